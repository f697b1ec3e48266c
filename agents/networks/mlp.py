"""Dense networks with explicit initialisation (no draw from the process-wide generator)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, the one JAX implementations use by default."""
    return nn.functional.gelu(x, approximate="tanh")


@torch.no_grad()
def xavier_(weight: Tensor, rng: torch.Generator, gain: float = 1.0) -> Tensor:
    """Glorot & Bengio (2010), uniform: variance ``2 gain^2 / (fan_in + fan_out)``, drawn on the device of ``rng``."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = gain * (6.0 / (fan_in + fan_out)) ** 0.5
    draw = torch.rand(weight.shape, generator=rng, device=rng.device, dtype=weight.dtype)
    return weight.copy_(draw.mul_(2 * bound).sub_(bound))


def dense(n_in: int, n_out: int, rng: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A linear layer, Xavier-uniform weight and zero bias."""
    layer = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")  # no draw from the global generator
    xavier_(layer.weight, rng, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(n_in: int, n_out: int, rng: torch.Generator, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """A convolution, Xavier-uniform weight and zero bias."""
    layer = nn.Conv2d(n_in, n_out, kernel, stride, padding, device="meta").to_empty(device="cpu")
    xavier_(layer.weight, rng)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Module):
    """(..., sizes[0]) -> (..., sizes[-1]): dense, activation, LayerNorm (if asked for), for every layer but the last.

    Args:
        sizes: input size, hidden sizes, output size.
        rng: draws the weights.
        activation: pointwise.
        layer_norm: after each activation (eps 1e-6), as in OGBench's value networks.
        activate_final: activation (and norm) after the last layer too.
        final_gain: gain of the last layer's initialisation; 0.1 gives an actor that starts near zero.
    """

    def __init__(
        self, sizes: Sequence[int], *, rng: torch.Generator, activation: Callable[[Tensor], Tensor] = gelu,
        layer_norm: bool = False, activate_final: bool = False, final_gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        last = len(sizes) - 2
        self.activation = activation
        self.layers = nn.ModuleList(
            dense(n_in, n_out, rng, final_gain if i == last else 1.0)
            for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
        )
        activated = sizes[1:] if activate_final else sizes[1:-1]
        self.norms = nn.ModuleList(nn.LayerNorm(n, eps=1e-6) if layer_norm else nn.Identity() for n in activated)

    def forward(self, x: Tensor) -> Tensor:
        return self._through(x, len(self.layers))

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees: (..., sizes[0]) -> (..., sizes[-2])."""
        return self._through(x, len(self.layers) - 1)

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The outputs of all layers but the last, each (..., n)."""
        found = []
        for i in range(len(self.layers) - 1):
            x = self._layer(i, x)
            found.append(x)
        return found

    def _through(self, x: Tensor, count: int) -> Tensor:
        for i in range(count):
            x = self._layer(i, x)
        return x

    def _layer(self, i: int, x: Tensor) -> Tensor:
        x = self.layers[i](x)
        return self.norms[i](self.activation(x)) if i < len(self.norms) else x


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in ``module``."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
