"""Pages of a comparison, from the content of its ``comparison.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

import clbench
from clbench.metrics.statistics import Interval
from clbench.records import write_bytes
from clbench.report.elements import (
    bytes_text,
    caption,
    count_text,
    document,
    figure,
    interval_cell,
    number,
    plural,
    seconds_text,
    table,
    tag,
)
from clbench.report.markdown import interval_text
from clbench.report.summary import Curve
from clbench.report.svg import Line, line_chart, short_number

Content = Mapping[str, Any]
COLORS = 8
FEW_SEEDS = 5
MANY_DATASETS = 3  # with more, the paired differences of each are folded
STYLES = {"oracle": 0, "straight-line": 1, "random": 2}  # of the reference lines
AXES = {
    "size": ("Data-set size", "transitions", short_number),
    "length": ("Trajectory length", "states per trajectory", short_number),
    "mix": ("Noise mix", "share of good trajectories, the others are of the random policy", lambda v: f"{100 * v:g} %"),
    "layouts": ("Number of layouts", "maze layouts in the data", short_number),
    "edit distance": ("Edit distance of the layout", "cells that differ from the nearest layout of the data", short_number),
}  # fmt: skip


# -- text ----------------------------------------------------------------------------------------------------------------


def comparison_text(content: Content) -> str:
    """Success of every agent on every data set, and over all of them, as Markdown for terminals and documents."""
    agents, lines = content["agents"], _reference_names(content)
    rows = [("data set", *agents, *lines)]
    for dataset in content["datasets"]:
        of_agent, of_line = _agents_of(content, dataset), _lines_of(content, dataset)
        cells = [_text_cell(of_agent[a]) for a in agents]
        rows.append((dataset, *cells, *(f"{of_line[n]['success']:.2f}" if n in of_line else "-" for n in lines)))
    if len(content["datasets"]) > 1:
        overall = content["statistics"]["overall"]["agents"]
        rows.append(("IQM", *(_text_cell(overall[a].get("iqm")) for a in agents), *("" for _ in lines)))
    return f"{scale_text(content)}\n\n{_markdown(rows)}"


def _text_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    text, failed = interval_text(interval_of(found)), found["failures"]
    return text + (f" ({failed} of {found['n'] + failed} failed)" if failed else "")


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def scale_text(content: Content) -> str:
    """What the numbers were measured at: it belongs to every table."""
    settings, cells = content["settings"], content["cells"]
    parts = [f"Scale {content['scale']}"]
    seen = sorted({str(c["observation"]) for c in cells if c["observation"]})
    parts += [f"observations: {', '.join(seen)}"] if seen else []
    presets = sorted({c["preset"] for c in cells if c["preset"]})
    parts += [f"preset {', '.join(presets)}"] if presets else []
    budgets = {a: f"{settings['budgets'][a]} {settings['units'][a].replace('_', ' ')}" for a in content["agents"]}
    same = len(set(budgets.values())) == 1
    parts.append(next(iter(budgets.values())) if same else ", ".join(f"{a} {b}" for a, b in budgets.items()))
    episodes = sorted({c["episodes"] for c in cells if c["episodes"]})
    parts += [f"{' to '.join(map(str, {episodes[0]: 0, episodes[-1]: 0}))} frozen episodes"] if episodes else []
    return f"{'; '.join(parts)}; seeds {', '.join(map(str, content['seeds']))}."


def interval_of(found: Mapping[str, Any]) -> Interval:
    return Interval(found["value"], found["low"], found["high"], found["n"], found["failures"])


def _agents_of(content: Content, dataset: str) -> Mapping[str, Any]:
    return content["statistics"]["datasets"][dataset]["agents"]


def _lines_of(content: Content, dataset: str) -> Mapping[str, Any]:
    return content["references"].get(dataset, {}).get("lines", {})


def _reference_names(content: Content) -> list[str]:
    """The reference lines that are no agents of the comparison too, the best first."""
    found = {name for dataset in content["datasets"] for name in _lines_of(content, dataset)}
    return [name for name in STYLES if name in found - set(content["agents"])]


# -- the page ------------------------------------------------------------------------------------------------------------


def write_comparison(content: Content, out: Path) -> Path:
    """The report of a comparison: one self-contained HTML page."""
    write_bytes(out, page(content).encode())
    return out


def page(content: Content) -> str:
    """The whole document."""
    complete = sum(c["status"] == "complete" for c in content["cells"])
    without = len(content["cells"]) - complete
    lead = [plural(len(content["datasets"]), "data set"), plural(len(content["agents"]), "agent"),
            plural(len(content["seeds"]), "seed"), plural(complete, "complete run")]  # fmt: skip
    lead += [f"{without} without a result"] if without else []
    few = (
        f'<p class="warn">Fewer than {FEW_SEEDS} seeds: intervals over so few runs are too narrow, so take them as a hint '
        "and not as evidence.</p>" if len(content["seeds"]) < FEW_SEEDS else ""
    )  # fmt: skip
    sections = (_success, _figures, _overall, _differences, _costs, _failed, _settings)
    body = (
        f'<h1>Comparison</h1><p class="lead">{", ".join(lead)}. Success runs from 0 to 1 on frozen episodes that are the '
        "same for all agents.</p>"
        f"<p>{escape(scale_text(content))}</p>{few}{''.join(section(content) for section in sections)}"
        f"<footer>Written by clbench {escape(clbench.__version__)}. How the numbers are made: docs/compare.md.</footer>"
    )
    return document("Comparison", body)


def _note(content: Content, text: str) -> str:
    return caption(f"{text} {escape(scale_text(content))}")


def _success(content: Content) -> str:
    agents, lines = content["agents"], _reference_names(content)
    rows = []
    for dataset in content["datasets"]:
        of_agent, of_line = _agents_of(content, dataset), _lines_of(content, dataset)
        cells = [_success_cell(of_agent[a]) for a in agents]
        cells += [number(of_line[n]["success"]) if n in of_line else _EMPTY for n in lines]
        rows.append((escape(dataset), *cells))
    header = (
        "Data set",
        *map(escape, agents),
        *(f"{escape(n)}<br><span class='direction'>reference</span>" for n in lines),
    )
    text = (
        "Mean success over runs with the 95 % bootstrap interval (whole runs are resampled). Runs without a result are "
        f"counted, not averaged. {_reference_text(content)}"
    )
    return f"<h2>Success</h2>{table(header, rows)}{_note(content, text)}"


_EMPTY = '<td class="empty">\N{EN DASH}</td>'


def _success_cell(found: Mapping[str, Any]) -> str:
    cell, failed = interval_cell(interval_of(found)), found["failures"]
    if not failed:
        return cell
    counted = tag("span", f"{failed} of {found['n'] + failed} failed", class_="ci")
    return cell.replace("</td>", f"{counted}</td>")


def _reference_text(content: Content) -> str:
    text = (
        "References: oracle and straight-line are controllers that know the state of the environment (the oracle its map "
        "too), random draws actions uniformly; each is evaluated once on the same episodes."
    )
    absent = {n: why for r in content["references"].values() for n, why in r["absent"].items()}
    return text + "".join(f" Left out: {escape(n)} ({escape(why)})." for n, why in sorted(absent.items()))


# -- charts --------------------------------------------------------------------------------------------------------------


def _legend(content: Content, references: Sequence[str] = ()) -> str:
    entries = [f's{i % COLORS}">' + _label(a) for i, a in enumerate(content["agents"])]
    entries += [f'reference d{STYLES[n]}">' + _label(n) for n in references]
    return tag("div", "".join(f'<span class="{entry}</span>' for entry in entries), class_="legend")


def _label(name: str) -> str:
    return f'<i class="swatch"></i>{escape(name)}'


def _figures(content: Content) -> str:
    """The paper's figures: success along every axis that the data sets lie on."""
    charts = [_axis_chart(content, axis, places) for axis, places in content["axes"].items()]
    if not charts:
        return ""
    text = (
        "Mean success over runs at the values of the axis (which are not drawn to scale), shaded the 95 % interval. The "
        "axes are those of Sobal et al. 2025 (arXiv 2502.14819)."
    )
    legend = _legend(content, _reference_names(content))
    return f'<h2>Axes</h2>{legend}<div class="charts">{"".join(charts)}</div>{_note(content, text)}'


