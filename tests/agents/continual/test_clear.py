"""Stored rows of finished tasks keep the outputs that the network had for them, also where the loss is hidden."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.agents.continual.batches import rows, take
from clbench.agents.continual.clear import CLEAR
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


def after_one_task(lab: SimpleNamespace, base: Any, spaces: Any = None, **options: Any) -> Any:
    agent = lab.composed(base, ["clear"], spaces=spaces or lab.CLASSIFY, clear=options)
    lab.phase(agent, lab.data(0, spaces=spaces or lab.CLASSIFY), 20, 0)
    agent.start_task(TaskInfo(1))
    return agent


def move(agent: Any) -> None:
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(0.5 * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("samples", [1, 8, 21])
def test_rows_of_the_task_are_stored_with_the_outputs_of_its_end(lab: SimpleNamespace, samples: int) -> None:
    agent = after_one_task(lab, lab.Toy, samples=samples)
    held, (outputs,) = agent.methods["clear"].stored
    assert rows(held) == len(outputs.values) == samples
    task = {tuple(r) for r in lab.data(0).observations.tolist()}
    assert all(tuple(r) in task for r in held.observations.tolist())
    with torch.no_grad():
        assert torch.allclose(outputs.values, agent.agent.net(held.observations), atol=1e-6)
    assert not outputs.values.requires_grad
    lab.learn(agent, lab.data(1), 5)
    with torch.no_grad():
        assert not torch.allclose(outputs.values, agent.agent.net(held.observations), atol=1e-4)
    agent.finish_task()
    again, (later,) = agent.methods["clear"].stored
    assert rows(again) == 2 * samples
    assert torch.equal(later.values[:samples], outputs.values)  # the first task's outputs stay those of its end


@pytest.mark.parametrize("spaces", ["CLASSIFY", "REGRESS"])
def test_the_term_is_the_divergence_from_then_on_drawn_rows(lab: SimpleNamespace, spaces: str) -> None:
    space = getattr(lab, spaces)
    agent = after_one_task(lab, lab.Toy, space, samples=30, batch_size=10, strength=0.7)
    move(agent)
    method, zero = agent.methods["clear"], torch.zeros(())
    state = method.rng.get_state()
    drawn = torch.rand(30, generator=method.rng).topk(10).indices
    held, (old,) = take(method.stored, drawn)
    new = agent.agent.net(held.observations)
    p, q = old.values.softmax(1), new.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1) if spaces == "CLASSIFY" else 0.5 * (new - old.values).square().sum(1)
    method.rng.set_state(state)
    found = method.loss(zero + 2.0, None)
    assert torch.allclose(found, 2.0 + 0.7 * kl.mean(), atol=1e-6)
    backwards = (q * (q.log() - p.log())).sum(1).mean()
    assert spaces == "REGRESS" or not torch.allclose(found, 2.0 + 0.7 * backwards, rtol=1e-3)


def test_it_works_where_the_loss_is_hidden_as_where_it_is_not(lab: SimpleNamespace) -> None:
    found = []
    for base in (lab.Toy, lab.Hidden):
        agent = after_one_task(lab, base, samples=16, batch_size=16)
        before = agent.method_costs()["extra_backward_samples"]
        lab.learn(agent, lab.data(1), 10)
        assert before == 0
        assert agent.method_costs()["extra_backward_samples"] == 10 * 16
        found.append(lab.weights(agent))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_the_first_task_is_learned_as_without(lab: SimpleNamespace) -> None:
    agent, plain = lab.composed(lab.Toy, ["clear"]), lab.composed(lab.Toy, [])
    for each in (agent, plain):
        lab.phase(each, lab.data(0), 20, 0)
    assert lab.equal(lab.weights(agent), lab.weights(plain))


@pytest.mark.parametrize("base", ["Toy", "Hidden"])
def test_strength_keeps_the_old_outputs(lab: SimpleNamespace, base: str) -> None:
    def moved(strength: float) -> float:
        agent = lab.composed(getattr(lab, base), ["clear"], clear={"strength": strength, "samples": 64})
        lab.phase(agent, lab.data(0), 200, 0)
        probe = lab.data(0).sample(64, lab.generator(0))
        (old,) = agent.agent.outputs(probe)
        lab.phase(agent, lab.data(1), 200, 1)
        return float(agent.agent.outputs(probe)[0].divergence(old.detach()).detach().mean())

    free, held = moved(0.0), moved(5.0)
    assert held < 0.2 * free


def test_the_state_is_complete_before_any_batch_was_seen(lab: SimpleNamespace) -> None:
    """A hidden loss brings no batch, so the structure of rows must come from the state."""
    agent = after_one_task(lab, lab.Hidden, samples=5)
    other = lab.composed(lab.Hidden, ["clear"], seed=3, clear={"samples": 5})
    state = agent.state_dict()
    other.load_state_dict(state)
    state["methods"]["clear"]["state"]["stored"]["columns"][0].zero_()
    for each in (agent, other):
        lab.learn(each, lab.data(1), 5)
    assert lab.equal(lab.weights(agent), lab.weights(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1.0}, "strength"), ({"samples": 0}, "samples and batch_size"), ({"batch_size": 0}, "samples and")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLEAR.Config(**options)
