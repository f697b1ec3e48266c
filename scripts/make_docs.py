"""Write the generated parts of README.md and docs/: everything between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    python scripts/make_docs.py                     write all parts (also those that take seconds)
    python scripts/make_docs.py --check             exit 1 if a part that is cheap to make is out of date
    python scripts/make_docs.py --demo runs/demo    also write the table of the demo's results into README.md

Numbers in the documentation come from here and from nowhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import inspect
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- begin ([\w.\- ]+) -->\n)(.*?)(<!-- end \2 -->)", re.DOTALL)
STATISTICS = ("action_sd", "door_passing", "blocked", "pair_distance", "in_walls")
TRANSITIONS = 360_000  # per row of the table of data statistics
EPISODES = 250  # per controller and maze


def pages(root: Path = ROOT) -> list[Path]:
    """The files that may hold generated parts."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


# -- parts ---------------------------------------------------------------------------------------------------------------


def example(name: str) -> str:
    """A file of examples/, verbatim."""
    text = (ROOT / "examples" / name).read_text()
    return f"```{'python' if name.endswith('.py') else ''}\n{text.rstrip()}\n```"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)


def own(kind: str) -> dict[str, str]:
    """Names and summaries of what clbench itself registers (not of other packages that happen to be installed)."""
    from clbench.registry import TABLES, load_object

    return {name: summary for name, (_, summary) in sorted(load_object(TABLES[kind]).items())}


def registered(kind: str) -> str:
    """Names and summaries of one kind of plug-in."""
    return table((kind.removesuffix("s"), "what it is"), ((f"`{name}`", text) for name, text in own(kind).items()))


def what_works() -> str:
    """Everything registered, one row per kind."""
    from clbench.registry import KINDS

    def names(kind: str) -> str:
        listed = [f"`{name}`" for name in own(kind) if "/" not in name or kind != "datasets"]
        families = Counter(name.partition("/")[0] for name in own(kind) if "/" in name and kind == "datasets")
        return ", ".join([*listed, *(f"{count} of `{family}/`" for family, count in families.items())]) or "none yet"

    return table(("kind", "registered today"), ((kind, names(kind)) for kind in KINDS))


def options_text(fields: Iterable[Any]) -> str:
    """Names and defaults of dataclass fields."""

    def default(field: Any) -> Any:
        return field.default if field.default is not dataclasses.MISSING else field.default_factory()

    return ", ".join(f"`{f.name}={default(f)!r}`" for f in fields) or "none"


def agents() -> str:
    """Agents with what they require and their options."""
    from clbench.registry import resolve

    rows = []
    for name, summary in own("agents").items():
        cls = resolve("agents", name)
        needs = ", ".join(f"`{r}`" for r in sorted(cls.requires)) or "nothing"
        rows.append((f"`{name}`", summary, needs, options_text(dataclasses.fields(cls.Config))))
    return table(("agent", "what it is", "requires", "options and defaults"), rows)


def planners() -> str:
    """Planners with the options in which they differ from what all sampling planners have, and those."""
    from clbench.planners.sampling import SamplingConfig
    from clbench.registry import resolve

    shared = {f.name: f.default for f in dataclasses.fields(SamplingConfig)}
    rows = []
    for name, summary in own("planners").items():
        fields = dataclasses.fields(resolve("planners", name).Config)
        rows.append((f"`{name}`", summary, options_text(f for f in fields if shared.get(f.name, ...) != f.default)))
    text = options_text(dataclasses.fields(SamplingConfig))
    head = f"All but `gradient` also have these options, unless the table says otherwise: {text}.\n\n"
    return head + table(("planner", "what it is", "options and defaults of its own"), rows)


def streams() -> str:
    """Streams with their tasks, budgets and options."""
    from clbench.config import call_with_options, options_of
    from clbench.registry import resolve
    from clbench.rng import numpy_generator

    rows = []
    for name, summary in own("streams").items():
        function = resolve("streams", name)
        suite = call_with_options(function, None, where=name, rng=numpy_generator(0, "stream", "tasks"))
        options = options_text(dataclasses.fields(options_of(function)))
        rows.append((f"`{name}`", summary, len(suite.table), suite.updates, suite.env_steps, options))
    return table(("stream", "what it is", "tasks", "updates per task", "steps per task", "options and defaults"), rows)


