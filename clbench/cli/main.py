"""Parse, call one function, turn errors into one paragraph. Everything heavy is imported by the verb that needs it.

Exit code 0 on success, 2 on bad input (one paragraph on stderr, no traceback unless ``--traceback``), 130 on Ctrl-C after
saving, 1 when a check fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from clbench import __version__
from clbench.errors import ClbenchError, ConfigError, Interrupted, unknown_name

Arguments = list[str]

USAGE = """\
usage: clbench VERB [ARGUMENTS] [--traceback]

  run STREAM --agent AGENT [OPTIONS]   train and evaluate one agent on one stream
  compare DATASET... --agents A,B,...  several agents on several data sets: paired statistics and a report
  report RUNS... [--out FILE]          one self-contained HTML page with plots and tables
  data (list|info|make|import|export)  offline data: what there is, from and to Minari and OGBench
  list [KIND] [--json]                 agents, envs, streams, schedules, planners, methods, datasets
  verify RUN_DIR [--json]              have finished tasks changed? evidence about a run or module:network
  check PLUGIN                         conformance suite on module:Class or a registered name
  bench (envs|rollouts|updates)        speed beside the limit of the hardware

Give a verb and --help for its options."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Plug-ins in the current folder can import each other, as with ``python -m``."""
    sys.path.append(os.getcwd())
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: Arguments) -> int:
    traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe is known what to do about
        return code
    except (Interrupted, KeyboardInterrupt):
        _say("Stopped. What was done is saved; give the same command again to go on.")
        return 130
    except ClbenchError as error:
        if traceback:
            raise
        _say(textwrap.fill(f"clbench: {error}", width=100, break_long_words=False, break_on_hyphens=False))
        return 2
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:  # a page that cannot be written
        if traceback:
            raise
        _say(f"clbench: {error}. Choose another path.")
        return 2


def _dispatch(arguments: Arguments) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"clbench {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise unknown_name("verb", verb, VERBS)
    return VERBS[verb](rest)


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def _parse(kind: Any, arguments: Arguments, prog: str, description: str) -> Any:
    import tyro

    return tyro.cli(kind, args=arguments, prog=prog, description=description)


# -- run -----------------------------------------------------------------------------------------------------------------


def _run(arguments: Arguments) -> int:
    """Options of the agent, stream and schedule are added to the parser once their names are known."""
    wants_help = any(a in ("-h", "--help") for a in arguments)
    if not arguments or arguments[0].startswith("-"):
        if wants_help:
            print("usage: clbench run STREAM --agent AGENT [OPTIONS]\n\nGive STREAM and --agent before --help "
                  "to see all options.")  # fmt: skip
            return 0
        raise ConfigError(
            "Say which stream to run: clbench run STREAM --agent AGENT. `clbench list streams` names them."
        )
    agent = _value_of("--agent", arguments)
    if agent is None:
        raise ConfigError(
            f"Say which agent to run: clbench run {arguments[0]} --agent AGENT. `clbench list agents` names them."
        )
    parsed = _parse(
        _run_arguments(
            arguments[0],
            agent,
            _value_of("--schedule", arguments) or "sequential",
            _names(_value_of("--method", arguments)),
        ),
        arguments,
        "clbench run",
        "Train and evaluate one agent on one stream. Giving the same command again goes on with an interrupted run.",
    )
    from clbench.experiments import RunConfig, run

    values = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(RunConfig)}
    for group in ("agent_options", "stream_options", "schedule_options"):
        values[group] = {f.name: getattr(values[group], f.name) for f in dataclasses.fields(values[group])}
    methods = values["method_options"]
    values["method_options"] = {
        f.name: {g.name: getattr(getattr(methods, f.name), g.name) for g in dataclasses.fields(f.type)}  # type: ignore[arg-type]
        for f in dataclasses.fields(methods)
    }
    result = run(**values, out=parsed.out, overwrite=parsed.overwrite, progress=_progress)
    _print_result(result)
    if parsed.report:
        from clbench.report import write_report
        from clbench.report.pictures import save_rollout
        from clbench.report.planning import save_planning

        if result.agent is not None:
            save_rollout(result)
            save_planning(result)
        print(f"Report: {write_report([result.path], result.path / 'report.html')}")
    return 0


