"""Schedules: pure functions ``(num_tasks, budget, rng) -> [(task, budget), ...]``.

``budget`` is what one task gets by default. Every schedule of ``num_tasks`` tasks spends ``num_tasks * budget`` units, so
that agents on different schedules of one suite train equally long.
"""

from __future__ import annotations

import numpy as np

from clbench.errors import ConfigError

Slots = list[tuple[int, int]]


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")


def sequential(*, num_tasks: int, budget: int, rng: np.random.Generator) -> Slots:
    """Each task once, in order."""
    return [(t, budget) for t in range(num_tasks)]


def cyclic(*, num_tasks: int, budget: int, rng: np.random.Generator, cycles: int = 2) -> Slots:
    """The sequence ``cycles`` times over; a task's budget is divided among its visits."""
    _positive("cycles", cycles)
    return [(t, b) for b in _split(budget, cycles) for t in range(num_tasks)]


def shuffled(*, num_tasks: int, budget: int, rng: np.random.Generator, cycles: int = 1) -> Slots:
    """Each task once per cycle, in an order drawn anew for each cycle."""
    _positive("cycles", cycles)
    return [(int(t), b) for b in _split(budget, cycles) for t in rng.permutation(num_tasks)]


def uniform(*, num_tasks: int, budget: int, rng: np.random.Generator, phases: int = 0) -> Slots:
    """A task drawn uniformly for each of ``phases`` phases (0: twice the number of tasks); some may be missing."""
    pieces = _pieces(num_tasks, budget, phases)
    return [(int(t), b) for t, b in zip(rng.integers(num_tasks, size=len(pieces)), pieces, strict=True)]


def markov(*, num_tasks: int, budget: int, rng: np.random.Generator, phases: int = 0, stay: float = 0.5) -> Slots:
    """A Markov chain: the next phase keeps its task with probability ``stay``, else moves to another one uniformly."""
    if not 0 <= stay <= 1:
        raise ConfigError(f"stay must be in [0, 1], got {stay}.")
    task, slots = int(rng.integers(num_tasks)), []
    for b in _pieces(num_tasks, budget, phases):
        slots.append((task, b))
        if num_tasks > 1 and rng.random() >= stay:
            task = (task + 1 + int(rng.integers(num_tasks - 1))) % num_tasks
    return slots


def blurred(*, num_tasks: int, budget: int, rng: np.random.Generator, overlap: float = 0.5, slices: int = 10) -> Slots:
    """Sequential, but the boundaries are blurred.

    Each task's budget is cut into ``slices``. In the stretch of ``overlap`` task lengths centred on a boundary, a slice at
    the fraction ``f`` of the stretch belongs to the later task with probability ``f``; elsewhere the order is sequential.
    Successive slices of one task are joined to one phase. ``overlap=0`` is the sequential schedule.
    """
    if not 0 <= overlap <= 1:
        raise ConfigError(f"overlap must be in [0, 1], got {overlap}.")
    _positive("slices", slices)
    if budget < slices:
        raise ConfigError(
            f"blurred cuts each task's budget into {slices} slices, so it must be at least that; got {budget}."
        )
    slots: Slots = []
    for t in range(num_tasks):
        for s, b in enumerate(_split(budget, slices)):
            x = t + (s + 0.5) / slices  # time in task lengths
            task = t
            boundary = round(x)
            if 0 < boundary < num_tasks and overlap > 0 and abs(x - boundary) < overlap / 2:
                later = rng.random() < (x - boundary) / overlap + 0.5
                task = boundary if later else boundary - 1
            slots.append((task, b))
    return _merge(slots)


def power_law(
    *,
    num_tasks: int,
    budget: int,
    rng: np.random.Generator,
    exponent: float = 1.0,
    phases: int = 0,
    introduce: bool = True,
) -> Slots:
    """Power-law recurrence: ``P(task) ~ (time since it was last seen) ** -exponent``.

    Time counts phases; ``phases=0`` means four times the number of tasks. With ``introduce``, new tasks arrive in
    order and evenly spaced (task ``k`` of ``n`` first comes at phase ``k * phases // n``), and the phases in between
    are drawn from the tasks seen so far; without it every phase is drawn from all tasks, each counting as seen once,
    in order, before the stream began, and some tasks may never come. ``exponent=0`` draws uniformly. Source:
    'Catastrophic Interference is Mitigated in Naturalistic Power-Law Learning Environments' (the probability of
    meeting a task falls as a power law of the time since it was last performed).
    """
    if not (exponent >= 0 and np.isfinite(exponent)):
        raise ConfigError(f"exponent must be >= 0, got {exponent}.")
    pieces = _pieces(num_tasks, budget, phases, default=4)
    last = np.arange(-num_tasks, 0)
    known = 0 if introduce else num_tasks
    slots: Slots = []
    for time, b in enumerate(pieces):
        if known < num_tasks and known * len(pieces) // num_tasks <= time:
            task, known = known, known + 1
        else:
            weight = (time - last[:known]).astype(float) ** -exponent
            task = int(rng.choice(known, p=weight / weight.sum()))
        last[task] = time
        slots.append((task, b))
    return slots


def _split(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` whole numbers that differ by at most 1."""
    if total < parts:
        raise ConfigError(f"A budget of {total} cannot be divided into {parts} phases; raise it or use fewer phases.")
    return [total // parts + (i < total % parts) for i in range(parts)]


def _pieces(num_tasks: int, budget: int, phases: int, default: int = 2) -> list[int]:
    if phases < 0:
        raise ConfigError(f"phases must be >= 0, got {phases}.")
    return _split(num_tasks * budget, phases or default * num_tasks)


def _merge(slots: Slots) -> Slots:
    merged: Slots = []
    for task, b in slots:
        if merged and merged[-1][0] == task:
            merged[-1] = (task, merged[-1][1] + b)
        else:
            merged.append((task, b))
    return merged
