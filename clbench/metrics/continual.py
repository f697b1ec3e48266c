"""Continual-learning metrics as pure functions, defined by visits so that they stay right when tasks recur.

Notation (the same in docs/metrics.md). There are ``P`` phases and ``T`` tasks; ``p_j(t)`` is the mean evaluation score
of task ``j`` at step ``t``. ``R[i, j]`` is ``p_j`` at the end of phase ``i``, and ``R[0, j]`` before any training.
``a_j`` is the first phase that trains task ``j`` (its first visit) and ``l_j`` the last one. ``V`` is the set of
visited tasks; ``E`` (exposed) those with ``l_j < P``: something else was trained after them. If every task is visited
once, in order, then ``P = T``, ``a_j = l_j = j``, ``E = {1..T-1}``, and each formula is the one of the cited paper.

Conventions, without exception:

* Tasks that no finished phase visits are left out; :func:`unvisited` names them.
* A missing evaluation that a metric needs makes it ``None``; it is never averaged away. A score of 0 is a score.
* A mean over no tasks is ``None`` (forgetting of a single task, say).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clbench.contracts import Phase
from clbench.errors import DataError
from clbench.metrics.log import EvalLog, finished_phases, matrix, phase_ends, score_table

AUC_HEADROOM = 0.05
"""Smallest denominator of forward transfer; without it a good reference makes the ratio explode."""


@dataclass(frozen=True)
class Visits:
    """When each task was trained: ``first`` and ``last`` (T,) int64 count phases from 1, 0 = never."""

    first: np.ndarray
    last: np.ndarray
    count: int

    @property
    def visited(self) -> np.ndarray:
        """(T,) bool: the set ``V``."""
        return self.first > 0

    @property
    def exposed(self) -> np.ndarray:
        """(T,) bool: the set ``E`` of tasks after whose last visit something else was trained."""
        return self.visited & (self.last < self.count)


def find_visits(tasks: Sequence[str], phases: Sequence[Phase]) -> Visits:
    """First and last visit of each of ``tasks`` in ``phases``."""
    first, last = np.zeros((2, len(tasks)), dtype=np.int64)
    for j, name in enumerate(tasks):
        numbers = [i for i, phase in enumerate(phases, start=1) if name in phase.tasks]
        if numbers:
            first[j], last[j] = numbers[0], numbers[-1]
    return Visits(first, last, len(phases))


def unvisited(tasks: Sequence[str], phases: Sequence[Phase]) -> tuple[str, ...]:
    """Names of the tasks that no phase trains; the metrics leave them out."""
    return tuple(t for t, v in zip(tasks, find_visits(tasks, phases).visited, strict=True) if not v)


def _mean(values: np.ndarray) -> float | None:
    """The mean; ``None`` if there is nothing to average or anything is missing."""
    return None if values.size == 0 or np.isnan(values).any() else float(values.mean())


def average_performance(r: np.ndarray, visits: Visits) -> float | None:
    """``ACC = mean_{j in V} R[P, j]``: mean final score. Lopez-Paz & Ranzato 2017 (GEM), eq. 2.

    Args:
        r: performance matrix (P+1, T).
    """
    return _mean(r[visits.count, visits.visited])


def average_incremental(r: np.ndarray, visits: Visits) -> float | None:
    """``AIA = (1/P) sum_i mean_{j: 1 <= a_j <= i} R[i, j]``: mean over phases of the score on the tasks seen so far.

    Rebuffi et al. 2017 (iCaRL).
    """
    rows = [r[i, visits.visited & (visits.first <= i)].mean() for i in range(1, visits.count + 1)]
    return _mean(np.array(rows))


def learning_accuracy(r: np.ndarray, visits: Visits) -> float | None:
    """``LA = mean_{j in V} R[a_j, j]``: score right after a task was first trained. Riemer et al. 2019 (MER)."""
    tasks = np.flatnonzero(visits.visited)
    return _mean(r[visits.first[tasks], tasks])


def forgetting(r: np.ndarray, visits: Visits) -> float | None:
    """``F = mean_{j in E} (max_{a_j <= i < P} R[i, j] - R[P, j])``: best earlier score minus the final one.

    Negative if tasks end better than they ever were. The final row is not part of the maximum (else F >= 0 always), nor
    is what was measured before a task's first visit. Chaudhry et al. 2018 (RWalk), whose ``a_{k,j}`` has ``j <= k``.
    """
    falls = [r[visits.first[j] : visits.count, j].max() - r[visits.count, j] for j in np.flatnonzero(visits.exposed)]
    return _mean(np.array(falls))


def backward_transfer(r: np.ndarray, visits: Visits) -> float | None:
    """``BWT = mean_{j in E} (R[P, j] - R[l_j, j])``: what later training did to a task; negative = forgetting.

    Counted from the *last* visit, because a change across visits of the task itself is not transfer from others.
    Lopez-Paz & Ranzato 2017 (GEM), eq. 3.
    """
    tasks = np.flatnonzero(visits.exposed)
    return _mean(r[visits.count, tasks] - r[visits.last[tasks], tasks])


def zero_shot_transfer(r: np.ndarray, visits: Visits) -> float | None:
    """``ZST = mean_{j: a_j >= 2} (R[a_j - 1, j] - R[0, j])``: gain on a task before it is ever trained.

    The baseline ``b_j`` is the untrained agent of the same run, row 0, not the current one. Lopez-Paz & Ranzato 2017
    (GEM), eq. 4, there called FWT.
    """
    tasks = np.flatnonzero(visits.first >= 2)
    if np.isnan(r[0, tasks]).any():  # there was no evaluation before training
        return None
    return _mean(r[visits.first[tasks] - 1, tasks] - r[0, tasks])


def intransigence(r: np.ndarray, visits: Visits, best: np.ndarray) -> float | None:
    """``I = mean_{j in V} (p*_j - R[a_j, j])``: how far new tasks stay below ``p*``. Chaudhry et al. 2018 (RWalk).

    Theirs is the ``p*_j`` of a model trained on tasks 1 to j together. Here it is whatever ``best`` holds;
    :func:`compute_metrics` takes the final score of the single-task reference (:func:`reference_scores`), so that
    ``I = mean_j p*_j - LA``. The final scores of a run of protocol ``joint`` (all T tasks together) may be given as well.

    Args:
        r: performance matrix (P+1, T).
        best: ``p*`` (T,), NaN where it is not known.
    """
    tasks = np.flatnonzero(visits.visited)
    return _mean(best[tasks] - r[visits.first[tasks], tasks])


def warm_start_gap(r: np.ndarray, visits: Visits, fresh: np.ndarray) -> float | None:
    """``G = mean_{j: a_j >= 2} (fresh_j - R[a_j, j])``: what a fresh network reaches beyond the trained one.

    Both after the same training on the same new task. The first task is left out: there the two are the same network.
    Ash & Adams 2020 (On warm-starting neural network training), whose second task holds the data of the first.

    Args:
        r: performance matrix (P+1, T).
        fresh: final scores (T,) of a fresh agent on each task alone, see :func:`reference_scores`.
    """
    tasks = np.flatnonzero(visits.first >= 2)
    return _mean(fresh[tasks] - r[visits.first[tasks], tasks])


def reference_scores(reference: EvalLog, tasks: Sequence[str]) -> np.ndarray:
    """(T,) final score of each task in a run of protocol ``independent``; NaN for tasks that it did not train.

    Raises:
        DataError: a task is evaluated in several training phases, as no such run does.
    """
    trained = {e.task for e in reference.evaluations if e.phase > 0}
    return np.array([_reference_points(reference, t)[-1][1] if t in trained else np.nan for t in tasks])


@dataclass(frozen=True)
class Relearning:
    """Of each task that came back: ``first`` and ``again``, the steps to its target score, both (N,).

    Where ``censored`` (N,) the last visit ended before the score was regained: ``again`` is its whole budget, and the
    true number is larger.
    """

    tasks: tuple[str, ...]
    first: np.ndarray
    again: np.ndarray
    censored: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """``again / first`` (N,); at least that where censored."""
        return self.again / self.first

    @property
    def median_ratio(self) -> float | None:
        """Median of the ratios by the estimate of Kaplan & Meier 1958, which knows that censored ones are larger.

        ``None`` where so many are censored that it is not known, or where there are none.
        """
        survival = 1.0
        for value in np.unique(self.ratio[~self.censored]):
            at_risk = (self.ratio >= value).sum()
            survival *= 1 - ((self.ratio == value) & ~self.censored).sum() / at_risk
            if survival <= 0.5 + 1e-12:
                return float(value)
        return None


def relearning(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> Relearning | None:
    """Steps to regain ``R[a_j, j]`` in the last visit of ``j``, beside the steps that it took in the first one.

    Tasks that something else was trained between the first and the last visit of. Steps count from the start of the
    visit, whose evaluation is that at the end of the phase before, to the first evaluation that reaches the score; so
    their resolution is ``eval_every``. Tasks whose first visit had nothing to learn (the score was there at its start)
    are left out. ``None`` where an evaluation is missing.
    """
    finished = finished_phases(log, phases)
    done, ends = phases[:finished], phase_ends(log, phases)
    visits = find_visits(tasks, done)
    names, first, again, censored = [], [], [], []
    for name, a, last in zip(tasks, visits.first.tolist(), visits.last.tolist(), strict=True):
        if not any(name not in p.tasks for p in done[a:last]):
            continue
        start = last
        while name in done[start - 2].tasks:  # phases without a break are one visit
            start -= 1
        before = _phase_points(log, name, a, ends[a - 1])
        parts = [_phase_points(log, name, p, ends[start - 1]) for p in range(start, last + 1)]
        after = [point for part in parts for point in part]
        scores = np.array([score for _, score in before + after])
        starts = before[:1] + after[:1]
        if [step for step, _ in starts] != [0, 0] or before[-1][0] < ends[a] - ends[a - 1] or np.isnan(scores).any():
            return None
        target = before[-1][1]
        needed = next(step for step, score in before if score >= target)
        if needed == 0:
            continue
        regained = [step for step, score in after if score >= target]
        names.append(name)
        first.append(needed)
        again.append(regained[0] if regained else after[-1][0])
        censored.append(not regained)
    return Relearning(tuple(names), np.array(first, float), np.array(again, float), np.array(censored, bool))


def relearning_savings(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> float | None:
    """``S = 1 - median_j (steps to R[a_j, j] in the last visit / steps to it in the first)``, of tasks that came back.

    Savings of relearning (Ebbinghaus 1885), see :func:`relearning`: 1 if nothing was forgotten, 0 if a task is learned as
    slowly as at first, below 0 if slower. A median that knows of censored values, never a mean of them; ``None`` where it
    is not known.
    """
    found = relearning(log, tasks, phases)
    median = None if found is None else found.median_ratio
    return None if median is None else 1 - median


def performance_over_time(log: EvalLog, tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """-> steps int64 (N,) and ``P(t) = (1/T) sum_j p_j(t)`` (N,), over *all* tasks; NaN where one was not evaluated.

    Wolczyk et al. 2021 (Continual World).
    """
    table = score_table(log, tasks)
    return table.step, table.scores.mean(axis=1) if len(tasks) else np.full(len(table.step), np.nan)


def anytime_average(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> float | None:
    """``A = mean_{t > 0} mean_{j: a_j <= phase(t)} p_j(t)``: mean over evaluation times of the score on the tasks seen.

    The task in training counts as seen. Times are weighted equally, so compare only runs with the same ``eval_every``.
    It is average incremental accuracy at every evaluation instead of at the end of phases only.
    """
    finished = finished_phases(log, phases)
    first = find_visits(tasks, phases[:finished]).first
    table = score_table(log, tasks)
    values = [
        row[(first > 0) & (first <= i)].mean()
        for i, row in zip(table.phase, table.scores, strict=True)
        if 1 <= i <= finished
    ]
    return _mean(np.array(values))


def min_performance(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> float | None:
    """``minACC = mean_{j in V, a_j < P} min_t p_j(t)`` over evaluations after the end of the first visit of ``j``.

    De Lange et al. 2023 (stability gap), min-ACC.
    """
    lows, _ = _lows(log, tasks, phases)
    return _mean(lows)


def worst_case_performance(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> float | None:
    """``WC = mean_{j in V} w_j``, ``w_j = R[P, j]`` if ``a_j = P`` else ``min_t p_j(t)`` as in :func:`min_performance`.

    With single visits this is ``(1/T) R[T, T] + (1 - 1/T) minACC``. De Lange et al. 2023 (stability gap), WC-ACC.
    """
    lows, fresh = _lows(log, tasks, phases)
    return _mean(np.concatenate([lows, fresh]))


def _lows(log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest score after the first visit of each task, and the final score of tasks first visited in the last phase."""
    finished = finished_phases(log, phases)
    visits = find_visits(tasks, phases[:finished])
    table = score_table(log, tasks)
    later = [
        table.scores[(table.phase > visits.first[j]) & (table.phase <= finished), j]
        for j in np.flatnonzero(visits.visited & (visits.first < finished))
    ]
    lows = [scores.min() if scores.size else np.nan for scores in later]
    fresh = matrix(log, tasks, phases)[finished, visits.visited & (visits.first == finished)]
    return np.array(lows), fresh


