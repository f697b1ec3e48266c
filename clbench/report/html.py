"""The HTML report: one file, no scripts, no network. Style sheet, charts and pictures are inside it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import clbench
from clbench.errors import ConfigError
from clbench.metrics.statistics import Interval
from clbench.records import write_bytes
from clbench.registry import entries
from clbench.report.elements import (
    bytes_text,
    caption,
    count_text,
    document,
    figure,
    interval_cell,
    plural,
    seconds_text,
    table,
    tag,
)
from clbench.report.runs import BrokenRun, Group, Run, group_runs, load_run
from clbench.report.summary import (
    LOWER_IS_BETTER,
    MAIN,
    MORE,
    TITLES,
    Comparison,
    boundaries,
    comparisons,
    final_iqm,
    mean_curves,
    mean_matrix,
    metric_interval,
    online_interval,
    same_phases,
    task_curves,
    training_bands,
)
from clbench.report.svg import Line, line_chart, short_number, y_range

COLORS = 8
FEW_SEEDS = 5
PICTURE_BYTES = 4_000_000


def write_report(run_dirs: Sequence[Path | str], out: Path | str, *, baseline: str | None = None) -> Path:
    """Write one self-contained HTML page about the given run directories.

    Args:
        run_dirs: run directories (see :func:`clbench.report.find_runs`).
        out: the file to write, or an existing folder to put ``report.html`` in.
        baseline: agent that the others are compared with (default: all pairs of up to four agents).

    Returns:
        The path of the file.

    Raises:
        ConfigError: no run directories, or the file cannot be written.
        UnknownNameError: ``baseline`` ran nowhere.
    """
    if not run_dirs:
        raise ConfigError("There are no runs to report on; give folders that hold run directories (see clbench run).")
    out = Path(out)
    out = out / "report.html" if out.is_dir() else out
    out.parent.mkdir(parents=True, exist_ok=True)
    loaded = [load_run(Path(p)) for p in run_dirs]
    groups = group_runs([r for r in loaded if isinstance(r, Run)])
    broken = [r for r in loaded if isinstance(r, BrokenRun)]
    write_bytes(out, page(groups, broken, baseline).encode())
    return out


def _metric_title(metric: str) -> str:
    direction = "lower is better" if metric in LOWER_IS_BETTER else "higher is better"
    return f'{TITLES[metric]}<br><span class="direction">{direction}</span>'


# -- the page ------------------------------------------------------------------------------------------------------------


def page(groups: Sequence[Group], broken: Sequence[BrokenRun], baseline: str | None = None) -> str:
    """The whole document."""
    complete = sum(len(runs) for g in groups for runs in g.agents.values())
    others = sum(len(runs) for g in groups for runs in g.excluded.values())
    lead = [plural(complete, "complete run")]
    lead += [f"{others} not finished"] if others else []
    lead += [f"{len(broken)} unreadable"] if broken else []
    sections = "".join(_section(g, i, baseline) for i, g in enumerate(groups))
    body = (
        f'<h1>Benchmark report</h1><p class="lead">{", ".join(lead)}. Scores run from 0 (floor) to 1 (perfect). '
        "Metrics are recomputed from the raw evaluation logs; intervals are 95 % bootstrap intervals over seeds.</p>"
        f"{_contents(groups) if len(groups) > 1 else ''}{_excluded(groups, broken)}{sections}"
        f"<footer>Written by clbench {escape(clbench.__version__)}. Formulas and sources of all metrics: docs/metrics.md."
        "</footer>"
    )
    return document("Benchmark report", body)


def _contents(groups: Sequence[Group]) -> str:
    items = "".join(
        f'<li><a href="#group-{i}">{escape(g.title)}</a> <span class="note">{escape(", ".join(g.labels))}</span></li>'
        for i, g in enumerate(groups)
    )
    return f"<nav><ul>{items}</ul></nav>"


def _excluded(groups: Sequence[Group], broken: Sequence[BrokenRun]) -> str:
    rows = [(escape(str(b.path)), "unreadable", escape(b.problem)) for b in broken]
    for group in groups:
        for label, runs in group.excluded.items():
            rows += [(escape(str(r.path)), f"{escape(label)}, seed {r.seed}", escape(r.problem or "")) for r in runs]
        rows += [
            (escape(str(r.path)), f"{escape(r.agent)}, seed {r.seed}", "another run of this agent and seed is counted")
            for r in group.duplicates
        ]
    if not rows:
        return ""
    return (
        "<h3>Runs that are not averaged</h3>"
        + table(("Run directory", "What", "Why"), rows, text_columns=(1, 2))
        + caption("Runs that did not finish are counted as failures in the tables of their agent.")
    )


def _section(group: Group, index: int, baseline: str | None) -> str:
    parts = [f'<h2 id="group-{index}">{escape(group.title)}</h2>', _description(group)]
    if group.agents:
        few = [label for label, runs in group.agents.items() if len(runs) < FEW_SEEDS]
        if few:
            parts.append(
                f'<p class="warn">Fewer than {FEW_SEEDS} seeds for {escape(", ".join(few))}: intervals from so few runs '
                "are too narrow, so take them as a hint and not as evidence.</p>"
            )
        parts += [_metrics(group), _paired(group, baseline), _curves(group), _matrices(group), _costs(group)]
    parts += [_pictures(group), _provenance(group)]
    return f"<section>{''.join(parts)}</section>"


# -- what was run --------------------------------------------------------------------------------------------------------


def _description(group: Group) -> str:
    run, key = group.runs[0], group.key
    known = entries("streams").get(key["stream"])
    summary = (
        f"{escape(known.summary[0].upper() + known.summary[1:].rstrip('.'))}. "
        if known is not None and known.summary
        else ""
    )
    unit = str(key["unit"]).replace("_", " ")
    cadence = key["eval_every"]
    told = {"task_id": "the task's identity", "boundaries": "when the task changes", "nothing": "nothing"}
    evaluated = (
        f"every {count_text(cadence)} {unit} within a phase" if cadence else "at the end of each phase"
        if cadence == 0 else "ten times per phase"
    )  # fmt: skip
    text = (
        f"{summary}{plural(len(group.tasks), 'task')}, {plural(len(run.phases), 'phase')}, "
        f"{count_text(key['budget'])} {unit} in all; evaluated {evaluated}. "
        f"The agent is told {told.get(str(key['reveals']), str(key['reveals']))}."
    )
    options = {k: key[k] for k in ("stream_options", "schedule_options") if key[k]}
    if options:
        text += f" Options: <code>{escape(json.dumps(options))}</code>."
    missing = sorted({t for r in group.runs for t in r.unvisited})
    if missing:
        text += f" Not trained by every run, and left out of its metrics: {escape(', '.join(missing))}."
    return f"<p>{text}</p>{_task_table(group)}"


def _task_table(group: Group) -> str:
    run = group.runs[0]
    if not run.stream.get("tasks"):
        return ""
    rows = []
    for task in run.stream["tasks"]:
        metric = task.get("metric", {})
        score = metric.get("kind", "")
        score += f" {metric.get('low'):g} to {metric.get('high'):g}" if score == "return" else ""
        kwargs = {**task.get("env_kwargs", {})}
        rows.append(
            (
                escape(task["name"]),
                f"<code>{escape(task['env_id'])}</code>",
                f"<code>{escape(_shorten(', '.join(f'{k}={v}' for k, v in kwargs.items())))}</code>",
                escape(score),
                str(len(task["evaluation"]["seeds"])),
            )
        )
    listing = table(("Task", "Environment", "Parameters", "Score", "Episodes"), rows, text_columns=(1, 2, 3))
    return f"<details><summary>Tasks</summary>{listing}</details>"


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


# -- metrics -------------------------------------------------------------------------------------------------------------


def _metrics(group: Group) -> str:
    main = [m for m in MAIN if group.key["protocol"] == "sequential" or _defined(group, m)]
    rows = []
    for label in group.labels:
        cells = [_metric_cell(group, label, m) for m in main]
        rows.append((escape(label), _runs_cell(group, label), interval_cell(final_iqm(group, label)), *cells))
    header = ("Agent", "Runs", "Final score, IQM<br><span class='direction'>higher is better</span>",
              *(_metric_title(m) for m in main))  # fmt: skip
    text = caption(
        "Mean over seeds with the 95 % percentile-bootstrap interval (whole runs are resampled, 2000 times). IQM: mean of "
        f"the middle half of all run-task pairs. {escape(_transfer_note(group))}"
    )
    return f"<h3>Metrics</h3>{table(header, rows)}{text}{_more_metrics(group)}{_online(group)}"


def _metric_cell(group: Group, label: str, metric: str) -> str:
    interval = metric_interval(group, label, metric)
    reasons = [r.no_transfer for r in group.agents.get(label, ()) if r.no_transfer]
    if metric == "forward_transfer" and interval.value is None and reasons:
        why = "no reference runs" if reasons[0].startswith("Forward transfer needs") else "not defined"
        return f'<td class="empty" title="{escape(reasons[0])}">\N{EN DASH}<span class="ci">{why}</span></td>'
    return interval_cell(interval, len(group.agents.get(label, ())))


def _defined(group: Group, metric: str) -> bool:
    return any(run.metrics[metric] is not None for runs in group.agents.values() for run in runs)


def _more_metrics(group: Group) -> str:
    more = [m for m in MORE if _defined(group, m)]
    if not more:
        return ""
    rows = [(escape(label), *(_metric_cell(group, label, m) for m in more)) for label in group.labels]
    values = table(("Agent", *(_metric_title(m) for m in more)), rows)
    return f"<details><summary>More metrics</summary>{values}</details>"


def _online(group: Group) -> str:
    """Accuracy while learning, where agents report it."""
    if not any(run.online for runs in group.agents.values() for run in runs):
        return ""
    keys, k = ("accuracy", "loss_of_plasticity"), max(1, len(group.runs[0].phases) // 4)
    rows = [
        (
            escape(label),
            *(interval_cell(online_interval(group, label, key), len(group.agents.get(label, ()))) for key in keys),
        )
        for label in group.labels
    ]
    return table(("Agent", "Online accuracy", "Loss of plasticity"), rows) + caption(
        "Online accuracy: predictions made before the update on each training sample, all of them. Loss of plasticity: the "
        f"same in the first {plural(k, 'phase')} minus that in the last {k}; it has a meaning where tasks are exchangeable."
    )


def _runs_cell(group: Group, label: str) -> str:
    failures = len(group.excluded.get(label, ()))
    n = len(group.agents.get(label, ()))
    return f"<td>{n}{f'<span class=ci>{failures} failed</span>' if failures else ''}</td>"


def _transfer_note(group: Group) -> str:
    """Why forward transfer is empty, where it is."""
    reasons = sorted({r.no_transfer for runs in group.agents.values() for r in runs if r.no_transfer})
    if not reasons or group.key["protocol"] != "sequential":
        return ""
    if reasons[0].startswith("Forward transfer needs"):
        return f"{reasons[0]} Runs made with references switched on have them."
    return f"Forward transfer is empty: {reasons[0]}"


# -- paired differences --------------------------------------------------------------------------------------------------


def _paired(group: Group, baseline: str | None) -> str:
    if len(group.agents) < 2:
        return ""
    found = comparisons(group, baseline if baseline in group.agents else None)
    shown = [m for m in MAIN if any(m in c.differences for c in found)]
    rows = [_comparison_row(c, shown) for c in found if c.seeds]
    if not rows:
        return "<h3>Paired differences</h3><p class='note'>No two agents share a seed, so there is nothing to pair.</p>"
    left_out = sorted({s for c in found for s in c.left_out})
    note = f" Left out for want of a partner: seed {', '.join(map(str, left_out))}." if left_out else ""
    header = ("Difference", "Seeds", "P(better final score)", *(TITLES[m] for m in shown))
    return f"<h3>Paired differences</h3>{table(header, rows)}" + caption(
        "First agent minus second on the same seeds (the same tasks, data and evaluation episodes), mean and 95 % "
        "interval. One that excludes 0 is a difference these seeds can tell. The probability is over pairs of runs, "
        f"averaged over tasks, ties counted half.{note}"
    )


def _comparison_row(c: Comparison, shown: Sequence[str]) -> tuple[str, ...]:
    empty = Interval(None, None, None, 0)
    return (
        f"{escape(c.first)} \N{MINUS SIGN} {escape(c.second)}",
        str(len(c.seeds)),
        "\N{EN DASH}" if c.improvement is None else f"{c.improvement:.2f}",
        *(interval_cell(c.differences.get(m, empty), len(c.seeds)) for m in shown),
    )


# -- curves and matrices -------------------------------------------------------------------------------------------------


def _curves(group: Group) -> str:
    runs = [run for members in group.agents.values() for run in members]
    color = {label: i % COLORS for i, label in enumerate(group.labels)}
    x_max = max(int(run.log.step.max()) for run in runs)
    ends = boundaries(runs[0])[:-1] if same_phases(runs) else []
    per_task = {
        task: [Line(label, color[label], task_curves(rs, task)) for label, rs in group.agents.items()]
        for task in group.tasks
    }
    y = y_range([line for lines in per_task.values() for line in lines])
    charts = [
        figure(
            task,
            line_chart(
                lines, x_max=x_max, y=y, bands=training_bands(runs, task), boundaries=ends, name=f"Score on {task}"
            ),
        )
        for task, lines in per_task.items()
    ]
    average = ""
    if len(group.tasks) > 1 and group.key["protocol"] != "independent":
        lines = [Line(label, color[label], mean_curves(rs)) for label, rs in group.agents.items()]
        chart = line_chart(lines, x_max=x_max, y=y, boundaries=ends, width=1120, height=210, name="Mean over all tasks")
        average = figure("Mean over all tasks", chart, class_="wide")
    legend = "".join(
        f'<span class="s{color[label]}"><i class="swatch"></i>{escape(label)}</span>' for label in group.agents
    )
    band = '<span><i class="swatch band"></i>task in training</span>'
    unit = str(group.key["unit"]).replace("_", " ")
    shade = (
        "Dashed lines are phase boundaries." if same_phases(runs)
        else "The order of tasks differs between seeds: the darker the shade, the more seeds train the task then."
    )  # fmt: skip
    return (
        f'<h3>Learning curves</h3><div class="legend">{legend}{band}</div>{average}'
        f'<div class="charts">{"".join(charts)}</div>'
        + caption(
            f"Score against {unit} since the start ({short_number(x_max)} in all): mean over seeds, with the pointwise "
            f"95 % interval. {shade} Where the seeds were evaluated at different times, each is a line of its own."
        )
    )


def _matrices(group: Group) -> str:
    figures = []
    for label, runs in group.agents.items():
        shared = same_phases(runs)
        shown = runs if shared else runs[:1]
        note = (
            plural(len(runs), "seed")
            if shared
            else f"seed {runs[0].seed} only: the order of tasks differs between seeds"
        )
        title = f'{escape(label)} <span class="n">{note}</span>'
        heat = _heat_map(mean_matrix(shown), shown[0])
        figures.append(f"<figure><figcaption>{title}</figcaption><div style='overflow-x:auto'>{heat}</div></figure>")
    wide = " wide" if max(len(r.tasks) for runs in group.agents.values() for r in runs) > 8 else ""
    return f'<h3>Performance matrix</h3><div class="matrices{wide}">{"".join(figures)}</div>' + caption(
        "Row: after which phase (the first row is before any training); column: evaluated task; cell: mean score. "
        "Outlined: the task that the phase trained. A dash: not evaluated."
    )


def _heat_map(r: np.ndarray, run: Run) -> str:
    # what all names have in common is said once, in the corner; many columns get upright labels
    common = os.path.commonprefix(run.tasks) if len(run.tasks) > 1 else ""
    common = common[: common.rfind("-") + 1]
    upright = ' class="upright"' if len(run.tasks) > 6 and max(map(len, run.tasks)) - len(common) > 5 else ""
    head = tag("th", escape(common and f"{common}\N{HORIZONTAL ELLIPSIS}"), scope="col")
    head += "".join(f'<th scope="col"><span{upright}>{escape(t[len(common) :])}</span></th>' for t in run.tasks)
    rows = []
    for i, row in enumerate(r):
        trained = run.phases[i - 1].tasks if i else ()
        name = f"{i} {escape(', '.join(trained)) if len(trained) == 1 else 'all tasks'}" if i else "before"
        cells = "".join(_heat_cell(float(v), t in trained) for v, t in zip(row, run.tasks, strict=True))
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _heat_cell(value: float, trained: bool) -> str:
    outline = " trained" if trained else ""
    if np.isnan(value):
        return f'<td class="missing{outline}">\N{EN DASH}</td>'
    share = min(max(value, 0.0), 1.0) * 100
    strong = " strong" if share >= 55 else ""
    return f'<td class="{(strong + outline).strip()}" style="--v:{share:.0f}">{value:.2f}</td>'.replace(' class=""', "")


# -- costs, pictures, provenance -----------------------------------------------------------------------------------------

_COST_TITLES = {"env_steps": "Env steps", "updates": "Updates", "samples": "Samples", "parameters": "Parameters",
                "state_bytes": "State size", "evaluation_episodes": "Evaluation episodes"}  # fmt: skip


def _costs(group: Group) -> str:
    runs = [run for members in group.agents.values() for run in members]
    counts = list(dict.fromkeys([*_COST_TITLES, *(k for r in runs for k in r.cost)]))
    times = list(dict.fromkeys(k for r in runs for k in r.timing.get("wall_time_s", {})))
    counted = [(k, _COST_TITLES.get(k, k), lambda r, k=k: r.cost.get(k)) for k in counts]
    measured = [(f"time {k}", _time_title(k), lambda r, k=k: r.timing.get("wall_time_s", {}).get(k)) for k in times]
    measured += [("peak_memory_bytes", "Peak memory", lambda r: r.timing.get("peak_memory_bytes"))]
    return (
        f"<h3>Costs</h3>{_cost_table(group, counted)}{caption('Exact counts, mean per run.')}"
        f"{_cost_table(group, measured)}{caption('Measured, mean per run: compare only on the same, idle machine.')}"
    )


def _cost_table(group: Group, columns: Sequence[tuple[str, str, Callable[[Run], Any]]]) -> str:
    """A quantity that no run knows gets no column; one that some runs lack is a dash in theirs."""
    runs = [run for members in group.agents.values() for run in members]
    known = [c for c in columns if any(_is_number(c[2](r)) for r in runs)]
    rows = [
        (escape(label), *(_cost_cell(key, [get(r) for r in members]) for key, _, get in known))
        for label, members in group.agents.items()
    ]
    return table(("Agent", *(escape(title) for _, title, _ in known)), rows)


def _time_title(key: str) -> str:
    return "Wall time" if key == "total" else f"{key.replace('_', ' ').capitalize()} time"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cost_cell(key: str, values: Sequence[Any]) -> str:
    if not all(_is_number(v) for v in values):
        return '<td class="empty">\N{EN DASH}</td>'
    value = float(np.mean(values))
    if key.startswith("time "):
        return seconds_text(value)
    return bytes_text(value) if key.endswith("_bytes") else count_text(value)


def _pictures(group: Group) -> str:
    parts = []
    if figures := _picture_figures(group, "rollout.png", "Episodes"):
        parts.append(f'<h3>Episodes</h3><div class="pictures">{figures}</div>')
    if figures := _picture_figures(group, "planning.png", "Planning"):
        text = caption(
            "Maps: mean squared latent distance of every free position (at rest) to the goal of episode 1 at its "
            "start, and the length of the shortest path over the grid; dark is near; their Spearman correlation. "
            "Episodes: the executed path (black), and plans made at the marked places (from dark, the first, to "
            "light). A latent of a plan is drawn at the position of the grid whose encoded observation is nearest "
            "to it. Strip: the observation at that position for steps of the first plan of episode 1, above what "
            "happened at those steps, with planning anew on the way."
        )
        parts.append(f'<h3>Planning</h3><div class="pictures wide">{figures}</div>{text}')
    return "".join(parts)


def _picture_figures(group: Group, name: str, what: str) -> str:
    """The picture of that name of each agent's first run that has one."""
    figures = []
    for label, runs in group.agents.items():
        picture = next((r for r in runs if (r.path / name).exists()), None)
        if picture is None or (picture.path / name).stat().st_size > PICTURE_BYTES:
            continue
        data = base64.b64encode((picture.path / name).read_bytes()).decode()
        image = f'<img alt="{what} of {escape(label)}" src="data:image/png;base64,{data}">'
        title = f'{escape(label)} <span class="n">seed {picture.seed}</span>'
        figures.append(f"<figure><figcaption>{title}</figcaption>{image}</figure>")
    return "".join(figures)


