"""The metric table as Markdown, for terminals and documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clbench.metrics.statistics import Interval
from clbench.report.runs import BrokenRun, Group, Run, group_runs, load_run
from clbench.report.summary import MAIN, TITLES, metric_interval


def report_markdown(run_dirs: Sequence[Path | str]) -> str:
    """One table per group of comparable runs: agents x metrics, mean over seeds with a 95 % bootstrap interval."""
    loaded = [load_run(Path(p)) for p in run_dirs]
    groups = group_runs([r for r in loaded if isinstance(r, Run)])
    parts = [_group_table(g) for g in groups]
    broken = [f"- {b.path}: {b.problem}" for b in loaded if isinstance(b, BrokenRun)]
    if broken:
        parts.append("Unreadable runs:\n\n" + "\n".join(broken))
    return "\n\n".join(parts) + "\n"


def _group_table(group: Group) -> str:
    rows = [("agent", "runs", *(TITLES[m].lower() for m in MAIN))]
    for label in group.labels:
        n, failed = len(group.agents.get(label, ())), len(group.excluded.get(label, ()))
        runs = f"{n} ({failed} failed)" if failed else str(n)
        rows.append((label, runs, *(interval_text(metric_interval(group, label, m), n) for m in MAIN)))
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([f"**{group.title}**", "", lines[0], rule, *lines[1:]])


def interval_text(interval: Interval, runs: int | None = None) -> str:
    """``0.71 [0.65, 0.77]``; ``-`` for what is not defined; ``(2 of 3 runs)`` where some of ``runs`` lack the value."""
    if interval.value is None:
        return "-"
    text = f"{interval.value:.2f}"
    if interval.low is not None and interval.high is not None:
        text += f" [{interval.low:.2f}, {interval.high:.2f}]"
    return text + (f" ({interval.n} of {runs} runs)" if runs is not None and interval.n < runs else "")
