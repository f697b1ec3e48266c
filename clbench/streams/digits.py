"""Streams of classification tasks over one labelled source; scikit-learn's digits unless another is named.

Defaults follow the usual small settings: 10 permutations with 10 epochs of 45 batches of 32, 5 pairs of classes with 40
epochs of about 9 batches of 32. The online streams have hundreds of tasks, each for a few hundred examples that are seen
one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from clbench.contracts import Reveals, Task, TaskList
from clbench.data.labelled import Labelled, load_source
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError, unknown_name
from clbench.streams.core import Suite

Scenario = Literal["class", "domain", "task"]
ENV_STEPS = 20_000  # examples per task for agents that learn from interaction, about 14 epochs of digits
ONLINE_UPDATES = 250  # examples per task of the online streams


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
    *,
    rng: np.random.Generator,
    classes_per_task: int = 2,
    scenario: Scenario = "class",
    episodes: int = 360,
    source: str = "digits",
) -> Suite:
    """Each task shows some of the classes, in order.

    What must be told in the end is the scenario (van de Ven & Tolias 2019, arXiv 1904.07734):

    | scenario | the answer is | outputs | the agent is told |
    |---|---|---|---|
    | ``class`` | the class, one of all | all classes | boundaries |
    | ``domain`` | the position of the class within its task | ``classes_per_task`` | boundaries |
    | ``task`` | the same | ``classes_per_task`` | the task, so that it may have one head for each |

    A task is evaluated on the test examples of its classes (at most ``episodes`` of them).

    Raises:
        ConfigError: ``classes_per_task`` does not divide the number of classes, or is below 1; an unknown scenario.
    """
    _at_least_one(classes_per_task=classes_per_task)
    if scenario not in get_args(Scenario):
        raise unknown_name("value of scenario", str(scenario), get_args(Scenario), where="stream 'digits-split'")
    data = load_source(source)
    if data.num_classes % classes_per_task:
        raise ConfigError(
            f"classes_per_task must divide the {data.num_classes} classes of {source!r}, got {classes_per_task}."
        )
    relabel = {} if scenario == "class" else {"relabel": True}  # left out, so that stored streams stay equal
    table = []
    for first in range(0, data.num_classes, classes_per_task):
        classes = list(range(first, first + classes_per_task))
        test = _head(_of_classes(data, classes), episodes)
        table.append(_task("classes-" + "-".join(map(str, classes)), source, test, classes=classes, **relabel))
    reveals: Reveals = "task_id" if scenario == "task" else "boundaries"
    return Suite("digits-split", table, updates=360, env_steps=ENV_STEPS, reveals=reveals)


def digits_online_inputs(
    *, rng: np.random.Generator, tasks: int = 200, episodes: int = 20, source: str = "digits"
) -> Suite:
    """Many short tasks that differ in a permutation of the pixels: does an agent lose the ability to learn?

    Meant for agents that see one example at a time (``batch_size=1``) and are judged by their accuracy on each example
    before they learn from it. The tasks are exchangeable: each is as hard as the next. Source: input-permuted MNIST of
    Elsayed & Mahmood 2024 (arXiv 2404.00781), which changes every 5000 examples.

    Args:
        rng: draws the seeds of the permutations.
        tasks: number of permutations.
        episodes: test examples per task, the first of the test split; few, as there are many tasks.
        source: a labelled source, see :func:`clbench.data.labelled.load_source`.

    Raises:
        ConfigError: fewer than one task or episode.
    """
    return _online("digits-online-inputs", "permutation", rng, tasks, episodes, source)


def digits_online_labels(
    *, rng: np.random.Generator, tasks: int = 200, episodes: int = 20, source: str = "digits"
) -> Suite:
    """Many short tasks that differ in a permutation of the labels; the pictures stay.

    What is learned about pictures stays useful, and only what they are called has to be learned anew. Otherwise as
    :func:`digits_online_inputs`. Source: label-permuted EMNIST of Elsayed & Mahmood 2024 (arXiv 2404.00781), which changes
    every 2500 examples.

    Raises:
        ConfigError: fewer than one task or episode.
    """
    return _online("digits-online-labels", "label_permutation", rng, tasks, episodes, source)


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


def _online(name: str, transform: str, rng: np.random.Generator, tasks: int, episodes: int, source: str) -> Suite:
    """``tasks`` Classify tasks that differ in the seed of one transform."""
    _at_least_one(tasks=tasks)
    test = _head(load_source(source).test.tolist(), episodes)
    seeds = rng.choice(2**31, size=tasks, replace=False)
    prefix = {"permutation": "permutation", "label_permutation": "labels"}[transform]
    table = [_task(f"{prefix}-{i}", source, test, **{transform: int(s)}) for i, s in enumerate(seeds)]
    return Suite(name, table, updates=ONLINE_UPDATES, env_steps=ONLINE_UPDATES)


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