def _provenance(group: Group) -> str:
    keys = list(dict.fromkeys(k for r in group.runs for k in r.provenance))
    rows = [(escape(k), escape(_values(str(r.provenance.get(k)) for r in group.runs))) for k in keys]
    settings = [
        (escape(k), f"<code>{escape(_shorten(_values(json.dumps(r.config.get(k)) for r in group.runs), 400))}</code>")
        for k in sorted({k for r in group.runs for k in r.config} - {"agent", "seed", *OPTIONS, "method"})
    ]
    options = [
        (escape(label), f"<code>{escape(json.dumps(_options(members[0])))}</code>",
         escape(_values(str(r.seed) for r in members)))
        for label in group.labels
        for members in [(*group.agents.get(label, ()), *group.excluded.get(label, ()))]
    ]  # fmt: skip
    commands = "\n".join(sorted(_command(r) for r in group.runs))
    return (
        "<details><summary>Settings, versions, commands</summary>"
        + table(("Agent", "Options", "Seeds"), options, text_columns=(1, 2))
        + "<h3>Settings</h3>" + table(("Setting", "Value"), settings, text_columns=(1,))
        + "<h3>Versions and hardware</h3>" + table(("", "Value"), rows, text_columns=(1,))
        + f"<h3>Commands</h3><pre>{escape(commands)}</pre></details>"
    )  # fmt: skip


OPTIONS = ("agent_options", "method_options")


def _options(run: Run) -> dict[str, Any]:
    """Of the agent and, by method, of its methods."""
    return {k: v for name in OPTIONS for k, v in dict(run.config.get(name) or {}).items()}


def _values(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _command(run: Run) -> str:
    """The command of the run, without agent options that have their default or not (they are in the table above)."""
    config: Mapping[str, Any] = run.config
    text = f"clbench run {config['stream']} --agent {config['agent']}"
    text += f" --method {','.join(config['method'])}" if config.get("method") else ""
    text += f" --seed {run.seed}"
    for key, default in (
        ("schedule", "sequential"),
        ("protocol", "sequential"),
        ("budget", None),
        ("eval_every", None),
    ):
        if config.get(key, default) != default:
            text += f" --{key.replace('_', '-')} {config[key]}"
    return text
