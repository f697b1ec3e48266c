"""PointMaze data: the stated distributions, the dynamics of the environment behind the transitions, and bad arguments."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

import clbench.envs.point_maze_data as point_maze_data
from clbench.data.dataset import GoalSampling, Rendered
from clbench.data.registry import dataset_id, load_dataset
from clbench.data.storage import load_stored_dataset, save_dataset
from clbench.envs.point_maze import PointMazeVectorEnv, render_pixels, ring_code, wall_distance
from clbench.envs.point_maze_data import point_maze, statistics
from clbench.errors import ConfigError
from clbench.streams.maze_layouts import PUBLISHED, layout_code, training_layouts


@pytest.fixture(scope="module")
def data():
    return point_maze(transitions=100_000)


def first_states(data):
    return data.observations["observation"][data.starts].double()


def check_distributions(data):
    """specs 2.3: magnitudes of actions uniform in [0, 1], of first velocities in [0, 5], directions uniform."""
    velocity = first_states(data)[:, 2:]
    for vectors, largest in ((data.actions.double(), 1), (velocity, 5)):
        length, angle = vectors.norm(dim=1), torch.atan2(vectors[:, 1], vectors[:, 0])
        assert kstest((length / largest).numpy(), "uniform").pvalue > 1e-3
        assert kstest((angle / (2 * np.pi) + 0.5).numpy(), "uniform").pvalue > 1e-3
    assert float(data.actions.std(0).mean()) == pytest.approx(0.408, abs=0.002)
    after = data.actions[1:] * data.actions[:-1]  # drawn anew at every step
    assert after.sum(1).mean().abs() < 0.01


def test_actions_and_first_velocities_are_distributed_as_stated(data):
    check_distributions(data)


@pytest.mark.parametrize("wrong", ["area", "held"])
def test_the_distribution_check_catches_other_policies(wrong, monkeypatch):
    def area(rng, radius, shape):
        """Uniform over the disc instead of over magnitudes."""
        length, angle = radius * np.sqrt(rng.uniform(0, 1, shape)), rng.uniform(0, 2 * np.pi, shape)
        return np.stack([length * np.cos(angle), length * np.sin(angle)])

    right = point_maze_data._actions

    def held(rng, count, steps):
        """Each action held for two steps."""
        return right(rng, count, steps)[:, torch.arange(steps) // 2]

    patched = {"area": ("_disc", area), "held": ("_actions", held)}[wrong]
    monkeypatch.setattr(point_maze_data, *patched)
    with pytest.raises(AssertionError):
        check_distributions(point_maze(transitions=50_000))


def test_starts_are_near_the_centres_of_all_free_cells(data):
    start = first_states(data)[:, :2]
    inside = (start % 1 - 0.5) / 0.1
    assert inside.abs().max() <= 1 + 1e-6
    assert kstest((inside.flatten() / 2 + 0.5).numpy(), "uniform").pvalue > 1e-3
    for number, text in enumerate(PUBLISHED):
        mine = start[number::5].floor().long()
        cells, counts = (4 * mine[:, 1] + mine[:, 0]).unique(return_counts=True)
        letters = text.replace("/", "")
        assert [letters[i] for i in cells] == ["O"] * letters.count("O")
        expected = len(mine) / len(cells)
        assert (counts - expected).abs().max() < 5 * expected**0.5


def test_transitions_obey_the_environment(data):
    layouts = [PUBLISHED[int(e) % 5] for e in data.episode[:3000]]
    index = torch.arange(3000)
    before, after = data.observation(index)["observation"], data.next_observation(index)["observation"]
    env = PointMazeVectorEnv(3000, autoreset="disabled", layout=layouts, max_episode_steps=None)
    env.reset(options={"start": before[:, :2], "velocity": before[:, 2:]})
    assert torch.equal(env.step(data.actions[:3000])[0]["observation"], after)


def test_layouts_take_turns_and_nothing_is_in_a_wall(data):
    assert data.metadata["layouts"] == list(PUBLISHED)
    solid = ring_code(torch.tensor([layout_code(t) for t in PUBLISHED]))[data.episode % 5]
    place = data.observations["achieved_goal"].double().t()
    assert wall_distance(place, solid).min() > 0.02
    assert wall_distance(place, solid.roll(100)).min() == 0  # on other layouts they would be


def test_statistics(data):
    found = statistics(data)
    assert found["action_sd"] == pytest.approx(0.408, abs=0.002)
    assert found["coverage"] == 1
    assert found["nearest"] > 0.02
    assert 0.02 < found["touching"] < 0.5
    assert 1 < found["cells"] < 12
    assert found["velocity_sd"] == pytest.approx(float(data.observations["observation"][:, 2:].std(0).mean()))


def test_other_layouts():
    for layouts, expected in ((10, training_layouts(10)), ("M3", PUBLISHED[3:4]), (PUBLISHED[1], PUBLISHED[1:2])):
        data = point_maze(layouts=layouts, transitions=2000)
        assert data.metadata["layouts"] == list(expected)
        assert statistics(data)["nearest"] > 0.02


def test_the_count_is_exact_and_the_last_episode_is_cut():
    data = point_maze(transitions=950)
    assert len(data) == 950
    assert data.lengths.tolist() == [100] * 9 + [50]
    whole = point_maze(transitions=1000)
    assert torch.equal(whole.actions[:950], data.actions)
    # the state after the last action is the next state of the uncut episode
    assert torch.equal(data.final_observations["observation"][-1], whole.observations["observation"][950])


def test_data_are_a_function_of_the_arguments():
    a, b, c = point_maze(transitions=500), point_maze(transitions=500), point_maze(transitions=500, seed=1)
    assert torch.equal(a.actions, b.actions)
    assert torch.equal(a.observations["observation"], b.observations["observation"])
    assert not torch.equal(a.actions, c.actions)
    assert {k: a.metadata[k] for k in ("seed", "steps")} == {"seed": 0, "steps": 100}


def test_pixels_are_drawn_from_the_same_states(tmp_path):
    states, pixels = (point_maze(transitions=700, observation=o) for o in ("state", "pixels"))
    picture = pixels.observations["observation"]
    assert isinstance(picture, Rendered)
    assert picture is pixels.observations["achieved_goal"]
    assert torch.equal(pixels.observations["velocity"], states.observations["observation"][:, 2:])
    codes = torch.tensor([layout_code(t) for t in PUBLISHED])[pixels.episode % 5]
    batch = pixels.sample(64, torch.Generator().manual_seed(0), GoalSampling())
    for shown, rows in (
        (batch.observations["observation"], batch.index),
        (batch.observations["desired_goal"], batch.goal_index),
    ):
        place = states.observations["achieved_goal"][rows]
        assert torch.equal(shown, render_pixels({"position": place, "layout": codes[rows]}))
    assert statistics(pixels) == statistics(states)
    save_dataset(pixels, tmp_path / "maze.npz")
    again = load_stored_dataset(tmp_path / "maze.npz")
    assert torch.equal(again.observations["observation"][:20], picture[:20])
    assert again.observations["observation"] is not again.observations["velocity"]


def test_by_name_and_in_less_than_50_megabytes_for_the_large_set():
    name = dataset_id("point-maze", layouts=PUBLISHED[2], transitions=900, steps=30, observation="pixels", seed=3)
    data = load_dataset(name)
    assert data.metadata["layouts"] == [PUBLISHED[2]]
    assert len(data.lengths) == 30
    assert len(load_dataset("point-maze?layouts=2&transitions=300").metadata["layouts"]) == 2
    columns = [*data.observations["observation"].columns.values(), data.observations["velocity"], data.actions]
    assert sum(c.nbytes for c in columns) / len(data) * 1_000_000 < 50e6
    assert all(c.is_contiguous() for c in columns)


@pytest.mark.slow
def test_the_large_set():
    data = point_maze()
    assert len(data) == 1_000_000
    assert statistics(data)["action_sd"] == pytest.approx(0.4082, abs=0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": 0}, "from 1 to 40"),
        ({"layouts": 41}, "from 1 to 40"),
        ({"layouts": "OOOO"}, "4 rows of 4 letters"),
        ({"transitions": 0}, "transitions must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        point_maze(**options)
