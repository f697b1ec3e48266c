"""Conformance checks for streams, schedules and data sets."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
import torch

from clbench.config import call_with_options
from clbench.contracts import Metric, Stream, Task
from clbench.data.dataset import OfflineDataset, map_obs
from clbench.data.registry import load_dataset
from clbench.envs.make import make_env
from clbench.registry import load_object, resolve
from clbench.rng import get_global_state, numpy_generator, sealed_global_rng, seed_global, torch_generator
from clbench.streams.core import make_stream
from clbench.testing.core import (
    Checks,
    Failed,
    NotApplicable,
    Report,
    clone,
    difference,
    run_checks,
    used_generator,
)
from clbench.testing.envs import check_observation

STREAM_CHECKS: Checks = Checks()
SCHEDULE_CHECKS: Checks = Checks()
DATASET_CHECKS: Checks = Checks()


# -- streams ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class StreamCase:
    """One stream, made on demand."""

    name: str
    seed: int
    load: int | None
    options: Mapping[str, Any]

    def make(self, seed: int | None = None) -> Stream:
        return make_stream(self.name, seed=self.seed if seed is None else seed, options=self.options)

    @cached_property
    def stream(self) -> Stream:
        return self.make()

    @property
    def sample(self) -> tuple[Task, ...]:
        """The tasks whose data and evaluation are tried: the first and the last ones."""
        tasks = self.stream.tasks
        if self.load is None or self.load >= len(tasks):
            return tasks
        return (*tasks[: self.load - 1], tasks[-1]) if self.load > 0 else ()


def check_stream(name: str, *, seed: int = 0, load: int | None = 2, **options: Any) -> Report:
    """Run every stream check.

    Args:
        name: a registered stream or ``"module:function"``.
        seed: of the stream.
        load: how many tasks' data sets and evaluation lists are tried (``None``: all).
        options: keyword arguments of the stream's function.
    """
    report = Report(f"stream {name}")
    with sealed_global_rng():
        report.results += run_checks(
            STREAM_CHECKS, StreamCase(name, seed, load, options), "", _function("streams", name)
        )
    return report


def _function(kind: str, name: str) -> Any:
    """The function behind a name, for messages."""
    try:
        return resolve(kind, name) if ":" not in name else load_object(name)
    except Exception:  # noqa: BLE001 (the first check reports it)
        return name


MADE = "the stream can be made"


@STREAM_CHECKS.add(MADE)
def _made(case: StreamCase) -> str | None:
    stream = case.stream
    return f"{len(stream.tasks)} tasks, {len(stream.phases)} phases"


@STREAM_CHECKS.add("the same seed gives the same stream", needs=MADE)
def _stream_pure(case: StreamCase) -> str | None:
    for seed in (1, 2):
        seed_global(seed)
        before = get_global_state()
        again = case.make()
        culprit = used_generator(before)
        if culprit:
            raise Failed(f"making the stream used the process-wide generator of {culprit}; draw from the rng argument.")
        changed = difference(case.stream.to_dict(), again.to_dict(), "stream")
        if changed:
            raise Failed(f"two streams of the same seed differ: {changed}; draw only from the rng argument.")
    return None


@STREAM_CHECKS.add("the stream survives being stored as JSON", needs=MADE)
def _serialisable(case: StreamCase) -> str | None:
    data = case.stream.to_dict()
    try:
        back = Stream.from_dict(json.loads(json.dumps(data)))
    except TypeError as error:
        raise Failed(
            f"the stream holds a value that JSON cannot store ({error}); use plain numbers, strings and lists in "
            "env_kwargs and evaluation options."
        ) from error
    if back != case.stream:
        changed = difference(json.loads(json.dumps(data)), json.loads(json.dumps(back.to_dict())), "stream")
        raise Failed(
            f"the stream comes back different from JSON ({changed or 'a tuple became a list, or a key became text'}); "
            "use lists instead of tuples and text as keys in env_kwargs."
        )
    return None


@STREAM_CHECKS.add("visits are numbered from 1", needs=MADE)
def _visits(case: StreamCase) -> str | None:
    seen: Counter[str] = Counter()
    for i, phase in enumerate(case.stream.phases):
        seen.update(phase.tasks)
        if phase.visit != seen[phase.tasks[0]]:
            raise Failed(
                f"phase {i} is visit {seen[phase.tasks[0]]} of {phase.tasks[0]!r}, but is numbered {phase.visit}; use "
                "clbench.streams.core.number_visits."
            )
    return None


@STREAM_CHECKS.add("all tasks share one observation and one action space", needs=MADE)
def _share_spaces(case: StreamCase) -> str | None:
    found: dict[str, Any] = {}
    for task in case.stream.tasks:
        env = make_env(task.env_id, 1, **task.env_kwargs)
        found[task.name] = (env.single_observation_space, env.single_action_space)
        env.close()
    first = next(iter(found))
    for name, spaces in found.items():
        if spaces != found[first]:
            raise Failed(f"task {name!r} has spaces {spaces}, task {first!r} has {found[first]}; pad or unify them.")
    return None


@STREAM_CHECKS.add("data sets load and match the environment", needs=MADE)
def _data(case: StreamCase) -> str | None:
    tasks = [t for t in case.sample if t.dataset_id]
    if not tasks:
        raise NotApplicable("no task with a data set was tried")
    for task in tasks:
        data = load_dataset(task.dataset_id or "")
        env = make_env(task.env_id, 1, **task.env_kwargs)
        index = torch.unique(torch.linspace(0, len(data) - 1, 64).to(torch.int64))
        where = f"the data set {task.dataset_id!r} of task {task.name!r}: observations"
        _data_observations(data.observation(index), env.single_observation_space, len(index), where)
        _data_actions(data.actions, env.single_action_space, f"the data set {task.dataset_id!r} of task {task.name!r}")
        env.close()
    return f"{len(tasks)} of {sum(bool(t.dataset_id) for t in case.stream.tasks)} data sets tried"


def _data_observations(obs: Any, space: gymnasium.Space, batch: int, where: str) -> None:
    """Like observations of the environment, except that goals are drawn later."""
    if isinstance(space, gymnasium.spaces.Dict) and isinstance(obs, Mapping):
        parts = {k: v for k, v in space.spaces.items() if k in obs or k != "desired_goal"}
        space = gymnasium.spaces.Dict(parts)
    check_observation(obs, space, batch, torch.device("cpu"), where)


def _data_actions(actions: torch.Tensor, space: gymnasium.Space, where: str) -> None:
    if isinstance(space, gymnasium.spaces.Discrete):
        low, high, shape, dtype = int(space.start), int(space.start + space.n) - 1, (), torch.int64
    elif isinstance(space, gymnasium.spaces.Box):
        low, high, shape, dtype = torch.tensor(space.low), torch.tensor(space.high), space.shape, torch.float32
    else:
        return
    if tuple(actions.shape[1:]) != tuple(shape) or actions.dtype != dtype:
        raise Failed(
            f"{where}: actions are {tuple(actions.shape)} {actions.dtype}, the environment takes rows of "
            f"{shape} {dtype}."
        )
    if bool(((actions < low) | (actions > high)).any()):
        raise Failed(
            f"{where}: actions lie in [{actions.min():.4g}, {actions.max():.4g}], outside the action space {space}."
        )


@STREAM_CHECKS.add("evaluation lists can be played", needs=MADE)
def _evaluations(case: StreamCase) -> str | None:
    for task in case.sample:
        tasks = task.evaluation.head(3)
        env = make_env(task.env_id, len(tasks), autoreset="disabled", **task.env_kwargs)
        obs, _ = env.reset(seed=list(tasks.seeds), options=dict(tasks.options))
        check_observation(
            obs, env.single_observation_space, len(tasks), env.device, f"task {task.name!r}: the first observation"
        )
        actions = np.stack([_any_action(env.single_action_space)] * len(tasks))
        info = env.step(torch.from_numpy(actions))[4]
        if isinstance(task.metric, Metric) and task.metric.kind == "success" and "is_success" not in info:
            raise Failed(
                f"task {task.name!r} is measured by success, but its environment gives no info['is_success']; use a "
                "Metric of kind 'return' or another environment."
            )
        env.close()
    return None


def _any_action(space: gymnasium.Space) -> np.ndarray:
    if isinstance(space, gymnasium.spaces.Box):
        return np.clip(np.zeros(space.shape, np.float32), space.low, space.high).astype(np.float32)
    return np.asarray(getattr(space, "start", 0), np.int64)


# -- schedules -------------------------------------------------------------------------------------


@dataclasses.dataclass
class ScheduleCase:
    """One schedule, called with several sizes."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    sizes: tuple[tuple[int, int], ...] = ((1, 60), (2, 60), (5, 120))

    def make(self, num_tasks: int, budget: int, seed: int = 0) -> Any:
        rng = numpy_generator(seed, "testing", "schedule")
        return call_with_options(
            self.function, self.options, "the schedule", num_tasks=num_tasks, budget=budget, rng=rng
        )


