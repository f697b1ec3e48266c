"""Offline data for OGBench's point mazes: the scripted policies of OGBench (Park et al. 2025, arXiv 2410.20092).

All trajectories are rolled out together; the only loop is over time. Whatever a trajectory draws is a function of the seed,
its number and the step, so a smaller data set is the beginning of a larger one.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from clbench.data.dataset import OfflineDataset
from clbench.envs.ogbench_maze import STEP_SIZE, SUCCESS, Maze, check_step_size
from clbench.errors import ConfigError, unknown_name
from clbench.rng import derive_seed, hash_seeds, hash_uniform
from clbench.streams.ogbench_mazes import NOISE, UNIT, free_cells, next_cells, path_lengths, vertex_cells

KINDS = ("navigate", "stitch")
STITCH = 4  # steps over cells from start to goal of stitch data


def ogbench_maze(
    *,
    maze: str = "medium",
    kind: str = "navigate",
    trajectories: int = 1000,
    steps: int = 1000,
    step_size: float = STEP_SIZE,
    noise: float = 0.5,
    seed: int = 0,
) -> OfflineDataset:
    """Scripted walks in one of OGBench's point mazes, a pure function of the arguments.

    A trajectory begins in a random free cell. At each step it heads for the centre of the next cell of a shortest path to
    its goal; the action is that direction (of length 1) plus normal noise, clipped to +-1. Starts and goals are within +-1
    of the centres of their cells.

    Args:
        maze: ``"medium"``, ``"large"``, ``"giant"``, ``"teleport"`` or ``"u"``.
        kind: ``"navigate"``: the goal is a random cell that is not part of a straight corridor, and a new one when it is
            reached. ``"stitch"``: the goal is a random cell at 4 steps from the start (the start itself if there is none),
            where the walk stays.
        trajectories: number of trajectories, ``E``.
        steps: actions per trajectory, ``T``.
        step_size: displacement per axis of a full action, at most 0.5.
        noise: standard deviation per axis of the noise on actions.
        seed: of everything that is drawn.

    Returns:
        ``E * T`` transitions with the keys ``observation`` and ``achieved_goal``, which share one column (N, 2).

    Raises:
        ConfigError: an argument out of range.
    """
    for name, value in (("trajectories", trajectories), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"ogbench-maze: {name} must be at least 1, got {value}.")
    if kind not in KINDS:
        raise unknown_name("value of kind", str(kind), KINDS, where="data set 'ogbench-maze'")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ConfigError(f"ogbench-maze: noise must be a standard deviation >= 0, got {noise}.")
    check_step_size(step_size)
    shape = Maze(maze)
    base = derive_seed(seed, "ogbench-maze", maze, kind)
    seeds = hash_seeds(torch.full((trajectories,), base, dtype=torch.int64), torch.arange(trajectories))
    states, actions = _roll(shape, kind, seeds, steps, step_size, noise)
    rows, final = states[:, :-1].reshape(-1, 2), states[:, -1].clone()
    return OfflineDataset(
        {"observation": rows, "achieved_goal": rows},
        actions.reshape(-1, 2),
        torch.full((trajectories,), steps),
        {"observation": final, "achieved_goal": final},
        name="ogbench-maze",
        metadata={
            "generator": "ogbench-maze", "maze": maze, "kind": kind, "trajectories": trajectories, "steps": steps,
            "step_size": step_size, "noise": noise, "seed": seed,
        },
    )  # fmt: skip


def _roll(maze: Maze, kind: str, seeds: Tensor, steps: int, step_size: float, noise: float) -> tuple[Tensor, Tensor]:
    """-> states (E, T + 1, 2), actions (E, T, 2), float32."""
    count = len(seeds)
    way, targets = torch.from_numpy(next_cells(maze.name)), torch.from_numpy(vertex_cells(maze.name))
    states, actions = torch.empty(count, steps + 1, 2), torch.empty(count, steps, 2)
    position, goal = _starts(maze, kind, hash_uniform(seeds, 0, 6).t())
    states[:, 0] = position.t()
    for t in range(steps):
        u = hash_uniform(seeds, t + 1, 6).t()  # noise (2), teleporter, next goal: cell and offset (2)
        cell, goal_cell = maze.cell(position), maze.cell(goal)
        towards = maze.centres[:, way[cell, goal_cell]] - position
        length = (towards[0] ** 2 + towards[1] ** 2).sqrt() + 1e-6
        action = (towards / length + noise * _normal(u[:2])).clamp(-1, 1).to(torch.float32)
        actions[:, t] = action.t()
        position = maze.move(position.to(torch.float64), action.to(torch.float64), step_size).to(torch.float32)
        if kind == "navigate":
            reached = (position - goal).square().sum(0) <= SUCCESS**2
            goal = torch.where(reached, _near(maze, _choose(targets, u[3]), u[4:6]), goal)
        position = maze.teleport(position, u[2])
        states[:, t + 1] = position.t()
    return states, actions


def _starts(maze: Maze, kind: str, u: Tensor) -> tuple[Tensor, Tensor]:
    """First positions and goals, (2, E) float32 each; ``u`` (6, E)."""
    cell = _choose(torch.from_numpy(free_cells(maze.name)), u[0])
    if kind == "navigate":
        goal = _choose(torch.from_numpy(vertex_cells(maze.name)), u[1])
    else:
        table, number = _stitch_goals(maze.name)
        goal = table[cell, (u[1] * number[cell]).to(torch.int64)]
    return _near(maze, cell, u[2:4]), _near(maze, goal, u[4:6])


@functools.cache
def _stitch_goals(maze: str) -> tuple[Tensor, Tensor]:
    """Goals of each cell (cells, n), padded, and their number (cells,); the cell itself where none is 4 steps away."""
    steps = path_lengths(maze)
    chosen = [np.flatnonzero(row == STITCH) for row in steps]
    chosen = [cells if len(cells) else np.array([i]) for i, cells in enumerate(chosen)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in chosen], batch_first=True)
    return padded, torch.tensor([len(c) for c in chosen])


def _choose(cells: Tensor, u: Tensor) -> Tensor:
    return cells[(u * len(cells)).to(torch.int64)]


def _near(maze: Maze, cell: Tensor, u: Tensor) -> Tensor:
    """Points (2, E) float32 around the centres of cells (E,); ``u`` (2, E)."""
    return (maze.centres[:, cell] + NOISE * (2 * u - 1)).to(torch.float32)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers by the inverse of the distribution function; one by one, so they do not depend on ``E``."""
    return torch.from_numpy(ndtri(u.numpy() + 2.0**-54))


