"""Data sets x agents x seeds: every cell an ordinary run, all on the same frozen episodes, with paired statistics.

::

    import clbench
    found = clbench.compare(["two-rooms/size-5078-v0"], agents=["pldm", "bc"], seeds=[0, 1, 2])
    found.content["statistics"]["datasets"]["two-rooms/size-5078-v0"]["agents"]["pldm"]

The same call again skips cells that are complete and goes on with those that were stopped.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import inspect
import io
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import clbench
from clbench.config import build, coerce, options_of
from clbench.contracts import Agent, Spaces, Stream, Task
from clbench.data.recipes import RECIPES
from clbench.data.registry import parse_dataset_id
from clbench.envs.make import make_env
from clbench.errors import ClbenchError, ConfigError, Interrupted, unknown_name
from clbench.evaluate import evaluate
from clbench.executors import Executor, InProcess, Processes, default_workers
from clbench.experiments import Resolved, RunConfig, check_configuration, default_out, name_of, resolve_run, run
from clbench.loop import blame, check_requirements
from clbench.metrics.comparison import compare_scores
from clbench.records import RunDirectory, content_hash, provenance, read_json, write_bytes, write_json
from clbench.registry import resolve
from clbench.report.comparison import comparison_text, write_comparison
from clbench.report.runs import REFERENCES, Run, load_run
from clbench.rng import sealed_global_rng, torch_generator
from clbench.streams.core import resolve_stream

Scale = Literal["small", "paper"]
SEEDS = (0, 1, 2)
OUT = Path("runs/compare")

# -- what a scale means: everything about it is here ----------------------------------------------------------------------

OBSERVATION: dict[str, str] = {"small": "state", "paper": "pixels"}  # where the data set has the choice
# gradient updates per run; "*" is any agent. Paper scale: three passes over the reference data (PLDM); OGBench's of pixels
BUDGETS: dict[str, dict[str, int]] = {"small": {"*": 6_000, "pldm": 4_000}, "paper": {"*": 500_000, "pldm": 144_000}}
# whose preset an agent takes at the scale of the paper, by the beginning of the data set's name; FLAVOURS in the name are
# added where the agent knows such a preset (pointmaze-giant-stitch), and FALLBACKS are for those without one of the family
PRESETS: dict[str, str] = {
    "two-rooms/": "two-rooms",
    "point-maze/": "diverse-maze",
    "ogbench-maze/": "pointmaze",
    **{f"ogbench/{name}": name for name in ("pointmaze", "antmaze", "humanoidmaze", "antsoccer", "powderworld")},
    **{f"ogbench/{name}": "manipulation" for name in ("cube", "scene", "puzzle")},
}
FLAVOURS, FALLBACKS = ("giant", "stitch", "explore", "play", "noisy"), ("ogbench", "reference")
MEMORY: dict[str, int] = {"small": 2 * 2**30, "paper": 8 * 2**30}  # bytes to allow per worker
EVAL_ENVS = 512
CONTROLLERS = {"oracle": "oracle_actions", "straight-line": "straight_line_actions"}


@dataclass(frozen=True)
class Cell:
    """One run of the comparison: what it is, where it is, and the command that makes it anywhere else."""

    dataset: str
    agent: str
    seed: int
    preset: str | None
    resolved: Resolved
    path: Path
    command: str

    @property
    def job(self) -> dict[str, Any]:
        """What a worker needs."""
        config = self.resolved.config
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {"settings": settings, "out": str(self.path), "fingerprint": self.resolved.fingerprint}


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave. ``content`` is that of ``comparison.json``, ``rows`` those of ``table.csv``."""

    path: Path
    content: Mapping[str, Any] = field(repr=False)
    rows: Sequence[Mapping[str, Any]] = field(repr=False)

    @property
    def failures(self) -> list[Mapping[str, Any]]:
        """The cells that gave no result."""
        return [row for row in self.rows if row["status"] != "complete"]

    @property
    def text(self) -> str:
        """The tables of the comparison as Markdown."""
        return comparison_text(self.content)