def _axis_chart(content: Content, axis: str, places: Mapping[str, float]) -> str:
    family, _, kind = axis.rpartition(": ")
    title, unit, text = AXES[kind]
    order = sorted(places, key=lambda d: places[d])
    lines = [
        Line(a, i % COLORS, _curve([_agents_of(content, d)[a] for d in order]), dots=True)
        for i, a in enumerate(content["agents"])
    ]
    lines += [
        Line(n, 0, _curve([_flat(_lines_of(content, d).get(n)) for d in order]), f"reference d{STYLES[n]}")
        for n in _reference_names(content)
    ]
    chart = line_chart(
        lines,
        x_max=len(order),
        y=(0.0, 1.0),
        name=f"Success against {title.lower()}",
        x_ticks=[(i + 0.5, text(places[d])) for i, d in enumerate(order)],
        height=230,
    )
    return figure(f"{family}: {title.lower()}", chart + caption(escape(f"{title}: {unit}.")))


def _flat(line: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"value": line and line["success"], "low": None, "high": None}


def _curve(found: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One curve through the places that have a value; an interval where all of these have one."""
    there = [(i + 0.5, f) for i, f in enumerate(found) if f["value"] is not None]
    if not there:
        return []
    whole = all(f["low"] is not None for _, f in there)
    column: Callable[[str], np.ndarray] = lambda key: np.array([f[key] for _, f in there])  # noqa: E731
    steps = np.array([i for i, _ in there])
    return [Curve(steps, column("value"), column("low") if whole else None, column("high") if whole else None)]


# -- over all data sets --------------------------------------------------------------------------------------------------


def _overall(content: Content) -> str:
    overall = content["statistics"]["overall"]
    rows = []
    for agent in content["agents"]:
        found = overall["agents"][agent]
        iqm = interval_cell(interval_of(found["iqm"])) if "iqm" in found else _EMPTY
        rows.append((escape(agent), ", ".join(map(str, found["seeds"])) or _EMPTY, iqm))
    wins = {(d["first"], d["second"]): d for d in overall["improvement"]}
    text = (
        "IQM: mean of the middle half of all (run, data set) pairs, of the seeds that have a result on every data set; "
        "whole seeds are resampled. Performance profile: share of these pairs with a success above the threshold, with the "
        "pointwise 95 % interval; a curve that lies above another everywhere is better everywhere."
    )
    listing = table(("Agent", "Seeds", "IQM of success"), rows, text_columns=(1,))
    return f"<h2>Over all data sets</h2>{listing}{_profile(content)}{_note(content, text)}{_improvement(content, wins)}"


def _profile(content: Content) -> str:
    overall = content["statistics"]["overall"]
    x = np.array(overall["thresholds"])
    lines = []
    for i, agent in enumerate(content["agents"]):
        found = overall["agents"][agent]
        if "profile" in found:
            low, high = (None if found[k] is None else np.array(found[k]) for k in ("profile_low", "profile_high"))
            lines.append(Line(agent, i % COLORS, [Curve(x, np.array(found["profile"]), low, high)]))
    if not lines:
        return ""
    chart = line_chart(lines, x_max=1.0, y=(0.0, 1.0), width=1120, height=240, name="Performance profile")
    return _legend(content) + figure("Share of (run, data set) pairs with a success above the threshold", chart, "wide")


def _improvement(content: Content, wins: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    agents = [a for a in content["agents"] if content["statistics"]["overall"]["agents"][a]["seeds"]]
    if len(agents) < 2:
        return ""

    def cell(row: str, column: str) -> str:
        if row == column:
            return _EMPTY
        found, turned = wins.get((row, column)), (row, column) not in wins
        found = wins[column, row] if found is None else found
        values = [found["probability"], found["low"], found["high"]]
        if turned:  # P(A > B) = 1 - P(B > A), as ties count half
            values = [None if v is None else 1 - v for v in (values[0], values[2], values[1])]
        p, low, high = values
        return f"<td>{p:.2f}{'' if low is None else tag('span', f'{low:.2f} to {high:.2f}', class_='ci')}</td>"

    rows = [(escape(a), *(cell(a, b) for b in agents)) for a in agents]
    text = (
        "Probability that a run of the agent of the row has a higher success than one of the agent of the column, averaged "
        "over data sets, ties count half; 95 % intervals, runs of both resampled."
    )
    return f"<h3>Probability of improvement</h3>{table(('', *map(escape, agents)), rows)}{_note(content, text)}"


# -- paired differences --------------------------------------------------------------------------------------------------


def _differences(content: Content) -> str:
    tables = [_difference_table(content, d) for d in content["datasets"]]
    if not any(tables):
        return ""
    text = (
        "First agent minus second. Both intervals are paired. Over seeds: differences of runs of the same seed, seeds "
        "resampled; it says whether other runs would differ alike. Over episodes: differences on the same frozen episode, "
        "episodes resampled, runs as they are; it says whether these runs would differ alike on other episodes. Bold: "
        "neither interval holds 0."
    )
    return f"<h2>Paired differences</h2>{''.join(tables)}{_note(content, text)}"


def _difference_table(content: Content, dataset: str) -> str:
    rows = []
    for d in content["statistics"]["datasets"][dataset]["differences"]:
        clear = all(
            low is not None and (low > 0 or high < 0)
            for low, high in ((d["low"], d["high"]), (d["episodes_low"], d["episodes_high"]))
        )
        value = number(d["value"])
        rows.append(
            (
                f"{escape(d['first'])} \N{MINUS SIGN} {escape(d['second'])}",
                f"<b>{value}</b>" if clear else value,
                _range(d["low"], d["high"]),
                _range(d["episodes_low"], d["episodes_high"]),
                ", ".join(map(str, d["seeds"])),
                str(d["episodes"]),
            )
        )
    if not rows:
        return ""
    header = ("Difference in success", "Mean", "95 % over seeds", "95 % over episodes", "Seeds", "Episodes")
    opened = " open" if len(content["datasets"]) <= MANY_DATASETS else ""
    return f"<details{opened}><summary>{escape(dataset)}</summary>{table(header, rows)}</details>"


def _range(low: float | None, high: float | None) -> str:
    return _EMPTY if low is None or high is None else f"{number(low)} to {number(high)}"


# -- costs, failures, settings -------------------------------------------------------------------------------------------

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "updates": ("Updates", count_text),
    "env_steps": ("Env steps", count_text),
    "samples": ("Samples", count_text),
    "parameters": ("Parameters", count_text),
    "training_s": ("Training", seconds_text),
    "evaluation_s": ("Evaluation", seconds_text),
    "wall_s": ("In all", seconds_text),
    "planning_ms_per_step": ("Planning per env step", lambda v: f"{v:.3g} ms"),
    "peak_memory_bytes": ("Peak memory", bytes_text),
}


def _costs(content: Content) -> str:
    measured = {(m["dataset"], m["agent"], m["seed"]): m for m in content["measured"]}
    complete = [
        {**measured[c["dataset"], c["agent"], c["seed"]], **c} for c in content["cells"] if c["status"] == "complete"
    ]
    rows = [
        (escape(a), *(_cost_cell([c[k] for c in complete if c["agent"] == a], text) for k, (_, text) in COSTS.items()))
        for a in content["agents"]
    ]
    text = (
        "Mean over the complete runs of all data sets. Times and memory are measured: compare them only between runs on "
        "the same machine with the same number of workers. Planning per env step: time in the agent's act divided by the "
        "steps of all evaluated episodes, which are played in parallel."
    )
    return f"<h2>Costs</h2>{table(('Agent', *(title for title, _ in COSTS.values())), rows)}{_note(content, text)}"


def _cost_cell(values: Sequence[float | None], text: Callable[[float], str]) -> str:
    known = [v for v in values if v is not None]
    return text(float(np.mean(known))) if known else _EMPTY


def _failed(content: Content) -> str:
    rows = [
        (escape(c["dataset"]), escape(c["agent"]), str(c["seed"]), escape(c["status"]), escape(c["problem"] or ""))
        for c in content["cells"]
        if c["status"] != "complete"
    ]
    if not rows:
        return ""
    header = ("Data set", "Agent", "Seed", "Status", "Why")
    return f"<h2>Runs without a result</h2>{table(header, rows, text_columns=(1, 2, 3, 4))}"


def _settings(content: Content) -> str:
    settings = [(escape(k), f"<code>{escape(json.dumps(v))}</code>") for k, v in content["settings"].items()]
    keys = list(dict.fromkeys(k for p in content["provenance"] for k in p))
    made = [(escape(k), escape(", ".join(dict.fromkeys(str(p.get(k)) for p in content["provenance"])))) for k in keys]
    commands = "\n".join(c["command"] for c in content["cells"])
    return (
        "<h2>Settings, versions, commands</h2>"
        f"<details><summary>Settings</summary>{table(('Setting', 'Value'), settings, text_columns=(1,))}</details>"
        f"<details><summary>Versions and hardware</summary>{table(('', 'Value'), made, text_columns=(1,))}</details>"
        f"<details><summary>Commands</summary>{caption('One per run; each gives the same numbers by itself.')}"
        f"<pre>{escape(commands)}</pre></details>"
    )
