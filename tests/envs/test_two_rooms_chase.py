"""The chaser's path against a visibility graph, steps against slow scalar ones, and the environment contract."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import clbench.envs  # noqa: F401 (registers the ids)
from clbench.envs.two_rooms import TwoRoomsVectorEnv, dot_position, is_free, make_layout, render_pixels, stop_at_walls
from clbench.envs.two_rooms_chase import TwoRoomsChaseVectorEnv, shortest_path, walk
from clbench.envs.two_rooms_data import two_rooms
from clbench.errors import ConfigError, ContractError
from clbench.testing import check_env as check_batched_env

# -- the shortest path, slowly: a visibility graph of both points and the four corners of the door ---------------------


def sees(p, q, left, right, upper, lower):
    """Whether the segment stays out of the wall: the part within the open strip must be between the jambs."""
    (x0, y0), (x1, y1) = sorted([p, q])
    if x1 <= left or x0 >= right:
        return True
    begin, end = max(x0, left), min(x1, right)
    heights = [y0, y1] if x0 == x1 else [y0 + (x - x0) / (x1 - x0) * (y1 - y0) for x in (begin, end)]
    return all(upper - 1e-9 <= y <= lower + 1e-9 for y in heights)


def slow_path(start, end, faces):
    """Points of the shortest polyline (Bellman-Ford over six nodes) and its length."""
    left, right, upper, lower = faces
    nodes = [start, end, *((x, y) for x in (left, right) for y in (upper, lower))]
    length, via = {0: 0.0}, {}
    for _ in nodes:
        for i in list(length):
            for j, node in enumerate(nodes):
                total = length[i] + math.dist(nodes[i], node)
                if total < length.get(j, math.inf) - 1e-12 and sees(nodes[i], node, *faces):
                    length[j], via[j] = total, i
    path, at = [], 1
    while at:
        path.append(nodes[at])
        at = via[at]
    return [start, *path[::-1]], length[1]


def slow_walk(path, distance):
    for p, q in zip(path, path[1:], strict=False):
        length = math.dist(p, q)
        if distance < length:
            return tuple(a + distance / length * (b - a) for a, b in zip(p, q, strict=True))
        distance -= length
    return path[-1]


def points(count, layout, rng):
    """In free space: anywhere, close to the door, in it, on faces, on the border and at corners."""
    (left, upper), (right, lower) = (face.numpy() for face in layout)
    kind = rng.integers(8, size=count)
    x, y = rng.uniform(4, 60, (2, count))
    side = np.where(rng.uniform(size=count) < 0.5, left, right)
    jamb = np.where(rng.uniform(size=count) < 0.5, upper, lower)
    x = np.where(
        kind == 0, side, np.where((kind == 1) | (kind == 2), left + (right - left) * rng.uniform(size=count), x)
    )
    y = np.where(kind == 1, upper + (lower - upper) * rng.uniform(size=count), np.where(kind == 2, jamb, y))
    x, y = np.where(kind == 3, side, x), np.where(kind == 3, jamb, y)
    x = np.where(kind == 4, side + rng.uniform(-3, 3, count), x)
    x = np.where(kind == 5, rng.choice([4.0, 60.0], count), x)
    found = torch.from_numpy(np.stack([x, y])).float().double()
    trapped = ~is_free(found, layout)
    found[0] = torch.where(trapped, torch.from_numpy(side), found[0])
    assert bool(is_free(found, layout).all())
    return found


def cases(count, seed=0):
    rng = np.random.default_rng(seed)
    layout = make_layout(rng.choice([32.0, 20.0, 25.3, 44.9], count), rng.choice([10.0, 33.3, 54.9], count))
    start, end = points(count, layout, rng), points(count, layout, rng)
    same = torch.from_numpy(rng.uniform(size=count) < 0.02)
    return start, torch.where(same, start, end), layout


def lengths_of(path):
    return (path[1:] - path[:-1]).norm(dim=1).sum(0)


def compare_paths(path_of, count=6000):
    """Length of every path against the graph's, and every piece of it free."""
    start, end, layout = cases(count)
    path = path_of(start, end, layout)
    faces = torch.stack([layout.low[0], layout.high[0], layout.low[1], layout.high[1]], 1).tolist()
    slow = [
        slow_path(tuple(s), tuple(e), f)[1] for s, e, f in zip(start.t().tolist(), end.t().tolist(), faces, strict=True)
    ]
    torch.testing.assert_close(lengths_of(path), torch.tensor(slow, dtype=torch.float64), atol=1e-9, rtol=0)
    for share in torch.linspace(0, 1, 41, dtype=torch.float64):
        between = path[:-1] + share * (path[1:] - path[:-1])
        for piece in between.float().double():  # as the environment stores it
            assert bool(is_free(piece, layout).all())
    return path


