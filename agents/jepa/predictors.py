"""Predictors: one step of all members of an ensemble, z (E, N, D...) and standardised action (N, A) -> (E, N, D...).

The latent is the embedding followed by the context: ``D`` numbers are ``embedding + context`` long, an image-like
latent has the planes of the embedding first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clbench.agents.jepa.layers import ACTIVATIONS, StackedGRU, StackedLayerNorm, StackedLinear


class MLPPredictor(nn.Module):
    """MLP on [z, action]: (LayerNorm,) activation after every layer but the last, then (z +) and the encoder's norm.

    With hidden sizes (256, 256), Mish, hidden norms and 5 members it is PLDM's ensemble for the ant: 1,072,007
    parameters with the shared norm on 256 + 27 numbers.

    Args:
        members: E.
        embedding, context, action: numbers of each.
        hidden: sizes of the hidden layers.
        activation: name in ``ACTIVATIONS``.
        hidden_norm: LayerNorm before each activation.
        residual: predict the change of z.
        norm: LayerNorm of the encoder, applied to the embedding of the prediction too (tied weights), or None.
        context_norm: LayerNorm without weights on the context.
    """

    def __init__(
        self, members: int, embedding: int, context: int, action: int, *, hidden: Sequence[int], activation: str,
        hidden_norm: bool, residual: bool, norm: nn.LayerNorm | None, context_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.embedding, self.activation_name = embedding, activation
        self.activation = ACTIVATIONS[activation]
        self.residual, self.norm, self.context_norm = residual, norm, context_norm
        size = embedding + context
        sizes = (size + action, *hidden, size)
        self.layers = nn.ModuleList(StackedLinear(members, a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(StackedLayerNorm(members, n) if hidden_norm else nn.Identity() for n in hidden)

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([z, action.expand(len(z), *action.shape)], -1)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = self.activation(norm(layer(x)))
        x = self.layers[-1](x)
        return self._finish(z + x if self.residual else x)

    def _finish(self, z: Tensor) -> Tensor:
        if z.shape[-1] == self.embedding:
            return z if self.norm is None else self.norm(z)
        embedding, context = z[..., : self.embedding], z[..., self.embedding :]
        embedding = embedding if self.norm is None else self.norm(embedding)
        context = nn.functional.layer_norm(context, context.shape[-1:]) if self.context_norm else context
        return torch.cat([embedding, context], -1)


class GRUPredictor(nn.Module):
    """A GRU cell whose hidden state is z and whose input is the action, then the encoder's LayerNorm (tied weights).

    PLDM's predictor for Two-Rooms: 793,600 parameters with the shared norm for D = 512 and two actions.
    """

    def __init__(self, members: int, embedding: int, action: int, *, norm: nn.LayerNorm | None):
        super().__init__()
        self.cell = StackedGRU(members, action, embedding)
        self.norm = norm

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        z = self.cell(z, action.expand(len(z), *action.shape))
        return z if self.norm is None else self.norm(z)


class MazePredictor(nn.Module):
    """Residual convolutions on [z, action as planes]; z (E, N, C, H, W). One step sees 7 x 7 cells of the latent.

    PLDM's predictor of Diverse PointMaze: 20,370 parameters for 16 + 2 planes and two actions.
    """

    def __init__(self, members: int, planes: int, action: int):
        super().__init__()
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(planes + action, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
                nn.Conv2d(32, planes, 3, padding=1),
            )
            for _ in range(members)
        )  # fmt: skip

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        planes = action[:, :, None, None].expand(-1, -1, *z.shape[-2:])
        changes = [member(torch.cat([zi, planes], 1)) for member, zi in zip(self.members, z, strict=True)]
        return z + torch.stack(changes)
