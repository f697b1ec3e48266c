"""Receding-horizon control: plan, execute the first actions, plan again from where one has come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clbench.contracts import Objective, Planner, WorldModel
from clbench.errors import ConfigError, ContractError
from clbench.planners.bounds import ActionBounds
from clbench.planners.rollout import trajectories
from clbench.planners.sampling import Generator


class MPC:
    """Executes the plans of a planner, each environment on its own clock.

    The state of a control loop is its ``memory``, a dict of tensors with one row per environment: ``plan`` (B, H, A),
    ``cursor`` (B,) int64, the actions of it that have been executed, and ``planner``, the planner's own warm start. It can
    be copied, stored and indexed by row; nothing is kept in this object.

    Args:
        planner: one with ``start(envs, device)`` and ``shift(memory, steps)`` is warm-started from its last plan, shifted
            by the steps executed since, if that was followed; any other begins anew each time.
        replan_every: environment steps between two plans of an environment.
        escape: where the world model is wrong, a deterministic controller can repeat the same useless plan for ever, for
            example at the edge of a door. An environment whose latent has moved by less than this share of what its plan
            promised is stuck: it takes one random action of largest size for ``replan_every`` steps, and ``n`` times as
            long the n-th time in an episode (up to 8), before it is planned for again. 0 never does.
        bounds: allowed actions, for ``escape``; default: those of the planner.

    Raises:
        ConfigError: ``replan_every`` below 1, or above the planner's horizon (when called); ``escape`` outside of [0, 1).
    """

    def __init__(
        self, planner: Planner, *, replan_every: int = 1, escape: float = 0.0, bounds: ActionBounds | None = None
    ):  # fmt: skip
        if replan_every < 1:
            raise ConfigError(f"replan_every must be at least 1, got {replan_every}.")
        if not 0 <= escape < 1:
            raise ConfigError(f"escape must be in [0, 1), got {escape}.")
        self.planner: Any = planner
        self.replan_every = replan_every
        self.escape = escape
        self.bounds: Any = bounds or getattr(planner, "bounds", None)
        if escape and self.bounds is None:
            raise ConfigError("escape needs to know the bounds of the actions; give bounds.")
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
        before = memory
        if memory is None:
            warm = self.planner.start(len(first), z.device) if self._warm else None
            plan, warm = self._plan(model, z, objective, warm, rng)
            cursor = torch.zeros(len(first), dtype=torch.int64, device=z.device)
        elif bool(due.any()):
            plan, cursor, warm = self._replan(model, z, objective, memory, first, due, rng)
        else:
            plan, cursor, warm = memory["plan"], memory["cursor"], memory["planner"]
        action = plan[torch.arange(len(first), device=plan.device), cursor]
        memory = {"plan": plan, "cursor": cursor + 1, "planner": warm}
        if self.escape:
            last = None if before is None else before["escape"]
            action, memory["escape"] = self._escape(model, z, plan, action, last, first, due, rng)
        return action, memory

    def _escape(
        self, model: WorldModel, z: Tensor, plan: Tensor, action: Tensor, last: dict[str, Tensor] | None, first: Tensor,
        due: Tensor, rng: Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Actions in which the environments that are stuck are replaced, and the new state of all.

        ``origin`` (B, *latent) is where the last plan began, ``promise`` (B,) the squared distance it was to bring,
        ``times`` (B,) how often an episode was stuck, ``left`` (B,) steps of the escape that goes on, ``action`` (B, A),
        and ``escaping`` (B,) bool, whether that action is executed instead of the plan.
        """
        if last is None:
            count = torch.zeros(len(first), dtype=torch.int64, device=z.device)
            promise = torch.zeros(len(first), dtype=torch.float32, device=z.device)
            last = {"origin": z, "promise": promise, "times": count, "left": count, "action": action}
        moved = (z - last["origin"]).flatten(1).square().sum(1).float()
        stuck = due & ~first & (moved < self.escape**2 * last["promise"])
        times = last["times"].masked_fill(first, 0) + stuck
        left = torch.where(stuck, self.replan_every * times.clamp(max=8), last["left"].masked_fill(first, 0))
        away = torch.where(stuck[:, None], self._random_action(action, rng), last["action"])
        ahead = trajectories(model, z, plan[:, : self.replan_every])[:, -1]
        promise = torch.where(due, (ahead - z).flatten(1).square().sum(1).float(), last["promise"])
        promise = promise.masked_fill(left > 0, 0.0)  # no plan is executed, so none can be broken
        state = {
            "origin": _where(due, z, last["origin"]), "promise": promise, "times": times,
            "left": (left - 1).clamp(min=0), "action": away, "escaping": left > 0,
        }  # fmt: skip
        return torch.where((left > 0)[:, None], away, action), state

    def _random_action(self, like: Tensor, rng: Generator) -> Tensor:
        """Actions (B, A) of a random direction on the border of the bounds, one for all or one per generator."""
        generators = [rng] if isinstance(rng, torch.Generator) else rng
        size = like.shape[1]
        direction = torch.stack([torch.randn(size, generator=g, device=g.device) for g in generators]).to(like.device)
        bounds = self.bounds.to(like.device)
        reach = bounds.radius * direction / direction.abs().amax(1, keepdim=True).clamp(min=1e-6)
        return bounds.project(bounds.center + reach).expand(len(like), size)

    def _replan(
        self, model: WorldModel, z: Tensor, objective: Objective, memory: dict[str, Any], first: Tensor, due: Tensor,
        rng: Generator,
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Plan, cursor and warm start in which the rows that are due are new."""
        warm = memory["planner"]
        if self._warm:
            fresh = self.planner.start(len(first), z.device)
            moved = self.planner.shift(warm, memory["cursor"])
            # the last plan of an environment that escapes was not followed, so it says nothing about the next
            anew = first | (due & memory["escape"]["escaping"]) if "escape" in memory else first
            warm = {k: _where(anew, fresh[k], _where(due, moved[k], warm[k])) for k in fresh}
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
