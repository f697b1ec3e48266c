"""Model predictive path integral control: Williams et al. 2017, "Information theoretic MPC for model-based reinforcement
learning"; the variant of PLDM (arXiv 2502.14819), which brings the candidates into the bounds before it rolls them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clbench.errors import ConfigError, unknown_name
from clbench.planners.sampling import SamplingConfig, SamplingPlanner, State


class MPPI(SamplingPlanner):
    """The new mean is the average of all candidates, weighted by ``exp(-cost / temperature)``."""

    @dataclass
    class Config(SamplingConfig):
        """Options of MPPI, besides those of all sampling planners.

        Args:
            temperature: of the weights; PLDM has 0.005 on Two-Rooms and 0.0025 on mazes.
            temperature_scale: ``"none"`` takes the temperature as it is, in units of the cost; ``"std"`` in units of the
                standard deviation of an environment's costs, which makes it independent of the scale of the latents.
            std_decay: factor on the standard deviation after each iteration; 1 keeps the noise.
            control_cost: weight of the path integral's action cost ``temperature * sum_t U_t^T Sigma^-1 (V_t - U_t)``; 1 in
                the original, 0 leaves it out.
        """

        temperature: float = 0.1
        temperature_scale: Literal["none", "std"] = "std"
        std_decay: float = 1.0
        control_cost: float = 0.0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not (self.temperature > 0 and math.isfinite(self.temperature)):
                raise ConfigError(f"temperature must be positive and finite, got {self.temperature}.")
            if self.temperature_scale not in ("none", "std"):
                raise unknown_name("value of temperature_scale", str(self.temperature_scale), ("none", "std"))
            if not 0 < self.std_decay <= 1:
                raise ConfigError(f"std_decay must be in (0, 1], got {self.std_decay}.")
            if not self.control_cost >= 0:
                raise ConfigError(f"control_cost must be at least 0, got {self.control_cost}.")

    config: Config

    def update(self, state: State, candidates: Tensor, costs: Tensor) -> State:
        config = self.config
        if config.control_cost:
            costs = costs + config.control_cost * config.temperature * control_cost(
                candidates, state["mean"].transpose(0, 1), state["std"].transpose(0, 1)
            )
        scale = costs.std(1, keepdim=True, correction=0).clamp(min=1e-12) if config.temperature_scale == "std" else 1.0
        weight = weights(costs / scale, config.temperature)
        mean = torch.einsum("bk,tbka->bta", weight, candidates)
        return {"mean": mean, "std": state["std"] * config.std_decay}


def weights(costs: Tensor, temperature: float) -> Tensor:
    """``exp(-(cost - min cost) / temperature)`` of each row (B, K), summing to 1."""
    return torch.softmax(-costs / temperature, dim=1)


def control_cost(candidates: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``sum_t U_t^T Sigma^-1 (V_t - U_t)`` (B, K) of candidates V (T, B, K, A), mean U and deviations (T, B, A)."""
    factor = mean / std.square()
    return torch.einsum("tba,tbka->bk", factor, candidates) - (factor * mean).sum((0, 2))[:, None]
