"""Changed dynamics: one step in closed form, data and environments that agree, controllers that still arrive."""

import math

import pytest
import torch

from clbench import load_dataset, make_env, make_stream
from clbench.contracts import Stream
from clbench.envs.point_maze import DAMPING, GEAR, MASS, PointMazeVectorEnv, move, simulation_step
from clbench.envs.point_maze_data import point_maze
from clbench.envs.two_rooms import TwoRoomsVectorEnv, displacement, make_layout
from clbench.envs.two_rooms_data import _plans, _roll, two_rooms
from clbench.errors import ConfigError
from clbench.loop import common_spaces
from clbench.rng import numpy_generator

NAMES = {"two-rooms-dynamics": 50, "point-maze-dynamics": 20}
FREE = torch.zeros(3, dtype=torch.int64)  # no walls


def test_one_step_of_two_rooms_in_closed_form():
    options = {"start": [[15.0, 40.0]], "goal": [[50.0, 40.0]]}
    for kwargs, moved in (
        ({}, (1.2, -0.9)),
        ({"action_gain": 0.5}, (0.6, -0.45)),
        ({"action_gain": -1.0}, (-1.2, 0.9)),
        ({"friction": 0.5}, (0.8, -0.6)),  # length 1.5 becomes 1.0
        ({"friction": 1.6}, (0.0, 0.0)),
        ({"action_gain": 2.0, "friction": 1.0}, (1.6, -1.2)),  # 3.0 becomes 2.0
    ):
        env = TwoRoomsVectorEnv(1, **kwargs)
        env.reset(seed=0, options=options)
        obs = env.step(torch.tensor([[1.2, -0.9]]))[0]["observation"]
        torch.testing.assert_close(obs[0], torch.tensor([15.0 + moved[0], 40.0 + moved[1]]), rtol=0, atol=1e-5)


def test_walls_hold_under_all_dynamics():
    env = TwoRoomsVectorEnv(1, action_gain=3.0)
    env.reset(seed=0, options={"start": [[30.0, 40.0]], "goal": [[50.0, 40.0]]})
    assert env.step(torch.tensor([[1.8, 0.0]]))[0]["observation"].tolist() == [[31.0, 40.0]]


def test_nominal_displacement_is_the_action_itself():
    action = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert displacement(action, 1.0, 0.0) is action
    assert torch.equal(displacement(-action, 1.3, 0.4), -displacement(action, 1.3, 0.4))
    assert torch.equal(displacement(torch.zeros(2, 3), 1.0, 0.5), torch.zeros(2, 3))


@pytest.mark.parametrize(("gain", "damping"), [(1.0, DAMPING), (0.5, 1.0), (-1.0, 1.0), (1.0, 20.0), (1.5, 0.0)])
def test_one_simulation_step_of_the_ball_in_closed_form(gain, damping):
    """Away from walls: v' = v + h (F - d v) / (m + h d), p' = p + h v'."""
    p, v = torch.tensor([[1.5, 1.6, 1.7]] * 2, dtype=torch.float64), torch.tensor([[0.5, -1.0, 0.0]] * 2).double()
    action = torch.tensor([[1.0, -0.2, 0.3], [0.0, 0.5, -1.0]])
    new_p, new_v = move(p.float(), v.float(), action, FREE, 1, gain, damping)
    p, force = p.float().double(), gain * GEAR * action.double()
    expected = v + 0.01 * (force - damping * v) / (MASS + 0.01 * damping)
    torch.testing.assert_close(new_v, expected.float())
    torch.testing.assert_close(new_p, (p + 0.01 * expected).float())


def test_defaults_of_the_ball_are_those_of_the_reference():
    p, v = torch.full((2, 3), 1.5, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    force = torch.full((2, 3), 30.0, dtype=torch.float64)
    plain, named = simulation_step(p, v, force, FREE), simulation_step(p, v, force, FREE, 1.0)
    other = simulation_step(p, v, force, FREE, 2.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, named, strict=True)) and not torch.equal(plain[1], other[1])


# -- data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamics", [{"action_gain": -1.0}, {"action_gain": 0.5}, {"friction": 0.5}])
def test_two_rooms_data_are_made_under_the_dynamics(dynamics):
    """The environment, set to a state of the data, goes where the data go; another one does not."""
    data = two_rooms(transitions=900, seed=1, **dynamics)
    position = data.observations["observation"]
    inner = torch.arange(900)[torch.arange(900) % 90 != 89]

    def arrives(**kwargs):
        env = TwoRoomsVectorEnv(len(inner), autoreset="disabled", **kwargs)
        env.reset(seed=0, options={"start": position[inner], "goal": torch.full((len(inner), 2), 50.0)})
        return env.step(data.actions[inner])[0]["observation"]

    assert torch.equal(arrives(**dynamics), position[inner + 1]) and not torch.equal(arrives(), position[inner + 1])
    assert dynamics.items() <= data.metadata.items()


def passing(planned, real):
    """Share of trajectories with states on both sides of the wall, laid by ``planned`` dynamics and run under ``real``."""
    rng = numpy_generator(1, "two-rooms", "data")
    layout = make_layout(32.0, 10.0)
    start, actions = _plans(rng, 500, 90, 5.0, 0.6, 32.0, 10.0, layout, planned)
    x = _roll(start, actions, layout, "stop", rng, real)[..., 0]
    return float(((x.amin(1) < 31) & (x.amax(1) > 33)).float().mean())


