"""What an agent computes for a batch, as a distribution: what continual methods protect, distil and store."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Output(NamedTuple):
    """``B`` distributions.

    Args:
        kind: ``categorical`` (``values`` are logits) or ``gaussian`` (means, with unit variance).
        values: (B, n).
    """

    kind: Literal["categorical", "gaussian"]
    values: Tensor

    def detach(self) -> Output:
        return Output(self.kind, self.values.detach())

    def take(self, rows: Tensor) -> Output:
        return Output(self.kind, self.values[rows])

    def sample(self, rng: torch.Generator) -> Tensor:
        """A draw per row: (B,) int64 classes, or (B, n) numbers."""
        values = self.values.detach()
        if self.kind == "categorical":
            return torch.multinomial(torch.softmax(values, 1), 1, generator=rng)[:, 0]
        return values + torch.randn(values.shape, generator=rng, device=rng.device)

    def log_likelihood(self, target: Tensor) -> Tensor:
        """``log p(target)`` (B,), up to a constant."""
        if self.kind == "categorical":
            return -functional.cross_entropy(self.values, target, reduction="none")
        return -0.5 * (target - self.values).square().sum(1)

    def divergence(self, old: Output, temperature: float = 1.0) -> Tensor:
        """``KL(old || self)`` (B,); of categorical ones at ``temperature``."""
        if self.kind == "categorical":
            p, q = (functional.log_softmax(o.values / temperature, 1) for o in (old, self))
            return (p.exp() * (p - q)).sum(1)
        return 0.5 * (self.values - old.values).square().sum(1)
