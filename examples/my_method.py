from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench import Method, TaskInfo


class SlowOldWeights(Method):
    """Weights move less with every task: gradients are divided by ``1 + slowdown * finished tasks``."""

    requires = frozenset({"boundaries"})
    paper = "an example"
    formula = "g <- g / (1 + slowdown k) in task k = 0, 1, ..."
    state = ("tasks",)  # attributes that checkpoints hold

    @dataclass
    class Config:
        """Options.

        Args:
            slowdown: per finished task.
        """

        slowdown: float = 1.0

    tasks = -1

    def start_task(self, task: TaskInfo) -> None:
        self.tasks += 1

    def after_backward(self, params: Sequence[nn.Parameter]) -> None:
        gradients: list[Tensor] = [p.grad for p in params if p.grad is not None]
        torch._foreach_div_(gradients, 1 + self.config.slowdown * max(self.tasks, 0))
