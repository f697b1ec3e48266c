"""The report: one file that needs nothing else, with numbers recomputed from the raw logs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from clbench.errors import ConfigError, UnknownNameError
from clbench.report import find_runs, report_markdown, write_report
from clbench.report.elements import bytes_text, count_text, number, seconds_text
from clbench.report.runs import BrokenRun, Run, group_runs, load_run
from clbench.report.summary import (
    Interval,
    comparisons,
    final_scores,
    mean_matrix,
    metric_interval,
    task_curves,
    training_bands,
)
from clbench.report.svg import ticks

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Checker(HTMLParser):
    """Collects text, and everything a browser would fetch; raises on tags that do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"unclosed {self.open}"

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def study(write_run, tmp_path):
    """Two agents, three seeds each; one more seed was interrupted, one folder is corrupt."""
    for seed in range(3):
        write_run(f"runs/bc/{seed}", agent="bc", seed=seed)
        write_run(f"runs/keeper/{seed}", agent="keeper", seed=seed, retention=1.0)
    write_run("runs/bc/3", agent="bc", seed=3, status="interrupted", stop_after=150)
    write_run("runs/corrupt")
    (tmp_path / "runs/corrupt/eval.csv").write_text("phase,step\n1,2\n")
    return tmp_path / "runs"


def groups_of(paths):
    return group_runs([r for r in map(load_run, paths) if isinstance(r, Run)])


def test_one_well_formed_file_that_fetches_nothing(study):
    page = write_report(find_runs([study]), study / "report.html")
    text = page.read_text()
    checked = Checker(text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in checked.fetched), checked.fetched
    assert not re.search(r"url\(|@import|https?://", text)
    assert "6 complete runs, 1 not finished, 1 unreadable" in checked.text
    assert "keeper \N{MINUS SIGN} bc" in checked.text
    assert text.count("<svg") == 4  # three tasks and their mean
    assert text.count('class="heat"') == 2
    assert "no reference runs" in checked.text
    assert "Fewer than 5 seeds" in checked.text


def test_the_page_is_a_function_of_the_runs(study):
    runs = find_runs([study])
    first = write_report(runs, study / "a.html").read_bytes()
    assert write_report(runs[::-1], study / "b.html").read_bytes() == first


def test_metrics_are_recomputed_and_results_json_is_not_trusted(study):
    """results.json of the synthetic runs claims an average performance of 123."""
    (group,) = groups_of(find_runs([study]))
    interval = metric_interval(group, "bc", "average_performance")
    by_hand = [r.log.matrix(r.tasks, r.phases)[-1].mean() for r in group.agents["bc"]]
    assert interval.value == pytest.approx(np.mean(by_hand)) and interval.low <= interval.value <= interval.high
    assert "123.0" not in Checker(write_report(find_runs([study]), study / "r.html").read_text()).text


def test_interrupted_runs_are_failures_and_not_averaged(study):
    (group,) = groups_of(find_runs([study]))
    assert [r.seed for r in group.agents["bc"]] == [0, 1, 2]
    assert [r.problem for r in group.excluded["bc"]] == ["interrupted after 1 of 3 phases"]
    interval = metric_interval(group, "bc", "forgetting")
    assert (interval.n, interval.failures) == (3, 1)
    assert "3 (1 failed)" in report_markdown(find_runs([study]))


def test_a_run_that_claims_to_be_complete_but_is_not(write_run):
    run = load_run(write_run("run", stop_after=150))
    assert isinstance(run, Run) and "complete, but the evaluation log ends after 1 of 3" in (run.problem or "")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "Cannot read"),
        ("config.json", '{"schema": 99}', "schema 99"),
        ("config.json", '{"schema": 1}', "lacks or mistypes"),
        ("config.json", "[]", "lacks or mistypes"),
        ("eval.csv", "phase\n", "line 1"),
        ("results.json", "nonsense", "Cannot read"),
    ],
)
def test_corrupt_runs_are_listed_with_the_reason(write_run, tmp_path, file, content, message):
    path = write_run("bad")
    (path / file).write_text(content)
    broken = load_run(path)
    assert isinstance(broken, BrokenRun) and message in broken.problem
    write_run("good", seed=1)
    text = Checker(write_report(find_runs([tmp_path]), tmp_path / "report.html").read_text()).text
    assert "1 complete run, 1 unreadable" in text and str(path) in text


