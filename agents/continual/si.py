"""Synaptic intelligence: weights that brought the loss down while they learned are held by a spring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.agents.continual.method import Method
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


class SI(Method):
    """Synaptic intelligence.

    ``omega_i`` is the part of weight ``i`` in the fall of the loss along the path of a task: with gradients ``g`` and steps
    ``delta`` of the optimiser, the sum of ``-g_i delta_i``. ``g`` is meant to be of the task's loss alone. What an update
    shows is the gradient with the spring's in it, so the spring's, which is known in closed form, is taken out again. (A
    spring counted as a task would make weights important for having been important.) The parts of other methods count as
    the task's. The path starts at the weights with which a task begins, and each weight has a path of its own, so several
    optimisers may move different weights at different times.
    """

    requires = frozenset({"boundaries"})
    paper = "Zenke, Poole & Ganguli 2017 (Continual Learning Through Synaptic Intelligence)"
    formula = (
        "loss + strength sum_i Omega_i (theta_i - theta*_i)^2, Omega_i = sum over tasks of "
        "max(omega_i, 0) / ((change of theta_i)^2 + xi), omega_i = sum over steps of -g_i delta_i"
    )
    state = ("importance", "anchor", "start", "path")

    @dataclass
    class Config:
        """Options.

        Args:
            strength: c.
            xi: damping: keeps the importance of weights that hardly moved finite.
        """

        strength: float = 1.0
        xi: float = 0.1

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")
            if not self.xi > 0:
                raise ConfigError(f"xi must be positive, got {self.xi}.")

    importance: list[Tensor] | None = None  # Omega
    anchor: list[Tensor] | None = None  # theta*
    start: list[Tensor] | None = None  # the weights with which the present task began
    path: list[Tensor] | None = None  # omega

    def start_task(self, task: TaskInfo) -> None:
        self.start = self.learner.values()
        self.path = [torch.zeros_like(p) for p in self.start]

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.importance is None or self.anchor is None:
            return base
        terms = zip(self.importance, self.learner.params, self.anchor, strict=True)
        return base + self.config.strength * sum((w * (p - a).square()).sum() for w, p, a in terms)

    def after_backward(self, params: Sequence[nn.Parameter]) -> None:
        self._step = {i: (self._task_gradient(i, p), p.detach().clone()) for i, p in self._moving(params)}

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        if self.path is not None:
            for i, p in self._moving(params):
                gradient, before = self._step[i]
                self.path[i].addcmul_(gradient, p - before, value=-1)

    def _moving(self, params: Sequence[nn.Parameter]) -> Iterator[tuple[int, nn.Parameter]]:
        """Those of ``params`` that have a gradient, with their places among all the agent trains."""
        place = {id(p): i for i, p in enumerate(self.learner.params)}
        return ((place[id(p)], p) for p in params if p.grad is not None and id(p) in place)

    def _task_gradient(self, i: int, p: nn.Parameter) -> Tensor:
        """The gradient without the spring's part."""
        assert p.grad is not None
        if self.importance is None or self.anchor is None:
            return p.grad.clone()
        return p.grad - 2 * self.config.strength * self.importance[i] * (p - self.anchor[i])

    def finish_task(self, batches: Iterator[Any]) -> None:
        assert self.start is not None and self.path is not None
        theta = self.learner.values()
        parts = zip(self.path, theta, self.start, strict=True)
        new = [w.clamp_min(0) / ((end - begin).square() + self.config.xi) for w, end, begin in parts]
        old = self.importance
        self.importance = new if old is None else [o + n for o, n in zip(old, new, strict=True)]
        self.anchor, self.start, self.path = theta, None, None
