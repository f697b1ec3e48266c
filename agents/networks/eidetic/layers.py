"""Layers in which owned units cannot change: their weights are :class:`OwnedParameter`, everything else is unit-wise.

What makes the guarantee hold (Dronen and Balestriero 2025, arXiv 2502.09500): a unit's output depends on units that are not
younger than it, on its own frozen weights, and on nothing else in the batch or the layer. So BatchNorm works channel by
channel with frozen statistics where a channel is owned, LayerNorm becomes :class:`PrefixNorm`, an attention head is a unit.
Layers keep the spaces they read and write; those belong to the network (:mod:`clbench.agents.networks.eidetic.network`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.agents.networks.eidetic.ownership import (
    INPUT,
    Axis,
    OwnedParameter,
    Space,
    along,
    fan_in_bound,
    take,
)
from clbench.errors import ConfigError, unknown_name

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
}


class EideticLayer(nn.Module):
    """What the network needs of a layer: the space it writes, and buffers that follow spaces.

    Attributes:
        out: the space that the layer writes, None where it only transforms.
        follows: buffer name -> (dim, axis), for buffers with an entry per unit.
        counters: names of buffers that no unit's output depends on.
    """

    out: Space | None = None
    counters: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.follows: dict[str, tuple[int, Axis]] = {}

    def axes(self) -> Iterator[Axis]:
        """All axes by which this layer's own tensors follow spaces."""
        for _, axis in self.follows.values():
            yield axis
        for part in self.children():
            if isinstance(part, OwnedParameter):
                yield part.out[1]
                if part.inputs is not None:
                    yield part.inputs[1]

    def recycle(self) -> None:
        """Statistics of free units as at the start."""

    def resize(self, sources: dict[Space, Tensor]) -> None:
        """Buffers follow changed spaces."""
        for name, (dim, axis) in self.follows.items():
            if any(s in sources for s in axis.spaces):
                fill = 1.0 if name.endswith("var") else 0.0
                setattr(self, name, take(getattr(self, name), dim, axis.gather(sources), fill))


def _spaces(spaces: Space | Sequence[Space]) -> tuple[Space, ...]:
    return (spaces,) if isinstance(spaces, Space) else tuple(spaces)


class _Hidden:
    """Keeps spaces out of nn.Module's own registry: they belong to the network, once."""

    def __init__(self, space: Space):
        self.space = space


class Linear(EideticLayer):
    """(..., n_in) -> (..., n_out).

    Args:
        inputs: the space, or the spaces side by side, that the last axis of the input consists of.
        out: the space that is written.
        bias: with a bias per unit.
        repeat: entries per number of the input: H * W where planes (C, H, W) were flattened.
        channels_last: the input was flattened from (H, W, C).
    """

    def __init__(
        self, inputs: Space | Sequence[Space], out: Space, *, bias: bool = True, repeat: int = 1,
        channels_last: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        reads = Axis(_spaces(inputs), *((1, repeat) if channels_last else (repeat, 1)))
        writes = Axis((out,))
        object.__setattr__(self, "out", out)
        bound = fan_in_bound(reads.size)
        self.weight = OwnedParameter((writes.size, reads.size), (0, writes), (1, reads), bound=bound)
        self.bias = OwnedParameter((writes.size,), (0, writes), bound=bound) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight(private=True), None if self.bias is None else self.bias())
        return self.out.tap(y) if self.out is not None else y


