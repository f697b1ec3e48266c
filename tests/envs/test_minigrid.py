"""MiniGrid's observations, goals, reward and success."""

import copy
from collections import deque

import gymnasium
import minigrid  # noqa: F401  (registers the ids)
import numpy as np
import pytest
import torch
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

from clbench.envs.make import make_env
from clbench.envs.minigrid import flat_view
from clbench.errors import ConfigError

LEFT, RIGHT, FORWARD, PICKUP, TOGGLE = 0, 1, 2, 3, 5
GOAL_MODES = ["goal-position", "goal-image"]


def plan(env_id, seed, wanted):
    """Breadth-first search on MiniGrid itself: the shortest actions that end in ``wanted(reward, terminated)``."""
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=seed)
    queue, seen = deque([(env, [])]), set()
    while queue:
        env, actions = queue.popleft()
        for action in (LEFT, RIGHT, FORWARD, PICKUP, TOGGLE):
            child = copy.deepcopy(env)
            _, reward, terminated, truncated, _ = child.step(action)
            if wanted(float(reward), terminated):
                return [*actions, action]
            held = child.carrying and child.carrying.type
            key = (tuple(int(v) for v in child.agent_pos), int(child.agent_dir), held, child.grid.encode().tobytes())
            if not (terminated or truncated) and key not in seen:
                seen.add(key)
                queue.append((child, [*actions, action]))
    raise AssertionError(f"{env_id} with seed {seed} has no such plan")


def to_goal(env_id, seed):
    return plan(env_id, seed, lambda reward, terminated: terminated and reward > 0)


def follow(env, seed, actions):
    """All step results of one episode in one row."""
    env.reset(seed=[seed])
    return [env.step(torch.tensor([a])) for a in actions]


@pytest.mark.parametrize("observation", ["flat", "image", *GOAL_MODES])
def test_success_at_the_goal(observation):
    env_id = "MiniGrid-DoorKey-5x5-v0"
    actions = to_goal(env_id, 3)
    steps = follow(make_env(env_id, autoreset="disabled", observation=observation), 3, actions)
    assert [bool(info["is_success"]) for *_, info in steps] == [False] * (len(actions) - 1) + [True]
    rewards = [float(s[1]) for s in steps]
    if observation in GOAL_MODES:
        assert rewards == [-1.0] * (len(actions) - 1) + [0.0]
        obs = steps[-1][0]
        assert torch.equal(obs["achieved_goal"], obs["desired_goal"])
    else:
        assert rewards[:-1] == [0.0] * (len(actions) - 1)
        assert rewards[-1] == pytest.approx(1 - 0.9 * len(actions) / 250)


@pytest.mark.parametrize("observation", ["flat", *GOAL_MODES])
def test_lava_terminates_without_success(observation):
    env_id = "MiniGrid-LavaGapS5-v0"
    actions = plan(env_id, 0, lambda reward, terminated: terminated and reward <= 0)
    _, reward, terminated, _, info = follow(
        make_env(env_id, autoreset="disabled", observation=observation), 0, actions
    )[-1]
    assert bool(terminated) and not bool(info["is_success"])  # success read from `terminated` would be wrong here
    assert float(reward) == (-1.0 if observation in GOAL_MODES else 0.0)


def test_timeout_is_no_success():
    env = make_env("MiniGrid-Empty-5x5-v0", autoreset="disabled", max_episode_steps=4)
    *_, truncated, info = follow(env, 0, [LEFT] * 4)[-1]
    assert bool(truncated) and not bool(info["is_success"])


def test_success_speaks_of_the_episode_that_ended():
    env_id = "MiniGrid-Empty-5x5-v0"
    env = make_env(env_id, observation="flat")
    *_, info = follow(env, 0, to_goal(env_id, 0))[-1]
    assert bool(info["_final_obs"]) and bool(info["is_success"])
    assert not bool(env.step(torch.tensor([LEFT]))[-1]["is_success"])


# -- observations ---------------------------------------------------------------------------------------------------------


def raw(env):
    return env.envs[0].unwrapped.gen_obs()


def test_flat_and_image_are_minigrids_view():
    flat, image = (make_env("MiniGrid-DoorKey-8x8-v0", observation=o) for o in ("flat", "image"))
    f, i = flat.reset(seed=[5])[0][0], image.reset(seed=[5])[0][0]
    view = raw(flat)
    np.testing.assert_array_equal(i.numpy(), np.moveaxis(view["image"], -1, 0))
    cells = f[:-4].reshape(7, 7, 20).numpy()
    for channel, part in enumerate((cells[..., :11], cells[..., 11:17], cells[..., 17:])):
        np.testing.assert_array_equal(part.sum(-1), 1)
        np.testing.assert_array_equal(part.argmax(-1), view["image"][..., channel])
    assert int(f[-4:].argmax()) == view["direction"] and float(f[-4:].sum()) == 1


