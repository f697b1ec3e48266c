"""Two-Rooms data: the published statistics of the policy, dynamics behind the transitions, size, and bad arguments."""

import math

import numpy as np
import pytest
import torch

import clbench.envs.two_rooms_data as two_rooms_data
from clbench.data.dataset import GoalSampling, Rendered
from clbench.data.registry import dataset_id, load_dataset
from clbench.envs.two_rooms import COLLISIONS, make_layout, render_pixels
from clbench.envs.two_rooms_data import statistics, two_rooms
from clbench.errors import ConfigError


def check_good_data(found):
    """specs/pldm.md 2.1 and 8.2, for 90 steps, kappa 5 and 60 % forced trajectories under the reference's rule."""
    assert found["action_sd"] == pytest.approx(0.7496, abs=0.002)
    assert found["door_passing"] == pytest.approx(0.35, abs=0.01)
    assert found["blocked"] == pytest.approx(0.26, abs=0.01)
    assert found["pair_distance"] == pytest.approx(31.0, abs=1.0)
    assert found["in_walls"] == 0


def test_statistics_of_the_good_data():
    check_good_data(statistics(two_rooms(transitions=10_240 * 90, collision="cancel"), sample=2000))


@pytest.mark.parametrize(
    ("rate", "passing", "blocked", "distance"), [(0.0, 0.079, 0.32, 26.8), (1.0, 0.536, 0.23, 33.9)]
)
def test_statistics_of_plain_and_forced_trajectories(rate, passing, blocked, distance):
    found = statistics(two_rooms(transitions=5000 * 90, cross_wall_rate=rate, collision="cancel"), sample=2000)
    assert found["door_passing"] == pytest.approx(passing, abs=0.02)
    assert found["blocked"] == pytest.approx(blocked, abs=0.015)
    assert found["pair_distance"] == pytest.approx(distance, abs=1.0)


def test_statistics_of_the_random_policy():
    found = statistics(two_rooms(transitions=5000 * 90, kappa=1e-6, collision="cancel"), sample=2000)
    assert found["pair_distance"] == pytest.approx(12.4, abs=0.5)
    assert found["door_passing"] == pytest.approx(0.428, abs=0.03)
    plain = statistics(two_rooms(transitions=5000 * 90, kappa=1e-6, cross_wall_rate=0.0, collision="cancel"))
    assert plain["door_passing"] == pytest.approx(0.02, abs=0.01)


def test_statistics_catch_a_policy_with_a_fixed_heading(monkeypatch):
    # the misreading that the specification warns of: noise around one heading instead of a walk of the heading
    def fixed_heading(rng, heading, steps, kappa):
        angle = heading[:, None] + rng.vonmises(0.0, kappa, (len(heading), steps))
        length = rng.uniform(0.2, 1.8, angle.shape)
        return np.stack([length * np.cos(angle), length * np.sin(angle)], -1).astype(np.float32)

    monkeypatch.setattr(two_rooms_data, "_walk", fixed_heading)
    with pytest.raises(AssertionError):
        check_good_data(statistics(two_rooms(transitions=2000 * 90, collision="cancel")))


def test_our_rule_keeps_the_data_alike():
    found = statistics(two_rooms(transitions=5000 * 90), sample=2000)
    assert found["door_passing"] == pytest.approx(0.35, abs=0.02)
    assert found["in_walls"] == 0


@pytest.mark.parametrize("collision", ["stop", "cancel"])
@pytest.mark.parametrize(("wall_x", "door_y"), [(32.0, 10.0), (22.0, 46.0), (44.5, 54.5)])
def test_transitions_obey_the_environment(collision, wall_x, door_y):
    data = two_rooms(wall_x=wall_x, door_y=door_y, transitions=6000, collision=collision)
    index = torch.arange(len(data))
    before, after = data.observation(index)["observation"], data.next_observation(index)["observation"]
    moved = COLLISIONS[collision](before.t().double(), data.actions.t().double(), make_layout(wall_x, door_y))
    assert torch.equal(moved.t().float(), after)
    assert data.actions.norm(dim=1).min() > 0.2 - 1e-5
    assert data.actions.norm(dim=1).max() < 1.8 + 1e-5
    assert statistics(data)["in_walls"] == 0