def test_only_broken_runs_still_give_a_page(write_run, tmp_path):
    path = write_run("bad")
    (path / "eval.csv").unlink()
    assert "0 complete runs, 1 unreadable" in Checker(write_report([path], tmp_path / "r.html").read_text()).text


def test_what_is_not_comparable_is_apart(write_run, tmp_path):
    write_run("a", seed=0)
    write_run("b", seed=1, budget=50)
    write_run("c", seed=1, per_phase=2)
    write_run("d", seed=1, schedule="cyclic")
    write_run("e", seed=1, protocol="independent")
    assert [len(g.runs) for g in groups_of(find_runs([tmp_path]))] == [1] * 5


def test_tasks_that_are_scored_otherwise_are_apart(write_run, tmp_path):
    def task(episodes, kind, permutation):
        return {
            "name": "left",
            "env_id": "e",
            "env_kwargs": {"permutation": permutation},
            "metric": {"kind": kind, "low": 0.0, "high": 1.0},
            "evaluation": {"seeds": list(range(episodes))},
        }

    listed = [task(4, "success", 1), task(4, "success", 2), task(9, "success", 1), task(4, "return", 1)]
    for seed, own in enumerate(listed):
        path = write_run(f"{seed}", seed=seed)
        (path / "stream.json").write_text(json.dumps({"tasks": [own]}))
    sizes = sorted(len(group.runs) for group in groups_of(find_runs([tmp_path])))
    assert sizes == [1, 1, 2], "only what the seed draws may differ"


def test_configurations_of_one_agent_are_told_apart(write_run, tmp_path):
    write_run("a", seed=0, agent_options={"lr": 0.1, "width": 64})
    write_run("b", seed=0, agent_options={"lr": 0.2, "width": 64})
    (group,) = groups_of(find_runs([tmp_path]))
    assert list(group.agents) == ["bc (lr=0.1)", "bc (lr=0.2)"]


def test_runs_with_continual_methods_are_told_apart(write_run, tmp_path):
    """One row per agent and methods; a run from before there were methods counts with those that have none."""
    write_run("old", seed=0)
    write_run("none", seed=1, method=[], method_options={})
    replay = {"method": ["er"], "method_options": {"er": {"memory": 200}}}
    write_run("er", seed=0, **replay)
    both = {"er": {"memory": 200}, "ewc": {"strength": 1.0}}
    write_run("both", seed=0, method=["er", "ewc"], method_options=both)
    (group,) = groups_of(find_runs([tmp_path]))
    assert {k: [r.seed for r in v] for k, v in group.agents.items()} == {"bc": [0, 1], "bc+er": [0], "bc+er+ewc": [0]}
    page = write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text()
    text = Checker(page).text
    assert "clbench run toy --agent bc --method er,ewc --seed 0" in text
    assert '"ewc": {"strength": 1.0}' in text
    assert "| bc+er+ewc |" in report_markdown(find_runs([tmp_path]))


def test_options_of_a_method_tell_runs_apart(write_run, tmp_path):
    for name, memory in (("a", 100), ("b", 500)):
        write_run(name, method=["er"], method_options={"er": {"memory": memory, "batch_size": 0}})
    (group,) = groups_of(find_runs([tmp_path]))
    assert list(group.agents) == ["bc+er (er.memory=100)", "bc+er (er.memory=500)"]


def test_a_reference_has_the_same_methods(write_run):
    run = write_run("runs/toy/bc+er/seed-0", method=["er"], method_options={"er": {"memory": 9}})
    write_run("runs/references/plain", protocol="independent")
    write_run("runs/references/larger", protocol="independent", method=["er"], method_options={"er": {"memory": 10}})
    assert load_run(run).metrics["forward_transfer"] is None
    write_run("runs/references/right", protocol="independent", method=["er"], method_options={"er": {"memory": 9}})
    assert load_run(run).metrics["forward_transfer"] is not None


def test_a_reference_from_before_there_were_methods_still_fits(write_run):
    run = write_run("runs/toy/bc/seed-0", method=[], method_options={})
    write_run("runs/references/old", protocol="independent")
    assert load_run(run).metrics["forward_transfer"] is not None


def test_a_repeated_seed_counts_once(write_run, tmp_path):
    write_run("a", seed=0)
    write_run("b", seed=0)
    (group,) = groups_of(find_runs([tmp_path]))
    assert len(group.agents["bc"]) == 1 and [r.path.name for r in group.duplicates] == ["b"]
    text = Checker(write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text()).text
    assert "another run of this agent and seed is counted" in text


