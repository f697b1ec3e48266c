"""What all sampling planners share: draw action sequences, bring them into the bounds, roll them out, update.

A planner adds its update rule, a small function of the candidates and their costs. All tensors are batched over
environments, and no environment ever sees another: rank, weights and averages are taken within a row.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clbench.contracts import Objective, WorldModel
from clbench.errors import ConfigError, ContractError, unknown_name
from clbench.planners.bounds import TILE, ActionBounds
from clbench.planners.graphs import GraphCache
from clbench.planners.rollout import (
    PRECISIONS,
    Precision,
    Rollout,
    check_horizon,
    check_memory,
    check_noise,
    envs_together,
    finite_costs,
    hidden_numbers,
    lowest_costs,
    share_gained,
)

Generator = torch.Generator | Sequence[torch.Generator]
Prior = Callable[[Tensor, int], Tensor]
State = dict[str, Tensor]


@dataclass
class SamplingConfig:
    """Options of all sampling planners.

    Args:
        horizon: model steps of a plan.
        samples: action sequences per environment and iteration, kept elites and prior sequences included.
        iterations: rounds of sampling and updating.
        std: standard deviation of the first iteration's noise, in units of the radius of the action bounds.
        color: exponent of the noise's power spectrum over time, ``f^-color``: 0 is white, 2 is smooth.
        action_repeat: model steps for which each action is held; ``horizon / action_repeat`` actions are searched.
        warm_start: begin at the last plan, where ``memory`` holds one, instead of the centre of the bounds.
        returns: ``"mean"`` of the distribution, or the ``"best"`` sequence that was sampled.
        tolerance: an environment whose best cost improves in an iteration by less than this share, or whose standard
            deviation is below it (in units of the radius), is not updated further; 0 never stops early.
        prior_samples: sequences that follow the policy prior, where the planner has one.
        prior_std: noise on all but one of them, in units of the radius.
        block: environments that go through the time loop together; by default chosen for the device.
        precision: of the rollout's matrix multiplications: ``"float32"``, ``"tf32"`` (CUDA) or ``"bfloat16"``.
        cuda_graph: capture one iteration and replay it, on a GPU and with a world model that has a stepper.
    """

    horizon: int = 16
    samples: int = 512
    iterations: int = 5
    std: float = 0.5
    color: float = 0.0
    action_repeat: int = 1
    warm_start: bool = True
    returns: Literal["mean", "best"] = "mean"
    tolerance: float = 0.0
    prior_samples: int = 24
    prior_std: float = 0.3
    block: int | None = None
    precision: Precision = "float32"
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        for name in ("horizon", "samples", "iterations", "action_repeat", "prior_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.horizon % self.action_repeat:
            raise ConfigError(
                f"horizon must be a multiple of action_repeat, got {self.horizon} and {self.action_repeat}."
            )
        if not (self.std > 0 and math.isfinite(self.std)):
            raise ConfigError(f"std must be positive and finite, got {self.std}.")
        for name in ("tolerance", "prior_std", "color"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if self.block is not None and self.block < 1:
            raise ConfigError(f"block must be at least 1, got {self.block}.")
        if self.returns not in ("mean", "best"):
            raise unknown_name("value of returns", str(self.returns), ("mean", "best"))
        if self.precision not in PRECISIONS:
            raise unknown_name("value of precision", str(self.precision), PRECISIONS)

    @property
    def knots(self) -> int:
        """``T``, the number of distinct actions of a sequence."""
        return self.horizon // self.action_repeat


class SamplingPlanner(ABC):
    """Base of MPPI, CEM, iCEM and random shooting.

    Args:
        bounds: allowed actions, in environment units; default: two actions in [-1, 1].
        config: options.
        prior: a policy ``(z (B, P, *latent), step) -> actions (B, P, A)``, step 0 first; the sequences that follow it in
            the world model join the candidates of every iteration, as in TD-MPC2 (Hansen et al. 2024).

    Raises:
        ConfigError: not enough samples for elites and prior, or a horizon that the memory cannot hold.
    """

    Config: ClassVar[type[SamplingConfig]] = SamplingConfig

    def __init__(self, bounds: ActionBounds | None = None, config: Any = None, *, prior: Prior | None = None):
        self.bounds = bounds or ActionBounds([-1.0, -1.0], [1.0, 1.0])
        self.config = config or self.Config()
        self.prior = prior
        if not isinstance(self.config, self.Config):
            raise ConfigError(
                f"{type(self).__name__} takes a {type(self).__name__}.Config, got {type(self.config).__name__}."
            )
        smallest, extra = min(self.samples_of(i) for i in range(self.config.iterations)), self._extra()
        if smallest <= extra:
            raise ConfigError(
                f"{smallest} samples leave nothing to draw beside {extra} kept or prior sequences; raise samples."
            )
        self._graphs = GraphCache()
        if self.config.color:
            check_noise(self.config.knots)
        self._synthesis = synthesis(self.config.knots, self.config.color) if self.config.color else None

    # -- what a planner adds -------------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, state: State, candidates: Tensor, costs: Tensor) -> State:
        """The new ``mean`` and ``std`` (B, T, A), and whatever else the planner keeps, from candidates (T, B, K, A) in the
        bounds and finite costs (B, K). Changes nothing in place."""

    def samples_of(self, iteration: int) -> int:
        """``K`` of an iteration."""
        return self.config.samples

    def kept(self) -> int:
        """How many sequences of ``state["kept"]`` (B, n, T, A) are candidates again."""
        return 0

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Standard noise (T, K, A)."""
        white = torch.randn(shape, generator=generator, device=generator.device)
        if self._synthesis is None:
            return white
        self._synthesis = self._synthesis.to(white.device)
        return torch.einsum("st,tka->ska", self._synthesis, white)

    # -- planning ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def plan(
        self, model: WorldModel, z: Tensor, objective: Objective, memory: State | None, *, rng: Generator
    ) -> tuple[Tensor, State]:
        """Latents (B, *latent) -> (actions (B, H, A), memory).

        ``memory`` is ``None`` or what the last call returned; see :meth:`shift` for the steps executed since. With one
        generator all environments share one draw of noise, so a plan does not depend on its batch; ``rng`` may also be a
        sequence of ``B`` generators. ``memory["replaced"]`` (B,) counts the costs that were not finite.

        Raises:
            ConfigError: too large for the memory of the device, or an objective for another horizon.
            ContractError: ``memory`` of another batch or planner.
        """
        config = self.config
        self.bounds = self.bounds.to(z.device)
        check_horizon(objective, config.horizon)
        block = envs_together(z, config.samples, objective, config.block)
        check_memory(z, config.knots, config.samples, self.bounds.size, block=block, hidden=hidden_numbers(model))
        state = self._begin(z, memory)
        rollout = Rollout(
            model, z, objective, repeat=config.action_repeat, block=config.block, precision=config.precision
        )
        fixed = self._follow_prior(model, z, rng) if self.prior is not None else None
        before, stopped = state["replaced"], False
        iterate: dict[int, Callable[[State, Tensor], State]] = {}  # by the number of samples
        for iteration in range(config.iterations):
            noise = self._draw(iteration, rng, z.device)
            # the noise of iterations that are not needed is drawn too: what comes next must not depend on the batch
            if not stopped:
                samples = noise.shape[2]
                if samples not in iterate:
                    iterate[samples] = self._iteration(rollout, state, noise, fixed)
                state = iterate[samples](state, noise)
                stopped = config.tolerance > 0 and z.device.type == "cpu" and not bool(state["active"].any())
        warn_replaced(type(self).__name__, state["replaced"] - before)
        return self._end(state)

    def _iteration(
        self, rollout: Rollout, state: State, noise: Tensor, fixed: Tensor | None
    ) -> Callable[[State, Tensor], State]:
        if self.config.cuda_graph:
            return self._graphs.iteration(self._iterate, rollout, state, noise, fixed)
        return lambda state, noise: self._iterate(rollout, state, noise, fixed)

    def _iterate(self, rollout: Callable[[Tensor], Tensor], state: State, noise: Tensor, fixed: Tensor | None) -> State:
        """One round for all environments; frozen ones keep their state."""
        candidates = self._candidates(state, noise, fixed)
        costs, replaced = finite_costs(rollout(candidates))
        new = self.update(state, candidates, costs)
        cost, index = lowest_costs(costs, replaced)
        improved = cost < state["cost"]
        best = _take(candidates, index[:, None])[:, :, 0].transpose(0, 1)
        new["best"] = torch.where(improved[:, None, None], best, state["best"])
        new["cost"] = torch.minimum(cost, state["cost"])
        new["replaced"] = state["replaced"] + replaced
        if self.config.tolerance:
            gain = share_gained(state["cost"], new["cost"])
            width = (new["std"] / self.bounds.radius).amax((1, 2))
            new["active"] = state["active"] & (gain >= self.config.tolerance) & (width >= self.config.tolerance)
            new = {k: torch.where(_like(state["active"], v), v, state[k]) for k, v in new.items()}
        return {**state, **new}

    def _candidates(self, state: State, noise: Tensor, fixed: Tensor | None) -> Tensor:
        """(T, B, K, A): drawn around the mean, then the kept and the prior's sequences; all in the bounds."""
        mean, std = (state[k].transpose(0, 1)[:, :, None] for k in ("mean", "std"))
        extras = [state["kept"].permute(2, 0, 1, 3)] if self.kept() else []
        extras += [] if fixed is None else [fixed]
        steps, _, samples, size = noise.shape
        # over several samples at once, since a broadcast over the few dimensions of an action alone would be slow
        group = math.gcd(samples, TILE)
        noise = noise.view(steps, -1, samples // group, group * size)
        mean, std = mean.repeat(1, 1, 1, group), std.repeat(1, 1, 1, group)
        candidates = torch.addcmul(mean, noise, std).view(steps, -1, samples, size)
        if extras:
            candidates[:, :, samples - self._extra() :] = torch.cat(extras, 2)
        return self.bounds.project_(candidates)

    def _extra(self) -> int:
        return self.kept() + (self.config.prior_samples if self.prior is not None else 0)

    def _draw(self, iteration: int, rng: Generator, device: torch.device) -> Tensor:
        """Noise (T, 1 or B, K, A), also for the sequences that are kept, which do not use it."""
        shape = (self.config.knots, self.samples_of(iteration), self.bounds.size)
        if isinstance(rng, torch.Generator):
            return self.noise(shape, rng)[:, None].to(device)
        return torch.stack([self.noise(shape, g) for g in rng], 1).to(device)

    def _follow_prior(self, model: WorldModel, z: Tensor, rng: Generator) -> Tensor:
        """Sequences (T, B, P, A) that follow the policy prior, all but the first with noise."""
        assert self.prior is not None
        config, count = self.config, self.config.prior_samples
        shape = (config.knots, count, self.bounds.size)
        generators = [rng] if isinstance(rng, torch.Generator) else rng
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators], 1).to(z.device)
        noise[:, :, 0] = 0
        latents, sequence = z[:, None].expand(-1, count, *z.shape[1:]), []
        for t in range(config.knots):
            action = self.prior(latents, t * config.action_repeat)
            if action.shape != (len(z), count, self.bounds.size):
                raise ContractError(
                    f"The prior returned actions {tuple(action.shape)}, expected {(len(z), count, self.bounds.size)}."
                )
            action = self.bounds.project(action + config.prior_std * self.bounds.radius * noise[t])
            sequence.append(action)
            for _ in range(config.action_repeat):
                latents = model.predict(latents, action)
        return torch.nan_to_num(torch.stack(sequence))

    # -- memory --------------------------------------------------------------------------------------------------------

    def start(self, envs: int, device: torch.device) -> State:
        """The memory of ``envs`` environments that have not been planned for."""
        mean = self.bounds.center.to(device).expand(envs, self.config.knots, -1).clone()
        memory = {"mean": mean, "replaced": torch.zeros(envs, dtype=torch.int64, device=device)}
        return memory | ({"kept": mean[:, None].repeat(1, self.kept(), 1, 1)} if self.kept() else {})

    def shift(self, memory: State, steps: Tensor) -> State:
        """The memory after ``steps`` (B,) int64 actions of its plan have been executed; the last action is repeated."""
        moved = {k: shifted(memory[k], steps, self.config.action_repeat) for k in ("mean", "kept") if k in memory}
        return {**memory, **moved}

    def _begin(self, z: Tensor, memory: State | None) -> State:
        fresh = self.start(len(z), z.device)
        state = begin_memory(fresh, memory if self.config.warm_start else None, type(self).__name__)
        state["std"] = (self.config.std * self.bounds.radius).expand_as(state["mean"])
        state["best"] = state["mean"]
        state["cost"] = torch.full((len(z),), torch.inf, device=z.device)
        state["active"] = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return state

    def _end(self, state: State) -> tuple[Tensor, State]:
        chosen = self.bounds.project(state["best" if self.config.returns == "best" else "mean"])
        memory = {k: state[k].clone() for k in self.start(0, chosen.device)}
        return chosen.repeat_interleave(self.config.action_repeat, 1), memory


