"""PackNet: each task gets some of the weights, which no later task may change.

A task first trains all weights that nobody owns, on top of those of earlier tasks. Then it keeps the largest of them, gives
the others back (they become 0) and trains those it kept for the rest of its phase. To act on a task, the network is used as
it was at the end of it: with the weights of this task and of earlier ones, and zeros elsewhere.

* **Shares.** Of ``T`` tasks the ``k``-th keeps ``1 / (T - k + 1)`` of what is still free of every weight tensor, the
  largest by absolute value. What is given back starts the next task at 0, as in the paper; new random values were no
  better (permuted digits: 89.5 against 90.6 % with zeros, two seeds).
* **Output layers** of one task each (``bc`` with several ``heads``) belong to it as a whole.
* **Biases and norms** belong to the first task that trains them, as in the paper (see :func:`is_matrix`).
* **Parameters without a gradient** during a task (other tasks' output layers) are left as they are and stay free.
* **A task that comes again** changes nothing, since later tasks may be built on its weights.

Only parameters are protected. Numbers that an agent keeps beside them (statistics of a normaliser) must not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.agents.continual.method import Method
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


class PackNet(Method):
    """PackNet. Outputs on a task that is over never change, bit for bit."""

    requires = frozenset({"boundaries", "task_id"})
    last = True  # whatever other methods do to owned weights is undone
    excludes = {"moves weights at boundaries": "weights that finished tasks own must stay as they are"}
    paper = "Mallya & Lazebnik 2018 (PackNet: Adding Multiple Tasks to a Single Network by Iterative Pruning)"
    formula = (
        "network of task k: theta_i if owner_i <= k, else 0; it owns the largest 1 / (T - k + 1) of the free weights"
    )
    state = ("order", "now", "owner", "matrix", "trained", "packed")

    @dataclass
    class Config:
        """Options.

        Args:
            tasks: T, how many tasks there is room for.
            prune_at: share of a phase's updates after which the task gives weights back.
        """

        tasks: int = 10
        prune_at: float = 0.5

        def __post_init__(self) -> None:
            if not 1 <= self.tasks <= 255:
                raise ConfigError(f"tasks must be from 1 to 255, got {self.tasks}.")
            if not 0 < self.prune_at <= 1:
                raise ConfigError(f"prune_at must be above 0 and at most 1, got {self.prune_at}.")

    owner: list[Tensor] | None = None  # per weight: 0 free, else the number of a task, from 1
    matrix: list[bool] | None = None  # per parameter: is shared among tasks; others belong to one
    now = 0  # number of the task that is trained; 0 if nothing may change

    def __init__(self, config: Any, learner: Any, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.order: list[int] = []  # ids of tasks, by number
        self.trained: list[bool] = []  # per parameter: had a gradient in this task
        self.packed: list[bool] = []  # per parameter: this task has chosen its weights

    # -- one task -------------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        params = self.learner.params
        if self.owner is None or self.matrix is None:
            self.owner = [torch.zeros_like(p, dtype=torch.uint8) for p in params]
            heads = getattr(getattr(self.learner.agent, "policy", None), "output_layers", ())
            own = {id(p) for head in heads for p in head.parameters()} if len(heads) > 1 else set()
            self.matrix = [is_matrix(p) and id(p) not in own for p in params]
        if task.id is None:
            raise ConfigError("PackNet trains one task at a time and must be told which; this phase has no task id.")
        self.trained, self.packed, self.now = [False] * len(params), [False] * len(params), 0
        if task.id in self.order:
            return
        if len(self.order) == self.config.tasks:
            raise ConfigError(
                f"PackNet has room for {self.config.tasks} tasks, and task {task.id} is one more; raise tasks."
            )
        self.order.append(task.id)
        self.now = len(self.order)

    def after_backward(self, params: Sequence[nn.Parameter]) -> None:
        self._before = {}
        for i, p in self._among(params):
            self._before[i] = p.detach().clone()
            if p.grad is not None:
                self.trained[i] = True
                p.grad.masked_fill_(~self._learns(i), 0)

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        for i, p in self._among(params):  # momentum and weight decay move weights without a gradient, too
            p.copy_(torch.where(self._learns(i), p, self._before[i]))
        if self.now and self.learner.progress >= self.config.prune_at:
            self._pack()

    def finish_task(self, batches: Iterator[Any]) -> None:
        assert self.owner is not None and self.matrix is not None
        if self.now:
            self._pack()
            for owner, matrix, trained in zip(self.owner, self.matrix, self.trained, strict=True):
                if trained and not matrix:
                    owner[owner == 0] = self.now
        self.now = 0

    def _among(self, params: Sequence[nn.Parameter]) -> Iterator[tuple[int, nn.Parameter]]:
        """``params`` with their places among all the agent trains."""
        place = {id(p): i for i, p in enumerate(self.learner.params)}
        return ((place[id(p)], p) for p in params if id(p) in place)

    def _learns(self, i: int) -> Tensor:
        """Which weights of parameter ``i`` may change."""
        assert self.owner is not None
        if not self.now:
            return torch.zeros_like(self.owner[i], dtype=torch.bool)
        return self.owner[i] == (self.now if self.packed[i] else 0)

    @torch.no_grad()
    def _pack(self) -> None:
        """Own the largest of the free weights, and set the others to 0."""
        assert self.owner is not None and self.matrix is not None
        left = self.config.tasks - self.now + 1
        for i, p in enumerate(self.learner.params):
            if not self.matrix[i] or not self.trained[i] or self.packed[i]:
                continue
            owner = self.owner[i]
            count = -(-int((owner == 0).sum()) // left)
            size = torch.where(owner == 0, p.abs(), -1.0)
            owner.view(-1)[size.flatten().topk(count).indices] = self.now
            p.masked_fill_(owner == 0, 0)
            self.packed[i] = True

    # -- acting ---------------------------------------------------------------------------------------------------------

    def view(self, task: int | None) -> AbstractContextManager[None] | None:
        """The network with the weights of ``task`` and of those before it. A task that was never trained, and the one in
        training, see all weights as they are."""
        if task not in self.order or self.owner is None:
            return None
        number = self.order.index(task) + 1
        if number == self.now:
            return None
        owned = zip(self.learner.params, self.owner, strict=True)
        return self.learner.holding([torch.where((o > 0) & (o <= number), p.detach(), 0.0) for p, o in owned])

    def metrics(self) -> dict[str, float]:
        """The share of weights that are free."""
        if self.owner is None:
            return {}
        return {"packnet_free": sum(int((o == 0).sum()) for o in self.owner) / sum(o.numel() for o in self.owner)}


def is_matrix(p: Tensor) -> bool:
    """Whether tasks share the numbers of a parameter, given as it was before any training.

    Biases and norms are not shared: they have one axis, or those of an ensemble are (E, 1, n), or all entries start equal.
    """
    stacked = p.ndim == 3 and p.shape[1] == 1
    return p.ndim > 1 and not stacked and bool((p != p.flatten()[0]).any())
