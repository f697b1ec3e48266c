"""Offline data: layout, validation, rows, joining."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.data.dataset import Batch, GoalSampling, OfflineDataset, Rendered, map_obs
from clbench.errors import ConfigError, DataError
from clbench.rng import torch_generator

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def numbered(lengths: list[int], goal: bool = False, rendered: bool = False, final: bool = True) -> OfflineDataset:
    """Episode ``e``, step ``t`` is observed as ``[e, t]``; the action is ``100 e + t``."""
    rows = torch.tensor([[e, t] for e, n in enumerate(lengths) for t in range(n)], dtype=torch.float32)
    last = torch.tensor([[e, n] for e, n in enumerate(lengths)], dtype=torch.float32)

    def observe(x: torch.Tensor) -> Any:
        if rendered:
            column = Rendered("two-rooms", {"x": x}, lambda c: torch.stack([c["x"], c["x"]], dim=1))
            return {"observation": column, "achieved_goal": column} if goal else column
        return {"observation": x, "achieved_goal": x} if goal else x

    return OfflineDataset(
        observe(rows), rows @ torch.tensor([[100.0], [1.0]]), torch.tensor(lengths), observe(last) if final else None
    )


# -- layout --------------------------------------------------------------------------------------------------------------


@given(LENGTHS)
def test_the_episode_index_by_brute_force(lengths: list[int]) -> None:
    data = numbered(lengths)
    starts = [sum(lengths[:e]) for e in range(len(lengths))]
    rows = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    assert len(data) == len(rows) and data.num_episodes == len(lengths)
    assert data.starts.tolist() == starts
    assert data.episode.tolist() == [e for e, _ in rows]
    assert data.final.tolist() == [starts[e] + lengths[e] - 1 for e, _ in rows]


@given(LENGTHS, st.booleans(), st.booleans(), st.data())
def test_next_observation_by_brute_force(lengths: list[int], goal: bool, rendered: bool, draw: st.DataObject) -> None:
    data = numbered(lengths, goal, rendered)
    rows = [(e, t) for e, n in enumerate(lengths) for t in range(n)]
    index = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    expected = torch.tensor([[rows[i][0], rows[i][1] + 1] for i in index], dtype=torch.float32)
    got = data.next_observation(torch.tensor(index))
    for value in got.values() if goal else [got]:
        assert torch.equal(value, torch.stack([expected, expected], dim=1) if rendered else expected)


def test_next_observation_does_not_run_into_the_next_episode() -> None:
    """Negative control: the row below is wrong exactly at the ends of episodes."""
    data = numbered([3, 2, 4])
    index = torch.arange(len(data) - 1)
    below = data.observation(index + 1)
    wrong = (below != data.next_observation(index)).any(1)
    assert torch.equal(wrong, index == data.final[index])


def test_one_step_data_has_no_later_observation() -> None:
    data = numbered([1, 1, 1], final=False)
    index = torch.tensor([2, 0])
    assert torch.equal(data.next_observation(index), data.observation(index))


# -- validation ----------------------------------------------------------------------------------------------------------


def made(**changes: Any) -> OfflineDataset:
    arguments: dict[str, Any] = {
        "observations": {"observation": torch.zeros(5, 2), "achieved_goal": torch.zeros(5, 2)},
        "actions": torch.zeros(5, 1),
        "lengths": torch.tensor([3, 2]),
        "final_observations": {"observation": torch.zeros(2, 2), "achieved_goal": torch.zeros(2, 2)},
        "name": "mine",
    }
    return OfflineDataset(**{**arguments, **changes})


def with_value(shape: tuple[int, ...], row: int, value: float) -> torch.Tensor:
    x = torch.zeros(shape)
    x[row] = value
    return x


POSITIONS = Rendered("two-rooms", {"x": with_value((5, 2), 4, torch.nan)}, lambda c: c["x"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": torch.tensor([3, 3])}, "'mine': episode lengths sum to 6, but there are 5 actions"),
        ({"lengths": torch.tensor([5, 0])}, "every episode needs at least one transition"),
        ({"lengths": torch.tensor([6, -1])}, "every episode needs at least one transition"),
        ({"lengths": torch.tensor([], dtype=torch.int64)}, "every episode needs at least one transition"),
        ({"observations": torch.zeros(4, 2)}, "observations has 4 rows, expected 5"),
        ({"observations": {"observation": torch.zeros(6, 2)}}, "observations.observation has 6 rows, expected 5"),
        ({"final_observations": torch.zeros(5, 2)}, "final_observations has 5 rows, expected 2"),
        ({"task": torch.zeros(4, dtype=torch.int64)}, "task has 4 rows, expected 5"),
        ({"actions": with_value((5, 1), 2, torch.nan)}, "actions holds NaN or infinite values in 1 rows.* row 2"),
        ({"actions": with_value((5, 1), 1, torch.inf)}, "in 1 rows, the first is row 1; clean the data"),
        ({"actions": torch.tensor([[torch.inf], [-torch.inf], [0], [0], [0]])}, "in 2 rows, the first is row 0"),
        (
            {"observations": {"observation": torch.zeros(5, 2), "achieved_goal": with_value((5, 2), 3, torch.nan)}},
            "observations.achieved_goal holds NaN .* row 3",
        ),
        ({"observations": POSITIONS, "final_observations": None}, "observations.x holds NaN .* row 4"),
        (
            {"final_observations": {"observation": with_value((2, 2), 1, torch.nan)}},
            "final_observations.observation holds NaN .* row 1",
        ),
        ({"final_observations": {"observation": torch.zeros(2, 2)}}, "final_observations must have the keys, shapes and"),
        ({"final_observations": torch.zeros(2, 2)}, "final_observations must have the keys"),
        (
            {"observations": torch.zeros(5, 2), "final_observations": torch.zeros(2, 1)},  # would be broadcast in silence
            r"must have the keys, shapes and dtypes of observations; got \{'': \(\(1,\), 'torch.float32'\)\}, expected",
        ),
        ({"observations": torch.zeros(5, 2), "final_observations": torch.zeros(2, 2).double()}, "dtypes of observations"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(**changes)


def test_large_finite_values_are_data() -> None:
    """The quick check sums a column; a sum that overflows is no reason to refuse."""
    huge = torch.full((5, 1), torch.finfo(torch.float32).max)
    assert torch.equal(made(actions=huge).actions, huge)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.6, 0.0), "must be >= 0 and sum to 1"),
        ((-0.5, 1.5, 0.0), "must be >= 0 and sum to 1"),
        ((float("nan"), 1.0, 0.0), "must be >= 0 and sum to 1"),
        ((0.0, 1.0, 0.0, True, 1.0), r"discount must be in \[0, 1\), got 1.0"),
        ((0.0, 1.0, 0.0, True, float("nan")), "discount must be in"),
    ],
)
def test_wrong_goal_sampling_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GoalSampling(*arguments)


# -- rendered observations -----------------------------------------------------------------------------------------------


def test_rendered_observations_behave_like_the_tensor_they_stand_for() -> None:
    x = torch.arange(12.0).reshape(6, 2)
    rendered = Rendered("two-rooms", {"x": x}, lambda c: c["x"][:, None] * torch.ones(3, 1))
    full = x[:, None] * torch.ones(3, 1)
    assert rendered.shape == full.shape and rendered.ndim == full.ndim and len(rendered) == len(full)
    assert rendered.dtype == full.dtype and rendered.device == full.device
    rows = [torch.tensor([4, 0, 4]), slice(1, 4), torch.tensor([True, False] * 3), [5, 2], 3, -1]
    for index in rows:
        assert torch.equal(rendered[index], full[index]), index
    assert rendered.to("cpu").shape == full.shape


def test_only_the_rows_asked_for_are_rendered() -> None:
    drawn = []

    def render(columns: Any) -> torch.Tensor:
        drawn.append(len(columns["x"]))
        return columns["x"]

    rendered = Rendered("two-rooms", {"x": torch.zeros(1000, 1)}, render)
    rendered[torch.tensor([1, 2, 3])]
    assert drawn == [1, 3]


# -- batches -------------------------------------------------------------------------------------------------------------


def test_a_batch_carries_goals_and_relabelled_success() -> None:
    data = numbered([3, 2], goal=True)
    batch = data.batch(torch.tensor([0, 1, 2, 4]), torch.tensor([1, 1, 4, 4]))
    assert set(batch.observations) == set(batch.next_observations) == {"observation", "achieved_goal", "desired_goal"}
    goals = torch.tensor([[0, 1], [0, 1], [1, 1], [1, 1]], dtype=torch.float32)
    assert torch.equal(batch.observations["desired_goal"], goals)
    assert torch.equal(batch.next_observations["desired_goal"], goals)
    assert torch.equal(batch.next_observations["observation"][2:], torch.tensor([[0.0, 3.0], [1.0, 2.0]]))
    assert batch.actions.flatten().tolist() == [0, 1, 2, 101]
    assert batch.success.tolist() == [0, 1, 0, 1] and batch.masks.tolist() == [1, 0, 1, 0]
    assert batch.rewards().tolist() == [-1, 0, -1, 0] and batch.rewards(negative=False).tolist() == [0, 1, 0, 1]
    assert "desired_goal" not in data.observations  # the data are left as they were


def test_a_batch_without_goals_never_succeeds() -> None:
    batch = numbered([3, 2], goal=True).sample(16, torch_generator(0, "batch"))
    assert isinstance(batch, Batch) and batch.goal_index is None and "desired_goal" not in batch.observations
    assert float(batch.success.sum()) == 0 and float(batch.masks.sum()) == 16


def test_goals_need_goal_data() -> None:
    with pytest.raises(DataError, match="has no achieved_goal, so no goals can be drawn"):
        numbered([3]).sample(2, torch_generator(0, "batch"), GoalSampling())
    assert not numbered([3]).is_goal and numbered([3], goal=True).is_goal


def test_samples_repeat_with_the_generator() -> None:
    data = numbered([3, 2, 4], goal=True)
    a, b, c = (data.sample(32, torch_generator(0, name), GoalSampling(0.2, 0.5, 0.3)) for name in ("a", "a", "c"))
    assert torch.equal(a.index, b.index) and torch.equal(a.goal_index, b.goal_index)  # type: ignore[arg-type]
    assert not torch.equal(a.index, c.index)


# -- joining -------------------------------------------------------------------------------------------------------------


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.booleans(), st.booleans(), st.booleans())
def test_joined_data_are_the_parts_one_after_another(
    parts: list[list[int]], goal: bool, rendered: bool, labelled: bool
) -> None:
    pieces = [numbered(p, goal, rendered).with_task(k if labelled else None) for k, p in enumerate(parts)]
    whole = OfflineDataset.concatenate(pieces, name="all")
    assert whole.name == "all" and whole.lengths.tolist() == sum(parts, [])
    at = 0
    for k, piece in enumerate(pieces):
        rows = torch.arange(len(piece))
        got, expected = whole.batch(rows + at), piece.batch(rows)
        for a, b in ((got.observations, expected.observations), (got.next_observations, expected.next_observations)):
            assert torch.equal(a["achieved_goal"], b["achieved_goal"]) if goal else torch.equal(a, b)
        assert torch.equal(got.actions, expected.actions)
        assert got.task is None if not labelled else bool((got.task == k).all())
        at += len(piece)
    if goal:
        assert whole.observations["observation"] is whole.observations["achieved_goal"]


@pytest.mark.parametrize("rendered", [False, True])
def test_shared_tensors_stay_shared(rendered: bool) -> None:
    data = numbered([3, 2], goal=True, rendered=rendered)
    for other in (data.to("cpu"), data.with_task(3), OfflineDataset.concatenate([data, data])):
        assert other.observations["observation"] is other.observations["achieved_goal"]
        assert other.final_observations["observation"] is other.final_observations["achieved_goal"]


def test_tensors_that_are_not_shared_are_not_mixed_up() -> None:
    x, y = torch.zeros(2, 1), torch.ones(2, 1)
    parts = [
        OfflineDataset({"observation": x, "achieved_goal": g}, torch.zeros(2), torch.tensor([1, 1])) for g in (x, y)
    ]  # the first shares, the second does not
    whole = OfflineDataset.concatenate(parts)
    assert whole.observations["observation"].flatten().tolist() == [0, 0, 0, 0]
    assert whole.observations["achieved_goal"].flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (OfflineDataset(torch.zeros(2, 3), torch.zeros(2, 1), torch.tensor([2]), torch.zeros(1, 3)), "cannot be joined"),
        (OfflineDataset(torch.zeros(2, 2).int(), torch.zeros(2, 1), torch.tensor([2]), torch.ones(1, 2).int()), "join"),
        (OfflineDataset(torch.zeros(2, 2), torch.zeros(2).int(), torch.tensor([2]), torch.zeros(1, 2)), "cannot be joined"),
        (numbered([2], goal=True), "cannot be joined: their observations .* have different keys"),
        (numbered([2], rendered=True), "cannot be joined"),
        (numbered([1, 1], final=False), r"cannot be joined: .*\(or final observations\) have different keys"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_not_joined(other: OfflineDataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        OfflineDataset.concatenate([numbered([2]), other])


def test_labels_of_the_task() -> None:
    data = numbered([3, 2])
    labelled = data.with_task(4)
    assert labelled.task is not None and labelled.task.tolist() == [4] * 5 and labelled.task.dtype == torch.int64
    assert data.task is None and labelled.with_task(None).task is None
    assert labelled.sample(3, torch_generator(0)).task.tolist() == [4, 4, 4]  # type: ignore[union-attr]
    joined = OfflineDataset.concatenate([labelled, data])
    assert joined.task is None  # a label for some rows only would be a trap


def test_map_obs_keeps_the_kind() -> None:
    assert map_obs(lambda v: v + 1, {"a": 1, "b": 2}) == {"a": 2, "b": 3}
    assert map_obs(lambda v: v + 1, 1) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rendered", [False, True])
def test_data_move_to_the_gpu_with_their_sharing(rendered: bool) -> None:
    data = numbered([3, 2], goal=True, rendered=rendered).with_task(1)
    moved = data.to("cuda")
    assert moved.observations["observation"] is moved.observations["achieved_goal"]
    batch = moved.sample(64, torch_generator(0, "b", device="cuda"), GoalSampling(0.2, 0.5, 0.3, geometric=True))
    assert {v.device.type for v in batch.observations.values()} == {"cuda"} and batch.goal_index is not None
    expected = data.batch(batch.index.cpu(), batch.goal_index.cpu())
    for key, value in batch.next_observations.items():
        assert torch.equal(value.cpu(), expected.next_observations[key])
