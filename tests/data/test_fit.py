"""Data that an environment does not speak are refused before training, in one sentence."""

from __future__ import annotations

from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

import clbench
from clbench.contracts import Phase, Spaces, Stream, Task, TaskList
from clbench.data.dataset import OfflineDataset
from clbench.data.fit import check_fits
from clbench.errors import ClbenchError, DataError, UnknownNameError

VECTOR, PLANE = Box(-1, 1, (3,)), Box(-1, 1, (2,))
GOAL = Dict({"observation": VECTOR, "achieved_goal": PLANE, "desired_goal": PLANE})


def data(observation: Any = 3, action: Any = 2) -> OfflineDataset:
    """Four transitions; sizes of observation (or a dict of them) and action (``None``: discrete 0, 1, 2, 3)."""
    obs = (
        {k: torch.zeros(4, n) for k, n in observation.items()}
        if isinstance(observation, dict)
        else torch.zeros(4, observation)
    )
    return OfflineDataset(obs, torch.arange(4) if action is None else torch.zeros(4, action), torch.tensor([4]))


@pytest.mark.parametrize(
    ("found", "observation", "action"),
    [
        (data(), VECTOR, PLANE),
        (data(3, None), VECTOR, Discrete(4)),
        (data(3, None), VECTOR, Discrete(9, start=-2)),
        (data({"observation": 3, "achieved_goal": 2}), GOAL, PLANE),
    ],
)
def test_data_that_fit(found: OfflineDataset, observation: gymnasium.Space, action: gymnasium.Space) -> None:
    check_fits(found, Spaces(observation, action), "here")


@pytest.mark.parametrize(
    ("found", "observation", "action", "error", "message"),
    [
        (data(3, 5), VECTOR, PLANE, DataError, r"here: .* actions of shape \(5,\).*environment have shape \(2,\)"),
        (data(3, None), VECTOR, PLANE, DataError, r"actions of shape \(\) \(torch.int64\)"),
        (data(3, 2), VECTOR, Discrete(4), DataError, r"actions \(2,\) torch.float32, but .* takes Discrete\(4\)"),
        (data(3, None), VECTOR, Discrete(3), DataError, r"actions from 0 to 3, but the environment takes Discrete\(3\)"),
        (data(3, None), VECTOR, Discrete(3, start=1), DataError, "actions from 0 to 3"),
        (data(4), VECTOR, PLANE, DataError, r"observations have shape \(4,\) in the data, but \(3,\) in the environment"),
        (data({"observation": 3, "achieved_gaol": 2}), GOAL, PLANE, UnknownNameError,
         "Unknown observation key 'achieved_gaol' in here. Did you mean 'achieved_goal'"),
        (data({"observation": 3, "achieved_goal": 2, "desired_goal": 2}), GOAL, PLANE, UnknownNameError, "'desired_goal'"),
        (data({"observation": 3}), GOAL, PLANE, DataError, r"lack the observation keys \['achieved_goal'\]"),
        (data({"observation": 2, "achieved_goal": 2}), GOAL, PLANE, DataError, r"observations\['observation'\] have shape"),
        (data(), GOAL, PLANE, DataError, "have no observation keys"),
        (data({"observation": 3}), VECTOR, PLANE, DataError, "achieved_goal=none"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(
    found: OfflineDataset, observation: Any, action: Any, error: type[ClbenchError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_fits(found, Spaces(observation, action), "here")


def wide_actions() -> OfflineDataset:
    """Two-Rooms data with actions of a size that Two-Rooms does not have."""
    x, last = torch.full((4, 2), 10.0), torch.full((1, 2), 10.0)
    return OfflineDataset(
        {"observation": x, "achieved_goal": x}, torch.zeros(4, 3), torch.tensor([4]),
        {"observation": last, "achieved_goal": last},
    )  # fmt: skip


def test_a_run_says_so_before_it_evaluates(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clbench.register_dataset("test-wide-actions")(wide_actions)
    monkeypatch.setattr("clbench.loop.evaluate", lambda *_, **__: pytest.fail("evaluated first"))
    task = Task("only", "clbench/TwoRooms-v0", {}, "test-wide-actions", TaskList.from_seeds(2))
    stream = Stream("wide", (task,), (Phase("only", 2),))
    with pytest.raises(DataError, match=r"'test-wide-actions' of task 'only': the data have actions of shape \(3,\)"):
        clbench.run(stream, "bc", out=tmp_path / "run")
