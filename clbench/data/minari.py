"""Import and export of Minari data sets (Farama Foundation, format 0.5) with h5py and JSON; Minari itself is not needed.

A Minari data set is a folder ``ROOT/NAMESPACE/NAME-vN/data`` with ``metadata.json`` and ``main_data.hdf5``: a group per
episode of ``T`` actions, with ``T + 1`` observations. Rewards, terminations and infos are not read: episodes end where
Minari's do, and goals and rewards are relabelled when a batch is drawn.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from clbench.contracts import Spaces
from clbench.data.columns import exported_columns, make_dataset, to_tensor
from clbench.data.dataset import OfflineDataset
from clbench.errors import ClbenchError, ConfigError, DataError, unknown_name
from clbench.records import unwritable
from clbench.version import __version__

MINARI_VERSION = "0.5.0"  # the oldest version of this layout: readers refuse files that are newer than they are
MAIN_FILE, METADATA = "main_data.hdf5", "metadata.json"
ID = re.compile(r"(?:[-_\w][-_\w/]*[-_\w]+/)?[-_\w]+-v\d+")
SPACES = ("Box", "Discrete", "Dict")


def minari_root() -> Path:
    """``$MINARI_DATASETS_PATH``, else ``~/.minari/datasets``."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or "~/.minari/datasets").expanduser()


def minari_id(name: str) -> str:
    """A name that Minari allows: no dots, question marks or equal signs, and a version at the end.

    ``"two-rooms/mix-0.01-v0" -> "two-rooms/mix-0_01-v0"``, ``"two-rooms?door_y=30" -> "two-rooms_door_y_30-v0"``.
    """
    parts = [re.sub(r"[^-\w]+", "_", part).strip("_") for part in re.split("/+", name.replace("?", "_")) if part]
    text = "/".join(part for part in parts if part)
    text = text if re.search(r"-v\d+$", text) else f"{text}-v0"
    return check_minari_id(text)


def check_minari_id(text: str) -> str:
    """``text`` itself.

    Raises:
        ConfigError: not of Minari's form.
    """
    if not ID.fullmatch(text) or "//" in text:
        raise ConfigError(
            f"{text!r} is no Minari id; the form is namespace/name-v0 with letters, digits, '-' and '_' (no dots)."
        )
    return text


# -- reading -------------------------------------------------------------------------------------------------------------


def read_minari(source: str | Path, *, keys: Sequence[str] = ()) -> OfflineDataset:
    """The data set in a Minari folder, or of that id below Minari's own root.

    Box observations become a tensor, Dict observations a dict without ``desired_goal`` (goals are drawn). Numbers with a
    point become float32, whole numbers int64; JPEG images are decoded.

    Args:
        source: the folder, one of the two files in it, or an id.
        keys: of Dict observations, those to read (default: all but ``desired_goal``).

    Raises:
        UnknownNameError: a key that the observations do not have.
        DataError: missing, truncated or inconsistent files, kinds of spaces that are not known here, links out of the file.
    """
    folder = find_minari(source)
    metadata = _read_metadata(folder / METADATA)
    if metadata.get("data_format", "hdf5") != "hdf5":
        raise DataError(f"{folder} is stored as {metadata['data_format']!r}; only Minari's format 'hdf5' can be read.")
    observed, acted = _space(metadata, "observation_space", folder, keys), _space(metadata, "action_space", folder)
    if acted is not None and acted["type"] == "Dict":
        raise DataError(f"{folder} has Dict actions; only Box and Discrete actions can be read.")
    parts: dict[str, list[np.ndarray]] = {}
    actions: list[np.ndarray] = []
    try:
        with h5py.File(folder / MAIN_FILE, "r") as file:
            for name, episode in _episodes(file, folder):
                taken = _read_array(episode, "actions", f"{folder}: {name}")
                if len(taken) == 0:
                    continue  # reset without a step: there is nothing to learn from it
                actions.append(taken)
                jpeg = bool(metadata.get("jpeg_encoding", True))
                for key, array in _read_observations(episode, observed, keys, jpeg, f"{folder}: {name}"):
                    if len(array) != len(taken) + 1:
                        raise DataError(
                            f"{folder}: {name} has {len(array)} observations{f' {key!r}' if key else ''} for {len(taken)} "
                            f"actions, expected {len(taken) + 1}; the file was not written by Minari or is damaged."
                        )
                    parts.setdefault(key, []).append(array)
    except ClbenchError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, MemoryError) as error:
        raise DataError(
            f"{folder / MAIN_FILE} is corrupt or truncated ({error}); download or copy it again."
        ) from error
    if not actions:
        raise DataError(f"{folder} has no episode with an action.")
    return _assemble(parts, actions, metadata, folder)


