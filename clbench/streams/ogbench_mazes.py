"""OGBench's point mazes as plain values: maps, tasks, shortest paths over cells, and the frozen evaluation episodes.

Source: OGBench (Park et al. 2025, arXiv 2410.20092), re-implemented from its facts. A map is rows of ``1`` (wall) and
``0`` (free); cells are squares of side 4, and the centre of the cell in row ``i`` and column ``j`` is at
``(x, y) = (4 j - 4, 4 i - 4)``. The number of a cell is ``i * columns + j``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from clbench.contracts import TaskList
from clbench.errors import ConfigError, unknown_name
from clbench.rng import derive_seed

VERSION = "ogbench-maze-v1"
UNIT = 4.0  # side of a cell
ORIGIN = 1.5 * UNIT  # the outer corner of the cell (0, 0) is at (-6, -6)
NOISE = 1.0  # starts and goals: uniform within +-1 per axis around the centres of their cells

MAPS: dict[str, tuple[str, ...]] = {
    "u": ("11111", "10001", "11101", "10001", "11111"),
    "medium": ("11111111", "10011001", "10010001", "11000111", "10010001", "10100101", "10001001", "11111111"),
    "large": (
        "111111111111", "100001000001", "101101010101", "100000010001", "101111011101", "100101000001",
        "110101010111", "100100010001", "111111111111",
    ),
    "giant": (
        "1111111111111111", "1010000001100001", "1010110101001101", "1000100100010001", "1011101111110101",
        "1000100010000101", "1110101001010111", "1000100100010001", "1010101111110101", "1011100010001101",
        "1000001000100001", "1111111111111111",
    ),
    "teleport": (
        "111111111111", "100000101001", "110100010011", "110111000001", "100001010101", "101101010101",
        "101101010101", "100001000101", "111111111111",
    ),
}  # fmt: skip
Cell = tuple[int, int]  # row, column
TASKS: dict[str, tuple[tuple[Cell, Cell], ...]] = {  # from start to goal; task_id 1 to 5
    "u": (((1, 1), (3, 1)), ((3, 1), (1, 1)), ((1, 2), (3, 2)), ((3, 3), (1, 1)), ((1, 1), (2, 3))),
    "medium": (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))),
    "large": (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4))),
    "giant": (((1, 1), (10, 14)), ((1, 14), (10, 1)), ((8, 14), (1, 1)), ((8, 3), (5, 12)), ((5, 9), (3, 8))),
    "teleport": (((1, 10), (7, 1)), ((1, 1), (7, 10)), ((5, 6), (7, 10)), ((7, 1), (7, 10)), ((5, 6), (7, 1))),
}
ENTRIES: dict[str, tuple[Cell, ...]] = {"teleport": ((4, 6), (5, 1))}
EXITS: dict[str, tuple[Cell, ...]] = {"teleport": ((1, 7), (6, 1), (6, 10))}
DIRECTIONS = ((-1, 0), (0, -1), (1, 0), (0, 1))  # up, left, down, right; ties between paths go to the first


# -- cells --------------------------------------------------------------------------------------------------------------


@functools.cache
def walls(maze: str) -> np.ndarray:
    """Which cells are walls (rows, columns) bool. The result is shared: do not write to it.

    Raises:
        UnknownNameError: with the nearest name.
    """
    if maze not in MAPS:
        raise unknown_name("maze", str(maze), MAPS, where="OGBench's point mazes")
    return np.array([[letter == "1" for letter in row] for row in MAPS[maze]])


def numbers(maze: str, cells: Sequence[Cell]) -> np.ndarray:
    """Numbers (n,) int64 of cells given as (row, column)."""
    columns = walls(maze).shape[1]
    return np.array([row * columns + column for row, column in cells], dtype=np.int64)


def centres(maze: str) -> np.ndarray:
    """Centres (cells, 2) float64 of all cells, as (x, y)."""
    rows, columns = walls(maze).shape
    number = np.arange(rows * columns)
    return UNIT * np.stack([number % columns, number // columns], 1) - UNIT


def free_cells(maze: str) -> np.ndarray:
    """Numbers of the free cells, ascending."""
    return np.flatnonzero(~walls(maze))


def vertex_cells(maze: str) -> np.ndarray:
    """Numbers of the free cells that are not part of a straight corridor, ascending: the goals of ``navigate`` data."""
    free = ~walls(maze)
    up, left, down, right = (np.roll(free, (-row, -column), (0, 1)) for row, column in DIRECTIONS)
    corridor = (up & down & ~left & ~right) | (left & right & ~up & ~down)
    return np.flatnonzero(free & ~corridor)


# -- paths --------------------------------------------------------------------------------------------------------------


def _moves(maze: str, avoid: Sequence[int] = ()) -> np.ndarray:
    """Whether one step leads from one cell to another (cells, cells) bool; none leads into the cells ``avoid``."""
    free = ~walls(maze).ravel()
    row, column = np.divmod(np.arange(free.size), walls(maze).shape[1])
    touching = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1
    into = free.copy()
    into[list(avoid)] = False
    return touching & free[:, None] & into


def _path_lengths(moves: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Steps from each cell to each other (cells, cells) int64, -1 where there is no path."""
    reached = np.diag(free)
    steps = np.where(reached, 0, -1)
    weights = moves.astype(np.float32)
    for length in range(1, len(moves)):
        found = (reached.astype(np.float32) @ weights > 0) & ~reached
        if not found.any():
            break
        steps[found] = length
        reached = reached | found
    return steps


