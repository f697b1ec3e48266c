"""Statistics over runs. The unit of replication is a whole run (a seed): tasks inside a run are correlated.

Scores come as ``X`` (runs, tasks). For metrics of a whole sequence (average performance, forgetting, ...) aggregate
over tasks first and resample runs (:func:`bootstrap_ci`). For scores of run-task pairs there are two:
:func:`stratified_bootstrap_ci` resamples runs inside each task, as Agarwal et al. 2021 recommend for columns that are
independent of each other; :func:`run_bootstrap_ci` resamples whole runs and is right when the tasks of a run are
correlated, as in a stream. Every function takes a ``numpy.random.Generator`` and leaves the global one alone.

Failed runs must be counted, not averaged away: NaN in the input is an error; :func:`summarise` takes ``None`` for a run
that failed and reports how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clbench.errors import DataError

RESAMPLES = 2000
CONFIDENCE = 0.95
Statistic = Callable[[np.ndarray], np.ndarray]
"""Reduces the last axis, or the last two for run x task scores, of an array of any leading shape."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with a percentile bootstrap interval; ``n`` runs went into it, ``failures`` could not.

    With one run there is no interval (``low`` and ``high`` are ``None``), without any no ``value`` either.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    failures: int = 0


def _finite(x: np.ndarray | Sequence, dimensions: int, what: str) -> np.ndarray:
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != dimensions or x.size == 0:
        raise DataError(f"{what} must be a non-empty array with {dimensions} axes, got shape {x.shape}.")
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).sum())
        raise DataError(f"{what} has {bad} missing or infinite entries; count failed runs, do not average them away.")
    return x


def mean(x: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.mean(x, axis=-1)


def iqm(x: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last two axes (runs, tasks): the 25 % trimmed mean of all run-task pairs.

    Like ``scipy.stats.trim_mean(x, 0.25)``: ``floor(n / 4)`` of the ``n`` values are cut off at each end. Agarwal et
    al. 2021.
    """
    flat = np.sort(x.reshape(*x.shape[:-2], -1), axis=-1)
    n = flat.shape[-1]
    return flat[..., n // 4 : n - n // 4].mean(axis=-1)


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    rng: np.random.Generator,
    *,
    statistic: Statistic = mean,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap over runs for one number per run.

    Args:
        values: (N,), one per run, finite.
        rng: source of the resamples.
        statistic: reduces the last axis.

    Raises:
        DataError: no values, or missing ones.
    """
    x = _finite(values, 1, "The sample")
    point = float(statistic(x))
    if len(x) == 1:
        return Interval(point, None, None, 1)
    draws = statistic(x[rng.integers(len(x), size=(resamples, len(x)))])
    return Interval(point, *_percentiles(draws, confidence), len(x))


def stratified_bootstrap_ci(
    scores: np.ndarray,
    rng: np.random.Generator,
    *,
    statistic: Statistic = iqm,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Percentile bootstrap of run x task scores, runs resampled independently inside each task (the strata).

    Args:
        scores: (N, T) finite.
        statistic: reduces the last two axes.
    """
    x = _finite(scores, 2, "The score table")
    n, tasks = x.shape
    point = float(statistic(x))
    if n == 1:
        return Interval(point, None, None, 1)
    rows = rng.integers(n, size=(resamples, n, tasks))
    return Interval(point, *_percentiles(statistic(x[rows, np.arange(tasks)]), confidence), n)


def run_bootstrap_ci(
    scores: np.ndarray,
    rng: np.random.Generator,
    *,
    statistic: Statistic = iqm,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Like :func:`stratified_bootstrap_ci`, but whole runs (rows) are resampled: tasks of a run may be correlated."""
    x = _finite(scores, 2, "The score table")
    point = float(statistic(x))
    if len(x) == 1:
        return Interval(point, None, None, 1)
    return Interval(
        point, *_percentiles(statistic(x[rng.integers(len(x), size=(resamples, len(x)))]), confidence), len(x)
    )


def _percentiles(draws: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def summarise(values: Sequence[float | None], rng: np.random.Generator, *, failures: int = 0) -> Interval:
    """Mean over runs with a bootstrap interval; ``None`` entries are counted as failures beside ``failures``."""
    there = [v for v in values if v is not None]
    failures += len(values) - len(there)
    if not there:
        return Interval(None, None, None, 0, failures)
    result = bootstrap_ci(there, rng)
    return Interval(result.value, result.low, result.high, result.n, failures)


def paired_difference(
    a: Mapping[int, float], b: Mapping[int, float], rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> Interval:
    """Mean of ``a[seed] - b[seed]`` with a bootstrap over seeds: both methods met the same streams, so pair them.

    Raises:
        DataError: the seeds differ; the message says which.
    """
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if only_a or only_b:
        sides = (("the second", only_a), ("the first", only_b))
        missing = " and ".join(f"{side} has no seed {', '.join(map(str, seeds))}" for side, seeds in sides if seeds)
        raise DataError(f"A paired difference needs the same seeds on both sides: {missing}. Run those too.")
    return bootstrap_ci([a[s] - b[s] for s in sorted(a)], rng, resamples=resamples)


def probability_of_improvement(x: np.ndarray, y: np.ndarray) -> float:
    """``P(X > Y)``, ties count half (Mann-Whitney U / nm), per task and averaged over tasks.

    Args:
        x, y: (N, T) and (M, T) scores of two methods on the same tasks. Agarwal et al. 2021.
    """
    x, y = _finite(x, 2, "The first score table"), _finite(y, 2, "The second score table")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"The score tables have {x.shape[1]} and {y.shape[1]} tasks; compare the same tasks.")
    d = x[:, None] - y[None]
    return float(((d > 0) + 0.5 * (d == 0)).mean(axis=(0, 1)).mean())


def performance_profile(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Fraction of run-task pairs above each threshold ``P(score > tau)``: (N, T), (K,) -> (K,). Dolan & More 2002."""
    x = _finite(scores, 2, "The score table")
    return (x.reshape(-1, 1) > np.asarray(thresholds, dtype=np.float64)).mean(axis=0)
