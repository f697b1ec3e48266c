"""Windows of offline data: what world models train on. The oracle walks episode by episode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clbench.data.dataset import OfflineDataset, Rendered
from clbench.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=5)
KINDS = st.sampled_from(["tensor", "dict", "rendered"])


def numbered(lengths: list[int], kind: str = "tensor", final: bool = True) -> OfflineDataset:
    """Episode ``e``, step ``t`` is observed as ``[e, t]``; so is its action."""
    rows = torch.tensor([[e, t] for e, n in enumerate(lengths) for t in range(n)], dtype=torch.float32)
    last = torch.tensor([[e, n] for e, n in enumerate(lengths)], dtype=torch.float32)

    def observe(x: torch.Tensor) -> Any:
        if kind == "tensor":
            return x
        column = Rendered("two-rooms", {"x": x}, lambda c: torch.stack([c["x"]] * 2, 1)) if kind == "rendered" else x
        return {"observation": column, "achieved_goal": column, "velocity": x + 0.5}

    return OfflineDataset(observe(rows), rows.clone(), torch.tensor(lengths), observe(last) if final else None)


def oracle(lengths: list[int], length: int, final: bool) -> list[tuple[int, int]]:
    """(episode, first step) of every window."""
    room = 0 if final else 1
    return [(e, t) for e, n in enumerate(lengths) for t in range(n) if t + length + room <= n]


@given(LENGTHS, KINDS, st.integers(1, 5), st.booleans())
def test_windows_by_brute_force(lengths: list[int], kind: str, length: int, final: bool) -> None:
    data, expected = numbered(lengths, kind, final), oracle(lengths, length, final)
    if not expected:
        with pytest.raises(DataError, match=f"no window of {length} actions: the longest episode has"):
            data.window_starts(length)
        return
    starts = data.window_starts(length)
    assert starts.tolist() == [sum(lengths[:e]) + t for e, t in expected]
    observations, actions = data.windows(starts, length)
    steps = torch.tensor([[[e, t + k] for k in range(length + 1)] for e, t in expected], dtype=torch.float32)
    assert torch.equal(actions, steps[:, :-1])
    if kind == "tensor":
        assert torch.equal(observations, steps)
    else:
        assert torch.equal(observations["velocity"], steps + 0.5)
        picture = torch.stack([steps] * 2, 2) if kind == "rendered" else steps
        assert torch.equal(observations["observation"], picture)
        assert observations["achieved_goal"] is observations["observation"]  # a shared column is drawn once


def test_windows_agree_with_transitions() -> None:
    data = numbered([3, 1, 4], "dict")
    starts = data.window_starts(1)
    observations, actions = data.windows(starts, 1)
    batch = data.batch(starts)
    assert torch.equal(actions[:, 0], batch.actions)
    for key, value in observations.items():
        assert torch.equal(value[:, 0], batch.observations[key])
        assert torch.equal(value[:, 1], batch.next_observations[key])


def test_windows_that_run_into_the_next_episode_would_be_noticed() -> None:
    """Negative control: consecutive rows of the flat tensor are not the windows."""
    data = numbered([2, 3])
    starts = data.window_starts(2)
    observations, _ = data.windows(starts, 2)
    careless = data.observations[(starts[:, None] + torch.arange(3)).clamp(max=len(data) - 1)]
    assert not torch.equal(observations, careless)
    assert (observations[:, :, 0] == observations[:, :1, 0]).all()  # one episode per window


def test_starts_are_computed_once_and_reading_changes_nothing() -> None:
    data = numbered([4, 4])
    before = data.observations.clone()
    assert data.window_starts(2) is data.window_starts(2)
    observations, actions = data.windows(data.window_starts(2), 2)
    observations += 1
    actions += 1
    assert torch.equal(data.observations, before)


def test_discrete_actions() -> None:
    data = OfflineDataset(torch.zeros(3, 1), torch.tensor([2, 0, 1]), torch.tensor([3]), torch.ones(1, 1))
    assert data.windows(data.window_starts(2), 2)[1].tolist() == [[2, 0], [0, 1]]


def test_a_window_needs_an_action() -> None:
    with pytest.raises(ConfigError, match="must be at least 1 action, got 0"):
        numbered([2]).window_starts(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["tensor", "dict", "rendered"])
def test_windows_on_a_gpu(kind: str) -> None:
    data = numbered([3, 1, 4, 2], kind)
    moved = data.to("cuda")
    starts = moved.window_starts(2)
    assert starts.is_cuda and starts.tolist() == data.window_starts(2).tolist()
    (here, _), (there, actions) = data.windows(starts.cpu(), 2), moved.windows(starts, 2)
    pairs = [(here, there)] if kind == "tensor" else [(here[k], there[k]) for k in here]
    assert actions.is_cuda and all(b.is_cuda and torch.equal(a, b.cpu()) for a, b in pairs)