def find_minari(source: str | Path) -> Path:
    """The folder that holds ``metadata.json`` and ``main_data.hdf5``.

    Raises:
        DataError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        path = path.parent
    local = [path, path / "data"] if not ID.fullmatch(str(source)) or path.is_dir() else []
    stored = [minari_root() / str(source) / "data"] if ID.fullmatch(str(source)) else []
    for folder in (*local, *stored):
        if (folder / METADATA).is_file() and (folder / MAIN_FILE).is_file():
            return folder
    for folder in (*local, *stored):
        if (folder / METADATA).is_file():
            kind = _read_metadata(folder / METADATA).get("data_format")
            raise DataError(f"{folder} has no {MAIN_FILE} (its format is {kind!r}); only Minari's 'hdf5' can be read.")
    raise DataError(
        f"There is no Minari data set {str(source)!r} (a folder with data/{METADATA} and data/{MAIN_FILE}, or an id below "
        f"{minari_root()}); download it with Minari first."
    )


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}); download or copy the data set again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no JSON object; download or copy the data set again.")
    return found


def _space(metadata: Mapping[str, Any], key: str, folder: Path, chosen: Sequence[str] = ()) -> dict[str, Any] | None:
    """The description of a space, of which the ``chosen`` keys are checked; ``None`` if the environment is to know it."""
    text = metadata.get(key)
    if text is None:
        return None
    try:
        space = json.loads(text)
        parts = space["subspaces"] if space["type"] == "Dict" else {}
        inner = {k: s["type"] for k, s in parts.items() if (k in chosen if chosen else k != "desired_goal")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder / METADATA}: {key} is no description of a space ({error!r}).") from error
    if space["type"] not in SPACES:
        raise DataError(f"{folder} has the {key} {space['type']}; only Box, Discrete and a Dict of those can be read.")
    for k, kind in inner.items():
        if kind not in ("Box", "Discrete"):
            raise DataError(
                f"{folder} has {kind} at the key {k!r} of its {key}; only Box and Discrete can be read, so choose keys "
                "without it, as '?keys=observation'."
            )
    return space


def _episodes(file: h5py.File, folder: Path) -> Iterator[tuple[str, h5py.Group]]:
    """Episodes in the order of their numbers (HDF5 lists episode_10 before episode_2)."""
    numbers = sorted(int(m[1]) for m in (re.fullmatch(r"episode_(\d+)", str(name)) for name in file) if m)
    for number in numbers:
        name = f"episode_{number}"
        node = _node(file, name, str(folder))
        if not isinstance(node, h5py.Group):
            raise DataError(f"{folder}: {name} is no group; the file was not written by Minari or is damaged.")
        yield name, node


def _node(group: h5py.Group, name: str, where: str) -> Any:
    """A member of a group that lies in the file itself: links can lead to any file of this machine."""
    link = group.get(name, getlink=True)
    if link is None:
        raise DataError(f"{where} has no {name!r}; the file was not written by Minari or is damaged.")
    if not isinstance(link, h5py.HardLink):
        raise DataError(
            f"{where}: {name!r} is a link to elsewhere, which is not followed; get the file from its source."
        )
    node = group[name]
    if isinstance(node, h5py.Dataset) and (node.external or node.is_virtual):
        raise DataError(f"{where}: {name!r} keeps its numbers in another file, which is not read.")
    return node


def _read_array(group: h5py.Group, name: str, where: str) -> np.ndarray:
    node = _node(group, name, where)
    if not isinstance(node, h5py.Dataset) or node.ndim == 0:
        raise DataError(f"{where}: {name!r} is no array; only Box, Discrete and a Dict of those can be read.")
    if node.size and not node.id.get_storage_size():
        raise DataError(f"{where}: {name!r} promises {node.shape} numbers but holds none; the file is damaged.")
    return node[()]


def _read_observations(
    episode: h5py.Group, space: Mapping[str, Any] | None, keys: Sequence[str], jpeg: bool, where: str
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, array) of the columns; the key is empty for Box observations."""
    node = _node(episode, "observations", where)
    for key in keys:
        if not isinstance(node, h5py.Group) or key not in node:
            raise unknown_name("observation key", key, node if isinstance(node, h5py.Group) else (), where=where)
    if not isinstance(node, h5py.Group):
        yield "", _decoded(_read_array(episode, "observations", where), space, jpeg, where)
        return
    subspaces = {} if space is None else space.get("subspaces", {})
    for key in map(str, node):
        if key in keys if keys else key != "desired_goal":
            yield key, _decoded(_read_array(node, key, f"{where} observations"), subspaces.get(key), jpeg, where)


