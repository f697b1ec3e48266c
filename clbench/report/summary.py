"""The numbers of a report: intervals over seeds, paired differences, aggregated curves and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from clbench.errors import ConfigError, unknown_name
from clbench.metrics.continual import METRICS
from clbench.metrics.log import score_table
from clbench.metrics.statistics import (
    RESAMPLES,
    Interval,
    iqm,
    paired_difference,
    probability_of_improvement,
    run_bootstrap_ci,
    summarise,
)
from clbench.report.runs import Group, Run
from clbench.rng import numpy_generator

MAIN = (
    "average_performance",
    "anytime_average",
    "learning_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
)
MORE = tuple(m for m in METRICS if m not in MAIN)
TITLES = {
    "average_performance": "Average performance",
    "average_incremental": "Average incremental",
    "anytime_average": "Anytime average",
    "learning_accuracy": "Learning accuracy",
    "forgetting": "Forgetting",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "forward_transfer_unnormalised": "Forward transfer, not normalised",
    "zero_shot_transfer": "Zero-shot transfer",
    "min_performance": "Minimum performance",
    "worst_case_performance": "Worst-case performance",
    "intransigence": "Intransigence",
    "relearning_savings": "Relearning savings",
}
LOWER_IS_BETTER = frozenset({"forgetting", "intransigence"})
MAX_PAIRED_AGENTS = 4


def _rng(*names: str) -> np.random.Generator:
    """The same report for the same runs: every interval has a generator of its own name."""
    return numpy_generator(0, "report", *names)


def metric_interval(group: Group, label: str, metric: str) -> Interval:
    """Mean over complete runs with a 95 % interval; runs that did not finish count as failures."""
    values = [run.metrics[metric] for run in group.agents.get(label, ())]
    return summarise(values, _rng(metric, label), failures=len(group.excluded.get(label, ())))


def online_interval(group: Group, label: str, key: str) -> Interval:
    """Mean of ``accuracy`` or ``loss_of_plasticity`` of the online results, as :func:`metric_interval`."""
    values = [run.online.get(key) for run in group.agents.get(label, ())]
    return summarise(values, _rng("online", key, label), failures=len(group.excluded.get(label, ())))


def final_scores(runs: Sequence[Run]) -> np.ndarray | None:
    """Final score per run and task (N, T), over the tasks that all runs visited; ``None`` if one is missing."""
    if not runs:
        return None
    skip = {t for run in runs for t in run.unvisited}
    columns = [j for j, t in enumerate(runs[0].tasks) if t not in skip]
    rows = []
    for run in runs:
        r = run.log.matrix(run.tasks, run.phases)
        own = np.array([_last_phase(run, t) for t in run.tasks])
        rows.append(r[own, np.arange(len(own))][columns] if run.protocol == "independent" else r[-1, columns])
    scores = np.array(rows)
    return None if scores.size == 0 or np.isnan(scores).any() else scores


def _last_phase(run: Run, task: str) -> int:
    return max((i for i, p in enumerate(run.phases, start=1) if task in p.tasks), default=0)


def final_iqm(group: Group, label: str) -> Interval:
    """IQM over all run-task pairs of the final scores; whole runs are resampled."""
    runs, failures = group.agents.get(label, ()), len(group.excluded.get(label, ()))
    scores = final_scores(runs)
    if scores is None:
        return Interval(None, None, None, 0, failures)
    result = run_bootstrap_ci(scores, _rng("iqm", label), statistic=iqm)
    return Interval(result.value, result.low, result.high, result.n, failures)


# -- paired comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """``first`` minus ``second`` on their common seeds, per metric, and the probability that ``first`` scores higher."""

    first: str
    second: str
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    differences: Mapping[str, Interval]
    improvement: float | None


def comparisons(group: Group, baseline: str | None = None) -> list[Comparison]:
    """Every agent against ``baseline``; without one all pairs (up to four agents), else against the first agent.

    Raises:
        UnknownNameError: no agent of that name in the group.
    """
    labels = list(group.agents)
    if baseline is not None and baseline not in labels:
        raise unknown_name("baseline agent", baseline, labels, where=group.title)
    if baseline is None and len(labels) <= MAX_PAIRED_AGENTS:
        pairs = [(b, a) for a, b in combinations(labels, 2)]
    else:
        base = baseline or labels[0]
        pairs = [(label, base) for label in labels if label != base]
    return [_compare(group, a, b) for a, b in pairs]


def _compare(group: Group, first: str, second: str) -> Comparison:
    a, b = ({run.seed: run for run in group.agents[label]} for label in (first, second))
    # The same seed must have given the same stream, else the pair is no pair.
    common = sorted(s for s in a.keys() & b.keys() if a[s].stream_hash == b[s].stream_hash)
    differences = {}
    for metric in MAIN:
        x, y = ({s: v for s in common if (v := side[s].metrics[metric]) is not None} for side in (a, b))
        if x and x.keys() == y.keys():
            differences[metric] = paired_difference(x, y, _rng("paired", metric, first, second))
    scores = [final_scores([side[s] for s in common]) for side in (a, b)]
    improvement = (
        probability_of_improvement(scores[0], scores[1]) if scores[0] is not None and scores[1] is not None else None
    )
    left_out = tuple(sorted((a.keys() | b.keys()) - set(common)))
    return Comparison(first, second, tuple(common), left_out, differences, improvement)


# -- curves and matrices -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Mean over seeds (S,) with a pointwise 95 % interval (``None`` with one seed) at ``steps`` (S,)."""

    steps: np.ndarray
    value: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


