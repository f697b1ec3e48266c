"""The benchmark of updates: rows are complete, unknown names are refused. No speed is asserted."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import clbench.bench.updates as bench
from clbench.agents.gcrl.base import GoalAgent
from clbench.bench.rollouts import LIMIT, OURS
from clbench.bench.updates import BATCHED, DEFAULT, bench_updates, point_maze_like
from clbench.cli.main import _main
from clbench.errors import ConfigError, UnknownNameError

KEYS = {
    "name", "device", "value", "unit", "ratio_to_limit", "agent", "preset", "implementation", "obs", "act", "seeds",
    "updates_per_graph", "batch_size", "hidden", "threads", "clock", "rounds", "memory_ratio",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHORT", 0.001)


@pytest.fixture
def rows(short: None) -> list[dict[str, Any]]:
    return bench_updates(DEFAULT, seeds=2, quick=True, rounds=2, threads=1)


def test_rows_are_complete(rows: list[dict[str, Any]]) -> None:
    json.dumps(rows, allow_nan=False)
    assert len({r["name"] for r in rows}) == len(rows) == 3 * 8 + 2
    for row in rows:
        assert row.keys() == KEYS
        assert row["unit"] == "updates/s" and row["threads"] == 1 and row["rounds"] == 2 and row["seeds"] == 2
        assert row["value"] > 0 and math.isfinite(row["value"])
        if row["agent"] in ("bc", "pldm"):
            assert row["ratio_to_limit"] is None and row["implementation"] == OURS
        else:
            assert row["ratio_to_limit"] > 0 and row["implementation"] in (OURS, LIMIT, BATCHED)
            assert row["implementation"] != LIMIT or row["ratio_to_limit"] == 1


@pytest.mark.parametrize("method", bench.eidetic.SHAPES)
def test_eidetic_networks_beside_plain_ones(method: str) -> None:
    ours, limit = bench_updates([method], quick=True, rounds=2, threads=1)
    assert ours.keys() == limit.keys() == KEYS and ours["agent"] == method and ours["implementation"] == OURS
    assert ours["ratio_to_limit"] > 0 and limit["ratio_to_limit"] == 1
    assert ours["memory_ratio"] > 1 == limit["memory_ratio"]


def test_half_of_the_units_of_the_eidetic_network_are_owned_and_it_learns() -> None:
    updates, config, _ = bench.eidetic.implementations("eidetic:mlp", "cpu", quick=True)
    learner = updates["ours"].__self__
    share = 1 - learner.module.capacity().share("free")
    assert share == 0.5 and config.hidden == (16, 16)
    before = torch.nn.functional.cross_entropy(learner.forward(), learner.y).item()
    for _ in range(50):
        learner.update()
    assert torch.nn.functional.cross_entropy(learner.forward(), learner.y).item() < before


def test_memory_counts_every_storage_once() -> None:
    """A linear layer by hand: weight and bias, each with gradient, two moments and a step; the input."""
    layer, x, y = torch.nn.Linear(30, 10), torch.randn(20, 30), torch.randint(10, (20,))
    learner = bench.eidetic.Learner(list(layer.parameters()), lambda: layer(x), y, layer)
    assert learner.memory() == 4 * (4 * (300 + 10) + 2 + 600)


def test_the_ratio_is_ours_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says how long each took: twice the time of the limit is half as fast."""
    now = {OURS: 4.0, LIMIT: 2.0}

    def seconds(update: Any, calls: int, clock: Any, device: str) -> float:
        update()
        return next(now[name] for name, known in made.items() if known is update)

    made: dict[str, Any] = {}
    implementations = bench._implementations

    def remember(*arguments: Any) -> Any:
        updates, config = implementations(*arguments)
        made.update(updates)
        return updates, config

    monkeypatch.setattr(bench, "_implementations", remember)
    monkeypatch.setattr(bench, "_seconds", seconds)
    ours, limit = bench_updates(["gcbc"], quick=True, rounds=3)
    assert (ours["implementation"], ours["value"], ours["ratio_to_limit"]) == (OURS, 0.25, 0.5)
    assert (limit["implementation"], limit["value"], limit["ratio_to_limit"]) == (LIMIT, 0.5, 1)


def test_all_rows_count_the_updates_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call makes K updates of every implementation, and the speed is of updates, not of calls."""
    made, update = {"ours": 0, "limit": 0}, GoalAgent.update

    def ours(self: GoalAgent, batch: Any) -> Any:
        made["ours"] += 1
        return update(self, batch)

    class Counted(bench.Loop):
        def update(self) -> None:
            made["limit"] += 1

    def seconds(update: Any, calls: int, clock: Any, device: str) -> float:
        before = dict(made)
        update()
        assert sorted(made[k] - before[k] for k in made) == [0, 5]
        return 2.0

    monkeypatch.setattr(GoalAgent, "update", ours)
    monkeypatch.setattr(bench, "Loop", Counted)
    monkeypatch.setattr(bench, "_seconds", seconds)
    rows = bench_updates(["gcbc"], updates_per_graph=5, quick=True)
    assert [(r["implementation"], r["value"], r["updates_per_graph"]) for r in rows] == [
        (OURS, 2.5, 5),
        (LIMIT, 2.5, 0),
    ]


def test_threads_and_generators_are_as_before() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    bench_updates(["gcbc"], quick=True, threads=1)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(2, 2), (5, 2), (2, 3)])
def test_data_are_walks(shape: tuple[int, int]) -> None:
    data = point_maze_like(*shape, episodes=3, steps=20)
    assert len(data) == 60 and data.is_goal and data.actions.shape == (60, shape[1])
    assert float(data.actions.abs().max()) <= 1
    obs, following = data.observation(torch.arange(60)), data.next_observation(torch.arange(60))
    step = (following["observation"] - obs["observation"])[:, :2]
    assert torch.allclose(step, 0.2 * data.actions[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"agents": ["random"]}, UnknownNameError, "agent 'random'"),
        ({"preset": "antmaze"}, UnknownNameError, "preset 'antmaze'"),
        ({"clock": "sun"}, UnknownNameError, "clock 'sun'"),
        ({"updates_per_graph": -1}, ConfigError, "updates_per_graph must be at least 0, got -1"),
        ({"seeds": 0}, ConfigError, "seeds must be at least 1, got 0"),
        ({"rounds": 0}, ConfigError, "rounds must be at least 1"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        bench_updates(**options)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["bench", "updates", "--agents", "gcbc,bc", "--quick", "--json", "--threads", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows] == ["gcbc clbench", "gcbc limit", "bc clbench"]
    assert _main(["bench", "updates", "--agent", "gcbc", "--quick", "--rounds", "1"]) == 0
    assert "gcbc limit" in capsys.readouterr().out
