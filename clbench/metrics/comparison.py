"""Statistics of a comparison: agents on several data sets, a few runs (seeds) each, all on the same frozen episodes.

The unit of replication is a run. Two kinds of intervals are given for the difference of two agents on one data set, as they
answer two questions: over *seeds* (would other runs of the same two agents differ alike?), and over *episodes* (would these
very runs differ alike on other episodes of the kind?). Both are paired: seed by seed, and episode by episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from clbench.errors import DataError
from clbench.metrics.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    bootstrap_ci,
    iqm,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    run_bootstrap_ci,
    summarise,
)
from clbench.rng import numpy_generator

THRESHOLDS = np.linspace(0.0, 1.0, 51)
Scores = Mapping[int, np.ndarray]
"""Seed -> scores of the frozen episodes (E,)."""


def compare_scores(scores: Mapping[str, Mapping[str, Scores]], failures: Mapping[str, Mapping[str, int]]) -> dict:
    """All statistics of a comparison as plain values, a pure function of the scores.

    Args:
        scores: data set -> agent -> seed -> scores of the episodes; every agent is there, if need be without seeds.
        failures: data set -> agent -> runs that gave no result; they are counted and nowhere averaged.
    """
    agents = list(dict.fromkeys(a for of_agent in scores.values() for a in of_agent))
    pairs = list(combinations(agents, 2))
    return {
        "datasets": {
            name: {
                "agents": {a: _plain(_mean(name, a, runs, failures[name][a])) for a, runs in of_agent.items()},
                "differences": [
                    d for a, b in pairs if (d := paired(name, a, of_agent.get(a, {}), b, of_agent.get(b, {})))
                ],
            }
            for name, of_agent in scores.items()
        },
        "overall": _overall(scores, agents, pairs),
    }


def _mean(name: str, agent: str, runs: Scores, failures: int) -> Interval:
    return summarise([float(runs[s].mean()) for s in sorted(runs)], _rng("mean", name, agent), failures=failures)


def _plain(interval: Interval) -> dict[str, Any]:
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": interval.n,
            "failures": interval.failures}  # fmt: skip


def _rng(*names: str) -> np.random.Generator:
    return numpy_generator(0, "compare", *names)


# -- one data set --------------------------------------------------------------------------------------------------------


def paired(name: str, first: str, a: Scores, second: str, b: Scores) -> dict[str, Any] | None:
    """``first`` minus ``second`` on the seeds that both have: mean, interval over seeds, interval over episodes.

    Returns ``None`` where the two have no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    over_seeds = paired_difference(
        {s: float(a[s].mean()) for s in seeds},
        {s: float(b[s].mean()) for s in seeds},
        _rng("seeds", name, first, second),
    )
    over_episodes = Interval(None, None, None, len(a[seeds[0]]))
    if len({len(a[s]) for s in seeds}) == 1:  # a stream may give another number of episodes to another seed
        x, y = (np.stack([side[s] for s in seeds]) for side in (a, b))
        over_episodes = episode_difference(x, y, _rng("episodes", name, first, second))
    return {
        "first": first, "second": second, "seeds": seeds, "left_out": sorted(a.keys() ^ b.keys()),
        "value": over_seeds.value, "low": over_seeds.low, "high": over_seeds.high, "episodes": over_episodes.n,
        "episodes_low": over_episodes.low, "episodes_high": over_episodes.high,
    }  # fmt: skip


def episode_difference(
    a: np.ndarray, b: np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> Interval:
    """Mean of ``a - b`` with a bootstrap over episodes; the runs stay as they are. ``n`` is the number of episodes.

    Args:
        a, b: scores (runs, episodes) of two agents; the same row and column is the same seed and frozen episode.

    Raises:
        DataError: the two did not play the same episodes.
    """
    if a.shape != b.shape:
        raise DataError(f"A paired difference needs the same runs and episodes, got {a.shape} and {b.shape}.")
    return bootstrap_ci((a - b).mean(axis=0), rng, resamples=resamples)


# -- over data sets ------------------------------------------------------------------------------------------------------


def _overall(
    scores: Mapping[str, Mapping[str, Scores]], agents: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> dict:
    seeds = {a: complete_seeds(scores, a) for a in agents}
    tables = {a: score_table(scores, a, seeds[a]) for a in agents if seeds[a]}
    return {
        "datasets": list(scores),
        "agents": {a: {"seeds": seeds[a], **(_aggregate(a, tables[a]) if a in tables else {})} for a in agents},
        "thresholds": THRESHOLDS.round(6).tolist(),
        "improvement": [improvement(a, tables[a], b, tables[b]) for a, b in pairs if a in tables and b in tables],
    }


def complete_seeds(scores: Mapping[str, Mapping[str, Scores]], agent: str) -> list[int]:
    """The seeds whose runs are complete on every data set."""
    have = [set(of_agent.get(agent, {})) for of_agent in scores.values()]
    return sorted(set.intersection(*have)) if have else []


def score_table(scores: Mapping[str, Mapping[str, Scores]], agent: str, seeds: Sequence[int]) -> np.ndarray:
    """Mean score (seeds, data sets) of an agent."""
    return np.array([[float(of_agent[agent][s].mean()) for of_agent in scores.values()] for s in seeds])


def _aggregate(agent: str, table: np.ndarray) -> dict[str, Any]:
    """IQM and performance profile over (run, data set) pairs. Whole runs are resampled, a seed keeps its data sets
    together: data sets that are parts of each other, and equal initial weights, make the scores of a seed dependent."""
    result = run_bootstrap_ci(table, _rng("iqm", agent), statistic=iqm)
    low, high = profile_band(table, _rng("profile", agent))
    return {
        "iqm": _plain(result),
        "profile": performance_profile(table, THRESHOLDS).tolist(),
        "profile_low": low,
        "profile_high": high,
    }


def profile_band(
    table: np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> tuple[list[float] | None, list[float] | None]:
    """Pointwise interval of the performance profile, runs resampled; ``None`` with one run."""
    if len(table) == 1:
        return None, None
    above = (table[:, :, None] > THRESHOLDS).mean(axis=1)  # (runs, thresholds)
    draws = above[rng.integers(len(table), size=(resamples, len(table)))].mean(axis=1)
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low.tolist(), high.tolist()


def improvement(first: str, x: np.ndarray, second: str, y: np.ndarray) -> dict[str, Any]:
    """P(a run of ``first`` scores higher than one of ``second``), averaged over data sets, ties count half.

    Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", section 4.3.
    """
    rng, low, high = _rng("improvement", first, second), None, None
    if min(len(x), len(y)) > 1:
        d = x[:, None] - y[None]
        wins = ((d > 0) + 0.5 * (d == 0)).mean(axis=2)  # (runs of first, runs of second)
        rows, columns = (rng.integers(n, size=(RESAMPLES, n)) for n in (len(x), len(y)))
        draws = wins[rows[:, :, None], columns[:, None, :]].mean(axis=(1, 2))
        low, high = (float(q) for q in np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    return {"first": first, "second": second, "probability": probability_of_improvement(x, y), "low": low, "high": high}
