"""Data sets on disk: one ``.npz`` with a header that holds the version and a checksum per array.

Only arrays and JSON are read (``allow_pickle=False``). Rendered observations are stored as what they are rendered from, so
3.7 M Two-Rooms transitions take 59 MB instead of 31 GB; the file names the renderer, it cannot bring code.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.data import RENDERERS
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.errors import DataError
from clbench.records import BROKEN_ARCHIVE, check_archive, write_bytes
from clbench.registry import load_object

FORMAT, VERSION = "clbench-dataset", 1
_DTYPES = {"float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"}


def save_dataset(dataset: OfflineDataset, path: str | Path) -> None:
    """Write ``dataset`` to ``path`` (``.npz``), atomically.

    Raises:
        ConfigError: the folder cannot be written.
        DataError: a dtype that NumPy files do not know.
    """
    arrays: dict[str, np.ndarray] = {}
    shared: dict[int, str] = {}  # tensors that appear twice are stored once

    def put(key: str, tensor: torch.Tensor) -> str:
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES:
            raise DataError(
                f"{key} of data set {dataset.name!r} is {tensor.dtype}, which cannot be stored; cast it first."
            )
        if id(tensor) not in shared:
            shared[id(tensor)] = key
            arrays[key] = tensor.detach().cpu().numpy()
        return shared[id(tensor)]

    def column(key: str, value: Any) -> Any:
        if isinstance(value, Rendered):
            return {"renderer": value.name, "columns": {k: put(f"{key}.{k}", v) for k, v in value.columns.items()}}
        return put(key, value)

    def observations(key: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {"keys": {k: column(f"{key}.{k}", v) for k, v in value.items()}}
        return {"single": column(key, value)}

    layout = {
        "observations": observations("observations", dataset.observations),
        "final_observations": observations("final_observations", dataset.final_observations),
        "actions": put("actions", dataset.actions),
        "lengths": put("lengths", dataset.lengths),
        "task": None if dataset.task is None else put("task", dataset.task),
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "name": dataset.name,
        "metadata": dataset.metadata,
        "layout": layout,
        "sha256": {k: _checksum(v) for k, v in arrays.items()},
    }
    buffer = io.BytesIO()
    np.savez(buffer, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]
    write_bytes(Path(path), buffer.getbuffer())


def load_stored_dataset(path: str | Path, device: Any = "cpu") -> OfflineDataset:
    """Read what :func:`save_dataset` wrote, verifying every checksum.

    Raises:
        DataError: missing, truncated, corrupt, not one of our files, or of a newer version.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            check_archive(archive.zip)
            if "header" not in archive.files:
                raise DataError(f"{path} is not a clbench data set (no header); see docs/data.md for the format.")
            header = json.loads(archive["header"].tobytes())
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise DataError(
                    f"{path} has format {header.get('format')!r} version {header.get('version')!r}; this version reads "
                    f"{FORMAT!r} version {VERSION}."
                )
            arrays = {k: archive[k] for k in header["sha256"]}
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no data set at {path}.") from error
    except BROKEN_ARCHIVE as error:
        detail = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is corrupt or truncated ({detail}); make or copy it again.") from error
    for key, array in arrays.items():
        if array.dtype.name not in _DTYPES or _checksum(array) != header["sha256"][key]:
            raise DataError(f"{path} is corrupt: the checksum of {key!r} does not match; make or copy the file again.")
    tensors = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}

    def column(spec: Any) -> Any:
        if isinstance(spec, str):
            return tensors[spec]
        if spec["renderer"] not in RENDERERS:
            raise DataError(f"{path} names the unknown renderer {spec['renderer']!r}; known: {sorted(RENDERERS)}.")
        columns = {k: tensors[v] for k, v in spec["columns"].items()}
        return Rendered(spec["renderer"], columns, load_object(RENDERERS[spec["renderer"]]))

    def observations(spec: Any) -> Any:
        if spec is None:
            return None
        return {k: column(v) for k, v in spec["keys"].items()} if "keys" in spec else column(spec["single"])

    try:
        layout = header["layout"]
        return OfflineDataset(
            observations(layout["observations"]),
            tensors[layout["actions"]],
            tensors[layout["lengths"]],
            observations(layout["final_observations"]),
            None if layout["task"] is None else tensors[layout["task"]],
            header["name"],
            header["metadata"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} has a broken header ({error!r}); make or copy the file again.") from error


def dataset_checksum(dataset: OfflineDataset) -> str:
    """SHA-256 of all numbers and of what they are called; the same for equal data, however they came about.

    Names and metadata do not count, so that a data set that was exported and imported again can be recognised.
    """
    digest = hashlib.sha256()

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for k in sorted(value):
                add(f"{key}.{k}", value[k])
        elif isinstance(value, Rendered):
            add(f"{key}<{value.name}>", value.columns)
        elif value is not None:
            digest.update(f"{key}:{_checksum(value.detach().cpu().numpy())}\n".encode())

    for part in ("observations", "final_observations", "actions", "lengths", "task"):
        add(part, getattr(dataset, part))
    return digest.hexdigest()


def _checksum(array: np.ndarray) -> str:
    described = f"{array.dtype.name}{array.shape}".encode()
    return hashlib.sha256(described + np.ascontiguousarray(array).tobytes()).hexdigest()
