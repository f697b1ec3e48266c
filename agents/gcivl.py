"""GCIVL: goal-conditioned implicit V-learning (OGBench, Park et al. 2025; IQL, Kostrikov et al. 2022, without Q).

Members j = 1, 2; the weight comes from the advantage under the target network, the residual of each member from its own
target (r, m: reward and mask of the relabelled goal)::

    A   = r + gamma m min_j V'_j(s', g) - mean_j V'_j(s, g)
    L_V = sum_j E[ L_kappa(A, r + gamma m V'_j(s', g) - V_j(s, g)) ]
    L_pi = AWR with A_pi = V(s', g_a) - V(s, g_a),  V = mean_j V_j
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig
from clbench.agents.gcrl.losses import awr_loss, detached, expectile_loss
from clbench.agents.gcrl.networks import Actor, Distribution, Input, Network, stack_rows


def implicit_v_loss(
    v: Tensor, target_v: Tensor, target_next: Tensor, at_goal: Tensor, discount: float, expectile: float
) -> Tensor:
    """The value loss above. All values (2, B): online at s, target at s and at s'; ``at_goal`` (B,)."""
    r, m = at_goal - 1, 1 - at_goal
    advantage = r + discount * m * target_next.amin(0) - target_v.mean(0)
    q = r + discount * m * target_next
    return expectile_loss(advantage, q - v, expectile).mean(1).sum()


class GCIVL(GoalAgent):
    """Goal-conditioned implicit V-learning with advantage-weighted regression."""

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            expectile: kappa.
            alpha: inverse temperature of the regression; larger is greedier.
            tau: step of the target network.
        """

        expectile: float | None = None
        alpha: float | None = None
        tau: float | None = None
        agent = "gcivl"

    targets = {"target_value": "value"}
    value: Network
    target_value: Network
    actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        hidden = self.config.hidden
        shapes = (self.inputs.state_shape, self.inputs.goal_shape)
        return {
            "value": Network(shapes, (*hidden, 1), rng=rng, members=2, layer_norm=True, squeeze=True),
            "actor": Actor(shapes, hidden, self.action_size, rng=rng, **self.actor_options),
        }

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, both = self.config, stack_rows(batch.s, batch.s_next)
        with torch.no_grad():
            target_v, target_next = self.target_value(both, stack_rows(batch.g_v, batch.g_v)).chunk(2, 1)
            v_a, next_a = self.value(both, stack_rows(batch.g_a, batch.g_a)).mean(0).chunk(2)
        v = self.value(batch.s, batch.g_v)
        value_loss = implicit_v_loss(v, target_v, target_next, batch.at_goal, config.discount, config.expectile)
        advantage = next_a - v_a
        actor_loss = awr_loss(self.actor(batch.s, batch.g_a), batch.a, advantage, config.alpha)
        loss = value_loss + actor_loss
        terms = {
            "loss": loss,
            "value_loss": value_loss,
            "actor_loss": actor_loss,
            "v": v.mean(),
            "adv": advantage.mean(),
        }
        return loss, detached(terms)

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        return self.actor(s, g)
