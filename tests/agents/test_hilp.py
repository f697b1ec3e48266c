"""Agent hilp: distances, gradients, goals to be avoided, planning with states of the data.

The losses are checked against the reference's numbers (golden cases); here is what those do not see.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clbench
from clbench.agents.gcrl.base import GoalBatch
from clbench.agents.gcrl.networks import SIGN, Input
from clbench.agents.hilp import HILP, hilbert_value, midpoint, random_skills
from clbench.config import build
from clbench.contracts import Experience, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError
from clbench.registry import resolve

POINT = Box(-1, 1, (2,), np.float32)
KEYS: dict[str, Space] = {"observation": POINT, "achieved_goal": POINT, "desired_goal": POINT}
ACTION = Box(-0.3, 0.3, (2,), np.float32)
PLANE = Spaces(Dict(KEYS), ACTION)
SIGNED = Spaces(Dict({**KEYS, SIGN: Box(-1, 1, (1,), np.float32)}), ACTION)
TINY: dict[str, Any] = {"hidden": (16, 16), "batch_size": 32, "skill_dim": 4}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces = PLANE, seed: int = 0, cls: type[HILP] = HILP, **options: Any) -> HILP:
    config = build(cls.Config, {**TINY, **options}, "agent")
    return cls(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def walks(episodes: int = 30, length: int = 10, *, sign: bool = False, seed: int = 0) -> OfflineDataset:
    """Random walks in the square."""
    rng = generator(seed)
    actions = (torch.rand(episodes, length, 2, generator=rng) * 2 - 1) * 0.3
    path = [torch.rand(episodes, 2, generator=rng) * 2 - 1]
    for t in range(length):
        path.append((path[-1] + actions[:, t]).clamp(-1, 1))

    def columns(position: Tensor) -> dict[str, Tensor]:
        extra = {SIGN: torch.ones(len(position), 1)} if sign else {}
        return {"observation": position, "achieved_goal": position, **extra}

    rows = columns(torch.stack(path[:-1], 1).flatten(0, 1))
    return OfflineDataset(rows, actions.flatten(0, 1), torch.full((episodes,), length), columns(path[-1]))


def points(count: int, seed: int = 0, sign: Tensor | None = None) -> dict[str, Tensor]:
    here, goal = (torch.rand(2, count, 2, generator=generator(seed)) * 2 - 1).unbind()
    extra = {} if sign is None else {SIGN: sign.reshape(-1, 1)}
    return {"observation": here, "achieved_goal": here, "desired_goal": goal, **extra}


def act(agent: HILP, obs: dict[str, Tensor]) -> Tensor:
    return agent.act(obs, None, torch.ones(len(obs["observation"]), dtype=torch.bool), rng=generator(0))[0]


def train(agent: HILP, data: OfflineDataset, updates: int, seed: int = 0) -> HILP:
    for _ in agent.learn(Experience(dataset=data), updates, rng=generator(seed)):
        pass
    return agent


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- distances and skills ------------------------------------------------------------------------------------------------


def breaks_an_axiom(distance: Any, x: Tensor, y: Tensor, w: Tensor) -> bool:
    """Whether a distance of rows is negative, not symmetric, or longer than a way around."""
    d = distance(x, y)
    around = distance(x, w) + distance(w, y)
    return bool((d < 0).any() or not torch.allclose(d, distance(y, x)) or (d > around + 1e-4).any())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 6), scale=st.sampled_from([1e-3, 1.0, 100.0]))
def test_distances_are_a_metric(seed: int, dim: int, scale: float) -> None:
    x, y, w = torch.randn(3, 20, dim, generator=generator(seed)) * scale
    assert not breaks_an_axiom(lambda a, b: -hilbert_value(a, b), x, y, w)
    assert torch.allclose(hilbert_value(x, x), torch.tensor(-1e-3))  # the floor under the root


def test_the_check_of_a_metric_notices_what_is_none() -> None:
    x, y, w = torch.randn(3, 20, 3, generator=generator(0))
    assert breaks_an_axiom(lambda a, b: hilbert_value(a, b).square(), x, y, w)  # no triangle inequality
    assert breaks_an_axiom(lambda a, b: torch.relu(a - b).sum(-1), x, y, w)  # not symmetric


def test_skills_are_uniform_directions() -> None:
    z = random_skills(4000, 3, torch.device("cpu"), generator(0))
    assert torch.allclose(z.norm(dim=1), torch.ones(4000))
    assert float(z.mean(0).abs().max()) < 0.05
    assert float((z.T @ z / 4000 - torch.eye(3) / 3).abs().max()) < 0.03


# -- gradients -----------------------------------------------------------------------------------------------------------


class Leaky(HILP):
    """The reward of skills trains the representation, which it must not."""

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = super().loss(batch)
        z = batch.more["skills"].flat
        return loss + ((self.phi(batch.achieved_next)[0] - self.phi(batch.achieved)[0]) * z).sum(
            -1
        ).square().mean(), info


@pytest.mark.parametrize(("cls", "sound"), [(HILP, True), (Leaky, False)])
def test_skills_do_not_train_the_representation(cls: type[HILP], sound: bool) -> None:
    """Other skills, the same gradient of phi."""
    agent, data = make(cls=cls), walks()
    batch = agent.sample(data, generator(1))
    skills = Input(random_skills(len(batch), 4, torch.device("cpu"), generator(5)))
    other = dataclasses.replace(batch, more={"skills": skills})
    gradients = []
    for each in (batch, other):
        agent.optimizer.zero_grad()
        agent.loss(each)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.phi.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-7) is sound


# -- goals to be avoided -------------------------------------------------------------------------------------------------


def test_the_sign_is_no_part_of_the_state() -> None:
    plain, signed = make(), make(SIGNED)
    assert plain.networks.state_dict().keys() == signed.networks.state_dict().keys()
    for a, b in zip(plain.networks.parameters(), signed.networks.parameters(), strict=True):
        assert torch.equal(a, b)
    train(plain, walks(), 3)
    train(signed, walks(sign=True), 3)
    for a, b in zip(plain.networks.parameters(), signed.networks.parameters(), strict=True):
        assert torch.equal(a, b)


def follow_the_skill(agent: HILP) -> HILP:
    """phi is the identity and actions are the skill, so that agents move straight."""

    class Identity(torch.nn.Module):
        def forward(self, x: Any) -> Tensor:
            return torch.stack([x.flat, x.flat])

    class Move(torch.nn.Module):
        def forward(self, s: Any, *, extra: Tensor) -> Any:
            return type("Policy", (), {"mode": extra})()

    agent.phi, agent.skill_actor = Identity(), Move()  # type: ignore[assignment]
    return agent


def nearer(agent: HILP, obs: dict[str, Tensor]) -> Tensor:
    """Whether each row's first action leads to its goal."""
    after = obs["observation"] + 1e-3 * act(agent, obs)
    return (after - obs["desired_goal"]).norm(dim=1) < (obs["observation"] - obs["desired_goal"]).norm(dim=1)


