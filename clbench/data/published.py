"""The published data sets by name: deterministic functions of their id, made on the machine and cached.

Two-Rooms trajectories are drawn in batches of 1024 with a seed each, as the reference's generator does, so a small set is
the beginning of the large one and takes no longer than its own batches. Sizes are exact: where ``N`` is no multiple of the
trajectory's length, the last trajectory is cut short. The paper says 3 M transitions for the reference data, and so do we;
the file it released has 40 batches, 3,686,400.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clbench.config import build, options_of
from clbench.data.cache import cache_path, cached
from clbench.data.dataset import OfflineDataset
from clbench.data.recipes import RECIPES, Recipe
from clbench.data.registry import parse_dataset_id
from clbench.registry import load_object
from clbench.rng import derive_seed, numpy_generator

BATCH = 1024  # trajectories
STEPS = 90
GOOD, RANDOM = 5.0, 1e-6  # concentration of the turns
WALL_X, DOOR_Y = 32.0, 10.0
FACES = 31.0, 33.0  # a trajectory passes the door if it has states on both sides of the wall
GENERATORS = {
    "two-rooms": "clbench.envs.two_rooms_data:two_rooms",
    "point-maze": "clbench.envs.point_maze_data:point_maze",
    "ogbench-maze": "clbench.envs.ogbench_maze_data:ogbench_maze",
}
CODE = {  # what the numbers depend on; a cached file of other code is not read
    "two-rooms": (__name__, "clbench.rng", "clbench.envs.two_rooms", "clbench.envs.two_rooms_data"),
    "point-maze": (
        __name__, "clbench.rng", "clbench.envs.point_maze", "clbench.envs.point_maze_data",
        "clbench.streams.maze_layouts", "clbench.streams.lists/point_maze_v1.json",
    ),
    "ogbench-maze": (
        __name__, "clbench.rng", "clbench.envs.ogbench_maze", "clbench.envs.ogbench_maze_data",
        "clbench.streams.ogbench_mazes",
    ),
}  # fmt: skip
WITH_LAYOUT = "clbench.envs.point_maze_data:with_layout"
RENDERED = "clbench.envs.two_rooms_data:rendered"

Trajectories = tuple[Tensor, Tensor]  # states (E, T + 1, 2), actions (E, T, 2)


def __getattr__(name: str) -> Callable[..., OfflineDataset]:
    """The function of each recipe, ``two_rooms_good_v0`` and so on."""
    for recipe in RECIPES.values():
        if recipe.attribute == name:
            return {"two-rooms": _two_rooms, "point-maze": _point_maze, "ogbench-maze": _ogbench_maze}[recipe.family](
                recipe
            )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _key(recipe: Recipe, **options: Any) -> dict[str, Any]:
    """All that the numbers of a recipe depend on besides code; its settings too, so that a change of them is seen."""
    return {**recipe.settings, **options}


def kept_at(identifier: str) -> Path | None:
    """Where the cache has, or would have, the data set of an id; ``None`` for ids that are not of published data sets."""
    name, given = parse_dataset_id(identifier)
    recipe = RECIPES.get(name)
    if recipe is None:
        return None
    options = dataclasses.asdict(build(options_of(__getattr__(recipe.attribute)), given, f"data set {name!r}"))
    if recipe.family == "two-rooms":
        del options["observation"]  # pictures are drawn from the same file
    if recipe.family == "point-maze":
        options["observation"] = _kept_observation(options["observation"])
    return cache_path(name, _key(recipe, **options), CODE[recipe.family])


# -- Two-Rooms -----------------------------------------------------------------------------------------------------------


def _two_rooms(recipe: Recipe) -> Callable[..., OfflineDataset]:
    def make(*, observation: str = "state", collision: str = "stop", seed: int = 0) -> OfflineDataset:
        """See :data:`clbench.data.recipes.RECIPES`.

        Args:
            observation: ``"state"`` (positions) or ``"pixels"`` (rendered from stored positions when a batch is drawn).
            collision: rule of :data:`clbench.envs.two_rooms.COLLISIONS`; ``"cancel"`` is the reference's generator.
            seed: another draw of the same distribution.
        """
        check = {"observation": observation, "collision": collision, "transitions": 1, "steps": 1}
        load_object(GENERATORS["two-rooms"])(**check)  # its messages for options that are wrong
        data = cached(
            recipe.name, _key(recipe, collision=collision, seed=seed), recipe.settings["transitions"],
            lambda: _make_two_rooms(recipe, collision, seed), CODE["two-rooms"],
        )  # fmt: skip
        return data if observation == "state" else _as_pixels(data)

    return make


def _make_two_rooms(recipe: Recipe, collision: str, seed: int) -> OfflineDataset:
    options = {"transitions": 0, "steps": STEPS, "source": "good", "good_share": 1.0, "door": True, **recipe.settings}
    steps, transitions = options["steps"], options["transitions"]
    count = -(-transitions // steps)

    def draw(
        source: str, kappa: float, trajectories: int, keep: Callable[[Tensor], Tensor] | None = None
    ) -> Trajectories:
        return _collect(_batches(source, steps, kappa, collision, seed), trajectories, keep)

    if options["good_share"] < 1:
        good = int(count * options["good_share"])
        parts = [draw("good", GOOD, good), draw("random", RANDOM, count - good)]
        order = torch.from_numpy(numpy_generator(seed, recipe.name, "order").permutation(count))
        states, actions = (torch.cat(columns)[order] for columns in zip(*parts, strict=True))
    else:
        states, actions = draw(options["source"], GOOD, count, None if options["door"] else _stays)
    metadata = {
        "generator": recipe.name, "wall_x": WALL_X, "door_y": DOOR_Y, "steps": steps, "transitions": transitions,
        "collision": collision, "observation": "state", "seed": seed, "good_share": options["good_share"],
    }  # fmt: skip
    return _flat(states, actions, transitions, recipe.name, metadata)


def _batches(source: str, steps: int, kappa: float, collision: str, seed: int) -> Iterator[Trajectories]:
    """Batches of trajectories without end; batch ``i`` depends on its number and the arguments alone."""
    generate = load_object(GENERATORS["two-rooms"])
    for i in itertools.count():
        data = generate(wall_x=WALL_X, door_y=DOOR_Y, transitions=BATCH * steps, steps=steps, kappa=kappa,
                        collision=collision, seed=derive_seed(seed, "two-rooms", source, i))  # fmt: skip
        states, final = data.observations["observation"], data.final_observations["observation"]
        yield torch.cat([states.reshape(BATCH, steps, 2), final[:, None]], 1), data.actions.reshape(BATCH, steps, 2)


def _collect(
    batches: Iterator[Trajectories], count: int, keep: Callable[[Tensor], Tensor] | None = None
) -> Trajectories:
    """The first ``count`` trajectories for which ``keep`` (states -> (E,) bool) holds."""
    parts: list[Trajectories] = []
    found = 0
    while found < count or not parts:
        states, actions = next(batches)
        if keep is not None:
            kept = keep(states)
            states, actions = states[kept], actions[kept]
        parts.append((states, actions))
        found += len(states)
    states, actions = (torch.cat(columns)[:count] for columns in zip(*parts, strict=True))
    return states, actions


def _stays(states: Tensor) -> Tensor:
    """(E, T + 1, 2) -> (E,): whether a trajectory stays on one side of the wall (or within it)."""
    x = states[..., 0]
    return ~((x.amin(1) < FACES[0]) & (x.amax(1) > FACES[1]))


def _flat(states: Tensor, actions: Tensor, transitions: int, name: str, metadata: dict[str, Any]) -> OfflineDataset:
    count, steps, _ = actions.shape
    lengths = torch.full((count,), steps)
    lengths[-1] = transitions - (count - 1) * steps
    final = states[:, -1].clone()
    final[-1] = states[-1, lengths[-1]]
    rows = states[:, :-1].reshape(-1, 2)[:transitions].clone()
    taken = actions.reshape(-1, 2)[:transitions].clone()
    return OfflineDataset(
        {"observation": rows, "achieved_goal": rows}, taken, lengths, {"observation": final, "achieved_goal": final},
        name=name, metadata=metadata,
    )  # fmt: skip


def _as_pixels(data: OfflineDataset) -> OfflineDataset:
    render = load_object(RENDERED)

    def draw(positions: dict[str, Tensor]) -> dict[str, Any]:
        column = render(positions["observation"], WALL_X, DOOR_Y)
        return {"observation": column, "achieved_goal": column}

    return OfflineDataset(
        draw(data.observations), data.actions, data.lengths, draw(data.final_observations), None, data.name,
        {**data.metadata, "observation": "pixels"}, check=False,
    )  # fmt: skip


def _kept_observation(observation: str) -> str:
    """Layouts are added to the states that are in the cache."""
    return "state" if observation == "layout" else observation


# -- PointMaze -----------------------------------------------------------------------------------------------------------


def _point_maze(recipe: Recipe) -> Callable[..., OfflineDataset]:
    def make(*, observation: str = "state", seed: int = 0) -> OfflineDataset:
        """See :data:`clbench.data.recipes.RECIPES`.

        Args:
            observation: ``"state"``, ``"layout"`` (and the walls as numbers), or ``"pixels"`` (rendered from stored
                positions when a batch is drawn).
            seed: another draw of the same distribution.
        """
        kept = _kept_observation(observation)
        settings = {**recipe.settings, "observation": kept, "seed": derive_seed(seed, recipe.name)}
        data = cached(
            recipe.name, _key(recipe, observation=kept, seed=seed), recipe.settings["transitions"],
            lambda: load_object(GENERATORS["point-maze"])(**settings), CODE["point-maze"],
        )  # fmt: skip
        return load_object(WITH_LAYOUT)(data) if observation == "layout" else data

    return make


# -- OGBench's point mazes -----------------------------------------------------------------------------------------------


def _ogbench_maze(recipe: Recipe) -> Callable[..., OfflineDataset]:
    def make(*, trajectories: int | None = None, step_size: float = 0.2, seed: int = 0) -> OfflineDataset:
        """See :data:`clbench.data.recipes.RECIPES`.

        Args:
            trajectories: the first so many, instead of all.
            step_size: displacement per axis of a full action.
            seed: another draw of the same distribution.
        """
        kept = ("maze", "kind", "trajectories", "steps")
        settings = {**{key: recipe.settings[key] for key in kept}, "step_size": step_size, "seed": seed}
        if trajectories is not None:
            settings["trajectories"] = trajectories
        return cached(
            recipe.name, _key(recipe, trajectories=trajectories, step_size=step_size, seed=seed),
            settings["trajectories"] * settings["steps"], lambda: load_object(GENERATORS["ogbench-maze"])(**settings),
            CODE["ogbench-maze"],
        )  # fmt: skip

    return make
