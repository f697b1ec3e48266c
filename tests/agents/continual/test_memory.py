"""The memory is a uniform sample of what was offered, in equal shares where it should be, and saved completely."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from clbench.agents.continual.memory import Memory
from clbench.errors import ContractError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(start: int, count: int) -> dict[str, torch.Tensor]:
    """Rows that can be told apart; both columns say which one it is."""
    n = torch.arange(start, start + count)
    return {"n": n, "x": torch.stack([n, -n], 1).float()}


def kept(memory: Memory) -> list[int]:
    """The rows that are held."""
    held = memory.sample(10**6, generator(0))
    if held is None:
        return []
    assert torch.equal(held["x"], torch.stack([held["n"], -held["n"]], 1).float())  # rows are whole
    return sorted(held["n"].tolist())


def fill(memory: Memory, sizes: list[list[int]], rng: torch.Generator) -> Memory:
    """Offer batches of the given sizes, task by task; rows are numbered as they come."""
    start = 0
    for task in sizes:
        memory.start_group()
        for count in task:
            memory.add(numbered(start, count), rng)
            start += count
    return memory


class Fifo(Memory):
    """Broken on purpose: the newest rows are kept."""

    def _slot(self, u: float) -> int | None:
        self.seen[-1] += 1
        if self.filled < self.size:
            self.filled += 1
            self.slots[-1].append(self.filled - 1)
        return (self.seen[-1] - 1) % self.size


class Late(Memory):
    """Broken on purpose: the chance of the n-th row is size / (n + 8), not size / n."""

    def _slot(self, u: float) -> int | None:
        return super()._slot(min(u * (self.seen[-1] + 8) / (self.seen[-1] + 1), 1 - 1e-9))


class First(Memory):
    """Broken on purpose: the first rows are kept."""

    def _slot(self, u: float) -> int | None:
        return super()._slot(1 - 1e-9)


# -- uniform -------------------------------------------------------------------------------------------------------------

SIZE, OFFERED, SEEDS = 6, 30, 800


def p_value(cls: type[Memory]) -> float:
    """Of the counts with which rows are kept over many seeds, if every row has the same chance.

    Counts of samples without replacement: their squared deviations, over ``p (1 - p) n / (n - 1)`` per seed, sum to a
    chi-square variable with ``n - 1`` degrees of freedom.
    """
    counts = torch.zeros(OFFERED)
    for seed in range(SEEDS):
        counts[kept(fill(cls(SIZE), [[7, 7, 7, 7, 2]], generator(seed)))] += 1
    p = SIZE / OFFERED
    variance = SEEDS * p * (1 - p) * OFFERED / (OFFERED - 1)
    statistic = float((counts - SEEDS * p).square().sum()) / variance
    return float(chi2.sf(statistic, OFFERED - 1))


def test_every_row_has_the_same_chance() -> None:
    assert p_value(Memory) > 0.01


@pytest.mark.parametrize("broken", [Fifo, Late, First])
def test_a_biased_memory_is_caught(broken: type[Memory]) -> None:
    assert p_value(broken) < 1e-6


def test_within_a_task_every_row_has_the_same_chance_also_after_its_share_shrank() -> None:
    """Three tasks of 20 rows; each ends with 4 of the 12 places."""
    counts = torch.zeros(3, 20)
    for seed in range(1000):
        memory = fill(Memory(12, "task"), [[9, 11], [20], [5, 5, 10]], generator(seed))
        counts.view(-1)[kept(memory)] += 1
    p = 4 / 20
    for task in counts:
        statistic = float((task - 1000 * p).square().sum()) / (1000 * p * (1 - p) * 20 / 19)
        assert chi2.sf(statistic, 19) > 0.001
    assert (counts.sum(1) == 4000).all()


def test_how_rows_are_cut_into_batches_does_not_matter() -> None:
    whole, pieces = ([[30]], [[1] * 10 + [13, 7]])
    one, other = (fill(Memory(SIZE), sizes, generator(3)) for sizes in (whole, pieces))
    assert kept(one) == kept(other)
    assert kept(one) != kept(fill(Memory(SIZE), whole, generator(4)))


def test_a_later_row_of_a_batch_takes_the_place_of_an_earlier_one() -> None:
    """Many rows for few places: as if they came one by one."""
    for seed in range(20):
        assert kept(fill(Memory(2), [[50]], generator(seed))) == kept(fill(Memory(2), [[1] * 50], generator(seed)))


# -- shares --------------------------------------------------------------------------------------------------------------


def shares(memory: Memory) -> list[int]:
    return [len(s) for s in memory.slots]


def fair(size: int, offered: list[int]) -> list[int]:
    """Max-min fair shares, up to one: places are given out in turn to whoever still has rows."""
    given = [0] * len(offered)
    while sum(given) < min(size, sum(offered)):
        smallest = min((g, i) for i, g in enumerate(given) if g < offered[i])[1]
        given[smallest] += 1
    return given


@given(
    size=st.integers(1, 25),
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_equal_as_far_as_tasks_have_rows(size: int, sizes: list[list[int]], seed: int) -> None:
    memory = fill(Memory(size, "task"), sizes, generator(seed))
    want = fair(size, [sum(s) for s in sizes])
    assert all(abs(a - b) <= 1 for a, b in zip(shares(memory), want, strict=True))
    assert sum(shares(memory)) == len(memory) == sum(want)  # no room is left that could be used


@given(
    size=st.integers(1, 12),
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    balance=st.sampled_from(["none", "task"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_was_offered_once_and_fits(size: int, sizes: list[list[int]], balance: Any, seed: int) -> None:
    memory = fill(Memory(size, balance), sizes, generator(seed))
    offered = sum(map(sum, sizes))
    held = kept(memory)
    assert len(held) == len(set(held)) == len(memory) == min(size, offered)
    assert all(0 <= n < offered for n in held)
    assert sorted(s for slots in memory.slots for s in slots) == list(range(len(memory)))  # no slot is lost or shared
    assert sum(memory.seen) == offered


def test_a_reservoir_of_everything_has_no_equal_shares() -> None:
    """Negative control: the short task gets few rows unless it is balanced."""
    sizes = [[200], [200], [10]]
    last = lambda m: sum(n >= 400 for n in kept(m))  # noqa: E731
    assert last(fill(Memory(30, "task"), sizes, generator(0))) == 10
    assert last(fill(Memory(30), sizes, generator(0))) <= 4


def test_a_task_without_rows_takes_no_share() -> None:
    memory = Memory(4, "task")
    for _ in range(3):
        memory.start_group()
    memory.add(numbered(0, 10), generator(0))
    assert shares(memory) == [4]


# -- drawing -------------------------------------------------------------------------------------------------------------


def test_samples_are_without_replacement_and_uniform() -> None:
    memory, rng = fill(Memory(10), [[10]], generator(0)), generator(1)
    counts = torch.zeros(10)
    for _ in range(1000):
        drawn = memory.sample(3, rng)["n"]
        assert len(drawn.unique()) == 3
        counts[drawn] += 1
    statistic = float((counts - 300).square().sum()) / (1000 * 0.3 * 0.7 * 10 / 9)
    assert chi2.sf(statistic, 9) > 0.001


def test_fewer_rows_than_asked_for_are_given_all() -> None:
    memory = fill(Memory(10), [[4]], generator(0))
    assert sorted(memory.sample(7, generator(0))["n"].tolist()) == [0, 1, 2, 3]
    assert Memory(10).sample(7, generator(0)) is None


def test_the_past_has_no_row_of_the_present_task() -> None:
    memory, rng = Memory(12, "task"), generator(0)
    memory.start_group()
    memory.add(numbered(0, 20), rng)
    assert memory.sample(5, rng, past=True) is None
    memory.start_group()
    assert sorted(memory.sample(99, rng, past=True)["n"].tolist()) == kept(memory)  # nothing is offered yet
    memory.add(numbered(20, 20), rng)
    past = memory.sample(99, rng, past=True)["n"]
    assert len(past) == 6
    assert bool((past < 20).all())
    assert any(n >= 20 for n in kept(memory))  # the present is in the memory, only not drawn


def test_what_is_drawn_is_a_copy() -> None:
    memory = fill(Memory(5), [[5]], generator(0))
    memory.sample(5, generator(0))["n"].zero_()
    assert kept(memory) == [0, 1, 2, 3, 4]


def test_rows_are_copies_of_what_was_offered() -> None:
    memory, batch = Memory(5), numbered(0, 5)
    memory.add(batch, generator(0))
    batch["n"].zero_()
    batch["x"].zero_()
    assert kept(memory) == [0, 1, 2, 3, 4]


# -- one tensor in two places ---------------------------------------------------------------------------------------------


def test_a_tensor_in_two_places_is_kept_once_until_it_is_two() -> None:
    x = torch.arange(4.0)
    memory, rng = Memory(8), generator(0)
    memory.add({"a": x, "b": x}, rng)
    assert len(memory.columns) == 1
    memory.add({"a": x + 10, "b": x + 20}, rng)  # other data, in which they differ
    held = memory.sample(8, rng)
    both = sorted(zip(held["a"].tolist(), held["b"].tolist(), strict=True))
    assert both == [(i, i) for i in range(4)] + [(i + 10, i + 20) for i in range(4)]
    memory.add({"a": x, "b": x}, rng)  # and back: nothing is mixed up
    held = memory.sample(8, rng)
    assert all(b - a in (0, 10) for a, b in zip(held["a"].tolist(), held["b"].tolist(), strict=True))
    assert any(b != a for a, b in zip(held["a"].tolist(), held["b"].tolist(), strict=True))


def test_rows_of_another_kind_are_refused() -> None:
    memory = fill(Memory(8), [[4]], generator(0))
    with pytest.raises(ContractError, match="structure"):
        memory.add({"n": torch.zeros(2)}, generator(0))


# -- state ---------------------------------------------------------------------------------------------------------------


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("balance", ["none", "task"])
@pytest.mark.parametrize("before", [[], [[3]], [[30]], [[30], [5]], [[30], [20], [1, 1]]])
def test_it_goes_on_as_if_it_had_not_been_saved(balance: Any, before: list[list[int]]) -> None:
    rng = generator(1)
    memory = fill(Memory(7, balance), before, rng)
    loaded = Memory(7, balance)
    loaded.load_state_dict(through_file(memory.state_dict()))
    held = []
    for each in (memory, loaded):
        g = torch.Generator()
        g.set_state(rng.get_state())
        drawn = each.sample(3, g)
        each.add(numbered(100, 9), g)
        each.start_group()
        each.add(numbered(200, 9), g)
        held.append((None if drawn is None else drawn["n"].tolist(), each.slots, each.seen, kept(each)))
    assert held[0] == held[1]


@pytest.mark.parametrize("lost", ["seen", "slots"])
def test_a_state_that_lacks_something_is_noticed(lost: str) -> None:
    """Negative control of the test above."""
    memory = fill(Memory(7, "task"), [[30], [20]], generator(1))
    state = memory.state_dict()
    state[lost] = [0, 0] if lost == "seen" else [state["slots"][1], state["slots"][0]]
    loaded = Memory(7, "task")
    loaded.load_state_dict(state)
    for each in (memory, loaded):
        each.add(numbered(100, 30), generator(2))
    assert kept(memory) != kept(loaded)


def test_state_and_memory_share_nothing() -> None:
    memory = fill(Memory(5), [[5]], generator(0))
    state = memory.state_dict()
    loaded = Memory(5)
    loaded.load_state_dict(state)
    changes: list[Callable[[], Any]] = [
        lambda: memory.add(numbered(50, 50), generator(3)),
        lambda: [c.zero_() for c in state["columns"]],
    ]
    for change in changes:
        change()
        assert kept(loaded) == [0, 1, 2, 3, 4]
