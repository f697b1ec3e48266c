"""The L2 anchor: its spring, what it converges to, and that it is elastic weight consolidation with equal importances."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clbench.agents.continual.l2 import L2
from clbench.errors import ConfigError


def moved(agent: object, seed: int = 9) -> None:
    """Weights somewhere else."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.trainables:  # type: ignore[attr-defined]
            p.add_(torch.randn(p.shape, generator=rng))


def test_the_spring_pulls_to_where_the_last_task_ended(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["l2"], l2={"strength": 0.7})
    lab.phase(agent, lab.data(0), 5)
    lab.phase(agent, lab.data(1), 5)
    anchor = lab.weights(agent)
    moved(agent)
    found = torch.autograd.grad(agent.methods["l2"].loss(torch.zeros(()), None), agent.trainables)
    for g, p, a in zip(found, agent.trainables, anchor):
        torch.testing.assert_close(g, 0.7 * (p.detach() - a))


def test_the_first_task_is_as_without_it(lab: SimpleNamespace) -> None:
    with_l2, without = lab.composed(lab.Toy, ["l2"], l2={"strength": 100.0}), lab.composed(lab.Toy, [])
    for agent in (with_l2, without):
        lab.phase(agent, lab.data(0), 5)
    assert lab.equal(lab.weights(with_l2), lab.weights(without))
    for agent in (with_l2, without):
        lab.phase(agent, lab.data(1), 5)
    assert not lab.equal(lab.weights(with_l2), lab.weights(without))


def test_on_a_linear_model_the_minimum_is_ridge_regression_around_the_anchor(lab: SimpleNamespace) -> None:
    strength, data = 0.3, lab.data(1, spaces=lab.REGRESS)
    agent = lab.composed(lab.Toy, ["l2"], spaces=lab.REGRESS, agent={"hidden": ()}, l2={"strength": strength})
    lab.phase(agent, lab.data(0, spaces=lab.REGRESS), 20)
    old = torch.cat([agent.net.layers[0].weight, agent.net.layers[0].bias[:, None]], 1).detach()
    batch = data.batch(torch.arange(len(data)))
    optimizer = torch.optim.LBFGS(agent.trainables, max_iter=100, tolerance_grad=1e-9, tolerance_change=0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = agent.agent.loss(batch)[0]
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[arg-type]
    found = torch.cat([agent.net.layers[0].weight, agent.net.layers[0].bias[:, None]], 1).detach()
    x = torch.cat([data.observations, torch.ones(len(data), 1)], 1)
    # argmin 1 / (2 N) |Y - X W^T|^2 + strength / 2 |W - W*|^2
    gram = x.T @ x / len(x) + strength * torch.eye(x.shape[1])
    right = torch.linalg.solve(gram, x.T @ data.actions / len(x) + strength * old.T).T
    torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, old, atol=1e-2)


@pytest.mark.parametrize(("importance", "same"), [(1.0, True), (2.0, False)])
def test_it_is_ewc_with_importance_one(lab: SimpleNamespace, importance: float, same: bool) -> None:
    l2 = lab.composed(lab.Toy, ["l2"], l2={"strength": 0.5})
    ewc = lab.composed(lab.Toy, ["ewc"], ewc={"strength": 0.5})
    for agent in (l2, ewc):
        lab.phase(agent, lab.data(0), 5)
    ewc.methods["ewc"].fisher = [torch.full_like(p, importance) for p in ewc.trainables]
    for agent in (l2, ewc):
        lab.phase(agent, lab.data(1), 10)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(l2.trainables, ewc.trainables)) is same


def test_the_anchor_stays_while_weights_move(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["l2"])
    lab.phase(agent, lab.data(0), 5)
    before = [a.clone() for a in agent.methods["l2"].anchor]
    moved(agent)
    assert lab.equal(before, agent.methods["l2"].anchor)
    assert not lab.equal(before, lab.weights(agent))


@pytest.mark.parametrize("strength", [-1.0, float("nan")])
def test_a_strength_that_makes_no_sense(strength: float) -> None:
    with pytest.raises(ConfigError, match="strength must be at least 0"):
        L2.Config(strength=strength)
