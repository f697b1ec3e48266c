"""ReDo: units that hardly ever speak are made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clbench.agents.continual.method import Learner
from clbench.agents.continual.units import UnitMethod
from clbench.errors import ConfigError


class ReDo(UnitMethod):
    """Recycling of dormant hidden units. It needs no boundaries.

    Every ``every`` updates a unit whose score is at most ``tau`` gets fresh incoming weights and no outgoing ones, and the
    optimiser forgets its moments. The means are over all rows of the updates since the last check, so batches of one row
    are enough. Renewing a unit that never spoke changes no output, unless a LayerNorm follows the activation.

    Raises:
        ConfigError: the agent has no hidden units that :mod:`clbench.agents.continual.units` finds.
    """

    paper = "Sokar et al. 2023 (The Dormant Neuron Phenomenon in Deep Reinforcement Learning)"
    formula = "unit i is renewed if E|h_i| / mean_k E|h_k| <= tau, k over its layer"
    state = ("updates", "dormant", "renewed")

    @dataclass
    class Config:
        """Options.

        Args:
            every: updates between two checks.
            tau: threshold of the score.
        """

        every: int = 1000
        tau: float = 0.1

        def __post_init__(self) -> None:
            if self.every < 1:
                raise ConfigError(f"every must be at least 1, got {self.every}.")
            if not self.tau >= 0:
                raise ConfigError(f"tau must be at least 0, got {self.tau}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        layers = len(self.activity.hiddens)
        self.updates = [0] * layers  # of each layer, since its last check
        self.dormant = [0.0] * layers  # share of its units, at its last check
        self.renewed = 0

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        for place in self.places(params):
            self.updates[place] += 1
            if self.updates[place] % self.config.every:
                continue
            self.updates[place] = 0
            means = self.activity.take(place)
            if means is None:
                continue
            asleep = self.score(means[0]) <= self.config.tau
            self.dormant[place] = asleep.to(torch.float32).mean().item()
            if self.dormant[place]:
                self.activity.hiddens[place].renew(asleep, self.rng, self.optimizers)
                self.renewed += int(asleep.sum())

    @staticmethod
    def score(size: torch.Tensor) -> torch.Tensor:
        """Means of ``|h|`` (E, n) -> the same over the mean of the layer; 0 in a layer that is silent altogether."""
        return size / size.mean(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)

    def metrics(self) -> dict[str, float]:
        """``redo_dormant``: share of all units at their last checks; ``redo_renewed``: units so far."""
        sizes = [h.shape[0] * h.shape[1] for h in self.activity.hiddens]
        share = sum(d * n for d, n in zip(self.dormant, sizes, strict=True)) / sum(sizes)
        return {"redo_dormant": share, "redo_renewed": float(self.renewed)}