def check_schedule(name: str | Callable[..., Any], **options: Any) -> Report:
    """Run every schedule check on a registered schedule, a ``"module:function"`` or a function."""
    report = Report(f"schedule {name if isinstance(name, str) else name.__name__}")
    function = resolve("schedules", name) if isinstance(name, str) else name
    with sealed_global_rng():
        report.results += run_checks(SCHEDULE_CHECKS, ScheduleCase(function, options), "", function)
    return report


SLOTS = "it gives pairs (task, budget)"


@SCHEDULE_CHECKS.add(SLOTS)
def _slots(case: ScheduleCase) -> str | None:
    for n, budget in case.sizes:
        slots = case.make(n, budget)
        if not isinstance(slots, list) or not slots:
            raise Failed(f"the schedule returned {slots!r}; return a list of pairs (task, budget).")
        for slot in slots:
            if not (isinstance(slot, tuple) and len(slot) == 2 and all(type(v) is int for v in slot)):
                raise Failed(
                    f"the schedule returned the entry {slot!r}; each must be a pair of Python ints (task, budget)."
                )
            if not 0 <= slot[0] < n:
                raise Failed(f"the schedule names task {slot[0]} of {n}; tasks are numbered from 0 to num_tasks - 1.")
            if slot[1] < 1:
                raise Failed(f"the schedule gives a phase a budget of {slot[1]}; leave out empty phases.")
    return None


