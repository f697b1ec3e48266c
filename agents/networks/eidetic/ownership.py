"""Spaces of units, who owns which, and parameters that cannot change where they are owned.

Eidetic Learning (Dronen and Balestriero 2025, arXiv 2502.09500) keeps what a task has learned by wiring: the units that a
task uses become its own, nothing that belongs to a younger task flows into them (*resistance*), and their weights never
change again (*persistence*). Here both are structural. A layer does not compute with its parameter but with ::

    W[i, j] = store[i, j]   where row i is owned                              a buffer: no optimiser knows it
            = value[i, j]   where row i is free and alive, column j readable  the parameter
            = 0             elsewhere

so weight decay, momentum, clipping, averaging or resets of parameters cannot reach what is owned. Ownership is one number
per unit and aliveness one bit per unit; weights hold no masks, those follow from the spaces on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.errors import ConfigError

FREE = torch.iinfo(torch.int16).max  # owner of a unit that belongs to no task yet: younger than every task
INPUT = -1  # owner of what the network is given: older than every task


class Space(nn.Module):
    """Units that one or several layers write and others read: the outputs of a layer, a residual stream, a latent.

    Attributes:
        owner: (size,) int16, the task that owns each unit; :data:`FREE` for none, :data:`INPUT` for given numbers.
        alive: (size,) bool, False for units that were pruned in the task under way.

    Args:
        size: number of units.
        group: numbers per unit. A unit of several numbers (an attention head) is owned and pruned as a whole.
        owner: of all units at the start.
        prunable: False for spaces whose units are all needed (outputs).
        transfer: whether units may read those of older tasks (forward transfer). Without it tasks share only the inputs.
    """

    owner: Tensor
    alive: Tensor

    def __init__(
        self, size: int, *, group: int = 1, owner: int = FREE, prunable: bool = True, transfer: bool = True
    ) -> None:
        super().__init__()
        if size < 1 or group < 1:
            raise ConfigError(
                f"A space needs at least one unit of at least one number, got size={size}, group={group}."
            )
        self.group, self.prunable, self.transfer = group, prunable, transfer
        self.register_buffer("owner", torch.full((size,), owner, dtype=torch.int16))
        self.register_buffer("alive", torch.ones(size, dtype=torch.bool))
        self.version = 0  # goes up with every change, so that masks are made anew
        self.taps: list[tuple[Tensor, int]] | None = None

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.owner)

    @property
    def width(self) -> int:
        """Numbers in all units."""
        return self.size * self.group

    @property
    def free(self) -> Tensor:
        """(size,) bool: units that no task owns."""
        return self.owner == FREE

    @property
    def candidates(self) -> Tensor:
        """(size,) bool: units that may be pruned, trained, reset; never an owned one."""
        return self.free & self.alive

    def kill(self, mask: Tensor) -> None:
        """Prune units. Raises ConfigError if one of ``mask`` (size,) bool is owned."""
        if bool((mask & ~self.free).any()):
            raise ConfigError("Only free units can be pruned; the mask holds owned ones.")
        self.alive &= ~mask
        self.version += 1

    def revive(self) -> None:
        """All units alive: the start of a task, or its end."""
        self.alive.fill_(True)
        self.version += 1

    def claim(self, task: int) -> None:
        """Every free unit that is alive becomes the task's."""
        self.owner[self.candidates] = task
        self.version += 1

    def key(self) -> tuple[int, int, int]:
        """Changes whenever owners or aliveness do."""
        return self.version, self.owner._version, self.alive._version

    def tap(self, values: Tensor, dim: int = -1) -> Tensor:
        """Called by layers with what they write here; kept while :attr:`taps` is a list (importance, verification)."""
        if self.taps is not None:
            if values.requires_grad:
                values.retain_grad()
            self.taps.append((values, dim))
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Space:
        self.version += 1
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.version += 1
        super()._load_from_state_dict(*args)


