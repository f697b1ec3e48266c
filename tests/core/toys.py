"""Small plug-ins for the tests of the core: a coin environment, agents that learn, and agents that misbehave.

Used as ``toys:Name`` from the command line too, so everything here is importable as a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from clbench import Agent, Experience, Phase, Spaces, Stream, Task, TaskInfo, TaskList
from clbench.streams.core import Suite


class SlowFailures(gymnasium.Env):
    """Success is a coin of the episode's seed; successes last 2 steps, failures 20. Both end with ``terminated``."""

    metadata = {"render_modes": []}

    def __init__(self, name_of_success: str = "is_success", obs_size: int = 1):
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (obs_size,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(2)
        self.name_of_success, self.obs_size = name_of_success, obs_size

    def _obs(self) -> np.ndarray:
        return np.full(self.obs_size, self.lucky, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.lucky, self.t = float(self.np_random.random() < 0.5), 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        done = self.t >= (2 if self.lucky else 20)
        return self._obs(), float(self.lucky and done), done, False, {self.name_of_success: bool(self.lucky and done)}


gymnasium.register("toys/SlowFailures-v0", entry_point=SlowFailures, max_episode_steps=50)


class Linear(Agent):
    """Softmax regression on digits: the agent of 30 lines that documentation shows, with everything in its state."""

    @dataclass
    class Config:
        lr: float = 0.5

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        n = int(np.prod(spaces.observation.shape or (1,)))
        self.w = torch.randn(n, int(spaces.action.n), generator=rng, device=device) * 0.01  # type: ignore[attr-defined]
        self.told: list[str] = []

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return (obs.flatten(1) @ self.w).argmax(1), memory

    def learn(self, experience: Experience, budget: int, *, rng) -> Iterator[Mapping[str, float]]:
        data = experience.dataset
        assert data is not None
        for _ in range(budget):
            batch = data.sample(16, rng)
            x, y = batch.observations.flatten(1), batch.actions
            p = torch.softmax(x @ self.w, 1)
            self.w -= self.config.lr * x.T @ (p - torch.nn.functional.one_hot(y, self.w.shape[1])) / 16
            yield {"loss": float(-p[torch.arange(16), y].log().mean())}

    def start_task(self, task: TaskInfo) -> None:
        self.told.append(f"start {task.id} {task.name}")

    def finish_task(self) -> None:
        self.told.append("finish")

    def state_dict(self) -> dict[str, Any]:
        return {"w": self.w.clone(), "told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.w, self.told = state["w"].clone(), list(state["told"])


class Walker(Agent):
    """Learns from the environment: counts what it sees. Its state is exact only if the environment's is restored too."""

    requires = frozenset({"env"})

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.seen = torch.zeros(2, dtype=torch.float64)
        self.obs: torch.Tensor | None = None

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return torch.zeros(len(first), dtype=torch.int64), memory

    def learn(self, experience: Experience, budget: int, *, rng) -> Iterator[Mapping[str, float]]:
        env = experience.env
        assert env is not None
        for i in range(budget // env.num_envs):
            actions = torch.randint(2, (env.num_envs,), generator=rng)
            obs, reward, *_ = env.step(actions)
            self.seen += torch.stack([obs.double().sum(), reward.double().sum() * (i + 1)])
            yield {"step": float((i + 1) * env.num_envs), "reward": float(reward.mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"].clone()


class Forgetful(Linear):
    """A missing entry: the weights are not in the state."""

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self.told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told = list(state["told"])


class ActLearns(Linear):
    """Evaluation changes the agent."""

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        self.w += 1e-3
        return super().act(obs, memory, first, rng=rng)


class WrongShape(Linear):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return torch.zeros(len(first), 1, dtype=torch.int64), memory


class Raises(Linear):
    def learn(self, experience: Experience, budget: int, *, rng) -> Iterator[Mapping[str, float]]:
        yield {"loss": 0.0}
        raise ZeroDivisionError("the learning rate is zero")


class NeedsTaskId(Linear):
    requires = frozenset({"task_id"})


class Slow(Linear):
    """Yields ten thousand times and takes its time: for tests that stop a run from outside."""

    def learn(self, experience: Experience, budget: int, *, rng) -> Iterator[Mapping[str, float]]:
        for metrics in super().learn(experience, budget, rng=rng):
            torch.linspace(0, 1, 200_000).sin().sum()
            yield metrics


def digit_tasks(n: int, seeds: list[int]) -> list[Task]:
    return [
        Task(
            f"task-{i}",
            "clbench/Classify-v0",
            {"permutation": s},
            f"classify?permutation={s}",
            TaskList("digits-head", tuple(range(30)), {"index": tuple(range(30))}),
        )
        for i, s in enumerate(seeds[:n])
    ]


def digits(*, rng: np.random.Generator, tasks: int = 3) -> Suite:
    """Digits under permutations, small enough for a test."""
    return Suite("toy-digits", digit_tasks(tasks, rng.integers(2**31, size=tasks).tolist()), updates=40, env_steps=80)


def coins(*, rng: np.random.Generator, episodes: int = 24) -> Suite:
    """Two copies of the coin environment."""
    tasks = [
        Task(f"coin-{i}", "toys/SlowFailures-v0", {}, None, TaskList.from_seeds(episodes, first=i)) for i in range(2)
    ]
    return Suite("toy-coins", tasks, updates=10, env_steps=64)


def changing_spaces(*, rng: np.random.Generator) -> Stream:
    """A stream whose second task has other observations."""
    tasks = tuple(
        Task(f"size-{n}", "toys/SlowFailures-v0", {"obs_size": n}, None, TaskList.from_seeds(2)) for n in (1, 2)
    )
    return Stream("changing", tasks, tuple(Phase(t.name, 8) for t in tasks))
