"""Reinforcement learning beside planning on reward-free offline data: the study of PLDM, on one footing.

    python scripts/rl_versus_planning.py [--axes size,length,...] [--seeds 0,1,2] [--write]
    python scripts/rl_versus_planning.py --scale paper --device cuda

PLDM against GCBC, GCIQL, CRL, HIQL and HILP on the axes of Sobal et al. 2025 (arXiv 2502.14819): quality of the data, size,
length of trajectories, missing doors, number of maze layouts, distance of a layout from those trained on, and a new task.
Every method faces the same frozen episodes. The scale `small` takes states and small networks, for two CPU cores; `paper`
takes pixels and the published sizes, for a GPU.

One seed of everything comes first, so an interrupted study is a smaller study: give the command again to go on. `--write`
writes docs/rl_versus_planning.md from what there is; what has not been run is said to be missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from clbench.comparison import command_of, compare, episode_scores
from clbench.config import build
from clbench.experiments import RunConfig
from clbench.metrics.comparison import paired
from clbench.metrics.statistics import Interval, summarise
from clbench.registry import resolve
from clbench.report import find_runs
from clbench.report.markdown import interval_text
from clbench.report.runs import Run, load_run
from clbench.rng import numpy_generator
from clbench.streams.two_rooms_chase import SPEEDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "rl_versus_planning.md"
AGENTS = ("pldm", "hilp", "hiql", "gciql", "crl", "gcbc")


def rooms(name: str) -> str:
    """Two-Rooms with the rule at walls that the paper's evaluations have."""
    return f"two-rooms/{name}-v0?walls=noisy"


GOOD = rooms("good")
MAZE = "point-maze/5-layouts-v0?observation=layout"

# axis -> data set -> (label, published success of AGENTS in percent: figures 1 and 4 and table 2 of version 2 of the paper;
# GCIQL on good data and without doors as in table 2 of version 4, before 93.6 and 22). Extremes and middle of each axis.
Published = tuple[float | None, ...]
BEST: Published = (97.8, 100, 96.4, 98.0, 89.3, 86.0)
AXES: Mapping[str, tuple[str, Mapping[str, tuple[str, Published]]]] = {
    "door": (
        "Two-Rooms: with and without trajectories through the door",
        {GOOD: ("good data", BEST), rooms("no-door"): ("no door passing", (34.4, 100, 26.3, 99.6, 14.7, 8.4))},
    ),
    "size": (
        "Two-Rooms: transitions",
        {
            rooms("size-634"): ("634", (9, 2.6, 5.3, 10, 8, 4)),
            rooms("size-5078"): ("5,078", (80.6, 2.6, 22, 35.3, 22.6, 20.6)),
            rooms("size-81250"): ("81,250", (98, 69.3, 79.3, 74, 58.6, 64)),
            GOOD: ("3 M", BEST),
        },
    ),
    "length": (
        "Two-Rooms: states per trajectory",
        {
            rooms("length-17"): ("17", (87.3, 100, 30.6, 38, 40, 38.6)),
            rooms("length-33"): ("33", (89.3, 100, 56.6, 58, 59.3, 45.3)),
            GOOD: ("91", BEST),
        },
    ),
    "mix": (
        "Two-Rooms: share of good trajectories, the others of a random policy",
        {
            rooms("mix-0"): ("0", (None, 100, 46, 46.6, 29.3, 18.6)),
            rooms("mix-0.02"): ("0.02", (84.6, 99.3, 70.6, 58, 36.6, 55.3)),
            GOOD: ("1", BEST),
        },
    ),
    "layouts": (
        "Point mazes: layouts in the data, success on layouts that are not",
        {
            MAZE: ("5", (95.9, 38.3, 60.3, 55.3, 45.6, 48.6)),
            "point-maze/40-layouts-v0?observation=layout": ("40", (99.2, 76.3, 86, 73, 56.6, 51.3)),
        },
    ),
    "distance": (
        "Point mazes, 5 layouts in the data: edit distance of the layout to them",
        {
            f"{MAZE}&trials=distance-0": ("0", (100, 83.3, 100, 100, 95, 81.6)),
            f"{MAZE}&trials=distance-4": ("4", (96.6, 46.6, 78.3, 78.3, 68.3, 61.6)),
            f"{MAZE}&trials=distance-8": ("8", (95, 38.3, 60, 56.6, 50, 46.6)),
        },
    ),
}
CHASE = "two-rooms-chase"
CHASE_PUBLISHED = {"pldm": (72, 41, 20, 5.4, 1.5, 0.6), "hilp": (71, 22, 0, 0, 0, 0)}


