"""Random shooting: the cheapest of action sequences that are drawn uniformly (Nagabandi et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clbench.errors import ConfigError
from clbench.planners.sampling import SamplingConfig, SamplingPlanner, State, elites


@dataclass
class RandomShootingConfig(SamplingConfig):
    """Options of random shooting; ``std`` is half the width of the uniform distribution, in units of the radius."""

    iterations: int = 1
    std: float = 1.0
    returns: Literal["mean", "best"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.color:
            raise ConfigError(f"Random shooting draws without correlation in time; color must be 0, got {self.color}.")
        if self.returns != "best":
            raise ConfigError(
                f"Random shooting does not move its mean, so it would ignore the world model; returns must be 'best', got "
                f"{self.returns!r}."
            )


class RandomShooting(SamplingPlanner):
    """Draws around the centre of the bounds; with a warm start the last plan competes."""

    Config = RandomShootingConfig
    config: RandomShootingConfig

    def kept(self) -> int:
        return 1

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device).mul_(2).sub_(1)

    def update(self, state: State, candidates: Tensor, costs: Tensor) -> State:
        return {"mean": state["mean"], "std": state["std"], "kept": elites(candidates, costs, 1).permute(1, 2, 0, 3)}
