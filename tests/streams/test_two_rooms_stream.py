"""The stream two-rooms-doors: frozen lists, plain tasks, and data drawn from the stream's generator."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from clbench.contracts import Stream
from clbench.data.registry import load_dataset, parse_dataset_id
from clbench.envs.two_rooms import TwoRoomsVectorEnv, is_free, make_layout
from clbench.errors import ConfigError, DataError
from clbench.streams import make_stream
from clbench.streams import two_rooms as stream_module
from clbench.streams.two_rooms import load_lists

ROOT = Path(__file__).resolve().parents[2]


def make_script():
    spec = importlib.util.spec_from_file_location("make_two_rooms_lists", ROOT / "scripts" / "make_two_rooms_lists.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_still_gives_the_shipped_list():
    assert make_script().content() == load_lists()


def test_lists_hold_episodes_across_the_wall_and_far_from_it():
    lists = load_lists()
    layouts = [(entry["wall_x"], entry["door_y"]) for entry in lists["layouts"]]
    assert layouts[0] == (32.0, 10.0)
    assert len(set(layouts)) == 5
    seeds = [s for entry in lists["layouts"] for s in entry["seeds"]]
    assert len(set(seeds)) == len(seeds) == 500
    for entry in lists["layouts"]:
        start, goal = (torch.tensor(entry[key], dtype=torch.float64).t() for key in ("start", "goal"))
        layout = make_layout(entry["wall_x"], entry["door_y"])
        assert is_free(start, layout).all()
        assert is_free(goal, layout).all()
        assert ((start[0] < entry["wall_x"]) != (goal[0] < entry["wall_x"])).all()
        assert (start[0] - entry["wall_x"]).abs().min() >= 3.59
        assert 20 < int((start[0] < entry["wall_x"]).sum()) < 80


def test_tasks_are_plain_values_and_run():
    stream = make_stream("two-rooms-doors", seed=3, options={"episodes": 7, "observation": "pixels"})
    assert Stream.from_dict(json.loads(json.dumps(stream.to_dict()))) == stream
    assert len(stream.tasks) == 5
    for task in stream.tasks:
        assert len(task.evaluation) == 7
        assert task.metric.kind == "success"
        env = TwoRoomsVectorEnv(7, autoreset="disabled", **task.env_kwargs)
        obs, info = env.reset(seed=task.evaluation.seeds, options=task.evaluation.options)
        assert obs["observation"].shape == (7, 2, 65, 65)
        assert not info["is_success"].any()
        torch.testing.assert_close(env.state_dict()["position"].t(), torch.tensor(task.evaluation.options["start"]))
        name, options = parse_dataset_id(task.dataset_id)
        assert name == "two-rooms"
        assert {k: float(options[k]) for k in ("wall_x", "door_y")} == {
            k: task.env_kwargs[k] for k in ("wall_x", "door_y")
        }


def test_data_set_seeds_come_from_the_stream_and_the_episodes_do_not():
    first, again, other = (make_stream("two-rooms-doors", seed=s) for s in (0, 0, 1))
    assert first == again
    ids = [t.dataset_id for t in first.tasks]
    assert len(set(ids)) == 5
    assert set(ids).isdisjoint(t.dataset_id for t in other.tasks)
    assert [t.evaluation for t in first.tasks] == [t.evaluation for t in other.tasks]


def test_the_data_set_of_a_task_shows_its_layout():
    task = make_stream("two-rooms-doors", options={"transitions": 900}).tasks[1]
    data = load_dataset(task.dataset_id)
    assert len(data) == 900
    assert {k: data.metadata[k] for k in ("wall_x", "door_y")} == {k: task.env_kwargs[k] for k in ("wall_x", "door_y")}


def test_episodes_are_the_head_of_the_list():
    few, many = (make_stream("two-rooms-doors", options={"episodes": n}).tasks[0].evaluation for n in (5, 100))
    assert few.options["start"] == many.options["start"][:5]
    assert few.seeds == many.seeds[:5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 101}, "from 1 to 100"),
        ({"episodes": 0}, "from 1 to 100"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        make_stream("two-rooms-doors", options=options)


def test_a_broken_installation_is_named(monkeypatch):
    monkeypatch.setattr(stream_module, "LIST", "two_rooms_v9.json")
    with pytest.raises(DataError, match="Cannot read the evaluation lists two_rooms_v9.json"):
        load_lists()
