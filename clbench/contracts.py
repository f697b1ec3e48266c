"""The contracts: what agents, tasks, streams, environments, world models and planners are to each other.

Axis letters, the same everywhere: ``B`` environments, ``T`` time, ``K`` samples, ``H`` horizon, ``A`` action size,
``D`` latent size, ``E`` ensemble members (or episodes of a data set), ``N`` transitions. Tensors are torch, batch first.
An observation is a tensor ``(B, ...)`` or a dict of such tensors; goal environments use the keys ``observation``,
``achieved_goal`` and ``desired_goal`` (Gymnasium-Robotics and Stable-Baselines3).

This module imports neither torch nor Gymnasium at run time, so ``import clbench`` stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from clbench.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import gymnasium
    import torch

    from clbench.data.dataset import OfflineDataset

    Observation = torch.Tensor | dict[str, torch.Tensor]

REQUIREMENTS = frozenset(
    {"dataset", "env", "goal", "task_id", "boundaries", "discrete", "continuous", "pixels", "state"}
)
Reveals = Literal["task_id", "boundaries", "nothing"]
REVEALS: tuple[Reveals, ...] = ("task_id", "boundaries", "nothing")


@dataclass(frozen=True)
class Spaces:
    """The Gymnasium spaces of one environment (not of the batch)."""

    observation: gymnasium.Space
    action: gymnasium.Space


@dataclass(frozen=True)
class TaskInfo:
    """What the stream reveals to the agent at a boundary; ``None`` for what it hides."""

    id: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class Experience:
    """What an agent learns from in one phase: an offline data set, a batched environment, or both."""

    dataset: OfflineDataset | None = None
    env: VectorEnv | None = None


@dataclass(frozen=True)
class TaskList:
    """A frozen list of evaluation episodes, the same for every method.

    Episode ``i`` is started with ``env.reset(seed=seeds[i], options={key: column[i] for each option})``.

    Args:
        name: identifies the list and its version, for example ``"two-rooms-v1"``.
        seeds: one seed per episode.
        options: columns of reset options (start, goal, index of an example, ...), each as long as ``seeds``.
    """

    name: str
    seeds: tuple[int, ...]
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(int(s) for s in self.seeds))
        object.__setattr__(self, "options", {k: _freeze(v) for k, v in self.options.items()})
        if not self.seeds:
            raise ConfigError(f"Evaluation list {self.name!r} has no episodes; give at least one seed.")
        for key, column in self.options.items():
            if not isinstance(column, tuple):
                raise ConfigError(
                    f"Evaluation list {self.name!r}: option {key!r} must be a column with one row per episode, got "
                    f"{column!r}."
                )
            if len(column) != len(self.seeds):
                raise ConfigError(
                    f"Evaluation list {self.name!r}: option {key!r} has {len(column)} rows for {len(self.seeds)} seeds; "
                    "give one row per episode."
                )

    def __len__(self) -> int:
        return len(self.seeds)

    @staticmethod
    def from_seeds(n: int, name: str | None = None, first: int = 1_000_000) -> TaskList:
        """``n`` episodes that differ only in the seed of ``reset``."""
        if n < 1:
            raise ConfigError(f"The number of evaluation episodes must be at least 1, got {n}.")
        return TaskList(name or f"seeds-{first}-{n}-v1", tuple(range(first, first + n)))

    def head(self, n: int | None) -> TaskList:
        """The first ``n`` episodes (all of them for ``None`` or a larger ``n``)."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise ConfigError(f"The number of evaluation episodes must be at least 1, got {n}.")
        return TaskList(f"{self.name}[:{n}]", self.seeds[:n], {k: v[:n] for k, v in self.options.items()})


def _freeze(column: Any) -> Any:
    """Lists, arrays and tensors as nested tuples of plain Python values."""
    if hasattr(column, "tolist"):
        column = column.tolist()
    is_column = isinstance(column, Sequence) and not isinstance(column, str | bytes)
    return tuple(_freeze(v) for v in column) if is_column else column


@dataclass(frozen=True)
class Metric:
    """How one evaluation episode becomes a score; 1 is perfect, 0 is the published floor.

    Args:
        kind: ``"success"`` (the environment's own ``info["is_success"]``, never ``terminated``) or ``"return"``.
        low: return that maps to 0 (``"return"`` only; fixed and published with the task).
        high: return that maps to 1.
        when: ``"end"`` reads success at the last step of the episode, ``"ever"`` counts it at any step.
    """

    kind: Literal["success", "return"] = "success"
    low: float = 0.0
    high: float = 1.0
    when: Literal["end", "ever"] = "end"

    def __post_init__(self) -> None:
        if self.kind not in ("success", "return"):
            raise unknown_name("metric", str(self.kind), ("success", "return"))
        if self.when not in ("end", "ever"):
            raise unknown_name("metric.when", str(self.when), ("end", "ever"))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ConfigError(f"Metric bounds must be finite with low < high, got low={self.low}, high={self.high}.")


