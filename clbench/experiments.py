"""One run from one configuration: resolve, check, train, evaluate, write. The command line is a thin layer over this.

::

    import clbench
    result = clbench.run("digits-permuted", agent="bc", seed=0)
    result = clbench.run("digits-split", agent=MyAgent, agent_options={"lr": 1e-3}, out="runs/mine")
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

import clbench
from clbench.config import build
from clbench.contracts import Agent, Reveals, Spaces, Stream
from clbench.errors import ClbenchError, ConfigError, ContractError, DataError, Interrupted, UnknownNameError
from clbench.loop import (
    Loop,
    LoopSettings,
    Unit,
    blame,
    check_requirements,
    common_spaces,
    experience_unit,
    new_agent,
    phase_records,
)
from clbench.metrics.continual import compute_metrics
from clbench.metrics.log import EvalLog, read_eval_csv
from clbench.metrics.plasticity import online_results
from clbench.records import (
    RunDirectory,
    content_hash,
    load_checkpoint,
    peak_memory_bytes,
    provenance,
    read_json,
    unwritable,
    write_json,
)
from clbench.registry import load_object, resolve
from clbench.rng import sealed_global_rng
from clbench.streams.core import joint, make_stream, one_phase_per_task

Protocol = Literal["sequential", "independent", "joint"]


@dataclass(frozen=True)
class RunConfig:
    """Everything one run depends on.

    Args:
        stream: a registered stream, the id of a data set, or ``module:function``.
        agent: a registered agent or ``module:Class``.
        method: continual methods that the agent is combined with, in order: registered names or ``module:Class``.
        seed: the seed of the run; stream, agent and evaluation derive their own generators from it.
        schedule: which task comes when (``clbench list schedules``).
        protocol: ``sequential`` (the stream), ``independent`` (a fresh agent per task), ``joint`` (all tasks at once).
        reveals: what the agent is told: ``task_id``, ``boundaries`` or ``nothing`` (default: the stream's own).
        budget: units per task: environment steps if an environment drives the agent, else gradient updates (default: the
            stream's own).
        eval_every: units between evaluations within a phase (default: a tenth of the phase; 0: at phase ends only).
        eval_start: evaluate before training, too (row 0 of the performance matrix).
        evaluate: ``False`` switches evaluation off.
        eval_envs: parallel environments in evaluation.
        num_envs: parallel training environments.
        device: torch device.
        threads: CPU threads. One gives the same numbers on any machine and is fastest for small networks.
        references: also make (or reuse) the single-task reference run that forward transfer is defined against.
        checkpoint_seconds: wall time between checkpoints within a phase.
        tensorboard: write TensorBoard event files.
        probe: write measures of the agent's features to probe.csv, before training and after each phase.
        agent_options: fields of the agent's ``Config``.
        method_options: for each method, fields of its ``Config``.
        stream_options: options of the stream.
        schedule_options: options of the schedule.
    """

    stream: str
    agent: str
    method: tuple[str, ...] = ()
    seed: int = 0
    schedule: str = "sequential"
    protocol: Protocol = "sequential"
    reveals: Reveals | None = None
    budget: int | None = None
    eval_every: int | None = None
    eval_start: bool = True
    evaluate: bool = True
    eval_envs: int = 512
    num_envs: int = 8
    device: str = "cpu"
    threads: int = 1
    references: bool = False
    checkpoint_seconds: float = 20.0
    tensorboard: bool = True
    probe: bool = False
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    schedule_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.method, str):  # as on the command line: "er,ewc"
            object.__setattr__(self, "method", tuple(n for n in self.method.split(",") if n))
        for name, least in (("seed", 0), ("eval_every", 0), ("eval_envs", 1), ("num_envs", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}.")
        if self.budget is not None and self.budget < 1:
            raise ConfigError(f"budget must be a positive number of units, got {self.budget}.")
        if not self.checkpoint_seconds >= 0:
            raise ConfigError(f"checkpoint_seconds must be >= 0, got {self.checkpoint_seconds}.")
        check_device(self.device)

    @property
    def label(self) -> str:
        """The agent and its methods: ``bc+er+ewc``."""
        return "+".join((self.agent, *self.method))


# settings that change how a run is made but not what comes out; a resumed run may change them
FREE = ("references", "checkpoint_seconds", "tensorboard")


def check_device(device: str) -> None:
    """Raise :class:`ConfigError` for a device that torch does not know or this machine does not have."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"Unknown device {device!r}; use cpu, cuda or cuda:N.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"No GPU is available for device {device!r}; use --device cpu, or install a CUDA build of torch."
        )


@dataclass(frozen=True)
class Resolved:
    """A configuration with its names looked up and checked."""

    config: RunConfig
    agent_class: type[Agent]
    agent_config: Any
    stream: Stream
    unit: Unit

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with everything that changes the result."""
        # agent_config and stream say these in full
        options = ("agent_options", "method_options", "stream_options", "schedule_options")
        plain = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in (*FREE, *options)}
        if self.config.eval_start:
            del plain["eval_start"]  # runs from before there was this option go on
        if not self.config.method:
            del plain["method"]
        if not self.config.probe:
            del plain["probe"]
        agent = [dataclasses.asdict(self.agent_config), self.agent_code]
        return content_hash([plain, agent, self.stream.to_dict(), clbench.__version__, torch.__version__])

    @property
    def agent_code(self) -> str:
        """Changes with the files that define the agent's class, its methods' and their bases: half a run of old code is no
        run."""
        sources = []
        parts = (self.agent_class, *getattr(self.agent_class, "parts", ()))
        for cls in (c for part in parts for c in part.__mro__):
            if cls is not Agent:
                with contextlib.suppress(OSError, TypeError):  # defined in a shell, or built in
                    sources.append(Path(inspect.getfile(cls)).read_text())
        return content_hash(sources)

    def make_agent(self, spaces: Spaces, device: torch.device, rng: torch.Generator) -> Agent:
        """An agent that has learned nothing yet.

        Raises:
            ConfigError: the stream lacks what the agent requires.
        """
        check_requirements(self.agent_class, self.config.label, self.stream, spaces)
        with blame(self.agent_class.__name__, "__init__"):
            return self.agent_class(spaces, self.agent_config, device=device, rng=rng)


@dataclass(frozen=True)
class RunResult:
    """Where a run is and what it gave: the content of ``results.json`` and, where this call trained it, the agent."""

    path: Path
    results: Mapping[str, Any] = field(repr=False)
    stream: Stream = field(repr=False)
    agent: Agent | None = field(default=None, repr=False)

    @property
    def metrics(self) -> Mapping[str, float | None]:
        return self.results["metrics"]


def name_of(plugin: Any) -> str:
    """``module:Class`` for a class, the text itself for a name."""
    return plugin if isinstance(plugin, str) else f"{plugin.__module__}:{plugin.__qualname__}"


def resolve_run(config: RunConfig, *, agent_class: Any = None, stream: Stream | None = None) -> Resolved:
    """Look up and check everything that can be checked before training.

    Args:
        agent_class: use this class instead of looking up ``config.agent``.
        stream: use this stream instead of making ``config.stream``.
    """
    found = resolve("agents", config.agent) if agent_class is None else agent_class
    if not (isinstance(found, type) and issubclass(found, Agent)):
        raise ContractError(f"Agent {config.agent!r} must be a subclass of clbench.Agent, got {found!r}.")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise ContractError(f"Agent {config.agent!r} does not define {', '.join(missing)}; see docs/add_an_agent.md.")
    if config.method:
        found = load_object("clbench.agents.continual.compose:compose")(
            config.agent if agent_class is None else agent_class, config.method
        )
        options = _with_methods(config)
        agent_config = build(found.Config, options, where=f"agent {config.label!r}")
    elif config.method_options:
        raise ConfigError(f"Options of {', '.join(config.method_options)} are given, but no such method.")
    else:
        agent_config = build(found.Config, config.agent_options, where=f"agent {config.agent!r}")

    def made(unit: Unit) -> Stream:
        return make_stream(
            config.stream, seed=config.seed, schedule=config.schedule, budget=config.budget, unit=unit,
            reveals=config.reveals, options=config.stream_options, schedule_options=config.schedule_options,
        )  # fmt: skip

    full = made("updates") if stream is None else stream
    unit = experience_unit(found, full)
    if stream is None and unit == "env_steps":
        full = made(unit)
    arrange = {"sequential": lambda s: s, "independent": one_phase_per_task, "joint": joint}[config.protocol]
    return Resolved(config, found, agent_config, arrange(full), unit)


def _with_methods(config: RunConfig) -> dict[str, Any]:
    """The options of an agent that is combined with methods."""
    return {"agent": config.agent_options, **config.method_options}


def default_out(config: RunConfig, root: str | Path = "runs") -> Path:
    """``runs/STREAM/AGENT[+METHOD][-SCHEDULE][-PROTOCOL]/seed-N``."""

    def safe(text: str) -> str:
        return "".join(c if c.isalnum() or c in "-_.=+" else "_" for c in text)

    parts = [safe(config.label)]
    parts += [safe(config.schedule)] if config.schedule != "sequential" else []
    parts += [config.protocol] if config.protocol != "sequential" else []
    return Path(root) / safe(config.stream) / "-".join(parts) / f"seed-{config.seed}"


def run(
    stream: str | Stream,
    agent: str | type[Agent],
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[Resolved], contextlib.AbstractContextManager[Any]] | None = None,
    reference_root: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Run one agent on one stream, or go on with a run that was stopped.

    Args:
        stream: a registered name, ``module:function``, or a :class:`clbench.Stream`.
        agent: a registered name, ``module:Class``, or a class.
        out: run directory (default: see :func:`default_out`). If it holds an interrupted run of the same configuration,
            that run goes on; a complete one is returned as it is; one of another configuration is refused.
        overwrite: start again in ``out``, deleting what is there.
        progress: makes a context manager that shows progress (the command line's).
        reference_root: folder of cached reference runs (default: ``references`` beside the runs).
        **settings: fields of :class:`RunConfig`; ``method`` may name classes, too.

    Raises:
        ConfigError, DataError, ContractError: bad input, with what to do.
        Interrupted: Ctrl-C; everything done is saved, the same call goes on.
    """
    given = settings.pop("method", ())
    listed = given.split(",") if isinstance(given, str) else [given] if isinstance(given, type) else given
    names = {"stream": _stream_name(stream), "agent": name_of(agent), "method": [name_of(m) for m in listed if m]}
    config = build(RunConfig, {**settings, **names}, where="run")
    with sealed_global_rng(), cpu_threads(config.threads):
        resolved = resolve_run(
            config,
            agent_class=None if isinstance(agent, str) else agent,
            stream=stream if isinstance(stream, Stream) else None,
        )
        path = Path(out) if out is not None else default_out(config)
        reference = None
        if config.references and config.protocol == "sequential":
            root = Path(reference_root) if reference_root is not None else _beside(path, config)
            reference = reference_run(resolved, root, progress)
        return _run_in(resolved, path, overwrite, progress, reference)


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads of torch, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stream_name(stream: str | Stream) -> str:
    return stream.name if isinstance(stream, Stream) else stream


def _beside(path: Path, config: RunConfig) -> Path:
    """``runs/references`` for the default layout, else ``references`` beside the run directory."""
    default = default_out(config, root="")
    root = path.parents[len(default.parts) - 1] if path.parts[-len(default.parts) :] == default.parts else path.parent
    return root / "references"


def reference_run(
    resolved: Resolved, root: Path, progress: Callable[[Resolved], contextlib.AbstractContextManager[Any]] | None = None
) -> EvalLog:
    """The single-task runs of the same agent and seed, made once and kept under a hash of all they depend on.

    A process that finds another one making them waits for it. Damaged ones are made again.
    """
    config = dataclasses.replace(
        resolved.config,
        protocol="independent",
        schedule="sequential",
        schedule_options={},
        references=False,
        probe=False,
    )
    alone = dataclasses.replace(resolved, config=config, stream=one_phase_per_task(resolved.stream))
    path = root / alone.fingerprint
    try:
        _run_in(alone, path, False, progress, None, wait=True)
    except DataError:
        _run_in(alone, path, True, progress, None, wait=True)
    return read_eval_csv(path / "eval.csv")


def _run_in(
    resolved: Resolved,
    path: Path,
    overwrite: bool,
    progress: Callable[[Resolved], contextlib.AbstractContextManager[Any]] | None,
    reference: EvalLog | None,
    wait: bool = False,
) -> RunResult:
    directory = RunDirectory(path)
    directory.open(wait)
    try:
        if overwrite:
            directory.clear()
        status = directory.status()
        if status is not None:
            check_configuration(resolved, directory)
        if status == "complete" and directory.checkpoint.exists():
            results = read_json(directory.results)
            if reference is not None:  # which the run may have been made without
                results = write_results(resolved, directory, "complete", results["cost"], reference)
            return RunResult(path, results, resolved.stream)
        with _stopping() as should_stop:
            loop = _make_loop(resolved, directory, should_stop)
            new, start, status = status is None, time.perf_counter(), "interrupted"
            try:
                if new:
                    write_json(directory.stream, resolved.stream.to_dict())
                    write_json(directory.config, _config_record(resolved))
                with progress(resolved) if progress is not None else contextlib.nullcontext() as bar:
                    if bar is not None:
                        loop.on_progress = bar
                    loop.run()
                status = "complete"
            except OSError as error:
                raise unwritable(path, error) from error
            except ClbenchError as error:
                if not directory.checkpoint.exists() and not isinstance(error, Interrupted):
                    directory.clear()  # it failed before there was anything to keep
                raise
            finally:
                if directory.checkpoint.exists():
                    results = write_results(resolved, directory, status, loop.cost(), reference)
                    _write_timing(loop, directory, time.perf_counter() - start)
        return RunResult(path, results, resolved.stream, loop.agent)
    finally:
        directory.close()


def _make_loop(resolved: Resolved, directory: RunDirectory, should_stop: Callable[[], None]) -> Loop:
    config = resolved.config
    return Loop(
        stream=resolved.stream,
        make_agent=resolved.make_agent,
        agent_name=config.label,
        settings=LoopSettings(
            seed=config.seed,
            device=config.device,
            eval_every=config.eval_every,
            eval_start=config.eval_start,
            evaluate=config.evaluate,
            eval_envs=config.eval_envs,
            num_envs=config.num_envs,
            fresh_agent=config.protocol == "independent",
            checkpoint_seconds=config.checkpoint_seconds,
            tensorboard=config.tensorboard,
            probe=config.probe,
        ),  # fmt: skip
        directory=directory,
        unit=resolved.unit,
        fingerprint=resolved.fingerprint,
        should_stop=should_stop,
    )


# -- what a run directory holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedRun:
    """A run as its directory describes it.

    Args:
        path: the run directory.
        record: the content of ``config.json``.
        resolved: its configuration, with today's code of the agent.
    """

    path: Path
    record: Mapping[str, Any] = field(repr=False)
    resolved: Resolved = field(repr=False)

    @functools.cached_property
    def checkpoint(self) -> Mapping[str, Any]:
        """The last checkpoint, read when it is first asked for. Raises DataError: there is none, or it is damaged."""
        file = RunDirectory(self.path).checkpoint
        if not file.is_file():
            raise DataError(f"{self.path} has no checkpoint.pt: the run has not got that far. Give its command again.")
        return load_checkpoint(file)


def read_run(path: str | Path, *, device: str | None = None, agent_class: type[Agent] | None = None) -> SavedRun:
    """The configuration of a run, read from ``config.json`` and ``stream.json``; nothing is written.

    Args:
        path: a run directory.
        device: in place of the one that the run was made on.
        agent_class: in place of looking the agent up by its name.

    Raises:
        ConfigError: no run directory, or one that this version cannot make sense of.
        DataError: damaged files.
    """
    directory = RunDirectory(Path(path))
    if not directory.config.is_file():
        found = "it has no config.json" if directory.path.is_dir() else "there is no such folder"
        raise ConfigError(f"{path} is no run directory: {found}. `clbench run` makes one, and prints where it is.")
    record, plain = read_json(directory.config), read_json(directory.stream)
    try:
        settings = {**record["config"], **({} if device is None else {"device": device})}
        stream, unit = Stream.from_dict(plain), record["unit"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"config.json or stream.json of {path} does not hold what a run writes there ({type(error).__name__}: "
            f"{error}). Start the run again with --overwrite."
        ) from error
    config = build(RunConfig, settings, where=str(directory.config))
    try:
        # the stream was saved as its protocol arranged it
        plainly = dataclasses.replace(config, protocol="sequential")
        resolved = resolve_run(plainly, agent_class=agent_class, stream=stream)
    except UnknownNameError as error:
        raise UnknownNameError(f"The run in {path} cannot be put together again. {error}") from error
    return SavedRun(directory.path, record, dataclasses.replace(resolved, config=config, unit=unit))


def load_agent(
    path: str | Path | SavedRun, *, device: str | None = None, agent_class: type[Agent] | None = None
) -> Agent:
    """The agent of a run, finished or interrupted, as its last checkpoint has it; nothing is written. ::

        agent = load_agent("runs/digits-split/bc/seed-0")

    Args:
        path: a run directory, or what :func:`read_run` gave.
        device: in place of the one that the run was made on.
        agent_class: in place of looking the agent up by its name; for classes defined in a shell.

    Raises:
        ConfigError: no run directory, or an agent that is not there.
        DataError: no checkpoint, or a damaged one.
        ContractError: the agent cannot be made, or cannot load its state.
    """
    saved = path if isinstance(path, SavedRun) else read_run(path, device=device, agent_class=agent_class)
    resolved, state = saved.resolved, saved.checkpoint.get("agent")
    if not isinstance(state, dict):
        raise DataError(f"The checkpoint in {saved.path} holds no agent. Start the run again with --overwrite.")
    where, seed = torch.device(resolved.config.device), resolved.config.seed
    with sealed_global_rng():
        agent = new_agent(resolved.make_agent, common_spaces(resolved.stream, where), where, seed)
        try:
            with blame(agent, "load_state_dict"):
                agent.load_state_dict(state)
        except ClbenchError as error:
            if saved.record.get("agent_code") == resolved.agent_code:
                raise
            raise ContractError(f"{error} The agent's code is not that of the run any more; get that one.") from error
    return agent


# -- stopping ------------------------------------------------------------------------------------------------------------

GRACE_SECONDS = 6.0


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], None]]:
    """Ctrl-C (or SIGTERM, as a cluster sends it) asks the loop to stop at the next yield.

    If that takes too long, or at a second Ctrl-C, it stops at once and loses what was done since the last checkpoint.
    """
    asked = threading.Event()

    def should_stop() -> None:
        if asked.is_set():
            raise Interrupted("Stopped by the user.")

    if threading.current_thread() is not threading.main_thread():
        yield should_stop
        return

    def on_interrupt(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def on_alarm(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    handlers = {signal.SIGINT: on_interrupt, signal.SIGTERM: on_interrupt, signal.SIGALRM: on_alarm}
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield should_stop
    except KeyboardInterrupt as stop:
        raise Interrupted("Stopped by the user.") from stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)


# -- result files --------------------------------------------------------------------------------------------------------


def _config_record(resolved: Resolved) -> dict[str, Any]:
    options, methods = dataclasses.asdict(resolved.agent_config), {}
    if resolved.config.method:
        methods = options
        options = methods.pop("agent")
    return {
        "schema": 1,
        "config": {**dataclasses.asdict(resolved.config), "agent_options": options, "method_options": methods},
        "unit": resolved.unit,
        "reveals": resolved.stream.reveals,
        "tasks": [t.name for t in resolved.stream.tasks],
        "phases": phase_records(resolved.stream),
        "stream_hash": content_hash(resolved.stream.to_dict()),
        "agent_code": resolved.agent_code,
        "fingerprint": resolved.fingerprint,
        "provenance": provenance(),
    }


def check_configuration(resolved: Resolved, directory: RunDirectory) -> None:
    """Refuse to go on with a run of another configuration; name what differs."""
    saved = read_json(directory.config)
    if saved.get("fingerprint") == resolved.fingerprint:
        return
    ours = _config_record(resolved)
    differences = []
    for key in ("config", "stream_hash", "agent_code", "provenance"):
        old, new = saved.get(key), ours[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            wanted = ("clbench", "torch") if key == "provenance" else [k for k in {**old, **new} if k not in FREE]
            differences += [
                f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in wanted if old.get(k) != new.get(k)
            ]
        elif old != new:
            differences.append(f"{key.replace('_', ' ')}: {old!r} there, {new!r} now")
    raise ConfigError(
        f"{directory.path} holds a run of another configuration ({'; '.join(differences) or 'another version'}). Choose "
        "another folder with --out, or --overwrite to start again there."
    )


def write_results(
    resolved: Resolved, directory: RunDirectory, status: str, cost: Mapping[str, Any], reference: EvalLog | None
) -> dict[str, Any]:
    """``results.json``: a pure function of ``eval.csv``, ``train.csv``, the configuration and the deterministic counts.

    It holds no wall times, and not where it was made (``config.json`` does), so that a run that was killed and resumed
    gives the same file as one that was not, also on another machine or commit.
    """
    config, stream = resolved.config, resolved.stream
    log = read_eval_csv(directory.eval.path)
    tasks = [t.name for t in stream.tasks]
    online = online_results(directory.train.path, len(stream.phases), status == "complete")
    results = {
        "schema": 1,
        "status": status,
        "stream": config.stream,
        "agent": config.agent,
        "method": list(config.method),
        "seed": config.seed,
        "schedule": config.schedule,
        "protocol": config.protocol,
        "reveals": stream.reveals,
        "unit": resolved.unit,
        "budgets": [p.budget for p in stream.phases],
        "tasks": tasks,
        "matrix": _with_nulls(log.matrix(tasks, stream.phases)),
        "metrics": compute_metrics(log, tasks, stream.phases, reference, protocol=config.protocol),
        **({} if online is None else {"online": online}),
        "reference": None if reference is None else Path(reference.source).parent.name,
        "cost": dict(cost),
        "provenance": read_json(directory.config).get("provenance"),  # of the start: the same after a resume elsewhere
    }
    write_json(directory.results, results)
    return results


def _with_nulls(matrix: Any) -> list[list[float | None]]:
    return [[None if v != v else float(v) for v in row] for row in matrix.tolist()]


def _write_timing(loop: Loop, directory: RunDirectory, total: float) -> None:
    """``timing.json``: what was measured, added up over the processes that worked on the run."""
    timing = loop.timing
    now = {
        "total": total,
        "learn": timing.learn,
        "environment": timing.environment,
        "update": max(timing.learn - timing.environment, 0.0),
        "evaluate": timing.evaluate,
        "evaluate_environment": timing.evaluate_environment,
        "evaluate_act": timing.evaluate_act,
        "checkpoint": timing.checkpoint,
    }
    before = {}
    if directory.timing.exists():
        with contextlib.suppress(ClbenchError, AttributeError):
            before = dict(read_json(directory.timing).get("wall_time_s", {}))
    write_json(
        directory.timing,
        {
            "schema": 1,
            "wall_time_s": {k: round(v + float(before.get(k, 0.0)), 6) for k, v in now.items()},
            "peak_memory_bytes": peak_memory_bytes(),
        },
    )


def run_many(runs: Sequence[Mapping[str, Any]], **common: Any) -> list[RunResult]:
    """Several runs, one after the other; finished ones are not repeated."""
    return [run(**{**common, **settings}) for settings in runs]


__all__ = [
    "RunConfig", "RunResult", "SavedRun", "default_out", "load_agent", "read_run", "reference_run", "resolve_run", "run",
    "run_many",
]  # fmt: skip
