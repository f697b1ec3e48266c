"""Conformance checks for planners, on a toy world whose latent is moved by the action: ``z' = z + a``."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clbench.contracts import Planner
from clbench.rng import get_global_state, sealed_global_rng, torch_generator
from clbench.testing.core import Checks, Failed, NotApplicable, Report, clone, difference, run_checks

PLANNER_CHECKS: Checks = Checks()
PLANS = "plan returns actions (B, H, A)"


class LinearWorld:
    """World model whose latent (..., 2) is moved by an action (..., 2)."""

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        return z + action


class Watched(LinearWorld):
    """Remembers the actions it has been asked about."""

    def __init__(self) -> None:
        self.actions: list[Tensor] = []

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        self.actions.append(action.detach().reshape(-1, action.shape[-1]).clone())
        return super().predict(z, action)


class NaNWorld(LinearWorld):
    """Gives NaN where the first coordinate is above 0.3: for some of the latents of a case, and not at once for others."""

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        z = z + action
        return torch.where(z[..., :1] > 0.3, torch.nan, z)


def distance_to_corner(z: Tensor, step: int) -> Tensor:
    """Squared distance of latents (..., 2) to the point (0.5, 0.5), of every step."""
    return ((z - 0.5) ** 2).sum(-1)


@dataclasses.dataclass
class Case:
    """One planner; ``make`` gives a fresh one."""

    make: Callable[[], Planner]
    action_size: int
    tolerance: float

    def latents(self, batch: int) -> Tensor:
        return torch.rand(batch, 2, generator=torch_generator(0, "testing", "latents")) * 0.4

    def far_apart(self) -> Tensor:
        """Latents (4, 2) around the target in four directions, so that each needs a plan of its own."""
        return 0.5 + 2 * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]) + self.latents(4)

    def plan(
        self, z: Tensor, memory: Any = None, seed: int = 0, planner: Planner | None = None,
        world: LinearWorld | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        rng = torch_generator(seed, "testing", "plan")
        answer = (planner or self.make()).plan(world or LinearWorld(), z, distance_to_corner, memory, rng=rng)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise Failed(f"plan returned a {type(answer).__name__}; return the pair (actions, memory).")
        return answer

    def costs(self, z: Tensor, actions: Tensor) -> Tensor:
        """Mean cost per step (B,) of action sequences (B, H, 2)."""
        return distance_to_corner(z[:, None] + actions.cumsum(1), 0).mean(1)


def check_planner(planner: Planner | Callable[[], Planner], *, action_size: int = 2, tolerance: float = 0.2) -> Report:
    """Run every planner check on a planner, or a class that can be made without arguments.

    Args:
        planner: the planner (used for all checks), or what makes a fresh one.
        action_size: must be 2, the size of the toy world's actions, for the planner that is made.
        tolerance: allowed difference of the mean cost per step of a row planned alone and in a batch, as a share of what
            it would cost more to follow the plans of the other rows.
    """
    make: Callable[[], Any] = planner if isinstance(planner, type) or not hasattr(planner, "plan") else lambda: planner  # type: ignore[assignment]
    report = Report(f"planner {getattr(planner, '__name__', type(planner).__name__)}")
    with sealed_global_rng():
        plugin = planner if isinstance(planner, type) else type(planner)
        report.results += run_checks(PLANNER_CHECKS, Case(make, action_size, tolerance), "", plugin)
    return report


@PLANNER_CHECKS.add(PLANS)
def _plans(case: Case) -> str | None:
    for batch in (1, 3):
        actions, memory = case.plan(case.latents(batch))
        for _ in range(2):
            if not isinstance(actions, Tensor) or actions.ndim != 3 or actions.shape[::2] != (batch, case.action_size):
                got = tuple(actions.shape) if isinstance(actions, Tensor) else type(actions).__name__
                raise Failed(
                    f"plan returned actions {got}, expected ({batch}, H, {case.action_size}): one row per latent, one "
                    "column per step of the horizon."
                )
            if not bool(torch.isfinite(actions).all()):
                raise Failed("plan returned NaN or infinite actions; clamp them to the action bounds.")
            actions, memory = case.plan(case.latents(batch), memory)
    return None


@PLANNER_CHECKS.add("the same generator state gives the same plan", needs=PLANS)
def _deterministic(case: Case) -> str | None:
    before, planner = get_global_state(), case.make()
    z = case.latents(3)
    first = case.plan(z, planner=planner)[0].clone()
    case.plan(case.latents(3) + 1, seed=1, planner=planner)
    if difference(first, case.plan(z, planner=planner)[0]):
        raise Failed(
            "plan answers the same question differently the second time; keep state in memory and draw only from rng."
        )
    if difference(before, get_global_state()):
        raise Failed("plan used a process-wide generator; pass generator=rng.")
    return None


@PLANNER_CHECKS.add("plan does not change its inputs", needs=PLANS)
def _inputs(case: Case) -> str | None:
    z = case.latents(3)
    _, memory = case.plan(z)
    before = clone({"z": z, "memory": memory})
    case.plan(z, memory)
    changed = next((k for k, v in {"z": z, "memory": memory}.items() if difference(before[k], v)), None)
    if changed:
        raise Failed(f"plan changed its argument {changed!r} in place; work on a copy ({changed}.clone()).")
    return None


@PLANNER_CHECKS.add("a plan does not depend on the other rows of the batch", needs=PLANS)
def _rows(case: Case) -> str | None:
    z = case.far_apart()
    together = case.costs(z, case.plan(z)[0])
    plans = torch.cat([case.plan(z[i : i + 1])[0] for i in range(4)])
    costs = torch.stack([case.costs(z, plan.expand_as(plans)) for plan in plans], 1)  # of each row with each row's plan
    alone = costs.diagonal()
    allowed = case.tolerance * ((costs.sum(1) - alone) / 3 - alone).clamp(min=0) + 1e-5 * alone
    differs = (together - alone).abs()
    row = int((differs - allowed).argmax())
    if bool(differs[row] > allowed[row]):
        raise Failed(
            f"row {row} planned alone and in a batch of 4 differs in mean cost by {float(differs[row]):.3g} (allowed: "
            f"{float(allowed[row]):.3g}); rank and update samples within each row, never across rows."
        )
    return None


@PLANNER_CHECKS.add("candidates and plans stay within the action bounds", needs=PLANS)
def _bounds(case: Case) -> str | None:
    planner, world = case.make(), Watched()
    bounds: Any = getattr(planner, "bounds", None)
    if bounds is None or not all(hasattr(bounds, name) for name in ("low", "high")):
        raise NotApplicable("The planner has no attribute bounds with low and high (A,).")
    plan, _ = case.plan(case.latents(3) - 5, planner=planner, world=world)  # far away, so that it pays to go too far
    for what, actions in (("returned", plan.reshape(-1, case.action_size)), ("tried", torch.cat(world.actions))):
        outside = ((actions < bounds.low) | (actions > bounds.high)).any(1)
        cap = getattr(bounds, "max_norm", None)
        outside |= False if cap is None else actions.double().norm(dim=1) > cap
        if bool(outside.any()):
            raise Failed(
                f"plan {what} an action outside of its bounds, {actions[outside][0].tolist()}; project candidates before "
                "they are rolled out, since what they cost outside says nothing."
            )
    return None


@PLANNER_CHECKS.add("a world model that gives NaN does not break the plan", needs=PLANS)
def _survives_nan(case: Case) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a planner may well say that costs were replaced
        memory = None
        for seed in range(2):
            actions, memory = case.plan(case.latents(3), memory, seed=seed, world=NaNWorld())
            if not bool(torch.isfinite(actions).all()):
                raise Failed(
                    "plan returned NaN or infinite actions after some sequences cost NaN; replace costs that are not "
                    "finite by the worst of their row."
                )
    return None
