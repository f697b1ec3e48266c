"""The demo benchmark: two task streams, three agents, three seeds, on real data, and one report.

    make demo            or            python scripts/demo.py [--out runs/demo]

`two-rooms-doors`: reach a goal in the other room, five walls and doors one after the other (goal-conditioned behaviour
cloning from random walks). `digits-permuted`: scikit-learn's handwritten digits under ten pixel permutations. Give the
command again to go on after an interruption; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
LARGER = {"hidden": (256, 256, 256), "batch_size": 256}
RUNS: list[dict[str, Any]] = [
    {"stream": "two-rooms-doors", "agent": "bc", "budget": 1500, "eval_every": 750, "agent_options": LARGER},
    {"stream": "two-rooms-doors", "agent": "random", "budget": 1500, "eval_every": 750},
    {"stream": "digits-permuted", "agent": "bc", "budget": 450, "eval_every": 90, "references": True},
    {"stream": "digits-permuted", "agent": "bc", "budget": 450, "eval_every": 450, "protocol": "joint"},
    {"stream": "digits-permuted", "agent": "random", "budget": 450, "eval_every": 90},
]


def one(settings: dict[str, Any]) -> str:
    """One run in a process of its own, with a picture of what the trained agent does."""
    import clbench
    from clbench.report.pictures import save_rollout

    result = clbench.run(**settings)
    if result.agent is not None:
        save_rollout(result)
    return str(result.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where the runs and the report go")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="runs at the same time")
    arguments = parser.parse_args()

    from clbench.experiments import RunConfig, default_out
    from clbench.report import report_markdown, write_report

    jobs = []
    for seed in SEEDS:
        for settings in RUNS:
            path = default_out(RunConfig(**settings, seed=seed), arguments.out)
            jobs.append({**settings, "seed": seed, "out": path, "reference_root": arguments.out / "references"})

    start, paths = time.perf_counter(), []
    # a fresh interpreter per worker: torch's threads do not survive a fork
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for path in pool.map(one, jobs):
            paths.append(Path(path))
            print(f"[{len(paths):2d}/{len(jobs)}] {path}", flush=True)
    print(f"\n{report_markdown(paths)}")
    report = write_report(paths, arguments.out / "report.html").resolve()
    print(f"\n{len(jobs)} runs in {time.perf_counter() - start:.0f} s. The report: {report}")


if __name__ == "__main__":
    sys.exit(main())