@SCHEDULE_CHECKS.add("it spends num_tasks * budget units", needs=SLOTS)
def _total(case: ScheduleCase) -> str | None:
    for n, budget in case.sizes:
        total = sum(b for _, b in case.make(n, budget))
        if total != n * budget:
            raise Failed(
                f"{n} tasks with a budget of {budget} make {total} units instead of {n * budget}, so agents on this "
                "schedule would train longer or shorter than on others; divide the budget among the phases."
            )
    return None


@SCHEDULE_CHECKS.add("the same generator gives the same schedule", needs=SLOTS)
def _schedule_pure(case: ScheduleCase) -> str | None:
    n, budget = case.sizes[-1]
    found = []
    for seed in (1, 2, 3):
        seed_global(seed)
        before = get_global_state()
        found.append(case.make(n, budget))
        culprit = used_generator(before)
        if culprit:
            raise Failed(f"the schedule used the process-wide generator of {culprit}; draw from the rng argument.")
    if found[0] != found[1] or found[0] != found[2]:
        raise Failed(
            "two schedules from the same generator differ; keep no state between calls and draw only from rng."
        )
    if json.loads(json.dumps(found[0])) != [list(s) for s in found[0]]:
        raise Failed("the schedule does not survive being stored as JSON; return pairs of Python ints.")
    return None


# -- data sets -------------------------------------------------------------------------------------


