"""Agent hilp-zero-shot: tasks, features and losses against their definitions in plain torch; prompts; the order of a step.

Each guarantee has a variant that is broken on purpose, which the same check must notice.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clbench.agents.gcrl.base import GoalBatch
from clbench.agents.gcrl.networks import SIGN, Input
from clbench.agents.gcrl.seeds import SeedBatch
from clbench.agents.hilp_zero_shot import (
    LARGEST,
    HILPZeroShot,
    TruncatedNormal,
    draw_tasks,
    infer_task,
    keep_within,
    linear,
    task_vector,
)
from clbench.agents.networks.mlp import count_parameters
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset
from clbench.errors import ClbenchError, ConfigError

POINT = Box(-1, 1, (2,), np.float32)
KEYS: dict[str, Space] = {"observation": POINT, "achieved_goal": POINT, "desired_goal": POINT}
LIMIT = 0.3
ACTION = Box(-LIMIT, LIMIT, (2,), np.float32)
PLANE = Spaces(Dict(KEYS), ACTION)
SIGNED = Spaces(Dict({**KEYS, SIGN: Box(-1, 1, (1,), np.float32)}), ACTION)
TINY: dict[str, Any] = {"hidden": (16, 16), "map_hidden": (16, 8), "batch_size": 32, "skill_dim": 4}
FEATURES = ("state", "difference")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces = PLANE, seed: int = 0, cls: type[HILPZeroShot] = HILPZeroShot, **options: Any) -> HILPZeroShot:
    config = build(cls.Config, {**TINY, **options}, "agent")
    return cls(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def walks(episodes: int = 30, length: int = 10, seed: int = 0) -> OfflineDataset:
    """Random walks in the square."""
    rng = generator(seed)
    actions = (torch.rand(episodes, length, 2, generator=rng) * 2 - 1) * LIMIT
    path = [torch.rand(episodes, 2, generator=rng) * 2 - 1]
    for t in range(length):
        path.append((path[-1] + actions[:, t]).clamp(-1, 1))
    rows = torch.stack(path[:-1], 1).flatten(0, 1)
    return OfflineDataset(
        {"observation": rows, "achieved_goal": rows}, actions.flatten(0, 1), torch.full((episodes,), length),
        {"observation": path[-1], "achieved_goal": path[-1]},
    )  # fmt: skip


def train(agent: HILPZeroShot, updates: int, data: OfflineDataset | None = None, seed: int = 0) -> HILPZeroShot:
    for _ in agent.learn(Experience(dataset=data or walks()), updates, rng=generator(seed)):
        pass
    return agent


def shaken(seed: int = 0, **options: Any) -> tuple[HILPZeroShot, GoalBatch]:
    """An agent whose targets have parted from their networks and whose mean is not 0, and a batch."""
    agent = make(seed=seed, **options)
    with torch.no_grad():
        for p in agent.networks.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator(seed + p.numel())))
        agent.phi.mean.copy_(torch.randn(4, generator=generator(seed)))
    return agent, agent.sample(walks(), generator(seed + 1))


def points(count: int, seed: int = 0, sign: Tensor | None = None) -> dict[str, Tensor]:
    here, goal = (torch.rand(2, count, 2, generator=generator(seed)) * 2 - 1).unbind()
    extra = {} if sign is None else {SIGN: sign.reshape(-1, 1)}
    return {"observation": here, "achieved_goal": here, "desired_goal": goal, **extra}


def act(agent: HILPZeroShot, obs: dict[str, Tensor], **options: Any) -> Tensor:
    first = torch.ones(len(obs["observation"]), dtype=torch.bool)
    return agent.act(obs, None, first, rng=generator(0), **options)[0]


def gradient(module: nn.Module, loss: Tensor) -> Tensor:
    parts = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in parts if g is not None] or [torch.zeros(1)])


# -- networks and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3)])
def test_weights_are_orthogonal(shape: tuple[int, int]) -> None:
    layer = linear(*shape, generator(0))
    small = layer.weight if shape[1] <= shape[0] else layer.weight.T
    assert torch.allclose(small @ small.T, torch.eye(min(shape)), atol=1e-5)
    assert not layer.bias.any()


def test_size_of_the_reference() -> None:
    """obs 2, act 2: by the arithmetic of its layers, without the targets."""

    def dense(n_in: int, n_out: int) -> int:
        return n_in * n_out + n_out

    def tower(n_in: int, wide: int) -> int:
        return dense(n_in, wide) + 2 * wide + dense(wide, 512)

    phi = 2 * (tower(2, 512) + dense(512, 50))
    successor = tower(4, 1024) + tower(52, 1024) + 2 * (dense(1024, 1024) + dense(1024, 50))
    actor = tower(2, 1024) + tower(52, 1024) + dense(1024, 1024) + dense(1024, 2)
    config = build(HILPZeroShot.Config, {"preset": "reference"}, "agent")
    agent = HILPZeroShot(PLANE, config, device=torch.device("cpu"), rng=generator(0))
    assert count_parameters(agent.networks) == phi + successor + actor
    assert [g["lr"] for g in agent.optimizer.param_groups] == [1e-4, 5e-4]
    assert {id(p) for p in agent.optimizer.param_groups[1]["params"]} == {id(p) for p in agent.phi.parameters()}
    assert (config.hidden, config.map_hidden, config.skill_dim) == ((512, 512), (1024, 512), 50)


def test_presets_resolve() -> None:
    small, reference = (build(HILPZeroShot.Config, {"preset": name}, "agent") for name in ("small", "reference"))
    assert all(value is not None for config in (small, reference) for value in vars(config).values())
    assert max(small.map_hidden or ()) < max(reference.map_hidden or ()) and reference.behaviour == 0


def test_goals_have_their_own_discount() -> None:
    config = build(HILPZeroShot.Config, {"goal_discount": 0.5, "discount": 0.9}, "agent")
    assert config.value_sampling.discount == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [({"preset": "antmaze"}, "preset"), ({"features": "concat"}, "features"), ({"skill_dim": 0}, "skill_dim must be")],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClbenchError, match=message):
        build(HILPZeroShot.Config, options, "agent")


def test_discrete_actions_are_refused() -> None:
    with pytest.raises(ConfigError, match="continuous actions.*Discrete.*use hilp"):
        make(Spaces(PLANE.observation, Discrete(3)))


# -- tasks ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 6), mix=st.sampled_from([0.0, 0.5, 1.0]))
def test_tasks_have_length_root_d(seed: int, dim: int, mix: float) -> None:
    f = torch.randn(30, dim, generator=generator(seed))
    z = draw_tasks(f, mix, generator(seed))
    assert torch.allclose(z.norm(dim=1), torch.full((30,), math.sqrt(dim)), atol=1e-4)


def of_some_row(z: Tensor, candidates: Tensor) -> float:
    """Share of tasks that have the direction of one of the candidates."""
    cosine = nn.functional.normalize(z, dim=1) @ nn.functional.normalize(candidates, dim=1).T
    return float((cosine.amax(1) > 1 - 1e-5).float().mean())


def test_tasks_of_the_data() -> None:
    f = torch.randn(500, 5, generator=generator(0)) @ torch.randn(5, 5, generator=generator(1)) + 1
    inferred = f @ torch.linalg.inv((f.T @ f / 500).double()).float()
    assert of_some_row(draw_tasks(f, 1.0, generator(2)), inferred) == 1
    assert of_some_row(draw_tasks(f, 0.0, generator(2)), inferred) < 0.05
    assert of_some_row(draw_tasks(f, 0.5, generator(2)), inferred) == pytest.approx(0.5, abs=0.08)
    assert of_some_row(draw_tasks(f, 1.0, generator(2)), f) < 0.1  # the control: without the inverse


def test_tasks_are_of_other_rows() -> None:
    f = torch.randn(200, 5, generator=generator(0))
    inferred = task_vector(f @ torch.linalg.inv(f.T @ f / 200))
    own = (draw_tasks(f, 1.0, generator(1)) - inferred).norm(dim=1) < 1e-3
    assert float(own.float().mean()) < 0.05


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_a_linear_reward_is_recovered(seed: int, scale: float) -> None:
    f, w = torch.randn(100, 6, generator=generator(seed)), torch.randn(6, generator=generator(seed + 1))
    assert torch.allclose(infer_task(f, scale * f @ w), task_vector(w), atol=1e-3)
    assert torch.allclose(infer_task(f, -scale * f @ w), -task_vector(w), atol=1e-3)


# -- actions -------------------------------------------------------------------------------------------------------------


def test_actions_keep_within_bounds_and_let_the_gradient_through() -> None:
    a = torch.tensor([-3.0, 0.2, 1.0, 5.0], requires_grad=True)
    kept = keep_within(a)
    assert float(kept.detach().abs().max()) <= LARGEST + 1e-7  # of the order of a rounding
    assert torch.autograd.grad(kept.sum(), a)[0].tolist() == [1, 1, 1, 1]
    hard = a.clamp(-LARGEST, LARGEST)  # the control
    assert torch.autograd.grad(hard.sum(), a)[0].tolist() == [0, 1, 0, 0]


def test_noise_is_cut() -> None:
    policy = TruncatedNormal(torch.zeros(1000, 2), torch.full((2,), math.log(0.2)))
    noise = torch.randn(1000, 2, generator=generator(0))
    a = policy.perturbed(noise, 0.3)
    assert torch.allclose(a, (0.2 * noise).clamp(-0.3, 0.3))
    assert float(policy.sample(generator(0)).abs().max()) > 0.5  # only training cuts it
    near = TruncatedNormal(torch.full((1000, 2), 0.95), torch.full((2,), math.log(0.2)))
    assert float(near.sample(generator(0)).max()) <= 1 and float(near.perturbed(noise, 0.3).max()) <= 1


# -- losses --------------------------------------------------------------------------------------------------------------


def features_by_hand(agent: HILPZeroShot, batch: GoalBatch) -> Tensor:
    here, there = (agent.phi(x)[0] - agent.phi.mean for x in (batch.achieved, batch.achieved_next))
    return there if agent.config.features == "state" else there - here


def successor_loss_by_hand(
    agent: HILPZeroShot, batch: GoalBatch, *, head: Any = torch.argmin, q_loss: bool = False
) -> Tensor:
    """Row by row, head by head."""
    z, noise = batch.more["z"].flat, batch.more["noise_next"].flat
    assert z is not None and noise is not None
    f, total = features_by_hand(agent, batch), torch.zeros(())
    mean = torch.tanh(agent.actor(batch.s_next, z)[0])
    for i in range(len(z)):
        s, s_next = (Input(x.flat[i : i + 1]) for x in (batch.s, batch.s_next))  # type: ignore[index]
        a_next = (mean[i] + (0.2 * noise[i]).clamp(-0.3, 0.3)).clamp(-LARGEST, LARGEST)
        following = agent.target_successor(s_next, z[i : i + 1], a_next[None])[:, 0]
        y = f[i] + agent.config.discount * following[head(following @ z[i])]
        for prediction in agent.successor(s, z[i : i + 1], batch.a[i : i + 1])[:, 0]:
            error = (prediction - y) @ z[i] if q_loss else prediction - y
            total = total + error.square().mean() / len(z)
    return total


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("q_loss", [False, True])
def test_loss_of_successor_features(features: str, q_loss: bool) -> None:
    agent, batch = shaken(features=features, q_loss=q_loss)
    with torch.no_grad():
        loss = agent.successor_loss(batch)
        assert torch.allclose(loss, successor_loss_by_hand(agent, batch, q_loss=q_loss), rtol=1e-4)
        assert not torch.allclose(loss, successor_loss_by_hand(agent, batch, q_loss=not q_loss), rtol=1e-3)
        brave = successor_loss_by_hand(agent, batch, head=torch.argmax, q_loss=q_loss)  # the greater of the heads
        assert not torch.allclose(loss, brave, rtol=1e-3)


def test_loss_of_the_policy() -> None:
    agent, batch = shaken()
    z, noise = batch.more["z"].flat, batch.more["noise"].flat
    assert z is not None and noise is not None
    with torch.no_grad():
        loss, q = agent.actor_loss(batch)
        a = (torch.tanh(agent.actor(batch.s, z)[0]) + (0.2 * noise).clamp(-0.3, 0.3)).clamp(-LARGEST, LARGEST)
        first, second = (agent.successor(batch.s, z, a) * z).sum(-1)
    cloning = (torch.tanh(agent.actor(batch.s, z)[0]) - batch.a).square().sum(-1).mean()
    assert torch.allclose(q, torch.minimum(first, second), rtol=1e-4)
    expected = -q.mean() + agent.config.behaviour * q.abs().mean() * cloning
    assert torch.allclose(loss, expected.detach(), rtol=1e-4)
    assert not torch.allclose(q, torch.maximum(first, second), rtol=1e-3)


def test_without_cloning_as_in_the_paper() -> None:
    agent, batch = shaken(behaviour=0.0)
    with torch.no_grad():
        loss, q = agent.actor_loss(batch)
    assert torch.allclose(loss, -q.mean())


def test_gradients_stop_where_they_must() -> None:
    agent, batch = shaken()
    losses = {
        "phi": agent.phi_loss(batch)[0],
        "successor": agent.successor_loss(batch),
        "actor": agent.actor_loss(batch)[0],
    }
    for name, loss in losses.items():
        for other in losses:
            moved = bool(gradient(agent.networks[other], loss).any())
            assert moved == (name == other), f"{name}_loss and {other}"
    total = agent.loss(batch)[0]
    assert torch.allclose(total, torch.stack(list(losses.values())).sum())


def test_the_check_of_gradients_notices_a_leak() -> None:
    agent, batch = shaken()
    z = batch.more["z"].flat
    assert z is not None
    a = agent.pi(batch.s, z).mean
    leaky, sound = agent.successor(batch.s, z, a).sum(), agent.successor.frozen(batch.s, z, a).sum()
    assert torch.allclose(leaky, sound)
    assert gradient(agent.successor, leaky).any() and not gradient(agent.successor, sound).any()
    assert torch.allclose(gradient(agent.actor, leaky), gradient(agent.actor, sound))


# -- the order of a step -------------------------------------------------------------------------------------------------


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_targets_and_mean_after_a_step() -> None:
    """phi's target follows phi before the step, F's target F after it, and the mean phi before it."""
    agent, batch = shaken()
    old = {name: flat(network) for name, network in agent.networks.items()}
    mean, own = agent.phi.mean.clone(), agent.phi(batch.achieved)[0].mean(0).detach()
    agent.update(batch)
    new = {name: flat(network) for name, network in agent.networks.items()}
    tau, slow = agent.config.tau, agent.config.successor_tau
    assert torch.allclose(new["target_phi"], torch.lerp(old["target_phi"], old["phi"], tau), atol=1e-7)
    assert torch.allclose(
        new["target_successor"], torch.lerp(old["target_successor"], new["successor"], slow), atol=1e-7
    )
    assert torch.allclose(agent.phi.mean, 0.995 * mean + 0.005 * own, atol=1e-6)
    # the controls: the other order
    assert not torch.allclose(new["target_phi"], torch.lerp(old["target_phi"], new["phi"], tau), atol=1e-7)
    wrong = torch.lerp(old["target_successor"], old["successor"], slow)
    assert not torch.allclose(new["target_successor"], wrong, atol=1e-7)


def test_targets_begin_as_copies() -> None:
    agent = make()
    assert torch.equal(flat(agent.phi), flat(agent.target_phi))
    assert torch.equal(flat(agent.successor), flat(agent.target_successor))


def test_the_mean_is_that_of_the_features() -> None:
    """A constant representation: the mean comes nearer by the same factor in every step."""
    agent = make(phi_lr=1e-12)
    batch = agent.sample(walks(), generator(0))
    level = agent.phi(batch.achieved)[0].mean(0).detach()
    for _ in range(20):
        agent.update(batch)
    assert torch.allclose(agent.phi.mean, level * (1 - 0.995**20), atol=1e-5)


def test_seeds_are_not_batched() -> None:
    """Its tasks come from the networks, its targets move at two moments: another update than the one that is batched."""
    with pytest.raises(ConfigError, match="hilp-zero-shot' has its own; train its seeds one after the other"):
        SeedBatch([make(seed=0), make(seed=1)])


# -- acting --------------------------------------------------------------------------------------------------------------


def spy(agent: HILPZeroShot) -> list[Tensor]:
    """The tasks that the policy is asked to follow."""
    seen: list[Tensor] = []
    original = agent.pi

    def pi(s: Input, z: Tensor) -> TruncatedNormal:
        seen.append(z)
        return original(s, z)

    agent.pi = pi  # type: ignore[method-assign]
    return seen


def test_goals_are_prompts() -> None:
    agent, obs = train(make(), 3), points(10)
    seen = spy(agent)
    act(agent, obs)
    here, there = (agent.phi(agent.inputs.goal(obs[k]))[0] for k in ("achieved_goal", "desired_goal"))
    assert torch.allclose(seen[0], 2 * nn.functional.normalize(there - here, dim=1), atol=1e-5)  # 2 = sqrt(4)


def test_goals_are_avoided_row_by_row() -> None:
    sign = torch.tensor([1.0, -1.0]).repeat(5)
    agent = make(SIGNED)
    seen = spy(agent)
    act(agent, points(10, sign=torch.ones(10)))
    act(agent, points(10, sign=sign))
    assert torch.equal(seen[1], sign[:, None] * seen[0])
    assert not torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("features", FEATURES)
def test_prompting_by_rewards(features: str) -> None:
    agent = train(make(features=features), 5)
    obs, following, w = points(300), points(300, seed=1), torch.tensor([1.0, -2.0, 0.5, 0.0])
    f = agent.phi(agent.inputs.goal(obs["achieved_goal"]))[0] - agent.phi.mean
    if features == "difference":
        f = agent.phi(agent.inputs.goal(following["achieved_goal"]))[0] - agent.phi.mean - f
    z = agent.prompt(obs, (f @ w).detach(), following)
    assert torch.allclose(z, task_vector(w), atol=0.05)
    seen = spy(agent)
    goals = act(agent, points(10))
    assert torch.allclose(seen[0], z.expand(10, -1))
    agent.prompted = None
    assert not torch.equal(act(agent, points(10)), goals)


def test_a_prompt_is_saved_and_ends_with_its_task() -> None:
    agent = make(features="state")
    agent.prompt(points(50), torch.rand(50, generator=generator(0)))
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    twin = make(features="state", seed=1)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(act(twin, points(5)), act(agent, points(5)))
    before = act(agent, points(5))
    agent.start_task(TaskInfo(None, None))
    assert not torch.equal(act(agent, points(5)), before)


def test_differences_need_what_comes_next() -> None:
    with pytest.raises(ConfigError, match="next_observations"):
        make(features="difference").prompt(points(5), torch.zeros(5))


def test_exploration_is_noisy_and_within_bounds() -> None:
    agent, obs = make(), points(200)
    greedy, explored = act(agent, obs), act(agent, obs, explore=True)
    assert float(explored.abs().max()) <= LIMIT
    assert 0.02 < float((explored - greedy).std()) < 0.1  # 0.2 of the limit, where nothing is cut


def approached(agent: HILPZeroShot, sign: float = 1.0, steps: int = 8) -> float:
    """Mean distance to goals after following the agent in the square, relative to that at the beginning."""
    obs = points(200, seed=3, sign=torch.full((200,), sign))
    here = obs["observation"]
    for _ in range(steps):
        here = (here + act(agent, {**obs, "observation": here, "achieved_goal": here})).clamp(-1, 1)
    start, end = ((x - obs["desired_goal"]).norm(dim=1).mean() for x in (obs["observation"], here))
    return float(end / start)


def test_it_learns_to_reach_and_to_avoid() -> None:
    options = {"hidden": (32, 32), "map_hidden": (64, 32), "batch_size": 128, "discount": 0.9, "phi_discount": 0.9,
               "goal_discount": 0.8, "lr": 1e-3, "frequencies": 0}  # fmt: skip
    agent = make(SIGNED, **options)
    rows = walks(200)
    untrained = approached(agent)
    train(agent, 300, OfflineDataset(*_signed(rows)))
    assert approached(agent) < 0.7 < untrained
    assert approached(agent, sign=-1) > 1.1


def _signed(data: OfflineDataset) -> tuple[Any, ...]:
    def add(obs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**obs, SIGN: torch.ones(len(obs["observation"]), 1)}

    return add(data.observations), data.actions, data.lengths, add(data.final_observations)