@dataclass(frozen=True)
class Transfer:
    """Forward transfer per visited task: ``auc`` and ``reference`` (areas, (V,)), and the names of the tasks."""

    tasks: tuple[str, ...]
    auc: np.ndarray
    reference: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """``AUC_j - AUC_j^ref`` (V,)."""
        return self.auc - self.reference

    @property
    def normalised(self) -> np.ndarray:
        """``(AUC_j - AUC_j^ref) / max(1 - AUC_j^ref, 0.05)`` (V,)."""
        return self.difference / np.maximum(1 - self.reference, AUC_HEADROOM)


def forward_transfer(
    log: EvalLog, tasks: Sequence[str], phases: Sequence[Phase], reference: EvalLog | None
) -> Transfer:
    """``FT_j = (AUC_j - AUC_j^ref) / max(1 - AUC_j^ref, 0.05)``: learning speed against a fresh learner.

    ``AUC_j = (1/D) int_0^D p_j(start_j + t) dt`` over the first visit of ``j``, ``D`` its budget, by the trapezoidal
    rule on the evaluations from the start of the phase to its end; ``AUC_j^ref`` likewise in the reference run
    (protocol ``independent``, same seed). Wolczyk et al. 2021 (Continual World); the floor of the denominator is ours.

    Raises:
        DataError: no reference, or evaluations are missing on either side.
    """
    if reference is None:
        raise DataError(
            "Forward transfer needs single-task reference runs (protocol independent, same agent, seed and budget); "
            "without them it is not defined."
        )
    finished = finished_phases(log, phases)
    first = find_visits(tasks, phases[:finished]).first
    names = tuple(t for t, i in zip(tasks, first, strict=True) if i > 0)
    ends = phase_ends(log, phases)
    auc, ref = [], []
    for name, i in ((t, int(i)) for t, i in zip(tasks, first, strict=True) if i > 0):
        budget = phases[i - 1].budget
        auc.append(_area(log, _phase_points(log, name, i, ends[i - 1]), name, budget))
        ref.append(_area(reference, _reference_points(reference, name), name, budget))
    return Transfer(names, np.array(auc), np.array(ref))


