"""Whether offline data are of the kind that an environment speaks: checked before anything is trained on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
from torch import Tensor

from clbench.contracts import Spaces
from clbench.data.dataset import OfflineDataset
from clbench.errors import DataError, unknown_name


def check_fits(dataset: OfflineDataset, spaces: Spaces, where: str) -> None:
    """Compare actions and observations of the data with the environment's spaces.

    Args:
        where: names the data set and the task in messages.

    Raises:
        DataError: actions of another size or kind, other shapes of observations, missing keys.
        UnknownNameError: observation keys that the environment does not have, with the nearest.
    """
    _check_actions(dataset.actions, spaces.action, where)
    space, observations = spaces.observation, dataset.observations
    if not isinstance(space, gymnasium.spaces.Dict):
        if isinstance(observations, Mapping):
            raise DataError(
                f"{where}: the data have the observation keys {sorted(observations)}, but the environment's observations "
                f"are one {space}; for data without goals, load the file with '?achieved_goal=none'."
            )
        _check_column(observations, space, f"{where}: observations")
        return
    wanted = {k: v for k, v in space.spaces.items() if k != "desired_goal"}
    if not isinstance(observations, Mapping):
        raise DataError(f"{where}: the data have no observation keys, but the environment has {sorted(space.spaces)}.")
    for key in observations:
        if key not in wanted:
            raise unknown_name("observation key", key, wanted, where=where)
    missing = sorted(set(wanted) - set(observations))
    if missing:
        raise DataError(f"{where}: the data lack the observation keys {missing}, which the environment has.")
    for key, column in observations.items():
        _check_column(column, wanted[key], f"{where}: observations[{key!r}]")


def _check_actions(actions: Tensor, space: gymnasium.Space, where: str) -> None:
    if isinstance(space, gymnasium.spaces.Discrete):
        if actions.is_floating_point() or actions.ndim != 1:
            raise DataError(
                f"{where}: the data have actions {tuple(actions.shape[1:])} {actions.dtype}, but the environment takes "
                f"{space}; it is the wrong data set or the wrong environment."
            )
        first, last = int(actions.min()), int(actions.max())
        if first < space.start or last >= space.start + space.n:
            raise DataError(
                f"{where}: the data have actions from {first} to {last}, but the environment takes {space}."
            )
    elif isinstance(space, gymnasium.spaces.Box) and not (
        actions.is_floating_point() and tuple(actions.shape[1:]) == space.shape
    ):
        raise DataError(
            f"{where}: the data have actions of shape {tuple(actions.shape[1:])} ({actions.dtype}), but those of the "
            f"environment have shape {space.shape} (float32); it is the wrong data set or the wrong environment."
        )


def _check_column(column: Any, space: gymnasium.Space, where: str) -> None:
    if space.shape is not None and tuple(column.shape[1:]) != tuple(space.shape):
        raise DataError(
            f"{where} have shape {tuple(column.shape[1:])} in the data, but {tuple(space.shape)} in the environment; it is "
            "the wrong data set, the wrong environment, or another observation option."
        )
