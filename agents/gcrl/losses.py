"""Terms that the losses of offline goal-conditioned agents are made of. Means over the batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clbench.agents.gcrl.networks import Distribution

MAX_WEIGHT = 100.0  # of advantage-weighted regression


def expectile_loss(advantage: Tensor, difference: Tensor, expectile: float) -> Tensor:
    """``|kappa - 1(A < 0)| delta^2`` (IQL, Kostrikov et al. 2022, eq. 5): (B,), (..., B) -> (..., B)."""
    weight = torch.where(advantage >= 0, expectile, 1 - expectile)
    return weight * difference.square()


def awr_loss(policy: Distribution, action: Tensor, advantage: Tensor, alpha: float) -> Tensor:
    """Advantage-weighted regression, ``-E[min(exp(alpha A), 100) log pi(a)]`` (Peng et al. 2019); no gradient into A."""
    weight = torch.exp(alpha * advantage.detach()).clamp(max=MAX_WEIGHT)
    return -(weight * policy.log_prob(action)).mean()


def ddpg_bc_loss(policy: Distribution, action: Tensor, q: Tensor, alpha: float) -> Tensor:
    """``-E[Q(s, mu)] / E|Q| - alpha E[log pi(a)]`` (DDPG+BC: Fujimoto & Gu 2021; Park et al. 2024), Q (B,).

    The gradient reaches the policy through Q's action only: the caller freezes the critic.
    """
    scale = q.detach().abs().mean() + 1e-6
    return -q.mean() / scale - alpha * policy.log_prob(action).mean()


def detached(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scalars for a log."""
    return {k: v.detach() for k, v in terms.items()}
