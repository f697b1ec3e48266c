"""What a run leaves on disk: nothing is lost or half-written, whatever fails and whenever."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clbench.errors import ClbenchError, ConfigError, DataError
from clbench.records import (
    GrowingCsv,
    RunDirectory,
    content_hash,
    flatten_state,
    load_checkpoint,
    provenance,
    read_json,
    save_checkpoint,
    state_bytes,
    state_digest,
    write_bytes,
    write_json,
)

# -- whole files ---------------------------------------------------------------------------------------------------------


class FullDisk:
    """A file that takes half of what is written."""

    def __init__(self, file: Any):
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")


def break_step(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if step == "write":
        real = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *a, **k: FullDisk(real(*a, **k)))
    else:
        monkeypatch.setattr(os, step, fail)


@pytest.mark.parametrize("step", ["write", "fsync", "chmod", "replace"])
def test_a_failure_at_any_step_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    break_step(monkeypatch, step, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ClbenchError, match="The disk is full: could not write .*file. Free some space"):
        write_bytes(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644


def test_writing_in_place_would_lose_the_old_file(tmp_path: Path) -> None:
    """Negative control: the same full disk with a plain write."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        FullDisk(path.open("wb")).write(b"new and longer")
    assert path.read_bytes() != b"old"


def test_the_folder_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_replace, real_fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("replace"), real_replace(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), real_fsync(fd))[1])
    write_bytes(tmp_path / "file", b"x")
    assert done == ["fsync", "replace", "fsync"]


def test_other_failures_name_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="Cannot write .*nowhere/file: No such file or directory. Choose another folder"
    ):
        write_bytes(tmp_path / "nowhere" / "file", b"x")
    break_step(monkeypatch, "fsync", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ConfigError, match="Cannot write .*file: Input/output error"):
        write_bytes(tmp_path / "file", b"x")


def test_json_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, None, 0.1]})
    assert read_json(tmp_path / "a.json") == {"x": [1, None, 0.1]}
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"x": [1, None, 0.1]}
    (tmp_path / "a.json").write_text('{"x": [1')
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        with pytest.raises(DataError, match="Cannot read .*json: .*Delete the run directory and start the run again"):
            read_json(path)


# -- states --------------------------------------------------------------------------------------------------------------


def test_states_are_flattened_with_paths() -> None:
    state = {"a": {"b": [1, (2, 3)]}, "c": torch.zeros(2), 4: None, "empty": {}}
    flat = dict(flatten_state(state))
    assert [*flat] == ["a.b[0]", "a.b[1][0]", "a.b[1][1]", "c", "4"]
    assert flat["c"] is state["c"]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda s: s["w"].__setitem__((0, 0), 1e-45), "w"),
        (lambda s: s.__setitem__("w", s["w"].double()), "w"),
        (lambda s: s.__setitem__("w", s["w"].reshape(3, 2)), "w"),
        (lambda s: s["n"].__setitem__(0, 1), "n[0]"),
        (lambda s: s.__setitem__("e", torch.zeros(1, 0)), "e"),
    ],
)
def test_a_digest_sees_every_change(change: Any, path: str) -> None:
    def state() -> dict[str, Any]:
        return {"w": torch.zeros(2, 3), "n": [0, "x"], "e": torch.zeros(0, 1), "b": torch.ones(2, dtype=torch.bool)}

    before, changed = state_digest(state()), state()
    assert state_digest(changed) == before
    change(changed)
    after = state_digest(changed)
    assert [k for k in before if before[k] != after.get(k)] == [path]


def test_a_digest_takes_every_kind_of_tensor() -> None:
    kinds = [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
    state = [torch.ones(2, 2).to(k) for k in kinds] + [
        torch.tensor(3.0),
        torch.ones(2, 3).T,
        torch.ones(1, 2).expand(3, 2),
    ]
    digest = state_digest(state)
    assert len(set(digest.values())) == len(state) - 1  # the last two hold the same numbers
    assert digest["[6]"] == digest["[7]"]
    assert digest["[6]"] == state_digest([torch.ones(3, 2)])["[0]"]  # content, not memory layout


def test_bytes_of_a_state() -> None:
    assert state_bytes({"a": torch.zeros(3, 2), "b": [torch.zeros(5, dtype=torch.uint8)], "c": 7}) == 3 * 2 * 4 + 5
    assert state_bytes({}) == 0


def test_content_hash_ignores_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})


def test_provenance_can_be_stored() -> None:
    assert json.loads(json.dumps(provenance())) == provenance()
    assert {"clbench", "python", "torch", "git", "dirty", "cpu"} <= provenance().keys()


# -- growing logs --------------------------------------------------------------------------------------------------------


def log(tmp_path: Path, rows: int = 3) -> GrowingCsv:
    made = GrowingCsv(tmp_path / "log.csv", ("step", "name"))
    made.restart()
    made.append([(i, f'task "{i}", x') for i in range(rows)])
    return made


def lines(made: GrowingCsv) -> list[str]:
    return made.path.read_text().splitlines()


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    made = log(tmp_path)
    assert lines(made) == ["step,name"] + [f'{i},"task ""{i}"", x"' for i in range(3)]
    assert made.rows == 3
    made.sync()
    made.close()


