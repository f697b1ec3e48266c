"""Receding-horizon control: plan, execute the first actions, plan again from where one has come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clbench.contracts import Objective, Planner, WorldModel
from clbench.errors import ConfigError, ContractError
from clbench.planners.sampling import Generator


class MPC:
    """Executes the plans of a planner, each environment on its own clock.

    The state of a control loop is its ``memory``, a dict of tensors with one row per environment: ``plan`` (B, H, A),
    ``cursor`` (B,) int64, the actions of it that have been executed, and ``planner``, the planner's own warm start. It can
    be copied, stored and indexed by row; nothing is kept in this object.

    Args:
        planner: one with ``start(envs, device)`` and ``shift(memory, steps)`` is warm-started from its last plan, shifted
            by the steps executed since; any other begins anew each time.
        replan_every: environment steps between two plans of an environment.

    Raises:
        ConfigError: ``replan_every`` below 1, or above the planner's horizon (when called).
    """

    def __init__(self, planner: Planner, *, replan_every: int = 1):
        if replan_every < 1:
            raise ConfigError(f"replan_every must be at least 1, got {replan_every}.")
        self.planner: Any = planner
        self.replan_every = replan_every
        self._warm = hasattr(planner, "start") and hasattr(planner, "shift")

    def due(self, memory: dict[str, Any] | None, first: Tensor) -> Tensor:
        """The environments (B,) bool that the next :meth:`act` plans for; only their latents are looked at.

        Raises:
            ContractError: a memory of another number of environments.
        """
        if memory is None:
            return torch.ones_like(first)
        if len(memory["cursor"]) != len(first):
            raise ContractError(
                f"The memory is of {len(memory['cursor'])} environments, but {len(first)} are to act; pass None to "
                "begin anew."
            )
        return first | (memory["cursor"] >= self.replan_every)

    def act(
        self, model: WorldModel, z: Tensor, objective: Objective, memory: dict[str, Any] | None, first: Tensor, *,
        rng: Generator,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Latents (B, *latent) -> (actions (B, A), memory); changes none of its arguments.

        On a CPU only the environments that are due are planned for, where the objective can ``select`` them; on a GPU all
        are, and the others keep their plan, so that the shapes stay the same.

        Args:
            model: the world model.
            z: encoded observations.
            objective: of these environments.
            memory: ``None`` at first, then what the last call returned.
            first: (B,) bool, rows that begin an episode.
            rng: one generator, or one per environment.
        """
        due = self.due(memory, first)
        if memory is None:
            warm = self.planner.start(len(first), z.device) if self._warm else None
            plan, warm = self._plan(model, z, objective, warm, rng)
            cursor = torch.zeros(len(first), dtype=torch.int64, device=z.device)
        elif bool(due.any()):
            plan, cursor, warm = self._replan(model, z, objective, memory, first, due, rng)
        else:
            plan, cursor, warm = memory["plan"], memory["cursor"], memory["planner"]
        action = plan[torch.arange(len(first), device=plan.device), cursor]
        return action, {"plan": plan, "cursor": cursor + 1, "planner": warm}

    def _replan(
        self, model: WorldModel, z: Tensor, objective: Objective, memory: dict[str, Any], first: Tensor, due: Tensor,
        rng: Generator,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Plan, cursor and warm start in which the rows that are due are new."""
        warm = memory["planner"]
        if self._warm:
            fresh = self.planner.start(len(first), z.device)
            moved = self.planner.shift(warm, memory["cursor"])
            warm = {k: _where(first, fresh[k], _where(due, moved[k], warm[k])) for k in fresh}
        select = getattr(objective, "select", None)
        rows = due.nonzero()[:, 0] if z.device.type == "cpu" and select is not None and not bool(due.all()) else None
        if rows is None or select is None:
            plan, new = self._plan(model, z, objective, warm, rng)
        else:
            some = {k: v[rows] for k, v in warm.items()} if self._warm else None
            generators = rng if isinstance(rng, torch.Generator) else [rng[i] for i in rows.tolist()]
            some_plan, some_new = self._plan(model, z[rows], select(rows), some, generators)
            plan = memory["plan"].index_copy(0, rows, some_plan)
            new = {k: warm[k].index_copy(0, rows, v) for k, v in some_new.items()} if self._warm else None
        plan = _where(due, plan, memory["plan"])
        new = {k: _where(due, new[k], warm[k]) for k in new} if self._warm and new is not None else None
        return plan, memory["cursor"].masked_fill(due, 0), new

    def _plan(
        self, model: WorldModel, z: Tensor, objective: Objective, warm: Any, rng: Generator
    ) -> tuple[Tensor, Any]:
        plan, warm = self.planner.plan(model, z, objective, warm, rng=rng)
        if plan.shape[1] < self.replan_every:
            raise ConfigError(
                f"replan_every={self.replan_every} needs plans of as many steps, but the planner's horizon is "
                f"{plan.shape[1]}."
            )
        return plan, warm if self._warm else None


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(mask.view(-1, *[1] * (yes.ndim - 1)), yes, no)
