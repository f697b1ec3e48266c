"""The page of the study: cells, verdicts and commands from run directories that are made up here."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import shlex
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.cli.main import _run_arguments
from clbench.experiments import RunConfig, _config_record, resolve_run
from clbench.metrics.statistics import bootstrap_ci

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 2)


def load() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("rl_versus_planning", ROOT / "scripts" / "rl_versus_planning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


study = load()


def write(out: Path, dataset: str, agent: str, seed: int, scores: Sequence[float], status: str = "complete",
          **options: Any) -> RunConfig:  # fmt: skip
    """A run with these scores of its episodes, the same on every task, in the format of the loop."""
    config = RunConfig(dataset, agent, seed=seed, budget=9, eval_every=0, eval_start=False, tensorboard=False,
                       agent_options={"preset": "small", **options}, stream_options={"observation": "state"})  # fmt: skip
    resolved = resolve_run(config)
    path = out / agent / f"{seed}-{len(list(out.rglob('config.json')))}"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(_config_record(resolved)))
    rows = [(1, 1, 9, task.name, e, s, s, 7) for task in resolved.stream.tasks for e, s in enumerate(scores)]
    with (path / "eval.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("phase", "visit", "step", "task", "episode", "score",
                                                          "return", "length"), *rows])  # fmt: skip
    (path / "results.json").write_text(json.dumps({"status": status, "cost": {"updates": 9}}))
    times = {"total": 3.0, "learn": 2.0, "evaluate_act": 0.014 * len(rows)}
    (path / "timing.json").write_text(json.dumps({"wall_time_s": times}))
    return config


def flips(share: float, count: int = 100) -> list[float]:
    """Scores with this mean, successes first."""
    return [float(i < round(share * count)) for i in range(count)]


def page(out: Path) -> str:
    return study.page(study.Study(out), types.SimpleNamespace(scale="small"))


def row(text: str, *beginnings: str) -> list[str]:
    """The cells of the only row of a table that begins like this."""
    split = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    (found,) = [cells for cells in split if all(c.startswith(b) for c, b in zip(cells, beginnings, strict=False))]
    return found


# -- what the page says --------------------------------------------------------------------------------------------------


def test_cells_published_numbers_and_costs(tmp_path: Path) -> None:
    small = study.rooms("size-5078")
    for seed, share in zip(SEEDS, (0.5, 0.6, 0.7), strict=True):
        write(tmp_path, small, "pldm", seed, flips(share))
    write(tmp_path, small, "gcbc", 0, flips(0.2))
    write(tmp_path, small, "crl", 0, flips(0.9), status="interrupted")
    text = page(tmp_path)
    cells = dict(zip(study.AGENTS, row(text, "5,078")[1:], strict=True))
    assert cells["pldm"].startswith("0.60 [0.50, 0.70]") and cells["pldm"].endswith("(80.6 %)")
    assert cells["gcbc"] == "0.20 (20.6 %)"  # one run has no interval
    assert cells["crl"] == "- (22.6 %)"  # not complete
    assert row(text, "pldm", "3")[1:] == ["3", "9", "2", "3", "2.000"]
    assert "| scale small | pldm |" in text and "4 complete runs" in text


def test_without_runs_the_page_says_so(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "No runs yet." in text and "Not run." in text
    assert {cells[-1] for cells in (row(text, f.text, f"{f.better} - {f.worse[0]}") for f in study.FINDINGS)} == {"-"}


def test_the_new_task_is_read_by_task(tmp_path: Path) -> None:
    for seed in SEEDS:
        write(tmp_path, study.CHASE, "pldm", seed, flips(0.9))
        write(tmp_path, study.CHASE, "hilp", seed, flips(0.1))
    text = page(tmp_path)
    assert row(text, "hilp", "0.10 [0.10, 0.10] (-)")[2] == "0.10 [0.10, 0.10] (71 %)"  # reach, then the slowest chaser
    found = row(text, "Planning wins on a new task", "pldm - hilp")
    assert (found[2], found[4]) == ("+19.0 %", "holds") and found[3].startswith("+0.80 [+0.80, +0.80] over 3 seeds; ")


def test_each_command_is_the_run_and_says_what_its_preset_does_not(tmp_path: Path) -> None:
    import tyro

    made = [write(tmp_path, study.rooms("no-door"), agent, 1, flips(0.5)) for agent in study.AGENTS]
    made.append(write(tmp_path, f"{study.MAZE}&trials=distance-4", "gciql", 2, flips(0.5), normalise=False, alpha=0.5))
    lines = page(tmp_path).partition("```\n")[2].partition("\n```")[0].splitlines()

    def fingerprint(line: str) -> str:
        words = shlex.split(line)[2:]
        parsed: Any = tyro.cli(_run_arguments(words[0], words[2], "sequential"), args=words)
        values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)}
        groups = ("agent_options", "method_options", "stream_options", "schedule_options")
        return resolve_run(RunConfig(**{**values, **{g: dict(vars(values[g])) for g in groups}})).fingerprint

    assert sorted(map(fingerprint, lines)) == sorted(resolve_run(c).fingerprint for c in made)
    (changed,) = [line for line in lines if "distance-4" in line]
    assert "--agent.normalise False" in changed and "--agent.alpha 0.5" in changed
    assert all(line.count("--agent.") == 1 for line in lines if line != changed)  # the preset


# -- verdicts ------------------------------------------------------------------------------------------------------------


def verdict(out: Path, a: dict[int, list[float]], b: dict[int, list[float]], text: str = "HILP wins where") -> str:
    """Of the finding that begins with ``text``, for scores of its two agents."""
    finding = next(f for f in study.FINDINGS if f.text.startswith(text))
    for agent, of_seed in ((finding.better, a), (finding.worse[0], b)):
        for seed, scores in of_seed.items():
            write(out, finding.dataset, agent, seed, scores)
    return row(page(out), text, f"{finding.better} - {finding.worse[0]}")[-1]


def test_a_difference_holds_is_reversed_or_undecided(tmp_path: Path) -> None:
    high, low = {s: flips(0.9) for s in SEEDS}, {s: flips(0.3) for s in SEEDS}
    assert verdict(tmp_path / "a", high, low) == "holds"
    assert verdict(tmp_path / "b", low, high) == "reversed"
    mixed = {0: flips(0.9), 1: flips(0.1), 2: flips(0.5)}
    assert verdict(tmp_path / "c", mixed, {s: flips(0.5) for s in SEEDS}) == "undecided"
    assert verdict(tmp_path / "d", {0: flips(0.9)}, {0: flips(0.3)}) == "one seed"
    assert verdict(tmp_path / "e", {0: flips(0.9)}, {1: flips(0.3)}) == "-"  # nothing to pair


def test_seeds_that_agree_by_chance_are_not_enough(tmp_path: Path) -> None:
    """Three equal small differences: the interval over seeds alone would say that it holds."""
    order = np.random.default_rng(0).permutation(100)
    other = {s: list(np.array(flips(0.5))[order]) for s in SEEDS}
    assert verdict(tmp_path, {s: flips(0.52) for s in SEEDS}, other) == "undecided"
    found = study.paired(
        "x", "a", {s: np.array(flips(0.52)) for s in SEEDS}, "b", {s: np.array(other[s]) for s in SEEDS}
    )
    assert found["low"] > 0 > found["episodes_low"]


def test_intervals_over_few_seeds_hold_what_they_promise() -> None:
    """Of two agents that do not differ, one in twenty is said to; a bootstrap of three seeds says it of one in four."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(400, 3))
    wrong = [study.student(d)["low"] > 0 or study.student(d)["high"] < 0 for d in draws]
    bootstrap = [bootstrap_ci(d, rng) for d in draws]
    assert np.mean(wrong) < 0.09 < 0.18 < np.mean([i.low * i.high > 0 for i in bootstrap])  # type: ignore[operator]
    assert study.student(np.array([0.5])) == {"low": None, "high": None}