def test_the_path_is_as_short_as_that_of_a_visibility_graph_and_free():
    path = compare_paths(shortest_path)
    bends = (lengths_of(path) - (path[-1] - path[0]).norm(dim=0)) > 1e-6
    assert 0.2 < float(bends.double().mean()) < 0.8  # the cases are of both kinds


def through_walls(start, end, layout):
    """Broken: the straight line."""
    return torch.stack([start, end, end, end])


def by_the_middle_of_the_door(start, end, layout):
    """Broken: free, but longer than needed."""
    path = shortest_path(start, end, layout)
    middle = ((layout.low[1] + layout.high[1]) / 2).expand_as(path[1, 1])
    at_face = (path[1:3, 0] == layout.low[0]) | (path[1:3, 0] == layout.high[0])
    crosses = (lengths_of(path) > (end - start).norm(dim=0) + 1e-9) & at_face.all(0)
    path[1:3, 1] = torch.where(crosses, middle, path[1:3, 1])
    return path


def nearest_heights(start, end, layout):
    """Broken: both heights of the straight line, each moved into the door by itself."""
    path = shortest_path(start, end, layout)
    x = path[1:3, 0]
    line = start[1] + (x - start[0]) / (end[0] - start[0]) * (end[1] - start[1])
    crosses = lengths_of(path) > (end - start).norm(dim=0) + 1e-9
    path[1:3, 1] = torch.where(crosses, line.clamp(layout.low[1], layout.high[1]), path[1:3, 1])
    return path


@pytest.mark.parametrize("broken", [through_walls, by_the_middle_of_the_door, nearest_heights])
def test_the_comparison_catches_broken_paths(broken):
    with pytest.raises(AssertionError):
        compare_paths(broken, 1000)


def check_walk(walk, speed):
    """Free, at most ``speed`` from the start, and that much closer along the shortest path."""
    start, end, layout = cases(20_000, seed=1)
    path = shortest_path(start, end, layout)
    moved = walk(path, speed).float().double()
    assert bool(is_free(moved, layout).all())
    assert (moved - start).norm(dim=0).max() <= speed + 1e-5
    whole = lengths_of(path)
    rest = lengths_of(shortest_path(moved, end, layout))
    torch.testing.assert_close(rest, (whole - speed).clamp(min=0), atol=2e-5, rtol=0)


@pytest.mark.parametrize("speed", [0.0, 0.8, 1.8, 5.0, 100.0])
def test_a_step_is_free_no_longer_than_allowed_and_all_of_it_progress(speed):
    check_walk(walk, speed)


def past_the_corner(path, distance):
    """Broken: goes on in the direction of the first piece."""
    step = path[1] - path[0]
    return path[0] + step * (distance / step.norm(dim=0).clamp(min=1e-9)).clamp(max=3)


def stops_at_the_corner(path, distance):
    """Broken: one piece per step."""
    step = path[1] - path[0]
    return path[0] + step * (distance / step.norm(dim=0).clamp(min=1e-9)).clamp(max=1)


@pytest.mark.parametrize("broken", [past_the_corner, stops_at_the_corner, lambda p, d: walk(p, 1.05 * d)])
def test_the_check_of_steps_catches_broken_ones(broken):
    with pytest.raises(AssertionError):
        check_walk(broken, 1.8)


# -- the environment against a slow step ------------------------------------------------------------------------------


