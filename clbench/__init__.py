"""clbench: continual learning, goal-conditioned RL and latent planning in one episode/task loop.

``import clbench`` is light (no torch): the names below are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import clbench.envs  # noqa: F401 (registers clbench/... with Gymnasium: string entry points only)
from clbench.version import __version__

if TYPE_CHECKING:
    from clbench.agents.continual.method import Learner, Method
    from clbench.comparison import compare
    from clbench.contracts import (
        Agent,
        Experience,
        Metric,
        Objective,
        Phase,
        Planner,
        Spaces,
        Stream,
        Task,
        TaskInfo,
        TaskList,
        VectorEnv,
        WorldModel,
    )
    from clbench.data.dataset import OfflineDataset
    from clbench.data.registry import load_dataset
    from clbench.envs.make import make_env
    from clbench.experiments import run
    from clbench.registry import (
        register_agent,
        register_dataset,
        register_env,
        register_method,
        register_planner,
        register_stream,
    )
    from clbench.streams import make_stream

_LAZY = {
    "clbench.contracts": (
        "Agent", "Experience", "Metric", "Objective", "Phase", "Planner", "Spaces", "Stream", "Task", "TaskInfo",
        "TaskList", "VectorEnv", "WorldModel",
    ),
    "clbench.registry": (
        "register_agent", "register_dataset", "register_env", "register_method", "register_planner", "register_stream",
    ),
    "clbench.agents.continual.method": ("Learner", "Method"),
    "clbench.data.dataset": ("OfflineDataset",),
    "clbench.data.registry": ("load_dataset",),
    "clbench.envs.make": ("make_env",),
    "clbench.streams": ("make_stream",),
    "clbench.experiments": ("run",),
    "clbench.comparison": ("compare",),
}  # fmt: skip
_WHERE = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Agent", "Experience", "Learner", "Method", "Metric", "Objective", "OfflineDataset", "Phase", "Planner", "Spaces",
    "Stream", "Task", "TaskInfo", "TaskList", "VectorEnv", "WorldModel", "__version__", "compare", "load_dataset",
    "make_env", "make_stream", "register_agent", "register_dataset", "register_env", "register_method",
    "register_planner", "register_stream", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'clbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