def test_flat_view_tells_cells_apart():
    a, b = np.zeros((7, 7, 3), np.uint8), np.zeros((7, 7, 3), np.uint8)
    b[2, 3] = OBJECT_TO_IDX["key"], COLOR_TO_IDX["blue"], 0
    assert flat_view(a, 0).shape == (984,) and int((flat_view(a, 0) != flat_view(b, 0)).sum()) == 4
    assert int((flat_view(a, 0) != flat_view(a, 3)).sum()) == 2


@pytest.mark.parametrize("observation", ["flat", "image", "goal-position"])
def test_all_rooms_share_their_spaces(observation):
    envs = [
        make_env(f"MiniGrid-{n}-v0", observation=observation) for n in ("Empty-5x5", "MultiRoom-N2-S4", "LavaGapS7")
    ]
    assert len({str(e.single_observation_space) + str(e.single_action_space) for e in envs}) == 1


@pytest.mark.parametrize("observation", ["flat", "image", *GOAL_MODES])
@pytest.mark.parametrize("name", ["DoorKey-5x5", "Dynamic-Obstacles-6x6", "FourRooms"])
def test_observations_are_in_their_space(name, observation):
    env = make_env(f"MiniGrid-{name}-v0", 2, observation=observation)
    obs, _ = env.reset(seed=0)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        for row in range(2):
            one = {k: v[row].numpy() for k, v in obs.items()} if isinstance(obs, dict) else obs[row].numpy()
            assert env.single_observation_space.contains(one)
        obs, *_ = env.step(torch.randint(7, (2,), generator=rng) % int(env.single_action_space.n))


def test_missions_need_no_tensor():
    env = make_env("BabyAI-GoToRedBall-v0", observation="flat")
    assert env.reset(seed=0)[0].shape == (1, 984)


# -- goals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", GOAL_MODES)
def test_step_reward_is_compute_reward(observation):
    env_id = "MiniGrid-LavaGapS5-v0"
    env = make_env(env_id, autoreset="disabled", observation=observation)
    steps = follow(env, 2, to_goal(env_id, 2))
    achieved, desired = (torch.cat([s[0][k] for s in steps]) for k in ("achieved_goal", "desired_goal"))
    batched = env.compute_reward(achieved, desired, None)
    assert batched.dtype == np.float32 and batched.tolist() == [float(s[1]) for s in steps]
    # any leading dimensions, and each state reaches itself
    pairs = env.compute_reward(achieved[:, None], achieved[None], None)
    assert pairs.shape == (len(steps), len(steps)) and (np.diag(pairs) == 0).all()


def test_both_goal_forms_agree():
    """Position and picture judge every pair of states of random walks alike."""
    envs = [make_env("MiniGrid-DoorKey-5x5-v0", 1, autoreset="disabled", observation=o) for o in GOAL_MODES]
    rng = torch.Generator().manual_seed(0)
    states = [[e.reset(seed=[4])[0]["achieved_goal"]] for e in envs]
    for _ in range(25):
        action = torch.randint(6, (1,), generator=rng)
        for e, seen in zip(envs, states):
            seen.append(e.step(action)[0]["achieved_goal"])
    rewards = []
    for e, seen in zip(envs, states):
        s = torch.cat(seen)
        rewards.append(e.compute_reward(s[:, None], s[None], None))
    np.testing.assert_array_equal(*rewards)
    assert 0 < (rewards[0] == 0).mean() < 1


def test_goal_picture_shows_the_agent_on_the_goal():
    env = make_env("MiniGrid-Empty-6x6-v0", observation="goal-image")
    obs, _ = env.reset(seed=0)
    assert obs["desired_goal"].shape == (1, 3, 6, 6) and obs["desired_goal"].dtype == torch.uint8
    assert int(obs["desired_goal"][0, 0, 4, 4]) == OBJECT_TO_IDX["agent"]
    assert int(obs["achieved_goal"][0, 0, 1, 1]) == OBJECT_TO_IDX["agent"]
    turned = env.step(torch.tensor([RIGHT]))[0]
    assert torch.equal(turned["achieved_goal"], obs["achieved_goal"])  # looking elsewhere is the same goal
    assert not torch.equal(turned["observation"], obs["observation"])


def test_positions_are_x_and_y_of_the_grid():
    env = make_env("MiniGrid-FourRooms-v0", 4, observation="goal-position")
    obs, _ = env.reset(seed=[1, 2, 3, 4])
    goals = obs["desired_goal"].long().tolist()
    assert any(x != y for x, y in goals)
    for single, goal, agent in zip(env.envs, goals, obs["achieved_goal"].tolist()):
        assert single.unwrapped.grid.get(*goal).type == "goal" and tuple(agent) == tuple(single.unwrapped.agent_pos)


@pytest.mark.parametrize("observation", GOAL_MODES)
def test_tasks_without_a_goal_square(observation):
    env = make_env("MiniGrid-Unlock-v0", observation=observation)
    with pytest.raises(ConfigError, match="MiniGrid-Unlock-v0 has 0 goal squares.*use observation='flat' or 'image'"):
        env.reset(seed=0)
