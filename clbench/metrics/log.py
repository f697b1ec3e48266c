"""The raw log of a run, ``eval.csv``: one row per evaluated episode. Every metric is a pure function of it.

An *evaluation* is the set of rows with the same (phase, step, task). It is complete if it holds every episode that any
evaluation of that task holds: evaluation lists are frozen, so a shorter one was interrupted. The score of an incomplete
evaluation is NaN, never the mean of the episodes that happen to be there.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clbench.contracts import Phase
from clbench.errors import DataError

HEADER = ("phase", "visit", "step", "task", "episode", "score", "return", "length")


@dataclass(frozen=True)
class Evaluation:
    """One task evaluated once.

    ``mean`` and ``standard_error`` (of the mean over episodes, ``s / sqrt(n)``) are NaN if the evaluation is
    incomplete; ``standard_error`` is NaN for a single episode too.
    """

    phase: int
    step: int
    task: str
    episodes: int
    expected: int
    mean: float
    standard_error: float

    @property
    def complete(self) -> bool:
        return self.episodes == self.expected


class EvalLog:
    """The columns of ``eval.csv`` as NumPy arrays ``(N,)``, in canonical order (phase, step, task, episode).

    The order of the rows in the file has no meaning: logs with the same rows are equal, bit for bit.

    Args:
        phase, visit, step, episode, length: int64 (N,).
        task: names (N,).
        score, return_: float64 (N,), finite.
        source: where the log comes from, for messages.

    Raises:
        DataError: columns of different length, an episode that was counted twice, or steps that run backwards.
    """

    def __init__(
        self,
        *,
        phase: Any,
        visit: Any,
        step: Any,
        task: Any,
        episode: Any,
        score: Any,
        return_: Any,
        length: Any,
        source: str = "evaluation log",
    ):
        integers = [np.asarray(c, dtype=np.int64).reshape(-1) for c in (phase, visit, step, episode, length)]
        floats = [np.asarray(c, dtype=np.float64).reshape(-1) for c in (score, return_)]
        names = np.asarray(task, dtype=np.str_).reshape(-1)
        if len({len(c) for c in (*integers, *floats, names)}) != 1:
            raise DataError(f"{source}: the columns have different lengths; give one entry per evaluated episode.")
        order = np.lexsort((integers[3], names, integers[2], integers[0]))
        self.phase, self.visit, self.step, self.episode, self.length = (c[order] for c in integers)
        self.score, self.return_ = (c[order] for c in floats)
        self.task = names[order]
        self.source = source
        self._check()

    @staticmethod
    def from_rows(rows: Iterable[Sequence[Any]], source: str = "evaluation log") -> EvalLog:
        """A log from rows in the order of :data:`HEADER`."""
        columns = list(zip(*rows, strict=True)) or [()] * len(HEADER)
        if len(columns) != len(HEADER):
            raise DataError(f"{source}: rows have {len(columns)} fields, expected {len(HEADER)}: {', '.join(HEADER)}.")
        named = dict(zip(HEADER, columns, strict=True))
        return EvalLog(**{"return_" if k == "return" else k: v for k, v in named.items()}, source=source)

    def __len__(self) -> int:
        return len(self.phase)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EvalLog):
            return NotImplemented
        return all(np.array_equal(a, b) for a, b in zip(self._columns(), other._columns(), strict=True))

    __hash__ = None  # type: ignore[assignment]

    def _columns(self) -> tuple[np.ndarray, ...]:
        return (self.phase, self.visit, self.step, self.task, self.episode, self.score, self.return_, self.length)

    def _check(self) -> None:
        if len(self) < 2:
            return
        key = [c[1:] == c[:-1] for c in (self.phase, self.step, self.task, self.episode)]
        twice = np.flatnonzero(np.logical_and.reduce(key))
        if len(twice):
            i = int(twice[0])
            raise DataError(
                f"{self.source}: episode {self.episode[i]} of task {str(self.task[i])!r} is there twice at phase "
                f"{self.phase[i]}, step {self.step[i]}; each listed episode counts exactly once. Remove the duplicate "
                "rows or run again."
            )
        phases = np.unique(self.phase)
        for before, after in zip(phases[:-1], phases[1:], strict=True):
            end, start = self.step[self.phase == before].max(), self.step[self.phase == after].min()
            if start < end:
                raise DataError(
                    f"{self.source}: phase {after} begins at step {start}, before the end of phase {before} at step "
                    f"{end}; steps count from the start of the run. The log is mixed up; run again."
                )

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of all evaluated tasks, sorted."""
        return tuple(str(t) for t in np.unique(self.task))

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """All evaluations in the order (phase, step, task)."""
        expected = {t: len(np.unique(self.episode[self.task == t])) for t in self.tasks}
        new = np.ones(len(self), dtype=bool)
        new[1:] = np.logical_or.reduce([c[1:] != c[:-1] for c in (self.phase, self.step, self.task)])
        starts = np.flatnonzero(new)
        ends = np.append(starts, len(self))[1:]
        return tuple(self._evaluation(int(a), int(b), expected) for a, b in zip(starts, ends, strict=True))

    def _evaluation(self, start: int, end: int, expected: dict[str, int]) -> Evaluation:
        task, n, scores = str(self.task[start]), end - start, self.score[start:end]
        complete = n == expected[task]
        return Evaluation(
            phase=int(self.phase[start]),
            step=int(self.step[start]),
            task=task,
            episodes=n,
            expected=expected[task],
            mean=float(scores.mean()) if complete else math.nan,
            standard_error=float(scores.std(ddof=1) / math.sqrt(n)) if complete and n > 1 else math.nan,
        )

    @property
    def incomplete(self) -> tuple[Evaluation, ...]:
        """Evaluations that lack episodes; they count as missing."""
        return tuple(e for e in self.evaluations if not e.complete)

    def curve(self, task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> steps int64 (N,), mean score (N,), standard error (N,) of every evaluation of ``task``, in time order."""
        rows = [e for e in self.evaluations if e.task == task]
        return (
            np.array([e.step for e in rows], dtype=np.int64),
            np.array([e.mean for e in rows], dtype=np.float64),
            np.array([e.standard_error for e in rows], dtype=np.float64),
        )

    def matrix(self, tasks: Sequence[str], phases: int | Sequence[Phase]) -> np.ndarray:
        """The performance matrix (P+1, T), see :func:`matrix`."""
        return matrix(self, tasks, phases)


@dataclass(frozen=True)
class Table:
    """Scores of all tasks at all evaluation times: ``phase`` (N,), ``step`` (N,), ``scores`` (N, T), NaN = missing."""

    phase: np.ndarray
    step: np.ndarray
    scores: np.ndarray


def score_table(log: EvalLog, tasks: Sequence[str]) -> Table:
    """``p_j(t)`` for every evaluation time ``t`` of the log and every task ``j`` of ``tasks``.

    Raises:
        DataError: the log holds a task that is not in ``tasks``.
    """
    unknown = sorted(set(log.tasks) - set(tasks))
    if unknown:
        raise DataError(
            f"{log.source}: evaluated task {unknown[0]!r} is not a task of the stream ({', '.join(tasks)}); "
            "the log and the configuration do not belong together."
        )
    column = {name: j for j, name in enumerate(tasks)}
    times = sorted({(e.phase, e.step) for e in log.evaluations})
    row = {time: i for i, time in enumerate(times)}
    scores = np.full((len(times), len(tasks)), np.nan)
    for e in log.evaluations:
        scores[row[e.phase, e.step], column[e.task]] = e.mean
    phase, step = np.array(times, dtype=np.int64).reshape(-1, 2).T
    return Table(phase, step, scores)


def matrix(log: EvalLog, tasks: Sequence[str], phases: int | Sequence[Phase]) -> np.ndarray:
    """The performance matrix ``R`` (P+1, T): row 0 before training, row i at the last evaluated step of phase i.

    Entries are means over episodes, NaN where the task was not evaluated (completely) at that step. Given the phases
    themselves and not only their number, rows of phases that did not finish, or whose end was not evaluated, are NaN too
    (see :func:`finished_phases`): a score from the middle of a phase is not the one at its end.
    """
    table = score_table(log, tasks)
    count, finished = (phases, phases) if isinstance(phases, int) else (len(phases), finished_phases(log, phases))
    ends = [0] * (count + 1) if isinstance(phases, int) else phase_ends(log, phases)
    result = np.full((count + 1, len(tasks)), np.nan)
    for i in range(finished + 1):
        rows = np.flatnonzero((table.phase == i) & (table.step >= ends[i]))
        if len(rows):
            result[i] = table.scores[rows[-1]]
    return result


def phase_ends(log: EvalLog, phases: Sequence[Phase]) -> list[int]:
    """The step at which each phase ends (P+1 of them, the first is 0), evaluated or not.

    A phase ends its budget after its start, or at its last evaluation if that is later: learners that round a budget up
    to whole rollouts are counted right.
    """
    ends = [0]
    for i, phase in enumerate(phases, start=1):
        steps = log.step[log.phase == i]
        ends.append(max(ends[-1] + phase.budget, int(steps.max()) if len(steps) else 0))
    return ends


def finished_phases(log: EvalLog, phases: Sequence[Phase]) -> int:
    """How many phases, from the first, have been trained and evaluated to their end.

    A phase is finished if a later one has rows, or if its end was evaluated (see :func:`phase_ends`).
    """
    ends = phase_ends(log, phases)
    last = int(log.phase.max()) if len(log) else 0
    for i in range(1, len(phases) + 1):
        if last <= i and not (log.step[log.phase == i] >= ends[i]).any():
            return i - 1
    return len(phases)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError("a whole number >= 0")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def _name(text: str) -> str:
    if not text:
        raise ValueError("a name")
    return text


_KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "phase": (_count, "a whole number >= 0"),
    "visit": (_count, "a whole number >= 0"),
    "step": (_count, "a whole number >= 0"),
    "task": (_name, "a name"),
    "episode": (_count, "a whole number >= 0"),
    "score": (_number, "a finite number"),
    "return": (_number, "a finite number"),
    "length": (_count, "a whole number >= 0"),
}


def read_eval_csv(path: str | Path) -> EvalLog:
    """Read ``eval.csv``; every row is checked and nothing is skipped.

    Raises:
        DataError: the file is missing, has another header, is cut off, or a row has a wrong field; names file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Cannot read the evaluation log {path}: {error}.") from error
    if not text:
        raise DataError(f"{path} is empty; expected the header {','.join(HEADER)}.")
    if not text.endswith("\n"):
        raise DataError(
            f"{path}, line {text.count(chr(10)) + 1}: the last line is cut off; resume the run to repair it."
        )
    reader = csv.reader(text.splitlines(keepends=True), strict=True)
    rows = []
    try:
        header = tuple(next(reader))
        if header != HEADER:
            raise DataError(f"{path}, line 1: the header is {','.join(header)!r}, expected {','.join(HEADER)!r}.")
        for row in reader:
            rows.append(_parse_row(row, path, reader.line_num))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error
    return EvalLog.from_rows(rows, source=str(path))


def _parse_row(row: list[str], path: Path, line: int) -> list[Any]:
    if len(row) != len(HEADER):
        raise DataError(f"{path}, line {line}: {len(row)} fields, expected {len(HEADER)} ({','.join(HEADER)}).")
    values = []
    for name, text in zip(HEADER, row, strict=True):
        parse, expected = _KINDS[name]
        try:
            values.append(parse(text))
        except ValueError:
            raise DataError(f"{path}, line {line}: {name} must be {expected}, got {text!r}.") from None
    return values
