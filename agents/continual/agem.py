"""A-GEM: a step must not raise the loss on rows of the past, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.agents.continual.batches import rows
from clbench.agents.continual.memory import Memory, check_sizes
from clbench.agents.continual.method import Learner, Method
from clbench.contracts import TaskInfo


class AGEM(Method):
    """Averaged gradient episodic memory.

    The memory is a reservoir of each task, shared equally among them. It is filled while a task is learned, but only rows
    of *earlier* tasks constrain the step, as in the paper: those of the present one agree with the gradient anyway.

    What is projected is the gradient that the optimiser would use, with the parts of all methods in the loss;
    ``g_ref`` is of the agent's own loss.
    """

    requires = frozenset({"boundaries", "loss"})
    paper = "Chaudhry et al. 2019 (Efficient Lifelong Learning with A-GEM)"
    formula = "g - (g . g_ref / g_ref . g_ref) g_ref where g . g_ref < 0; g_ref the gradient on rows of earlier tasks"

    @dataclass
    class Config:
        """Options.

        Args:
            memory: rows that are kept.
            batch_size: rows per update that ``g_ref`` is computed on; 0: as many as the batch has.
        """

        memory: int = 200
        batch_size: int = 0

        def __post_init__(self) -> None:
            check_sizes(self.memory, self.batch_size)

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.memory = Memory(config.memory, "task", learner.device)
        self.size = 0  # rows of the present batch
        self.steps = self.projected = 0  # since the last report

    def start_task(self, task: TaskInfo) -> None:
        self.memory.start_group()

    def replay(self, batch: Any) -> None:
        self.size = rows(batch)
        self.memory.add(batch, self.rng)

    def after_backward(self, params: Sequence[nn.Parameter]) -> None:
        past = self.memory.sample(self.config.batch_size or self.size, self.rng, past=True)
        if past is None:
            return
        with torch.enable_grad():
            reference = torch.autograd.grad(self.learner.loss(past), params, allow_unused=True)
        reference = [torch.zeros_like(p) if g is None else g for p, g in zip(params, reference, strict=True)]
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        projection = project(gradient, reference)
        self.steps += 1
        if projection is not None:
            self.projected += 1
            for p, g in zip(params, projection, strict=True):
                p.grad = g

    def metrics(self) -> dict[str, float]:
        """Share of the steps since the last report that were projected."""
        share = self.projected / max(1, self.steps)
        self.steps = self.projected = 0
        return {"agem_projected": share}

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict(), "steps": self.steps, "projected": self.projected}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.steps, self.projected = int(state["steps"]), int(state["projected"])


def project(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor] | None:
    """The vector nearest to ``gradient`` that has no negative product with ``reference``; None: it is itself.

    Both are one vector each, over all parameters together.
    """
    product = sum(((g * r).sum() for g, r in zip(gradient, reference, strict=True)), torch.zeros(()))
    if not product < 0:
        return None
    norm = sum((r.square().sum() for r in reference), torch.zeros(()))
    return [g - (product / norm) * r for g, r in zip(gradient, reference, strict=True)]
