"""Signs of collapse: effective rank, spread per dimension, and what a linear probe reads off the latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clbench.metrics.features import rankme, ridge_weights


@torch.no_grad()
def deviations(z: Tensor) -> tuple[float, float]:
    """The smallest and the mean standard deviation of the dimensions of ``z`` (N, D...) over its rows (unbiased)."""
    deviation = z.flatten(1).std(0)
    return float(deviation.min()), float(deviation.mean())


@torch.no_grad()
def probe_r2(z: Tensor, state: Tensor, *, ridge: float = 1e-4) -> float:
    """R^2 of the state as a linear function of the latent, fitted on the even rows and measured on the odd ones.

    Ridge regression on standardised features: minimises |Y - X W|^2 + ridge n |W|^2 (n rows). The mean over the numbers of
    the state of 1 - sum (y - y^)^2 / sum (y - mean y)^2 (means of the measured half); numbers that never vary are left out.
    About 0, or a little below, where nothing can be read off; 1 where the state is a linear function.

    Args:
        z: (N, D...).
        state: (N, S).
        ridge: strength.

    Returns:
        NaN for latents that are not finite, fewer than 4 rows, or a state that never varies.
    """
    x, y = z.flatten(1).to(torch.float64), state.flatten(1).to(torch.float64)
    varies = (y[1::2].var(0, correction=0) > 0) if len(y) >= 4 else None
    if varies is None or not bool(varies.any()) or not bool(torch.isfinite(x).all()):
        return math.nan
    y = y[:, varies]
    x_mean, y_mean = x[::2].mean(0), y[::2].mean(0)
    scale = x[::2].std(0, correction=0)
    x = (x - x_mean) / torch.where(scale > 1e-8, scale, 1.0)
    fit, held_out, target = x[::2], x[1::2], y[1::2]
    weights = ridge_weights(fit, y[::2] - y_mean, ridge * len(fit))
    error = (target - (held_out @ weights + y_mean)).square().sum(0)
    return float((1 - error / (target - target.mean(0)).square().sum(0)).mean())


def diagnose(z: Tensor, state: Tensor | None = None) -> dict[str, float]:
    """All of the above under the names they have in the log: latents (N, D...) and, if there is one, state (N, S)."""
    smallest, mean = deviations(z)
    values = {"rankme": rankme(z), "latent_std_min": smallest, "latent_std_mean": mean}
    return values if state is None else {**values, "probe_r2": probe_r2(z, state)}
