"""``clbench compare`` as a user meets it: cells, resuming, failures, kill -9, errors before anything runs."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import clbench
import clbench.comparison as comparison
from clbench.cli.compare import seeds_of, settings_of
from clbench.cli.main import _main, _run_arguments
from clbench.comparison import MEASURED, axes_of, command_of, episode_scores, make_cells, preset_of
from clbench.errors import ConfigError, ContractError, UnknownNameError
from clbench.executors import InProcess, Processes
from clbench.experiments import RunConfig, resolve_run
from clbench.registry import resolve
from clbench.report.runs import Run, load_run

SMALL = "two-rooms/size-634-v0"
SETTINGS: dict[str, Any] = {"agents": ["bc", "random"], "seeds": [0, 1], "budget": 6, "episodes": 4, "scale": "small"}


def compare(out: Path, datasets: Any = (SMALL,), **settings: Any) -> Any:
    return clbench.compare(list(datasets), **{**SETTINGS, "workers": 0, **settings}, out=out)


def same_everywhere(content: Any) -> dict[str, Any]:
    """What of ``comparison.json`` must not depend on where and how it was made."""
    return {k: v for k, v in content.items() if k not in ("measured", "provenance")}


def stored(out: Path) -> dict[str, Any]:
    return same_everywhere(json.loads((out / "comparison.json").read_text()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished comparison, in a folder that tests leave as it is."""
    return compare(tmp_path_factory.mktemp("compare") / "out")


# -- what comes out ------------------------------------------------------------------------------------------------------


def test_every_cell_is_an_ordinary_run_with_the_same_number(done: Any, tmp_path: Path) -> None:
    assert len(done.rows) == 4 and not done.failures
    cell = done.path / "two-rooms_size-634-v0" / "bc" / "seed-1"
    alone = clbench.run(SMALL, "bc", seed=1, budget=6, eval_every=0, eval_start=False, stream_options={"episodes": 4},
                        out=tmp_path / "a")  # fmt: skip
    assert (cell / "eval.csv").read_bytes() == (alone.path / "eval.csv").read_bytes()
    row = next(r for r in done.rows if (r["agent"], r["seed"]) == ("bc", 1))
    assert row["success"] == alone.results["matrix"][-1][0]
    assert row["updates"] == 6 and row["parameters"] > 0 and row["planning_ms_per_step"] > 0


def test_table_and_page_are_there(done: Any) -> None:
    with (done.path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["dataset"], r["agent"], r["seed"], r["status"]) for r in rows] == [
        (SMALL, a, s, "complete") for a in ("bc", "random") for s in ("0", "1")
    ]
    assert "<html" in (done.path / "report.html").read_text()[:60]
    assert "Scale small" in done.text and "| bc" in done.text


def test_the_score_is_that_of_the_last_evaluation(tmp_path: Path) -> None:
    again = compare(tmp_path, agents=["bc"], seeds=[0], eval_every=3)
    run = load_run(again.path / "two-rooms_size-634-v0" / "bc" / "seed-0")
    assert isinstance(run, Run)
    assert len(run.log) == 8 and len(episode_scores(run)) == 4  # halfway and at the end
    assert episode_scores(run).tolist() == run.log.score[run.log.step == 6].tolist()


def test_reference_lines_play_the_same_episodes(done: Any) -> None:
    found = done.content["references"][SMALL]
    assert found["lines"]["random"]["episodes"] == 4
    for name in ("oracle", "straight-line"):  # a line, or the reason why not
        assert (name in found["lines"]) != (name in found["absent"])


def test_a_reference_line_that_breaks_is_left_out_and_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(name: str, task: Any, cell: Any) -> Any:
        if name == "oracle":
            raise ZeroDivisionError("no way to the goal")
        return original(name, task, cell)

    original = comparison._reference
    monkeypatch.setattr(comparison, "_reference", broken)
    found = compare(tmp_path, agents=["random"], seeds=[0])
    assert not found.failures and found.content["references"][SMALL]["absent"]["oracle"] == "no way to the goal"
    monkeypatch.undo()
    assert "oracle" in compare(tmp_path, agents=["random"], seeds=[0]).content["references"][SMALL]["lines"]


def test_again_nothing_is_run(done: Any) -> None:
    before = {p: p.stat().st_mtime_ns for p in done.path.rglob("*/seed-*/*")}
    said: list[str] = []
    again = compare(done.path, note=said.append)
    assert said == ["4 of 4 cells are complete already."]
    assert {p: p.stat().st_mtime_ns for p in done.path.rglob("*/seed-*/*")} == before
    assert again.content == done.content


