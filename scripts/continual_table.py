"""Continual methods on classifiers, policies and world models: one table per benchmark.

    python scripts/continual_table.py BENCHMARK[,BENCHMARK...] [--seeds 0,1,2] [--processes 2] [--write]

Benchmarks: `permuted`, `split-class`, `split-domain`, `split-task` (digits, bc), `doors-bc`, `doors-pldm` (Two-Rooms, a
policy and a world model), `minigrid` (sb3-ppo), `online-inputs`, `online-labels` (one example at a time, hundreds of
changes). Every method gets the same updates (environment steps) per task. Where a method has a grid, its value is chosen on
the tuning seed, by the measure that is reported, and then run on the reporting seeds. Finished runs are not repeated: give
the command again to go on after an interruption. `--write` writes docs/results/continual_BENCHMARK.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import clbench
from clbench.executors import InProcess, Processes
from clbench.metrics.statistics import Interval, paired_difference, summarise
from clbench.records import read_json
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator

ROOT = Path(__file__).resolve().parents[1]
TUNING_SEED = 100


@dataclass(frozen=True)
class Row:
    """One line of a table: an agent with methods.

    Args:
        method: names of methods.
        option: of the first method (``METHOD.OPTION``: of that one), which ``grid`` is about.
        grid: values that are tried on the tuning seed, where the benchmark tunes.
        like: the row whose value is taken, in place of a grid.
        options: of the first method, fixed.
        agent: another agent than the benchmark's, and its options.
        protocol: of the run.
    """

    method: tuple[str, ...] = ()
    option: str = ""
    grid: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    agent: str = ""
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = "sequential"
    like: str = ""

    def method_options(self, value: Any) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {m.replace("-", "_"): {} for m in self.method}
        if self.method:
            first = next(iter(found))
            found[first] |= self.options
            method, _, option = self.option.rpartition(".")
            if option and value is not None:
                found[method or first][option] = value
        return found


def ewc_rows(grid: tuple[float, ...]) -> dict[str, Row]:
    names = {"ewc": "EWC (sampled Fisher)", "ewc-exact": "EWC (exact Fisher)", "ewc-empirical": "EWC (empirical Fisher)",
             "ewc-online": "online EWC"}  # fmt: skip
    return {label: Row((name,), "strength", grid) for name, label in names.items()}


ROWS: dict[str, Row] = {
    "fine-tuning": Row(),
    "L2": Row(("l2",), "strength", (0.01, 0.1, 1.0, 10.0)),
    **ewc_rows((1.0, 10.0, 100.0, 1000.0)),
    "SI": Row(("si",), "strength", (1.0, 10.0, 100.0, 1000.0)),
    "MAS": Row(("mas",), "strength", (1e-3, 0.01, 0.1, 1.0)),
    "LwF": Row(("lwf",), "strength", (0.1, 0.3, 1.0, 3.0)),
    "PackNet": Row(("packnet",)),
    "A-GEM": Row(("a-gem",)),
    "ER": Row(("er",)),
    "ER, balanced": Row(("er-balanced",)),
    "ER + EWC": Row(("er", "ewc"), "ewc.strength", like="EWC (sampled Fisher)"),
    "DER++": Row(("derpp",), "alpha", (0.3, 1.0)),
    "CLEAR": Row(("clear",), "strength", (3.0, 10.0, 30.0, 100.0)),
    "UER": Row(("uer",)),
    "UPGD": Row(("upgd",), "lr", (0.03, 0.1, 0.3)),
    "UPGD (features)": Row(("upgd-feature",), "lr", (0.03, 0.1, 0.3)),
    "continual backprop": Row(("cbp",), "rho", (1e-5, 1e-4)),
    "shrink and perturb": Row(("shrink-perturb",), "decay", (1e-3, 1e-2)),
    "shrink and perturb at boundaries": Row(("shrink-perturb-task",), "shrink", (0.5, 0.9)),
    "ReDo": Row(("redo",), "tau", (0.025, 0.1)),
    "L2 to init": Row(("l2-init",), "strength", (1e-4, 1e-3)),
    "independent": Row(protocol="independent"),
    "joint": Row(protocol="joint"),
}
REPLAY = ("A-GEM", "ER", "ER, balanced", "ER + EWC", "DER++", "UER")


@dataclass(frozen=True)
class Benchmark:
    """A stream and an agent, and what is run on them.

    Args:
        title: of the page.
        stream, agent: names.
        agent_options, stream_options, settings: for :func:`clbench.run`.
        without: rows that do not fit, each with the reason.
        rows: rows of its own, or other forms of the common ones.
        tune: whether grids are tried; else ``values``, or the default of the method.
        seeds: default reporting seeds.
        online: the measure is prequential accuracy, not the final one.
        note: what else has to be known of the runs behind the page.
    """

    title: str
    stream: str
    agent: str
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Row] = field(default_factory=dict)
    tune: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)
    seeds: str = "0,1,2"
    online: bool = False
    note: str = ""

    def table(self) -> dict[str, Row]:
        if self.online:
            return dict(self.rows)
        return {k: self.rows.get(k, r) for k, r in ROWS.items() if k not in self.without} | {
            k: r for k, r in self.rows.items() if k not in ROWS
        }


DIGITS: dict[str, Any] = {"hidden": (100, 100), "batch_size": 32, "lr": 1e-3}
# as many stored rows in all as replay has
CLONING = {"CLEAR": Row(("clear",), "strength", (3.0, 10.0, 30.0, 100.0), {"samples": 20})}
FIVE = {
    "PackNet": Row(("packnet",), options={"tasks": 5}),
    "CLEAR": Row(("clear",), "strength", (3.0, 10.0, 30.0, 100.0), {"samples": 40}),
}
OWN_LAYERS: dict[str, Any] = {"hidden": (100, 100), "batch_size": 32}
EIDETIC_BC = {"eidetic-bc": Row(agent="eidetic-bc", agent_options=OWN_LAYERS)}
EIDETIC_BC_5 = {"eidetic-bc": Row(agent="eidetic-bc", agent_options={**OWN_LAYERS, "pruning": {"tasks": 5}})}
ADAPTIVE = {  # the agents' own optimiser is Adam
    "UPGD": Row(("upgd",), "sigma", (1e-3,), {"adaptive": True, "lr": 6e-4}),
    "UPGD (features)": Row(("upgd-feature",), "sigma", (1e-3,), {"adaptive": True, "lr": 6e-4}),
}
ONE_HEAD = {"UER": "one output layer only"}
NO_IDS = {"PackNet": "it needs task ids while acting, which this scenario hides"}
OWN_CLASSES = {"independent": "each network would be tested on its own classes only"}
# where the loss of a task comes near 0 its Fisher does, too
SPLIT = ewc_rows((1e2, 1e4, 1e6, 1e8))
CONTINUOUS = {"UER": "classes only"}
SGD = {"optimizer": "sgd"}
# a cheaper search than the default, as evaluation would take most of the time
PLANS: dict[str, Any] = {"planner_options": {"samples": 64, "elites": 16}, "replan_every": 8}
WORLD = {"EWC (sampled Fisher)": Row(("ewc",), "strength", (1.0, 10.0, 100.0))}
EIDETIC = {"eidetic-pldm": Row(agent="eidetic-pldm", agent_options=PLANS)}
SLOW = {**SGD, "lr": 0.03}
UTILITY = {"weight_decay": 1e-3, "sigma": 0.1, "beta": 0.999}
ONLINE: dict[str, Row] = {
    "SGD": Row(agent_options=SLOW),
    "Adam": Row(agent_options={"lr": 3e-3}),
    "SGD, online EWC": Row(("ewc-online",), options={"strength": 1.0, "samples": 50}, agent_options=SLOW),
    "SGD, SI": Row(("si",), options={"strength": 0.1}, agent_options=SLOW),
    "UPGD": Row(("upgd",), "lr", (0.1,), UTILITY),
    "UPGD (features)": Row(("upgd-feature",), "lr", (0.03,), UTILITY),
    "SGD, shrink and perturb": Row(("shrink-perturb",), options={"decay": 1e-3, "sigma": 0.1}, agent_options=SLOW),
    "SGD, L2 to init": Row(("l2-init",), options={"strength": 1e-3}, agent_options=SLOW),
    "SGD, continual backprop": Row(("cbp",), options={"rho": 1e-3}, agent_options=SLOW),
    "SGD, ReDo": Row(("redo",), options={"every": 500, "tau": 0.1}, agent_options=SLOW),
    "Adam, continual backprop": Row(("cbp",), options={"rho": 1e-3}, agent_options={"lr": 3e-3}),
}
INPUTS = {**ONLINE, "UPGD": Row(("upgd",), "lr", (0.03,), UTILITY)}
ONE_BY_ONE: dict[str, Any] = {"hidden": (128, 64), "batch_size": 1, "reset_optimizer": False, "activation": "relu"}

BENCHMARKS: dict[str, Benchmark] = {
    "permuted": Benchmark(
        "Ten permutations of digits", "digits-permuted", "bc", DIGITS,
        rows={**CLONING, **EIDETIC_BC}, seeds="0,1,2,3,4",
    ),
    "split-class": Benchmark(
        "Split digits, class-incremental", "digits-split", "bc", DIGITS, {"scenario": "class"},
        without={**NO_IDS, **OWN_CLASSES}, rows={**FIVE, **SPLIT}, seeds="0,1,2,3,4",
    ),
    "split-domain": Benchmark(
        "Split digits, domain-incremental", "digits-split", "bc", DIGITS, {"scenario": "domain"},
        without=NO_IDS, rows={**FIVE, **SPLIT}, seeds="0,1,2,3,4",
    ),
    "split-task": Benchmark(
        "Split digits, task-incremental", "digits-split", "bc", {**DIGITS, "heads": 5}, {"scenario": "task"},
        without=ONE_HEAD, rows={**FIVE, **EIDETIC_BC_5, **SPLIT}, seeds="0,1,2,3,4",
    ),
    "doors-bc": Benchmark(
        "A policy on five layouts of Two-Rooms", "two-rooms-doors", "bc", {"hidden": (256, 256)},
        {"episodes": 20, "observation": "layout"}, {"reveals": "task_id", "budget": 300},
        without=CONTINUOUS, rows=FIVE, tune=False,
    ),
    "doors-pldm": Benchmark(
        "A world model on five layouts of Two-Rooms", "two-rooms-doors", "pldm",
        {"architecture": {"hidden": (256, 256)}, **PLANS}, {"episodes": 10, "observation": "layout"},
        {"reveals": "task_id", "budget": 600}, rows={**FIVE, **ADAPTIVE, **EIDETIC, **WORLD},
        without={**CONTINUOUS, "EWC (empirical Fisher)": "the loss compares samples with each other"},
        note="The extra samples of these runs were counted in windows of 16 transitions, the agent's own in transitions: "
        "the shares are 16 times what is said. A joint model, replay and EWC must hold all layouts in one network, told "
        "apart by two numbers; PackNet and eidetic networks have weights per task, as the independent agents have. With "
        "more updates and the default search `eidetic-pldm` did better ([there](eidetic_world_model.md)).",
    ),
    "minigrid": Benchmark(
        "Five MiniGrid tasks, online", "minigrid-5", "sb3-ppo", {"lr": 6e-4, "batch_size": 256, "ent_coef": 0.01},
        {"episodes": 20}, {"reveals": "task_id", "budget": 8_192, "num_envs": 16}, tune=False, rows={**FIVE, **ADAPTIVE},
        without=dict.fromkeys((*REPLAY, "LwF", "EWC (empirical Fisher)"), "PPO's loss is not open to methods"),
    ),
    "online-inputs": Benchmark(
        "One example at a time, inputs permuted again and again", "digits-online-inputs", "bc", ONE_BY_ONE,
        settings={"evaluate": False}, rows=INPUTS, online=True, tune=False, seeds="10,11,12",
    ),
    "online-labels": Benchmark(
        "One example at a time, labels permuted again and again", "digits-online-labels", "bc", ONE_BY_ONE,
        settings={"evaluate": False}, rows=ONLINE, online=True, tune=False, seeds="10,11,12",
    ),
}  # fmt: skip


# -- runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run of a row with one value of its option."""

    benchmark: str
    row: str
    seed: int
    value: Any = None

    def path(self, out: Path) -> Path:
        name = self.row if self.value is None else f"{self.row}={self.value}"
        return (
            out / self.benchmark / "".join(c if c.isalnum() or c in "-=." else "_" for c in name) / f"seed-{self.seed}"
        )

    def settings(self, out: Path) -> dict[str, Any]:
        bench = BENCHMARKS[self.benchmark]
        row = bench.table()[self.row]
        own = dict(row.agent_options) if row.agent else {**bench.agent_options, **row.agent_options}
        return {
            "stream": bench.stream, "agent": row.agent or bench.agent, "method": row.method, "protocol": row.protocol,
            "seed": self.seed, "eval_every": 0, "eval_start": False, "tensorboard": False, "agent_options": own,
            "method_options": row.method_options(self.value), "stream_options": dict(bench.stream_options),
            **bench.settings, "out": self.path(out),
        }  # fmt: skip


