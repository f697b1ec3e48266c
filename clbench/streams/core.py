"""From a suite (a table of tasks with default budgets) and a schedule to a :class:`clbench.Stream`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clbench.config import call_with_options
from clbench.contracts import REVEALS, Phase, Reveals, Stream, Task, is_positive_whole
from clbench.data.files import is_file
from clbench.data.recipes import RECIPES
from clbench.errors import ConfigError, ContractError, unknown_name
from clbench.registry import entries, load_object, resolve
from clbench.rng import numpy_generator

Unit = Literal["updates", "env_steps"]


@dataclass(frozen=True)
class Suite:
    """A table of tasks, and how long each is trained by default.

    Args:
        name: for reports.
        tasks: the tasks, in their canonical order.
        updates: gradient updates per task for agents that learn from a data set.
        env_steps: environment steps per task for agents that learn from interaction.
        reveals: what the agent is told unless the user asks for another level.
        zero_shot: tasks that no schedule trains; they are evaluated whenever the others are.
    """

    name: str
    tasks: Sequence[Task]
    updates: int
    env_steps: int
    reveals: Reveals = "boundaries"
    zero_shot: Sequence[Task] = ()

    @property
    def table(self) -> tuple[Task, ...]:
        """All tasks, the trained ones first."""
        return (*self.tasks, *self.zero_shot)


def make_stream(
    name: str,
    *,
    seed: int = 0,
    schedule: str = "sequential",
    budget: int | None = None,
    unit: Unit = "updates",
    reveals: Reveals | None = None,
    options: Mapping[str, Any] | None = None,
    schedule_options: Mapping[str, Any] | None = None,
) -> Stream:
    """The stream ``name``: the same for every agent with the same arguments.

    Args:
        name: a registered stream, the id of a published data set, or ``module:function``.
        seed: of the run; the tasks use the generator ``(seed, "stream", "tasks")``, the schedule
            ``(seed, "stream", "schedule")``.
        schedule: which task comes when (see ``clbench list schedules``).
        budget: units per task; ``None`` takes the suite's default for ``unit``.
        unit: ``"updates"`` or ``"env_steps"``, whichever the agent consumes.
        reveals: what the agent is told; ``None`` takes the suite's default.
        options: keyword arguments of the suite.
        schedule_options: keyword arguments of the schedule.

    Raises:
        UnknownNameError: unknown stream, schedule, or option.
        ConfigError: a budget below 1.
    """
    if reveals is not None and reveals not in REVEALS:
        raise unknown_name("value of reveals", str(reveals), REVEALS)
    if budget is not None and not is_positive_whole(budget):
        raise ConfigError(f"The budget must be a positive whole number of {unit.replace('_', ' ')}, got {budget!r}.")
    suite = call_with_options(
        resolve_stream(name), options, where=f"stream {name!r}", rng=numpy_generator(seed, "stream", "tasks")
    )
    if isinstance(suite, Stream):
        if budget is not None or schedule != "sequential" or schedule_options:
            raise ConfigError(f"Stream {name!r} has a schedule of its own; leave out schedule and budget.")
        return Stream(suite.name, suite.tasks, suite.phases, reveals or suite.reveals)
    if not isinstance(suite, Suite):
        raise ContractError(f"The stream {name!r} must return a Suite or a Stream, got {type(suite).__name__}.")
    each = budget if budget is not None else getattr(suite, unit)
    slots = call_with_options(
        resolve("schedules", schedule),
        schedule_options,
        where=f"schedule {schedule!r}",
        num_tasks=len(suite.tasks),
        budget=each,
        rng=numpy_generator(seed, "stream", "schedule"),
    )
    return Stream(suite.name, suite.table, number_visits(suite.tasks, slots), reveals or suite.reveals)


def resolve_stream(name: str) -> Any:
    """The function (or the :class:`clbench.Stream`) behind the name of a stream or the id of a data set.

    Raises:
        UnknownNameError: with the nearest names of streams and data sets.
    """
    known = entries("streams")
    if not isinstance(name, str) or name in known:
        return resolve("streams", name)
    data = name.partition("?")[0]
    if is_file(data) or data in entries("datasets"):
        return load_object("clbench.streams.dataset_task:stream_of")(name)
    if ":" in data or not data:
        return resolve("streams", name)
    error = unknown_name("stream", data, {**known, **RECIPES} if "/" in data else known)
    raise type(error)(
        f"{error} Published data sets are streams too (`clbench list datasets`); your own is 'module:name'."
    )


def number_visits(tasks: Sequence[Task], slots: Sequence[tuple[int, int]]) -> tuple[Phase, ...]:
    """Phases from (task index, budget) pairs, each with the number of the visit it is."""
    visits = [0] * len(tasks)
    phases = []
    for task, budget in slots:
        visits[task] += 1
        phases.append(Phase(tasks[task].name, int(budget), visits[task]))
    return tuple(phases)


def one_phase_per_task(stream: Stream) -> Stream:
    """Protocol ``independent``: every task once, for the budget of its first visit."""
    budgets: dict[str, int] = {}
    for phase in stream.phases:
        for name in phase.tasks:
            budgets.setdefault(name, phase.budget)
    phases = tuple(Phase(t.name, budgets[t.name]) for t in stream.tasks if t.name in budgets)
    return Stream(stream.name, stream.tasks, phases, stream.reveals)


def joint(stream: Stream) -> Stream:
    """Protocol ``joint``: all tasks that the stream visits at once, for the sum of all budgets."""
    visited = tuple(t.name for t in stream.trained)
    return Stream(stream.name, stream.tasks, (Phase(visited, sum(p.budget for p in stream.phases)),), stream.reveals)
