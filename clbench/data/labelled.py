"""Labelled images and vectors: scikit-learn's digits, ``.npz`` files, and folders in MNIST's IDX format.

A source is one table of ``N`` examples, numbered as in the source, and two disjoint lists of row numbers: what may be
trained on and what is tested on. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import gzip
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clbench.errors import DataError, unknown_name

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")

# the four files of an IDX folder; each may also end in .gz
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}
SOURCES = (
    "'digits' (comes with scikit-learn), a .npz file (with arrays x_train, y_train, x_test, y_test, or x and y), "
    f"or a folder with the IDX files {', '.join(IDX_FILES.values())} (each may end in .gz)"
)


@dataclass(frozen=True)
class Labelled:
    """One labelled source.

    Args:
        x: examples (N, H, W) or (N, D) float32; 8-bit data are scaled to [0, 1].
        y: labels (N,) int64 in ``0 .. num_classes - 1``.
        train: row numbers of the training examples, int64.
        test: row numbers of the test examples, int64, disjoint from ``train``.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    test: Tensor

    @property
    def num_classes(self) -> int:
        return int(self.y.max()) + 1

    def rows(self, split: str) -> Tensor:
        """Row numbers of ``"train"`` or ``"test"``.

        Raises:
            UnknownNameError: another name.
        """
        if split not in SPLITS:
            raise unknown_name("split", str(split), SPLITS)
        return self.train if split == "train" else self.test


def load_labelled(source: str, split: Split) -> tuple[Tensor, Tensor]:
    """Examples (n, H, W) or (n, D) float32 and labels (n,) int64 of one split; see :func:`load_source`."""
    data = load_source(source)
    rows = data.rows(split)
    return data.x[rows], data.y[rows]


@functools.lru_cache(maxsize=4)
def load_source(source: str) -> Labelled:
    """The labelled source behind a name or path. The result is shared: do not write to its tensors.

    Args:
        source: ``"digits"`` (1797 digits of 8x8, 1437 train and 360 test, frozen split); or the path of a ``.npz`` file
            with the arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, or ``x`` and ``y`` (then every fifth row,
            number ``4, 9, 14, ...``, is a test example); or a folder with MNIST's four IDX files, packed or not. Where
            the split comes with the files, training rows are numbered before test rows.

    Raises:
        DataError: there is no such source (with what to put where), or its content is malformed.
    """
    if source == "digits":
        return _digits()
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_arrays({key: _read_idx(_idx_path(path, key)) for key in IDX_FILES}, path)
    if path.is_file() and path.suffix == ".npz":
        return _from_arrays(_read_npz(path), path)
    if path.is_file():
        raise DataError(f"{path} is not a .npz file; give {SOURCES}.")
    raise DataError(f"There is no labelled source {source!r}; give {SOURCES}.")


def _digits() -> Labelled:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    frozen = json.loads(resources.files("clbench.data").joinpath("digits_split.json").read_text())
    if len(pixels) != frozen["rows"] or int(labels @ np.arange(len(labels))) != frozen["label_checksum"]:
        raise DataError("scikit-learn's digits are not those that the frozen split was made for; install version 1.9.")
    test = torch.tensor(frozen["test"])
    is_test = torch.zeros(len(pixels), dtype=torch.bool)
    is_test[test] = True
    x = torch.from_numpy((pixels / 16.0).astype(np.float32)).reshape(-1, 8, 8)
    return Labelled(x, torch.from_numpy(labels.astype(np.int64)), (~is_test).nonzero()[:, 0], test)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):  # the name alone does not make it an archive
            raise ValueError("it holds a single array, as numpy.save writes it")
        with archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{path} cannot be read as a .npz file of plain arrays ({error}); write it with numpy.savez."
        raise DataError(message) from error


def _idx_path(folder: Path, key: str) -> Path:
    name = IDX_FILES[key]
    # some mirrors write a dot before idx
    for candidate in (name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    names = ", ".join(IDX_FILES.values())
    raise DataError(f"{folder} has no file {name} (or {name}.gz); put the four IDX files there: {names}.")


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes: big-endian magic ``0x0000080d`` (d dimensions), d sizes, then the data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}); copy the file again.") from error
    dimensions = raw[3] if len(raw) >= 4 and raw[:3] == b"\x00\x00\x08" else 0
    if dimensions not in (1, 2, 3) or len(raw) < 4 + 4 * dimensions:
        raise DataError(
            f"{path} is not an IDX file of bytes: it starts with {raw[:4].hex() or 'nothing'}, "
            "expected 00000803 (images) or 00000801 (labels)."
        )
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    content, expected = len(raw) - 4 - 4 * dimensions, int(np.prod(shape, dtype=np.int64))
    if content != expected:
        raise DataError(f"{path} holds {content} bytes of data, its header promises {expected}; copy the file again.")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _from_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> Labelled:
    if all(key in arrays for key in IDX_FILES):
        parts = [_pair(arrays, f"x_{s}", f"y_{s}", path) for s in SPLITS]
        if parts[0][0].shape[1:] != parts[1][0].shape[1:]:
            shapes = [tuple(x.shape[1:]) for x, _ in parts]
            raise DataError(f"{path}: training and test examples have different shapes, {shapes[0]} and {shapes[1]}.")
        n = len(parts[0][0])
        x, y = (torch.cat([p[i] for p in parts]) for i in range(2))
        return Labelled(x, y, torch.arange(n), torch.arange(n, len(x)))
    if "x" in arrays and "y" in arrays:
        x, y = _pair(arrays, "x", "y", path)
        if len(x) < 5:
            raise DataError(f"{path} has {len(x)} rows; every fifth is a test example, so give at least 5.")
        is_test = torch.arange(len(x)) % 5 == 4
        return Labelled(x, y, (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0])
    raise DataError(f"{path} holds the arrays {sorted(arrays)}, expected {list(IDX_FILES)}, or x and y.")


def _examples(x: np.ndarray, path: Path, key: str) -> Tensor:
    if x.ndim not in (2, 3) or x.dtype.kind not in "fiub" or x.size == 0:
        raise DataError(f"{path}: {key} has shape {x.shape} and type {x.dtype}, expected numbers (N, H, W) or (N, D).")
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    examples = x.astype(np.float32) / np.float32(scale)
    bad = ~np.isfinite(examples).reshape(len(x), -1).all(1)
    if bad.any():
        raise DataError(f"{path}: {key} holds NaN or infinite values in {bad.sum()} rows, first in row {bad.argmax()}.")
    return torch.from_numpy(examples)


def _labels(y: np.ndarray, path: Path, key: str) -> Tensor:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"{path}: {key} has shape {y.shape} and type {y.dtype}, expected whole numbers (N,).")
    if y.size and (y.min() < 0 or y.max() >= 10_000):
        bad = int(((y < 0) | (y >= 10_000)).argmax())
        raise DataError(f"{path}: the label {y[bad]} in row {bad} of {key} is out of range; number the classes from 0.")
    return torch.from_numpy(y.astype(np.int64))


def _pair(arrays: Mapping[str, np.ndarray], x_key: str, y_key: str, path: Path) -> tuple[Tensor, Tensor]:
    x, y = _examples(arrays[x_key], path, x_key), _labels(arrays[y_key], path, y_key)
    if len(x) != len(y):
        raise DataError(f"{path}: {x_key} has {len(x)} rows, {y_key} has {len(y)}.")
    return x, y
