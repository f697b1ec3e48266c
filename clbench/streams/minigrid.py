"""Five MiniGrid tasks with the same observations and actions."""

from __future__ import annotations

import numpy as np

from clbench.contracts import Task, TaskList
from clbench.errors import ConfigError, unknown_name
from clbench.streams.core import Suite

# task name -> Gymnasium id: an empty room, lava, walls, a key, a door; all end at one goal square
ROOMS = {
    "empty": "MiniGrid-Empty-Random-6x6-v0",
    "lava-gap": "MiniGrid-LavaGapS5-v0",
    "crossing": "MiniGrid-SimpleCrossingS9N1-v0",
    "door-key": "MiniGrid-DoorKey-5x5-v0",
    "multi-room": "MiniGrid-MultiRoom-N2-S4-v0",
}
# goal-image is missing: its pictures have the size of the grid, which differs between the rooms
OBSERVATIONS = ("flat", "image", "goal-position")


def minigrid_5(*, rng: np.random.Generator, episodes: int = 20, observation: str = "flat") -> Suite:
    """Reach the goal square in five kinds of rooms; 7 actions, partial view.

    Args:
        rng: not used; the tasks are fixed.
        episodes: evaluation episodes per task, each with a layout of its own.
        observation: ``flat``, ``image`` or ``goal-position``, see :mod:`clbench.envs.minigrid`.

    Raises:
        ConfigError: fewer than one episode, or another observation.
    """
    if observation == "goal-image":
        raise ConfigError(
            "minigrid-5 cannot use observation='goal-image': the rooms have different sizes, and with them the pictures; "
            f"use one of {', '.join(OBSERVATIONS)}."
        )
    if observation not in OBSERVATIONS:
        raise unknown_name("value of observation", observation, OBSERVATIONS, where="stream 'minigrid-5'")
    evaluation = TaskList.from_seeds(episodes)
    tasks = [Task(name, env_id, {"observation": observation}, None, evaluation) for name, env_id in ROOMS.items()]
    return Suite("minigrid-5", tasks, updates=50_000, env_steps=50_000)
