"""OGBench's point mazes: collisions against brute force, tasks and teleporters, the environment contract, controllers."""

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
from clbench.envs.ogbench_maze import (
    RADIUS,
    Maze,
    OGBenchPointMazeEnv,
    OGBenchPointMazeVectorEnv,
    goal_reward,
)
from clbench.errors import ConfigError, ContractError, DataError
from clbench.rng import torch_generator
from clbench.streams.ogbench_mazes import (
    ENTRIES,
    EXITS,
    MAPS,
    TASKS,
    centres,
    evaluation_trials,
    free_cells,
    next_cells,
    numbers,
    oracle_cells,
    path_lengths,
    vertex_cells,
    walls,
)

MAZES = tuple(MAPS)


def rolled(env, actions):
    """Everything that steps return, in one flat list of tensors."""
    out = []
    for a in actions:
        obs, reward, terminated, truncated, info = env.step(a)
        out += [*obs.values(), reward, terminated, truncated, info["is_success"]]
    return out


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def actions_of(num_envs, steps, seed=0, scale=2.0):
    return (torch.rand(steps, num_envs, 2, generator=torch_generator(seed)) * 2 - 1) * scale


# -- cells and paths ----------------------------------------------------------------------------------------------------


def searched(maze, goal):
    """Steps from every cell to ``goal`` by breadth-first search over a dict, -1 without a path."""
    rows = MAPS[maze]
    free = {(i, j) for i, row in enumerate(rows) for j, c in enumerate(row) if c == "0"}
    found, frontier = {goal: 0}, [goal]
    while frontier:
        ahead = []
        for i, j in frontier:
            for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if cell in free and cell not in found:
                    found[cell] = found[(i, j)] + 1
                    ahead.append(cell)
        frontier = ahead
    return [found.get((i, j), -1) for i in range(len(rows)) for j in range(len(rows[0]))]


@pytest.mark.parametrize("maze", MAZES)
def test_paths_are_shortest(maze):
    steps, following, columns = path_lengths(maze), next_cells(maze), walls(maze).shape[1]
    for goal in {cell for pair in TASKS[maze] for cell in pair}:
        number = goal[0] * columns + goal[1]
        assert steps[:, number].tolist() == searched(maze, goal)
    cell, goal = np.nonzero(steps > 0)
    onwards = following[cell, goal]
    assert (steps[onwards, goal] == steps[cell, goal] - 1).all() and (steps[cell, onwards] == 1).all()
    cell, goal = np.nonzero(steps <= 0)
    assert (following[cell, goal] == cell).all()


@pytest.mark.parametrize("maze", MAZES)
def test_maps_are_closed_and_tasks_are_in_free_cells(maze):
    solid = walls(maze)
    assert solid[[0, -1]].all() and solid[:, [0, -1]].all()
    assert len(TASKS[maze]) == 5
    for start, goal in TASKS[maze]:
        assert not solid[start] and not solid[goal]
        assert path_lengths(maze)[numbers(maze, [start])[0], numbers(maze, [goal])[0]] > 0
    for cell in (*ENTRIES.get(maze, ()), *EXITS.get(maze, ())):
        assert not solid[cell]


def test_vertices_are_free_cells_without_straight_corridors():
    rows, columns = walls("medium").shape
    expected = []
    for i in range(rows):
        for j in range(columns):
            if walls("medium")[i, j]:
                continue
            up, down, left, right = (
                MAPS["medium"][a][b] == "0" for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
            )
            if (up, down, left, right) not in ((True, True, False, False), (False, False, True, True)):
                expected.append(i * columns + j)
    assert vertex_cells("medium").tolist() == expected
    assert 0 < len(expected) < len(free_cells("medium"))


def test_one_exit_of_the_teleporters_is_sealed():
    steps = path_lengths("teleport")
    (sealed, *others), free = numbers("teleport", EXITS["teleport"]), free_cells("teleport")
    assert (steps[sealed, free] >= 0).sum() == 1  # itself
    assert all((steps[other, free] >= 0).sum() > 10 for other in others)