@functools.cache
def path_lengths(maze: str) -> np.ndarray:
    """Steps between cells (cells, cells) int64: shortest path over free neighbours, -1 where there is none.

    Teleporters are ordinary cells. The result is shared: do not write to it.
    """
    return _path_lengths(_moves(maze), ~walls(maze).ravel())


@functools.cache
def next_cells(maze: str) -> np.ndarray:
    """The cell to go to next, ``[cell, goal]`` (cells, cells) int64; the cell itself at the goal or without a path.

    Teleporters are ordinary cells, as for the scripted policy of the data. The result is shared: do not write to it.
    """
    return following(path_lengths(maze), walls(maze).shape[1])


def following(steps: np.ndarray, columns: int) -> np.ndarray:
    """From path lengths ``[cell, goal]`` (cells, cells), -1 for no path, to the next cell of a shortest path.

    Of several paths, the one that begins upwards, leftwards, downwards, in this order. At the goal or without a path, the
    cell itself.

    Args:
        steps: of a grid of cells, numbered row by row; neighbours are those at length 1.
        columns: of the grid.
    """
    cell, far = np.arange(len(steps)), len(steps)
    candidates = [cell, *((cell + row * columns + column) % far for row, column in DIRECTIONS)]
    left = np.where(steps < 0, far, steps)
    cost = [left, *(np.where(steps[cell, other][:, None] == 1, left[other], far) for other in candidates[1:])]
    return np.stack(candidates)[np.argmin(cost, 0), cell[:, None]]


@functools.cache
def oracle_cells(maze: str) -> np.ndarray:
    """As :func:`next_cells`, by somebody who knows the teleporters: around them where possible, else into the nearest."""
    if maze not in ENTRIES:
        return next_cells(maze)
    entries, columns = numbers(maze, ENTRIES[maze]), walls(maze).shape[1]
    around = _path_lengths(_moves(maze, entries.tolist()), ~walls(maze).ravel())
    to_entry = path_lengths(maze)[:, entries]
    nearest = entries[np.where(to_entry < 0, len(around), to_entry).argmin(1)]
    into = next_cells(maze)[np.arange(len(around)), nearest]
    return np.where(around >= 0, following(around, columns), into[:, None])


# -- frozen evaluation episodes -----------------------------------------------------------------------------------------


def evaluation_trials(maze: str, episodes: int) -> TaskList:
    """The first ``episodes`` evaluation episodes of a maze: number ``i`` is of task ``1 + i % 5``.

    Start, goal and seed of an episode depend on :data:`VERSION`, the maze and its number alone; any multiple of 5 is
    balanced over the tasks.

    Raises:
        UnknownNameError: no such maze.
        ConfigError: fewer than one episode.
    """
    middle = centres(maze)
    if episodes < 1:
        raise ConfigError(f"{maze}: episodes must be at least 1, got {episodes}.")
    pairs = np.stack([numbers(maze, pair) for pair in TASKS[maze]])
    points = []
    for i in range(episodes):
        draws = [derive_seed(0, VERSION, maze, i, name) for name in ("start x", "start y", "goal x", "goal y")]
        offset = NOISE * (2.0 * np.array(draws, dtype=np.float64) / 2.0**63 - 1.0)
        points.append(np.round(middle[pairs[i % len(pairs)]] + offset.reshape(2, 2), 3))
    start, goal = np.stack(points, 1)
    seeds = tuple(derive_seed(0, VERSION, maze, i, "seed") for i in range(episodes))
    return TaskList(f"{VERSION}/{maze}[:{episodes}]", seeds, {"start": start.tolist(), "goal": goal.tolist()})
