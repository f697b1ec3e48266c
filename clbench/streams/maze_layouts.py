"""Layouts of the Diverse PointMaze, their frozen lists and trials; ``maze-layouts`` and ``point-maze-dynamics``.

A layout is the 4 x 4 core of a maze, its rows from top to bottom joined by ``/``, ``#`` a wall and ``O`` free; a ring of
walls surrounds it. As a number (its *code*), bit ``4 * row + column`` is 1 for a wall. Source: PLDM (Sobal et al. 2025,
arXiv 2502.14819), re-implemented from its facts.

Generation: each cell is free with probability 1/2; then, twice, every free cell with more than 6 free cells among its 8
neighbours becomes a wall; what remains must have 8 to 12 free cells, all connected, at most 7 steps apart.

Distance of layouts: Levenshtein distance of the 6 x 6 texts, ring and separators included.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from clbench.contracts import Task, TaskList
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError, DataError, unknown_name
from clbench.streams.core import Suite

LIST = "point_maze_v1.json"  # made by scripts/make_maze_lists.py
SIDE, CELLS = 4, 16
FREE_CELLS = (8, 12)
MAX_PATH = 7
FAR = (5, 3)  # steps between start and goal: at least the first that the layout has
# the five training layouts of the paper
PUBLISHED = ("####/#OOO/OO#O/#O#O", "OO##/#OOO/OOOO/OO##", "#OO#/OOOO/##OO/##OO", "O###/OOOO/O##O/OO##",
             "##OO/##O#/#OOO/#OO#")  # fmt: skip
BUCKETS = range(9)  # smallest edit distance to a published layout

# -- one layout -------------------------------------------------------------------------------------------------------


def layout_code(layout: str) -> int:
    """The code of a layout, given as text or by its name (``M0`` ... of the training, ``E0`` ... of the held-out list).

    Raises:
        ConfigError: the text is no layout: not 4 rows of 4, an unknown letter, fewer than 2 free cells, or free cells
            that are not connected.
    """
    text = str(layout)
    if "/" not in text and text[1:].isdigit() and text[:1] in ("M", "E"):
        names = named_layouts()
        if text not in names:
            raise unknown_name("layout", text, names)
        text = names[text]
    rows = text.split("/")
    if len(rows) != SIDE or any(len(row) != SIDE or set(row) - set("#O") for row in rows):
        raise ConfigError(
            f"A maze layout is 4 rows of 4 letters joined by '/', '#' a wall and 'O' free, such as {PUBLISHED[0]!r}, or "
            f"a name such as 'M0'; got {text!r}."
        )
    code = sum(1 << i for i, letter in enumerate("".join(rows)) if letter == "#")
    steps = path_lengths(code)
    free = np.diag(steps) == 0
    if free.sum() < 2:
        raise ConfigError(f"The maze layout {text!r} needs at least two free cells.")
    if (steps[np.ix_(free, free)] < 0).any():
        raise ConfigError(f"The free cells of the maze layout {text!r} are not connected; open a wall between them.")
    return code


def layout_text(code: int) -> str:
    """The inverse of :func:`layout_code`."""
    letters = "".join("#" if code >> i & 1 else "O" for i in range(CELLS))
    return "/".join(letters[r : r + SIDE] for r in range(0, CELLS, SIDE))


def with_ring(layout: str) -> str:
    """The 6 x 6 text of a layout."""
    wall = "#" * (SIDE + 2)
    return "/".join([wall, *(f"#{row}#" for row in layout.split("/")), wall])


def _grid(codes: np.ndarray) -> np.ndarray:
    """Codes (N,) -> free cells (N, 4, 4) bool."""
    return ((codes[:, None] >> np.arange(CELLS)) & 1 == 0).reshape(-1, SIDE, SIDE)


@functools.cache
def path_lengths(code: int) -> np.ndarray:
    """Steps between cells (16, 16) int64: shortest path over free neighbours, 0 from a free cell to itself, else -1."""
    return _path_lengths(np.array([code]))[0]


def _path_lengths(codes: np.ndarray) -> np.ndarray:
    """Of many layouts, (N, 16, 16) int64."""
    row, column = np.divmod(np.arange(CELLS), SIDE)
    touching = np.abs(row[:, None] - row) + np.abs(column[:, None] - column) == 1
    free = _grid(codes).reshape(-1, CELLS)
    both = free[:, :, None] & free[:, None, :]
    moves = (touching & both).astype(np.float32)
    reached = np.eye(CELLS, dtype=bool) & both
    steps = np.where(reached, 0, -1)
    for length in range(1, CELLS):
        found = (reached.astype(np.float32) @ moves > 0) & ~reached
        steps[found] = length
        reached |= found
    return steps


@functools.cache
def far_pairs(code: int) -> np.ndarray:
    """Pairs of cells (start, goal) (P, 2), far apart: at least 5 steps, else at least 3, else as many as there are."""
    steps = path_lengths(code)
    enough = next((n for n in FAR if n <= steps.max()), int(steps.max()))
    return np.argwhere(steps >= enough)


# -- making layouts ---------------------------------------------------------------------------------------------------


def generate_layouts(count: int, rng: np.random.Generator, exclude: Collection[str] = ()) -> list[str]:
    """``count`` different layouts that are not in ``exclude``, in the order in which they are found."""
    found: dict[str, None] = {}
    while len(found) < count:
        codes = _break_open(rng.integers(1 << CELLS, size=256))
        texts = [layout_text(int(c)) for c in codes[acceptable(codes)]]
        found.update(dict.fromkeys(t for t in texts if t not in exclude))
    return list(found)[:count]


def acceptable(codes: np.ndarray) -> np.ndarray:
    """Which of the codes (N,) have 8 to 12 free cells, all connected, at most 7 steps apart -> (N,) bool."""
    free = _grid(codes).reshape(-1, CELLS)
    steps = _path_lengths(codes)
    connected = ((steps >= 0) | ~(free[:, :, None] & free[:, None, :])).all((1, 2))
    number = free.sum(1)
    return (number >= FREE_CELLS[0]) & (number <= FREE_CELLS[1]) & connected & (steps.max((1, 2)) <= MAX_PATH)


def _break_open(codes: np.ndarray) -> np.ndarray:
    """Twice, all free cells with more than 6 free neighbours (of 8) become walls."""
    for _ in range(2):
        free = _grid(codes)
        padded = np.pad(free, ((0, 0), (1, 1), (1, 1))).astype(np.int64)
        window = [padded[:, r : r + SIDE, c : c + SIDE] for r in range(3) for c in range(3)]
        open_area = free & (sum(window) - free > 6)
        codes = codes | (open_area.reshape(-1, CELLS) << np.arange(CELLS)).sum(1)
    return codes


def all_layouts() -> list[str]:
    """Every layout that the generator can give, in the order of their codes."""
    codes = np.arange(1 << CELLS)
    codes = codes[_break_open(codes) == codes]
    return [layout_text(int(c)) for c in codes[acceptable(codes)]]


def edit_distances(layouts: Sequence[str], reference: str) -> np.ndarray:
    """Levenshtein distance of each of ``layouts`` (N,) to ``reference``, with rings -> (N,) int64."""
    letters = np.array([list(with_ring(text)) for text in layouts]).T
    before = [np.full(len(layouts), j) for j in range(len(letters) + 1)]
    for i, letter in enumerate(with_ring(reference), start=1):
        row = [np.full(len(layouts), i)]
        for j, column in enumerate(letters, start=1):
            change = before[j - 1] + (column != letter)
            row.append(np.minimum(np.minimum(before[j], row[-1]) + 1, change))
        before = row
    return before[-1]


def distance_to_published(layouts: Sequence[str]) -> np.ndarray:
    """Smallest edit distance of each layout to one of the five published training layouts -> (N,) int64."""
    return np.min([edit_distances(layouts, published) for published in PUBLISHED], axis=0)


# -- frozen lists -----------------------------------------------------------------------------------------------------


@functools.cache
def load_lists() -> dict[str, Any]:
    """The frozen layouts and trials. The result is shared: do not write to it.

    Raises:
        DataError: the file is missing or of another version (a broken installation).
    """
    path = importlib.resources.files("clbench.streams") / "lists" / LIST
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the evaluation lists {LIST}: {error}. Install clbench again.") from error
    if lists.get("version") != 1:
        raise DataError(f"The evaluation lists {LIST} have version {lists.get('version')}, expected 1.")
    return lists


def named_layouts() -> dict[str, str]:
    """``M0`` ... ``M39`` (training, nested: 5, 10, 20, 40) and ``E0`` ... ``E39`` (held out), name -> text."""
    lists = load_lists()
    kinds = (("M", lists["training"]), ("E", lists["heldout"]))
    return {f"{letter}{i}": text for letter, texts in kinds for i, text in enumerate(texts)}


def training_layouts(count: int) -> tuple[str, ...]:
    """The first ``count`` training layouts.

    Raises:
        ConfigError: more than there are, or none.
    """
    texts = load_lists()["training"]
    if not 1 <= count <= len(texts):
        raise ConfigError(f"layouts must be from 1 to {len(texts)} (the frozen training layouts), got {count}.")
    return tuple(texts[:count])


def training_trials(number: int) -> TaskList:
    """The trials on training layout ``number`` (0 for ``M0``), with the options start, goal and layout."""
    return _task_list(f"M{number}", load_lists()["trials"]["training"][number])


def heldout_trials() -> TaskList:
    """80 trials, two on each of the 40 layouts that no training set holds, with the options start, goal and layout."""
    return _task_list("heldout", load_lists()["trials"]["heldout"])


def bucket_trials(distance: int) -> TaskList:
    """20 trials on 5 layouts at edit distance ``distance`` (0 to 8) from the nearest of the 5 published layouts.

    The options are start, goal and layout; distance 0 are the published layouts themselves.

    Raises:
        ConfigError: no such bucket.
    """
    if distance not in BUCKETS:
        raise ConfigError(f"There are buckets for the edit distances 0 to {BUCKETS[-1]}, not for {distance}.")
    return _task_list(f"distance-{distance}", load_lists()["trials"]["buckets"][int(distance)])


def _task_list(name: str, trials: dict[str, Any]) -> TaskList:
    options = {key: trials[key] for key in ("start", "goal", "layout")}
    return TaskList(f"{load_lists()['name']}/{name}", trials["seeds"], options)


# -- the stream -------------------------------------------------------------------------------------------------------


def maze_layouts(
    *, rng: np.random.Generator, layouts: int = 5, observation: str = "state", transitions: int = 200_000,
    episodes: int = 20,
) -> Suite:  # fmt: skip
    """The first ``layouts`` training layouts as tasks, each with random-policy data and frozen trials of its own.

    Args:
        rng: draws the seeds of the data sets.
        layouts: number of tasks, 1 to 40; the first 5 are those of the paper.
        observation: ``"state"`` (position, velocity), ``"layout"`` (these, and the walls as 16 numbers) or ``"pixels"``
            (3 x 64 x 64, and the velocity).
        transitions: size of each task's data set.
        episodes: evaluation episodes per task, the first of the 50 shipped ones.

    Raises:
        ConfigError: more layouts or episodes than the lists have, or none; an unknown observation.
    """
    if observation not in (known := ("state", "layout", "pixels")):
        raise unknown_name("value of observation", observation, known, where="stream 'maze-layouts'")
    tasks = []
    for number, layout in enumerate(training_layouts(layouts)):
        trials = training_trials(number)
        if not 1 <= episodes <= len(trials):
            raise ConfigError(
                f"maze-layouts: episodes must be from 1 to {len(trials)} (the frozen list), got {episodes}."
            )
        data = dataset_id(
            "point-maze", layouts=layout, transitions=transitions, observation=observation,
            seed=int(rng.integers(2**31)),
        )  # fmt: skip
        kwargs = {"layout": layout, "observation": observation}
        tasks.append(Task(f"M{number}", "clbench/PointMaze-v0", kwargs, data, trials.head(episodes), "success"))
    return Suite("maze-layouts", tasks, updates=2000, env_steps=20_000)


DYNAMICS: dict[str, dict[str, float]] = {
    "nominal": {},
    "gain-0.5": {"action_gain": 0.5},
    "gain-1.5": {"action_gain": 1.5},
    "damping-20": {"damping": 20.0},
    "reversed": {"action_gain": -1.0},
}


def point_maze_dynamics(
    *, rng: np.random.Generator, layout: int = 1, observation: str = "state", transitions: int = 200_000,
    episodes: int = 20,
) -> Suite:  # fmt: skip
    """Five tasks in one maze that differ in what actions do, not in what is seen.

    ``nominal`` (damping 1); forces of half and of 1.5 times the size; damping 20, which halves a speed in 0.15 s instead of
    2.9 s; and reversed forces. All tasks have the same frozen trials, those of the layout in ``maze-layouts``.

    Args:
        rng: draws the seeds of the data sets.
        layout: number of the training layout, 0 to 39.
        observation: as in :func:`maze_layouts`.
        transitions: size of each task's data set.
        episodes: evaluation episodes per task, the first of the 50 shipped ones.

    Raises:
        ConfigError: no such layout, more episodes than the list has, or none; an unknown observation.
    """
    if observation not in (known := ("state", "layout", "pixels")):
        raise unknown_name("value of observation", observation, known, where="stream 'point-maze-dynamics'")
    known_layouts = training_layouts(40)
    if not 0 <= layout < len(known_layouts):
        raise ConfigError(f"point-maze-dynamics: layout must be from 0 to {len(known_layouts) - 1}, got {layout}.")
    trials = training_trials(layout)
    if not 1 <= episodes <= len(trials):
        raise ConfigError(
            f"point-maze-dynamics: episodes must be from 1 to {len(trials)} (the frozen list), got {episodes}."
        )
    tasks = []
    for name, dynamics in DYNAMICS.items():
        data = dataset_id(
            "point-maze", layouts=known_layouts[layout], transitions=transitions, observation=observation,
            seed=int(rng.integers(2**31)), **dynamics,
        )  # fmt: skip
        kwargs = {"layout": known_layouts[layout], "observation": observation, **dynamics}
        tasks.append(Task(name, "clbench/PointMaze-v0", kwargs, data, trials.head(episodes), "success"))
    return Suite("point-maze-dynamics", tasks, updates=2000, env_steps=20_000)
