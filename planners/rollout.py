"""The rollout kernel: what action sequences cost under a world model.

Actions are time-major ``(T, B, K, A)``, costs are added up in float32 as the latents go by, and no trajectory is stored.
Environments go through the time loop in blocks; their size never changes a result, only the speed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.contracts import Objective, Stepper, WorldModel
from clbench.errors import ConfigError
from clbench.planners.steppers import make_stepper

Precision = Literal["float32", "tf32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")

_SMALL = 2**26  # bytes: less than this is not worth asking how much memory is free
# a block's latents (numbers) and rows, such that they stay, with the layers between them, in the cache of the cores
_CPU_NUMBERS, _CPU_ROWS = 2**17, 2**12


class Rollout:
    """Costs of action sequences from latents ``z`` (B, *latent); made anew for each plan.

    Args:
        model: the world model; its stepper is used where it has one.
        z: where the sequences begin.
        objective: summed over the steps 1..H.
        repeat: model steps for which each action is held.
        block: environments that go through the time loop together; by default chosen for the device.
        precision: of the matrix multiplications; costs are float32 in any case.

    Raises:
        ConfigError: an objective that waits for a step beyond the horizon (when called).
    """

    def __init__(
        self, model: WorldModel, z: Tensor, objective: Objective, *, repeat: int = 1, block: int | None = None,
        precision: str = "float32",
    ):  # fmt: skip
        self.model, self.z, self.objective = model, z, objective
        self.repeat, self.block, self.precision = repeat, block, precision
        self._steppers: dict[int, Stepper] = {}
        self._parts: dict[tuple[int, int], Objective] = {}

    def __call__(self, actions: Tensor) -> Tensor:
        """(T, B, K, A) -> costs (B, K) of ``T * repeat`` steps, as the model gives them: maybe not finite."""
        distinct, envs, samples, _ = actions.shape
        check_horizon(self.objective, distinct * self.repeat)
        costs = torch.zeros(envs, samples, dtype=torch.float32, device=actions.device)
        block = envs_together(self.z, samples, self.objective, self.block)
        with precision_of(self.precision, actions.device):
            for start in range(0, envs, block):
                self._roll(actions, costs, start, min(start + block, envs))
        return costs

    # -- for a CUDA graph ----------------------------------------------------------------------------------------------

    def key(self) -> tuple[Any, ...] | None:
        """What a recorded rollout depends on besides its tensors; ``None`` where it cannot be recorded: a model without
        resident buffers, an objective of the user's, or several blocks."""
        key = getattr(self.objective, "key", None)
        if key is None or None in (key := key()) or self.block is not None or not hasattr(self.model, "stepper"):
            return None
        return (self.z.shape, self.z.dtype, self.z.device, *key)

    def separate(self) -> Rollout:
        """The same with buffers of its own, which :meth:`refresh` fills."""
        objective: Any = self.objective
        return Rollout(
            self.model, self.z.clone(), objective.clone(), repeat=self.repeat, precision=self.precision
        )  # fmt: skip

    def refreshable(self) -> bool:
        """Whether the steppers made so far can take new weights in place."""
        return all(hasattr(s, "pack") for s in self._steppers.values())

    def refresh(self, other: Rollout) -> None:
        """Copy the latents, the objective's tensors and the model's weights of this moment, in place."""
        self.z.copy_(other.z)
        mine, theirs = (r.objective.tensors() for r in (self, other))  # type: ignore[attr-defined]
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
        for stepper in self._steppers.values():
            stepper.pack()  # type: ignore[attr-defined]

    def _roll(self, actions: Tensor, costs: Tensor, start: int, stop: int) -> None:
        """Add the costs of the environments ``start..stop`` to their rows."""
        distinct, envs, samples, size = actions.shape
        count = stop - start
        objective = self._part(start, stop) if count < envs else self.objective
        flat = actions[:, start:stop].reshape(distinct, count * samples, size)  # a view
        latent = self.z.shape[1:]
        z = self.z[start:stop, None].expand(count, samples, *latent).reshape(count * samples, *latent)
        stepper, total = self._stepper(count * samples), costs[start:stop]
        stepper.load(z)
        step = 0
        for action in flat.unbind():
            for _ in range(self.repeat):
                step += 1
                total += objective(stepper.step(action).view(count, samples, *latent), step)

    def _stepper(self, rows: int) -> Stepper:
        if rows not in self._steppers:
            dtype = torch.bfloat16 if self.precision == "bfloat16" and hasattr(self.model, "stepper") else None
            self._steppers[rows] = make_stepper(self.model, rows, dtype)
        return self._steppers[rows]

    def _part(self, start: int, stop: int) -> Objective:
        if (start, stop) not in self._parts:
            self._parts[start, stop] = self.objective.select(slice(start, stop))  # type: ignore[attr-defined]
        return self._parts[start, stop]


def rollout(
    model: WorldModel, z: Tensor, actions: Tensor, objective: Objective, *, repeat: int = 1, block: int | None = None
) -> Tensor:
    """Costs (B, K) of action sequences (T, B, K, A), each action held ``repeat`` steps, from latents (B, *latent)."""
    with torch.no_grad():
        return Rollout(model, z, objective, repeat=repeat, block=block)(actions)


def trajectories(model: WorldModel, z: Tensor, actions: Tensor) -> Tensor:
    """Latents (B, H, *latent) after each action of (B, H, A) sequences, for pictures of a plan."""
    steps = []
    with torch.no_grad():
        for action in actions.unbind(1):
            z = model.predict(z, action)
            steps.append(z)
    return torch.stack(steps, 1)