def _phase_points(log: EvalLog, task: str, phase: int, start: int) -> list[tuple[int, float]]:
    """(steps since the ``start`` of the phase, score): the end of the phase before, then all evaluations inside."""
    # A log that evaluates again at the start of the phase (same step) must not count that instant twice.
    points = {
        e.step - start: e.mean
        for e in log.evaluations
        if e.task == task and (e.phase == phase or (e.phase == phase - 1 and e.step == start))
    }
    return sorted(points.items())


def _reference_points(log: EvalLog, task: str) -> list[tuple[int, float]]:
    """(steps since the start, score) of the one phase of an independent run that trains ``task``."""
    trained = sorted({e.phase for e in log.evaluations if e.task == task and e.phase > 0})
    if len(trained) != 1:
        raise DataError(
            f"{log.source}: task {task!r} is evaluated in {len(trained)} training phases; a reference run (protocol "
            "independent) evaluates each task in exactly one."
        )
    rows = [e for e in log.evaluations if e.task == task and e.phase == trained[0]]
    if trained == [1]:  # evaluated before any training, as phase 0
        rows = [e for e in log.evaluations if e.task == task and e.phase == 0][:1] + rows
    return sorted({e.step - rows[0].step: e.mean for e in rows}.items())


def _area(log: EvalLog, points: list[tuple[int, float]], task: str, budget: int) -> float:
    """Mean height of the piecewise linear curve through ``points`` over ``[0, budget]``."""
    steps, scores = np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points])
    if len(points) < 2 or steps[0] != 0 or steps[-1] < budget or np.isnan(scores).any():
        raise DataError(
            f"{log.source}: forward transfer of task {task!r} needs complete evaluations from the start of its first "
            f"visit to {budget} units later; found {len(points)} at {[p[0] for p in points]}."
        )
    inside = steps < budget
    x = np.append(steps[inside], budget)
    y = np.append(scores[inside], np.interp(budget, steps, scores))
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1])) / (2 * budget))