@dataclass(frozen=True)
class Axis:
    """How the entries along one axis of a tensor follow the units of one or several spaces, in this order.

    Args:
        spaces: joined one after the other.
        inner: entries per number of a unit, side by side: H * W when planes (C, H, W) are flattened.
        outer: repetitions of the whole: 3 for the gates of a GRU, H * W when channels come last.
    """

    spaces: tuple[Space, ...]
    inner: int = 1
    outer: int = 1

    def expand(self, per_unit: Callable[[Space], Tensor]) -> Tensor:
        """A value per entry from a value per unit."""
        parts = [per_unit(s).repeat_interleave(s.group * self.inner) for s in self.spaces]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).repeat(self.outer)

    @property
    def size(self) -> int:
        """Entries."""
        return sum(s.width for s in self.spaces) * self.inner * self.outer

    def owners(self) -> Tensor:
        """(size,) int16."""
        return self.expand(lambda s: s.owner)

    def key(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(s.key() for s in self.spaces)

    def gather(self, sources: dict[Space, Tensor]) -> Tensor:
        """Where each entry of the axis comes from when spaces change, -1 for new ones.

        Args:
            sources: for changed spaces, the old unit (or -1) of each new unit, int64.
        """
        device = self.spaces[0].owner.device
        blocks, start = [], 0
        for space in self.spaces:
            step = space.group * self.inner
            units = sources.get(space, torch.arange(space.size, device=device))
            first = torch.where(units < 0, -1, start + units * step)
            inside = torch.arange(step, device=device)
            blocks.append(torch.where(first[:, None] < 0, -1, first[:, None] + inside).flatten())
            start += space.size * step
        block = torch.cat(blocks)
        return torch.cat([torch.where(block < 0, -1, block + i * start) for i in range(self.outer)])


def take(tensor: Tensor, dim: int, source: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Entries ``source`` of ``tensor`` along ``dim``; ``fill`` (broadcast to the result) where ``source`` is -1."""
    taken = tensor.index_select(dim, source.clamp_min(0))
    if bool((source < 0).any()):
        new = along(source < 0, dim, taken.ndim)
        taken = torch.where(new, torch.as_tensor(fill, dtype=taken.dtype, device=taken.device), taken)
    return taken


def along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    """A vector as a tensor of ``ndim`` axes that varies along ``dim``."""
    return vector.reshape([-1 if i == dim else 1 for i in range(ndim)])


class _Effective(torch.autograd.Function):
    """``where(trainable, value, store)``, written into ``store`` itself: no further copy of the weights is kept.

    Entries of ``store`` that are trainable are scratch; the others are what is owned, or 0. The gradient of entries that
    are not trainable is exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, store: Tensor, trainable: Tensor) -> Tensor:
        # Through .data, so that an earlier forward of this step, which holds the same numbers, stays valid for autograd.
        # A parameter that has changed since is noticed in backward, because value is a saved tensor.
        scratch = store.data
        torch.where(trainable, value.detach(), scratch, out=scratch)
        ctx.save_for_backward(value, trainable)
        return store.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        _, trainable = ctx.saved_tensors
        return torch.where(trainable, grad, 0.0), None, None


class OwnedParameter(nn.Module):
    """A parameter whose rows belong to units; calling it gives the effective tensor to compute with.

    Attributes:
        value: the parameter. What it holds at owned rows means nothing.
        store: what is owned, a buffer of the same shape; empty until something is pruned or owned.

    Args:
        shape: of the tensor.
        out: (dim, axis) of the units that the tensor belongs to.
        inputs: (dim, axis) of the units that are read through it; None for biases and the like.
        bound: fresh entries are uniform in +-bound; or, with ``constant``, all equal to it.
        constant: see ``bound``.
    """

    store: Tensor

    def __init__(
        self, shape: tuple[int, ...], out: tuple[int, Axis], inputs: tuple[int, Axis] | None = None, *,
        bound: float = 0.0, constant: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out, self.inputs, self.bound, self.constant = out, inputs, bound, constant
        self.value = nn.Parameter(torch.full(shape, constant))
        self.register_buffer("store", torch.empty(0))
        self._masks: tuple[Any, Any] | None = None

    def forward(self) -> Tensor:
        trainable = self._trainable()
        if trainable is True:  # nothing owned, nothing pruned
            return self.value
        if trainable is False:  # all owned
            return self.store
        return _Effective.apply(self.value, self.store, trainable())  # type: ignore[return-value]

    # -- masks ------------------------------------------------------------------------------------------------------------

    def rows(self) -> Tensor:
        """(out size,) bool: trainable rows, free and alive."""
        return self.out[1].expand(lambda s: s.candidates)

    def columns(self) -> Tensor:
        """(in size,) bool: what a free row may read: every unit that is alive; without transfer no owned one."""
        assert self.inputs is not None
        if self.transfers:
            return self.inputs[1].expand(lambda s: s.alive)
        return self.inputs[1].expand(lambda s: s.alive & (s.free | (s.owner == INPUT)))

    @property
    def transfers(self) -> bool:
        return all(s.transfer for s in self.out[1].spaces)

    def trainable(self) -> Tensor:
        """Bool, broadcastable to the shape: entries that the parameter decides about."""
        dim, ndim = self.out[0], self.value.ndim
        rows = along(self.rows(), dim, ndim)
        return rows if self.inputs is None else rows & along(self.columns(), self.inputs[0], ndim)

    def owned(self) -> Tensor:
        """Bool, broadcastable to the shape: rows that are owned."""
        return along(self.out[1].expand(lambda s: ~s.free), self.out[0], self.value.ndim)

    def _trainable(self) -> Any:
        """True (everything), False (nothing), or a function that makes the mask; kept until ownership changes."""
        key = self.out[1].key(), None if self.inputs is None else self.inputs[1].key()
        if self._masks is None or self._masks[0] != key:
            dim, ndim = self.out[0], self.value.ndim
            rows = self.rows()
            columns = None if self.inputs is None else self.columns()
            if bool(rows.all()) and (columns is None or bool(columns.all())):
                self._masks = key, True
            elif bool(self.owned().all()):
                self._masks = key, False
            else:
                self._clear()
                r = along(rows, dim, ndim)
                if columns is None or self.inputs is None:
                    self._masks = key, lambda: r
                else:  # two vectors in place of a mask as large as the weights
                    c = along(columns, self.inputs[0], ndim)
                    self._masks = key, lambda: r & c
        return self._masks[1]

    @torch.no_grad()
    def _clear(self) -> None:
        """``store`` holds what is owned and zeros."""
        if self.store.shape != self.value.shape:
            self.store = torch.zeros_like(self.value, requires_grad=False)
        else:
            self.store.data.masked_fill_(~self.owned(), 0.0)

    # -- changes ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, rng: torch.Generator) -> None:
        """Fresh values at the rows that no task owns. Draws as many numbers whatever is owned."""
        free = along(self.out[1].expand(lambda s: s.free), self.out[0], self.value.ndim)
        self.value.copy_(torch.where(free, self.fresh(tuple(self.value.shape), rng), self.value))

    def fresh(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Initial values: uniform in +-bound (Kaiming with a = sqrt 5, the default of torch), or the constant."""
        if not self.bound:
            return torch.full(shape, self.constant, dtype=self.value.dtype, device=self.value.device)
        draw = torch.rand(shape, generator=rng, device=rng.device).mul_(2 * self.bound).sub_(self.bound)
        return draw.to(self.value)

    @torch.no_grad()
    def settle(self) -> None:
        """Write the effective values into ``store``, where :meth:`Space.claim` is about to make rows owned.

        Raises:
            ConfigError: a value is not finite.
        """
        effective = self().detach()
        if not bool(torch.isfinite(effective).all()):
            raise ConfigError("holds NaN or infinite values")
        if self.store.shape != self.value.shape:
            self.store = effective.clone()
        elif effective.data_ptr() != self.store.data_ptr():
            self.store.data.copy_(effective)

    @torch.no_grad()
    def resize(self, sources: dict[Space, Tensor], rng: torch.Generator | None) -> None:
        """Follow changed spaces (see :meth:`Axis.gather`); new entries are fresh in ``value`` and 0 in ``store``."""
        axes = [self.out] if self.inputs is None else [self.out, self.inputs]
        changed = [(dim, axis.gather(sources)) for dim, axis in axes if any(s in sources for s in axis.spaces)]
        if not changed:
            return
        value, store = self.value.detach(), self.store
        for dim, source in changed:
            shape = list(value.shape)
            shape[dim] = len(source)
            grows = bool((source < 0).any())
            fill = self.fresh(tuple(shape), rng) if grows and rng is not None else 0.0
            value = take(value, dim, source, fill)
            store = take(store, dim, source) if store.numel() else store
        self.value, self.store, self._masks = nn.Parameter(value), store, None

    # -- state ------------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.store.numel():  # without scratch
            destination[prefix + "store"] = self.store.detach().masked_fill(~self.owned(), 0.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "store")
        if saved is not None and saved.shape != self.store.shape:
            self.store = torch.zeros(saved.shape, dtype=self.value.dtype, device=self.value.device)
        self._masks = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnedParameter:
        self._masks = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_masks": None}  # copies make masks of their own

    def extra_repr(self) -> str:
        return f"{tuple(self.value.shape)}"


def fan_in_bound(fan_in: int) -> float:
    """1 / sqrt(fan_in): the bound of torch's default initialisation."""
    return 1 / math.sqrt(fan_in)


def owned_parameters(module: nn.Module) -> Iterator[tuple[str, OwnedParameter]]:
    """Names and owned parameters of a module, in the order of its parts."""
    for name, part in module.named_modules():
        if isinstance(part, OwnedParameter):
            yield name, part