def schedules() -> str:
    """Schedules with their options."""
    from clbench.config import options_of
    from clbench.registry import resolve

    rows = []
    for name, summary in own("schedules").items():
        fields = dataclasses.fields(options_of(resolve("schedules", name), ("num_tasks", "budget", "rng")))
        rows.append((f"`{name}`", summary, options_text(fields)))
    return table(("schedule", "what it is", "options and defaults"), rows)


def run_options() -> str:
    """The arguments of `clbench run` and `clbench.run`, from the one docstring that describes them."""
    from clbench.cli.main import _argument_help
    from clbench.experiments import RunConfig

    helps = _argument_help(RunConfig.__doc__ or "")
    rows = []
    for f in dataclasses.fields(RunConfig):
        if f.name.endswith("_options"):
            continue
        option = "positional" if f.name == "stream" else f"`--{f.name.replace('_', '-')}`"
        default = "" if f.default is dataclasses.MISSING else f"`{f.default}`"
        rows.append((f"`{f.name}`", option, default, helps[f.name]))
    return table(("Python", "command line", "default", "meaning"), rows)


def pldm_presets() -> str:
    """What each preset of pldm sets."""
    from clbench.agents.pldm import PRESETS

    def text(value: Any) -> str:
        if dataclasses.is_dataclass(value):
            changed = [f for f in dataclasses.fields(value) if f.name == "name" or getattr(value, f.name) != f.default]
            value = {f.name: getattr(value, f.name) for f in changed}
        return ", ".join(f"`{k}={v}`" for k, v in value.items()) if isinstance(value, dict) else f"`{value}`"

    rows = ((f"`{name}`", *(text(preset[name]) for preset in PRESETS.values())) for name in PRESETS["small"])
    return table(("option", *(f"`{name}`" for name in PRESETS)), rows)


def pldm_options() -> str:
    """The options of pldm from the docstring that describes them."""
    from clbench.agents.pldm import PLDM
    from clbench.cli.main import _argument_help

    helps = _argument_help(textwrap.indent(inspect.cleandoc(PLDM.Config.__doc__ or ""), "    "))
    rows = []
    for f in dataclasses.fields(PLDM.Config):
        plain = f.default is not dataclasses.MISSING and f.default is not None
        rows.append((f"`{f.name}`", f"`{f.default}`" if plain else "of the preset", helps[f.name]))
    return table(("option", "default", "meaning"), rows)


def eidetic_options() -> str:
    """The options of eidetic-bc, with those of its pruning, from the docstrings that describe them."""
    from clbench.agents.eidetic_bc import EideticBC
    from clbench.agents.networks.eidetic.pruning import Pruning
    from clbench.cli.main import _argument_help

    rows = []
    for cls, prefix in ((EideticBC.Config, ""), (Pruning, "pruning.")):
        helps = _argument_help(textwrap.indent(inspect.cleandoc(cls.__doc__ or ""), "    "))
        for f in dataclasses.fields(cls):
            if f.name == "pruning":
                continue
            default = f"{type(f.default_factory()).__name__}()" if callable(f.default_factory) else f.default
            rows.append((f"`{prefix}{f.name}`", f"`{default}`", re.sub(r":\w+:`(\w+)`", r"`\1`", helps[f.name])))
    return table(("option", "default", "meaning"), rows)


def eidetic_refused() -> str:
    """Modules of torch that an eidetic network refuses, by what takes their place."""
    from clbench.agents.networks.eidetic.network import MIXING, UNITWISE

    rows = [
        (", ".join(f"`{name}`" for name, other in MIXING.items() if other == instead), instead)
        for instead in dict.fromkeys(MIXING.values())
    ]
    allowed = ", ".join(f"`{name}`" for name in UNITWISE)
    return table(("refused", "in its place"), rows) + f"\n\nTaken from `torch.nn` as they are: {allowed}."


MISTAKES = ("WrongShape", "MissingKey", "NeedsTaskId", "RaisesInLearn")


def methods() -> str:
    """Continual methods with what they require and the agents they work with."""
    from clbench.registry import resolve

    rows = []
    for name, summary in own("methods").items():
        needs = ", ".join(f"`{r}`" for r in sorted(resolve("methods", name).requires)) or "nothing"
        rows.append((f"[`{name}`](method_cards.md#{name})", summary, needs))
    return table(("method", "what it is", "requires"), rows)


