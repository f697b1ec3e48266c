"""EideticNet on streams of digits: against plain networks, over widths, without its parts, and with routers.

    python scripts/eidetic_digits.py [--parts methods,widths,variants,routing,cost] [--seeds 0,1,2,3,4] [--write]

`methods`: ten permutations; eidetic-bc beside fine-tuning, independent networks of the same width and joint training.
`widths`: the same for narrower networks, with what capacity was used: where zero forgetting begins to cost accuracy.
`variants`: criteria, norms, no transfer. `routing`: digits-split, digits-rotated and digits-permuted with and without task
ids. `cost`: time of a finished task's own network beside the whole one. Finished runs are not repeated; `--write` writes
docs/results/eidetic_digits.md. Options were chosen on seed 100, which is not reported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import clbench
from clbench.agents.eidetic_bc import EideticBC
from clbench.data.labelled import load_source
from clbench.experiments import RunResult, load_agent
from clbench.metrics.statistics import Interval, paired_difference, summarise
from clbench.records import read_json
from clbench.report.markdown import interval_text
from clbench.rng import numpy_generator
from clbench.streams.core import make_stream
from clbench.verification import verify_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "eidetic_digits.md"
STREAMS = ("digits-split", "digits-rotated", "digits-permuted")
WIDTH = 512
WIDTHS = (32, 64, 128, 256)
PLAIN = {"lr": EideticBC.Config.lr}
VARIANTS: dict[str, dict[str, Any]] = {
    "l2 (default)": {},
    "l1": {"pruning": {"criterion": "l1"}},
    "taylor": {"pruning": {"criterion": "taylor"}},
    "random": {"pruning": {"criterion": "random"}},
    "BatchNorm": {"norm": "batch"},
    "PrefixNorm": {"norm": "prefix"},
    "no transfer": {"transfer": False},
    "one AdamW, decay 0.1, never reset": {"reset_optimizer": False, "weight_decay": 0.1},
}


class Study:
    """Runs, made once, by name."""

    def __init__(self, out: Path, seeds: Sequence[int]):
        self.out, self.seeds = out, seeds
        self.few = seeds[:3]  # for parts with many settings
        self.example: Path | None = None

    def run(
        self, name: str, seed: int, stream: str, agent: str, options: Mapping[str, Any], **settings: Any
    ) -> RunResult:
        path = self.out / name / f"seed-{seed}"
        new = not (path / "results.json").exists()
        result = clbench.run(
            stream, agent, seed=seed, eval_every=0, tensorboard=False, out=path, agent_options=options, **settings
        )
        self.example = self.example or path
        if new:
            score = result.metrics["average_performance"]
            print(f"{name}, seed {seed}: {score:.3f}", file=sys.stderr, flush=True)
        return result

    def eidetic(
        self, seed: int, width: int, stream: str = "digits-permuted", name: str = "", **options: Any
    ) -> RunResult:
        tasks = {} if stream == "digits-permuted" else {"tasks": 5}
        options = {"hidden": (width, width), **options}
        options["pruning"] = {**tasks, **options.get("pruning", {})}
        settings = {"reveals": options.pop("reveals")} if "reveals" in options else {}
        return self.run(name or f"{stream}-eidetic-{width}", seed, stream, "eidetic-bc", options, **settings)

    def plain(self, seed: int, width: int, protocol: str, stream: str = "digits-permuted") -> RunResult:
        options = {"hidden": (width, width), **PLAIN}
        return self.run(f"{stream}-{protocol}-{width}", seed, stream, "bc", options, protocol=protocol)


def final(result: RunResult) -> float:
    """Average performance after the last phase; of independent runs, each task by its own network."""
    return float(
        result.metrics["learning_accuracy" if result.results["protocol"] == "independent" else "average_performance"]
    )  # type: ignore[arg-type]


def text(values: Sequence[float], *names: str) -> str:
    """Mean of shares in percent, with its interval."""
    interval: Interval = summarise([100 * v for v in values], numpy_generator(0, "eidetic-digits", *names))
    return interval_text(interval, len(values))


def difference(a: Sequence[float], b: Sequence[float], *names: str) -> str:
    """Mean of a - b over seeds, in points, with its interval."""
    first, second = ({i: 100 * x for i, x in enumerate(values)} for values in (a, b))
    found = paired_difference(first, second, numpy_generator(0, "eidetic-digits", *names))
    return interval_text(found, len(a))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def evidence(paths: Sequence[Path]) -> str:
    """What `clbench verify` says of finished runs: worst status per level, largest change. Stops where one fails."""
    found = [verify_run(path) for path in paths]
    for verification in found:
        if not verification.ok:
            raise SystemExit(f"{verification.target}: a finished task has changed ({verification.levels})")
    order = ("fail", "skip", "pass")
    levels = {level: min((f.levels[level] for f in found), key=order.index) for level in found[0].levels}
    change = max(e.max_abs_change for f in found for e in f.networks.values())
    return f"{', '.join(f'{k} {v}' for k, v in levels.items())}; largest change {change:g}"


# -- parts ---------------------------------------------------------------------------------------------------------------


def methods(study: Study) -> str:
    """Ten permutations, all methods at one width and budget."""
    made: dict[str, list[RunResult]] = {
        "eidetic-bc": [], "bc, independent networks": [], "bc, joint": [], "bc, fine-tuning": [], "random": [],
    }  # fmt: skip
    for seed in study.seeds:
        made["eidetic-bc"].append(study.eidetic(seed, WIDTH))
        made["bc, independent networks"].append(study.plain(seed, WIDTH, "independent"))
        made["bc, joint"].append(study.plain(seed, WIDTH, "joint"))
        made["bc, fine-tuning"].append(study.plain(seed, WIDTH, "sequential"))
        made["random"].append(study.run("digits-permuted-random", seed, "digits-permuted", "random", {}))
    alone = [final(r) for r in made["bc, independent networks"]]
    rows = []
    for name, results in made.items():
        scores = [final(r) for r in results]
        forgetting = [r.metrics.get("forgetting") for r in results]
        known = [float(f) for f in forgetting if f is not None]
        parameters = results[0].results["cost"]["parameters"]
        networks = len(results[0].results["tasks"]) if "independent" in name else 1
        rows.append(
            (
                name, text(scores, name), text(known, name, "forgetting") if known and "independent" not in name else "-",
                "-" if name == "bc, independent networks" else difference(scores, alone, name),
                "-" if not parameters else f"{networks} x {parameters:,}" if networks > 1 else f"{parameters:,}",
            )
        )  # fmt: skip
    exact = {r.metrics["forgetting"] for r in made["eidetic-bc"]}
    head = ("method", "average accuracy, %", "forgetting, points", "minus independent, points", "parameters")
    return (
        f"## Ten permutations, width {WIDTH}\n\n{table(head, rows)}\n\n"
        f"Values of `forgetting` in the results.json of eidetic-bc: {', '.join(f'{v!r}' for v in sorted(exact))}. "
        f"`clbench verify` on all {len(study.seeds)} runs: {evidence([r.path for r in made['eidetic-bc']])}.\n"
    )


def widths(study: Study) -> str:
    """Where capacity runs short."""
    rows = []
    for width in (*WIDTHS, WIDTH):
        ours = [study.eidetic(seed, width) for seed in study.few]
        alone = [study.plain(seed, width, "independent") for seed in study.few]
        capacity = [load_agent(r.path).network.capacity() for r in ours]  # type: ignore[attr-defined]

        def mean(f: Callable[[Any], float], found: Sequence[Any] = capacity) -> str:
            return f"{100 * statistics.mean(f(c) for c in found):.0f} %"

        last = [r.results["matrix"][-1] for r in ours]
        owned = [n for c in capacity for space in c.units.values() for owner, n in space.items() if owner != "free"]
        rows.append(
            (
                width, text([final(r) for r in ours], str(width)), text([final(r) for r in alone], str(width), "alone"),
                difference([final(r) for r in ours], [final(r) for r in alone], str(width)),
                f"{statistics.mean(row[0] for row in last):.3f}", f"{statistics.mean(row[-1] for row in last):.3f}",
                f"{min(owned)} to {max(owned)}", mean(lambda c: 1 - c.share("free")), mean(lambda c: c.live),
                mean(lambda c: c.dead),
            )
        )  # fmt: skip
    head = (
        "width", "eidetic-bc, %", "independent, same width, %", "difference, points", "first task", "last task",
        "units of a task in a layer", "units owned", "weights live", "weights dead",
    )  # fmt: skip
    return (
        f"## Capacity\n\nTwo hidden layers for ten permutations, seeds {study.few}. A task may own `1 / (tasks left + 1)` "
        "of the units that are free, and owns fewer where pruning goes on; all others that it reads are older.\n\n"
        f"{table(head, rows)}\n"
    )


def variants(study: Study) -> str:
    """One change at a time."""
    rows = []
    for name, options in VARIANTS.items():
        path = f"variant-{''.join(c if c.isalnum() else '-' for c in name)}" if options else ""
        made = [study.eidetic(seed, WIDTH, name=path, **options) for seed in study.few]
        rows.append(
            (
                name, text([final(r) for r in made], name), f"{max(r.metrics['forgetting'] for r in made)!r}",  # type: ignore[type-var]
                evidence([made[0].path]),
            )
        )  # fmt: skip
    head = ("variant", "average accuracy, %", "largest forgetting", "`clbench verify` of the first seed")
    return f"## Variants, ten permutations, width {WIDTH}\n\nSeeds {study.few}.\n\n{table(head, rows)}\n"


def routing(study: Study) -> str:
    """Accuracy with the right head, and with the head that a router finds."""
    rows, confusions = [], []
    for stream in STREAMS:
        told: dict[str, Any] = {"name": f"{stream}-oracle", "reveals": "task_id"}
        told = {} if stream == "digits-permuted" else told  # that stream reveals ids by itself
        oracle = [study.eidetic(s, WIDTH, stream, **told) for s in study.seeds]
        novelty = [study.eidetic(s, WIDTH, stream, f"{stream}-novelty", reveals="boundaries") for s in study.seeds]
        trained = [
            study.eidetic(s, WIDTH, stream, f"{stream}-trained", reveals="boundaries", router="trained")
            for s in study.seeds
        ]
        upper = [final(r) for r in oracle]
        forgot = text([float(r.metrics["forgetting"] or 0) for r in oracle], stream, "forgetting")
        rows.append((stream, "oracle (task ids)", "no", text(upper, stream), "-", "-", forgot))
        for name, made, stored in (("novelty, frozen scores", novelty, "no"), ("trained", trained, "**all tasks**")):
            found = [confusion(r) for r in made]
            right = [float(c.diagonal().mean()) for c in found]
            scores = [final(r) for r in made]
            gap = difference(upper, scores, stream, name)
            forgot = text([float(r.metrics["forgetting"] or 0) for r in made], stream, name, "forgetting")
            rows.append(
                (stream, name, stored, text(scores, stream, name), text(right, stream, name, "router"), gap, forgot)
            )
            if name.startswith("novelty") and stream != "digits-permuted":
                confusions.append(f"{stream}, {name}:\n\n{confusion_table(made[0], torch.stack(found).mean(0))}\n")
    head = (
        "stream",
        "router",
        "stored data",
        "accuracy, %",
        "router accuracy, %",
        "oracle gap, points",
        "forgetting, points",
    )
    return (
        "## Which task? Routing without task ids\n\n"
        f"{table(head, rows)}\n\nShare of test examples of each task (row) that go to each task (column), mean over seeds; "
        "with frozen scores a new task can only take decisions for itself, never move one between older tasks.\n\n"
        + "\n".join(confusions)
    )


@torch.no_grad()
def confusion(result: RunResult) -> torch.Tensor:
    """(tasks, tasks) shares: where the test examples of each task are sent."""
    from clbench.agents.networks.eidetic.policy import prepare

    agent: Any = load_agent(result.path)
    rows = []
    for task in result.stream.tasks:
        env = clbench.make_env(task.env_id, len(task.evaluation), "cpu", autoreset="disabled", **task.env_kwargs)
        obs, _ = env.reset(seed=list(task.evaluation.seeds), options=task.evaluation.options)
        env.close()
        sent = agent.route(prepare(agent.parts, obs))
        rows.append(torch.bincount(sent, minlength=len(result.stream.tasks)).double() / len(sent))
    return torch.stack(rows)


def confusion_table(result: RunResult, shares: torch.Tensor) -> str:
    names = [t.name for t in result.stream.tasks]
    return table(
        ("task", *names), [(n, *(f"{x:.3f}" for x in row)) for n, row in zip(names, shares.tolist(), strict=True)]
    )


def cost(study: Study) -> str:
    """Inference: the network of a finished task alone beside the whole network."""
    from clbench.agents.networks.eidetic.verify import evaluating

    network = load_agent(study.eidetic(study.seeds[0], WIDTH).path).network  # type: ignore[attr-defined]
    x = torch.rand(256, 64)
    rows, whole = [], 0.0
    count = sum(p.numel() for n, p in network.named_buffers() if n.endswith("store") and "head" not in n)
    with torch.no_grad(), evaluating(network):
        for task in (None, 0, 2, 4, 9):
            if task is None:
                seconds = whole = timed(lambda: network(x, task=9))
                rows.append(("whole network", f"{count:,}", f"{seconds * 1e6:.0f}", "1.00"))
                continue
            alone = network.extract(task)
            own = sum(p.numel() for n, p in alone.named_buffers() if n.endswith("store") and "head" not in n)
            seconds = timed(lambda alone=alone, task=task: alone(x, task=task))
            rows.append((f"task {task} alone", f"{own:,}", f"{seconds * 1e6:.0f}", f"{seconds / whole:.2f}"))
    head = ("network", "weights and biases of hidden layers", "microseconds for 256 examples", "of the whole")
    return (
        f"## Inference of old tasks, width {WIDTH}\n\n{table(head, rows)}\n\nMedian of 200 passes in one process, one "
        "thread. The extracted network has the units of the task and of older ones only.\n"
    )


def timed(function: Callable[[], Any]) -> float:
    for _ in range(20):
        function()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


PARTS: dict[str, Callable[[Study], str]] = {
    "methods": methods, "widths": widths, "routing": routing, "variants": variants, "cost": cost,
}  # fmt: skip


def page(texts: Iterable[str], study: Study, arguments: argparse.Namespace) -> str:
    assert study.example is not None
    made = read_json(study.example / "config.json")["provenance"]
    commit = f"{str(made['git'])[:12]}{' with local changes' if made['dirty'] else ''}"
    options, data = EideticBC.Config(), load_source("digits")
    budgets = ", ".join(f"{s}: {make_stream(s).phases[0].budget}" for s in STREAMS)
    return (
        "# Eidetic networks on streams of digits\n\n"
        f"Written by `python scripts/eidetic_digits.py --seeds {arguments.seeds} --write`. Scikit-learn's digits, "
        f"{len(data.train)} to train on, {len(data.test)} to test on. Updates per task, pruning included ({budgets}), with "
        f"batches of {options.batch_size} for all methods. `eidetic-bc` holds out {options.held_out:.0%} of the training "
        "data until it has judged its last kill. Plain networks are `bc` with the same width and learning rate "
        f"({options.lr}), which was not tuned for them. Seeds {arguments.seeds}; options of `eidetic-bc` were "
        "chosen on seed 100. Means over seeds with 95 % bootstrap intervals over runs. "
        f"Commit {commit}, {made['cpu']}, 1 thread, GPU: {made['gpu'] or 'none'}, torch {made['torch']}.\n\n"
        + "\n".join(texts)
    )


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas between")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=Path("runs/eidetic-digits"))
    parser.add_argument("--write", action="store_true", help="also write the page in docs/results/")
    arguments = parser.parse_args(given)
    names = arguments.parts.split(",")
    unknown = [n for n in names if n not in PARTS]
    if unknown:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    study = Study(arguments.out, [int(s) for s in arguments.seeds.split(",")])
    whole = page([PARTS[name](study) for name in names], study, arguments)
    print(whole)
    if arguments.write:
        PAGE.write_text(whole)
    return whole


if __name__ == "__main__":
    main()