def _value_of(option: str, arguments: Arguments) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == option and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
    return None


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").split(",") if name]


def _run_arguments(stream: str, agent: str, schedule: str, methods: Sequence[str] = ()) -> type:
    """A dataclass with the fields of RunConfig, the options of the plug-ins, and where to write."""
    import tyro

    from clbench.config import options_of
    from clbench.contracts import Agent, Stream
    from clbench.errors import ContractError
    from clbench.experiments import RunConfig
    from clbench.registry import resolve
    from clbench.streams.core import resolve_stream

    agent_class, factory = resolve("agents", agent), resolve_stream(stream)
    if not (isinstance(agent_class, type) and issubclass(agent_class, Agent)):
        raise ContractError(f"Agent {agent!r} must be a subclass of clbench.Agent, got {agent_class!r}.")
    if not dataclasses.is_dataclass(agent_class.Config):
        raise ContractError(f"Agent {agent!r}: its Config is not a dataclass; decorate it with @dataclass.")
    none = dataclasses.make_dataclass("no_options", [])
    of_methods: type = none
    if methods:
        from clbench.agents.continual.compose import compose, field_name

        composed = compose(agent, methods)
        kinds = {f.name: f.type for f in dataclasses.fields(composed.Config)}  # type: ignore[arg-type]
        names = [field_name(m) for m in methods]
        of_methods = dataclasses.make_dataclass("method_options", [(name, kinds[name]) for name in names])
    groups = {
        "agent_options": ("agent", agent_class.Config),
        "method_options": ("method", of_methods),
        "stream_options": ("stream", none if isinstance(factory, Stream) else options_of(factory)),
        "schedule_options": ("schedule", options_of(resolve("schedules", schedule), ("num_tasks", "budget", "rng"))),
    }
    fields: list[Any] = []
    helps = _argument_help(RunConfig.__doc__ or "")
    for f in dataclasses.fields(RunConfig):
        if f.name in groups:
            name, kind = groups[f.name]
            # no default: an instance would have filled in what its other options decide about, such as a preset
            fields.append((f.name, Annotated[kind, tyro.conf.arg(name=name)]))
        elif f.name == "method":
            kind = Annotated[str, tyro.conf.arg(help=helps[f.name] + " Several: er,ewc")]
            fields.append((f.name, kind, dataclasses.field(default="")))
        elif f.name == "stream":
            fields.append((f.name, Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=helps[f.name])]))
        else:
            kind = Annotated[_type_of(RunConfig, f.name), tyro.conf.arg(help=helps.get(f.name, ""))]
            fields.append((f.name, kind) if f.name == "agent" else (f.name, kind, dataclasses.field(default=f.default)))
    fields += [
        ("out", Annotated[Path | None, tyro.conf.arg(help="run directory (default: runs/STREAM/AGENT/seed-N)")], None),
        ("overwrite", Annotated[bool, tyro.conf.arg(help="start again, deleting what is in the run directory")], False),
        ("report", Annotated[bool, tyro.conf.arg(help="write report.html into the run directory")], True),
    ]
    return dataclasses.make_dataclass("Run", fields, kw_only=True)


def _type_of(cls: type, name: str) -> Any:
    import typing

    return typing.get_type_hints(cls)[name]


