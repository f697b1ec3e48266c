"""A published data set is a stream of one task."""

from __future__ import annotations

from pathlib import Path

import pytest

import clbench
from clbench.config import options_of
from clbench.data.ogbench import write_ogbench
from clbench.data.recipes import RECIPES
from clbench.data.registry import load_dataset
from clbench.errors import ConfigError, DataError, UnknownNameError
from clbench.experiments import RunConfig, default_out
from clbench.streams.core import make_stream, resolve_stream
from clbench.streams.two_rooms import load_lists

TWO_ROOMS = [name for name, recipe in RECIPES.items() if recipe.family == "two-rooms"]


@pytest.mark.parametrize("name", TWO_ROOMS)
def test_every_set_has_a_task(name: str) -> None:
    stream = make_stream(name)
    (task,) = stream.tasks
    assert (stream.name, task.dataset_id, task.env_id) == (name, name, "clbench/TwoRooms-v0")
    layout = load_lists()["layouts"][0]
    assert (layout["wall_x"], layout["door_y"]) == (task.env_kwargs["wall_x"], task.env_kwargs["door_y"]) == (32, 10)
    assert task.evaluation.seeds == tuple(layout["seeds"]) and len(task.evaluation) == 100
    assert task.evaluation.options["goal"] == tuple(map(tuple, layout["goal"]))


def test_the_data_do_not_change_with_the_seed_of_the_run() -> None:
    a, b = make_stream("two-rooms/size-634-v0", seed=0), make_stream("two-rooms/size-634-v0", seed=1)
    assert a == b
    other = make_stream("two-rooms/size-634-v0", options={"seed": 1})  # negative control
    assert other.tasks[0].dataset_id == "two-rooms/size-634-v0?seed=1"


def test_options_reach_data_and_environment() -> None:
    (task,) = make_stream("two-rooms/size-634-v0", options={"observation": "pixels", "episodes": 7}).tasks
    assert task.dataset_id == "two-rooms/size-634-v0?observation=pixels"
    assert task.env_kwargs["observation"] == "pixels" and len(task.evaluation) == 7


def test_options_in_the_id_are_defaults() -> None:
    name = "two-rooms/size-634-v0?observation=pixels"
    assert make_stream(name).tasks == make_stream("two-rooms/size-634-v0", options={"observation": "pixels"}).tasks
    assert make_stream(name, options={"observation": "state"}).tasks == make_stream("two-rooms/size-634-v0").tasks
    assert options_of(resolve_stream(name))().observation == "pixels"  # what --help shows


def test_a_run(tmp_path: Path) -> None:
    result = clbench.run(
        "two-rooms/size-634-v0", "bc", budget=2, out=tmp_path / "run", stream_options={"episodes": 2}, tensorboard=False
    )
    assert result.results["stream"] == "two-rooms/size-634-v0" and result.results["status"] == "complete"
    out = default_out(RunConfig("two-rooms/size-634-v0?observation=pixels", "bc"))
    assert out == Path("runs/two-rooms_size-634-v0_observation=pixels/bc/seed-0")


def test_a_file_with_the_environment_it_is_for(tmp_path: Path) -> None:
    path = str(write_ogbench(load_dataset("two-rooms/size-634-v0"), tmp_path / "walks.npz"))
    with pytest.raises(ConfigError, match="do not say which environment they are for; add --stream.env"):
        make_stream(path)
    options = {"env": "clbench/TwoRooms-v0?wall_x=25.5&observation=state", "episodes": 3}
    (task,) = make_stream(path, options=options).tasks
    assert (task.env_id, task.env_kwargs) == ("clbench/TwoRooms-v0", {"wall_x": 25.5, "observation": "state"})
    assert task.dataset_id == path and len(task.evaluation) == 3
    result = clbench.run(path, "bc", budget=2, out=tmp_path / "run", stream_options=options, tensorboard=False)
    assert result.results["status"] == "complete"
    with pytest.raises(DataError, match=r"the data have actions of shape \(2,\).*environment have shape \(1,\)"):
        pendulum = {"env": "Pendulum-v1", "metric": "return", "low": -2000.0, "high": 0.0}
        clbench.run(path, "bc", budget=2, out=tmp_path / "other", stream_options=pendulum)


