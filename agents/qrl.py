"""QRL: quasimetric reinforcement learning (Wang et al. 2023, arXiv 2304.01203), as in OGBench (Park et al. 2025).

Goals that are far apart are pushed apart, while one step of the data costs at most 1. With a quasimetric d of latents phi::

    C   = E[ relu(d(s, s') - 1)^2 ]
    L_V = E[ 100 softplus(5 - d(s, g) / 100) ] + lambda C,   g any state of the data
    L_lambda = lambda (epsilon - C)
    DDPG+BC: a model of latents f, z' = phi(s) + f(phi(s), a), by L_f = E[ (d(phi(s'), z') + d(z', phi(s'))) / 2 ], and
             Q = -d(phi(s) + f(phi(s), clip(mu)), phi(g_a))
    AWR:     A = d(s, g_a) - d(s', g_a)

Where states have more than goals do (velocities), d compares what is achieved, and f also sees the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig, choose_extraction
from clbench.agents.gcrl.losses import awr_loss, ddpg_bc_loss, detached
from clbench.agents.gcrl.networks import Actor, Distribution, Input, Network
from clbench.agents.gcrl.quasimetrics import IQE, MRN
from clbench.errors import ConfigError

GROUP = 8  # coordinates per group of IQE


class Multiplier(nn.Module):
    """A Lagrange multiplier, ``exp`` of a parameter that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log_value.exp()


class QRL(GoalAgent):
    """Quasimetric RL."""

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            alpha: with ``awr`` the inverse temperature (larger is greedier), with ``ddpg-bc`` the weight of cloning.
            actor_loss: how the policy is extracted from the distance;
                ``auto`` is ``ddpg-bc``, or ``awr`` with alpha 3 where actions are discrete.
            quasimetric: ``iqe`` or ``mrn``.
            latent_dim: size of phi; a multiple of 8 for ``iqe``, of 2 for ``mrn``.
            epsilon: the constraint's slack.
        """

        alpha: float | None = None
        actor_loss: Literal["auto", "awr", "ddpg-bc"] | None = None
        quasimetric: Literal["iqe", "mrn"] = "iqe"
        latent_dim: int | None = None
        epsilon: float | None = None
        agent = "qrl"

    phi: Network
    quasimetric: IQE | MRN
    multiplier: Multiplier
    dynamics: Network
    actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        choose_extraction(self)
        config, latent = self.config, self.config.latent_dim
        divisor = GROUP if config.quasimetric == "iqe" else 2
        if latent % divisor:
            raise ConfigError(
                f"Agent 'qrl': latent_dim must be a multiple of {divisor} for {config.quasimetric}, got {latent}."
            )
        goal, sizes = self.inputs.goal_shape, (*config.hidden, latent)
        networks: dict[str, nn.Module] = {
            "phi": Network((goal,), sizes, rng=rng, layer_norm=True),
            "quasimetric": IQE(latent // GROUP) if config.quasimetric == "iqe" else MRN(),
            "multiplier": Multiplier(),
        }
        if config.actor_loss == "ddpg-bc":
            extra, context = latent + self.action_size, self.inputs.context_shape
            networks["dynamics"] = Network((context,), sizes, rng=rng, extra=extra, layer_norm=True)
        shapes = (self.inputs.state_shape, goal)
        networks["actor"] = Actor(shapes, config.hidden, self.action_size, rng=rng, **self.actor_options)
        return networks

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        # one call each: gradients that cancel, such as that of phi's last bias, cancel exactly, as in the reference
        z, z_next, z_goal = (self.phi(x) for x in (batch.achieved, batch.achieved_next, batch.g_v))
        d_goal, d_step = self.quasimetric(z, z_goal), self.quasimetric(z, z_next)
        constraint = torch.relu(d_step - 1).square().mean()
        multiplier = self.multiplier()
        value_loss = (100 * functional.softplus(5 - d_goal / 100)).mean() + multiplier.detach() * constraint
        multiplier_loss = multiplier * (self.config.epsilon - constraint.detach())
        terms = {"value_loss": value_loss, "multiplier_loss": multiplier_loss}
        if self.config.actor_loss == "ddpg-bc":
            terms["dynamics_loss"] = self.dynamics_loss(batch, z, z_next)
        terms["actor_loss"] = self.actor_loss(batch, z, z_next)
        loss = torch.stack(list(terms.values())).sum()
        return loss, detached(
            {"loss": loss, **terms, "multiplier": multiplier, "d_goal": d_goal.mean(), "d_step": d_step.mean()}
        )

    def step(self, z: Tensor, context: Input, a: Tensor, *, frozen: bool = False) -> Tensor:
        """Latents after actions, (B, D), (B, A) -> (B, D)."""
        return z + self.dynamics(context, extra=torch.cat([z, a], 1), frozen=frozen)

    def dynamics_loss(self, batch: GoalBatch, z: Tensor, z_next: Tensor) -> Tensor:
        """Its gradient reaches phi on both sides, as in the reference."""
        predicted = self.step(z, batch.context, batch.a)
        return (self.quasimetric(z_next, predicted) + self.quasimetric(predicted, z_next)).mean() / 2

    def actor_loss(self, batch: GoalBatch, z: Tensor, z_next: Tensor) -> Tensor:
        policy = self.actor(batch.s, batch.g_a)
        with torch.no_grad():
            z, z_next, z_goal = z.detach(), z_next.detach(), self.phi(batch.g_a)
        if self.config.actor_loss == "awr":
            with torch.no_grad():
                advantage = self.quasimetric(z, z_goal) - self.quasimetric(z_next, z_goal)
            return awr_loss(policy, batch.a, advantage, self.config.alpha)
        reached = self.step(z, batch.context, policy.mode.clamp(-1, 1), frozen=True)
        q = -self.quasimetric(reached, z_goal, frozen=True)
        return ddpg_bc_loss(policy, batch.a, q, self.config.alpha)

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        return self.actor(s, g)
