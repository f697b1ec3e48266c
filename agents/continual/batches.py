"""Batches of any agent as rows: tensors with the same first dimension in tuples, dicts and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def zip_map(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` on the tensors of trees of one structure; what is no tensor is taken from the first."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        parts = {f.name: zip_map(function, *(getattr(t, f.name) for t in trees)) for f in dataclasses.fields(first)}
        return type(first)(**parts)
    if isinstance(first, Mapping):
        return {k: zip_map(function, *(t[k] for t in trees)) for k in first}
    if isinstance(first, tuple | list):
        parts = [zip_map(function, *values) for values in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in a fixed order."""
    found: list[Tensor] = []
    zip_map(found.append, tree)
    return iter(found)


def rows(batch: Any) -> int:
    """Number of rows."""
    return len(next(tensors(batch)))


def take(batch: Any, index: Tensor | slice) -> Any:
    """Some rows."""
    return zip_map(lambda t: t[index], batch)


def concat(batches: Sequence[Any]) -> Any:
    """The rows of several batches."""
    return batches[0] if len(batches) == 1 else zip_map(lambda *parts: torch.cat(parts), *batches)


def empty_like(batch: Any, size: int) -> Any:
    """Room for ``size`` rows."""
    return zip_map(lambda t: torch.zeros(size, *t.shape[1:], dtype=t.dtype, device=t.device), batch)


def put(store: Any, slots: Tensor, batch: Any) -> None:
    """``store[slots] = batch``, in place."""

    def write(into: Tensor, values: Tensor) -> None:
        into[slots] = values

    zip_map(write, store, batch)
