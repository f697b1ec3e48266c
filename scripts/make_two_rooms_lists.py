"""Make clbench/streams/lists/two_rooms_v1.json: the frozen evaluation episodes of the stream two-rooms-doors.

For each layout, 100 pairs of start and goal in different rooms (the "medium" sampling of PLDM), drawn by hashing fixed
seeds. Run once; the list is shipped, so results stay comparable whatever becomes of the sampling code. A test checks that
the script still gives the file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from clbench.envs.two_rooms import make_layout, sample_start_goal
from clbench.rng import derive_seed, hash_seeds, hash_uniform

PATH = Path(__file__).resolve().parents[1] / "clbench" / "streams" / "lists" / "two_rooms_v1.json"
EPISODES = 100
LAYOUTS = [(32.0, 10.0), (24.0, 46.0), (42.0, 24.0), (20.0, 32.0), (38.0, 54.0)]  # (wall_x, door_y); PLDM's own first


def content() -> dict:
    """What the file holds: coordinates in pixels, rounded to 1e-3."""
    layouts = []
    for number, (wall_x, door_y) in enumerate(LAYOUTS):
        base = torch.full((EPISODES,), derive_seed(0, "two-rooms-v1", number), dtype=torch.int64)
        seeds = hash_seeds(base, torch.arange(EPISODES))
        points = sample_start_goal(hash_uniform(seeds, 0, 5), make_layout(wall_x, door_y))
        start, goal = ([[round(v, 3) for v in p] for p in column.t().tolist()] for column in points)
        layouts.append({"wall_x": wall_x, "door_y": door_y, "seeds": seeds.tolist(), "start": start, "goal": goal})
    return {"version": 1, "name": "two-rooms-v1", "layouts": layouts}


def main() -> None:
    data = content()
    PATH.write_text(json.dumps(data) + "\n")
    print(f"{PATH.name}: {len(LAYOUTS)} layouts with {EPISODES} episodes each")


if __name__ == "__main__":
    main()
