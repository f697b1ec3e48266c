"""Distances of latents that obey the triangle inequality but need not be symmetric."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def union_lengths(x: Tensor, y: Tensor) -> Tensor:
    """Length of the union of the intervals ``[x_i, max(x_i, y_i)]``: (..., k), (..., k) -> (...).

    From left to right, each interval adds what lies beyond the furthest end so far.
    """
    left, order = torch.sort(x, dim=-1)
    right = torch.maximum(x, y).gather(-1, order)
    furthest = torch.cummax(right, dim=-1).values
    covered = torch.maximum(left[..., 1:], furthest[..., :-1])
    return (right[..., 0] - left[..., 0]) + torch.relu(right[..., 1:] - covered).sum(-1)


class IQE(nn.Module):
    """Interval quasimetric embedding (Wang & Isola 2022, arXiv 2211.15120), maximum and mean of its groups mixed.

    Args:
        groups: of the latent; D must be a multiple.
    """

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups
        self.alpha = nn.Parameter(torch.zeros(()))  # sigmoid(alpha) is the share of the mean

    def forward(self, x: Tensor, y: Tensor, *, frozen: bool = False) -> Tensor:
        """(B, D), (B, D) -> (B,)."""
        parts = union_lengths(*(v.unflatten(-1, (self.groups, -1)) for v in (x, y)))
        share = torch.sigmoid(self.alpha.detach() if frozen else self.alpha)
        return share * parts.mean(-1) + (1 - share) * parts.amax(-1)


class MRN(nn.Module):
    """Metric residual network (Liu et al. 2023, arXiv 2208.08133): a norm of one half, a maximum of the other."""

    def forward(self, x: Tensor, y: Tensor, *, frozen: bool = False) -> Tensor:
        """(B, D), (B, D) -> (B,)."""
        symmetric, asymmetric = (x - y).chunk(2, -1)
        distance = symmetric.square().sum(-1).clamp(min=1e-12).sqrt()
        return distance + torch.relu(asymmetric.amax(-1))
