"""PointMaze: pictures against the definition, starts and goals, and the environment contract."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import clbench.envs  # noqa: F401 (registers the ids)
from clbench.contracts import VectorEnv
from clbench.envs.point_maze import (
    FLOOR,
    GREEN,
    SIZE,
    WALL,
    PointMazeEnv,
    PointMazeVectorEnv,
    background,
    disc_position,
    goal_reward,
    move,
    render_pixels,
    ring_code,
    wall_distance,
)
from clbench.errors import ConfigError, ContractError, DataError
from clbench.streams.maze_layouts import PUBLISHED, all_layouts, far_pairs, layout_code, path_lengths, with_ring
from clbench.testing import check_env as conforms

M0, M1, M2 = PUBLISHED[:3]
OPEN = "OOOO/OOOO/OOOO/OOOO"

# -- pictures ---------------------------------------------------------------------------------------------------------


def random_states(count, seed=0):
    """Positions anywhere in free cells of random layouts -> (count, 2), codes (count,), texts."""
    rng = np.random.default_rng(seed)
    texts = [str(t) for t in rng.choice(all_layouts(), count)]
    cells = [rng.choice(np.flatnonzero(np.diag(path_lengths(layout_code(t))) == 0)) for t in texts]
    corner = np.stack([np.array(cells) % 4, np.array(cells) // 4], 1)
    position = torch.from_numpy((corner + rng.uniform(0.03, 0.97, corner.shape)).astype(np.float32))
    return position, torch.tensor([layout_code(t) for t in texts], dtype=torch.int32), texts


def brute_force(x, y, layout):
    """The definition, pixel by pixel: cells of 14 pixels, 4 pixels of the ring, a disc of 2.8 pixels with a soft edge."""
    rows = with_ring(layout).split("/")
    frame = np.zeros((3, SIZE, SIZE), np.uint8)
    for v in range(SIZE):
        for u in range(SIZE):
            ground = WALL if rows[(v - 4) // 14 + 1][(u - 4) // 14 + 1] == "#" else FLOOR
            distance = math.hypot(u + 0.5 - (4 + 14 * x), v + 0.5 - (4 + 14 * y))
            cover = min(max(2.8 + 0.5 - distance, 0), 1)
            frame[:, v, u] = [round(g + cover * (c - g)) for g, c in zip(ground, GREEN, strict=True)]
    return frame


def check_pictures(render):
    position, codes, texts = random_states(6)
    frames = render({"position": position, "layout": codes}).numpy()
    assert frames.shape == (6, 3, 64, 64)
    assert frames.dtype == np.uint8
    for frame, (x, y), text in zip(frames, position.double().tolist(), texts, strict=True):
        np.testing.assert_array_equal(frame, brute_force(x, y, text))


def test_pixels_equal_the_definition():
    check_pictures(render_pixels)


@pytest.mark.parametrize(
    "broken",
    [
        lambda c: render_pixels(c).transpose(2, 3),
        lambda c: render_pixels({**c, "position": c["position"] + 0.02}),
        lambda c: render_pixels({**c, "layout": c["layout"] ^ 1}),
        lambda c: background(c["layout"]),
    ],
)
def test_the_comparison_catches_broken_pictures(broken):
    with pytest.raises(AssertionError):
        check_pictures(broken)


def test_the_ring_is_partly_visible_all_around():
    frame = background(torch.tensor([layout_code(OPEN)]))[0, 0]
    assert frame[4:60, 4:60].unique().tolist() == [FLOOR[0]]
    for edge in (frame[:4], frame[-4:], frame[:, :4], frame[:, -4:]):
        assert edge.unique().tolist() == [WALL[0]]


def test_the_position_can_be_read_back():
    position, codes, _ = random_states(2000, seed=1)
    frames = render_pixels({"position": position, "layout": codes})
    assert (disc_position(frames) - position).abs().max() < 0.02


# -- the environment --------------------------------------------------------------------------------------------------


def actions_of(num_envs, steps, seed=0):
    return torch.rand(steps, num_envs, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def rollout(env, actions):
    """Everything that steps return, in one flat list of tensors."""
    out = []
    for a in actions:
        obs, reward, terminated, truncated, info = env.step(a)
        out += [*obs.values(), reward, terminated, truncated, info["is_success"]]
    return out


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


KEYS = {
    "state": ["achieved_goal", "desired_goal", "observation"],
    "pixels": ["achieved_goal", "desired_goal", "observation", "velocity"],
}


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_protocol_spaces_shapes_and_dtypes(observation):
    env = PointMazeVectorEnv(3, observation=observation)
    assert isinstance(env, VectorEnv)
    obs, _ = env.reset(seed=0)
    assert sorted(obs) == KEYS[observation]
    for _ in range(3):
        for row in range(3):
            assert env.single_observation_space.contains({k: v[row].numpy() for k, v in obs.items()})
        assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})
        obs, reward, terminated, truncated, _ = env.step(np.asarray(env.action_space.sample()))
    assert reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == (3,)


def test_make_vec_gives_the_batched_class():
    env = gymnasium.make_vec("clbench/PointMaze-v0", num_envs=4, layout="M3")
    assert isinstance(env, PointMazeVectorEnv)
    assert env.num_envs == 4
    assert env.max_episode_steps == 200


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_single_env_passes_both_checkers(observation):
    env = gymnasium.make("clbench/PointMaze-v0", observation=observation, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(env)
    assert env.render().shape == (256, 256, 3)


def test_single_env_takes_a_layout_per_episode_and_ends_after_200_steps():
    env = gymnasium.make("clbench/PointMaze-v0")
    options = {"layout": OPEN, "start": [0.5, 0.5], "goal": [3.5, 3.5], "velocity": [1.0, 0.0]}
    obs, info = env.reset(seed=0, options=options)
    assert obs["observation"].tolist() == [0.5, 0.5, 1.0, 0.0]
    assert info == {"is_success": False}
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(200)]
    assert not any(t or s for t, s in ends[:-1])
    assert ends[-1] == (False, True)


def test_a_step_is_four_of_the_simulator():
    env = PointMazeVectorEnv(5, layout=OPEN, max_episode_steps=None)
    env.reset(seed=1)
    position, velocity = env.state_dict()["position"], env.state_dict()["velocity"]
    solid = ring_code(torch.tensor([layout_code(OPEN)]).expand(5))
    for action in actions_of(5, 20):
        position, velocity = move(position, velocity, action.t(), solid, repeat=4)
        assert torch.equal(env.step(action)[0]["observation"], torch.cat([position, velocity]).t())
    fine = PointMazeVectorEnv(1, layout=OPEN, action_repeat=1)
    options = {"start": [[0.5, 0.5]], "velocity": [[1.0, 0.0]], "goal": [[3.5, 3.5]]}
    fine.reset(options=options)
    assert float(fine.step(torch.zeros(1, 2))[0]["observation"][0, 0]) == pytest.approx(0.51, abs=1e-4)


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_an_episode_is_a_function_of_its_seed_and_layout_whatever_the_batch(observation):
    actions = actions_of(5, 40)
    layouts = [M0, M1, M2, "M3", OPEN]
    big = PointMazeVectorEnv(5, observation=observation, layout=layouts, max_episode_steps=13)
    big.reset(seed=[7, 8, 9, 10, 11])
    together = rollout(big, actions)
    one = PointMazeVectorEnv(1, observation=observation, layout=M2, max_episode_steps=13)
    one.reset(seed=[9])
    alone = rollout(one, actions[:, 2:3])
    assert equal([v[2:3] for v in together], alone)


def test_one_seed_for_the_batch_gives_rows_that_differ_and_do_not_depend_on_their_number():
    first = PointMazeVectorEnv(6).reset(seed=3)[0]["observation"]
    again = PointMazeVectorEnv(2).reset(seed=3)[0]["observation"]
    assert torch.equal(first[:2], again)
    assert len(first.unique(dim=0)) == 6
    assert not torch.equal(first, PointMazeVectorEnv(6).reset(seed=4)[0]["observation"])


@pytest.mark.parametrize(
    ("layout", "steps"), [(M0, 5), (OPEN, 5), ("OO##/OO##/O###/####", 3), ("OO##/####/####/####", 1)]
)
def test_starts_and_goals_are_far_apart_and_cover_what_they_may(layout, steps):
    env = PointMazeVectorEnv(20_000, layout=layout, terminate_on_success=False)
    obs, _ = env.reset(seed=0)
    start, goal = obs["achieved_goal"].double(), obs["desired_goal"].double()
    assert (obs["observation"][:, 2:] == 0).all()
    cells = [(4 * p[:, 1].floor() + p[:, 0].floor()).long().numpy() for p in (start, goal)]
    lengths = path_lengths(layout_code(layout))[cells[0], cells[1]]
    assert lengths.min() == steps
    pairs = far_pairs(layout_code(layout))
    found = np.unique(np.stack(cells, 1), axis=0, return_counts=True)
    np.testing.assert_array_equal(found[0], pairs)  # every pair that is far enough, and no other
    expected = 20_000 / len(pairs)
    assert np.abs(found[1] - expected).max() < 5 * math.sqrt(expected) + 1
    for points, half in ((start, 0.1), (goal, 0.25)):
        inside = (points % 1 - 0.5) / half
        assert inside.abs().max() <= 1 + 1e-6
        assert (inside.mean(0)).abs().max() < 4 * math.sqrt(1 / 3 / 20_000)
        assert (inside.var(0) - 1 / 3).abs().max() < 0.01


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_same_step_autoreset_keeps_the_last_observation(observation):
    env = PointMazeVectorEnv(3, observation=observation, layout=OPEN, max_episode_steps=4)
    start, goal = torch.tensor([[0.5, 0.5]] * 3), torch.tensor([[1.01, 0.5], [3.5, 3.5], [3.5, 3.5]])
    first, info = env.reset(seed=0, options={"start": start, "goal": goal})
    assert not info["is_success"].any()
    kept = {k: v.clone() for k, v in first.items()}
    obs, reward, terminated, truncated, info = env.step(torch.tensor([[1.0, 0.0]] * 3))
    assert terminated.tolist() == info["is_success"].tolist() == info["_final_obs"].tolist() == [True, False, False]
    assert reward.tolist() == [0.0, -1.0, -1.0]
    assert not truncated.any()
    final = info["final_obs"]
    where = final["achieved_goal"] if observation == "state" else disc_position(final["achieved_goal"])
    assert (where[:, 0] - 0.52).abs().max() < 0.03
    speed = final["observation"][:, 2:] if observation == "state" else final["velocity"]
    assert (speed[:, 0] - 0.95).abs().max() < 0.01
    assert torch.equal(final["desired_goal"], first["desired_goal"])
    assert not torch.equal(obs["desired_goal"][0], first["desired_goal"][0])  # row 0 has begun a new episode
    assert torch.equal(obs["desired_goal"][1:], first["desired_goal"][1:])
    assert all(torch.equal(first[k], kept[k]) for k in kept)  # what was handed out stays as it was
    for _ in range(3):
        _, _, _, truncated, info = env.step(torch.zeros(3, 2))
    assert truncated.tolist() == [False, True, True]  # row 0 is one step younger
    assert info["_final_obs"].tolist() == [False, True, True]


def test_pixels_show_the_state_all_the_time():
    actions = actions_of(4, 30, seed=5)
    layouts = [M0, M1, OPEN, M2]
    codes = torch.tensor([layout_code(t) for t in layouts])
    states, pixels = (
        PointMazeVectorEnv(4, observation=o, max_episode_steps=7, layout=layouts) for o in ("state", "pixels")
    )

    def drawn(position):
        return render_pixels({"position": position, "layout": codes})

    first, second = states.reset(seed=0)[0], pixels.reset(seed=0)[0]
    for a in actions:
        assert second["observation"] is second["achieved_goal"]
        assert torch.equal(drawn(first["achieved_goal"]), second["observation"])
        assert torch.equal(drawn(first["desired_goal"]), second["desired_goal"])
        assert torch.equal(first["observation"][:, 2:], second["velocity"])
        (first, *_, info), (second, *_, other) = states.step(a), pixels.step(a)
        assert torch.equal(drawn(info["final_obs"]["achieved_goal"]), other["final_obs"]["observation"])
        assert torch.equal(info["final_obs"]["observation"][:, 2:], other["final_obs"]["velocity"])


def test_layouts_of_a_reset_hold_for_its_episodes_only():
    env = PointMazeVectorEnv(3, observation="pixels", layout=[M0, M1, M2], max_episode_steps=2)
    own = [layout_code(t) for t in (M0, M1, M2)]
    env.reset(seed=0)
    mask = torch.tensor([True, False, True])
    obs, _ = env.reset(seed=[1, 2, 3], options={"layout": [OPEN, "not read", M1], "reset_mask": mask})
    now = [layout_code(OPEN), own[1], own[1]]
    assert env.state_dict()["layout"].tolist() == now
    shown = {"position": env.state_dict()["position"].t(), "layout": torch.tensor(now)}
    assert torch.equal(obs["observation"], render_pixels(shown))
    for _ in range(2):
        env.step(torch.zeros(3, 2))
    assert env.state_dict()["layout"].tolist() == own  # the second step ended rows 0 and 2, the first one row 1
    fresh = PointMazeVectorEnv(1, layout=M1).reset(seed=[3])[0]
    again = PointMazeVectorEnv(1, layout=M0).reset(seed=[3], options={"layout": [M1]})[0]
    assert all(torch.equal(fresh[k], again[k]) for k in fresh)


def test_evaluation_mode_leaves_finished_rows_alone():
    env = PointMazeVectorEnv(2, autoreset="disabled", layout=OPEN, max_episode_steps=3)
    env.reset(seed=[1, 2], options={"start": [[0.5, 0.5]] * 2, "goal": [[0.6, 0.5], [3.5, 3.5]]})
    obs, _, terminated, _, info = env.step(torch.zeros(2, 2))
    assert terminated.tolist() == [True, False]
    assert "final_obs" not in info
    assert obs["achieved_goal"].tolist() == [[0.5, 0.5]] * 2
    obs, _ = env.reset(seed=[5, 6], options={"reset_mask": torch.tensor([True, False])})
    alone = PointMazeVectorEnv(1, layout=OPEN).reset(seed=[5])[0]["observation"][0]
    assert torch.equal(obs["observation"][0], alone)
    assert obs["achieved_goal"][1].tolist() == [0.5, 0.5]
    env.step(torch.zeros(2, 2))
    truncated = env.step(torch.zeros(2, 2))[3]
    assert truncated.tolist() == [False, True]


def test_success_is_closer_than_half_a_cell_and_need_not_end_the_episode():
    env = PointMazeVectorEnv(2, layout=OPEN, terminate_on_success=False, max_episode_steps=None)
    goal = [[1.0 - 1e-3, 0.5], [1.0 + 1e-3, 0.5]]
    _, info = env.reset(options={"start": [[0.5, 0.5]] * 2, "goal": goal})
    assert info["is_success"].tolist() == [True, False]
    _, reward, terminated, truncated, info = env.step(torch.zeros(2, 2))
    assert info["is_success"].tolist() == [True, False]
    assert reward.tolist() == [0.0, -1.0]
    assert not terminated.any()
    assert not truncated.any()


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_state_dict_continues_in_the_middle_of_episodes(observation):
    def make():
        return PointMazeVectorEnv(3, observation=observation, layout=[M0, M1, M2], max_episode_steps=25)

    env, actions = make(), actions_of(3, 6).sign().repeat_interleave(10, 0)
    env.reset(seed=0, options={"layout": [M2, M2, OPEN]})
    rollout(env, actions[:15])
    state = env.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    expected = rollout(env, actions[15:])
    other = make()
    other.load_state_dict(state)
    assert equal(rollout(other, actions[15:]), expected)
    again = make()
    again.load_state_dict(state)  # the first load did not keep the tensors
    assert equal(rollout(again, actions[15:]), expected)
    changes = {"position": 0.03, "velocity": 0.5, "goal": 0.1, "steps": 1, "episode": 1, "base": 1}
    changed = {name: state[name] + by for name, by in changes.items()}
    changed["layout"] = torch.full((3,), layout_code(OPEN))
    for name, value in changed.items():  # each of them matters
        broken = make()
        broken.load_state_dict({**state, name: value})
        assert not equal(rollout(broken, actions[15:]), expected), name


def test_state_of_an_environment_that_was_never_reset():
    env = PointMazeVectorEnv(2)
    env.load_state_dict(PointMazeVectorEnv(2).state_dict())
    with pytest.raises(ContractError, match="call reset"):
        env.step(torch.zeros(2, 2))


def test_step_changes_no_input_and_no_global_generator():
    env = PointMazeVectorEnv(2)
    before = torch.get_rng_state()
    env.reset(seed=0)
    action = torch.tensor([[3.0, -0.0], [0.5, 0.5]])
    env.step(action)
    assert torch.equal(torch.get_rng_state(), before)
    assert action.tolist() == [[3.0, -0.0], [0.5, 0.5]]


def test_no_row_ever_is_in_a_wall_through_the_environment():
    layouts = [str(t) for t in np.random.default_rng(0).choice(all_layouts(), 500)]
    env = PointMazeVectorEnv(500, layout=layouts, max_episode_steps=40)
    env.reset(seed=0)
    solid = ring_code(torch.tensor([layout_code(t) for t in layouts]))
    for number, action in enumerate(actions_of(500, 60)):
        action = action.sign() if number % 20 else action
        final = env.step(action)[4]["final_obs"]["achieved_goal"]
        assert wall_distance(final.double().t(), solid).min() > 0.02


# -- rewards for hindsight, pictures for people -----------------------------------------------------------------------


def test_compute_reward_agrees_with_the_environment():
    for observation in ("state", "pixels"):
        env = PointMazeVectorEnv(500, observation=observation, layout=OPEN, terminate_on_success=False)
        start = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1
        goal = start + torch.linspace(0, 1, 500)[:, None] * 0.7
        env.reset(options={"start": start, "goal": goal})
        obs, reward, *_ = env.step(torch.zeros(500, 2))
        computed = env.compute_reward(obs["achieved_goal"], obs["desired_goal"], {})
        clear = ((start - goal).norm(dim=1) - 0.5).abs() > (0 if observation == "state" else 0.04)
        assert torch.equal(computed[clear], reward[clear])
        assert {-1.0, 0.0} == set(reward[clear].tolist())
        one = env.compute_reward(obs["achieved_goal"][0].numpy(), obs["desired_goal"][0].numpy(), {})
        assert one == reward[0]
        as_numpy = goal_reward(obs["achieved_goal"].numpy(), obs["desired_goal"].numpy())
        assert isinstance(as_numpy, np.ndarray)
        np.testing.assert_array_equal(as_numpy, computed.numpy())


def test_render_shows_walls_agent_and_goal():
    env = PointMazeVectorEnv(2, layout=[M0, M1])
    env.reset(seed=0, options={"start": [[1.5, 1.5], [0.5, 0.5]], "goal": [[3.5, 3.5], [3.5, 2.5]]})
    pictures = env.render()
    assert pictures.shape == (2, 256, 256, 3)
    assert pictures.dtype == np.uint8

    def colour(row, x, y):
        return tuple(pictures[row, round(56 * y + 16), round(56 * x + 16)])

    agent, goal, wall, floor = colour(0, 1.5, 1.5), colour(0, 3.5, 3.5), colour(0, 0.5, 0.5), colour(0, 2.5, 1.5)
    assert len({agent, goal, wall, floor}) == 4
    assert [colour(1, 0.5, 0.5), colour(1, 3.5, 2.5), colour(1, 3.5, 0.5)] == [agent, goal, wall]
    assert colour(0, 1.5, -0.2) == wall  # the ring


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "####/####"}, "4 rows of 4 letters"),
        ({"layout": "####/#..#/####/####"}, "4 rows of 4 letters"),
        ({"layout": "O###/###O/####/####"}, "not connected"),
        ({"layout": "O###/####/####/####"}, "at least two free cells"),
        ({"layout": "M99"}, "Unknown layout 'M99'"),
        ({"layout": [M0]}, "layout has 1 entries; give one, or 2"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
        ({"autoreset": "next_step"}, "autoreset"),
        ({"action_repeat": 0}, "action_repeat must be at least 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"num_envs": 0}, "num_envs must be"),
        ({"device": "gpu"}, "is not a device"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        PointMazeVectorEnv(**{"num_envs": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": [[0.5, 0.5], [2.5, 1.5]]}, "start of row 0, .* free cell, at least 0.02"),
        ({"goal": [[2.5, 1.5], [1.01, 1.5]]}, "goal of row 1, .* free cell, at least 0.02"),
        ({"goal": [[2.5, 1.5], [float("nan"), 1.5]]}, "goal of row 1"),
        ({"start": [[2.5, 1.5], [2.5, 1e9]]}, "start of row 1"),
        ({"velocity": [[9.0, 0.0], [0.0, 0.0]]}, "velocity of row 0, .* within"),
        ({"velocity": [[0.0, float("nan")], [0.0, 0.0]]}, "velocity of row 0"),
        ({"start": [[1.5, 1.5, 0.0]] * 2}, r"shape \(2, 2\)"),
        ({"layout": ["O###/###O/####/####"] * 2}, "not connected"),
        ({"layout": M0}, "one entry for each of the 2 rows"),
        ({"starts": [[1.5, 1.5]] * 2}, "Did you mean 'start'"),
    ],
)
def test_bad_reset_options(options, message):
    env = PointMazeVectorEnv(2, layout=M0)
    with pytest.raises(ConfigError, match=message):
        env.reset(seed=0, options=options)


def test_a_masked_row_may_hold_anything():
    env = PointMazeVectorEnv(2, layout=M0)
    env.reset(seed=0)
    options = {"reset_mask": [True, False], "start": [[1.5, 1.5], [float("nan")] * 2], "layout": [M2, ""]}
    assert env.reset(options=options)[0]["achieved_goal"][0].tolist() == [1.5, 1.5]


def test_bad_actions_and_order_of_calls():
    env = PointMazeVectorEnv(2)
    with pytest.raises(ContractError, match="call reset before step"):
        env.step(torch.zeros(2, 2))
    with pytest.raises(ContractError, match="first reset must reset all rows"):
        env.reset(options={"reset_mask": [True, False]})
    env.reset(seed=0)
    before = env.state_dict()
    for actions, message in (
        (torch.zeros(2, 3), r"actions must be float \(2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "actions must be float"),
        (torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), "action of row 1 is not finite"),
        (np.array([[np.inf, 0.0], [0.0, 0.0]]), "action of row 0 is not finite"),
    ):
        with pytest.raises(ContractError, match=message):
            env.step(actions)
    assert equal(list(before.values()), list(env.state_dict().values()))


def test_bad_states():
    env = PointMazeVectorEnv(2)
    state = env.state_dict()
    with pytest.raises(DataError, match="no entry 'goal'"):
        env.load_state_dict({k: v for k, v in state.items() if k != "goal"})
    with pytest.raises(DataError, match="of 2 environments, not of 3"):
        PointMazeVectorEnv(3).load_state_dict(state)


def test_single_env_rejects_unknown_render_modes():
    with pytest.raises(ConfigError, match="render_mode"):
        PointMazeEnv(render_mode="human")


# -- controllers, layouts as observations -------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["state", "layout"])
def test_the_oracle_solves_every_layout(observation):
    layouts = all_layouts()[::7]
    env = PointMazeVectorEnv(len(layouts), autoreset="disabled", layout=layouts, observation=observation)
    shares = {}
    for controller in ("oracle_actions", "straight_line_actions"):
        env.reset(seed=0)
        reached = torch.zeros(len(layouts), dtype=torch.bool)
        for _ in range(200):
            action = getattr(env, controller)()
            assert action.abs().max() <= 1
            reached |= env.step(action)[4]["is_success"]
        shares[controller] = float(reached.double().mean())
    assert shares["oracle_actions"] == 1
    assert 0 < shares["straight_line_actions"] < 0.8  # negative control


def test_the_oracle_follows_layouts_of_a_reset():
    env = PointMazeVectorEnv(2, autoreset="disabled", layout=OPEN)
    places = {"start": [[1.5, 1.5]] * 2, "goal": [[3.5, 3.5]] * 2}
    env.reset(seed=0, options=places)
    before = env.oracle_actions()
    env.reset(seed=0, options={"layout": [M0, OPEN], **places})
    assert torch.equal(env.oracle_actions()[1], before[1]) and not torch.equal(env.oracle_actions()[0], before[0])


def test_layouts_are_observed():
    env = PointMazeVectorEnv(3, observation="layout", layout=[M0, M1, M2], max_episode_steps=2)
    plain = PointMazeVectorEnv(3, layout=[M0, M1, M2], max_episode_steps=2)

    def walls(texts):
        return torch.tensor([[float(letter == "#") for letter in text.replace("/", "")] for text in texts])

    obs, _ = env.reset(seed=0)
    assert torch.equal(obs["layout"], walls([M0, M1, M2]))
    assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})
    obs, _ = env.reset(seed=0, options={"layout": [OPEN, M0, M1]})
    expected, _ = plain.reset(seed=0, options={"layout": [OPEN, M0, M1]})
    assert all(torch.equal(obs[k], v) for k, v in expected.items()) and set(obs) - set(expected) == {"layout"}
    assert torch.equal(obs["layout"], walls([OPEN, M0, M1]))
    for _ in range(2):
        obs, *_, info = env.step(torch.zeros(3, 2))
    assert torch.equal(info["final_obs"]["layout"], walls([OPEN, M0, M1]))
    assert torch.equal(obs["layout"], walls([M0, M1, M2]))  # new episodes are on the rows' own layouts
    grid = env.goal_grid(1)
    assert torch.equal(grid.observations["layout"], walls([M1]).expand(len(grid.positions), -1))
    conforms("clbench/PointMaze-v0", observation="layout", max_episode_steps=20).raise_if_failed()


# -- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_a_gpu_gives_the_same_episodes(observation):
    layouts = [str(t) for t in np.random.default_rng(0).choice(all_layouts(), 64)]
    runs = []
    for device in ("cpu", "cuda"):
        env = PointMazeVectorEnv(64, device, observation=observation, layout=layouts, max_episode_steps=20)
        first, _ = env.reset(seed=0)
        runs.append([*first.values(), *rollout(env, actions_of(64, 50).to(device))])
    for cpu, cuda in zip(*runs, strict=True):
        torch.testing.assert_close(
            cuda.cpu().float(), cpu.float(), atol=2 if cpu.dtype == torch.uint8 else 1e-3, rtol=0
        )
