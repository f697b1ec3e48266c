"""Five MiniGrid tasks, one after the other, without forgetting: eidetic-ppo beside fine-tuning, independent, joint.

    python scripts/eidetic_minigrid.py [--seeds 0,1,2] [--budget N] [--processes 2] [--write]

Trains `eidetic-ppo` and Stable-Baselines3's `sb3-ppo` on `minigrid-5` with the same options and the same environment steps
per task: PPO that goes on with its weights (fine-tuning), a fresh agent per task (independent), all tasks at once (joint,
as many steps in all). Prints success on the frozen tasks after the last phase with 95 % intervals over seeds, and whether
the finished policies of each eidetic run have changed, by `clbench verify` and episode by episode after every later
phase. Give the command again to go on after an interruption; finished runs are not repeated. `--write` also writes
docs/results/eidetic_minigrid.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import clbench
from clbench.executors import InProcess, Processes
from clbench.metrics.log import EvalLog, read_eval_csv
from clbench.metrics.statistics import Interval, summarise
from clbench.records import read_json
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator
from clbench.verification import verify_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "eidetic_minigrid.md"
STREAM, EIDETIC = "minigrid-5", "eidetic-ppo"

METHODS: dict[str, tuple[str, str]] = {  # agent and protocol
    EIDETIC: (EIDETIC, "sequential"),
    "fine-tuning": ("sb3-ppo", "sequential"),
    "independent": ("sb3-ppo", "independent"),
    "joint": ("sb3-ppo", "joint"),
}
# the same for both agents, chosen on seed 100: an entropy bonus, as rewards are sparse, and larger steps than the default
OPTIONS: dict[str, Any] = {"lr": 6e-4, "batch_size": 256, "ent_coef": 0.01}
OWN: dict[str, dict[str, Any]] = {EIDETIC: {"hidden": (128, 128), "distil_updates": 500}, "sb3-ppo": {}}
ENVS = 16


def job(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of :func:`clbench.run`."""
    agent, protocol = METHODS[name]
    return {
        "stream": STREAM, "agent": agent, "protocol": protocol, "seed": seed, "reveals": "task_id",
        "budget": arguments.budget, "eval_every": 0, "eval_start": False, "num_envs": ENVS, "threads": arguments.threads,
        "tensorboard": False, "agent_options": {**OPTIONS, **OWN[agent]},
        "stream_options": {"episodes": arguments.episodes},
        "out": arguments.out / name / f"seed-{seed}",
    }  # fmt: skip


def one(settings: Mapping[str, Any]) -> None:
    """Train and evaluate; nothing, if that has been done."""
    clbench.run(**settings)


