"""Names of plug-ins: ``name -> "module:attribute"`` with a one-line summary. Nothing is imported until it is named.

Sources, in this order: what this process registered (``@clbench.register_agent("name")``), the tables of our own packages
(``TABLE`` in ``clbench.agents`` and so on), and entry points of installed packages in the groups ``clbench.agents``,
``clbench.envs``, ``clbench.streams``, ``clbench.planners``, ``clbench.methods`` and ``clbench.datasets``. Instead of a
name, ``module:attribute`` works everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from clbench.errors import ClbenchError, ConfigError, ContractError, MissingExtraError, UnknownNameError, unknown_name

# kind -> the table of our own entries, itself "module:attribute" so that a listing imports only light modules
TABLES: dict[str, str] = {
    "agents": "clbench.agents:TABLE",
    "envs": "clbench.envs:TABLE",
    "streams": "clbench.streams:TABLE",
    "schedules": "clbench.streams:SCHEDULES",
    "planners": "clbench.planners:TABLE",
    "methods": "clbench.agents:METHODS",
    "datasets": "clbench.data:TABLE",
}
KINDS = tuple(TABLES)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered plug-in: ``target`` is ``"module:attribute"`` or the object itself."""

    name: str
    target: Any
    summary: str = ""


_LOCAL: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}


def _singular(kind: str) -> str:
    return kind.removesuffix("s")


def register(kind: str, name: str, summary: str = "") -> Callable[[Any], Any]:
    """Decorator that registers an object under ``name`` for this process.

    Raises:
        ConfigError: the name is taken by another object.
    """

    def add(target: Any) -> Any:
        old = _LOCAL[kind].get(name)
        same = old is not None and getattr(old.target, "__qualname__", None) == getattr(target, "__qualname__", None)
        if name in _own(kind) or (old is not None and not same):
            raise ConfigError(f"The {_singular(kind)} name {name!r} is already registered; choose another name.")
        doc = (inspect.getdoc(target) or "").partition("\n")[0]
        _LOCAL[kind][name] = Entry(name, target, summary or doc)
        return target

    return add


def _own(kind: str) -> Mapping[str, tuple[str, str]]:
    return load_object(TABLES[kind])


def entries(kind: str) -> dict[str, Entry]:
    """All registered entries of ``kind``, by name, without importing them."""
    if kind not in TABLES:
        raise unknown_name("kind of plug-in", kind, KINDS)
    found = {name: Entry(name, target, summary) for name, (target, summary) in _own(kind).items()}
    for point in _entry_points(importlib.metadata.entry_points, f"clbench.{kind}", tuple(sys.path)):
        package = point.dist.name if point.dist else "an installed package"
        found.setdefault(point.name, Entry(point.name, point.value, f"from {package}"))
    return found | _LOCAL[kind]


@functools.cache
def _entry_points(find: Callable[..., Any], group: str, path: tuple[str, ...]) -> Any:
    """The entry points of a group; looking through all installed packages takes 10 ms, and names are looked up often."""
    return find(group=group)


def load_object(target: str) -> Any:
    """Import ``"module:attribute"``; modules in the current folder are found too.

    Raises:
        UnknownNameError: the module or the attribute does not exist.
        MissingExtraError: the module needs a package that is not installed.
        ContractError: the module raises an exception while it is imported.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute or module_name.startswith("."):
        raise ConfigError(
            f"{target!r} is not of the form 'module:attribute'; "
            "the class MyAgent of my_agent.py in the current folder is 'my_agent:MyAgent'."
        )
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UnknownNameError(
                f"There is no module {module_name!r} (looked in {here} and the installed packages); "
                "check the spelling or run from the folder that holds the file."
            ) from error
        raise MissingExtraError(
            f"{module_name!r} needs the package {error.name!r}, which is not installed: `pip install {error.name}`."
        ) from error
    except ClbenchError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" at {frame.filename}:{frame.lineno}"
        raise ContractError(f"Importing {module_name!r} failed with {type(error).__name__}{where}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    try:
        value: Any = module
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        public = [n for n in vars(module) if not n.startswith("_")]
        where, file = f"module {module_name}", getattr(module, "__file__", None)
        if os.path.exists(os.path.join(here, f"{module_name}.py")) and (
            not file or os.path.realpath(os.path.dirname(file)) != os.path.realpath(here)
        ):
            where += f" ({file or 'part of Python'}; it hides your {module_name}.py, which needs another name)"
        raise unknown_name("attribute", attribute, public, where=where) from error
    return value


def resolve(kind: str, name: str) -> Any:
    """The object behind a registered name or a ``module:attribute`` string.

    Raises:
        UnknownNameError: with the nearest registered names.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"The {_singular(kind)} must be a name or 'module:attribute', got {name!r}.")
    if ":" in name:
        return load_object(name)
    known = entries(kind)
    if name not in known:
        error = unknown_name(_singular(kind), name, known)
        raise UnknownNameError(f"{error} Your own is 'module:name'.")
    target = known[name].target
    return load_object(target) if isinstance(target, str) else target


def register_agent(name: str, summary: str = "") -> Callable[[Any], Any]:
    """``@clbench.register_agent("name")`` on an :class:`clbench.Agent` class."""
    return register("agents", name, summary)


def register_env(name: str, summary: str = "") -> Callable[[Any], Any]:
    """Register a batched environment class (see docs/environments.md)."""
    return register("envs", name, summary)


def register_stream(name: str, summary: str = "") -> Callable[[Any], Any]:
    """Register a function that returns a :class:`clbench.streams.Suite` or a :class:`clbench.Stream`."""
    return register("streams", name, summary)


def register_dataset(name: str, summary: str = "") -> Callable[[Any], Any]:
    """Register a function that returns an :class:`clbench.OfflineDataset`."""
    return register("datasets", name, summary)


def register_planner(name: str, summary: str = "") -> Callable[[Any], Any]:
    """Register a :class:`clbench.contracts.Planner` class."""
    return register("planners", name, summary)


def register_method(name: str, summary: str = "") -> Callable[[Any], Any]:
    """Register a continual method: a subclass of :class:`clbench.Method`."""
    return register("methods", name, summary)
