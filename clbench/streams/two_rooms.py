"""Streams of Two-Rooms: ``two-rooms-doors``, five positions of the wall and the door; ``two-rooms-dynamics``, one layout
where actions come to do something else."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import numpy as np

from clbench.contracts import Task, TaskList
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError, DataError, unknown_name
from clbench.streams.core import Suite

OBSERVATIONS = ("state", "layout", "pixels")
LIST = "two_rooms_v1.json"  # made by scripts/make_two_rooms_lists.py

DYNAMICS: dict[str, dict[str, float]] = {
    "nominal": {},
    "gain-0.5": {"action_gain": 0.5},
    "gain-1.5": {"action_gain": 1.5},
    "friction-0.5": {"friction": 0.5},
    "reversed": {"action_gain": -1.0},
}


def two_rooms_doors(
    *, rng: np.random.Generator, observation: str = "state", transitions: int = 92_160, episodes: int = 50
) -> Suite:
    """Five tasks that differ in where the wall and its door are; the first is PLDM's own layout (wall 32, door 10).

    Each task has random-walk data (PLDM's "good" policy) and frozen pairs of start and goal in different rooms.

    Args:
        rng: draws the seeds of the data sets.
        observation: ``"state"`` (positions, from which layouts cannot be told apart), ``"layout"`` (with the places of wall
            and door) or ``"pixels"`` (2 x 65 x 65).
        transitions: size of each task's data set.
        episodes: evaluation episodes per task, the first of the 100 shipped ones.

    Raises:
        ConfigError: more episodes than the list has, or none; an unknown observation.
    """
    if observation not in OBSERVATIONS:
        raise unknown_name("value of observation", observation, OBSERVATIONS, where="stream 'two-rooms-doors'")
    lists = load_lists()
    tasks = []
    for i, layout in enumerate(lists["layouts"]):
        wall_x, door_y = layout["wall_x"], layout["door_y"]
        name = f"wall-{wall_x:g}-door-{door_y:g}"
        data = dataset_id(
            "two-rooms", wall_x=wall_x, door_y=door_y, transitions=transitions, observation=observation,
            seed=int(rng.integers(2**31)),
        )  # fmt: skip
        kwargs = {"wall_x": wall_x, "door_y": door_y, "observation": observation}
        tasks.append(Task(name, "clbench/TwoRooms-v0", kwargs, data, evaluation_list(lists, i, episodes), "success"))
    return Suite("two-rooms-doors", tasks, updates=2000, env_steps=20_000)


def two_rooms_dynamics(
    *, rng: np.random.Generator, observation: str = "state", transitions: int = 92_160, episodes: int = 50
) -> Suite:
    """Five tasks in PLDM's layout (wall 32, door 10) that differ in what actions do, not in what is seen.

    ``nominal``; moves of half and of 1.5 times the length; friction that shortens every move by half a pixel (moves in the
    data are 1 pixel long on average); and reversed actions. Data are random walks with the same actions as in
    ``two-rooms-doors``, and all tasks have the same frozen episodes, so tasks are compared in pairs. No single observation
    says which task it is; ``--reveals task_id`` does.

    Arguments and errors: as :func:`two_rooms_doors`.
    """
    if observation not in ("state", "pixels"):
        raise unknown_name(
            "value of observation", observation, ("state", "pixels"), where="stream 'two-rooms-dynamics'"
        )
    evaluation = evaluation_list(load_lists(), 0, episodes)
    tasks = []
    for name, dynamics in DYNAMICS.items():
        kwargs = {"wall_x": 32.0, "door_y": 10.0, "observation": observation, **dynamics}
        data = dataset_id("two-rooms", **kwargs, transitions=transitions, seed=int(rng.integers(2**31)))
        tasks.append(Task(name, "clbench/TwoRooms-v0", kwargs, data, evaluation, "success"))
    return Suite("two-rooms-dynamics", tasks, updates=2000, env_steps=20_000)


def evaluation_list(lists: dict[str, Any], layout: int, episodes: int) -> TaskList:
    """The first ``episodes`` frozen episodes of the layout of that number.

    Raises:
        ConfigError: more episodes than the list has, or none.
    """
    chosen = lists["layouts"][layout]
    available = len(chosen["seeds"])
    if not 1 <= episodes <= available:
        raise ConfigError(f"Two-Rooms: episodes must be from 1 to {available} (the frozen list), got {episodes}.")
    name = f"{lists['name']}/wall-{chosen['wall_x']:g}-door-{chosen['door_y']:g}"
    return TaskList(name, chosen["seeds"], {"start": chosen["start"], "goal": chosen["goal"]}).head(episodes)


def load_lists() -> dict[str, Any]:
    """The frozen layouts and episodes.

    Raises:
        DataError: the file is missing or of another version (a broken installation).
    """
    path = importlib.resources.files("clbench.streams") / "lists" / LIST
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the evaluation lists {LIST}: {error}. Install clbench again.") from error
    if lists.get("version") != 1:
        raise DataError(f"The evaluation lists {LIST} have version {lists.get('version')}, expected 1.")
    return lists