def compare_steps(cls, speed, steps=60):
    """Each step of the batch against one in Python floats: agent first, then chaser, then the verdict."""
    env = cls(24, autoreset="disabled", chaser_speed=speed, wall_x=30.0, door_y=30.0)
    env.reset(seed=0)
    faces = (29.0, 31.0, 26.0, 34.0)
    layout = make_layout(30.0, 30.0)
    generator = torch.Generator().manual_seed(0)
    ends = 0
    for _ in range(steps):
        before = env.state_dict()
        noise = torch.randn(24, 2, generator=generator)
        towards = (before["goal"] - before["position"]).t() * torch.rand(24, 1, generator=generator) * 0.3
        action = (noise + towards).clamp(-1.8, 1.8)  # half of them run into the chaser's arms
        _, reward, terminated, _, info = env.step(action)
        after = env.state_dict()
        for row in range(24):
            x, y = action[row].tolist()
            norm = math.hypot(x, y)
            cut = torch.tensor([[x], [y]], dtype=torch.float64) * min(1.0, 1.84 / norm)
            agent = stop_at_walls(before["position"][:, row : row + 1].double(), cut, layout).float()[:, 0].tolist()
            path, _ = slow_path(tuple(before["goal"][:, row].tolist()), tuple(agent), faces)
            chaser = slow_walk(path, speed)
            assert math.dist(after["position"][:, row].tolist(), agent) < 1e-5
            assert math.dist(after["goal"][:, row].tolist(), chaser) < 1e-5
            distance = math.dist(agent, chaser)
            if abs(distance - 1.4) > 1e-4:
                caught = distance < 1.4
                assert (bool(terminated[row]), bool(info["is_success"][row])) == (caught, not caught)
                assert reward[row] == (0.0 if caught else 1.0)
        ends += int(terminated.sum())
        env.reset(options={"reset_mask": terminated})
    assert ends > 10


@pytest.mark.parametrize("speed", [0.8, 1.8])
def test_every_step_equals_the_slow_one(speed):
    compare_steps(TwoRoomsChaseVectorEnv, speed)


class ChaserFirst(TwoRoomsChaseVectorEnv):
    """Broken: the chaser moves to where the agent was."""

    def _move(self, action):
        was = self._position.clone()
        chaser = self._goal.double()
        super()._move(action)
        self._goal = walk(shortest_path(chaser, was.double(), self._layout), self.chaser_speed).float()


class Fast(TwoRoomsChaseVectorEnv):
    """Broken: the chaser is faster than it should be."""

    def _move(self, action):
        self.chaser_speed *= 1.001
        super()._move(action)


class LongArms(TwoRoomsChaseVectorEnv):
    """Broken: catches at the distance at which goals count as reached."""

    def _outcome(self):
        caught = torch.hypot(*(self._position - self._goal)) < math.sqrt(2)
        return ~caught, 1 - caught.float(), caught


class Unbounded(TwoRoomsChaseVectorEnv):
    """Broken: actions of any length."""

    def _move(self, action):
        TwoRoomsVectorEnv._move(self, action)
        agent, chaser = self._position.double(), self._goal.double()
        self._goal = walk(shortest_path(chaser, agent, self._layout), self.chaser_speed).float()


@pytest.mark.parametrize("broken", [ChaserFirst, Fast, LongArms, Unbounded])
def test_the_comparison_catches_broken_environments(broken):
    with pytest.raises(AssertionError):
        compare_steps(broken, 1.8, steps=200)