def one(settings: Mapping[str, Any]) -> None:
    """Train and evaluate; nothing, if that has been done."""
    clbench.run(**settings)


def run_all(jobs: Sequence[Job], arguments: argparse.Namespace) -> None:
    """Every job once, several at a time.

    Raises:
        SystemExit: some failed; what is done is kept.
    """
    due = [j for j in jobs if not done(j, arguments.out)]
    executor = InProcess() if arguments.processes == 1 else Processes(arguments.processes)
    failed = 0
    for end in executor.run(one, [j.settings(arguments.out) for j in due]):
        job = due[end.index]
        failed += end.problem is not None
        said = end.problem or f"{score(job, arguments.out):.3f}"
        print(f"{job.benchmark}, {job.row}, {job.value}, seed {job.seed}: {said}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"{failed} runs failed; give the command again to repeat those.")


def done(job: Job, out: Path) -> bool:
    """Whether the run is there and complete.

    Raises:
        SystemExit: it was made with other settings than today's.
    """
    folder = job.path(out)
    if not (folder / "results.json").exists() or read_json(folder / "results.json")["status"] != "complete":
        return False
    made, wanted = (
        read_json(folder / "config.json")["config"],
        json.loads(json.dumps(job.settings(folder), default=str)),
    )
    del wanted["out"]
    differing = [k for k in wanted if not agrees(wanted[k], made.get(k))]
    if differing:
        sys.exit(f"{folder} was made with other settings ({', '.join(differing)}); remove it, or choose another --out.")
    return True


def agrees(wanted: Any, made: Any) -> bool:
    """Whether what is wanted is what was recorded, which may hold more (defaults)."""
    if isinstance(wanted, dict) and isinstance(made, dict):
        return all(k in made and agrees(v, made[k]) for k, v in wanted.items())
    return wanted == made or str(wanted) == str(made) or (wanted == [] and made in (None, ()))


def results(job: Job, out: Path) -> dict[str, Any]:
    return dict(read_json(job.path(out) / "results.json"))


def score(job: Job, out: Path) -> float:
    """What the tables are about: final average performance, or prequential accuracy."""
    found = results(job, out)
    if BENCHMARKS[job.benchmark].online:
        return float(found["online"]["accuracy"])
    final = found["metrics"]["average_performance"]
    if final is None:
        sys.exit(f"{job.path(out)} has no average performance; was it evaluated at all?")
    return float(final)


def choose(name: str, rows: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The value of each row's option: the best on the tuning seed, the benchmark's, or None for the method's default."""
    bench = BENCHMARKS[name]
    table = bench.table()
    if not bench.tune:
        return {k: bench.values.get(k, table[k].grid[len(table[k].grid) // 2] if table[k].grid else None) for k in rows}
    trials = {k: [Job(name, k, TUNING_SEED, v) for v in table[k].grid] for k in rows}
    run_all([j for jobs in trials.values() for j in jobs], arguments)
    best = {k: max(jobs, key=lambda j: score(j, arguments.out)).value for k, jobs in trials.items() if jobs}
    return {k: best.get(table[k].like or k) for k in rows}


def edge(row: Row, value: Any) -> str:
    """A mark for a value at the end of its grid, where the best may lie beyond."""
    return " (edge)" if len(row.grid) > 1 and value in (row.grid[0], row.grid[-1]) else ""


# -- tables --------------------------------------------------------------------------------------------------------------


def percent(values: Sequence[float | None], *names: str) -> Interval:
    return summarise([None if v is None else 100 * v for v in values], numpy_generator(0, "continual", *names))


def lines(name: str, jobs: Mapping[str, Sequence[Job]], arguments: argparse.Namespace) -> Iterable[Sequence[str]]:
    """Header and rows of a benchmark's table."""
    out, online = arguments.out, BENCHMARKS[name].online
    found = {k: [results(j, out) for j in js] for k, js in jobs.items()}
    first = next(iter(jobs))
    base = {j.seed: 100 * score(j, out) for j in jobs[first]}
    if online:
        yield ("method", "value", "online accuracy", f"minus {first}", "first tenth", "last tenth", "lost", "extra samples",
               "state, kB")  # fmt: skip
    else:
        yield ("method", "value", "average", f"minus {first}", "forgetting", "right after learning", "extra samples",
               "state, kB")  # fmt: skip
    for row, runs in found.items():
        here, chosen = jobs[row], jobs[row][0].value
        own = BENCHMARKS[name].table()[row]
        value = "-" if chosen is None else f"{own.option} {chosen:g}{edge(own, chosen)}"
        mine = {j.seed: 100 * score(j, out) for j in here}
        other = "-"
        if row != first:
            other = interval_text(paired_difference(mine, base, numpy_generator(0, "continual", name, row)), len(here))
        if online:
            per = [np.array(r["online"]["per_phase"], float) for r in runs]
            tenth = max(1, len(per[0]) // 10)
            starts, ends = [p[:tenth].mean() for p in per], [p[-tenth:].mean() for p in per]
            lost = [a - b for a, b in zip(starts, ends, strict=True)]
            measures = [
                percent([score(j, out) for j in here], name, row), other,
                *(percent(v, name, row, k) for k, v in (("first", starts), ("last", ends), ("lost", lost))),
            ]  # fmt: skip
        else:
            keys = ("forgetting", "learning_accuracy")
            measures = [
                percent([score(j, out) for j in here], name, row), other,
                *(percent([r["metrics"][k] for r in runs], name, row, k) for k in keys),
            ]  # fmt: skip
        texts = [m if isinstance(m, str) else interval_text(m, len(here)) for m in measures]
        cost = [r["cost"] for r in runs]
        extra = [
            float(np.mean([c.get(f"extra_{way}_samples", 0) / (c["samples"] or 1) for c in cost]))
            for way in ("forward", "backward")
        ]
        state = [c.get("method_state_bytes", 0) / 1024 for c in cost]
        yield (row, value, *texts, " / ".join(f"{100 * e:.0f} %" for e in extra), f"{float(np.mean(state)):.0f}")


def layouts(name: str, jobs: Mapping[str, Sequence[Job]], arguments: argparse.Namespace) -> Iterable[Sequence[str]]:
    """Final score on every task, and what it cost."""
    out = arguments.out
    tasks = results(next(iter(jobs.values()))[0], out)["tasks"]
    yield ("method", *tasks, "parameters", "training, s", "act, s")
    for row, here in jobs.items():
        runs = [results(j, out) for j in here]
        wall = [read_json(j.path(out) / "timing.json")["wall_time_s"] for j in here]
        final = [
            [r["matrix"][k + 1 if r["protocol"] == "independent" else -1][k] for r in runs] for k in range(len(tasks))
        ]
        cells = [interval_text(percent(v, name, row, t), len(runs)) for t, v in zip(tasks, final, strict=True)]
        yield (
            row, *cells, f"{runs[0]['cost']['parameters']:,}", f"{np.mean([w['learn'] for w in wall]):.0f}",
            f"{np.mean([w['evaluate_act'] for w in wall]):.0f}",
        )  # fmt: skip


def markdown(rows: Iterable[Sequence[str]]) -> str:
    header, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rest))


def commit_of(job: Job, out: Path) -> str:
    """What a run was made with; rows were added as methods were written."""
    made = read_json(job.path(out) / "config.json")["provenance"]
    return f"{str(made['git'])[:10]}{' with local changes' if made['dirty'] else ''}"


def page(name: str, jobs: Mapping[str, Sequence[Job]], arguments: argparse.Namespace) -> str:
    bench = BENCHMARKS[name]
    example = next(iter(jobs.values()))[0]
    made = read_json(example.path(arguments.out) / "config.json")["provenance"]
    budget = results(example, arguments.out)["budgets"][0]
    unit = results(example, arguments.out)["unit"].replace("_", " ")
    commits = sorted({commit_of(j, arguments.out) for js in jobs.values() for j in js})
    seeds = ",".join(str(j.seed) for j in next(iter(jobs.values())))
    last = max((j.path(arguments.out) / "results.json").stat().st_mtime for js in jobs.values() for j in js)
    day = datetime.datetime.fromtimestamp(last, datetime.UTC).date().isoformat()
    settings = ", ".join(f"`{k}={v!r}`" for k, v in {**bench.agent_options, **bench.stream_options}.items())
    grids = "; ".join(
        f"{k}: {', '.join(f'{v:g}' for v in r.grid)}" for k, r in bench.table().items() if r.grid and k in jobs
    )
    chosen = (
        f"Values were chosen on seed {TUNING_SEED}, one run each, which is not reported (its examples or episodes for "
        f"evaluation are those of all seeds), from: {grids}."
        if bench.tune
        else "Values were not tuned here: middles of the grids of other benchmarks, or (online) chosen on seeds 0 and 1."
    )
    measure = (
        "Accuracy of predictions made before the update on each example, over all tasks, over the first and the last tenth "
        "of the tasks, and the difference of the two (positive: plasticity was lost)"
        if bench.online
        else "Scores after the last phase, averaged over tasks; forgetting (best earlier score minus the last); scores "
        "right after a task was learned"
    )
    text = (
        f"# {bench.title}\n\n"
        f"Written by `python scripts/continual_table.py {name} --seeds {seeds} --write` on {day}. "
        f"Stream `{bench.stream}`, agent "
        f"`{bench.agent}` ({settings or 'defaults'}), {budget} {unit} per task for every method. {measure}; all in "
        f"percent, means over seeds {seeds} with 95 % bootstrap intervals over runs, differences paired by seed. Extra "
        "samples: what the method sends forward / backward through the network beside the agent's own batches, as a share "
        "of those; state: "
        f"what it keeps beside the network and its optimiser. {chosen} Commits {', '.join(commits)}; {made['cpu']}, 1 "
        f"thread, GPU: {made['gpu'] or 'none'}, torch {made['torch']}.\n\n{markdown(lines(name, jobs, arguments))}\n"
    )
    missing = [row for row in bench.table() if row not in jobs]
    text += f"\nNot run: {', '.join(missing)}.\n" if missing else ""
    text += f"\n{bench.note}\n" if bench.note else ""
    if bench.without and not bench.online:
        text += "\nNot there: " + "; ".join(f"{k} ({why})" for k, why in bench.without.items()) + ".\n"
    if not bench.online:
        few = len(results(example, arguments.out)["tasks"]) <= 5
        text += f"\n## Each task at the end\n\n{markdown(layouts(name, jobs, arguments))}\n" if few else ""
    return text


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", help=f"some of {', '.join(BENCHMARKS)}, with commas between")
    parser.add_argument("--seeds", default="", help="reporting seeds (default: the benchmark's)")
    parser.add_argument("--rows", default="", help="only some rows, with semicolons between")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/continual"))
    parser.add_argument("--write", action="store_true", help="also write the pages in docs/results/")
    arguments = parser.parse_args(given)
    names = arguments.benchmarks.split(",")
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmarks {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    texts = []
    for name in names:
        bench = BENCHMARKS[name]
        rows = [r for r in arguments.rows.split(";") if r] or list(bench.table())
        values = choose(name, rows, arguments)
        seeds = [int(s) for s in (arguments.seeds or bench.seeds).split(",")]
        # one seed of everything first: an interrupted study is a smaller study
        run_all([Job(name, row, seed, values[row]) for seed in seeds for row in rows], arguments)
        jobs = {row: [Job(name, row, seed, values[row]) for seed in seeds] for row in rows}
        texts.append(page(name, jobs, arguments))
        if arguments.write:
            (ROOT / "docs" / "results" / f"continual_{name.replace('-', '_')}.md").write_text(texts[-1])
    whole = "\n".join(texts)
    print(whole)
    return whole


if __name__ == "__main__":
    main()
