"""L2 init: every weight is drawn back to where it began, so that it stays where it can learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.method import Learner, Method
from clbench.errors import ConfigError


class L2Init(Method):
    """Regularisation towards the initial weights. It needs no boundaries."""

    paper = (
        "Kumar, Marklund & Van Roy 2023 (Maintaining Plasticity in Continual Learning via Regenerative Regularization)"
    )
    formula = "loss + strength |theta - theta_0|^2, theta_0 the initial weights"
    state = ("initial",)

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
        """

        strength: float = 1e-3

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.rebuilt()

    def rebuilt(self) -> None:
        self.initial = self.learner.values()

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        distance = [(p - p0).square().sum() for p, p0 in zip(self.learner.params, self.initial, strict=True)]
        return base + self.config.strength * sum(distance)
