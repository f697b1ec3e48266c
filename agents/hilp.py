"""HILP: Hilbert representations and skills (Park et al. 2024, arXiv 2402.15567), goal-conditioned.

Distances in the latent space of phi are temporal distances; a skill z is a direction to move in there::

    V_j(s, g) = -|phi_j(s) - phi_j(g)|,  j = 1, 2, trained as in GCIVL
    r_z = (phi_1(s') - phi_1(s)) z,      z uniform on the unit sphere, fresh for every row
    L_v = E[ L_kappa(delta, delta) ],    delta = min_j Q'_j(s, z, a) - v(s, z)
    L_q = E[ sum_j (Q_j(s, z, a) - r_z - gamma v(s', z))^2 ]              never terminal
    L_pi = AWR with A = min_j Q'_j(s, z, a) - v(s, z)                      the target critic, unlike GCIQL

To reach g, follow the skill ``z = (phi(g) - phi(s)) / |.|``, computed anew at every step; to avoid it (observations with
``goal_sign`` -1), follow -z, as PLDM does for its chaser. Where states have more than goals do (velocities), phi compares
what is achieved.

What differs from the published code: skills are fresh in every update (one random batch of skills was frozen into it until
2025-09, also for the published numbers); rows of the data are those with an action, without the last state of an episode,
which is a next state only; actions are not clipped to 1 - 1e-5, which matters to squashed policies only, and this one is
not. A categorical policy for discrete actions is ours.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents.gcivl import implicit_v_loss
from clbench.agents.gcrl.base import GoalAgent, GoalBatch, GoalConfig
from clbench.agents.gcrl.losses import awr_loss, detached, expectile_loss
from clbench.agents.gcrl.networks import Actor, Distribution, Input, Network, stack_rows
from clbench.contracts import Spaces
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError

PLAN_ROUNDS, PLAN_NEAREST = 3, 50  # of HILP-Plan
EMBED_ROWS = 4096  # at once


def hilbert_value(x: Tensor, y: Tensor) -> Tensor:
    """Minus the distance of latents: (..., B, D) -> (..., B)."""
    return -(x - y).square().sum(-1).clamp(min=1e-6).sqrt()


def random_skills(count: int, dim: int, device: torch.device, rng: torch.Generator) -> Tensor:
    """(B, D), uniform on the unit sphere."""
    draw = torch.randn(count, dim, generator=rng, device=rng.device).to(device)
    return functional.normalize(draw, dim=-1)


def midpoint(x: Tensor, y: Tensor, states: Tensor, *, rounds: int = PLAN_ROUNDS, nearest: int = PLAN_NEAREST) -> Tensor:
    """Latents on the way from x to y (HILP, its section on test-time planning).

    In each round, y moves to the mean of those states that are nearest to both: with the least ``max(|w - x|, |w - y|)``.

    Args:
        x: (B, D).
        y: (B, D).
        states: (N, D), latents of states of the data.
        rounds: halvings of the way.
        nearest: states to average.

    Returns:
        (B, D).
    """
    from_here = torch.cdist(x, states)
    for _ in range(rounds):
        distance = torch.maximum(from_here, torch.cdist(y, states))
        y = states[distance.topk(min(nearest, len(states)), largest=False).indices].mean(1)
    return y


class HILP(GoalAgent):
    """Hilbert representation, and skills that move through it."""

    @dataclass
    class Config(GoalConfig):
        """Options, beside those of :class:`GoalConfig`.

        Args:
            expectile: kappa of the representation.
            skill_expectile: kappa of the skills' value.
            alpha: inverse temperature of the skill policy; larger is greedier.
            tau: step of the target networks.
            skill_dim: D.
            plan_states: of the latest data, to find midpoints among on the way to a goal (HILP-Plan; 50,000 in the paper);
                0: go straight for the goal. They are kept in the agent's state.
        """

        expectile: float | None = None
        skill_expectile: float | None = None
        alpha: float | None = None
        tau: float | None = None
        skill_dim: int | None = None
        plan_states: int = 0
        agent = "hilp"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.plan_states < 0:
                raise ConfigError(f"plan_states must be at least 0, got {self.plan_states}.")

    targets = {"target_phi": "phi", "target_skill_critic": "skill_critic"}
    avoids = True
    phi: Network
    target_phi: Network
    skill_value: Network
    skill_critic: Network
    target_skill_critic: Network
    skill_actor: Actor

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.waypoints: Tensor | None = None  # (N, ...) achieved goals of the data, to plan with
        self._embedded: tuple[int, Tensor] | None = None  # after how many updates, their latents

    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        state, hidden, dim = self.inputs.state_shape, self.config.hidden, self.config.skill_dim
        shared: dict[str, Any] = {"rng": rng, "layer_norm": True}
        options = {**self.actor_options, "activation": torch.relu}
        return {
            "phi": Network((self.inputs.goal_shape,), (*hidden, dim), members=2, **shared),
            "skill_value": Network((state,), (*hidden, 1), extra=dim, squeeze=True, **shared),
            "skill_critic": Network(
                (state,), (*hidden, 1), extra=dim + self.action_size, members=2, squeeze=True, **shared
            ),
            "skill_actor": Actor((state,), hidden, self.action_size, rng=rng, extra=dim, **options),
        }

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> GoalBatch:
        """No goals for the actor, but a skill for every row."""
        index = data.sample_index(self.config.batch_size, rng)
        goal = data.sample_goals(index, self.config.value_sampling, rng)
        batch = self.batch(data, index, goal, goal)
        skills = random_skills(len(index), self.config.skill_dim, self.device, rng)
        return dataclasses.replace(batch, more={"skills": Input(skills)})

    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, z, a = self.config, batch.more["skills"].flat, self.as_input(batch.a)
        assert z is not None
        rows = stack_rows(batch.achieved, batch.achieved_next, batch.g_v)
        with torch.no_grad():
            x, x_next, y = self.target_phi(rows).chunk(3, 1)
            target_v, target_next = hilbert_value(x, y), hilbert_value(x_next, y)
        # one call each: gradients that cancel, such as that of phi's last bias, cancel exactly, as in the reference
        x, y = self.phi(batch.achieved), self.phi(batch.g_v)
        v = hilbert_value(x, y)
        phi_loss = implicit_v_loss(v, target_v, target_next, batch.at_goal, config.discount, config.expectile)
        with torch.no_grad():
            x_next = self.phi(batch.achieved_next)
            reward = ((x_next[0] - x[0]) * z).sum(-1)
            target_q = self.target_skill_critic(batch.s, extra=torch.cat([z, a], 1)).amin(0)
            q_next = reward + config.discount * self.skill_value(batch.s_next, extra=z)
        skill_v = self.skill_value(batch.s, extra=z)
        delta = target_q - skill_v
        value_loss = expectile_loss(delta, delta, config.skill_expectile).mean()
        q = self.skill_critic(batch.s, extra=torch.cat([z, a], 1))
        critic_loss = (q - q_next).square().sum(0).mean()
        actor_loss = awr_loss(self.skill_actor(batch.s, extra=z), batch.a, delta, config.alpha)
        loss = phi_loss + value_loss + critic_loss + actor_loss
        terms = {
            "phi_loss": phi_loss, "value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss,
        }  # fmt: skip
        return loss, detached({"loss": loss, **terms, "v": v.mean(), "q": q.mean()})

    # -- acting -----------------------------------------------------------------------------------------------------

    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float,
               sign: Tensor | None = None) -> Distribution:  # fmt: skip
        here, there = self.phi(stack_rows(achieved, g))[0].chunk(2)
        if self.waypoints is not None:
            there = midpoint(here, there, self._waypoint_latents(self.waypoints))
        skill = functional.normalize(there - here, dim=-1)
        return self.skill_actor(s, extra=skill if sign is None else sign * skill)

    def prepare(self, data: OfflineDataset) -> None:
        super().prepare(data)
        if self.config.plan_states:
            # spread evenly: nothing is drawn, so training is the same with and without planning
            count = min(self.config.plan_states, len(data))
            rows = torch.arange(count, device=data.device) * len(data) // count
            self.waypoints, self._embedded = data.observations["achieved_goal"][rows].to(self.device), None

    @torch.no_grad()
    def _waypoint_latents(self, waypoints: Tensor) -> Tensor:
        """(N, D), computed once after every change of the networks."""
        if self._embedded is None or self._embedded[0] != self.updates:
            parts = [self.phi(self.inputs.goal(rows))[0] for rows in waypoints.split(EMBED_ROWS)]
            self._embedded = self.updates, torch.cat(parts)
        return self._embedded[1]

    def state_dict(self) -> dict[str, Any]:
        if self.waypoints is None:
            return super().state_dict()
        return {**super().state_dict(), "waypoints": self.waypoints.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        waypoints = state.get("waypoints")
        self.waypoints = None if waypoints is None else waypoints.to(self.device, copy=True)
        self._embedded = None
