"""Behaviour cloning of one's own past: on stored rows, the outputs stay near those that the network had for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.batches import concat, pack, rows, take, unpack
from clbench.agents.continual.method import Method
from clbench.errors import ConfigError


class CLEAR(Method):
    """Behaviour cloning on rows of finished tasks: CLEAR's policy cloning, at the boundary, as ClonEx does it.

    At the end of a task ``samples`` rows are stored with the network's outputs, beside those of earlier tasks. CLEAR itself
    needs no boundary, clones value estimates too, and replays with an off-policy correction: that part belongs to an
    actor-critic and is left out. ClonEx's exploration by the old policies is left out, too.

    Works with agents that hide their loss.
    """

    requires = frozenset({"boundaries", "outputs", "batches"})
    paper = "Rolnick et al. 2019 (Experience Replay for Continual Learning); Wolczyk et al. 2022 (ClonEx-SAC)"
    formula = "loss + strength mean_x KL(p_then(. | x) || p(. | x)), x of the rows stored at boundaries"

    @dataclass
    class Config:
        """Options.

        Args:
            strength: lambda.
            samples: rows stored per task.
            batch_size: rows drawn of them per update.
        """

        strength: float = 1.0
        samples: int = 200
        batch_size: int = 64

        def __post_init__(self) -> None:
            if not self.strength >= 0:
                raise ConfigError(f"strength must be at least 0, got {self.strength}.")
            if self.samples < 1 or self.batch_size < 1:
                raise ConfigError(
                    f"samples and batch_size must be at least 1, got {self.samples} and {self.batch_size}."
                )

    stored: Any = None  # (rows, outputs)

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        if self.stored is None:
            return base
        drawn = torch.rand(rows(self.stored), generator=self.rng, device=self.rng.device)
        old_rows, old = take(self.stored, drawn.topk(min(self.config.batch_size, len(drawn))).indices)
        new = self.learner.outputs(old_rows)
        return base + self.config.strength * sum(n.divergence(o).mean() for n, o in zip(new, old, strict=True))

    @torch.no_grad()
    def finish_task(self, batches: Iterator[Any]) -> None:
        parts = [] if self.stored is None else [self.stored]
        missing = self.config.samples
        while missing:
            batch = next(batches)
            batch = take(batch, slice(0, min(missing, rows(batch))))
            parts.append((batch, self.learner.outputs(batch)))
            missing -= rows(batch)
        self.stored = concat(parts)

    def state_dict(self) -> dict[str, Any]:
        return {"stored": pack(self.stored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stored = unpack(state["stored"], self.learner.device)
