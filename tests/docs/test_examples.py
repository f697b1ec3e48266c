"""The example files: each passes the conformance suite and goes through a real run."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import clbench
from clbench import experiments
from clbench.agents.networks import eidetic
from clbench.errors import ClbenchError, Interrupted
from clbench.experiments import RunResult
from clbench.records import state_digest
from clbench.registry import resolve
from clbench.testing import (
    check_agent,
    check_dataset,
    check_env,
    check_method,
    check_schedule,
    check_stream,
    run_check,
)

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET: dict[str, Any] = {"tensorboard": False, "eval_every": 0}
EPISODES = clbench.TaskList.from_seeds(40)


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder outside the repository with the example files in it."""
    for file in EXAMPLES.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("my_")]:
        del sys.modules[name]


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    assert [f.stem for f in EXAMPLES.glob("*.py") if f"{f.stem}:" not in text and f"from {f.stem} " not in text] == []


@pytest.mark.parametrize("name", ["my_agent:MyAgent", "my_online_agent:ActorCritic"])
def test_agents_conform(name: str) -> None:
    cls = resolve("agents", name)
    check_agent(cls, config={"hidden": 8}, budget=24).raise_if_failed()


def test_a_method_of_ones_own_conforms() -> None:
    check_method(resolve("methods", "my_method:SlowOldWeights"), agents=["bc", "gcbc"]).raise_if_failed()


def test_an_objective_of_ones_own_conforms_and_plans() -> None:
    small: dict[str, Any] = {
        "window": 4, "batch_size": 4, "replan_every": 2,
        "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,), "channels": (4, 4, 4)},
        "planner_options": {"horizon": 8, "samples": 16, "elites": 4, "iterations": 1},
    }  # fmt: skip
    cls = resolve("agents", "my_objective:LatePLDM")
    check_agent(cls, config=small, budget=12).raise_if_failed()
    result = clbench.run(
        "two-rooms/size-634-v0", cls, budget=2, agent_options=small, stream_options={"episodes": 2}, **QUIET
    )
    agent: Any = result.agent
    objective = agent.objective(torch.zeros(2, 4))
    costs = [float(objective(torch.ones(2, 3, 4), step).sum()) for step in range(1, 9)]
    assert costs == [0.0] * 4 + [6.0] * 4
    assert float(objective.select(slice(1, 2))(torch.ones(1, 3, 4), 8).sum()) == 3.0


def test_the_agent_learns() -> None:
    result = clbench.run("digits-split", "my_agent:MyAgent", budget=60, **QUIET)
    independent = clbench.run("digits-split", "my_agent:MyAgent", budget=60, protocol="independent", **QUIET)
    assert independent.results["metrics"]["average_performance"] > 0.8
    assert result.results["metrics"]["learning_accuracy"] > 0.8  # each task on its own ...
    assert result.results["metrics"]["backward_transfer"] < -0.3  # ... and then it is forgotten


@contextlib.contextmanager
def stop_soon() -> Iterator[Any]:
    """Instead of Ctrl-C: asks to stop in the middle of the second phase."""
    calls = iter(range(30))

    def should_stop() -> None:
        if next(calls, None) is None:
            raise Interrupted("stop")

    yield should_stop


@pytest.mark.parametrize("name", ["my_agent:MyAgent", "my_online_agent:ActorCritic"])
def test_agents_resume_exactly(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tuple(clbench.Task(f"cells-{n}", "my_env:Corridor", {"cells": n}) for n in (4, 6))
    corridors = clbench.Stream("corridors", tasks, tuple(clbench.Phase(t.name, 160) for t in tasks))
    stream: Any = corridors if "online" in name else "digits-split"

    def go(folder: str) -> RunResult:
        return clbench.run(stream, name, out=tmp_path / folder, evaluate=False, **settings)

    settings: dict[str, Any] = {"tensorboard": False} if "online" in name else {"tensorboard": False, "budget": 20}
    whole = go("whole")
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "_stopping", stop_soon)
        with pytest.raises(Interrupted):
            go("stopped")
    assert (tmp_path / "stopped" / "checkpoint.pt").exists()
    resumed = go("stopped")
    assert whole.agent is not None and resumed.agent is not None
    assert state_digest(whole.agent.state_dict()) == state_digest(resumed.agent.state_dict())


