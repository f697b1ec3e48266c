"""Small eidetic agents and networks for the tests of ``clbench verify``, used as ``eidetic_toys:Name``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clbench import Agent, Experience, Spaces, TaskInfo
from clbench.agents.networks import eidetic


class Net(eidetic.EideticNetwork):
    """One hidden layer and a head per task."""

    def __init__(self, inputs: int = 6, units: int = 16, outputs: int = 3) -> None:
        super().__init__()
        x, h = self.inputs("x", inputs), self.space("h", units)
        self.first, self.relu = eidetic.Linear(x, h), eidetic.Activation("relu")
        self.head = self.heads(h, outputs)

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.head(self.relu(self.first(x)), task)


class Coupled(Net):
    """All units, free ones too, shift every output: what is owned is kept, what it computes is not."""

    def forward(self, x: Tensor, task: int) -> Tensor:
        h = self.relu(self.first(x))
        return self.head(h, task) + self.first(x).mean(-1, keepdim=True)


class Keeper(Agent):
    """Classifies digits with one network, of which each task gets half of the units that are free."""

    requires = frozenset({"dataset", "boundaries", "discrete"})
    network: type[Net] = Net

    @dataclass
    class Config:
        units: int = 16
        probes: bool = True
        commit: bool = True

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        inputs = int(np.prod(spaces.observation.shape or (1,)))
        with torch.random.fork_rng([]):
            self.net = self.network(inputs, config.units, int(spaces.action.n)).to(device)  # type: ignore[attr-defined]
        self.rng = rng
        self.last = torch.zeros(8, inputs)

    @property
    def eidetic(self) -> Mapping[str, eidetic.EideticNetwork]:
        return {"policy": self.net}

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        if self.net.task < 0:
            return torch.zeros(len(first), dtype=torch.int64), memory
        number = self.net.task if task is None else min(int(task[0]), self.net.task)
        with torch.no_grad():
            return self.net(obs.flatten(1), task=number).argmax(1), memory

    def start_task(self, task: TaskInfo) -> None:
        self.net.begin_task(self.rng)
        h = self.net.prunable()["h"]
        free = h.candidates.nonzero()[:, 0]
        h.kill(torch.zeros_like(h.alive).index_fill(0, free[len(free) // 2 :], True))

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        assert experience.dataset is not None
        for _ in range(budget):
            batch = experience.dataset.sample(16, rng)
            self.last = batch.observations.flatten(1)[:8].clone()
            parameters = list(self.net.parameters())
            loss = nn.functional.cross_entropy(
                self.net(batch.observations.flatten(1), task=self.net.task), batch.actions
            )
            with torch.no_grad():
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                    if g is not None:
                        p -= 0.1 * g
            yield {"loss": float(loss.detach())}

    def finish_task(self) -> None:
        if self.config.commit:
            self.net.commit([self.last] if self.config.probes else None)

    def state_dict(self) -> dict[str, Any]:
        return {"net": dict(self.net.state_dict()), "last": self.last.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.restore(state["net"])
        self.last = state["last"].clone()


class Broken(Keeper):
    network = Coupled


class Giver(Keeper):
    """Commits without probes, and says what to try afterwards."""

    def eidetic_probes(self) -> Mapping[str, Mapping[int, Sequence[Tensor]]]:
        return {"policy": {task: [self.last] for task in range(self.net.committed)}}


class Misnamed(Keeper):
    def eidetic_probes(self) -> Any:
        return {"critic": {0: [self.last]}}


class NoNetworks(Keeper):
    eidetic = {"policy": nn.Linear(1, 1)}  # type: ignore[assignment]


class Two(Keeper):
    """A second network, in which one number changed after its commit."""

    @property
    def eidetic(self) -> Mapping[str, eidetic.EideticNetwork]:
        other = copy.deepcopy(self.net)
        other.first.weight.store[0, 0] += 1.0
        return {"policy": self.net, "critic": other}


def trained(network: type[Net] = Net, *, probes: bool = True) -> Net:
    """Two tasks, no training: what was drawn is what was learned."""
    rng = torch.Generator().manual_seed(0)
    net = network()
    for task in range(2):
        net.begin_task(rng)
        h = net.prunable()["h"]
        h.kill(torch.arange(16) >= 5 * (task + 1))
        net.commit([torch.randn(4, 6, generator=rng)] if probes else None)
    return net


MADE = trained()


def make() -> Net:
    print("a plug-in that prints")
    return trained()


def make_pair() -> tuple[Net, dict[int, list[Tensor]]]:
    rng = torch.Generator().manual_seed(1)
    return trained(probes=False), {task: [torch.randn(9, 6, generator=rng)] for task in range(2)}


def make_without_probes() -> Net:
    return trained(probes=False)


def make_coupled() -> Net:
    return trained(Coupled)


def make_wrong() -> nn.Module:
    return nn.Linear(1, 1)


def make_of_size(size: int) -> Net:
    return Net(size)


def make_failing() -> Net:
    raise ZeroDivisionError("no units")


def make_bare_tensor() -> tuple[Net, Any]:
    return trained(probes=False), {0: torch.zeros(4, 6)}
