"""Plasticity seen from outside: how well a learner predicts *while* it learns, early in the stream and late.

``A_i`` is the online accuracy of phase ``i``: the share of its training samples that were predicted right before the
update on them (test, then train: prequential). It needs no evaluation, and is defined for learners that are told no
boundaries.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clbench.errors import DataError

ONLINE, COUNT = "online_accuracy", "online_count"
FIRST_AND_LAST = 0.25
"""Share of the phases that count as the first, and as the last, ones in :func:`online_results`."""


def prequential(accuracy: np.ndarray | Sequence[float], count: np.ndarray | Sequence[float]) -> float | None:
    """``A = sum_r n_r a_r / sum_r n_r = (1/n) sum_s 1[yhat_s = y_s]``, each prediction made before the update on its
    sample.

    Dawid 1984; Gama et al. 2013 (On evaluating stream learning algorithms). ``None`` without samples.

    Args:
        accuracy: (R,) share of right predictions, per report.
        count: (R,) predictions that each report is about.
    """
    a, n = np.asarray(accuracy, dtype=np.float64), np.asarray(count, dtype=np.float64)
    return float((a * n).sum() / n.sum()) if n.sum() > 0 else None


def loss_of_plasticity(
    per_task: Sequence[float] | np.ndarray, k: int, reference: Sequence[float] | np.ndarray | None = None
) -> float | None:
    """``LoP = mean_{first k} A_j - mean_{last k} A_j``: above 0 if the learner has become slower. Dohare et al. 2024.

    Without ``reference`` this has a meaning only where tasks are exchangeable, as permutations of one task are. Where
    some are harder, ``A_j / A_j^ref`` takes the place of ``A_j``, with the reference of a fresh network on the same task.

    Args:
        per_task: (T,) online accuracy ``A_j`` (or area under the learning curve) of each task, in the order of training.
        k: how many tasks are the first and the last ones; ``None`` comes back where they would overlap.
        reference: (T,) the same of a fresh network (protocol ``independent``), positive.
    """
    a = np.asarray(per_task, dtype=np.float64)
    if reference is not None:
        ref = np.asarray(reference, dtype=np.float64)
        if ref.shape != a.shape or not (ref > 0).all():
            raise DataError(f"The reference must have a positive value for each of the {len(a)} tasks.")
        a = a / ref
    if k < 1 or 2 * k > len(a) or not np.isfinite(a).all():
        return None
    return float(a[:k].mean() - a[-k:].mean())


def sample_plasticity(before: Any, after: Any) -> Any:
    """``p = clip(1 - L(w', z) / max(L(w, z), 1e-8), 0, 1)``: what one update on a sample did to the loss of that very
    sample.

    Elsayed & Mahmood 2024 (UPGD). 1 if the sample is fitted at once, 0 if nothing was learned (or the loss rose). Average
    it over the samples of a task.

    Args:
        before: losses >= 0 before the update on each sample, array or tensor of any shape.
        after: losses of the same samples after it.
    """
    return (1 - after / before.clip(1e-8)).clip(0, 1)


# -- of a run ----------------------------------------------------------------------------------------------------------


def online_results(path: str | Path, phases: int, complete: bool) -> dict[str, Any] | None:
    """The online accuracy of a run from its ``train.csv``; ``None`` where the learner does not report it.

    Args:
        path: of ``train.csv``.
        phases: of the stream.
        complete: whether all of them were trained. Else those before the last one that has rows were; the others are
            ``None``, and left out of ``accuracy``.

    Returns:
        ``accuracy`` of all samples; ``per_phase``; ``loss_of_plasticity`` between the first and the last quarter of the
        phases (of all of them: ``None`` until they are finished), and how many phases a quarter is (``k``).

    Raises:
        DataError: the file is missing or damaged.
    """
    rows = _online_rows(Path(path))
    if not rows:
        return None
    table = np.array(rows, dtype=np.float64)
    finished = phases if complete else int(table[:, 0].max()) - 1
    per_phase = [
        prequential(table[table[:, 0] == i, 1], table[table[:, 0] == i, 2]) if i <= finished else None
        for i in range(1, phases + 1)
    ]
    done, k = table[table[:, 0] <= finished], max(1, int(phases * FIRST_AND_LAST))
    values = [math.nan if a is None else a for a in per_phase]
    return {
        "accuracy": prequential(done[:, 1], done[:, 2]),
        "per_phase": per_phase,
        "loss_of_plasticity": loss_of_plasticity(values, k),
        "k": k,
    }


def _online_rows(path: Path) -> list[tuple[int, float, float]]:
    """(phase, accuracy, count) of the rows that have them."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not {ONLINE, COUNT} <= set(reader.fieldnames or ()):
                return []
            found = [(row["phase"], row[ONLINE], row[COUNT]) for row in reader]
        return [(int(p), float(a), float(n)) for p, a, n in found if a and n]
    except (OSError, UnicodeDecodeError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