@pytest.mark.parametrize("name", [n for n, recipe in RECIPES.items() if recipe.family == "point-maze"])
def test_mazes_are_evaluated_on_held_out_layouts(name: str) -> None:
    from clbench.streams.maze_layouts import heldout_trials, training_layouts

    (task,) = make_stream(name, options={"observation": "pixels"}).tasks
    assert (task.env_id, task.env_kwargs) == ("clbench/PointMaze-v0", {"observation": "pixels"})
    assert task.dataset_id == f"{name}?observation=pixels" and task.evaluation == heldout_trials()
    assert not set(task.evaluation.options["layout"]) & set(training_layouts(40))
    with pytest.raises(ConfigError, match="episodes must be from 1 to 80"):
        make_stream(name, options={"episodes": 81})


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        (
            "two-rooms/size-643-v0",
            {},
            UnknownNameError,
            "Did you mean 'two-rooms/size-634-v0'.*data sets are streams too",
        ),
        ("two-rooms-door", {}, UnknownNameError, "Unknown stream 'two-rooms-door'. Did you mean 'two-rooms-doors'"),
        ("zzz", {}, UnknownNameError, "Published data sets are streams too"),
        ("two-rooms", {}, ConfigError, "'two-rooms' has no task of its own, so it is no stream"),
        ("classify?source=x", {}, ConfigError, "'classify' has no task of its own"),
        ("two-rooms/size-634-v0?episode=3", {}, UnknownNameError, "Did you mean 'episodes'"),
        ("two-rooms/size-634-v0?episodes=x", {}, ConfigError, "episodes must be of type int"),
        ("two-rooms/size-634-v0", {"episodes": 101}, ConfigError, "episodes must be from 1 to 100"),
        ("two-rooms/size-634-v0", {"observation": "video"}, UnknownNameError, "Unknown value of observation 'video'"),
    ],
)
def test_wrong_names(name: str, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_stream(name, options=options)


# -- OGBench's point mazes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, recipe in RECIPES.items() if recipe.family == "ogbench-maze"])
def test_ogbench_mazes_have_their_five_tasks(name: str) -> None:
    maze = RECIPES[name].settings["maze"]
    (task,) = make_stream(name).tasks
    assert (task.name, task.env_id, task.dataset_id) == (maze, "clbench/OGBenchPointMaze-v0", name)
    assert task.env_kwargs == {"maze": maze, "step_size": 0.2, "max_episode_steps": 1000}
    assert len(task.evaluation) == 250 and set(task.evaluation.options) == {"start", "goal"}
    assert make_stream(name, seed=3).tasks == (task,)


def test_the_small_protocol_of_ogbench() -> None:
    name = "ogbench-maze/medium-navigate-v0"
    options = {"trajectories": 100, "step_size": 0.5, "max_steps": 400, "episodes": 50}
    (task,) = make_stream(name, options=options).tasks
    assert task.dataset_id == f"{name}?step_size=0.5&trajectories=100"
    assert task.env_kwargs == {"maze": "medium", "step_size": 0.5, "max_episode_steps": 400}
    full = make_stream(name).tasks[0].evaluation
    assert task.evaluation.seeds == full.seeds[:50] and task.evaluation.options["goal"] == full.options["goal"][:50]
    assert (
        make_stream(f"{name}?seed=2", options=options)
        .tasks[0]
        .dataset_id.endswith("?seed=2&step_size=0.5&trajectories=100")
    )
    with pytest.raises(ConfigError, match="episodes must be at least 1"):
        make_stream(name, options={"episodes": 0})


def test_a_run_on_ogbench(tmp_path: Path) -> None:
    options = {"trajectories": 2, "step_size": 0.5, "max_steps": 3, "episodes": 5}
    result = clbench.run(
        "ogbench-maze/large-stitch-v0", "bc", budget=2, out=tmp_path / "run", stream_options=options, tensorboard=False
    )
    assert result.results["status"] == "complete" and result.results["tasks"] == ["large"]


# -- PointMaze: layouts as observations, other trials --------------------------------------------------------------------


def test_trials_of_point_maze_can_be_chosen() -> None:
    from clbench.streams.maze_layouts import bucket_trials

    name = "point-maze/5-layouts-v0"
    for distance in (0, 8):
        options = {"trials": f"distance-{distance}", "observation": "layout", "episodes": 12}
        (task,) = make_stream(name, options=options).tasks
        assert task.evaluation == bucket_trials(distance).head(12) and task.name == f"distance-{distance}-layouts"
        assert task.dataset_id == f"{name}?observation=layout" and task.env_kwargs == {"observation": "layout"}
    with pytest.raises(UnknownNameError, match="Did you mean 'distance-8'"):
        make_stream(name, options={"trials": "distance-9"})
    with pytest.raises(ConfigError, match="episodes must be from 1 to 20"):
        make_stream(name, options={"trials": "distance-1", "episodes": 21})
