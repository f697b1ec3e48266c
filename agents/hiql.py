"""HIQL: hierarchical implicit Q-learning (Park et al. 2023, arXiv 2307.11949), as in OGBench (Park et al. 2025).

A high policy proposes the representation z of a subgoal k steps ahead, a low policy acts towards it::

    rho([s; g]) has length sqrt(dim);  V_j(s, g) = MLP_j([s; rho([s; g])]),  j = 1, 2;  there is no target copy of rho
    L_V: as in GCIVL
    L_l = AWR with A = V(s', w) - V(s, w),        log pi_l(a | s, rho([s; w])),        w = s_{t+k}
    L_h = AWR with A = V(s_{t+k}, g) - V(s, g),   log pi_h(rho([s; s_{t+k}]) | s, g)

The high policy is asked anew at every step, and what it proposes is brought to length sqrt(dim).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.agents.gcivl import implicit_v_loss
from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig
from clbench.agents.gcrl.losses import awr_loss, detached
from clbench.agents.gcrl.networks import Actor, Distribution, Gaussian, Input, Network, stack_rows
from clbench.data.dataset import OfflineDataset


def length_normalise(x: Tensor) -> Tensor:
    """(..., n) -> the same direction, length sqrt(n)."""
    return x / x.norm(dim=-1, keepdim=True) * math.sqrt(x.shape[-1])


class HIQL(GoalAgent):
    """Hierarchical implicit Q-learning; the high policy is continuous whatever the actions are."""

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            expectile: kappa.
            high_alpha: inverse temperature of the high policy; larger is greedier.
            low_alpha: of the low policy.
            tau: step of the target network.
            subgoal_steps: k.
            rep_dim: numbers in a representation of a goal.
            low_actor_rep_grad: let the low policy train the representation too, as pixels need it (``None``: with pixels).
        """

        expectile: float | None = None
        high_alpha: float | None = None
        low_alpha: float | None = None
        tau: float | None = None
        subgoal_steps: int | None = None
        rep_dim: int | None = None
        low_actor_rep_grad: bool | None = None
        agent = "hiql"

    targets = {"target_value": "value"}
    goal_rep: Network
    value: Network
    target_value: Network
    low_actor: Actor
    high_actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        if self.config.low_actor_rep_grad is None:
            self.config = dataclasses.replace(self.config, low_actor_rep_grad=bool(self.inputs.images))
        config, state, goal = self.config, self.inputs.state_shape, self.inputs.goal_shape
        hidden, dim = config.hidden, config.rep_dim
        value: dict[str, Any] = {"rng": rng, "layer_norm": True}
        return {
            "goal_rep": Network((state, goal), (*hidden, dim), **value),
            "value": Network((state,), (*hidden, 1), extra=dim, members=2, squeeze=True, **value),
            "low_actor": Actor((state,), hidden, self.action_size, rng=rng, extra=dim, **self.actor_options),
            "high_actor": Actor((state, goal), hidden, dim, rng=rng, learn_std=config.learn_std),
        }

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> GoalBatch:
        """Subgoals k steps ahead, but not beyond the goal (high) or the end of the trajectory (low)."""
        config, index = self.config, data.sample_index(self.config.batch_size, rng)
        value_goal = data.sample_goals(index, config.value_sampling, rng)
        low, high, target = subgoals(data, index, config.subgoal_steps, config.actor_p_random, rng)
        batch = self.batch(data, index, value_goal, high, low_actor_goals=low, high_actor_targets=target)
        if self.inputs.same:
            return batch
        # a subgoal is also a state, whose value counts
        states = {"high_actor_target_states": self.inputs.state(data.observation(target))}
        return dataclasses.replace(batch, more={**batch.more, **states})

    def rho(self, s: Input, g: Input) -> Tensor:
        return length_normalise(self.goal_rep(s, g))

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, more, s = self.config, batch.more, batch.s
        w, g, target = more["low_actor_goals"], more.get("high_actor_goals", batch.g_a), more["high_actor_targets"]
        with torch.no_grad():
            both, g_v = stack_rows(s, batch.s_next), stack_rows(batch.g_v, batch.g_v)
            target_v, target_next = self.target_value(both, extra=self.rho(both, g_v)).chunk(2, 1)
            states = stack_rows(s, batch.s_next, s, more.get("high_actor_target_states", target))
            goals = stack_rows(w, w, g, g)
            v_w, next_w, v_g, target_g = self.value(states, extra=self.rho(states, goals)).mean(0).chunk(4)
        v = self.value(s, extra=self.rho(s, batch.g_v))
        value_loss = implicit_v_loss(v, target_v, target_next, batch.at_goal, config.discount, config.expectile)
        with torch.set_grad_enabled(config.low_actor_rep_grad):
            subgoal = self.rho(s, w)
        low_loss = awr_loss(self.low_actor(s, extra=subgoal), batch.a, next_w - v_w, config.low_alpha)
        with torch.no_grad():
            proposal = self.rho(s, target)
        high_loss = awr_loss(self.high_actor(s, g), proposal, target_g - v_g, config.high_alpha)
        loss = value_loss + low_loss + high_loss
        terms = {"value_loss": value_loss, "low_actor_loss": low_loss, "high_actor_loss": high_loss}
        return loss, detached({"loss": loss, **terms, "v": v.mean()})

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        high = self.high_actor(s, g)
        assert isinstance(high, Gaussian)
        z = high.sample(rng, temperature) if temperature else high.mode
        return self.low_actor(s, extra=length_normalise(z))


def subgoals(
    data: OfflineDataset, index: Tensor, steps: int, p_random: float, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B,) of the low policy's goals, the high policy's goals, and its targets, for state rows ``index`` (B,).

    With probability ``p_random`` the high goal is any row and its target ``min(i + k, final)``; else the goal is uniform
    over the rest of the trajectory, and the target does not go beyond it.
    """
    final = data.final[index]
    ahead = torch.minimum(index + steps, final)
    u = torch.rand(index.shape, generator=rng, device=data.device, dtype=torch.float64)
    later = torch.round(torch.minimum(index + 1, final) * u + final * (1 - u)).to(torch.int64)
    anywhere = data.sample_index(len(index), rng)
    coin = torch.rand(index.shape, generator=rng, device=data.device) < p_random
    goal = torch.where(coin, anywhere, later)
    target = torch.where(coin, ahead, torch.minimum(ahead, later))
    return ahead, goal, target
