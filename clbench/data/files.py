"""Data sets in files: named by their path, imported into the data folder under a name of their own, or OGBench's."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from clbench.data.cache import data_folder
from clbench.data.dataset import OfflineDataset
from clbench.data.ogbench import HEADER, read_ogbench
from clbench.data.storage import load_stored_dataset, save_dataset
from clbench.errors import ConfigError, DataError, unknown_name
from clbench.records import unwritable

PREFIX = "imported/"
OGBENCH = "ogbench/"
OGBENCH_FOLDER = "~/.ogbench/data"  # where OGBench keeps its own
OGBENCH_SOURCE = "https://rail.eecs.berkeley.edu/datasets/ogbench"
HDF5 = (".hdf5", ".h5")
SUFFIXES = (".npz", *HDF5)


def is_file(name: str) -> bool:
    """Whether a data-set name is that of a file, of imported data, or of a file of OGBench."""
    return name.startswith((PREFIX, OGBENCH)) or name.endswith(SUFFIXES)


def reader_of(name: str) -> Callable[..., OfflineDataset]:
    """The function that reads the file ``name``; its keyword arguments are the options of the id.

    Raises:
        DataError: there is no such file, or it is of no known format.
        UnknownNameError: no such imported data, with the nearest names.
    """
    if name.startswith(PREFIX):
        path = imported_path(name.removeprefix(PREFIX))
        if not path.exists():
            raise unknown_name("imported data set", name, [PREFIX + n for n in imported_names()])
        return _stored(path)
    if name.startswith(OGBENCH):
        return _ogbench(ogbench_path(name.removeprefix(OGBENCH)))
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"There is no data set at {path}.")
    if path.suffix in HDF5:
        return minari_reader(path)
    return _stored(path) if _is_ours(path) else _ogbench(path)


def imported_names() -> list[str]:
    """Names of the imported data sets, without the prefix."""
    return sorted(p.stem for p in (data_folder() / "imported").glob("*.npz"))


def imported_path(name: str) -> Path:
    """The file of the imported data set ``name``.

    Raises:
        ConfigError: the name would leave the folder.
    """
    if not re.fullmatch(r"\w[\w.=-]*", name):
        raise ConfigError(
            f"{name!r} cannot be the name of imported data; use letters, digits, '-', '_', '.' and '=', and no '/'."
        )
    return data_folder() / "imported" / f"{name}.npz"


def ogbench_path(name: str) -> Path:
    """The file of OGBench's data set ``name``, in the data folder or in OGBench's own.

    Raises:
        ConfigError: the name would leave the folder.
        DataError: it is in neither; says where to get it and where to put it.
    """
    if not re.fullmatch(r"\w[\w.=-]*", name):
        raise ConfigError(f"{name!r} is not the name of a data set of OGBench, such as 'antmaze-large-navigate-v0'.")
    folders = [data_folder() / "ogbench", Path(OGBENCH_FOLDER).expanduser()]
    for folder in folders:
        if (folder / f"{name}.npz").exists():
            return folder / f"{name}.npz"
    raise DataError(
        f"OGBench's data set {name!r} is not on this machine. Download {OGBENCH_SOURCE}/{name}.npz to {folders[0]} or "
        f"{folders[1]}."
    )


def store_imported(dataset: OfflineDataset, name: str) -> Path:
    """Keep ``dataset`` as ``imported/NAME``.

    Raises:
        ConfigError: the name is taken, not allowed, or the folder cannot be written.
    """
    path = imported_path(name)
    if path.exists():
        raise ConfigError(
            f"There is already a data set {PREFIX}{name} ({path}); choose another --name or delete that file."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    save_dataset(dataset, path)
    return path


def _is_ours(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return "header.npy" in names and f"{HEADER}.npy" not in names


def _stored(path: Path) -> Callable[..., OfflineDataset]:
    def read() -> OfflineDataset:
        return load_stored_dataset(path)

    return read


def minari_reader(source: str | Path) -> Callable[..., OfflineDataset]:
    """The function that reads a Minari data set (folder, file or id); its keyword arguments are the options."""

    def read(*, keys: tuple[str, ...] = ()) -> OfflineDataset:
        from clbench.data.minari import read_minari

        return read_minari(source, keys=keys)

    return read


def _ogbench(path: Path) -> Callable[..., OfflineDataset]:
    def read(*, achieved_goal: str = "auto", keys: tuple[str, ...] = (), split: str = "train") -> OfflineDataset:
        return read_ogbench(path, achieved_goal=achieved_goal, keys=keys, split=split)

    return read
