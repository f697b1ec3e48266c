"""A memory of training rows, filled by reservoir sampling."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.agents.continual.batches import empty_like, put, rows, take, tensors, zip_map

Balance = Literal["none", "task"]


class Memory:
    """At most ``size`` rows of all that were offered.

    ``none``: reservoir sampling (Vitter 1985, algorithm R): after ``n`` offered rows each is kept with probability
    ``size / n``. ``task``: the same within each task, the room being shared equally among the tasks so far.

    Rows may be of any kind that :mod:`clbench.agents.continual.batches` takes, the first ``add`` decides.
    """

    def __init__(self, size: int, balance: Balance = "none"):
        self.size, self.balance = size, balance
        self.store: Any = None  # the structure of a batch, (size, ...) each
        self.group = torch.zeros(size, dtype=torch.int64)  # of each slot
        self.filled = 0
        self.seen: list[int] = []  # rows offered, per group
        self._saved: list[Tensor] | None = None  # loaded before the structure was known

    def __len__(self) -> int:
        return self.filled

    def start_group(self) -> None:
        """A new task begins (only ``balance="task"`` needs to know)."""
        if not self.seen or self.seen[-1] > 0:
            self.seen.append(0)

    def prepare(self, batch: Any) -> None:
        """Make room for rows like these."""
        if self.store is None:
            self.store = empty_like(batch, self.size)
            if self._saved is not None:
                put(self.store, torch.arange(self.filled), _like(self.store, self._saved))
                self._saved = None

    def add(self, batch: Any, rng: torch.Generator) -> None:
        """Offer all rows of a batch."""
        self.prepare(batch)
        if not self.seen:
            self.seen.append(0)
        slots: dict[int, int] = {}  # slot -> row of the batch; a later row may take the slot of an earlier one
        draws = torch.rand(rows(batch), generator=rng, device=rng.device, dtype=torch.float64).tolist()
        for row, u in enumerate(draws):
            slot = self._slot(u)
            if slot is not None:
                slots[slot] = row
        if slots:
            device = next(tensors(batch)).device
            into = torch.tensor(list(slots), device=device)
            put(self.store, into, take(batch, torch.tensor(list(slots.values()), device=device)))

    def _slot(self, u: float) -> int | None:
        """Where the next row goes, given a uniform number; None: it is not kept."""
        now = len(self.seen) - 1
        self.seen[now] += 1
        if self.balance == "none":
            if self.filled < self.size:
                self.filled += 1
                return self.filled - 1
            slot = int(u * sum(self.seen))
            return slot if slot < self.size else None
        share = max(1, self.size // len(self.seen))
        mine = (self.group[: self.filled] == now).nonzero()[:, 0]
        if len(mine) >= share:
            place = int(u * self.seen[now])
            return int(mine[place]) if place < len(mine) else None
        if self.filled < self.size:
            self.filled += 1
            slot = self.filled - 1
        else:  # take from the group that has most; within it any row is as good as another
            counts = torch.bincount(self.group[: self.filled], minlength=len(self.seen))
            largest = (self.group == int(counts.argmax())).nonzero()[:, 0]
            slot = int(largest[int(u * len(largest))])
        self.group[slot] = now
        return slot

    def sample(self, count: int, rng: torch.Generator) -> Any:
        """``count`` rows drawn uniformly: without replacement if there are so many, else all of them."""
        return take(self.store, self.sample_index(count, rng))

    def sample_index(self, count: int, rng: torch.Generator) -> Tensor:
        """Slots of the rows that :meth:`sample` would give."""
        order = torch.rand(self.filled, generator=rng, device=rng.device).argsort()
        return order[:count]

    def state_dict(self) -> dict[str, Any]:
        """The rows as a list of tensors, in the order of the batch's structure."""
        held = self._saved
        if self.store is not None:
            held = [t[: self.filled].clone() for t in tensors(self.store)]
        return {
            "rows": [] if held is None else copy.deepcopy(held), "group": self.group.clone(), "filled": self.filled,
            "seen": list(self.seen),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.group, self.filled = state["group"].clone(), int(state["filled"])
        self.seen = [int(n) for n in state["seen"]]
        held = [t.clone() for t in state["rows"]]
        self._saved, self.store = (held or None), None


def _like(tree: Any, flat: list[Tensor]) -> Any:
    """The tensors of ``flat`` in the structure of ``tree``."""

    found = iter(flat)
    return zip_map(lambda _: next(found), tree)
