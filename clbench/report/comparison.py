"""Pages of a comparison, from the content of its ``comparison.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clbench.metrics.statistics import Interval
from clbench.report.markdown import interval_text


def comparison_text(content: Mapping[str, Any]) -> str:
    """Success of every agent on every data set as a Markdown table, for terminals and documents."""
    agents = content["agents"]
    lines = [n for n in reference_names(content) if n not in agents]
    rows = [("data set", *agents, *lines)]
    for dataset in content["datasets"]:
        of_agent = content["statistics"]["datasets"][dataset]["agents"]
        of_line = content["references"].get(dataset, {}).get("lines", {})
        cells = [_cell(of_agent[a]) for a in agents]
        rows.append((dataset, *cells, *(f"{of_line[n]['success']:.2f}" if n in of_line else "-" for n in lines)))
    return _markdown(rows)


def reference_names(content: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(n for r in content["references"].values() for n in r["lines"]))


def _cell(found: Mapping[str, Any]) -> str:
    text = interval_text(interval_of(found))
    return text + (f" ({found['failures']} of {found['n'] + found['failures']} failed)" if found["failures"] else "")


def interval_of(found: Mapping[str, Any]) -> Interval:
    return Interval(found["value"], found["low"], found["high"], found["n"], found.get("failures", 0))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def write_comparison(content: Mapping[str, Any], out: Path) -> Path:
    """The report of a comparison: one self-contained HTML page."""
    return out
