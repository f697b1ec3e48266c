"""Continual backpropagation: a small stream of the least useful units is made anew, all the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.agents.continual.method import Learner
from clbench.agents.continual.units import Hidden, UnitMethod
from clbench.errors import ConfigError


class CBP(UnitMethod):
    """Continual backpropagation. It needs no boundaries.

    Of the units of a layer older than ``maturity`` updates, a share ``rho`` per update is renewed (fractions add up until
    they make a unit): those of the smallest utility get fresh incoming weights and no outgoing ones, utility and age begin
    anew, and the optimiser forgets its moments. What a unit gave on average is added to the biases behind it, so that the
    outputs do not jump. That, and the correction of utility and mean by ``1 - eta^age``, are from memory of the authors'
    code; their Adam also counts steps per weight, this one does not. Where a LayerNorm follows the activation no bias is
    corrected, and utilities are of what goes into the norm.

    Raises:
        ConfigError: the agent has no hidden units that :mod:`clbench.agents.continual.units` finds.
    """

    paper = "Dohare et al. 2024 (Loss of Plasticity in Deep Continual Learning, Nature)"
    formula = "u <- eta u + (1 - eta) |h| sum |w_out|; of units of age > m, rho per update with the least u are renewed"
    state = ("utility", "mean", "age", "due", "renewed")

    @dataclass
    class Config:
        """Options.

        Args:
            rho: replacement rate, per unit and update.
            maturity: m, updates for which a new unit is left alone.
            decay: eta.
        """

        rho: float = 1e-4
        maturity: int = 100
        decay: float = 0.99

        def __post_init__(self) -> None:
            if not 0 <= self.rho <= 1:
                raise ConfigError(f"rho must be in [0, 1], got {self.rho}.")
            if self.maturity < 0:
                raise ConfigError(f"maturity must be at least 0, got {self.maturity}.")
            if not 0 <= self.decay < 1:
                raise ConfigError(f"decay must be in [0, 1), got {self.decay}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        hiddens = self.activity.hiddens
        self.utility = [h.zeros() for h in hiddens]
        self.mean = [h.zeros() for h in hiddens]
        # on the CPU: which units are old is known without the data
        self.age = [torch.zeros(h.shape, dtype=torch.int64) for h in hiddens]
        self.due = [torch.zeros(h.shape[0], dtype=torch.float64) for h in hiddens]
        self.renewed = 0

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        for place in self.places(params):
            means = self.activity.take(place)
            if means is None:  # the layer had no part in this loss
                continue
            hidden = self.activity.hiddens[place]
            size, value = means
            leaving = torch.stack([part.of(part.parameter).abs().sum(-1) for part in hidden.outgoing]).sum(0)
            self.utility[place].lerp_(size * leaving, 1 - self.config.decay)
            self.mean[place].lerp_(value, 1 - self.config.decay)
            self.age[place] += 1
            old = self.age[place] > self.config.maturity
            self.due[place] += self.config.rho * old.sum(-1)
            for member in (self.due[place] >= 1).nonzero()[:, 0].tolist():
                self._renew(hidden, place, member, old[member])

    def _renew(self, hidden: Hidden, place: int, member: int, old: Tensor) -> None:
        """The least useful of the units ``old`` (n,) of one member, as many as are due."""
        count = int(self.due[place][member])
        self.due[place][member] -= count
        correction = (1 - self.config.decay ** self.age[place].double()).to(self.utility[place])
        utility = self.utility[place][member] / correction[member].clamp_min(1e-12)
        worst = utility.masked_fill(~old.to(utility.device), torch.inf).argsort(stable=True)[
            : min(count, int(old.sum()))
        ]
        units = torch.zeros(hidden.shape, dtype=torch.bool, device=utility.device)
        units[member, worst] = True
        if not hidden.normed:
            hidden.hand_over(units, self.mean[place] / correction.clamp_min(1e-12))
        hidden.renew(units, self.rng, self.optimizers)
        self.utility[place][units] = 0.0
        self.mean[place][units] = 0.0
        self.age[place][units.cpu()] = 0
        self.renewed += len(worst)

    def metrics(self) -> dict[str, float]:
        """``cbp_renewed``: units so far."""
        return {"cbp_renewed": float(self.renewed)}
