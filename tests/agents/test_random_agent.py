"""The random agent draws uniformly, with the generator it is given, and never touches the environment."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from clbench.agents.random import RandomAgent
from clbench.contracts import Experience, Spaces
from clbench.errors import ConfigError

OBS = Box(-1, 1, (3,), np.float32)


def make(tiny: Any, action: Any) -> RandomAgent:
    return RandomAgent(Spaces(OBS, action), RandomAgent.Config(), device=tiny.cpu, rng=tiny.generator(0))


def draw(tiny: Any, action: Any, rows: int = 20_000, seed: int = 0) -> torch.Tensor:
    first = torch.ones(rows, dtype=torch.bool)
    return make(tiny, action).act(torch.zeros(rows, 3), None, first, rng=tiny.generator(seed))[0]


def test_discrete_actions_are_uniform_and_start_where_the_space_does(tiny: Any) -> None:
    actions = draw(tiny, Discrete(4, start=-1))
    assert actions.dtype == torch.int64 and actions.unique().tolist() == [-1, 0, 1, 2]
    # 20,000 draws of probability 1/4: standard deviation of a share is 0.0031
    assert torch.bincount(actions + 1).div(20_000).sub(0.25).abs().max() < 5 * 0.0031


def test_continuous_actions_have_the_moments_of_the_uniform_distribution(tiny: Any) -> None:
    space = Box(np.array([-2.0, 1.0], np.float32), np.array([0.0, 7.0], np.float32))
    actions = draw(tiny, space)
    assert actions.dtype == torch.float32 and all(space.contains(a) for a in actions[:100].numpy())
    width = torch.tensor([2.0, 6.0])
    assert ((actions.mean(0) - torch.tensor([-1.0, 4.0])).abs() / width < 5 / 12**0.5 / 20_000**0.5).all()
    assert torch.allclose(actions.std(0), width / 12**0.5, rtol=0.03)


def test_coordinates_without_bounds_are_normal(tiny: Any) -> None:
    space = Box(np.array([-np.inf, 0.0], np.float32), np.array([np.inf, 1.0], np.float32))
    actions = draw(tiny, space)
    assert abs(float(actions[:, 0].std()) - 1) < 0.03 and bool(actions.isfinite().all())
    assert float(actions[:, 1].min()) >= 0 and float(actions[:, 1].max()) <= 1


def test_actions_are_a_function_of_the_generator(tiny: Any) -> None:
    outside = torch.get_rng_state()
    torch.manual_seed(5)
    a = draw(tiny, Discrete(4), seed=1)
    torch.manual_seed(6)
    b = draw(tiny, Discrete(4), seed=1)
    torch.set_rng_state(outside)
    assert torch.equal(a, b) and not torch.equal(a, draw(tiny, Discrete(4), seed=2))


def test_learning_consumes_the_budget_and_leaves_the_environment_alone(tiny: Any) -> None:
    env = tiny.Line(2, "discrete")
    agent = make(tiny, env.spaces.action)
    steps = [m["step"] for m in agent.learn(Experience(env=env), 7, rng=tiny.generator(0))]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert env.steps == env.resets == 0
    assert agent.costs() == {"updates": 0, "samples": 0} and agent.num_parameters == 0


def test_unsupported_actions_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="Agent 'random' needs Box or Discrete actions, but the action space is Dict"):
        make(tiny, Dict(a=Discrete(2)))
