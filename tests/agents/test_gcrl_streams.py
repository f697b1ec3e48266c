"""The offline goal-conditioned agents in streams of tasks, on pixels, and where goals are not states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

import clbench
from clbench.agents.gcrl.base import GoalAgent
from clbench.config import build
from clbench.contracts import Experience, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.data.registry import load_dataset
from clbench.errors import ConfigError, DataError
from clbench.registry import resolve
from clbench.rng import torch_generator
from clbench.testing import check_agent
from clbench.testing.fixtures import Fixture

ALL = ["gcbc", "gcivl", "gciql", "qrl", "crl", "hiql", "hilp"]
EXTRACTED = ["gciql", "qrl", "crl"]
TINY: dict[str, Any] = {"hidden": (8, 8), "batch_size": 4}


def options(name: str, **more: Any) -> dict[str, Any]:
    return {**TINY, **({"latent_dim": 16} if name in ("qrl", "crl") else {}), **more}


def make(name: str, spaces: Spaces, **more: Any) -> GoalAgent:
    cls = resolve("agents", name)
    config = build(cls.Config, options(name, **more), where="test")
    return cls(spaces, config, device=torch.device("cpu"), rng=torch_generator(0, "test"))


# -- streams of tasks and the continual protocols ------------------------------------------------------------------------

STREAMS: dict[str, dict[str, Any]] = {
    "two-rooms-doors": {"episodes": 1, "transitions": 400},
    "maze-layouts": {"episodes": 1, "transitions": 400, "layouts": 2},
}
PROTOCOLS = ["sequential", "independent", "joint"]
# every agent and every protocol, but not all 42 combinations: those are the slow test
SOME = [
    *[(a, "maze-layouts", PROTOCOLS[i % 3]) for i, a in enumerate(ALL)],
    ("hiql", "two-rooms-doors", "sequential"),
]


def run(agent: str, stream: str, protocol: str, out: Path) -> None:
    result = clbench.run(
        stream, agent, protocol=protocol, budget=2, eval_every=0, agent_options=options(agent), out=out,
        stream_options=STREAMS[stream], tensorboard=False, references=False,
    )  # fmt: skip
    assert 0 <= (result.metrics["average_performance"] or 0.0) <= 1
    rows = (out / "eval.csv").read_text().splitlines()
    assert len(rows) > 2


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("agent", ALL)
def test_in_streams_under_every_protocol(agent: str, stream: str, protocol: str, tmp_path: Path) -> None:
    run(agent, stream, protocol, tmp_path / "run")


@pytest.mark.parametrize(("agent", "stream", "protocol"), SOME)
def test_in_streams(agent: str, stream: str, protocol: str, tmp_path: Path) -> None:
    run(agent, stream, protocol, tmp_path / "run")


# -- pixels, and goals that are not states -------------------------------------------------------------------------------

DATA = {
    "positions": "two-rooms?transitions=200",
    "pixels": "two-rooms?transitions=200&observation=pixels",
    "maze": "point-maze?transitions=200",
    "maze pixels": "point-maze?transitions=200&observation=pixels",
}
ENVS: dict[str, tuple[str, dict[str, Any]]] = {
    "positions": ("clbench/TwoRooms-v0", {}),
    "pixels": ("clbench/TwoRooms-v0", {"observation": "pixels"}),
    "maze": ("clbench/PointMaze-v0", {}),
    "maze pixels": ("clbench/PointMaze-v0", {"observation": "pixels"}),
}


@pytest.fixture(scope="module")
def data() -> dict[str, OfflineDataset]:
    return {kind: load_dataset(identifier) for kind, identifier in DATA.items()}


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ALL)
def test_learn_and_act(data: dict[str, OfflineDataset], name: str, kind: str) -> None:
    """Every trained number moves; actions fit the space; what was learned is saved and read back."""
    env_id, kwargs = ENVS[kind]
    env = clbench.make_env(env_id, num_envs=3, device="cpu", **kwargs)
    spaces = Spaces(env.single_observation_space, env.single_action_space)
    agent = make(name, spaces)
    before = {k: v.clone() for k, v in agent.networks.named_parameters()}
    rng = torch_generator(1, "learn")
    # what all latents have in common cancels out of their distances
    last = len(agent.config.hidden)
    still = {f"phi.mlp.biases.{last}", f"phi.mlp.shifts.{last - 1}", "quasimetric.alpha"}
    infos = list(agent.learn(Experience(data[kind], None), 3, rng=rng))
    assert all(np.isfinite(v) for info in infos for v in info.values())
    for key, value in agent.networks.named_parameters():
        assert bool(torch.isfinite(value).all())
        if key.removeprefix("target_") not in still:
            assert not torch.equal(value, before[key]), key
    obs, _ = env.reset(seed=0)
    first = torch.ones(3, dtype=torch.bool)
    action, _ = agent.act(obs, None, first, rng=rng)
    assert action.shape == (3, *env.single_action_space.shape)  # type: ignore[misc]
    assert all(env.single_action_space.contains(a.numpy()) for a in action)
    twin = make(name, spaces)
    twin.load_state_dict(agent.state_dict())
    again, _ = twin.act(obs, None, first, rng=torch_generator(2, "other"))
    assert torch.equal(action, again)  # greedy: nothing is drawn
    loud, _ = twin.act(obs, None, first, rng=torch_generator(2, "other"), explore=True)
    assert not torch.equal(action, loud)


def test_the_parts_of_observations_that_agents_see(data: dict[str, OfflineDataset]) -> None:
    for kind, (env_id, kwargs) in ENVS.items():
        env = clbench.make_env(env_id, num_envs=1, device="cpu", **kwargs)
        inputs = make("qrl", Spaces(env.single_observation_space, env.single_action_space)).inputs
        assert inputs.same == (not kind.startswith("maze")), kind
        assert (inputs.context_shape.flat > 0) == kind.startswith("maze"), kind  # velocities
        assert (inputs.state_shape.image is None) == ("pixels" not in kind)
        assert (inputs.goal_shape.image is None) == ("pixels" not in kind)


@pytest.mark.parametrize("name", ["qrl", "hilp"])
def test_distances_of_a_maze_compare_positions_without_velocities(data: dict[str, OfflineDataset], name: str) -> None:
    env = clbench.make_env("clbench/PointMaze-v0", num_envs=1, device="cpu")
    agent = make(name, Spaces(env.single_observation_space, env.single_action_space), normalise=False)
    batch = agent.sample(data["maze"], torch_generator(0, "sample"))
    size = batch.achieved.flat.shape[1]  # type: ignore[union-attr]
    assert size == batch.g_v.flat.shape[1] == agent.inputs.goal_shape.flat  # type: ignore[union-attr]
    assert batch.s.flat.shape[1] > size  # type: ignore[union-attr]


def test_the_subgoal_of_hiql_is_a_state_too(data: dict[str, OfflineDataset]) -> None:
    """Where goals are not states, its value is that of the state at the same row."""
    env = clbench.make_env("clbench/PointMaze-v0", num_envs=1, device="cpu")
    agent = make("hiql", Spaces(env.single_observation_space, env.single_action_space), normalise=False, frequencies=0)
    batch = agent.sample(data["maze"], torch_generator(0, "sample"))
    goals, states = batch.more["high_actor_targets"].flat, batch.more["high_actor_target_states"].flat
    assert goals is not None and states is not None
    achieved = data["maze"].observations["achieved_goal"]
    whole = agent.inputs.state(data["maze"].observations).flat
    assert whole is not None
    for goal, state in zip(goals, states, strict=True):
        rows = (whole == state).all(1).nonzero()[:, 0]
        assert len(rows)
        assert any(torch.equal(achieved[r].reshape(-1).to(torch.float32), goal) for r in rows)


# -- extraction ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXTRACTED)
def test_ddpg_bc_conforms_on_continuous_actions(name: str) -> None:
    cls = resolve("agents", name)
    check_agent(cls, config=options(name), budget=8, fixtures=[Fixture(goal=True)]).raise_if_failed()


@pytest.mark.parametrize("name", EXTRACTED)
def test_ddpg_bc_with_a_learned_deviation_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="improves the mean action"):
        make(name, Fixture(goal=True).spaces, learn_std=True)


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [
    {"preset": "antmazes"}, {"lr": 0.0}, {"batch_size": 0}, {"discount": 1.0}, {"hidden": ()}, {"log_every": 0},
    {"value_p_random": 0.9}, {"actor_p_random": -1.0}, {"expectile": 1.0}, {"tau": 0.0}, {"alpha": -1.0},
])  # fmt: skip
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[-1]):
        build(resolve("agents", "gcivl").Config, wrong, where="test")


@pytest.mark.parametrize(("name", "size"), [("qrl", 12), ("qrl", 4)])
def test_latents_that_do_not_split_into_groups_are_refused(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        make(name, Fixture(goal=True).spaces, latent_dim=size)


def test_data_without_goals_are_refused() -> None:
    agent = make("gcbc", Fixture(goal=True).spaces)
    with pytest.raises(DataError, match="no achieved_goal"):
        list(agent.learn(Experience(Fixture().dataset(), None), 1, rng=torch_generator(0, "x")))


def test_observations_without_goals_are_refused() -> None:
    with pytest.raises(ConfigError, match="desired_goal"):
        make("gcbc", Spaces(Dict(observation=Box(-1, 1, (2,), np.float32)), Discrete(2)))
