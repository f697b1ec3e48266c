"""Data that are encoded once give the batches that are encoded row by row."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import clbench.agents.gcrl.base as base
from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.bench.updates import make_agent, point_maze_like
from clbench.data.dataset import OfflineDataset

DATA = point_maze_like(2, 2, episodes=4, steps=5)  # short: many rows are the last of their episode


def prepared(method: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> GoalAgent:
    monkeypatch.setattr(base, "KEPT_BYTES", kept)
    options: dict[str, Any] = {"hidden": (8,), "batch_size": 40, "normalise": True, "frequencies": 2}
    agent = make_agent(method, DATA, **options)
    assert isinstance(agent, GoalAgent)
    agent.prepare(DATA)
    return agent


def sampled(agent: GoalAgent, data: OfflineDataset = DATA) -> GoalBatch:
    return agent.sample(data, torch.Generator().manual_seed(1))


def same(a: GoalBatch, b: GoalBatch) -> bool:
    pairs = zip(tree_leaves(vars(a)), tree_leaves(vars(b)), strict=True)
    return all(
        x is y is None or (x is not None and y is not None and torch.allclose(x, y, atol=1e-6)) for x, y in pairs
    )


@pytest.mark.parametrize("method", ["gcbc", "gcivl", "hiql", "hilp"])
def test_the_same_batches(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    once, each = prepared(method, 2**27, monkeypatch), prepared(method, 0, monkeypatch)
    assert once._encoded is not None and each._encoded is None
    assert same(sampled(once), sampled(each))


def test_other_data_are_not_mistaken_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    once, each = prepared("gcivl", 2**27, monkeypatch), prepared("gcivl", 0, monkeypatch)
    other = dataclasses.replace(DATA, actions=-DATA.actions, check=False)
    assert same(sampled(once, other), sampled(each, other))
    assert not same(sampled(once, other), sampled(once))


def test_a_loaded_agent_encodes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, source = (prepared("gcivl", 2**27, monkeypatch) for _ in range(2))
    source.inputs.transforms["observation"].center.add_(1)  # type: ignore[operator]
    before = sampled(agent)
    agent.load_state_dict(source.state_dict())
    assert not same(sampled(agent), before)
    agent.updates = 1  # inputs are fitted once
    agent.prepare(DATA)
    assert not same(sampled(agent), before)