def compare(
    datasets: Sequence[str],
    *,
    agents: Sequence[str | type[Agent]],
    seeds: Sequence[int] = SEEDS,
    scale: Scale | None = None,
    budget: int | None = None,
    eval_every: int = 0,
    episodes: int | None = None,
    threads: int = 1,
    workers: int | None = None,
    device: str | None = None,
    out: str | Path = OUT,
    overwrite: bool = False,
    agent_options: Mapping[str, Mapping[str, Any]] | None = None,
    stream_options: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run every agent on every data set with every seed, and compare.

    Args:
        datasets: ids of data sets with a task (``two-rooms/good-v0``), or streams.
        agents: registered agents, ``module:Class``, or classes.
        seeds: of the runs.
        scale: ``small`` (state observations and the preset ``small``) or ``paper`` (pixels where the data set has them, the
            preset of the data set's family). Default: ``paper`` with a GPU, else ``small``.
        budget: gradient updates per run (environment steps of agents that an environment drives). Default:
            :data:`BUDGETS`.
        eval_every: units between evaluations within a run; 0 for the end only.
        episodes: evaluation episodes, where the data sets have this option.
        threads: CPU threads per run.
        workers: processes at once; 0 runs everything in this process. Default: what cores and memory allow, one on a GPU.
        device: torch device. Default: the GPU at the scale of the paper where there is one, else the CPU.
        out: folder of the comparison.
        overwrite: make cells again that hold a run of another configuration (those of the same are kept).
        agent_options: per agent, fields of its ``Config``.
        stream_options: options of the streams, which all of them must know.
        executor: runs the jobs, in place of ``workers``.
        note: called with a line per cell that has ended.

    Raises:
        ConfigError, UnknownNameError, ContractError: something is wrong with a cell; nothing has been run.
        Interrupted: Ctrl-C; everything done is saved and written, the same call goes on.
    """
    if scale is None:
        scale = "paper" if torch.cuda.is_available() else "small"
    if scale not in OBSERVATION:
        raise unknown_name("scale", str(scale), OBSERVATION)
    if device is None:
        device = "cuda" if scale == "paper" and torch.cuda.is_available() else "cpu"
    names = [name_of(a) for a in agents]
    options = {k: dict(v) for k, v in (agent_options or {}).items()}
    for name in options:
        if name not in names:
            raise unknown_name("agent with options", name, names, where="this comparison")
    common = {"budget": budget, "eval_every": eval_every, "threads": threads, "device": device}
    stream_options = {**(stream_options or {}), **({} if episodes is None else {"episodes": episodes})}
    out = Path(out)
    with sealed_global_rng():
        cells = make_cells(datasets, names, seeds, scale, common, options, stream_options, out)
        check_cells(cells, overwrite)
    if executor is None:
        executor = _executor(workers, threads, scale, device, len(cells))
    return _compare(cells, scale, out, executor, note)


def _executor(workers: int | None, threads: int, scale: str, device: str, cells: int) -> Executor:
    if workers is None:
        on_gpu = torch.device(device).type == "cuda"
        workers = min(1 if on_gpu else default_workers(threads, MEMORY[scale]), cells)
    return InProcess() if workers == 0 else Processes(workers)


# -- cells ---------------------------------------------------------------------------------------------------------------


def make_cells(
    datasets: Sequence[str],
    agents: Sequence[str],
    seeds: Sequence[int],
    scale: str,
    common: Mapping[str, Any],
    agent_options: Mapping[str, Mapping[str, Any]],
    stream_options: Mapping[str, Any],
    out: Path,
) -> list[Cell]:
    """All cells, resolved: one seed of everything first, so that an interrupted comparison is a smaller comparison.

    Raises:
        UnknownNameError: a data set, agent, option or preset that does not exist, with the nearest names.
        ConfigError: nothing to compare, or something twice.
    """
    for what, given in (("data sets", datasets), ("agents", agents), ("seeds", seeds)):
        if not given:
            raise ConfigError(f"There is nothing to compare: give at least one of the {what}.")
        twice = [str(v) for v in dict.fromkeys(given) if list(given).count(v) > 1]
        if twice:
            raise ConfigError(f"Name each of the {what} once; {', '.join(twice)} is there twice.")
    cells = [
        _cell(dataset, agent, seed, scale, common, agent_options.get(agent, {}), stream_options, out)
        for seed in seeds
        for dataset in datasets
        for agent in agents
    ]
    if len({cell.path for cell in cells}) < len(cells):
        raise ConfigError(f"Two of {', '.join((*datasets, *agents))} would have the same folder below {out}.")
    return cells


def _cell(
    dataset: str, agent: str, seed: int, scale: str, common: Mapping[str, Any], agent_options: Mapping[str, Any],
    stream_options: Mapping[str, Any], out: Path,
) -> Cell:  # fmt: skip
    of_stream = {**_scale_options(dataset, scale), **stream_options}
    agent_class = resolve("agents", agent)
    preset = preset_of(agent_class, agent, dataset, scale)
    of_agent = {**({"preset": preset} if preset else {}), **agent_options}
    settings = {**common, "stream": dataset, "agent": agent, "seed": seed, "tensorboard": False, "eval_start": False,
                "agent_options": of_agent, "stream_options": of_stream}  # fmt: skip
    if common.get("budget") is None and not isinstance(resolve_stream(dataset), Stream):
        settings["budget"] = BUDGETS[scale].get(agent, BUDGETS[scale]["*"])
    config = build(RunConfig, settings, where="compare")
    resolved = resolve_run(config)
    if common.get("budget") is None and resolved.unit != "updates":
        config = dataclasses.replace(config, budget=None)  # environment steps: the stream knows how many
        resolved = resolve_run(config)
    used = getattr(resolved.agent_config, "preset", None)
    return Cell(dataset, agent, seed, used, resolved, default_out(config, out), command_of(config))


def _scale_options(dataset: str, scale: str) -> dict[str, Any]:
    """The observation of the scale, where the stream leaves the choice and the id has not made it."""
    factory = resolve_stream(dataset)
    if isinstance(factory, Stream) or "observation" in parse_dataset_id(dataset)[1]:
        return {}
    known = {f.name for f in dataclasses.fields(options_of(factory))}
    # positions alone do not tell one maze from another
    wanted = "layout" if scale == "small" and dataset.startswith("point-maze/") else OBSERVATION[scale]
    return {"observation": wanted} if "observation" in known else {}


def preset_of(agent_class: Any, agent: str, dataset: str, scale: str) -> str | None:
    """The preset of the scale; ``None`` for agents without presets, or with none that fits (their default is used then)."""
    config = getattr(agent_class, "Config", None)
    if not dataclasses.is_dataclass(config) or "preset" not in {f.name for f in dataclasses.fields(config)}:
        return None
    small = ["small-pointmaze", "small"] if dataset.startswith("ogbench-maze/") else ["small"]
    for preset in small if scale == "small" else _presets_of_family(dataset):
        with contextlib.suppress(ConfigError):
            build(config, {"preset": preset}, where=f"agent {agent!r}")  # type: ignore[type-var]
            return preset
    return None


def _presets_of_family(dataset: str) -> list[str]:
    """What the preset of a data set may be called, the most special first."""
    family = next((v for k, v in PRESETS.items() if dataset.startswith(k)), None)
    if family is None:
        return list(FALLBACKS)
    flavours = [f for f in FLAVOURS if f in dataset.partition("?")[0].split("/")[-1].split("-")]
    names = ["-".join((family, *flavours)), *(f"{family}-{f}" for f in reversed(flavours)), family, *FALLBACKS]
    return list(dict.fromkeys(names))


def command_of(config: RunConfig) -> str:
    """The command line of one cell; it gives the same numbers in a folder of its own."""
    words = ["clbench", "run", config.stream, "--agent", config.agent, "--seed", str(config.seed)]
    for f in dataclasses.fields(RunConfig):
        value = getattr(config, f.name)
        if f.name in ("budget", "eval_every", "eval_start", "threads", "device") and value != f.default:
            flag = f.name.replace("_", "-")
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    groups = {"agent": (config.agent_options, _config_class(config.agent)), "stream": (config.stream_options, None)}
    for name, (options, kind) in groups.items():
        for key, value in options.items():
            words += _flags(f"--{name}.{key.replace('_', '-')}", value, kind and _type_of(kind, key))
    return shlex.join(words)


def _config_class(agent: str) -> Any:
    return getattr(resolve("agents", agent), "Config", None)


def _type_of(cls: Any, name: str) -> Any:
    import typing

    return typing.get_type_hints(cls).get(name.replace("-", "_")) if inspect.isclass(cls) else None


def _flags(flag: str, value: Any, kind: Any) -> list[str]:
    """An option of any type in the form that the command line of ``clbench run`` reads."""
    with contextlib.suppress(ConfigError):
        value = value if kind is None or isinstance(value, Mapping) else coerce(value, kind, flag)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return [w for k, v in value.items() for w in _flags(f"{flag}.{k.replace('_', '-')}", v, _type_of(kind, k))]
    if isinstance(value, bool) and kind in (bool, None):  # one that may also be None takes a word
        head, _, last = flag.rpartition(".")
        return [flag if value else f"{head}.no-{last}"]
    if isinstance(value, Mapping):
        return [flag, *(str(w) for item in value.items() for w in item)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def check_cells(cells: Sequence[Cell], overwrite: bool) -> None:
    """Everything that can be known before the first run: agents fit their environments, folders hold the same runs.

    Raises:
        ConfigError, ContractError: which cell, and why. Nothing has been run or deleted then.
    """
    known: dict[str, Spaces] = {}
    built: set[str] = set()
    stale: list[Cell] = []
    for cell in cells:
        resolved = cell.resolved
        task = resolved.stream.tasks[0]
        environment = content_hash([task.env_id, task.env_kwargs])
        if environment not in known:
            known[environment] = _spaces_of(task)
        spaces = known[environment]
        check_requirements(resolved.agent_class, cell.agent, resolved.stream, spaces)
        agent = content_hash([cell.agent, dataclasses.asdict(resolved.agent_config), str(spaces)])
        if agent not in built:
            _check_agent(cell, spaces)
            built.add(agent)
        if (cell.path / "config.json").exists():
            try:
                check_configuration(resolved, RunDirectory(cell.path))
            except ClbenchError:
                if not overwrite:
                    raise
                stale.append(cell)
    for cell in stale:
        directory = RunDirectory(cell.path)
        directory.open()
        directory.clear()
        directory.close()


def _check_agent(cell: Cell, spaces: Spaces) -> None:
    """Make the agent once: it may refuse the spaces, or options that do not go together."""
    resolved, rng = cell.resolved, torch_generator(0, "check")
    try:
        with blame(resolved.agent_class.__name__, "__init__"):
            resolved.agent_class(spaces, resolved.agent_config, device=torch.device("cpu"), rng=rng)
    except ClbenchError as error:
        raise type(error)(f"Agent {cell.agent!r} on {cell.dataset}: {error}") from error


def _spaces_of(task: Task) -> Spaces:
    with blame(task.env_id, "__init__"):
        env = make_env(task.env_id, 1, "cpu", autoreset="disabled", **task.env_kwargs)
    env.close()
    return Spaces(env.single_observation_space, env.single_action_space)


def run_cell(job: Mapping[str, Any]) -> None:
    """One cell, in whatever process.

    Raises:
        ConfigError: the agent's code is not what it was when the comparison began: its cells would not be comparable.
    """
    config = RunConfig(**job["settings"])
    if resolve_run(config).fingerprint != job["fingerprint"]:
        raise ConfigError(
            f"The code of the agent {config.agent!r} or of its task has changed since this comparison began; give the same "
            "command again (with --overwrite if cells of the old code are there)."
        )
    run(**job["settings"], out=job["out"])


# -- running -------------------------------------------------------------------------------------------------------------


def _compare(
    cells: Sequence[Cell], scale: str, out: Path, executor: Executor, note: Callable[[str], None]
) -> Comparison:
    problems: dict[Path, str] = {}
    due = [cell for cell in cells if load_row(cell, scale, None)["status"] != "complete"]
    if len(due) < len(cells):
        note(f"{len(cells) - len(due)} of {len(cells)} cells are complete already.")
    references = {}
    try:
        for cell in {c.dataset: c for c in reversed(cells)}.values():
            references[cell.dataset] = reference_lines(cell, out)
        with contextlib.closing(executor.run(run_cell, [cell.job for cell in due])) as ended:
            for count, finished in enumerate(ended, start=1):
                cell = due[finished.index]
                if finished.problem is not None:
                    problems[cell.path] = finished.problem
                row = load_row(cell, scale, finished.problem)
                note(f"[{count}/{len(due)}] {cell.dataset} · {cell.agent} · seed {cell.seed}: {_said(row)}")
    except KeyboardInterrupt as stop:
        raise Interrupted("Stopped by the user.") from stop
    finally:
        result = write_all(cells, scale, out, problems, references)
    return result


def _said(row: Mapping[str, Any]) -> str:
    if row["status"] == "complete":
        return f"success {row['success']:.2f} ({row['wall_s']:.0f} s)"
    return f"{row['status']}: {row['problem']}"


# -- reference lines -----------------------------------------------------------------------------------------------------


class _Controller(Agent):
    """A controller that an environment brings: it knows the state of the environment that it is evaluated in."""

    def __init__(self, method: Callable[[], torch.Tensor]):
        self.method = method

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.method(), memory

    def learn(self, experience, budget, *, rng):
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def reference_lines(cell: Cell, out: Path) -> dict[str, Any]:
    """Success of the random agent and of the environment's own controllers on the cell's frozen episodes.

    They do not depend on the data, so data sets with the same task share them. They are kept in ``out``, and made again
    when the episodes or the environment have changed.

    Returns:
        ``{"lines": {name: {"success", "episodes"}}, "absent": {name: why}}``
    """
    stream = cell.resolved.stream
    tasks = [{k: v for k, v in t.items() if k != "dataset_id"} for t in stream.to_dict()["tasks"]]
    code = [_env_code(t) for t in stream.tasks]
    key = content_hash([tasks, code, clbench.__version__, torch.__version__, cell.resolved.config.device])
    path = out / REFERENCES / f"{key}.json"
    if path.exists():
        with contextlib.suppress(ClbenchError):
            return read_json(path)
    lines, absent, broken = {}, {}, False
    for name in ("random", *CONTROLLERS):
        try:
            scores = [_reference(name, task, cell) for task in stream.tasks]
        except Exception as error:  # noqa: BLE001 (a plug-in may raise anything; the runs can do without its line)
            absent[name], broken = str(error) or type(error).__name__, True
            continue
        if any(s is None for s in scores):
            absent[name] = f"{stream.tasks[0].env_id} has no method {CONTROLLERS[name]}"
            continue
        flat = np.concatenate([s for s in scores if s is not None])
        lines[name] = {"success": float(flat.mean()), "episodes": len(flat)}
    if not broken:  # else try again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"lines": lines, "absent": absent})
    return {"lines": lines, "absent": absent}


def _reference(name: str, task: Task, cell: Cell) -> np.ndarray | None:
    """Scores (E,) of the frozen episodes; ``None`` where the environment has no such controller."""
    config = cell.resolved.config
    device = torch.device(config.device)
    env = make_env(task.env_id, min(EVAL_ENVS, len(task.evaluation)), device, autoreset="disabled", **task.env_kwargs)
    rng = torch_generator(0, "reference", name, task.name, device=device)
    try:
        if name == "random":
            spaces = Spaces(env.single_observation_space, env.single_action_space)
            agent = resolve("agents", "random")(spaces, None, device=device, rng=rng)
        else:
            method = getattr(env, CONTROLLERS[name], None)
            if method is None:
                return None
            agent = _Controller(method)
        with sealed_global_rng():
            return evaluate(agent, task, env, rng=rng).score.numpy()
    finally:
        env.close()


def _env_code(task: Task) -> str:
    """Changes with the file of the environment's class."""
    with contextlib.suppress(ClbenchError, OSError, TypeError):
        return content_hash(Path(inspect.getfile(resolve("envs", task.env_id))).read_text())
    return ""


# -- reading what the cells left -----------------------------------------------------------------------------------------

COLUMNS = (
    "dataset", "agent", "seed", "status", "success", "episodes", "scale", "observation", "preset", "updates", "env_steps",
    "samples", "parameters", "wall_s", "training_s", "evaluation_s", "planning_ms_per_step", "peak_memory_bytes", "git",
    "device", "threads", "problem", "command",
)  # fmt: skip
MEASURED = ("wall_s", "training_s", "evaluation_s", "planning_ms_per_step", "peak_memory_bytes")


def load_row(cell: Cell, scale: str, problem: str | None) -> dict[str, Any]:
    """The row of a cell in the table: what its folder says, and why it has no result.

    ``status`` is ``complete``, ``failed`` (``problem`` says why), ``interrupted``, or ``missing``.
    """
    config = cell.resolved.config
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"dataset": cell.dataset, "agent": cell.agent, "seed": cell.seed, "scale": scale, "preset": cell.preset,
            "observation": _observation_of(cell), "device": config.device,
            "threads": config.threads, "command": cell.command}  # fmt: skip
    found = _load(cell)
    if found is None or found.problem is not None:
        stopped, why = ("missing", _why_missing(cell)) if found is None else ("interrupted", found.problem)
        row |= {"status": stopped if problem is None else "failed", "problem": problem or why}
        return row
    scores = episode_scores(found)
    times = found.timing.get("wall_time_s", {})
    steps, act = int(found.log.length.sum()), times.get("evaluate_act")
    row |= {
        "status": "complete", "success": float(scores.mean()), "episodes": len(scores),
        **{k: found.cost.get(k) for k in ("updates", "env_steps", "samples", "parameters")},
        "wall_s": times.get("total"), "training_s": times.get("learn"), "evaluation_s": times.get("evaluate"),
        "planning_ms_per_step": None if act is None or not steps else 1000 * act / steps,
        "peak_memory_bytes": found.timing.get("peak_memory_bytes"), "git": found.provenance.get("git"),
    }  # fmt: skip
    return row


def _observation_of(cell: Cell) -> str | None:
    """``state``, ``pixels`` and the like where the stream has the choice: as an option, or else in the id."""
    chosen = cell.resolved.config.stream_options.get("observation")
    if chosen is None and not isinstance(resolve_stream(cell.dataset), Stream):
        chosen = parse_dataset_id(cell.dataset)[1].get("observation")
    return chosen


def _why_missing(cell: Cell) -> str:
    if (cell.path / "config.json").exists():
        return "its folder holds an unreadable run, or one of another configuration (has its code changed meanwhile?)"
    return "it was not begun"


def _load(cell: Cell) -> Run | None:
    """The run in the folder of a cell, if it is the cell's."""
    if not (cell.path / "config.json").exists():
        return None
    with contextlib.suppress(ClbenchError):
        if read_json(cell.path / "config.json").get("fingerprint") == cell.resolved.fingerprint:
            found = load_run(cell.path)
            return found if isinstance(found, Run) else None
    return None


def episode_scores(run: Run) -> np.ndarray:
    """Scores (E,) of the last evaluation: all episodes of all tasks, in canonical order."""
    log = run.log
    return log.score[(log.phase == len(run.phases)) & (log.step == log.step.max())]


def write_all(
    cells: Sequence[Cell], scale: str, out: Path, problems: Mapping[Path, str], references: Mapping[str, Any]
) -> Comparison:
    """``table.csv``, ``comparison.json`` and ``report.html`` from what is on disk."""
    rows = [load_row(cell, scale, problems.get(cell.path)) for cell in cells]
    order = list(dict.fromkeys(cell.dataset for cell in cells))
    agents = list(dict.fromkeys(cell.agent for cell in cells))
    rows.sort(key=lambda r: (order.index(r["dataset"]), agents.index(r["agent"]), r["seed"]))
    content = _content(cells, rows, scale, order, agents, references)
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "table.csv", _csv(rows).encode())
    write_json(out / "comparison.json", content)
    write_comparison(content, out / "report.html")
    return Comparison(out, content, rows)


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if row[k] is None else row[k] for k in COLUMNS} for row in rows)
    return text.getvalue()


