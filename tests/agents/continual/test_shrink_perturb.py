"""Shrink and perturb: one update and one boundary in closed form."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


def test_one_update_in_closed_form(lab: SimpleNamespace):
    """(1 - lr decay) theta' + lr sigma xi, theta' the weights of plain SGD."""
    agent, plain = (
        lab.composed(lab.Toy, ["shrink-perturb"], agent={"lr": 0.2}, shrink_perturb={"decay": d, "sigma": s})
        for d, s in ((0.3, 0.5), (0.0, 0.0))
    )
    noise = torch.Generator()
    noise.set_state(agent.methods["shrink-perturb"].rng.get_state())
    for a in (agent, plain):
        lab.learn(a, lab.data(0), 1)
    sizes = [p.numel() for p in plain.trainables]
    xi = torch.randn(sum(sizes), generator=noise).split(sizes)
    for p, q, e in zip(agent.trainables, plain.trainables, xi, strict=True):
        assert torch.allclose(p, (1 - 0.2 * 0.3) * q + 0.2 * 0.5 * e.view(q.shape), atol=1e-6)


def test_without_decay_and_noise_nothing_happens(lab: SimpleNamespace):
    agent = lab.composed(lab.Toy, ["shrink-perturb"], shrink_perturb={"decay": 0.0, "sigma": 0.0})
    plain = lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": 0.0})
    stirred = lab.composed(lab.Toy, ["shrink-perturb"])
    for a in (agent, plain, stirred):
        lab.learn(a, lab.data(0), 5)
    assert lab.equal(lab.weights(agent), lab.weights(plain))
    assert not lab.equal(lab.weights(stirred), lab.weights(plain))


def test_it_follows_the_learning_rate(lab: SimpleNamespace):
    """At a rate of almost nothing there is almost no noise."""
    agent = lab.composed(lab.Toy, ["shrink-perturb"], agent={"lr": 1e-9}, shrink_perturb={"sigma": 1.0})
    before = lab.weights(agent)
    lab.learn(agent, lab.data(0), 5)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(agent.trainables, before, strict=True))


def test_one_boundary_in_closed_form(lab: SimpleNamespace):
    agent = lab.composed(lab.Toy, ["shrink-perturb-task"], shrink_perturb_task={"shrink": 0.4, "sigma": 0.2})
    method = agent.methods["shrink-perturb-task"]
    start = lab.weights(agent)
    agent.start_task(TaskInfo(None))
    assert lab.equal(lab.weights(agent), start)  # the first task has nothing before it
    lab.learn(agent, lab.data(0), 5)
    trained = lab.weights(agent)
    fresh = torch.Generator()
    fresh.set_state(method.rng.get_state())
    agent.start_task(TaskInfo(None))
    new = lab.Toy(lab.CLASSIFY, agent.agent.config, device=lab.cpu, rng=fresh)
    for p, q, p0 in zip(agent.trainables, trained, new.trainables, strict=True):
        assert torch.allclose(p, 0.4 * q + 0.2 * p0, atol=1e-7)
    agent.start_task(TaskInfo(None))  # and the third boundary draws others
    assert not torch.allclose(
        agent.trainables[0], 0.4 * (0.4 * trained[0] + 0.2 * new.trainables[0]) + 0.2 * new.trainables[0]
    )


def test_the_boundary_form_leaves_updates_alone(lab: SimpleNamespace):
    agent = lab.composed(lab.Toy, ["shrink-perturb"], shrink_perturb={"when": "task"})
    plain = lab.composed(lab.Toy, ["l2-init"], l2_init={"strength": 0.0})
    for a in (agent, plain):
        lab.learn(a, lab.data(0), 5)
    assert lab.equal(lab.weights(agent), lab.weights(plain))


def test_what_it_needs_of_the_stream(lab: SimpleNamespace):
    assert "boundaries" in type(lab.composed(lab.Toy, ["shrink-perturb-task"])).requires
    assert "boundaries" not in type(lab.composed(lab.Toy, ["shrink-perturb"])).requires


def test_the_count_of_tasks_is_part_of_the_state(lab: SimpleNamespace):
    """An agent that goes on in its second task must shrink at the next boundary, as the one that never stopped."""
    one = lab.composed(lab.Toy, ["shrink-perturb-task"])
    lab.phase(one, lab.data(0), 5)
    other = lab.composed(lab.Toy, ["shrink-perturb-task"])
    state = one.state_dict()
    other.load_state_dict(copy.deepcopy(state))
    forgetful = lab.composed(lab.Toy, ["shrink-perturb-task"])
    state["methods"]["shrink-perturb-task"]["state"]["tasks"] = 0
    forgetful.load_state_dict(state)
    for a in (one, other, forgetful):
        lab.phase(a, lab.data(1), 5)
    assert lab.equal(lab.weights(one), lab.weights(other))
    assert not lab.equal(lab.weights(one), lab.weights(forgetful))


def test_values_out_of_range_are_refused(lab: SimpleNamespace):
    for wrong in ({"decay": -1.0}, {"sigma": -1.0}, {"shrink": 2.0}, {"when": "never"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            lab.composed(lab.Toy, ["shrink-perturb"], shrink_perturb=wrong)
