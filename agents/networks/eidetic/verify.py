"""Evidence that finished tasks have not changed, in five levels; accuracy curves are none.

==  =====================================================================================================================
L0  what is owned has the hash that was recorded at commit; what must be zero is zero; statistics are finite
L1  outputs and owned activations on the recorded probes are bit for bit those of the commit (same configuration only:
    another device, dtype, batch shape, number of threads or version of torch may round differently)
L2  all free parameters and statistics are overwritten with N(0, s^2), s in 0, 1, 1000: nothing of the old tasks moves
L3  the derivative of old outputs with respect to every parameter and every younger activation is exactly 0
L4  a twin with small whole numbers, in which every sum is exact: also another batch size, extraction and widening change
    nothing
==  =====================================================================================================================

L0, L2 and L3 hold or fail on any machine. A level that cannot be judged says ``skip`` and why; it never says ``pass``.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.agents.networks.eidetic.layers import (
    Activation,
    BatchNorm,
    EideticLayer,
    GRUCell,
    MultiheadAttention,
    PrefixNorm,
)
from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.ownership import along, owned_parameters

LEVELS = ("L0", "L1", "L2", "L3", "L4")
NAMES = {
    "L0": "static: what is owned is what was committed",
    "L1": "dynamic: recorded outputs and activations",
    "L2": "adversarial: everything free overwritten",
    "L3": "influence: derivatives are exactly zero",
    "L4": "exact twin: batch size, extraction, widening",
}
SCALES = (0.0, 1.0, 1e3)
Probes = Mapping[int, Sequence[Tensor]]


@dataclass
class Evidence:
    """What was found.

    Args:
        status: level -> ``pass``, ``fail`` or ``skip``.
        details: level -> one sentence.
        tasks: finished tasks.
        max_abs_change: largest change of an output of a finished task at any level.
    """

    status: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    tasks: int = 0
    max_abs_change: float = 0.0

    @property
    def ok(self) -> bool:
        """No level failed, and those that can be judged anywhere (L0, L2, L3) passed."""
        needed = all(self.status.get(level) == "pass" for level in ("L0", "L2", "L3"))
        return needed and "fail" not in self.status.values()

    def to_dict(self) -> dict[str, Any]:
        return {
            "levels": dict(self.status), "max_abs_change": self.max_abs_change, "tasks": self.tasks,
            "details": dict(self.details),
        }  # fmt: skip

    def _change(self, before: Any, after: Any) -> None:
        self.max_abs_change = max(self.max_abs_change, largest_change(before, after))


def verify(network: EideticNetwork, probes: Probes | None = None, *, seed: int = 0) -> Evidence:
    """All levels on a network, which is left as it was.

    Args:
        network: with at least one committed task.
        probes: task -> inputs of ``forward``, for tasks that were committed without any. Recorded ones come first; a task
            that still has none is tried on those of another task.
        seed: of what is drawn for L2 to L4.
    """
    evidence = Evidence(tasks=network.committed)
    if network.committed == 0:
        for level in LEVELS:
            evidence.status[level], evidence.details[level] = "skip", "no task has been committed"
        return evidence
    used = {k: r["inputs"] for k, r in enumerate(network.references) if "inputs" in r}
    used = {**(probes or {}), **used}
    if used:  # tasks without any are tried on those of another one: what they own is not to move for any input
        some = next(iter(used.values()))
        used = {k: used.get(k, some) for k in range(network.committed)}
    dtype = next(network.parameters()).dtype  # the network may have been cast since
    used = {k: [x.to(dtype) if x.is_floating_point() else x for x in xs] for k, xs in used.items()}
    rng = torch.Generator().manual_seed(seed)
    work = copy.deepcopy(network)
    checks: dict[str, Callable[[], tuple[str, str]]] = {
        "L0": lambda: _static(work),
        "L1": lambda: _dynamic(work, evidence),
        "L2": lambda: _adversarial(work, used, rng, evidence),
        "L3": lambda: _influence(work, used),
        "L4": lambda: _twin(work, used, rng, evidence),
    }
    for level, check in checks.items():
        try:
            evidence.status[level], evidence.details[level] = check()
        except (RuntimeError, ValueError, IndexError) as error:  # shapes that do not fit, for example
            evidence.status[level], evidence.details[level] = "fail", f"the network cannot be run: {error}"
    return evidence


# -- observing -----------------------------------------------------------------------------------------------------------


def arithmetic(device: torch.device, dtype: torch.dtype) -> str:
    """A hash of a fixed computation: how this machine, its libraries and their settings round, whatever they are called."""
    numbers = torch.arange(129 * 65, dtype=torch.float64).remainder(97).sub_(48).div_(31).reshape(129, 65)
    x = numbers.to(device, dtype)
    values = [x @ x.mT, torch.tanh(x), x.exp().softmax(1), F.conv2d(x[None, None], x[None, None, :5, :5])]
    raw = b"".join(v.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for v in values)
    return hashlib.sha256(raw).hexdigest()[:12]


def configuration(network: nn.Module, inputs: Sequence[Tensor]) -> str:
    """All that may change the last bits of a result without the network having changed."""
    parameter = next(network.parameters())
    cuda = parameter.device.type == "cuda"
    device = torch.cuda.get_device_name(parameter.device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
    flags = (
        f", matmul {torch.get_float32_matmul_precision()}, arithmetic {arithmetic(parameter.device, parameter.dtype)}"
    )
    if parameter.device.type == "cuda":
        flags += f", tf32 {torch.backends.cuda.matmul.allow_tf32}/{torch.backends.cudnn.allow_tf32}"
    threads = torch.get_num_threads()
    return f"{device}, {parameter.dtype}, inputs {shapes}, {threads} threads, torch {torch.__version__}{flags}"


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, and every part back in its own mode afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@torch.no_grad()
def outputs(network: EideticNetwork, inputs: Sequence[Tensor], task: int) -> list[Tensor]:
    """What ``task`` gives in eval mode, as a list of tensors of their own."""
    with evaluating(network):
        y = network(*inputs, task=task)
    return [v.clone() for v in (y if isinstance(y, tuple | list) else (y,))]


@torch.no_grad()
def activations(network: EideticNetwork, inputs: Sequence[Tensor], task: int) -> dict[str, list[Tensor]]:
    """Space -> what was written into its units with owner <= task, in eval mode."""
    spaces = network.all_spaces()
    for space in spaces.values():
        space.taps = []
    try:
        with evaluating(network):
            network(*inputs, task=task)
        found = {}
        for name, space in spaces.items():
            keep = (space.owner <= task).repeat_interleave(space.group).nonzero()[:, 0]
            found[name] = [v.index_select(dim % v.ndim, keep) for v, dim in space.taps or []]
        return found
    finally:
        for space in spaces.values():
            space.taps = None


def observe(network: EideticNetwork, inputs: Sequence[Tensor], task: int) -> dict[str, Any]:
    """Outputs of the whole network and of the extracted one, a hash of the owned activations, and the widths.

    Widening may change the last bits of what the whole network gives (sums have other lengths), never of the extracted one.
    """
    found = hashlib.sha256()
    for name, tensors in sorted(activations(network, inputs, task).items()):
        for tensor in tensors:
            # + 0.0: a sum of zeros may change its sign, which changes no value
            raw = (tensor + 0.0).contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
            found.update(name.encode() + raw)
    dense = outputs(network, inputs, task)
    block, widths = outputs(network.extract(task), inputs, task), {n: s.size for n, s in network.prunable().items()}
    return {"dense": dense, "block": block, "activations": found.hexdigest(), "widths": widths}


def same(before: Any, after: Any) -> bool:
    """Equal values (NaN equals NaN, +0 equals -0), bit for bit otherwise, of nested lists of tensors and text."""
    if isinstance(before, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            return False
        return bool(((before == after) | (before.isnan() & after.isnan())).all())
    if isinstance(before, Mapping):
        return before.keys() == after.keys() and all(same(before[k], after[k]) for k in before)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(same(a, b) for a, b in zip(before, after, strict=True))
    return before == after


def largest_change(before: Any, after: Any) -> float:
    """Largest absolute difference of nested tensors; infinity where shapes or NaN differ."""
    if isinstance(before, Tensor):
        if before.shape != after.shape:
            return math.inf
        if same(before, after):
            return 0.0
        change = (before.double() - after.double()).abs()
        return math.inf if bool(change.isnan().any()) else float(change.max())
    if isinstance(before, Mapping):
        return max((largest_change(before[k], after.get(k)) for k in before), default=0.0)
    if isinstance(before, list | tuple):
        return max((largest_change(a, b) for a, b in zip(before, after, strict=True)), default=0.0)
    return 0.0


# -- L0 ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _static(network: EideticNetwork) -> tuple[str, str]:
    dtype = str(next(network.parameters()).dtype)
    if dtype != network.dtype_of_record:
        return "skip", (
            f"hashes were recorded in {network.dtype_of_record}, the network was cast to {dtype} since; verify it before."
        )
    for task in range(network.committed):
        if network.digest(task) != network.digests[task]:
            return "fail", f"what task {task} owns is not what was committed"
    wrong = forbidden(network)
    if wrong:
        return "fail", wrong
    return "pass", f"{network.committed} hashes agree; no weight from a younger unit to an older one"


@torch.no_grad()
def forbidden(network: EideticNetwork) -> str:
    """Where a weight that must be zero is not, in words; empty if nowhere."""
    for name, parameter in owned_parameters(network):
        if parameter.inputs is None:
            continue
        rows, columns = parameter.out[1].owners(), parameter.inputs[1].owners()
        ndim = parameter.value.ndim
        r, c = along(rows, parameter.out[0], ndim), along(columns, parameter.inputs[0], ndim)
        younger = c > r
        if not parameter.transfers:
            younger = younger | ((c < r) & (c >= 0) & (r < network.committed))
        if bool((parameter().detach().masked_fill(~younger, 0.0) != 0).any()):
            return f"{name} has weights from units to units of an older task"
    for name, space in network.all_spaces().items():
        if bool((~space.alive & ~space.free).any()):
            return f"owned units of {name} are pruned"
        if bool((space.owner[~space.free] >= network.committed).any()):
            return f"units of {name} belong to tasks that are not finished"
    return ""


# -- L1 ------------------------------------------------------------------------------------------------------------------


def _dynamic(network: EideticNetwork, evidence: Evidence) -> tuple[str, str]:
    judged, wider, other = 0, 0, set()
    for task, record in enumerate(network.references):
        if "inputs" not in record:
            continue
        here = configuration(network, record["inputs"])
        if here not in record["seen"]:
            other |= set(record["seen"])
            continue
        now = observe(network, record["inputs"], task)
        if not same(now, observe(network, record["inputs"], task)):
            return "skip", f"two passes of the same network differ here ({here}), so nothing can be said"
        before = record["seen"][here]
        if before["widths"] != now["widths"]:
            wider += 1
            before, now = ({"block": seen["block"]} for seen in (before, now))
        evidence._change(before, now)
        if not same(before, now):
            part = next(k for k in now if not same(before[k], now[k]))
            return "fail", f"task {task}: {part} differ from what was recorded at its commit"
        judged += 1
    if judged < network.committed:
        there = f"; others were recorded for {sorted(other)[0]}" if other else "; others have no probes"
        return (
            "skip",
            f"{judged} of {network.committed} tasks have a record for this configuration, and are as recorded{there}",
        )
    text = f"{judged} tasks are bit for bit as recorded"
    return "pass", text + (f"; the network was widened since, so {wider} were compared extracted" if wider else "")


# -- L2 ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_free(network: EideticNetwork, scale: float, rng: torch.Generator) -> None:
    """Overwrite everything that no task owns: parameters, statistics, which free units are alive."""

    def noise(like: Tensor) -> Tensor:
        return (torch.randn(like.shape, generator=rng, device=rng.device) * scale).to(like)

    for _, parameter in owned_parameters(network):
        parameter.value.copy_(noise(parameter.value))  # at owned rows too, where it must mean nothing
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            free = layer.weight.out[1].expand(lambda s: s.free)
            layer.running_mean.copy_(torch.where(free, noise(layer.running_mean), layer.running_mean))
            layer.running_var.copy_(torch.where(free, noise(layer.running_var).abs(), layer.running_var))
    for space in network.all_spaces().values():
        coin = torch.rand(space.size, generator=rng).to(space.owner.device) < 0.3
        space.revive()
        space.kill(coin & space.free)


def _adversarial(network: EideticNetwork, probes: Probes, rng: torch.Generator, evidence: Evidence) -> tuple[str, str]:
    tasks = [k for k in range(network.committed) if k in probes]
    if not tasks:
        return "skip", "no inputs are known to try; give probes"

    def look(net: EideticNetwork) -> dict[int, Any]:
        return {k: observe(net, probes[k], k) for k in tasks}

    before = look(network)
    if not same(before, look(network)):
        return "skip", "two passes of the same network differ here, so nothing can be said"
    for scale in SCALES:
        other = copy.deepcopy(network)
        fill_free(other, scale, rng)
        after = look(other)
        evidence._change(before, after)
        if not same(before, after):
            task = next(k for k in tasks if not same(before[k], after[k]))
            return "fail", f"task {task} changes when free parameters are overwritten with N(0, {scale:g}^2)"
    return "pass", f"{len(tasks)} tasks, free parameters and statistics overwritten with s = 0, 1, 1000"


# -- L3 ------------------------------------------------------------------------------------------------------------------


def _influence(network: EideticNetwork, probes: Probes) -> tuple[str, str]:
    tasks = [k for k in range(network.committed) if k in probes]
    if not tasks:
        return "skip", "no inputs are known to try; give probes"
    for _, parameter in owned_parameters(network):
        parameter.value.requires_grad_(True)  # of target networks too
    parameters = dict(network.named_parameters())
    for task in tasks:
        spaces = network.all_spaces()
        for space in spaces.values():
            space.taps = []
        try:
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in probes[task]]
            with evaluating(network), torch.enable_grad():
                y = network(*inputs, task=task)
                total = sum(
                    v.double().square().sum() + v.double().sum() for v in (y if isinstance(y, tuple | list) else (y,))
                )
            taps = [(n, v, d) for n, s in spaces.items() for v, d in s.taps or [] if v.requires_grad]
            wanted = [*parameters.values(), *(v for _, v, _ in taps)]
            wanted = [w for w in wanted if w.requires_grad]
            if not (isinstance(total, Tensor) and total.requires_grad):
                if any(x.requires_grad for x in inputs):
                    return "skip", f"outputs of task {task} carry no gradient; forward must not switch gradients off"
                continue  # made of tokens and of what is stored: nothing there has a derivative
            grads = dict(zip(map(id, wanted), torch.autograd.grad(total, wanted, allow_unused=True), strict=True))
        finally:
            for space in spaces.values():
                space.taps = None
        for name, parameter in parameters.items():
            grad = grads.get(id(parameter))
            if grad is not None and not bool((grad == 0).all()):
                return "fail", f"outputs of task {task} depend on the parameter {name}"
        for name, value, dim in taps:
            grad, space = grads.get(id(value)), spaces[name]
            if grad is None:
                continue
            younger = (space.owner > task).repeat_interleave(space.group)
            if not bool((grad.masked_select(along(younger, dim % grad.ndim, grad.ndim)) == 0).all()):
                return "fail", f"outputs of task {task} depend on younger units of {name}"
    return "pass", f"{len(tasks)} tasks, {len(parameters)} parameters and all younger activations"


# -- L4 ------------------------------------------------------------------------------------------------------------------

MODULUS = 17.0
LARGEST = 2.0**45  # sums of that many whole numbers stay below 2^53, up to which float64 is exact


def _whole(x: Tensor) -> Tensor:
    """A non-linear function on whole numbers that keeps them small: relu, then the remainder."""
    return torch.remainder(torch.relu(x), MODULUS)


class _WholeActivation(Activation):
    def forward(self, x: Tensor) -> Tensor:
        return _whole(x)


class _WholePrefixNorm(PrefixNorm):
    """Reads the same units as the norm it stands for, in exact arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        alive, members, level = self.levels(x.device)
        if not members:
            return x
        sums = torch.stack([torch.remainder(x @ m.to(x.dtype), MODULUS) for m in members], -1)
        y = torch.remainder(x - sums[..., level], MODULUS)
        if self.weight is not None and self.bias is not None:
            y = torch.remainder(y * self.weight() + self.bias(), MODULUS)
        return torch.where(alive, y, 0.0)


