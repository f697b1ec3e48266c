"""Small batched environments in torch for the tests of agents, and what the tests do with agents."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space

from clbench.contracts import Spaces

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Line:
    """A point on [-1, 1] moves by at most 0.2 a step and should come within 0.1 of a goal. 12 steps, SAME_STEP autoreset.

    ``kind`` is any combination of the words "discrete" (actions 3, 4 = left, right), "goal" (goal dict), "pixels"
    (a 1x40x40 picture of the position) and "last" (its channel comes last).
    """

    max_episode_steps = 12
    autoreset = "same_step"
    device = CPU

    def __init__(self, num_envs: int = 2, kind: str = ""):
        self.num_envs, self.kind, self.resets, self.steps = num_envs, kind, 0, 0
        self.rng = generator(0)
        self.position, self.target = torch.zeros(num_envs), torch.zeros(num_envs)
        self.time = torch.zeros(num_envs, dtype=torch.int64)
        self.single_observation_space, self.single_action_space = self.spaces.observation, self.spaces.action

    @property
    def spaces(self) -> Spaces:
        point = Box(-1, 1, (1,), np.float32)
        observation: Space = Box(-1, 1, (2,), np.float32)
        if "pixels" in self.kind:
            observation = Box(0, 255, (40, 40, 1) if "last" in self.kind else (1, 40, 40), np.uint8)
        if "goal" in self.kind:
            observation = Dict(observation=point, achieved_goal=point, desired_goal=point)
        return Spaces(
            observation, Discrete(2, start=3) if "discrete" in self.kind else Box(-0.2, 0.2, (1,), np.float32)
        )

    def _draw(self, rows: torch.Tensor) -> None:
        fresh = torch.rand(2, self.num_envs, generator=self.rng) * 2 - 1
        self.position = torch.where(rows, fresh[0], self.position)
        self.target = torch.where(rows, fresh[1], self.target)
        self.time = torch.where(rows, 0, self.time)

    def _observe(self) -> Any:
        if "goal" in self.kind:
            here = self.position[:, None].clone()
            return {"observation": here, "achieved_goal": here, "desired_goal": self.target[:, None].clone()}
        if "pixels" in self.kind:
            level = ((self.position + 1) * 127).to(torch.uint8)
            return level[:, None, None, None].expand(-1, *self.spaces.observation.shape).contiguous()  # type: ignore[misc]
        return torch.stack([self.position, self.target], 1)

    def compute_reward(self, achieved: np.ndarray, desired: np.ndarray, infos: Any) -> np.ndarray:
        return -(np.abs(achieved - desired)[:, 0] > 0.1).astype(np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.resets += 1
        if seed is not None:
            self.rng.manual_seed(seed)
        self._draw(torch.ones(self.num_envs, dtype=torch.bool))
        return self._observe(), {}

    def step(self, actions: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        assert actions.dtype == (torch.int64 if "discrete" in self.kind else torch.float32)
        move = (actions - 3.5) * 0.4 if "discrete" in self.kind else actions[:, 0]
        assert bool((move.abs() <= 0.2 + 1e-6).all())
        self.position = (self.position + move).clamp(-1, 1)
        self.time = self.time + 1
        self.steps += self.num_envs
        distance = (self.position - self.target).abs()
        terminated = distance <= 0.1
        truncated = (self.time >= self.max_episode_steps) & ~terminated
        done = terminated | truncated
        info = {"final_obs": self._observe(), "_final_obs": done, "is_success": terminated}
        reward = -distance if "goal" not in self.kind else -(~terminated).float()
        self._draw(done)
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        return np.zeros((self.num_envs, 8, 8, 3), np.uint8)

    def state_dict(self) -> dict[str, Any]:
        tensors = {"position": self.position, "target": self.target, "time": self.time}
        return {**{k: v.clone() for k, v in tensors.items()}, "rng": self.rng.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.position, self.target, self.time = (state[k].clone() for k in ("position", "target", "time"))
        self.rng.set_state(state["rng"])

    def close(self) -> None: ...


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """Saved and read back as the loop does it: no pickled objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What the tests of this folder share."""
    return SimpleNamespace(Line=Line, generator=generator, through_file=through_file, same=same, cpu=CPU)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Networks this small are slower with two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