@pytest.mark.parametrize("speed", [0.8, 1.3, 1.8])
def test_who_stands_still_is_caught_when_the_path_has_been_walked(speed):
    env = TwoRoomsChaseVectorEnv(300, autoreset="disabled", chaser_speed=speed)
    obs, info = env.reset(seed=3)
    assert info["is_success"].all()
    path = shortest_path(obs["desired_goal"].t().double(), obs["observation"].t().double(), make_layout(32.0, 10.0))
    # starts are 2.6 pixels off every wall, so at 1.4 pixels there is no corner between the two
    expected = ((lengths_of(path) - 1.4) / speed).floor() + 1
    lasted = torch.zeros(300)
    alive = torch.ones(300, dtype=torch.bool)
    for step in range(1, 101):
        _, _, terminated, truncated, info = env.step(torch.zeros(300, 2))
        lasted = torch.where(alive & terminated, step, lasted)
        alive &= ~terminated
        assert bool(truncated.all()) == (step == 100)
    assert torch.equal(info["is_success"][alive], torch.ones(int(alive.sum()), dtype=torch.bool))
    assert torch.equal(torch.where(alive, 101, lasted), expected.clamp(max=101).float())
    assert 0 < int(alive.sum()) < 300 or speed > 1


def test_actions_are_cut_to_their_largest_norm_and_keep_their_direction():
    env = TwoRoomsChaseVectorEnv(4, autoreset="disabled", chaser_speed=0.0)
    start = torch.tensor([[15.0, 40.0]] * 4)
    env.reset(seed=0, options={"start": start, "chaser": torch.tensor([[50.0, 40.0]] * 4)})
    actions = torch.tensor([[1.8, 1.8], [-30.0, 40.0], [0.5, -0.25], [0.0, 0.0]])
    moved = env.step(actions)[0]["observation"] - start
    expected = torch.tensor([[1.84 / math.sqrt(2)] * 2, [-1.104, 1.472], [0.5, -0.25], [0.0, 0.0]])
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_nobody_gets_through_walls_or_far_in_one_step():
    env = TwoRoomsChaseVectorEnv(200, chaser_speed=1.2, wall_x=[20.0, 44.9] * 100, door_y=[54.9, 33.3] * 100)
    layout = make_layout(env.wall_x, env.door_y)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        before = env.state_dict()["goal"]
        ended = env.step((torch.rand(200, 2, generator=generator) * 2 - 1) * 3)[4]["_final_obs"]
        state = env.state_dict()
        for key in ("position", "goal"):
            assert bool(is_free(state[key].double(), layout).all())
        assert (state["goal"] - before).norm(dim=0)[~ended].max() <= 1.2 + 1e-5


# -- the environment contract -----------------------------------------------------------------------------------------