class Conv2d(EideticLayer):
    """(B, C_in, H, W) -> (B, C_out, H', W'); a unit is a filter.

    Args:
        inputs: the space, or the spaces side by side, of the input channels.
        out: the space of the output channels.
        kernel, stride, padding: as in torch.
        bias: with a bias per filter.
    """

    def __init__(
        self, inputs: Space | Sequence[Space], out: Space, kernel: int, *, stride: int = 1, padding: int = 0,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        reads, writes = Axis(_spaces(inputs)), Axis((out,))
        object.__setattr__(self, "out", out)
        self.stride, self.padding = stride, padding
        bound = fan_in_bound(reads.size * kernel * kernel)
        shape = (writes.size, reads.size, kernel, kernel)
        self.weight = OwnedParameter(shape, (0, writes), (1, reads), bound=bound)
        self.bias = OwnedParameter((writes.size,), (0, writes), bound=bound) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight(private=True), None if self.bias is None else self.bias()
        if weight.numel():
            y = F.conv2d(x, weight, bias, self.stride, self.padding)
        else:  # an extracted network may have no unit here, or none to read, which torch refuses
            (n_out, n_in), kernel = weight.shape[:2], weight.shape[2:]
            x = x if n_in else x.new_zeros(len(x), 1, *x.shape[2:])
            y = F.conv2d(x, weight.new_zeros(max(n_out, 1), max(n_in, 1), *kernel), None, self.stride, self.padding)
            y = y[:, :n_out] if bias is None else y[:, :n_out] + along(bias, 1, 4)
        return self.out.tap(y, 1) if self.out is not None else y


class Embedding(EideticLayer):
    """(...) int64 -> (..., n_out). The numbers of a vector are the units; an owned one keeps its rows of all tokens.

    Args:
        tokens: number of tokens.
        out: the space that is written.
    """

    def __init__(self, tokens: int, out: Space):
        super().__init__()
        writes = Axis((out,))
        object.__setattr__(self, "out", out)
        self.weight = OwnedParameter((tokens, writes.size), (1, writes), bound=1.0)

    def forward(self, index: Tensor) -> Tensor:
        y = F.embedding(index, self.weight(private=True))
        return self.out.tap(y) if self.out is not None else y


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias per channel, where the statistics of some channels depend on x.

    With the kernels of torch for fixed statistics, and the gradient through the statistics of the batch added in those
    channels alone: the cost is near that of torch's BatchNorm, and a channel is computed in the same way in training and
    at test time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, batch: Tensor, eps: float
    ) -> Tensor:
        """``batch`` (C,) bool: channels whose mean and variance are those of ``x``."""
        ctx.save_for_backward(x, weight, mean, var, batch)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, var, batch = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], True, True
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, wanted
        )
        if dx is not None:
            scale = torch.rsqrt(var + ctx.eps)
            rate = torch.where(batch, weight * scale / (x.numel() // x.shape[1]), 0.0)
            slope = -rate * scale * dw
            dx.addcmul_(x, along(slope, 1, x.ndim)).sub_(along(rate * db + slope * mean, 1, x.ndim))
        return dx, dw, db, None, None, None, None


class BatchNorm(EideticLayer):
    """(B, C) or (B, C, H, W), channel by channel. Owned channels use their stored statistics, in training too.

    Otherwise younger units would be trained on features of older ones that they never see at test time.

    Args:
        space: of the channels.
        eps: added to variances.
        momentum: of the running statistics; None for their plain average since the task began.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    counters = ("batches",)

    def __init__(self, space: Space, *, eps: float = 1e-5, momentum: float | None = 0.1):
        super().__init__()
        axis = Axis((space,))
        self._space, self.eps, self.momentum = _Hidden(space), eps, momentum
        self.weight = OwnedParameter((axis.size,), (0, axis), constant=1.0)
        self.bias = OwnedParameter((axis.size,), (0, axis), constant=0.0)
        self.register_buffer("running_mean", torch.zeros(axis.size))
        self.register_buffer("running_var", torch.ones(axis.size))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.follows = {"running_mean": (0, axis), "running_var": (0, axis)}
        self._masks: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_masks": None}

    def forward(self, x: Tensor) -> Tensor:
        free, trained, alive = self._who()
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight(), self.bias()
        if alive is not None:  # a channel may have been pruned because its statistics were not finite
            mean, var = torch.where(alive, mean, 0.0), torch.where(alive, var, 1.0)
        if self.training and free is not None:
            if (count := x.numel() // x.shape[1]) < 2:
                raise ConfigError(f"BatchNorm needs at least 2 values per channel in training, got {tuple(x.shape)}.")
            # the mean and the variance per channel, without a gradient, which _Normalise has
            now, spread = torch.batch_norm_update_stats(x.detach(), None, None, 0.0)
            self._update(now, spread * (count / (count - 1)), trained)
            mean = torch.where(free, now.to(mean.dtype), mean)
            var = torch.where(free, spread.to(var.dtype), var)
            y: Tensor = _Normalise.apply(x, weight, bias, mean, var, free, self.eps)  # type: ignore[assignment]
        else:
            y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        return y if alive is None else torch.where(along(alive, 1, x.ndim), y, 0.0)

    def _who(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Channels that are free (None if none is), those that are trained, those that are alive (None if all are)."""
        space = self._space.space
        if self._masks is None or self._masks[0] != space.key():
            with torch.inference_mode(False):
                free, trained, alive = (_numbers(space, v) for v in (space.free, space.candidates, space.alive))
                found = free if bool(free.any()) else None, trained, None if bool(alive.all()) else alive
            self._masks = space.key(), found
        return self._masks[1]

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, trained: Tensor) -> None:
        self.batches += 1
        rate = 1 / float(self.batches) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, var)):
            # the statistics of owned channels are copied, never computed: x + 0 * (y - x) is not x for infinite y
            running.copy_(torch.where(trained, running + rate * (now.to(running.dtype) - running), running))

    @torch.no_grad()
    def recycle(self) -> None:
        free = _numbers(self._space.space, self._space.space.free)
        self.running_mean.copy_(torch.where(free, 0.0, self.running_mean))
        self.running_var.copy_(torch.where(free, 1.0, self.running_var))
        self.batches.zero_()