class _WholeBatchNorm(BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean = (along(v, 1, x.ndim) for v in (self.weight(), self.bias(), self.running_mean))
        alive = along(self._space.space.alive.repeat_interleave(self._space.space.group), 1, x.ndim)
        return torch.where(alive, torch.remainder((x - mean) * weight + bias, MODULUS), 0.0)


class _WholeGRU(GRUCell):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        assert self.out is not None
        of_x = F.linear(x, self.weight_ih(), self.bias_ih()).chunk(3, -1)
        of_h = F.linear(h, self.weight_hh(), self.bias_hh()).chunk(3, -1)
        reset, update = _whole(of_x[0] + of_h[0]), _whole(of_x[1] + of_h[1])
        new = _whole(of_x[2] + reset * of_h[2])
        alive = self.out.alive.repeat_interleave(self.out.group)
        return self.out.tap(torch.where(alive, torch.remainder(new + update * (h - new), MODULUS), 0.0))


class _WholeAttention(MultiheadAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = self._heads.space
        split = (heads.size, heads.group)
        q, k, v = (_whole(f(x)).unflatten(-1, split).transpose(-3, -2) for f in (self.query, self.key, self.value))
        scores = _whole(q @ k.mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, 0.0)
        return self.output(_whole(scores @ v).transpose(-3, -2).flatten(-2))


WHOLE: dict[type[nn.Module], type[nn.Module]] = {
    Activation: _WholeActivation,
    PrefixNorm: _WholePrefixNorm,
    BatchNorm: _WholeBatchNorm,
    GRUCell: _WholeGRU,
    MultiheadAttention: _WholeAttention,
}


@torch.no_grad()
def whole_twin(network: EideticNetwork, rng: torch.Generator) -> EideticNetwork:
    """The same wiring with whole numbers in float64: every sum is exact, whatever its order."""
    twin = copy.deepcopy(network).to("cpu", torch.float64).eval()

    def draw(like: Tensor) -> Tensor:
        return torch.randint(-2, 3, like.shape, generator=rng).to(like)

    for _, parameter in owned_parameters(twin):
        # what the twin stores is allowed where the network stores something: zeros of the wiring stay zeros
        if parameter.store.numel():
            stored = parameter.store.masked_fill(~parameter.owned(), 0.0)
            wired = stored != 0 if parameter.inputs is not None else parameter.owned().expand_as(stored)
            parameter.store.data.copy_(torch.where(wired, draw(stored), 0.0))
        parameter.value.copy_(draw(parameter.value))
        parameter.forget()
    for part in twin.modules():
        if type(part) in WHOLE:
            part.__class__ = WHOLE[type(part)]
        if isinstance(part, EideticLayer):
            for name in part.follows:
                getattr(part, name).copy_(draw(getattr(part, name)))
    return twin


def _whole_inputs(probe: Sequence[Tensor], rng: torch.Generator) -> list[Tensor]:
    return [
        torch.randint(0, 3, x.shape, generator=rng).to(torch.float64) if x.is_floating_point() else x.cpu()
        for x in probe
    ]


def _twin(network: EideticNetwork, probes: Probes, rng: torch.Generator, evidence: Evidence) -> tuple[str, str]:
    tasks = [k for k in range(network.committed) if k in probes]
    if not tasks:
        return "skip", "no inputs are known to try; give probes"
    twin = whole_twin(network, rng)
    given = {k: _whole_inputs(probes[k], rng) for k in tasks}
    before = {k: outputs(twin, given[k], k) for k in tasks}
    written = [v for k in tasks for vs in activations(twin, given[k], k).values() for v in vs]
    for y in [*written, *(y for ys in before.values() for y in ys)]:
        if bool((y != y.round()).any()):
            return "skip", "the network uses functions that are not exact on whole numbers"
        if bool((y.abs() > LARGEST).any()):
            return "skip", "numbers in the network grow too large for exact sums"
    wider = copy.deepcopy(twin)
    if wider.prunable():
        wider.widen(dict.fromkeys(wider.prunable(), 3), rng)
    filled = copy.deepcopy(twin)
    for _, parameter in owned_parameters(filled):
        parameter.value.data.copy_(torch.randint(-9, 10, parameter.value.shape, generator=rng).to(parameter.value))
    for task in tasks:
        rows = min(len(given[task][0]), 8)
        single = [outputs(twin, [x[i : i + 1] for x in given[task]], task) for i in range(rows)]
        variants = {
            "alone in a batch": [torch.cat(column) for column in zip(*single, strict=True)],
            "extracted": outputs(twin.extract(task), given[task], task),
            "widened": outputs(wider, given[task], task),
            "with other free weights": outputs(filled, given[task], task),
        }
        for words, found in variants.items():
            expected = [y[:rows] for y in before[task]] if words.startswith("alone") else before[task]
            if not same(expected, found):
                return "fail", f"task {task}: the exact twin gives something else {words}"
    return "pass", f"{len(tasks)} tasks: one by one, extracted, widened and refilled, all sums exact"


__all__ = ["LEVELS", "Evidence", "activations", "configuration", "fill_free", "observe", "outputs", "verify"]