def begin_memory(fresh: State, memory: Any, planner: str) -> State:
    """``memory`` where there is one, checked against a ``fresh`` one.

    Raises:
        ContractError: it is of another batch, horizon or planner.
    """
    if memory is None:
        return dict(fresh)
    for name, value in fresh.items():
        if not isinstance(memory, dict) or getattr(memory.get(name), "shape", None) != value.shape:
            raise ContractError(
                f"This memory is not of {planner} for {len(value)} environments ({name!r} must be a tensor "
                f"{tuple(value.shape)}): pass None, or what plan returned for these environments."
            )
    return {k: memory[k] for k in fresh}


def warn_replaced(planner: str, replaced: Tensor) -> None:
    """Say that costs were replaced, where looking at them does not make a GPU wait."""
    if replaced.device.type == "cpu" and (count := int(replaced.sum())):
        warnings.warn(
            f"{planner}: {count} costs of action sequences were not finite and count as the worst of their environment; "
            "the world model or the objective gives NaN or infinity. memory['replaced'] counts them per environment.",
            stacklevel=3,
        )


# -- pure functions ------------------------------------------------------------------------------------------------------


def elites(candidates: Tensor, costs: Tensor, count: int) -> Tensor:
    """The ``count`` cheapest sequences (T, B, count, A) of each environment, cheapest first."""
    return _take(candidates, costs.topk(count, 1, largest=False).indices)