class PrefixNorm(EideticLayer):
    """LayerNorm in which a unit is normalised by the units that are not younger: (..., n) -> (..., n).

    For unit ``i`` of task ``k``: mean and variance over the alive units with owner <= k (without transfer: its own task's);
    free units see all that are alive. Gain and offset per unit. Plain LayerNorm mixes owned and free units and so cannot
    keep what is owned.

    Args:
        spaces: the space, or the spaces side by side, of the last axis.
        eps: added to variances.
        affine: with a gain and an offset per unit.
    """

    def __init__(self, spaces: Space | Sequence[Space], *, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        axis = Axis(_spaces(spaces))
        self.axis, self.eps = axis, eps
        self.weight = OwnedParameter((axis.size,), (0, axis), constant=1.0) if affine else None
        self.bias = OwnedParameter((axis.size,), (0, axis), constant=0.0) if affine else None
        self._levels: tuple[Any, Any] | None = None

    def axes(self) -> Iterator[Axis]:
        yield self.axis

    def forward(self, x: Tensor) -> Tensor:
        alive, members, level = self.levels(x.device)
        wide = x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x
        means, scales = [], []
        # one level after the other, in shapes that do not change: what a level gives never depends on how many there are
        for inside in members:
            inside = inside.to(wide.dtype)
            count = inside.sum().clamp_min(1)  # of no units at all, when all of a level are pruned
            mean = (wide @ inside / count)[..., None]
            var = (wide - mean).square() @ inside / count
            means.append(mean)
            scales.append(torch.rsqrt(var + self.eps)[..., None])
        if not means:  # a space without units, in an extracted network
            return x
        mean, scale = (v[0] if len(v) == 1 else torch.cat(v, -1)[..., level] for v in (means, scales))
        y = ((wide - mean) * scale).to(x.dtype)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight() + self.bias()
        return torch.where(alive, y, 0.0)

    def levels(self, device: torch.device) -> tuple[Tensor, list[Tensor], Tensor]:
        """Numbers alive (n,) bool; the members (n,) bool of each level; the level (n,) int64 of each number."""
        key = (self.axis.key(), device)
        if self._levels is None or self._levels[0] != key:
            with torch.inference_mode(False):
                owners, alive = self.axis.owners(), self.axis.expand(lambda s: s.alive)
                tasks = owners.unique()  # in order
                transfer = all(s.transfer for s in self.axis.spaces)
                older = [owners <= task if transfer else (owners == task) | (owners == INPUT) for task in tasks]
                members = [m & alive for m in older]
                self._levels = key, (alive, members, torch.searchsorted(tasks, owners))
        return self._levels[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_levels": None}


class GRUCell(EideticLayer):
    """x (..., n_in), h (..., n) -> (..., n): Cho et al. 2014, in the form of torch. A unit has the rows of all three gates.

    Start from ``h = 0``: anything else would have to be owned too.

    Args:
        inputs: the space, or the spaces side by side, of x.
        hidden: the space of h.
    """

    def __init__(self, inputs: Space | Sequence[Space], hidden: Space):
        super().__init__()
        of_x, of_h, gates = Axis(_spaces(inputs)), Axis((hidden,)), Axis((hidden,), outer=3)
        object.__setattr__(self, "out", hidden)
        bound = fan_in_bound(hidden.width)
        self.weight_ih = OwnedParameter((gates.size, of_x.size), (0, gates), (1, of_x), bound=bound)
        self.weight_hh = OwnedParameter((gates.size, of_h.size), (0, gates), (1, of_h), bound=bound)
        self.bias_ih = OwnedParameter((gates.size,), (0, gates), bound=bound)
        self.bias_hh = OwnedParameter((gates.size,), (0, gates), bound=bound)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        assert self.out is not None
        reset_x, update_x, new_x = F.linear(x, self.weight_ih(private=True), self.bias_ih()).chunk(3, -1)
        reset_h, update_h, new_h = F.linear(h, self.weight_hh(private=True), self.bias_hh()).chunk(3, -1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        # the hidden state of a killed unit is 0, whatever it was before
        y = torch.where(_numbers(self.out, self.out.alive), new + update * (h - new), 0.0)
        return self.out.tap(y)


class MultiheadAttention(EideticLayer):
    """Self-attention (B, T, n) -> (B, T, n_out); a head is one unit, and its owner owns its Q, K, V rows.

    Products of queries and keys mix all numbers of a head, so a head has one owner. Within a head nothing of another
    head is read; what heads read and where they write is owned number by number.

    Args:
        stream: the space that is read.
        heads: a space with one unit per head and ``group`` numbers in each.
        out: the space that is written: the same residual stream, as a rule.
        causal: let a position see only itself and earlier ones.
    """

    def __init__(self, stream: Space, heads: Space, out: Space, *, causal: bool = False):
        super().__init__()
        object.__setattr__(self, "out", out)
        self._heads, self.causal = _Hidden(heads), causal
        self.query, self.key, self.value = (Linear(stream, heads) for _ in range(3))
        self.output = Linear(heads, out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (T, T) or (B, 1, T, T) bool: who may look at whom. It must not depend on the network's units."""
        heads = self._heads.space
        split = (heads.size, heads.group)
        q, k, v = (f(x).unflatten(-1, split).transpose(-3, -2) for f in (self.query, self.key, self.value))
        scores = q @ k.mT * heads.group**-0.5
        if self.causal:
            t = x.shape[-2]
            lower = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
            mask = lower if mask is None else mask & lower
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
        return self.output(attended)


class Activation(nn.Module):
    """A function of each number alone, by name: one of ``POINTWISE``."""

    def __init__(self, name: str):
        super().__init__()
        if name not in POINTWISE:
            raise unknown_name("activation", name, POINTWISE)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return POINTWISE[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class Heads(nn.Module):
    """One linear output layer per task, opened when its task begins; all read the same space.

    Args:
        inputs: the space, or the spaces side by side, that heads read.
        size: outputs of each.
        transfer: as for spaces.
    """

    def __init__(self, inputs: Space | Sequence[Space], size: int, *, transfer: bool = True):
        super().__init__()
        self._inputs, self.size, self.transfer = _spaces(inputs), size, transfer
        self.layers = nn.ModuleList()
        self.spaces = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.layers)

    def open(self, like: Tensor | None = None) -> Linear:
        """A head for the next task, with the dtype and on the device of ``like``."""
        space = Space(self.size, prunable=False, transfer=self.transfer)
        layer = Linear(self._inputs, space)
        if like is not None:
            layer.to(like)
        space.to(self._inputs[0].owner.device)
        self.spaces.append(space)
        self.layers.append(layer)
        return layer

    def close(self, count: int) -> None:
        """Only the first ``count`` heads stay."""
        while len(self) > count:
            self.layers.pop(len(self.layers) - 1)
            self.spaces.pop(len(self.spaces) - 1)

    def forward(self, x: Tensor, task: int) -> Tensor:
        """(..., n) -> (..., size), of the head of ``task``."""
        if not 0 <= task < len(self):
            raise ConfigError(f"There is no head for task {task}; {len(self)} have begun.")
        return self.layers[task](x)


def _numbers(space: Space, per_unit: Tensor) -> Tensor:
    """(size,) -> (width,)."""
    return per_unit if space.group == 1 else per_unit.repeat_interleave(space.group)


__all__ = [
    "Activation", "BatchNorm", "Conv2d", "EideticLayer", "Embedding", "GRUCell", "Heads", "Linear",
    "MultiheadAttention", "PrefixNorm",
]  # fmt: skip