def outcome(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Success per task after the last phase (of a fresh agent: after its own), metrics of the whole, wall time."""
    path = arguments.out / name / f"seed-{seed}"
    results = read_json(path / "results.json")
    tasks, matrix = results["tasks"], results["matrix"]
    rows = range(1, len(tasks) + 1) if METHODS[name][1] == "independent" else [-1] * len(tasks)
    success = {task: matrix[row][column] for column, (task, row) in enumerate(zip(tasks, rows, strict=True))}
    metrics = {k: results["metrics"][k] for k in ("average_performance", "forgetting")}
    wall = read_json(path / "timing.json")["wall_time_s"]
    return {**success, **metrics, "learn": wall["learn"], "total": wall["total"]}


def unchanged(path: Path) -> tuple[str, bool]:
    """Of an eidetic run: what its evidence says, in words, and whether all of it is good.

    The outputs recorded when a task was finished are compared, bit for bit, with those of the network at the end; and every
    evaluation episode of a finished task must be the same after every later phase.
    """
    evidence = verify_run(path)
    log = read_eval_csv(path / "eval.csv")
    tasks = read_json(path / "results.json")["tasks"]
    compared = differing = 0
    for number, task in enumerate(tasks, start=1):
        own = episodes(log, task, number)
        for phase in range(number + 1, len(tasks) + 1):
            compared += 1
            differing += episodes(log, task, phase) != own
    good = evidence.ok and evidence.levels["L1"] == "pass" and differing == 0
    levels = ", ".join(f"{level} {status}" for level, status in evidence.levels.items())
    text = (
        f"{levels}; largest change of an output {evidence.max_abs_change:g}; {compared - differing} of {compared} later "
        "evaluations of finished tasks the same, episode by episode"
    )
    return text, good


def episodes(log: EvalLog, task: str, phase: int) -> list[tuple[float, ...]]:
    """Score, return and length of each episode of a task after a phase, in order."""
    rows = (log.task == task) & (log.phase == phase)
    return list(zip(*(column[rows].tolist() for column in (log.score, log.return_, log.length)), strict=True))


def cells(name: str, columns: Sequence[str], runs: Sequence[Mapping[str, float | None]]) -> list[str]:
    """A row of the table: means over seeds with their intervals, and mean wall times."""

    def over_runs(key: str) -> Interval:
        return summarise([r[key] for r in runs], numpy_generator(0, "eidetic-minigrid", name, key))

    scores = [interval_text(over_runs(k)) for k in columns]
    return [name, str(len(runs)), *scores, *(f"{over_runs(k).value or 0:.0f}" for k in ("learn", "total"))]


def table(rows: Iterable[Sequence[str]]) -> str:
    header, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rest))


def page(text: str, proofs: Sequence[str], arguments: argparse.Namespace) -> str:
    """The page of the documentation: the table, the evidence, and what it was measured with."""
    example = read_json(arguments.out / EIDETIC / f"seed-{arguments.seeds.split(',')[0]}" / "config.json")
    made, options = example["provenance"], example["config"]["agent_options"]
    commit = f"{str(made['git'])[:12]}{' with local changes' if made['dirty'] else ''}"
    pruning, shared = options["pruning"], ", ".join(f"`{k}={v!r}`" for k, v in OPTIONS.items())
    return (
        "# Online reinforcement learning without forgetting: MiniGrid\n\n"
        f"Written by `python scripts/eidetic_minigrid.py --seeds {arguments.seeds} --budget {arguments.budget} --episodes "
        f"{arguments.episodes} --write`. Commit {commit}, {made['cpu']}, {arguments.threads} thread, torch "
        f"{made['torch']}; other processes ran beside it, so wall times are rough.\n\n"
        f"Stream `{STREAM}`, task ids revealed, {arguments.budget} environment steps per task ({ENVS} environments), "
        f"{arguments.episodes} frozen evaluation episodes per task. Both agents: {shared}, else their defaults; actor of "
        f"`{EIDETIC}` {tuple(options['hidden'])}, planned for {pruning['tasks']} tasks, {options['distil_updates']} "
        "updates of distillation per task, which take no environment steps. Success after the last phase (independent: a "
        "fresh agent after its own task), mean over seeds with 95 % bootstrap intervals over runs; with so few seeds those "
        "are too narrow. Wall times are of training and of everything, in seconds.\n\n"
        f"{text}\n\n"
        f"Finished policies of `{EIDETIC}`, unchanged after each later task:\n\n"
        + "\n".join(f"* {line}" for line in proofs)
        + "\n"
    )


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS), help="some of them, with commas between")
    parser.add_argument("--budget", type=int, default=40_960, help="environment steps per task")
    parser.add_argument("--episodes", type=int, default=20, help="evaluation episodes per task")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/eidetic-minigrid"))
    parser.add_argument("--write", action="store_true", help="also write the page in docs/results/")
    arguments = parser.parse_args(given)
    names, seeds = arguments.methods.split(","), [int(s) for s in arguments.seeds.split(",")]
    unknown = [n for n in names if n not in METHODS]
    if unknown:
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")

    # one seed of everything first: an interrupted study is a smaller study
    todo = [(name, seed) for seed in seeds for name in names]
    executor = InProcess() if arguments.processes == 1 else Processes(arguments.processes)
    failed = 0
    for end in executor.run(one, [job(name, seed, arguments) for name, seed in todo]):
        name, seed = todo[end.index]
        failed += end.problem is not None
        average = "" if end.problem else outcome(name, seed, arguments)["average_performance"]
        print(
            f"{name}, seed {seed}: {end.problem or f'average performance {average:.2f}'}", file=sys.stderr, flush=True
        )
    if failed:
        sys.exit(f"{failed} runs failed; give the command again to repeat those.")

    found = {name: [outcome(name, seed, arguments) for seed in seeds] for name in names}
    columns = [k for k in found[names[0]][0] if k not in ("learn", "total")]
    header = ["method", "runs", *(c.replace("_", " ") for c in columns), "training, s", "in all, s"]
    text = table([header, *(cells(name, columns, runs) for name, runs in found.items())])
    proofs, good = [], True
    for seed in seeds if EIDETIC in names else []:
        proof, fine = unchanged(arguments.out / EIDETIC / f"seed-{seed}")
        proofs.append(f"seed {seed}: {'unchanged' if fine else 'CHANGED'} ({proof})")
        good &= fine
    print("\n".join([text, "", *proofs]))
    if arguments.write and EIDETIC in names:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(text, proofs, arguments))
    if not good:
        sys.exit("A finished policy has changed.")
    return text


if __name__ == "__main__":
    main()
