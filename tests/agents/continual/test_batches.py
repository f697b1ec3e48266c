"""Rows of any batch: every kind of structure, tensors that stand in two places, and batches as plain values."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch

from clbench.agents.continual.batches import concat, flatten, pack, rows, take, tensors, unflatten, unpack, zip_map
from clbench.agents.gcrl.base import GoalBatch
from clbench.agents.gcrl.networks import Input
from clbench.agents.networks.outputs import Output
from clbench.data.dataset import Batch
from clbench.errors import ContractError

CPU = torch.device("cpu")


def numbers(count: int, *shape: int, start: int = 0) -> torch.Tensor:
    size = count * int(torch.tensor(shape).prod()) if shape else count
    return torch.arange(start, start + size, dtype=torch.float32).reshape(count, *shape)


def cloned(count: int, start: int) -> Batch:
    """As behaviour cloning has it: no goals, no tasks."""
    x = numbers(count, 3, start=start)
    return Batch(
        torch.arange(count), {"observation": x}, torch.arange(count), {"observation": x + 1}, torch.zeros(count)
    )


def windows(count: int, start: int) -> tuple[Any, torch.Tensor]:
    """As a world model has it; what is achieved is what is observed."""
    x = numbers(count, 4, 2, start=start)
    return {"observation": x, "achieved_goal": x}, numbers(count, 3, 2, start=start)


def goals(count: int, start: int) -> GoalBatch:
    """As the goal-conditioned agents have it: the state is what is compared with goals, and there is no context."""
    s, more = (
        Input(numbers(count, 2, start=start)),
        {"low": Input(None, torch.zeros(count, 1, 2, 2, dtype=torch.uint8))},
    )
    g = Input(numbers(count, 2, start=start + 1))
    return GoalBatch(s, s, g, g, torch.zeros(count, 1), torch.zeros(count), s, s, Input(None), more)


KINDS = [
    cloned,
    windows,
    goals,
    lambda n, start: numbers(n, 2, start=start),
    lambda n, start: [numbers(n, start=start)],
]


def same(a: Any, b: Any) -> bool:
    (x, p), (y, q) = flatten(a), flatten(b)
    return p == q and len(x) == len(y) and all(torch.equal(u, v) and u.dtype == v.dtype for u, v in zip(x, y))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_taken_and_joined_in_every_part_alike(kind: Any) -> None:
    batch = kind(5, 0)
    assert rows(batch) == 5
    assert same(concat([take(batch, slice(0, 2)), take(batch, torch.tensor([2, 3, 4]))]), batch)
    assert type(take(batch, slice(0, 1))) is type(batch)
    assert not same(take(batch, torch.tensor([1, 0, 2, 3, 4])), batch)  # the check sees an order


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_survives_as_plain_values_in_a_file(kind: Any) -> None:
    batch, file = kind(3, 7), io.BytesIO()
    torch.save(pack(batch), file)
    file.seek(0)
    found = unpack(torch.load(file, weights_only=True), CPU)
    assert same(found, batch)
    assert type(found) is type(batch)


def test_nothing_is_packed_as_nothing() -> None:
    assert pack(None) is None
    assert unpack(None, CPU) is None


def test_what_is_unpacked_has_memory_of_its_own() -> None:
    state = pack(windows(3, 0))
    assert state is not None
    one, two = unpack(state, CPU), unpack(state, CPU)
    one[1].zero_()
    assert not same(one, two)
    assert same(two, windows(3, 0))


@pytest.mark.parametrize("kind", [windows, goals])
def test_a_tensor_in_two_places_is_handled_once_and_stays_one(kind: Any) -> None:
    batch = kind(4, 0)
    calls: list[torch.Tensor] = []
    found = zip_map(lambda t: (calls.append(t), t + 1)[1], batch)
    assert len(calls) == len({id(t) for t in calls}) == len(list(tensors(batch))) == len(flatten(batch)[0])
    assert len(calls) < len(flatten(batch, share=False)[0])  # there was something to share
    assert flatten(found)[1] == flatten(batch)[1]


def test_equal_tensors_in_two_places_are_not_taken_for_one() -> None:
    apart = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert len(flatten(apart)[0]) == 2
    x = torch.zeros(2)
    joined = concat([{"a": x, "b": x}, {"a": torch.ones(2), "b": torch.full((2,), 5.0)}])  # shared in one of them only
    assert joined["b"].tolist() == [0, 0, 5, 5]
    assert joined["a"].tolist() == [0, 0, 1, 1]


def test_outputs_are_rows_too() -> None:
    outputs = (Output("categorical", numbers(3, 2)), Output("gaussian", numbers(3, 4)))
    found = unflatten(*flatten(outputs))
    assert [o.kind for o in found] == ["categorical", "gaussian"]
    assert same(found, outputs)


def test_a_batch_with_something_else_in_it_is_refused() -> None:
    with pytest.raises(ContractError, match="Generator"):
        flatten({"x": torch.zeros(2), "rng": torch.Generator()})


class Pair(NamedTuple):
    a: torch.Tensor
    b: int


def test_a_state_builds_containers_and_nothing_else() -> None:
    columns, structure = flatten(Pair(torch.zeros(2), 3))
    assert structure[0] == "class"
    with pytest.raises(ContractError, match="container"):
        unflatten(columns, ["class", "os:system", {"command": ["value", "true"]}])
    with pytest.raises(ContractError, match="container"):
        unflatten(columns, ["class", "torch:Generator", {}])
