"""Losses of latent world models: pure functions, batch first, in the form of PLDM's code, to which its coefficients belong.

``z`` (B, T, D...) are encodings of T = H + 1 frames of B windows, ``predictions`` (B, H, [E,] D...) those of frames 1 to
H. Features of any trailing shape count as one flat axis of size D. Every reduction is a mean unless it says otherwise
(the formulas printed in PLDM's appendix sum over features and time; its coefficients are for the means).

The weighted sum of PLDM (arXiv 2502.14819) is ``prediction + alpha variance + beta covariance + alpha_t
variance_over_time + delta temporal_smoothness + omega inverse_dynamics + context``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clbench.agents.jepa.layers import initialise
from clbench.errors import ConfigError

# -- prediction ----------------------------------------------------------------------------------------------------------


def prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over batch, time and features of (z_t - z^_t)^2, t = 1..H, summed over members (PLDM, L_sim).

    Gradients flow into both arguments.

    Args:
        predictions: (B, H, D...), or (B, H, E, D...) of an ensemble.
        targets: encodings of frames 1 to H, (B, H, D...).
    """
    if predictions.ndim == targets.ndim:
        return nn.functional.mse_loss(predictions, targets)
    members = predictions.shape[2]
    return members * nn.functional.mse_loss(predictions, targets.unsqueeze(2).expand_as(predictions))


def self_prediction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """:func:`prediction_loss` with targets that get no gradient.

    "Understanding Self-Predictive Learning for Reinforcement Learning" (Tang et al. 2023, arXiv 2212.03319), equation 2:
    with the stop-gradient, and a predictor that is (nearly) optimal at each step, the representation does not collapse.
    """
    return prediction_loss(predictions, targets.detach())


def context_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """:func:`prediction_loss` of the context alone: PLDM's loss of the velocity planes (L_prop, mazes).

    Args:
        predictions, targets: ``LatentModel.context_features`` of what :func:`prediction_loss` takes.
    """
    return prediction_loss(predictions, targets)


# -- against collapse ----------------------------------------------------------------------------------------------------


def variance_loss(z: Tensor, *, every_step: bool = False, eps: float = 1e-4) -> Tensor:
    """Mean over features of relu(1 - sqrt(Var_b(z_0) + eps)), the unbiased variance over the batch (VICReg; PLDM L_var).

    Args:
        z: (B, T, D...).
        every_step: mean over all frames, as PLDM's text has it, instead of the first frame alone, as its code does.
        eps: inside the root.

    Raises:
        ConfigError: fewer than two windows.
    """
    return torch.relu(1 - torch.sqrt(_by_time(z, every_step).var(1) + eps)).mean()


def covariance_loss(z: Tensor, *, every_step: bool = False, adjusted: bool = True) -> Tensor:
    """Sum over i != j of C_ij^2 / (D (D - 1)), C the covariance matrix of z_0 over the batch (VICReg; PLDM L_cov).

    With fewer windows than features it is computed from the matrix of inner products of the rows X of the centred batch,
    without a D x D matrix: sum_{i != j} C_ij^2 = |X X^T|_F^2 / (B - 1)^2 - sum_i Var_i^2.

    Args:
        z: (B, T, D...).
        every_step: mean over all frames instead of the first frame alone.
        adjusted: divide by D (D - 1); otherwise by D, as VICReg and PLDM's text do.

    Raises:
        ConfigError: fewer than two windows.
    """
    z = _by_time(z, every_step)
    time, rows, features = z.shape
    z = z - z.mean(1, keepdim=True)
    if features > rows:
        squares = (z @ z.mT).square().sum() - z.square().sum(1).square().sum()
    else:
        c = z.mT @ z
        squares = c.square().sum() - c.diagonal(dim1=1, dim2=2).square().sum()
    divisor = max(features * (features - 1), 1) if adjusted else features
    return squares / ((rows - 1) ** 2 * time * divisor)


