"""Run many independent jobs: in this process, or in processes of their own. A cluster engine can take the same place.

A job is a plain value (it is pickled), the function one that a module holds. Jobs leave what they make on disk, so an
executor has to bring back little: what the function returned, or that the process was lost.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clbench.errors import ClbenchError, ConfigError, Interrupted

STOP_SECONDS = 60.0  # for a job to save what it has when it is asked to stop
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Finished:
    """The end of job number ``index``: what the function returned, or what went wrong (one sentence)."""

    index: int
    value: Any = None
    problem: str | None = None


class Executor(Protocol):
    """Where jobs run."""

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Generator[Finished, None, None]:
        """``function(job)`` for every job, begun in the given order; yields as they end, in any order.

        A job that raises, or whose process is lost, gives ``problem``; the others go on. Ctrl-C, SIGTERM, or closing the
        iterator ask the running jobs to save what they have, and wait for them; no process is left behind.

        Raises:
            Interrupted: the user asked to stop.
        """
        ...


class InProcess:
    """One job after the other in this process."""

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Generator[Finished, None, None]:
        for index, job in enumerate(jobs):
            yield _call(index, function, job)


class Processes:
    """Up to ``workers`` jobs at once on this machine, each in a fresh process.

    A process per job costs a few seconds of imports and buys that no job inherits anything of another (memory, peak of
    memory, generators), and that a process which the operating system kills (for want of memory, say) takes only its own
    job with it. The processes are spawned, never forked: torch's threads and CUDA do not survive a fork. When this process
    dies, however it dies, they end.
    """

    def __init__(self, workers: int):
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, got {workers}.")
        self.workers = workers

    def run(self, function: Callable[[Any], Any], jobs: Sequence[Any]) -> Generator[Finished, None, None]:
        waiting = list(enumerate(jobs))[::-1]
        running: dict[Any, tuple[int, Any]] = {}
        with _terminate_like_interrupt():
            try:
                while waiting or running:
                    while waiting and len(running) < self.workers:
                        index, job = waiting.pop()
                        receiver, process = _start(index, function, job)
                        running[receiver] = index, process
                    for ready in multiprocessing.connection.wait(list(running)):
                        yield _collect(ready, *running.pop(ready))
            except KeyboardInterrupt as stop:
                raise Interrupted("Stopped by the user.") from stop
            finally:
                _stop([process for _, process in running.values()])


# -- the side of this process --------------------------------------------------------------------------------------------


def _start(index: int, function: Callable[[Any], Any], job: Any) -> tuple[Any, Any]:
    receiver, sender = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_work, args=(sender, index, function, job))
    # Ctrl-C of the terminal reaches the whole process group; the new process hears of it from this one alone
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sender.close()
    return receiver, process


def _collect(receiver: Any, index: int, process: Any) -> Finished:
    """What the process sent, or how it ended without a word."""
    try:
        answer = receiver.recv()
    except (EOFError, OSError):
        answer = None
    receiver.close()
    process.join()
    return answer if isinstance(answer, Finished) else Finished(index, problem=_obituary(process.exitcode))


def _obituary(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {int(s) for s in signal.Signals} else f"signal {-code}"
        why = " (for want of memory? take fewer workers)" if name == "SIGKILL" else ""
        return f"The process was ended by {name}{why}; give the same command again to go on."
    return f"The process ended with exit code {code} before the job did; its messages are on stderr."


def _stop(processes: Sequence[Any]) -> None:
    """Ask all to save and stop, wait, and kill those that do not."""
    for process in processes:
        with contextlib.suppress(OSError):
            process.terminate()
    for process in processes:
        process.join(STOP_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()


@contextlib.contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM (a cluster's, or a shutdown's) stops like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


# -- the side of the new process -----------------------------------------------------------------------------------------


def _work(sender: Any, index: int, function: Callable[[Any], Any], job: Any) -> None:
    os.setsid()  # out of the terminal's process group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = _call(index, function, job)
    except Interrupted:
        answer = Finished(index, problem="Stopped by the user.")
    sender.send(answer)
    sender.close()


def _end_with_parent() -> None:
    """At once, without saving: a new command may be waiting for the same folders, and at most what was done since the last
    checkpoint is lost."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _call(index: int, function: Callable[[Any], Any], job: Any) -> Finished:
    try:
        return Finished(index, function(job))
    except (Interrupted, KeyboardInterrupt) as stop:
        raise Interrupted("Stopped by the user.") from stop
    except ClbenchError as error:
        return Finished(index, problem=str(error))
    except Exception as error:  # noqa: BLE001 (a plug-in may raise anything; it is this job's problem alone)
        return Finished(index, problem=f"{type(error).__name__}: {error}")


# -- the machine's limits ------------------------------------------------------------------------------------------------


def default_workers(threads: int, memory: int) -> int:
    """How many processes of ``threads`` threads and ``memory`` bytes this machine takes at once, at least one."""
    return max(1, min(available_cores() // threads, available_memory() // memory))


def available_cores() -> int:
    """Cores that this process may use: its affinity mask, and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words(Path("/sys/fs/cgroup/cpu.max"))  # "200000 100000" microseconds per period, or "max 100000"
    if len(quota) == 2 and quota[0].isdigit():
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def available_memory() -> int:
    """Bytes of memory that can be had without swapping, within the container's limit.

    What the container's count of memory in use holds of files is given back when it is needed, so it is left out.
    """
    known = [int(w[1]) * 1024 for line in _lines(Path("/proc/meminfo")) if (w := line.split())[:1] == ["MemAvailable:"]]
    group = Path("/sys/fs/cgroup")
    limit, used = (_words(group / name) for name in ("memory.max", "memory.current"))
    files = [int(w[1]) for line in _lines(group / "memory.stat") if (w := line.split())[:1] == ["inactive_file"]]
    if limit and limit[0].isdigit() and used:
        known.append(int(limit[0]) - int(used[0]) + sum(files))
    return max(0, min(known, default=sys.maxsize))


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


__all__ = ["Executor", "Finished", "InProcess", "Processes", "available_cores", "available_memory", "default_workers"]
