"""docs/conformance.md: its example runs, and it names every check there is."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

from clbench.testing.agents import AGENT_CHECKS, CLASS_CHECKS
from clbench.testing.envs import ENV_CHECKS
from clbench.testing.methods import CLASS_CHECKS as METHOD_CHECKS
from clbench.testing.methods import FITS, TASK_CHECKS
from clbench.testing.planners import PLANNER_CHECKS
from clbench.testing.streams import DATASET_CHECKS, SCHEDULE_CHECKS, STREAM_CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
CHECKS = [*CLASS_CHECKS, *AGENT_CHECKS, *ENV_CHECKS, *STREAM_CHECKS, *SCHEDULE_CHECKS, *DATASET_CHECKS, *PLANNER_CHECKS,
          *METHOD_CHECKS, *TASK_CHECKS]  # fmt: skip


def test_the_example_runs(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(code, "docs/conformance.md", "exec", dont_inherit=True), module.__dict__)


def test_the_page_names_exactly_the_checks_there_are():
    named = {cell for line in PAGE.splitlines() if line.startswith("| ") for cell in re.split(r" ?\| ?", line) if cell}
    names = [c.name for c in CHECKS] + ["there is a task that meets requires", FITS]
    assert len(set(names)) == len(names)
    assert set(names) <= named