def _argument_help(docstring: str) -> dict[str, str]:
    """The texts of a Google-style ``Args:`` section, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Args:")[2].splitlines():
        head, colon, text = line.strip().partition(": ")
        if colon and line.startswith(" " * 8) and not line.startswith(" " * 9) and head.isidentifier():
            name, found[head] = head, text
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {k: v.replace("``", "") for k, v in found.items()}


@contextmanager
def _progress(resolved: Any) -> Iterator[Callable[..., None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(p.budget for p in resolved.stream.phases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[scores]}"))  # fmt: skip
    config = resolved.config
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{config.stream} · {config.label} · seed {config.seed}", total=total, scores="")

        def show(position: Any, metrics: Any, scores: Any) -> None:
            mean = f"mean score {sum(scores.values()) / len(scores):.2f}" if scores else ""
            bar.update(task, completed=position.step, scores=mean)

        yield show


def _print_result(result: Any) -> None:
    results = result.results
    agent = "+".join([results["agent"], *results.get("method", [])])
    print(f"{results['stream']} · {agent} · seed {results['seed']} · {results['status']} · {result.path}")
    for name, value in results["metrics"].items():
        if isinstance(value, int | float):
            print(f"  {name:<24} {value: .4f}")
        elif name == "forward_transfer":
            print(f"  {name:<24}  not shown: it is defined against single-task reference runs; add --references")


# -- report, list, check, bench ------------------------------------------------------------------------------------------


def _report(arguments: Arguments) -> int:
    import tyro

    kind = dataclasses.make_dataclass(
        "Report",
        [
            (
                "runs",
                Annotated[
                    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help="run directories, or folders of them")
                ],
            ),
            (
                "out",
                Annotated[Path | None, tyro.conf.arg(help="the page (default: report.html in the first folder)")],
                None,
            ),
        ],
    )
    parsed = _parse(kind, arguments, "clbench report", "One self-contained HTML page over any number of runs.")
    from clbench.report import find_runs, report_markdown, write_report

    if not parsed.runs:
        raise ConfigError("Say which runs to report: clbench report runs/")
    runs = find_runs(parsed.runs)
    if not runs:
        raise ConfigError(
            f"No runs found below {', '.join(map(str, parsed.runs))}; a run directory holds config.json and eval.csv."
        )
    out = parsed.out or (parsed.runs[0] / "report.html")
    print(report_markdown(runs))
    print(f"Report: {write_report(runs, out)}")
    return 0


def _list(arguments: Arguments) -> int:
    from clbench.registry import KINDS, entries

    if any(a in ("-h", "--help") for a in arguments):
        print(f"usage: clbench list [{' | '.join(KINDS)}] [--json]")
        return 0
    as_json = "--json" in arguments
    names = [a for a in arguments if a != "--json"]
    for name in names:
        if name not in KINDS:
            raise unknown_name("kind of plug-in", name, KINDS)
    listing = {
        kind: [{"name": e.name, "summary": e.summary} for e in sorted(entries(kind).values(), key=lambda e: e.name)]
        for kind in names or KINDS
    }
    if as_json:
        print(json.dumps(listing, indent=1))
        return 0
    for kind, found in listing.items():
        print(f"{kind}:" if found else f"{kind}: none yet")
        for entry in found:
            print(f"  {entry['name']:<22} {entry['summary']}")
    return 0


def _check(arguments: Arguments) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: clbench check PLUGIN\n\nRuns the conformance suite on module:Class or a registered name.")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    from clbench.testing import run_check

    report = run_check(arguments[0])
    print(report)
    return 0 if report.ok else 1


def _bench(arguments: Arguments) -> int:
    if not arguments or arguments[0] not in BENCHMARKS:
        if arguments and not arguments[0].startswith("-"):
            raise unknown_name("benchmark", arguments[0], BENCHMARKS)
        print(f"usage: clbench bench ({' | '.join(BENCHMARKS)}) [--json] [OPTIONS]")
        return 0 if arguments else 2
    return BENCHMARKS[arguments[0]](arguments[1:])


def _bench_envs(arguments: Arguments) -> int:
    kind = dataclasses.make_dataclass(
        "Bench", [("json", bool, False), ("num_envs", int, 4096), ("device", str, "cpu"), ("quick", bool, False)]
    )
    parsed = _parse(kind, arguments, "clbench bench envs", "Environment speed beside the memory-bandwidth limit.")
    from clbench.bench.envs import bench_envs
    from clbench.experiments import check_device

    check_device(parsed.device)
    rows = bench_envs(num_envs=parsed.num_envs, device=parsed.device, quick=parsed.quick)
    if parsed.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        speed = f"{row['value']:>14,.0f} {row['unit']:<10}"
        print(f"{row['name']:<44} {row['device']:<8} {speed} {row['ratio_to_limit']:>8.2f} x limit")
    return 0


def _bench_options(function: Callable[..., Any], several: Sequence[str], arguments: Arguments, summary: str) -> Any:
    """The parameters of a benchmark as options, with ``json``; ``several`` take more than one name, also as ``--name``."""
    import inspect

    import tyro

    helps = _argument_help(function.__doc__ or "")
    fields: list[Any] = [("json", Annotated[bool, tyro.conf.arg(help="print a list of rows")], False)]
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if name != "note":
            option = tyro.conf.arg(help=helps[name], aliases=[f"--{name[:-1]}"] if name in several else None)
            kind = Annotated[tuple[str, ...] if name in several else parameter.annotation, option]
            fields.append((name, kind, dataclasses.field(default=parameter.default)))
    prog = "clbench bench " + function.__name__.removeprefix("bench_")
    return _parse(dataclasses.make_dataclass("Bench", fields), arguments, prog, summary)


def _measured(function: Callable[..., Any], parsed: Any) -> list[dict[str, Any]]:
    from clbench.experiments import check_device

    check_device(parsed.device)
    options = {f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed) if f.name != "json"}
    rows = function(**options, note=_say)
    if parsed.json:
        print(json.dumps(rows, indent=1))
    return rows


def _bench_rollouts(arguments: Arguments) -> int:
    from clbench.bench.rollouts import bench_rollouts

    summary = "Planning speed beside the matrix-multiplication limit."
    parsed = _bench_options(bench_rollouts, ("cases", "planners"), arguments, summary)
    rows = _measured(bench_rollouts, parsed)
    if parsed.json:
        return 0
    print(f"{'':<64} {'ms / plan':>10} {'x limit':>8} {'cost':>8} {'MiB':>8}")
    for row in rows:
        cost = "" if row["plan_cost"] is None else f"{row['plan_cost']:.4g}"
        memory = f"{row['peak_extra_bytes'] / 2**20:.1f}"
        print(f"{row['name']:<64} {row['value'] * 1e3:>10.1f} {row['ratio_to_limit']:>8.2f} {cost:>8} {memory:>8}")
    return 0


def _bench_updates(arguments: Arguments) -> int:
    from clbench.bench.updates import bench_updates

    summary = "Gradient updates per second of the offline agents, beside loops written by hand."
    parsed = _bench_options(bench_updates, ("agents",), arguments, summary)
    rows = _measured(bench_updates, parsed)
    if parsed.json:
        return 0
    print(f"{'':<48} {'updates/s':>10} {'x limit':>8}")
    for row in rows:
        ratio = "" if row["ratio_to_limit"] is None else f"{row['ratio_to_limit']:.2f}"
        print(f"{row['name']:<48} {row['value']:>10.1f} {ratio:>8}")
    return 0


BENCHMARKS: dict[str, Callable[[Arguments], int]] = {
    "envs": _bench_envs,
    "rollouts": _bench_rollouts,
    "updates": _bench_updates,
}


def _compare(arguments: Arguments) -> int:
    from clbench.cli.compare import compare

    return compare(arguments, _parse)


def _data(arguments: Arguments) -> int:
    from clbench.cli.data import data

    return data(arguments, _parse)


def _verify(arguments: Arguments) -> int:
    from clbench.cli.verify import verify

    return verify(arguments, _parse)


VERBS: dict[str, Callable[[Arguments], int]] = {
    "run": _run,
    "compare": _compare,
    "data": _data,
    "report": _report,
    "list": _list,
    "verify": _verify,
    "check": _check,
    "bench": _bench,
}


if __name__ == "__main__":
    main()
