"""A memory of training rows, filled by reservoir sampling."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.agents.continual.batches import flatten, rows, take, unflatten
from clbench.errors import ConfigError, ContractError

Balance = Literal["none", "task"]


def check_sizes(memory: int, batch_size: int) -> None:
    """Raise :class:`ConfigError` for a memory without rows, or a negative number of rows to draw."""
    if memory < 1 or batch_size < 0:
        raise ConfigError(f"memory must be at least 1 and batch_size at least 0, got {memory}, {batch_size}.")


class Memory:
    """At most ``size`` rows of all that were offered.

    ``none``: reservoir sampling (Vitter 1985, algorithm R): after ``n`` offered rows each is kept with probability
    ``size / n``. ``task``: the same within each task, and the room is shared equally: no task has two rows more than
    another that could have more. A task that comes again is a new one here.

    Rows may be of any kind that :mod:`clbench.agents.continual.batches` takes; the first that are kept decide.
    """

    def __init__(self, size: int, balance: Balance = "none", device: torch.device | None = None):
        self.size, self.balance, self.device = size, balance, device or torch.device("cpu")
        self.columns: list[Tensor] = []  # (size, ...) each
        self.structure: Any = None  # of a batch; None before the first
        self.slots: list[list[int]] = [[]]  # that the rows of each task have
        self.seen = [0]  # rows offered, per task
        self.filled = 0

    def __len__(self) -> int:
        return self.filled

    def start_group(self) -> None:
        """A new task begins (only ``balance="task"`` needs to know)."""
        if self.balance == "task" and self.seen[-1] > 0:
            self.slots.append([])
            self.seen.append(0)

    # -- filling --------------------------------------------------------------------------------------------------------

    def add(self, batch: Any, rng: torch.Generator) -> None:
        """Offer all rows of a batch."""
        slots, kept = self.offer(rows(batch), rng)
        self.put(slots, batch if len(kept) == rows(batch) else take(batch, kept))

    def offer(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which of ``count`` rows are kept, and where; :meth:`put` must follow, with these rows in this order.

        Returns:
            Slots (K,), each once, and rows (K,), ascending.
        """
        taken: dict[int, int] = {}  # slot -> row; a later row may take the slot of an earlier one
        draws = torch.rand(count, generator=rng, device=rng.device, dtype=torch.float64)
        for row, u in enumerate(draws.tolist()):
            slot = self._slot(u)
            if slot is not None:
                taken.pop(slot, None)
                taken[slot] = row
        return (
            torch.tensor(list(taken), dtype=torch.int64, device=self.device),
            torch.tensor(list(taken.values()), dtype=torch.int64, device=self.device),
        )

    def _slot(self, u: float) -> int | None:
        """Where the next row goes, given a uniform number; None: it is not kept."""
        mine = self.slots[-1]
        self.seen[-1] += 1
        if self.filled < self.size:
            slot = self.filled
            self.filled += 1
        else:
            largest = mine if len(self.slots) == 1 else max(self.slots, key=len)
            if not mine and len(largest) == 1:  # more tasks than rows: a reservoir of tasks
                return self._slot_of_another(u) if self.seen[-1] == 1 else None
            if len(largest) <= len(mine) + 1:  # it has its share
                place = int(u * self.seen[-1])
                return mine[place] if place < len(mine) else None
            place = int(u * len(largest))  # within a task any row is as good as another
            slot, largest[place] = largest[place], largest[-1]
            largest.pop()
        mine.append(slot)
        return slot

    def _slot_of_another(self, u: float) -> int | None:
        """For the first row of a task where each has one at most: with ``size / tasks``, the slot of any of them."""
        place = int(u * len(self.slots))
        if place >= self.size:
            return None
        for theirs in self.slots:
            if theirs == [place]:
                theirs.clear()
        self.slots[-1].append(place)
        return place

    def put(self, slots: Tensor, batch: Any) -> None:
        """Write rows where :meth:`offer` said."""
        if len(slots) == 0:
            return
        columns, structure = flatten(batch)
        if self.structure is None:
            self.structure = structure
            self.columns = [self._room(c) for c in columns]
        elif structure != self.structure:  # tensors that were one are not now, or the other way round
            columns, structure = flatten(batch, share=False)
            apart, self.structure = flatten(unflatten(self.columns, self.structure), share=False)
            if structure != self.structure:
                raise ContractError("A batch has another structure than those of which the memory keeps rows.")
            self.columns = [c.clone() for c in apart]
        for into, values in zip(self.columns, columns, strict=True):
            into[slots] = values.detach()

    def _room(self, like: Tensor) -> Tensor:
        return torch.zeros(self.size, *like.shape[1:], dtype=like.dtype, device=self.device)

    # -- drawing --------------------------------------------------------------------------------------------------------

    def sample(self, count: int, rng: torch.Generator, *, past: bool = False) -> Any:
        """Rows drawn uniformly without replacement: ``count``, or all where there are fewer; None where there are none.

        Args:
            count: of rows.
            rng: draws them.
            past: only rows of earlier tasks than the present one.
        """
        among = None
        if past:
            earlier = [s for slots in self.slots[:-1] for s in slots]
            among = torch.tensor(earlier, dtype=torch.int64, device=self.device)
        have = self.filled if among is None else len(among)
        if have == 0:
            return None
        chosen = torch.rand(have, generator=rng, device=rng.device).topk(min(count, have)).indices
        index = chosen if among is None else among[chosen]
        return unflatten([c[index] for c in self.columns], self.structure)

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "columns": [c[: self.filled].clone() for c in self.columns],
            "structure": copy.deepcopy(self.structure),
            "slots": [torch.tensor(s, dtype=torch.int64) for s in self.slots],
            "seen": list(self.seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.structure = copy.deepcopy(state["structure"])
        self.slots = [s.tolist() for s in state["slots"]]
        self.seen = [int(n) for n in state["seen"]]
        self.filled = sum(map(len, self.slots))
        self.columns = [self._room(c) for c in state["columns"]]
        for into, values in zip(self.columns, state["columns"], strict=True):
            into[: self.filled] = values.to(self.device)
