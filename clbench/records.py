"""What a run leaves on disk: the run directory, written so that nothing is ever lost or half-written.

Whole files (config, results, checkpoint) are written to a temporary file, synced and renamed. The two logs only grow; a
checkpoint knows how many rows belong to it, and resuming cuts the logs back to that.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.errors import ClbenchError, ConfigError, DataError
from clbench.version import __version__

EVAL_HEADER = ("phase", "visit", "step", "task", "episode", "score", "return", "length")
PROBE_HEADER = ("phase", "step", "task", "layer", "measure", "value")
CHECKPOINT_FORMAT = 1


# -- atomic files --------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically: the old content or the new one is there after any crash.

    Raises:
        ClbenchError: the folder cannot be written, or the disk is full; the old file is untouched.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves no half-written file
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically.

    Raises:
        ConfigError: NaN, infinities, or objects that JSON does not know.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Cannot write {path}: {error}. Use plain values (numbers, text, lists, dicts).") from error
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: missing or corrupt.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}. Delete the run directory and start the run again.") from error


def unwritable(path: Path, error: OSError) -> ClbenchError:
    """The error for a path that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ClbenchError(
            f"The disk is full: could not write {path}. Free some space and give the same command again; the run goes on "
            "from its last checkpoint."
        )
    return ConfigError(f"Cannot write {path}: {error.strerror or error}. Choose another folder with --out.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- hashes --------------------------------------------------------------------------------------------------------------


def content_hash(value: Any) -> str:
    """A short hash of plain values, equal for equal content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def flatten_state(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of a nested state of dicts and sequences, leaves being tensors and plain values."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from flatten_state(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from flatten_state(value, f"{prefix}[{i}]")
    else:
        yield prefix, state


def state_digest(state: Any) -> dict[str, str]:
    """A hash per leaf of a state, to find out what changed."""
    import torch

    digests = {}
    for path, leaf in flatten_state(state):
        if isinstance(leaf, torch.Tensor):
            raw = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digests[path] = hashlib.sha256(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + raw).hexdigest()
        else:
            digests[path] = repr(leaf)
    return digests


def changed_entries(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Entries that differ between two digests of :func:`state_digest`."""
    return [k for k in {**before, **after} if before.get(k) != after.get(k)]


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in a state."""
    import torch

    return sum(v.numel() * v.element_size() for _, v in flatten_state(state) if isinstance(v, torch.Tensor))


# -- where a run was made ------------------------------------------------------------------------------------------------


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions, git commit and hardware, for every result file."""
    import gymnasium
    import numpy
    import torch

    def git(*arguments: str) -> str | None:
        try:
            folder = Path(__file__).resolve().parent
            done = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
            )
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {
        "clbench": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "gymnasium": gymnasium.__version__,
        "git": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """Peak resident memory of this process (and of the GPU, added, where one is used)."""
    import resource

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


# -- the run directory ---------------------------------------------------------------------------------------------------


class GrowingCsv:
    """A CSV log that only grows and can be cut back to a number of rows."""

    def __init__(self, path: Path, header: Sequence[str]):
        self.path, self.header, self.rows = path, list(header), 0
        self._file: Any = None

    def restart(self, rows: int = 0, header: Sequence[str] | None = None) -> None:
        """Keep the first ``rows`` rows and the given columns, drop the rest."""
        self.close()
        if header is not None:
            self.header = list(header)
        kept: list[list[str]] = []
        if rows:
            try:
                with self.path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    known = reader.fieldnames or ()
                    whole = [row for row, _ in zip(reader, range(rows), strict=False) if None not in row.values()]
                    kept = [[row[h] for h in self.header] for row in whole] if set(self.header) <= set(known) else []
            except OSError as error:
                raise DataError(
                    f"Cannot read {self.path}: {error.strerror}. Start the run again with --overwrite."
                ) from error
            if len(kept) < rows:
                raise DataError(
                    f"{self.path} holds {len(kept)} rows but its checkpoint knows {rows}; the file was cut. Start the run "
                    "again with --overwrite."
                )
        self.rows = len(kept)
        self._write_all(kept)

    def _write_all(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.header)
        writer.writerows(rows)
        write_bytes(self.path, text.getvalue().encode())

    def append(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add rows; they are flushed to the operating system before this returns."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        try:
            if self._file is None:
                self._file = self.path.open("a", newline="", encoding="utf-8")
            self._file.write(text.getvalue())
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.rows += len(rows)

    def append_mapping(self, row: Mapping[str, Any]) -> None:
        """Add one row by column name; new columns are added to the file (older rows stay empty there)."""
        new = [k for k in row if k not in self.header]
        if new:
            self.close()
            with self.path.open(newline="", encoding="utf-8") as file:
                old = list(csv.reader(file))[1:]
            self.header += new
            self._write_all([r + [""] * len(new) for r in old])
        self.append([[row.get(h, "") for h in self.header]])

    def sync(self) -> None:
        """Force what was appended to the disk."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise unwritable(self.path, error) from error

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class RunDirectory:
    """The files of one run; see docs/run_directory.md."""

    def __init__(self, path: Path):
        self.path = path
        self.config, self.results, self.timing = path / "config.json", path / "results.json", path / "timing.json"
        self.stream, self.checkpoint = path / "stream.json", path / "checkpoint.pt"
        self.eval = GrowingCsv(path / "eval.csv", EVAL_HEADER)
        self.train = GrowingCsv(path / "train.csv", ("step", "phase"))
        self.probe, self.features = GrowingCsv(path / "probe.csv", PROBE_HEADER), path / "features"
        self._made = [p for p in (path, *path.parents) if not p.exists()]  # folders that a refused run takes away again
        self._lock: Any = None

    def open(self, wait: bool = False) -> None:
        """Create the folder and lock it for this process, where ``wait`` as soon as another one has left it.

        Raises:
            ConfigError: the folder cannot be written, or another process works in it.
        """
        while self._lock is None:
            self._lock = self._try_lock(wait)
        for leftover in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)

    def _try_lock(self, wait: bool) -> Any:
        """The locked file, or ``None`` if the process that had it has deleted it meanwhile."""
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = file.open("a")
        except (
            FileNotFoundError,
            FileExistsError,
        ) as error:  # the second, where it goes while mkdir looks what is there
            a_file = self.path.exists() and not self.path.is_dir()
            if wait and self.path.parent.exists() and not a_file:
                return None
            raise unwritable(self.path, error) from error
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            lock.close()
            raise ConfigError(
                f"Another process is writing to {self.path}; wait for it or choose another --out."
            ) from error
        lock.close()
        return None

    def close(self) -> None:
        """Close the logs and release the lock; a folder without a run is left without a trace."""
        for log in (self.eval, self.train, self.probe):
            log.close()
        if self._lock is not None:
            if not self.config.exists():
                (self.path / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty: it holds something else
                    for folder in self._made or [self.path]:
                        folder.rmdir()
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Delete the files of an earlier run (only those this class writes).

        The checkpoint goes first and the configuration last: at no moment could what is left be taken for another run.
        """
        events = self.path.glob("events.out.tfevents.*")
        pages = [self.path / name for name in ("rollout.png", "planning.png", "report.html")]
        logs = self.eval.path, self.train.path, self.probe.path, *self.features.glob("*.npz")
        for file in (self.checkpoint, self.results, self.timing, *logs, *pages, *events, self.stream, self.config):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or it holds something else
            self.features.rmdir()

    def status(self) -> str | None:
        """``"complete"``, ``"interrupted"``, or ``None`` for a folder without a run."""
        if not self.config.exists():
            return None
        if self.results.exists():
            return str(read_json(self.results).get("status"))
        return "interrupted"


# what reading a damaged archive raises, apart from the checks of its reader
BROKEN_ARCHIVE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def check_archive(archive: zipfile.ZipFile) -> None:
    """Refuse compression that we never write (a damaged header may name any).

    Raises:
        zipfile.BadZipFile: names the record.
    """
    for record in archive.infolist():
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"{record.filename!r} has the compression method {record.compress_type}")


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically. Tensors and plain values only (it is read back with ``weights_only=True``)."""
    import torch

    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **content}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint and verify it.

    Raises:
        DataError: truncated, corrupt, of another format, or with objects that are not data.
    """
    import pickle

    import torch

    advice = "Start the run again with --overwrite."
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive)
            bad = archive.testzip()  # CRC of every record
        if bad is not None:
            raise DataError(f"Checkpoint {path} is corrupt (record {bad}). {advice}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_ARCHIVE as error:
        raise DataError(
            f"Checkpoint {path} is corrupt or truncated ({type(error).__name__}: {error}). {advice}"
        ) from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"Checkpoint {path} holds objects that are not plain data and was not read. {advice}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"Checkpoint {path} has format {found!r}, this version reads {CHECKPOINT_FORMAT}. {advice}")
    return content
