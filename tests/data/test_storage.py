"""Data sets on disk: exact round trips, and damage that is never read as data."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clbench.data.dataset import OfflineDataset, Rendered
from clbench.data.storage import load_stored_dataset, save_dataset
from clbench.envs.two_rooms_data import two_rooms
from clbench.errors import ClbenchError, DataError

DTYPES = [torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
FULL_SIZE, LIMIT = 3_700_000, 100e6  # transitions of the large Two-Rooms set, bytes on disk


def small() -> OfflineDataset:
    x, last = torch.arange(10.0).reshape(5, 2), torch.ones(2, 2)
    return OfflineDataset(
        {"observation": x, "achieved_goal": x},
        torch.tensor([1, 0, 2, 1, 0]),
        torch.tensor([3, 2]),
        {"observation": last, "achieved_goal": last},
        torch.tensor([0, 0, 0, 1, 1]),
        "small",
        {"made": {"by": "hand", "sizes": [1, 2]}},
    )


def tensors(data: OfflineDataset) -> dict[str, torch.Tensor]:
    found = {"actions": data.actions, "lengths": data.lengths}
    if data.task is not None:
        found["task"] = data.task
    for kind in ("observations", "final_observations"):
        obs = getattr(data, kind)
        for key, column in (obs if isinstance(obs, dict) else {"": obs} if obs is not None else {}).items():
            columns = column.columns if isinstance(column, Rendered) else {"": column}
            found |= {f"{kind}/{key}/{k}": v for k, v in columns.items()}
    return found


def same(a: OfflineDataset, b: OfflineDataset) -> bool:
    """Bit for bit, names and metadata included."""
    x, y = tensors(a), tensors(b)
    equal = x.keys() == y.keys() and all(
        x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].numpy().tobytes() == y[k].numpy().tobytes()
        for k in x
    )
    return equal and (a.name, a.metadata) == (b.name, b.metadata)


def contents(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {k: archive[k] for k in archive.files}


def rewrite(path: Path, **header: Any) -> None:
    """Change the header and write a file that is sound as an archive."""
    arrays = contents(path)
    changed = {**json.loads(arrays.pop("header").tobytes()), **header}
    np.savez(path, header=np.frombuffer(json.dumps(changed).encode(), dtype=np.uint8), **arrays)  # type: ignore[arg-type]


# -- round trips ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from(["tensor", "dict", "shared"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_round_trip(
    tmp_path: Path, lengths: list[int], dtype: torch.dtype, kind: str, final: bool, task: bool, seed: int
) -> None:
    rng, n = torch.Generator().manual_seed(seed), sum(lengths)

    def numbers(rows: int) -> torch.Tensor:
        return (torch.rand(rows, 3, generator=rng) * 100).to(dtype)

    def observe(rows: int) -> Any:
        x = numbers(rows)
        if kind == "tensor":
            return x
        return {"observation": x, "achieved_goal": x if kind == "shared" else numbers(rows)}

    data = OfflineDataset(
        observe(n), numbers(n), torch.tensor(lengths), observe(len(lengths)) if final else None,
        torch.arange(n) if task else None, "é/name", {"a": [1, None, "x"]},
    )  # fmt: skip
    save_dataset(data, tmp_path / "data.npz")
    again = load_stored_dataset(tmp_path / "data.npz")
    assert same(data, again)
    assert again.final.tolist() == data.final.tolist()
    if kind == "shared":
        assert again.observations["observation"] is again.observations["achieved_goal"]


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = torch.tensor([[-0.0], [1e-45], [0.1], [torch.finfo(torch.float32).max]])
    save_dataset(OfflineDataset(bits, bits.clone(), torch.tensor([4])), tmp_path / "data.npz")
    assert load_stored_dataset(tmp_path / "data.npz").actions.numpy().tobytes() == bits.numpy().tobytes()


def test_tensors_that_are_shared_are_stored_once(tmp_path: Path) -> None:
    save_dataset(small(), tmp_path / "data.npz")
    assert set(contents(tmp_path / "data.npz")) == {
        "header", "observations.observation", "final_observations.observation", "actions", "lengths", "task",
    }  # fmt: skip


def test_slices_and_views_are_stored_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    data = OfflineDataset(base[:, ::2], base.T[:4, :1], torch.tensor([4]))
    save_dataset(data, tmp_path / "data.npz")
    assert torch.equal(load_stored_dataset(tmp_path / "data.npz").observations, base[:, ::2])


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_two_rooms_round_trip_and_size(tmp_path: Path, observation: str) -> None:
    path = tmp_path / "data.npz"
    data = two_rooms(transitions=9_000, observation=observation)
    save_dataset(data, path)
    again = load_stored_dataset(path)
    assert same(data, again)
    index = torch.tensor([0, 89, 90, 8999])
    assert torch.equal(again.next_observation(index)["observation"], data.next_observation(index)["observation"])
    overhead = 20_000  # headers do not grow with the data
    assert (path.stat().st_size - overhead) / len(data) * FULL_SIZE < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_the_large_two_rooms_set_fits(tmp_path: Path, observation: str) -> None:
    save_dataset(two_rooms(transitions=FULL_SIZE, observation=observation), tmp_path / "data.npz")
    assert (tmp_path / "data.npz").stat().st_size < LIMIT
    assert len(load_stored_dataset(tmp_path / "data.npz")) == FULL_SIZE


# -- damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("stored") / "data.npz"
    save_dataset(small(), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "data.npz"


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_changed_byte_is_read_as_other_data(stored: bytes, damaged: Path, data: st.DataObject) -> None:
    """Some bytes of an archive mean nothing (dates, attributes); whatever is read must equal what was stored."""
    at = data.draw(st.integers(0, len(stored) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged.write_bytes(stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :])
    try:
        read = load_stored_dataset(damaged)
    except DataError as error:
        assert str(damaged) in str(error)
    else:
        assert same(read, small())


def test_changed_numbers_are_noticed(stored: bytes, damaged: Path) -> None:
    """Negative control of the test above: the bytes of the numbers are among those that must be noticed."""
    at = stored.index(small().actions.numpy().tobytes())
    damaged.write_bytes(stored[:at] + b"\x02" + stored[at + 1 :])
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(damaged)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_cut_file_is_refused(stored: bytes, damaged: Path, data: st.DataObject) -> None:
    damaged.write_bytes(stored[: data.draw(st.integers(0, len(stored) - 1))])
    with pytest.raises(DataError, match="corrupt or truncated"):
        load_stored_dataset(damaged)


def test_the_checksum_notices_what_the_archive_does_not(tmp_path: Path) -> None:
    """An archive that another program repacked is sound for zip; our checksums still know the numbers."""
    path = tmp_path / "data.npz"
    save_dataset(small(), path)
    arrays = contents(path)
    arrays["actions"] = arrays["actions"][::-1].copy()
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the checksum of 'actions' does not match; make or copy the file again"):
        load_stored_dataset(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"version": 2}, "has format 'clbench-dataset' version 2; this version reads 'clbench-dataset' version 1"),
        ({"format": "other"}, "has format 'other' version 1"),
        ({"layout": {}}, "has a broken header"),
        ({"layout": None}, "has a broken header"),
        ({"sha256": {"missing": "0"}}, "corrupt or truncated .*missing"),
        ({"sha256": None}, "corrupt or truncated"),
    ],
)
def test_other_headers_are_refused(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    save_dataset(small(), tmp_path / "data.npz")
    rewrite(tmp_path / "data.npz", **header)
    with pytest.raises(DataError, match=message):
        load_stored_dataset(tmp_path / "data.npz")


def test_files_name_renderers_and_bring_no_code(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    save_dataset(two_rooms(transitions=180, observation="pixels"), path)
    header = json.loads(contents(path)["header"].tobytes())
    for column in header["layout"]["observations"]["keys"].values():
        column["renderer"] = "os:system"
    rewrite(path, layout=header["layout"])
    with pytest.raises(DataError, match=r"names the unknown renderer 'os:system'; known: \['point-maze', 'two-rooms'"):
        load_stored_dataset(path)


class Bomb:
    """Runs code when it is unpickled: it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    header = {"format": "clbench-dataset", "version": 1, "sha256": {"actions": "0"}}
    trace = tmp_path / "trace"
    bomb = np.array([Bomb(trace)], dtype=object)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8), actions=bomb)
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(path)
    np.save(path.with_suffix(".npy"), bomb, allow_pickle=True)
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(path.with_suffix(".npy"))
    assert not trace.exists()
    np.load(path.with_suffix(".npy"), allow_pickle=True)
    assert trace.exists()  # negative control: the pickle would have run


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"is not a clbench data set \(no header\)"):
        load_stored_dataset(tmp_path / "other.npz")
    with pytest.raises(DataError, match="There is no data set at .*nothing.npz"):
        load_stored_dataset(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(tmp_path / "array.npy")
    with pytest.raises(DataError, match="corrupt"):
        load_stored_dataset(tmp_path)  # a folder


def test_nan_in_a_stored_file_is_refused(tmp_path: Path) -> None:
    data = small()
    data.observations["observation"][3, 0] = torch.nan
    save_dataset(data, tmp_path / "data.npz")
    with pytest.raises(DataError, match="NaN or infinite values in 1 rows, the first is row 3"):
        load_stored_dataset(tmp_path / "data.npz")


def test_dtypes_that_files_do_not_know_are_refused_before_writing(tmp_path: Path) -> None:
    data = OfflineDataset(torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(2), torch.tensor([2]), name="mine")
    with pytest.raises(
        DataError, match="observations of data set 'mine' is torch.bfloat16, which cannot be stored; cast"
    ):
        save_dataset(data, tmp_path / "data.npz")
    assert list(tmp_path.iterdir()) == []


# -- writing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "data.npz"
    save_dataset(small(), path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if step == "write":
        monkeypatch.setattr(os, "fdopen", lambda *_, **__: _Full())
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(ClbenchError, match="The disk is full: could not write .*data.npz"):
        save_dataset(two_rooms(transitions=180), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert same(load_stored_dataset(path), small())


class _Full(io.BytesIO):
    """A file on a full disk: the first bytes go through."""

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ClbenchError, match="Cannot write .*data.npz"):
        save_dataset(small(), tmp_path / "nowhere" / "data.npz")