def test_the_numbers_do_not_depend_on_the_workers(done: Any, tmp_path: Path) -> None:
    other = compare(tmp_path, workers=2)
    assert same_everywhere(other.content) == same_everywhere(done.content)
    for kept, made in zip(done.rows, other.rows, strict=True):
        assert {k: v for k, v in kept.items() if k not in MEASURED} == {
            k: v for k, v in made.items() if k not in MEASURED
        }


def test_more_seeds_and_data_sets_keep_what_is_there(done: Any, tmp_path: Path) -> None:
    first = compare(tmp_path, agents=["bc"])
    said: list[str] = []
    more = compare(tmp_path, [SMALL, "two-rooms/size-1269-v0"], agents=["bc"], seeds=[0, 1, 2], note=said.append)
    assert said[0] == "2 of 6 cells are complete already." and not more.failures
    assert more.content["settings"]["stream_options"] == dict.fromkeys(
        (SMALL, "two-rooms/size-1269-v0"), {"observation": "state", "episodes": 4}
    )
    assert [r["success"] for r in first.rows] == [r["success"] for r in more.rows[:2]]
    assert more.content["axes"] == {"two-rooms: size": {SMALL: 634.0, "two-rooms/size-1269-v0": 1269.0}}


# -- failures ------------------------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    found = clbench.compare(["toys:digits"], agents=["toys:Raises", "toys:Linear"], seeds=[0, 1], budget=4, workers=0,
                            out=tmp_path)  # fmt: skip
    assert [r["agent"] for r in found.failures] == ["toys:Raises"] * 2
    assert all(r["status"] == "failed" and "learning rate is zero" in r["problem"] for r in found.failures)
    of_agent = found.content["statistics"]["datasets"]["toys:digits"]["agents"]
    assert (of_agent["toys:Raises"]["n"], of_agent["toys:Raises"]["failures"]) == (0, 2)
    assert (of_agent["toys:Linear"]["n"], of_agent["toys:Linear"]["failures"]) == (2, 0)
    assert "learning rate is zero" in (found.path / "report.html").read_text()
    assert "2 of 2 failed" in found.text


def test_the_exit_code_says_that_some_failed(tmp_path: Path, capsys: Any) -> None:
    arguments = ["compare", "toys:digits", "--budget", "4", "--seeds", "0", "--workers", "0"]
    assert _main([*arguments, "--agents", "toys:Linear", "--out", str(tmp_path / "a")]) == 0
    assert _main([*arguments, "--agents", "toys:Linear,toys:Raises", "--out", str(tmp_path / "b")]) == 1
    assert "No result: toys:digits · toys:Raises · seed 0: failed." in capsys.readouterr().out


def test_a_worker_that_is_killed_fails_its_cell_alone(tmp_path: Path) -> None:
    class Murderous(Processes):
        def run(self, function: Any, jobs: Any) -> Any:
            from jobs import job

            lost = list(Processes.run(self, job, ["killed"]))[0]
            yield dataclasses.replace(lost, index=0)
            yield from (dataclasses.replace(f, index=f.index + 1) for f in InProcess().run(function, jobs[1:]))

    found = compare(tmp_path, executor=Murderous(1))
    assert [(r["status"], r["seed"]) for r in found.failures] == [("failed", 0)]
    assert "SIGKILL" in found.failures[0]["problem"]
    assert not compare(tmp_path).failures  # given again, it is made


def test_code_that_changes_meanwhile_fails_the_cells_that_are_left(tmp_path: Path) -> None:
    """Half a comparison of old code and half of new is none."""

    class Edited(InProcess):
        def run(self, function: Any, jobs: Any) -> Any:
            changed = [{**jobs[0], "fingerprint": "of other code"}, *jobs[1:]]
            yield from InProcess.run(self, function, changed)

    found = compare(tmp_path, executor=Edited())
    assert [(r["status"], r["seed"]) for r in found.failures] == [("failed", 0)]
    assert "has changed since this comparison began" in found.failures[0]["problem"]
    assert not (tmp_path / "two-rooms_size-634-v0" / "bc" / "seed-0").exists()


