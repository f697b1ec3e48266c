"""A chain of ten states, walked at random: what the agents learn there is known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn

from clbench.agents.crl import CRL
from clbench.agents.gcivl import GCIVL
from clbench.agents.gcrl.base import GoalAgent
from clbench.agents.gcrl.networks import Input
from clbench.agents.qrl import QRL
from clbench.config import build
from clbench.contracts import Spaces
from clbench.data.dataset import OfflineDataset

N, GAMMA, BATCH, STEPS = 10, 0.9, 128, 20_000
EYE = torch.eye(N)
STATES, GOALS = Input(EYE.repeat_interleave(N, 0)), Input(EYE.repeat(N, 1))  # all pairs
STEPS_BETWEEN = (torch.arange(N)[:, None] - torch.arange(N)).abs().to(torch.float32)


def neighbour(state: int, action: int) -> int:
    """Action 0 goes to the left, 1 to the right; the ends hold."""
    return min(max(state + (1 if action else -1), 0), N - 1)


def random_walk() -> OfflineDataset:
    """One long walk; states are one-hot."""
    actions = torch.randint(2, (STEPS,), generator=torch.Generator().manual_seed(0))
    states = [0]
    for a in actions.tolist():
        states.append(neighbour(states[-1], a))
    seen = EYE[torch.tensor(states)]
    rows, last = ({"observation": x, "achieved_goal": x} for x in (seen[:-1], seen[-1:]))
    return OfflineDataset(rows, actions, torch.tensor([STEPS]), last)


DATA = random_walk()


def trained(cls: type[GoalAgent], updates: int, **options: Any) -> Any:
    box = Box(0, 1, (N,), np.float32)
    spaces = Spaces(Dict({"observation": box, "achieved_goal": box, "desired_goal": box}), Discrete(2))
    given = {"preset": "ogbench", "hidden": (64, 64), "batch_size": BATCH, "lr": 3e-3, "discount": GAMMA, **options}
    config = build(cls.Config, given, where="test")
    agent = cls(spaces, config, device=torch.device("cpu"), rng=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    for _ in range(updates):
        agent.update(agent.sample(DATA, rng))
    return agent


@torch.no_grad()
def values(agent: Any) -> Tensor:
    return agent.value(STATES, GOALS).mean(0).view(N, N)


SHORTEST = -(1 - GAMMA**STEPS_BETWEEN) / (1 - GAMMA)


def test_gcivl_finds_the_value_of_the_shortest_path() -> None:
    """With an expectile near 1; in the middle it is the value of the random walk, which is far lower."""
    error = values(trained(GCIVL, 1200, expectile=0.99, tau=0.05)) - SHORTEST
    assert float(error.abs().mean()) < 0.2
    assert float(error.abs().max()) < 0.8  # of values down to -6.1
    walk = values(trained(GCIVL, 400, expectile=0.5, tau=0.05)) - SHORTEST
    assert float(walk.mean()) < -1


def test_gcivl_without_the_goal_among_its_goals_does_not_know_zero() -> None:
    """Nothing then says where the values begin, so that all of them fall (specification, trap 5)."""
    agent = trained(GCIVL, 400, expectile=0.99, tau=0.05, value_p_current=0.0, value_p_trajectory=0.7)
    rng = torch.Generator().manual_seed(2)
    never = [agent.sample(DATA, rng).at_goal.sum() for _ in range(5)]
    assert float(sum(never)) < 5  # only by chance
    assert float(values(agent).diagonal().mean()) < -1


@torch.no_grad()
def distances(agent: Any) -> Tensor:
    return agent.quasimetric(agent.phi(STATES), agent.phi(GOALS)).view(N, N)


def ratios(agent: Any) -> Tensor:
    apart = STEPS_BETWEEN > 0
    return (distances(agent) / STEPS_BETWEEN)[apart]


def constraint(agent: Any) -> float:
    """C over the transitions between neighbours."""
    return float(torch.relu(distances(agent)[STEPS_BETWEEN == 1] - 1).square().mean())


OPTIONS: dict[str, Any] = {"actor_loss": "awr", "alpha": 1.0, "latent_dim": 32, "epsilon": 0.05}


@pytest.mark.slow
def test_qrl_counts_the_steps() -> None:
    """A step may cost 1 + sqrt(epsilon), and the multiplier rises until no more than that is left."""
    agent = trained(QRL, 1200, **OPTIONS)
    found = ratios(agent)
    assert float(found.min()) > 0.9
    assert float(found.max()) < 1.5
    assert float(found.mean()) == pytest.approx(1 + math.sqrt(OPTIONS["epsilon"]), abs=0.15)
    assert constraint(agent) < 3 * OPTIONS["epsilon"]
    assert float(agent.multiplier().detach()) > 3
    assert float(distances(agent).diagonal().max()) < 1e-5


@pytest.mark.slow
def test_qrl_with_a_multiplier_that_stays_is_caught() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_value = nn.Parameter(torch.zeros(()))

        def forward(self) -> Tensor:
            return 0 * self.log_value + 1

    class Broken(QRL):
        def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
            return {**super().build(rng), "multiplier": Fixed()}

    agent = trained(Broken, 400, **OPTIONS)
    assert float(ratios(agent).mean()) > 1.5
    assert constraint(agent) > 5 * OPTIONS["epsilon"]


@torch.no_grad()
def logits(agent: Any) -> Tensor:
    """f(s, a, g) as (2 actions, N, N)."""
    psi = agent.critic_psi(Input(EYE))
    phi = [agent.critic_phi(Input(EYE), extra=EYE[:2, :2][torch.full((N,), a)]) for a in range(2)]
    return torch.stack([(p @ psi.mT).mean(0) / math.sqrt(psi.shape[-1]) for p in phi])


def log_ratios() -> Tensor:
    """log p(g | s, a) / p(g) for g at a geometric distance ahead, (2, N, N); the walk visits all states alike."""
    moves = torch.zeros(2, N, N)
    for a in range(2):
        for s in range(N):
            moves[a, s, neighbour(s, a)] = 1
    ahead = (1 - GAMMA) * torch.linalg.inv(EYE - GAMMA * moves.mean(0))
    return torch.log(moves @ ahead * N)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([v.argsort().argsort() for v in (x, y)]).to(torch.float32)
    return float(torch.corrcoef(ranks)[0, 1])


def orders(f: Tensor) -> list[float]:
    """Rank correlation of logits with nearness, for goals that lie in the direction of the action."""
    right = [rank_correlation(f[1, s, s + 1 :], -torch.arange(float(N - s - 1))) for s in range(N - 3)]
    left = [rank_correlation(f[0, s, :s], torch.arange(float(s))) for s in range(3, N)]
    return right + left


def test_crl_orders_goals_by_distance() -> None:
    """The logits are log p(g | s, a) / p(g) - log(B - 1), where B - 1 goals of other rows stand against one."""
    options: dict[str, Any] = {"actor_loss": "awr", "alpha": 1.0, "latent_dim": 16, "batch_size": 256}
    f = logits(trained(CRL, 500, **options)) + math.log(256 - 1)
    assert float((f - log_ratios()).square().mean().sqrt()) < 0.4
    assert min(orders(log_ratios())) == pytest.approx(1)
    assert np.mean(orders(f)) > 0.95
    towards, away = f[1, 0, 1:].mean(), f[0, 0, 1:].mean()  # at the left end: step to the right, or stay
    assert float(towards) > float(away)


@pytest.mark.slow
def test_crl_with_goals_of_anywhere_is_caught() -> None:
    options: dict[str, Any] = {"actor_loss": "awr", "alpha": 1.0, "latent_dim": 16, "batch_size": 256}
    f = logits(trained(CRL, 200, value_p_trajectory=0.0, value_p_random=1.0, **options)) + math.log(256 - 1)
    assert float((f - log_ratios()).square().mean().sqrt()) > 0.8
    assert np.mean(orders(f)) < 0.8
