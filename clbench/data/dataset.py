"""Offline data as flat tensors, and the goal sampler of offline goal-conditioned RL.

Layout: ``N`` transitions, episodes concatenated. Row ``i`` holds the observation and the action of one transition; the
observation after the last action of an episode is kept apart, so an episode of ``T`` actions has ``T + 1`` observations and
every row can be trained on::

    row              0   1   2  | 3   4        final_observations
    observations     s0  s1  s2 | s0  s1       s3 | s2
    actions          a0  a1  a2 | a0  a1
    episode          0   0   0  | 1   1
    final            2   2   2  | 4   4        (index of the last transition of the same episode)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clbench.errors import ConfigError, DataError


class Rendered:
    """Observations that are computed when they are indexed, for example pixels from stored positions.

    Behaves like a tensor ``(N, *shape)`` where that is cheap: ``[rows]``, ``len``, ``shape``, ``dtype``, ``device``.

    Args:
        name: key of :data:`clbench.data.RENDERERS`, for storage.
        columns: tensors ``(N, ...)`` from which a row is drawn.
        render: ``columns of B rows -> (B, *shape)``.
    """

    def __init__(self, name: str, columns: Mapping[str, Tensor], render: Callable[[Mapping[str, Tensor]], Tensor]):
        self.name, self.columns, self.render = name, dict(columns), render
        sample = render({k: v[:1] for k, v in self.columns.items()})
        self.shape = torch.Size([len(self), *sample.shape[1:]])
        self.dtype = sample.dtype

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: Any) -> Tensor:
        if isinstance(rows, int):
            return self[torch.tensor([rows], device=self.device)][0]
        return self.render({k: v[rows] for k, v in self.columns.items()})

    @property
    def device(self) -> torch.device:
        return next(iter(self.columns.values())).device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def to(self, device: Any) -> Rendered:
        return Rendered(self.name, {k: v.to(device) for k, v in self.columns.items()}, self.render)


Column = Tensor | Rendered
Observations = Column | dict[str, Column]


def map_obs(function: Callable[[Any], Any], obs: Any) -> Any:
    """Apply ``function`` to an observation tensor, or to each entry of an observation dict."""
    return {k: function(v) for k, v in obs.items()} if isinstance(obs, Mapping) else function(obs)


def _take(obs: Any, index: Tensor) -> Any:
    """Rows of an observation tensor or dict; keys that share a column share the result."""
    if not isinstance(obs, Mapping):
        return obs[index]
    taken = {id(column): column[index] for column in {id(c): c for c in obs.values()}.values()}
    return {k: taken[id(column)] for k, column in obs.items()}


def _pairwise(function: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    """Apply ``function`` to two observations, key by key; keys that share both operands share the result."""
    if not isinstance(a, Mapping):
        return function(a, b)
    made: dict[tuple[int, int], Tensor] = {}
    for k in a:
        pair = id(a[k]), id(b[k])
        if pair not in made:
            made[pair] = function(a[k], b[k])
    return {k: made[id(a[k]), id(b[k])] for k in a}


def _row_kinds(obs: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Key -> (shape of one row, dtype)."""
    columns = obs if isinstance(obs, Mapping) else {"": obs}
    return {k: (tuple(c.shape[1:]), str(c.dtype)) for k, c in columns.items()}


@dataclass(frozen=True)
class GoalSampling:
    """How goals are drawn (specification: OGBench's sampler).

    Args:
        p_current: probability that the goal is the state itself.
        p_trajectory: probability of a later state of the same episode.
        p_random: probability of any state of the data set. The three sum to 1.
        geometric: later states at a geometric distance (mean ``1 / (1 - discount)``) instead of uniformly.
        discount: of the geometric distance; the agent's own.
    """

    p_current: float = 0.0
    p_trajectory: float = 1.0
    p_random: float = 0.0
    geometric: bool = False
    discount: float = 0.99

    def __post_init__(self) -> None:
        p = (self.p_current, self.p_trajectory, self.p_random)
        if not (all(x >= 0 for x in p) and abs(sum(p) - 1) <= 1e-6):  # NaN fails too
            raise ConfigError(f"p_current, p_trajectory, p_random must be >= 0 and sum to 1, got {p}.")
        if not 0 <= self.discount < 1:
            raise ConfigError(f"discount must be in [0, 1), got {self.discount}.")


@dataclass(frozen=True)
class Batch:
    """``B`` transitions. ``observations`` has the keys of the environment, ``desired_goal`` included where goals are drawn.

    ``rewards`` and ``masks`` are relabelled by index equality of state and goal (0/1 and 1/0); all zeros and ones
    without goals.
    """

    index: Tensor
    observations: Any
    actions: Tensor
    next_observations: Any
    success: Tensor
    goal_index: Tensor | None = None
    task: Tensor | None = None

    @property
    def masks(self) -> Tensor:
        return 1.0 - self.success

    def rewards(self, negative: bool = True) -> Tensor:
        """Relabelled reward: -1 per step and 0 at the goal, or (``negative=False``) 0 per step and 1 at the goal."""
        return self.success - 1.0 if negative else self.success


