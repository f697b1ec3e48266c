"""Resident buffers that move latents by one step without fresh memory.

World models offer them by a method ``stepper(rows)``; it packs the weights of that moment, so a stepper never holds stale
ones if it is made for each plan. A model without the method is moved by its ``predict``.

The layout: one buffer ``[z | a | 1]`` per block of rows. The first matrix multiplication reads it whole (the column of ones
carries the bias), the last writes the next latent back into it. Ensembles of ``E`` members are stacked: buffers
(E, rows, ...), latents (rows, E, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.contracts import Stepper, WorldModel
from clbench.errors import ConfigError, ContractError, unknown_name

Affine = tuple[Tensor, Tensor | None]  # weight (out, in) or (E, out, in), bias (out,) or (E, out)
Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias (D,) or (E, D), and eps of a LayerNorm

_ALIGN = 16  # floats: rows that begin at a cache line


def _gelu(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu.out(x, out=x)


def _elu(x: Tensor) -> Tensor:
    return functional.elu(x, inplace=True)


ACTIVATIONS: dict[str, Callable[[Tensor], Any]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "gelu": _gelu,
    "elu": _elu,
    "silu": lambda x: functional.silu(x, inplace=True),
    "mish": lambda x: functional.mish(x, inplace=True),
}


class PredictStepper:
    """Steps by ``model.predict``: no fast path, any latent shape.

    A model whose own ``stepper`` returns one says that its ``predict`` is always the same sequence of tensor operations, so
    that a CUDA graph may record it.

    Raises:
        ContractError: ``predict`` does not return the shape of its latents.
    """

    def __init__(self, model: WorldModel):
        self.model = model
        self.z = torch.empty(0)
        self._addresses = self._where()

    def pack(self) -> None:
        """See that the weights are still where they were: then there is nothing to copy.

        Raises:
            RuntimeError: they are not, or the model is no ``torch.nn.Module`` and does not say where they are.
        """
        if self._addresses is None or self._addresses != self._where():
            raise RuntimeError("the weights that predict uses have moved, or the model is no torch.nn.Module")

    def _where(self) -> list[int] | None:
        if not isinstance(self.model, nn.Module):
            return None
        return [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]

    def load(self, z: Tensor) -> None:
        self.z = z

    def step(self, action: Tensor) -> Tensor:
        z = self.model.predict(self.z, action)
        if z.shape != self.z.shape:
            raise ContractError(
                f"{type(self.model).__name__}.predict returned {tuple(z.shape)} for latents {tuple(self.z.shape)}; it must "
                "keep the shape of the latents."
            )
        self.z = z
        return z


def fold_action_scale(affine: Affine, mean: Tensor, std: Tensor) -> Affine:
    """The layer that takes ``a`` in environment units where the given one takes ``(a - mean) / std``.

    The actions are the last inputs of the layer: ``W_a (a - mean) / std + b = (W_a / std) a + (b - W_a mean / std)``.
    """
    weight, bias = affine
    size = len(mean)
    of_action = weight[..., -size:] / std
    shift = of_action @ mean
    bias = -shift if bias is None else bias - shift
    return torch.cat([weight[..., :-size], of_action], -1), bias


class MLPStepper:
    """``z' = [z +] MLP([z, a])``, one network or a stacked ensemble.

    Args:
        rows: latents that are moved together.
        layers: gives the affine layers at the time of packing, first to last; with an ensemble each weight is
            (E, out, in). The first takes ``[z, a]``, the last gives ``D`` numbers.
        latent: ``D``.
        activation: between the layers, of :data:`ACTIVATIONS`.
        norms: gives per hidden layer the LayerNorm before its activation, or ``None``.
        residual: add the latent to the output.
        final_norm: gives the LayerNorm of the new latent, or ``None``.
        dtype: of the buffers; default that of the weights.
    """

    def __init__(
        self, rows: int, layers: Callable[[], Sequence[Affine]], *, latent: int, activation: str = "relu",
        norms: Callable[[], Sequence[Norm | None]] | None = None, residual: bool = False,
        final_norm: Callable[[], Norm | None] | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        if activation not in ACTIVATIONS:
            raise unknown_name("activation", activation, ACTIVATIONS)
        self._layers, self._norms, self._final_norm = layers, norms, final_norm
        self._activate, self._residual = ACTIVATIONS[activation], residual
        affines = layers()
        first = affines[0][0]
        dtype = dtype or first.dtype
        self._members = first.shape[:-2]
        if len(self._members) > 1 or affines[-1][0].shape[-2] != latent or first.shape[-1] <= latent:
            shapes = [tuple(w.shape) for w, _ in affines]
            raise ConfigError(
                f"These layers {shapes} do not take [z, a] to z with {latent} features: weights are (out, in), or "
                "(E, out, in) for an ensemble."
            )
        inputs = [first.shape[-1], *(w.shape[-2] for w, _ in affines[:-1])]
        self._buffers = [_with_ones(self._members, rows, n, dtype, first.device) for n in inputs]
        self._weights = [
            torch.zeros(*self._members, b.shape[-1], w.shape[-2], dtype=dtype, device=first.device)
            for b, (w, _) in zip(self._buffers, affines, strict=True)
        ]
        self._outputs = [b[..., :n] for b, n in zip(self._buffers[1:], inputs[1:], strict=True)]
        self._z, self._action = self._buffers[0][..., :latent], self._buffers[0][..., latent : inputs[0]]
        aside = residual or self._members or len(affines) == 1  # one layer alone would write over what it reads
        self._increment = torch.empty_like(self._z) if aside else None
        self._multiply = torch.bmm if self._members else torch.mm
        self.latents = self._z.movedim(0, 1) if self._members else self._z
        self._norm = [_like_norm(n, dtype) for n in norms()] if norms else [None] * len(self._outputs)
        self._last_norm = _like_norm(final_norm(), dtype) if final_norm else None
        self.pack()

    def pack(self) -> None:
        """Copy the weights of this moment, in place."""
        for packed, (weight, bias) in zip(self._weights, self._layers(), strict=True):
            size = weight.shape[-1]
            packed[..., :size, :].copy_(weight.mT)
            if bias is not None:
                packed[..., size, :].copy_(bias)
        for packed, norm in zip(self._norm, self._norms() if self._norms else [], strict=False):
            _copy_norm(packed, norm)
        if self._final_norm:
            _copy_norm(self._last_norm, self._final_norm())

    def load(self, z: Tensor) -> None:
        self.latents.copy_(z)

    def step(self, action: Tensor) -> Tensor:
        self._action.copy_(action)
        x = self._buffers[0]
        for weight, output, buffer, norm in zip(
            self._weights, self._outputs, self._buffers[1:], self._norm, strict=False
        ):
            self._multiply(x, weight, out=output)
            if norm is not None:
                _layer_norm_(output, norm)
            self._activate(output)
            x = buffer
        if self._increment is None:
            self._multiply(x, self._weights[-1], out=self._z)
        else:
            self._multiply(x, self._weights[-1], out=self._increment)
            self._z.add_(self._increment) if self._residual else self._z.copy_(self._increment)
        if self._last_norm is not None:
            _layer_norm_(self._z, self._last_norm)
        return self.latents


class GRUStepper:
    """A GRU layer (the equations of ``torch.nn.GRUCell``) whose hidden state is the latent and whose input is the action.

    Args:
        rows: latents that are moved together.
        weights: gives ``(weight_ih (3D, A), weight_hh (3D, D), bias_ih (3D,), bias_hh (3D,))`` in the order reset, update,
            new at the time of packing; with an ensemble each has a leading axis E.
        norm: gives the LayerNorm of the new latent, or ``None``.
        dtype: of the buffers; default that of the weights.
    """

    def __init__(
        self, rows: int, weights: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]], *,
        norm: Callable[[], Norm | None] | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self._source, self._norm = weights, norm
        weight_ih, weight_hh, _, _ = weights()
        dtype, device = dtype or weight_hh.dtype, weight_hh.device
        self._members, (size, actions) = weight_hh.shape[:-2], (weight_hh.shape[-1], weight_ih.shape[-1])
        self._size = size
        self._buffer = _with_ones(self._members, rows, size + actions, dtype, device)
        # [z | a | 1] -> reset, update, and the hidden half of the new gate; [a | 1] -> the other half
        self._weight = torch.zeros(*self._members, self._buffer.shape[-1], 3 * size, dtype=dtype, device=device)
        self._weight_new = torch.zeros(*self._members, self._buffer.shape[-1] - size, size, dtype=dtype, device=device)
        self._gates = torch.empty(*self._members, rows, 3 * size, dtype=dtype, device=device)
        self._new = torch.empty(*self._members, rows, size, dtype=dtype, device=device)
        self._z, self._tail = self._buffer[..., :size], self._buffer[..., size:]
        self._action = self._tail[..., :actions]
        self._switches = self._gates[..., : 2 * size]
        self._reset, self._update, self._hidden = self._gates.split(size, -1)
        self._multiply = torch.bmm if self._members else torch.mm
        self.latents = self._z.movedim(0, 1) if self._members else self._z
        self._last_norm = _like_norm(norm(), dtype) if norm else None
        self.pack()

    def pack(self) -> None:
        """Copy the weights of this moment, in place."""
        weight_ih, weight_hh, bias_ih, bias_hh = self._source()
        size, inputs = self._size, self._size + weight_ih.shape[-1]
        self._weight[..., :size, :].copy_(weight_hh.mT)
        self._weight[..., size:inputs, : 2 * size].copy_(weight_ih[..., : 2 * size, :].mT)
        self._weight[..., inputs, :].copy_(bias_hh)
        self._weight[..., inputs, : 2 * size].add_(bias_ih[..., : 2 * size])
        self._weight_new[..., : inputs - size, :].copy_(weight_ih[..., 2 * size :, :].mT)
        self._weight_new[..., inputs - size, :].copy_(bias_ih[..., 2 * size :])
        if self._norm:
            _copy_norm(self._last_norm, self._norm())

    def load(self, z: Tensor) -> None:
        self.latents.copy_(z)

    def step(self, action: Tensor) -> Tensor:
        self._action.copy_(action)
        self._multiply(self._buffer, self._weight, out=self._gates)
        self._multiply(self._tail, self._weight_new, out=self._new)
        self._switches.sigmoid_()
        new = self._new.addcmul_(self._reset, self._hidden).tanh_()
        torch.lerp(new, self._z, self._update, out=self._z)  # (1 - update) * new + update * z
        if self._last_norm is not None:
            _layer_norm_(self._z, self._last_norm)
        return self.latents


def _with_ones(members: Sequence[int], rows: int, inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (*members, rows, inputs + 1) with ones in the last column, and rows that begin at a cache line.

    On a GPU with the zeros that fill the cache line, because tensor cores like such sizes; a CPU would only multiply them.
    """
    width = -(-(inputs + 1) // _ALIGN) * _ALIGN
    buffer = torch.zeros(*members, rows, width, dtype=dtype, device=device)
    buffer[..., inputs] = 1
    return buffer if _whole_lines(device) else buffer[..., : inputs + 1]


def _whole_lines(device: torch.device) -> bool:
    return device.type != "cpu"


def _like_norm(norm: Norm | None, dtype: torch.dtype) -> Norm | None:
    """Room for the parameters of a LayerNorm."""
    if norm is None:
        return None
    weight, bias = (None if p is None else torch.empty_like(p, dtype=dtype) for p in norm[:2])
    return weight, bias, norm[2]


def _copy_norm(packed: Norm | None, norm: Norm | None) -> None:
    for old, new in zip((packed or ())[:2], (norm or ())[:2], strict=True):
        if old is not None and new is not None:
            old.copy_(new)


def _layer_norm_(x: Tensor, norm: Norm) -> None:
    """LayerNorm over the last axis, in place; with (E, D) parameters each member of (E, rows, D) has its own."""
    weight, bias, eps = norm
    if weight is not None and weight.ndim == 2:
        y = functional.layer_norm(x, x.shape[-1:], None, None, eps).mul_(weight[:, None])
        x.copy_(y if bias is None else y.add_(bias[:, None]))
    else:
        x.copy_(functional.layer_norm(x, x.shape[-1:], weight, bias, eps))


def make_stepper(model: WorldModel, rows: int, dtype: torch.dtype | None = None) -> Stepper:
    """The model's own stepper where it has one, else its ``predict``."""
    make = getattr(model, "stepper", None)
    if make is None:
        return PredictStepper(model)
    return make(rows) if dtype is None else make(rows, dtype=dtype)