def task_curves(runs: Sequence[Run], task: str) -> list[Curve]:
    """One curve with an interval over seeds; one curve per run where the runs were evaluated at different times."""
    return _aggregate([_drop_missing(*run.log.curve(task)[:2]) for run in runs], _rng("curve", runs[0].agent, task))


def mean_curves(runs: Sequence[Run]) -> list[Curve]:
    """Like :func:`task_curves` for the mean over all tasks, at times when all were evaluated."""
    tables = [score_table(run.log, run.tasks) for run in runs]
    return _aggregate([_drop_missing(t.step, t.scores.mean(axis=1)) for t in tables], _rng("curve", runs[0].agent))


def _drop_missing(steps: np.ndarray, values: np.ndarray) -> dict[int, float]:
    return {int(s): float(v) for s, v in zip(steps, values, strict=True) if not np.isnan(v)}


def _aggregate(curves: Sequence[Mapping[int, float]], rng: np.random.Generator) -> list[Curve]:
    curves = [c for c in curves if c]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(c) for c in curves)))
    if len(common) < max(len(c) for c in curves):
        return [Curve(np.array(sorted(c)), np.array([c[s] for s in sorted(c)]), None, None) for c in curves]
    x = np.array([[c[s] for s in common] for c in curves])
    if len(x) == 1:
        return [Curve(np.array(common), x[0], None, None)]
    draws = x[rng.integers(len(x), size=(RESAMPLES, len(x)))].mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return [Curve(np.array(common), x.mean(axis=0), low, high)]


def same_phases(runs: Sequence[Run]) -> bool:
    """Whether all runs train the same tasks in the same order for the same time."""
    return len({tuple((p.task, p.budget) for p in run.phases) for run in runs}) <= 1


def mean_matrix(runs: Sequence[Run]) -> np.ndarray:
    """Performance matrix (P+1, T), mean over runs, NaN where any run lacks the entry.

    Raises:
        ConfigError: the runs have different phases, so that rows do not correspond.
    """
    if not same_phases(runs):
        raise ConfigError(
            "Performance matrices of runs with different phases cannot be averaged; show them one by one."
        )
    return np.mean([run.log.matrix(run.tasks, run.phases) for run in runs], axis=0)


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis and the share of runs that train the task there."""

    start: float
    end: float
    share: float


def training_bands(runs: Sequence[Run], task: str) -> list[Band]:
    """When ``task`` was trained."""
    edges = sorted({e for run in runs for e in boundaries(run)} | {0})
    bands = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        share = float(np.mean([task in _phase_at(run, (start + end) / 2) for run in runs]))
        if share > 0:
            bands.append(Band(start, end, share))
    return bands


def boundaries(run: Run) -> list[int]:
    """Ends of the phases in units."""
    return np.cumsum([p.budget for p in run.phases]).tolist()


def _phase_at(run: Run, step: float) -> tuple[str, ...]:
    index = int(np.searchsorted(boundaries(run), step, side="left"))
    return run.phases[index].tasks if index < len(run.phases) else ()
