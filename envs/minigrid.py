"""MiniGrid tasks with observations that have a tensor form: flat, image, or with a goal.

``flat``
    (984,) float32: the 7x7 cells in front of the agent, one-hot (11 objects, 6 colours, 3 states), and its direction.
``image``
    (3, 7, 7) uint8: the same cells as object, colour and state numbers.
``goal-position``
    ``observation`` as in ``flat``; ``achieved_goal`` and ``desired_goal`` are (x, y) float32 of agent and goal square.
``goal-image``
    All three (3, W, H) uint8: the whole grid as numbers; in ``desired_goal`` the agent stands on the goal square.

With ``flat`` and ``image`` the reward is MiniGrid's, ``1 - 0.9 t / max_steps`` at success, else 0. In the goal modes it
is sparse: 0 when the agent is at the goal, else -1. Success (``info["is_success"]``) is MiniGrid's own reward being
positive at the end of an episode: falling into lava ends it too, but is a failure. The direction the agent looks in is
not part of a goal. ``flat`` and ``image`` have the same shape for every task, and leave out the mission text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from minigrid.minigrid_env import MiniGridEnv

from clbench.errors import ConfigError, unknown_name

AGENT = OBJECT_TO_IDX["agent"]
RED = COLOR_TO_IDX["red"]
DIRECTIONS = 4
# Bounds are part of the observation space, and agents scale by them. One bound serves all but the largest grids, so that
# tasks share their spaces; symbols are numbers of objects, colours and states, far from the 255 of a grey value.
COMMON_SIZE = 32
MAX_SYMBOL = max(*OBJECT_TO_IDX.values(), *COLOR_TO_IDX.values(), *STATE_TO_IDX.values(), 3)
# states of a cell: open, closed, locked; the agent's own cell holds its direction in grid encodings
_ONE_HOT = [np.eye(n, dtype=np.float32) for n in (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX))]


def flat_view(image: np.ndarray, direction: int) -> np.ndarray:
    """The partial view (7, 7, 3) and the direction as one one-hot vector (984,) float32."""
    cells = np.concatenate([table[image[..., c]] for c, table in enumerate(_ONE_HOT)], axis=-1)
    return np.concatenate([cells.ravel(), np.eye(DIRECTIONS, dtype=np.float32)[direction]])


class MiniGridTensors(gymnasium.Wrapper):
    """What all observations share: success by MiniGrid's own reward."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        if not isinstance(env.unwrapped, MiniGridEnv):
            raise ConfigError(f"{env} is not a MiniGrid environment.")
        self.grid_env: MiniGridEnv = env.unwrapped

    def observe(self, obs: dict[str, Any]) -> Any:
        """MiniGrid's observation (a dict of image, direction, mission) in tensor form."""
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self.observe(obs), {**info, "is_success": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        success = terminated and float(reward) > 0
        return self.observe(obs), float(reward), terminated, truncated, {**info, "is_success": success}


class FlatObservation(MiniGridTensors):
    """(984,) float32, see :func:`flat_view`."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.observation_space = _flat_space(self.grid_env)

    def observe(self, obs: dict[str, Any]) -> np.ndarray:
        return flat_view(obs["image"], obs["direction"])


class ImageObservation(MiniGridTensors):
    """(3, 7, 7) uint8: object, colour and state numbers of the partial view, channel first."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        size = self.grid_env.agent_view_size
        self.observation_space = spaces.Box(0, MAX_SYMBOL, (3, size, size), np.uint8)

    def observe(self, obs: dict[str, Any]) -> np.ndarray:
        return np.moveaxis(obs["image"], -1, 0)


class GoalObservation(MiniGridTensors):
    """The goal keys of Gymnasium-Robotics and the sparse reward, for tasks with one goal square.

    The task ends where MiniGrid ends it, so falling into lava stops the -1 per step: judge by success, not by return.

    Raises:
        ConfigError: there is not exactly one goal square.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        # the goal square does not move within an episode, but the agent hides it from encodings once it stands there
        raw, info = self.env.reset(seed=seed, options=options)
        self.goal = self._find_goal()
        return self.observe(raw), {**info, "is_success": False}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        reward = self.compute_reward(obs["achieved_goal"], obs["desired_goal"], info)
        return obs, float(reward), terminated, truncated, info

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> np.ndarray:
        """0 where the agent is at the goal, else -1: any leading dims, float32; ``info`` is not used."""
        raise NotImplementedError

    def _find_goal(self) -> tuple[int, int]:
        grid = self.grid_env.grid
        found = [
            (i % grid.width, i // grid.width) for i, o in enumerate(grid.grid) if o is not None and o.type == "goal"
        ]
        if len(found) != 1:
            name = self.grid_env.spec.id if self.grid_env.spec else type(self.grid_env).__name__
            raise ConfigError(
                f"{name} has {len(found)} goal squares, but a goal observation needs exactly one; "
                "use observation='flat' or 'image'."
            )
        return found[0]


class GoalPosition(GoalObservation):
    """``observation`` flat; goals are grid coordinates (x, y) float32."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        largest = max(COMMON_SIZE, self.grid_env.width, self.grid_env.height) - 1
        position = spaces.Box(0.0, float(largest), (2,), np.float32)
        self.observation_space = spaces.Dict(
            observation=_flat_space(self.grid_env), achieved_goal=position, desired_goal=position
        )

    def observe(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        return {
            "observation": flat_view(obs["image"], obs["direction"]),
            "achieved_goal": np.array(self.grid_env.agent_pos, dtype=np.float32),
            "desired_goal": np.array(self.goal, dtype=np.float32),
        }

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> np.ndarray:
        there = (np.asarray(achieved_goal) == np.asarray(desired_goal)).all(-1)
        return there.astype(np.float32) - np.float32(1)


class GoalImage(GoalObservation):
    """Whole grids (3, W, H) uint8, channel first; the agent's cell holds its direction only in ``observation``."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        picture = spaces.Box(0, MAX_SYMBOL, (3, self.grid_env.width, self.grid_env.height), np.uint8)
        self.observation_space = spaces.Dict(observation=picture, achieved_goal=picture, desired_goal=picture)

    def observe(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        x, y = (int(v) for v in self.grid_env.agent_pos)
        cells = np.moveaxis(self.grid_env.grid.encode(), -1, 0)
        return {
            "observation": _with_agent(cells, x, y, obs["direction"]),
            "achieved_goal": _with_agent(cells, x, y, 0),
            "desired_goal": _with_agent(cells, *self.goal, 0),
        }

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any) -> np.ndarray:
        """Compares where the agent stands in both pictures; doors and keys do not count."""
        here, there = (np.asarray(g)[..., 0, :, :] == AGENT for g in (achieved_goal, desired_goal))
        return (here == there).all((-2, -1)).astype(np.float32) - np.float32(1)


OBSERVATIONS: dict[str, type[MiniGridTensors]] = {
    "flat": FlatObservation,
    "image": ImageObservation,
    "goal-position": GoalPosition,
    "goal-image": GoalImage,
}


def wrapper_of(observation: str) -> Callable[[gymnasium.Env], gymnasium.Env]:
    """The wrapper that gives MiniGrid's observations the named form.

    Raises:
        UnknownNameError: another name than ``flat``, ``image``, ``goal-position``, ``goal-image``.
    """
    if observation not in OBSERVATIONS:
        raise unknown_name("MiniGrid observation", str(observation), OBSERVATIONS)
    return OBSERVATIONS[observation]


def _with_agent(cells: np.ndarray, x: int, y: int, direction: int) -> np.ndarray:
    picture = cells.copy()
    picture[:, x, y] = AGENT, RED, direction
    return picture


def _flat_space(env: MiniGridEnv) -> spaces.Box:
    size = env.agent_view_size**2 * sum(len(table) for table in _ONE_HOT) + DIRECTIONS
    return spaces.Box(0.0, 1.0, (size,), np.float32)