def method_cards() -> str:
    """One card per continual method: source, formula, options, where it works, what was measured."""
    from clbench.agents.continual.compose import check_pair
    from clbench.errors import ConfigError
    from clbench.registry import resolve

    measured, cards = continual_results(), []
    for name, summary in own("methods").items():
        cls = resolve("methods", name)
        works, refused = [], []
        for agent in own("agents"):
            try:
                check_pair(resolve("agents", agent), agent, cls, name)
                works.append(f"`{agent}`")
            except ConfigError:
                refused.append(f"`{agent}`")
        meaning = argument_help(cls.Config)
        options = [(f"`{f.name}`", f"`{f.default!r}`", meaning.get(f.name, "")) for f in dataclasses.fields(cls.Config)]
        lines = [
            f"## {name}",
            inspect.getdoc(cls) or summary,
            f"* **Source**: {cls.paper}",
            f"* **Formula**: `{cls.formula}`",
            f"* **Requires**: {', '.join(f'`{r}`' for r in sorted(cls.requires)) or 'nothing'}",
            f"* **Works with**: {', '.join(works) or 'no agent'}. Refused at start-up: {', '.join(refused) or 'none'}.",
        ]
        text = "\n\n".join([*lines[:2], "\n".join(lines[2:])])
        text += "\n\n" + (table(("option", "default", "meaning"), options) if options else "No options.")
        if name in measured:
            head = ("benchmark", "value", "average, % (online accuracy)", "forgetting, points (lost)", "extra samples",
                    "state, kB")  # fmt: skip
            text += "\n\n" + table(head, measured[name])
        else:
            text += "\n\nNot measured yet."
        cards.append(text)
    return "\n\n".join(cards)


def argument_help(config: type) -> dict[str, str]:
    """What the ``Args:`` of a Config and of its bases say, by name."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        _, _, arguments = (inspect.getdoc(cls) or "").partition("Args:\n")
        name = ""
        for line in arguments.splitlines():
            if match := re.match(r" {4}(\w+): (.*)", line):
                name = match[1]
                found[name] = match[2]
            elif name and line.startswith(" " * 8):
                found[name] += " " + line.strip()
    return {k: v.replace("``", "`") for k, v in found.items()}


def continual_results() -> dict[str, list[Sequence[str]]]:
    """Rows for the cards of each method, from the pages that scripts/continual_table.py wrote."""
    spec = importlib.util.spec_from_file_location("continual_table", ROOT / "scripts" / "continual_table.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = study
    spec.loader.exec_module(study)
    found: dict[str, list[Sequence[str]]] = {}
    for name, bench in study.BENCHMARKS.items():
        page = f"continual_{name.replace('-', '_')}.md"
        if not (ROOT / "docs" / "results" / page).exists():
            continue
        text = (ROOT / "docs" / "results" / page).read_text()
        first = text[text.index("| method |") :].split("\n\n")[0].splitlines()
        header = [c.strip() for c in first[0].strip("|").split("|")]
        day = re.search(r"` on ([\d-]+)\.", text)
        for line in first[2:]:
            cells = dict(zip(header, (c.strip() for c in line.strip("|").split("|")), strict=True))
            row = bench.table().get(cells["method"])
            if row is None or len(row.method) != 1:
                continue
            score, lost = ("online accuracy", "lost") if bench.online else ("average", "forgetting")
            link = f"[{name}](results/{page}), {day[1] if day else 'undated'}"
            cells = (link, cells["value"], cells[score], cells[lost], cells["extra samples"], cells["state, kB"])
            found.setdefault(row.method[0], []).append(cells)
    return found


def mistakes() -> str:
    """What `clbench run` and `clbench check` say about the agents of examples/mistakes.py."""
    import clbench
    from clbench.errors import ClbenchError
    from clbench.testing import run_check

    def run_says(name: str, folder: str) -> str:
        try:
            clbench.run("digits-split", f"mistakes:{name}", out=folder, budget=2, eval_every=0, tensorboard=False)
        except ClbenchError as error:
            return str(error).replace(f"{ROOT / 'examples'}/", "")
        return "nothing: it is noticed only when a run is resumed"

    rows, before = [], set(sys.modules)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(ROOT / "examples"):
        for name in MISTAKES:
            failures = run_check(f"mistakes:{name}").failures
            check_says = failures[0].message if failures else "nothing: it is right, on streams that reveal the task"
            rows.append((f"`{name}`", run_says(name, f"{folder}/{name}"), check_says))
    for module in {"my_agent", "mistakes"} - before:
        sys.modules.pop(module, None)
    return table(("agent", "`clbench run` says", "`clbench check` says"), rows)


def usage() -> str:
    """What `clbench --help` prints."""
    from clbench.cli.main import USAGE

    return f"```\n{USAGE}\n```"


def two_rooms_statistics() -> str:
    """Measured statistics of the Two-Rooms data under the collision rules of clbench and of the reference's generator."""
    from clbench.envs.two_rooms_data import statistics, two_rooms

    kinds = (("good", 5.0), ("random policy", 1e-6))
    rows = []
    for label, kappa in kinds:
        for collision in ("stop", "cancel"):
            found = statistics(two_rooms(transitions=TRANSITIONS, kappa=kappa, collision=collision))
            rows.append((label, f"`{kappa:g}`", f"`{collision}`", *(f"{found[k]:.4g}" for k in STATISTICS)))
    head = f"`two_rooms(transitions={TRANSITIONS}, kappa=..., collision=...)`, otherwise defaults (seed 0):\n\n"
    return head + table(("data", "`kappa`", "`collision`", *(f"`{k}`" for k in STATISTICS)), rows)