# -- errors before anything runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"agents": ["bcc"]}, "Unknown agent 'bcc'. Did you mean 'bc'"),
        ({"datasets": ["two-rooms/sise-634-v0"]}, "Did you mean 'two-rooms/size-634-v0'"),
        ({"agent_options": {"bc": {"lrr": 1}}}, "Unknown key 'lrr'.*Did you mean 'lr'"),
        ({"agent_options": {"pldm": {"lr": 1}}}, "Unknown agent with options 'pldm'"),
        ({"stream_options": {"observatoin": "state"}}, "Unknown key 'observatoin'.*Did you mean 'observation'"),
        ({"scale": "smal"}, "Unknown scale 'smal'. Did you mean 'small'"),
        ({"agents": ["bc", "sb3-dqn"]}, "'sb3-dqn' requires 'discrete'"),
        ({"agents": []}, "nothing to compare.*agents"),
        ({"seeds": [1, 1]}, "seeds once; 1 is there twice"),
        ({"budget": 0}, "budget must be"),
        ({"threads": 0}, "threads must be"),
        ({"device": "gpu"}, "Unknown device"),
        ({"workers": -1}, "workers must be"),
    ],
)
def test_an_impossible_cell_is_an_error_before_the_first_run(tmp_path: Path, changes: Any, message: str) -> None:
    changes = {"datasets": [SMALL], **changes}
    with pytest.raises((ConfigError, ContractError), match=message):
        compare(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_another_configuration_is_refused_before_the_first_run(done: Any, tmp_path: Path) -> None:
    compare(tmp_path, agents=["bc"], seeds=[0])
    with pytest.raises(ConfigError, match="holds a run of another configuration.*budget: 6 there, 7 now"):
        compare(tmp_path, agents=["random", "bc"], budget=7)
    assert not (tmp_path / "two-rooms_size-634-v0" / "random").exists()
    again = compare(tmp_path, agents=["bc"], seeds=[0], budget=7, overwrite=True)
    assert [r["updates"] for r in again.rows] == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: clbench compare"),
        (["--agents", "bc"], "Say what to compare on"),
        ([SMALL, "--agents", "bc", "--seeds", "a"], "--seeds must be numbers"),
        ([SMALL, "--agents", "bc", "--set", "bd.lr=1"], "Did you mean 'bc'"),
        ([SMALL, "--agents", "bc", "--set", "lr=1"], "AGENT.OPTION=VALUE"),
        ([SMALL, "--agents", "pldm", "--set", "pldm.a=1", "--set", "pldm.a.b=2"], "a is set as a whole too"),
        ([SMALL, "--agents", "pldm", "--set", "pldm.a.b=2", "--set", "pldm.a=1"], "parts of a are set too"),
        ([SMALL, "--agents", "bc", "--seeds", "²"], "--seeds must be numbers"),
        ([SMALL, "--agents", "bc,", "--set", "bc.lr=fast"], "must be of type float"),
        ([SMALL, "--agents", "bc", "--workers", "-2"], "workers must be"),
    ],
)
def test_wrong_command_lines(tmp_path: Path, monkeypatch: Any, capsys: Any, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(["compare", *arguments]) == 2
    said = capsys.readouterr()
    assert message in " ".join((said.out + said.err).split())
    assert not list(tmp_path.iterdir())


def test_seeds_and_settings_are_read() -> None:
    assert seeds_of("0,2-4, 7") == [0, 2, 3, 4, 7]
    agents = ["bc", "my.module:Agent", "pldm"]
    assert settings_of(["bc.lr=1", "pldm.architecture.members=2", "pldm.lr=3", "my.module:Agent.k=a=b"], agents) == {
        "bc": {"lr": "1"},
        "pldm": {"architecture": {"members": "2"}, "lr": "3"},
        "my.module:Agent": {"k": "a=b"},
    }


# -- scale and commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "options"),
    [
        ("bc", {"lr": "0.01", "hidden": "16,16", "reset_optimizer": "false"}),
        ("pldm", {"preset": "small", "architecture": {"members": "2"}, "frozen_inverse": True, "window": "4",
                  "planner_options": {"samples": "64", "horizon": "8"}}),
        ("gciql", {"preset": "small", "normalise": "true", "value_geometric": "false", "reset_optimizer": "false"}),
        ("random", {}),
    ],
)  # fmt: skip
def test_the_printed_command_is_the_same_run(agent: str, options: dict[str, Any]) -> None:
    """Read by the parser of ``clbench run``, it has the fingerprint of the cell; another seed has not."""
    stream_options = {"observation": "state", "episodes": 4}
    config = RunConfig(SMALL, agent, seed=3, budget=9, eval_every=0, eval_start=False, threads=2, agent_options=options,
                       stream_options=stream_options)  # fmt: skip
    words = shlex.split(command_of(config))
    assert words[:3] == ["clbench", "run", SMALL]
    assert fingerprint(words[2:]) == resolve_run(config).fingerprint
    assert fingerprint([*words[2:], "--seed", "4"]) != resolve_run(config).fingerprint