def test_goals_are_avoided_row_by_row() -> None:
    sign = torch.tensor([1.0, -1.0]).repeat(50)
    agent = follow_the_skill(make(SIGNED, frequencies=0))
    assert nearer(agent, points(100, sign=sign)).tolist() == (sign > 0).tolist()
    assert nearer(agent, points(100)).all()  # without the key, all are reached


def test_an_agent_that_overlooks_the_sign_is_noticed() -> None:
    class Deaf(HILP):
        avoids = True

        def policy(self, *args: Any, sign: Any = None, **more: Any) -> Any:
            return super().policy(*args, **more)

    sign = torch.tensor([1.0, -1.0]).repeat(50)
    agent = follow_the_skill(make(SIGNED, cls=Deaf, frequencies=0))
    assert nearer(agent, points(100, sign=sign)).tolist() != (sign > 0).tolist()


@pytest.mark.parametrize("name", ["gcbc", "gcivl", "gciql", "qrl", "crl", "hiql"])
def test_agents_that_can_only_reach_goals_say_so(name: str) -> None:
    cls = resolve("agents", name)
    config = build(cls.Config, {}, "agent")
    with pytest.raises(ConfigError, match="can only reach goals.*goal_sign.*hilp"):
        cls(SIGNED, config, device=torch.device("cpu"), rng=generator(0))


@pytest.mark.parametrize("name", ["hilp", "hilp-zero-shot"])
def test_the_chase_runs(name: str, tmp_path: Path) -> None:
    result = clbench.run(
        "two-rooms-chase", agent=name, budget=2, eval_every=0, out=tmp_path, tensorboard=False,
        agent_options={"hidden": (8,), "batch_size": 8, "skill_dim": 4, "log_every": 1},
        stream_options={"episodes": 2, "transitions": 900, "speeds": (1.0,)},
    )  # fmt: skip
    assert [len(row) for row in result.results["matrix"]] == [2, 2]


