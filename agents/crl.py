"""CRL: contrastive reinforcement learning (Eysenbach et al. 2022, arXiv 2206.07568), as in OGBench (Park et al. 2025).

The logit of "g comes later in the trajectory of (s, a)", told apart from the goals of other rows, is a log density ratio
and serves as Q::

    f_j(s, a, g) = phi_j([s; a]) psi_j(g) / sqrt(d),  j = 1, 2
    L_c  = mean over (i, k, j) of BCE(f_j(s_i, a_i, g_k), 1[i = k]),  g at a geometric distance ahead
    L_pi: DDPG+BC with Q = min_j f_j(s, clip(mu), g_a), or AWR with A = min_j f_j(s, a, g_a) - v(s, g_a), where v is a
          second network of the same kind, without actions
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig, choose_extraction
from clbench.agents.gcrl.losses import awr_loss, ddpg_bc_loss, detached
from clbench.agents.gcrl.networks import Actor, Distribution, Input, Network


def contrastive_loss(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Binary noise-contrastive estimation (not InfoNCE): (..., B, D), (..., B, D) -> loss, logits (..., B, B)."""
    logits = phi @ psi.mT / math.sqrt(phi.shape[-1])
    labels = torch.eye(logits.shape[-1], device=logits.device).expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, labels), logits


def similarity(phi: Tensor, psi: Tensor) -> Tensor:
    """f(s, a, g) row by row: (..., B, D) -> (..., B)."""
    return (phi * psi).sum(-1) / math.sqrt(phi.shape[-1])


class CRL(GoalAgent):
    """Contrastive RL."""

    loss_compares_rows = True  # each goal is a negative of the others

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            alpha: with ``awr`` the inverse temperature (larger is greedier), with ``ddpg-bc`` the weight of cloning.
            actor_loss: how the policy is extracted from the logits;
                ``auto`` is ``ddpg-bc``, or ``awr`` with alpha 3 where actions are discrete.
            latent_dim: d.
        """

        alpha: float | None = None
        actor_loss: Literal["auto", "awr", "ddpg-bc"] | None = None
        latent_dim: int | None = None
        agent = "crl"

    looks_ahead = False
    critic_phi: Network
    critic_psi: Network
    value_phi: Network
    value_psi: Network
    actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        choose_extraction(self)
        state, goal, hidden = self.inputs.state_shape, self.inputs.goal_shape, self.config.hidden
        sizes = (*hidden, self.config.latent_dim)
        both: dict[str, Any] = {"rng": rng, "layer_norm": True, "members": 2}
        networks: dict[str, nn.Module] = {
            "critic_phi": Network((state,), sizes, extra=self.action_size, **both),
            "critic_psi": Network((goal,), sizes, **both),
            "actor": Actor((state, goal), hidden, self.action_size, rng=rng, **self.actor_options),
        }
        if self.config.actor_loss == "awr":
            networks["value_phi"] = Network((state,), sizes, rng=rng, layer_norm=True)
            networks["value_psi"] = Network((goal,), sizes, rng=rng, layer_norm=True)
        return networks

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        a = self.as_input(batch.a)
        critic_loss, logits = contrastive_loss(self.critic_phi(batch.s, extra=a), self.critic_psi(batch.g_v))
        terms = {"critic_loss": critic_loss}
        if self.config.actor_loss == "awr":
            terms["value_loss"], _ = contrastive_loss(self.value_phi(batch.s), self.value_psi(batch.g_v))
        terms["actor_loss"] = self.actor_loss(batch, a)
        loss = torch.stack(list(terms.values())).sum()
        positive = logits.diagonal(dim1=-2, dim2=-1).mean()
        return loss, detached({"loss": loss, **terms, "logit_positive": positive, "logit": logits.mean()})

    def actor_loss(self, batch: GoalBatch, a: Tensor) -> Tensor:
        policy = self.actor(batch.s, batch.g_a)
        with torch.no_grad():
            psi = self.critic_psi(batch.g_a)
        if self.config.actor_loss == "awr":
            with torch.no_grad():
                q = similarity(self.critic_phi(batch.s, extra=a), psi).amin(0)
                advantage = q - similarity(self.value_phi(batch.s), self.value_psi(batch.g_a))
            return awr_loss(policy, batch.a, advantage, self.config.alpha)
        mu = policy.mode.clamp(-1, 1)
        q = similarity(self.critic_phi(batch.s, extra=mu, frozen=True), psi).amin(0)
        return ddpg_bc_loss(policy, batch.a, q, self.config.alpha)

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        return self.actor(s, g)