# -- collisions ---------------------------------------------------------------------------------------------------------


def distances(maze, points):
    """Distance of points (N, 2) to every box of wall -> (N, walls)."""
    middle = centres(maze)[walls(maze).ravel()]
    outside = (np.abs(points[:, None] - middle) - 2).clip(min=0)
    return np.hypot(outside[..., 0], outside[..., 1])


def brute_force(maze, position, action, step_size):
    """Move (2,) and push out of one box after the other until nothing is touched."""
    middle = centres(maze)[walls(maze).ravel()]
    point = position + step_size * np.clip(action, -1, 1)
    for _ in range(200):
        nearest = np.clip(point, middle - 2, middle + 2)
        away = point - nearest
        length = np.hypot(*away.T)
        worst = length.argmin()
        if length[worst] >= RADIUS - 1e-12:
            return point
        if length[worst] == 0:
            return None  # inside a box: no direction
        point = nearest[worst] + away[worst] * RADIUS / length[worst]
    raise AssertionError("not resolved")


def places(maze, count, seed):
    """Points (count, 2) that touch no wall, many of them close to one."""
    rng = np.random.default_rng(seed)
    middle = centres(maze)[free_cells(maze)]
    points = middle[rng.integers(len(middle), size=20 * count)] + rng.uniform(-2, 2, (20 * count, 2))
    near = distances(maze, points).min(1)
    points = np.concatenate([points[(near >= RADIUS) & (near < RADIUS + 0.3)][: count // 2], points[near >= RADIUS]])
    return points[:count], rng.uniform(-1.3, 1.3, (count, 2))


def check_moves(move, step_size):
    for maze in ("medium", "giant", "teleport"):
        position, action = places(maze, 400, seed=0)
        moved = move(Maze(maze), torch.from_numpy(position).t(), torch.from_numpy(action).t(), step_size).t().numpy()
        expected = [brute_force(maze, p, a, step_size) for p, a in zip(position, action, strict=True)]
        known = np.array([e is not None for e in expected])
        assert known.mean() > 0.99
        np.testing.assert_allclose(moved[known], np.stack([e for e in expected if e is not None]), atol=1e-9)
        assert distances(maze, moved).min() >= RADIUS - 1e-9


@pytest.mark.parametrize("step_size", [0.2, 0.5])
def test_moves_equal_brute_force(step_size):
    check_moves(Maze.move, step_size)


class NoCorners(Maze):
    def push_out(self, position):
        at = (position + 6) / 4
        offset = position - (4 * at.round() - 6)
        pushed = super().push_out(position)
        both = ((pushed - position).abs() > 1e-12).all(0) & (offset.abs() < RADIUS).all(0)
        return torch.where(both, position, pushed)


class Thinner(Maze):
    def push_out(self, position):
        return position + 0.9 * (super().push_out(position) - position)


@pytest.mark.parametrize("broken", [NoCorners, Thinner])
def test_the_comparison_catches_broken_collisions(broken):
    with pytest.raises(AssertionError):
        check_moves(lambda maze, *arguments: broken(maze.name).move(*arguments), 0.2)


@settings(max_examples=25, deadline=None)
@given(maze=st.sampled_from(MAZES), seed=st.integers(0, 10**6), heading=st.floats(0, 6.28))
def test_no_walk_ever_touches_a_wall(maze, seed, heading):
    env = OGBenchPointMazeVectorEnv(32, maze=maze, step_size=0.5, max_episode_steps=None, terminate_on_success=False)
    env.reset(seed=seed)
    push = 3 * torch.tensor([np.cos(heading), np.sin(heading)], dtype=torch.float32)
    for action in actions_of(32, 25, seed) + push:
        point = env.step(action)[0]["observation"].double().numpy()
        assert distances(maze, point).min() >= RADIUS - 1e-5  # positions are stored as float32
        assert not walls(maze).ravel()[env.maze.cell(torch.from_numpy(point).t()).numpy()].any()


def test_centres_on_or_across_a_corner_are_pushed_out():
    maze = Maze("medium")
    assert bool(maze.walls[5, 2]) and not maze.walls[[5, 6, 6], [3, 2, 3]].any()  # so a corner is at (6, 18)
    beyond = torch.tensor([[6.0, 5.997, 5.998, 6.0], [18.0, 17.995, 17.999, 18.2]], dtype=torch.float64)
    moved = maze.push_out(beyond)
    assert distances("medium", moved.t().numpy()).min() >= RADIUS - 1e-9
    assert (moved - beyond).abs().amax() < RADIUS + 0.01


# -- the environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maze", MAZES)
def test_protocol_spaces_shapes_and_dtypes(maze):
    env = OGBenchPointMazeVectorEnv(3, maze=maze)
    assert isinstance(env, VectorEnv)
    obs, _ = env.reset(seed=0)
    for _ in range(3):
        assert env.observation_space.contains({k: v.numpy() for k, v in obs.items()})
        obs, reward, terminated, truncated, _ = env.step(np.asarray(env.action_space.sample()))
    assert reward.dtype == torch.float32 and terminated.dtype == truncated.dtype == torch.bool
    assert reward.shape == terminated.shape == truncated.shape == (3,)


def test_gymnasium_and_sb3_accept_the_single_environment():
    env = gymnasium.make("clbench/OGBenchPointMaze-v0", maze="u")
    assert env.spec is not None and env.spec.max_episode_steps == 1000
    check_env(env.unwrapped, skip_render_check=True)
    sb3_check_env(env.unwrapped)
    picture = OGBenchPointMazeEnv(maze="u", render_mode="rgb_array")
    picture.reset(seed=0, options={"task_id": 2, "start": [4.0, 0.0]})
    assert picture.render().shape == (120, 120, 3)


@pytest.mark.parametrize("maze", ["medium", "teleport"])
def test_rows_do_not_depend_on_their_number(maze):
    def run(seeds, actions):
        env = OGBenchPointMazeVectorEnv(len(seeds), maze=maze, step_size=0.5, max_episode_steps=30)
        first, _ = env.reset(seed=seeds)
        return [*first.values(), *rolled(env, actions)]

    actions = actions_of(5, 80) + torch.tensor([0.5, 0.3])
    together = run([11, 12, 13, 14, 15], actions)
    for row in range(5):
        assert equal([v[row : row + 1] for v in together], run([11 + row], actions[:, row : row + 1]))
    assert not equal(together, run([11, 12, 13, 14, 16], actions))  # negative control


def test_random_tasks_have_their_noise():
    n, maze = 20_000, "large"
    env = OGBenchPointMazeVectorEnv(n, maze=maze)
    obs, _ = env.reset(seed=3)
    pairs = np.stack([numbers(maze, pair) for pair in TASKS[maze]])
    start, goal = (obs[k].double().numpy() for k in ("achieved_goal", "desired_goal"))
    cells = np.stack([env.maze.cell(torch.from_numpy(p).t()).numpy() for p in (start, goal)], 1)
    task = (cells[:, None] == pairs).all(-1)
    assert (task.sum(1) == 1).all()
    assert np.abs(task.sum(0) - n / 5).max() < 5 * np.sqrt(n * 0.16)
    for points, cell in ((start, cells[:, 0]), (goal, cells[:, 1])):
        noise = points - centres(maze)[cell]
        assert np.abs(noise).max() <= 1 + 1e-6
        assert np.abs(noise.mean(0)).max() < 5 * np.sqrt(1 / 3 / n) and np.abs(noise.var(0) - 1 / 3).max() < 0.01
    noise = np.concatenate([start - centres(maze)[cells[:, 0]], goal - centres(maze)[cells[:, 1]]], 1)
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < 0.05  # four independent draws


def test_reset_options():
    env = OGBenchPointMazeVectorEnv(5, maze="giant", autoreset="disabled")
    obs, _ = env.reset(seed=[1, 2, 3, 4, 5], options={"task_id": [1, 2, 3, 4, 5]})
    pairs = np.stack([centres("giant")[numbers("giant", pair)] for pair in TASKS["giant"]])
    for key, expected in (("observation", pairs[:, 0]), ("desired_goal", pairs[:, 1])):
        assert np.abs(obs[key].numpy() - expected).max() <= 1 + 1e-6
    given = {"start": pairs[:, 1] + 0.5, "task_id": torch.tensor([1, 2, 3, 4, 5])}
    other, _ = env.reset(seed=[1, 2, 3, 4, 5], options=given)
    np.testing.assert_allclose(other["observation"].numpy(), pairs[:, 1] + 0.5)
    assert torch.equal(other["desired_goal"], obs["desired_goal"])  # of the same seeds
    mask = torch.tensor([True, False, True, False, False])
    masked, _ = env.reset(seed=[7] * 5, options={"reset_mask": mask, "task_id": [1, 99, 2, -1, 0]})
    assert torch.equal(masked["observation"][~mask], other["observation"][~mask])
    assert not torch.equal(masked["observation"][mask], other["observation"][mask])


def test_success_is_within_one_after_the_step():
    env = OGBenchPointMazeVectorEnv(3, autoreset="disabled", terminate_on_success=True)
    start = [[0.0, 0.0]] * 3
    goal = [[1.2, 0.0], [1.2 + 1e-3, 0.0], [0.0, 1.0]]
    _, info = env.reset(options={"start": start, "goal": goal})
    assert info["is_success"].tolist() == [False, False, True]
    obs, reward, terminated, _, info = env.step(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]]))
    assert info["is_success"].tolist() == terminated.tolist() == [True, False, False]
    assert reward.tolist() == [0.0, -1.0, -1.0]
    assert torch.equal(env.compute_reward(obs["achieved_goal"], obs["desired_goal"]), reward)
    assert isinstance(goal_reward(np.zeros((4, 2)), np.ones((4, 2))), np.ndarray)