# -- planning with states of the data ------------------------------------------------------------------------------------


def midpoint_of_one(x: Tensor, y: Tensor, states: Tensor, rounds: int, nearest: int) -> Tensor:
    """One row at a time, as in the definition."""
    for _ in range(rounds):
        distance = [max(float((w - x).norm()), float((w - y).norm())) for w in states]
        order = sorted(range(len(states)), key=lambda i: distance[i])
        y = torch.stack([states[i] for i in order[:nearest]]).mean(0)
    return y


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), rounds=st.integers(0, 3), nearest=st.sampled_from([1, 3, 50]))
def test_midpoints_as_defined(seed: int, rounds: int, nearest: int) -> None:
    states = torch.randn(20, 3, generator=generator(seed))
    x, y = torch.randn(2, 4, 3, generator=generator(seed + 1))
    found = midpoint(x, y, states, rounds=rounds, nearest=nearest)
    expected = [midpoint_of_one(a, b, states, rounds, nearest) for a, b in zip(x, y, strict=True)]
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def test_every_round_halves_the_way() -> None:
    states = torch.stack([torch.linspace(0, 1, 2001), torch.zeros(2001)], 1)
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for rounds in range(4):
        assert float(midpoint(x, y, states, rounds=rounds)[0, 0]) == pytest.approx(0.5**rounds, abs=0.02)


def test_a_wall_is_walked_around() -> None:
    """Latents of a horseshoe: the straight way leads across nothing that was ever seen, the midpoint lies on it."""
    angle = torch.linspace(0, torch.pi, 1000)
    states = torch.stack([angle.cos(), angle.sin()], 1)
    start, goal = states[:1], states[-1:]
    assert float((goal - start)[0, 1]) == pytest.approx(0, abs=1e-5)
    assert float((midpoint(start, goal, states, rounds=1) - start)[0, 1]) > 0.9


def test_planning_does_not_change_training() -> None:
    plain, planning = train(make(), walks(), 3), train(make(plan_states=100), walks(), 3)
    for a, b in zip(plain.networks.parameters(), planning.networks.parameters(), strict=True):
        assert torch.equal(a, b)
    obs = points(20)
    assert not torch.equal(act(plain, obs), act(planning, obs))


def test_states_to_plan_with_are_of_the_latest_data_and_saved() -> None:
    agent = make(plan_states=40)
    assert "waypoints" not in agent.state_dict()
    first, second = walks(seed=0), walks(seed=1)
    train(agent, first, 1)
    assert agent.waypoints is not None and len(agent.waypoints) == 40
    train(agent, second, 1)
    rows = {tuple(row) for row in second.observations["achieved_goal"].tolist()}
    assert all(tuple(row) in rows for row in agent.waypoints.tolist())
    obs = points(20)
    before = act(agent, obs)
    twin = make(plan_states=40, seed=1)
    twin.load_state_dict(through_file(agent.state_dict()))
    assert torch.equal(act(twin, obs), before)
    forgetful = {k: v for k, v in agent.state_dict().items() if k != "waypoints"}
    twin.load_state_dict(forgetful)  # the control: without them, the goal is headed for straight away
    assert not torch.equal(act(twin, obs), before)


def test_their_latents_are_those_of_the_present_networks() -> None:
    agent, obs = train(make(plan_states=40), walks(), 1), points(20)
    act(agent, obs)
    agent.update(agent.sample(walks(), generator(2)))
    twin = make(plan_states=40)
    twin.load_state_dict(agent.state_dict())
    assert torch.equal(act(agent, obs), act(twin, obs))
    act(agent, obs)
    agent._embedded = (agent.updates, torch.zeros(40, 4))  # the control: latents of other networks
    assert not torch.equal(act(agent, obs), act(twin, obs))


def test_small_data_are_used_whole() -> None:
    agent = train(make(plan_states=50_000), walks(episodes=3, length=5), 1)
    assert agent.waypoints is not None and len(agent.waypoints) == 15


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="plan_states must be at least 0, got -1"):
        build(HILP.Config, {"plan_states": -1}, "agent")


def test_discrete_actions() -> None:
    agent = make(Spaces(PLANE.observation, Discrete(4, start=2)))
    chosen = act(agent, points(50))
    assert chosen.dtype == torch.int64 and set(chosen.tolist()) <= {2, 3, 4, 5}
