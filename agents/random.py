"""Uniformly random actions: the floor of every comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from clbench.contracts import Agent, Experience, Spaces
from clbench.errors import ConfigError


class RandomAgent(Agent):
    """Draws every action uniformly from the action space, whatever ``explore`` says, and learns nothing.

    Coordinates of a Box without finite bounds are drawn from a standard normal distribution instead.

    Raises:
        ConfigError: the action space is neither Box nor Discrete.
    """

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        if not isinstance(spaces.action, Box | Discrete):
            raise ConfigError(f"Agent 'random' needs Box or Discrete actions, but the action space is {spaces.action}.")

    def act(self, obs: Any, memory: Any, first: torch.Tensor, *, rng: torch.Generator, task: torch.Tensor | None = None,
            explore: bool = False) -> tuple[torch.Tensor, Any]:  # fmt: skip
        space, rows = self.spaces.action, len(first)
        if isinstance(space, Discrete):
            actions = torch.randint(int(space.n), (rows,), generator=rng, device=rng.device) + int(space.start)
            return actions.to(self.device), memory
        assert isinstance(space, Box)
        low, high = (torch.as_tensor(np.asarray(b, np.float32), device=rng.device) for b in (space.low, space.high))
        bounded = torch.isfinite(low) & torch.isfinite(high)
        uniform = torch.rand((rows, *space.shape), generator=rng, device=rng.device)
        actions = torch.lerp(low, high, uniform)
        if not bool(bounded.all()):
            normal = torch.randn((rows, *space.shape), generator=rng, device=rng.device)
            actions = torch.where(bounded, actions, normal.clamp(low, high))
        return actions.to(self.device), memory

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """Lets the budget pass. The environment is not stepped: nothing could be learned from it."""
        for step in range(1, budget + 1):
            yield {"step": step}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def costs(self) -> dict[str, int]:
        """Nothing is computed."""
        return {"updates": 0, "samples": 0}

    @property
    def num_parameters(self) -> int:
        return 0
