"""Online accuracy, loss of plasticity, intransigence, relearning: closed forms, brute force, what must be undefined."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.contracts import Phase
from clbench.errors import DataError
from clbench.metrics import EvalLog, compute_metrics
from clbench.metrics.continual import (
    Relearning,
    find_visits,
    intransigence,
    learning_accuracy,
    reference_scores,
    relearning,
    relearning_savings,
    warm_start_gap,
)
from clbench.metrics.plasticity import loss_of_plasticity, online_results, prequential, sample_plasticity

# -- online accuracy -----------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=9))
def test_prequential_is_the_mean_over_samples_however_they_are_cut_into_reports(reports: list[list[bool]]) -> None:
    samples = [s for r in reports for s in r]
    found = prequential([sum(r) / len(r) for r in reports], [len(r) for r in reports])
    assert found == pytest.approx(sum(samples) / len(samples), abs=1e-12)


def test_prequential_is_not_the_mean_of_the_reports() -> None:
    assert prequential([1.0, 0.0], [90, 10]) == pytest.approx(0.9)
    assert prequential([], []) is None and prequential([0.5], [0]) is None


def test_online_results_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text(
        "step,phase,loss,online_accuracy,online_count\n10,1,0.5,0.25,4\n20,1,0.4,1.0,12\n25,1,0.4,,\n30,2,1,0.5,2\n"
    )
    assert online_results(file, 2, True) == {
        "accuracy": pytest.approx(14 / 18), "per_phase": [pytest.approx(13 / 16), pytest.approx(0.5)],
        "loss_of_plasticity": pytest.approx(13 / 16 - 0.5), "k": 1,
    }  # fmt: skip
    unfinished = online_results(file, 3, False)  # phase 2 may not be at its end
    assert unfinished is not None
    assert unfinished["per_phase"] == [pytest.approx(13 / 16), None, None]
    assert unfinished["accuracy"] == pytest.approx(13 / 16) and unfinished["loss_of_plasticity"] is None


def test_without_the_columns_there_is_nothing_and_damage_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text("step,phase,loss,online_accuracy\n10,1,0.5,0.25\n")
    assert online_results(file, 2, True) is None  # of how many samples is not said
    file.write_text("step,phase,online_accuracy,online_count\n10,1,much,4\n")
    with pytest.raises(DataError, match=r"train\.csv"):
        online_results(file, 2, True)


# -- loss of plasticity, sample plasticity -------------------------------------------------------------------------------


def test_loss_of_plasticity() -> None:
    falling = [0.9, 0.8, 0.7, 0.6, 0.5]
    assert loss_of_plasticity(falling, 2) == pytest.approx(0.85 - 0.55)
    assert loss_of_plasticity(falling[::-1], 2) == pytest.approx(-0.3)
    assert loss_of_plasticity(falling, 2, reference=falling) == pytest.approx(
        0
    )  # the tasks became harder, not the learner
    assert loss_of_plasticity(falling, 3) is None  # the middle task would be on both sides
    assert loss_of_plasticity([0.9, math.nan], 1) is None and loss_of_plasticity(falling, 0) is None
    with pytest.raises(DataError, match="each of the 5 tasks"):
        loss_of_plasticity(falling, 2, reference=[1.0])


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_sample_plasticity(kind) -> None:
    before, after = kind([2.0, 2.0, 2.0, 2.0, 0.0]), kind([0.0, 0.5, 2.0, 5.0, 0.0])
    assert sample_plasticity(before, after).tolist() == [1.0, 0.75, 0.0, 0.0, 1.0]


# -- against a reference -------------------------------------------------------------------------------------------------


def log_of(points: dict[tuple[int, int], dict[str, float]]) -> EvalLog:
    """(phase, step) -> task -> score."""
    return EvalLog.from_rows(
        (phase, 0, step, task, 0, score, 0.0, 1) for (phase, step), row in points.items() for task, score in row.items()
    )


AB = ("a", "b")
PHASES = [Phase("a", 100), Phase("b", 100)]
RUN = log_of({(0, 0): {"a": 0.0, "b": 0.0}, (1, 100): {"a": 0.8, "b": 0.1}, (2, 200): {"a": 0.2, "b": 0.5}})
ALONE = log_of({(1, 0): {"a": 0.0}, (1, 100): {"a": 0.8}, (2, 100): {"b": 0.0}, (2, 200): {"b": 0.9}})


def test_intransigence_and_warm_start_gap() -> None:
    r, visits = RUN.matrix(AB, 2), find_visits(AB, PHASES)
    best = reference_scores(ALONE, AB)
    assert best.tolist() == [0.8, 0.9]
    assert intransigence(r, visits, best) == pytest.approx((0.0 + 0.4) / 2)
    assert intransigence(r, visits, best) == pytest.approx(best.mean() - (learning_accuracy(r, visits) or 0))
    assert warm_start_gap(r, visits, best) == pytest.approx(0.4)  # the first task is the same network
    assert intransigence(r, visits, np.array([0.8, math.nan])) is None
    assert compute_metrics(RUN, AB, PHASES, ALONE)["intransigence"] == pytest.approx(0.2)
    assert compute_metrics(RUN, AB, PHASES)["intransigence"] is None


def test_a_reference_that_lacks_a_task_leaves_intransigence_undefined() -> None:
    part = log_of({(1, 0): {"a": 0.0}, (1, 100): {"a": 0.8}})
    assert np.isnan(reference_scores(part, AB)).tolist() == [False, True]
    assert compute_metrics(RUN, AB, PHASES, part)["intransigence"] is None


# -- relearning ----------------------------------------------------------------------------------------------------------


ABA = [Phase("a", 100), Phase("b", 100), Phase("a", 100)]


def aba(first: list[float], again: list[float], forgotten: float = 0.1) -> EvalLog:
    """Task a after 0, 25, 50, ... units of its first visit, and after 25, 50, ... of its second."""
    points = {(0, 0): {"a": first[0], "b": 0.0}}
    points |= {(1, 25 * i): {"a": v, "b": 0.0} for i, v in enumerate(first[1:], start=1)}
    points |= {(2, 200): {"a": forgotten, "b": 1.0}}
    points |= {(3, 200 + 25 * i): {"a": v, "b": 1.0} for i, v in enumerate(again, start=1)}
    return log_of(points)


@pytest.mark.parametrize(
    ("again", "forgotten", "expected"),
    [
        ([0.4, 0.9, 0.9, 0.9], 0.1, 0.5),  # 50 units in place of 100
        ([0.4, 0.5, 0.6, 0.8], 0.1, 0.0),  # as slow as at first
        ([0.4, 0.5, 0.6, 0.7], 0.1, None),  # never regained: at least 100 units, and that is all that is known
        ([0.8, 0.8, 0.8, 0.8], 0.9, 1.0),  # nothing was forgotten
    ],
)
def test_relearning_savings(again: list[float], forgotten: float, expected: float | None) -> None:
    log = aba([0.0, 0.2, 0.4, 0.6, 0.8], again, forgotten)
    assert relearning_savings(log, AB, ABA) == (None if expected is None else pytest.approx(expected))
    assert compute_metrics(log, AB, ABA)["relearning_savings"] == relearning_savings(log, AB, ABA)
    found = relearning(log, AB, ABA)
    assert found is not None and found.tasks == ("a",) and found.first.tolist() == [100]
    assert found.censored.tolist() == [expected is None]


def test_the_first_visit_counts_until_the_score_was_first_there() -> None:
    log = aba([0.0, 0.8, 0.7, 0.9, 0.8], [0.1, 0.8, 0.8, 0.8])
    found = relearning(log, AB, ABA)
    assert found is not None and (found.first.tolist(), found.again.tolist()) == ([25], [50])
    assert relearning_savings(log, AB, ABA) == pytest.approx(-1.0)


def test_what_has_no_relearning() -> None:
    assert relearning_savings(RUN, AB, PHASES) is None  # no task comes back
    constant = aba([0.5] * 5, [0.5] * 4)
    found = relearning(constant, AB, ABA)
    assert found is not None and found.tasks == ()  # there was nothing to learn
    missing = log_of({(1, 100): {"a": 0.8, "b": 0.0}, (2, 200): {"a": 0.1, "b": 1.0}, (3, 300): {"a": 0.9, "b": 1.0}})
    assert relearning(missing, AB, ABA) is None  # no evaluation before training
    whole = {
        (0, 0): {"a": 0.0}, (1, 50): {"a": 0.5}, (1, 100): {"a": 0.8}, (2, 200): {"a": 0.1}, (3, 300): {"a": 0.9},
    }  # fmt: skip
    found = relearning(log_of(whole), AB, ABA)
    assert found is not None and found.tasks == ("a",)
    for end in ((0, 0), (1, 100), (2, 200)):  # what starts or ends one of the two visits was not evaluated
        assert relearning(log_of({k: v for k, v in whole.items() if k != end}), AB, ABA) is None
    back_to_back = [Phase("a", 100), Phase("a", 100), Phase("b", 100)]
    log = log_of({(0, 0): {"a": 0.0}, (1, 100): {"a": 0.5}, (2, 200): {"a": 0.9}, (3, 300): {"a": 0.1}})
    found = relearning(log, ("a", "b"), back_to_back)
    assert found is not None and found.tasks == ()  # nothing came between the two visits


def test_phases_without_a_break_are_one_visit() -> None:
    phases = [Phase("a", 100), Phase("b", 100), Phase("a", 100), Phase("a", 100)]
    log = log_of({
        (0, 0): {"a": 0.0, "b": 0.0}, (1, 100): {"a": 0.8, "b": 0.0}, (2, 200): {"a": 0.1, "b": 1.0},
        (3, 300): {"a": 0.7, "b": 1.0}, (4, 400): {"a": 0.8, "b": 1.0},
    })  # fmt: skip
    found = relearning(log, AB, phases)
    assert found is not None and found.again.tolist() == [200] and not found.censored.any()


def made(ratios: list[float], censored: list[bool]) -> Relearning:
    n = len(ratios)
    return Relearning(tuple(map(str, range(n))), np.ones(n), np.array(ratios), np.array(censored, bool))


def test_the_median_knows_of_censored_values() -> None:
    assert made([0.2, 0.4, 0.6], [False] * 3).median_ratio == 0.4
    assert made([0.2, 0.4, 1.0], [False, False, True]).median_ratio == 0.4  # at least 1: the median does not change
    assert made([0.2, 1.0, 1.0], [False, True, True]).median_ratio is None  # more than half are not known
    # by hand: S = 4/5 at 0.1; one lost at 0.3; S = 4/5 * 2/3 at 0.5; * 1/2 at 0.7
    assert made([0.1, 0.3, 0.5, 0.7, 0.9], [False, True, False, False, False]).median_ratio == 0.7
    assert made([], []).median_ratio is None


@given(st.lists(st.integers(1, 30), min_size=1, max_size=15))
def test_without_censored_values_it_is_the_lower_median(values: list[int]) -> None:
    ordered = sorted(values)
    assert made([float(v) for v in values], [False] * len(values)).median_ratio == ordered[(len(values) - 1) // 2]


def test_negative_control_the_mean_of_censored_values_is_wrong() -> None:
    """Ratios from 1 to 20: the length of the last visit changes the mean, but not the median as long as it is known."""
    true = np.arange(1.0, 21.0)
    medians, means = [], []
    for limit in (12.0, 15.0, 30.0):
        cut = np.minimum(true, limit)
        medians.append(made(cut.tolist(), (true > limit).tolist()).median_ratio)
        means.append(cut.mean())
    assert medians == [10.0] * 3 and len(set(means)) == 3
