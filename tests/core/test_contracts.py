"""Tasks, phases and streams: what they accept, and that a stored stream is the same stream."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench import Phase, Stream, Task, TaskList
from clbench.contracts import REVEALS, Metric, is_positive_whole
from clbench.errors import ConfigError, UnknownNameError

# -- evaluation lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column",
    [
        [[0, 1], [2, 3], [4, 5]],
        np.arange(6).reshape(3, 2),
        torch.arange(6).reshape(3, 2),
        [torch.tensor([0, 1]), np.array([2, 3]), (4, 5)],
        [range(2), range(2, 4), range(4, 6)],
    ],
    ids=["lists", "array", "tensor", "mixed", "ranges"],
)
def test_columns_are_frozen_to_plain_tuples(column: Any) -> None:
    frozen = TaskList("l", (1, 2, 3), {"goal": column})
    assert frozen.options["goal"] == ((0, 1), (2, 3), (4, 5))
    assert all(type(x) is int for row in frozen.options["goal"] for x in row)
    assert frozen == TaskList("l", [1, 2, 3], {"goal": column})  # type: ignore[arg-type]
    assert json.loads(json.dumps(frozen.options)) == {"goal": [[0, 1], [2, 3], [4, 5]]}


def test_a_list_does_not_change_with_what_it_was_made_from() -> None:
    goals = [[0, 1], [2, 3]]
    frozen = TaskList("l", torch.tensor([5, 6]), {"goal": goals})  # type: ignore[arg-type]
    goals[0][0] = 99
    assert frozen.options["goal"] == ((0, 1), (2, 3)) and frozen.seeds == (5, 6)
    assert all(type(s) is int for s in frozen.seeds)


@given(st.integers(1, 20), st.integers(1, 25))
def test_head_keeps_the_first_episodes(size: int, n: int) -> None:
    full = TaskList("l", range(size), {"k": range(10, 10 + size), "text": ["ab"] * size})  # type: ignore[arg-type]
    head = full.head(n)
    assert len(head) == min(n, size)
    assert head.seeds == full.seeds[:n]
    assert head.options == {k: v[:n] for k, v in full.options.items()}
    assert (head is full) == (n >= size) and (head.name == full.name) == (n >= size)
    assert full.head(None) is full


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskList("l", ()), "'l' has no episodes; give at least one seed"),
        (lambda: TaskList("l", (1, 2), {"g": (1,)}), "option 'g' has 1 rows for 2 seeds; give one row per episode"),
        (lambda: TaskList("l", (1, 2), {"g": 3}), "option 'g' must be a column with one row per episode, got 3"),  # type: ignore[arg-type]
        (lambda: TaskList("l", (1, 2), {"g": "ab"}), "option 'g' must be a column"),  # type: ignore[arg-type]
        (lambda: TaskList("l", (1, 2), {"g": torch.tensor(3)}), "option 'g' must be a column"),  # type: ignore[arg-type]
        (lambda: TaskList.from_seeds(0), "number of evaluation episodes must be at least 1, got 0"),
        (lambda: TaskList.from_seeds(3).head(0), "must be at least 1, got 0"),
        (lambda: TaskList.from_seeds(3).head(-1), "must be at least 1, got -1"),
    ],
)
def test_wrong_lists_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_lists_from_seeds_are_named_by_what_they_hold() -> None:
    made = TaskList.from_seeds(3, first=7)
    assert made.seeds == (7, 8, 9) and made.options == {}
    assert made.name != TaskList.from_seeds(3, first=8).name != TaskList.from_seeds(4, first=8).name


# -- metrics, tasks, phases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sucess"}, "Unknown metric 'sucess'. Did you mean 'success'"),
        ({"when": "evr"}, "Unknown metric.when 'evr'. Did you mean 'ever'"),
        ({"low": 1.0, "high": 1.0}, "finite with low < high, got low=1.0, high=1.0"),
        ({"low": 2.0}, "low < high"),
        ({"high": math.inf}, "must be finite"),
        ({"low": -math.inf}, "must be finite"),
        ({"low": math.nan}, "must be finite"),
    ],
)
def test_wrong_metrics_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Metric(**arguments)


def test_a_task_takes_the_name_of_a_metric() -> None:
    assert Task("a", "env", metric="return").metric == Metric("return")
    with pytest.raises(UnknownNameError, match="Unknown metric 'retrun'. Did you mean 'return'"):
        Task("a", "env", metric="retrun")


@pytest.mark.parametrize("budget", [0, -1, 0.5, True, None, "10", math.inf, -math.inf, math.nan, np.int64(0)])
def test_wrong_budgets_are_refused(budget: Any) -> None:
    assert not is_positive_whole(budget)
    with pytest.raises(ConfigError, match="budget of a phase must be a positive whole number, got "):
        Phase("a", budget)


@pytest.mark.parametrize("budget", [10, 10.0, np.int64(10), np.float32(10)])
def test_whole_budgets_become_python_integers(budget: Any) -> None:
    phase = Phase("a", budget)
    assert phase.budget == 10 and type(phase.budget) is int


def test_a_phase_names_one_task_or_several() -> None:
    assert Phase("ab", 1).tasks == ("ab",)
    assert Phase(["a", "b"], 1).tasks == ("a", "b")  # type: ignore[arg-type]
    assert Phase(["a", "b"], 1) == Phase(("a", "b"), 1)  # type: ignore[arg-type]


# -- streams -------------------------------------------------------------------------------------------------------------

A, B = Task("maze-a", "env"), Task("maze-b", "env")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stream("s", (), (Phase("a", 1),)), "'s' needs at least one task and one phase"),
        (lambda: Stream("s", (A,), ()), "needs at least one task and one phase"),
        (lambda: Stream("s", (A, A), (Phase("maze-a", 1),)), "two tasks of the same name"),
        (
            lambda: Stream("s", (A, B), (Phase("maze-c", 1),)),
            "Unknown task 'maze-c' in stream 's'. Did you mean 'maze-",
        ),
        (lambda: Stream("s", (A, B), (Phase(("maze-a", "zzz"), 1),)), "Unknown task 'zzz' in stream 's'"),
        (lambda: Stream("s", (A,), (Phase((), 1),)), "'s' has a phase without a task"),
        (lambda: Stream("s", (A,), (Phase("maze-a", 1),), "boundary"), "Unknown value of reveals 'boundary'. Did you"),  # type: ignore[arg-type]
        (lambda: Stream("s", (A, B), (Phase("maze-a", 1),)).task("maze-x"), "Unknown task 'maze-x' in stream 's'"),
    ],
)
def test_wrong_streams_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def task_lists(draw: st.DrawFn) -> TaskList:
    n = draw(st.integers(1, 4))
    rows = st.integers() | st.floats(allow_nan=False) | st.lists(st.integers(), max_size=2) | st.text(max_size=3)
    options = draw(st.dictionaries(st.text(max_size=4), st.lists(rows, min_size=n, max_size=n), max_size=2))
    return TaskList(draw(st.text(max_size=5)), tuple(draw(st.lists(st.integers(), min_size=n, max_size=n))), options)  # type: ignore[arg-type]


METRICS = st.builds(
    Metric,
    st.sampled_from(["success", "return"]),
    st.floats(-100, 0),
    st.floats(0.5, 100),
    st.sampled_from(["end", "ever"]),
)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    names = draw(st.lists(st.text(max_size=5), min_size=1, max_size=3, unique=True))
    tasks = [
        Task(
            name,
            draw(st.text(max_size=5)),
            draw(st.dictionaries(st.text(max_size=4), PLAIN, max_size=2)),
            draw(st.none() | st.text(max_size=5)),
            draw(task_lists()),
            draw(METRICS),
        )
        for name in names
    ]
    which = st.sampled_from(names) | st.lists(st.sampled_from(names), min_size=1, max_size=3).map(tuple)
    phases = draw(st.lists(st.builds(Phase, which, st.integers(1, 10**9), st.integers(1, 9)), min_size=1, max_size=4))
    return Stream(draw(st.text(max_size=5)), tuple(tasks), tuple(phases), draw(st.sampled_from(REVEALS)))


@given(streams())
def test_a_stored_stream_is_the_same_stream(stream: Stream) -> None:
    data = stream.to_dict()
    assert Stream.from_dict(data) == stream
    text = json.dumps(data)
    again = Stream.from_dict(json.loads(text))
    assert again == stream
    assert json.dumps(again.to_dict()) == text
    assert [stream.task(t.name) for t in stream.tasks] == list(stream.tasks)


def test_the_comparison_sees_every_part() -> None:
    """Negative control: dropping any one field of the stored form gives another stream or an error."""
    stream = Stream(
        "s",
        (Task("a", "env", {"k": 1}, "data", TaskList("l", (1,), {"g": (2,)}), Metric("return", -1, 2, "ever")),),
        (Phase("a", 3, 2),),
        "task_id",
    )

    def paths(value: Any, at: tuple = ()) -> list[tuple]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [p for k, v in pairs for p in ([(*at, k)], paths(v, (*at, k))) for p in p]

    text = json.dumps(stream.to_dict())
    everything = paths(json.loads(text))
    assert len(everything) > 20
    for path in everything:
        data = json.loads(text)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        try:
            changed = Stream.from_dict(data)
        except (ConfigError, KeyError, TypeError):
            continue
        assert changed != stream, path


def test_changing_what_to_dict_returned_changes_no_stream() -> None:
    stream = Stream("s", (Task("a", "env", {"sizes": [1, 2]}),), (Phase("a", 1),))
    stream.to_dict()["tasks"][0]["env_kwargs"]["sizes"].append(3)
    assert stream.task("a").env_kwargs == {"sizes": [1, 2]}
