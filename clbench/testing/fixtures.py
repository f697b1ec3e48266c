"""Tiny tasks on which plug-ins are checked: a point in a square, fast on any device, in every kind of clbench task.

The kinds are the product of discrete or continuous actions, state or pixel observations, with or without goals. Each
offers an environment (:class:`ToyVectorEnv`, a complete and short example of the batched protocol) and a data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor

from clbench.contracts import Experience, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError
from clbench.rng import hash_seeds, hash_uniform, torch_generator

IMAGE = 36  # pixels per side: the smallest picture that the usual three-layer convolutional encoder accepts
_MOVES = ((0.4, 0.0), (-0.4, 0.0), (0.0, 0.2), (0.0, -0.2))
_EPISODES, _LENGTH = 4, 32  # of the data
_LIMITS = (0.5, 0.25)  # neither 1 nor equal, so that an agent that ignores the action space is noticed


class ToyVectorEnv:
    """A point in the square [-1, 1]^2 that walks to a goal.

    State observations are (x, y, distance to the nearest wall), pixels are (3, 36, 36) uint8. With ``goal`` the
    observation is a dict whose goals are positions (or pictures); without, the goal is the centre. Success is being
    within 0.4 of the goal.

    Args:
        num_envs: rows ``B``.
        device: of all tensors.
        autoreset: ``"same_step"`` or ``"disabled"``.
        discrete: four moves instead of a displacement in [-0.5, 0.5] x [-0.25, 0.25].
        pixels: pictures instead of states.
        goal: goal observations.
        max_episode_steps: after which an episode is truncated.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        *,
        autoreset: str = "same_step",
        discrete: bool = False,
        pixels: bool = False,
        goal: bool = False,
        max_episode_steps: int = 8,
    ):
        if autoreset not in ("same_step", "disabled"):
            raise ConfigError(f"autoreset must be 'same_step' or 'disabled', got {autoreset!r}.")
        self.num_envs, self.device, self.autoreset = num_envs, torch.device(device), autoreset
        self.max_episode_steps: int | None = max_episode_steps
        self.discrete, self.pixels, self.goal = discrete, pixels, goal
        self.single_observation_space = self._observation_space()
        limits = np.array(_LIMITS, np.float32)
        self.single_action_space: gymnasium.Space = (
            gymnasium.spaces.Discrete(4) if discrete else gymnasium.spaces.Box(-limits, limits)
        )
        self.seeds = torch.arange(num_envs, device=self.device)
        self.episodes = torch.full((num_envs,), -1, device=self.device)
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(num_envs, 2, device=self.device)
        self.target = torch.zeros(num_envs, 2, device=self.device)
        self.calls = 0  # of step since construction, to count what an agent spends

    def _observation_space(self) -> gymnasium.Space:
        image = gymnasium.spaces.Box(0, 255, (3, IMAGE, IMAGE), np.uint8)
        state, position = (gymnasium.spaces.Box(-1.0, 1.0, (n,), np.float32) for n in (3, 2))
        observation = image if self.pixels else state
        if not self.goal:
            return observation
        goal = image if self.pixels else position
        return gymnasium.spaces.Dict({"observation": observation, "achieved_goal": goal, "desired_goal": goal})

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See :meth:`clbench.VectorEnv.reset`."""
        options = options or {}
        mask = torch.as_tensor(
            options.get("reset_mask", torch.ones(self.num_envs, dtype=torch.bool)), device=self.device
        )
        if seed is not None:
            rows = torch.arange(self.num_envs, device=self.device)
            fresh = (
                hash_seeds(torch.full_like(rows, seed), rows) if isinstance(seed, int) else torch.tensor(seed).to(rows)
            )
            self.seeds = torch.where(mask, fresh, self.seeds)
            self.episodes = torch.where(mask, -1, self.episodes)
        self._start(mask)
        return self._observe(), {"is_success": self._success()}

    def _start(self, mask: Tensor) -> None:
        """Begin the next episode in the rows of ``mask`` (B,): a function of the row's seed and number of episodes."""
        self.episodes = self.episodes + mask
        u = hash_uniform(self.seeds, self.episodes, 4).to(torch.float32) * 1.8 - 0.9
        self.position = torch.where(mask[:, None], u[:, :2], self.position)
        self.target = torch.where(mask[:, None], u[:, 2:] * float(self.goal), self.target)
        self.steps = torch.where(mask, 0, self.steps)

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """See :meth:`clbench.VectorEnv.step`."""
        limits = torch.tensor(_LIMITS, device=self.device)
        move = torch.tensor(_MOVES, device=self.device)[actions] if self.discrete else actions.clamp(-limits, limits)
        self.position = (self.position + move).clamp(-1, 1)
        self.steps = self.steps + 1
        self.calls += 1
        success = self._success()
        truncated = (self.steps >= (self.max_episode_steps or 0)) & ~success
        reward = -(self.position - self.target).norm(dim=1)
        done = success | truncated
        info: dict[str, Any] = {"is_success": success}
        if self.autoreset == "same_step":
            info["final_obs"], info["_final_obs"] = self._observe(), done
            self._start(done)
        return self._observe(), reward, success, truncated, info

    def _success(self) -> Tensor:
        return (self.position - self.target).norm(dim=1) < 0.4

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Tensor:
        """Relabelled reward (B,): 0 at the goal, else -1. Takes tensors or, as Stable-Baselines3 sends them, arrays."""
        achieved, desired = (torch.as_tensor(g, dtype=torch.float32) for g in (achieved_goal, desired_goal))
        distance = (achieved - desired).flatten(1).norm(dim=1)
        return -(distance >= 0.4).to(torch.float32)

    def _observe(self) -> Any:
        return observe(self.position, self.target, pixels=self.pixels, goal=self.goal)

    def render(self) -> np.ndarray:
        """(B, 36, 36, 3) uint8."""
        return draw(self.position).permute(0, 2, 3, 1).cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        names = ("seeds", "episodes", "steps", "position", "target")
        return {name: getattr(self, name).clone() for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.device).clone())

    def close(self) -> None:
        pass


