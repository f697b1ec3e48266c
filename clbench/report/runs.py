"""Read run directories, recompute their metrics, and put comparable runs together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clbench.contracts import Phase
from clbench.errors import ClbenchError, ConfigError, DataError
from clbench.metrics.continual import compute_metrics, forward_transfer, unvisited
from clbench.metrics.log import EvalLog, finished_phases, read_eval_csv
from clbench.metrics.plasticity import online_results
from clbench.records import read_json

SCHEMA = 1
REFERENCES = "references"
_MARKS = ("eval.csv", "results.json", "checkpoint.pt")


@dataclass(frozen=True)
class Run:
    """One readable run directory. ``problem`` says why it is not averaged (``None``: it is complete)."""

    path: Path
    config: Mapping[str, Any]
    unit: str
    tasks: tuple[str, ...]
    phases: tuple[Phase, ...]
    stream_hash: str
    provenance: Mapping[str, Any]
    log: EvalLog
    finished: int
    problem: str | None
    metrics: Mapping[str, float | None]
    no_transfer: str | None
    cost: Mapping[str, Any]
    timing: Mapping[str, Any]
    stream: Mapping[str, Any] = field(default_factory=dict)
    online: Mapping[str, Any] = field(default_factory=dict)

    @property
    def agent(self) -> str:
        """The agent and its continual methods: ``bc+er+ewc``."""
        return "+".join((str(self.config["agent"]), *map(str, self.config.get("method") or ())))

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def protocol(self) -> str:
        return str(self.config.get("protocol", "sequential"))

    @property
    def unvisited(self) -> tuple[str, ...]:
        return unvisited(self.tasks, self.phases)


@dataclass(frozen=True)
class BrokenRun:
    """A run directory that cannot be read, and why."""

    path: Path
    problem: str


@dataclass(frozen=True)
class Group:
    """Runs that may be compared: same stream, schedule, protocol, unit, budget and evaluation cadence.

    ``agents`` maps a label to its complete runs in the order of seeds (one run per seed); ``excluded`` to those that did
    not finish. ``duplicates`` are complete runs of an agent and seed that is there already.
    """

    key: Mapping[str, Any]
    agents: Mapping[str, tuple[Run, ...]]
    excluded: Mapping[str, tuple[Run, ...]]
    duplicates: tuple[Run, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for runs in (*self.agents.values(), *self.excluded.values()) for run in runs)

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.runs[0].tasks

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({*self.agents, *self.excluded}))

    @property
    def title(self) -> str:
        parts = [self.key["stream"], f"{self.key['schedule']} schedule"]
        if self.key["protocol"] != "sequential":
            parts.append(f"{self.key['protocol']} protocol")
        return ", ".join([*parts, f"{self.key['budget']} {self.key['unit'].replace('_', ' ')}"])


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """All run directories at or below ``paths``, sorted; caches of reference runs (``references``) are skipped.

    Raises:
        ConfigError: a path does not exist.
    """
    found: set[Path] = set()
    for root in map(Path, paths):
        if not root.is_dir():
            raise ConfigError(f"There is no folder {root}; give run directories or folders that hold some.")
        for folder, children, files in os.walk(root):
            if "config.json" in files and any(name in files for name in _MARKS):
                found.add(Path(folder))
                children.clear()
            children[:] = [c for c in children if c != REFERENCES]
    return sorted(found)


def load_run(path: Path) -> Run | BrokenRun:
    """Read one run directory; whatever is wrong with it becomes the text of a :class:`BrokenRun`."""
    try:
        return _load(Path(path))
    except ClbenchError as error:
        return BrokenRun(Path(path), str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return BrokenRun(Path(path), f"config.json or results.json lacks or mistypes {error}.")


def _load(path: Path) -> Run:
    record = read_json(path / "config.json")
    if record.get("schema") != SCHEMA:
        raise DataError(f"config.json has schema {record.get('schema')!r}, this version reads {SCHEMA}.")
    config, tasks = record["config"], tuple(str(t) for t in record["tasks"])
    phases = tuple(Phase(p["task"], p["budget"], p["visit"]) for p in record["phases"])
    log = read_eval_csv(path / "eval.csv")
    results = read_json(path / "results.json") if (path / "results.json").exists() else {}
    finished = finished_phases(log, phases)
    protocol = str(config.get("protocol", "sequential"))
    stream = _optional_json(path / "stream.json")
    references = _find_references(path, record, stream, phases) if protocol == "sequential" else []
    # several that differ: of other versions of the agent's code, say. None of them is known to be the right one.
    reference = references[0][1] if references and all(log == references[0][1] for _, log in references) else None
    return Run(
        path=path,
        config={"agent": config["agent"], "seed": int(config["seed"]), "stream": config["stream"], **config},
        unit=str(record["unit"]),
        tasks=tasks,
        phases=phases,
        stream_hash=str(record.get("stream_hash", "")),
        provenance=dict(record.get("provenance", {})),
        log=log,
        finished=finished,
        problem=_problem(results, log, finished, len(phases)),
        metrics=compute_metrics(log, tasks, phases, reference, protocol=protocol),
        no_transfer=_why_no_transfer(log, tasks, phases, references, protocol),
        cost=dict(results.get("cost", {})),
        timing=_optional_json(path / "timing.json"),
        stream=stream,
        online=online_results(path / "train.csv", len(phases), results.get("status") == "complete") or {}
        if (path / "train.csv").exists()
        else {},
    )


def _optional_json(path: Path) -> Mapping[str, Any]:
    return dict(read_json(path)) if path.exists() else {}


def _problem(results: Mapping[str, Any], log: EvalLog, finished: int, phases: int) -> str | None:
    status = results.get("status", "interrupted")
    if not len(log):
        return f"{status}, without any evaluation"
    if status != "complete":
        return f"{status} after {finished} of {phases} phases"
    if finished < phases:
        return f"results.json says complete, but the evaluation log ends after {finished} of {phases} phases"
    if log.incomplete:
        e = log.incomplete[0]
        return f"evaluation of {e.task} at step {e.step} has {e.episodes} of {e.expected} episodes"
    return None


def _why_no_transfer(
    log: EvalLog,
    tasks: Sequence[str],
    phases: Sequence[Phase],
    references: Sequence[tuple[Path, EvalLog]],
    protocol: str,
) -> str | None:
    if protocol != "sequential":
        return f"Forward transfer is not defined for the protocol {protocol}."
    reference = references[0][1] if references else None
    other = next((path for path, log in references if log != reference), None)
    if other is not None:
        return (
            f"The reference runs {references[0][0].name} and {other.name} in {other.parent} both fit but differ (the "
            "agent's code changed in between?); delete the outdated one."
        )
    try:
        forward_transfer(log, tasks, phases, reference)
    except DataError as error:
        return str(error)
    return None


# -- reference runs ------------------------------------------------------------------------------------------------------

# A reference run has the same configuration but for these.
_REFERENCE_DIFFERS = ("protocol", "schedule", "schedule_options", "references", "checkpoint_seconds", "tensorboard",
                      "probe")  # fmt: skip


def _find_references(
    path: Path, record: Mapping[str, Any], stream: Mapping[str, Any], phases: Sequence[Phase]
) -> list[tuple[Path, EvalLog]]:
    """The complete single-task runs of the same agent, seed, tasks and versions, and their logs.

    They are looked for in the nearest ``references`` cache in or above the run that holds any.
    """
    budgets: dict[str, int] = {}
    for phase in phases:
        for name in phase.tasks:
            budgets.setdefault(name, phase.budget)
    absolute = path.resolve()
    for folder in [absolute, *list(absolute.parents)[:4]]:
        found = []
        for file in sorted((folder / REFERENCES).glob("*/config.json")):
            try:
                if _fits(file.parent, record, stream, budgets):
                    found.append((file.parent, read_eval_csv(file.with_name("eval.csv"))))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
                continue  # an unreadable cache entry is no reference
        if found:
            return found
    return []


def _fits(folder: Path, record: Mapping[str, Any], stream: Mapping[str, Any], budgets: Mapping[str, int]) -> bool:
    """Whether a run is a complete reference of the run with this record, stream and budgets of first visits."""
    other = json.loads((folder / "config.json").read_text())
    if other["config"]["protocol"] != "independent" or _comparable(other["config"]) != _comparable(record["config"]):
        return False
    versions = [{k: r.get("provenance", {}).get(k) for k in ("clbench", "torch")} for r in (record, other)]
    return (
        {p["task"]: p["budget"] for p in other["phases"]} == budgets
        and list(other["tasks"]) == list(record["tasks"])
        and versions[0] == versions[1]
        and _optional_json(folder / "stream.json").get("tasks") == stream.get("tasks")
        and json.loads((folder / "results.json").read_text())["status"] == "complete"
    )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    without_methods = {"method": [], "method_options": {}}  # runs older than methods do not say so
    return {k: v for k, v in {**without_methods, **config}.items() if k not in _REFERENCE_DIFFERS}


# -- groups --------------------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Comparable runs together, in a stable order. Two runs of one agent and seed: the first path counts, others do not."""
    keyed: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: str(r.path)):
        keyed.setdefault(json.dumps(_group_key(run), sort_keys=True, default=str), []).append(run)
    return [_group(members) for _, members in sorted(keyed.items(), key=lambda item: _order(item[1][0]))]


