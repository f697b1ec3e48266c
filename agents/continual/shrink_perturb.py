"""Shrink and perturb: weights shrink and are stirred, so that the network stays able to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from clbench.agents.continual.compose import optimizers_of
from clbench.agents.continual.method import Learner, Method
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


class ShrinkPerturb(Method):
    """Shrink and perturb, after every update; with ``when="task"`` once at each boundary.

    The online form is the one that UPGD is compared with (Elsayed & Mahmood 2024), there with SGD: decay and noise are
    scaled by the optimiser's learning rate, whatever the optimiser. (Dohare et al. 2024 add noise whose size is independent
    of it.) At a boundary the fresh weights are those of a new agent, as in Ash & Adams, so each layer keeps its scale.

    ``when="task"`` does nothing on a stream that reveals no boundaries; ``shrink-perturb-task`` is refused there.
    """

    paper = "Ash & Adams 2020 (On Warm-Starting Neural Network Training); online: Elsayed & Mahmood 2024"
    formula = "theta <- (1 - lr decay) theta + lr sigma xi, xi ~ N(0, 1); or theta <- shrink theta + sigma theta_fresh"
    state = ("tasks",)

    @dataclass
    class Config:
        """Options.

        Args:
            when: after each ``step``, or at each boundary between two tasks (``task``).
            decay: of ``step``.
            shrink: of ``task``: what is left of the weights.
            sigma: of the noise (``step``), or of the fresh weights (``task``).
        """

        when: Literal["step", "task"] = "step"
        decay: float = 0.001
        shrink: float = 0.5
        sigma: float = 0.1

        def __post_init__(self) -> None:
            if self.when not in ("step", "task"):
                raise ConfigError(f"when must be 'step' or 'task', got {self.when!r}.")
            if not (self.decay >= 0 and self.sigma >= 0):
                raise ConfigError(f"decay and sigma must be at least 0, got {self.decay}, {self.sigma}.")
            if not 0 <= self.shrink <= 1:
                raise ConfigError(f"shrink must be in [0, 1], got {self.shrink}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.tasks = 0  # begun
        if config.when == "task":
            self.does = frozenset({"moves weights at boundaries"})

    def start_task(self, task: TaskInfo) -> None:
        self.tasks += 1
        if self.config.when == "step" or self.tasks == 1:
            return
        agent = self.learner.agent
        fresh = type(agent)(agent.spaces, agent.config, device=agent.device, rng=self.rng).trainables
        with torch.no_grad():
            for p, p0 in zip(self.learner.params, fresh, strict=True):
                p.mul_(self.config.shrink).add_(p0, alpha=self.config.sigma)

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        if self.config.when == "task":
            return
        rates = self._rates()
        draw = torch.randn(sum(p.numel() for p in params), generator=self.rng, device=self.rng.device).to(
            params[0].device
        )
        for p, noise in zip(params, draw.split([p.numel() for p in params]), strict=True):
            lr = rates[p]
            p.mul_(1 - lr * self.config.decay).add_(noise.view(p.shape), alpha=lr * self.config.sigma)

    def _rates(self) -> dict[nn.Parameter, float]:
        """Learning rates as they are now: agents may have schedules."""
        groups = [group for optimizer in optimizers_of(self.learner.agent) for group in optimizer.param_groups]
        return {p: float(group["lr"]) for group in groups for p in group["params"]}


class TaskShrinkPerturb(ShrinkPerturb):
    """Shrink and perturb once at each boundary between two tasks."""

    requires = frozenset({"boundaries"})
    formula = "theta <- shrink theta + sigma theta_fresh at each boundary, theta_fresh the weights of a new agent"

    @dataclass
    class Config(ShrinkPerturb.Config):
        """Options: see :class:`ShrinkPerturb.Config`."""

        when: Literal["step", "task"] = "task"