def actions_of(num_envs, steps, seed=0):
    return (torch.rand(steps, num_envs, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * 1.8


def rollout(env, actions):
    """Everything that steps return, in one flat list of tensors."""
    out = []
    for a in actions:
        obs, reward, terminated, truncated, info = env.step(a)
        out += [*obs.values(), reward, terminated, truncated, info["is_success"]]
    return out


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kwargs", [{"chaser_speed": 1.8}, {"observation": "pixels"}, {"collision": "noisy"}])
def test_conformance(kwargs):
    check_batched_env("clbench/TwoRoomsChase-v0", success=True, **kwargs).raise_if_failed()


def test_two_rooms_with_a_goal_sign_has_the_same_spaces_and_is_otherwise_the_same():
    chase, signed, plain = (
        TwoRoomsChaseVectorEnv(2), TwoRoomsVectorEnv(2, goal_sign=True), TwoRoomsVectorEnv(2)
    )  # fmt: skip
    assert chase.single_observation_space == signed.single_observation_space
    assert chase.single_action_space == signed.single_action_space
    assert "goal_sign" not in plain.single_observation_space.spaces
    first, second = signed.reset(seed=1)[0], plain.reset(seed=1)[0]
    assert chase.reset(seed=1)[0]["goal_sign"].tolist() == [[-1.0], [-1.0]]
    for action in actions_of(2, 5):
        assert first.pop("goal_sign").tolist() == [[1.0], [1.0]]
        assert equal(list(first.values()), list(second.values()))
        first, second = signed.step(action)[0], plain.step(action)[0]
    check_batched_env("clbench/TwoRooms-v0", goal_sign=True).raise_if_failed()


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_data_with_a_goal_sign_agree_with_the_environment(observation):
    signed = two_rooms(transitions=100, steps=40, observation=observation, goal_sign=True)
    plain = two_rooms(transitions=100, steps=40, observation=observation)
    assert (
        set(signed.observations) == {"observation", "achieved_goal", "goal_sign"} == {"goal_sign", *plain.observations}
    )
    rows = torch.arange(100)
    assert torch.equal(signed.observation(rows)["goal_sign"], torch.ones(100, 1))
    assert torch.equal(signed.next_observation(rows)["goal_sign"], torch.ones(100, 1))
    assert torch.equal(signed.observation(rows)["observation"], plain.observation(rows)["observation"])
    assert signed.metadata == {**plain.metadata, "goal_sign": True}


@pytest.mark.filterwarnings("ignore:.*normalized.*")  # actions are displacements in pixels, on purpose
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_single_env_passes_both_checkers(observation):
    env = gymnasium.make("clbench/TwoRoomsChase-v0", observation=observation, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(env)
    picture = env.render()
    assert picture.shape == (260, 260, 3)
    assert {(214, 39, 40), (31, 119, 180)} <= {tuple(c) for c in picture.reshape(-1, 3).tolist()}


def test_registered_single_and_batched():
    env = gymnasium.make("clbench/TwoRoomsChase-v0", chaser_speed=0.0)
    env.reset(seed=0, options={"start": [6.0, 6.0], "chaser": [50.0, 50.0]})
    steps = [env.step(np.zeros(2, np.float32)) for _ in range(100)]
    assert not any(s[2] or s[3] for s in steps[:-1])
    assert steps[-1][2:4] == (False, True)
    assert steps[-1][4]["is_success"] is True
    batch = gymnasium.make_vec("clbench/TwoRoomsChase-v0", num_envs=2)
    assert isinstance(batch, TwoRoomsChaseVectorEnv)
    assert batch.max_episode_steps == 100


def test_an_episode_is_a_function_of_its_seed_whatever_the_batch():
    actions = actions_of(5, 150)
    big = TwoRoomsChaseVectorEnv(5, chaser_speed=1.8, max_episode_steps=60)
    big.reset(seed=[7, 8, 9, 10, 11])
    together = rollout(big, actions)
    one = TwoRoomsChaseVectorEnv(1, chaser_speed=1.8, max_episode_steps=60)
    one.reset(seed=[9])
    assert equal([v[2:3] for v in together], rollout(one, actions[:, 2:3]))
    single = gymnasium.make("clbench/TwoRoomsChase-v0", chaser_speed=1.8).unwrapped
    obs, _ = single.reset(seed=9)
    one = TwoRoomsChaseVectorEnv(1, chaser_speed=1.8)
    batched = one.reset(seed=[9])[0]
    for action in actions[:30, 2]:
        assert all(np.array_equal(obs[k], batched[k][0].numpy()) for k in batched)
        obs, reward, terminated, *_ = single.step(action.numpy())
        batched, rewards, terminations, *_ = one.step(action[None])
        assert (reward, terminated) == (float(rewards[0]), bool(terminations[0]))


def test_pixels_show_the_chaser_as_the_goal_in_every_step():
    actions = actions_of(3, 40, seed=5)
    states, pixels = (
        TwoRoomsChaseVectorEnv(3, observation=o, max_episode_steps=15, chaser_speed=1.5) for o in ("state", "pixels")
    )
    columns = {"wall_x": torch.full((3,), 32.0), "door_y": torch.full((3,), 10.0)}
    first, second = states.reset(seed=0)[0], pixels.reset(seed=0)[0]
    shown = set()
    for action in actions:
        for key in ("observation", "desired_goal"):
            assert torch.equal(render_pixels({"position": first[key], **columns}), second[key])
        shown.add(tuple(first["desired_goal"][0].tolist()))
        (first, *_, info), (second, *_, other) = states.step(action), pixels.step(action)
        final = info["final_obs"]["desired_goal"]
        assert torch.equal(render_pixels({"position": final, **columns}), other["final_obs"]["desired_goal"])
    assert len(shown) == 40  # it moves all the time


def test_same_step_autoreset_keeps_the_last_observation():
    env = TwoRoomsChaseVectorEnv(2, chaser_speed=1.0, max_episode_steps=2)
    start, chaser = torch.tensor([[10.0, 30.0], [10.0, 30.0]]), torch.tensor([[12.0, 30.0], [20.0, 30.0]])
    env.reset(seed=0, options={"start": start, "chaser": chaser})
    obs, reward, terminated, truncated, info = env.step(torch.zeros(2, 2))
    assert terminated.tolist() == info["_final_obs"].tolist() == [True, False]
    assert info["is_success"].tolist() == [False, True]
    assert reward.tolist() == [0.0, 1.0]
    assert info["final_obs"]["desired_goal"].tolist() == [[11.0, 30.0], [19.0, 30.0]]
    assert obs["desired_goal"][1].tolist() == [19.0, 30.0]
    assert (obs["desired_goal"][0] - obs["observation"][0]).norm() > 5  # a new episode, in different rooms
    *_, truncated, info = env.step(torch.zeros(2, 2))
    assert truncated.tolist() == [False, True]
    assert info["is_success"].tolist() == [True, True]


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_state_dict_continues_in_the_middle_of_episodes(observation):
    def make():
        return TwoRoomsChaseVectorEnv(3, observation=observation, chaser_speed=1.6, max_episode_steps=9)

    env, actions = make(), actions_of(3, 40)
    env.reset(seed=0)
    rollout(env, actions[:15])
    state = env.state_dict()
    expected = rollout(env, actions[15:])
    for _ in range(2):
        other = make()
        other.load_state_dict(state)
        assert equal(rollout(other, actions[15:]), expected)
    for name in ("position", "goal", "steps", "episode"):  # each of them matters
        broken = make()
        broken.load_state_dict({**state, name: state[name].flip(-1) + 1})
        assert not equal(rollout(broken, actions[15:]), expected)


@pytest.mark.parametrize("kind", ["state", "pixels"])
def test_compute_reward_is_that_of_the_step(kind):
    env = TwoRoomsChaseVectorEnv(50, autoreset="disabled", observation=kind)
    start = torch.full((50, 2), 45.0)
    chaser = start + torch.linspace(1.2, 3.8, 50)[:, None] * torch.tensor([0.6, 0.8])
    env.reset(seed=0, options={"start": start, "chaser": chaser})
    obs, reward, *_ = env.step(torch.zeros(50, 2))
    found = env.compute_reward(obs["achieved_goal"], obs["desired_goal"])
    points = [dot_position(v) if kind == "pixels" else v for v in (obs["achieved_goal"], obs["desired_goal"])]
    clear = ((points[0] - points[1]).norm(dim=1) - 1.4).abs() > 0.1
    assert torch.equal(found[clear], reward[clear])
    assert {0.0, 1.0} == set(reward[clear].tolist())
    arrays = env.compute_reward(obs["achieved_goal"].numpy(), obs["desired_goal"].numpy(), {})
    assert isinstance(arrays, np.ndarray)
    assert arrays.tolist() == found.tolist()


@pytest.mark.parametrize("speed", [-0.1, math.nan, math.inf, "fast", True])
def test_bad_speeds(speed):
    with pytest.raises(ConfigError, match="chaser_speed must be a number of pixels >= 0"):
        TwoRoomsChaseVectorEnv(1, chaser_speed=speed)


def test_bad_reset_options_and_actions():
    env = TwoRoomsChaseVectorEnv(1)
    with pytest.raises(ContractError, match="call reset before step"):
        env.step(torch.zeros(1, 2))
    with pytest.raises(ConfigError, match=r"the chaser of row 0, \[32.0, 40.0\], is not in a room"):
        env.reset(options={"chaser": [[32.0, 40.0]]})
    with pytest.raises(ConfigError, match="Unknown reset option 'goal' in Two-Rooms. Known: chaser"):
        env.reset(options={"goal": [[10.0, 40.0]]})
    env.reset(seed=0)
    with pytest.raises(ContractError, match="not finite"):
        env.step(torch.tensor([[math.nan, 0.0]]))


def test_there_is_no_controller_towards_a_chaser():
    env = TwoRoomsChaseVectorEnv(1)
    assert env.oracle_actions is None and env.straight_line_actions is None