def test_find_runs_skips_reference_caches(write_run, tmp_path):
    write_run("runs/a")
    write_run("runs/references/x", protocol="independent")
    assert [p.name for p in find_runs([tmp_path / "runs", tmp_path / "runs/a"])] == ["a"]
    with pytest.raises(ConfigError, match="There is no folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="no runs to report on"):
        write_report([], tmp_path / "r.html")


def test_forward_transfer_appears_with_the_cached_reference(write_run):
    run = write_run("runs/toy/bc/seed-0")
    assert load_run(run).metrics["forward_transfer"] is None
    write_run("runs/references/other-seed", protocol="independent", seed=1)
    assert load_run(run).metrics["forward_transfer"] is None
    write_run("runs/references/shorter", protocol="independent", budget=50)
    assert load_run(run).metrics["forward_transfer"] is None
    write_run("runs/references/right", protocol="independent")
    found = load_run(run)
    assert isinstance(found, Run)
    assert found.metrics["forward_transfer"] == pytest.approx(0.0, abs=0.1), "the toy agent learns equally fast"
    assert found.no_transfer is None


def test_a_reference_must_be_complete_and_of_the_same_tasks_and_versions(write_run):
    run = write_run("runs/toy/bc/seed-0")
    right = write_run("runs/references/right", protocol="independent")
    record, results = ((right / f"{name}.json").read_text() for name in ("config", "results"))
    assert load_run(run).metrics["forward_transfer"] is not None

    def without(name, content):
        before = (right / name).read_text() if (right / name).exists() else None
        (right / name).write_text(json.dumps(content))
        answer = load_run(run)
        (right / name).unlink() if before is None else (right / name).write_text(before)
        assert answer.no_transfer.startswith("Forward transfer needs")
        return answer.metrics["forward_transfer"]

    newer = {**json.loads(record)["provenance"], "torch": "99.0"}
    assert without("config.json", json.loads(record) | {"provenance": newer}) is None
    assert without("results.json", json.loads(results) | {"status": "interrupted"}) is None
    assert without("stream.json", {"tasks": [{"name": "left", "env_kwargs": {"wall_x": 1.0}}]}) is None
    assert load_run(run).metrics["forward_transfer"] is not None


def test_references_that_fit_but_differ_are_not_chosen_between(write_run):
    run = write_run("runs/toy/bc/seed-0")
    write_run("runs/references/new", protocol="independent")
    write_run("runs/references/same", protocol="independent")
    assert load_run(run).metrics["forward_transfer"] is not None, "equal ones are no problem"
    # the agent's code was another one: it learns in fewer evaluations
    old = write_run("runs/references/old", protocol="independent")
    text = (old / "eval.csv").read_text().splitlines()
    (old / "eval.csv").write_text("\n".join([text[0], *(re.sub(r"0\.\d+", "1.0", line) for line in text[1:])]) + "\n")
    found = load_run(run)
    assert isinstance(found, Run)
    assert found.metrics["forward_transfer"] is None
    assert found.no_transfer is not None and "both fit but differ" in found.no_transfer


def test_a_mean_over_some_of_the_runs_says_so(write_run, tmp_path):
    for seed in range(3):
        write_run(f"runs/toy/bc/seed-{seed}", seed=seed)
        if seed < 2:
            write_run(f"runs/references/r{seed}", protocol="independent", seed=seed)
    paths = find_runs([tmp_path / "runs"])
    page = Checker(write_report(paths, tmp_path / "r.html").read_text()).text
    assert page.count("2 of 3 runs") == 3, "forward transfer, normalised and not, and intransigence; nothing else"
    assert report_markdown(paths).count("(2 of 3 runs)") == 1
    write_run("runs/references/r2", protocol="independent", seed=2)
    assert "of 3 runs" not in write_report(paths, tmp_path / "r.html").read_text()


def test_paired_differences_use_common_seeds_only(write_run, tmp_path):
    for seed in range(3):
        write_run(f"a{seed}", agent="bc", seed=seed)
    for seed in range(1, 4):
        write_run(f"k{seed}", agent="keeper", seed=seed, retention=1.0)
    (group,) = groups_of(find_runs([tmp_path]))
    (c,) = comparisons(group)
    assert (c.first, c.second, c.seeds, c.left_out) == ("keeper", "bc", (1, 2), (0, 3))
    by_seed = {label: {r.seed: r.metrics["average_performance"] for r in runs} for label, runs in group.agents.items()}
    expected = np.mean([by_seed["keeper"][s] - by_seed["bc"][s] for s in (1, 2)])
    assert c.differences["average_performance"].value == pytest.approx(expected)
    assert comparisons(group, "keeper")[0].first == "bc"
    with pytest.raises(UnknownNameError, match="baseline agent 'kepper'.*'keeper'"):
        comparisons(group, "kepper")


def test_seeds_whose_streams_differ_are_no_pair(write_run, tmp_path):
    write_run("a", agent="bc")
    path = write_run("b", agent="keeper")
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(record | {"stream_hash": "another"}))
    (group,) = groups_of(find_runs([tmp_path]))
    assert comparisons(group)[0].seeds == ()
    assert "nothing to pair" in write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text()


