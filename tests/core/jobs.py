"""Jobs for the tests of the executors: light, and importable by the processes that run them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

from clbench.errors import ConfigError


def job(what: Any) -> Any:
    """Does what it is told: a number is squared, a word names a mishap, a path waits for the end."""
    if isinstance(what, int):
        return what * what
    if what == "refuse":
        raise ConfigError("This job is refused.")
    if what == "raise":
        raise ZeroDivisionError("the job divides by zero")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(7)
    return wait(Path(what))


def wait(folder: Path) -> None:
    """Write who works here, then work until asked to stop, and save on the way out."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    (folder / f"{os.getpid()}.started").touch()
    stop.wait(60)
    (folder / f"{os.getpid()}.saved").touch()
