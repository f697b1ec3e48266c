"""Line charts as inline SVG: sharp at any size, small, and their colours follow the page's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from clbench.report.summary import Band, Curve

LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 22
MAX_BOUNDARIES = 40


@dataclass(frozen=True)
class Line:
    """One agent's curves; ``color`` is the index of a series colour of the page, ``style`` another class of the page.

    ``dots`` marks the points of a curve.
    """

    label: str
    color: int
    curves: Sequence[Curve]
    style: str = ""
    dots: bool = False


def y_range(lines: Sequence[Line]) -> tuple[float, float]:
    """[0, 1], widened where scores lie outside."""
    values = [v for line in lines for c in line.curves for v in (c.value, c.low, c.high) if v is not None and len(v)]
    if not values:
        return 0.0, 1.0
    return min(0.0, *(float(v.min()) for v in values)), max(1.0, *(float(v.max()) for v in values))


def line_chart(
    lines: Sequence[Line],
    *,
    x_max: float,
    y: tuple[float, float],
    bands: Sequence[Band] = (),
    boundaries: Sequence[float] = (),
    width: int = 360,
    height: int = 190,
    name: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """A chart of score over training. ``bands`` shade when the task was trained, ``boundaries`` are ends of phases.

    ``x_ticks`` are positions and labels for the x axis, in place of round numbers.
    """
    x_max = max(x_max, 1.0)
    low, high = y

    def px(x: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * x / x_max

    def py(v: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (high - v) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}" class="chart">']
    for band in bands:
        parts.append(
            f'<rect class="band" x="{px(band.start):.1f}" y="{TOP}" width="{px(band.end) - px(band.start):.1f}" '
            f'height="{height - TOP - BOTTOM}" style="opacity:{0.2 + 0.8 * band.share:.2f}"/>'
        )
    for tick in ticks(low, high, 5 if height > 150 else 3):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{py(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    if len(boundaries) <= MAX_BOUNDARIES:
        for b in boundaries:
            parts.append(f'<line class="phase" x1="{px(b):.1f}" x2="{px(b):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
    if x_ticks is None:
        x_ticks = [(tick, short_number(tick)) for tick in ticks(0, x_max, max(2, width // 90))]
    for tick, label in x_ticks:
        anchor = "end" if px(tick) > width - 20 else "middle"
        parts.append(
            f'<text class="tick" x="{px(tick):.1f}" y="{height - 7}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    for line in lines:
        for curve in line.curves:
            parts.append(_curve(line, curve, px, py))
    return "".join([*parts, "</svg>"])


def _curve(line: Line, curve: Curve, px, py) -> str:
    xs = [px(float(s)) for s in curve.steps]
    points = [f"{x:.1f},{py(float(v)):.1f}" for x, v in zip(xs, curve.value, strict=True)]
    style = f"series s{line.color} {line.style}".rstrip()
    result = [f'<g class="{style}"><title>{escape(line.label)}</title>']
    if curve.low is not None and curve.high is not None:
        upper = [f"{x:.1f},{py(float(v)):.1f}" for x, v in zip(xs, curve.high, strict=True)]
        lower = [f"{x:.1f},{py(float(v)):.1f}" for x, v in zip(xs, curve.low, strict=True)]
        result.append(f'<polygon class="interval" points="{" ".join(upper + lower[::-1])}"/>')
    if len(points) > 1:
        result.append(f'<polyline class="line" points="{" ".join(points)}"/>')
    for x, y in (p.split(",") for p in (points if line.dots or len(points) == 1 else ())):
        result.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.5"/>')
    return "".join([*result, "</g>"])


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most ``most`` + 1 round numbers in [low, high]."""
    span = high - low
    raw = span / most
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(np.round(i * step, 12)) for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """1500 -> 1.5k, 2000000 -> 2M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"
