"""``clbench compare``: data sets x agents x seeds, with paired statistics and one report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from clbench.errors import ConfigError, unknown_name

USAGE = """\
usage: clbench compare DATASET... --agents AGENT,AGENT,... [OPTIONS]

Give data sets (or streams) and --help to see all options, those of the streams among them."""
DESCRIPTION = (
    "Every agent on every data set with every seed, on the same frozen episodes. Giving the same command again skips what "
    "is complete and goes on with what was stopped."
)


def compare(arguments: list[str], parse: Callable[..., Any]) -> int:
    """The verb ``compare``. Returns 1 if a cell gave no result."""
    datasets = _leading(arguments)
    if not datasets:
        if not arguments or any(a in ("-h", "--help") for a in arguments):
            print(USAGE)
            return 0 if arguments else 2
        raise ConfigError("Say what to compare on: clbench compare DATASET... --agents AGENT,AGENT,... "
                          "`clbench list datasets` names the data sets.")  # fmt: skip
    kind = _arguments(datasets)
    parsed = parse(kind, arguments, "clbench compare", DESCRIPTION)
    agents = [a for a in parsed.agents.split(",") if a]
    options = {f.name: getattr(parsed.stream, f.name) for f in dataclasses.fields(parsed.stream)}
    from clbench.comparison import compare as run_comparison

    found = run_comparison(
        parsed.datasets,
        agents=agents,
        seeds=seeds_of(parsed.seeds),
        agent_options=settings_of(parsed.set, agents),
        stream_options={k: v for k, v in options.items() if v is not None},
        note=lambda text: print(text, file=sys.stderr, flush=True),
        **{name: getattr(parsed, name) for name in PLAIN},
    )
    print(found.text)
    for row in found.failures:
        print(f"No result: {row['dataset']} · {row['agent']} · seed {row['seed']}: {row['status']}. {row['problem']}")
    print(f"Table: {found.path / 'table.csv'}\nReport: {found.path / 'report.html'}")
    return 1 if found.failures else 0


PLAIN = ("scale", "budget", "eval_every", "episodes", "threads", "workers", "device", "out", "overwrite")


def _leading(arguments: Sequence[str]) -> list[str]:
    """The words before the first option: the data sets, whose options the parser has to know."""
    first = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    return list(arguments[:first])


def _arguments(datasets: Sequence[str]) -> type:
    import tyro

    def option(help: str) -> Any:
        return tyro.conf.arg(help=help)

    several = Annotated[tuple[str, ...], tyro.conf.Positional, option("data sets with a task, or streams")]
    every = tyro.conf.UseAppendAction[tuple[str, ...]]
    fields: list[Any] = [
        ("datasets", several),
        ("agents", Annotated[str, option("agents, with commas between (`clbench list agents`, or module:Class)")]),
        ("seeds", Annotated[str, option("seeds of the runs, with commas between; 0-4 is 0,1,2,3,4")], "0,1,2"),
        ("scale", Annotated[Literal["small", "paper"] | None, option(
            "small: state observations and the agents' preset small; paper: pixels where the data set has them and the "
            "preset of its family (default: paper with a GPU, else small)")], None),
        ("budget", Annotated[int | None, option(
            "updates per run (default: a table per scale and agent, docs/compare.md)")], None),
        ("eval_every", Annotated[int, option("updates between evaluations within a run; 0: at its end only")], 0),
        ("episodes", Annotated[int | None, option("the first N frozen evaluation episodes (default: all)")], None),
        ("threads", Annotated[int, option("CPU threads per run")], 1),
        ("workers", Annotated[int | None, option(
            "runs at once; 0 runs all in this process (default: what cores and memory allow; one on a GPU)")], None),
        ("device", Annotated[str | None, option("torch device (default: a GPU for --scale paper if there is one)")], None),
        ("set", Annotated[every, tyro.conf.arg(metavar="AGENT.OPTION=VALUE", help=(
            "an option of an agent, as hiql.alpha=3; can be given several times"))], ()),
        ("out", Annotated[Path, option("where everything goes; runs in OUT/DATASET/AGENT/seed-N")], Path("runs/compare")),
        ("overwrite", Annotated[bool, option(
            "make cells again that hold a run of another configuration (the others are kept)")], False),
        ("stream", _common_options(datasets)),
    ]  # fmt: skip
    return dataclasses.make_dataclass("Compare", fields, kw_only=True)


def _common_options(datasets: Iterable[str]) -> type:
    """A dataclass of the options that all streams know; ``None`` leaves each its own default."""
    from clbench.config import options_of
    from clbench.contracts import Stream
    from clbench.streams.core import resolve_stream

    shared: dict[str, Any] | None = None
    for dataset in datasets:
        factory = resolve_stream(dataset)
        own = {} if isinstance(factory, Stream) else {f.name: f.type for f in dataclasses.fields(options_of(factory))}
        shared = own if shared is None else {k: v for k, v in shared.items() if k in own}
    fields: list[Any] = [(k, v | None, None) for k, v in (shared or {}).items() if k != "episodes"]
    return dataclasses.make_dataclass("stream_options", fields)


def seeds_of(text: str) -> list[int]:
    """``"0,1,2"`` or ``"0-2"`` or both mixed.

    Raises:
        ConfigError: anything else.
    """
    found: list[int] = []
    for part in (p.strip() for p in text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise ConfigError(f"--seeds must be numbers with commas between, as 0,1,2 or 0-2, got {text!r}.")
        found += range(int(first), int(last or first) + 1)
    return found


def settings_of(settings: Iterable[str], agents: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["pldm.architecture.members=5"] -> {"pldm": {"architecture": {"members": "5"}}}``.

    Raises:
        UnknownNameError: an agent that is not compared.
        ConfigError: not of that form, or an option that is set as a whole and in part.
    """
    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        path, equals, value = text.partition("=")
        agent = max((a for a in agents if path.startswith(f"{a}.")), key=len, default=None)
        keys = path.removeprefix(f"{agent}.").split(".") if agent else path.split(".")
        if not equals or len(path.split(".")) < 2 or not all(keys):
            raise ConfigError(f"--set takes AGENT.OPTION=VALUE, as --set hiql.alpha=3, got {text!r}.")
        if agent is None:
            raise unknown_name("agent", keys[0], agents, where=f"--set {text}")
        place = found.setdefault(agent, {})
        *groups, last = (key.replace("-", "_") for key in keys)
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {text}: {group} is set as a whole too; set it as a whole or in parts.")
        if isinstance(place.get(last), dict):
            raise ConfigError(f"--set {text}: parts of {last} are set too; set it as a whole or in parts.")
        place[last] = value
    return found
