"""The probe leaves no trace, survives stops, and measures what it says; online accuracy counts every sample once."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import clbench
from clbench import experiments
from clbench.agents.bc import BC
from clbench.data.registry import load_dataset
from clbench.errors import ConfigError, ContractError, Interrupted
from clbench.experiments import load_agent, read_run
from clbench.loop import Loop, Position
from clbench.metrics.features import dormant_share, linear_cka, weight_norms
from clbench.probe import load_features, probe_agent, probe_inputs
from clbench.records import state_digest
from clbench.streams.core import make_stream

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"agent_options": {"hidden": (12, 8), "activation": "relu", "log_every": 7}}


def run(path: Path, agent: Any = "bc", stream: Any = "toys:digits", **settings: Any) -> experiments.RunResult:
    settings = {**(SMALL if agent == "bc" else {}), **settings}
    return clbench.run(stream, agent, out=path, tensorboard=False, eval_every=0, **settings)


@contextlib.contextmanager
def stopping_at(condition: Callable[[Position], bool]) -> Iterator[None]:
    make, patch = experiments._make_loop, pytest.MonkeyPatch()

    def made(resolved: Any, directory: Any, should_stop: Any) -> Loop:
        def stop() -> None:
            if condition(loop.position):
                raise Interrupted("stop")

        loop = make(resolved, directory, stop)
        return loop

    patch.setattr(experiments, "_make_loop", made)
    try:
        yield
    finally:
        patch.undo()


def finish(path: Path, every: int, **settings: Any) -> int:
    """Stop after every few units until the run is complete; -> how often it was stopped."""
    for stops in range(60):
        start: list[int] = []

        def due(position: Position, start: list[int] = start) -> bool:
            start.append(position.step)
            return position.step - start[0] >= every

        try:
            with stopping_at(due):
                run(path, **settings)
            return stops
        except Interrupted:
            pass
    raise AssertionError("the run did not get further")


def rows(path: Path, name: str = "probe.csv") -> list[dict[str, str]]:
    with (path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def value(path: Path, phase: int, task: str, layer: str, measure: str) -> float:
    found = [
        r for r in rows(path) if (r["phase"], r["task"], r["layer"], r["measure"]) == (str(phase), task, layer, measure)
    ]
    assert len(found) == 1
    return float(found[0]["value"])


# -- what is written -----------------------------------------------------------------------------------------------------


def test_the_probe_measures_what_it_says(tmp_path: Path) -> None:
    result = run(tmp_path / "run", probe=True)
    found = rows(tmp_path / "run")
    assert {r["phase"] for r in found} == set("0123") and {r["layer"] for r in found} == {
        "hidden-1",
        "features",
        "parameters",
    }
    assert {r["task"] for r in found} == {"", "task-0", "task-1", "task-2"}
    assert {r["step"] for r in found if r["phase"] == "2"} == {"80"}
    # CKA is there from the end of a task's own phase on, and 1 there
    assert {(r["phase"], r["task"]) for r in found if r["measure"] == "cka"} == {
        (str(i), f"task-{j}") for i in range(1, 4) for j in range(3) if j < i
    }
    for j in range(3):
        assert value(tmp_path / "run", j + 1, f"task-{j}", "features", "cka") == pytest.approx(1)
    # the last phase, from the trained agent
    agent = load_agent(tmp_path / "run")
    obs = probe_inputs(result.stream.tasks[0], CPU)
    now = probe_agent(agent, obs)
    assert now["hidden-1"].shape == (30, 12) and now["features"].shape == (30, 8)
    own = load_features(tmp_path / "run" / "features" / "task-0.npz")
    assert value(tmp_path / "run", 3, "task-0", "features", "cka") == pytest.approx(
        linear_cka(now["features"], own["features"])
    )
    assert value(tmp_path / "run", 3, "task-0", "features", "cka") < 0.9999
    assert value(tmp_path / "run", 3, "task-0", "hidden-1", "dormant_0.1") == pytest.approx(
        dormant_share(now["hidden-1"], 0.1)
    )
    norms = weight_norms(agent.trainables)  # type: ignore[attr-defined]
    assert value(tmp_path / "run", 3, "", "parameters", "weight_l2") == pytest.approx(norms["weight_l2"])


def test_the_inputs_are_the_first_observations_of_the_evaluation_list(tmp_path: Path) -> None:
    task = run(tmp_path / "run", "random").stream.tasks[1]
    seen: list[torch.Tensor] = []

    class Sees(toys.Linear):
        def act(self, obs, memory, first, *, rng, task=None, explore=False):
            seen.append(obs.clone())
            return super().act(obs, memory, first, rng=rng)

    run(tmp_path / "sees", Sees, budget=1)
    assert any(torch.equal(probe_inputs(task, CPU), obs) for obs in seen)
    assert torch.equal(probe_inputs(task, CPU), probe_inputs(task, CPU))
    benchmark = make_stream("digits-permuted", seed=0).tasks[1]
    inputs, data = probe_inputs(benchmark, CPU), load_dataset(benchmark.dataset_id or "", CPU).observations
    assert isinstance(data, torch.Tensor)
    assert len(inputs) == 256
    assert not bool((inputs[:, None] == data[None]).all(-1).any())  # none of them is trained on


def test_a_run_without_the_probe_is_what_it_was(tmp_path: Path) -> None:
    result = run(tmp_path / "run")
    assert not (tmp_path / "run" / "probe.csv").exists() and not (tmp_path / "run" / "features").exists()
    resolved = read_run(result.path).resolved
    assert resolved.fingerprint == json.loads((result.path / "config.json").read_text())["fingerprint"]


@pytest.mark.parametrize(("settings", "phases"), [({"protocol": "independent"}, "123"), ({"protocol": "joint"}, "01")])
def test_protocols(tmp_path: Path, settings: dict[str, Any], phases: str) -> None:
    run(tmp_path / "run", probe=True, **settings)
    found = rows(tmp_path / "run")
    assert {r["phase"] for r in found} == set(phases)
    if settings["protocol"] == "independent":
        assert {(r["phase"], r["task"]) for r in found if r["task"]} == {(str(i + 1), f"task-{i}") for i in range(3)}


def test_overwriting_takes_the_probe_away(tmp_path: Path) -> None:
    run(tmp_path / "run", probe=True)
    run(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "probe.csv").exists() and not (tmp_path / "run" / "features").exists()


# -- purity --------------------------------------------------------------------------------------------------------------


class DrawsInProbe(BC):
    """Draws from the process-wide generator in the probe, and in training."""

    def probe(self, obs: Any, task: Any = None) -> dict[str, torch.Tensor]:
        torch.rand(3)
        return super().probe(obs, task)

    def update(self, batch: Any) -> Any:
        with torch.no_grad():
            for p in self.trainables:
                p += 1e-3 * torch.randn(p.shape)
        return super().update(batch)


def final(result: experiments.RunResult) -> dict[str, str]:
    assert result.agent is not None
    return state_digest(result.agent.state_dict())


@pytest.mark.parametrize(
    "settings", [{"agent": "bc"}, {"agent": DrawsInProbe, **SMALL}, {"agent": "bc", "method": "er,ewc"}]
)
def test_the_probe_never_changes_training(tmp_path: Path, settings: dict[str, Any]) -> None:
    with_probe, without = (run(tmp_path / str(p), probe=p, **settings) for p in (True, False))
    assert final(with_probe) == final(without)
    for name in ("eval.csv", "train.csv"):
        assert (with_probe.path / name).read_bytes() == (without.path / name).read_bytes()
    results = [json.loads((r.path / "results.json").read_text()) for r in (with_probe, without)]
    assert results[0] == results[1]


def test_negative_control_without_the_seal_the_draws_would_reach_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clbench.loop.sealed_global_rng", contextlib.nullcontext)
    runs = [run(tmp_path / str(p), DrawsInProbe, probe=p, **SMALL) for p in (True, False)]
    assert final(runs[0]) != final(runs[1])


class LearnsInProbe(BC):
    def probe(self, obs: Any, task: Any = None) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            self.trainables[0].mul_(0.9)
        return super().probe(obs, task)


def test_negative_control_a_probe_that_changes_the_agent_is_caught(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="The probe changed the agent .*policy"):
        run(tmp_path / "run", LearnsInProbe, probe=True, **SMALL)


def test_an_agent_without_a_probe_and_one_with_a_wrong_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'random' cannot be probed; .*probe\(obs, task\)"):
        run(tmp_path / "none", "random", probe=True)
    assert not (tmp_path / "none").exists()

    class Short(BC):
        def probe(self, obs: Any, task: Any = None) -> dict[str, torch.Tensor]:
            return {"features": torch.zeros(2, 3)}

    with pytest.raises(ContractError, match=r"Short\.probe must return .* 30 observations"):
        run(tmp_path / "short", Short, probe=True, **SMALL)


# -- stop and resume -----------------------------------------------------------------------------------------------------

FILES = ("probe.csv", "features/task-0.npz", "features/task-1.npz", "eval.csv", "train.csv", "results.json")


@pytest.mark.parametrize("settings", [{}, {"reveals": "nothing", "schedule": "blurred", "method": "er"}])
def test_stopped_and_resumed_the_probe_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    run(tmp_path / "whole", probe=True, **settings)
    assert finish(tmp_path / "stopped", 31, probe=True, **settings) >= 3
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [1, 2, 4])
def test_killed_while_the_probe_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """The rows are in the file but no checkpoint knows of them: they are taken again, not twice."""
    run(tmp_path / "whole", probe=True)
    checkpoint, probe = Loop._checkpoint, Loop._probe_between_segments
    probes = 0

    def dying(self: Loop) -> None:
        nonlocal probes
        probes += 1
        with pytest.MonkeyPatch.context() as patch:
            if probes == moment:
                patch.setattr(Loop, "_checkpoint", lambda *_: (_ for _ in ()).throw(Killed()))
            probe(self)

    monkeypatch.setattr(Loop, "_probe_between_segments", dying)
    with pytest.raises(Killed):
        run(tmp_path / "killed", probe=True)
    assert Loop._checkpoint is checkpoint
    monkeypatch.setattr(Loop, "_probe_between_segments", probe)
    written = len(rows(tmp_path / "killed"))
    run(tmp_path / "killed", probe=True)
    assert len(rows(tmp_path / "killed")) >= written > 0
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_negative_control_a_log_that_is_not_cut_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole", probe=True)
    with stopping_at(lambda p: p.step > 50), pytest.raises(Interrupted):
        run(tmp_path / "stopped", probe=True)
    with (tmp_path / "stopped" / "probe.csv").open("a") as file:
        file.write("1,40,task-0,features,srank,77\n")  # what a killed process wrote beyond its checkpoint
    restart = clbench.records.GrowingCsv.restart  # type: ignore[attr-defined]

    def keeps_all(self: Any, count: int = 0, header: Any = None) -> None:
        if count and self.path.name == "probe.csv":
            count = len(self.path.read_text().splitlines()) - 1
        restart(self, count, header)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.records.GrowingCsv.restart", keeps_all)
        run(tmp_path / "stopped", probe=True)
    assert (tmp_path / "whole" / "probe.csv").read_bytes() != (tmp_path / "stopped" / "probe.csv").read_bytes()


def test_switching_the_probe_on_is_another_configuration(tmp_path: Path) -> None:
    run(tmp_path / "run")
    with pytest.raises(ConfigError, match="probe: False there, True now"):
        run(tmp_path / "run", probe=True)


# -- online accuracy -----------------------------------------------------------------------------------------------------


class Counts(BC):
    """Notes every prediction that is made before the update on it."""

    noted: list[tuple[int, int]] = []

    def update(self, batch: Any) -> Any:
        with torch.no_grad():
            right = int((self.policy(batch.observations, batch.task).argmax(1) == batch.actions).sum())
        Counts.noted.append((right, len(batch.index)))
        return super().update(batch)


def brute_force(phases: int, budget: int) -> list[float]:
    assert len(Counts.noted) == phases * budget
    parts = [Counts.noted[i * budget : (i + 1) * budget] for i in range(phases)]
    return [sum(r for r, _ in part) / sum(n for _, n in part) for part in parts]


@pytest.mark.parametrize(
    ("per_phase", "log_every", "settings"),
    [(200, 7, {}), (3, 1, {}), (3, 7, {"reveals": "nothing"}), (3, 7, {"method": "er"}), (3, 1000, {})],
)
def test_online_accuracy_is_that_of_every_sample_however_rows_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_phase: int, log_every: int, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr("clbench.loop.LOG_POINTS_PER_PHASE", per_phase)
    Counts.noted = []
    options = {"hidden": (8,), "log_every": log_every, "batch_size": 5}
    result = run(tmp_path / "run", Counts, budget=50, agent_options=options, evaluate=False, **settings)
    expected = brute_force(3, 50)
    online = result.results["online"]
    assert online["per_phase"] == pytest.approx(expected, abs=1e-12)
    assert online["accuracy"] == pytest.approx(sum(expected) / 3, abs=1e-12)
    assert online["loss_of_plasticity"] == pytest.approx(expected[0] - expected[2], abs=1e-12) and online["k"] == 1
    train = rows(tmp_path / "run", "train.csv")
    assert sum(float(r["online_count"] or 0) for r in train) == 3 * 50 * 5
    assert all(sum(r["phase"] == str(i) for r in train) <= per_phase + 2 for i in (1, 2, 3))


def test_negative_control_rows_that_are_dropped_lose_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clbench.loop.LOG_POINTS_PER_PHASE", 3)
    monkeypatch.setattr(Loop, "_collect_online", lambda *_: None)
    Counts.noted = []
    result = run(tmp_path / "run", Counts, budget=50, agent_options={"hidden": (8,), "log_every": 1}, evaluate=False)
    assert result.results["online"]["per_phase"] != pytest.approx(brute_force(3, 50), abs=1e-3)


def test_stopped_and_resumed_nothing_is_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clbench.loop.LOG_POINTS_PER_PHASE", 3)
    whole = run(tmp_path / "whole", budget=50)
    assert finish(tmp_path / "stopped", 13, budget=50) >= 5
    for name in ("train.csv", "results.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    assert len(whole.results["online"]["per_phase"]) == 3


def test_of_an_interrupted_run_only_finished_phases_count(tmp_path: Path) -> None:
    with stopping_at(lambda p: p.step > 100), pytest.raises(Interrupted):
        run(tmp_path / "run", budget=50, agent_options={"hidden": (8,), "log_every": 1})
    online = json.loads((tmp_path / "run" / "results.json").read_text())["online"]
    assert [v is None for v in online["per_phase"]] == [False, False, True]
    assert online["loss_of_plasticity"] is None
    assert online["accuracy"] == pytest.approx(sum(online["per_phase"][:2]) / 2)


def test_agents_that_report_none_have_none(tmp_path: Path) -> None:
    assert "online" not in run(tmp_path / "run", toys.Linear).results
