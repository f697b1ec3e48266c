"""Intervals: equal to SciPy's where comparable, with the coverage they promise, and resampling the right unit."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from clbench.errors import DataError
from clbench.metrics.statistics import (
    Interval,
    bootstrap_ci,
    iqm,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    run_bootstrap_ci,
    stratified_bootstrap_ci,
    summarise,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (4, 5), (10, 7)])
def test_iqm_is_the_trimmed_mean_of_all_pairs(shape):
    x = rng(1).random(shape)
    assert iqm(x) == pytest.approx(scipy.stats.trim_mean(x, 0.25, axis=None))
    assert iqm(np.stack([x, x + 1])) == pytest.approx([iqm(x), iqm(x) + 1])


def test_iqm_ignores_the_tails_and_the_mean_does_not():
    x = np.array([[0.0, 0.5, 0.5, 0.5]])
    assert iqm(x) == 0.5 and x.mean() != 0.5


def test_bootstrap_agrees_with_scipy():
    x = rng(2).random(20)
    ours = bootstrap_ci(x, rng(3), resamples=20_000)
    theirs = scipy.stats.bootstrap(
        (x,), np.mean, method="percentile", n_resamples=20_000, rng=rng(4)
    ).confidence_interval
    assert ours.value == pytest.approx(x.mean())
    assert [ours.low, ours.high] == pytest.approx(theirs, abs=0.1 * (theirs.high - theirs.low))


def test_intervals_are_a_function_of_the_generator():
    x = rng(5).random(8)
    assert bootstrap_ci(x, rng(1)) == bootstrap_ci(x, rng(1)) != bootstrap_ci(x, rng(2))


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    bootstrap_ci([1.0, 2.0], rng())
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_one_run_has_no_interval():
    assert bootstrap_ci([0.5], rng()) == Interval(0.5, None, None, 1)
    assert run_bootstrap_ci(np.ones((1, 3)), rng()).low is None
    assert stratified_bootstrap_ci(np.ones((1, 3)), rng()).low is None


def coverage(interval, draw, truth: float, trials: int = 300) -> float:
    hits = 0
    for trial in range(trials):
        found = interval(draw(rng(trial)), rng(10_000 + trial))
        hits += found.low <= truth <= found.high
    return hits / trials


def test_coverage_of_the_run_bootstrap():
    """A percentile bootstrap of 20 values covers a little less than the nominal 95 %."""
    found = coverage(lambda x, g: bootstrap_ci(x, g, resamples=500), lambda g: g.normal(size=20), 0.0)
    assert 0.88 <= found <= 0.98


def correlated(g: np.random.Generator) -> np.ndarray:
    """15 runs x 10 tasks; the tasks of a run share most of their luck."""
    return g.normal(size=(15, 1)) + 0.3 * g.normal(size=(15, 10))


def check_coverage_with_correlated_tasks(interval) -> None:
    assert coverage(interval, correlated, 0.0, trials=200) >= 0.85


def mean2(x: np.ndarray) -> np.ndarray:
    return x.mean(axis=(-2, -1))


def test_resampling_runs_covers_when_tasks_are_correlated():
    check_coverage_with_correlated_tasks(lambda x, g: run_bootstrap_ci(x, g, statistic=mean2, resamples=400))
    check_coverage_with_correlated_tasks(lambda x, g: bootstrap_ci(x.mean(axis=1), g, resamples=400))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, g: bootstrap_ci(x.ravel(), g, resamples=400),  # run-task pairs as if they were independent
        lambda x, g: bootstrap_ci(x.mean(axis=0), g, resamples=400),  # tasks instead of runs
        lambda x, g: stratified_bootstrap_ci(x, g, statistic=mean2, resamples=400),  # breaks the pairing within runs
    ],
)
def test_resampling_anything_else_is_too_narrow_and_caught(wrong):
    with pytest.raises(AssertionError):
        check_coverage_with_correlated_tasks(wrong)


def test_stratified_bootstrap_resamples_within_tasks():
    """Columns that are constant stay constant, whatever their differences."""
    found = stratified_bootstrap_ci(np.tile([0.0, 1.0, 5.0], (6, 1)), rng(), statistic=mean2)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_paired_difference_removes_what_seeds_share():
    luck = rng(1).normal(size=10)
    a = {s: luck[s] + 0.1 for s in range(10)}
    b = {s: luck[s] for s in range(10)}
    found = paired_difference(a, b, rng())
    assert found.value == pytest.approx(0.1) and found.low == pytest.approx(0.1) == pytest.approx(found.high)
    unpaired = bootstrap_ci(list(a.values()), rng())
    assert unpaired.high - unpaired.low > 0.5


def test_paired_difference_names_the_seeds_that_do_not_match():
    with pytest.raises(DataError, match="the second has no seed 1, 2 and the first has no seed 7"):
        paired_difference({0: 1.0, 1: 1.0, 2: 1.0}, {0: 1.0, 7: 1.0}, rng())


def test_failures_are_counted_not_averaged_away():
    found = summarise([0.5, None, 0.7], rng(), failures=2)
    assert found.value == pytest.approx(0.6) and (found.n, found.failures) == (2, 3)
    assert summarise([None], rng()) == Interval(None, None, None, 0, 1)
    for bad in ([0.5, np.nan], [0.5, np.inf]):
        with pytest.raises(DataError, match="1 missing or infinite"):
            bootstrap_ci(bad, rng())
    with pytest.raises(DataError, match="must be a non-empty array"):
        bootstrap_ci([], rng())


def test_probability_of_improvement():
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0]])
    assert probability_of_improvement(x, y) == pytest.approx((0.5 + 0.5) / 2)
    assert probability_of_improvement(y + 5, x) == 1.0
    a, b = rng(1).random((6, 1)), rng(2).random((9, 1))
    u = scipy.stats.mannwhitneyu(a[:, 0], b[:, 0]).statistic
    assert probability_of_improvement(a, b) == pytest.approx(u / 54)
    with pytest.raises(DataError, match="2 and 1 tasks"):
        probability_of_improvement(x, a)


def test_performance_profile():
    x = np.array([[0.0, 0.5], [0.5, 1.0]])
    assert performance_profile(x, np.array([-1.0, 0.0, 0.5, 1.0])).tolist() == [1.0, 0.75, 0.25, 0.0]
