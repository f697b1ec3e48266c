"""Find out what a name or ``module:attribute`` stands for, and run the suite for that kind of plug-in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium

from clbench.agents.continual.method import Method
from clbench.contracts import Agent, Stream
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError, unknown_name
from clbench.registry import entries, load_object, resolve
from clbench.streams.core import Suite
from clbench.testing.agents import check_agent
from clbench.testing.core import Report
from clbench.testing.envs import check_env
from clbench.testing.methods import check_method
from clbench.testing.planners import check_planner
from clbench.testing.streams import check_dataset, check_schedule, check_stream

KINDS = ("agents", "envs", "streams", "schedules", "datasets", "planners", "methods")


def run_check(target: str, *, config: Mapping[str, Any] | None = None) -> Report:
    """Run the conformance suite on a plug-in.

    Args:
        target: a registered name (of any kind; ``"agents/bc"`` says which) or ``"module:attribute"``.
        config: values of the agent's or method's ``Config``, keywords of the environment, options of the stream, ...

    Raises:
        UnknownNameError: nothing of that name.
        ConfigError: a name of several kinds, or an object that is no plug-in.
    """
    kind, name = _kind(target)
    values = dict(config or {})
    if kind == "agents":
        return check_agent(resolve("agents", name), config=values)
    if kind == "methods":
        return check_method(resolve("methods", name), config=values)
    if kind == "planners":
        return check_planner(resolve("planners", name))
    checks: dict[str, Callable[..., Report]] = {
        "envs": check_env,
        "streams": check_stream,
        "schedules": check_schedule,
        "datasets": check_dataset,
    }
    return checks[kind](name, **values)


def _kind(target: str) -> tuple[str, str]:
    """(kind, name) of a target."""
    kind, _, name = target.partition("/")
    if kind in KINDS and name:
        return kind, name
    known = {k: entries(k) for k in KINDS}
    kinds = [k for k in KINDS if target.partition("?")[0] in known[k]]
    if len(kinds) > 1:
        raise ConfigError(
            f"{target!r} names {' and '.join(kinds)}; write {' or '.join(f'{k}/{target}' for k in kinds)}."
        )
    if kinds:
        return kinds[0], target
    if target in gymnasium.registry or target.startswith(("MiniGrid-", "BabyAI-")):
        return "envs", target
    if ":" not in target:
        raise unknown_name("plug-in", target, {n for k in KINDS for n in known[k]})
    return _kind_of(load_object(target.partition("?")[0]), target), target


def _kind_of(plugin: Any, target: str) -> str:
    """The kind of an object: by its base class, else by its methods, else by its arguments and what it returns."""
    if inspect.isclass(plugin):
        if issubclass(plugin, Method) or hasattr(plugin, "after_backward"):
            return "methods"
        if issubclass(plugin, Agent) or (hasattr(plugin, "act") and hasattr(plugin, "learn")):
            return "agents"
        if issubclass(plugin, gymnasium.Env) or (hasattr(plugin, "step") and hasattr(plugin, "reset")):
            return "envs"
        if hasattr(plugin, "plan"):
            return "planners"
    elif callable(plugin):
        signature = inspect.signature(plugin)
        returned = str(signature.return_annotation)
        if {"num_tasks", "budget"} <= set(signature.parameters):
            return "schedules"
        if OfflineDataset.__name__ in returned:
            return "datasets"
        if Suite.__name__ in returned or Stream.__name__ in returned or "rng" in signature.parameters:
            return "streams"
    raise ConfigError(
        f"{target!r} is {plugin!r}, which is no plug-in: give an Agent class, a Method class, an environment class, a "
        "Planner class, a function that returns a Suite, a Stream or an OfflineDataset (with that return annotation), or a "
        "schedule."
    )
