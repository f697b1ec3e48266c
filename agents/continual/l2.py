"""L2 anchor: stay near the weights with which the last task ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clbench.agents.continual.method import Method
from clbench.errors import ConfigError


class L2(Method):
    """L2 anchor: all weights are equally important (EWC with the identity in place of the Fisher information)."""

    requires = frozenset({"boundaries"})
    paper = "the baseline of Kirkpatrick et al. 2017; Smith et al. 2023 (A Closer Look at Rehearsal-Free CL)"
    formula = "loss + strength / 2 |theta - theta*|^2, theta* the weights at the end of the last task"
    state = ("anchor",)

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
        """

        strength: float = 0.1

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")

    anchor: list[Tensor] | None = None

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.anchor is None:
            return base
        distance = [(p - a).square().sum() for p, a in zip(self.learner.params, self.anchor, strict=True)]
        return base + 0.5 * self.config.strength * sum(distance)

    def finish_task(self, batches: Iterator[Any]) -> None:
        self.anchor = self.learner.values()
