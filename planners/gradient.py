"""Planning by gradient descent on the actions, through a differentiable world model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.contracts import Objective, WorldModel
from clbench.errors import ConfigError, ContractError
from clbench.planners.bounds import ActionBounds
from clbench.planners.rollout import (
    check_horizon,
    check_memory,
    finite_costs,
    hidden_numbers,
    lowest_costs,
    share_gained,
)
from clbench.planners.sampling import Generator, State, begin_memory, shifted, warn_replaced


class Gradient:
    """Adam (Kingma and Ba 2015) on action sequences, brought into the bounds after each step; the cheapest one is returned.

    Args:
        bounds: allowed actions, in environment units; default: two actions in [-1, 1].
        config: options.
    """

    @dataclass
    class Config:
        """Options.

        Args:
            horizon: model steps of a plan.
            iterations: steps of Adam.
            restarts: sequences per environment: the warm start without noise, the others with it.
            lr: learning rate, in units of the radius of the action bounds.
            std: standard deviation of the noise of the restarts, in units of the radius.
            action_repeat: model steps for which each action is held.
            warm_start: begin at the last plan, where ``memory`` holds one.
            tolerance: an environment whose best cost improves in an iteration by less than this share is not updated
                further; 0 never stops early.
        """

        horizon: int = 16
        iterations: int = 50
        restarts: int = 8
        lr: float = 0.1
        std: float = 0.5
        action_repeat: int = 1
        warm_start: bool = True
        tolerance: float = 0.0

        def __post_init__(self) -> None:
            for name in ("horizon", "iterations", "restarts", "action_repeat"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
            if self.horizon % self.action_repeat:
                raise ConfigError(
                    f"horizon must be a multiple of action_repeat, got {self.horizon} and {self.action_repeat}."
                )
            if not (self.lr > 0 and math.isfinite(self.lr)):
                raise ConfigError(f"lr must be positive and finite, got {self.lr}.")
            for name in ("std", "tolerance"):
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")

    def __init__(self, bounds: ActionBounds | None = None, config: Any = None):
        self.bounds = bounds or ActionBounds([-1.0, -1.0], [1.0, 1.0])
        self.config: Gradient.Config = config or self.Config()
        if not isinstance(self.config, self.Config):
            raise ConfigError(f"Gradient takes a Gradient.Config, got {type(self.config).__name__}.")

    @torch.no_grad()
    def plan(
        self, model: WorldModel, z: Tensor, objective: Objective, memory: State | None, *, rng: Generator
    ) -> tuple[Tensor, State]:
        """Latents (B, *latent) -> (actions (B, H, A), memory); as with the sampling planners.

        Raises:
            ConfigError: too large for the memory of the device, or an objective for another horizon.
            ContractError: a model or objective through which no gradient flows.
        """
        config = self.config
        self.bounds = self.bounds.to(z.device)
        knots, rows = config.horizon // config.action_repeat, config.restarts
        check_horizon(objective, config.horizon)
        # what backward needs is kept for every step: as if the environments were so many more
        check_memory(z, knots, rows * config.horizon, self.bounds.size, block=len(z), hidden=hidden_numbers(model))
        memory = begin_memory(self.start(len(z), z.device), memory if config.warm_start else None, "Gradient")
        actions = self.bounds.project(memory["mean"].transpose(0, 1)[:, :, None] + self._noise(knots, rng, z.device))
        first, second = torch.zeros_like(actions), torch.zeros_like(actions)
        best, cost = memory["mean"], torch.full((len(z),), torch.inf, device=z.device)
        replaced = memory["replaced"]
        active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        for iteration in range(config.iterations + 1):  # the last one only looks at what the last step gave
            costs, gradient = self._costs(model, z, objective, actions)
            costs, bad = finite_costs(costs)
            replaced = replaced + bad
            lowest, index = lowest_costs(costs, bad)
            gain = share_gained(cost, lowest)
            index = index[None, :, None, None].expand(knots, -1, 1, actions.shape[-1])
            cheapest = actions.gather(2, index)[:, :, 0].transpose(0, 1)
            best = torch.where((active & (lowest < cost))[:, None, None], cheapest, best)
            cost = torch.where(active, torch.minimum(cost, lowest), cost)
            if config.tolerance:
                active = active & (gain >= config.tolerance)
                if z.device.type == "cpu" and not bool(active.any()):
                    break
            gradient = torch.nan_to_num(gradient, posinf=0.0, neginf=0.0)
            first, second = first.lerp(gradient, 0.1), second.lerp(gradient.square(), 0.001)
            t = iteration + 1
            step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            actions = self.bounds.project(actions - config.lr * self.bounds.radius * step)
        warn_replaced("Gradient", replaced - memory["replaced"])
        chosen = self.bounds.project(best)
        return chosen.repeat_interleave(config.action_repeat, 1), {"mean": chosen.clone(), "replaced": replaced}

    def start(self, envs: int, device: torch.device) -> State:
        """The memory of ``envs`` environments that have not been planned for."""
        mean = self.bounds.center.to(device).expand(envs, self.config.horizon // self.config.action_repeat, -1).clone()
        return {"mean": mean, "replaced": torch.zeros(envs, dtype=torch.int64, device=device)}

    def shift(self, memory: State, steps: Tensor) -> State:
        """The memory after ``steps`` (B,) int64 actions of its plan have been executed; the last action is repeated."""
        return {**memory, "mean": shifted(memory["mean"], steps, self.config.action_repeat)}

    def _noise(self, knots: int, rng: Generator, device: torch.device) -> Tensor:
        """(T, 1 or B, R, A), zero for the first restart."""
        shape = (knots, self.config.restarts, self.bounds.size)
        generators = [rng] if isinstance(rng, torch.Generator) else list(rng)
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators], 1).to(device)
        noise[:, :, 0] = 0
        return noise * (self.config.std * self.bounds.radius)

    def _costs(self, model: WorldModel, z: Tensor, objective: Objective, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Costs (B, R) of sequences (T, B, R, A) and the gradient of their sum."""
        with torch.enable_grad():
            actions = actions.detach().requires_grad_()
            latents = z.detach()[:, None].expand(-1, actions.shape[2], *z.shape[1:])
            costs, step = torch.zeros(actions.shape[1:3], device=z.device), 0
            for action in actions.unbind():
                for _ in range(self.config.action_repeat):
                    latents, step = model.predict(latents, action), step + 1
                    costs = costs + objective(latents, step).float()
            if not costs.requires_grad:
                raise ContractError(
                    "No gradient flows from the objective to the actions: the gradient planner needs a world model and an "
                    "objective that are differentiable; use a sampling planner, such as icem."
                )
            (gradient,) = torch.autograd.grad(costs.sum(), actions)
        return costs.detach(), gradient