def synthesis(steps: int, color: float) -> Tensor:
    """The matrix (T, T) that makes noise of unit variance and power spectrum ``f^-color`` from white noise (T,).

    Its columns are the cosines and sines of all frequencies ``k / T``, scaled by ``k^(-color / 2)`` as by Timmer and Koenig
    (1995), "On generating power law noise"; the constant has the amplitude of the lowest frequency.
    """
    time = torch.arange(steps, dtype=torch.float64)
    columns, power = [], []
    for k in range(steps // 2 + 1):
        angle = 2 * math.pi * k * time / steps
        amplitude = max(k, 1) ** (-color / 2)
        single = k == 0 or 2 * k == steps  # these frequencies have no sine
        columns += (
            [amplitude * angle.cos()] if single else [math.sqrt(2) * amplitude * f for f in (angle.cos(), angle.sin())]
        )
        power.append(amplitude**2 * (1 if single else 2))
    return (torch.stack(columns, 1) / math.sqrt(sum(power))).to(torch.float32)


def shifted(sequences: Tensor, steps: Tensor, repeat: int = 1) -> Tensor:
    """Sequences (B, ..., T, A) without their first ``steps`` (B,) actions, the last one repeated.

    With ``repeat`` each action stands for so many steps; one that then covers parts of two is their average.
    """
    held = sequences.repeat_interleave(repeat, -2)
    horizon = held.shape[-2]
    index = (torch.arange(horizon, device=held.device) + steps[:, None]).clamp(max=horizon - 1)
    index = index.view(len(index), *[1] * (held.ndim - 3), horizon, 1).expand_as(held)
    moved = held.gather(-2, index)
    return moved.unflatten(-2, (-1, repeat)).mean(-2) if repeat > 1 else moved


def _take(candidates: Tensor, index: Tensor) -> Tensor:
    """(T, B, K, A) at indices (B, n) -> (T, B, n, A)."""
    steps, envs, _, size = candidates.shape
    return candidates.gather(2, index[None, :, :, None].expand(steps, envs, index.shape[1], size))


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (value.ndim - 1))
