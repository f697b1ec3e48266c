"""Metrics against values computed by hand, classical formulas, and wrong definitions that other frameworks use."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.contracts import Phase
from clbench.errors import DataError
from clbench.metrics import METRICS, EvalLog, compute_metrics, continual, forward_transfer, matrix, unvisited
from clbench.metrics.continual import find_visits, performance_over_time

ABC = ("a", "b", "c")


def log_from_matrix(r: Sequence[Sequence[float | None]], tasks: Sequence[str], budget: int = 100) -> EvalLog:
    """Two episodes per evaluation, 0.1 above and below the entry; ``None`` is not evaluated."""
    return EvalLog.from_rows(
        (i, 0, i * budget, task, episode, value + sign * 0.1, 0.0, 1)
        for i, row in enumerate(r)
        for task, value in zip(tasks, row, strict=True)
        if value is not None
        for episode, sign in enumerate((1, -1))
    )


def visiting(names: str | Sequence[str], budget: int = 100) -> list[Phase]:
    return [Phase(n, budget, visit=list(names[: i + 1]).count(n)) for i, n in enumerate(names)]


def metrics(r, tasks, names, **keywords) -> dict[str, float | None]:
    return compute_metrics(log_from_matrix(r, tasks), list(tasks), visiting(names), **keywords)


SQUARE = [[0.1, 0.2, 0.1], [0.8, 0.3, 0.1], [0.6, 0.9, 0.3], [0.5, 0.7, 1.0]]


def test_single_visits_give_the_classical_numbers():
    m = metrics(SQUARE, ABC, ABC)
    assert m["average_performance"] == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert m["average_incremental"] == pytest.approx((0.8 + (0.6 + 0.9) / 2 + 2.2 / 3) / 3)
    assert m["anytime_average"] == pytest.approx(m["average_incremental"])  # evaluated at phase ends only
    assert m["learning_accuracy"] == pytest.approx((0.8 + 0.9 + 1.0) / 3)
    assert m["forgetting"] == pytest.approx(((0.8 - 0.5) + (0.9 - 0.7)) / 2)
    assert m["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert m["zero_shot_transfer"] == pytest.approx(((0.3 - 0.2) + (0.3 - 0.1)) / 2)
    assert m["min_performance"] == pytest.approx((0.5 + 0.7) / 2)
    assert m["worst_case_performance"] == pytest.approx(1.0 / 3 + (1 - 1 / 3) * 0.6)
    assert m["forward_transfer"] is None and m["forward_transfer_unnormalised"] is None
    assert tuple(m) == METRICS


def test_forgetting_is_negative_when_tasks_improve():
    """The example on which a definition whose maximum includes the last row gives 0."""
    r = [[0, 0, 0], [0.60, None, None], [0.80, 0.70, None], [0.90, 0.95, 0.50]]
    assert metrics(r, ABC, ABC)["forgetting"] == pytest.approx(-0.175)


def test_non_square_more_tasks_than_phases():
    m = metrics([[0, 0, 0], [0.8, 0.1, 0.4], [0.6, 0.9, 0.4]], ABC, "ab")
    assert m["average_performance"] == pytest.approx(0.75), "task c was never trained and is left out"
    assert m["forgetting"] == pytest.approx(0.2)
    assert unvisited(ABC, visiting("ab")) == ("c",)


def test_recurring_tasks_are_defined_by_visits_not_by_position():
    """Phases a b a c b: a is last visited in phase 3, b in phase 5, c in phase 4."""
    r = [
        [0.0, 0.1, 0.2],
        [0.7, 0.2, 0.2],  # a, first visit
        [0.4, 0.6, 0.3],  # b, first visit
        [0.9, 0.3, 0.4],  # a, last visit
        [0.8, 0.2, 0.5],  # c
        [0.6, 0.8, 0.1],  # b, last visit
    ]
    m = metrics(r, ABC, "abacb")
    assert m["average_performance"] == pytest.approx((0.6 + 0.8 + 0.1) / 3)
    assert m["learning_accuracy"] == pytest.approx((0.7 + 0.6 + 0.5) / 3)
    assert m["backward_transfer"] == pytest.approx(((0.6 - 0.9) + (0.1 - 0.5)) / 2), "b was trained last: not exposed"
    assert m["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.5 - 0.1)) / 2)
    assert m["zero_shot_transfer"] == pytest.approx(((0.2 - 0.1) + (0.4 - 0.2)) / 2)
    assert m["min_performance"] == pytest.approx((0.4 + 0.2 + 0.1) / 3)
    assert m["anytime_average"] == pytest.approx((0.7 + 0.5 + 0.6 + 0.5 + 0.5) / 5)


def test_the_same_task_twice_in_a_row_is_one_task():
    m = metrics([[0.0, 0.0], [0.5, 0.0], [0.7, 0.1], [0.6, 0.9]], "ab", "aab")
    assert m["learning_accuracy"] == pytest.approx((0.5 + 0.9) / 2)
    assert m["backward_transfer"] == pytest.approx(0.6 - 0.7)


def test_true_zeros_count():
    """Dropping zeros would give 1.0."""
    m = metrics([[0] * 4, [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], "abcd", "abcd")
    assert m["average_performance"] == pytest.approx(0.5)


def test_a_missing_evaluation_makes_none_not_an_average_of_the_rest():
    r = [[0, 0, 0], [0.8, 0.1, 0.1], [0.6, 0.9, 0.1], [0.5, None, 0.9]]
    m = metrics(r, ABC, ABC)
    for name in ("average_performance", "forgetting", "backward_transfer", "average_incremental", "anytime_average",
                 "min_performance", "worst_case_performance"):  # fmt: skip
        assert m[name] is None, name
    assert m["learning_accuracy"] == pytest.approx((0.8 + 0.9 + 0.9) / 3)
    assert m["zero_shot_transfer"] == pytest.approx(0.1)


def test_missing_before_the_first_visit_matters_only_to_zero_shot_transfer():
    r = [[None] * 3, [0.8, None, None], [0.6, 0.9, None], [0.5, 0.7, 1.0]]
    full, ragged = metrics(SQUARE, ABC, ABC), metrics(r, ABC, ABC)
    assert ragged["zero_shot_transfer"] is None
    for name in ("average_performance", "forgetting", "backward_transfer", "learning_accuracy", "anytime_average"):
        assert ragged[name] == pytest.approx(full[name])


def test_one_task_has_no_forgetting():
    m = metrics([[0.1], [0.9]], "a", "a")
    assert m["average_performance"] == m["learning_accuracy"] == pytest.approx(0.9)
    assert m["worst_case_performance"] == pytest.approx(0.9)
    for name in ("forgetting", "backward_transfer", "zero_shot_transfer", "min_performance"):
        assert m[name] is None


def test_interrupted_runs_count_finished_phases_only():
    """Stopped at step 250, in the middle of phase 3."""
    rows = [(i, 0, 100 * i, t, 0, v, 0, 1) for i, row in enumerate(SQUARE[:3]) for t, v in zip(ABC, row)]
    rows += [(3, 0, 250, t, 0, 0.123, 0, 1) for t in ABC]
    log = EvalLog.from_rows(rows)
    m = compute_metrics(log, ABC, visiting(ABC))
    assert m["average_performance"] == pytest.approx((0.6 + 0.9) / 2)
    assert m["backward_transfer"] == pytest.approx(0.6 - 0.8)
    assert m["anytime_average"] == pytest.approx((0.8 + 0.75) / 2)
    assert np.isnan(matrix(log, ABC, visiting(ABC))[3]).all()


def test_nothing_finished_gives_none_everywhere():
    assert set(compute_metrics(EvalLog.from_rows([]), ABC, visiting(ABC)).values()) == {None}
    assert set(metrics(SQUARE[:1], ABC, ABC).values()) == {None}


def test_joint_training_has_only_averages():
    log = log_from_matrix([[0.1, 0.2], [0.7, 0.9]], "ab")
    m = compute_metrics(log, "ab", [Phase(("a", "b"), 100)])
    assert m["average_performance"] == m["anytime_average"] == pytest.approx(0.8)
    assert [k for k, v in m.items() if v is not None] == ["average_performance", "anytime_average"]


def test_independent_runs_average_the_end_of_each_task():
    log = EvalLog.from_rows(reference_rows({"a": (0.0, 0.6), "b": (0.2, 0.8)}))
    m = compute_metrics(log, "ab", visiting("ab"), protocol="independent")
    assert m["average_performance"] == m["learning_accuracy"] == pytest.approx(0.7)
    assert [k for k, v in m.items() if v is not None] == ["average_performance", "learning_accuracy"]


def test_results_are_plain_numbers():
    assert {type(v) for v in metrics(SQUARE, ABC, ABC).values()} == {float, type(None)}


def test_performance_over_time_averages_all_tasks():
    steps, values = performance_over_time(log_from_matrix([[0.0, 0.2], [0.6, None], [0.5, 0.7]], "ab"), "ab")
    assert steps.tolist() == [0, 100, 200]
    assert values == pytest.approx([0.1, math.nan, 0.6], nan_ok=True)


def test_a_log_of_other_tasks_is_refused():
    with pytest.raises(DataError, match="'c' is not a task of the stream"):
        compute_metrics(log_from_matrix(SQUARE, ABC), "ab", visiting("ab"))


# -- forward transfer ----------------------------------------------------------------------------------------------------


def reference_rows(curves: dict[str, Sequence[float]], budget: int = 100):
    """An independent run: each task from scratch, evaluated at equal distances from the start of its phase."""
    for i, (task, values) in enumerate(curves.items(), start=1):
        for k, v in enumerate(values):
            step = (i - 1) * budget + k * budget // (len(values) - 1)
            yield (i, 1, step, task, 0, v, 0.0, 1)


def stream_log() -> EvalLog:
    """Phases a b, evaluated at the middle and the end of each."""
    scores = {"a": (0.0, 0.4, 0.8, 0.7, 0.6), "b": (0.1, 0.2, 0.3, 0.7, 0.9)}
    return EvalLog.from_rows(
        (math.ceil(k / 2), 0, 50 * k, task, 0, v, 0.0, 1) for task, s in scores.items() for k, v in enumerate(s)
    )


def test_forward_transfer_by_hand():
    reference = EvalLog.from_rows(reference_rows({"a": (0.0, 0.4, 0.8), "b": (0.1, 0.4, 0.7)}))
    transfer = forward_transfer(stream_log(), "ab", visiting("ab"), reference)
    auc_b = ((0.3 + 0.7) / 2 + (0.7 + 0.9) / 2) / 2
    assert transfer.auc == pytest.approx([0.4, auc_b])
    assert transfer.reference == pytest.approx([0.4, 0.4])
    m = compute_metrics(stream_log(), "ab", visiting("ab"), reference)
    assert m["forward_transfer_unnormalised"] == pytest.approx((auc_b - 0.4) / 2)
    assert m["forward_transfer"] == pytest.approx((auc_b - 0.4) / 0.6 / 2)


def test_forward_transfer_refuses_without_a_reference():
    with pytest.raises(DataError, match="needs single-task reference runs"):
        forward_transfer(stream_log(), "ab", visiting("ab"), None)
    assert compute_metrics(stream_log(), "ab", visiting("ab"))["forward_transfer"] is None


def test_a_perfect_reference_does_not_explode():
    reference = EvalLog.from_rows(reference_rows({"a": (1.0, 1.0, 1.0), "b": (1.0, 1.0, 1.0)}))
    transfer = forward_transfer(stream_log(), "ab", visiting("ab"), reference)
    assert transfer.normalised == pytest.approx((transfer.auc - 1) / 0.05)


def test_forward_transfer_uses_the_first_visit():
    r = [[0, 0], [1, 0], [0, 1], [1, 1]]
    rows = [(i, 0, 100 * i, t, 0, v, 0.0, 1) for i, row in enumerate(r) for t, v in zip("ab", row)]
    reference = EvalLog.from_rows(reference_rows({"a": (0.0, 1.0), "b": (0.0, 1.0)}))
    assert forward_transfer(EvalLog.from_rows(rows), "ab", visiting("aba"), reference).auc == pytest.approx([0.5, 0.5])


def test_a_longer_reference_is_read_up_to_the_budget():
    reference = EvalLog.from_rows(reference_rows({"a": (0.0, 0.4, 0.8), "b": (0.0, 0.4, 0.8)}, budget=200))
    assert forward_transfer(stream_log(), "ab", visiting("ab"), reference).reference == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (EvalLog.from_rows(reference_rows({"a": (0, 1)})), "'b' is evaluated in 0 training phases"),
        (stream_log(), "'a' is evaluated in 2 training phases"),
        (EvalLog.from_rows(reference_rows({"a": (0, 1), "b": (0, 1)}, budget=60)), "to 100 units later; found 2 at"),
    ],
)
def test_unusable_references_are_refused(reference, message):
    with pytest.raises(DataError, match=message):
        forward_transfer(stream_log(), "ab", visiting("ab"), reference)


def test_a_run_without_evaluation_at_the_start_of_the_phase_has_no_area():
    rows = list(reference_rows({"a": (0, 0.5, 1), "b": (0, 0.5, 1)}))
    log = EvalLog.from_rows([r for r in rows if r[2] > 0])
    with pytest.raises(DataError, match="'a' needs complete evaluations from the start"):
        forward_transfer(log, "ab", visiting("ab"), EvalLog.from_rows(rows))


# -- properties ----------------------------------------------------------------------------------------------------------

unit = st.floats(0, 1, allow_nan=False)


@st.composite
def square(draw, most: int = 5):
    t = draw(st.integers(1, most))
    return draw(st.lists(st.lists(unit, min_size=t, max_size=t), min_size=t + 1, max_size=t + 1))


@given(square())
def test_identity_of_average_learning_accuracy_and_backward_transfer(r):
    """ACC = LA + BWT (T-1)/T, exactly, if every task is visited once."""
    t = len(r[0])
    names = "abcde"[:t]
    m = metrics(r, names, names)
    backward = m["backward_transfer"] or 0.0
    assert m["average_performance"] == pytest.approx(m["learning_accuracy"] + backward * (t - 1) / t)
    if t > 1:
        assert m["forgetting"] >= -m["backward_transfer"] - 1e-12, (
            "the best earlier score is at least that of the visit"
        )
        assert m["worst_case_performance"] <= m["average_performance"] + 1e-12


@given(square(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_renaming_tasks_changes_nothing(r, random):
    names = list("abcde"[: len(r[0])])
    order = random.sample(range(len(names)), len(names))
    renamed = [names[i] for i in order]
    assert metrics(r, names, names) == pytest.approx(metrics(r, renamed, renamed), nan_ok=True)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.data())
def test_recurring_streams_against_a_slow_definition(names, data):
    r = data.draw(st.lists(st.lists(unit, min_size=3, max_size=3), min_size=len(names) + 1, max_size=len(names) + 1))
    m, p = metrics(r, ABC, names), len(names)
    seen = [t for t in ABC if t in names]
    last = {t: max(i for i, n in enumerate(names, 1) if n == t) for t in seen}
    exposed = [t for t in seen if last[t] < p]
    final = {t: r[p][ABC.index(t)] for t in seen}
    assert m["average_performance"] == pytest.approx(sum(final.values()) / len(seen))
    expected = sum(final[t] - r[last[t]][ABC.index(t)] for t in exposed) / len(exposed) if exposed else None
    assert m["backward_transfer"] == pytest.approx(expected)


# -- negative controls: known wrong definitions must fail the checks above -----------------------------------------------


def average_without_zeros(r, visits):
    scores = r[visits.count, visits.visited].copy()
    scores[scores == 0] = np.nan
    return float(np.nanmean(scores))


def average_of_what_is_there(r, visits):
    return float(np.nanmean(r[visits.count, visits.visited]))


def average_of_all_tasks(r, visits):
    return float(r[visits.count].mean())


def forgetting_with_last_row(r, visits):
    return float(np.mean([r[visits.first[j] :, j].max() - r[-1, j] for j in np.flatnonzero(visits.exposed)] or [0.0]))


def forgetting_by_position(r, visits):
    t = r.shape[1]
    return float(np.mean([r[j + 1 : -1, j].max() - r[-1, j] for j in range(t - 1)] or [0.0]))


def backward_by_position(r, visits):
    return float(np.mean([r[-1, j] - r[j + 1, j] for j in range(r.shape[1] - 1)] or [0.0]))


def zero_shot_against_current_model(r, visits):
    tasks = np.flatnonzero(visits.first >= 2)
    return float(np.mean(r[visits.first[tasks] - 1, tasks] - r[visits.first[tasks] - 1, tasks]))


@pytest.mark.parametrize(
    ("name", "wrong", "check"),
    [
        ("average_performance", average_without_zeros, test_true_zeros_count),
        ("average_performance", average_of_what_is_there,
         test_a_missing_evaluation_makes_none_not_an_average_of_the_rest),
        ("average_performance", average_of_all_tasks, test_non_square_more_tasks_than_phases),
        ("forgetting", forgetting_with_last_row, test_forgetting_is_negative_when_tasks_improve),
        ("forgetting", forgetting_by_position, test_recurring_tasks_are_defined_by_visits_not_by_position),
        ("backward_transfer", backward_by_position, test_recurring_tasks_are_defined_by_visits_not_by_position),
        ("zero_shot_transfer", zero_shot_against_current_model, test_single_visits_give_the_classical_numbers),
    ],
)  # fmt: skip
def test_wrong_definitions_are_caught(monkeypatch, name, wrong, check):
    monkeypatch.setattr(continual, name, wrong)
    with pytest.raises(AssertionError):
        check()


# -- documentation -------------------------------------------------------------------------------------------------------


def test_every_metric_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in METRICS:
        section = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
        assert section, f"docs/metrics.md has no section on {name}"
        for part in ("**Formula**", "**Source**", "**Range**", "**Healthy**"):
            assert part in section.group(1), f"{name}: {part} is missing"


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    exec(re.search(r"```python\n(.*?)```", text, flags=re.S).group(1), {})
    assert capsys.readouterr().out.split() == ["0.625", "-0.75"]


def test_every_metric_function_cites_its_formula():
    for function in (continual.average_performance, continual.average_incremental, continual.learning_accuracy,
                     continual.forgetting, continual.backward_transfer, continual.zero_shot_transfer,
                     continual.forward_transfer, continual.min_performance):  # fmt: skip
        assert re.search(r"et al\. 20\d\d|Ranzato 2017", inspect.getdoc(function) or ""), function.__name__


def test_visits():
    visits = find_visits(("a", "b", "x"), [Phase("a", 1), Phase(("a", "b"), 1), Phase("a", 1)])
    assert visits.first.tolist() == [1, 2, 0] and visits.last.tolist() == [3, 2, 0]
    assert visits.exposed.tolist() == [False, True, False]


def test_no_metric_uses_the_middle_of_a_phase_for_its_missing_end():
    points = [(0, 0, 0.0), (1, 50, 0.2), (1, 100, 0.9), (2, 150, 0.5), (2, 200, 0.6)]
    phases = [Phase("a", 100), Phase("b", 100)]

    def log(points):
        return EvalLog.from_rows((i, 0, s, t, 0, v, 0.0, 1) for i, s, v in points for t in "ab")

    whole, holed = log(points), log([p for p in points if p[1] != 100])
    alone = [(1, 0, "a", 0.0), (1, 100, "a", 0.4), (2, 100, "b", 0.0), (2, 200, "b", 0.4)]
    reference = EvalLog.from_rows((i, 0, s, t, 0, v, 0.0, 1) for i, s, t, v in alone)
    full, m = (compute_metrics(one, "ab", phases, reference) for one in (whole, holed))
    assert {k for k, v in full.items() if v is None} == {"relearning_savings"}  # no task comes back
    for name in ("average_incremental", "learning_accuracy", "forgetting", "backward_transfer", "zero_shot_transfer"):
        assert m[name] is None, name
    assert m["average_performance"] == full["average_performance"], "the final row is there"
    assert m["forward_transfer"] is None
    with pytest.raises(DataError, match="task 'a' needs complete evaluations from the start of its first visit to 100"):
        forward_transfer(holed, "ab", phases, reference)
