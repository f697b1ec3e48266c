"""Import and export of OGBench's ``.npz`` files (Park et al. 2025): flat arrays, without pickles.

An episode of ``T`` actions is stored as ``T + 1`` rows, the last of which has an action that was never taken (ours repeats
the one before) and ``terminals`` 1. Arrays of other names are extra keys of the observations. Files we write also hold
``clbench``, a line of JSON that says which keys the observations had; OGBench ignores it.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.data.columns import exported_columns, join_episodes, make_dataset, to_tensor
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.errors import ConfigError, DataError, unknown_name
from clbench.records import BROKEN_ARCHIVE, check_archive, unwritable, write_bytes

REQUIRED = ("observations", "actions", "terminals")
HEADER = "clbench"
CHUNK = 4096  # rows that are drawn at once


def read_ogbench(
    path: str | Path, *, achieved_goal: str = "auto", keys: Sequence[str] = (), split: str = "train"
) -> OfflineDataset:
    """The data set in an OGBench-style file.

    Args:
        path: ``X.npz``.
        achieved_goal: what goals are made of: ``"observation"`` (all of it, as OGBench does), the numbers of its entries
            (``"0,1"`` is the position in mazes), the name of another array, ``"none"`` for data without goals, or
            ``"auto"``: as we wrote it, and ``"observation"`` in files of others.
        keys: names of further arrays that become keys of the observations (``qpos``, ``button_states``, ...).
        split: ``"train"``, or ``"val"`` for ``X-val.npz`` beside it.

    Raises:
        DataError: missing or truncated files, pickles, arrays of different lengths, an episode without an end.
        ConfigError: unknown options.
    """
    path = _split(Path(path), split)
    arrays = read_arrays(path)
    for name in REQUIRED:
        if name not in arrays:
            raise DataError(f"{path} has no array {name!r}; OGBench files have {', '.join(REQUIRED)}.")
    header = _header(arrays, path)
    for name in (*REQUIRED, *keys):
        if name not in arrays:
            raise unknown_name("array", name, arrays, where=str(path))
        _check_rows(arrays, name, path)
    ends = _ends(arrays["terminals"], path)
    lengths = np.diff(ends, prepend=-1) - 1
    if (lengths < 1).any():
        first = int(np.flatnonzero(lengths < 1)[0])
        raise DataError(f"{path}: episode {first} has no transition (one row only); leave such episodes out.")
    columns = _columns(arrays, header, keys, achieved_goal, path)
    actions = np.delete(arrays["actions"], ends, axis=0)
    return make_dataset(
        columns,
        to_tensor(actions, f"{path}: actions"),
        torch.from_numpy(lengths),
        str(path),
        {"source": "ogbench", "file": path.name, **({"clbench": header} if header else {})},
    )


def _split(path: Path, split: str) -> Path:
    if split not in ("train", "val"):
        raise unknown_name("value of split", split, ("train", "val"))
    return path if split == "train" else path.with_name(f"{path.stem}-val{path.suffix}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a ``.npz`` file.

    Raises:
        DataError: missing, truncated, holds pickled objects, or names paths that leave a folder.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array, no archive")
            check_archive(archive.zip)
            check_names(archive.zip.namelist(), path)
            return {k: archive[k] for k in archive.files}
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"There is no data set at {path}.") from error
    except (*BROKEN_ARCHIVE, MemoryError) as error:
        if "allow_pickle" in str(error):
            raise DataError(f"{path} holds pickled objects, which could run code; store plain arrays only.") from error
        detail = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is corrupt or truncated ({detail}); download or copy it again.") from error


def check_names(names: Sequence[str], path: Path) -> None:
    """Refuse archives with names that would leave the folder they are unpacked in.

    Raises:
        DataError: names the entry.
    """
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise DataError(f"{path} has an entry {name!r} that leaves its folder; get the file from its source.")


def _header(arrays: dict[str, np.ndarray], path: Path) -> dict[str, Any]:
    """What we wrote beside the arrays; empty for files of others."""
    raw = arrays.pop(HEADER, None)
    if raw is None:
        return {}
    try:
        header = json.loads(raw.tobytes())
        wanted = header["observations"]
        missing = [k for k in wanted or () if k not in arrays and k not in ("observation", "achieved_goal")]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: the array {HEADER!r} is no header of ours ({error!r}); remove it.") from error
    if missing:
        raise DataError(f"{path} has no array {missing[0]!r}, which its header names; copy the file again.")
    return header


def _check_rows(arrays: Mapping[str, np.ndarray], name: str, path: Path) -> None:
    array, observations = arrays[name], arrays["observations"]
    if observations.ndim == 0:
        raise DataError(f"{path}: observations is a single number; it must have a row per time step.")
    if array.ndim == 0 or len(array) != len(observations):
        raise DataError(f"{path}: {name} has shape {array.shape}, but there are {len(observations)} observations.")


def _ends(terminals: np.ndarray, path: Path) -> np.ndarray:
    """Rows at which episodes end."""
    if terminals.ndim != 1 or terminals.dtype.kind not in "biuf" or not np.isin(terminals, (0, 1)).all():
        raise DataError(f"{path}: terminals must be 0 or 1 in every row, got {terminals.dtype} {terminals.shape}.")
    if len(terminals) == 0 or not terminals[-1]:
        raise DataError(f"{path}: the last row is not the end of an episode (terminals); the file seems to be cut.")
    return np.flatnonzero(terminals)


def _columns(
    arrays: Mapping[str, np.ndarray],
    header: Mapping[str, Any],
    keys: Sequence[str],
    achieved_goal: str,
    path: Path,
) -> dict[str, Tensor] | Tensor:
    """Observations (N + E, ...), as a tensor where there is one key only and it was not written as a dict."""

    def column(name: str) -> Tensor:
        _check_rows(arrays, name, path)
        return to_tensor(arrays[name], f"{path}: {name}")

    observation = column("observations")
    written = header.get("observations")
    extra = [k for k in dict.fromkeys([*(written or ()), *keys]) if k not in ("observation", "achieved_goal")]
    columns = {"observation": observation, **{k: column(k) for k in extra}}
    if achieved_goal == "auto":
        achieved_goal = "observation" if not header or "achieved_goal" in (written or ()) else "none"
        achieved_goal = "achieved_goal" if "achieved_goal" in arrays else achieved_goal
    if achieved_goal == "none":
        return columns if extra or written else observation
    if achieved_goal == "observation":
        return {**columns, "achieved_goal": observation}
    if achieved_goal in arrays and achieved_goal not in REQUIRED:
        return {**columns, "achieved_goal": column(achieved_goal)}
    try:
        entries = [int(i) for i in achieved_goal.split(",") if i]
        if observation.ndim != 2 or not entries:
            raise IndexError
        return {**columns, "achieved_goal": observation[:, entries].contiguous()}
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"achieved_goal must be 'observation', 'none', the name of an array of {path.name}, or numbers of entries of "
            f"the observation {tuple(observation.shape[1:])} such as '0,1'; got {achieved_goal!r}."
        ) from error


def write_ogbench(dataset: OfflineDataset, path: str | Path, *, pixels: bool = False) -> Path:
    """Write ``path`` (``.npz``), atomically.

    Args:
        dataset: with the observation after the last action of each episode; its observations are a tensor, or a dict with
            the key ``observation``.
        path: the file, which must not exist.
        pixels: draw rendered observations; else the positions they are drawn from are written.

    Raises:
        ConfigError: the file exists, or cannot be written.
        DataError: no final observations, or keys that do not go into such a file.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"OGBench files end in .npz; got {path}.")
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten; choose another --out.")
    observations, rest = exported_columns(dataset, pixels)
    main = "" if "" in observations else "observation"
    if main not in observations:
        raise DataError(f"Data set {dataset.name!r} has no key 'observation', only {sorted(observations)}.")
    shared = observations[main][0]
    extra = {k: c for k, c in observations.items() if k != main and not (k == "achieved_goal" and c[0] is shared)}
    extra |= {k: c for k, c in rest.items() if k not in extra}
    taken = sorted({*REQUIRED, HEADER} & set(extra))
    if taken:
        raise DataError(
            f"Data set {dataset.name!r} has the key {taken[0]!r}, which OGBench files use for something else."
        )
    _check_memory(dataset, observations)
    last = dataset.actions[(dataset.starts + dataset.lengths - 1)]
    terminals = torch.zeros(len(dataset) + dataset.num_episodes, dtype=torch.bool)
    terminals[(dataset.lengths + 1).cumsum(0).cpu() - 1] = True
    header = {
        "name": dataset.name, "metadata": dataset.metadata, "observations": None if main == "" else list(observations),
    }  # fmt: skip
    arrays = {
        "observations": _joined(observations[main], dataset),
        "actions": join_episodes(dataset.actions, last, dataset).cpu().numpy(),
        "terminals": terminals.numpy(),
        **{k: _joined(c, dataset) for k, c in extra.items()},
        HEADER: np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    write_bytes(path, buffer.getbuffer())
    return path


def _joined(column: tuple[Any, Any], dataset: OfflineDataset) -> np.ndarray:
    rows, final = (_drawn(c) if isinstance(c, Rendered) else c for c in column)
    return join_episodes(rows, final, dataset).cpu().numpy()


def _drawn(column: Rendered) -> Tensor:
    """All rows of a rendered column, a few at a time."""
    rows = torch.arange(len(column), device=column.device)
    return torch.cat([column[chunk].cpu() for chunk in rows.split(CHUNK)]).to(column.device)


def _check_memory(dataset: OfflineDataset, observations: Mapping[str, tuple[Any, Any]]) -> None:
    """Pictures are drawn into memory: say so before it runs out."""
    drawn = {id(c): c for c, _ in observations.values() if isinstance(c, Rendered)}
    needed = 3 * sum(len(c) * int(np.prod(c.shape[1:])) for c in drawn.values())  # drawn, joined, and the archive
    available = _available() if needed else None
    if available is not None and needed > available:
        raise DataError(
            f"The pictures of data set {dataset.name!r} need {needed / 1e9:.0f} GB, and {available / 1e9:.0f} GB are free; "
            "export positions (without --pixels) or a smaller set."
        )


def _available() -> int | None:
    """Bytes of memory that can still be had; ``None`` where it cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
