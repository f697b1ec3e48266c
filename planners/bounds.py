"""What actions are allowed: a box, a cap on the norm, or both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clbench.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium

# samples that are broadcast over together: over the few dimensions of an action alone the innermost loop would be too short
TILE = 16


class ActionBounds:
    """The set ``{a : low <= a <= high, |a| <= max_norm}`` of actions in environment units.

    Args:
        low: lower bounds (A,); -inf is allowed where ``max_norm`` is given.
        high: upper bounds (A,).
        max_norm: largest Euclidean norm of an action; the box must then contain 0.

    Raises:
        ConfigError: empty, unbounded, or a norm cap on a box without 0.
    """

    def __init__(self, low: Any, high: Any, max_norm: float | None = None):
        low, high = (torch.as_tensor(b, dtype=torch.float64).cpu().flatten() for b in (low, high))
        if low.shape != high.shape or not len(low):
            raise ConfigError(
                f"low and high must have one number per action dimension, got {len(low)} and {len(high)}."
            )
        if not bool((low < high).all()):  # false for NaN too
            raise ConfigError(f"Each low must be below its high, got low={low.tolist()}, high={high.tolist()}.")
        if max_norm is None and not bool((low.isfinite() & high.isfinite()).all()):
            raise ConfigError(
                f"Planners need bounded actions, got low={low.tolist()}, high={high.tolist()}: give finite bounds or "
                "max_norm."
            )
        if max_norm is not None and not 0 < max_norm < float("inf"):
            raise ConfigError(f"max_norm must be positive and finite, got {max_norm}.")
        if max_norm is not None and not bool(((low <= 0) & (high >= 0)).all()):
            raise ConfigError(
                f"With max_norm the box must contain 0, because actions are shortened towards it; got low={low.tolist()}, "
                f"high={high.tolist()}."
            )
        self.low, self.high = _inwards(low, +1), _inwards(high, -1)
        self.max_norm = max_norm
        cap = float("inf") if max_norm is None else max_norm
        half = ((high - low) / 2).clamp(max=cap)
        self.radius = half.to(torch.float32)
        center = torch.where(low.isfinite() & high.isfinite(), (low + high) / 2, torch.zeros_like(low))
        self.center = self.project(center.to(torch.float32))

    @staticmethod
    def of(space: gymnasium.Space, max_norm: float | None = None) -> ActionBounds:
        """The bounds of a Gymnasium Box.

        Raises:
            ConfigError: the space is no Box, or unbounded without ``max_norm``.
        """
        low, high = getattr(space, "low", None), getattr(space, "high", None)
        if low is None or high is None:
            raise ConfigError(f"Planners need continuous actions (a Box), got {space}.")
        return ActionBounds(torch.from_numpy(low.copy()), torch.from_numpy(high.copy()), max_norm)

    @property
    def size(self) -> int:
        """``A``."""
        return len(self.low)

    @property
    def device(self) -> torch.device:
        return self.low.device

    def to(self, device: torch.device) -> ActionBounds:
        """The same bounds on ``device``."""
        if device == self.device:
            return self
        moved = object.__new__(ActionBounds)
        moved.max_norm = self.max_norm
        for name in ("low", "high", "radius", "center"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def project(self, actions: Tensor) -> Tensor:
        """The actions (..., A), clamped to the box and then shortened to the norm cap; float32 rounding stays inside."""
        actions = torch.minimum(torch.maximum(actions, self.low), self.high)
        return actions if self.max_norm is None else actions * self._shrink(actions)

    def project_(self, actions: Tensor) -> Tensor:
        """:meth:`project` in place, for contiguous actions (..., A)."""
        repeats = math.gcd(actions.numel() // self.size, TILE)
        wide = actions.view(-1, repeats * self.size)
        torch.clamp(wide, self.low.repeat(repeats), self.high.repeat(repeats), out=wide)
        return actions if self.max_norm is None else actions.mul_(self._shrink(actions))

    def _shrink(self, actions: Tensor) -> Tensor:
        """Factors (..., 1) that bring the norm to the cap, less what rounding can add to it."""
        assert self.max_norm is not None
        cap = self.max_norm * (1 - (self.size + 8) * 2.0**-23)
        return (cap / torch.linalg.vector_norm(actions, dim=-1, keepdim=True)).clamp_(max=1.0)


def _inwards(bound: Tensor, sign: int) -> Tensor:
    """float64 bounds as float32 that are never outside of them."""
    rounded = bound.to(torch.float32)
    outside = (rounded.double() - bound) * sign < 0
    return torch.where(outside, torch.nextafter(rounded, torch.full_like(rounded, sign * float("inf"))), rounded)
