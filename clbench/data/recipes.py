"""The published data sets as plain values: 23 of PLDM (Sobal et al. 2025, arXiv 2502.14819, appendix on data), and the 8 of
OGBench's point mazes (Park et al. 2025, arXiv 2410.20092).

Nothing heavy is imported here, so that a listing costs nothing; :mod:`clbench.data.published` makes the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FULL = 3_000_000  # transitions of the reference data: the figure of the paper (its released file has 3,686,400)
MAZE = 1_000_000
SIZES = (634, 1_269, 5_078, 20_312, 81_250, 325_000, 1_500_000)
STATES = (17, 33, 65)  # per trajectory; the reference data have 91
GOOD_SHARES = (0, 0.001, 0.01, 0.02, 0.04, 0.08, 0.16)
LAYOUTS = (5, 10, 20, 40)
OGBENCH = {  # trajectories x steps of each kind; giant mazes have longer ones
    "medium": {"navigate": (1000, 1000), "stitch": (5000, 200)},
    "large": {"navigate": (1000, 1000), "stitch": (5000, 200)},
    "giant": {"navigate": (500, 2000), "stitch": (5000, 200)},
    "teleport": {"navigate": (1000, 1000), "stitch": (5000, 200)},
}


@dataclass(frozen=True)
class Recipe:
    """One published data set.

    Args:
        name: its id without options.
        summary: for ``clbench list``.
        family: ``"two-rooms"``, ``"point-maze"`` or ``"ogbench-maze"``: what makes it and what its task is.
        settings: what sets it apart within the family.
    """

    name: str
    summary: str
    family: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attribute(self) -> str:
        """The function of :mod:`clbench.data.published` that makes it."""
        return re.sub(r"\W", "_", self.name)


def _recipes() -> list[Recipe]:
    found = [
        Recipe("two-rooms/good-v0", "Two-Rooms, 3 M transitions of random walks: the reference data", "two-rooms",
               {"transitions": FULL})
    ]  # fmt: skip
    found += [
        Recipe(f"two-rooms/length-{n}-v0", f"trajectories of {n} states instead of 91", "two-rooms",
               {"transitions": FULL, "steps": n - 1, "source": f"length-{n}"})
        for n in STATES
    ]  # fmt: skip
    found += [
        Recipe(f"two-rooms/size-{n}-v0", f"the first {n:,} transitions of two-rooms/good-v0", "two-rooms",
               {"transitions": n})
        for n in SIZES
    ]  # fmt: skip
    found += [
        Recipe(f"two-rooms/mix-{share}-v0", f"{100 * share:g} % good trajectories, the others of the random policy",
               "two-rooms", {"transitions": FULL, "good_share": share})
        for share in GOOD_SHARES
    ]  # fmt: skip
    found.append(
        Recipe("two-rooms/no-door-v0", "only good trajectories that do not pass the door", "two-rooms",
               {"transitions": FULL, "door": False, "source": "no-door"})
    )  # fmt: skip
    found += [
        Recipe(f"point-maze/{n}-layouts-v0", f"1 M random transitions in {n} maze layouts", "point-maze",
               {"transitions": MAZE, "layouts": n})
        for n in LAYOUTS
    ]  # fmt: skip
    found += [
        Recipe(f"ogbench-maze/{maze}-{kind}-v0", f"OGBench's pointmaze-{maze}-{kind}: {count:,} walks of {steps:,} steps",
               "ogbench-maze", {"transitions": count * steps, "maze": maze, "kind": kind, "trajectories": count,
                                "steps": steps})
        for maze, kinds in OGBENCH.items()
        for kind, (count, steps) in kinds.items()
    ]  # fmt: skip
    return found


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}