@dataclass(frozen=True)
class Task:
    """What a task is: an environment, its training data, and how it is evaluated.

    Args:
        name: unique within the stream.
        env_id: a Gymnasium id.
        env_kwargs: keyword arguments of the environment (plain values, so that the stream can be stored).
        dataset_id: name of an offline data set (``name?key=value&...``), or ``None``.
        evaluation: frozen list of evaluation episodes.
        metric: ``"success"``, ``"return"`` or a :class:`Metric`.
    """

    name: str
    env_id: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dataset_id: str | None = None
    evaluation: TaskList = field(default_factory=lambda: TaskList.from_seeds(20))
    metric: Metric | str = field(default_factory=Metric)

    def __post_init__(self) -> None:
        if isinstance(self.metric, str):
            object.__setattr__(self, "metric", Metric(self.metric))  # type: ignore[arg-type]
        object.__setattr__(self, "env_kwargs", dict(self.env_kwargs))


def is_positive_whole(value: Any) -> bool:
    """Whether ``value`` is a whole number of at least 1 (``10.0`` is, ``True``, text, NaN and infinity are not)."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and float(value) >= 1 and float(value).is_integer()


@dataclass(frozen=True)
class Phase:
    """A stretch of training on one task (or, in joint training, on several at once).

    Args:
        task: name of a task of the stream, or a tuple of names.
        budget: units to train for: environment steps if an environment drives the experience, else gradient updates.
        visit: how often the task has been trained so far, this phase included (1 = first visit).
    """

    task: str | tuple[str, ...]
    budget: int
    visit: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.task, list):
            object.__setattr__(self, "task", tuple(self.task))
        if not is_positive_whole(self.budget):
            raise ConfigError(f"The budget of a phase must be a positive whole number, got {self.budget!r}.")
        object.__setattr__(self, "budget", int(self.budget))  # a NumPy integer could not be stored

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.task,) if isinstance(self.task, str) else self.task


@dataclass(frozen=True)
class Stream:
    """A pure schedule of phases over a table of tasks. Which task comes now, and what a task is, are separate.

    Args:
        name: for reports.
        tasks: the table of tasks.
        phases: what is trained when.
        reveals: what the agent is told: ``"task_id"`` (at boundaries, in joint data and at test time),
            ``"boundaries"`` (that something changed, not what) or ``"nothing"``.
    """

    name: str
    tasks: tuple[Task, ...]
    phases: tuple[Phase, ...]
    reveals: Reveals = "boundaries"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "phases", tuple(self.phases))
        if self.reveals not in REVEALS:
            raise unknown_name("value of reveals", str(self.reveals), REVEALS)
        names = [t.name for t in self.tasks]
        if not names or not self.phases:
            raise ConfigError(f"Stream {self.name!r} needs at least one task and one phase.")
        if len(set(names)) != len(names):
            raise ConfigError(f"Stream {self.name!r} has two tasks of the same name: {names}.")
        for phase in self.phases:
            if not phase.tasks:
                raise ConfigError(f"Stream {self.name!r} has a phase without a task.")
            for name in phase.tasks:
                if name not in names:
                    raise unknown_name("task", name, names, where=f"stream {self.name!r}")

    @property
    def trained(self) -> tuple[Task, ...]:
        """The tasks that some phase trains; the others are only evaluated."""
        visited = {name for phase in self.phases for name in phase.tasks}
        return tuple(task for task in self.tasks if task.name in visited)

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UnknownNameError: with the nearest names of the table.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise unknown_name("task", name, [t.name for t in self.tasks], where=f"stream {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; :meth:`from_dict` gives an equal stream back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Stream:
        def task(d: Mapping[str, Any]) -> Task:
            return Task(**{**d, "evaluation": TaskList(**d["evaluation"]), "metric": Metric(**d["metric"])})

        return Stream(
            data["name"],
            tuple(task(t) for t in data["tasks"]),
            tuple(Phase(**p) for p in data["phases"]),
            data["reveals"],
        )


@runtime_checkable
class VectorEnv(Protocol):
    """A batch of ``B`` environments that speaks torch tensors on ``device``. Made by :func:`clbench.make_env`.

    ``autoreset`` is ``"same_step"`` (training: a finished row is reset inside the step; the last observation of the
    episode is ``info["final_obs"]``, dense, valid where ``info["_final_obs"]``) or ``"disabled"`` (evaluation: the caller
    resets rows with ``reset(options={"reset_mask": mask, ...})``; finished rows may be stepped on, their results mean
    nothing).

    ``info["is_success"]`` (B,) bool is there whenever the environment defines success; for a row that ends in this step it
    speaks of the episode that ended.
    """

    num_envs: int
    device: torch.device
    autoreset: str
    max_episode_steps: int | None
    single_observation_space: gymnasium.Space
    single_action_space: gymnasium.Space

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """-> (observation, info).

        ``seed`` int: seeds the whole batch, row ``i``'s episodes are a function of (seed, i). A sequence: one seed per row,
        and row ``i``'s episode is then a function of ``seed[i]`` alone (evaluation lists). ``options`` may hold
        ``reset_mask`` (B,) bool (only these rows are reset) and columns with one entry per row.
        """
        ...

    def step(self, actions: Any) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        """``actions`` (B, A) float or (B,) int64 -> (observation, reward (B,) float32, terminated (B,) bool,
        truncated (B,) bool, info)."""
        ...

    def render(self) -> Any:
        """(B, H, W, 3) uint8 pictures of all rows, as a NumPy array."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which :meth:`load_state_dict` continues bit for bit, in the middle of episodes."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Agent(ABC):
    """What the loop needs of any learner.

    Class attributes:
        requires: what the agent cannot do without, of :data:`REQUIREMENTS`. The loop checks it against the stream at
            start-up. An agent that names neither ``"dataset"`` nor ``"env"`` gets the data set where the task has one, else
            the environment.
        Config: a dataclass whose fields all have defaults; unknown keys are errors.
    """

    requires: ClassVar[frozenset[str]] = frozenset()

    @dataclass
    class Config:
        """No options."""

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        self.spaces = spaces
        self.config = config
        self.device = device

    @abstractmethod
    def act(
        self,
        obs: Any,
        memory: Any,
        first: torch.Tensor,
        *,
        rng: torch.Generator,
        task: torch.Tensor | None = None,
        explore: bool = False,
    ) -> tuple[torch.Tensor, Any]:
        """-> (actions (B, A) float32 or (B,) int64, memory). Must change nothing in the agent.

        ``first`` (B,) bool marks rows that begin an episode; ``memory`` is the agent's own per-episode state (planner warm
        start, recurrent state), ``None`` on the first call; ``task`` (B,) int64 are the task ids where the stream reveals
        them at test time, else ``None``.
        """

    @abstractmethod
    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """Consume ``budget`` units (environment steps if ``experience.env`` drives it, else gradient updates).

        Yields metrics often. Each yield counts as one unit, unless the mapping holds ``"step"``: the units consumed since
        this call began. Between yields the loop may evaluate, call ``state_dict`` or stop for good; after
        ``load_state_dict`` it calls ``learn`` again with the rest of the budget and the same ``rng`` state. So at every
        yield all that matters for the future must be in the state, not in local variables.
        """

    def start_task(self, task: TaskInfo) -> None:
        """A boundary: called before ``learn`` unless the stream reveals nothing."""

    def finish_task(self) -> None:
        """The other side of the boundary: called after ``learn`` unless the stream reveals nothing."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything: weights, optimiser, buffers, masks, normalisers. Tensors and plain Python values only."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken. Must not keep references to ``state``'s tensors."""


