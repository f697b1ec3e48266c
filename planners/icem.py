"""iCEM: Pinneri et al. 2020, "Sample-efficient cross-entropy method for real-time planning"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clbench.errors import ConfigError
from clbench.planners.cem import CEMConfig, refit
from clbench.planners.sampling import SamplingPlanner, State, elites


@dataclass
class ICEMConfig(CEMConfig):
    """Options of iCEM, besides those of CEM; ``color`` is the paper's beta.

    Args:
        keep: share of the elites that are candidates again in the next iteration and, shifted, in the next plan.
        decay: factor by which the number of samples falls per iteration, not below twice the elites; 1 keeps it.
    """

    std: float = 1.0
    elites: int = 20
    color: float = 3.0
    returns: Literal["mean", "best"] = "mean"
    keep: float = 0.3
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.keep <= 1:
            raise ConfigError(f"keep must be in [0, 1], got {self.keep}.")
        if not self.decay >= 1:
            raise ConfigError(f"decay must be at least 1, got {self.decay}.")


class ICEM(SamplingPlanner):
    """CEM with noise of a power-law spectrum, elites that are kept and the mean as a candidate."""

    Config = ICEMConfig
    config: ICEMConfig

    def samples_of(self, iteration: int) -> int:
        fewest = min(self.config.samples, 2 * self.config.elites)
        return max(fewest, math.floor(self.config.samples / self.config.decay**iteration))

    def kept(self) -> int:
        return round(self.config.keep * self.config.elites) + 1

    def update(self, state: State, candidates: Tensor, costs: Tensor) -> State:
        best = elites(candidates, costs, self.config.elites)
        mean, std = refit(best, state["mean"], state["std"], self.config.momentum)
        kept = torch.cat([mean[:, None], best[:, :, : self.kept() - 1].permute(1, 2, 0, 3)], 1)
        return {"mean": mean, "std": std.maximum(self.config.min_std * self.bounds.radius), "kept": kept}
