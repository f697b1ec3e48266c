"""Pieces of HTML that all pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from clbench.metrics.statistics import Interval


def document(title: str, body: str) -> str:
    """A page that needs nothing but itself."""
    css = files("clbench.report").joinpath("style.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{css}</style></head><body><main>{body}</main></body></html>\n"
    )


def tag(name: str, content: str, **attributes: Any) -> str:
    text = "".join(f' {k.rstrip("_").replace("_", "-")}="{escape(str(v))}"' for k, v in attributes.items() if v)
    return f"<{name}{text}>{content}</{name}>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = ()) -> str:
    """A table from cells that are HTML already; the first cell of each row is its header."""

    def cells(row: Sequence[str]) -> str:
        first, *rest = row
        body = [
            c if c.startswith("<td") else tag("td", c, class_="text" if i in text_columns else "")
            for i, c in enumerate(rest, start=1)
        ]
        return tag("tr", tag("th", first, scope="row") + "".join(body))

    head = "".join(
        tag("th", h, scope="col", class_="text" if i == 0 or i in text_columns else "") for i, h in enumerate(header)
    )
    body = "".join(cells(r) for r in rows)
    return tag("div", tag("table", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"), class_="scroll")


def caption(text: str) -> str:
    return tag("p", text, class_="caption")


def number(value: float) -> str:
    """Three decimals with a proper minus sign, and no negative zero."""
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "\N{MINUS SIGN}")


def interval_cell(interval: Interval, runs: int | None = None) -> str:
    """Value and interval; where only some of ``runs`` have the value, how many."""
    if interval.value is None:
        return '<td class="empty">\N{EN DASH}</td>'
    if interval.low is None or interval.high is None:
        notes = ["one run"]
    else:
        notes = [f"{number(interval.low)} to {number(interval.high)}"]
    notes += [f"{interval.n} of {runs} runs"] if runs is not None and interval.n < runs else []
    return f"<td>{number(interval.value)}{''.join(tag('span', n, class_='ci') for n in notes)}</td>"


def count_text(value: Any) -> str:
    """1234567 -> '1 234 567' (thin spaces)."""
    return f"{round(value):,}".replace(",", "\N{THIN SPACE}")


def bytes_text(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def seconds_text(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.1f} h"
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.1f} s"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def figure(title: str, content: str, class_: str = "") -> str:
    return tag("figure", f"<figcaption>{escape(title)}</figcaption>{content}", class_=class_)