def published_statistics() -> str:
    """Measured statistics of the published Two-Rooms data sets that differ in more than their size."""
    from clbench.data.recipes import GOOD_SHARES, RECIPES, STATES
    from clbench.data.registry import load_dataset
    from clbench.envs.two_rooms_data import statistics

    varied = [*(f"length-{n}" for n in STATES), *(f"mix-{share}" for share in GOOD_SHARES), "no-door"]
    names = [name for name in (f"two-rooms/{part}-v0" for part in ("good", *varied)) if name in RECIPES]
    found = [statistics(load_dataset(name)) for name in names]
    rows = [(f"`{name}`", *(f"{values[k]:.4g}" for k in STATISTICS)) for name, values in zip(names, found, strict=True)]
    return table(("data set", *(f"`{k}`" for k in STATISTICS)), rows)


def point_maze_statistics() -> str:
    """Measured statistics of the PointMaze data."""
    from clbench.envs.point_maze_data import point_maze, statistics

    counts, columns = (5, 40), ("action_sd", "velocity_sd", "cells", "coverage", "touching", "nearest")
    found = [statistics(point_maze(layouts=n, transitions=TRANSITIONS)) for n in counts]
    rows = [(n, *(f"{values[k]:.4g}" for k in columns)) for n, values in zip(counts, found, strict=True)]
    head = f"`point_maze(layouts=..., transitions={TRANSITIONS})`, otherwise defaults (seed 0):\n\n"
    return head + table(("`layouts`", *(f"`{k}`" for k in columns)), rows)


def ogbench_maze_statistics() -> str:
    """Measured statistics of the walks in OGBench's point mazes."""
    from clbench.data.recipes import RECIPES
    from clbench.data.registry import load_dataset
    from clbench.envs.ogbench_maze_data import statistics

    names = [name for name, recipe in RECIPES.items() if recipe.family == "ogbench-maze"]
    found = [statistics(load_dataset(name)) for name in names]
    rows = [(f"`{name}`", *(f"{v:.4g}" for v in values.values())) for name, values in zip(names, found, strict=True)]
    return table(("data set", *(f"`{k}`" for k in found[0])), rows)


def ogbench_maze_lines() -> str:
    """Success of controllers on the frozen episodes of OGBench's point mazes."""
    import torch

    from clbench.envs.make import make_env
    from clbench.streams.ogbench_mazes import TASKS, evaluation_trials

    rows = []
    for maze in TASKS:
        trials = evaluation_trials(maze, EPISODES)
        env: Any = make_env("clbench/OGBenchPointMaze-v0", EPISODES, autoreset="disabled", maze=maze)
        for name, method in (("shortest path", "oracle_actions"), ("straight line", "straight_line_actions")):
            env.reset(seed=trials.seeds, options=dict(trials.options))
            reached = torch.zeros(EPISODES, dtype=torch.bool)
            for _ in range(env.max_episode_steps):
                reached |= env.step(getattr(env, method)())[4]["is_success"]
            each = reached.double().view(-1, len(TASKS[maze])).mean(0)
            rows.append((f"`{maze}`", name, *(f"{v:.2f}" for v in each.tolist()), f"{float(each.mean()):.3f}"))
    head = f"{EPISODES} frozen episodes per maze, steps of 0.2, 1000 steps:\n\n"
    return head + table(("maze", "controller", *(f"task {i}" for i in range(1, 6)), "mean"), rows)


def printed_by(script: str) -> str | None:
    """A table of the lines ``LABEL: RESULT`` that a script prints; ``None`` where it prints none."""
    path = ROOT / "scripts" / script
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    rows = [line.rsplit(": ", 1) for line in done.stdout.splitlines()]
    return table(("compared", "result"), rows) if rows else None


