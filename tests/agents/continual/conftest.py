"""A tiny agent on which continual methods are checked, and what their tests do with agents.

Tests take the fixture ``lab``::

    agent = lab.composed(lab.Toy, ["er"], er={"memory": 8}, agent={"optimizer": "adam"})
    lab.phase(agent, lab.data(0), updates=10, task_id=0)          # start_task, learn, finish_task
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from clbench.agents.continual.compose import Composed, compose
from clbench.agents.networks.mlp import MLP
from clbench.agents.networks.outputs import Output
from clbench.config import build
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.data.dataset import Batch, OfflineDataset

CPU = torch.device("cpu")
INPUTS, CLASSES = 4, 3
POINT = Box(-1, 1, (INPUTS,), np.float32)
CLASSIFY = Spaces(POINT, Discrete(CLASSES))
REGRESS = Spaces(POINT, Box(-1, 1, (2,), np.float32))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Toy(Agent):
    """A network on points: a classifier where actions are discrete, else least squares."""

    requires = frozenset({"dataset"})

    @dataclass
    class Config:
        hidden: tuple[int, ...] = (6,)
        optimizer: str = "sgd"
        lr: float = 0.1
        momentum: float = 0.0
        weight_decay: float = 0.0
        batch_size: int = 8

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.config: Any = config
        self.discrete = isinstance(spaces.action, Discrete)
        size = CLASSES if self.discrete else int(np.prod(spaces.action.shape or ()))
        self.net = MLP((INPUTS, *config.hidden, size), rng=rng, activation=torch.tanh)
        self.optimizer = self.new_optimizer()

    @property
    def trainables(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def new_optimizer(self) -> torch.optim.Optimizer:
        c = self.config
        if c.optimizer == "adam":
            return torch.optim.Adam(self.trainables, lr=c.lr, weight_decay=c.weight_decay)
        return torch.optim.SGD(self.trainables, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        found = self.net(batch.observations)
        if self.discrete:
            loss = nn.functional.cross_entropy(found, batch.actions)
        else:
            loss = 0.5 * (batch.actions - found).square().sum(1).mean()
        return loss, {"loss": loss.detach()}

    def outputs(self, batch: Batch) -> tuple[Output, ...]:
        return (Output("categorical" if self.discrete else "gaussian", self.net(batch.observations)),)

    def features(self, batch: Batch) -> Tensor:
        return self.net.features(batch.observations)

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> Batch:
        return data.sample(self.config.batch_size, rng)

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        assert experience.dataset is not None
        for step in range(1, budget + 1):
            loss, _ = self.loss(self.sample(experience.dataset, rng))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"step": step, "loss": loss.item()}

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        found = self.net(obs)
        return (found.argmax(1) if self.discrete else found.clamp(-1, 1)), memory

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"net": dict(self.net.state_dict()), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


class Several(Toy):
    """With an optimiser for each layer, as actor-critic agents have; each is stepped on a loss of its own."""

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.optimizers = [torch.optim.SGD(layer.parameters(), lr=config.lr) for layer in self.net.layers]

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        assert experience.dataset is not None
        for step in range(1, budget + 1):
            for optimizer in self.optimizers:
                loss, _ = self.loss(self.sample(experience.dataset, rng))
                for p in self.trainables:
                    p.grad = None
                loss.backward()
                optimizer.step()
            yield {"step": step, "loss": loss.item()}


class Hidden(Toy):
    """Its loss is out of reach, as that of Stable-Baselines3's algorithms: methods see gradients only."""

    loss = None  # type: ignore[assignment]

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        assert experience.dataset is not None
        for step in range(1, budget + 1):
            loss, _ = Toy.loss(self, self.sample(experience.dataset, rng))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"step": step, "loss": loss.item()}


def data(task: int, rows: int = 64, *, spaces: Spaces = CLASSIFY) -> OfflineDataset:
    """Random points and, differently for each task, what is right there."""
    rng = generator(100 + task)
    x = torch.rand(rows, INPUTS, generator=rng) * 2 - 1
    if isinstance(spaces.action, Discrete):
        y = (x @ torch.randn(INPUTS, int(spaces.action.n), generator=rng)).argmax(1)
    else:
        y = torch.tanh(x @ torch.randn(INPUTS, int(np.prod(spaces.action.shape or ())), generator=rng))
    return OfflineDataset(x, y, torch.ones(rows, dtype=torch.int64))


def composed(
    base: str | type[Agent], methods: Sequence[Any], *, spaces: Spaces = CLASSIFY, seed: int = 0, **options: Any
) -> Composed:
    """``base`` with ``methods``, on the CPU; ``options`` are fields of the ``Config``: ``agent`` and one per method."""
    cls = compose(base, methods)
    return cls(spaces, build(cls.Config, options, "agent"), device=CPU, rng=generator(seed))  # type: ignore[return-value]


def learn(agent: Agent, of: OfflineDataset, updates: int, *, rng: int | torch.Generator = 0) -> list[dict[str, float]]:
    """``updates`` of a phase that was started."""
    rng = generator(rng) if isinstance(rng, int) else rng
    return [dict(m) for m in agent.learn(Experience(dataset=of), updates, rng=rng)]


def phase(agent: Agent, of: OfflineDataset, updates: int, task_id: int | None = None, *, rng: int = 0) -> None:
    """A task from boundary to boundary."""
    agent.start_task(TaskInfo(task_id))
    learn(agent, of, updates, rng=rng)
    agent.finish_task()


def weights(agent: Any) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in agent.trainables]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """What the tests of this folder share."""
    return SimpleNamespace(
        Toy=Toy, Several=Several, Hidden=Hidden, data=data, composed=composed, phase=phase, learn=learn, weights=weights,
        equal=equal, generator=generator, CLASSIFY=CLASSIFY, REGRESS=REGRESS, cpu=CPU,
    )  # fmt: skip