def fingerprint(arguments: list[str]) -> str:
    """Of the run that ``clbench run`` makes of these words."""
    import tyro

    parsed: Any = tyro.cli(_run_arguments(arguments[0], arguments[2], "sequential"), args=arguments)
    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)}
    for group in ("agent_options", "method_options", "stream_options", "schedule_options"):
        values[group] = dict(vars(values[group]))
    return resolve_run(RunConfig(**values)).fingerprint


@pytest.mark.parametrize("agent", ["gcbc", "gcivl", "gciql", "qrl", "crl", "hiql", "hilp", "hilp-zero-shot", "pldm"])
def test_the_command_of_a_finished_run_with_all_its_options_is_read(agent: str) -> None:
    """A run directory says every option in full, also those that the preset has filled in."""
    settings = {"agent": agent, "budget": 9, "eval_every": 0, "eval_start": False}
    ids = "point-maze/5-layouts-v0?observation=layout&trials=distance-4"
    first = RunConfig(ids, **settings, stream_options={"episodes": 4})
    full = json.loads(json.dumps(dataclasses.asdict(resolve_run(first).agent_config)))
    command = command_of(RunConfig(ids, **settings, agent_options=full, stream_options={"episodes": 4}))
    assert f"'{ids}'" in command  # the shell would cut it at &
    assert fingerprint(shlex.split(command)[2:]) == resolve_run(first).fingerprint


def test_an_observation_in_the_id_is_in_the_table(tmp_path: Path) -> None:
    ids = "point-maze/5-layouts-v0?observation=layout"
    found = compare(tmp_path, [ids], agents=["random"], seeds=[0], budget=None, episodes=2)
    assert [r["observation"] for r in found.rows] == ["layout"]
    assert "observations: layout" in found.text


def test_the_scale_decides_observation_and_preset(tmp_path: Path) -> None:
    from clbench.comparison import BUDGETS

    common = {"eval_every": 0, "threads": 1, "device": "cpu"}
    names = [SMALL, "two-rooms/size-1269-v0?observation=state"]
    for scale, observation, preset in (("small", "state", "small"), ("paper", "pixels", "two-rooms")):
        plain, said = make_cells(names, ["pldm"], [0], scale, common, {}, {}, tmp_path)
        assert plain.resolved.config.stream_options["observation"] == observation
        assert plain.preset == plain.resolved.agent_config.preset == preset
        assert plain.resolved.stream.phases[0].budget == BUDGETS[scale].get("pldm", BUDGETS[scale]["*"])
        assert said.resolved.stream.tasks[0].env_kwargs["observation"] == "state"  # the id has the last word
    chosen = make_cells([SMALL], ["pldm"], [0], "paper", common, {"pldm": {"preset": "small"}}, {}, tmp_path)[0]
    assert chosen.preset == "small"


def test_the_page_says_the_budgets() -> None:
    """Of both scales, in their order, and no others."""
    from clbench.comparison import BUDGETS

    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    paragraph = text.partition("**Scale.**")[2].partition("\n\n")[0]
    said = [int(n.replace(",", "")) for n in re.findall(r"\d+,\d{3}", paragraph)]
    assert said == [n for scale in ("small", "paper") for n in BUDGETS[scale].values()]


def test_presets_by_family() -> None:
    pldm = resolve("agents", "pldm")
    assert preset_of(pldm, "pldm", "point-maze/5-layouts-v0", "paper") == "diverse-maze"
    assert preset_of(pldm, "pldm", "point-maze/5-layouts-v0", "small") == "small"
    assert preset_of(resolve("agents", "bc"), "bc", SMALL, "paper") is None
    gciql = resolve("agents", "gciql")
    for name, preset in {
        "two-rooms/good-v0?observation=state": "two-rooms",
        "ogbench-maze/giant-stitch-v0": "pointmaze-giant-stitch",
        "ogbench-maze/giant-navigate-v0": "pointmaze-giant",
        "ogbench-maze/medium-stitch-v0": "pointmaze-stitch",
        "ogbench-maze/teleport-navigate-v0": "pointmaze",
        "ogbench/antmaze-medium-explore-v0": "antmaze-explore",
        "ogbench/humanoidmaze-giant-navigate-v0": "humanoidmaze",
        "ogbench/cube-single-play-v0": "manipulation-play",
        "ogbench/puzzle-4x4-noisy-v0": "manipulation-noisy",
        "ogbench/powderworld-easy-play-v0": "powderworld",
        "ogbench/some-other-v0": "ogbench",
    }.items():
        assert preset_of(gciql, "gciql", name, "paper") == preset
    zero_shot = resolve("agents", "hilp-zero-shot")
    assert preset_of(zero_shot, "hilp-zero-shot", SMALL, "paper") == "reference"  # not its default, which is small
    assert preset_of(zero_shot, "hilp-zero-shot", SMALL, "small") == "small"


