"""The life of an eidetic network: begin a task, train and prune, commit; count, extract, widen.

::

    begin_task   free units are fresh, a head is opened
    train        whatever optimiser: only free units and the new head can move
    prune        kill free units that are not needed (clbench.agents.networks.eidetic.pruning)
    commit       what is alive becomes the task's own, for good; what was killed is free for the next task

Claim (arXiv 2502.09500, its persistence and resistance): after ``commit`` the function ``x -> network(x, task=k)`` never
changes. By induction over layers: a unit of owner a <= k reads only units with owner <= a, through weights that are stored.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from clbench.agents.networks.eidetic.layers import EideticLayer, Heads
from clbench.agents.networks.eidetic.ownership import FREE, INPUT, OwnedParameter, Space, owned_parameters
from clbench.errors import CapacityExhausted, ConfigError, ContractError, unknown_name

Exhausted = Literal["raise", "head-only", "widen"]
EXHAUSTED: tuple[Exhausted, ...] = ("raise", "head-only", "widen")

# layers that mix units, and what to use in their place
MIXING: dict[str, str] = {
    "LayerNorm": "eidetic.PrefixNorm",
    "RMSNorm": "eidetic.PrefixNorm",
    "GroupNorm": "eidetic.PrefixNorm, or BatchNorm",
    "LocalResponseNorm": "eidetic.BatchNorm",
    "SyncBatchNorm": "eidetic.BatchNorm",
    "LazyBatchNorm1d": "eidetic.BatchNorm",
    "BatchNorm1d": "eidetic.BatchNorm",
    "BatchNorm2d": "eidetic.BatchNorm",
    "BatchNorm3d": "eidetic.BatchNorm",
    "Linear": "eidetic.Linear",
    "Bilinear": "eidetic.Linear on both inputs side by side",
    "Conv1d": "eidetic.Conv2d",
    "Conv2d": "eidetic.Conv2d",
    "Embedding": "eidetic.Embedding",
    "GRUCell": "eidetic.GRUCell",
    "GRU": "eidetic.GRUCell in a loop",
    "RNN": "eidetic.GRUCell in a loop",
    "LSTM": "eidetic.GRUCell in a loop",
    "MultiheadAttention": "eidetic.MultiheadAttention",
    "PReLU": "eidetic.Activation, which has no weights",
    "Softmax": "softmax inside eidetic.MultiheadAttention, or on outputs outside of the network",
    "LogSoftmax": "log_softmax on outputs outside of the network",
    "Softmin": "softmax on outputs outside of the network",
    "GLU": "eidetic.Activation",
}
# modules of torch without weights that work on each number, or on each plane, alone
UNITWISE = (
    "Identity", "Flatten", "Unflatten", "Dropout", "Dropout2d", "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU",
    "GELU", "SiLU", "Mish", "Tanh", "Sigmoid", "Softplus", "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid",
    "MaxPool2d", "AvgPool2d", "AdaptiveMaxPool2d", "AdaptiveAvgPool2d", "Upsample", "ZeroPad2d", "InstanceNorm2d",
    "Sequential", "ModuleList", "ModuleDict",
)  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """Who owns what. Shares are of the whole and sum to 1.

    Args:
        units: space -> owner -> number of units; owners are task numbers and ``"free"``.
        live: share of weights that are owned and may be non-zero.
        dead: share of weights that are owned and zero for ever: an older unit does not read a younger one.
        free: share of weights of units that nobody owns.
        reuse: per task, the share of its live weights (from hidden units) that read units of older tasks.
    """

    units: Mapping[str, Mapping[str, int]]
    live: float
    dead: float
    free: float
    reuse: tuple[float, ...]

    def share(self, owner: str) -> float:
        """Share of all units that ``owner`` has."""
        total = sum(n for space in self.units.values() for n in space.values())
        return sum(space.get(owner, 0) for space in self.units.values()) / max(total, 1)


class EideticNetwork(nn.Module):
    """Base class: a network of eidetic layers. Subclasses make spaces and layers, and define ``forward(*inputs, task)``.

    ``forward`` must end in a head of ``task`` and use nothing but eidetic layers and functions of each number alone (or of
    a plane alone: pooling). Sizes that it needs it reads off spaces, as they change when the network is widened.

    Args:
        transfer: let units read those of older tasks (forward transfer).
        exhausted: what :meth:`begin_task` does where a space has fewer than ``least`` free units: ``raise``
            :class:`CapacityExhausted`, train the head alone on what there is (``head-only``), or add units (``widen``).
        least: free units that a task needs in each space.
        growth: units that ``widen`` adds to a space, as a share of what it has.
    """

    def __init__(
        self, *, transfer: bool = True, exhausted: Exhausted = "raise", least: int = 1, growth: float = 0.25
    ) -> None:
        super().__init__()
        if exhausted not in EXHAUSTED:
            raise unknown_name("value of exhausted", str(exhausted), EXHAUSTED)
        if least < 1 or not growth > 0:
            raise ConfigError(f"least must be at least 1 and growth positive, got {least} and {growth}.")
        self.transfer, self.exhausted, self.least, self.growth = transfer, exhausted, least, growth
        self.spaces = nn.ModuleDict()
        self.committed = 0  # tasks that are finished
        self.begun = False  # whether a task is under way
        self.dtype_of_record: str | None = None  # of the numbers that were committed
        self.digests: list[str] = []  # per task, of everything it owns
        self.references: list[dict[str, Any]] = []  # per task, probe inputs and what they gave

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and callable(getattr(type(self), name, None)):
            raise ConfigError(
                f"{type(self).__name__}.{name} is a method of eidetic networks; call the layer otherwise."
            )
        super().__setattr__(name, value)

    # -- building ---------------------------------------------------------------------------------------------------------

    def space(self, name: str, size: int, *, group: int = 1, prunable: bool = True) -> Space:
        """A new space of hidden units."""
        space = Space(size, group=group, prunable=prunable, transfer=self.transfer)
        self.spaces[name] = space
        return space

    def inputs(self, name: str, size: int) -> Space:
        """A space of given numbers."""
        space = Space(size, owner=INPUT, prunable=False, transfer=self.transfer)
        self.spaces[name] = space
        return space

    def heads(self, inputs: Space | Sequence[Space], size: int) -> Heads:
        """A linear output layer per task."""
        return Heads(inputs, size, transfer=self.transfer)

    def check(self) -> None:
        """Refuse what would break the guarantee.

        Raises:
            ConfigError: a layer that mixes units, with the name of its replacement; weights or statistics that no task can
                own; a space that belongs to no network.
        """
        known = {id(s) for s in self.modules() if isinstance(s, Space)}
        frozen = {id(p) for part in self.modules() if getattr(part, "frozen", False) for p in part.modules()}
        for name, part in self.named_modules():
            if isinstance(tied := getattr(part, "parametrizations", None), nn.ModuleDict):
                raise ConfigError(
                    f"Layer {name!r} has a parametrization ({', '.join(tied)}): spectral norm and the "
                    "like tie all units of a layer together, so owned ones would change; leave it out."
                )
            if isinstance(part, EideticLayer):
                for axis in part.axes():
                    if any(id(s) not in known for s in axis.spaces):
                        raise ConfigError(
                            f"Layer {name!r} reads or writes a space that is no part of the network; make spaces with "
                            "self.space(name, size) or self.inputs(name, size)."
                        )
            if id(part) in frozen:
                if any(p.requires_grad for p in part.parameters(recurse=False)):
                    raise ConfigError(f"Layer {name!r} is marked as frozen, but its parameters require gradients.")
            elif not isinstance(part, OwnedParameter | Space):
                self._check_module(name, part)

    def _check_module(self, name: str, part: nn.Module) -> None:
        kind = type(part).__name__
        # a subclass of a layer that mixes units does so too
        mixing = next((c.__name__ for c in type(part).__mro__ if _of_torch(c) and c.__name__ in MIXING), None)
        if mixing is not None:
            raise ConfigError(
                f"Layer {name!r} is a {kind}, which would change what finished tasks compute; use {MIXING[mixing]}."
            )
        has_state = any(True for _ in part.parameters(recurse=False))
        if isinstance(part, EideticLayer):
            kept = {*part.follows, *part.counters}
        else:
            kept = part._non_persistent_buffers_set
        has_state = has_state or any(b not in kept for b in part._buffers)
        if has_state:
            where = f"Layer {name!r} ({kind})" if name else "The network itself"
            raise ConfigError(
                f"{where} has weights or statistics that no task owns; build it from eidetic layers, or set its attribute "
                "`frozen` if they never change after the first commit."
            )
        if _of_torch(type(part)) and kind not in UNITWISE:
            raise ConfigError(
                f"Layer {name!r} is a {kind}, and it is not known whether it mixes units; use eidetic layers, or a "
                f"function of each number alone ({', '.join(UNITWISE[:12])}, ...)."
            )

    # -- parts ------------------------------------------------------------------------------------------------------------

    def all_spaces(self) -> dict[str, Space]:
        """Name -> space, those of heads included."""
        return {n: m for n, m in self.named_modules() if isinstance(m, Space)}

    def prunable(self) -> dict[str, Space]:
        """Name, as given to :meth:`space`, -> space of hidden units."""
        return {n.replace("spaces.", ""): s for n, s in self.all_spaces().items() if s.prunable}

    def all_heads(self) -> list[Heads]:
        return [m for m in self.modules() if isinstance(m, Heads)]

    def writers(self, space: Space) -> list[tuple[str, OwnedParameter]]:
        """Weights (not biases) whose rows are the units of ``space``."""
        return [(n, p) for n, p in owned_parameters(self) if p.inputs is not None and p.out[1].spaces == (space,)]

    @property
    def task(self) -> int:
        """The task under way, or else the last one that was finished; -1 before any has begun."""
        return self.committed if self.begun else self.committed - 1

    # -- a task -----------------------------------------------------------------------------------------------------------

    def begin_task(self, rng: torch.Generator) -> int:
        """Free units anew, drawn with ``rng``, and a head for the next task. Returns the number of the task.

        An optimiser that was made before does not know the new head: make a new one, or give it
        :meth:`new_parameters`. Where units were added (``exhausted="widen"``), it has to be a new one.

        Raises:
            ContractError: a task is under way.
            CapacityExhausted: a space has too few free units left; without transfer also with ``head-only``, as a head
                must not read what other tasks own.
            ConfigError: the network has a layer that breaks the guarantee.
        """
        if self.begun:
            raise ContractError(f"Task {self.committed} is under way; commit it before the next one begins.")
        self.check()
        self._check_dtype("begin")
        full = {n: int(s.free.sum()) for n, s in self.prunable().items() if int(s.free.sum()) < self.least}
        if full and self.exhausted == "widen":
            spaces = self.prunable()
            self.widen({n: max(self.least, math.ceil(self.growth * spaces[n].size)) for n in full}, rng)
        elif full and (self.exhausted == "raise" or not self.transfer):
            alone = ", or train heads alone with exhausted='head-only'" if self.transfer else ""
            raise CapacityExhausted(
                f"Task {self.committed} finds no room: {', '.join(f'{n} has {k} free units' for n, k in full.items())}, "
                f"of {self.least} needed. Make the network wider, let tasks have smaller shares, or prune with a larger "
                f"tolerance{alone}."
            )
        for heads in self.all_heads():
            while len(heads) <= self.committed:
                heads.open(like=self._like())
        for space in self.all_spaces().values():
            space.revive()
        for _, parameter in owned_parameters(self):
            parameter.reset(rng)
        for layer in self.modules():
            if isinstance(layer, EideticLayer):
                layer.recycle()
        self.begun = True
        return self.committed

    def new_parameters(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Trainable parameters that ``optimizer`` does not know yet: those of a head that was opened since."""
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in known]

    def commit(self, probes: Sequence[Tensor] | None = None, *, cap: float | None = None) -> int:
        """All that is alive becomes the task's own, for good. All or nothing: an error leaves everything as it was.

        Args:
            probes: inputs of ``forward``, kept with what they give, to prove later that nothing has changed.
            cap: largest share of the units of a space that the task may take.

        Returns:
            The number of the task.

        Raises:
            ContractError: no task is under way (it may have been committed already).
            ConfigError: NaN or infinite weights or statistics, or more units than ``cap``.
        """
        if not self.begun:
            raise ContractError("There is nothing to commit: no task is under way; call begin_task first.")
        self._check_dtype("commit")
        task, before = self.committed, self.snapshot()
        for name, space in self.prunable().items():
            wanted = int(space.candidates.sum())
            if cap is not None and wanted > max(1, math.floor(cap * space.size + 1e-9)):
                raise ConfigError(
                    f"Task {task} would take {wanted} of the {space.size} units of {name}, more than its share of {cap}; "
                    "prune further, or allow it more."
                )
        try:
            for name, parameter in owned_parameters(self):
                try:
                    parameter.settle()
                except ConfigError as error:
                    raise ConfigError(
                        f"Task {task} cannot be committed: {name} {error}. It would be kept for ever; look for diverging "
                        "losses, and go back to an earlier state."
                    ) from error
            for name, value in self._statistics():
                if not bool(torch.isfinite(value).all()):
                    raise ConfigError(f"Task {task} cannot be committed: {name} holds NaN or infinite values.")
            for space in self.all_spaces().values():
                space.claim(task)
            # What was pruned stays so until the next task begins and draws it anew: it may hold anything, even NaN.
            self.begun, self.committed = False, task + 1
            self.dtype_of_record = str(self._like().dtype)
            self.digests.append(self.digest(task))
            self.references.append({})
            if probes is not None:
                self.remember(task, probes)
        except BaseException:  # Ctrl-C too: half a commit would be no guarantee
            self.restore(before)
            raise
        return task

    def _statistics(self) -> Iterator[tuple[str, Tensor]]:
        """Of units that are alive: what pruned ones had is forgotten."""
        for name, layer in self.named_modules():
            if isinstance(layer, EideticLayer):
                for buffer, (dim, axis) in layer.follows.items():
                    alive = axis.expand(lambda s: s.alive).nonzero()[:, 0]
                    yield f"{name}.{buffer}", getattr(layer, buffer).index_select(dim, alive)

    def _like(self) -> Tensor:
        """A tensor with the dtype and device of the weights."""
        return next((p.value for _, p in owned_parameters(self)), torch.empty(0))

    def _check_dtype(self, what: str) -> None:
        now = str(self._like().dtype)
        if self.committed and now != self.dtype_of_record:
            raise ConfigError(
                f"Cannot {what} task {self.committed}: finished tasks were committed in {self.dtype_of_record}, it is "
                f"{now} now, so what they own was rounded and cannot be proved any more. Go back to "
                f"{self.dtype_of_record} (load a state from before), or choose the dtype before the first commit."
            )

    # -- evidence ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def digest(self, task: int) -> str:
        """A hash of all numbers that ``task`` owns, rows up to its own columns and statistics, and of frozen modules.

        Columns of younger units are left out (they are zero, which is checked apart), so widening does not change it.
        """
        found = hashlib.sha256()
        for name, parameter in owned_parameters(self):
            rows = parameter.out[1].owners() == task
            if not bool(rows.any()):
                continue
            # without a store nothing is owned
            block = parameter.store.index_select(parameter.out[0], rows.nonzero()[:, 0])
            if parameter.inputs is not None:
                older = (parameter.inputs[1].owners() <= task).nonzero()[:, 0]
                block = block.index_select(parameter.inputs[0], older)
            found.update(name.encode() + _bytes(block))
        for name, layer in self.named_modules():
            if isinstance(layer, EideticLayer):
                for buffer, (dim, axis) in layer.follows.items():
                    rows = (axis.owners() == task).nonzero()[:, 0]
                    found.update(f"{name}.{buffer}".encode() + _bytes(getattr(layer, buffer).index_select(dim, rows)))
        for name, layer in self.named_modules():
            if getattr(layer, "frozen", False):
                for key, value in layer.state_dict().items():
                    found.update(f"{name}.{key}".encode() + _bytes(value))
        for name, space in self.all_spaces().items():
            if count := int((space.owner == task).sum()):
                found.update(f"{name} {count}".encode())
        return found.hexdigest()

    @torch.no_grad()
    def remember(self, task: int, probes: Sequence[Tensor]) -> None:
        """Keep ``probes`` and what ``task`` gives for them here and now: device, dtype, threads and versions included."""
        from clbench.agents.networks.eidetic.verify import configuration, observe

        network: Any = self  # by the other import path it is another class to a type checker
        inputs = [p.detach().clone() for p in probes]
        seen = {configuration(network, inputs): observe(network, inputs, task)}
        record = self.references[task]
        old = record.get("inputs", [])
        if len(old) == len(inputs) and all(torch.equal(a, b) for a, b in zip(old, inputs, strict=True)):
            seen = {**record["seen"], **seen}  # the same probes in one more configuration
        self.references[task] = {"inputs": inputs, "seen": seen}

    # -- capacity ---------------------------------------------------------------------------------------------------------

    def capacity(self) -> Capacity:
        """Units and weights by owner; see :class:`Capacity`."""
        units: dict[str, dict[str, int]] = {}
        for name, space in self.prunable().items():
            owners, counts = space.owner.unique(return_counts=True)
            pairs = zip(owners.tolist(), counts.tolist(), strict=True)
            units[name] = {"free" if o == FREE else str(o): n for o, n in pairs}
        live = dead = free = 0
        reads, reused = [0] * self.committed, [0] * self.committed
        for _, parameter in owned_parameters(self):
            if parameter.inputs is None:
                continue
            other = parameter.value.numel() // (parameter.out[1].size * parameter.inputs[1].size)
            rows, columns = parameter.out[1].owners().to(torch.int64), parameter.inputs[1].owners().to(torch.int64)
            free += int((rows == FREE).sum()) * len(columns) * other
            for task in range(self.committed):
                n = int((rows == task).sum()) * other
                own, older = int((columns == task).sum()), int(((columns < task) & (columns != INPUT)).sum())
                given = int((columns == INPUT).sum())
                read = own + given + (older if parameter.transfers else 0)
                live += n * read
                dead += n * (len(columns) - read)
                reads[task] += n * (own + (older if parameter.transfers else 0))
                reused[task] += n * (older if parameter.transfers else 0)
        total = max(live + dead + free, 1)
        reuse = tuple(a / max(b, 1) for a, b in zip(reused, reads, strict=True))
        return Capacity(units, live / total, dead / total, free / total, reuse)

    # -- other shapes of the same function ------------------------------------------------------------------------------

    def extract(self, task: int) -> Self:
        """The network of ``task`` alone: units with owner <= task (without transfer: its own), nothing younger.

        Its shapes are fixed once the task is committed, so what it gives does not change by a bit when others are added,
        when the network is widened, or when a younger unit overflows; and it costs only its own prefix. In eval mode.

        Raises:
            ConfigError: ``task`` is not committed.
        """
        if not 0 <= task < self.committed:
            raise ConfigError(f"Task {task} is not committed; {self.committed} are.")
        alone = copy.deepcopy(self)
        sources = {}
        for space in alone.all_spaces().values():
            keep = space.owner <= task
            if not self.transfer:
                keep &= (space.owner == task) | (space.owner == INPUT)
            if bool(keep.all()) or space.size == 0:
                continue
            sources[space] = keep.nonzero()[:, 0]
        for heads in alone.all_heads():  # other heads are no part of it
            for i in range(len(heads)):
                if i != task:
                    sources.pop(heads.spaces[i], None)  # type: ignore[arg-type]
                    heads.layers[i], heads.spaces[i] = _Absent(i, task), nn.Identity()
        alone._follow(sources, None)
        for _, parameter in owned_parameters(alone):  # all owned: the parameters are of no use
            parameter.value = nn.Parameter(parameter.value.new_empty((0,) * parameter.value.ndim), requires_grad=False)
        return alone.eval().requires_grad_(False)

    def widen(self, units: Mapping[str, int], rng: torch.Generator) -> None:
        """Add free units. Parameters are new objects, so optimisers have to be made anew.

        Args:
            units: name of a space -> units to add.
            rng: draws the new weights.

        Raises:
            ConfigError: no such space, or fewer than one unit.
        """
        known = self.prunable()
        for name, count in units.items():
            if name not in known or count < 1:
                raise ConfigError(
                    f"widen adds at least one unit to spaces of hidden units ({', '.join(known)}), got {name!r}: {count}."
                )
        sources = {
            known[n]: torch.cat([torch.arange(known[n].size), torch.full((k,), -1)]).to(known[n].owner.device)
            for n, k in units.items()
        }
        self._follow(sources, rng)

    def _follow(self, sources: dict[Space, Tensor], rng: torch.Generator | None) -> None:
        """All tensors follow spaces that change: new unit -> old unit or -1."""
        for _, parameter in owned_parameters(self):
            parameter.resize(sources, rng)
        for layer in self.modules():
            if isinstance(layer, EideticLayer):
                layer.resize(sources)
        for space, source in sources.items():
            new = source < 0
            space.owner = torch.where(new, FREE, space.owner[source.clamp_min(0)]).to(torch.int16)
            space.alive = torch.where(new, True, space.alive[source.clamp_min(0)])
            space.version += 1

    # -- state ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self) -> dict[str, Any]:
        """A copy of everything, for :meth:`restore`."""
        state = dict(self.state_dict())
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Weights, masks and statistics exactly as when ``snapshot`` was taken.

        Where the network had fewer heads then, the later ones are closed. Parameters stay the same objects, unless the
        network has been widened since.
        """
        self._match_sizes(snapshot, "", shrink=True)
        self.load_state_dict(dict(snapshot))

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "committed": self.committed, "begun": self.begun, "heads": [len(h) for h in self.all_heads()],
            "dtype": self.dtype_of_record, "digests": list(self.digests), "references": _copied(self.references),
        }  # fmt: skip

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.committed, self.begun = int(state["committed"]), bool(state["begun"])
        self.dtype_of_record, self.digests = state["dtype"], list(state["digests"])
        self.references = _copied(state["references"])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """As in torch, with the heads and sizes that the state has; called before the parts are loaded.

        Raises:
            ConfigError: it is no state of an eidetic network, or it was committed in another dtype: rounding would change
                what finished tasks compute.
        """
        extra = state_dict.get(prefix + "_extra_state")
        if extra is None:
            raise ConfigError("This is not the state of an eidetic network: it has no '_extra_state'.")
        mine = str(self._like().dtype)
        if extra["committed"] and extra["dtype"] != mine:
            raise ConfigError(
                f"This state was committed in {extra['dtype']}, the network is {mine}: loading would round what finished "
                f"tasks own. Load it into a network of {extra['dtype']}, and cast afterwards if that is what you want."
            )
        for heads, count in zip(self.all_heads(), extra["heads"], strict=True):
            while len(heads) < count:
                heads.open(like=self._like())
            heads.close(count)
        self._match_sizes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _match_sizes(self, state_dict: Mapping[str, Any], prefix: str, *, shrink: bool = False) -> None:
        """A network that was widened is loaded into one that was not; with ``shrink`` the other way round, too."""
        sources = {}
        for name, space in self.all_spaces().items():
            saved = state_dict.get(f"{prefix}{name}.owner")
            if saved is not None and len(saved) > space.size:
                new = torch.full((len(saved) - space.size,), -1)
                sources[space] = torch.cat([torch.arange(space.size), new]).to(space.owner.device)
            elif saved is not None and len(saved) < space.size and shrink:
                sources[space] = torch.arange(len(saved), device=space.owner.device)
        if sources:
            self._follow(sources, None)


class _Absent(nn.Module):
    """The head of another task in an extracted network."""

    def __init__(self, task: int, present: int):
        super().__init__()
        self.task, self.present = task, present

    def forward(self, *_: Any) -> Tensor:
        raise ConfigError(f"This is the network of task {self.present} alone; it has no head for task {self.task}.")


def _of_torch(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.") and kind is not nn.Module


def _copied(references: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of their own. Their tensors are shared: nothing writes into them, and there are many."""
    return [{**r, "seen": dict(r["seen"])} if "seen" in r else dict(r) for r in references]


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


__all__ = ["MIXING", "Capacity", "EideticNetwork"]
