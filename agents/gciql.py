"""GCIQL: goal-conditioned implicit Q-learning (Kostrikov et al. 2022), as in OGBench (Park et al. 2025).

::

    L_V = E[ L_kappa(delta, delta) ],  delta = min_j Q'_j(s, g, a) - V(s, g)
    L_Q = E[ sum_j (Q_j(s, g, a) - r - gamma m V(s', g))^2 ]
    L_pi: DDPG+BC with Q = min_j Q_j(s, g_a, clip(mu)), or AWR with A = min_j Q_j(s, g_a, a) - V(s, g_a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig, choose_extraction
from clbench.agents.gcrl.losses import awr_loss, ddpg_bc_loss, detached, expectile_loss
from clbench.agents.gcrl.networks import Actor, Distribution, Input, Network


class GCIQL(GoalAgent):
    """Goal-conditioned implicit Q-learning."""

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            expectile: kappa.
            alpha: with ``awr`` the inverse temperature (larger is greedier), with ``ddpg-bc`` the weight of cloning.
            tau: step of the target network.
            actor_loss: how the policy is extracted from Q;
                ``auto`` is ``ddpg-bc``, or ``awr`` with alpha 3 where actions are discrete.
        """

        expectile: float | None = None
        alpha: float | None = None
        tau: float | None = None
        actor_loss: Literal["auto", "awr", "ddpg-bc"] | None = None
        agent = "gciql"

    targets = {"target_critic": "critic"}
    value: Network
    critic: Network
    target_critic: Network
    actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        choose_extraction(self)
        hidden = self.config.hidden
        shapes = (self.inputs.state_shape, self.inputs.goal_shape)
        shared: dict[str, Any] = {"rng": rng, "layer_norm": True, "squeeze": True}
        return {
            "value": Network(shapes, (*hidden, 1), **shared),
            "critic": Network(shapes, (*hidden, 1), extra=self.action_size, members=2, **shared),
            "actor": Actor(shapes, hidden, self.action_size, rng=rng, **self.actor_options),
        }

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, s, g, a = self.config, batch.s, batch.g_v, self.as_input(batch.a)
        r, m = batch.at_goal - 1, 1 - batch.at_goal
        with torch.no_grad():
            target_q = self.target_critic(s, g, extra=a).amin(0)
            y = r + config.discount * m * self.value(batch.s_next, g)
        v, q = self.value(s, g), self.critic(s, g, extra=a)
        delta = target_q - v
        value_loss = expectile_loss(delta, delta, config.expectile).mean()
        critic_loss = (q - y).square().sum(0).mean()
        actor_loss = self.actor_loss(batch, a)
        loss = value_loss + critic_loss + actor_loss
        terms = {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}
        return loss, detached({"loss": loss, **terms, "v": v.mean(), "q": q.mean()})

    def actor_loss(self, batch: GoalBatch, a: Tensor) -> Tensor:
        policy = self.actor(batch.s, batch.g_a)
        if self.config.actor_loss == "awr":
            with torch.no_grad():
                advantage = self.critic(batch.s, batch.g_a, extra=a).amin(0) - self.value(batch.s, batch.g_a)
            return awr_loss(policy, batch.a, advantage, self.config.alpha)
        mu = policy.mode.clamp(-1, 1)
        q = self.critic(batch.s, batch.g_a, extra=mu, frozen=True).amin(0)
        return ddpg_bc_loss(policy, batch.a, q, self.config.alpha)

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        return self.actor(s, g)
