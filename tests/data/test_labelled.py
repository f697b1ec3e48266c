"""Labelled sources: the frozen digits split, .npz files, IDX folders, and their errors."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from clbench.data.labelled import IDX_FILES, load_labelled, load_source
from clbench.errors import DataError, UnknownNameError


def test_digits_split_is_frozen_and_stratified():
    data = load_source("digits")
    assert (len(data.train), len(data.test), data.num_classes) == (1437, 360, 10)
    assert sorted(data.train.tolist() + data.test.tolist()) == list(range(1797))
    assert all(35 <= int(n) <= 37 for n in torch.bincount(data.y[data.test]))
    assert data.test[:6].tolist() == [21, 24, 28, 34, 35, 37]


def test_digits_are_scikit_learns():
    pixels, labels = load_digits(return_X_y=True)
    data = load_source("digits")
    assert torch.equal(data.x, torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 8, 8))
    assert torch.equal(data.y, torch.from_numpy(labels))


# -- files ----------------------------------------------------------------------------------------------------------------


def idx_bytes(array, magic=None):
    head = bytes([0, 0, 8, array.ndim]) if magic is None else magic
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (12, 4, 3)).astype(np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 3)).astype(np.uint8),
        "y_test": np.arange(6) % 3,
    }


@pytest.fixture
def idx_folder(tmp_path, arrays):
    for key, name in IDX_FILES.items():
        (tmp_path / name).write_bytes(idx_bytes(arrays[key]))
    return tmp_path


def check_arrays(source, arrays):
    for split in ("train", "test"):
        x, y = load_labelled(str(source), split)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        np.testing.assert_array_equal((x * 255).round().numpy(), arrays[f"x_{split}"])
        np.testing.assert_array_equal(y.numpy(), arrays[f"y_{split}"])


def test_npz_with_a_split(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    check_arrays(tmp_path / "a.npz", arrays)


def test_npz_without_a_split_tests_every_fifth_row(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(11, 4)), np.arange(11) % 2
    np.savez(tmp_path / "b.npz", x=x, y=y)
    data = load_source(str(tmp_path / "b.npz"))
    assert data.test.tolist() == [4, 9] and data.train.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    np.testing.assert_array_equal(data.x.numpy(), x.astype(np.float32))


def test_idx_folder(idx_folder, arrays):
    check_arrays(idx_folder, arrays)


def test_packed_idx_folder_with_dots(tmp_path, arrays):
    for key, name in IDX_FILES.items():
        (tmp_path / (name.replace("-idx", ".idx") + ".gz")).write_bytes(gzip.compress(idx_bytes(arrays[key])))
    check_arrays(tmp_path, arrays)


# -- errors ---------------------------------------------------------------------------------------------------------------


def test_missing_source_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError, match=r"no labelled source 'mnist'.*'digits'.*\.npz.*train-images-idx3-ubyte"):
        load_source("mnist")
    (tmp_path / "c.csv").write_text("1,2")
    with pytest.raises(DataError, match="is not a .npz file"):
        load_source(str(tmp_path / "c.csv"))


def test_unknown_split():
    with pytest.raises(UnknownNameError, match="Unknown split 'valid'"):
        load_labelled("digits", "valid")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing, expected 00000803"),
        (idx_bytes(np.zeros((12, 4, 3)), magic=b"\x00\x00\x0d\x03"), "starts with 00000d03"),
        (idx_bytes(np.zeros((12, 4, 3)))[:-1], "holds 143 bytes of data, its header promises 144"),
        (idx_bytes(np.zeros((12, 4, 3))) + b"x", "holds 145 bytes of data, its header promises 144"),
        (idx_bytes(np.zeros((11, 4, 3))), "x_train has 11 rows, y_train has 12"),
        (idx_bytes(np.zeros((12, 5, 3))), r"different shapes, \(5, 3\) and \(4, 3\)"),
        (idx_bytes(np.zeros(12)), r"x_train has shape \(12,\)"),
        (b"\x00\x00\x08\x03\x00\x00", "is not an IDX file of bytes"),
    ],
)
def test_broken_idx_files(idx_folder, content, message):
    (idx_folder / IDX_FILES["x_train"]).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_source(str(idx_folder))


def test_missing_and_cut_packed_idx_file(idx_folder, arrays):
    path = idx_folder / IDX_FILES["y_test"]
    path.unlink()
    with pytest.raises(DataError, match="has no file t10k-labels-idx1-ubyte .*put the four IDX files there"):
        load_source(str(idx_folder))
    (idx_folder / (path.name + ".gz")).write_bytes(gzip.compress(idx_bytes(arrays["y_test"]))[:-5])
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_source(str(idx_folder))


def changed(arrays, **new):
    return {**arrays, **new}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed(a, y_train=a["y_train"] - 1), "the label -1 in row 0 of y_train is out of range"),
        (lambda a: changed(a, y_test=a["y_test"] + 9_998), "the label 10000 in row 2 of y_test is out of range"),
        (lambda a: changed(a, y_train=a["y_train"] / 2), "y_train has shape .* expected whole numbers"),
        (
            lambda a: changed(a, x_test=np.full((6, 4, 3), np.nan)),
            "x_test holds NaN .* in 6 rows, first in row 0",
        ),
        (lambda a: changed(a, x_train=a["x_train"][:0], y_train=a["y_train"][:0]), "x_train has shape"),
        (lambda a: {"x_train": a["x_train"]}, r"holds the arrays \['x_train'\], expected"),
    ],
)
def test_broken_npz_arrays(tmp_path, arrays, change, message):
    np.savez(tmp_path / "d.npz", **change(arrays))
    with pytest.raises(DataError, match=message):
        load_source(str(tmp_path / "d.npz"))


def test_npz_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "e.npz", x=np.array([{}], dtype=object), y=np.zeros(1, np.int64))
    with pytest.raises(DataError, match="cannot be read as a .npz file of plain arrays"):
        load_source(str(tmp_path / "e.npz"))
    (tmp_path / "f.npz").write_bytes((tmp_path / "e.npz").read_bytes()[:50])
    with pytest.raises(DataError, match="cannot be read as a .npz file"):
        load_source(str(tmp_path / "f.npz"))


def test_damage_below_the_container_is_one_sentence(tmp_path, idx_folder):
    images = idx_folder / IDX_FILES["x_train"]
    images.rename(idx_folder / "kept")
    header = gzip.compress(b"")[:10]
    (idx_folder / f"{images.name}.gz").write_bytes(header + b"\xff" * 20)  # no valid deflate block
    with pytest.raises(DataError, match="cannot be unpacked"):
        load_source(str(idx_folder))
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros((9, 2)))
    with pytest.raises(DataError, match="holds a single array"):
        load_source(str(tmp_path / "single.npz"))


def test_a_file_too_small_to_be_split_is_refused(tmp_path):
    for rows in (4, 5):
        np.savez(tmp_path / f"{rows}.npz", x=np.zeros((rows, 2), np.float32), y=np.arange(rows) % 2)
    assert load_source(str(tmp_path / "5.npz")).test.tolist() == [4]
    with pytest.raises(DataError, match="4 rows.*at least 5"):
        load_source(str(tmp_path / "4.npz"))