def demo_results(folder: Path) -> str:
    """The table of the demo's report, and what it was measured with."""
    from clbench.records import read_json
    from clbench.report import find_runs, report_markdown

    runs = find_runs([folder])
    if not runs:
        sys.exit(f"make_docs: no runs below {folder}; make them with `make demo`.")
    records = [read_json(Path(run) / "config.json")["provenance"] for run in runs]
    made = records[0]
    differing = [k for k in ("git", "cpu", "torch", "dirty") if len({str(r[k]) for r in records}) > 1]
    if differing:
        sys.exit(f"make_docs: the runs below {folder} differ in {', '.join(differing)}; make all of them anew.")
    last = max((Path(run) / "results.json").stat().st_mtime for run in runs)
    day = datetime.datetime.fromtimestamp(last, datetime.UTC).date().isoformat()
    commit = f"{str(made['git'])[:12]}{' with local changes' if made['dirty'] else ''}"
    source = (
        f"Command: `make demo`. Date: {day}. Commit: {commit}. Hardware: {made['cpu']}, {made['cores']} cores, "
        f"GPU: {made['gpu'] or 'none'}. Python {made['python']}, torch {made['torch']}. "
        "Means over seeds with 95 % bootstrap intervals over runs."
    )
    return f"{report_markdown(runs).strip()}\n\n{source}"


CHEAP: dict[str, Callable[[], str]] = {
    "what-works": what_works,
    "agents": agents,
    "planners": planners,
    "methods": methods,
    "method-cards": method_cards,
    "envs": lambda: registered("envs"),
    "streams": streams,
    "schedules": schedules,
    "datasets": lambda: registered("datasets"),
    "run-options": run_options,
    "pldm-presets": pldm_presets,
    "pldm-options": pldm_options,
    "eidetic-options": eidetic_options,
    "eidetic-refused": eidetic_refused,
    "usage": usage,
    "mistakes": mistakes,
}
COSTLY: dict[str, Callable[[], str]] = {
    "two-rooms-statistics": two_rooms_statistics,
    "published-statistics": published_statistics,
    "point-maze-statistics": point_maze_statistics,
    "ogbench-maze-statistics": ogbench_maze_statistics,
    "ogbench-maze-lines": ogbench_maze_lines,
}
# written where MuJoCo (or OGBench) is installed; its version and the machine decide about the last digits
SCRIPTS = {"point-maze-physics": "check_point_maze_physics.py", "ogbench-maze-physics": "check_ogbench_maze.py"}
BY_HAND = ("demo-results", *SCRIPTS)  # the first with --demo only


def part(name: str) -> Callable[[], str] | None:
    """The function that makes a part.

    Raises:
        KeyError: no part of that name.
    """
    if name.startswith("example "):
        return lambda: example(name.removeprefix("example "))
    if name in BY_HAND:
        return None
    return (CHEAP | COSTLY)[name]


def part_or_none(name: str) -> str | None:
    """The text of a part, ``None`` for one that is not made here."""
    function = part(name)
    return None if function is None else function()


# -- writing -------------------------------------------------------------------------------------------------------------


def renewed(text: str, make: Callable[[str], str | None]) -> str:
    """``text`` with every marked part replaced by ``make(name)``; ``None`` leaves a part as it is."""

    def replace(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        new = make(name)
        return begin + (old if new is None else new + "\n") + end

    return MARKED.sub(replace, text)


def outdated(paths: Iterable[Path]) -> list[str]:
    """``FILE: PART`` for each part that is cheap to make and not what it should be."""
    found: list[str] = []
    for path in paths:
        for _, name, old, _ in MARKED.findall(path.read_text()):
            function = None if name in COSTLY else part(name)
            if function is not None and function() + "\n" != old:
                found.append(f"{path.name}: {name}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    parser.add_argument("--demo", type=Path, help="folder of demo runs to put into README.md")
    arguments = parser.parse_args()
    if arguments.check:
        stale = outdated(pages())
        print("\n".join(f"{line} is out of date; run python scripts/make_docs.py" for line in stale) or "up to date")
        return 1 if stale else 0

    def make(name: str) -> str | None:
        if name == "demo-results" and arguments.demo is not None:
            return demo_results(arguments.demo)
        if name in SCRIPTS:
            return printed_by(SCRIPTS[name])
        return part_or_none(name)

    for path in pages():
        old = path.read_text()
        new = renewed(old, make)
        if new != old:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