def _order(run: Run) -> tuple[str, ...]:
    protocols = {"sequential": "0", "independent": "1", "joint": "2"}
    key = _group_key(run)
    return (
        key["stream"],
        "" if key["schedule"] == "sequential" else key["schedule"],
        protocols.get(run.protocol, "3"),
        json.dumps(key, sort_keys=True, default=str),
    )


def _group_key(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "stream": str(config["stream"]),
        "schedule": str(config.get("schedule", "sequential")),
        "protocol": run.protocol,
        "unit": run.unit,
        "reveals": config.get("reveals") or run.stream.get("reveals"),
        "budget": sum(p.budget for p in run.phases),
        "eval_every": config.get("eval_every"),
        "tasks": list(run.tasks),
        "kinds": [_kind(task) for task in run.stream.get("tasks", ())],
        "stream_options": dict(config.get("stream_options") or {}),
        "schedule_options": dict(config.get("schedule_options") or {}),
    }


def _kind(task: Mapping[str, Any]) -> list[Any]:
    """What the scores of a task mean: they compare across seeds only if this is equal (what a seed draws may differ)."""
    return [task.get("env_id"), task.get("metric"), len(task.get("evaluation", {}).get("seeds", ()))]


def _group(members: Sequence[Run]) -> Group:
    labels = _labels(members)
    agents: dict[str, dict[int, Run]] = {}
    excluded: dict[str, list[Run]] = {}
    duplicates: list[Run] = []
    for run, label in zip(members, labels, strict=True):
        if run.problem is not None:
            excluded.setdefault(label, []).append(run)
        elif run.seed in agents.setdefault(label, {}):
            duplicates.append(run)
        else:
            agents[label][run.seed] = run
    return Group(
        _group_key(members[0]),
        {k: tuple(agents[k][s] for s in sorted(agents[k])) for k in sorted(agents) if agents[k]},
        {k: tuple(v) for k, v in sorted(excluded.items())},
        tuple(duplicates),
    )


def _labels(members: Sequence[Run]) -> list[str]:
    """Agent names; where one name has several configurations, with the options that tell them apart."""
    return [_label(run, [m for m in members if m.agent == run.agent]) for run in members]


def _label(run: Run, namesakes: Sequence[Run]) -> str:
    options = [_options(m) for m in namesakes]
    own = _options(run)
    differing = sorted({k for o in options for k in {*o, *own} if o.get(k) != own.get(k)})
    return f"{run.agent} ({', '.join(f'{k}={own.get(k)}' for k in differing)})" if differing else run.agent


def _options(run: Run) -> dict[str, Any]:
    methods: Mapping[str, Mapping[str, Any]] = run.config.get("method_options") or {}
    of_methods = {f"{name}.{k}": v for name, options in methods.items() for k, v in options.items()}
    return {**dict(run.config.get("agent_options") or {}), **of_methods, "num_envs": run.config.get("num_envs")}
