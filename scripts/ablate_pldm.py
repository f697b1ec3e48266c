"""What the parts of PLDM are there for: the agent without each of them, on Two-Rooms.

    python scripts/ablate_pldm.py [--observation pixels] [--seeds 0,1,2] [--write]

Trains `pldm` (preset `small`) on `two-rooms/size-81250-v0` without one term of its loss after the other, with other means
against collapse, and, on the 5,078 transitions of `two-rooms/size-5078-v0`, as an ensemble with and without the penalty on
disagreement. Prints success on the frozen tasks with 95 % intervals over seeds, beside the paper's (arXiv 2502.14819,
appendix C.1.2 and figure 8: images, more data, another planner). Give the command again to go on after an interruption;
finished runs are not repeated. `--write` also writes docs/results/ablate_pldm.md (or ablate_pldm_pixels.md).
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clbench
from clbench.metrics.statistics import Interval, summarise
from clbench.records import read_json
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"state": "ablate_pldm.md", "pixels": "ablate_pldm_pixels.md"}
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the preset, the data, and the paper's success where it has that row."""

    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "two-rooms/size-81250-v0"
    paper: str = "-"


SMALL = "two-rooms/size-5078-v0"
ENSEMBLE = {"architecture": {"members": 5}}
VARIANTS: dict[str, Variant] = {
    "full": Variant(paper="0.980"),
    "no-variance": Variant({"variance": 0.0, "variance_over_time": 0.0}, paper="0.134"),
    "no-covariance": Variant({"covariance": 0.0}, paper="0.292"),
    "no-smoothness": Variant({"smoothness": 0.0}, paper="0.710"),
    "no-inverse": Variant({"inverse": 0.0}, paper="0.980"),
    "no-escape": Variant({"escape": 0.0}),
    "frozen-inverse": Variant({"frozen_inverse": True}),
    "barlow-twins": Variant({"anti_collapse": "barlow-twins", "smoothness": 0.0}),
    "self-prediction": Variant({"anti_collapse": "self-prediction", "smoothness": 0.0}),
    "forward-inverse": Variant({"anti_collapse": "forward-inverse"}),
    "small-data-full": Variant(data=SMALL),
    "small-data-ensemble": Variant(ENSEMBLE, SMALL, "0.806"),
    "small-data-ensemble-no-uncertainty": Variant({**ENSEMBLE, "uncertainty": 0.0}, SMALL, "0.426"),
}
HEADER = (
    "variant", "runs", "success", "paper", "RankMe", "probe R2", "smallest deviation", "updates", "training, s",
    "in all, s",
)  # fmt: skip


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, float | None]:
    """Train and evaluate, or read what there is: success, the last diagnostics of collapse, updates and wall times."""
    variant = VARIANTS[name]
    result = clbench.run(
        variant.data, "pldm", seed=seed, budget=arguments.budget, eval_every=0, device=arguments.device,
        threads=arguments.threads, tensorboard=False, agent_options={"preset": arguments.preset, **variant.options},
        stream_options={"observation": arguments.observation, "episodes": arguments.episodes},
        out=arguments.out / arguments.observation / name / f"seed-{seed}",
    )  # fmt: skip
    wall = read_json(result.path / "timing.json")["wall_time_s"]
    found = {k: last(result.path / "train.csv", k) for k in ("rankme", "probe_r2", "latent_std_min")}
    return {
        "success": result.results["matrix"][-1][0], **found, "updates": result.results["cost"]["updates"],
        "learn": wall["learn"], "total": wall["total"],
    }  # fmt: skip


def last(path: Path, column: str) -> float | None:
    """The last finite number of a column of a CSV file."""
    with path.open(newline="") as file:
        texts = [row[column] for row in csv.DictReader(file) if row.get(column)]
    numbers = [float(t) for t in texts if float(t) - float(t) == 0]
    return numbers[-1] if numbers else None


def cells(name: str, runs: Sequence[Mapping[str, float | None]]) -> list[str]:
    """A row of the table: success with its interval, means of the rest."""

    def over_runs(key: str) -> Interval:
        return summarise([r[key] for r in runs], numpy_generator(0, "ablate-pldm", name, key))

    def mean(key: str, digits: int) -> str:
        value = over_runs(key).value
        return "-" if value is None else f"{value:.{digits}f}"

    success = interval_text(over_runs("success"), len(runs))
    diagnostics = [mean("rankme", 1), mean("probe_r2", 3), mean("latent_std_min", 3)]
    costs = [mean("updates", 0), mean("learn", 0), mean("total", 0)]
    return [name, str(len(runs)), success, VARIANTS[name].paper, *diagnostics, *costs]


def table(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows))


def page(text: str, arguments: argparse.Namespace, example: Path) -> str:
    """The page of the documentation: the table and what it was measured with."""
    made = read_json(example / "config.json")["provenance"]
    commit = f"{str(made['git'])[:12]}{' with local changes' if made['dirty'] else ''}"
    return (
        f"# Ablations of pldm, {arguments.observation} observations\n\n"
        f"Written by `python scripts/ablate_pldm.py --observation {arguments.observation} --write`. Preset "
        f"`{arguments.preset}`, seeds {arguments.seeds}, {arguments.budget} updates, {arguments.episodes} frozen tasks. "
        f"Commit {commit}, {made['cpu']}, {arguments.threads} threads, GPU: {made['gpu'] or 'none'}, torch "
        f"{made['torch']}. Success: mean over seeds with 95 % bootstrap intervals over runs. The last columns are wall "
        "times of training and of everything, evaluation included.\n\n"
        f"{text}\n"
    )


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observation", default="state", choices=("state", "pixels"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, with commas between")
    parser.add_argument("--budget", type=int, default=10_000, help="updates")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ablate-pldm"))
    parser.add_argument("--write", action="store_true", help="also write the page in docs/results/")
    arguments = parser.parse_args(given)
    names, seeds = arguments.variants.split(","), [int(s) for s in arguments.seeds.split(",")]
    unknown = [n for n in names if n not in VARIANTS]
    if unknown:
        parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(VARIANTS)}")

    found: dict[str, list[dict[str, float | None]]] = {name: [] for name in names}
    for seed in seeds:  # one seed of everything first: an interrupted study is a smaller study
        for name in names:
            found[name].append(run(name, seed, arguments))
            print(f"{name}, seed {seed}: success {found[name][-1]['success']:.2f}", file=sys.stderr, flush=True)
    text = table(cells(name, runs) for name, runs in found.items())
    print(text)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        example = arguments.out / arguments.observation / names[0] / f"seed-{seeds[0]}"
        (RESULTS / PAGES[arguments.observation]).write_text(page(text, arguments, example))
    return text


if __name__ == "__main__":
    main()