def finite_costs(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Costs (B, K) with NaN and infinities replaced by the worst finite cost of their row (0 where there is none), and how
    many (B,) int64 there were."""
    finite = torch.isfinite(costs)
    worst = costs.masked_fill(~finite, -torch.inf).amax(1, keepdim=True)
    worst = worst.masked_fill(worst == -torch.inf, 0.0)
    return torch.where(finite, costs, worst), (~finite).sum(1)


def lowest_costs(costs: Tensor, replaced: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest of the costs (B, K) of each row and where it is, (B,) each; infinity where all ``K`` were ``replaced``,
    so that any cost that was measured beats it."""
    lowest, index = costs.min(1)
    return lowest.masked_fill(replaced == costs.shape[1], torch.inf), index


def share_gained(before: Tensor, after: Tensor) -> Tensor:
    """By what share (B,) of its lowest cost a row has improved; infinity where it has none yet."""
    return ((before - after) / after.abs().clamp(min=1e-12)).masked_fill(after == torch.inf, torch.inf)


def check_horizon(objective: Objective, horizon: int) -> None:
    """Raises:
    ConfigError: the objective waits for a step that never comes, so that every plan would cost the same."""
    awaited = getattr(objective, "horizon", None)
    if isinstance(awaited, int) and awaited > horizon:
        raise ConfigError(
            f"The objective counts step {awaited} only, but the planner's horizon is {horizon}: give both the same horizon."
        )


def block_size(z: Tensor, samples: int) -> int:
    """How many environments go through the time loop together.

    A GPU takes all. A CPU takes few enough that a step's buffers stay in the cache of its cores: with 512 samples 8
    environments at 32 features, and one at 512.
    """
    if z.device.type != "cpu":
        return len(z)
    latent = max(1, z.shape[1:].numel())
    return max(1, min(_CPU_NUMBERS // latent, _CPU_ROWS) // samples)


def envs_together(z: Tensor, samples: int, objective: Objective, block: int | None = None) -> int:
    """How many of the environments of ``z`` (B, *latent) a rollout takes at once: ``block`` or :func:`block_size`, but all
    of them where the objective cannot ``select``."""
    if getattr(objective, "select", None) is None:
        return len(z)
    return max(1, min(block or block_size(z, samples), len(z)))


@contextlib.contextmanager
def precision_of(precision: str, device: torch.device) -> Iterator[None]:
    """TF32 for float32 matrix multiplications on a GPU, bfloat16 autocast for models without a stepper, or neither."""
    if precision == "tf32" and device.type == "cuda":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    elif precision == "bfloat16":
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):  # a graph must not hold a cached weight
            yield
    else:
        yield


# -- memory --------------------------------------------------------------------------------------------------------------


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on ``device``; ``None`` where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def hidden_numbers(model: Any) -> int:
    """Numbers that a step needs per latent besides the latent itself: what the model's ``hidden_numbers`` says, else twice
    the widest layer of a ``torch.nn.Module``, else 0.

    Matrices are taken as (out, in), stacks of them as (E, in, out) or (E, out, in). Convolutions do not say how large their
    planes are, and are not counted.
    """
    told = getattr(model, "hidden_numbers", None)
    if isinstance(told, int):
        return told
    if not isinstance(model, nn.Module):
        return 0
    shapes = [p.shape for p in model.parameters()]
    widths = [s[0] for s in shapes if len(s) == 2] + [s[0] * max(s[1:]) for s in shapes if len(s) == 3]
    return 2 * max(widths, default=0)


def check_memory(
    z: Tensor, horizon: int, samples: int, action_size: int, *, block: int | None = None, hidden: int = 0
) -> None:
    """See whether a plan fits before anything is allocated.

    Args:
        z: latents (B, *latent).
        horizon: distinct actions of a sequence.
        samples: sequences per environment.
        action_size: ``A``.
        block: environments that go through the time loop together, ``None`` for the default.
        hidden: see :func:`hidden_numbers`.

    Raises:
        ConfigError: says how much it would need, how much there is, and what to lower.
    """
    envs, latent = len(z), max(1, z.shape[1:].numel())
    sequences = 2 * 4 * envs * samples * horizon * action_size  # noise and candidates
    rows = min(envs, block or block_size(z, samples)) * samples
    latents = 4 * rows * (4 * (latent + action_size) + hidden)  # the buffers of a block: latents, differences, layers
    need = sequences + latents
    if need < _SMALL:
        return
    available = available_bytes(z.device)
    if available is not None and need > available:
        raise ConfigError(
            f"Planning for {envs} environments with {samples} samples and {horizon} distinct actions of "
            f"{action_size} numbers would need about {_size(need)} ({_size(sequences)} for action sequences, "
            f"{_size(latents)} for latents), but {_size(available)} are free on {z.device}: lower samples or horizon, "
            "raise action_repeat, or plan for fewer "
            "environments at once."
        )


def check_noise(knots: int) -> None:
    """See whether the matrix (T, T) of coloured noise fits, while it is made in float64.

    Raises:
        ConfigError: says how much it would need, how much there is, and what to lower.
    """
    need, available = 2 * 8 * knots**2, available_bytes(torch.device("cpu"))
    if need > _SMALL and available is not None and need > available:
        raise ConfigError(
            f"Coloured noise over {knots} distinct actions would need about {_size(need)}, but {_size(available)} are "
            "free: lower horizon, raise action_repeat, or take color=0."
        )


def _size(number: int) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"