def test_same_step_autoreset_keeps_the_last_observation():
    env = OGBenchPointMazeVectorEnv(2, max_episode_steps=3)
    first, _ = env.reset(seed=0, options={"start": [[0.0, 0.0]] * 2, "goal": [[1.2, 0.0], [20.0, 20.0]]})
    kept = {k: v.clone() for k, v in first.items()}
    obs, _, terminated, _, info = env.step(torch.tensor([[1.0, 0.0]] * 2))
    assert terminated.tolist() == info["_final_obs"].tolist() == [True, False]
    np.testing.assert_allclose(info["final_obs"]["observation"].numpy(), [[0.2, 0.0]] * 2, atol=1e-6)
    assert torch.equal(info["final_obs"]["desired_goal"], first["desired_goal"])
    assert not torch.equal(obs["desired_goal"][0], first["desired_goal"][0])
    assert torch.equal(obs["desired_goal"][1], first["desired_goal"][1])
    assert all(torch.equal(first[k], kept[k]) for k in kept)  # what was handed out stays as it was
    env.step(torch.zeros(2, 2))
    assert env.step(torch.zeros(2, 2))[3].tolist() == [False, True]  # row 0 is one step younger


def test_teleporters_lead_to_each_exit_alike():
    n = 3000
    env = OGBenchPointMazeVectorEnv(n, maze="teleport", autoreset="disabled")
    entry, side = (
        centres("teleport")[numbers("teleport", [(4, 6)])[0]],
        centres("teleport")[numbers("teleport", [(3, 6)])[0]],
    )
    start = np.tile(entry + (side - entry) / 4 * 1.6, (n, 1))  # 1.6 from the centre: one step outside
    options = {"start": start, "goal": np.tile(side, (n, 1))}
    obs, _ = env.reset(seed=list(range(n)), options=options)
    away = torch.from_numpy((side - entry) / 4).float().expand(n, 2)
    outside = env.step(away)[0]["observation"]
    assert (outside - torch.from_numpy(start).float()).abs().max() < 0.21  # not teleported
    env.step(-away)
    obs, _, terminated, _, info = env.step(-away)
    exits = torch.from_numpy(centres("teleport")[numbers("teleport", EXITS["teleport"])]).float()
    which = (obs["observation"][:, None] == exits).all(-1)
    assert (which.sum(1) == 1).all()
    assert (which.sum(0) - n / 3).abs().max() < 5 * np.sqrt(n * 2 / 9)
    assert not terminated.any() and not info["is_success"].any()

    def exit_of(seed, wait):
        one = OGBenchPointMazeVectorEnv(1, maze="teleport", autoreset="disabled")
        one.reset(seed=[seed], options={k: v[:1] for k, v in options.items()})
        for _ in range(wait):
            one.step(torch.zeros(1, 2))
        return one.step(-away[:1])[0]["observation"].tolist()

    assert [exit_of(s, 2) for s in range(20)] == [exit_of(s, 2) for s in range(20)]
    assert [exit_of(5, w) for w in range(20)] != [exit_of(5, 0)] * 20  # another step is another draw