def test_axes_of_the_papers_figures() -> None:
    names = ["two-rooms/good-v0", SMALL, "two-rooms/length-17-v0", "two-rooms/mix-0-v0", "two-rooms/mix-0.16-v0",
             "two-rooms/no-door-v0", "point-maze/5-layouts-v0", "point-maze/40-layouts-v0"]  # fmt: skip
    assert axes_of(names, {}) == {
        "two-rooms: size": {"two-rooms/good-v0": 3e6, SMALL: 634.0},
        "two-rooms: length": {"two-rooms/good-v0": 91.0, "two-rooms/length-17-v0": 17.0},
        "two-rooms: mix": {"two-rooms/mix-0-v0": 0.0, "two-rooms/mix-0.16-v0": 0.16},
        "point-maze: layouts": {"point-maze/5-layouts-v0": 5.0, "point-maze/40-layouts-v0": 40.0},
    }
    far = [f"point-maze/5-layouts-v0?trials=distance-{k}" for k in (1, 4)]
    assert axes_of(far, {}) == {"point-maze/5-layouts-v0: edit distance": {far[0]: 1.0, far[1]: 4.0}}
    assert axes_of(["two-rooms/good-v0", "digits-split"], {}) == {}


def test_a_class_that_no_module_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises((UnknownNameError, ContractError, ConfigError)):
        compare(tmp_path, agents=[type("Local", (resolve("agents", "bc"),), {"__module__": "nowhere"})])


# -- stopping ------------------------------------------------------------------------------------------------------------

SLOW = {"agents": ["toys:Slow", "toys:Linear"], "seeds": [0], "budget": 150}
COMMAND = ["toys:digits", "--agents", "toys:Slow,toys:Linear", "--seeds", "0", "--budget", "150", "--workers", "2"]


def deterministic(out: Path) -> dict[str, Any]:
    """All results of a comparison but the commit that they were made at."""
    found = {str(p.relative_to(out)): json.loads(p.read_text()) for p in out.rglob("results.json")}
    return {"comparison": stored(out), **{k: {**v, "provenance": None} for k, v in found.items()}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison that nobody stopped."""
    return clbench.compare(["toys:digits"], **SLOW, workers=0, out=tmp_path_factory.mktemp("whole") / "out").path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "clbench", "compare", *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def at_work(process: subprocess.Popen[str], folder: Path) -> None:
    """Until the first slow run has logged some training."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for file in folder.rglob("seed-0/train.csv"):
            if "Slow" in str(file) and len(file.read_text().splitlines()) > 3:
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "nothing was written")


@pytest.mark.usefixtures("toys_on_path")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_and_given_again_it_is_the_same(tmp_path: Path, whole: Path, number: signal.Signals) -> None:
    process = start(tmp_path, *COMMAND, "--out", "stopped")
    at_work(process, tmp_path / "stopped")
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), error
    slow = tmp_path / "stopped" / "toys_digits" / "toys_Slow" / "seed-0"
    results = json.loads((slow / "results.json").read_text()) if (slow / "results.json").exists() else {}
    assert results.get("status") != "complete"  # else the test says nothing
    if number == signal.SIGINT:
        assert "Stopped. What was done is saved" in error and "Traceback" not in error
        assert results["status"] == "interrupted" and results["cost"]["updates"] >= 0
        assert "interrupted" in (tmp_path / "stopped" / "table.csv").read_text()
        assert deterministic(tmp_path / "stopped") != deterministic(whole)  # so that the check below can fail
    again = start(tmp_path, *COMMAND, "--out", "stopped")
    assert again.communicate(timeout=240)[0] and again.returncode == 0
    assert deterministic(tmp_path / "stopped") == deterministic(whole)


@pytest.mark.parametrize(
    ("dataset", "observation"), [("point-maze/5-layouts-v0", "layout"), ("two-rooms/size-634-v0", "state")]
)
def test_at_small_scale_mazes_are_seen_with_their_layout(dataset: str, observation: str, tmp_path: Path) -> None:
    common = {"budget": 5, "eval_every": 0, "threads": 1, "device": "cpu"}
    cell = make_cells([dataset], ["gcbc"], [0], "small", common, {}, {}, tmp_path)[0]
    assert cell.resolved.stream.tasks[0].env_kwargs["observation"] == observation