def test_step_lengths_and_turns_have_the_stated_distributions():
    data = two_rooms(transitions=200_000, cross_wall_rate=0.0)
    length = data.actions.double().norm(dim=1)
    assert float(length.mean()) == pytest.approx(1.0, abs=0.005)
    assert float(length.var()) == pytest.approx(0.1238, abs=0.002)
    angle = torch.atan2(data.actions[:, 1], data.actions[:, 0]).double()
    same = data.episode[1:] == data.episode[:-1]
    turn = (angle[1:] - angle[:-1])[same]
    assert float(turn.cos().mean()) == pytest.approx(0.8934, abs=0.002)  # I1(5) / I0(5)
    assert float(turn.sin().mean()) == pytest.approx(0, abs=0.005)
    assert float(angle.cos().mean()) == pytest.approx(0, abs=0.02)


def test_forced_trajectories_aim_through_the_door():
    # without walls in the way every one of them meets the door
    rng = np.random.default_rng(0)
    starts, actions = two_rooms_data._through_door(rng, 500, 30, 5.0, (31.0, 33.0), 32.0, 10.0)
    inside = np.all((starts > 4.02) & (starts < 59.98), axis=1)
    path = np.concatenate([starts[:, None], starts[:, None] + np.cumsum(actions, 1)], 1)
    at_door = (path[..., 0] >= 31 - 1e-4) & (path[..., 0] <= 33 + 1e-4) & (np.abs(path[..., 1] - 10) <= 4 + 1e-4)
    assert inside.sum() > 200
    assert at_door.any(1)[inside].all()


def test_the_count_is_exact_and_the_last_trajectory_is_cut():
    data = two_rooms(transitions=1000, steps=90)
    assert len(data) == 1000
    assert data.lengths.tolist() == [90] * 11 + [10]
    whole = two_rooms(transitions=1080, steps=90)
    assert torch.equal(whole.actions[:1000], data.actions)
    # the state after the last action is the next state of the uncut trajectory
    assert torch.equal(data.final_observations["observation"][-1], whole.observations["observation"][1000])


def test_data_are_a_function_of_the_arguments():
    a, b, c = two_rooms(transitions=500), two_rooms(transitions=500), two_rooms(transitions=500, seed=1)
    assert torch.equal(a.actions, b.actions)
    assert torch.equal(a.observations["observation"], b.observations["observation"])
    assert not torch.equal(a.actions, c.actions)
    assert a.metadata["seed"] == 0
    assert a.metadata["collision"] == "stop"
    assert a.observations["observation"] is a.observations["achieved_goal"]


def test_pixels_are_drawn_from_the_same_states():
    states = two_rooms(transitions=300, wall_x=25.0, door_y=30.0)
    pixels = two_rooms(transitions=300, wall_x=25.0, door_y=30.0, observation="pixels")
    assert isinstance(pixels.observations["observation"], Rendered)
    assert pixels.observations["observation"] is pixels.observations["achieved_goal"]
    rng = torch.Generator().manual_seed(0)
    batch = pixels.sample(64, rng, GoalSampling())
    columns = {"wall_x": torch.full((64,), 25.0), "door_y": torch.full((64,), 30.0)}
    for shown, rows in (
        (batch.observations["observation"], batch.index),
        (batch.observations["desired_goal"], batch.goal_index),
    ):
        position = states.observation(rows)["observation"]
        assert torch.equal(shown, render_pixels({"position": position, **columns}))
    assert statistics(pixels) == statistics(states)


def test_by_name_and_in_under_100_megabytes_for_the_large_set():
    data = load_dataset(dataset_id("two-rooms", wall_x=25, door_y=40, transitions=900, steps=30, seed=3))
    assert data.metadata["wall_x"] == 25.0
    assert len(data.lengths) == 30
    stored = (
        data.observations["observation"].nbytes + data.actions.nbytes + data.final_observations["observation"].nbytes
    )
    stored += data.lengths.nbytes
    assert stored / len(data) * 3_686_400 < 100e6
    assert data.observations["observation"].is_contiguous()


@pytest.mark.slow
def test_the_large_set():
    data = two_rooms(transitions=3_686_400)
    assert len(data) == 3_686_400
    assert statistics(data)["action_sd"] == pytest.approx(0.7496, abs=0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wall_x": 50.0}, r"wall_x must be in \[20, 45\)"),
        ({"door_y": 9.0}, r"door_y must be in \[10, 55\)"),
        ({"transitions": 0}, "transitions must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"kappa": 0.0}, "kappa must be positive"),
        ({"kappa": math.inf}, "kappa must be positive"),
        ({"cross_wall_rate": 1.5}, r"cross_wall_rate must be in \[0, 1\]"),
        ({"collision": "slide"}, "Unknown value of collision 'slide'"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        two_rooms(**options)
