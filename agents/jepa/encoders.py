"""Encoders: standardised goal part of an observation -> embedding. The sizes are those of PLDM (arXiv 2502.14819)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clbench.agents.jepa.layers import ACTIVATIONS

Shape = tuple[int, ...]


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), 3x3: activation after the sum, unlike the original IMPALA block."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class ImpalaEncoder(nn.Module):
    """Images (N, C, H, W) -> (N, 512): three stacks of conv, max-pool and two residual blocks, then Linear and LayerNorm.

    IMPALA (Espeholt et al. 2018) as PLDM uses it for Two-Rooms; 1,426,096 parameters on 2 x 65 x 65.
    """

    def __init__(self, image: tuple[int, int, int], *, widths: Sequence[int] = (16, 32, 32), size: int = 512):
        super().__init__()
        channels, height, width = image
        self.stacks = nn.ModuleList()
        for n in widths:
            pool = nn.MaxPool2d(3, stride=2, padding=1)
            self.stacks.append(
                nn.Sequential(nn.Conv2d(channels, n, 3, padding=1), pool, ResidualBlock(n), ResidualBlock(n))
            )
            channels, height, width = n, (height + 1) // 2, (width + 1) // 2
        self.dense = nn.Linear(channels * height * width, size)
        self.norm = nn.LayerNorm(size)
        self.shape: Shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        for stack in self.stacks:
            x = stack(x)
        return self.norm(self.dense(torch.relu(x).flatten(1)))


class MazeEncoder(nn.Module):
    """Images (N, 3, 64, 64) -> (N, 16, 26, 26): five convolutions with GroupNorm, nothing that sees the whole picture.

    PLDM's encoder of Diverse PointMaze, 33,296 parameters.
    """

    def __init__(self, image: tuple[int, int, int]):
        super().__init__()

        def block(n_in: int, n_out: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
            conv = nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=padding)
            return [conv, nn.GroupNorm(n_out // 4, n_out), nn.ReLU()]

        self.layers = nn.Sequential(
            *block(image[0], 16, 5, 1, 0), *block(16, 32, 5, 2, 0), *block(32, 32, 3, 1, 0), *block(32, 32, 3, 1, 1),
            nn.Conv2d(32, 16, 1),
        )  # fmt: skip
        height, width = ((n - 4 - 5) // 2 + 1 - 2 for n in image[1:])
        self.shape: Shape = (16, height, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class StateEncoder(nn.Module):
    """State (N, n) -> (N, sizes[-1]): Linear, LayerNorm, activation per layer; the last has no activation.

    With sizes (32, 256) and Mish on the (x, y) of an ant it is PLDM's encoder of 9,120 parameters.

    Args:
        n: numbers in a state.
        sizes: of the layers.
        frequencies: F > 0 appends the sines and cosines of ``pi 2^k x / 2``, k = 0..F-1, to the (standardised) state x:
            a plain MLP is too smooth to put the two sides of a thin wall apart (Tancik et al. 2020, "Fourier Features Let
            Networks Learn High Frequency Functions in Low Dimensional Domains").
        activation: after each layer but the last.
        output_norm: end with LayerNorm.
    """

    def __init__(
        self, n: int, sizes: Sequence[int], *, frequencies: int = 0, activation: str = "mish", output_norm: bool = True
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.frequencies = frequencies
        n += 2 * n * frequencies
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((n, *sizes[:-1]), sizes, strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(b) for b in sizes[:-1])
        self.norm = nn.LayerNorm(sizes[-1]) if output_norm else None
        self.shape: Shape = (sizes[-1],)

    def forward(self, x: Tensor) -> Tensor:
        if self.frequencies:
            scale = torch.pi * 2.0 ** torch.arange(-1, self.frequencies - 1, device=x.device)
            phase = (x[..., None] * scale).flatten(-2)
            x = torch.cat([x, phase.sin(), phase.cos()], -1)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x)))
        x = self.layers[-1](x)
        return x if self.norm is None else self.norm(x)


class StridedEncoder(nn.Module):
    """Images (N, C, H, W) -> (N, size): convolutions with strides, then Linear and LayerNorm; cheap enough for a CPU.

    Args:
        image: C, H, W.
        channels, kernels, strides: one number per convolution.
        size: of the embedding.
        activation: after each convolution.
        output_norm: end with LayerNorm.
    """

    def __init__(
        self, image: tuple[int, int, int], *, channels: Sequence[int], kernels: Sequence[int], strides: Sequence[int],
        size: int, activation: str = "relu", output_norm: bool = True,
    ):  # fmt: skip
        super().__init__()
        n, height, width = image
        self.activation = ACTIVATIONS[activation]
        self.convs = nn.ModuleList()
        for out, kernel, stride in zip(channels, kernels, strides, strict=True):
            self.convs.append(nn.Conv2d(n, out, kernel, stride=stride, padding=kernel // 2))
            n, height, width = out, *((side + 2 * (kernel // 2) - kernel) // stride + 1 for side in (height, width))
        self.dense = nn.Linear(n * height * width, size)
        self.norm = nn.LayerNorm(size) if output_norm else None
        self.shape: Shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.activation(conv(x))
        x = self.dense(x.flatten(1))
        return x if self.norm is None else self.norm(x)
