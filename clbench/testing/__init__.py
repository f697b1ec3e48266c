"""Conformance suites for plug-ins: one call says whether an agent, environment, stream, ... keeps its contract, and what to change.

``clbench check module:Class`` runs them from the command line; see docs/conformance.md.
"""

from __future__ import annotations

from clbench.testing.agents import check_agent
from clbench.testing.core import Report, Result

__all__ = ["Report", "Result", "check_agent"]
