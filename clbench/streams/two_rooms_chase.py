"""The stream ``two-rooms-chase``: trained to know Two-Rooms, tested on a task that was never trained, keeping away."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import numpy as np

from clbench.contracts import Task, TaskList
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError, DataError, unknown_name
from clbench.streams.core import Suite
from clbench.streams.two_rooms import evaluation_list, load_lists

LIST = "two_rooms_chase_v1.json"  # made by scripts/make_two_rooms_lists.py
SPEEDS = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8)  # of the chaser, in pixels per step (PLDM, arXiv 2502.14819)
LAYOUT = {"wall_x": 32.0, "door_y": 10.0}


def two_rooms_chase(
    *, rng: np.random.Generator, observation: str = "state", transitions: int = 92_160, episodes: int = 100,
    speeds: tuple[float, ...] = SPEEDS,
) -> Suite:  # fmt: skip
    """One task to train on, ``reach`` (Two-Rooms), and one per speed of a chaser, which no phase trains.

    All tasks have the observation key ``goal_sign``: 1 where the goal is to be reached, -1 where it is the chaser. Agents
    that know the key, as ``pldm``, do the one or the other with the same model.

    Args:
        rng: draws the seed of the data set.
        observation: ``"state"`` (positions) or ``"pixels"`` (2 x 65 x 65).
        transitions: size of the data set: random walks (PLDM's "good" policy).
        episodes: evaluation episodes per task, the first of the 100 shipped ones.
        speeds: of the chaser; all tasks have the same episodes.

    Raises:
        ConfigError: more episodes than the lists have, or none; an unknown observation; no speed, or one twice.
    """
    if observation not in ("state", "pixels"):
        raise unknown_name("value of observation", observation, ("state", "pixels"), where="stream 'two-rooms-chase'")
    if not speeds or len(set(speeds)) < len(speeds):
        raise ConfigError(f"two-rooms-chase: speeds must be different numbers, at least one, got {speeds}.")
    data = dataset_id(
        "two-rooms", **LAYOUT, transitions=transitions, observation=observation, goal_sign=True,
        seed=int(rng.integers(2**31)),
    )  # fmt: skip
    kwargs = {**LAYOUT, "observation": observation}
    evaluation = evaluation_list(load_lists(), 0, episodes)
    reach = Task("reach", "clbench/TwoRooms-v0", {**kwargs, "goal_sign": True}, data, evaluation, "success")
    trials = chase_trials(episodes)
    chases = [
        Task(
            f"chase-{speed:g}", "clbench/TwoRoomsChase-v0", {**kwargs, "chaser_speed": float(speed)}, None, trials,
            "success",
        )
        for speed in speeds
    ]  # fmt: skip
    return Suite("two-rooms-chase", [reach], updates=10_000, env_steps=100_000, zero_shot=chases)


def chase_trials(episodes: int) -> TaskList:
    """The first ``episodes`` frozen pairs of agent and chaser, in different rooms.

    Raises:
        ConfigError: more episodes than the list has, or none.
        DataError: the file is missing or of another version (a broken installation).
    """
    trials = load_trials()
    available = len(trials["seeds"])
    if not 1 <= episodes <= available:
        raise ConfigError(f"two-rooms-chase: episodes must be from 1 to {available} (the frozen list), got {episodes}.")
    options = {"start": trials["start"], "chaser": trials["chaser"]}
    return TaskList(trials["name"], trials["seeds"], options).head(episodes)


def load_trials() -> dict[str, Any]:
    """The frozen episodes.

    Raises:
        DataError: the file is missing or of another version (a broken installation).
    """
    path = importlib.resources.files("clbench.streams") / "lists" / LIST
    try:
        trials = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the evaluation lists {LIST}: {error}. Install clbench again.") from error
    if trials.get("version") != 1:
        raise DataError(f"The evaluation lists {LIST} have version {trials.get('version')}, expected 1.")
    return trials
