"""The raw log: strict reading, canonical order, complete evaluations."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.contracts import Phase
from clbench.errors import DataError
from clbench.metrics import EvalLog, compute_metrics, finished_phases, matrix, read_eval_csv
from clbench.metrics.log import HEADER

ROWS = [
    (0, 0, 0, "a", 0, 0.0, -1.0, 5),
    (0, 0, 0, "a", 1, 1.0, 1.0, 5),
    (0, 0, 0, "b", 0, 0.5, 0.0, 3),
    (1, 1, 10, "a", 0, 1.0, 1.0, 2),
    (1, 1, 10, "a", 1, 0.5, 1.0, 2),
    (1, 0, 10, "b", 0, 0.25, 0.0, 9),
]


def text(rows=ROWS, header=HEADER) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in [header, *rows])


def test_reads_back_what_was_written(tmp_path):
    (tmp_path / "eval.csv").write_text(text())
    log = read_eval_csv(tmp_path / "eval.csv")
    assert log == EvalLog.from_rows(ROWS) and len(log) == 6
    assert log.tasks == ("a", "b")
    steps, mean, error = log.curve("a")
    assert steps.tolist() == [0, 10] and mean.tolist() == [0.5, 0.75]
    assert error == pytest.approx([0.5, 0.25])
    assert matrix(log, ("b", "a"), 1).tolist() == [[0.5, 0.5], [0.25, 0.75]]
    assert log.matrix(("b", "a"), 1).tolist() == [[0.5, 0.5], [0.25, 0.75]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected the header"),
        (text(header=("phase", "step")), "line 1: the header is 'phase,step'"),
        (text([(1, 1, 10, "a", 0, 0.5, 0.5)]), "line 2: 7 fields, expected 8"),
        (text([*ROWS, (1, 1, 10, "a", 0, "nan", 0.5, 1)]), "line 8: score must be a finite number, got 'nan'"),
        (text([(1, 1, 10, "a", 0, 0.5, "inf", 1)]), "line 2: return must be a finite number, got 'inf'"),
        (text([(1, 1, "1e1", "a", 0, 0.5, 0.5, 1)]), "line 2: step must be a whole number >= 0, got '1e1'"),
        (text([(-1, 1, 1, "a", 0, 0.5, 0.5, 1)]), "line 2: phase must be a whole number >= 0, got '-1'"),
        (text([(1, 1, 1, "", 0, 0.5, 0.5, 1)]), "line 2: task must be a name"),
        (text() + "\n", "line 8: 0 fields"),
        (text()[:-1], "line 7: the last line is cut off"),
        (text([ROWS[0], ROWS[0]]), "episode 0 of task 'a' is there twice at phase 0, step 0"),
        (text([(1, 1, 10, "a", 0, 0, 0, 1), (2, 1, 5, "a", 0, 0, 0, 1)]), "phase 2 begins at step 5, before the end"),
    ],
)
def test_corrupt_files_are_refused_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "eval.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        read_eval_csv(path)
    assert str(path) in str(error.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="Cannot read the evaluation log"):
        read_eval_csv(tmp_path / "eval.csv")
    (tmp_path / "eval.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="Cannot read the evaluation log"):
        read_eval_csv(tmp_path / "eval.csv")


@given(st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_rows_means_nothing(shuffler: random.Random):
    rng = np.random.default_rng(0)
    rows = [(i, 0, 10 * i, t, e, float(rng.random()), 0.0, 1) for i in range(3) for t in "ab" for e in range(7)]
    shuffled = shuffler.sample(rows, len(rows))
    phases = [Phase("a", 10), Phase("b", 10)]
    original, other = EvalLog.from_rows(rows), EvalLog.from_rows(shuffled)
    assert original == other
    assert compute_metrics(original, "ab", phases) == compute_metrics(other, "ab", phases), "equal to the last bit"


def test_incomplete_evaluations_are_missing_not_half_counted():
    log = EvalLog.from_rows([r for r in ROWS if r[:5] != (1, 1, 10, "a", 1)])
    (evaluation,) = log.incomplete
    assert (evaluation.task, evaluation.step, evaluation.episodes, evaluation.expected) == ("a", 10, 1, 2)
    assert math.isnan(evaluation.mean)
    assert matrix(log, "ab", 1)[1] == pytest.approx([math.nan, 0.25], nan_ok=True)
    assert compute_metrics(log, "ab", [Phase("a", 10)])["average_performance"] is None


def test_rows_of_the_matrix_are_the_last_step_of_each_phase():
    rows = [(1, 1, s, "a", 0, v, 0.0, 1) for s, v in ((5, 0.1), (10, 0.2))] + [(2, 1, 15, "a", 0, 0.3, 0.0, 1)]
    log = EvalLog.from_rows(rows)
    assert matrix(log, "a", 2) == pytest.approx(np.array([[math.nan], [0.2], [0.3]]), nan_ok=True)
    phases = [Phase("a", 10), Phase("a", 10)]
    assert matrix(log, "a", phases) == pytest.approx(np.array([[math.nan], [0.2], [math.nan]]), nan_ok=True)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(0, 0)], 0),
        ([(0, 0), (1, 50)], 0),
        ([(0, 0), (1, 100)], 1),
        ([(0, 0), (1, 100), (2, 150)], 1),
        ([(0, 0), (1, 128), (2, 227)], 1),  # phase 1 ended late, so phase 2 has not had its 100 units
        ([(0, 0), (1, 128), (2, 228)], 2),
        ([(0, 0), (1, 90), (2, 200)], 2),  # phase 2 has begun, so phase 1 is over, though its end was not evaluated
        ([(0, 0), (1, 90), (2, 190)], 1),  # the loop counts the whole budget of an agent that stops early
    ],
)
def test_finished_phases(steps, expected):
    log = EvalLog.from_rows([(i, 0, s, "a", 0, 0.5, 0.0, 1) for i, s in steps])
    assert finished_phases(log, [Phase("a", 100), Phase("a", 100)]) == expected


def test_columns_of_different_length_are_refused():
    with pytest.raises(DataError, match="different lengths"):
        EvalLog(phase=[0], visit=[0], step=[0], task=["a"], episode=[0, 1], score=[0.0], return_=[0.0], length=[1])
    with pytest.raises(DataError, match="rows have 2 fields, expected 8"):
        EvalLog.from_rows([(0, 1)])


def test_the_middle_of_a_phase_is_not_its_end():
    phases = [Phase("a", 100), Phase("a", 100)]
    rows = [
        (i, 0, s, "a", 0, score, 0.0, 1) for i, s, score in ((0, 0, 0.1), (1, 50, 0.2), (1, 100, 0.3), (2, 200, 0.4))
    ]
    assert matrix(EvalLog.from_rows(rows), "a", phases)[:, 0].tolist() == [0.1, 0.3, 0.4]
    holed = EvalLog.from_rows(r for r in rows if r[2] != 100)
    assert matrix(holed, "a", phases)[:, 0] == pytest.approx([0.1, math.nan, 0.4], nan_ok=True)
    assert matrix(holed, "a", 2)[1, 0] == 0.2, "without the phases nobody can tell"
