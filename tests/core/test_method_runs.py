"""Runs with continual methods: the command line, runs that are read back, runs that are stopped and killed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from clbench import experiments
from clbench.agents.continual.compose import compose
from clbench.errors import ConfigError, Interrupted
from clbench.experiments import load_agent, read_run
from clbench.loop import Loop
from clbench.records import load_checkpoint, state_digest
from clbench.registry import entries, resolve
from clbench.report import report_markdown
from tests.core.test_cli import clbench, kill_and_resume

DIGITS = ["run", "digits-permuted", "--agent", "bc"]
SHORT = ["--stream.tasks", "2", "--budget", "10", "--no-tensorboard", "--no-report"]
TOGETHER = ["--method", "er,ewc", "--method.ewc.strength", "10", "--method.er.memory", "30"]
QUICK: dict[str, Any] = {"samples": 8, "memory": 24}


# -- the command line ------------------------------------------------------------------------------------------------------


def test_methods_and_their_options_are_given_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = clbench(capsys, *DIGITS, *TOGETHER, *SHORT)
    assert code == 0, err
    path = tmp_path / "runs" / "digits-permuted" / "bc+er+ewc" / "seed-0"
    config = json.loads((path / "config.json").read_text())["config"]
    assert config["agent"] == "bc" and config["method"] == ["er", "ewc"]
    assert config["method_options"]["ewc"]["strength"] == 10.0 and config["method_options"]["er"]["memory"] == 30
    assert config["method_options"]["ewc"]["samples"] == 200 and "hidden" in config["agent_options"]
    assert json.loads((path / "results.json").read_text())["method"] == ["er", "ewc"]
    assert "bc+er+ewc" in out
    assert clbench(capsys, *DIGITS, *SHORT)[0] == 0
    code, out, err = clbench(capsys, "report", "runs", "--out", "page.html")
    rows = [line for line in out.splitlines() if line.startswith("| bc") or line.lstrip().startswith("bc")]
    assert code == 0 and len(rows) == 2 and "bc+er+ewc" in out, err
    assert "| bc+er+ewc |" in report_markdown([path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DIGITS, "--method", "ewcc"], "Unknown method 'ewcc'. Did you mean 'ewc'"),
        ([*DIGITS, "--method", "er,er"], "Method 'er' is named twice."),
        ([*DIGITS, "--method", "nowhere:Thing"], "There is no module 'nowhere'"),
        ([*DIGITS, "--method", "toys:Linear"], "must be a subclass of clbench.Method"),
        ([*DIGITS, "--method", "upgd,upgd-feature"], "each bring an optimiser of their own; choose one"),
        (["run", "digits-permuted", "--agent", "random", "--method", "er"], "no parameters that methods could reach"),
        (["run", "digits-split", "--agent", "eidetic-bc", "--method", "l2"], "protect finished tasks themselves."),
        (["run", "digits-split", "--agent", "sb3-ppo", "--method", "er"], "computes it inside its own training."),
        (["run", "digits-split", "--agent", "sb3-dqn", "--method", "er"], "(--agent.buffer keep)."),
        (["run", "digits-split", "--agent", "bc", "--method", "packnet"], "add --reveals task_id"),
        ([*DIGITS, "--method", "l2", "--reveals", "nothing"], "requires 'boundaries'"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit_are_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = clbench(capsys, *arguments, *SHORT[2:])
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ewc", "--method.ewc.strenght", "1"], "--method.ewc.strength"),
        (["--method", "ewc", "--method.er.memory", "1"], "--method.er.memory"),
        (["--method", "ewc", "--method.ewc.strength", "-1"], "strength must be at least 0"),
        (["--method.ewc.strength", "1"], "--method.ewc.strength"),
    ],
)
def test_wrong_options_of_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = clbench(capsys, *DIGITS, *arguments, *SHORT)
    assert code == 2 and message in err
    assert not list(tmp_path.iterdir())


def test_methods_are_listed(capsys: Any) -> None:
    code, out, _ = clbench(capsys, "list", "methods", "--json")
    listing = json.loads(out)["methods"]
    assert code == 0 and {"er", "ewc", "l2"} <= {e["name"] for e in listing}
    assert all(e["summary"] for e in listing)


# -- runs that are read back -----------------------------------------------------------------------------------------------


def small(method: str, agent: str = "bc") -> dict[str, Any]:
    """Settings of a short run of the method."""
    cls = resolve("methods", method)
    known = {f.name for f in dataclasses.fields(cls.Config)}
    group = compose(agent, [method]).Config.__dataclass_fields__
    (field,) = set(group) - {"agent"}
    return {
        "method": (method,), "budget": 12, "eval_every": 6, "tensorboard": False, "stream_options": {"tasks": 3},
        "agent_options": {"hidden": (16,), "batch_size": 8},
        "method_options": {field: {k: v for k, v in QUICK.items() if k in known}},
    }  # fmt: skip


def test_a_run_with_methods_is_read_and_its_agent_is_loaded(tmp_path: Path) -> None:
    settings = small("ewc") | {"method": ("er", "ewc")}
    made = experiments.run("digits-permuted", "bc", out=tmp_path / "run", **settings)
    saved = read_run(tmp_path / "run")
    assert saved.resolved.config.method == ("er", "ewc") and saved.resolved.config.label == "bc+er+ewc"
    assert saved.resolved.agent_config.ewc.samples == 8 and saved.resolved.agent_config.agent.hidden == (16,)
    agent: Any = load_agent(saved)
    assert made.agent is not None
    assert state_digest(agent.state_dict()) == state_digest(made.agent.state_dict())
    assert agent.methods["ewc"].fisher is not None
    assert state_digest(load_agent(tmp_path / "run").state_dict()) == state_digest(agent.state_dict())
    again = experiments.run("digits-permuted", "bc", out=tmp_path / "run", **settings)  # complete: returned as it is
    assert again.results == made.results


@pytest.mark.parametrize(
    "other",
    [{"method": ("er",)}, {"method": ()}, {"method_options": {"ewc": {"samples": 9}}}],
    ids=["methods", "none", "options"],
)
def test_a_run_of_other_methods_is_not_gone_on_with(tmp_path: Path, other: dict[str, Any]) -> None:
    settings = small("ewc") | {"stream_options": {"tasks": 2}}
    experiments.run("digits-permuted", "bc", out=tmp_path / "run", **settings)
    changed = {**settings, **other}
    if other.get("method") in ((), ("er",)):
        changed["method_options"] = {}
    with pytest.raises(ConfigError, match="holds a run of another configuration"):
        experiments.run("digits-permuted", "bc", out=tmp_path / "run", **changed)


# -- runs that are stopped -------------------------------------------------------------------------------------------------


def stopped_at_every(path: Path, step: int, settings: dict[str, Any], spoil: Any = None) -> int:
    """Stop the run whenever so many units have passed, and start it again, until it is complete."""
    for stops in range(40):
        make, first = experiments._make_loop, -1

        def made(resolved: Any, directory: Any, should_stop: Any, make: Any = make, spoilt: bool = stops > 0) -> Loop:
            def stop() -> None:
                nonlocal first
                first = loop.position.step if first < 0 else first
                if loop.position.step - first >= step:
                    raise Interrupted("stop")

            loop = make(resolved, directory, stop)
            if spoil is not None and spoilt:
                spoil(loop)
            return loop

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "_make_loop", made)
            try:
                experiments.run("digits-permuted", "bc", out=path, **settings)
                return stops
            except Interrupted:
                continue
    raise AssertionError("the run did not get further")


def files_and_state(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {n: (path / n).read_bytes() for n in ("eval.csv", "train.csv")}
    results = json.loads((path / "results.json").read_text()) | {"provenance": None}
    return {**found, "results": results, "state": state_digest(load_checkpoint(path / "checkpoint.pt")["agent"])}


@pytest.mark.parametrize("method", entries("methods"))
def test_a_run_with_any_method_is_stopped_and_resumed_exactly(tmp_path: Path, method: str) -> None:
    settings = small(method)
    experiments.run("digits-permuted", "bc", out=tmp_path / "whole", **settings)
    assert stopped_at_every(tmp_path / "stopped", 5, settings) >= 5
    assert files_and_state(tmp_path / "whole") == files_and_state(tmp_path / "stopped")


def test_a_method_whose_state_is_lost_is_noticed(tmp_path: Path) -> None:
    """The negative control of the test above."""
    settings = small("ewc")

    def forget(loop: Any) -> None:
        method = loop.agent.methods["ewc"]
        method.load_state_dict = lambda state: None

    experiments.run("digits-permuted", "bc", out=tmp_path / "whole", **settings)
    stopped_at_every(tmp_path / "stopped", 5, settings, forget)
    assert files_and_state(tmp_path / "whole")["state"] != files_and_state(tmp_path / "stopped")["state"]


# agent -> a short run on which its methods have more than one task to look back on
KILLED = {
    "bc": ["digits-permuted", "--budget", "300", "--stream.tasks", "3"],
    "gcbc": [
        "two-rooms-doors",
        "--budget",
        "300",
        "--eval-every",
        "0",
        "--agent.batch-size",
        "16",
        "--stream.episodes",
        "4",
        "--stream.transitions",
        "9216",
    ],
    "sb3-ppo": ["digits-permuted", "--budget", "400", "--stream.tasks", "3", "--agent.rollout-steps", "64"],
}


@pytest.mark.slow
@pytest.mark.parametrize("agent", KILLED)
@pytest.mark.parametrize("method", entries("methods"))
def test_twenty_kills_for_every_registered_method(tmp_path: Path, capsys: Any, method: str, agent: str) -> None:
    try:
        compose(agent, [method])
    except ConfigError as reason:
        pytest.skip(str(reason))
    reveals = ["--reveals", "task_id"] if "task_id" in resolve("methods", method).requires else []
    arguments = ["run", *KILLED[agent], "--agent", agent, "--method", method, *reveals, "--no-tensorboard",
                 "--no-report", "--checkpoint-seconds", "0"]  # fmt: skip
    kill_and_resume(tmp_path, capsys, arguments, kills=20, seed=2)
