"""The hand-written loops of ``bench updates`` compute the losses and gradients of the agents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clbench.bench.minimal_gcrl as minimal
from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.agents.gcrl.networks import MLP
from clbench.bench.minimal_gcrl import LOSSES, Loop, Rows
from clbench.bench.updates import METHODS, hand_written, make_agent, point_maze_like

CASES = [(m, shape) for m in METHODS if m.partition(":")[0] in LOSSES for shape in ((2, 2), (5, 3))]
EXTRA = {"quasimetric.alpha": ("scalars", 0), "multiplier.log_value": ("scalars", 1), "log_std": ("log_std", 0)}


def parameters(agent: GoalAgent, nets: Any) -> list[tuple[str, Tensor, Tensor, bool]]:
    """(name, the agent's values, the hand-written loop's, whether transposed)."""
    found: list[tuple[str, Tensor, Tensor, bool]] = []
    for name, network in agent.networks.items():
        for path, module in network.named_modules():
            if isinstance(module, MLP):
                for e, member in enumerate(nets[name]):
                    dense = [m for m in member if isinstance(m, nn.Linear)]
                    norms = [m for m in member if isinstance(m, nn.LayerNorm)]
                    found += [
                        (f"{name}.{path}", k[e], d.weight, True) for k, d in zip(module.kernels, dense, strict=True)
                    ]
                    found += [
                        (f"{name}.{path}", b[e], d.bias, False) for b, d in zip(module.biases, dense, strict=True)
                    ]
                    found += [
                        (f"{name}.{path}", s[e], n.weight, False) for s, n in zip(module.scales, norms, strict=True)
                    ]
                    found += [
                        (f"{name}.{path}", s[e], n.bias, False) for s, n in zip(module.shifts, norms, strict=True)
                    ]
        for path, parameter in network.named_parameters():
            for end, (key, i) in EXTRA.items():
                if f"{name}.{path}".endswith(end):
                    found.append((f"{name}.{path}", parameter, nets[key][i], False))
    return found


@torch.no_grad()
def same_weights(agent: GoalAgent, loop: Loop) -> None:
    """Random weights for both, targets different from what they follow."""
    rng = torch.Generator().manual_seed(7)
    for parameter in agent.networks.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    copied = 0
    for _, ours, theirs, transposed in parameters(agent, loop.nets):
        theirs.copy_(ours.T if transposed else ours)
        copied += ours.numel()
    assert (
        copied == sum(p.numel() for p in agent.networks.parameters()) == sum(p.numel() for p in loop.nets.parameters())
    )


def rows_of(batch: GoalBatch) -> Rows:
    def flat(name: str) -> Tensor | None:
        return batch.more[name].flat if name in batch.more else None

    s, s_next, g_v, g_a = (x.flat for x in (batch.s, batch.s_next, batch.g_v, batch.g_a))
    assert s is not None and s_next is not None and g_v is not None and g_a is not None
    w, target, z = (flat(name) for name in ("low_actor_goals", "high_actor_targets", "skills"))
    return Rows(s, s_next, g_v, g_a, batch.a, batch.at_goal, w, target, z)


def both(method: str, shape: tuple[int, int]) -> tuple[GoalAgent, Loop, GoalBatch]:
    data = point_maze_like(*shape, episodes=5, steps=40)
    agent = make_agent(method, data, preset="small", hidden=(24, 24), batch_size=32)
    assert isinstance(agent, GoalAgent)
    agent.inputs.fit(data.observations)
    loop = hand_written(method, data, agent.config)
    same_weights(agent, loop)
    return agent, loop, agent.sample(data, torch.Generator().manual_seed(3))


def agree(method: str, shape: tuple[int, int]) -> bool:
    """Whether losses and gradients are equal but for rounding."""
    agent, loop, batch = both(method, shape)
    ours, _ = agent.loss(batch)
    theirs = loop.loss(loop.nets, rows_of(batch), agent.config)
    ours.backward()
    theirs.backward()
    worst = 0.0
    gradients = {id(p): p.grad for p in agent.networks.parameters()}
    for name, network in agent.networks.items():  # views of the agent's gradients in the place of its parameters
        for p in network.parameters():
            assert (p.grad is None) == (name in agent.targets)
    with torch.no_grad():
        for p in agent.networks.parameters():
            gradient = gradients[id(p)]
            p.copy_(torch.zeros_like(p) if gradient is None else gradient)
    for _, grad, parameter, transposed in parameters(agent, loop.nets):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grad = grad.detach().T if transposed else grad.detach()
        worst = max(worst, float((own - grad).abs().max() / (1e-3 + grad.abs().max())))
    return abs(float((theirs - ours).detach())) < 1e-5 * max(abs(float(ours.detach())), 1) and worst < 1e-3


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_same_loss_and_gradients(method: str, shape: tuple[int, int]) -> None:
    assert agree(method, shape)


@pytest.mark.parametrize("method", [m for m in METHODS if m.partition(":")[0] in LOSSES])
def test_other_maths_is_noticed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = method.partition(":")[0]
    right = LOSSES[name]

    def wrong(nets: Any, rows: Rows, config: Any) -> Tensor:
        return right(nets, replace(rows, a=rows.a * 0.99), config)

    monkeypatch.setattr(minimal, "LOSSES", {**LOSSES, name: wrong})
    assert not agree(method, (2, 2))
