"""Synthetic run directories: agents that learn and forget by a simple rule, written in the format of the loop."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# one white pixel
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8/5+hHgAHggJ/PchI7wAAAABJRU5ErkJggg=="
)


def write_run(
    path: Path,
    *,
    agent: str = "bc",
    seed: int = 0,
    order: tuple[str, ...] = ("left", "middle", "right"),
    tasks: tuple[str, ...] = ("left", "middle", "right"),
    stream: str = "toy",
    protocol: str = "sequential",
    schedule: str = "sequential",
    budget: int = 100,
    retention: float = 0.5,
    status: str = "complete",
    stop_after: int | None = None,
    episodes: int = 4,
    per_phase: int = 5,
    **config: object,
) -> Path:
    """Write one run; ``retention`` is the share of skill kept per phase on another task, ``stop_after`` cuts the log."""
    path.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(agent), len(protocol)])
    skill = dict.fromkeys(tasks, 0.1)
    visits = dict.fromkeys(tasks, 0)
    rows: list[tuple] = []

    def evaluate(phase: int, step: int, names: tuple[str, ...]) -> None:
        for name in names:
            for e in range(episodes):
                score = float(np.clip(skill[name] + 0.05 * rng.standard_normal(), 0, 1))
                rows.append((phase, visits[name], step, name, e, score, score, 7))

    if protocol != "independent":
        evaluate(0, 0, tasks)
    phases = []
    for i, name in enumerate(order, start=1):
        visits[name] += 1
        phases.append({"task": name, "budget": budget, "visit": visits[name]})
        evaluated = (name,) if protocol == "independent" else tasks
        start = (i - 1) * budget
        if protocol == "independent":
            skill = dict.fromkeys(tasks, 0.1)
            evaluate(i, start, evaluated)
        for k in range(1, per_phase + 1):
            for other in tasks:
                skill[other] += (0.95 - skill[other]) * 0.45 if other == name else 0.0
                skill[other] *= 1.0 if other == name else retention ** (1 / per_phase)
            evaluate(i, start + k * budget // per_phase, evaluated)
    if stop_after is not None:
        rows = [r for r in rows if r[2] <= stop_after]
    with (path / "eval.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("phase", "visit", "step", "task", "episode", "score", "return", "length"))
        writer.writerows(rows)
    settings = {"stream": stream, "agent": agent, "seed": seed, "schedule": schedule, "protocol": protocol,
                "reveals": "boundaries", "budget": budget, "eval_every": budget // per_phase, "num_envs": 8,
                "device": "cpu", "agent_options": {"lr": 1e-3}, "stream_options": {},
                "schedule_options": {}} | config  # fmt: skip
    provenance = {"clbench": "0.1.0", "python": "3.11.2", "git": "0123abc", "dirty": False, "cpu": "a CPU", "cores": 2}
    record = {"schema": 1, "config": settings, "unit": "updates", "tasks": list(tasks), "phases": phases,
              "stream_hash": f"{stream}-{seed}", "provenance": provenance}  # fmt: skip
    (path / "config.json").write_text(json.dumps(record))
    cost = {"env_steps": 0, "updates": budget * len(order), "samples": 64 * budget * len(order), "parameters": 51_234,
            "state_bytes": 614_808}  # fmt: skip
    results = {"schema": 1, "status": status, "stream": stream, "agent": agent, "seed": seed, "tasks": list(tasks),
               "matrix": [], "metrics": {"average_performance": 123.0}, "cost": cost}  # fmt: skip
    (path / "results.json").write_text(json.dumps(results))
    times = {"total": 61.5 + seed, "learn": 50.0, "evaluate": 10.0, "checkpoint": 1.5}
    (path / "timing.json").write_text(json.dumps({"wall_time_s": times, "peak_memory_bytes": 412_000_000}))
    (path / "rollout.png").write_bytes(PNG)
    return path


@pytest.fixture(name="write_run")
def _write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run(name, **settings)`` below ``tmp_path``."""
    return lambda name, **settings: write_run(tmp_path / name, **settings)
