"""Conformance suites for plug-ins: one call says whether an agent, an environment, a stream, ... keeps its contract.

Each failure comes with a sentence that says what to change. ``clbench check module:Class`` runs them from the command line;
see docs/conformance.md.
"""

from __future__ import annotations

from clbench.testing.agents import check_agent
from clbench.testing.core import Report, Result
from clbench.testing.envs import check_env
from clbench.testing.methods import check_method
from clbench.testing.planners import check_planner
from clbench.testing.streams import check_dataset, check_schedule, check_stream
from clbench.testing.target import run_check

__all__ = [
    "Report",
    "Result",
    "check_agent",
    "check_dataset",
    "check_env",
    "check_method",
    "check_planner",
    "check_schedule",
    "check_stream",
    "run_check",
]
