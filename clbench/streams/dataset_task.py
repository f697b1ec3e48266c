"""A data set as a stream of one task: ``clbench run two-rooms/size-5078-v0 --agent bc``.

Published data sets name their task. Those in files do not: ``clbench run walks.npz --agent bc --stream.env ENV``.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal

from clbench.config import build, options_of
from clbench.contracts import Metric, Task, TaskList
from clbench.data.files import OGBENCH, is_file
from clbench.data.recipes import RECIPES
from clbench.data.registry import dataset_id, parse_dataset_id
from clbench.errors import ConfigError, unknown_name
from clbench.registry import entries, load_object
from clbench.streams.core import Suite
from clbench.streams.two_rooms import evaluation_list, load_lists

UPDATES, ENV_STEPS = 10_000, 100_000  # default budgets


def stream_of(identifier: str) -> Callable[..., Suite]:
    """The function behind the stream that the id of a data set stands for.

    Options in the id of a published one (``two-rooms/good-v0?observation=pixels``) become defaults of the stream's options.

    Raises:
        UnknownNameError: an unknown data set or option.
        ConfigError: a data set without a task.
    """
    name, options = parse_dataset_id(identifier)
    if name.startswith(OGBENCH):
        return _ogbench(identifier)
    if is_file(name):
        return _of_file(identifier)
    if name not in RECIPES:
        if name not in entries("datasets"):
            raise unknown_name("data set", name, entries("datasets"))
        raise ConfigError(
            f"The data set {name!r} has no task of its own, so it is no stream; make a clbench.Task with this dataset_id, "
            f"or take one of {', '.join(sorted(RECIPES)[:2])}, ... (`clbench list datasets`)."
        )
    families = {"two-rooms": _two_rooms, "point-maze": _point_maze, "ogbench-maze": _ogbench_maze}
    function = families[RECIPES[name].family](name)
    return _with_defaults(function, options, identifier)


def _with_defaults(function: Callable[..., Suite], values: dict[str, str], where: str) -> Callable[..., Suite]:
    """``function`` with other defaults, which are checked here."""
    if not values:
        return function
    checked = build(options_of(function), values, f"data set {where!r}")
    signature = inspect.signature(function)
    parameters = [
        p.replace(default=getattr(checked, p.name)) if p.name in values else p for p in signature.parameters.values()
    ]

    @functools.wraps(function)
    def with_defaults(**options: Any) -> Suite:
        return function(**options)

    with_defaults.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return with_defaults


def _two_rooms(name: str) -> Callable[..., Suite]:
    def stream(
        *, observation: str = "state", collision: str = "stop", walls: str = "stop", seed: int = 0, episodes: int = 100
    ) -> Suite:
        """Goals in the other room of the layout wall 32, door 10.

        Args:
            observation: ``"state"`` (positions) or ``"pixels"`` (2 x 65 x 65).
            collision: rule of the data.
            walls: rule of the environment: ``"stop"``, or ``"noisy"`` as in the evaluations of the paper's code, where an
                agent that pushes against a wall is moved about.
            seed: of the data; the run's own seed does not change them.
            episodes: the first of the 100 frozen ones.
        """
        _check_observation(observation, name)
        data = _identifier(name, observation=(observation, "state"), collision=(collision, "stop"), seed=(seed, 0))
        if walls not in ("stop", "noisy"):
            raise unknown_name("value of walls", walls, ("stop", "noisy"), where=f"stream {name!r}")
        kwargs: dict[str, Any] = {"wall_x": 32.0, "door_y": 10.0, "observation": observation}
        if walls != "stop":
            kwargs["collision"] = walls
        evaluation = evaluation_list(load_lists(), 0, episodes)
        task = Task("wall-32-door-10", "clbench/TwoRooms-v0", kwargs, data, evaluation, "success")
        return Suite(name, [task], updates=UPDATES, env_steps=ENV_STEPS)

    return stream


def _point_maze(name: str) -> Callable[..., Suite]:
    def stream(
        *, observation: str = "state", seed: int = 0, trials: str = "heldout", episodes: int | None = None
    ) -> Suite:
        """Goals in held-out layouts.

        Args:
            observation: ``"state"``, ``"layout"`` (state and the walls as 16 numbers) or ``"pixels"`` (3 x 64 x 64, and the
                velocity).
            seed: of the data; the run's own seed does not change them.
            trials: ``"heldout"`` (80 trials on 40 layouts), or ``"distance-K"`` (20 trials on 5 layouts whose smallest edit
                distance to the paper's training layouts is K, 0 to 8).
            episodes: the first of the frozen ones; all of them by default.
        """
        _check_observation(observation, name, ("state", "layout", "pixels"))
        chosen = _maze_trials(trials, name)
        if episodes is not None and not 1 <= episodes <= len(chosen):
            raise ConfigError(f"{name}: episodes must be from 1 to {len(chosen)} (the frozen list), got {episodes}.")
        data = _identifier(name, observation=(observation, "state"), seed=(seed, 0))
        kwargs = {"observation": observation}
        label = "held-out-layouts" if trials == "heldout" else f"{trials}-layouts"
        task = Task(label, "clbench/PointMaze-v0", kwargs, data, chosen.head(episodes), "success")
        return Suite(name, [task], updates=UPDATES, env_steps=ENV_STEPS)

    return stream


def _maze_trials(trials: str, name: str) -> TaskList:
    """The frozen trials ``"heldout"`` or ``"distance-K"``."""
    if trials == "heldout":
        return load_object("clbench.streams.maze_layouts:heldout_trials")()
    buckets = [f"distance-{k}" for k in load_object("clbench.streams.maze_layouts:BUCKETS")]
    if trials not in buckets:
        raise unknown_name("value of trials", trials, ("heldout", *buckets), where=f"stream {name!r}")
    return load_object("clbench.streams.maze_layouts:bucket_trials")(buckets.index(trials))


def _ogbench_maze(name: str) -> Callable[..., Suite]:
    maze = RECIPES[name].settings["maze"]

    def stream(
        *, step_size: float = 0.2, trajectories: int | None = None, max_steps: int = 1000, seed: int = 0,
        episodes: int = 250,
    ) -> Suite:  # fmt: skip
        """The five tasks of the maze.

        Args:
            step_size: displacement per axis of a full action, in the data and in the environment.
            trajectories: of the data, the first so many; all of them by default.
            max_steps: steps after which an evaluation episode is over.
            seed: of the data; the run's own seed does not change them.
            episodes: the first ones of the frozen list; a multiple of 5 is balanced over the tasks.
        """
        trials: TaskList = load_object("clbench.streams.ogbench_mazes:evaluation_trials")(maze, episodes)
        data = _identifier(name, step_size=(step_size, 0.2), trajectories=(trajectories, None), seed=(seed, 0))
        kwargs = {"maze": maze, "step_size": step_size, "max_episode_steps": max_steps}
        task = Task(maze, "clbench/OGBenchPointMaze-v0", kwargs, data, trials, "success")
        return Suite(name, [task], updates=UPDATES, env_steps=ENV_STEPS)

    return stream


def _ogbench(identifier: str) -> Callable[..., Suite]:
    name = parse_dataset_id(identifier)[0]

    def stream(*, max_steps: int | None = None, episodes: int = 250) -> Suite:
        """The five tasks of an environment of OGBench.

        Args:
            max_steps: steps after which an evaluation episode is over; OGBench's own limit by default.
            episodes: evaluation episodes, told apart by their seeds; number ``i`` is of task ``1 + i % 5``.
        """
        plain = TaskList.from_seeds(episodes)
        tasks = tuple(1 + i % 5 for i in range(episodes))
        trials = TaskList(f"{name}-{plain.name}", plain.seeds, {"task_id": tasks})
        kwargs = {} if max_steps is None else {"max_episode_steps": max_steps}
        return Suite(identifier, [Task(name, name, kwargs, identifier, trials, "success")], UPDATES, ENV_STEPS)

    return stream


def _of_file(identifier: str) -> Callable[..., Suite]:
    def stream(
        *, env: str = "", episodes: int = 20, metric: Literal["success", "return"] = "success", low: float = 0.0,
        high: float = 1.0,
    ) -> Suite:  # fmt: skip
        """An environment that is named, with random starts.

        Args:
            env: a Gymnasium id with keyword arguments, as ``clbench/TwoRooms-v0?wall_x=32``.
            episodes: evaluation episodes, told apart by their seeds.
            metric: ``"success"`` or ``"return"``.
            low: return that scores 0.
            high: return that scores 1.
        """
        if not env:
            raise ConfigError(
                f"The data in {identifier!r} do not say which environment they are for; add --stream.env ENV, with "
                "arguments as clbench/TwoRooms-v0?wall_x=32."
            )
        env_id, arguments = parse_dataset_id(env)
        kwargs = {k: _plain(v) for k, v in arguments.items()}
        scored = Metric(metric, low, high)
        task = Task(env_id, env_id, kwargs, identifier, TaskList.from_seeds(episodes), scored)
        return Suite(identifier, [task], updates=UPDATES, env_steps=ENV_STEPS)

    return stream


def _plain(text: str) -> Any:
    """``"3"``, ``"0.5"``, ``"true"`` as what they look like, anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check_observation(observation: str, name: str, known: tuple[str, ...] = ("state", "pixels")) -> None:
    if observation not in known:
        raise unknown_name("value of observation", observation, known, where=f"stream {name!r}")


def _identifier(name: str, **options: tuple[Any, Any]) -> str:
    """The id with those options (value, default) that are not at their default."""
    return dataset_id(name, **{k: value for k, (value, default) in options.items() if value != default})
