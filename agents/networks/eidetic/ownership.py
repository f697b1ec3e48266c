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
        """All units alive: the start of a task."""
        self.alive.fill_(True)
        self.version += 1

    def claim(self, task: int) -> None:
        """Every free unit that is alive becomes the task's."""
        self.owner[self.candidates] = task
        self.version += 1

    def key(self) -> tuple[int, int, int]:
        """Changes whenever owners or aliveness do."""
        buffers = self._buffers  # asked for in every forward, and attributes of modules are slow
        return self.version, buffers["owner"]._version, buffers["alive"]._version  # type: ignore[union-attr]

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

    def key(self) -> tuple[Any, ...]:
        """Changes whenever owners or aliveness of a space do."""
        return self.spaces[0].key() if len(self.spaces) == 1 else tuple(s.key() for s in self.spaces)

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


@dataclass(frozen=True)
class _Plan:
    """Which entries of a tensor its parameter decides about, in indices: a mask would be as large as the weights.

    Args:
        dim: axis of the units that are written.
        rows: (n,) int64, the rows that are trainable; None for all.
        inputs: axis of the units that are read.
        closed: (k,) int64, the columns that trainable rows may not read; None for none.
        keep: vectors of 0 and 1 by which gradients are multiplied, shaped to vary along one axis each.
    """

    dim: int
    rows: Tensor | None
    inputs: int
    closed: Tensor | None
    keep: tuple[Tensor, ...]

    def write(self, value: Tensor, store: Tensor) -> None:
        """What is trainable goes from ``value`` into ``store``; what is not readable is 0 there."""
        if self.rows is None:
            store.copy_(value)
            if self.closed is not None:
                store.index_fill_(self.inputs, self.closed, 0.0)
            return
        part = value.index_select(self.dim, self.rows)
        if self.closed is not None:
            part.index_fill_(self.inputs, self.closed, 0.0)
        store.index_copy_(self.dim, self.rows, part)

    def clear(self, grad: Tensor) -> Tensor:
        """``grad``, in place, with 0 where nothing is trainable. NaN stays NaN: there the step is lost in any case."""
        for vector in self.keep:
            grad.mul_(vector)
        return grad


class _Effective(torch.autograd.Function):
    """What a layer computes with, written into ``store`` itself: no further copy of the weights is kept.

    Entries of ``store`` that are trainable are scratch; the others are what is owned, or 0. The gradient of entries that
    are not trainable is exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, store: Tensor, plan: _Plan, same: bool, private: bool) -> Tensor:
        # Autograd must notice when a graph is used after its weights have changed, as with any parameter. ``store`` is
        # what layers save, and writing into it counts as a change; so where the parameter is the same as in an earlier
        # forward, whose graph may still be needed, the same numbers are written through .data, which does not count.
        plan.write(value.detach(), store.data if same else store)
        ctx.plan, ctx.private = plan, private
        ctx.save_for_backward(value)
        return store.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        _ = ctx.saved_tensors  # raises if the parameter has changed since
        if not ctx.private or torch.is_grad_enabled():
            grad = grad.clone()
        return ctx.plan.clear(grad), None, None, None, None


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
        self._plan: tuple[Any, Any] | None = None
        self._written: tuple[int, int] | None = None  # the parameter, by identity and version, that store was made of

    def forward(self, *, private: bool = False) -> Tensor:
        """The effective tensor.

        Args:
            private: it is used in one operation whose gradient nothing else sees, so that can be masked in place.
        """
        plan = self._trainable()
        value = self.value
        if plan is True:  # nothing owned, nothing pruned
            return value
        if plan is False:  # all owned
            return self.store
        if isinstance(plan, Tensor):  # vectors are so small that copies cost less than keeping track
            return torch.where(plan, value, self.store)
        now = id(value), value._version
        same, self._written = self._written == now, now
        return _Effective.apply(value, self.store, plan, same, private)  # type: ignore[return-value]

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
        """True (everything), False (nothing), a mask of a vector, or a plan; kept until ownership changes."""
        key = self.out[1].key(), None if self.inputs is None else self.inputs[1].key()
        if self._plan is None or self._plan[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must be of use in training too
                self._plan = key, self._make_plan()
        return self._plan[1]

    def _make_plan(self) -> Any:
        if bool(self.owned().all()):  # of no rows at all, too
            return False
        rows = self.rows()
        columns = None if self.inputs is None else self.columns()
        if bool(rows.all()) and (columns is None or bool(columns.all())):
            return True
        self._clear()
        if self.value.ndim == 1:
            return rows
        dim, ndim = self.out[0], self.value.ndim
        keep, chosen, closed, inputs = [], None, None, 0
        if not bool(rows.all()):
            chosen = rows.nonzero()[:, 0]
            keep.append(along(rows, dim, ndim).to(self.value.dtype))
        if self.inputs is not None and columns is not None and not bool(columns.all()):
            inputs, closed = self.inputs[0], (~columns).nonzero()[:, 0]
            keep.append(along(columns, inputs, ndim).to(self.value.dtype))
        return _Plan(dim, chosen, inputs, closed, tuple(keep))

    def _clear(self) -> None:
        """``store`` holds what is owned and zeros. Counts as a change for graphs that were made of it."""
        self._written = None
        if self.store.shape != self.value.shape:
            self.store = torch.zeros_like(self.value, requires_grad=False)
        else:
            self.store.masked_fill_(~self.owned(), 0.0)

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
            self.store.copy_(effective)
        self._written = None

    @torch.no_grad()
    def resize(self, sources: dict[Space, Tensor], rng: torch.Generator | None) -> None:
        """Follow changed spaces (see :meth:`Axis.gather`); new entries are fresh in ``value`` and 0 in ``store``."""
        axes = [self.out] if self.inputs is None else [self.out, self.inputs]
        changed = [(dim, axis.gather(sources)) for dim, axis in axes if any(s in sources for s in axis.spaces)]
        if not changed:
            return
        value, store = self.value.detach(), self.store
        stored = store.shape == value.shape
        for dim, source in changed:
            shape = list(value.shape)
            shape[dim] = len(source)
            grows = bool((source < 0).any())
            fill = self.fresh(tuple(shape), rng) if grows and rng is not None else 0.0
            value = take(value, dim, source, fill)
            store = take(store, dim, source) if stored else store
        self.value, self.store = nn.Parameter(value), store
        self.forget()

    # -- state ------------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """The tensors are others now: what was derived from them is made anew."""
        self._plan = self._written = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.store.numel():  # without scratch
            destination[prefix + "store"] = self.store.detach().masked_fill(~self.owned(), 0.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "store")
        if saved is not None and saved.shape != self.store.shape:
            self.store = torch.zeros(saved.shape, dtype=self.value.dtype, device=self.value.device)
        self.forget()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnedParameter:
        self.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None, "_written": None}  # copies make plans of their own

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
