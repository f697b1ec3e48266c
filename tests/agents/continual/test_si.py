"""Synaptic intelligence: the path integral in closed form, and of the task's loss alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.agents.continual.si import SI
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError

RATE, STEPS, XI = 0.05, 30, 0.2


class Naive(SI):
    """Broken: takes the gradient as it comes, with the spring's in it."""

    def _task_gradient(self, i: int, p: Any) -> Tensor:
        return p.grad.clone()


class FromZero(SI):
    """Broken: the path of a task starts at 0."""

    def start_task(self, task: TaskInfo) -> None:
        super().start_task(task)
        self.start = [torch.zeros_like(p) for p in self.learner.params]


def method(agent: Any) -> Any:
    return next(iter(agent.methods.values()))


def linear(lab: SimpleNamespace, methods: list[Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """A linear model, and data of one row: every batch is the same, and the loss is a quadratic of the weights."""
    agent = lab.composed(
        lab.Toy, methods or ["si"], spaces=lab.REGRESS, agent={"hidden": (), "lr": options.pop("lr", RATE)}, **options
    )
    return agent, lab.data(0, 1, spaces=lab.REGRESS)


def inside(agent: Any, data: Any, lab: SimpleNamespace, updates: int) -> list[Tensor]:
    """A task without its end: the path so far."""
    agent.start_task(TaskInfo())
    lab.learn(agent, data, updates)
    return [w.clone() for w in method(agent).path]


def test_the_path_of_gradient_descent_on_a_quadratic(lab: SimpleNamespace) -> None:
    agent, data = linear(lab)
    layer, x, y = agent.net.layers[0], data.observations[0], data.actions[0]
    r = (layer(x) - y).detach()  # residuals (2,), of which each step leaves the share q
    q = 1 - RATE * (x.square().sum() + 1)
    steps = RATE * (1 - q ** (2 * STEPS)) / (1 - q**2)  # sum over steps of lr q^2t
    weight, bias = inside(agent, data, lab, STEPS)
    torch.testing.assert_close(weight, steps * r.square()[:, None] * x.square())
    torch.testing.assert_close(bias, steps * r.square())


@pytest.mark.parametrize(("agent", "optimizer"), [("Toy", "sgd"), ("Toy", "adam"), ("Several", "sgd")])
def test_the_path_adds_up_to_the_fall_of_the_loss(lab: SimpleNamespace, agent: str, optimizer: str) -> None:
    data = lab.data(0, 1)
    options = {"lr": 1e-3, "optimizer": optimizer}
    one = lab.composed(getattr(lab, agent), ["si"], agent=options)

    def loss() -> float:
        return one.agent_class.loss(one.agent, one.agent.sample(data, lab.generator(0)))[0].item()

    before = loss()
    path = inside(one, data, lab, 300)
    fall = before - loss()
    assert fall > 0.05
    assert sum(w.sum() for w in path) == pytest.approx(fall, rel=0.01)


def second_task(lab: SimpleNamespace, cls: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The path of a second task by the method, and by a simulation that differentiates the task's loss alone."""
    name = cls if isinstance(cls, str) else f"{cls.__module__}:{cls.__qualname__}".rpartition(":")[2]
    agent, data = linear(lab, [cls], **{name: {"strength": 0.3, "xi": XI}})
    lab.phase(agent, data, STEPS)
    si, other = method(agent), lab.data(1, 1, spaces=lab.REGRESS)
    theta = [p.detach().clone().requires_grad_() for p in agent.trainables]
    path = [torch.zeros_like(p) for p in theta]
    x, y = other.observations, other.actions
    for _ in range(STEPS):
        task = torch.autograd.grad(0.5 * (y - x @ theta[0].T - theta[1]).square().sum(), theta)
        spring = [(w * (p - a).square()).sum() for w, p, a in zip(si.importance, theta, si.anchor)]
        pull = torch.autograd.grad(0.3 * torch.stack(spring).sum(), theta)
        with torch.no_grad():
            for p, w, g, s in zip(theta, path, task, pull):
                step = -RATE * (g + s)
                w -= g * step
                p += step
    found = inside(agent, other, lab, STEPS)
    for p, q in zip(agent.trainables, theta):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    return found, path


def test_the_path_is_of_the_tasks_loss_alone(lab: SimpleNamespace) -> None:
    for found, right in zip(*second_task(lab, "si")):
        torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-3)


def test_with_the_springs_gradient_it_would_not_be(lab: SimpleNamespace) -> None:
    assert not any(torch.allclose(a, b, rtol=0.02) for a, b in zip(*second_task(lab, Naive)))


def importance_of_one_task(lab: SimpleNamespace, cls: Any, name: str) -> tuple[list[Tensor], list[Tensor]]:
    """By the method, and from its path and the weights before and after."""
    agent, data = linear(lab, [cls], **{name: {"xi": XI}})
    before = lab.weights(agent)
    path = inside(agent, data, lab, STEPS)
    agent.finish_task()
    parts = zip(path, lab.weights(agent), before)
    return method(agent).importance, [w / ((end - begin).square() + XI) for w, end, begin in parts]


def test_importance_is_the_path_over_the_squared_distance(lab: SimpleNamespace) -> None:
    for found, right in zip(*importance_of_one_task(lab, "si", "si")):
        torch.testing.assert_close(found, right)


def test_a_path_from_zero_would_be_something_else(lab: SimpleNamespace) -> None:
    weight, right = (found[0] for found in importance_of_one_task(lab, FromZero, "FromZero"))
    assert not torch.allclose(weight, right, rtol=0.02)


def test_importances_of_tasks_add_up_and_none_is_negative(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["si"], si={"xi": XI}, agent={"momentum": 0.9})
    lab.phase(agent, lab.data(0), 10)
    first = [w.clone() for w in method(agent).importance]
    agent.start_task(TaskInfo())
    start = lab.weights(agent)
    lab.learn(agent, lab.data(1), 10)
    path = [w.clone() for w in method(agent).path]
    assert any(bool((w < 0).any()) for w in path)  # momentum may carry weights uphill
    agent.finish_task()
    for old, new, w, end, begin in zip(first, method(agent).importance, path, agent.trainables, start):
        assert bool((new >= old).all())
        torch.testing.assert_close(new, old + w.clamp_min(0) / ((end.detach() - begin).square() + XI))


def test_the_spring(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["si"], si={"strength": 0.7})
    lab.phase(agent, lab.data(0), 10)
    anchor = lab.weights(agent)
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(torch.randn(p.shape, generator=lab.generator(1)))
    pull = torch.autograd.grad(method(agent).loss(torch.zeros(()), None), agent.trainables)
    for g, w, p, a in zip(pull, method(agent).importance, agent.trainables, anchor):
        torch.testing.assert_close(g, 2 * 0.7 * w * (p.detach() - a))


def test_a_hidden_loss_makes_no_difference(lab: SimpleNamespace) -> None:
    agents = [lab.composed(cls, ["si"], si={"strength": 3.0}) for cls in (lab.Toy, lab.Hidden)]
    for agent in agents:
        for k in range(3):
            lab.phase(agent, lab.data(k), 10)
    for a, b in zip(*(agent.trainables for agent in agents)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for a, b in zip(*(method(agent).importance for agent in agents)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_weights_without_a_gradient_have_no_importance(lab: SimpleNamespace) -> None:
    agent = lab.composed("bc", ["si"], agent={"hidden": (5,), "heads": 2})
    lab.phase(agent, lab.data(0).with_task(0), 5, 0)
    unused = {id(p) for p in agent.policy.more_heads[0].parameters()}
    for p, w in zip(agent.trainables, method(agent).importance):
        assert bool(w.any()) is (id(p) not in unused)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"strength": -1.0}, "strength"), ({"strength": float("nan")}, "strength"), ({"xi": 0.0}, "xi must be positive")],
)
def test_options_out_of_range(options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SI.Config(**options)