def _decoded(array: np.ndarray, space: Mapping[str, Any] | None, jpeg: bool, where: str) -> np.ndarray:
    """Images that Minari stored as JPEG become arrays (B, H, W[, C]) of uint8."""
    if not (jpeg and space is not None and _is_image(space)) or list(array.shape[1:]) == space["shape"]:
        return array
    from PIL import Image

    try:
        return np.stack([np.asarray(Image.open(io.BytesIO(np.asarray(frame, np.uint8).tobytes()))) for frame in array])
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{where} has an image that is no JPEG ({error}); download or copy it again.") from error


def _is_image(space: Mapping[str, Any]) -> bool:
    """Minari's own rule for what it stores as JPEG."""
    shape = space.get("shape", ())
    return (
        space["type"] == "Box" and space.get("dtype") == "uint8" and len(shape) in (2, 3) and min(shape[:2]) >= 32
        and bool(np.all(np.asarray(space["low"]) == 0)) and bool(np.all(np.asarray(space["high"]) == 255))
    )  # fmt: skip


def _assemble(
    parts: Mapping[str, list[np.ndarray]], actions: list[np.ndarray], metadata: Mapping[str, Any], folder: Path
) -> OfflineDataset:
    lengths = torch.tensor([len(a) for a in actions])

    def join(arrays: list[np.ndarray], where: str) -> Tensor:
        kinds = {(a.shape[1:], a.dtype.str) for a in arrays}
        if len(arrays) != len(actions) or len(kinds) > 1:
            raise DataError(f"{folder}: {where} are not of one kind in all episodes ({sorted(map(str, kinds))}).")
        return to_tensor(np.concatenate(arrays), f"{folder}: {where}")

    columns = {key: join(arrays, f"observations {key!r}") for key, arrays in parts.items()}
    if not columns:
        raise DataError(f"{folder} has no observations besides desired_goal.")
    name = str(metadata.get("dataset_id", folder))
    kept = ("dataset_id", "minari_version", "description", "author", "code_permalink", "algorithm_name", "clbench")
    origin = {"source": "minari", **{k: metadata[k] for k in kept if k in metadata}}
    taken = join(actions, "actions")
    return make_dataset(columns[""] if list(columns) == [""] else columns, taken, lengths, name, origin)


# -- writing -------------------------------------------------------------------------------------------------------------


