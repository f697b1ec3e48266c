"""Does a world model that forgets nothing plan as well? Two-Rooms, five layouts, one after the other.

    python scripts/eidetic_world_model.py [--seeds 0] [--budget 2000] [--write]

Trains `eidetic-pldm` and `pldm` (fine-tuned) on the five layouts of `two-rooms-doors` in sequence, and `pldm` on each
layout alone (`--protocol independent`), all with the same updates per layout. Task ids are revealed. Prints success per
layout after the last phase, forgetting, and what planning costs. Give the command again to go on after an
interruption; finished runs are not repeated. `--write` also writes docs/results/eidetic_world_model.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clbench
from clbench.metrics.statistics import summarise
from clbench.records import read_json
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator
from clbench.verification import verify_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "eidetic_world_model.md"


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    agent: str
    protocol: str = "sequential"


VARIANTS = {
    "eidetic-pldm, in sequence": Variant("eidetic-pldm"),
    "pldm, fine-tuned in sequence": Variant("pldm"),
    "pldm, one agent per layout": Variant("pldm", "independent"),
}


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or read what there is."""
    variant = VARIANTS[name]
    path = arguments.out / f"{variant.agent}-{variant.protocol}" / f"seed-{seed}"
    options = json.loads(arguments.options) if variant.agent == "eidetic-pldm" else {}
    result = clbench.run(
        "two-rooms-doors", variant.agent, seed=seed, protocol=variant.protocol, reveals="task_id", budget=arguments.budget,
        eval_every=0, eval_start=False, device=arguments.device, threads=arguments.threads, tensorboard=False,
        agent_options=options, stream_options={"episodes": arguments.episodes}, out=path,
    )  # fmt: skip
    matrix, wall = result.results["matrix"], read_json(result.path / "timing.json")["wall_time_s"]
    tasks = range(len(result.results["tasks"]))
    # a fresh agent per task is evaluated on its own task only
    final = [matrix[k + 1][k] if variant.protocol == "independent" else matrix[-1][k] for k in tasks]
    found = {
        "path": path, "names": result.results["tasks"], "final": final, "average": sum(final) / len(final),
        "forgetting": result.results["metrics"]["forgetting"], "learned": sum(matrix[k + 1][k] for k in tasks) / len(tasks),
        "parameters": result.results["cost"]["parameters"], "learn": wall["learn"],
        "act": 1e3 * wall["evaluate_act"] / max(environment_steps(result.path), 1),
    }  # fmt: skip
    if variant.agent == "eidetic-pldm":
        found["evidence"] = verify_run(path)
    return found


def environment_steps(path: Path) -> int:
    """Steps of all evaluated episodes."""
    with (path / "eval.csv").open(newline="") as file:
        return sum(int(row["length"]) for row in csv.DictReader(file))


def cells(name: str, runs: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """A row of the table: success per layout, then summaries."""

    def over_runs(values: Sequence[Any], what: str) -> str:
        return interval_text(summarise(values, numpy_generator(0, "eidetic-world-model", name, what)), len(runs))

    layouts = [over_runs([r["final"][k] for r in runs], f"layout {k}") for k in range(count)]
    summaries = [over_runs([r[k] for r in runs], k) for k in ("average", "learned", "forgetting")]
    mean = {k: sum(r[k] for r in runs) / len(runs) for k in ("parameters", "learn", "act")}
    return [
        name, *layouts, *summaries, f"{mean['parameters']:.0f}", f"{mean['learn']:.0f}", f"{mean['act']:.2f}"
    ]  # fmt: skip


def table(rows: Iterable[Sequence[str]], names: Sequence[str]) -> str:
    header = (
        "agent", *names, "average", "right after learning", "forgetting", "parameters", "training, s", "act, ms per step"
    )  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def page(text: str, evidence: str, arguments: argparse.Namespace, example: Path) -> str:
    """The page of the documentation: the table and what it was measured with."""
    made = read_json(example / "config.json")["provenance"]
    commit = f"{str(made['git'])[:12]}{' with local changes' if made['dirty'] else ''}"
    return (
        "# A world model that forgets nothing, on Two-Rooms\n\n"
        f"Written by `python scripts/eidetic_world_model.py --seeds {arguments.seeds} --budget {arguments.budget} "
        f"--episodes {arguments.episodes} --write`. Stream `two-rooms-doors`, states, task ids revealed, "
        f"{arguments.budget} updates per layout, the first {arguments.episodes} frozen episodes of each. Commit {commit}, "
        f"{made['cpu']}, {arguments.threads} threads, GPU: {made['gpu'] or 'none'}, torch {made['torch']}; the machine was "
        "shared, so times are upper bounds. Success per layout after the last phase; means over seeds, with 95 % bootstrap "
        "intervals over runs where there are several. `act` is wall time of acting in evaluation, planning included, per "
        f"environment and step.\n\n{text}\n\n{evidence}\n"
    )


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--budget", type=int, default=2000, help="updates per layout")
    parser.add_argument("--episodes", type=int, default=25, help="evaluation episodes per layout")
    parser.add_argument("--options", default="{}", help="options of eidetic-pldm, as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/eidetic-world-model"))
    parser.add_argument("--write", action="store_true", help="also write the page in docs/results/")
    arguments = parser.parse_args(given)
    seeds = [int(s) for s in arguments.seeds.split(",")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in seeds:  # one seed of everything first: an interrupted study is a smaller study
        for name in VARIANTS:
            found[name].append(run(name, seed, arguments))
            print(f"{name}, seed {seed}: {found[name][-1]['final']}", file=sys.stderr, flush=True)
    names = next(iter(found.values()))[0]["names"]
    text = table((cells(name, runs, len(names)) for name, runs in found.items()), names)
    checked = [r["evidence"] for r in found["eidetic-pldm, in sequence"]]
    levels = "; ".join(f"{k} {', '.join(sorted({v.levels[k] for v in checked}))}" for k in checked[0].levels)
    largest = max(v.max_abs_change for v in checked)
    evidence = (
        f"`clbench verify` on the eidetic runs: {levels}; largest change of an output of a finished task {largest:g}."
    )
    print(f"{text}\n\n{evidence}")
    if arguments.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(text, evidence, arguments, found["eidetic-pldm, in sequence"][0]["path"]))
    return text


if __name__ == "__main__":
    main()