# -- what the data are like ---------------------------------------------------------------------------------------------


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Numbers that describe the data.

    Args:
        dataset: made by :func:`ogbench_maze`.

    Returns:
        ``action_sd`` (per axis); ``speed``: mean displacement per step, in units of the step size, teleports left out;
        ``cells``: mean number of different cells that a trajectory visits; ``coverage``: share of free cells that some
        trajectory visits; ``touching``: share of states in contact with a wall; ``in_walls``: share of states nearer to a
        wall than the radius (0 unless broken).
    """
    settings = dataset.metadata
    maze, count = Maze(settings["maze"]), len(dataset.lengths)
    observed, final = (o["observation"].cpu() for o in (dataset.observations, dataset.final_observations))
    states = torch.cat([observed.reshape(count, -1, 2), final[:, None]], 1)
    moved = (states[:, 1:] - states[:, :-1]).norm(dim=-1) / settings["step_size"]
    points = states.reshape(-1, 2).t().to(torch.float64)
    cell = maze.cell(points).view(count, -1)
    visited = torch.zeros(count, maze.walls.numel(), dtype=torch.bool).scatter_(1, cell, True)
    pushed = (maze.push_out(points) - points).abs().amax(0)
    nudge = [[dx, dy] for dx in (-1e-4, 0.0, 1e-4) for dy in (-1e-4, 0.0, 1e-4)]
    touching = torch.stack(
        [
            (maze.push_out(shifted) - shifted).abs().amax(0) > 0
            for shifted in (points + torch.tensor([d], dtype=torch.float64).t() for d in nudge)
        ]
    ).any(0)
    return {
        "action_sd": float(dataset.actions.std(0).mean()),
        "speed": float(moved[moved < UNIT / 2 / settings["step_size"]].mean()),
        "cells": float(visited.sum(1).double().mean()),
        "coverage": int(visited.any(0).sum()) / len(free_cells(settings["maze"])),
        "touching": float(touching.double().mean()),
        "in_walls": float((pushed > 1e-5).double().mean()),
    }