@pytest.mark.parametrize("dynamics", [(1.0, 0.0), (-1.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_walks_are_laid_through_the_door_by_what_actions_do(dynamics):
    """Not by what they say: laid for another gain they pass the door less often."""
    assert passing(dynamics, dynamics) > 0.28 > passing((-dynamics[0], 0.0), dynamics)


def test_default_data_are_those_without_dynamics():
    for make, settings in ((two_rooms, {"friction": 0.0}), (point_maze, {"damping": DAMPING})):
        a, b = make(transitions=500), make(transitions=500, action_gain=1.0, **settings)
        assert torch.equal(a.observations["observation"], b.observations["observation"]) and a.metadata == b.metadata


@pytest.mark.parametrize("dynamics", [{"action_gain": -1.0}, {"damping": 20.0}])
def test_maze_data_are_made_under_the_dynamics(dynamics):
    data = point_maze(layouts="M1", transitions=400, seed=1, **dynamics)
    state = data.observations["observation"]
    inner = torch.arange(400)[torch.arange(400) % 100 != 99]
    inner = inner[((state[inner, :2] - state[inner, :2].round()).abs() > 0.05).all(1)]  # a start may not touch a wall

    def arrives(**kwargs):
        env = PointMazeVectorEnv(len(inner), autoreset="disabled", layout="M1", **kwargs)
        goal = state[inner[:1], :2].expand(len(inner), -1)
        env.reset(seed=0, options={"start": state[inner, :2], "velocity": state[inner, 2:], "goal": goal})
        return env.step(data.actions[inner])[0]["observation"]

    assert torch.equal(arrives(**dynamics), state[inner + 1]) and not torch.equal(arrives(), state[inner + 1])


# -- streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tasks_share_spaces_and_episodes_and_differ_in_dynamics(name):
    stream = make_stream(name, seed=3)
    assert Stream.from_dict(stream.to_dict()) == stream == make_stream(name, seed=3) and len(stream.tasks) == 5
    common_spaces(stream, torch.device("cpu"))
    assert all(t.evaluation == stream.tasks[0].evaluation for t in stream.tasks)
    assert len({str(t.env_kwargs) for t in stream.tasks}) == 5 and len({t.dataset_id for t in stream.tasks}) == 5
    assert len(stream.tasks[0].evaluation) == NAMES[name]


@pytest.mark.parametrize("name", NAMES)
def test_somebody_who_knows_the_dynamics_solves_every_task(name):
    for task in make_stream(name).tasks:
        assert reached(task, task.env_kwargs) > 0.95, task.name


@pytest.mark.parametrize("name", NAMES)
def test_nominal_actions_fail_where_actions_are_reversed(name):
    """The negative control: tasks differ in what has to be done."""
    nominal, *_, last = make_stream(name).tasks
    assert last.name == "reversed" and reached(last, nominal.env_kwargs) < 0.3


def reached(task, believed):
    """Share of the task's episodes that the oracle of an environment with the kwargs ``believed`` solves."""
    env = make_env(task.env_id, len(task.evaluation), autoreset="disabled", **task.env_kwargs)
    mind = make_env(task.env_id, len(task.evaluation), autoreset="disabled", **believed)
    env.reset(seed=task.evaluation.seeds, options=dict(task.evaluation.options))
    mind.reset(seed=task.evaluation.seeds, options=dict(task.evaluation.options))
    solved = torch.zeros(env.num_envs, dtype=torch.bool)
    for _ in range(200):
        mind.load_state_dict(env.state_dict())
        solved |= env.step(mind.oracle_actions())[4]["is_success"]
    return float(solved.float().mean())


@pytest.mark.parametrize("name", NAMES)
def test_data_sets_load(name):
    stream = make_stream(name, options={"transitions": 200, "observation": "pixels"})
    assert all(len(load_dataset(task.dataset_id)) == 200 for task in stream.tasks)


def test_bad_options():
    for gain in (0.0, math.inf):
        with pytest.raises(ConfigError, match="Two-Rooms: action_gain must be a number other than 0"):
            TwoRoomsVectorEnv(1, action_gain=gain)
    with pytest.raises(ConfigError, match="two-rooms: friction must be a number >= 0, got -1"):
        two_rooms(transitions=90, friction=-1.0)
    with pytest.raises(ConfigError, match="PointMaze: damping must be a number >= 0"):
        PointMazeVectorEnv(1, damping=-1.0)
    with pytest.raises(ConfigError, match="point-maze: action_gain"):
        point_maze(transitions=90, action_gain=0.0)
    for options, message in (
        ({"layout": 40}, "from 0 to 39"),
        ({"episodes": 51}, "from 1 to 50"),
        ({"observation": "x"}, "Unknown value of observation"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_stream("point-maze-dynamics", options=options)
    with pytest.raises(ConfigError, match="episodes must be from 1 to 100"):
        make_stream("two-rooms-dynamics", options={"episodes": 0})
