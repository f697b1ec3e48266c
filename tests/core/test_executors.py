"""Jobs in processes: what one loses, the others keep, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import job

import clbench.executors as executors
from clbench.errors import ConfigError, Interrupted
from clbench.executors import InProcess, Processes, available_cores, available_memory, default_workers

FOREVER = """
import sys
from jobs import job
from clbench.executors import Processes
if __name__ == "__main__":
    list(Processes(2).run(job, [sys.argv[1]] * 3))
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie, which nobody has waited for yet, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_forever(folder: Path) -> tuple[subprocess.Popen, list[int]]:
    """A process with two workers that never end, and the workers' ids."""
    script = folder / "forever.py"
    script.write_text(FOREVER)
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE, text=True)
    until(lambda: len(list(folder.glob("*.started"))) == 2, "the start of two workers")
    return process, [int(p.stem) for p in folder.glob("*.started")]


@pytest.mark.parametrize("executor", [InProcess(), Processes(1), Processes(2)], ids=["here", "one", "two"])
def test_every_job_ends_once_whatever_the_others_do(executor: executors.Executor) -> None:
    ended = {f.index: f for f in executor.run(job, [2, "refuse", "raise", 5])}
    assert sorted(ended) == [0, 1, 2, 3]
    assert (ended[0].value, ended[3].value) == (4, 25) and ended[0].problem is None
    assert ended[1].problem == "This job is refused."
    assert ended[2].problem == "ZeroDivisionError: the job divides by zero"


def test_a_lost_process_takes_only_its_own_job_with_it() -> None:
    """As when the operating system kills it for want of memory."""
    ended = {f.index: f for f in Processes(2).run(job, ["killed", 3, "exit", 4])}
    assert (ended[1].value, ended[3].value) == (9, 16)
    assert "ended by SIGKILL (for want of memory?" in (ended[0].problem or "")
    assert "exit code 7" in (ended[2].problem or "")


@pytest.mark.usefixtures("toys_on_path")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks processes up in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    process, workers = start_forever(tmp_path)
    assert all(alive(pid) for pid in workers)  # so that the check below can fail
    process.kill()
    process.communicate()
    until(lambda: not any(alive(pid) for pid in workers), "the end of the workers")
    assert not list(tmp_path.glob("*.saved"))


@pytest.mark.usefixtures("toys_on_path")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_the_jobs_save_and_no_other_is_begun(tmp_path: Path, number: signal.Signals) -> None:
    process, workers = start_forever(tmp_path)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert "Interrupted" in error
    assert {int(p.stem) for p in tmp_path.glob("*.saved")} == set(workers)
    assert len(list(tmp_path.glob("*.started"))) == 2


def test_closing_the_iterator_stops_the_jobs(tmp_path: Path) -> None:
    running = Processes(2).run(job, [6, str(tmp_path), 7])
    assert {next(running).value, next(running).value} == {36, 49}
    until(lambda: bool(list(tmp_path.glob("*.started"))), "the start of the job")
    running.close()
    assert list(tmp_path.glob("*.saved"))


def test_an_interrupt_inside_a_job_here_stops_all() -> None:
    def interrupted(what: int) -> int:
        if what:
            raise KeyboardInterrupt
        return what

    running = InProcess().run(interrupted, [0, 1, 0])
    assert next(running).value == 0
    with pytest.raises(Interrupted, match="Stopped"):
        next(running)


def test_workers_within_the_limits_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "available_cores", lambda: 16)
    monkeypatch.setattr(executors, "available_memory", lambda: 10 * 2**30)
    assert default_workers(1, 2**30) == 10
    assert default_workers(4, 2**30) == 4
    assert default_workers(32, 2**40) == 1


def test_limits_of_this_machine() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert available_memory() > 0


def test_a_container_may_have_less_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"cpu.max": "250000 100000", "memory.max": "1000", "memory.current": "400"}
    monkeypatch.setattr(executors, "_lines", lambda path: [files[path.name]] if path.name in files else [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert (available_cores(), available_memory()) == (2, 600)
    files |= {"memory.stat": "inactive_file 150"}  # read from disk once, and given back when it is needed
    assert available_memory() == 750
    files |= {"cpu.max": "max 100000", "memory.max": "max"}
    assert (available_cores(), available_memory()) == (8, sys.maxsize)


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        Processes(0)
