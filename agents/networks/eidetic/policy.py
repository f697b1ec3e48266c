"""An eidetic network from observations to outputs: convolutions for images, an MLP on everything, a head per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.agents.networks.eidetic.layers import Activation, BatchNorm, Conv2d, Linear, PrefixNorm
from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.ownership import Space
from clbench.agents.networks.encoders import Parts

Norm = Literal["none", "batch", "prefix"]
CHANNELS = (16, 32, 32)  # of the convolutions, 3x3 with stride 2, as in ConvEncoder


def prepare(parts: Parts, obs: Any) -> list[Tensor]:
    """Observation -> the inputs of :class:`EideticPolicy`: one vector (B, n) if there is any, then images in [0, 1]."""
    vectors, images = parts(obs)
    scaled = [image.to(torch.float32) / high for image, high in zip(images, parts.highs, strict=True)]
    return [*([torch.cat(vectors, 1)] if vectors else []), *scaled]


class EideticPolicy(EideticNetwork):
    """(vector (B, n), images (B, C, H, W)...) and a task -> (B, outputs).

    Args:
        parts: what the observations consist of.
        outputs: numbers that each head gives.
        hidden: widths of the hidden layers.
        norm: before each activation.
        activation: of the hidden layers.
        channels: filters of the convolutions that images go through.
        options: of :class:`EideticNetwork`.
    """

    def __init__(
        self, parts: Parts, outputs: int, hidden: Sequence[int], *, norm: Norm = "none", activation: str = "relu",
        channels: Sequence[int] = CHANNELS, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.vectors = parts.flat_size > 0
        read: list[Space] = [self.inputs("vector", parts.flat_size)] if self.vectors else []
        self.convs = nn.ModuleList()
        for i, (planes, height, width) in enumerate(parts.image_shapes):
            stack, below = nn.ModuleList(), self.inputs(f"image{i}", planes)
            for j, size in enumerate(channels):
                above = self.space(f"image{i}-{j}", size)
                stack.append(Conv2d(below, above, 3, stride=2, padding=1))
                below, height, width = above, (height + 1) // 2, (width + 1) // 2
            self.convs.append(stack)
            read.append(self.space(f"image{i}-dense", 256))
            stack.append(Linear(below, read[-1], repeat=height * width))
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        self.activation = Activation(activation)
        for i, size in enumerate(hidden):
            space = self.space(f"hidden{i}", size)
            self.layers.append(Linear(read, space))
            self.norms.append({"none": nn.Identity, "batch": BatchNorm, "prefix": PrefixNorm}[norm](space))
            read = [space]
        self.head = self.heads(read, outputs)

    def features(self, *inputs: Tensor) -> Tensor:
        """(B, last hidden width)."""
        given = list(inputs)
        found = [given.pop(0)] if self.vectors else []
        for stack, x in zip(self.convs, given, strict=True):
            *convs, dense = stack  # type: ignore[misc]
            for conv in convs:
                x = self.activation(conv(x))
            found.append(self.activation(dense(x.flatten(1))))
        x = torch.cat(found, 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return x

    def forward(self, *inputs: Tensor, task: int) -> Tensor:
        return self.head(self.features(*inputs), task)
