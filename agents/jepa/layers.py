"""Layers of the world models: stacked ensembles, normalisers, and initialisation from a given generator alone.

An ensemble of ``E`` members is one tensor axis, never a list: weights are ``(E, n_in, n_out)`` and one batched matrix
product moves all members.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clbench.errors import ConfigError

ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "mish": nn.functional.mish,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
EPS = 1e-6  # added to standard deviations
IMAGES_AT_ONCE = 256  # statistics of images are summed up in pieces of this size


class StackedLinear(nn.Module):
    """(E, N, n_in) -> (E, N, n_out): one linear layer per member."""

    def __init__(self, members: int, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, n_in, n_out))
        self.bias = nn.Parameter(torch.empty(members, 1, n_out))
        self.bound = n_in**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in) and bias (out,) as :mod:`clbench.planners.steppers` takes them; with E in front if E > 1."""
        return without_members(self.weight).mT, without_members(self.bias.squeeze(1))


class StackedLayerNorm(nn.Module):
    """(E, N, n) -> (E, N, n): LayerNorm with a gain and an offset per member."""

    def __init__(self, members: int, n: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, 1, n))
        self.bias = nn.Parameter(torch.empty(members, 1, n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, nn.functional.layer_norm(x, x.shape[-1:]), self.weight)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Gain and offset (n,), or (E, n)."""
        return without_members(self.weight.squeeze(1)), without_members(self.bias.squeeze(1))


class StackedGRU(nn.Module):
    """h (E, N, D), x (E, N, n_in) -> (E, N, D): one GRU cell per member (Cho et al. 2014, in the form of torch).

    ``reset, update, new`` gates in this order along the last axis of the weights, with two bias vectors as in torch.
    """

    def __init__(self, members: int, n_in: int, size: int):
        super().__init__()
        self.weight_ih = nn.Parameter(torch.empty(members, n_in, 3 * size))
        self.weight_hh = nn.Parameter(torch.empty(members, size, 3 * size))
        self.bias_ih = nn.Parameter(torch.empty(members, 1, 3 * size))
        self.bias_hh = nn.Parameter(torch.empty(members, 1, 3 * size))
        self.bound = size**-0.5

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        size = h.shape[-1]
        of_x = torch.baddbmm(self.bias_ih, x, self.weight_ih)
        of_h = torch.baddbmm(self.bias_hh, h, self.weight_hh)
        gates = torch.sigmoid(of_x[..., : 2 * size] + of_h[..., : 2 * size])
        reset, update = gates[..., :size], gates[..., size:]
        new = torch.tanh(torch.addcmul(of_x[..., 2 * size :], reset, of_h[..., 2 * size :]))
        return new + update * (h - new)  # not lerp: under autocast h and new differ in precision

    def affine(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Weights (3D, n_in), (3D, D) and biases (3D,), (3D,) of input and hidden state; with E in front if E > 1."""
        weights = without_members(self.weight_ih).mT, without_members(self.weight_hh).mT
        return weights, (without_members(self.bias_ih.squeeze(1)), without_members(self.bias_hh.squeeze(1)))


class Standardise(nn.Module):
    """(x - mean) / sd, with statistics that :meth:`fit` takes from a sample; the identity before that.

    Args:
        shape: of the statistics, broadcast against the trailing axes of ``x``.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def fit(self, x: Tensor) -> None:
        """Statistics of ``x`` (N, *shape), in float64. What never varies is centred and keeps its scale."""
        x = x.to(torch.float64)
        self._set(x.mean(0), x.std(0, correction=0))

    def _set(self, mean: Tensor, deviation: Tensor) -> None:
        self.mean.copy_(mean.reshape(self.mean.shape))
        self.scale.copy_(torch.where(deviation > EPS, deviation + EPS, 1.0).reshape(self.scale.shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.dtype) - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Back to the units of the sample."""
        return x * self.scale + self.mean


class StandardiseImage(Standardise):
    """Images (N, C, H, W) uint8 -> float32 with a mean and a deviation per channel.

    Args:
        channels: C.
        min_max: first stretch every channel of every image to [0, 1] by its own extremes (PLDM, Two-Rooms).
    """

    def __init__(self, channels: int, *, min_max: bool):
        super().__init__((channels, 1, 1))
        self.min_max = min_max

    def fit(self, x: Tensor) -> None:
        moments = torch.zeros(2, len(self.mean), dtype=torch.float64, device=x.device)
        for images in x.split(IMAGES_AT_ONCE):
            values = self._stretch(images).to(torch.float64)
            moments[0] += values.sum((0, 2, 3))
            moments[1] += values.square().sum((0, 2, 3))
        mean, square = moments / (x.numel() / x.shape[1])
        self._set(mean, (square - mean.square()).clamp_min(0).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return self._stretch(x).sub_(self.mean).div_(self.scale)

    def _stretch(self, x: Tensor) -> Tensor:
        """A float copy; what follows works in place, because batches of images are large."""
        values = x.to(self.mean.dtype, copy=True)
        if not self.min_max:
            return values
        low, high = (v.to(values.dtype) for v in (x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)))
        return values.sub_(low).div_((high - low).clamp_min_(EPS))


def without_members(stacked: Tensor) -> Tensor:
    """Detached, and without the axis of members where there is one member."""
    return stacked.detach()[0] if len(stacked) == 1 else stacked.detach()


@torch.no_grad()
def initialise(module: nn.Module, rng: torch.Generator) -> None:
    """Weights for a module built under ``torch.device("meta")``, all drawn from ``rng``, in the order of its parts.

    Uniform in +-1/sqrt(fan_in), or +-1/sqrt(size) for a GRU: the defaults of torch, which the published models used
    (kaiming_uniform with a = sqrt(5)). Gains of norms are 1, their offsets 0.

    Raises:
        ConfigError: the module has buffers, whose values would be lost.
    """
    if next(module.buffers(), None) is not None:
        raise ConfigError(f"{type(module).__name__} is initialised from a generator and must not have buffers.")
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | StackedLinear | StackedGRU):
            bound = part.weight[0].numel() ** -0.5 if isinstance(part, nn.Linear | nn.Conv2d) else part.bound
            for weight in part.parameters(recurse=False):
                draw = torch.rand(weight.shape, generator=rng, device=rng.device)
                weight.copy_(draw.mul_(2 * bound).sub_(bound))
        elif isinstance(part, nn.LayerNorm | nn.GroupNorm | StackedLayerNorm):
            for name, weight in part.named_parameters(recurse=False):
                weight.fill_(1.0 if name == "weight" else 0.0)