def draw(position: Tensor) -> Tensor:
    """Pictures (B, 3, 36, 36) uint8 of points (B, 2): a Gaussian blob, its coordinates as flat colours."""
    grid = torch.linspace(-1, 1, IMAGE, device=position.device)
    x, y = position[:, :1], position[:, 1:]
    blob = torch.exp(-((grid - y) ** 2) * 8)[:, :, None] * torch.exp(-((grid - x) ** 2) * 8)[:, None, :]
    channels = torch.stack([blob, *(((c + 1) / 2)[:, :, None].expand_as(blob) for c in (x, y))], 1)
    return (channels * 255).to(torch.uint8)


def observe(position: Tensor, target: Tensor | None, *, pixels: bool, goal: bool) -> Any:
    """Observations of points (B, 2); ``target=None`` leaves ``desired_goal`` out, as in a data set."""
    wall = 1 - position.abs().amax(1, keepdim=True)
    observation = draw(position) if pixels else torch.cat([position, wall], 1)
    if not goal:
        return observation
    picture = draw if pixels else torch.clone
    obs = {"observation": observation, "achieved_goal": observation if pixels else picture(position)}
    return obs if target is None else {**obs, "desired_goal": picture(target)}


@dataclass(frozen=True)
class Fixture:
    """One kind of task.

    Args:
        discrete: actions are one of four moves, else a displacement.
        pixels: observations are pictures, else states.
        goal: observations are goal dicts.
        device: of all tensors.
    """

    discrete: bool = False
    pixels: bool = False
    goal: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        goal = "goal " if self.goal else ""
        return f"{goal}{'pixels' if self.pixels else 'state'}, {'discrete' if self.discrete else 'continuous'} actions"

    @property
    def offers(self) -> frozenset[str]:
        """What an agent may require of this task, of :data:`clbench.contracts.REQUIREMENTS`."""
        kinds = {"discrete" if self.discrete else "continuous", "pixels" if self.pixels else "state"}
        always = {"dataset", "env", "task_id", "boundaries"}
        return frozenset(kinds | always | ({"goal"} if self.goal else set()))

    def env(self, num_envs: int, autoreset: str = "same_step") -> ToyVectorEnv:
        return ToyVectorEnv(
            num_envs, self.device, autoreset=autoreset, discrete=self.discrete, pixels=self.pixels, goal=self.goal
        )

    @property
    def spaces(self) -> Spaces:
        env = self.env(1)
        return Spaces(env.single_observation_space, env.single_action_space)

    @cached_property
    def _walks(self) -> tuple[Tensor, Tensor]:
        """Random walks: positions (E, L + 1, 2) and actions (E, L, ...)."""
        rng = torch_generator(0, "testing", "fixtures")
        position = torch.rand(_EPISODES, 2, generator=rng) * 1.8 - 0.9
        choice = torch.randint(4, (_EPISODES, _LENGTH), generator=rng)
        limits = torch.tensor(_LIMITS)
        steps = (torch.rand(_EPISODES, _LENGTH, 2, generator=rng) * 2 - 1) * limits
        moves = torch.tensor(_MOVES)[choice] if self.discrete else steps
        path = [position]
        for t in range(_LENGTH):
            path.append((path[-1] + moves[:, t]).clamp(-1, 1))
        return torch.stack(path, 1), choice if self.discrete else moves

    def dataset(self, task: int | None = None) -> OfflineDataset:
        """128 transitions in 4 episodes, which are long enough for agents that train on sequences."""
        path, actions = self._walks
        data = OfflineDataset(
            observe(path[:, :-1].flatten(0, 1), None, pixels=self.pixels, goal=self.goal),
            actions.flatten(0, 1).clone(),
            torch.full((_EPISODES,), _LENGTH),
            observe(path[:, -1], None, pixels=self.pixels, goal=self.goal),
            name=f"toy: {self.name}",
        )
        return data.with_task(task).to(self.device)

    def experience(self, source: str, num_envs: int, seed: int, task: int | None = None) -> Experience:
        """A fresh phase of experience; ``source`` is ``"dataset"``, ``"env"`` or ``"both"``."""
        env = self.env(num_envs) if source != "dataset" else None
        if env is not None:
            env.reset(seed=seed)
        return Experience(self.dataset(task) if source != "env" else None, env)


# the most telling kinds first: an agent that fits many is checked on FIXTURES, one with special needs on those it fits
FIXTURES: tuple[Fixture, ...] = (
    Fixture(discrete=True),
    Fixture(),
    Fixture(goal=True),
    Fixture(discrete=True, goal=True),
    Fixture(discrete=True, pixels=True),
)
ALL_FIXTURES: tuple[Fixture, ...] = tuple(
    Fixture(discrete=d, pixels=p, goal=g) for d, p, g in itertools.product((False, True), repeat=3)
)
