"""The stream two-rooms-chase: a trained task and tasks that are only tested, through the loop to results and report."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import clbench
from clbench import registry
from clbench.contracts import Agent, Stream
from clbench.data.registry import load_dataset
from clbench.envs.two_rooms import is_free, make_layout
from clbench.errors import ConfigError, DataError
from clbench.registry import register_stream
from clbench.report import write_report
from clbench.streams import Suite, make_stream
from clbench.streams import two_rooms_chase as stream_module
from clbench.streams.core import joint, one_phase_per_task
from clbench.streams.two_rooms_chase import SPEEDS, load_trials, two_rooms_chase
from clbench.testing.streams import check_stream

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"transitions": 900, "episodes": 8, "speeds": (0.8, 1.8)}


def make_script():
    spec = importlib.util.spec_from_file_location("make_two_rooms_lists", ROOT / "scripts" / "make_two_rooms_lists.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the frozen list --------------------------------------------------------------------------------------------------


def test_the_script_still_gives_the_shipped_list():
    assert make_script().chase_content() == load_trials()


def test_the_list_holds_pairs_in_different_rooms_about_35_pixels_apart():
    trials = load_trials()
    agent, chaser = (torch.tensor(trials[key], dtype=torch.float64) for key in ("start", "chaser"))
    assert len(set(trials["seeds"])) == len(agent) == len(chaser) == 100
    layout = make_layout(32.0, 10.0)
    assert is_free(agent.t(), layout).all()
    assert is_free(chaser.t(), layout).all()
    assert ((agent[:, 0] < 32) != (chaser[:, 0] < 32)).all()
    assert 30 < int((agent[:, 0] < 32).sum()) < 70
    assert abs(float((agent - chaser).norm(dim=1).mean()) - 35) < 1.5


# -- the stream -------------------------------------------------------------------------------------------------------


def test_conformance():
    check_stream("two-rooms-chase", load=None, transitions=900).raise_if_failed()
    check_stream("two-rooms-chase", load=2, transitions=900, observation="pixels").raise_if_failed()


def test_one_task_is_trained_and_the_chases_are_not():
    stream = make_stream("two-rooms-chase", options={"episodes": 9})
    assert Stream.from_dict(json.loads(json.dumps(stream.to_dict()))) == stream
    assert [t.name for t in stream.tasks] == ["reach", *(f"chase-{s:g}" for s in SPEEDS)]
    assert [(p.task, p.budget) for p in stream.phases] == [("reach", 10_000)]
    assert stream.trained == stream.tasks[:1]
    assert [t.dataset_id is None for t in stream.tasks] == [False] + 6 * [True]
    assert [t.env_kwargs["chaser_speed"] for t in stream.tasks[1:]] == list(SPEEDS)
    assert all(t.evaluation == stream.tasks[1].evaluation for t in stream.tasks[1:])  # speeds can be compared
    assert all(len(t.evaluation) == 9 for t in stream.tasks)


@pytest.mark.parametrize("schedule", ["sequential", "cyclic", "uniform", "power-law"])
def test_budget_and_schedules_are_of_the_trained_task(schedule):
    stream = make_stream("two-rooms-chase", budget=40, schedule=schedule)
    assert {p.task for p in stream.phases} == {"reach"}
    assert sum(p.budget for p in stream.phases) == 40
    assert sum(p.budget for p in make_stream("two-rooms-chase", schedule=schedule, unit="env_steps").phases) == 100_000
    for arranged in (one_phase_per_task(stream), joint(stream)):
        assert [p.tasks for p in arranged.phases] == [("reach",)]
        assert arranged.tasks == stream.tasks


def test_the_data_set_is_of_the_layout_and_of_the_seed():
    one, again, other = (make_stream("two-rooms-chase", seed=s, options={"transitions": 300}) for s in (0, 0, 1))
    assert one == again
    assert one.tasks[0].dataset_id != other.tasks[0].dataset_id
    data = load_dataset(one.tasks[0].dataset_id)
    assert len(data) == 300
    assert data.observations["goal_sign"].tolist() == 300 * [[1.0]]
    assert {k: data.metadata[k] for k in ("wall_x", "door_y")} == {"wall_x": 32.0, "door_y": 10.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 101}, "from 1 to 100"),
        ({"episodes": 0}, "from 1 to 100"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
        ({"speeds": ()}, "different numbers, at least one"),
        ({"speeds": (1.0, 1.0)}, "different numbers, at least one"),
        ({"speeds": (-1.0,)}, "chaser_speed must be a number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        clbench.run("two-rooms-chase", Still, stream_options={**SMALL, **options}, out="unused")


def test_a_broken_installation_is_named(monkeypatch):
    monkeypatch.setattr(stream_module, "LIST", "two_rooms_chase_v9.json")
    with pytest.raises(DataError, match=r"Cannot read the evaluation lists two_rooms_chase_v9.json"):
        load_trials()


# -- through the loop -------------------------------------------------------------------------------------------------


class Still(Agent):
    """Takes data, and does nothing."""

    requires = frozenset({"dataset", "goal", "continuous"})

    def learn(self, experience, budget, *, rng):
        self.keys = set(experience.dataset.observations)
        for _ in range(budget):
            yield {}

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return torch.zeros(len(first), 2), None

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Straight(Still):
    """Walks straight to where the goal is, or away from it, as ``goal_sign`` says."""

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        way = obs["desired_goal"] - obs["observation"]
        return obs["goal_sign"] * 1.8 * way / way.norm(dim=1, keepdim=True).clamp(min=1e-6), None


class IgnoresTheSign(Straight):
    """Goes to every goal, also to the chaser."""

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return super().act({**obs, "goal_sign": torch.ones(len(first), 1)}, memory, first, rng=rng)


def run(agent, tmp_path, **settings):
    return clbench.run(
        "two-rooms-chase", agent, budget=6, eval_every=0, tensorboard=False, stream_options=SMALL,
        out=tmp_path / agent.__name__, **settings,
    )  # fmt: skip


def mean_length(result, task):
    """Steps of the episodes after training."""
    rows = [line.split(",") for line in (result.path / "eval.csv").read_text().splitlines()]
    header, body = rows[0], rows[1:]
    lengths = [int(r[header.index("length")]) for r in body if r[header.index("task")] == task and r[0] == "1"]
    assert len(lengths) == 8
    return sum(lengths) / len(lengths)


def test_results_and_report_show_every_task_and_metrics_the_trained_one(tmp_path):
    result = run(Straight, tmp_path)
    assert result.results["status"] == "complete"
    assert result.results["tasks"] == ["reach", "chase-0.8", "chase-1.8"]
    matrix = torch.tensor(result.results["matrix"])  # None would be an error
    assert matrix.shape == (2, 3)
    assert torch.equal(matrix[0], matrix[1])
    assert result.metrics["average_performance"] == result.results["matrix"][1][0]
    assert result.agent.keys == {"observation", "achieved_goal", "goal_sign"}
    page = write_report([result.path], tmp_path / "page.html").read_text()
    for name in result.results["tasks"]:
        assert name in page
    assert "Not trained by every run, and left out of its metrics: chase-0.8, chase-1.8" in page


def test_agents_that_know_the_sign_last_longer(tmp_path):
    away, still, into = (run(agent, tmp_path) for agent in (Straight, Still, IgnoresTheSign))
    for task in ("chase-0.8", "chase-1.8"):
        assert mean_length(away, task) > mean_length(still, task) > mean_length(into, task)


def test_standing_still_hardly_ever_helps(tmp_path):
    """As published: 9.4 % at the lowest speed, 0 above 1."""
    options = {**SMALL, "episodes": 100, "speeds": SPEEDS}
    result = clbench.run(
        "two-rooms-chase", Still, budget=1, eval_every=0, tensorboard=False, stream_options=options, out=tmp_path
    )
    scores = result.results["matrix"][1][1:]
    assert scores[0] < 0.2
    assert scores[2:] == [0.0] * 4


def needs_data_that_are_missing(*, rng):
    """Broken: the task that is trained has no data set, and those that are not have one."""
    suite = two_rooms_chase(rng=rng, transitions=300, episodes=2)
    return Suite("broken", [suite.zero_shot[0]], 5, 5, zero_shot=suite.tasks)


def test_a_trained_task_without_data_is_still_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._LOCAL, "streams", {})
    register_stream("broken")(needs_data_that_are_missing)
    with pytest.raises(ConfigError, match=r"requires 'dataset'.*\['chase-0.8'\] have no data set"):
        clbench.run("broken", Still, out=tmp_path)
