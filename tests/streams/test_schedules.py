"""Schedules: what is conserved, the probabilities they promise, and what wrong options are told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clbench import Phase, Stream, Task, register_stream
from clbench.config import call_with_options
from clbench.errors import ConfigError, ContractError
from clbench.registry import entries, resolve
from clbench.rng import numpy_generator
from clbench.streams import Suite, make_stream
from clbench.streams.core import joint, number_visits, one_phase_per_task
from clbench.streams.schedules import Slots, blurred, markov, power_law, sequential, uniform

NAMES = sorted(entries("schedules"))
SCHEDULES = {name: resolve("schedules", name) for name in NAMES}
OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "sequential": st.just({}),
    "cyclic": st.fixed_dictionaries({"cycles": st.integers(1, 4)}),
    "shuffled": st.fixed_dictionaries({"cycles": st.integers(1, 4)}),
    "uniform": st.fixed_dictionaries({"phases": st.integers(0, 12)}),
    "markov": st.fixed_dictionaries({"phases": st.integers(0, 12), "stay": st.floats(0, 1)}),
    "blurred": st.fixed_dictionaries({"overlap": st.floats(0, 1), "slices": st.integers(1, 12)}),
    "power-law": st.fixed_dictionaries(
        {"phases": st.integers(0, 12), "exponent": st.floats(0, 50), "introduce": st.booleans()}
    ),
}


def draw_slots(name: str, num_tasks: int, budget: int, seed: int, options: dict[str, Any]) -> Slots:
    rng = numpy_generator(seed, "schedule")
    return call_with_options(SCHEDULES[name], options, where=name, num_tasks=num_tasks, budget=budget, rng=rng)


def test_every_schedule_is_tested() -> None:
    assert set(OPTIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(1, 6), st.integers(12, 200), st.integers(0, 9), st.data())
def test_the_whole_budget_is_spent(name: str, num_tasks: int, budget: int, seed: int, data: st.DataObject) -> None:
    options = data.draw(OPTIONS[name])
    slots = draw_slots(name, num_tasks, budget, seed, options)
    assert sum(b for _, b in slots) == num_tasks * budget
    assert all(type(t) is int and 0 <= t < num_tasks for t, _ in slots)
    assert all(type(b) is int and b >= 1 for _, b in slots)
    assert slots == draw_slots(name, num_tasks, budget, seed, options)  # pure


@pytest.mark.parametrize("name", NAMES)
def test_only_random_schedules_depend_on_the_seed(name: str) -> None:
    different = {tuple(draw_slots(name, 6, 60, seed, {})) for seed in range(5)}
    assert (len(different) == 1) == (name in ("sequential", "cyclic"))


def test_sequential_and_cyclic_by_hand() -> None:
    assert draw_slots("sequential", 3, 5, 0, {}) == [(0, 5), (1, 5), (2, 5)]
    assert draw_slots("cyclic", 2, 5, 0, {"cycles": 3}) == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1), (1, 1)]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_shuffled_visits_every_task_once_per_cycle(num_tasks: int, cycles: int, seed: int) -> None:
    slots = draw_slots("shuffled", num_tasks, 10, seed, {"cycles": cycles})
    for c in range(cycles):
        assert sorted(t for t, _ in slots[c * num_tasks : (c + 1) * num_tasks]) == list(range(num_tasks))
    spent = Counter()
    for t, b in slots:
        spent[t] += b
    assert set(spent.values()) == {10}


def test_shuffled_orders_are_equally_likely() -> None:
    rng = numpy_generator(0, "orders")
    orders = Counter(tuple(t for t, _ in SCHEDULES["shuffled"](num_tasks=3, budget=1, rng=rng)) for _ in range(6000))
    assert len(orders) == 6 and stats.chisquare(list(orders.values())).pvalue > 1e-3


# -- uniform and Markov --------------------------------------------------------------------------------------------------

LONG = 20_000


def tasks_of(slots: Slots) -> np.ndarray:
    return np.array([t for t, _ in slots])


def test_uniform_is_uniform_and_independent() -> None:
    tasks = tasks_of(uniform(num_tasks=4, budget=LONG, rng=numpy_generator(0, "uniform"), phases=LONG))
    table = np.bincount(tasks[:-1] * 4 + tasks[1:], minlength=16)
    assert stats.chisquare(table).pvalue > 1e-3
    sticky = tasks_of(markov(num_tasks=4, budget=LONG, rng=numpy_generator(0, "m"), phases=LONG, stay=0.3))
    table = np.bincount(sticky[:-1] * 4 + sticky[1:], minlength=16)
    assert stats.chisquare(table).pvalue < 1e-6  # negative control


@pytest.mark.parametrize("stay", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_markov_transitions(stay: float) -> None:
    tasks = tasks_of(markov(num_tasks=4, budget=LONG, rng=numpy_generator(1, "markov"), phases=LONG, stay=stay))
    steps = (tasks[1:] - tasks[:-1]) % 4
    counts = np.bincount(steps, minlength=4)
    expected = np.array([stay] + [(1 - stay) / 3] * 3) * len(steps)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3
        shifted = np.array([stay + 0.03] + [(0.97 - stay) / 3] * 3)  # negative control: another probability
        if shifted.min() > 0 and stay > 0:
            assert stats.chisquare(counts, shifted * len(steps)).pvalue < 1e-3


def test_markov_starts_anywhere_and_one_task_is_enough() -> None:
    starts = [markov(num_tasks=3, budget=9, rng=numpy_generator(s, "start"))[0][0] for s in range(900)]
    assert stats.chisquare(np.bincount(starts, minlength=3)).pvalue > 1e-3
    assert set(tasks_of(markov(num_tasks=1, budget=9, rng=numpy_generator(0, "one"), stay=0.0))) == {0}


# -- blurred boundaries --------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(12, 99), st.integers(1, 12), st.integers(0, 9))
def test_no_overlap_is_the_sequential_schedule(num_tasks: int, budget: int, slices: int, seed: int) -> None:
    rng = numpy_generator(seed, "blurred")
    plain = sequential(num_tasks=num_tasks, budget=budget, rng=rng)
    assert blurred(num_tasks=num_tasks, budget=budget, rng=rng, overlap=0.0, slices=slices) == plain


def timeline(slots: Slots) -> np.ndarray:
    """The task of every unit of the budget."""
    return np.repeat([t for t, _ in slots], [b for _, b in slots])


def shares(overlap: float, runs: int = 3000, slices: int = 20) -> np.ndarray:
    """P(the later of two tasks) for each slice; two tasks of ``slices`` units, so a unit is a slice."""
    rng = numpy_generator(0, "shares")
    return np.mean(
        [timeline(blurred(num_tasks=2, budget=slices, rng=rng, overlap=overlap, slices=slices)) for _ in range(runs)],
        axis=0,
    )


@pytest.mark.parametrize("overlap", [0.3, 0.5, 1.0])
def test_tasks_mix_linearly_inside_the_overlap_and_nowhere_else(overlap: float) -> None:
    x = (np.arange(40) + 0.5) / 20 - 1  # time from the boundary, in task lengths
    expected = np.clip(x / overlap + 0.5, 0, 1)
    measured = shares(overlap)
    inside = np.abs(x) < overlap / 2
    assert np.array_equal(measured[~inside], expected[~inside])
    error = np.sqrt(expected[inside] * (1 - expected[inside]) / 3000)
    assert (np.abs(measured[inside] - expected[inside]) < 4.5 * error).all()
    assert abs(measured[19:21].mean() - 0.5) < 0.03  # even at the boundary
    assert abs(measured.mean() - 0.5) < 0.01  # each task keeps its expected budget
    step = (x > 0).astype(float)  # negative control: the sequential schedule does not mix
    assert (np.abs(step[inside] - expected[inside]) >= 4.5 * error).any()


def test_blurred_phases_are_joined_and_concern_neighbours_only() -> None:
    slots = blurred(num_tasks=5, budget=100, rng=numpy_generator(0, "blurred"), overlap=1.0, slices=25)
    tasks = tasks_of(slots)
    assert (tasks[1:] != tasks[:-1]).all() and (np.abs(np.diff(tasks)) <= 2).all()
    at = np.arange(500) / 100
    assert (np.abs(timeline(slots) + 0.5 - at) <= 1.0 + 1e-9).all()  # never more than half a task early or late


# -- power law -----------------------------------------------------------------------------------------------------------


def power_law_p_value(streams: list[np.ndarray], num_tasks: int, exponent: float) -> float:
    """Chi-square of which *rank of recency* came next, against ``age ** -exponent`` given the ages at that moment.

    Observed and expected counts are summed over the run, task by recency rank; under the null the differences are a sum of
    martingale terms whose covariance is known, from which the statistic is made.
    """
    difference, covariance = np.zeros(num_tasks), np.zeros((num_tasks, num_tasks))
    for tasks in streams:
        last = np.arange(-num_tasks, 0)
        for time, task in enumerate(tasks):
            age = time - last
            order = np.argsort(age)
            weight = age[order].astype(float) ** -exponent
            p = weight / weight.sum()
            difference += (order == task) - p
            covariance += np.diag(p) - np.outer(p, p)
            last[task] = time
    d, c = difference[:-1], covariance[:-1, :-1]  # one rank follows from the others
    return float(stats.chi2.sf(d @ np.linalg.solve(c, d), num_tasks - 1))


def recurrence(exponent: float, seed: int = 0, phases: int = 6000, num_tasks: int = 8) -> np.ndarray:
    rng = numpy_generator(seed, "power-law")
    return tasks_of(
        power_law(num_tasks=num_tasks, budget=phases, rng=rng, exponent=exponent, phases=phases, introduce=False)
    )


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_the_next_task_follows_the_power_law_of_its_age(exponent: float) -> None:
    # many short streams: with a large exponent a long one ends in a single task
    streams = [recurrence(exponent, seed, phases=16, num_tasks=4) for seed in range(300)]
    assert power_law_p_value(streams, 4, exponent) > 1e-3
    assert power_law_p_value(streams, 4, exponent + 0.3) < 1e-3  # negative control: another exponent


def test_the_first_draw_by_brute_force() -> None:
    """Before anything is seen, task ``k`` of 4 has the age ``4 - k``."""
    rng = numpy_generator(0, "first")
    first = [power_law(num_tasks=4, budget=4, rng=rng, exponent=1.0, introduce=False)[0][0] for _ in range(4000)]
    weight = 1 / np.array([4, 3, 2, 1])
    assert stats.chisquare(np.bincount(first, minlength=4), weight / weight.sum() * 4000).pvalue > 1e-3


def test_exponent_zero_is_the_uniform_schedule() -> None:
    assert stats.chisquare(np.bincount(recurrence(0.0), minlength=8)).pvalue > 1e-3


@given(st.integers(1, 12), st.integers(1, 60), st.floats(0, 3), st.integers(0, 2**32))
def test_new_tasks_arrive_in_order_and_evenly_spaced(num_tasks: int, phases: int, exponent: float, seed: int) -> None:
    rng = numpy_generator(seed, "introduce")
    tasks = tasks_of(power_law(num_tasks=num_tasks, budget=phases, rng=rng, exponent=exponent, phases=phases))
    first = {int(t): i for i, t in reversed(list(enumerate(tasks)))}
    assert sorted(first) == list(range(min(num_tasks, phases))), "every task comes, if there are phases enough"
    if phases >= num_tasks:
        assert [first[k] for k in range(num_tasks)] == [k * phases // num_tasks for k in range(num_tasks)]


def test_between_arrivals_the_known_tasks_follow_the_power_law() -> None:
    """Two tasks, eight phases: in the last three, the older of both has the weight ``age ** -2``, by brute force."""
    counts = np.zeros(2)
    expected = np.zeros(2)
    for seed in range(3000):
        rng = numpy_generator(seed, "pair")
        tasks = tasks_of(power_law(num_tasks=2, budget=4, rng=rng, exponent=2.0, phases=8))
        assert list(tasks[:5]) == [0, 0, 0, 0, 1]
        for time in (5, 6, 7):
            age = np.array([time - np.flatnonzero(tasks[:time] == k)[-1] for k in (0, 1)])
            weight = age.astype(float) ** -2
            expected += weight / weight.sum()
            counts[tasks[time]] += 1
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert stats.chisquare(counts, [sum(expected) / 2] * 2).pvalue < 1e-3  # negative control: uniform


def gaps(tasks: np.ndarray) -> np.ndarray:
    """Phases between successive visits of the same task."""
    last: dict[int, int] = {}
    found = []
    for time, task in enumerate(tasks):
        if task in last:
            found.append(time - last[task])
        last[task] = time
    return np.array(found)


def test_recurrence_times_have_a_heavy_tail() -> None:
    heavy, plain = gaps(recurrence(1.0)), gaps(recurrence(0.0))
    assert np.median(heavy) < np.median(plain)  # what was just seen comes back soon
    limit = 10 * 8  # ten times the mean gap of eight tasks
    assert (heavy > limit).mean() > 10 * max((plain > limit).mean(), 1 / len(plain))
    assert abs(plain.mean() - 8) < 0.5
    # a geometric distribution of the same mean has no such tail
    assert (heavy > limit).mean() > 3 * (1 - 1 / heavy.mean()) ** limit


@pytest.mark.parametrize("exponent", [1000.0, 1e-9])
def test_extreme_exponents_stay_probabilities(exponent: float) -> None:
    tasks = recurrence(exponent, phases=50)
    assert len(tasks) == 50
    if exponent > 1:
        assert set(tasks) == {7}  # the virtual history ends with the last task, and nothing else is ever as recent


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cyclic", {"cycles": 0}, "cycles must be at least 1, got 0"),
        ("shuffled", {"cycles": -1}, "cycles must be at least 1, got -1"),
        ("cyclic", {"cycles": 100}, "A budget of 60 cannot be divided into 100 phases; raise it or use fewer phases"),
        ("uniform", {"phases": -1}, "phases must be >= 0, got -1"),
        ("uniform", {"phases": 181}, "A budget of 180 cannot be divided into 181 phases"),
        ("markov", {"stay": 1.5}, r"stay must be in \[0, 1\], got 1.5"),
        ("markov", {"stay": "nan"}, "stay is NaN"),
        ("blurred", {"overlap": -0.1}, r"overlap must be in \[0, 1\], got -0.1"),
        ("blurred", {"slices": 0}, "slices must be at least 1, got 0"),
        (
            "blurred",
            {"slices": 61},
            "blurred cuts each task's budget into 61 slices, so it must be at least that; got 60",
        ),
        ("power-law", {"exponent": -1}, "exponent must be >= 0, got -1"),
        ("power-law", {"exponent": "inf"}, "exponent must be >= 0, got inf"),
        ("power-law", {"exponnt": 1}, "Unknown key 'exponnt' in power-law. Did you mean 'exponent'"),
        ("cyclic", {"cycles": "many"}, "cyclic.cycles must be of type int, got 'many'"),
    ],
)
def test_wrong_options_are_explained(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_slots(name, 3, 60, 0, options)


# -- from a suite to a stream --------------------------------------------------------------------------------------------

TASKS = tuple(Task(name, "env") for name in ("a", "b", "c"))


def suite(*, rng: np.random.Generator, size: int = 3) -> Suite:
    """Tasks that show which numbers the suite was given."""
    tasks = [Task(t.name, t.env_id, {"x": float(rng.random())}) for t in TASKS[:size]]
    return Suite("suite", tasks, updates=40, env_steps=80, reveals="task_id")


def own_schedule() -> Stream:
    return Stream("own", TASKS, (Phase("a", 1),))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    import clbench.registry as registry

    monkeypatch.setitem(registry._LOCAL, "streams", {})
    register_stream("test-suite")(suite)
    register_stream("test-own")(own_schedule)
    register_stream("test-wrong")(lambda: 3)


def test_a_stream_is_a_pure_function_of_its_arguments() -> None:
    one, again, other = (make_stream("test-suite", seed=s, schedule="uniform") for s in (0, 0, 1))
    assert one == again and one != other
    assert one.reveals == "task_id"
    assert make_stream("test-suite", reveals="nothing").reveals == "nothing"
    assert sum(p.budget for p in one.phases) == 3 * 40
    assert sum(p.budget for p in make_stream("test-suite", unit="env_steps").phases) == 3 * 80
    assert [p.task for p in make_stream("test-suite", options={"size": "2"}, budget=7).phases] == ["a", "b"]


def test_tasks_do_not_depend_on_the_schedule() -> None:
    tables = {tuple(t.env_kwargs["x"] for t in make_stream("test-suite", seed=3, schedule=s).tasks) for s in NAMES}
    assert len(tables) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=9))
def test_visits_and_protocols(slots: Slots) -> None:
    phases = number_visits(TASKS, slots)
    for i, (phase, (task, budget)) in enumerate(zip(phases, slots, strict=True)):
        assert (phase.task, phase.budget) == (TASKS[task].name, budget)
        assert phase.visit == 1 + sum(t == task for t, _ in slots[:i])
    stream = Stream("s", TASKS, phases)
    visited = [t.name for k, t in enumerate(TASKS) if k in {s for s, _ in slots}]
    whole = joint(stream)
    assert [p.tasks for p in whole.phases] == [tuple(visited)]
    assert whole.phases[0].budget == sum(b for _, b in slots)
    once = one_phase_per_task(stream)
    assert [p.task for p in once.phases] == visited
    assert [p.budget for p in once.phases] == [next(p.budget for p in phases if p.task == n) for n in visited]
    assert {p.visit for p in once.phases} == {1}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"name": "test-suit"}, ConfigError, "Unknown stream 'test-suit'. Did you mean 'test-suite'"),
        ({"name": "test-suite", "schedule": "cyclc"}, ConfigError, "Unknown schedule 'cyclc'. Did you mean 'cyclic'"),
        ({"name": "test-suite", "budget": 0}, ConfigError, "budget must be a positive whole number of updates, got 0"),
        ({"name": "test-suite", "budget": float("inf")}, ConfigError, "positive whole number of updates, got inf"),
        ({"name": "test-suite", "budget": 1.5, "unit": "env_steps"}, ConfigError, "whole number of env steps, got 1.5"),
        ({"name": "test-suite", "reveals": "all"}, ConfigError, "Unknown value of reveals 'all'"),
        ({"name": "test-suite", "options": {"sise": 2}}, ConfigError, "Unknown key 'sise' in stream 'test-suite'"),
        ({"name": "test-own", "budget": 3}, ConfigError, "'test-own' has a schedule of its own; leave out schedule"),
        ({"name": "test-wrong"}, ContractError, "'test-wrong' must return a Suite or a Stream, got int"),
    ],
)
def test_wrong_streams_are_explained(arguments: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        make_stream(**arguments)


def test_a_stream_with_its_own_schedule() -> None:
    assert make_stream("test-own") == own_schedule()
    assert make_stream("test-own", reveals="nothing").reveals == "nothing"
