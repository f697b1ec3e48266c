"""Dark experience replay++: remembered rows are trained on, and give the outputs that they gave when they were stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.batches import rows, take
from clbench.agents.continual.memory import Memory, check_sizes
from clbench.agents.continual.method import Learner, Method
from clbench.agents.networks.outputs import Output
from clbench.errors import ConfigError


class DERpp(Method):
    """Dark experience replay++; needs no boundaries.

    Outputs (logits, before the softmax) are stored as they are before the update on their row, as in the paper. They cost a
    forward pass of their own, of those rows only that the reservoir keeps. The squared distance is averaged over rows and
    outputs, as in the authors' code; the paper's formula sums over outputs.
    """

    requires = frozenset({"loss", "outputs"})
    paper = "Buzzega et al. 2020 (Dark Experience for General Continual Learning)"
    formula = "loss + alpha mean (h(x') - z')^2 + beta loss(x'', y''); (x', z') and (x'', y'') drawn from the memory"

    @dataclass
    class Config:
        """Options.

        Args:
            memory: rows that are kept.
            batch_size: rows per sample of the memory (there are two per update); 0: as many as the batch has.
            alpha: weight of the outputs' distance; 0 leaves it out.
            beta: weight of the loss on remembered rows; 0 leaves it out, which is DER.
        """

        memory: int = 200
        batch_size: int = 0
        alpha: float = 0.5
        beta: float = 0.5

        def __post_init__(self) -> None:
            check_sizes(self.memory, self.batch_size)
            if not (self.alpha >= 0 and self.beta >= 0):
                raise ConfigError(f"alpha and beta must be at least 0, got {self.alpha} and {self.beta}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.memory = Memory(config.memory, device=learner.device)

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        count = self.config.batch_size or rows(batch)
        if len(self.memory) and self.config.alpha > 0:
            remembered, stored = self.memory.sample(count, self.rng)
            base = base + self.config.alpha * distance(self.learner.outputs(remembered), stored)
        if len(self.memory) and self.config.beta > 0:
            remembered, _ = self.memory.sample(count, self.rng)
            base = base + self.config.beta * self.learner.loss(remembered)
        self._remember(batch)
        return base

    @torch.no_grad()
    def _remember(self, batch: Any) -> None:
        slots, kept = self.memory.offer(rows(batch), self.rng)
        if len(kept):
            new = take(batch, kept)
            self.memory.put(slots, (new, self.learner.outputs(new)))

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])


def distance(outputs: tuple[Output, ...], stored: tuple[Output, ...]) -> Tensor:
    """Mean squared distance of values, summed over the agent's outputs."""
    terms = [(new.values - old.values).square().mean() for new, old in zip(outputs, stored, strict=True)]
    return torch.stack(terms).sum()
