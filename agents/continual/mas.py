"""Memory aware synapses: weights to which the network's outputs are sensitive are held by a spring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.batches import rows, take
from clbench.agents.continual.method import Learner, Method
from clbench.errors import ConfigError


class MAS(Method):
    """Memory aware synapses: needs outputs, but neither labels nor a loss.

    ``f`` are all numbers that the agent puts out for a sample, one after the other: logits of a classifier, means of a
    policy, latents of a world model.
    """

    requires = frozenset({"boundaries", "outputs", "batches"})
    paper = "Aljundi et al. 2018 (Memory Aware Synapses: Learning what (not) to forget)"
    formula = (
        "loss + strength / 2 sum_i Omega_i (theta_i - theta*_i)^2, Omega_i = sum over tasks of "
        "E_x |d |f(x)|^2 / d theta_i|"
    )
    state = ("importance", "anchor")

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
            samples: of a task's data that the importance is estimated from.
        """

        strength: float = 1.0
        samples: int = 200

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")
            if self.samples < 1:
                raise ConfigError(f"samples must be at least 1, got {self.samples}.")

    importance: list[Tensor] | None = None  # Omega
    anchor: list[Tensor] | None = None  # theta*

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.importance is None or self.anchor is None:
            return base
        terms = zip(self.importance, self.learner.params, self.anchor, strict=True)
        return base + 0.5 * self.config.strength * sum((w * (p - a).square()).sum() for w, p, a in terms)

    def finish_task(self, batches: Iterator[Any]) -> None:
        new = sensitivity(self.learner, batches, self.config.samples)
        old = self.importance
        self.importance = new if old is None else [o + n for o, n in zip(old, new, strict=True)]
        self.anchor = self.learner.values()


def sensitivity(learner: Learner, batches: Iterator[Any], samples: int) -> list[Tensor]:
    """``E_x |d |f(x)|^2 / d theta|``, one tensor per parameter. Absolute values are taken per sample: those of a batch's
    mean would cancel where samples pull in different directions.

    Args:
        learner: the agent.
        batches: draws of the data.
        samples: rows of it.
    """
    params = learner.params
    total = [torch.zeros_like(p) for p in params]
    done = 0
    while done < samples:
        batch = next(batches)
        for i in range(min(rows(batch), samples - done)):
            outputs = learner.outputs(take(batch, slice(i, i + 1)))
            length = torch.stack([o.values.square().sum() for o in outputs]).sum()
            for t, g in zip(total, torch.autograd.grad(length, params, allow_unused=True), strict=True):
                if g is not None:
                    t.add_(g.abs())
            done += 1
    return [t / done for t in total]
