"""The shape of the repository: direction of imports, the folder mapping, what a wheel holds."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import clbench

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("envs", "agents", "planners")
SOURCES = ("clbench", *FOLDERS)
DATA_SUFFIXES = (".json", ".html", ".css")


def modules() -> list[Path]:
    """Every source file, relative to the repository; the links inside clbench/ are not followed."""
    found = []
    for top in SOURCES:
        for folder, _, files in os.walk(ROOT / top, followlinks=False):
            found += [(Path(folder) / f).relative_to(ROOT) for f in files if f.endswith(".py")]
    return sorted(found)


def installed_path(path: Path) -> Path:
    """Where a source file lies in site-packages: ``envs/x.py -> clbench/envs/x.py``."""
    return Path("clbench") / path if path.parts[0] in FOLDERS else path


def dotted(path: Path) -> str:
    parts = installed_path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def copy_sources(target: Path) -> None:
    """What a build needs, in a folder that may be written to."""
    ignored = shutil.ignore_patterns("__pycache__")
    for top in SOURCES:
        shutil.copytree(ROOT / top, target / top, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    (target / "README.md").write_text("A copy for a test.\n")


# -- direction of imports ------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    paths = os.pathsep.join([str(folder), *(p for p in sys.path if p.endswith("site-packages"))])
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": paths},
    )


@pytest.fixture(scope="module")
def copy_of_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    copy_sources(folder)
    return folder


def test_imports_point_one_way(copy_of_sources: Path) -> None:
    done = lint_imports(copy_of_sources)
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("clbench/records.py", "import clbench.loop", "clbench.records is not allowed to import clbench.loop"),
        ("clbench/records.py", "import clbench", "clbench.records is not allowed to import clbench.envs"),
        ("agents/random.py", "from clbench.envs import make", "clbench.agents is not allowed to import clbench.envs"),
        ("envs/make.py", "import clbench.planners", "clbench.envs is not allowed to import clbench.planners"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, module: str, line: str, broken: str) -> None:
    copy_sources(tmp_path)
    source = (tmp_path / module).read_text()
    (tmp_path / module).write_text(f"{source}\n\ndef _late():\n    {line}\n")  # imports inside functions count too
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert broken in done.stdout


def layers() -> set[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    names = next(c["layers"] for c in contracts if c["type"] == "layers")
    return {name.strip() for layer in names for name in layer.split("|")}


def test_every_package_has_its_layer() -> None:
    """A new package that no layer names would escape the check."""
    free = {"clbench.__main__", "clbench.version"}  # an entry point and a constant
    tops = {".".join(dotted(p).split(".")[:2]) for p in modules()} - {"clbench"} - free
    assert tops == layers()


# -- the folder mapping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_links_show_the_installed_tree(folder: str) -> None:
    link = ROOT / "clbench" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_names_are_refused(folder: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert f"ImportError: import clbench.{folder}, not {folder}: this top-level folder is part of" in done.stderr


def test_the_bare_name_guard_is_what_refuses(tmp_path: Path) -> None:
    """Negative control: without the guard the bare import works."""
    source = (ROOT / "planners" / "__init__.py").read_text()
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    (tmp_path / "planners").mkdir()
    (tmp_path / "planners" / "__init__.py").write_text(ast.unparse(tree))
    done = subprocess.run([sys.executable, "-c", "import planners"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("build")
    copy_sources(folder)
    for link in FOLDERS:  # a zip download has no links: the mapping alone must be enough
        (folder / "clbench" / link).unlink()
    (folder / "envs" / "added").mkdir()  # a new sub-package is found without an edit of setup.py
    (folder / "envs" / "added" / "__init__.py").write_text('"""New."""\n')
    arguments = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder / "dist")]
    if _setuptools_is_recent():
        arguments.append("--no-isolation")
    done = subprocess.run([*arguments, str(folder)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


def _setuptools_is_recent() -> bool:
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


def test_the_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    inside = {n for n in wheel.namelist() if n.endswith(".py")}
    assert inside == {installed_path(p).as_posix() for p in modules()} | {"clbench/envs/added/__init__.py"}


def test_the_wheel_holds_the_data_files(wheel: zipfile.ZipFile) -> None:
    files = {
        installed_path((Path(folder) / f).relative_to(ROOT)).as_posix()
        for top in SOURCES
        for folder, _, names in os.walk(ROOT / top)
        for f in names
        if f.endswith(DATA_SUFFIXES) or f == "py.typed"
    }
    assert {"clbench/py.typed", "clbench/data/digits_split.json", "clbench/report/style.css"} <= files
    assert files <= set(wheel.namelist())


def test_the_wheel_knows_its_version_and_command(wheel: zipfile.ZipFile) -> None:
    info = f"clbench-{clbench.__version__}.dist-info"
    assert f"Version: {clbench.__version__}\n" in wheel.read(f"{info}/METADATA").decode()
    assert "clbench = clbench.cli.main:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_wheel_works_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import clbench, clbench.envs.two_rooms, clbench.agents.bc\n"
        "from clbench.streams import make_stream\n"
        "assert len(make_stream('two-rooms-doors').tasks) == 5\n"
        "print(clbench.__file__, clbench.envs.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "clbench" / p) for p in ("__init__.py", "envs/__init__.py")]


# -- habits --------------------------------------------------------------------------------------------------------------


def public_modules() -> list[Path]:
    return [p for p in modules() if not (p.stem.startswith("_") and p.stem != "__init__")]


@pytest.mark.parametrize("path", public_modules(), ids=str)
def test_every_public_module_says_what_it_is(path: Path) -> None:
    doc = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    assert doc and len(doc.split()) >= 3, f"{path} needs a docstring that says what it is for"


def test_test_files_have_unique_names() -> None:
    """pytest imports them by name; two of the same name would hide each other in reports and caches."""
    names = Counter(p.name for p in (ROOT / "tests").rglob("test_*.py"))
    assert [n for n, count in names.items() if count > 1] == []


def pickles_and_global_randomness(source: str) -> list[str]:
    """Calls that read pickles, run text, or reseed the process, by a look at the syntax tree."""
    banned = {"pickle.load", "pickle.loads", "eval", "exec", "np.random.seed", "random.seed", "torch.manual_seed"}
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    unsafe = [
        "torch.load without weights_only"
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load" and "weights_only=True" not in ast.unparse(n)
    ]
    return [c for c in calls if c in banned] + unsafe


def test_no_module_reads_pickles_or_reseeds_the_process() -> None:
    found = {str(p): pickles_and_global_randomness((ROOT / p).read_text()) for p in modules()}
    allowed = {"clbench/rng.py": {"random.seed", "np.random.seed", "torch.manual_seed"}}  # seed_global
    bad = {p: sorted(set(c) - allowed.get(p, set())) for p, c in found.items()}
    assert {p: c for p, c in bad.items() if c} == {}
    assert pickles_and_global_randomness("torch.load(p)\nnp.random.seed(1)") == [
        "np.random.seed",
        "torch.load without weights_only",
    ]
