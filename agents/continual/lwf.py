"""Learning without forgetting: on the new task's data, the outputs stay near those of the old network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.method import Learner, Method
from clbench.agents.networks.outputs import Output
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


class LwF(Method):
    """Distillation from the network as it was at the last boundary, on the present batch; nothing of the past is stored.

    With one output layer all its outputs are held, those of classes that are still to come included. An agent with a head
    per task (``heads`` > 1, batches with ``task``) is distilled through the head of each finished task, and the terms are
    summed, as in the paper; without task ids there is no telling the heads apart, so the stream must reveal them.

    The paper's loss is the cross-entropy with the old outputs at temperature T, which has the gradient of the divergence.
    The factor T^2 keeps gradients of one size whatever T is (Hinton et al. 2015). Gaussian outputs (latents, continuous
    actions) have no temperature: half their squared distance.
    """

    requires = frozenset({"boundaries", "outputs", "loss"})
    paper = "Li & Hoiem 2016 (Learning without Forgetting); Hinton et al. 2015 (distillation)"
    formula = "loss + strength T^2 mean_x KL(p_old(. | x; T) || p(. | x; T)), x of the present batch"
    state = ("old", "finished", "now")

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
            temperature: T, of categorical outputs.
        """

        strength: float = 1.0
        temperature: float = 2.0

        def __post_init__(self) -> None:
            if not (self.strength >= 0 and self.temperature > 0):
                raise ConfigError(
                    f"strength must be at least 0 and temperature positive, got {self.strength} and {self.temperature}."
                )

    old: list[Tensor] | None = None
    now: int | None = None

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.finished: list[int] = []
        self.heads = getattr(getattr(learner.agent, "config", None), "heads", 1) > 1

    def start_task(self, task: TaskInfo) -> None:
        self.now = task.id

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.old is None:
            return base
        for asked in self._as_old_tasks(batch):
            with self.learner.holding(self.old):
                old = self.learner.outputs(asked)
            for output, was in zip(self.learner.outputs(asked), old, strict=True):
                base = base + self.config.strength * distillation(output, was, self.config.temperature)
        return base

    def _as_old_tasks(self, batch: Any) -> list[Any]:
        """The batch, once for each output layer that has something to remember."""
        if not self.heads or getattr(batch, "task", None) is None:
            return [batch]
        ids = [k for k in self.finished if k != self.now]
        return [dataclasses.replace(batch, task=torch.full_like(batch.task, k)) for k in ids]

    def finish_task(self, batches: Iterator[Any]) -> None:
        self.old = self.learner.values()
        if self.now is not None and self.now not in self.finished:
            self.finished.append(self.now)


def distillation(output: Output, old: Output, temperature: float) -> Tensor:
    """``T^2`` times the mean divergence at temperature ``T``; of Gaussians, half the mean squared distance."""
    if output.kind == "gaussian":
        return output.divergence(old).mean()
    return temperature**2 * output.divergence(old, temperature).mean()
