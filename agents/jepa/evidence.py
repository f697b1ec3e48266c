"""Which task's dynamics hold, judged by how well each task's world model has predicted what came next.

Tasks are compared by the log likelihood of the same numbers, those of the latent that the oldest task owns and every
task predicts, with a variance per number that is calibrated on held-out data when the task is finished and never changed:

    l_k(t) = max(floor_k, log N(z_{t+1}; z^_k(z_t, a_t), Sigma_k))           floor_k: the lowest 1 % of the held-out ones
    S_k(t) = (1 - leak) S_k(t - 1) + l_k(t)

The leak takes the place of a prior that tasks may switch: old evidence counts less and less. A prior proper, such as rho /
(K - 1) from each task to each other, would tie the beliefs of old tasks to how many there are. The decision goes through
the tasks in order: a task takes over from the winner among the older ones where it leads by ``hysteresis``, and keeps the
lead until it is behind by as much. As nothing in it looks at younger tasks, adding a task can move decisions *to that task*
only, on every trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILE = 0.01  # a transition counts for no less than what so many of the held-out ones have
SMALLEST = 1e-4  # standard deviation


def calibrate(errors: Tensor) -> tuple[Tensor, float]:
    """Held-out prediction errors (N, m) -> variance per number (m,) and the floor of log likelihoods."""
    variance = errors.square().mean(0).clamp_min(SMALLEST**2)
    likelihood = log_likelihood(errors, variance, -torch.inf)
    return variance, float(likelihood.double().quantile(QUANTILE))


def log_likelihood(errors: Tensor, variance: Tensor, floor: float) -> Tensor:
    """Errors (B, m) -> (B,): log N(error; 0, variance), up to the constant that depends on m alone."""
    value = -0.5 * (errors.square() / variance + variance.log()).sum(-1)
    return value.nan_to_num(nan=floor).clamp_min(floor)


def accumulate(evidence: Tensor, likelihood: Tensor, leak: float) -> Tensor:
    """S_k after one more transition; evidence and likelihood (B, K)."""
    return (1 - leak) * evidence + likelihood


def decide(evidence: Tensor, leads: Tensor, hysteresis: float) -> tuple[Tensor, Tensor]:
    """Evidence (B, K) and which task led the older ones (B, K) bool -> chosen task (B,) int64, and who leads now."""
    chosen = torch.zeros(len(evidence), dtype=torch.int64, device=evidence.device)
    now = [torch.zeros_like(leads[:, 0])]
    for k in range(1, evidence.shape[1]):
        ahead = evidence[:, k] - evidence.gather(1, chosen[:, None])[:, 0]
        lead = torch.where(leads[:, k], ahead >= -hysteresis, ahead > hysteresis)
        chosen = torch.where(lead, k, chosen)
        now.append(lead)
    return chosen, torch.stack(now, 1)
