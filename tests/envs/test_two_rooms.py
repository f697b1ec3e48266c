"""Two-Rooms: collision rules against slow scalar versions, rendering against the formula, and the environment contract."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import clbench.envs  # noqa: F401 (registers the ids)
from clbench.contracts import VectorEnv
from clbench.data.registry import load_dataset
from clbench.envs.two_rooms import (
    COLLISIONS,
    FramePool,
    TwoRoomsEnv,
    TwoRoomsVectorEnv,
    background,
    cancel_at_walls,
    dot_position,
    goal_reward,
    is_free,
    make_layout,
    noisy_at_walls,
    render_pixels,
    stop_at_walls,
)
from clbench.errors import ConfigError, ContractError, DataError

# -- slow scalar versions of the three rules, in Python floats --------------------------------------------------------


def solid(x, y, wl, wr, d0, d1):
    """Strictly inside a wall, or strictly outside the border."""
    return not (4 <= x <= 60 and 4 <= y <= 60) or (wl < x < wr and not d0 <= y <= d1)


def scalar_stop(x, y, ax, ay, wl, wr, d0, d1, noise):
    """Cut the step where it meets any line of the plan; go to the first piece whose middle is solid."""
    times = {0.0, 1.0}
    for start, move, lines in ((x, ax, (4.0, 60.0, wl, wr)), (y, ay, (4.0, 60.0, d0, d1))):
        if move:
            times |= {t for line in lines if 0 <= (t := (line - start) / move) <= 1}
    cuts = sorted(times)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        middle = (begin + end) / 2
        if solid(x + middle * ax, y + middle * ay, wl, wr, d0, d1):
            return x + begin * ax, y + begin * ay
    return x + ax, y + ay


def scalar_cancel(x, y, ax, ay, wl, wr, d0, d1, noise):
    tx, ty = x + ax, y + ay
    if not (4 <= tx <= 60 and 4 <= ty <= 60):
        return x, y
    for jamb, crosses in ((d1, y <= d1 < ty), (d0, y >= d0 > ty)):
        if crosses and wl <= x + (jamb - y) / ay * ax <= wr:
            return x, y
    begins_inside, ends_inside = wl < x < wr, wl < tx < wr
    if begins_inside != ends_inside:
        outside = tx if begins_inside else x
        faces = [wl if outside <= wl else wr]
    elif (x <= wl and tx >= wr) or (x >= wr and tx <= wl):
        faces = [wl, wr]
    else:
        faces = []
    for face in faces:
        if not d0 <= y + (face - x) / ax * ay <= d1:
            return x, y
    return tx, ty


def scalar_noisy(x, y, ax, ay, wl, wr, d0, d1, noise):
    nx, ny = noise
    tx, ty = x + ax, y + ay

    def clamp(v, low, high):
        return min(max(v, low), high)

    for jamb, crosses, back in ((d1, y <= d1 < ty, -1), (d0, y >= d0 > ty, 1)):
        if crosses:
            at = x + (jamb - y) / ay * ax
            if wl <= at <= wr:
                return clamp(at + nx, 4, 60), clamp(jamb + back * abs(ny), d0, d1)
    left_room = x < (wl + wr) / 2
    box = ((4.0, wl) if left_room else (wr, 60.0)), (4.0, 60.0)
    hole = wl if left_room else wr
    hits = []
    for axis, (p, t, a) in enumerate(((x, tx, ax), (y, ty, ay))):
        for which, side in enumerate(box[axis]):
            if np.sign(p - side) * np.sign(t - side) > 0:
                continue
            time = (side - p) / a if a else 0.0
            if axis == 0 and side == hole and d0 <= y + time * ay <= d1:
                continue
            hits.append((time, axis, which, side))
    if not hits:
        return clamp(tx, 4, 60), clamp(ty, 4, 60)
    time, axis, which, side = min(hits)
    new = [x + time * ax + nx, y + time * ay + ny]
    sign = np.sign((x, y)[axis] - side) or (1 if which == 0 else -1)
    new[axis] = side + sign * abs((nx, ny)[axis])
    for k in (0, 1):
        low, high = box[k]
        if new[k] <= low:
            new[k] = low + 0.3
        elif new[k] >= high:
            new[k] = high - 0.3
    return clamp(new[0], 4, 60), clamp(new[1], 4, 60)


SCALAR = {"stop": scalar_stop, "cancel": scalar_cancel, "noisy": scalar_noisy}


def cases(count, seed=0):
    """Starts in free space, half of them on a face, at a corner or in the doorway; short, long and axis-parallel steps."""
    rng = np.random.default_rng(seed)
    wall = rng.choice([32.0, 20.0, 25.3, 44.9], count)
    door = rng.choice([10.0, 33.3, 54.9], count)
    layout = make_layout(wall, door)
    (wl, d0), (wr, d1) = (face.numpy() for face in layout)
    kind = rng.integers(10, size=count)
    x = rng.uniform(4, 60, count)
    y = rng.uniform(4, 60, count)
    x = np.where(kind == 0, wl, np.where(kind == 1, wr, x))  # on a face of the wall
    x = np.where(kind == 2, rng.choice([4.0, 60.0], count), x)  # on the border
    y = np.where(kind == 3, rng.choice([4.0, 60.0], count), y)
    x = np.where((kind == 4) | (kind == 5), wl + (wr - wl) * rng.uniform(size=count), x)  # in the doorway
    x = np.where(kind == 6, np.where(rng.uniform(size=count) < 0.5, wl, wr), x)  # at a corner of the door
    y = np.where(kind == 4, d0 + (d1 - d0) * rng.uniform(size=count), y)
    y = np.where((kind == 5) | (kind == 6), np.where(rng.uniform(size=count) < 0.5, d0, d1), y)  # at a jamb
    near = kind == 7  # so close to the wall that most steps meet it
    x = np.where(near, np.where(rng.uniform(size=count) < 0.5, wl, wr) + rng.uniform(-2, 2, count), x)
    y = np.where(near, np.where(rng.uniform(size=count) < 0.5, d0, d1) + rng.uniform(-3, 3, count), y)
    position = torch.from_numpy(np.stack([x, y])).float().double()
    trapped = ~is_free(position, layout)
    position[0] = torch.where(trapped, layout.low[0], position[0])
    position[1] = position[1].clamp(4, 60)
    size = np.where(rng.uniform(size=count) < 0.25, 80.0, 1.8)
    action = rng.uniform(-1, 1, (2, count)) * size
    action[:, rng.uniform(size=count) < 0.05] = 0.0
    action[0, rng.uniform(size=count) < 0.1] = -0.0
    action[1, rng.uniform(size=count) < 0.1] = 0.0
    action = torch.from_numpy(action).float().double()
    noise = torch.from_numpy(rng.normal(0, 0.5, (2, count)))
    assert bool(is_free(position, layout).all())
    return position, action, layout, noise


def compare(rule, scalar, position, action, layout, noise):
    """Every row of the batched rule, rounded to float32 as the environment does, against the scalar rule."""
    batched = rule(position, action, layout, noise).float().double()
    inputs = (
        torch.cat([position, action, layout.low[:1], layout.high[:1], layout.low[1:], layout.high[1:]]).t().tolist()
    )
    expected = torch.tensor([scalar(*row, n) for row, n in zip(inputs, noise.t().tolist(), strict=True)]).t()
    error = (batched - expected).abs().amax(0)
    worst = int(error.argmax())
    # float32 rounding of a coordinate up to 60 is 2e-6; the scalar result is not rounded
    assert error[worst] < 3e-6, (inputs[worst], batched[:, worst].tolist(), expected[:, worst].tolist())


@pytest.mark.parametrize(("name", "count"), [("stop", 100_000), ("cancel", 30_000), ("noisy", 30_000)])
def test_collision_rule_equals_the_slow_scalar_one(name, count):
    compare(COLLISIONS[name], SCALAR[name], *cases(count))


def test_stop_equals_the_scalar_rule_where_lines_meet_corners_exactly():
    # halves and whole numbers: many steps run through corners and along faces, without rounding
    rng = np.random.default_rng(1)
    count = 20_000
    layout = make_layout(np.full(count, 32.0), np.full(count, 10.0))
    position = torch.from_numpy(rng.integers(2 * 27, 2 * 37, (2, count)) / 2)
    position[1] = torch.from_numpy(rng.integers(8, 40, count) / 2)
    action = torch.from_numpy(rng.integers(-8, 9, (2, count)) / 2)
    free = is_free(position, layout)
    layout = type(layout)(layout.low[:, free], layout.high[:, free])
    compare(stop_at_walls, scalar_stop, position[:, free], action[:, free], layout, torch.zeros(2, int(free.sum())))


def tunnels(position, action, layout, noise):
    """Broken: looks only at where the step ends."""
    target = position + action
    return torch.where(is_free(target, layout), target, stop_at_walls(position, action, layout))


def sticks(position, action, layout, noise):
    """Broken: on a face there is no way off."""
    moved = stop_at_walls(position, action, layout)
    return torch.where((position == layout.low).any(0), position, moved)


def no_jambs(position, action, layout, noise):
    """Broken: from the doorway one may walk into the wall."""
    inside = (position[0] > layout.low[0]) & (position[0] < layout.high[0])
    return torch.where(inside, (position + action).clamp(4, 60), stop_at_walls(position, action, layout))


@pytest.mark.parametrize("broken", [tunnels, sticks, no_jambs, cancel_at_walls])
def test_the_comparison_catches_broken_rules(broken):
    with pytest.raises(AssertionError):
        compare(broken, scalar_stop, *cases(2000))


@pytest.mark.parametrize("name", COLLISIONS)
def test_no_rule_ever_enters_a_wall(name):
    position, action, layout, noise = cases(100_000, seed=2)
    for _ in range(5):
        position = COLLISIONS[name](position, action, layout, noise).float().double()
        assert bool(is_free(position, layout).all())
        action = action.roll(1, 1)


coordinate = st.floats(4, 60, width=32)
move = st.floats(-100, 100, width=32) | st.floats(-2, 2, width=32) | st.just(0.0)


@settings(max_examples=300, deadline=None)
@given(coordinate, coordinate, move, move, st.floats(20, 44.75, width=32), st.floats(10, 54.75, width=32))
def test_stop_moves_along_the_line_and_through_the_door_only(x, y, ax, ay, wall, door):
    layout = make_layout(wall, door)
    start, action = torch.tensor([[x], [y]], dtype=torch.float64), torch.tensor([[ax], [ay]], dtype=torch.float64)
    if not bool(is_free(start, layout)):
        start[0] = layout.low[0]
    end = stop_at_walls(start, action, layout).float().double()
    assert bool(is_free(end, layout))
    step = end - start
    assert step.norm() <= action.norm() + 1e-5
    cross = step[0] * action[1] - step[1] * action[0]
    assert cross.abs() <= 1e-5 * (1 + action.norm())  # on the line of the action
    assert (step * action).sum() >= -1e-5 * (1 + action.norm())  # not backwards
    sides = sorted([(float(start[0]), float(start[1])), (float(end[0]), float(end[1]))])
    wl, wr = float(layout.low[0]), float(layout.high[0])
    if sides[0][0] <= wl and sides[1][0] >= wr:  # from room to room
        (x0, y0), (x1, y1) = sides
        for face in (wl, wr):
            assert door - 4 - 1e-4 <= y0 + (y1 - y0) * (face - x0) / (x1 - x0) <= door + 4 + 1e-4


def test_stop_on_a_face_can_slide_and_leave():
    layout = make_layout(32, 10)
    for action, end in (((0.0, 1.0), (31.0, 41.0)), ((-1.0, 0.5), (30.0, 40.5)), ((1.0, 0.5), (31.0, 40.0))):
        moved = stop_at_walls(torch.tensor([[31.0], [40.0]]).double(), torch.tensor(action)[:, None].double(), layout)
        assert moved[:, 0].tolist() == list(end)


def test_stop_snaps_onto_faces_that_float32_cannot_hit_by_adding():
    position, action, layout, _ = cases(20_000, seed=3)
    action[0] = action[0].abs() + 60
    action[1] *= 0.01
    from_left = (position[0] < layout.low[0]) & ((position[1] < layout.low[1] - 1) | (position[1] > layout.high[1] + 1))
    from_left &= (position[1] > 5) & (position[1] < 59)  # does not meet the border first
    end = stop_at_walls(position, action, layout)
    assert int(from_left.sum()) > 1000
    assert torch.equal(end[0][from_left], layout.low[0][from_left])
    again = stop_at_walls(end.float().double(), action, layout)  # pressing on does not tunnel
    assert torch.equal(again[0][from_left], layout.low[0][from_left])


# -- pictures ---------------------------------------------------------------------------------------------------------


def brute_force(x, y, wall, door):
    """The formulas of the specification, pixel by pixel."""
    frame = np.zeros((2, 65, 65), np.uint8)
    for v in range(65):
        for u in range(65):
            r2 = (u - x) ** 2 + (v - y) ** 2
            frame[0, v, u] = math.floor(min(max(255 * math.exp(-r2 / (2 * 1.3**2)), 0), 255))
            in_wall = abs(u - wall) <= 1 and abs(v - door) > 4
            frame[1, v, u] = 255 if in_wall or u in (4, 60) or v in (4, 60) else 0
    return frame


def test_pixels_equal_the_formula():
    rng = np.random.default_rng(0)
    points = [(4.0, 4.0), (60.0, 60.0), (31.0, 10.5), (20.0, 30.0), *rng.uniform(4, 60, (12, 2)).tolist()]
    points = np.asarray(points, np.float32)
    walls = np.asarray([32, 20, 44.5, 25] * 4, np.float32)
    doors = np.asarray([10, 54, 33.25, 12] * 4, np.float32)
    columns = {"position": points, "wall_x": walls, "door_y": doors}
    frames = render_pixels({k: torch.from_numpy(v) for k, v in columns.items()}).numpy()
    assert frames.shape == (16, 2, 65, 65)
    for frame, (x, y), wall, door in zip(
        frames, points.astype(float), walls.astype(float), doors.astype(float), strict=True
    ):
        np.testing.assert_array_equal(frame, brute_force(x, y, wall, door))


def test_dot_peaks_at_255_on_a_pixel_centre_at_row_y_column_x():
    frame = render_pixels({"position": torch.tensor([[20.0, 41.0]]), "wall_x": torch.tensor([32.0]),
                           "door_y": torch.tensor([10.0])})[0, 0]  # fmt: skip
    assert frame.max() == 255
    assert frame[41, 20] == 255
    assert int((frame == 255).sum()) == 1


def test_reference_wall_has_three_columns_and_a_door_of_nine_rows():
    plane = background(torch.tensor([32.0]), torch.tensor([10.0]))[0, 1]
    assert plane[30, 5:60].nonzero().flatten().tolist() == [26, 27, 28]  # columns 31, 32, 33
    assert (plane[5:60, 32] == 0).nonzero().flatten().tolist() == list(range(1, 10))  # rows 6 to 14


def test_dot_position_reads_the_state_back():
    position = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 56 + 4
    frames = render_pixels(
        {"position": position, "wall_x": torch.full((2000,), 32.0), "door_y": torch.full((2000,), 10.0)}
    )
    assert (dot_position(frames) - position).abs().max() < 0.1


def test_frame_memory_is_reused_only_when_nothing_refers_to_it():
    pool = FramePool(2, torch.device("cpu"))
    zero, one = torch.zeros(2, 2, 65, 65, dtype=torch.uint8), torch.ones(1, 2, 65, 65, dtype=torch.uint8)
    first = pool.copy_of(zero)
    address = first.data_ptr()
    for keep in (first[1:], first.view(-1), first.numpy()[0]):  # any view keeps it, whatever else is dropped
        del first
        second = pool.copy_of(one)
        assert second.data_ptr() != address
        assert not keep.any()
        del second
        first = keep if isinstance(keep, torch.Tensor) else torch.from_numpy(keep)
    del first, keep
    third, fourth = pool.copy_of(one), pool.copy_of(one)
    assert address in (third.data_ptr(), fourth.data_ptr())
    assert third.data_ptr() != fourth.data_ptr()


# -- the environment --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_protocol_spaces_shapes_and_dtypes(observation):
    env = TwoRoomsVectorEnv(3, observation=observation)
    assert isinstance(env, VectorEnv)
    obs, _ = env.reset(seed=0)
    assert set(obs) == {"observation", "achieved_goal", "desired_goal"}
    for _ in range(3):
        for row in range(3):
            assert env.single_observation_space.contains({k: v[row].numpy() for k, v in obs.items()})
        assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})
        obs, reward, terminated, truncated, _ = env.step(np.asarray(env.action_space.sample()))
    assert reward.dtype == torch.float32
    assert terminated.dtype == truncated.dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == (3,)


def test_make_vec_gives_the_batched_class_without_warnings(recwarn):
    env = gymnasium.make_vec("clbench/TwoRooms-v0", num_envs=4)
    assert isinstance(env, TwoRoomsVectorEnv)
    assert env.num_envs == 4
    assert env.max_episode_steps == 200
    assert [w for w in recwarn if "autoreset" in str(w.message).lower()] == []


@pytest.mark.filterwarnings("ignore:.*normalized.*")  # actions are displacements in pixels, on purpose
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_single_env_passes_both_checkers(observation):
    env = gymnasium.make("clbench/TwoRooms-v0", observation=observation, render_mode="rgb_array").unwrapped
    check_env(env)
    sb3_check_env(env)
    assert env.render().shape == (260, 260, 3)


def test_gymnasium_make_truncates_after_200_steps():
    env = gymnasium.make("clbench/TwoRooms-v0")
    env.reset(seed=0, options={"start": [6.0, 6.0], "goal": [50.0, 50.0]})
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(200)]
    assert not any(t or s for t, s in ends[:-1])
    assert ends[-1] == (False, True)


@pytest.mark.parametrize("collision", COLLISIONS)
def test_an_episode_is_a_function_of_its_seed_whatever_the_batch(collision):
    actions = actions_of(5, 40)
    big = TwoRoomsVectorEnv(5, collision=collision, max_episode_steps=30)
    big.reset(seed=[7, 8, 9, 10, 11])
    together = rollout(big, actions)
    one = TwoRoomsVectorEnv(1, collision=collision, max_episode_steps=30)
    one.reset(seed=[9])
    alone = rollout(one, actions[:, 2:3])
    assert equal([v[2:3] for v in together], alone)


def test_one_seed_for_the_batch_gives_rows_that_differ_and_do_not_depend_on_their_number():
    first = TwoRoomsVectorEnv(6).reset(seed=3)[0]["observation"]
    again = TwoRoomsVectorEnv(2).reset(seed=3)[0]["observation"]
    assert torch.equal(first[:2], again)
    assert len(first.unique(dim=0)) == 6
    assert not torch.equal(first, TwoRoomsVectorEnv(6).reset(seed=4)[0]["observation"])


def test_starts_and_goals_are_uniform_in_different_rooms():
    env = TwoRoomsVectorEnv(20_000, wall_x=25.0)
    obs, info = env.reset(seed=0)
    start, goal = obs["observation"], obs["desired_goal"]
    swap = start[:, 0] > 25
    left, right = torch.where(swap[:, None], goal, start), torch.where(swap[:, None], start, goal)
    for points, low, high in ((left, 6.6, 21.4), (right, 28.6, 57.4)):
        scaled = (points[:, 0] - low) / (high - low)
        assert scaled.min() >= 0
        assert scaled.max() <= 1 + 1e-6
        # moments of the uniform distribution, within 4 standard errors
        assert abs(scaled.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20_000)
        assert abs(scaled.var() - 1 / 12) < 0.003
        assert points[:, 1].min() >= 6.6 - 1e-5
        assert points[:, 1].max() <= 57.4 + 1e-5
    assert abs(swap.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(20_000)
    assert not info["is_success"].any()


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_same_step_autoreset_keeps_the_last_observation(observation):
    env = TwoRoomsVectorEnv(3, observation=observation, max_episode_steps=4)
    start = torch.tensor([[10.0, 30.0], [10.0, 30.0], [10.0, 30.0]])
    goal = torch.tensor([[12.0, 30.0], [50.0, 30.0], [50.0, 30.0]])
    first, _ = env.reset(seed=0, options={"start": start, "goal": goal})
    kept = {k: v.clone() for k, v in first.items()}
    obs, reward, terminated, truncated, info = env.step(torch.tensor([[1.0, 0.0]] * 3))
    assert terminated.tolist() == info["is_success"].tolist() == info["_final_obs"].tolist() == [True, False, False]
    assert reward.tolist() == [0.0, -1.0, -1.0]
    assert not truncated.any()
    final = info["final_obs"]
    where = final["observation"] if observation == "state" else dot_position(final["observation"])
    torch.testing.assert_close(where, torch.tensor([[11.0, 30.0]] * 3), atol=0.1, rtol=0)
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
    layout = {"wall_x": [32.0, 25.0, 40.0, 22.5], "door_y": [10.0, 30.0, 50.0, 20.0]}
    states, pixels = (TwoRoomsVectorEnv(4, observation=o, max_episode_steps=7, **layout) for o in ("state", "pixels"))
    columns = {k: torch.tensor(v) for k, v in layout.items()}
    first, second = states.reset(seed=0)[0], pixels.reset(seed=0)[0]
    for a in actions:
        for key in first:
            assert torch.equal(render_pixels({"position": first[key], **columns}), second[key])
        (first, *_, info), (second, *_, other) = states.step(a), pixels.step(a)
        final = info["final_obs"]["observation"]
        assert torch.equal(render_pixels({"position": final, **columns}), other["final_obs"]["observation"])


def test_evaluation_mode_leaves_finished_rows_alone():
    env = TwoRoomsVectorEnv(2, autoreset="disabled", max_episode_steps=3)
    env.reset(seed=[1, 2], options={"start": [[10.0, 30.0]] * 2, "goal": [[10.5, 30.0], [50.0, 30.0]]})
    obs, _, terminated, _, info = env.step(torch.zeros(2, 2))
    assert terminated.tolist() == [True, False]
    assert "final_obs" not in info
    assert obs["observation"].tolist() == [[10.0, 30.0]] * 2
    obs, _ = env.reset(seed=[5, 6], options={"reset_mask": torch.tensor([True, False])})
    assert torch.equal(obs["observation"][0], TwoRoomsVectorEnv(1).reset(seed=[5])[0]["observation"][0])
    assert obs["observation"][1].tolist() == [10.0, 30.0]
    env.step(torch.zeros(2, 2))
    truncated = env.step(torch.zeros(2, 2))[3]
    assert truncated.tolist() == [False, True]


def test_success_is_closer_than_sqrt_two_and_need_not_end_the_episode():
    env = TwoRoomsVectorEnv(2, terminate_on_success=False, max_episode_steps=None)
    goal = [[10.0 + math.sqrt(2) - 1e-3, 30.0], [10.0 + math.sqrt(2) + 1e-3, 30.0]]
    _, info = env.reset(options={"start": [[10.0, 30.0]] * 2, "goal": goal})
    assert info["is_success"].tolist() == [True, False]
    _, reward, terminated, truncated, info = env.step(torch.zeros(2, 2))
    assert info["is_success"].tolist() == [True, False]
    assert reward.tolist() == [0.0, -1.0]
    assert not terminated.any()
    assert not truncated.any()


@pytest.mark.parametrize("collision", ["stop", "noisy"])
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_state_dict_continues_in_the_middle_of_episodes(observation, collision):
    def make():
        return TwoRoomsVectorEnv(3, observation=observation, collision=collision, max_episode_steps=9)

    env, actions = make(), actions_of(3, 40)
    env.reset(seed=0)
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
    for name in ("position", "goal", "steps", "episode"):  # each of them matters
        broken = make()
        broken.load_state_dict({**state, name: state[name].flip(-1) + 1})
        assert not equal(rollout(broken, actions[15:]), expected)


def test_state_of_an_environment_that_was_never_reset():
    env = TwoRoomsVectorEnv(2)
    env.load_state_dict(TwoRoomsVectorEnv(2).state_dict())
    with pytest.raises(ContractError, match="call reset"):
        env.step(torch.zeros(2, 2))


def test_rows_with_different_layouts_move_as_in_their_own_environment():
    layouts = [(32.0, 10.0), (24.5, 40.0), (44.0, 54.0)]
    wall_x, door_y = zip(*layouts, strict=True)
    together = TwoRoomsVectorEnv(3, wall_x=wall_x, door_y=door_y, max_episode_steps=20)
    together.reset(seed=[1, 2, 3])
    actions = actions_of(3, 50) * 5
    expected = rollout(together, actions)
    for row, (wall, door) in enumerate(layouts):
        env = TwoRoomsVectorEnv(1, wall_x=wall, door_y=door, max_episode_steps=20)
        env.reset(seed=[row + 1])
        assert equal(rollout(env, actions[:, row : row + 1]), [v[row : row + 1] for v in expected])


def test_step_changes_no_input_and_no_global_generator():
    env = TwoRoomsVectorEnv(2, collision="noisy")
    before = torch.get_rng_state()
    env.reset(seed=0)
    action = torch.tensor([[1.0, -0.0], [0.5, 0.5]])
    env.step(action)
    assert torch.equal(torch.get_rng_state(), before)
    assert action.tolist() == [[1.0, -0.0], [0.5, 0.5]]


def test_noise_has_the_chosen_size_and_differs_between_steps():
    env = TwoRoomsVectorEnv(4000, collision="noisy", noise=0.5, max_episode_steps=None)
    start = torch.tensor([[30.9, 40.0]]).expand(4000, 2)
    env.reset(seed=0, options={"start": start, "goal": torch.tensor([[50.0, 20.0]]).expand(4000, 2)})
    ends = env.step(torch.tensor([[0.5, 0.0]]).expand(4000, 2))[0]["observation"]
    along = ends[:, 1] - 40
    assert abs(along.mean()) < 4 * 0.5 / math.sqrt(4000)
    assert abs(along.std() - 0.5) < 0.03
    assert ends[:, 0].max() < 31
    env.reset(seed=0, options={"start": start})
    env.step(torch.zeros(4000, 2))
    later = env.step(torch.tensor([[0.5, 0.0]]).expand(4000, 2))[0]["observation"]
    assert not torch.equal(later, ends)


# -- rewards for hindsight ------------------------------------------------------------------------------------------------


def test_compute_reward_agrees_with_the_environment():
    for observation in ("state", "pixels"):
        env = TwoRoomsVectorEnv(500, observation=observation, terminate_on_success=False)
        start = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * 20 + 8
        goal = start + torch.linspace(0, 1, 500)[:, None] * 1.9
        env.reset(options={"start": start, "goal": goal})
        obs, reward, *_ = env.step(torch.zeros(500, 2))
        computed = env.compute_reward(obs["achieved_goal"], obs["desired_goal"], {})
        clear = ((start - goal).norm(dim=1) - math.sqrt(2)).abs() > (0 if observation == "state" else 0.2)
        assert torch.equal(computed[clear], reward[clear])
        assert {-1.0, 0.0} == set(reward[clear].tolist())
        one = env.compute_reward(obs["achieved_goal"][0].numpy(), obs["desired_goal"][0].numpy(), {})
        assert one == reward[0]
        as_numpy = goal_reward(obs["achieved_goal"].numpy(), obs["desired_goal"].numpy())
        assert isinstance(as_numpy, np.ndarray)
        np.testing.assert_array_equal(as_numpy, computed.numpy())


def test_render_shows_walls_agent_and_goal():
    env = TwoRoomsVectorEnv(2)
    env.reset(seed=0, options={"start": [[10.0, 30.0], [20.0, 50.0]], "goal": [[50.0, 30.0], [50.0, 12.0]]})
    pictures = env.render()
    assert pictures.shape == (2, 260, 260, 3)
    assert pictures.dtype == np.uint8

    def colour(row, x, y):
        return tuple(pictures[row, round((y + 0.5) * 4), round((x + 0.5) * 4)])

    shown = [colour(0, 10, 30), colour(0, 50, 30), colour(0, 32, 40), colour(0, 32, 10), colour(1, 10, 30)]
    assert shown[3] == shown[4]  # the door and the empty room are free
    assert len(set(shown)) == 4


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wall_x": 45.0}, r"wall_x must be in \[20, 45\)"),
        ({"wall_x": [32.0, 19.0]}, r"wall_x must be in \[20, 45\)"),
        ({"door_y": float("nan")}, r"door_y must be in \[10, 55\)"),
        ({"wall_x": [32.0] * 3}, r"wall_x has shape \(3,\)"),
        ({"wall_x": "left"}, "wall_x must be a number"),
        ({"collision": "stopp"}, "Did you mean 'stop'"),
        ({"observation": "pixel"}, "Did you mean 'pixels'"),
        ({"autoreset": "next_step"}, "autoreset"),
        ({"noise": -1.0}, "noise must be"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"num_envs": 0}, "num_envs must be"),
        ({"device": "gpu"}, "is not a device"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        TwoRoomsVectorEnv(**{"num_envs": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": [[32.0, 40.0], [10.0, 10.0]]}, "start of row 0, .* is not in a room"),
        ({"goal": [[10.0, 40.0], [61.0, 10.0]]}, "goal of row 1, .* is not in a room"),
        ({"goal": [[10.0, 40.0], [float("nan"), 10.0]]}, "goal of row 1"),
        ({"start": [[10.0, 10.0, 0.0]] * 2}, r"shape \(2, 2\)"),
        ({"starts": [[10.0, 10.0]] * 2}, "Did you mean 'start'"),
    ],
)
def test_bad_reset_options(options, message):
    with pytest.raises(ConfigError, match=message):
        TwoRoomsVectorEnv(2).reset(seed=0, options=options)


def test_a_masked_row_may_hold_any_start():
    env = TwoRoomsVectorEnv(2)
    env.reset(seed=0)
    options = {"reset_mask": [True, False], "start": [[10.0, 10.0], [float("nan")] * 2]}
    assert env.reset(options=options)[0]["observation"][0].tolist() == [10.0, 10.0]


def test_bad_actions_and_order_of_calls():
    env = TwoRoomsVectorEnv(2)
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
    env = TwoRoomsVectorEnv(2)
    state = env.state_dict()
    with pytest.raises(DataError, match="no entry 'goal'"):
        env.load_state_dict({k: v for k, v in state.items() if k != "goal"})
    with pytest.raises(DataError, match="of 2 environments, not of 3"):
        TwoRoomsVectorEnv(3).load_state_dict(state)


def test_single_env_rejects_unknown_render_modes():
    with pytest.raises(ConfigError, match="render_mode"):
        TwoRoomsEnv(render_mode="human")


def test_noisy_without_noise_keeps_the_gap_of_the_reference():
    layout = make_layout(32, 10)
    end = noisy_at_walls(torch.tensor([[30.0], [40.0]]).double(), torch.tensor([[1.5], [0.0]]).double(), layout)
    assert end[:, 0].tolist() == [31 - 0.3, 40.0]


def test_hindsight_replay_of_stable_baselines3_runs():
    from stable_baselines3 import SAC, HerReplayBuffer

    env = gymnasium.make("clbench/TwoRooms-v0", max_episode_steps=20)
    model = SAC("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, learning_starts=45, batch_size=32,
                policy_kwargs={"net_arch": [8]}, seed=0)  # fmt: skip
    model.learn(60)
    batch = model.replay_buffer.sample(256)
    near = (batch.next_observations["achieved_goal"] - batch.observations["desired_goal"]).norm(dim=1) < math.sqrt(2)
    assert near.any()
    assert torch.equal(batch.rewards[:, 0], near.float() - 1)


# -- controllers ------------------------------------------------------------------------------------------------------


def controlled(env, controller, steps=200):
    """Which rows reach their goals, and whether an action ever leaves the action space."""
    reached, bounded = torch.zeros(env.num_envs, dtype=torch.bool), True
    for _ in range(steps):
        action = getattr(env, controller)()
        bounded &= bool((action.abs() <= 1.8 + 1e-6).all()) and action.shape == (env.num_envs, 2)
        reached |= env.step(action)[4]["is_success"]
    return reached, bounded


@pytest.mark.parametrize("collision", ["stop", "noisy", "cancel"])
def test_the_oracle_goes_through_the_door(collision):
    rows = 300
    u = torch.rand(rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walls, doors = 20 + 24.9 * u[:, 0], 10 + 44.9 * u[:, 1]
    env = TwoRoomsVectorEnv(
        rows, autoreset="disabled", wall_x=walls.tolist(), door_y=doors.tolist(), collision=collision
    )
    env.reset(seed=1)
    reached, bounded = controlled(env, "oracle_actions")
    assert reached.all() and bounded
    env.reset(seed=1)
    reached, bounded = controlled(env, "straight_line_actions")  # negative control
    assert 0 < reached.double().mean() < 0.6 and bounded


def test_the_oracle_within_a_room_and_from_the_door():
    env = TwoRoomsVectorEnv(4, autoreset="disabled")  # wall 32, door 10
    start = [[10.0, 50.0], [32.0, 12.0], [10.0, 50.0], [31.0, 14.0]]
    env.reset(seed=0, options={"start": start, "goal": [[25.0, 20.0], [50.0, 50.0], [32.0, 9.0], [10.0, 55.0]]})
    assert torch.equal(env.oracle_actions()[0], env.straight_line_actions()[0])
    assert controlled(env, "oracle_actions")[0].all()
    env.reset(seed=0, options={"start": [[25.0, 20.0]] * 4, "goal": [[25.5, 20.0]] * 4})
    assert torch.allclose(env.oracle_actions(), torch.tensor([[0.5, 0.0]] * 4))  # not beyond the goal


def test_controllers_rest_at_the_goal():
    env = TwoRoomsVectorEnv(1, autoreset="disabled", terminate_on_success=False)
    env.reset(options={"start": [[20.0, 20.0]], "goal": [[20.0, 20.0]]})
    assert env.oracle_actions().tolist() == env.straight_line_actions().tolist() == [[0.0, 0.0]]


def test_the_layout_is_observed_where_it_is_asked_for() -> None:
    """Two numbers in [-1, 1) that tell layouts apart, the same in the environment, its goal grid and its data."""
    walls, doors = [20.0, 32.5], [10.0, 32.5]
    env = TwoRoomsVectorEnv(2, observation="layout", wall_x=walls, door_y=doors)
    obs, _ = env.reset(seed=0)
    assert obs["layout"].tolist() == [[-1.0, -1.0], [0.0, 0.0]]
    assert env.step(torch.zeros(2, 2))[0]["layout"].equal(obs["layout"])
    assert env.goal_grid(1).observations["layout"].unique().tolist() == [0.0]
    plain = TwoRoomsVectorEnv(2, wall_x=walls, door_y=doors).reset(seed=0)[0]
    assert "layout" not in plain and plain["observation"].equal(obs["observation"])
    data = load_dataset("two-rooms?wall_x=32.5&door_y=32.5&transitions=200&observation=layout")
    assert data.observations["layout"].shape == (200, 2) and not data.observations["layout"].any()
