"""Names of plug-ins: where they come from, and what a wrong one is told."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clbench.registry as registry
from clbench.errors import ConfigError, ContractError, MissingExtraError, UnknownNameError
from clbench.registry import KINDS, Entry, entries, load_object, register, resolve

ENTRIES = [(kind, name) for kind in KINDS for name in entries(kind)]


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing registered by this process, and nothing remains registered."""
    monkeypatch.setattr(registry, "_LOCAL", {kind: {} for kind in KINDS})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder of a user; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(("kind", "name"), ENTRIES, ids=[f"{k}:{n}" for k, n in ENTRIES])
def test_every_registered_name_can_be_imported(kind: str, name: str) -> None:
    assert resolve(kind, name) is not None
    assert entries(kind)[name].summary


def test_tables_exist_for_every_kind() -> None:
    assert {kind for kind, _ in ENTRIES} >= {"agents", "envs", "streams", "schedules", "datasets"}
    for kind in KINDS:
        assert isinstance(entries(kind), dict)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("agents", "bcc", "Unknown agent 'bcc'. Did you mean 'bc'"),
        ("streams", "digits-permutd", "Unknown stream 'digits-permutd'. Did you mean 'digits-permuted'"),
        ("schedules", "powerlaw", "Did you mean 'power-law'"),
        ("envs", "clbench/TwoRoom-v0", "Did you mean 'clbench/TwoRooms-v0'"),
        ("datasets", "zzz", "Unknown dataset 'zzz'. Known: bit-flip, classify, ogbench-maze"),
        ("agents", "", "The agent must be a name or 'module:attribute', got ''"),
        ("agents", None, "got None"),
        ("agnets", "bc", "Unknown kind of plug-in 'agnets'. Did you mean 'agents'"),
    ],
)
def test_unknown_names_get_the_nearest(kind: str, name: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(kind, name)


# -- module:attribute ----------------------------------------------------------------------------------------------------


def test_modules_of_the_current_folder_are_found(folder: Path) -> None:
    (folder / "users_own.py").write_text("class Outer:\n    class Agent:\n        pass\n")
    before = list(sys.path)
    assert resolve("agents", "users_own:Outer.Agent").__name__ == "Agent"
    assert sys.path == before


def test_a_package_of_the_current_folder_is_found(folder: Path) -> None:
    (folder / "users_package").mkdir()
    (folder / "users_package" / "__init__.py").write_text("")
    (folder / "users_package" / "model.py").write_text("from users_package import __name__ as package\nAgent = package")
    assert load_object("users_package.model:Agent") == "users_package"


@pytest.mark.parametrize(
    ("target", "kind", "message"),
    [
        ("users_own:Agnet", UnknownNameError, "Unknown attribute 'Agnet' in module users_own. Did you mean 'Agent'"),
        ("users_own:Agent.inner", UnknownNameError, "Unknown attribute 'Agent.inner' in module users_own"),
        ("users_onw:Agent", UnknownNameError, "There is no module 'users_onw' .looked in .*check the spelling"),
        ("users_own.py:Agent", UnknownNameError, "There is no module 'users_own.py'"),
        ("clbench.nothing:Agent", UnknownNameError, "There is no module 'clbench.nothing'"),
        (
            "needy:Agent",
            MissingExtraError,
            "'needy' needs the package 'no_such_package'.*`pip install no_such_package`",
        ),
        ("users_own:", ConfigError, "'users_own:' is not of the form 'module:attribute'"),
        (":Agent", ConfigError, "is not of the form"),
        ("./users_own:Agent", ConfigError, "'./users_own:Agent' is not of the form 'module:attribute'"),
        ("..users_own:Agent", ConfigError, "is not of the form"),
    ],
)
def test_wrong_targets_are_explained(folder: Path, target: str, kind: type, message: str) -> None:
    (folder / "users_own.py").write_text("class Agent:\n    pass\n")
    (folder / "needy.py").write_text("import no_such_package\n\n\nclass Agent:\n    pass\n")
    before = list(sys.path)
    with pytest.raises(kind, match=message):
        resolve("agents", target)
    assert sys.path == before


def test_a_missing_extra_keeps_its_own_sentence(folder: Path) -> None:
    (folder / "extra_needed.py").write_text(
        "from clbench.errors import missing_extra\nraise missing_extra('mujoco', 'mujoco', 'PointMaze')\n"
    )
    with pytest.raises(
        MissingExtraError, match=r"^PointMaze needs the package 'mujoco': install it with `pip install "
    ):
        load_object("extra_needed:Env")


def test_errors_inside_a_plug_in_are_not_hidden(folder: Path) -> None:
    (folder / "broken_plugin.py").write_text("1 / 0\n")
    with pytest.raises(
        ContractError, match=r"Importing 'broken_plugin' failed with ZeroDivisionError at .*plugin.py:1"
    ):
        load_object("broken_plugin:Agent")
    (folder / "unreadable_plugin.py").write_text("def learn(:\n")
    with pytest.raises(
        ContractError, match=r"failed with SyntaxError: invalid syntax \(unreadable_plugin.py, line 1\)"
    ):
        load_object("unreadable_plugin:Agent")


# -- registration --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty")
def test_registered_objects_are_found_with_the_first_line_of_their_docstring() -> None:
    @register("agents", "mine")
    class Mine:
        """An agent of mine.

        More about it.
        """

    assert resolve("agents", "mine") is Mine
    assert entries("agents")["mine"] == Entry("mine", Mine, "An agent of mine.")


@pytest.mark.usefixtures("empty")
def test_a_name_belongs_to_one_object() -> None:
    def first() -> None: ...

    def second() -> None: ...

    register("streams", "mine")(first)
    register("streams", "mine")(first)  # a module that is imported twice, as notebooks do
    with pytest.raises(ConfigError, match="The stream name 'mine' is already registered; choose another name"):
        register("streams", "mine")(second)
    with pytest.raises(ConfigError, match="The agent name 'bc' is already registered"):
        register("agents", "bc")(first)
    assert resolve("streams", "mine") is first
    register("agents", "mine")(second)  # other kinds have names of their own


def test_public_decorators_register_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_LOCAL", {kind: {} for kind in KINDS})
    for kind in ("agent", "env", "stream", "dataset", "planner"):
        marker = types.SimpleNamespace(__qualname__=kind)
        getattr(registry, f"register_{kind}")("mine", "a summary")(marker)
        assert resolve(f"{kind}s", "mine") is marker
        assert entries(f"{kind}s")["mine"].summary == "a summary"


def test_entry_points_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        importlib.metadata.EntryPoint("theirs", "collections:OrderedDict", "clbench.agents"),
        importlib.metadata.EntryPoint("bc", "collections:Counter", "clbench.agents"),
        importlib.metadata.EntryPoint("gone", "no_such_module_at_all:Agent", "clbench.agents"),
    ]
    asked = []

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(group)
        return [p for p in points if p.group == group]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert resolve("agents", "theirs").__name__ == "OrderedDict"
    assert entries("agents")["theirs"].summary == "from an installed package"
    assert resolve("agents", "bc").__module__ == "clbench.agents.bc"  # nobody replaces our own
    with pytest.raises(UnknownNameError, match="There is no module 'no_such_module_at_all'"):
        resolve("agents", "gone")  # listed, and only an error when it is named
    assert "theirs" not in entries("envs") and set(asked) == {"clbench.agents", "clbench.envs"}