@given(rows=st.integers(0, 6), keep=st.integers(0, 6), torn=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_restart_cuts_back_to_what_the_checkpoint_knows(tmp_path: Path, rows: int, keep: int, torn: bool) -> None:
    made = log(tmp_path, rows)
    whole = lines(made)
    made.close()
    if torn:  # the process was killed in the middle of a row
        made.path.write_text(made.path.read_text() + "99")
    again = GrowingCsv(made.path, ("step", "name"))
    if keep > rows:
        with pytest.raises(DataError, match=f"but its checkpoint knows {keep}; the file was cut"):
            again.restart(keep)
        return
    again.restart(keep)
    assert again.rows == keep and lines(again) == whole[: keep + 1]
    again.append([(7, "new")])
    assert lines(again) == [*whole[: keep + 1], "7,new"]
    again.close()


def test_new_columns_leave_older_rows_empty_there(tmp_path: Path) -> None:
    made = log(tmp_path, 1)
    made.append_mapping({"step": 1, "loss": 0.5})
    made.append_mapping({"name": "b", "step": 2})
    assert lines(made) == ["step,name,loss", '0,"task ""0"", x",', "1,,0.5", "2,b,"]
    made.close()
    again = GrowingCsv(made.path, ("step", "name"))
    again.restart(1, header=("step", "name"))  # a checkpoint from before the column
    assert lines(again) == ["step,name", '0,"task ""0"", x"']
    again.close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 rows but its checkpoint knows 2"),
        ("step,name\n0,a\n", "holds 1 rows"),
        ("step,name\n0,a\n1", "holds 1 rows"),  # cut within a row
        ("other,columns\n0,a\n1,b\n", "holds 0 rows"),
    ],
)
def test_logs_that_were_cut_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        GrowingCsv(path, ("step", "name")).restart(2)
    path.unlink()
    with pytest.raises(DataError, match="Cannot read .*log.csv: No such file or directory. Start the run again"):
        GrowingCsv(path, ("step", "name")).restart(2)


# -- the run directory ---------------------------------------------------------------------------------------------------

OTHER = """
import sys
from pathlib import Path
from clbench.records import RunDirectory
RunDirectory(Path(sys.argv[1])).open()
"""


def test_two_processes_never_write_to_one_folder(tmp_path: Path) -> None:
    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", OTHER, str(tmp_path / "run")], text=True, capture_output=True)

    directory = RunDirectory(tmp_path / "run")
    directory.open()
    done = other()
    assert done.returncode == 1 and "ConfigError: Another process is writing to" in done.stderr
    directory.close()
    assert other().returncode == 0  # negative control: the lock was what refused


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.abc.tmp").write_bytes(b"half")
    (tmp_path / "mine.tmp").write_bytes(b"the user's")
    directory = RunDirectory(tmp_path)
    directory.open()
    assert not (tmp_path / ".checkpoint.pt.abc.tmp").exists() and (tmp_path / "mine.tmp").exists()
    directory.close()


def test_a_folder_without_a_run_leaves_no_trace(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    assert directory.status() is None
    directory.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("the user's")
    directory.open()
    directory.close()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_clear_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.open()
    write_json(directory.config, {})
    assert directory.status() == "interrupted"
    write_json(directory.results, {"status": "complete"})
    assert directory.status() == "complete"
    for name in ("eval.csv", "train.csv", "checkpoint.pt", "events.out.tfevents.1", "mine.txt"):
        (tmp_path / name).write_text("x")
    directory.clear()
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "mine.txt"}
    directory.close()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="Cannot write .*run: .*Choose another folder with --out"):
        RunDirectory(tmp_path / "run").open()


# -- checkpoints ---------------------------------------------------------------------------------------------------------

CONTENT = {"agent": {"w": torch.arange(6.0), "n": 3}, "loop": [1, "x", None]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("stored") / "checkpoint.pt"
    save_checkpoint(path, CONTENT)
    return path.read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "checkpoint.pt"


def test_checkpoints_come_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", CONTENT)
    assert state_digest(load_checkpoint(tmp_path / "c.pt")) == state_digest({"format": 1, **CONTENT})


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_changed_byte_is_read_as_another_state(stored: bytes, damaged: Path, data: st.DataObject) -> None:
    at, flip = data.draw(st.integers(0, len(stored) - 1)), data.draw(st.integers(1, 255))
    damaged.write_bytes(stored[:at] + bytes([stored[at] ^ flip]) + stored[at + 1 :])
    try:
        read = load_checkpoint(damaged)
    except DataError as error:
        assert str(damaged) in str(error) and "--overwrite" in str(error)
    else:
        assert state_digest(read) == state_digest({"format": 1, **CONTENT})


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_cut_checkpoint_is_refused(stored: bytes, damaged: Path, data: st.DataObject) -> None:
    damaged.write_bytes(stored[: data.draw(st.integers(0, len(stored) - 1))])
    with pytest.raises(DataError, match="is corrupt or truncated .*Start the run again with --overwrite"):
        load_checkpoint(damaged)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    with pytest.raises(DataError, match="corrupt or truncated .FileNotFoundError"):
        load_checkpoint(path)
    for content, found in (({"format": 99}, "99"), ({}, "None"), ([1], "'list'")):
        torch.save(content, path)
        with pytest.raises(DataError, match=f"has format {found}, this version reads 1"):
            load_checkpoint(path)
    torch.save({"format": 1, "agent": ValueError("x")}, path)
    with pytest.raises(DataError, match="holds objects that are not plain data and was not read"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"format": 1}))
    with pytest.raises(DataError, match="corrupt or truncated"):
        load_checkpoint(path)