class Stepper(Protocol):
    """Resident buffers in which a world model moves ``rows`` latents: the fast path of planning.

    A world model offers it by a method ``stepper(rows)``, called anew for each plan, so that the weights are those of that
    moment. With an optional keyword ``dtype`` it computes in that precision. See :mod:`clbench.planners.steppers` for
    building blocks. An optional method ``pack()`` copies the weights again, in place.
    """

    def load(self, z: torch.Tensor) -> None:
        """Begin at latents (rows, *latent)."""
        ...

    def step(self, action: torch.Tensor) -> torch.Tensor:
        """(rows, A) -> the next latents (rows, *latent): a view that is valid until the next step."""
        ...


class WorldModel(Protocol):
    """A learned model of the environment in a latent space. Planners see this and nothing else.

    Latents have any shape. Actions are in the units of the environment. The members of an ensemble are the first axis of
    the latent: ``encode`` repeats over them and ``predict`` moves each by its own network. An optional method
    ``stepper(rows) -> Stepper`` makes planning fast.
    """

    def encode(self, obs: Any) -> torch.Tensor:
        """(B, ...) -> (B, D...)."""
        ...

    def predict(self, z: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """One step: (..., D), (..., A) -> (..., D)."""
        ...


class Objective(Protocol):
    """A cost to be minimised, accumulated inside the rollout.

    Where it holds data per environment (goals), an optional method ``select(rows) -> Objective`` (rows: a slice or int64
    indices) gives the objective of some environments; without it all are rolled out together.
    """

    def __call__(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """(B, K, D) after ``step`` actions (1 after the first) -> cost (B, K)."""
        ...


class Planner(Protocol):
    """Searches action sequences in a world model."""

    def plan(
        self, model: WorldModel, z: torch.Tensor, objective: Objective, memory: Any, *, rng: torch.Generator
    ) -> tuple[torch.Tensor, Any]:
        """Latents (B, D) -> (actions (B, H, A), memory for the warm start).

        ``memory`` is ``None`` at first, then what the last call returned; the planner changes neither it nor ``z``.
        """
        ...
