"""The cross-entropy method: Rubinstein and Kroese 2004; as a planner of learned models Chua et al. 2018 (PETS)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clbench.errors import ConfigError
from clbench.planners.sampling import SamplingConfig, SamplingPlanner, State, elites


@dataclass
class CEMConfig(SamplingConfig):
    """Options of CEM, besides those of all sampling planners.

    Args:
        elites: cheapest candidates to which the Gaussian is fitted.
        momentum: weight of the old mean and standard deviation.
        min_std: floor of the standard deviation, in units of the radius of the action bounds.
    """

    elites: int = 64
    momentum: float = 0.1
    min_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.elites <= self.samples:
            raise ConfigError(f"elites must be between 2 and samples ({self.samples}), got {self.elites}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {self.momentum}.")
        if not 0 <= self.min_std <= self.std:
            raise ConfigError(f"min_std must be between 0 and std ({self.std}), got {self.min_std}.")


class CEM(SamplingPlanner):
    """The next Gaussian is fitted to the cheapest candidates, independently per step and action dimension."""

    Config = CEMConfig
    config: CEMConfig

    def update(self, state: State, candidates: Tensor, costs: Tensor) -> State:
        best = elites(candidates, costs, self.config.elites)
        mean, std = refit(best, state["mean"], state["std"], self.config.momentum)
        return {"mean": mean, "std": std.maximum(self.config.min_std * self.bounds.radius)}


def refit(best: Tensor, mean: Tensor, std: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation (B, T, A) of elites (T, B, n, A), with ``momentum`` of the old ones."""
    new_mean, new_std = (m.transpose(0, 1) for m in (best.mean(2), best.std(2, correction=0)))
    return new_mean.lerp(mean, momentum), new_std.lerp(std, momentum)
