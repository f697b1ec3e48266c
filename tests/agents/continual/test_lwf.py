"""Learning without forgetting holds outputs on the new data, through the heads that old tasks had."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from clbench.agents.continual.lwf import LwF, distillation
from clbench.agents.networks.outputs import Output
from clbench.contracts import Spaces, TaskInfo
from clbench.errors import ConfigError


def logits(seed: int, count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def shake(agent: Any) -> None:
    """Move the weights."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(0.5 * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_the_term_is_the_divergence_at_a_temperature(temperature: float) -> None:
    new, old = logits(0).requires_grad_(), logits(1)
    p, q = ((x / temperature).softmax(1) for x in (old, new))
    want = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    found = distillation(Output("categorical", new), Output("categorical", old), temperature)
    assert torch.allclose(found, want)
    # the gradient of the paper's cross-entropy, T (q - p) / B
    (g,) = torch.autograd.grad(found, new)
    assert torch.allclose(g, temperature * (q - p).detach() / 6)


def test_at_high_temperature_it_is_the_distance_of_centred_logits() -> None:
    """Hinton et al. 2015: the factor T^2 leaves a limit, |z - v|^2 / 2n of centred logits."""
    new, old = ((x - x.mean(1, keepdim=True)) for x in (logits(0), logits(1)))
    limit = (new - old).square().sum(1).mean() / (2 * 3)
    found = distillation(Output("categorical", new), Output("categorical", old), 1e4)
    assert torch.allclose(found, limit, rtol=1e-3)
    without = found / 1e8  # the factor forgotten
    assert not torch.allclose(without, limit, rtol=0.5)


def test_gaussian_outputs_have_no_temperature() -> None:
    new, old = logits(0), logits(1)
    want = 0.5 * (new - old).square().sum(1).mean()
    for temperature in (1.0, 3.0):
        assert torch.allclose(distillation(Output("gaussian", new), Output("gaussian", old), temperature), want)


@pytest.mark.parametrize("spaces", ["CLASSIFY", "REGRESS"])
def test_the_loss_holds_the_outputs_of_the_last_boundary(lab: SimpleNamespace, spaces: str) -> None:
    space = getattr(lab, spaces)
    agent = lab.composed(lab.Toy, ["lwf"], spaces=space, lwf={"strength": 0.7})
    batch = lab.data(1, spaces=space).sample(8, lab.generator(0))
    agent.start_task(TaskInfo(0))
    assert torch.equal(agent.agent.loss(batch)[0], agent.learner.loss(batch))  # nothing to hold yet
    lab.learn(agent, lab.data(0, spaces=space), 5)
    agent.finish_task()
    (old,) = agent.agent.outputs(batch)
    assert torch.equal(agent.agent.loss(batch)[0], agent.learner.loss(batch))  # and nothing has moved
    shake(agent)
    (new,) = agent.agent.outputs(batch)
    own = agent.learner.loss(batch)
    total = agent.agent.loss(batch)[0]
    want = own + 0.7 * distillation(new, old.detach(), 2.0)
    assert torch.allclose(total, want)
    assert float(total.detach() - own.detach()) > 0.01
    found, wanted = (torch.autograd.grad(x, agent.trainables) for x in (total, want))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_the_old_network_leaves_no_trace(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["lwf"])
    lab.phase(agent, lab.data(0), 5, 0)
    agent.start_task(TaskInfo(1))
    lab.learn(agent, lab.data(1), 5)
    before, pointers = lab.weights(agent), [p.data_ptr() for p in agent.trainables]
    agent.agent.loss(lab.data(1).sample(8, lab.generator(0)))
    assert lab.equal(before, lab.weights(agent))
    assert pointers == [p.data_ptr() for p in agent.trainables]
    assert not lab.equal(before, agent.methods["lwf"].old)


def test_strength_draws_outputs_to_the_old_ones(lab: SimpleNamespace) -> None:
    def moved(strength: float) -> float:
        agent = lab.composed(lab.Toy, ["lwf"], lwf={"strength": strength})
        lab.phase(agent, lab.data(0), 200, 0)
        probe = lab.data(1).sample(64, lab.generator(0))
        (old,) = agent.agent.outputs(probe)
        lab.phase(agent, lab.data(1), 200, 1)
        return float(agent.agent.outputs(probe)[0].divergence(old.detach()).detach().mean())

    free, weak, strong = moved(0.0), moved(1.0), moved(10.0)
    assert strong < 0.5 * weak < 0.25 * free


def test_costs_are_two_more_passes_and_one_copy(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["lwf"])
    lab.phase(agent, lab.data(0), 5, 0)
    assert agent.method_costs()["extra_forward_samples"] == 0
    lab.phase(agent, lab.data(1), 5, 1)
    costs = agent.method_costs()
    assert costs["extra_forward_samples"] == 2 * 5 * 8
    assert costs["extra_backward_samples"] == 5 * 8
    assert costs["method_state_bytes"] == sum(p.numel() * 4 for p in agent.trainables)


# -- a head per task -------------------------------------------------------------------------------------------------------

SPACES = Spaces(Box(-1, 1, (4,), np.float32), Discrete(3))


def several_heads(lab: SimpleNamespace, ids: list[int], updates: int = 3) -> tuple[Any, Any]:
    """A clone with three heads after the given tasks, and a batch of the task that comes next."""
    agent = lab.composed(
        "bc", ["lwf"], spaces=SPACES, agent={"heads": 3, "hidden": (8,), "batch_size": 8}, lwf={"strength": 0.5}
    )
    for k in ids:
        data = dataclasses.replace(lab.data(k), task=torch.full((64,), k))
        lab.phase(agent, data, updates, k)
    data = dataclasses.replace(lab.data(2), task=torch.full((64,), 2))
    return agent, data.sample(8, lab.generator(0))


def test_each_finished_task_is_distilled_through_its_own_head(lab: SimpleNamespace) -> None:
    agent, batch = several_heads(lab, [0, 1])
    policy, features = agent.agent.policy, agent.agent.features
    agent.start_task(TaskInfo(2))
    with torch.no_grad():
        old = [policy.output_layers[k](features(batch)) for k in range(3)]
    shake(agent)
    new = [policy.output_layers[k](features(batch)) for k in range(3)]
    terms = [
        distillation(Output("categorical", n), Output("categorical", o), 2.0) for n, o in zip(new, old, strict=True)
    ]
    total, own = agent.agent.loss(batch)[0], agent.learner.loss(batch)
    assert torch.allclose(total, own + 0.5 * (terms[0] + terms[1]))
    assert not torch.allclose(total, own + 0.5 * terms[2], rtol=1e-3)  # the new task's own head is free


def test_a_task_that_comes_again_does_not_hold_its_own_head(lab: SimpleNamespace) -> None:
    agent, batch = several_heads(lab, [0, 2])
    agent.start_task(TaskInfo(2))
    heads = agent.agent.policy.output_layers
    shake(agent)
    total = agent.agent.loss(batch)[0] - agent.learner.loss(batch)
    found = torch.autograd.grad(total, [heads[0].weight, heads[2].weight], allow_unused=True)
    assert found[0].abs().max() > 1e-3
    assert found[1] is None or found[1].abs().max() < 1e-6
    assert agent.methods["lwf"].finished == [0, 2]


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"temperature": 0.0}, {"strength": float("nan")}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="strength must be at least 0 and temperature positive"):
        LwF.Config(**options)
