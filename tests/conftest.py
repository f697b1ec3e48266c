"""Shared by all tests: one torch thread per worker, and the toy plug-ins importable by name."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CLBENCH_DATA"] = tempfile.mkdtemp(prefix="clbench-data-")  # nobody's own cache
atexit.register(shutil.rmtree, os.environ["CLBENCH_DATA"], ignore_errors=True)
TOYS = Path(__file__).parent / "core"
sys.path.insert(0, str(TOYS))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two workers share two cores; more threads than that only get in each other's way."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture
def toys_on_path(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Child processes find ``toys`` too."""
    old = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{TOYS}{os.pathsep}{old}" if old else str(TOYS))
    return TOYS
