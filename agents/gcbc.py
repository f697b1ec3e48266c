"""GCBC: goal-conditioned behaviour cloning (Lynch et al. 2019; Ghosh et al. 2021), as in OGBench.

Clone the actions of the data, given a goal that the same trajectory reached later::

    L = -log pi(a | s, g),   g uniform over the rest of the trajectory
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig
from clbench.agents.gcrl.losses import detached
from clbench.agents.gcrl.networks import Actor, Distribution, Input
from clbench.data.dataset import OfflineDataset


class GCBC(GoalAgent):
    """Goal-conditioned behaviour cloning."""

    @dataclass
    class Config(GoalConfig):
        """Options: see :class:`GoalConfig`."""

        agent = "gcbc"

    looks_ahead = False
    actor: Actor

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        shapes = (self.inputs.state_shape, self.inputs.goal_shape)
        return {"actor": Actor(shapes, self.config.hidden, self.action_size, rng=rng, **self.actor_options)}

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> GoalBatch:
        """Only the actor has goals."""
        index = data.sample_index(self.config.batch_size, rng)
        goal = data.sample_goals(index, self.config.actor_sampling, rng)
        return self.batch(data, index, goal, goal)

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self.actor(batch.s, batch.g_a).log_prob(batch.a).mean()
        return loss, detached({"loss": loss, "bc_log_prob": -loss})

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        return self.actor(s, g)
