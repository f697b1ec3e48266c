"""The weights of a trained eidetic network, sorted by owner: the figure of docs/eidetic.md.

    python scripts/eidetic_figure.py [--run runs/eidetic-figure] [--out docs/images/eidetic.png]

Trains `eidetic-bc` on four permutations of the digits (seconds; a finished run is read instead), takes the effective
weights of its network, and sorts rows and columns by the task that owns them. Nothing is drawn that is not in the
weights: a cell is white where an owned weight is exactly 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

import clbench
from clbench.agents.networks.eidetic import FREE, INPUT, EideticNetwork, OwnedParameter
from clbench.experiments import load_agent

TASKS = 4
COLOURS = ("#1f6fb4", "#d9741a", "#3a9440", "#8a57b0", "#a0522d", "#c2559d")
GREY = "#bdbdbd"


def trained(run: Path) -> EideticNetwork:
    """The network of a run, which is made if it is not there."""
    if not (run / "results.json").exists():
        clbench.run(
            "digits-permuted", "eidetic-bc", seed=0, out=run, eval_every=0, threads=1,
            stream_options={"tasks": TASKS},
            agent_options={"hidden": (64, 64, 64), "pruning": {"tasks": TASKS}},
        )  # fmt: skip
    agent: Any = load_agent(run)
    return agent.network


def colour(owner: int) -> tuple[float, float, float]:
    return to_rgb(GREY if owner in (FREE, INPUT) else COLOURS[owner % len(COLOURS)])


def picture(weights: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, m) weights and the owners (n,) of their rows -> (n, m, 3): the larger a weight, the fuller its colour."""
    size = np.abs(weights) / max(float(np.quantile(np.abs(weights), 0.98)), 1e-12)
    fullness = np.where(weights == 0, 0.0, 0.35 + 0.65 * np.clip(size, 0, 1))[..., None]
    base = np.array([colour(int(owner)) for owner in rows])[:, None]
    return 1 - fullness * (1 - base)


def draw(axes: Any, parts: list[OwnedParameter], title: str, given: str) -> None:
    """One matrix; the rows of several layers (heads) are put below one another."""
    first = parts[0]
    assert first.inputs is not None
    columns = first.inputs[1].owners().cpu().numpy()
    rows = np.concatenate([p.out[1].owners().cpu().numpy() for p in parts])
    weights = np.concatenate([p().detach().cpu().numpy() for p in parts])
    by_row, by_column = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
    rows, columns, weights = rows[by_row], columns[by_column], weights[by_row][:, by_column]
    axes.imshow(picture(weights, rows), aspect="auto", interpolation="nearest")
    for owners, line in ((rows, axes.axhline), (columns, axes.axvline)):
        for edge in np.flatnonzero(np.diff(owners)):
            line(edge + 0.5, color="black", linewidth=0.7)
    for owners, axis in ((rows, axes.yaxis), (columns, axes.xaxis)):
        middle = {int(owner): float(np.flatnonzero(owners == owner).mean()) for owner in np.unique(owners)}
        names = [{FREE: "free", INPUT: given}.get(owner, str(owner)) for owner in middle]
        axis.set_ticks(list(middle.values()), names)
        axis.set_tick_params(length=0, labelsize=8)
    axes.set_title(title, fontsize=9)


def bars(axes: Any, network: EideticNetwork) -> None:
    """Units per owner in each hidden layer."""
    units = network.capacity().units
    for row, owners in enumerate(units.values()):
        start = 0
        for owner in [*(str(task) for task in range(network.committed)), "free"]:
            count = owners.get(owner, 0)
            axes.barh(row, count, left=start, color=colour(FREE if owner == "free" else int(owner)), edgecolor="white")
            if count:
                axes.text(start + count / 2, row, str(count), ha="center", va="center", fontsize=8)
            start += count
    axes.set_yticks(range(len(units)), [f"layer {i + 1}" for i in range(len(units))], fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.set_title("units by owner: tasks 0 to 3, free", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/eidetic-figure"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/eidetic.png"))
    arguments = parser.parse_args()
    network: Any = trained(arguments.run)
    figure = plt.figure(figsize=(8, 5.6), dpi=200)
    grid = figure.add_gridspec(2, 6)
    for i, layer in enumerate(network.layers):
        axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        draw(axes, [layer.weight], "inputs to layer 1" if i == 0 else f"layer {i} to layer {i + 1}", "pixels")
        axes.set_xlabel("read: units of task", fontsize=8)
        if i == 0:
            axes.set_ylabel("written: units of task", fontsize=8)
    heads = figure.add_subplot(grid[1, :3])
    draw(heads, [head.weight for head in network.head.layers], f"layer {len(network.layers)} to heads", "pixels")
    heads.set_xlabel("read: units of task", fontsize=8)
    heads.set_ylabel("head of task", fontsize=8)
    bars(figure.add_subplot(grid[1, 3:]), network)
    figure.tight_layout()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
