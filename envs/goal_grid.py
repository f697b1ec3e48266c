"""What an environment of points in the plane may offer beside the protocol, so that reports can draw maps over it.

Optional methods of a batched environment::

    goal_grid(row=0) -> GoalGrid               the free positions of a row, and what is observed there
    points() -> (agent (B, 2), goal (B, 2))    where agents and goals are, in the same coordinates
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GoalGrid(NamedTuple):
    """Free positions on a lattice.

    The lattice is so fine that no wall fits between two of its neighbours.

    Attributes:
        positions: (N, 2) float32.
        observations: what an agent at rest there observes, (N, ...) each; without the desired goal.
        extent: coordinates of the edges of the environment's pictures: left, right, bottom, top.
    """

    positions: Tensor
    observations: dict[str, Tensor]
    extent: tuple[float, float, float, float]


def lattice(coordinates: Tensor) -> Tensor:
    """All points whose coordinates are among (n,) -> (2, n * n)."""
    return torch.cartesian_prod(coordinates, coordinates).t().contiguous()