def test_a_tie_holds_only_where_both_are_near(tmp_path: Path) -> None:
    near, same = {s: flips(0.92) for s in SEEDS}, {s: flips(0.9) for s in SEEDS}
    assert verdict(tmp_path / "a", near, same, "A tie") == "holds"
    assert verdict(tmp_path / "b", near, {s: flips(0.3) for s in SEEDS}, "A tie") == "no tie"
    mixed = {0: flips(0.9), 1: flips(0.5), 2: flips(0.99)}
    assert verdict(tmp_path / "c", mixed, same, "A tie") == "undecided"
    ahead = {s: flips(0.98) for s in SEEDS}  # by 0.08, which may well be within the margin
    assert verdict(tmp_path / "d", ahead, same, "A tie") == "undecided"


def test_the_published_numbers_say_what_the_findings_say() -> None:
    for finding in study.FINDINGS:
        published = study._published(finding)
        for other in finding.worse:
            a, b = published[finding.better], published[other]
            if a is not None and b is not None:
                assert abs(a - b) < 100 * study.MARGIN if finding.tie else a > b, (finding.text, other)


# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the script would have compared; each call fails one cell."""
    calls: list[dict[str, Any]] = []

    def compare(names: Any, **settings: Any) -> Any:
        calls.append({"datasets": list(names), **settings})
        return types.SimpleNamespace(failures=[{}])

    monkeypatch.setattr(study, "compare", compare)
    return calls


def test_pieces_have_folders_of_their_own_and_failures_are_said(tmp_path: Path, asked: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2 cells gave no result"):
        study.main(["--axes", f"door,mix,{study.CHASE}", "--out", str(tmp_path)])
    first, second = asked
    assert first["datasets"] == [study.rooms(n) for n in ("good", "no-door", "mix-0", "mix-0.02")]
    assert second["datasets"] == [study.CHASE] and second["agents"] == ["pldm", "hilp"]
    assert first["out"] != second["out"]  # else one report would replace the other
    assert "# Reinforcement learning beside planning" in capsys.readouterr().out


def test_only_chooses_among_all_data_sets(tmp_path: Path, asked: Any) -> None:
    with pytest.raises(SystemExit):
        study.main(["--only", "no-door", "--out", str(tmp_path)])
    assert [call["datasets"] for call in asked] == [[study.rooms("no-door")]]


@pytest.mark.parametrize("wrong", [["--axes", "colour"], ["--agents", "pldm,hipl"]])
def test_unknown_names_end_before_anything_runs(asked: Any, capsys: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(wrong)
    assert f"unknown {wrong[0][2:]}" in capsys.readouterr().err and not asked