def test_recurring_streams_with_different_orders(write_run, tmp_path):
    write_run("a", seed=0, schedule="power-law", order=("left", "right", "left", "middle"))
    write_run("b", seed=1, schedule="power-law", order=("middle", "right", "left", "right"))
    (group,) = groups_of(find_runs([tmp_path]))
    runs = group.agents["bc"]
    assert [(b.start, b.end, b.share) for b in training_bands(runs, "left")] == [(0, 100, 0.5), (200, 300, 1.0)]
    with pytest.raises(ConfigError, match="different phases"):
        mean_matrix(runs)
    page = write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text()
    assert "seed 0 only: the order of tasks differs between seeds" in Checker(page).text


def test_runs_evaluated_at_different_times_are_separate_lines(write_run):
    runs = [load_run(write_run("a", seed=0)), load_run(write_run("b", seed=1, per_phase=2))]
    assert len(task_curves(runs, "left")) == 2
    same = [load_run(write_run("c", seed=2)), load_run(write_run("d", seed=3))]
    (curve,) = task_curves(same, "left")
    assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()


def test_independent_and_joint_runs(write_run, tmp_path):
    path = write_run("independent", protocol="independent")
    assert final_scores([load_run(path)]).shape == (1, 3)
    joint = write_run("joint", protocol="joint", order=("left",))
    record = json.loads((joint / "config.json").read_text())
    record["phases"] = [{"task": ["left", "middle", "right"], "budget": 100, "visit": 1}]
    (joint / "config.json").write_text(json.dumps(record))
    text = Checker(write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text()).text
    assert "independent protocol" in text and "joint protocol" in text and "1 all tasks" in text


def test_a_run_without_evaluation_is_listed(write_run, tmp_path):
    path = write_run("a")
    (path / "eval.csv").write_text("phase,visit,step,task,episode,score,return,length\n")
    assert "without any evaluation" in Checker(write_report([path], tmp_path / "r.html").read_text()).text


def test_hostile_names_are_escaped(write_run, tmp_path):
    nasty = "<img src=x onerror=alert(1)>&\"'"
    write_run("a", agent=nasty, tasks=(nasty, "b"), order=(nasty, "b"), stream=nasty)
    checked = Checker(write_report(find_runs([tmp_path]), tmp_path / "r.html").read_text())
    assert "x" not in checked.fetched and nasty in checked.text


def test_scores_outside_the_unit_interval_widen_the_axis(write_run, tmp_path):
    path = write_run("a")
    text = (path / "eval.csv").read_text().replace("0,0,0,left,0,", "0,0,0,left,0,-9", 1)
    (path / "eval.csv").write_text(text)
    Checker(write_report([path], tmp_path / "r.html").read_text())


def test_importing_the_report_imports_neither_matplotlib_nor_torch():
    code = "import sys, clbench.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_markdown_is_a_table(study):
    lines = [line for line in report_markdown(find_runs([study])).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "Unreadable runs" in report_markdown(find_runs([study]))


def test_numbers_are_readable():
    assert [number(v) for v in (0.5, -0.25, -0.0001)] == ["0.500", "\N{MINUS SIGN}0.250", "0.000"]
    assert count_text(1234567) == "1\N{THIN SPACE}234\N{THIN SPACE}567"
    assert [bytes_text(v) for v in (10, 2048, 5 * 2**20)] == ["10 B", "2.0 KiB", "5.0 MiB"]
    assert [seconds_text(v) for v in (3, 300, 7200)] == ["3.0 s", "5.0 min", "2.0 h"]
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 5000, 4) == [0, 2000, 4000]
    assert Interval(None, None, None, 0).failures == 0
