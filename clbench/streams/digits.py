"""Streams of classification tasks over one labelled source; scikit-learn's digits unless another is named.

Defaults follow the usual small settings: 10 permutations with 10 epochs of 45 batches of 32, 5 pairs of classes with 40
epochs of about 9 batches of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clbench.contracts import Task, TaskList
from clbench.data.labelled import Labelled, load_source
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError
from clbench.streams.core import Suite

ENV_STEPS = 20_000  # examples per task for agents that learn from interaction, about 14 epochs of digits


def digits_permuted(*, rng: np.random.Generator, tasks: int = 10, episodes: int = 360, source: str = "digits") -> Suite:
    """Each task shows the pixels in a fixed order of its own; all classes, one output layer.

    Args:
        rng: draws the seeds of the permutations.
        tasks: number of permutations.
        episodes: test examples per task, the first of the test split; at most all of them.
        source: a labelled source, see :func:`clbench.data.labelled.load_source`.

    Raises:
        ConfigError: fewer than one task or episode.
    """
    _at_least_one(tasks=tasks)
    data = load_source(source)
    test = _head(data.test.tolist(), episodes)
    seeds = rng.choice(2**31, size=tasks, replace=False)
    table = [_task(f"permutation-{i}", source, test, permutation=int(s)) for i, s in enumerate(seeds)]
    return Suite("digits-permuted", table, updates=450, env_steps=ENV_STEPS, reveals="task_id")


def digits_split(
    *, rng: np.random.Generator, classes_per_task: int = 2, episodes: int = 360, source: str = "digits"
) -> Suite:
    """Class-incremental: each task shows some classes, in order; one output layer over all classes.

    A task is evaluated on the test examples of its classes (at most ``episodes`` of them).

    Raises:
        ConfigError: ``classes_per_task`` does not divide the number of classes, or is below 1.
    """
    _at_least_one(classes_per_task=classes_per_task)
    data = load_source(source)
    if data.num_classes % classes_per_task:
        raise ConfigError(
            f"classes_per_task must divide the {data.num_classes} classes of {source!r}, got {classes_per_task}."
        )
    table = []
    for first in range(0, data.num_classes, classes_per_task):
        classes = list(range(first, first + classes_per_task))
        test = _head(_of_classes(data, classes), episodes)
        table.append(_task("classes-" + "-".join(map(str, classes)), source, test, classes=classes))
    return Suite("digits-split", table, updates=360, env_steps=ENV_STEPS)


def digits_rotated(
    *,
    rng: np.random.Generator,
    angles: tuple[float, ...] = (0.0, 30.0, 60.0, 90.0, 120.0),
    episodes: int = 360,
    source: str = "digits",
) -> Suite:
    """Each task shows the pictures turned by a fixed angle (degrees, counter-clockwise); all classes.

    Raises:
        ConfigError: no angle, or the same one twice.
    """
    if not angles or len(set(angles)) != len(angles):
        raise ConfigError(f"angles must be different numbers of degrees, at least one; got {angles}.")
    test = _head(load_source(source).test.tolist(), episodes)
    table = [_task(f"rotation-{angle:g}", source, test, rotation=float(angle)) for angle in angles]
    return Suite("digits-rotated", table, updates=450, env_steps=ENV_STEPS)


def _task(name: str, source: str, test: Sequence[int], **transform: Any) -> Task:
    """A Classify task: trained on the transformed training split, evaluated on the listed rows of the source."""
    options = {"source": source, **transform}
    # the seeds choose nothing, because every episode names its example
    evaluation = TaskList(f"{source}-{name}-{len(test)}-v1", tuple(range(len(test))), {"index": tuple(test)})
    return Task(name, "clbench/Classify-v0", options, dataset_id("classify", **options), evaluation, "success")


def _of_classes(data: Labelled, classes: Sequence[int]) -> list[int]:
    return [row for row in data.test.tolist() if int(data.y[row]) in classes]


def _head(rows: list[int], episodes: int) -> list[int]:
    _at_least_one(episodes=episodes)
    return rows[:episodes]


def _at_least_one(**options: int) -> None:
    for name, value in options.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