def test_success_at_a_teleporter_is_computed_before_it_acts():
    env = OGBenchPointMazeVectorEnv(1, maze="teleport", autoreset="disabled")
    entry = centres("teleport")[numbers("teleport", [(4, 6)])[0]]
    env.reset(seed=0, options={"start": [entry - [0.0, 1.6]], "goal": [entry - [0.0, 1.0]]})
    obs, reward, terminated, _, info = env.step(torch.tensor([[0.0, 1.0]]))
    assert info["is_success"].all() and terminated.all() and reward.tolist() == [0.0]
    assert (obs["observation"] - torch.from_numpy(entry).float()).norm() > 4


@pytest.mark.parametrize("maze", ["medium", "teleport"])
def test_state_dict_continues_in_the_middle_of_episodes(maze):
    def make():
        return OGBenchPointMazeVectorEnv(3, maze=maze, step_size=0.5, max_episode_steps=25)

    env, actions = make(), actions_of(3, 60, scale=1) + torch.tensor([0.6, 0.2])
    env.reset(seed=0)
    rolled(env, actions[:20])
    state = env.state_dict()
    expected = rolled(env, actions[20:])
    for _ in range(2):  # the first load did not keep the tensors
        other = make()
        other.load_state_dict(state)
        assert equal(rolled(other, actions[20:]), expected)
    for name, by in {"position": 0.1, "goal": 0.1, "steps": 1, "episode": 1, "base": 1}.items():  # each of them matters
        broken = make()
        broken.load_state_dict({**state, name: state[name] + by})
        assert not equal(rolled(broken, actions[20:]), expected), name