def variance_over_time_loss(z: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Mean over windows and features of relu(1 - sqrt(Var_t(z_1..z_H) + eps)) (in PLDM's code, not in its tables).

    Args:
        z: (B, T, D...), T of at least 3; the first frame does not count.
        eps: inside the root.

    Raises:
        ConfigError: fewer than three frames.
    """
    if z.shape[1] < 3:
        raise ConfigError(f"The variance over time needs windows of at least 3 frames, got {z.shape[1]}.")
    return torch.relu(1 - torch.sqrt(z[:, 1:].var(1) + eps)).mean()


def temporal_smoothness_loss(z: Tensor) -> Tensor:
    """Mean over windows, steps and features of (z_{t+1} - z_t)^2 (PLDM, L_time-sim). z (B, T, D...)."""
    return nn.functional.mse_loss(z[:, 1:], z[:, :-1])


def barlow_twins_loss(predictions: Tensor, targets: Tensor, *, weight: float = 5e-3, eps: float = 1e-5) -> Tensor:
    """sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2, C the cross-correlation of two views over the rows.

    Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230), equations 1 and 2. The two views of a frame are its encoding
    and its prediction from the past. With fewer rows than features the off-diagonal part comes from inner products of
    rows, as in :func:`covariance_loss`.

    Args:
        predictions, targets: (B, H, D...), or (B, H, E, D...) for predictions of an ensemble: the loss is summed over
            members. Each feature is standardised over all B * H rows.
        weight: lambda of the paper.
        eps: added to variances.

    Raises:
        ConfigError: fewer than two rows.
    """
    members = predictions.unbind(2) if predictions.ndim > targets.ndim else [predictions]
    b = _standard_rows(targets, eps)
    losses = []
    for member in members:
        a = _standard_rows(member, eps)
        rows, features = a.shape
        diagonal = (a * b).mean(0)
        if features > rows:
            squares = ((a @ a.T) * (b @ b.T)).sum() / rows**2
        else:
            squares = (a.T @ b / rows).square().sum()
        losses.append((1 - diagonal).square().sum() + weight * (squares - diagonal.square().sum()))
    return torch.stack(losses).sum()


# -- actions -------------------------------------------------------------------------------------------------------------


def inverse_dynamics_loss(head: nn.Module, z: Tensor, actions: Tensor) -> Tensor:
    """Mean squared error of the actions that ``head`` reads off two consecutive encodings (PLDM, L_IDM).

    Args:
        head: (N, D...), (N, D...) -> (N, A), for example :class:`InverseMLP`.
        z: (B, T, D...), with the context.
        actions: (B, T - 1, A), standardised (``LatentModel.normalise_actions``).
    """
    before, after = z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1)
    return nn.functional.mse_loss(head(before, after), actions.flatten(0, 1))


def forward_inverse_loss(forward: Tensor, inverse: Tensor, *, weight: float = 0.1) -> Tensor:
    """inverse + weight forward: "Learning to Poke by Poking" (Agrawal et al. 2016, arXiv 1606.07419), equation 3.

    The forward model regularises the features that the inverse model needs, and the inverse model keeps them from
    collapsing. The paper classifies binned actions; here both parts are squared errors. (Weight as remembered.)

    Args:
        forward: :func:`prediction_loss`.
        inverse: :func:`inverse_dynamics_loss`.
        weight: lambda of the paper.
    """
    return inverse + weight * forward


class InverseMLP(nn.Module):
    """(z_t, z_{t+1}) (N, D), (N, D) -> standardised action (N, A): Linear, ReLU, Linear.

    With D = 512 and 512 hidden units it is PLDM's head for Two-Rooms. PLDM's code never trains it: the encoder learns to
    make a fixed random network output the action.
    """

    def __init__(self, size: int, action: int, *, hidden: int = 512, rng: torch.Generator):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.Sequential(nn.Linear(2 * size, hidden), nn.ReLU(), nn.Linear(hidden, action))
        initialise(self, rng)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.layers(torch.cat([before.flatten(1), after.flatten(1)], 1))


class InverseConv(nn.Module):
    """(z_t, z_{t+1}) (N, C, H, W), twice -> standardised action (N, A): PLDM's head for mazes, velocity planes included.

    Three 3x3 convolutions with GroupNorm and ReLU, max-pools between them, then Linear.
    """

    def __init__(self, shape: tuple[int, ...], action: int, *, rng: torch.Generator):
        super().__init__()
        planes, height, width = shape
        if min(height, width) < 4:
            raise ConfigError(
                f"The convolutional inverse model needs latents of at least 4 x 4, got {height} x {width}."
            )

        def block(n_in: int) -> list[nn.Module]:
            return [nn.Conv2d(n_in, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]

        with torch.device("meta"):
            self.layers = nn.Sequential(
                *block(2 * planes), nn.MaxPool2d(2), *block(32), nn.MaxPool2d(2), *block(32), nn.Flatten(),
                nn.Linear(32 * (height // 4) * (width // 4), action),
            )  # fmt: skip
        initialise(self, rng)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.layers(torch.cat([before, after], 1))


def new_inverse_head(
    state_shape: tuple[int, ...], action: int, *, hidden: int = 512, rng: torch.Generator
) -> nn.Module:
    """:class:`InverseConv` for image-like latents, else :class:`InverseMLP` with ``hidden`` units."""
    if len(state_shape) == 3:
        return InverseConv(state_shape, action, rng=rng)
    return InverseMLP(state_shape[0], action, hidden=hidden, rng=rng)


# -- helpers -------------------------------------------------------------------------------------------------------------


def _by_time(z: Tensor, every_step: bool) -> Tensor:
    """(B, T, D...) -> (T, B, D), T = 1 unless ``every_step``."""
    if len(z) < 2:
        raise ConfigError(f"Variances over the batch need at least 2 windows, got {len(z)}; raise batch_size.")
    return (z if every_step else z[:, :1]).flatten(2).transpose(0, 1)


def _standard_rows(z: Tensor, eps: float) -> Tensor:
    """(B, H, D...) -> (B * H, D), each feature with mean 0 and variance 1 over the rows."""
    z = z.flatten(2).flatten(0, 1)
    if len(z) < 2:
        raise ConfigError("Correlations over the batch need at least 2 rows, got 1; raise batch_size.")
    variance, mean = torch.var_mean(z, 0, correction=0)
    return (z - mean) * torch.rsqrt(variance + eps)
