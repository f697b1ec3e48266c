"""The digits streams: tables, data, evaluation lists, bad options."""

import json

import numpy as np
import pytest
import torch

from clbench import load_dataset, loop, make_env, make_stream, run
from clbench.contracts import Stream
from clbench.data.labelled import load_source
from clbench.errors import ConfigError, DataError, UnknownNameError
from clbench.loop import common_spaces

NAMES = ["digits-permuted", "digits-split", "digits-rotated", "digits-online-inputs", "digits-online-labels"]
SMALL = {"hidden": (16,), "batch_size": 8}
DRAWN = {"digits-permuted", "digits-online-inputs", "digits-online-labels"}


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
    assert (make_stream(name, seed=4) == stream) == (name not in DRAWN)
    assert len({t.evaluation.name for t in stream.tasks}) == len(stream.tasks)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_examples_are_test_examples_of_the_task(name):
    data = load_source("digits")
    for task in make_stream(name).tasks[:10]:
        index = task.evaluation.options["index"]
        assert set(index) <= set(data.test.tolist()) and len(set(index)) == len(index)
        obs, labels = evaluation_set(task)
        if name != "digits-online-labels":
            assert labels.tolist() == data.y[list(index)].tolist()
        train = load_dataset(task.dataset_id)
        assert train.observations.shape[1:] == obs.shape[1:] and set(labels.tolist()) <= set(train.actions.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_a_nearest_neighbour_of_the_data_solves_the_task(name):
    """Data and evaluation go through the same transform: 1-NN on the training set is nearly right on every task."""
    tasks = make_stream(name).tasks[:3]
    for task in tasks:
        obs, labels = evaluation_set(task)
        train = load_dataset(task.dataset_id)
        guess = train.actions[torch.cdist(obs, train.observations).argmin(1)]
        assert float((guess == labels).float().mean()) > 0.9


@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits-split"])
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


def test_split_scenarios_differ_in_labels_outputs_and_what_is_told():
    streams = {s: make_stream("digits-split", options={"scenario": s}) for s in ("class", "domain", "task")}
    assert streams["class"] == make_stream("digits-split")  # stored streams stay equal
    assert [s.reveals for s in streams.values()] == ["boundaries", "boundaries", "task_id"]
    assert streams["domain"].tasks == streams["task"].tasks
    for old, new in zip(streams["class"].tasks, streams["domain"].tasks, strict=True):
        assert old.name == new.name and old.evaluation == new.evaluation
        (obs, labels), (same, within) = evaluation_set(old), evaluation_set(new)
        classes = torch.tensor(old.env_kwargs["classes"])
        assert torch.equal(obs, same) and torch.equal(classes[within], labels)
        assert set(load_dataset(new.dataset_id).actions.tolist()) == {0, 1}


@pytest.mark.parametrize(("scenario", "outputs"), [("class", 10), ("domain", 2), ("task", 2)])
def test_split_tasks_share_their_spaces(scenario, outputs):
    spaces = common_spaces(make_stream("digits-split", options={"scenario": scenario}), torch.device("cpu"))
    assert spaces.action.n == outputs


def test_split_of_old_runs_is_unchanged():
    """Frozen: what digits-split was before it had scenarios."""
    task = make_stream("digits-split").tasks[1]
    assert task.dataset_id == "classify?classes=2,3&source=digits"
    assert task.env_kwargs == {"source": "digits", "classes": [2, 3]}
    assert (task.name, task.evaluation.name, len(task.evaluation)) == ("classes-2-3", "digits-classes-2-3-72-v1", 72)


@pytest.mark.parametrize(
    ("name", "transform"), [("digits-online-inputs", "permutation"), ("digits-online-labels", "label_permutation")]
)
def test_online_streams_have_many_short_tasks(name, transform):
    stream = make_stream(name)
    assert len({t.env_kwargs[transform] for t in stream.tasks}) == 200 and stream.reveals == "boundaries"
    assert [p.budget for p in stream.phases] == [250] * 200 and all(len(t.evaluation) == 20 for t in stream.tasks)
    assert all(set(t.env_kwargs) == {"source", transform} for t in stream.tasks)  # exchangeable
    assert len(make_stream(name, options={"tasks": 3}).tasks) == 3


def test_online_labels_keep_the_pictures_and_online_inputs_the_labels():
    for name, kept in (("digits-online-inputs", "actions"), ("digits-online-labels", "observations")):
        a, b = (load_dataset(t.dataset_id) for t in make_stream(name).tasks[:2])
        same = {part: torch.equal(getattr(a, part), getattr(b, part)) for part in ("actions", "observations")}
        assert same == {"actions": kept == "actions", "observations": kept == "observations"}


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
        ("digits-online-inputs", {"tasks": 0}, "tasks must be at least 1, got 0"),
        ("digits-online-labels", {"episodes": 0}, "episodes must be at least 1, got 0"),
        ("digits-split", {"scenario": "domains"}, "Did you mean 'domain'"),
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


# -- runs -----------------------------------------------------------------------------------------------------------------


def test_data_sets_beyond_the_memory_limit_are_made_again(tmp_path, monkeypatch):
    """Hundreds of tasks on a large source do not fit at once; that they are dropped changes nothing."""
    loads = []

    def counted(name, *arguments):
        loads.append(name)
        return load_dataset(name, *arguments)

    monkeypatch.setattr(loop, "load_dataset", counted)
    results = []
    for folder, limit in (("all", loop.KEPT_BYTES), ("one", 1)):
        monkeypatch.setattr(loop, "KEPT_BYTES", limit)
        loads.clear()
        results.append(
            run(
                "digits-online-inputs", "bc", budget=6, schedule="cyclic", eval_every=0, out=tmp_path / folder,
                stream_options={"tasks": 3}, agent_options=SMALL, tensorboard=False,
            ).results["matrix"]
        )  # fmt: skip
        assert len(loads) == (3 if folder == "all" else 6)
    assert results[0] == results[1]


@pytest.mark.parametrize("schedule", ["cyclic", "power-law"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits-split", {"scenario": "domain"}),
        ("digits-online-inputs", {"tasks": 3}),
        ("digits-online-labels", {"tasks": 3}),
        ("bit-flipping", {"tasks": 3, "transitions": 20}),
        ("two-rooms-dynamics", {"transitions": 90}),
        ("point-maze-dynamics", {"transitions": 100}),
    ],
)
def test_recurring_schedules_train_through_the_new_streams(tmp_path, name, options, schedule):
    result = run(
        name, "bc", budget=8, schedule=schedule, evaluate=False, out=tmp_path / "run", stream_options=options,
        agent_options=SMALL, tensorboard=False,
    )  # fmt: skip
    stream = result.stream
    assert result.results["status"] == "complete" and sum(p.budget for p in stream.phases) == 8 * len(stream.tasks)
    visits = {t.name: [p.visit for p in stream.phases if p.task == t.name] for t in stream.tasks}
    assert all(v == list(range(1, len(v) + 1)) for v in visits.values()) and max(map(len, visits.values())) > 1
    assert all(len(v) == 2 for v in visits.values()) == (schedule == "cyclic")