def write_minari(
    dataset: OfflineDataset,
    root: str | Path,
    name: str,
    *,
    pixels: bool = False,
    spaces: Spaces | None = None,
    description: str = "",
) -> Path:
    """Write ``ROOT/NAME``, which Minari loads as ``name`` if ``root`` is its root.

    Rewards are zero, no step is a termination, the last of each episode is a truncation: what the goal is, is decided when
    a batch is drawn. Pictures are stored raw. What pictures are drawn from, besides the position, goes to ``infos``.

    Args:
        dataset: with the observation after the last action of each episode.
        root: folder of Minari data sets.
        name: a Minari id (:func:`minari_id`).
        pixels: draw rendered observations; else the positions they are drawn from are written.
        spaces: of the environment; where they fit the data they are written instead of unbounded ones.
        description: one line for Minari's listing.

    Returns:
        The folder of the data set.

    Raises:
        ConfigError: the id is not of Minari's form or exists already, or ``root`` cannot be written.
        DataError: the data set has no final observations.
    """
    check_minari_id(name)
    root = Path(root)
    target = root / name
    if target.exists():
        raise ConfigError(f"{target} exists and is not overwritten; choose another --name (the next version, say).")
    observations, rest = exported_columns(dataset, pixels)
    header = {
        "total_episodes": dataset.num_episodes,
        "total_steps": len(dataset),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(_describe_observations(observations, spaces)),
        "action_space": json.dumps(_describe(dataset.actions, None if spaces is None else spaces.action)),
        "dataset_id": name,
        "minari_version": MINARI_VERSION,
        "description": description,
        "clbench": {"name": dataset.name, "version": __version__, "metadata": dataset.metadata},
    }
    folder = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".clbench-", dir=root))
        (folder / "data").mkdir()
        _write_episodes(folder / "data" / MAIN_FILE, dataset, observations, rest)
        header["dataset_size"] = round((folder / "data" / MAIN_FILE).stat().st_size / 1e6, 1)
        (folder / "data" / METADATA).write_text(json.dumps(header))
        folder.chmod(0o755)
        _make_namespaces(root, name)
        os.rename(folder, target)  # whole or not at all; fails if another process was faster
        folder = None
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _make_namespaces(root: Path, name: str) -> None:
    parts = name.split("/")[:-1]
    for i in range(len(parts)):
        folder = root.joinpath(*parts[: i + 1])
        folder.mkdir(exist_ok=True)
        if not (folder / "namespace_metadata.json").exists():
            (folder / "namespace_metadata.json").write_text("{}")


def _write_episodes(
    path: Path,
    dataset: OfflineDataset,
    observations: Mapping[str, tuple[Any, Any]],
    rest: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    starts, lengths = dataset.starts.tolist(), dataset.lengths.tolist()
    actions = dataset.actions.cpu().numpy()

    def rows(column: tuple[Any, Any], e: int) -> np.ndarray:
        inside, final = column
        span = slice(starts[e], starts[e] + lengths[e])
        return torch.cat([inside[span], final[e : e + 1]]).cpu().numpy()

    with h5py.File(path, "w", libver=("v110", "v110"), track_order=True) as file:
        for e, length in enumerate(lengths):
            episode = file.create_group(f"episode_{e}")
            episode.attrs["id"], episode.attrs["total_steps"] = e, length
            drawn: dict[int, np.ndarray] = {}  # keys that share a column are drawn once
            for key, column in observations.items():
                if id(column[0]) not in drawn:
                    drawn[id(column[0])] = rows(column, e)
                episode[f"observations/{key}" if key else "observations"] = drawn[id(column[0])]
            episode["actions"] = actions[starts[e] : starts[e] + length]
            episode["rewards"] = np.zeros(length)
            episode["terminations"] = np.zeros(length, bool)
            episode["truncations"] = np.arange(length) == length - 1
            infos = episode.create_group("infos")
            for key, column in rest.items():
                infos[key] = rows(column, e)


def _describe_observations(observations: Mapping[str, tuple[Any, Any]], spaces: Spaces | None) -> dict[str, Any]:
    known: Any = None if spaces is None else spaces.observation
    if list(observations) == [""]:
        return _describe(observations[""][0], known)
    subspaces = getattr(known, "spaces", {})
    return {"type": "Dict", "subspaces": {k: _describe(c[0], subspaces.get(k)) for k, c in observations.items()}}


def _describe(column: Any, known: Any = None) -> dict[str, Any]:
    """Minari's JSON of the space ``known`` if the column is in it, else of a space that its kind of numbers suggests."""
    shape, dtype = list(column.shape[1:]), str(column.dtype).removeprefix("torch.")
    if dtype == "int64" and not shape:
        first, last = min(0, int(column.min())), int(column.max())
        if hasattr(known, "n") and known.start <= first and last < known.start + known.n:
            first, last = int(known.start), int(known.start + known.n) - 1
        return {"type": "Discrete", "dtype": "int64", "start": first, "n": last - first + 1}
    if list(getattr(known, "shape", None) or ()) == shape and str(getattr(known, "dtype", "")) == dtype:
        low, high = known.low.tolist(), known.high.tolist()
    else:
        bounds = {"uint8": (0, 255), "int64": (int(np.iinfo("int64").min), int(np.iinfo("int64").max))}
        limits = bounds.get(dtype, (-np.inf, np.inf))
        low, high = (np.full(shape, limit).tolist() for limit in limits)
    return {"type": "Box", "dtype": dtype, "shape": shape, "low": low, "high": high}