METRICS = (
    "average_performance",
    "average_incremental",
    "anytime_average",
    "learning_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "forward_transfer_unnormalised",
    "zero_shot_transfer",
    "min_performance",
    "worst_case_performance",
    "intransigence",
    "relearning_savings",
)
"""The keys of :func:`compute_metrics`, in the order of reports."""


def compute_metrics(
    log: EvalLog,
    tasks: Sequence[str],
    phases: Sequence[Phase],
    reference: EvalLog | None = None,
    *,
    protocol: str = "sequential",
) -> dict[str, float | None]:
    """All metrics of one run; only finished phases count, ``None`` is what is not defined or cannot be computed.

    Args:
        log: the run's evaluations.
        tasks: names of the stream's tasks.
        phases: what was (to be) trained when. In joint training (a phase with a tuple of tasks) only the final and the
            anytime average have a meaning.
        reference: the log of the same agent and seed under protocol ``independent``; without it forward transfer and
            intransigence are None.
        protocol: ``"independent"`` runs train a fresh agent per task, so only the mean of the tasks' final scores is
            defined (``average_performance`` and ``learning_accuracy`` are then the same number).

    Raises:
        DataError: the log does not belong to ``tasks``.
    """
    result: dict[str, float | None] = dict.fromkeys(METRICS)
    done = phases[: finished_phases(log, phases)]
    r, visits = matrix(log, tasks, done), find_visits(tasks, done)
    if not done:
        return result
    if protocol == "independent":
        result["average_performance"] = result["learning_accuracy"] = learning_accuracy(r, visits)
        return result
    result["average_performance"] = average_performance(r, visits)
    result["anytime_average"] = anytime_average(log, tasks, done)
    if protocol == "joint" or any(isinstance(p.task, tuple) for p in done):
        return result
    result["average_incremental"] = average_incremental(r, visits)
    result["learning_accuracy"] = learning_accuracy(r, visits)
    result["forgetting"] = forgetting(r, visits)
    result["backward_transfer"] = backward_transfer(r, visits)
    result["zero_shot_transfer"] = zero_shot_transfer(r, visits)
    result["min_performance"] = min_performance(log, tasks, done)
    result["worst_case_performance"] = worst_case_performance(log, tasks, done)
    result["relearning_savings"] = relearning_savings(log, tasks, done)
    if reference is not None:
        result["intransigence"] = _or_none(lambda: intransigence(r, visits, reference_scores(reference, tasks)))
    transfer = _or_none(lambda: forward_transfer(log, tasks, done, reference))
    if transfer is not None:
        result["forward_transfer"] = _mean(transfer.normalised)
        result["forward_transfer_unnormalised"] = _mean(transfer.difference)
    return result


Value = TypeVar("Value")


def _or_none(compute: Callable[[], Value]) -> Value | None:
    """Call :func:`forward_transfer` directly to learn why it is undefined."""
    try:
        return compute()
    except DataError:
        return None
