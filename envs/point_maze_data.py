"""Offline data for PointMaze: random actions on any number of layouts (PLDM, Sobal et al. 2025, arXiv 2502.14819).

All episodes are drawn and rolled out together; the only loop is over time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.data.dataset import OfflineDataset, Rendered
from clbench.envs.point_maze import (
    CONTACT,
    DAMPING,
    JITTER,
    MAX_SPEED,
    OBSERVATIONS,
    layout_bits,
    move,
    render_pixels,
    ring_code,
    wall_distance,
)
from clbench.envs.two_rooms import check_dynamics
from clbench.errors import ConfigError, unknown_name
from clbench.rng import numpy_generator
from clbench.streams.maze_layouts import SIDE, layout_code, layout_text, path_lengths, training_layouts


def point_maze(
    *,
    layouts: int | str = 5,
    transitions: int = 1_000_000,
    steps: int = 100,
    observation: str = "state",
    action_gain: float = 1.0,
    damping: float = DAMPING,
    seed: int = 0,
) -> OfflineDataset:
    """Random actions in PointMaze, a pure function of the arguments.

    An episode begins within 0.1 of the centre of a random free cell, with a velocity of uniform direction and of magnitude
    uniform in [0, 5]. Each action has a uniform direction and a magnitude uniform in [0, 1], drawn anew at every step
    (4 simulation steps). Layouts take turns: episode ``e`` is on layout ``e`` modulo their number.

    Args:
        layouts: number of training layouts (1 to 40; 5, 10, 20 and 40 are those of the paper's data sets), or one layout
            as text or name.
        transitions: ``N``; if it is no multiple of ``steps``, the last episode is cut short.
        steps: actions per episode, ``T``.
        observation: ``"state"``, ``"layout"``, or ``"pixels"`` (rendered from stored positions when a batch is drawn).
        action_gain: of the environment; actions are drawn alike under all dynamics.
        damping: of the environment.
        seed: of the generator.

    Returns:
        ``N`` transitions. ``"state"``: ``observation`` (N, 4) = (x, y, vx, vy) and ``achieved_goal`` (N, 2). ``"layout"``:
        these and ``layout`` (N, 16), 1 for a wall. ``"pixels"``: ``observation`` and ``achieved_goal``, which share one
        column (N, 3, 64, 64), and ``velocity`` (N, 2).

    Raises:
        ConfigError: an argument out of range, or no layout.
    """
    for name, value in (("transitions", transitions), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"point-maze: {name} must be at least 1, got {value}.")
    if observation not in OBSERVATIONS:
        raise unknown_name("value of observation", str(observation), OBSERVATIONS, where="data set 'point-maze'")
    check_dynamics("point-maze", action_gain, damping=damping)
    texts = training_layouts(layouts) if isinstance(layouts, int) else (layouts,)
    codes = torch.tensor([layout_code(text) for text in texts])
    rng = numpy_generator(seed, "point-maze", "data")
    count = -(-transitions // steps)
    layout = codes[torch.arange(count) % len(codes)]
    position, velocity = _starts(rng, layout)
    actions = _actions(rng, count, steps)
    states = _roll(position, velocity, actions, layout, action_gain, damping)

    lengths = torch.full((count,), steps)
    lengths[-1] = transitions - (count - 1) * steps
    final = states[:, -1].clone()
    final[-1] = states[-1, lengths[-1]]
    rows = states[:, :-1].reshape(-1, 4)[:transitions]

    def columns(state: Tensor, code: Tensor) -> dict[str, Any]:
        place = state[:, :2].contiguous()
        if observation != "pixels":
            columns = {"observation": state, "achieved_goal": place}
            return columns | {"layout": layout_bits(code)} if observation == "layout" else columns
        picture = rendered(place, code)
        return {"observation": picture, "achieved_goal": picture, "velocity": state[:, 2:].contiguous()}

    return OfflineDataset(
        columns(rows, layout.repeat_interleave(steps)[:transitions].to(torch.int32)),
        actions.reshape(-1, 2)[:transitions],
        lengths,
        columns(final, layout.to(torch.int32)),
        name="point-maze",
        metadata={
            "generator": "point-maze", "layouts": [layout_text(c) for c in codes.tolist()], "transitions": transitions,
            "steps": steps, "observation": observation, "seed": seed,
            **({} if (action_gain, damping) == (1, DAMPING) else {"action_gain": action_gain, "damping": damping}),
        },
    )  # fmt: skip


def with_layout(data: OfflineDataset) -> OfflineDataset:
    """State data of :func:`point_maze` with the further key ``layout`` (N, 16)."""
    codes = torch.tensor([layout_code(text) for text in data.metadata["layouts"]], device=data.device)
    episode = codes[torch.arange(len(data.lengths), device=data.device) % len(codes)]
    return OfflineDataset(
        data.observations | {"layout": layout_bits(episode[data.episode])}, data.actions, data.lengths,
        data.final_observations | {"layout": layout_bits(episode)}, None, data.name,
        {**data.metadata, "observation": "layout"}, check=False,
    )  # fmt: skip


def rendered(position: Tensor, layout: Tensor) -> Rendered:
    """Positions (N, 2) on layouts (N,) int32 codes as pixels (N, 3, 64, 64) that are drawn when indexed."""
    return Rendered("point-maze", {"position": position, "layout": layout}, render_pixels)


def _starts(rng: np.random.Generator, layout: Tensor) -> tuple[Tensor, Tensor]:
    """Positions and velocities (2, E) float32 of the first states."""
    count = len(layout)
    codes, index = np.unique(layout.numpy(), return_inverse=True)
    free = [np.flatnonzero(np.diag(path_lengths(int(code))) == 0) for code in codes]
    number = np.array([len(cells) for cells in free])[index]
    table = np.stack([np.resize(cells, SIDE**2) for cells in free])
    cell = table[index, (rng.uniform(size=count) * number).astype(int)]
    centre = np.stack([cell % SIDE, cell // SIDE]) + 0.5
    position = centre + rng.uniform(-JITTER, JITTER, (2, count))
    return _float32(position), _float32(_disc(rng, MAX_SPEED, (count,)))


def _actions(rng: np.random.Generator, count: int, steps: int) -> Tensor:
    """(E, T, 2) float32."""
    return _float32(np.moveaxis(_disc(rng, 1.0, (count, steps)), 0, -1))


def _disc(rng: np.random.Generator, radius: float, shape: tuple[int, ...]) -> np.ndarray:
    """Vectors (2, *shape) of uniform direction and uniform magnitude up to ``radius``."""
    length, angle = rng.uniform(0, radius, shape), rng.uniform(0, 2 * math.pi, shape)
    return np.stack([length * np.cos(angle), length * np.sin(angle)])


def _float32(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32, order="C"))


def _roll(
    position: Tensor, velocity: Tensor, actions: Tensor, layout: Tensor, gain: float = 1.0, damping: float = DAMPING
) -> Tensor:
    """Apply actions (E, T, 2) from the first states (2, E) -> states (E, T + 1, 4) float32."""
    solid = ring_code(layout)
    count, steps, _ = actions.shape
    states = torch.empty(count, steps + 1, 4)
    states[:, 0] = torch.cat([position, velocity]).t()
    for t in range(steps):
        position, velocity = move(position, velocity, actions[:, t].t().contiguous(), solid, gain=gain, damping=damping)
        states[:, t + 1] = torch.cat([position, velocity]).t()
    return states


# -- what the data are like -------------------------------------------------------------------------------------------


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Numbers to compare with the paper, over the episodes of full length.

    Args:
        dataset: made by :func:`point_maze`.

    Returns:
        ``action_sd`` and ``velocity_sd`` (per axis); ``cells``: mean number of different cells that an episode visits;
        ``coverage``: share of free cells, over all layouts, that some episode visits; ``touching``: share of states in
        contact with a wall (closer than radius and margin); ``nearest``: least distance of a ball's centre to a wall.
    """
    observed = dataset.observations
    if "velocity" in observed:
        position, velocity = observed["observation"].columns["position"], observed["velocity"]
    else:
        position, velocity = observed["observation"].split(2, 1)
    steps = int(dataset.lengths[0])
    full = int((dataset.lengths == steps).sum())
    texts = dataset.metadata["layouts"]
    codes = torch.tensor([layout_code(text) for text in texts], device=position.device)
    kind = torch.arange(full, device=position.device) % len(codes)
    place = position[: full * steps].to(torch.float64)
    solid = ring_code(codes)[kind.repeat_interleave(steps)]
    distance = wall_distance(place.t(), solid)
    column, row = place.floor().to(torch.int64).t()
    cell = (SIDE * row + column).view(full, steps)
    visited = torch.zeros(full, SIDE**2, dtype=torch.bool, device=cell.device).scatter_(1, cell, True)
    covered = torch.stack([visited[kind == k].any(0) for k in range(len(codes))])
    free = sum(text.count("O") for text in texts)
    return {
        "action_sd": float(dataset.actions.std(0).mean()),
        "velocity_sd": float(velocity.std(0).mean()),
        "cells": float(visited.sum(1).double().mean()),
        "coverage": float(covered.sum()) / free,
        "touching": float((distance < CONTACT).double().mean()),
        "nearest": float(distance.min()),
    }
