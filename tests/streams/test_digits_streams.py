"""The digits streams: tables, data, evaluation lists, bad options."""

import json

import numpy as np
import pytest
import torch

from clbench import load_dataset, make_env, make_stream
from clbench.contracts import Stream
from clbench.data.labelled import load_source
from clbench.errors import ConfigError, DataError, UnknownNameError

NAMES = ["digits-permuted", "digits-split", "digits-rotated"]


def evaluation_set(task):
    """The observations of a task's evaluation episodes, and the labels that it calls right (found by trying)."""
    env = make_env(task.env_id, len(task.evaluation), autoreset="disabled", **task.env_kwargs)
    obs, _ = env.reset(seed=task.evaluation.seeds, options=dict(task.evaluation.options))
    labels = torch.full((env.num_envs,), -1)
    for c in range(10):
        labels[env.step(torch.full((env.num_envs,), c))[4]["is_success"]] = c
    return obs, labels


@pytest.mark.parametrize("name", NAMES)
def test_streams_are_plain_values_and_functions_of_the_seed(name):
    stream = make_stream(name, seed=3)
    assert Stream.from_dict(json.loads(json.dumps(stream.to_dict()))) == stream
    assert make_stream(name, seed=3) == stream
    assert (make_stream(name, seed=4) == stream) == (name != "digits-permuted")
    assert len({t.evaluation.name for t in stream.tasks}) == len(stream.tasks)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_examples_are_test_examples_of_the_task(name):
    data = load_source("digits")
    for task in make_stream(name).tasks:
        index = task.evaluation.options["index"]
        assert set(index) <= set(data.test.tolist()) and len(set(index)) == len(index)
        obs, labels = evaluation_set(task)
        assert labels.tolist() == data.y[list(index)].tolist()
        train = load_dataset(task.dataset_id)
        assert train.observations.shape[1:] == obs.shape[1:] and set(train.actions.tolist()) == set(labels.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_a_nearest_neighbour_of_the_data_solves_the_task(name):
    """Data and evaluation go through the same transform: 1-NN on the training set is nearly right on every task."""
    tasks = make_stream(name).tasks[:3]
    for task in tasks:
        obs, labels = evaluation_set(task)
        train = load_dataset(task.dataset_id)
        guess = train.actions[torch.cdist(obs, train.observations).argmin(1)]
        assert float((guess == labels).float().mean()) > 0.95


@pytest.mark.parametrize("name", ["digits-permuted", "digits-rotated"])
def test_another_tasks_data_does_not_solve_the_task(name):
    """The negative control of the test above."""
    first, other = make_stream(name).tasks[0], make_stream(name).tasks[-1]
    obs, labels = evaluation_set(first)
    train = load_dataset(other.dataset_id)
    guess = train.actions[torch.cdist(obs, train.observations).argmin(1)]
    assert float((guess == labels).float().mean()) < 0.7


def test_permuted_defaults():
    stream = make_stream("digits-permuted")
    assert [t.name for t in stream.tasks] == [f"permutation-{i}" for i in range(10)]
    assert [p.budget for p in stream.phases] == [450] * 10 and all(len(t.evaluation) == 360 for t in stream.tasks)
    assert len({t.env_kwargs["permutation"] for t in stream.tasks}) == 10


def test_split_covers_all_classes_once():
    stream = make_stream("digits-split")
    assert [t.name for t in stream.tasks] == [f"classes-{a}-{a + 1}" for a in range(0, 10, 2)]
    rows = [row for t in stream.tasks for row in t.evaluation.options["index"]]
    assert sorted(rows) == load_source("digits").test.tolist() and stream.phases[0].budget == 360
    five = make_stream("digits-split", options={"classes_per_task": 5})
    assert [t.name for t in five.tasks] == ["classes-0-1-2-3-4", "classes-5-6-7-8-9"]


def test_rotated_names():
    stream = make_stream("digits-rotated", options={"angles": (0, 30, 22.5)})
    assert [t.name for t in stream.tasks] == ["rotation-0", "rotation-30", "rotation-22.5"]


def test_own_source_and_fewer_episodes(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", x=rng.random((50, 6, 6)), y=np.arange(50) % 4)
    options = {"source": str(tmp_path / "mine.npz"), "tasks": 2, "episodes": 7}
    stream = make_stream("digits-permuted", options=options)
    assert len(stream.tasks) == 2 and all(len(t.evaluation) == 7 for t in stream.tasks)
    assert load_dataset(stream.tasks[1].dataset_id).observations.shape == (40, 36)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits-permuted", {"tasks": 0}, "tasks must be at least 1, got 0"),
        ("digits-permuted", {"episodes": 0}, "episodes must be at least 1, got 0"),
        ("digits-split", {"classes_per_task": 3}, "must divide the 10 classes of 'digits', got 3"),
        ("digits-split", {"classes_per_task": -2}, "classes_per_task must be at least 1"),
        ("digits-rotated", {"angles": ()}, "angles must be different numbers"),
        ("digits-rotated", {"angles": (30, 30.0)}, "angles must be different numbers"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_stream(name, options=options)


def test_unknown_options_and_sources():
    with pytest.raises(UnknownNameError, match="Did you mean 'tasks'"):
        make_stream("digits-permuted", options={"task": 3})
    with pytest.raises(DataError, match="no labelled source 'mnist'"):
        make_stream("digits-split", options={"source": "mnist"})
