"""Make the frozen evaluation episodes of Two-Rooms, in clbench/streams/lists/.

two_rooms_v1.json, for the stream two-rooms-doors: for each layout, 100 pairs of start and goal in different rooms (the
"medium" sampling of PLDM). two_rooms_chase_v1.json, for two-rooms-chase: 100 pairs of agent and chaser, sampled likewise in
PLDM's layout. All are drawn by hashing fixed seeds. Run once; the lists are shipped, so results stay comparable whatever
becomes of the sampling code. Tests check that the script still gives the files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from clbench.envs.two_rooms import make_layout, sample_start_goal
from clbench.rng import derive_seed, hash_seeds, hash_uniform

FOLDER = Path(__file__).resolve().parents[1] / "clbench" / "streams" / "lists"
EPISODES = 100
LAYOUTS = [(32.0, 10.0), (24.0, 46.0), (42.0, 24.0), (20.0, 32.0), (38.0, 54.0)]  # (wall_x, door_y); PLDM's own first


def pairs(name: str, number: int, wall_x: float, door_y: float) -> tuple[list, list, list]:
    """Seeds, and points in different rooms: coordinates in pixels, rounded to 1e-3."""
    base = torch.full((EPISODES,), derive_seed(0, name, number), dtype=torch.int64)
    seeds = hash_seeds(base, torch.arange(EPISODES))
    points = sample_start_goal(hash_uniform(seeds, 0, 5), make_layout(wall_x, door_y))
    first, second = ([[round(v, 3) for v in p] for p in column.t().tolist()] for column in points)
    return seeds.tolist(), first, second


def content() -> dict:
    """What two_rooms_v1.json holds."""
    layouts = []
    for number, (wall_x, door_y) in enumerate(LAYOUTS):
        seeds, start, goal = pairs("two-rooms-v1", number, wall_x, door_y)
        layouts.append({"wall_x": wall_x, "door_y": door_y, "seeds": seeds, "start": start, "goal": goal})
    return {"version": 1, "name": "two-rooms-v1", "layouts": layouts}


def chase_content() -> dict:
    """What two_rooms_chase_v1.json holds."""
    wall_x, door_y = LAYOUTS[0]
    seeds, start, chaser = pairs("two-rooms-chase-v1", 0, wall_x, door_y)
    return {
        "version": 1, "name": "two-rooms-chase-v1", "wall_x": wall_x, "door_y": door_y, "seeds": seeds, "start": start,
        "chaser": chaser,
    }  # fmt: skip


def main() -> None:
    for name, data in (("two_rooms_v1.json", content()), ("two_rooms_chase_v1.json", chase_content())):
        (FOLDER / name).write_text(json.dumps(data) + "\n")
        print(f"{name}: {EPISODES} episodes per layout")


if __name__ == "__main__":
    main()
