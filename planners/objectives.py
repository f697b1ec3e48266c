"""What a plan costs: functions of the predicted latents, summed over the steps of the horizon.

An objective is any callable ``(z (B, K, *latent), step) -> cost (B, K)``, where ``step`` counts from 1, the state after the
first action. Where it holds data per environment, such as goals, a method ``select(rows)`` that returns the objective of
these environments lets the rollout take them block by block.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.contracts import Objective
from clbench.errors import ConfigError, unknown_name

Rows = slice | Tensor


class GoalDistance:
    """Squared latent distance to a goal, averaged over features (and ensemble members): ``mean_d (z_d - goal_d)^2``.

    With ``reduce="sum"`` every step of the horizon counts, as in PLDM (arXiv 2502.14819, planning objective); with
    ``"last"`` only the last.

    Args:
        goal: encoded goals (B, *latent).
        reduce: which steps count.
        horizon: the last step, for ``reduce="last"``: the horizon of the planner.
        features: picks the part of a latent (..., *latent) in which the distance is taken, for example without velocities.
        sign: 1 approaches the goal, -1 avoids it; a number or one per environment (B,).

    Raises:
        ConfigError: an unknown ``reduce``, or ``"last"`` without a horizon.
    """

    def __init__(
        self, goal: Tensor, *, reduce: Literal["sum", "last"] = "sum", horizon: int | None = None,
        features: Callable[[Tensor], Tensor] | None = None, sign: float | Tensor = 1.0,
    ):  # fmt: skip
        if reduce not in ("sum", "last"):
            raise unknown_name("value of reduce", str(reduce), ("sum", "last"))
        if reduce == "last" and (horizon is None or horizon < 1):
            raise ConfigError(
                f"reduce='last' needs the horizon of the planner (a positive number of steps), got {horizon}."
            )
        self.goal, self.features, self.sign = goal, features, sign
        self.reduce: Literal["sum", "last"] = reduce
        self.horizon = horizon if reduce == "last" else None
        self._prepare()

    def _prepare(self) -> None:
        self._target = (self.goal if self.features is None else self.features(self.goal))[:, None]
        self._scale = self.sign / math.prod(self._target.shape[2:])
        if isinstance(self._scale, Tensor):
            self._scale = self._scale.to(self.goal.device, torch.float32).view(-1, 1)
        self._difference: Tensor | None = None  # kept between steps, so that a step needs no fresh memory

    def _with(self, goal: Tensor, sign: float | Tensor) -> GoalDistance:
        other = copy.copy(self)
        other.goal, other.sign = goal, sign
        other._prepare()
        return other

    def __call__(self, z: Tensor, step: int) -> Tensor:
        if self.horizon is not None and step != self.horizon:
            return z.new_zeros(z.shape[:2], dtype=torch.float32)
        z = z if self.features is None else self.features(z)
        axes = tuple(range(2, z.ndim))
        if torch.is_grad_enabled():
            return (z - self._target).square().sum(axes) * self._scale
        if self._difference is None or self._difference.shape != z.shape:
            self._difference = torch.empty(z.shape, dtype=self._target.dtype, device=z.device)
        difference = torch.sub(z, self._target, out=self._difference)
        return torch.linalg.vector_norm(difference, dim=axes).square_().mul_(self._scale)

    def select(self, rows: Rows) -> GoalDistance:
        """The objective of some environments."""
        sign = self.sign[rows] if isinstance(self.sign, Tensor) and self.sign.ndim else self.sign
        return self._with(self.goal[rows], sign)

    def clone(self) -> GoalDistance:
        """The same with tensors of its own."""
        sign = self.sign.clone() if isinstance(self.sign, Tensor) else self.sign
        return self._with(self.goal.clone(), sign)

    def tensors(self) -> list[Tensor]:
        """What differs between plans; what is equal in :meth:`key` may share a recorded iteration."""
        return [self._target, *([self._scale] if isinstance(self._scale, Tensor) else [])]

    def key(self) -> tuple[Any, ...]:
        """Holds ``None`` for a subclass, of whose data nothing is known here."""
        kind = GoalDistance if type(self) is GoalDistance else None
        scale = self._scale if isinstance(self._scale, float) else "per environment"
        return (kind, self.horizon or "all steps", self.features or "all features", scale)


class Uncertainty:
    """Disagreement of an ensemble: ``weight * discount^step * sum_d Var_e(z_{e,d})`` with the population variance.

    Latents are (B, K, E, ...): the first latent axis are the members. PLDM (arXiv 2502.14819 v2) has weight 1e-4 and
    discount 0.9 on Two-Rooms.

    Raises:
        ConfigError: (when called) latents without a member axis.
    """

    def __init__(self, weight: float = 1e-4, discount: float = 0.9):
        if not 0 <= discount <= 1:
            raise ConfigError(f"The discount of the uncertainty must be in [0, 1], got {discount}.")
        self.weight, self.discount = weight, discount

    def __call__(self, z: Tensor, step: int) -> Tensor:
        if z.ndim < 4:
            raise ConfigError(
                f"Uncertainty needs latents with a member axis (B, K, E, D), got {tuple(z.shape)}: use a world model with "
                "an ensemble, or leave the uncertainty out."
            )
        variance = z.float().var(dim=2, correction=0)
        return variance.flatten(2).sum(-1).mul(self.weight * self.discount**step)

    def select(self, rows: Rows) -> Uncertainty:
        return self

    def clone(self) -> Uncertainty:
        return self

    def tensors(self) -> list[Tensor]:
        return []

    def key(self) -> tuple[Any, ...]:
        return (Uncertainty if type(self) is Uncertainty else None, self.weight, self.discount)


class Sum:
    """The sum of objectives."""

    def __init__(self, *parts: Objective):
        if not parts:
            raise ConfigError("Sum needs at least one objective.")
        self.parts = parts

    def __call__(self, z: Tensor, step: int) -> Tensor:
        total = self.parts[0](z, step)
        for part in self.parts[1:]:
            total = total + part(z, step)
        return total

    @property
    def horizon(self) -> int | None:
        """The step that some part is waiting for."""
        return max((h for h in (getattr(p, "horizon", None) for p in self.parts) if h is not None), default=None)

    @property
    def select(self) -> Callable[[Rows], Sum] | None:
        """``None`` where a part cannot be taken apart."""
        parts = [getattr(p, "select", None) for p in self.parts]
        return None if None in parts else lambda rows: Sum(*(select(rows) for select in parts if select))

    def clone(self) -> Sum:
        return Sum(*(p.clone() for p in self.parts))  # type: ignore[attr-defined]

    def tensors(self) -> list[Tensor]:
        return [t for p in self.parts for t in p.tensors()]  # type: ignore[attr-defined]

    def key(self) -> tuple[Any, ...]:
        """Holds ``None`` where a part has no key, and the sum cannot be recorded."""
        return (Sum, *(k for p in self.parts for k in (p.key() if hasattr(p, "key") else (None,))))  # type: ignore[attr-defined]
