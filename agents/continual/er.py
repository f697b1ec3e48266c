"""Experience replay: every update also trains on rows of the past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clbench.agents.continual.batches import rows
from clbench.agents.continual.memory import Balance, Memory, check_sizes
from clbench.agents.continual.method import Learner, Method
from clbench.contracts import TaskInfo


class ER(Method):
    """Experience replay from a reservoir; needs no boundaries."""

    requires = frozenset({"loss"})
    does = frozenset({"replays rows"})
    paper = "Chaudhry et al. 2019 (On Tiny Episodic Memories in Continual Learning); reservoir: Vitter 1985"
    formula = "loss on the union of the batch and rows drawn from the memory"

    @dataclass
    class Config:
        """Options.

        Args:
            memory: rows that are kept.
            batch_size: rows replayed per update; 0: as many as the batch has.
            balance: ``task`` shares the memory equally among the tasks so far (where boundaries are revealed).
        """

        memory: int = 200
        batch_size: int = 0
        balance: Balance = "none"

        def __post_init__(self) -> None:
            check_sizes(self.memory, self.batch_size)

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.memory = Memory(config.memory, config.balance, learner.device)

    def start_task(self, task: TaskInfo) -> None:
        self.memory.start_group()

    def replay(self, batch: Any) -> Any | None:
        replayed = self.memory.sample(self.config.batch_size or rows(batch), self.rng)
        self.memory.add(batch, self.rng)  # afterwards: a row is not its own past
        return replayed

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])


class BalancedER(ER):
    """Experience replay whose memory is shared equally among the tasks so far."""

    requires = frozenset({"loss", "boundaries"})

    @dataclass
    class Config(ER.Config):
        """Options: see :class:`ER.Config`."""

        balance: Balance = "task"