# -- controllers --------------------------------------------------------------------------------------------------------


def success(policy, maze="medium", step_size=0.5, limit=400, episodes=250):
    """Success (episodes,) on the frozen list."""
    trials = evaluation_trials(maze, episodes)
    env = OGBenchPointMazeVectorEnv(
        episodes, maze=maze, step_size=step_size, max_episode_steps=limit, autoreset="disabled"
    )
    env.reset(seed=trials.seeds, options=dict(trials.options))
    reached = torch.zeros(episodes, dtype=torch.bool)
    rng = torch_generator(0)
    for _ in range(limit):
        action = {
            "oracle": env.oracle_actions,
            "straight": env.straight_line_actions,
            "random": lambda: torch.rand(episodes, 2, generator=rng) * 2 - 1,
        }[policy]()
        reached |= env.step(action)[4]["is_success"]
    return reached.double()


@pytest.mark.parametrize(("step_size", "limit"), [(0.2, 1000), (0.5, 400)])
def test_reference_lines_of_the_medium_maze(step_size, limit):
    assert success("oracle", step_size=step_size, limit=limit).mean() == 1
    straight = success("straight", step_size=step_size, limit=limit).view(-1, 5).mean(0)
    # no wall between start and goal of task 1; task 2 is symmetric; the others lead into dead ends
    assert straight[0] == 1 and 0.3 < straight[1] < 0.7 and straight[2:].max() == 0
    assert success("random", step_size=step_size, limit=limit).mean() < 0.02


