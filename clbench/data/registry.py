"""Data sets by name: ``name`` or ``name?key=value&key=value``, made on the machine and the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode

from clbench.config import call_with_options
from clbench.data.dataset import OfflineDataset
from clbench.data.files import is_file, reader_of
from clbench.errors import ConfigError, ContractError
from clbench.registry import resolve


def dataset_id(name: str, **options: Any) -> str:
    """``("two-rooms", wall_x=32) -> "two-rooms?wall_x=32"``; the inverse of :func:`parse_dataset_id`."""

    def text(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    pairs = [(k, text(v)) for k, v in sorted(options.items()) if v is not None]
    return name + ("?" + urlencode(pairs, safe=",/:") if pairs else "")


def parse_dataset_id(identifier: str) -> tuple[str, dict[str, str]]:
    """``"two-rooms?wall_x=32" -> ("two-rooms", {"wall_x": "32"})``."""
    name, _, query = identifier.partition("?")
    try:
        return name, dict(parse_qsl(query, strict_parsing=True, keep_blank_values=True)) if query else {}
    except ValueError as error:
        raise ConfigError(
            f"Data set id {identifier!r}: the part after '?' must be key=value pairs joined by '&'."
        ) from error


def load_dataset(identifier: str, device: Any = "cpu") -> OfflineDataset:
    """The data set behind an id: a registered name, ``module:function``, ``imported/NAME``, or the path of a file (our own
    ``.npz``, one of OGBench's form, or ``main_data.hdf5`` of Minari), with options after ``?``.

    Raises:
        UnknownNameError: unknown name or option.
        DataError: the data are corrupt, or a file is missing (with where to put it).
    """
    name, options = parse_dataset_id(identifier)
    data = call_with_options(maker_of(name), options, where=f"data set {name!r}")
    if not isinstance(data, OfflineDataset):
        raise ContractError(f"The data set {name!r} must return an OfflineDataset, got {type(data).__name__}.")
    data.name = identifier
    return data.to(device)


def maker_of(name: str) -> Callable[..., Any]:
    """The function behind the name of a data set (an id without options); its keyword arguments are the options.

    Raises:
        UnknownNameError: unknown name, with the nearest.
        DataError: a file that is missing.
    """
    return reader_of(name) if is_file(name) else resolve("datasets", name)