@dataclass
class OfflineDataset:
    """Flat offline data on one device.

    Args:
        observations: tensor ``(N, ...)``, :class:`Rendered`, or a dict of those. Goal data have the keys ``observation``
            and ``achieved_goal`` (which may be the same tensor).
        actions: ``(N, A)`` float or ``(N,)`` int64.
        lengths: ``(E,)`` transitions per episode; they sum to ``N``.
        final_observations: like ``observations`` with ``E`` rows: the observation after each episode's last action;
            ``None`` where it does not exist (one-step supervised episodes).
        task: ``(N,)`` int64 task ids where revealed (joint training), else ``None``.
        name: for error messages.
        check: verify shapes and finiteness (skipped for slices of checked data).

    Raises:
        DataError: shapes that do not fit, empty episodes, NaN or infinite values (with the first bad row).
    """

    observations: Any
    actions: Tensor
    lengths: Tensor
    final_observations: Any = None
    task: Tensor | None = None
    name: str = "dataset"
    metadata: dict[str, Any] = field(default_factory=dict)
    check: dataclasses.InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        self.lengths = torch.as_tensor(self.lengths, dtype=torch.int64, device=self.actions.device)
        if check:
            self._check()
        ends = self.lengths.cumsum(0)
        self.episode = torch.repeat_interleave(torch.arange(len(self.lengths), device=self.device), self.lengths)
        self.starts = ends - self.lengths
        self.final = (ends - 1)[self.episode]
        self._window_starts: dict[int, Tensor] = {}

    def _check(self) -> None:
        n = len(self.actions)
        if len(self.lengths) == 0 or int(self.lengths.min()) < 1:
            raise DataError(f"Data set {self.name!r}: every episode needs at least one transition.")
        if int(self.lengths.sum()) != n:
            raise DataError(
                f"Data set {self.name!r}: episode lengths sum to {int(self.lengths.sum())}, but there are {n} actions."
            )
        parts = {"actions": (self.actions, n)}
        for kind, obs, rows in (
            ("observations", self.observations, n),
            ("final_observations", self.final_observations, len(self.lengths)),
        ):
            if obs is None:
                continue
            columns = obs if isinstance(obs, Mapping) else {"": obs}
            for key, column in columns.items():
                tensors = column.columns if isinstance(column, Rendered) else {"": column}
                for sub, tensor in tensors.items():
                    parts[".".join(p for p in (kind, key, sub) if p)] = (tensor, rows)
        for where, (tensor, rows) in parts.items():
            if len(tensor) != rows:
                raise DataError(f"Data set {self.name!r}: {where} has {len(tensor)} rows, expected {rows}.")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
                bad = ~torch.isfinite(tensor.reshape(rows, -1)).all(1)
                if bool(bad.any()):
                    raise DataError(
                        f"Data set {self.name!r}: {where} holds NaN or infinite values in {int(bad.sum())} rows, the first "
                        f"is row {int(bad.nonzero()[0])}; clean the data before training."
                    )
        if self.task is not None and len(self.task) != n:
            raise DataError(f"Data set {self.name!r}: task has {len(self.task)} rows, expected {n}.")
        if self.final_observations is not None:
            rows_of, last = _row_kinds(self.observations), _row_kinds(self.final_observations)
            if rows_of != last:
                raise DataError(
                    f"Data set {self.name!r}: final_observations must have the keys, shapes and dtypes of observations; "
                    f"got {last}, expected {rows_of}."
                )

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def device(self) -> torch.device:
        return self.actions.device

    @property
    def num_episodes(self) -> int:
        return len(self.lengths)

    @property
    def is_goal(self) -> bool:
        """Whether goals can be drawn (observations have an ``achieved_goal``)."""
        return isinstance(self.observations, Mapping) and "achieved_goal" in self.observations

    def to(self, device: Any) -> OfflineDataset:
        """The same data on another device."""

        moved: dict[int, Any] = {}  # keys that share a tensor keep sharing it

        def move_column(column: Any) -> Any:
            if id(column) not in moved:
                moved[id(column)] = column.to(device)
            return moved[id(column)]

        def move(obs: Any) -> Any:
            return None if obs is None else map_obs(move_column, obs)

        return OfflineDataset(
            move(self.observations), self.actions.to(device), self.lengths.to(device), move(self.final_observations),
            None if self.task is None else self.task.to(device), self.name, self.metadata, check=False,
        )  # fmt: skip

    # -- rows -------------------------------------------------------------------------------------------------------

    def observation(self, index: Tensor) -> Any:
        """Observations of rows ``index`` (B,)."""
        return _take(self.observations, index)

    def next_observation(self, index: Tensor) -> Any:
        """Observations after the actions of rows ``index`` (B,); of one-step data without one, the observation itself."""
        final = self.final[index]
        following = self.observation(torch.minimum(index + 1, final))
        if self.final_observations is None:
            return following
        last = index == final
        if index.device.type == "cpu":  # there are few: to look up, or to draw, the others in vain would cost more
            rows = last.nonzero()[:, 0]
            if len(rows) == 0:
                return following
            ends = _take(self.final_observations, self.episode[index[rows]])
            return _pairwise(lambda a, b: a.index_copy(0, rows, b), following, ends)
        ends = _take(self.final_observations, self.episode[index])
        return _pairwise(lambda a, b: torch.where(last.reshape(-1, *[1] * (a.ndim - 1)), b, a), following, ends)

    # -- windows ----------------------------------------------------------------------------------------------------

    def window_starts(self, length: int) -> Tensor:
        """Rows (M,) int64 from which an episode goes on for ``length`` actions and the observation after them.

        Raises:
            ConfigError: ``length`` is below 1.
            DataError: no episode is that long (with the length of the longest).
        """
        if length < 1:
            raise ConfigError(f"The length of a window must be at least 1 action, got {length}.")
        if length not in self._window_starts:
            row = torch.arange(len(self), device=self.device)
            unseen = self.final_observations is None  # the observation after the last action does not exist
            starts = (row + length - (0 if unseen else 1) <= self.final).nonzero()[:, 0]
            if len(starts) == 0:
                longest = int(self.lengths.max()) - unseen
                raise DataError(
                    f"Data set {self.name!r} has no window of {length} actions: the longest episode has {longest}; lower "
                    "the length of the sequences to train on."
                )
            self._window_starts[length] = starts
        return self._window_starts[length]

    def windows(self, starts: Tensor, length: int) -> tuple[Any, Tensor]:
        """Sequences of ``length`` actions from rows ``starts`` (B,), which must be of :meth:`window_starts`.

        Keys that share a column share the result, so rendered observations are drawn once.

        Returns:
            observations (B, length + 1, ...), tensor or dict, and actions (B, length, ...).
        """
        rows = starts[:, None] + torch.arange(length + 1, device=self.device)
        over = rows[:, -1] > self.final[starts]
        inside, episode = torch.minimum(rows, self.final[starts][:, None]), self.episode[starts]

        def gather(column: Tensor, final: Tensor | None) -> Tensor:
            values = column[inside]
            if final is not None:
                keep = over.reshape(-1, *[1] * (column.ndim - 1))
                values[:, -1] = torch.where(keep, final[episode], values[:, -1])
            return values

        def sequence(column: Any, final: Any) -> Tensor:
            if not isinstance(column, Rendered):
                return gather(column, final)
            parts = {k: gather(v, None if final is None else final.columns[k]) for k, v in column.columns.items()}
            drawn = column.render({k: v.flatten(0, 1) for k, v in parts.items()})
            return drawn.unflatten(0, (len(starts), length + 1))

        actions = self.actions[rows[:, :-1]]
        if not isinstance(self.observations, Mapping):
            return sequence(self.observations, self.final_observations), actions
        made: dict[tuple[int, int], Tensor] = {}
        observations = {}
        for key, column in self.observations.items():
            final = None if self.final_observations is None else self.final_observations[key]
            pair = id(column), id(final)
            if pair not in made:
                made[pair] = sequence(column, final)
            observations[key] = made[pair]
        return observations, actions

    # -- sampling ---------------------------------------------------------------------------------------------------

    def sample_index(self, batch_size: int, rng: torch.Generator) -> Tensor:
        """Rows (B,) uniform over all transitions."""
        return torch.randint(len(self), (batch_size,), generator=rng, device=self.device)

    def sample_goals(self, index: Tensor, sampling: GoalSampling, rng: torch.Generator) -> Tensor:
        """Goal rows (B,) for state rows ``index`` (B,).

        1. a random row, independent of the state;
        2. a row of the same episode after the state: ``min(i + k, final)`` with ``k`` geometric on {1, 2, ...}, or
           ``round(lo u + final (1 - u))`` with ``lo = min(i + 1, final)``;
        3. the trajectory row with probability ``p_trajectory / (1 - p_current)``, else the random row; then, by an
           independent coin, the state itself with probability ``p_current``.
        """
        size, device = index.shape, self.device
        # drawn whether it counts or not: other probabilities leave the other draws as they are
        rand = self.sample_index(len(index), rng)
        u = torch.rand(size, generator=rng, device=device, dtype=torch.float64)
        if sampling.p_current >= 1:
            return index.clone()
        coins = [torch.rand(size, generator=rng, device=device, dtype=torch.float64) for _ in range(2)]
        share = sampling.p_trajectory / (1 - sampling.p_current)
        goal = rand
        if share > 0:
            goal = self._later(index, u, sampling)
        if 0 < share < 1:
            goal = torch.where(coins[0] < share, goal, rand)
        return torch.where(coins[1] < sampling.p_current, index, goal) if sampling.p_current > 0 else goal

    def _later(self, index: Tensor, u: Tensor, sampling: GoalSampling) -> Tensor:
        """Rows (B,) of the same episode after ``index``, from uniform numbers ``u`` (B,)."""
        final = self.final[index]
        if sampling.geometric:
            # inverse CDF of the geometric distribution: k = floor(log(1 - u) / log(discount)) + 1
            k = torch.floor(torch.log1p(-u) / math.log(max(sampling.discount, 1e-12))).to(torch.int64) + 1
            return torch.minimum(index + k, final)
        low = torch.minimum(index + 1, final)
        return torch.round(low * u + final * (1 - u)).to(torch.int64)

    def sample(self, batch_size: int, rng: torch.Generator, goals: GoalSampling | None = None) -> Batch:
        """A random batch; with ``goals``, observations carry a ``desired_goal`` drawn as in :meth:`sample_goals`."""
        index = self.sample_index(batch_size, rng)
        return self.batch(index, None if goals is None else self.sample_goals(index, goals, rng))

    def batch(self, index: Tensor, goal_index: Tensor | None = None) -> Batch:
        """The batch of the given rows and goal rows."""
        obs, following = self.observation(index), self.next_observation(index)
        success = torch.zeros(index.shape, device=self.device)
        if goal_index is not None:
            if not self.is_goal:
                raise DataError(f"Data set {self.name!r} has no achieved_goal, so no goals can be drawn from it.")
            goal = self.observations["achieved_goal"][goal_index]
            obs, following = {**obs, "desired_goal": goal}, {**following, "desired_goal": goal}
            success = (index == goal_index).to(torch.float32)
        task = None if self.task is None else self.task[index]
        return Batch(index, obs, self.actions[index], following, success, goal_index, task)

    # -- joining ----------------------------------------------------------------------------------------------------

    @staticmethod
    def concatenate(parts: Sequence[OfflineDataset], name: str = "joint") -> OfflineDataset:
        """One data set of all parts (joint training). Parts must have the same keys, shapes and dtypes."""
        device = parts[0].device

        def join(columns: list[Any]) -> Any:
            kinds = {(type(c), tuple(c.shape[1:]), c.dtype, getattr(c, "name", None)) for c in columns}
            if len(kinds) > 1:
                raise DataError(f"Data sets {[p.name for p in parts]} cannot be joined: {sorted(map(str, kinds))}.")
            if isinstance(columns[0], Rendered):
                keys = columns[0].columns
                return Rendered(
                    columns[0].name, {k: torch.cat([c.columns[k] for c in columns]) for k in keys}, columns[0].render
                )
            return torch.cat([c.to(device) for c in columns])

        def join_obs(observations: list[Any]) -> Any:
            if all(o is None for o in observations):
                return None
            keys = {None if o is None else tuple(sorted(o)) if isinstance(o, Mapping) else "" for o in observations}
            if len(keys) > 1:
                raise DataError(
                    f"Data sets {[p.name for p in parts]} cannot be joined: their observations (or final observations) "
                    f"have different keys, {sorted(map(str, keys))}."
                )
            if isinstance(observations[0], Mapping):
                joined: dict[str, Any] = {}
                seen: dict[tuple[int, ...], Any] = {}  # keys that share a tensor keep sharing it
                for k in observations[0]:
                    key = tuple(id(o[k]) for o in observations)
                    seen.setdefault(key, None)
                    if seen[key] is None:
                        seen[key] = join([o[k] for o in observations])
                    joined[k] = seen[key]
                return joined
            return join(observations)

        task = None if any(p.task is None for p in parts) else torch.cat([p.task for p in parts])  # type: ignore[misc]
        return OfflineDataset(
            join_obs([p.observations for p in parts]), join([p.actions for p in parts]),
            torch.cat([p.lengths for p in parts]), join_obs([p.final_observations for p in parts]), task, name, check=False,
        )  # fmt: skip

    def with_task(self, task: int | None) -> OfflineDataset:
        """The same data with every row labelled as of ``task`` (or unlabelled)."""
        ids = None if task is None else torch.full((len(self),), task, dtype=torch.int64, device=self.device)
        return OfflineDataset(
            self.observations,
            self.actions,
            self.lengths,
            self.final_observations,
            ids,
            self.name,
            self.metadata,
            check=False,
        )