@dataclasses.dataclass
class DatasetCase:
    """One data set, loaded on demand."""

    load: Callable[[], OfflineDataset]

    @cached_property
    def data(self) -> OfflineDataset:
        return self.load()

    def rows(self) -> Any:
        """A sample of all columns, small enough to compare."""
        data = self.data
        index = torch.unique(torch.linspace(0, len(data) - 1, 256).to(torch.int64))
        return self.columns(data, index)

    @staticmethod
    def columns(data: OfflineDataset, index: torch.Tensor) -> Any:
        return clone([data.observation(index), data.actions[index], data.next_observation(index), data.lengths])


def check_dataset(identifier: str | Callable[[], OfflineDataset], **options: Any) -> Report:
    """Run every data set check on an id (``"name?key=value"``) or a function that returns an :class:`OfflineDataset`."""
    if isinstance(identifier, str):
        report, name = Report(f"data set {identifier}"), identifier
        plugin: Any = _function("datasets", identifier.partition("?")[0])
        case = DatasetCase(lambda: load_dataset(name))
    else:
        function = identifier
        report, plugin = Report(f"data set {function.__name__}"), function
        case = DatasetCase(lambda: function(**options))
    with sealed_global_rng():
        report.results += run_checks(DATASET_CHECKS, case, "", plugin)
    return report


LOADS = "it loads and its columns fit together"


@DATASET_CHECKS.add(LOADS)
def _loads(case: DatasetCase) -> str | None:
    data = case.data  # imports of the first call may draw from process-wide generators; only the second counts
    before = get_global_state()
    case.load()
    culprit = used_generator(before)
    if culprit:
        raise Failed(
            f"loading used the process-wide generator of {culprit}; derive one from a seed option (clbench.rng)."
        )
    if not isinstance(data, OfflineDataset):
        raise Failed(f"it returned a {type(data).__name__}; return a clbench.OfflineDataset.")
    OfflineDataset(data.observations, data.actions, data.lengths, data.final_observations, data.task, data.name)
    if data.actions.dtype not in (torch.float32, torch.int64):
        raise Failed(f"actions are {data.actions.dtype}; use float32 (continuous) or int64 (discrete).")
    return f"{len(data)} transitions in {data.num_episodes} episodes"


@DATASET_CHECKS.add("observations have one type each", needs=LOADS)
def _types(case: DatasetCase) -> str | None:
    obs = case.data.observations
    for key, column in (obs if isinstance(obs, Mapping) else {"": obs}).items():
        if column.dtype not in (torch.float32, torch.uint8, torch.int64):
            raise Failed(
                f"observations{f'[{key!r}]' if key else ''} are {column.dtype}; use float32, uint8 (pixels) or int64."
            )
    if isinstance(obs, Mapping) and "desired_goal" in obs:
        raise Failed("observations hold a desired_goal; leave it out, goals are drawn when a batch is drawn.")
    final = case.data.final_observations
    if final is not None and isinstance(obs, Mapping) and set(final) != set(obs):
        raise Failed(f"final_observations have the keys {sorted(final)}, observations {sorted(obs)}; they must agree.")
    return None


@DATASET_CHECKS.add("loading it twice gives the same data", needs=LOADS)
def _twice(case: DatasetCase) -> str | None:
    seed_global(99)
    changed = difference(case.rows(), DatasetCase(case.load).rows())
    if changed:
        raise Failed(
            "loading the data set twice gives different data; make it a function of its options (and a seed option)."
        )
    return None


@DATASET_CHECKS.add("drawing a batch changes nothing", needs=LOADS)
def _draw(case: DatasetCase) -> str | None:
    before = case.rows()
    batches = [case.data.sample(32, torch_generator(0, "testing", "batch")) for _ in range(2)]
    pairs = [clone([b.observations, b.actions, b.next_observations]) for b in batches]
    if difference(pairs[0], pairs[1]):
        raise Failed("two batches drawn with the same generator differ; a renderer must be a function of its columns.")
    map_obs(lambda v: v.zero_(), batches[0].observations)
    batches[0].actions.zero_()
    if difference(before, case.rows()):
        raise Failed("changing a batch changed the data set; a renderer must return new tensors.")
    return None