@pytest.mark.parametrize("env", ["my_env:Corridor", "my_batched_env:Corridors"])
def test_environments_conform_and_are_learned(env: str) -> None:
    check_env(env, success=True).raise_if_failed()
    task = clbench.Task("corridor", env, {"cells": 6}, evaluation=EPISODES)
    stream = clbench.Stream("corridor", (task,), (clbench.Phase("corridor", 6000),))
    options = {"lr": 1e-2}
    trained = clbench.run(stream, "my_online_agent:ActorCritic", num_envs=16, agent_options=options, **QUIET)
    before, after = (row[0] for row in trained.results["matrix"])
    assert after > 0.9 > before


def test_the_data_set_conforms_and_shows_the_way() -> None:
    check_dataset("my_dataset:corridor_walks", episodes=20).raise_if_failed()
    task = clbench.Task("c", "my_env:Corridor", {"cells": 6}, "my_dataset:corridor_walks?cells=6", evaluation=EPISODES)
    stream = clbench.Stream("corridor", (task,), (clbench.Phase("c", 200),))
    cloned = clbench.run(stream, "bc", agent_options={"hidden": (32,), "lr": 1e-2}, **QUIET)
    before, after = (row[0] for row in cloned.results["matrix"])
    assert after > 0.9 > before


def test_the_planner_conforms() -> None:
    run_check("my_planner:HalfWay").raise_if_failed()


def test_the_stream_and_the_schedule_conform_and_run() -> None:
    check_stream("my_stream:pendulum_gravity", tasks=2).raise_if_failed()
    check_schedule("my_schedule:there_and_back").raise_if_failed()
    result = clbench.run(
        "my_stream:pendulum_gravity", "random", budget=400, schedule="my_schedule:there_and_back",
        stream_options={"tasks": 2, "episodes": 2}, **QUIET,
    )  # fmt: skip
    scores = [score for row in result.results["matrix"] for score in row]
    assert all(0 < score < 1 for score in scores)
    assert [p.visit for p in result.stream.phases] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WrongShape", r"WrongShape.act returned actions of shape \(\d+, 10\), expected \(\d+,\)"),
        ("NeedsTaskId", "requires 'task_id', but stream 'digits-split' does not offer it: it reveals 'boundaries'"),
        ("RaisesInLearn", r"RaisesInLearn.learn raised ZeroDivisionError at .*mistakes.py:\d+"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ClbenchError, match=message) as error:
        clbench.run("digits-split", f"mistakes:{name}", budget=2, out=tmp_path / "run", **QUIET)
    assert "\n" not in str(error.value)
    assert name == "RaisesInLearn" or not (tmp_path / "run").exists()


def test_a_missing_key_is_found_by_the_conformance_suite() -> None:
    failures = run_check("mistakes:MissingKey").failures
    assert any("optimizer" in f.message for f in failures)


def test_the_eidetic_network_learns_both_tasks_and_keeps_the_first() -> None:
    from my_eidetic_network import TASKS, accuracy, learn  # type: ignore[import-not-found]

    network = learn()
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    assert all(accuracy(network, task, x) > 0.85 for task in range(len(TASKS)))
    evidence = eidetic.verify(network)
    assert set(evidence.status.values()) == {"pass"}, evidence.details
    assert evidence.max_abs_change == 0
    units = network.capacity().units
    assert all(0 < units[name].get(str(task), 0) < 48 for name in units for task in range(len(TASKS)))
    with torch.no_grad():  # the negative control: what no optimiser can do
        network.body[0].weight.store[0] += 1e-3
    assert not eidetic.verify(network).ok
