"""OGBench's own environments: a stand-in for the package, and the package itself where it is installed."""

import importlib
import sys
import types

import gymnasium
import numpy as np
import pytest
import torch

import clbench
from clbench.data.ogbench import write_ogbench
from clbench.data.registry import load_dataset
from clbench.envs.make import make_env
from clbench.envs.ogbench import env_name_of
from clbench.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from clbench.streams.core import make_stream
from clbench.testing import check_env


class Line(gymnasium.Env):
    """A point on a line; like OGBench's mazes, it draws from NumPy's process-wide generator and its own action space."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, slips: bool = False):
        self.slips = slips
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        task = (options or {}).get("task_id", np.random.randint(1, 6))  # noqa: NPY002
        self.goal = np.array([float(task), 0.0]) + 0.1 * self.action_space.sample()
        self.place = np.random.uniform(-0.1, 0.1, 2)  # noqa: NPY002
        return self.place.copy(), {"goal": self.goal}

    def step(self, action):
        self.place = self.place + action
        if self.slips:
            self.place += np.random.uniform(-0.1, 0.1, 2)  # noqa: NPY002
        success = bool(np.linalg.norm(self.place - self.goal) < 0.6)
        return self.place.copy(), 0.0, success, False, {"success": float(success)}


@pytest.fixture
def package(monkeypatch):
    """``import ogbench`` gives a stand-in with ``pointmaze-line-v0``, and ``antmaze-teleport-v0``, which slips."""
    module = types.ModuleType("ogbench")
    module.Line = Line  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ogbench", module)
    registry = dict(gymnasium.registry)
    gymnasium.register("pointmaze-line-v0", "ogbench.line:Line", max_episode_steps=20)
    gymnasium.register("antmaze-teleport-v0", "ogbench.line:Line", max_episode_steps=20, kwargs={"slips": True})
    gymnasium.register("pointmaze-line-singletask-v0", "ogbench.line:Line")
    line = types.ModuleType("ogbench.line")
    line.Line = Line  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ogbench.line", line)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(registry)


def rolled(name, seeds, steps=15, disturb=False):
    env = make_env(name, len(seeds), autoreset="disabled")
    obs, _ = env.reset(seed=seeds)
    out = list(obs.values())
    for t in range(steps):
        if disturb:
            np.random.uniform(size=3)  # noqa: NPY002
            torch.rand(2)
        obs, reward, terminated, truncated, info = env.step(
            torch.full((len(seeds), *env.single_action_space.shape), 0.2) * (t % 3)
        )
        out += [*obs.values(), reward, terminated, truncated, info["is_success"]]
    return out


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["ogbench/pointmaze-line-v0", "ogbench/antmaze-teleport-v0"])
def test_episodes_are_functions_of_their_seeds(package, name):
    together = rolled(name, [1, 2, 3])
    assert equal(together, rolled(name, [1, 2, 3], disturb=True))
    assert equal([v[1:2] for v in together], rolled(name, [2]))
    assert not equal(together, rolled(name, [1, 2, 4]))  # negative control
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    rolled(name, [1])
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_the_stand_in_draws_from_the_process():
    """Negative control: without the wrapper the same seed gives different episodes."""
    starts = [Line().reset(seed=0)[0].tolist() for _ in range(2)]
    assert starts[0] != starts[1]


@pytest.mark.parametrize("name", ["ogbench/pointmaze-line-v0", "ogbench/antmaze-teleport-v0"])
def test_it_conforms(package, name):
    check_env(name, success=True).raise_if_failed()


def test_goals_tasks_and_rewards(package):
    env = make_env("ogbench/pointmaze-line-navigate-v0", 5, autoreset="disabled", max_episode_steps=7)
    assert env.max_episode_steps == 7
    obs, _ = env.reset(seed=[1, 2, 3, 4, 5], options={"task_id": [1, 2, 3, 4, 5]})
    assert set(obs) == {"observation", "achieved_goal", "desired_goal"}
    assert torch.equal(obs["observation"], obs["achieved_goal"]) and obs["observation"].dtype == torch.float32
    assert (obs["desired_goal"][:, 0] - torch.arange(1, 6)).abs().max() <= 0.1 + 1e-6
    goals = obs["desired_goal"]
    obs, reward, terminated, _, info = env.step(torch.tensor([[1.0, 0.0]] * 5))
    assert info["is_success"].tolist() == terminated.tolist() == [True] + [False] * 4
    assert reward.tolist() == [0.0] + [-1.0] * 4 and torch.equal(obs["desired_goal"], goals)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("ogbench/pointmaze-lin-v0", {}, UnknownNameError, "Did you mean 'pointmaze-line-v0'"),
        ("ogbench/pointmaze-line-singletask-v0", {}, UnknownNameError, "Unknown environment of OGBench"),
        ("ogbench/pointmaze-line-v0", {"task_id": [6]}, ConfigError, "task_id must be from 1 to 5"),
        ("ogbench/pointmaze-line-v0", {"task": [1]}, UnknownNameError, "Unknown reset option 'task'"),
    ],
)
def test_wrong_names_and_options(package, name, options, error, message):
    with pytest.raises(error, match=message):
        make_env(name, 1).reset(seed=0, options=options)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(MissingExtraError, match=r'pip install "clbench\[mujoco\]".*clbench/OGBenchPointMaze-v0'):
        make_env("ogbench/antmaze-large-v0")


def test_names_of_data_sets_lead_to_environments():
    assert env_name_of("visual-antmaze-giant-stitch-v0") == "visual-antmaze-giant-v0"
    assert env_name_of("puzzle-4x5-noisy-v0") == "puzzle-4x5-v0"
    assert env_name_of("antmaze-large-v0") == "antmaze-large-v0"


def test_data_and_tasks_by_name(package, tmp_path, monkeypatch):
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path))
    name = "ogbench/pointmaze-line-navigate-v0"
    with pytest.raises(
        DataError, match=r"is not on this machine. Download https://.*/pointmaze-line-navigate-v0.npz to"
    ):
        load_dataset(name)
    with pytest.raises(ConfigError, match="is not the name of a data set of OGBench"):
        load_dataset("ogbench/../x")
    walks = load_dataset("ogbench-maze/medium-navigate-v0?trajectories=2")
    write_ogbench(walks, tmp_path / "ogbench" / "pointmaze-line-navigate-v0.npz")
    assert torch.equal(load_dataset(name).actions, walks.actions)
    (task,) = make_stream(name, options={"episodes": 7, "max_steps": 9}).tasks
    assert (task.env_id, task.dataset_id, task.env_kwargs) == (name, name, {"max_episode_steps": 9})
    assert task.evaluation.options["task_id"] == (1, 2, 3, 4, 5, 1, 2)
    result = clbench.run(
        name, "bc", budget=2, out=tmp_path / "run", stream_options={"episodes": 5, "max_steps": 4}, tensorboard=False
    )
    assert result.results["status"] == "complete"


# -- the package itself ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pointmaze-medium-v0", "pointmaze-teleport-v0", "antmaze-medium-v0"])
def test_the_real_environments(name):
    pytest.importorskip("ogbench", reason="needs OGBench: pip install 'clbench[mujoco]'")
    importlib.import_module("ogbench")
    check_env(f"ogbench/{name}", success=True, max_episode_steps=30).raise_if_failed()
    assert equal(rolled(f"ogbench/{name}", [1, 2]), rolled(f"ogbench/{name}", [1, 2], disturb=True))
