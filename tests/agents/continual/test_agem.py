"""A-GEM's step is the nearest one that does not raise the loss of the past, to first order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from clbench.agents.continual.agem import AGEM, project
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


def vectors(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A gradient and a reference over three parameters."""
    rng = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(s, generator=rng, dtype=torch.float64) for s in ((2, 2), (3,), ())] for _ in range(2))  # type: ignore[return-value]


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten() for p in parts])


def projected(gradient: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    found = project(gradient, reference)
    return flat(gradient if found is None else found)


def quadratic_program(g: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``min |x - g|^2`` with ``x . r >= 0``."""
    constraint = {"type": "ineq", "fun": lambda x: x @ r, "jac": lambda x: r}
    options = {"ftol": 1e-14, "maxiter": 500}
    objective, slope = (lambda x: float((x - g) @ (x - g))), (lambda x: 2 * (x - g))
    return minimize(objective, np.zeros_like(g), jac=slope, constraints=[constraint], method="SLSQP", options=options).x


def error(project_one: Any, seed: int) -> float:
    gradient, reference = vectors(seed)
    want = torch.from_numpy(quadratic_program(flat(gradient).numpy(), flat(reference).numpy()))
    return float((project_one(gradient, reference) - want).abs().max())


def test_the_projection_solves_the_quadratic_program() -> None:
    active = [project(*vectors(seed)) is not None for seed in range(20)]
    assert 5 < sum(active) < 15  # both cases are there
    assert max(error(projected, seed) for seed in range(20)) < 1e-6


@pytest.mark.parametrize("broken", ["always", "each parameter", "unscaled"])
def test_a_wrong_projection_is_caught(broken: str) -> None:
    def wrong(gradient: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
        if broken == "each parameter":
            return torch.cat([projected([g], [r]) for g, r in zip(gradient, reference, strict=True)])
        g, r = flat(gradient), flat(reference)
        if broken == "always":
            return g - (g @ r) / (r @ r) * r
        return g - min(0.0, float(g @ r)) * r

    assert max(error(wrong, seed) for seed in range(20)) > 0.1


def test_a_reference_of_zero_changes_nothing() -> None:
    gradient, reference = vectors(0)
    assert project(gradient, [torch.zeros_like(r) for r in reference]) is None


# -- in an agent -----------------------------------------------------------------------------------------------------------


def prepared(lab: SimpleNamespace, *methods: str, **options: Any) -> Any:
    """At the beginning of a second task; the whole memory is the reference."""
    agent = lab.composed(lab.Toy, [*methods, "a-gem"], a_gem={"memory": 40, "batch_size": 99}, **options)
    lab.phase(agent, lab.data(0), 30, 0)
    agent.start_task(TaskInfo(1))
    return agent


def conflict(lab: SimpleNamespace) -> Any:
    """The first task's points with other labels."""
    batch = lab.data(0).sample(8, lab.generator(3))
    batch.actions.add_(1).remainder_(3)
    return batch


def step(agent: Any, batch: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of one update: the plain one, the reference, and what the optimiser got."""
    loss, _ = agent.agent.loss(batch)
    past = agent.methods["a-gem"].memory.sample(999, torch.Generator().manual_seed(0), past=True)
    plain, reference = (
        list(torch.autograd.grad(agent.learner.own_loss(b)[0], agent.trainables)) for b in (batch, past)
    )
    agent.agent.optimizer.zero_grad()
    loss.backward()
    agent.agent.optimizer.step()
    return plain, reference, [p.grad for p in agent.trainables]


def test_a_conflicting_step_is_projected_over_all_parameters_together(lab: SimpleNamespace) -> None:
    agent = prepared(lab)
    plain, reference, used = step(agent, conflict(lab))
    assert float(flat(plain) @ flat(reference)) < -1e-3
    assert abs(float(flat(used) @ flat(reference))) < 1e-5
    assert torch.allclose(flat(used), projected(plain, reference), atol=1e-6)
    assert agent.methods["a-gem"].metrics() == {"agem_projected": 1.0}
    assert agent.methods["a-gem"].metrics() == {"agem_projected": 0.0}


def test_a_step_that_agrees_is_left_alone_bit_for_bit(lab: SimpleNamespace) -> None:
    agent = prepared(lab)
    plain, reference, used = step(agent, lab.data(0).sample(8, lab.generator(3)))
    assert float(flat(plain) @ flat(reference)) > 0
    assert lab.equal(plain, used)


def test_a_parameter_without_a_gradient_gets_its_part_of_the_projection(lab: SimpleNamespace) -> None:
    agent = prepared(lab)
    params = agent.trainables
    agent.agent.loss(lab.data(0).sample(8, lab.generator(3)))
    past = agent.methods["a-gem"].memory.sample(999, torch.Generator().manual_seed(0), past=True)
    reference = list(torch.autograd.grad(agent.learner.own_loss(past)[0], params))
    params[0].grad = None
    for p, r in zip(params[1:], reference[1:], strict=True):
        p.grad = -r
    with torch.no_grad():
        agent.methods["a-gem"].after_backward(params)
    want = projected([torch.zeros_like(params[0]), *(-r for r in reference[1:])], reference)
    assert torch.allclose(flat([p.grad for p in params]), want, atol=1e-3)
    assert params[0].grad is not None and float(params[0].grad.abs().max()) > 1e-2


def test_only_earlier_tasks_constrain(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["a-gem"])
    agent.start_task(TaskInfo(0))
    lab.learn(agent, lab.data(0), 20)
    assert agent.method_costs()["extra_backward_samples"] == 0  # a first task has no past
    agent.finish_task()
    agent.start_task(TaskInfo(1))
    lab.learn(agent, lab.data(1), 5)
    assert agent.method_costs()["extra_backward_samples"] == agent.method_costs()["extra_forward_samples"] == 5 * 8
    past = agent.methods["a-gem"].memory.sample(999, lab.generator(0), past=True)
    first = {tuple(r) for r in lab.data(0).observations.tolist()}
    assert all(tuple(r) in first for r in past.observations.tolist())


def test_the_loss_on_the_memory_does_not_rise(lab: SimpleNamespace) -> None:
    """Small steps against the past: without the projection it does."""

    def rise(methods: list[str], **options: Any) -> float:
        agent = lab.composed(lab.Toy, methods, agent={"lr": 0.02}, **options)
        lab.phase(agent, lab.data(0), 200, 0)
        probe = lab.data(0).batch(torch.arange(64))
        before = agent.learner.own_loss(probe)[0].item()
        agent.start_task(TaskInfo(1))
        for _ in range(50):
            loss, _ = agent.agent.loss(conflict(lab))
            agent.agent.optimizer.zero_grad()
            loss.backward()
            agent.agent.optimizer.step()
        return agent.learner.own_loss(probe)[0].item() - before

    assert rise([]) > 0.1
    assert rise(["a-gem"], a_gem={"memory": 1000, "batch_size": 1000}) < 0.01


def test_what_is_projected_includes_the_parts_of_other_methods(lab: SimpleNamespace) -> None:
    agent = prepared(lab, "l2", l2={"strength": 5.0})
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(0.1)  # away from the anchor
    plain, reference, used = step(agent, conflict(lab))
    plain = [g + 5.0 * 0.1 for g in plain]
    assert torch.allclose(flat(used), projected(plain, reference), atol=1e-5)


@pytest.mark.parametrize("options", [{"memory": 0}, {"batch_size": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="memory must be at least 1 and batch_size at least 0"):
        AGEM.Config(**options)
