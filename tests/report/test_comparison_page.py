"""The page of a comparison: every part and figure is there, from the content of comparison.json alone."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clbench.metrics.comparison import compare_scores
from clbench.report.comparison import comparison_text, page, write_comparison

AGENTS, SEEDS = ["plan", "learn"], [0, 1, 2]
PLACES = {
    "two-rooms: size": {"two-rooms/size-634-v0": 634.0, "two-rooms/good-v0": 3e6},
    "two-rooms: length": {"two-rooms/length-17-v0": 17.0, "two-rooms/good-v0": 91.0},
    "two-rooms: mix": {"two-rooms/mix-0-v0": 0.0, "two-rooms/mix-0.01-v0": 0.01},
    "point-maze: layouts": {"point-maze/5-layouts-v0": 5.0, "point-maze/40-layouts-v0": 40.0},
    "point-maze/5-layouts-v0: edit distance": {
        f"point-maze/5-layouts-v0?trials=distance-{k}": float(k) for k in (0, 4)
    },
}
DATASETS = list(dict.fromkeys(d for places in PLACES.values() for d in places))


class Reader(HTMLParser):
    """Tags that are open, sections, and the text of the page; complains about tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: dict[str, int] = {}
        self.text: list[str] = []
        self.headings: list[str] = []
        self.captions: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1
        if tag not in ("meta", "br", "line", "rect", "circle", "polyline", "polygon", "img"):
            self.open.append(tag)
        if dict(attrs).get("class") == "caption":
            self.captions.append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found[tag] = self.found.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.captions:
            self.captions[-1] += data if self.open and self.open[-1] == "p" else ""


def made(failing: bool = False, axes: bool = True) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    lost = {(DATASETS[0], "learn", 2)} if failing else set()
    scores = {
        d: {a: {s: (rng.random(20) < 0.4).astype(float) for s in SEEDS if (d, a, s) not in lost} for a in AGENTS}
        for d in DATASETS
    }
    cells, measured = [], []
    for d in DATASETS:
        for a in AGENTS:
            for s in SEEDS:
                gone = (d, a, s) in lost
                cells.append(
                    {"dataset": d, "agent": a, "seed": s, "status": "failed" if gone else "complete",
                     "problem": "it <b>broke</b>" if gone else None, "success": None if gone else 0.4,
                     "episodes": None if gone else 20, "observation": "state", "preset": "small", "updates": 1234,
                     "env_steps": 0, "samples": 5000, "parameters": 777,
                     "command": f"clbench run {d} --agent {a} --seed {s}"}
                )  # fmt: skip
                measured.append(
                    {"dataset": d, "agent": a, "seed": s, "wall_s": 3.0, "training_s": 2.0, "evaluation_s": 1.0,
                     "planning_ms_per_step": 0.125, "peak_memory_bytes": 2**20}
                )  # fmt: skip
    failures = {d: {a: sum((d, a, s) in lost for s in SEEDS) for a in AGENTS} for d in DATASETS}
    lines = {"oracle": {"success": 1.0, "episodes": 20}, "random": {"success": 0.05, "episodes": 20}}
    return {
        "schema": 1, "scale": "small", "datasets": DATASETS, "agents": AGENTS, "seeds": SEEDS,
        "settings": {"budgets": dict.fromkeys(AGENTS, 1234), "units": dict.fromkeys(AGENTS, "updates")},
        "axes": PLACES if axes else {}, "cells": cells, "measured": measured,
        "references": {d: {"lines": lines, "absent": {"straight-line": "no such method"}} for d in DATASETS},
        "statistics": compare_scores(scores, failures), "provenance": [{"torch": "2.8", "cpu": "some CPU"}],
    }  # fmt: skip


def test_every_part_and_every_figure_of_the_paper_is_there() -> None:
    text = page(made())
    reader = Reader(text)
    assert reader.headings == ["Success", "Axes", "Over all data sets", "Paired differences", "Costs",
                               "Settings, versions, commands"]  # fmt: skip
    for title in (
        "data-set size",
        "trajectory length",
        "noise mix",
        "number of layouts",
        "edit distance of the layout",
    ):
        assert f'aria-label="Success against {title}"' in text
    assert 'aria-label="Performance profile"' in text
    assert reader.found["svg"] == 6
    for label in ("634", "3M", "17", "91", "1 %", "40"):
        assert f">{label}</text>" in text
    for cell in made()["cells"]:
        assert cell["command"] in text
    assert "0.125 ms" in text and "some CPU" in text


def test_without_an_axis_there_is_no_figure() -> None:
    text = page(made(axes=False))
    assert "<h2>Axes</h2>" not in text and Reader(text).found["svg"] == 1


def test_the_scale_is_stated_with_every_table() -> None:
    reader = Reader(page(made()))
    stated = [c for c in reader.captions if "Scale small; observations: state; preset small; 1234 updates" in c]
    assert len(stated) == 6  # success, axes, over all, improvement, differences, costs
    assert comparison_text(made()).startswith("Scale small;")


def test_the_numbers_are_those_of_the_statistics() -> None:
    content = made()
    text = page(content)
    for dataset in DATASETS:
        found = content["statistics"]["datasets"][dataset]
        for cell in found["agents"].values():
            assert f'{cell["value"]:.3f}<span class="ci">{cell["low"]:.3f} to {cell["high"]:.3f}</span>' in text
        (difference,) = found["differences"]
        assert f"{difference['value']:.3f}".replace("-", "\N{MINUS SIGN}") in text
    changed = copy.deepcopy(content)
    changed["statistics"]["datasets"][DATASETS[0]]["agents"]["plan"]["value"] = 0.987
    assert "0.987" in page(changed) and "0.987" not in text


def test_failures_are_listed_and_counted() -> None:
    text = page(made(failing=True))
    Reader(text)
    assert "Runs without a result" in text and "1 of 3 failed" in text and "it &lt;b&gt;broke&lt;/b&gt;" in text
    assert "1 of 3 failed" in comparison_text(made(failing=True))
    assert "failed" not in page(made())


def test_reference_lines_and_why_one_is_left_out() -> None:
    content = made()
    text = page(content)
    assert "Left out: straight-line (no such method)." in text
    assert text.count("series s0 reference d0") == len(PLACES)
    content["agents"] = ["plan", "learn"]
    rows = [line for line in comparison_text(content).splitlines() if line.startswith("| data set")]
    assert [c.strip() for c in rows[0].strip("|").split("|")] == ["data set", "plan", "learn", "oracle", "random"]


def test_names_are_escaped() -> None:
    text = json.dumps(made()).replace('"plan"', '"<script>alert(1)</script>"')
    found = page(json.loads(text))
    assert "<script" not in found and "&lt;script&gt;" in found


def test_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    path = write_comparison(made(), tmp_path / "report.html")
    text = path.read_text()
    assert (
        "src=" not in text
        and "<link" not in text
        and "url(" not in text
        and "http" not in text.replace("https://www.w3.org", "")
    )


@pytest.mark.parametrize("empty", ["plan", "learn"])
def test_an_agent_without_results_leaves_a_readable_page(empty: str) -> None:
    content = made()
    scores = {d: {a: {} if a == empty else {0: np.ones(4)} for a in AGENTS} for d in DATASETS}
    content["statistics"] = compare_scores(scores, {d: {a: 3 * (a == empty) for a in AGENTS} for d in DATASETS})
    Reader(page(content))
    assert "3 of 3 failed" in comparison_text(content)