@dataclass(frozen=True)
class Finding:
    """A published difference: ``better`` reaches more than each of ``worse`` on this data set; or, as a ``tie``, neither
    is ahead of the other by :data:`MARGIN`."""

    text: str
    dataset: str
    better: str
    worse: tuple[str, ...]
    tie: bool = False
    task: str | None = None  # of the stream; all of them by default


MARGIN = 0.1  # of success; smaller differences count as a tie
OTHERS = tuple(a for a in AGENTS if a != "pldm")
POLICIES = ("hiql", "gciql", "crl", "gcbc")
FINDINGS = (
    Finding("Planning wins on little data (5,078 transitions)", rooms("size-5078"), "pldm", OTHERS),
    Finding("Planning wins on new layouts (5 in the data)", MAZE, "pldm", OTHERS),
    Finding("Planning wins on a new task (a chaser of speed 1)", CHASE, "pldm", ("hilp",), task="chase-1"),
    Finding("Planning beats policies on short trajectories", rooms("length-17"), "pldm", POLICIES),
    Finding("HILP wins where no trajectory passes the door", rooms("no-door"), "hilp", ("pldm",)),
    Finding("HILP wins on short trajectories", rooms("length-17"), "hilp", ("pldm",)),
    Finding("HILP wins on random data", rooms("mix-0"), "hilp", ("pldm", *POLICIES)),
    Finding("HILP wins on hardly any good data (2 %)", rooms("mix-0.02"), "hilp", ("pldm",)),
    Finding("A tie on the best data", GOOD, "pldm", ("hilp", "hiql", "gciql"), tie=True),
)


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join((*AXES, CHASE)), help="some of them, with commas between")
    parser.add_argument("--only", default="", help="data sets whose id holds one of these, with commas between")
    parser.add_argument("--agents", default=",".join(AGENTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", default="small", choices=("small", "paper"))
    parser.add_argument("--device", default=None, help="default: the GPU at the scale of the paper, else the CPU")
    parser.add_argument("--workers", type=int, default=None, help="processes at once; default: what the machine allows")
    parser.add_argument("--out", type=Path, default=Path("runs/rl-versus-planning"))
    parser.add_argument("--no-run", action="store_true", help="only read what there is")
    parser.add_argument("--write", action="store_true", help="write the page of the documentation")
    arguments = parser.parse_args(given)
    axes = arguments.axes.split(",")
    unknown = [a for a in axes if a not in (*AXES, CHASE)]
    if unknown:
        parser.error(f"unknown axes {', '.join(unknown)}; there are {', '.join((*AXES, CHASE))}")
    unknown = [a for a in arguments.agents.split(",") if a not in AGENTS]
    if unknown:
        parser.error(f"unknown agents {', '.join(unknown)}; the study has {', '.join(AGENTS)}")
    out = arguments.out / arguments.scale
    failed = 0 if arguments.no_run else run(axes, arguments, out)
    text = page(Study(out), arguments)
    print(text)
    if arguments.write:
        PAGE.write_text(text)
    if failed:
        raise SystemExit(f"{failed} cells gave no result; {out}/**/report.html says why, the same command tries again.")
    return text


def run(axes: Sequence[str], arguments: argparse.Namespace, out: Path) -> int:
    """Whatever is not there yet. Returns the number of cells without a result."""
    agents, seeds = arguments.agents.split(","), [int(s) for s in arguments.seeds.split(",")]
    datasets = list(dict.fromkeys(d for axis in axes if axis != CHASE for d in AXES[axis][1]))
    chosen = [
        d for d in (*datasets, *([CHASE] if CHASE in axes else [])) if any(p in d for p in arguments.only.split(","))
    ]
    of_chase = [a for a in CHASE_PUBLISHED if a in agents]
    pieces = [
        (out, [d for d in chosen if d != CHASE], agents),
        (out / "new-task", [d for d in chosen if d == CHASE], of_chase),  # apart: every folder has one report
    ]
    failed = 0
    for folder, names, who in pieces:
        if names and who:
            found = compare(
                names, agents=who, seeds=seeds, scale=arguments.scale, device=arguments.device,
                workers=arguments.workers, out=folder, note=lambda text: print(text, file=sys.stderr, flush=True),
            )  # fmt: skip
            failed += len(found.failures)
    return failed


def task_scores(found: Run, task: str) -> np.ndarray:
    """Scores (E,) of the last evaluation of one task."""
    log = found.log
    return log.score[(log.phase == len(found.phases)) & (log.step == log.step.max()) & (log.task == task)]


class Study:
    """The complete runs below a folder: data set -> agent -> seed."""

    def __init__(self, out: Path):
        self.runs: dict[str, dict[str, dict[int, Run]]] = {}
        for path in find_runs([out]) if out.exists() else []:
            found = load_run(path)
            if isinstance(found, Run) and found.problem is None:
                name = str(found.config["stream"])
                self.runs.setdefault(name, {}).setdefault(found.agent, {})[found.seed] = found

    def scores(self, dataset: str, agent: str, task: str | None = None) -> dict[int, np.ndarray]:
        """Seed -> scores of the frozen episodes (E,), of one task or of all."""
        runs = sorted(self.runs.get(dataset, {}).get(agent, {}).items())
        return {s: episode_scores(r) if task is None else task_scores(r, task) for s, r in runs}

    def success(self, dataset: str, agent: str) -> Interval:
        means = [float(s.mean()) for s in self.scores(dataset, agent).values()]
        return summarise(means, numpy_generator(0, "study", dataset, agent))

    def all(self) -> list[Run]:
        return [r for of_agent in self.runs.values() for runs in of_agent.values() for r in runs.values()]


# -- the page ------------------------------------------------------------------------------------------------------------


def page(study: Study, arguments: argparse.Namespace) -> str:
    made = study.all()
    parts = [INTRODUCTION.format(scale=arguments.scale), _how(made, arguments)]
    parts += ["## Which findings hold here", RULE.format(margin=MARGIN), findings(study)]
    parts += [f"## {title}\n\n{axis_table(study, points, arguments.scale)}" for title, points in AXES.values()]
    parts += ["## Two-Rooms: a new task, to stay away from a chaser, without further training", chase_table(study)]
    parts += ["## What it cost", costs(study), "## Commands", commands(made)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Reinforcement learning beside planning

Written by `python scripts/rl_versus_planning.py --scale {scale} --write`; nothing on this page is typed by hand.

One world model that is planned with (`pldm`) and five methods that learn a policy from the same reward-free data (`hilp`,
`hiql`, `gciql`, `crl`, `gcbc`), on the axes of Sobal et al. 2025 (arXiv 2502.14819). All meet the same frozen episodes.
Beside each success stand the paper's figures in percent: other networks, pixels, and far more training, so they are to
compare orders with, not levels. **A cell without a number has no complete run.**"""

RULE = """Difference in success, paired by seed and by episode; the published one in points of percent. Over seeds the
interval is that of Student's t, because a bootstrap of 3 seeds is far too narrow; over episodes it is a bootstrap,
the runs as they are. A finding *holds* where both lie on its side of 0, is *reversed* where both lie on the other,
and *undecided* otherwise; a tie holds where both lie within +-{margin:g}, and is none where both lie outside. There
is no correction for the number of rows."""


def _how(made: Sequence[Run], arguments: argparse.Namespace) -> str:
    if not made:
        return "No runs yet."
    example = made[0]
    source = example.provenance
    budgets = sorted({(r.agent, r.phases[0].budget) for r in made})
    updates = ", ".join(f"{agent} {budget:,}" for agent, budget in budgets)
    commits = sorted({str(r.provenance["git"])[:12] + ("+" if r.provenance["dirty"] else "") for r in made})
    return (
        f"Scale `{arguments.scale}`; gradient updates per run: {updates}. {len(made)} complete runs on {source['cpu']}, "
        f"GPU: {source['gpu'] or 'none'}, torch {source['torch']}, commits {', '.join(commits)} (+: changed). Success: "
        "mean over seeds with a 95 % bootstrap interval over runs (none with one seed)."
    )


def axis_table(study: Study, points: Mapping[str, tuple[str, Published]], scale: str) -> str:
    rows: list[Sequence[str]] = [(f"scale {scale}", *AGENTS)]
    for dataset, (label, published) in points.items():
        row = [label]
        for agent, theirs in zip(AGENTS, published, strict=True):
            ours = study.success(dataset, agent)
            row.append(f"{interval_text(ours)} ({'-' if theirs is None else f'{theirs:g} %'})")
        rows.append(row)
    return _table(rows)


def findings(study: Study) -> str:
    """Each published difference beside ours, paired by seed and episode."""
    rows: list[Sequence[str]] = [("finding", "difference of", "published", "here", "verdict")]
    for finding in FINDINGS:
        published = _published(finding)
        for other in finding.worse:
            a, b = (study.scores(finding.dataset, agent, finding.task) for agent in (finding.better, other))
            found = paired(finding.dataset, finding.better, a, other, b)
            theirs = published[finding.better], published[other]
            gap = "-" if None in theirs else f"{theirs[0] - theirs[1]:+.1f} %"  # type: ignore[operator]
            if found is not None:
                found |= student(np.array([a[s].mean() - b[s].mean() for s in found["seeds"]]))
            ours = "not run" if found is None else _difference(found)
            rows.append((finding.text, f"{finding.better} - {other}", gap, ours, _verdict(found, finding.tie)))
    return _table(rows)


def student(differences: np.ndarray) -> dict[str, float | None]:
    """The 95 % interval of Student's t for the mean of paired differences (runs,); none with one."""
    n = len(differences)
    if n == 1:
        return {"low": None, "high": None}
    half = float(stdtrit(n - 1, 0.975) * differences.std(ddof=1) / np.sqrt(n))
    return {"low": float(differences.mean()) - half, "high": float(differences.mean()) + half}


def _published(finding: Finding) -> Mapping[str, float | None]:
    if finding.dataset == CHASE:
        number = [f"chase-{speed:g}" for speed in SPEEDS].index(str(finding.task))
        return {agent: of_speed[number] for agent, of_speed in CHASE_PUBLISHED.items()}
    points = next(points for _, points in AXES.values() if finding.dataset in points)
    return dict(zip(AGENTS, points[finding.dataset][1], strict=True))


def _difference(found: Mapping[str, Any]) -> str:
    text = f"{found['value']:+.2f}"
    if found["low"] is not None:
        text += f" [{found['low']:+.2f}, {found['high']:+.2f}] over {len(found['seeds'])} seeds"
    if found["episodes_low"] is not None:
        text += f"; [{found['episodes_low']:+.2f}, {found['episodes_high']:+.2f}] over episodes"
    return text


def _verdict(found: Mapping[str, Any] | None, tie: bool) -> str:
    """By both intervals, over seeds and over episodes; the first can be narrow by chance."""
    if found is None:
        return "-"
    if found["low"] is None:
        return "one seed"
    low = min(v for v in (found["low"], found["episodes_low"]) if v is not None)
    high = max(v for v in (found["high"], found["episodes_high"]) if v is not None)
    if tie:
        return (
            "holds" if low > -MARGIN and high < MARGIN else "no tie" if low > MARGIN or high < -MARGIN else "undecided"
        )
    return "holds" if low > 0 else "reversed" if high < 0 else "undecided"


def chase_table(study: Study) -> str:
    """Success per task of the stream, of which only the first is trained."""
    rows: list[Sequence[str]] = []
    for agent, published in CHASE_PUBLISHED.items():
        runs = study.runs.get(CHASE, {}).get(agent, {})
        if not runs:
            continue
        tasks = next(iter(runs.values())).tasks
        if not rows:
            rows.append(("", *tasks))
        cells = [agent]
        for number, task in enumerate(tasks):
            means = [float(task_scores(r, task).mean()) for r in runs.values()]
            theirs = f"{published[number - 1]:g} %" if 0 < number <= len(published) else "-"
            cells.append(f"{interval_text(summarise(means, numpy_generator(0, 'study', agent, task)))} ({theirs})")
        rows.append(cells)
    return _table(rows) if rows else "Not run."


def costs(study: Study) -> str:
    """Means over all runs of an agent on data sets."""
    rows: list[Sequence[str]] = [("", "runs", "updates", "training, s", "everything, s", "acting, ms per env step")]
    for agent in AGENTS:
        runs = [r for name, of_agent in study.runs.items() if name != CHASE for r in of_agent.get(agent, {}).values()]
        if not runs:
            continue
        times = [r.timing.get("wall_time_s", {}) for r in runs]
        steps = [int(r.log.length.sum()) for r in runs]
        acting = [1000 * t["evaluate_act"] / n for t, n in zip(times, steps, strict=True) if n and "evaluate_act" in t]

        def mean(values: Sequence[float], digits: int) -> str:
            return f"{np.mean(values):.{digits}f}" if values else "-"

        learn, total = ([t[k] for t in times if k in t] for k in ("learn", "total"))
        updates = mean([r.cost.get("updates", 0) for r in runs], 0)
        rows.append((agent, str(len(runs)), updates, mean(learn, 0), mean(total, 0), mean(acting, 3)))
    return _table(rows)


def commands(made: Sequence[Run]) -> str:
    """One line per run, which makes it anywhere."""
    lines = [
        command_of(build(RunConfig, {**r.config, "agent_options": chosen_options(r)}, where="study")) for r in made
    ]
    return "Each cell on its own:\n\n```\n" + "\n".join(sorted(lines)) + "\n```"


def chosen_options(found: Run) -> dict[str, Any]:
    """The options of a run's agent without those that its preset, or nothing at all, brings anyway."""
    kind, options = resolve("agents", found.agent).Config, found.config["agent_options"]
    start = {k: options[k] for k in ("preset",) if k in options}
    brought = json.loads(json.dumps(dataclasses.asdict(build(kind, start, where=found.agent))))
    return {**start, **{k: v for k, v in options.items() if v != brought.get(k)}}


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


if __name__ == "__main__":
    main()
