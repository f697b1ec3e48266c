"""The documentation does what it says: blocks run, commands parse, links resolve, generated parts are up to date."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import clbench.bench.envs as bench
import clbench.bench.rollouts as bench_planners
import clbench.bench.updates as bench_updates
import clbench.cli.data as cli_data
import clbench.experiments as experiments
from clbench.cli.main import main
from clbench.registry import KINDS
from clbench.testing import target as conformance

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IDS = [str(p.relative_to(ROOT)) for p in PAGES]


def load_make_docs() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_docs = load_make_docs()


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of a language, except those whose info string says ``no-run``."""
    return [code for info, code in BLOCK.findall(text) if info.split()[:1] == [language] and "no-run" not in info]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that holds the example files, as a reader would have them; what is imported there is forgotten."""
    for file in (ROOT / "examples").glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_") or name.startswith("docs_block"):
            del sys.modules[name]


def execute(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType(f"docs_block_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(code, f"{name}.md", "exec", dont_inherit=True), module.__dict__)
    return module


# -- code ----------------------------------------------------------------------------------------------------------------

WITH_CODE = [p for p in PAGES if blocks(p.read_text(), "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=[p.stem for p in WITH_CODE])
def test_python_blocks_run(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in blocks(page.read_text(), "python"):
        execute(code, page.stem, monkeypatch)


def test_negative_control_a_block_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    page = "text\n```python\nimport clbench\nclbench.no_such_function()\n```\n```python no-run\n1 / 0\n```\n"
    (code,) = blocks(page, "python")
    with pytest.raises(AttributeError, match="no_such_function"):
        execute(code, "broken", monkeypatch)


# -- commands ------------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The arguments of every ``clbench`` command in shell blocks and in blocks without a language."""
    lines = [
        line
        for info, code in BLOCK.findall(text)
        if info.strip() in ("bash", "console", "")
        for line in code.splitlines()
    ]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("clbench ")]


class Reached(Exception):
    """The command got as far as its work."""


def try_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command up to the point where it would train, check or measure.

    Raises:
        AssertionError: it did not get there.
    """

    def pretend_run(**values: Any) -> None:
        names = {f for f in values if f in experiments.RunConfig.__dataclass_fields__}
        experiments.resolve_run(experiments.RunConfig(**{k: values[k] for k in names}))
        raise Reached

    def pretend_check(name: str) -> None:
        conformance._kind(name)
        raise Reached

    def pretend(*_: Any, **__: Any) -> None:
        raise Reached

    def stub(function: Any) -> Any:
        """With the parameters of ``function``, which are the options of its command."""
        return functools.wraps(function)(lambda *_, **__: pretend())

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "run", pretend_run)
        patch.setattr("clbench.testing.run_check", pretend_check)
        patch.setattr("clbench.report.find_runs", pretend)
        patch.setattr("clbench.comparison._compare", pretend)
        patch.setattr("clbench.verification.verify_target", pretend)
        patch.setattr(bench, "bench_envs", pretend)
        patch.setattr(bench_planners, "bench_rollouts", stub(bench_planners.bench_rollouts))
        patch.setattr(bench_updates, "bench_updates", stub(bench_updates.bench_updates))
        patch.setattr(cli_data, "VERBS", {k: (pretend, *rest) for k, (_, *rest) in cli_data.VERBS.items()})
        try:
            main(arguments)
        except Reached:
            return
        except SystemExit as end:
            assert end.code == 0, f"clbench {' '.join(arguments)} ends with code {end.code}"


ALL_COMMANDS = sorted({shlex.join(c) for p in PAGES for c in commands(p.read_text())})
# names of files that the reader is to write
NOT_OURS = ("my_package.my_file:MyAgent",)


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if not any(n in c for n in NOT_OURS)])
def test_commands_parse(command: str, desk: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    try_command(shlex.split(command), monkeypatch)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {
        word
        for page in PAGES
        for line in re.findall(
            r"^make ([^#\n]+)", "".join(code for _, code in BLOCK.findall(page.read_text())), re.MULTILINE
        )
        for word in line.split()
    }
    assert {"demo", "test"} <= shown <= targets


def test_every_verb_is_shown() -> None:
    assert {shlex.split(c)[0] for c in ALL_COMMANDS} >= {
        "run",
        "compare",
        "report",
        "data",
        "list",
        "verify",
        "check",
        "bench",
    }


@pytest.mark.parametrize(
    "command", ["run digits-permutet --agent bc", "run digits-split --agent bc --agent.lrr 1", "check nothing", "rum"]
)
def test_negative_control_wrong_commands_are_noticed(command: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(AssertionError, match="ends with code 2"):
        try_command(shlex.split(command), monkeypatch)


# -- links, names, tests that are cited ------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown viewer makes from headings."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        found = (page.parent / name).resolve() if name else page
        if name.endswith(".png") and found.parent == ROOT / "docs" / "images":
            continue  # pictures of results are made at the end of a release
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_negative_control_broken_links_are_noticed() -> None:
    text = "[a](docs/nowhere.md) [b](docs/loop.md#nothing) [c](docs/loop.md#protocols) [d](https://example.org)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/loop.md#nothing"]


def test_every_page_is_reachable_from_the_readme() -> None:
    linked = set(re.findall(r"\((docs/\w+\.md|CONTRIBUTING\.md|CHANGELOG\.md)\)", (ROOT / "README.md").read_text()))
    assert {str(p.relative_to(ROOT)) for p in PAGES} - {"README.md"} == linked


@pytest.mark.parametrize("kind", KINDS)
def test_everything_registered_is_described(kind: str) -> None:
    text = "".join(p.read_text() for p in PAGES if p.parent == ROOT / "docs")
    assert [name for name in make_docs.own(kind) if f"`{name}`" not in text] == []


def cited_tests_missing(text: str) -> list[str]:
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert cited
    missing = []
    for file, name in cited:
        source = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        if not re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE):
            missing.append(f"{file}::{name}")
    return missing


def test_promises_cite_tests_that_exist() -> None:
    assert cited_tests_missing((ROOT / "README.md").read_text()) == []


def test_negative_control_a_missing_test_is_noticed() -> None:
    text = "`tests/docs/test_docs.py::test_links_resolve` `tests/docs/test_docs.py::test_that_is_not_there`"
    assert cited_tests_missing(text) == ["tests/docs/test_docs.py::test_that_is_not_there"]


def keys(value: Any) -> Iterator[str]:
    """All keys of nested mappings, except the open-ended ones."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            if key not in ("config", "provenance", "metrics"):
                yield from keys(inner)


