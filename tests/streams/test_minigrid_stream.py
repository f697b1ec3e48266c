"""minigrid-5: equal spaces, fixed layouts, and every task can be solved."""

import json

import pytest
import torch

from clbench import make_env, make_stream
from clbench.contracts import Stream
from clbench.errors import ConfigError, UnknownNameError

# shortest solutions of each task's first evaluation episode, found by breadth-first search (tests/envs/test_minigrid.py)
SOLUTIONS = {
    "empty": "0022",
    "lava-gap": "122022",
    "crossing": "22221222222022",
    "door-key": "0030021522122",
    "multi-room": "1212522",
}


def test_plain_values():
    stream = make_stream("minigrid-5")
    assert Stream.from_dict(json.loads(json.dumps(stream.to_dict()))) == stream
    assert len(stream.tasks) == 5 and stream == make_stream("minigrid-5", seed=1)


@pytest.mark.parametrize("observation", ["flat", "image", "goal-position"])
def test_tasks_share_their_spaces(observation):
    tasks = make_stream("minigrid-5", options={"observation": observation}).tasks
    envs = [make_env(t.env_id, **t.env_kwargs) for t in tasks]
    assert all(e.single_observation_space == envs[0].single_observation_space for e in envs)
    assert all(e.single_action_space == envs[0].single_action_space for e in envs)


@pytest.mark.parametrize("observation", ["flat", "goal-position"])
def test_every_task_can_be_solved(observation):
    for task in make_stream("minigrid-5", options={"observation": observation}).tasks:
        env = make_env(task.env_id, autoreset="disabled", **task.env_kwargs)
        env.reset(seed=task.evaluation.seeds[:1])
        results = [env.step(torch.tensor([int(a)])) for a in SOLUTIONS[task.name]]
        assert [bool(r[4]["is_success"]) for r in results] == [False] * (len(results) - 1) + [True], task.name


def test_standing_still_solves_nothing():
    for task in make_stream("minigrid-5").tasks:
        env = make_env(task.env_id, 3, autoreset="disabled", **task.env_kwargs)
        env.reset(seed=task.evaluation.seeds[:3])
        for _ in range(env.max_episode_steps or 0):
            _, _, _, truncated, info = env.step(torch.zeros(3, dtype=torch.int64))
            assert not info["is_success"].any()
        assert truncated.all()


def test_episodes_differ_within_a_task():
    for task in make_stream("minigrid-5").tasks:
        env = make_env(task.env_id, 20, **task.env_kwargs)
        obs, _ = env.reset(seed=task.evaluation.seeds)
        assert len(torch.unique(obs, dim=0)) > 1, task.name


def test_bad_options():
    with pytest.raises(ConfigError, match="cannot use observation='goal-image': the rooms have different sizes"):
        make_stream("minigrid-5", options={"observation": "goal-image"})
    with pytest.raises(UnknownNameError, match="Did you mean 'flat'"):
        make_stream("minigrid-5", options={"observation": "flt"})
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        make_stream("minigrid-5", options={"episodes": 0})
