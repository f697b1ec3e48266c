"""Pictures of planning: grids, decoding, maps and paths, with a world model that is known to be right (or wrong)."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy.stats import spearmanr
from torch import Tensor

import clbench
from clbench.cli.main import main
from clbench.contracts import Agent, Phase, Stream, Task, TaskList
from clbench.envs.goal_grid import GoalGrid
from clbench.envs.make import make_env
from clbench.envs.two_rooms import make_layout
from clbench.envs.two_rooms_chase import shortest_path
from clbench.experiments import RunResult
from clbench.planners.bounds import ActionBounds
from clbench.planners.mpc import MPC
from clbench.report import planning
from clbench.report.planning import (
    COLUMNS,
    EPISODES,
    Decoder,
    as_picture,
    chosen,
    nearest,
    on_lattice,
    path_lengths,
    plan_steps,
    rank_correlation,
    save_planning,
    watch,
)
from clbench.rng import get_global_state

ENVS = [
    ("clbench/TwoRooms-v0", {"wall_x": 27.3, "door_y": 40.6}),
    ("clbench/TwoRooms-v0", {"observation": "pixels"}),
    ("clbench/PointMaze-v0", {"layout": "O###/OOOO/OO#O/OO##"}),
    ("clbench/PointMaze-v0", {"observation": "pixels"}),
]
STEP = {"clbench/TwoRooms-v0": 1.0, "clbench/PointMaze-v0": 0.1}  # of the grids


class Truth:
    """A world model whose latent is the position (repeated for an ensemble), and whose dynamics are ``speed`` times the
    action."""

    def __init__(self, members: int = 1, speed: float = 1.0):
        self.members, self.speed = members, speed

    def encode(self, obs: Any) -> Tensor:
        return self._repeat(obs["achieved_goal"])

    def encode_goal(self, obs: Any) -> Tensor:
        return self._repeat(obs["desired_goal"])

    def _repeat(self, z: Tensor) -> Tensor:
        return z if self.members == 1 else z[:, None].expand(len(z), self.members, 2)

    def goal_features(self, z: Tensor) -> Tensor:
        return z

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        return z + self.speed * (action if self.members == 1 else action[:, None])


class Constant(Truth):
    """Collapsed: all observations are one."""

    def encode(self, obs: Any) -> Tensor:
        return torch.zeros_like(super().encode(obs))


class NotFinite(Truth):
    def encode(self, obs: Any) -> Tensor:
        return super().encode(obs) * torch.nan


class Straight:
    """Plans a straight line to the goal."""

    def plan(self, model: Any, z: Tensor, objective: Any, memory: Any, *, rng: Any) -> tuple[Tensor, None]:
        way = objective - z
        step = way * (1.5 / way.norm(dim=1, keepdim=True)).clamp(max=0.5)
        return step[:, None].expand(-1, 12, -1), None


class Planner(Agent):
    """Follows straight lines by the true model; has no weights."""

    def __init__(self, model: Any = None, replan_every: int = 4, **options: Any):
        self.model, self.mpc = model or Truth(), MPC(Straight(), replan_every=replan_every, **options)
        self.device = torch.device("cpu")

    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: Any, task: Any = None, explore: bool = False) -> Any:
        return self.mpc.act(self.model, obs["achieved_goal"], obs["desired_goal"], memory, first, rng=rng)

    def learn(self, experience: Any, budget: int, *, rng: Any) -> Any:
        raise NotImplementedError

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def rooms_task(episodes: int = EPISODES, **kwargs: Any) -> Task:
    return Task("rooms", "clbench/TwoRooms-v0", kwargs, None, TaskList.from_seeds(episodes), "success")


def result_of(agent: Any, path: Path, *tasks: Task) -> RunResult:
    path.mkdir(exist_ok=True)
    stream = Stream("pictures", tasks, tuple(Phase(t.name, budget=1) for t in tasks), reveals="task_id")
    return RunResult(path, {}, stream, agent)


def grid_of(env_id: str, kwargs: dict) -> GoalGrid:
    env: Any = make_env(env_id, 1, "cpu", **kwargs)
    env.reset(seed=0)
    return env.goal_grid()


# -- grids ---------------------------------------------------------------------------------------------------------------


def observed_at(env_id: str, kwargs: dict, positions: Tensor) -> dict[str, Tensor]:
    """What the environment shows of an agent that begins at rest at the positions; it refuses those in walls."""
    env = make_env(env_id, len(positions), "cpu", **kwargs)
    obs, _ = env.reset(seed=0, options={"start": positions, "goal": positions})
    return {k: v for k, v in obs.items() if k != "desired_goal"}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("env_id", "kwargs"), ENVS)
def test_a_grid_observes_what_the_environment_observes_there(env_id: str, kwargs: dict) -> None:
    grid = grid_of(env_id, kwargs)
    some = torch.arange(0, len(grid.positions), 7)
    observations = {k: v[some] for k, v in grid.observations.items()}
    assert same(observations, observed_at(env_id, kwargs, grid.positions[some]))
    assert not same(observations, observed_at(env_id, kwargs, grid.positions[some.roll(1)])), "positions must matter"


@pytest.mark.parametrize(("env_id", "kwargs"), ENVS)
def test_every_place_has_a_grid_point_near(env_id: str, kwargs: dict) -> None:
    env: Any = make_env(env_id, 300, "cpu", **kwargs)
    env.reset(seed=1)
    for points in env.points():  # starts and goals, which are drawn anywhere in the rooms
        assert torch.cdist(points, env.goal_grid().positions).amin(1).max() < 1.01 * STEP[env_id]


def test_each_row_has_the_grid_of_its_layout() -> None:
    maze: Any = make_env("clbench/PointMaze-v0", 2, "cpu", layout=["OOOO/####/####/####", "####/####/####/OOOO"])
    maze.reset(seed=0)
    assert maze.goal_grid(0).positions[:, 1].max() < 1 and maze.goal_grid(1).positions[:, 1].min() > 3
    rooms: Any = make_env("clbench/TwoRooms-v0", 2, "cpu", wall_x=[24.0, 40.0], observation="pixels")
    rooms.reset(seed=0)
    for row, wall in enumerate((24.0, 40.0)):
        grid = rooms.goal_grid(row)
        assert (grid.positions[:, 0] == wall).sum() == 9, "only the door is free"
        assert (grid.observations["observation"][:, 1, 60 // 2, int(wall)] == 255).all()


@pytest.mark.parametrize(("env_id", "kwargs"), ENVS[::2])
def test_the_extent_is_where_pictures_show_the_agent(env_id: str, kwargs: dict) -> None:
    env: Any = make_env(env_id, 20, "cpu", **kwargs)
    env.reset(seed=3)
    left, right, bottom, top = env.goal_grid().extent
    pictures = env.render()
    blue = (pictures == np.array([31, 119, 180])).all(-1)
    for picture, point in zip(blue, env.points()[0].numpy(), strict=True):
        y, x = (picture.nonzero()[i].mean() + 0.5 for i in (0, 1))
        at = left + (right - left) * x / picture.shape[1], top + (bottom - top) * y / picture.shape[0]
        np.testing.assert_allclose(at, point, atol=0.15 * STEP[env_id])


# -- decoding and maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [1, 3])
def test_encoded_grid_points_are_decoded_to_themselves(members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "CHUNK", 100)
    grid = grid_of(*ENVS[0])
    everywhere = np.arange(len(grid.positions))
    decoder = Decoder(Truth(members), grid)
    assert (decoder.decode(decoder.model.encode(grid.observations)) == everywhere).all()
    broken = Decoder(Constant(members), grid)
    assert (broken.decode(broken.model.encode(grid.observations)) != everywhere).any(), "a collapsed model is found out"


def test_an_ensemble_is_decoded_to_the_least_mean_distance() -> None:
    grid = grid_of(*ENVS[0])
    z = 4 + 56 * torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(0))
    each = (z[:, None] - grid.positions[None, :, None]).square().sum(-1)  # (50, N, 3)
    found = Decoder(Truth(3), grid).decode(z)
    least = each.mean(2).gather(1, torch.from_numpy(found)[:, None])[:, 0]
    torch.testing.assert_close(least, each.mean(2).amin(1))
    assert (found != each[..., 0].argmin(1).numpy()).any(), "one member alone says something else"


def test_the_map_of_the_true_model_is_that_of_distances() -> None:
    grid = grid_of(*ENVS[0])
    goal = torch.tensor([[50.0, 12.0]])
    expected = np.square(grid.positions.numpy() - goal.numpy()).sum(1) / 2
    np.testing.assert_allclose(Decoder(Truth(3), grid).distances(Truth(3)._repeat(goal)), expected, rtol=1e-5)
    picture = on_lattice(grid.positions.numpy(), expected)
    assert picture.shape == (57, 57)
    assert np.unravel_index(np.nanargmin(picture), picture.shape) == (12 - 4, 50 - 4), "row is y, column is x"
    assert np.isnan(picture).sum() == 57 * 57 - len(grid.positions)


def test_paths_over_the_grid_are_nearly_the_shortest() -> None:
    kwargs = ENVS[0][1]
    positions = grid_of(*ENVS[0]).positions.numpy()
    layout = make_layout(kwargs["wall_x"], kwargs["door_y"])
    for goal in ((10.0, 10.0), (50.0, 57.0), (27.0, 40.0)):
        found = path_lengths(positions, nearest(positions, np.array(goal)))
        end = torch.tensor(goal, dtype=torch.float64)[:, None].expand(2, len(positions))
        corners = shortest_path(torch.from_numpy(positions.T).double(), end, layout)
        exact = (corners[1:] - corners[:-1]).norm(dim=1).sum(0).numpy()
        # the lattice turns at its own points, up to a step beside the corners of the door
        assert (found > exact - 1e-4).all() and (found < 1.083 * exact + 2).all()
        straight = np.linalg.norm(positions - goal, axis=1)
        assert not (straight > exact - 1e-4).all(), "a path through the wall would be seen"


def test_paths_in_a_maze_turn_around_walls() -> None:
    positions = grid_of("clbench/PointMaze-v0", {"layout": "OOOO/O##O/O##O/O##O"}).positions.numpy()
    left, right = (nearest(positions, np.array([x, 3.5])) for x in (0.5, 3.5))
    length = path_lengths(positions, left)[right]
    assert 2 * 2.6 + 1.9 < length < 2 * 3.0 + 3.2


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_paths_in_the_open_have_a_closed_form(width: int, height: int, data: Any) -> None:
    positions = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2).astype(float)
    positions = data.draw(st.permutations(list(positions)).map(np.array))
    source = data.draw(st.integers(0, len(positions) - 1))
    gap = np.abs(positions - positions[source])
    np.testing.assert_allclose(path_lengths(positions, source), gap.max(1) + (np.sqrt(2) - 1) * gap.min(1))


def test_paths_do_not_cut_corners_and_may_not_exist() -> None:
    diagonal = np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    assert path_lengths(diagonal, 1).tolist() == [np.inf, 0, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    a, b = np.array(pairs, dtype=float).T
    found = rank_correlation(np.append(a, 1.0), np.append(b, np.inf))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(a, b)[0])


@given(st.integers(1, 400), st.integers(1, 10))
def test_chosen_steps(count: int, most: int) -> None:
    steps = plan_steps(count)
    assert steps[0] == 0 and steps[-1] <= count and len(steps) <= COLUMNS
    assert len(set(np.diff(steps))) <= 1 and all(step % 5 == 0 for step in steps)
    picked = chosen(count, most)
    assert len(picked) == min(count, most) and picked[0] == 0 and (most == 1 or picked[-1] == count - 1)


def test_images_for_people() -> None:
    rgb = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    assert (as_picture(rgb) == rgb.transpose(1, 2, 0)).all() and (
        as_picture(rgb.transpose(1, 2, 0)) == rgb.T.swapaxes(0, 1)
    ).all()
    rooms = grid_of(*ENVS[1]).observations["achieved_goal"][0].numpy()
    picture = as_picture(rooms)
    assert picture.shape == (65, 65, 3) and picture.dtype == np.uint8
    assert (picture[0, 0] == 255).all() and picture[4, 40].max() < 100, "white, and a dark wall"
    assert as_picture(rooms[:1]).shape == (65, 65, 3)


# -- episodes ------------------------------------------------------------------------------------------------------------


def wanted(start: np.ndarray, actions: Tensor) -> np.ndarray:
    return np.concatenate([start[None], start + actions[0].cumsum(0).numpy()])


def test_paths_and_plans_are_those_of_the_episode() -> None:
    task = rooms_task()
    story = watch(Planner(), task)
    assert story is not None and story.name == "rooms" and len(story.episodes) == EPISODES
    misread = 0.0
    for seed, episode in zip(task.evaluation.seeds, story.episodes, strict=True):
        steps = len(episode.path) - 1
        assert [step for step, _ in episode.plans] == list(range(0, steps, 4)), "planned every fourth step"
        assert len(episode.observations) == steps + 1
        shown = torch.cat([o["achieved_goal"] for o in episode.observations]).numpy()
        np.testing.assert_array_equal(np.stack(episode.path), shown)
        env: Any = make_env(task.env_id, 1, "cpu", autoreset="disabled")
        env.reset(seed=[seed])
        np.testing.assert_array_equal(env.points()[0][0].numpy(), episode.path[0])
        np.testing.assert_array_equal(env.points()[1][0].numpy(), episode.goal)
        for step, actions in episode.plans:
            for t in range(step, min(step + 4, steps)):
                env.step(actions[:, t - step])
                np.testing.assert_array_equal(env.points()[0][0].numpy(), episode.path[t + 1])
        reached = np.square(episode.path[-1] - episode.goal).mean() < 1
        assert episode.outcome == f"{'success' if reached else 'failure'} after {steps} steps"
        for plan in episode.plans[:3]:
            line = wanted(episode.path[plan[0]], plan[1])
            line = line[np.abs(line[:, 0] - 32) > 1.5]
            decoded = episode.decoder.positions[episode.planned(plan)]
            assert np.linalg.norm(line[:, None] - decoded[None], axis=2).min(1).max() < 0.71, "within half a step"
            episode.decoder.model = Truth(speed=-1.0)
            wrong = episode.decoder.positions[episode.planned(plan)]
            episode.decoder.model = Truth()
            misread = max(misread, np.linalg.norm(line[:, None] - wrong[None], axis=2).min(1).max())
    assert misread > 3, "a model that moves the other way would be seen"
    assert {e.outcome.split()[0] for e in story.episodes} <= {"success", "failure"}


def test_plans_that_an_escape_did_not_execute_are_not_on_the_path() -> None:
    bounds = ActionBounds([-1.5, -1.5], [1.5, 1.5])
    # the model promises three times what happens, so every plan that is followed ends in an escape
    story = watch(Planner(Truth(speed=3.0), escape=0.9, bounds=bounds), rooms_task(1))
    assert story is not None
    (episode,) = story.episodes
    made = [step for step, _ in episode.plans]
    # followed for 4 steps, escape of 4, followed for 4, escape of 8, followed for 4, escape of 12
    assert made[:3] == [0, 8, 20][: len(made)] and len(made) >= 2


def test_rows_with_one_layout_share_their_encodings() -> None:
    story = watch(Planner(), rooms_task())
    assert story is not None and len({id(e.decoder) for e in story.episodes}) == 1
    lists = TaskList("two-layouts", (0, 1), {"layout": ("OOOO/####/####/####", "####/####/####/OOOO")})
    mazes = watch(Planner(), Task("mazes", "clbench/PointMaze-v0", {"max_episode_steps": 3}, None, lists, "success"))
    assert mazes is not None and len({id(e.decoder) for e in mazes.episodes}) == 2


@pytest.mark.parametrize("model", [Truth(3), Constant(), NotFinite()], ids=["ensemble", "collapsed", "nan"])
def test_any_model_is_drawn(tmp_path: Path, model: Truth) -> None:
    class Still(Planner):
        def act(self, obs: Any, memory: Any, first: Tensor, **kwargs: Any) -> Any:
            cursor = torch.ones(len(first), dtype=torch.int64)
            return torch.zeros(len(first), 2), {"plan": torch.ones(len(first), 6, 2), "cursor": cursor}

    tasks = rooms_task(1, max_episode_steps=3), Task("maze", *rooms_maze())
    path = save_planning(result_of(Still(model), tmp_path, *tasks))
    assert path == tmp_path / "planning.png"
    both = imread(path)
    assert np.ptp(both[..., :3]) > 0.5
    one = save_planning(result_of(Still(model), tmp_path, tasks[0]))
    assert one is not None and imread(one).shape[0] < both.shape[0], "a task is a row"


def rooms_maze() -> tuple[Any, ...]:
    return "clbench/PointMaze-v0", {"max_episode_steps": 2}, None, TaskList.from_seeds(2), "success"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("env_id", "kwargs"), ENVS)
def test_a_gpu_draws_too(tmp_path: Path, env_id: str, kwargs: dict) -> None:
    class Pixels(Truth):
        def _repeat(self, z: Tensor) -> Tensor:
            return z.to(torch.float32).flatten(1)[:, ::1000] if z.dtype == torch.uint8 else z

        def predict(self, z: Tensor, action: Tensor) -> Tensor:
            return z

    class Still(Planner):
        def act(self, obs: Any, memory: Any, first: Tensor, **kwargs: Any) -> Any:
            plan = torch.ones(len(first), 6, 2, device=first.device)
            return plan[:, 0], {"plan": plan, "cursor": torch.ones_like(first, dtype=torch.int64)}

    agent = Still(Pixels())
    agent.device = torch.device("cuda")
    task = Task("gpu", env_id, {**kwargs, "max_episode_steps": 3}, None, TaskList.from_seeds(2), "success")
    assert save_planning(result_of(agent, tmp_path, task)) is not None


def test_nothing_is_drawn_without_the_notion(tmp_path: Path) -> None:
    coins = toys.coins(rng=np.random.default_rng(0)).tasks[0]

    class NoPlans(Planner):
        def act(self, obs: Any, memory: Any, first: Tensor, **kwargs: Any) -> Any:
            return torch.zeros(len(first), 2), None

    for agent, task in (
        (Planner(), coins),  # no grid
        (NoPlans(), rooms_task()),
        (Planner(SimpleNamespace(encode=lambda obs: obs)), rooms_task()),  # not a model that plans
        (toys.Walker, rooms_task()),
    ):
        assert save_planning(result_of(agent, tmp_path, task)) is None
    assert not list(tmp_path.iterdir())


def test_errors_are_not_swallowed(tmp_path: Path) -> None:
    class Broken(Truth):
        def predict(self, z: Tensor, action: Tensor) -> Tensor:
            raise ValueError("no dynamics today")

    with pytest.raises(ValueError, match="no dynamics today"):
        save_planning(result_of(Planner(Broken()), tmp_path, rooms_task()))
    assert not list(tmp_path.iterdir())


# -- whole runs ----------------------------------------------------------------------------------------------------------

STREAM = "two-rooms/size-5078-v0"
SMALL = {"architecture.latent": 8, "architecture.encoder-hidden": 16, "architecture.hidden": 16, "batch-size": 4,
         "window": 4, "replan-every": 8}  # fmt: skip
PLANNER = {"horizon": "8", "samples": "16", "iterations": "1", "elites": "4"}


def test_a_run_of_pldm_has_the_picture_and_one_of_bc_has_not(tmp_path: Path) -> None:
    common = ["--budget", "2", "--eval-every", "0", "--stream.episodes", "2", "--no-tensorboard"]  # fmt: skip
    options = [v for k, value in SMALL.items() for v in (f"--agent.{k}", str(value))]
    options += ["--agent.planner-options", *(v for pair in PLANNER.items() for v in pair)]
    for agent, extra in (("pldm", options), ("bc", [])):
        with pytest.raises(SystemExit) as ended:
            main(["run", STREAM, "--agent", agent, "--out", str(tmp_path / agent), *common, *extra])
        assert ended.value.code == 0
    assert (tmp_path / "pldm" / "planning.png").exists() and not (tmp_path / "bc" / "planning.png").exists()
    page = (tmp_path / "pldm" / "report.html").read_text()
    assert "<h3>Planning</h3>" in page and page.count("data:image/png;base64,") == 2
    assert "<h3>Planning</h3>" not in (tmp_path / "bc" / "report.html").read_text()


def test_drawing_leaves_no_trace(tmp_path: Path) -> None:
    result = clbench.run(
        STREAM, "pldm", out=tmp_path / "run", tensorboard=False, budget=2, eval_every=0, stream_options={"episodes": 2},
        agent_options={"architecture": {"latent": 8, "encoder_hidden": (16,), "hidden": (16,)}, "batch_size": 4,
                       "window": 4, "replan_every": 8, "planner_options": PLANNER},
    )  # fmt: skip
    assert result.agent is not None

    def everything() -> bytes:
        buffer = io.BytesIO()
        state = get_global_state()
        torch.save([result.agent.state_dict(), state["torch"]], buffer)  # type: ignore[union-attr]
        files = [p.read_bytes() for p in sorted(result.path.iterdir()) if p.is_file() and p.name != "planning.png"]
        return buffer.getvalue() + b"".join(files)

    before = everything()
    first = save_planning(result)
    assert first is not None
    picture = first.read_bytes()
    assert everything() == before
    torch.rand(1)
    assert everything() != before, "a number drawn would be seen"
    again = save_planning(result)
    assert again is not None and again.read_bytes() == picture, "the same agent gives the same picture"
    clbench.records.RunDirectory(result.path).clear()
    assert not first.exists(), "and overwriting a run removes it"
