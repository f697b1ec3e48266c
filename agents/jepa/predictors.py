"""Predictors: one step of all members of an ensemble, z (E, N, D...) and standardised action (N, A) -> (E, N, D...).

The latent is the embedding followed by the context: ``D`` numbers are ``embedding + context`` long, an image-like
latent has the planes of the embedding first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clbench.agents.jepa.layers import ACTIVATIONS, StackedGRU, StackedLayerNorm, StackedLinear, Standardise
from clbench.contracts import Stepper
from clbench.planners.steppers import GRUStepper, MLPStepper, Norm, fold_action_scale


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
        self.size = embedding + context
        sizes = (self.size + action, *hidden, self.size)
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

    def stepper(self, rows: int, actions: Standardise, dtype: torch.dtype | None) -> Stepper:
        """The same step in resident buffers, for actions before ``actions`` standardises them."""

        def affines() -> list[tuple[Tensor, Tensor | None]]:
            first, *rest = [m.affine() for m in self.layers if isinstance(m, StackedLinear)]
            return [fold_action_scale(first, actions.mean, actions.scale), *rest]

        def norms() -> list[Norm | None]:
            return [_norm(*m.affine(), dtype) for m in self.norms if isinstance(m, StackedLayerNorm)]

        hidden_norm = any(isinstance(m, StackedLayerNorm) for m in self.norms)
        whole = self.size == self.embedding and self.norm is not None
        stepper = MLPStepper(
            rows, affines, latent=self.size, activation=self.activation_name, norms=norms if hidden_norm else None,
            residual=self.residual, final_norm=(lambda: _tied(self.norm, dtype)) if whole else None, dtype=dtype,
        )  # fmt: skip
        return stepper if whole or (self.norm is None and not self.context_norm) else _FinishedStepper(stepper, self)


class _FinishedStepper:
    """A stepper whose latents are finished by norms of their parts."""

    def __init__(self, stepper: MLPStepper, predictor: MLPPredictor):
        self._stepper, self._predictor = stepper, predictor

    def pack(self) -> None:
        self._stepper.pack()

    def load(self, z: Tensor) -> None:
        self._stepper.load(z)

    def step(self, action: Tensor) -> Tensor:
        z = self._stepper.step(action)
        embedding, context = z[..., : self._predictor.embedding], z[..., self._predictor.embedding :]
        if (norm := _tied(self._predictor.norm, z.dtype)) is not None:
            embedding.copy_(nn.functional.layer_norm(embedding, embedding.shape[-1:], *norm))
        if self._predictor.context_norm:
            context.copy_(nn.functional.layer_norm(context, context.shape[-1:]))
        return z


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

    def stepper(self, rows: int, actions: Standardise, dtype: torch.dtype | None) -> Stepper:
        """The same step in resident buffers, for actions before ``actions`` standardises them."""

        def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            (of_action, of_z), (bias_action, bias_z) = self.cell.affine()
            of_action, bias = fold_action_scale((of_action, bias_action), actions.mean, actions.scale)
            return of_action, of_z, bias_action if bias is None else bias, bias_z

        return GRUStepper(rows, weights, norm=(lambda: _tied(self.norm, dtype)) if self.norm else None, dtype=dtype)


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


def _norm(weight: Tensor, bias: Tensor, dtype: torch.dtype | None, eps: float = 1e-5) -> Norm:
    return (weight, bias, eps) if dtype is None else (weight.to(dtype), bias.to(dtype), eps)


def _tied(norm: nn.LayerNorm | None, dtype: torch.dtype | None) -> Norm | None:
    return None if norm is None else _norm(norm.weight.detach(), norm.bias.detach(), dtype, norm.eps)
