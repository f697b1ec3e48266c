"""Methods in one agent: whose turn it is, and that an agent stopped in the middle of a task goes on bit for bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.agents.continual.method import Method
from clbench.agents.continual.packnet import PackNet
from clbench.agents.continual.si import SI
from clbench.contracts import Experience, TaskInfo

CALLS: list[tuple[str, str]] = []


class Doubles(Method):
    """Says when it is called; doubles the loss."""

    def start_task(self, task: TaskInfo) -> None:
        self.say("start_task")

    def replay(self, batch: Any) -> None:
        self.say("replay")

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        self.say("loss")
        return self.change(base)

    def after_backward(self, params: Any) -> None:
        self.say("after_backward")
        self.gradients = [p.grad.clone() for p in params]

    def after_step(self, params: Any) -> None:
        self.say("after_step")

    def finish_task(self, batches: Any) -> None:
        self.say("finish_task")

    def say(self, hook: str) -> None:
        CALLS.append((type(self).__name__, hook))

    def change(self, base: Tensor) -> Tensor:
        return 2 * base


class Adds(Doubles):
    """Adds half the squared length of the weights."""

    def change(self, base: Tensor) -> Tensor:
        return base + 0.5 * torch.stack([p.square().sum() for p in self.learner.params]).sum()


@pytest.mark.parametrize("methods", [[Doubles, Adds], [Adds, Doubles]])
def test_each_hook_is_called_in_the_order_of_the_list(lab: SimpleNamespace, methods: list[type[Method]]) -> None:
    CALLS.clear()
    agent = lab.composed(lab.Toy, methods)
    before = lab.weights(agent)
    lab.phase(agent, lab.data(0), 1)
    hooks = ("start_task", "replay", "loss", "after_backward", "after_step", "finish_task")
    assert [(m.__name__, hook) for hook in hooks for m in methods] == CALLS

    plain = lab.composed(lab.Toy, [])
    batch = plain.agent.sample(lab.data(0), lab.generator(0))
    task = torch.autograd.grad(plain.agent.loss(batch)[0], plain.trainables)
    found = next(iter(agent.methods.values())).gradients
    for g, t, p in zip(found, task, before):  # 2 L + w^2 / 2, or 2 (L + w^2 / 2)
        torch.testing.assert_close(g, 2 * t + (p if methods[0] is Doubles else 2 * p))


# -- state --------------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "l2": {}, "ewc": {"samples": 10}, "ewc-exact": {"samples": 4}, "ewc-empirical": {"samples": 10},
    "ewc-online": {"samples": 10}, "si": {}, "mas": {"samples": 10}, "packnet": {"tasks": 3},
}  # fmt: skip


def make(lab: SimpleNamespace, method: Any, seed: int = 0, **options: Any) -> Any:
    name = method if isinstance(method, str) else method.__qualname__
    return lab.composed(
        "bc", [method], seed=seed, agent={"hidden": (8,), "batch_size": 8}, **{name.replace("-", "_"): options}
    )


def interrupted(lab: SimpleNamespace, tiny: SimpleNamespace, method: Any, stop: int, **options: Any) -> list[Any]:
    """States after three tasks: of an agent, and of another one that took over after ``stop`` of 10 updates of the
    second task."""
    agents = []
    for resume in (False, True):
        agent, rng = make(lab, method, **options), lab.generator(1)
        lab.phase(agent, lab.data(0), 10, 0)
        agent.start_task(TaskInfo(1))
        learning = agent.learn(Experience(dataset=lab.data(1)), 10, rng=rng)
        for _ in range(stop if resume else 10):
            next(learning)
        if resume:
            state = tiny.through_file(agent.state_dict())
            agent = make(lab, method, seed=7, **options)
            agent.load_state_dict(state)
            kept = tiny.through_file(state)
            lab.learn(agent, lab.data(1), 10 - stop, rng=rng)
            assert tiny.same(state, kept)  # no memory is shared with what was loaded
        agent.finish_task()
        lab.phase(agent, lab.data(2), 10, 2)
        agents.append(agent)
    return [agent.state_dict() for agent in agents]


@pytest.mark.parametrize("stop", [3, 8])
@pytest.mark.parametrize("method", OPTIONS)
def test_an_agent_goes_on_bit_for_bit(lab: SimpleNamespace, tiny: SimpleNamespace, method: str, stop: int) -> None:
    whole, resumed = interrupted(lab, tiny, method, stop, **OPTIONS[method])
    assert tiny.same(whole, resumed)


class WithoutPath(SI):
    """Broken: the path of the present task is not part of the state."""

    state = ("importance", "anchor", "start")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.path = None if self.start is None else [torch.zeros_like(p) for p in self.start]


class WithoutChoice(PackNet):
    """Broken: that weights were chosen is not part of the state."""

    state = ("order", "now", "owner", "matrix", "trained")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.packed = [False] * len(self.trained)


@pytest.mark.parametrize("method", [WithoutPath, WithoutChoice])
def test_a_state_with_something_left_out_is_noticed(
    lab: SimpleNamespace, tiny: SimpleNamespace, method: type[Method]
) -> None:
    whole, resumed = interrupted(lab, tiny, method, 8)
    assert not tiny.same(whole["agent"], resumed["agent"])


@pytest.mark.parametrize("method", OPTIONS)
def test_a_saved_state_does_not_change_while_training_goes_on(
    lab: SimpleNamespace, tiny: SimpleNamespace, method: str
) -> None:
    agent = make(lab, method, **OPTIONS[method])
    lab.phase(agent, lab.data(0), 5, 0)
    agent.start_task(TaskInfo(1))
    lab.learn(agent, lab.data(1), 5)
    state = agent.state_dict()
    kept = tiny.through_file(state)
    lab.learn(agent, lab.data(1), 5)
    agent.finish_task()
    assert tiny.same(state, kept)
    assert not tiny.same(state["methods"], agent.state_dict()["methods"])
