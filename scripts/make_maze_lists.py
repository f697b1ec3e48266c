"""Make clbench/streams/lists/point_maze_v1.json: frozen layouts and trials of the Diverse PointMaze.

40 training layouts (the first 5 are the paper's, so 5, 10, 20 and 40 are nested), 40 held-out ones, and 5 layouts for each
smallest edit distance 1 to 8 to the paper's five, drawn uniformly from all layouts that the generator can give. A trial is
a start, the centre of a free cell, and a goal in the middle half of another free cell that is at least 5 steps away (3
where the layout has no such pair). Run once; the list is shipped, so results stay comparable whatever becomes of the
generator. A test checks that the script still gives the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clbench.rng import derive_seed, numpy_generator
from clbench.streams.maze_layouts import (
    BUCKETS,
    PUBLISHED,
    SIDE,
    all_layouts,
    distance_to_published,
    far_pairs,
    generate_layouts,
    layout_code,
    path_lengths,
)

PATH = Path(__file__).resolve().parents[1] / "clbench" / "streams" / "lists" / "point_maze_v1.json"
NAME = "point-maze-v1"
TRAINING, HELD_OUT = 40, 40
TRIALS, TRIALS_HELD_OUT, TRIALS_BUCKET = 50, 2, 4  # per layout
BUCKET_LAYOUTS = 5


def trials(layouts: Sequence[str], each: int, *names: str | int) -> dict:
    """``each`` trials on every layout; coordinates rounded to 1e-3."""
    rng = numpy_generator(0, NAME, *names)
    columns: dict[str, list] = {"seeds": [], "layout": [], "start": [], "goal": []}
    for layout in layouts:
        pairs = far_pairs(layout_code(layout))
        for pair in pairs[rng.integers(len(pairs), size=each)]:
            (top, left), (goal_top, goal_left) = (divmod(int(cell), SIDE) for cell in pair)
            offset = rng.uniform(0.25, 0.75, 2)
            columns["seeds"].append(derive_seed(0, NAME, *names, len(columns["seeds"])) >> 32)
            columns["layout"].append(layout)
            columns["start"].append([left + 0.5, top + 0.5])
            columns["goal"].append([round(goal_left + float(offset[0]), 3), round(goal_top + float(offset[1]), 3)])
    return columns


def content() -> dict:
    """What the file holds."""
    rng = numpy_generator(0, NAME, "layouts")
    training = [*PUBLISHED, *generate_layouts(TRAINING - len(PUBLISHED), rng, exclude=PUBLISHED)]
    heldout = generate_layouts(HELD_OUT, rng, exclude=training)
    known = all_layouts()
    distance = distance_to_published(known)
    buckets = []
    for wanted in BUCKETS:
        choice = np.flatnonzero(distance == wanted)
        layouts = PUBLISHED if wanted == 0 else [known[i] for i in rng.choice(choice, BUCKET_LAYOUTS, False)]
        buckets.append(trials(layouts, TRIALS_BUCKET, "distance", wanted))
    return {
        "version": 1,
        "name": NAME,
        "training": training,
        "heldout": heldout,
        "trials": {
            "training": [trials([layout], TRIALS, "training", i) for i, layout in enumerate(training)],
            "heldout": trials(heldout, TRIALS_HELD_OUT, "heldout"),
            "buckets": buckets,
        },
    }


def main() -> None:
    data = content()
    PATH.write_text(json.dumps(data) + "\n")
    found = Counter(distance_to_published(all_layouts()).tolist())
    print(f"{PATH.name}: {len(data['training'])} training and {len(data['heldout'])} held-out layouts")
    print(f"layouts that the generator can give, by smallest edit distance: {dict(sorted(found.items()))}")
    for name, part in (("held-out", data["trials"]["heldout"]), *enumerate(data["trials"]["buckets"])):
        steps = Counter()
        for layout, start, goal in zip(part["layout"], part["start"], part["goal"], strict=True):
            cells = [int(p[1]) * SIDE + int(p[0]) for p in (start, goal)]
            steps[int(path_lengths(layout_code(layout))[cells[0], cells[1]])] += 1
        print(f"trials {name}: {sum(steps.values())}, by steps apart {dict(sorted(steps.items()))}")


if __name__ == "__main__":
    main()