@pytest.mark.parametrize("maze", MAZES)
def test_the_oracle_solves_every_maze(maze):
    assert success("oracle", maze, episodes=50).mean() == 1
    assert success("straight", maze, episodes=50).mean() < 0.5


def test_an_oracle_without_the_map_fails(monkeypatch):
    monkeypatch.setattr("clbench.envs.ogbench_maze.oracle_cells", lambda maze: np.zeros_like(oracle_cells(maze)))
    assert success("oracle", episodes=50).mean() < 0.2


def test_the_oracle_goes_around_teleporters():
    columns, entries = walls("teleport").shape[1], set(numbers("teleport", ENTRIES["teleport"]).tolist())

    def visits(table, start, goal):
        cell, seen = start, set()
        while cell != goal:
            cell = int(table[cell, goal])
            seen.add(cell)
        return seen & entries

    pairs = [[i * columns + j for i, j in pair] for pair in TASKS["teleport"]]
    assert not any(visits(oracle_cells("teleport"), *pair) for pair in pairs)
    assert any(visits(next_cells("teleport"), *pair) for pair in pairs)  # negative control
    sealed = int(numbers("teleport", EXITS["teleport"])[0])
    way, cell = oracle_cells("teleport"), pairs[0][0]
    for _ in range(40):
        cell = int(way[cell, sealed])  # no path: into a teleporter
    assert cell in entries


# -- frozen lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maze", MAZES)
def test_evaluation_lists_are_frozen_and_balanced(maze):
    trials, more = evaluation_trials(maze, 25), evaluation_trials(maze, 60)
    assert trials.seeds == more.seeds[:25] and trials.options["start"] == more.options["start"][:25]
    assert len(set(more.seeds)) == 60
    pairs = np.stack([centres(maze)[numbers(maze, pair)] for pair in TASKS[maze]])
    for key, side in (("start", 0), ("goal", 1)):
        noise = np.array(more.options[key]) - np.tile(pairs[:, side], (12, 1))
        assert np.abs(noise).max() <= 1 and noise.std() > 0.5
    assert evaluation_trials("medium", 1).options != evaluation_trials("large", 1).options


def test_the_first_version_of_the_lists_never_changes():
    trials = evaluation_trials("medium", 250)
    assert trials.name == "ogbench-maze-v1/medium[:250]"
    assert trials.options["start"][0] == FIRST_START and trials.options["goal"][249] == LAST_GOAL


FIRST_START, LAST_GOAL = (-0.699, -0.671), (-0.329, 0.738)


# -- pictures, errors ---------------------------------------------------------------------------------------------------


def test_render_shows_walls_agent_goal_and_teleporters():
    env = OGBenchPointMazeVectorEnv(2, maze="teleport")
    env.reset(seed=0, options={"task_id": [1, 2]})
    pictures = env.render()
    assert pictures.shape == (2, 9 * 24, 12 * 24, 3) and pictures.dtype == np.uint8

    def colour(x, y):
        return tuple(pictures[0, round(6 * (y + 6)), round(6 * (x + 6))])

    agent, goal = (p[0].tolist() for p in env.points())
    seen = [colour(*agent), colour(*goal), colour(-4, -4), colour(20, 12), colour(24, 0), colour(4, 0)]
    assert len(set(seen)) == 6