def _content(
    cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], scale: str, datasets: Sequence[str], agents: Sequence[str],
    references: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The content of ``comparison.json``. All but ``measured`` and ``provenance`` is the same wherever it was made."""
    scores: dict[str, dict[str, dict[int, np.ndarray]]] = {d: {a: {} for a in agents} for d in datasets}
    failures = {d: dict.fromkeys(agents, 0) for d in datasets}
    made: list[Mapping[str, Any]] = []
    complete = {(r["dataset"], r["agent"], r["seed"]) for r in rows if r["status"] == "complete"}
    for cell in cells:
        found = _load(cell) if (cell.dataset, cell.agent, cell.seed) in complete else None
        if found is None:
            failures[cell.dataset][cell.agent] += 1
            continue
        scores[cell.dataset][cell.agent][cell.seed] = episode_scores(found)
        if found.provenance not in made:
            made.append(found.provenance)
    config = cells[0].resolved.config
    return {
        "schema": 1,
        "scale": scale,
        "datasets": list(datasets),
        "agents": list(agents),
        "seeds": sorted({cell.seed for cell in cells}),
        "settings": {
            "stream_options": {c.dataset: dict(c.resolved.config.stream_options) for c in cells},
            "eval_every": config.eval_every,
            "threads": config.threads,
            "device": config.device,
            "budgets": {c.agent: c.resolved.stream.phases[0].budget for c in cells},
            "units": {c.agent: c.resolved.unit for c in cells},
        },  # fmt: skip
        "axes": axes_of(datasets, config.stream_options),
        "cells": [{k: v for k, v in row.items() if k not in (*MEASURED, "git")} for row in rows],
        "references": dict(references),
        "statistics": compare_scores(scores, failures),
        "measured": [{k: row[k] for k in ("dataset", "agent", "seed", *MEASURED)} for row in rows],
        "provenance": made or [provenance()],
    }


# -- axes of the paper's figures -----------------------------------------------------------------------------------------


def axes_of(datasets: Sequence[str], stream_options: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """On which axes of the paper's figures the data sets lie: axis -> data set -> value, where at least two differ."""
    found: dict[str, dict[str, float]] = {}
    for dataset in datasets:
        for axis, value in _places(dataset, stream_options).items():
            found.setdefault(axis, {})[dataset] = value
    return {axis: places for axis, places in found.items() if len(set(places.values())) > 1}


def _places(dataset: str, stream_options: Mapping[str, Any]) -> dict[str, float]:
    name, options = parse_dataset_id(dataset)
    recipe = RECIPES.get(name)
    if recipe is None:
        return {}
    settings, places = recipe.settings, {}
    family = recipe.family
    trials = str(options.get("trials", stream_options.get("trials", "")))
    if trials.startswith("distance-"):
        return {f"{name}: edit distance": float(trials.removeprefix("distance-"))}
    if family == "two-rooms":
        if set(settings) == {"transitions"}:
            places["size"] = settings["transitions"]
        if str(settings.get("source", "")).startswith("length-") or name == "two-rooms/good-v0":
            places["length"] = settings.get("steps", 90) + 1
        if "good_share" in settings:
            places["mix"] = settings["good_share"]
    if "layouts" in settings:
        places["layouts"] = settings["layouts"]
    return {f"{family}: {axis}": float(value) for axis, value in places.items()}
