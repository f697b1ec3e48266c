"""Data-based methods stopped in the middle of a task go on bit for bit: on a policy and on a world model."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

from clbench.agents.continual.memory import Memory
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset

POINT = Box(-1, 1, (2,), np.float32)
PLANE = Spaces(Dict(achieved_goal=POINT, desired_goal=POINT), Box(-0.3, 0.3, (2,), np.float32))
WORLD_MODEL = {
    "window": 3, "batch_size": 8, "replan_every": 2, "planner": "cem",
    "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,), "channels": (4, 4, 4)},
    "planner_options": {"horizon": 4, "samples": 8, "elites": 2, "iterations": 1},
}  # fmt: skip
OPTIONS = {  # small memories, so that rows are replaced
    "er": {"memory": 12}, "er-balanced": {"memory": 12}, "derpp": {"memory": 12}, "a-gem": {"memory": 12}, "lwf": {},
    "clear": {"samples": 12, "batch_size": 5}, "uer": {"memory": 12},
}  # fmt: skip
CASES = [("bc", m) for m in OPTIONS] + [("pldm", m) for m in OPTIONS if m != "uer"]
UPDATES = 8


def walks(task: int) -> OfflineDataset:
    """Random walks in the square."""
    rng = torch.Generator().manual_seed(task)
    actions = (torch.rand(10, 6, 2, generator=rng) - 0.5) * 0.4
    path = [torch.rand(10, 2, generator=rng) * 2 - 1]
    for t in range(6):
        path.append((path[-1] + actions[:, t]).clamp(-1, 1))
    seen = {"achieved_goal": torch.stack(path[:-1], 1).flatten(0, 1)}
    return OfflineDataset(seen, actions.flatten(0, 1), torch.full((10,), 6), {"achieved_goal": path[-1]})


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(lab: SimpleNamespace, base: str, method: str, stop: tuple[int, int] | None) -> Any:
    """Three tasks; ``stop``: after this update of this task the agent is saved and made anew."""
    spaces, data = (PLANE, walks) if base == "pldm" else (lab.CLASSIFY, lab.data)
    agent_options = WORLD_MODEL if base == "pldm" else {"hidden": (8,), "batch_size": 8}

    def make(seed: int) -> Any:
        options = {"agent": agent_options, method.replace("-", "_"): OPTIONS[method]}
        return lab.composed(base, [method], spaces=spaces, seed=seed, **options)

    agent = make(0)
    for task in range(3):
        agent.start_task(TaskInfo(task))
        rng, experience = lab.generator(task), Experience(dataset=data(task))
        learning = agent.learn(experience, UPDATES, rng=rng)
        for step in range(1, UPDATES + 1):
            next(learning)
            if stop == (task, step):
                learning.close()
                state = agent.state_dict()
                saved = through_file(state)
                agent = make(1)  # other weights, until the state is loaded
                agent.load_state_dict(saved)
                learning = agent.learn(experience, UPDATES - step, rng=rng)
        learning.close()
        agent.finish_task()
    return agent


def state_of(agent: Any) -> list[Any]:
    found: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                found.append(str(key))
                walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                walk(value)
        else:
            found.append(node)

    walk(agent.state_dict())
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("base", "method"), CASES)
def test_stopped_and_resumed_it_ends_the_same(lab: SimpleNamespace, base: str, method: str) -> None:
    whole = state_of(run(lab, base, method, None))
    for stop in ((0, 1), (1, 3), (2, 5)):
        assert same(whole, state_of(run(lab, base, method, stop))), stop


@pytest.mark.parametrize("base", ["bc", "pldm"])
@pytest.mark.parametrize("lost", ["rows", "counts"])
def test_a_memory_that_is_not_saved_completely_is_caught(
    lab: SimpleNamespace, base: str, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    whole, right = state_of(run(lab, base, "er", None)), Memory.state_dict

    def broken(self: Memory) -> dict[str, Any]:
        state = right(self)
        if lost == "rows":
            return {**state, "columns": [torch.zeros_like(c) for c in state["columns"]]}
        return {**state, "seen": [0 for _ in state["seen"]]}

    with monkeypatch.context() as patch:
        patch.setattr(Memory, "state_dict", broken)
        stopped = run(lab, base, "er", (1, 3))
    assert not same(whole, state_of(stopped))


@pytest.mark.parametrize("method", OPTIONS)
def test_methods_share_no_memory_with_a_state_that_they_gave_or_took(lab: SimpleNamespace, method: str) -> None:
    agent = run(lab, "bc", method, None)
    before, state = copy.deepcopy(state_of(agent)), agent.state_dict()
    other = lab.composed("bc", [method], agent={"hidden": (8,)}, **{method.replace("-", "_"): OPTIONS[method]})
    other.load_state_dict(state)
    blank(state["methods"][method]["state"])
    assert same(state_of(agent), before)
    assert same(state_of(other), before)


def blank(node: Any) -> None:
    """Overwrite the tensors of a state."""
    if isinstance(node, torch.Tensor):
        node.zero_()
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            blank(value)