def test_goal_grid_is_where_the_agent_can_be():
    env = OGBenchPointMazeVectorEnv(1, maze="large")
    env.reset(seed=0)
    grid = env.goal_grid()
    assert distances("large", grid.positions.double().numpy()).min() >= RADIUS
    cells = np.unique(env.maze.cell(grid.positions.t()).numpy())
    assert cells.tolist() == free_cells("large").tolist()
    assert grid.extent == (-6, 42, 30, -6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maze": "mediun"}, "Did you mean 'medium'"),
        ({"step_size": 0.0}, r"step_size must be in \(0, 0.5\]"),
        ({"step_size": 0.51}, r"step_size must be in \(0, 0.5\]"),
        ({"step_size": float("nan")}, "step_size"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"autoreset": "next_step"}, "autoreset"),
        ({"num_envs": 0}, "num_envs must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        OGBenchPointMazeVectorEnv(**{"num_envs": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": [[0.0, 0.0], [8.0, 0.0]]}, "start of row 1, .* free cell, at least 0.7"),
        ({"start": [[0.0, 0.0], [0.0, -1.5]]}, "start of row 1, .* free cell, at least 0.7"),
        ({"goal": [[0.0, 0.0], [float("nan"), 0.0]]}, "goal of row 1, .* free cell"),
        ({"goal": [[1e9, 0.0], [0.0, 0.0]]}, "goal of row 0"),
        ({"goal": [[0.0, 0.0, 0.0]] * 2}, r"shape \(2, 2\)"),
        ({"task_id": [0, 1]}, "task_id must hold whole numbers from 1 to 5"),
        ({"task_id": [1.0, 2.0]}, "task_id must hold whole numbers"),
        ({"tasks": [1, 2]}, "Unknown reset option 'tasks'"),
    ],
)
def test_bad_reset_options(options, message):
    env = OGBenchPointMazeVectorEnv(2)
    with pytest.raises(ConfigError, match=message):
        env.reset(seed=0, options=options)


def test_bad_actions_states_and_order_of_calls():
    env = OGBenchPointMazeVectorEnv(2)
    with pytest.raises(ContractError, match="call reset before step"):
        env.step(torch.zeros(2, 2))
    with pytest.raises(ContractError, match="first reset must reset all rows"):
        env.reset(options={"reset_mask": [True, False]})
    env.reset(seed=0)
    for actions, message in (
        (torch.zeros(2, 3), r"actions must be float \(2, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), "actions must be float"),
        (torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), "action of row 1 is not finite"),
    ):
        with pytest.raises(ContractError, match=message):
            env.step(actions)
    state = env.state_dict()
    with pytest.raises(DataError, match="no entry 'goal'"):
        env.load_state_dict({k: v for k, v in state.items() if k != "goal"})
    with pytest.raises(DataError, match="of 2 environments, not of 3"):
        OGBenchPointMazeVectorEnv(3).load_state_dict(state)
    with pytest.raises(ConfigError, match="episodes must be at least 1"):
        evaluation_trials("medium", 0)
    with pytest.raises(ConfigError, match="render_mode"):
        OGBenchPointMazeEnv(render_mode="human")


# -- GPU ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("maze", ["medium", "teleport"])
def test_a_gpu_gives_the_same_episodes(maze):
    runs = []
    for device in ("cpu", "cuda"):
        env = OGBenchPointMazeVectorEnv(64, device, maze=maze, max_episode_steps=20)
        first, _ = env.reset(seed=0)
        runs.append([*first.values(), *rolled(env, actions_of(64, 50).to(device))])
    for cpu, cuda in zip(*runs, strict=True):
        torch.testing.assert_close(cuda.cpu().float(), cpu.float(), atol=1e-4, rtol=0)
