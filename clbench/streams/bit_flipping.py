"""The stream ``bit-flipping``: regression whose input distribution changes slowly, by one bit at a time."""

from __future__ import annotations

import math

import numpy as np

from clbench.contracts import Metric, Task, TaskList
from clbench.data.registry import dataset_id
from clbench.errors import ConfigError
from clbench.streams.core import Suite

BITS, SLOW, UNITS, BETA = 20, 15, 100, 0.7  # the authors' configuration
UPDATES = 1000


def needed(bits: int, beta: float) -> float:
    """``beta (m + 1)``: a unit is active where more inputs agree; rounded, so that whole numbers are whole."""
    return round(beta * (bits + 1), 9)


def mean_square(bits: int = BITS, units: int = UNITS, beta: float = BETA) -> float:
    """``E y^2 = n P(Binomial(m + 1, 1/2) > beta (m + 1))`` over all networks and inputs, before ``y`` is cut.

    Active units have independent signs, so only their number counts; an input agrees with a weight by chance.
    """
    least = math.floor(needed(bits, beta)) + 1
    return units * sum(math.comb(bits + 1, k) for k in range(least, bits + 2)) / 2 ** (bits + 1)


def bit_flipping(
    *,
    rng: np.random.Generator,
    tasks: int = 200,
    bits: int = BITS,
    slow: int = SLOW,
    units: int = UNITS,
    beta: float = BETA,
    transitions: int = 10_000,
    episodes: int = 20,
) -> Suite:
    """One target network, and tasks that differ from the one before in one slow bit, drawn uniformly.

    Score of a prediction: ``1 - error^2 / E y^2`` with the mean square of the targets of all networks and inputs
    (:func:`mean_square`; 3.92 by default), so 1 is perfect, and always saying 0 scores 0 on average over networks. Source:
    Dohare, Sutton & Mahmood 2021 (arXiv 2108.06325), where a bit flips every 10,000 examples.

    Args:
        rng: draws the target network, the first values of the slow bits, the flips, and the seeds of the data sets.
        tasks: number of tasks; between two of them one bit flips.
        bits: of the input.
        slow: how many of them are slow.
        units: of the target network.
        beta: fraction of inputs that must agree with a unit's weights to make it active.
        transitions: examples in each task's data set.
        episodes: examples on which a task is evaluated, the same random bits for all tasks.

    Raises:
        ConfigError: fewer than one task, or an option out of its range.
    """
    if tasks < 1:
        raise ConfigError(f"tasks must be at least 1, got {tasks}.")
    if not 1 <= slow <= bits:
        raise ConfigError(f"bit-flipping: slow must be from 1 to bits={bits}, got {slow}.")
    if units < 1 or not 0 <= beta < 1:
        raise ConfigError(f"bit-flipping: units must be at least 1 and beta in [0, 1), got {units} and {beta}.")
    metric = Metric("return", low=-mean_square(bits, units, beta), high=0.0)
    network, values = int(rng.integers(2**31)), rng.integers(2, size=slow)
    table = []
    for i in range(tasks):
        if i:
            values[rng.integers(slow)] ^= 1
        options = {"slow": values.tolist(), "bits": bits, "units": units, "beta": beta, "network": network}
        data = dataset_id("bit-flip", **options, transitions=transitions, seed=int(rng.integers(2**31)))
        table.append(Task(f"flips-{i}", "clbench/BitFlip-v0", options, data, TaskList.from_seeds(episodes), metric))
    return Suite("bit-flipping", table, updates=UPDATES, env_steps=10_000)
