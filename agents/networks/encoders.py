"""From observations of any supported space to one feature vector per row.

The transforms depend on the space only, never on data, so they are the same for every task of a stream:
bounded numbers are scaled to [-1, 1] by their bounds, images are divided by their largest
value, discrete values become one-hot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from torch import Tensor, nn

from clbench.agents.networks.mlp import conv, dense, gelu
from clbench.errors import ConfigError

MIN_IMAGE = 12  # smaller pictures (7x7 grids of symbols) are flattened: convolutions have nothing to share there


class Scale(nn.Module):
    """Box (B, *shape) -> (B, n) float32: bounded coordinates to [-1, 1] by the space's bounds, others unchanged."""

    center: Tensor
    radius: Tensor

    def __init__(self, space: Box):
        super().__init__()
        low, high = (np.asarray(b, np.float64).ravel() for b in (space.low, space.high))
        bounded = np.isfinite(low) & np.isfinite(high) & (high > low) & (high - low < 1e9)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        # of the space, not of the training: rebuilt by __init__, so not part of the state
        self.register_buffer("center", torch.as_tensor((high + low) / 2, dtype=torch.float32), persistent=False)
        self.register_buffer("radius", torch.as_tensor((high - low) / 2, dtype=torch.float32), persistent=False)
        self.size = len(low)

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(len(x), -1).to(torch.float32) - self.center) / self.radius

    def inverse(self, y: Tensor) -> Tensor:
        """(B, n) -> (B, n) in the units of the space."""
        return y * self.radius + self.center


class OneHot(nn.Module):
    """Discrete (B,) or MultiDiscrete (B, k) int64 -> (B, sum of the numbers of values) float32."""

    start: Tensor

    def __init__(self, counts: list[int], start: list[int]):
        super().__init__()
        self.counts, self.size = counts, sum(counts)
        self.register_buffer("start", torch.tensor(start, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), -1).to(torch.int64) - self.start
        parts = [nn.functional.one_hot(x[:, i], n) for i, n in enumerate(self.counts)]
        return torch.cat(parts, 1).to(torch.float32)


class ConvEncoder(nn.Module):
    """Images (B, C, H, W) uint8 -> (B, size): three 3x3 convolutions of stride 2, then a dense layer.

    ``high`` is the largest value of the space: 255 for grey values, less for symbols.
    """

    def __init__(
        self, channels: int, height: int, width: int, *, rng: torch.Generator, high: float = 255, size: int = 256
    ):
        super().__init__()
        self.high = high
        widths = (channels, 16, 32, 32)
        self.convs = nn.ModuleList(conv(a, b, rng, stride=2) for a, b in zip(widths[:-1], widths[1:], strict=True))
        for _ in self.convs:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.dense = dense(widths[-1] * height * width, size, rng)
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32) / self.high
        for layer in self.convs:
            x = gelu(layer(x))
        return gelu(self.dense(x.flatten(1)))


def channels_last(space: Box) -> bool:
    """Whether an image is (H, W, C): the smallest of its outer axes comes last."""
    return space.shape[2] < space.shape[0]


def image_shape(space: gymnasium.Space) -> tuple[int, int, int] | None:
    """(C, H, W) of an image space (uint8, three axes, at least ``MIN_IMAGE`` pixels high and wide), else ``None``."""
    if not (isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3):
        return None
    first, second, third = space.shape
    shape = (third, first, second) if channels_last(space) else (first, second, third)
    return shape if min(shape[1:]) >= MIN_IMAGE else None


def flat_encoder(space: gymnasium.Space, where: str) -> Scale | OneHot:
    """The parameter-free transform of a space that is not an image."""
    match space:
        case Box():
            return Scale(space)
        case Discrete():
            return OneHot([int(space.n)], [int(space.start)])
        case MultiDiscrete():
            return OneHot([int(n) for n in space.nvec.ravel()], [int(s) for s in space.start.ravel()])
        case MultiBinary():
            return Scale(Box(0, 1, space.shape))
    raise ConfigError(f"Observations {where} of {space} are not supported; use Box, Discrete or a flat Dict of them.")


class Parts(nn.Module):
    """Observation (tensor or dict, B rows) -> vectors (B, n) and images (B, C, H, W), without any weights.

    Of a goal dict ``observation``, further keys (such as ``velocity``) in sorted order, and ``desired_goal`` are read, not
    ``achieved_goal``; of another dict all keys in sorted order. Images of equal size are joined along the channel axis
    (early fusion of observation and goal); everything else is scaled or one-hot encoded.

    Attributes:
        image_shapes: (C, H, W) of each group of images.
        highs: the largest value of each group of images.
        flat_size: numbers in all vectors together.
    """

    def __init__(self, space: gymnasium.Space):
        super().__init__()
        spaces: Mapping[str, gymnasium.Space] = space.spaces if isinstance(space, Dict) else {"": space}
        keys = sorted(spaces)
        if "desired_goal" in spaces:
            goal_keys = ("observation", "achieved_goal", "desired_goal")
            keys = ["observation", *(k for k in keys if k not in goal_keys), "desired_goal"]
        shapes = {k: shape for k in keys if (shape := image_shape(spaces[k])) is not None}
        self.channels_last = {k for k in shapes if channels_last(spaces[k])}  # type: ignore[arg-type]
        self.flat_keys = [k for k in keys if k not in shapes]
        self.flats = nn.ModuleList(flat_encoder(spaces[k], repr(k) if k else "") for k in self.flat_keys)
        self.flat_size = sum(int(m.size) for m in self.flats)  # type: ignore[arg-type]
        sizes = dict.fromkeys(shape[1:] for shape in shapes.values())  # distinct, in the order of the keys
        self.image_keys = [[k for k in shapes if shapes[k][1:] == size] for size in sizes]
        self.highs = [max(float(spaces[k].high.max()) for k in group) for group in self.image_keys]  # type: ignore[attr-defined]
        self.image_shapes = [(sum(shapes[k][0] for k in group), *shapes[group[0]][1:]) for group in self.image_keys]

    def forward(self, obs: Any) -> tuple[list[Tensor], list[Tensor]]:
        parts = obs if isinstance(obs, Mapping) else {"": obs}
        vectors = [encode(parts[k]) for k, encode in zip(self.flat_keys, self.flats, strict=True)]
        images = [torch.cat([self._channels_first(k, parts[k]) for k in keys], 1) for keys in self.image_keys]
        return vectors, images

    def _channels_first(self, key: str, image: Tensor) -> Tensor:
        return image.movedim(-1, 1) if key in self.channels_last else image


class Encoder(nn.Module):
    """Observation (tensor or dict, B rows) -> features (B, size): vectors as :class:`Parts` gives them, and each group of
    images through a :class:`ConvEncoder`.
    """

    def __init__(self, space: gymnasium.Space, *, rng: torch.Generator):
        super().__init__()
        self.parts = Parts(space)
        shapes_and_highs = zip(self.parts.image_shapes, self.parts.highs, strict=True)
        self.convs = nn.ModuleList(ConvEncoder(*shape, rng=rng, high=high) for shape, high in shapes_and_highs)
        self.size = self.parts.flat_size + sum(int(m.size) for m in self.convs)  # type: ignore[arg-type]

    def forward(self, obs: Any) -> Tensor:
        vectors, images = self.parts(obs)
        return torch.cat([*vectors, *(conv(image) for conv, image in zip(self.convs, images, strict=True))], 1)
