"""Elastic weight consolidation: weights that the old tasks' outputs depend on are held by a spring.

*Which* Fisher information is estimated makes different methods of one name (van de Ven 2025), so it is an option with a
name: ``exact`` sums over all outputs, ``sampled`` draws them from the model, ``empirical`` takes the data's own, each as
the mean over samples of the squared gradient **per sample**; ``batch`` squares the mean gradient of a batch, as some
libraries do, which is something else (a batch of B gives about 1/B of the empirical one near an optimum).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.agents.continual.batches import rows, take
from clbench.agents.continual.method import Learner, Method
from clbench.errors import ConfigError

Fisher = Literal["exact", "sampled", "empirical", "batch"]


class EWC(Method):
    """Elastic weight consolidation, by default with labels sampled from the model."""

    requires = frozenset({"boundaries", "outputs", "batches"})
    paper = "Kirkpatrick et al. 2017; online: Schwarz et al. 2018 (Progress & Compress); one quadratic: Huszar 2018"
    formula = "loss + strength / 2 sum_i F_i (theta_i - theta*_i)^2, F_i = E_x E_y (d log p(y | x) / d theta_i)^2"
    state = ("fisher", "anchor")

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
            fisher: which estimate of the Fisher information.
            samples: of a task's data that it is estimated from.
            online: one Fisher that decays, anchored at the last task's weights, in place of the sum over tasks.
            decay: gamma of the online form.
        """

        strength: float = 100.0
        fisher: Fisher = "sampled"
        samples: int = 200
        online: bool = False
        decay: float = 0.9

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")
            if self.samples < 1:
                raise ConfigError(f"samples must be at least 1, got {self.samples}.")
            if not 0 <= self.decay <= 1:
                raise ConfigError(f"decay must be in [0, 1], got {self.decay}.")

    fisher: list[Tensor] | None = None
    anchor: list[Tensor] | None = None

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        if config.fisher in ("empirical", "batch") and learner.own_loss is None:
            raise ConfigError(
                f"fisher={config.fisher!r} needs a loss of a batch, which this agent hides; use 'sampled'."
            )
        if config.fisher == "empirical" and getattr(learner.agent, "loss_compares_rows", False):
            raise ConfigError(
                "the empirical Fisher is of the loss of single samples, and this agent's loss compares samples with each "
                "other; use 'sampled'."
            )

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.fisher is None or self.anchor is None:
            return base
        terms = zip(self.fisher, self.learner.params, self.anchor, strict=True)
        return base + 0.5 * self.config.strength * sum((f * (p - a).square()).sum() for f, p, a in terms)

    def finish_task(self, batches: Iterator[Any]) -> None:
        new = fisher_information(self.learner, batches, self.config.samples, self.config.fisher, self.rng)
        theta = self.learner.values()
        if self.fisher is None or self.anchor is None:
            self.fisher, self.anchor = new, theta
        elif self.config.online:
            self.fisher = [self.config.decay * f + n for f, n in zip(self.fisher, new, strict=True)]
            self.anchor = theta
        else:
            # the sum of the tasks' quadratics is one: sum_k F_k (theta - theta_k)^2 = F (theta - anchor)^2 + constant
            total = [f + n for f, n in zip(self.fisher, new, strict=True)]
            parts = zip(self.fisher, self.anchor, new, theta, total, strict=True)
            self.anchor = [torch.where(t > 0, (f * a + n * x) / t.clamp_min(1e-38), x) for f, a, n, x, t in parts]
            self.fisher = total


def fisher_information(
    learner: Learner, batches: Iterator[Any], samples: int, kind: Fisher, rng: torch.Generator
) -> list[Tensor]:
    """The diagonal of the Fisher information of the agent's outputs, one tensor per parameter.

    Args:
        learner: the agent.
        batches: draws of the data.
        samples: rows of it (of ``batch``: rounded up to whole batches).
        kind: see the module's docstring. ``empirical`` and ``batch`` differentiate the agent's loss.
        rng: draws the outputs of ``sampled``.
    """
    params = learner.params
    total = [torch.zeros_like(p) for p in params]

    def add(scalar: Tensor, weight: float | Tensor = 1.0) -> None:
        for t, g in zip(total, gradients(scalar, params), strict=True):
            if g is not None:
                t.add_(weight * g.square())

    done = 0
    while done < samples:
        batch = next(batches)
        if kind == "batch":
            done += rows(batch)
            add(learner.loss(batch), rows(batch))
            continue
        for i in range(min(rows(batch), samples - done)):
            one = take(batch, slice(i, i + 1))
            if kind == "empirical":
                add(learner.loss(one))
            else:
                outputs = learner.outputs(one)
                if kind == "sampled":
                    add(torch.stack([o.log_likelihood(o.sample(rng)).sum() for o in outputs]).sum())
                else:  # one pass back per number
                    numbers = sum(o.values.shape[1] for o in outputs)
                    learner.backward += (numbers - 1) * learner.samples(one)
                    for o in outputs:
                        if o.kind == "categorical":
                            log_p = torch.log_softmax(o.values, 1)[0]
                            for each in log_p:
                                add(each, each.detach().exp())
                        else:
                            for each in o.values[0]:
                                add(each)
            done += 1
    return [t / done for t in total]


def gradients(scalar: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of ``scalar`` by each parameter, None where it has no part; the graph is kept."""
    return torch.autograd.grad(scalar, params, retain_graph=True, allow_unused=True)


class OnlineEWC(EWC):
    """EWC with one decaying Fisher, anchored at the last task's weights: a state of fixed size by construction."""

    @dataclass
    class Config(EWC.Config):
        """Options: see :class:`EWC.Config`."""

        online: bool = True


class ExactEWC(EWC):
    """EWC with the exact Fisher information: the expectation over all outputs, for each sample."""

    @dataclass
    class Config(EWC.Config):
        """Options: see :class:`EWC.Config`."""

        fisher: Fisher = "exact"


class EmpiricalEWC(EWC):
    """EWC with the empirical Fisher information: squared gradients of the loss at the data's own labels, per sample."""

    requires = frozenset({"boundaries", "loss", "batches"})

    @dataclass
    class Config(EWC.Config):
        """Options: see :class:`EWC.Config`."""

        fisher: Fisher = "empirical"
