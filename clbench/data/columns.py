"""What import and export of other formats share: arrays to columns and back, with errors that say which array is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.data.dataset import OfflineDataset, Rendered
from clbench.errors import DataError

DRAWN_FROM = "position"  # the part of a rendered column that stands for it where pixels are not asked for


def to_tensor(array: np.ndarray, where: str) -> Tensor:
    """Floating point becomes float32 and whole numbers int64; uint8 stays (pixels).

    Raises:
        DataError: another type (text, objects, complex numbers).
    """
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "iu":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
    if array.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    raise DataError(f"{where} is of type {array.dtype}; only floating point, whole numbers and uint8 can be read.")


def split_episodes(column: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``T + 1`` observations per episode, concatenated (N + E, ...) -> those before an action, the final ones."""
    last = (lengths + 1).cumsum(0) - 1
    before = torch.ones(len(column), dtype=torch.bool)
    before[last] = False
    return column[before], column[last]


def join_episodes(column: Tensor, final: Tensor, dataset: OfflineDataset) -> Tensor:
    """The inverse of :func:`split_episodes`."""
    rows = torch.arange(len(dataset), device=dataset.device) + dataset.episode
    last = (dataset.lengths + 1).cumsum(0) - 1
    joined = column.new_empty(len(column) + len(final), *column.shape[1:])
    joined[rows], joined[last] = column, final
    return joined


def make_dataset(
    columns: Mapping[str, Tensor] | Tensor, actions: Tensor, lengths: Tensor, name: str, metadata: dict[str, Any]
) -> OfflineDataset:
    """A data set of columns (N + E, ...), with the observation after the last action in its place.

    Columns that are equal become one (``observation`` and ``achieved_goal`` often are).
    """
    if isinstance(columns, Tensor):
        rows, final = split_episodes(columns, lengths)
        return OfflineDataset(rows, actions, lengths, final, name=name, metadata=metadata)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for key, column in columns.items():
        twin = next((k for k in made if _equal(columns[k], column)), None)
        made[key] = made[twin] if twin is not None else split_episodes(column, lengths)
    observations, final = ({k: v[i] for k, v in made.items()} for i in (0, 1))
    return OfflineDataset(observations, actions, lengths, final, name=name, metadata=metadata)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def exported_columns(
    dataset: OfflineDataset, pixels: bool
) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Tensor, Tensor]]]:
    """What of a data set goes into a file: -> (observations, the rest of what pictures are drawn from), each by key as
    (rows, final rows). The key of observations that are no dict is ``""``.

    Args:
        dataset: with the observation after the last action of each episode.
        pixels: keep rendered columns (to be drawn by the writer) instead of the positions they are drawn from.

    Raises:
        DataError: there are no final observations, or a rendered column has no position.
    """
    if dataset.final_observations is None:
        raise DataError(
            f"Data set {dataset.name!r} has no observations after the last actions of its episodes, which both formats "
            "need; it cannot be exported."
        )
    single = not isinstance(dataset.observations, Mapping)
    observations = {"": dataset.observations} if single else dataset.observations
    final = {"": dataset.final_observations} if single else dataset.final_observations
    found: dict[str, tuple[Any, Any]] = {}
    rest: dict[str, tuple[Tensor, Tensor]] = {}
    for key, column in observations.items():
        last = final[key]
        if pixels or not isinstance(column, Rendered):
            found[key] = column, last
            continue
        if DRAWN_FROM not in column.columns:
            raise DataError(f"Data set {dataset.name!r}: {key} is drawn from {sorted(column.columns)}; add --pixels.")
        for part in column.columns:
            if part != DRAWN_FROM:
                rest[part] = column.columns[part], last.columns[part]
        found[key] = column.columns[DRAWN_FROM], last.columns[DRAWN_FROM]
    return found, rest
