"""L2 init: its gradient in closed form, that it pulls back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.errors import ConfigError


def distance(agent: Any, start: list[torch.Tensor]) -> float:
    return sum((p - p0).detach().square().sum().item() for p, p0 in zip(agent.trainables, start, strict=True)) ** 0.5


def test_the_loss_in_closed_form(lab: SimpleNamespace):
    agent = lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": 0.5})
    start = lab.weights(agent)
    batch = agent.agent.sample(lab.data(0), lab.generator(0))
    base = agent.learner.own_loss(batch)[0]
    assert torch.equal(agent.agent.loss(batch)[0], base)  # at the initial weights
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(0.1)
    base = agent.learner.own_loss(batch)[0]
    count = sum(p.numel() for p in start)
    assert agent.agent.loss(batch)[0].item() == pytest.approx(base.item() + 0.5 * 0.01 * count, rel=1e-5)


def test_one_step_of_sgd(lab: SimpleNamespace):
    """theta - lr (g + 2 strength (theta - theta_0))."""
    agent = lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": 0.5}, agent={"lr": 0.1})
    plain = lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": 0.0}, agent={"lr": 0.1})
    start = lab.weights(agent)
    for a in (agent, plain):
        with torch.no_grad():
            for p in a.trainables:
                p.mul_(1.5)
        lab.learn(a, lab.data(0), 1)
    for p, q, p0 in zip(agent.trainables, plain.trainables, start, strict=True):
        assert torch.allclose(p, q - 0.1 * 2 * 0.5 * (1.5 * p0 - p0), atol=1e-6)


def test_it_pulls_back_to_the_start(lab: SimpleNamespace):
    """The stronger, the nearer; also where the agent hides its loss."""
    for base in (lab.Toy, lab.Hidden):
        far = []
        for strength in (0.0, 0.1, 1.0):
            agent = lab.composed(base, ["l2-init"], l2_init={"strength": strength})
            start = lab.weights(agent)
            lab.learn(agent, lab.data(0), 60)
            far.append(distance(agent, start))
        assert far[0] > 1.5 * far[1] > 2 * far[2] > 0


def test_it_draws_to_the_first_weights_not_to_those_it_was_loaded_into(lab: SimpleNamespace):
    first, other = (lab.composed(lab.Toy, ["l2-init"], seed=seed) for seed in (0, 1))
    start = lab.weights(first)
    assert not lab.equal(start, lab.weights(other))
    state = first.state_dict()
    other.load_state_dict(state)
    assert lab.equal(other.methods["l2-init"].initial, start)
    state["methods"]["l2-init"]["state"]["initial"][0].zero_()
    assert lab.equal(other.methods["l2-init"].initial, start)  # no memory is shared


def test_a_negative_strength_is_refused(lab: SimpleNamespace):
    with pytest.raises(ConfigError, match="strength"):
        lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": -1.0})