def test_the_run_directory_page_names_every_file_and_key(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "run_directory.md").read_text()
    main_arguments = ["run", "digits-split", "--agent", "bc", "--budget", "10", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        main(main_arguments)
    assert end.value.code == 0
    files = {re.sub(r"tfevents\..*", "tfevents.*", f.name) for f in (tmp_path / "run").iterdir()}
    assert {f for f in files if f"`{f}`" not in page} == set()
    found: set[str] = set()
    for name in ("results.json", "timing.json", "config.json"):
        content = json.loads((tmp_path / "run" / name).read_text())
        found |= set(keys({k: v for k, v in content.items() if k != "phases"}))
    found |= set((tmp_path / "run" / "eval.csv").read_text().splitlines()[0].split(","))
    assert {"updates", "parameters", "state_bytes", "wall_time_s", "evaluate", "peak_memory_bytes"} <= found
    assert {k for k in found if f"`{k}`" not in page} == set()


# -- generated parts -------------------------------------------------------------------------------------------------------


def test_generated_parts_are_up_to_date() -> None:
    assert make_docs.outdated(make_docs.pages()) == []


@pytest.mark.slow
def test_costly_parts_are_up_to_date() -> None:
    for page in make_docs.pages():
        assert make_docs.renewed(page.read_text(), make_docs.part_or_none) == page.read_text()


def test_negative_control_an_outdated_part_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin example my_agent.py -->\nold\n<!-- end example my_agent.py -->\nb\n")
    assert make_docs.outdated([page]) == ["page.md: example my_agent.py"]
    page.write_text(make_docs.renewed(page.read_text(), make_docs.part_or_none))
    assert make_docs.outdated([page]) == []
    text = page.read_text()
    assert text.startswith("a\n<!-- begin") and text.endswith("-->\nb\n") and "class MyAgent(Agent)" in text


def test_markers_match_and_name_known_parts() -> None:
    for page in make_docs.pages():
        text = page.read_text()
        names = [name for _, name, _, _ in make_docs.MARKED.findall(text)]
        assert len(names) == len(re.findall(r"^<!-- begin ", text, re.MULTILINE)), page
        for name in names:
            make_docs.part(name)
    with pytest.raises(KeyError):
        make_docs.part("no-such-part")
