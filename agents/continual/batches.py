"""Batches of any agent as rows: tensors with the same first dimension in tuples, dicts and dataclasses.

A tensor that stands in several places of a batch (an observation that is also the achieved goal) is taken, joined and kept
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clbench.errors import ContractError
from clbench.registry import load_object


def zip_map(function: Callable[..., Any], *trees: Any) -> Any:
    """``function`` on the tensors of trees of one structure; what is no tensor is taken from the first.

    Places that hold the same tensors share one result.
    """
    results: dict[tuple[int, ...], Any] = {}

    def walk(*trees: Any) -> Any:
        first = trees[0]
        if isinstance(first, Tensor):
            same = tuple(map(id, trees))
            if same not in results:
                results[same] = function(*trees)
            return results[same]
        if dataclasses.is_dataclass(first) and not isinstance(first, type):
            parts = {f.name: walk(*(getattr(t, f.name) for t in trees)) for f in dataclasses.fields(first)}
            return type(first)(**parts)
        if isinstance(first, Mapping):
            return {k: walk(*(t[k] for t in trees)) for k in first}
        if isinstance(first, tuple | list):
            parts = [walk(*values) for values in zip(*trees, strict=True)]
            return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
        return first

    return walk(*trees)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a batch, each once, in a fixed order."""
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


def _is_container(cls: Any) -> bool:
    """Whether it is the class of a dataclass or of a named tuple."""
    return isinstance(cls, type) and (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields"))


# -- as plain values -------------------------------------------------------------------------------------------------------


def flatten(batch: Any, *, share: bool = True) -> tuple[list[Tensor], Any]:
    """The tensors of a batch and its structure in plain values: what a state may hold.

    Args:
        batch: any.
        share: a tensor that stands in several places is listed once.

    Raises:
        ContractError: it holds something that is neither a tensor, a container of tensors, nor a plain value.
    """
    columns: list[Tensor] = []
    place: dict[int, int] = {}

    def walk(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if not (share and id(tree) in place):
                place[id(tree)] = len(columns)
                columns.append(tree)
            return ["tensor", place[id(tree)]]
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            fields = {f.name: walk(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
            return ["class", f"{type(tree).__module__}:{type(tree).__qualname__}", fields]
        if isinstance(tree, Mapping):
            return ["dict", {k: walk(v) for k, v in tree.items()}]
        if isinstance(tree, tuple) and hasattr(tree, "_fields"):
            fields = {k: walk(getattr(tree, k)) for k in tree._fields}  # type: ignore[attr-defined]
            return ["class", f"{type(tree).__module__}:{type(tree).__qualname__}", fields]
        if isinstance(tree, tuple | list):
            return ["list" if isinstance(tree, list) else "tuple", [walk(v) for v in tree]]
        if tree is None or isinstance(tree, bool | int | float | str):
            return ["value", tree]
        raise ContractError(f"A batch of training rows holds a {type(tree).__name__}; use tensors and plain values.")

    return columns, walk(batch)


def unflatten(columns: Sequence[Tensor], structure: Any) -> Any:
    """The inverse of :func:`flatten`.

    Raises:
        ContractError: the structure names a class that is no container.
    """

    def build(node: Any) -> Any:
        kind, content = node[0], node[1]
        if kind == "tensor":
            return columns[content]
        if kind == "class":
            cls: Any = load_object(content)
            if not _is_container(cls):  # a file must not make us call anything
                raise ContractError(f"A state names {content} as a container of rows, but it is none.")
            return cls(**{k: build(v) for k, v in node[2].items()})
        if kind == "dict":
            return {k: build(v) for k, v in content.items()}
        if kind in ("tuple", "list"):
            parts = [build(v) for v in content]
            return parts if kind == "list" else tuple(parts)
        return content

    return build(structure)


def pack(batch: Any) -> dict[str, Any] | None:
    """A batch, or None, as a state in memory of its own; :func:`unpack` makes it a batch again."""
    if batch is None:
        return None
    columns, structure = flatten(batch)
    return {"columns": [c.detach().clone() for c in columns], "structure": structure}


def unpack(state: Mapping[str, Any] | None, device: torch.device) -> Any:
    """The batch of a state, on a device, in memory of its own."""
    if state is None:
        return None
    return unflatten([c.to(device, copy=True) for c in state["columns"]], state["structure"])
