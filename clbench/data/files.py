"""Data sets in files: named by their path, or imported into the data folder under a name of their own."""

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
HDF5 = (".hdf5", ".h5")
SUFFIXES = (".npz", *HDF5)


def is_file(name: str) -> bool:
    """Whether a data-set name is that of a file or of imported data."""
    return name.startswith(PREFIX) or name.endswith(SUFFIXES)


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
