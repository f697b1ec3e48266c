"""PPO, DQN, SAC and TD3 of Stable-Baselines3, each with its options.

Learning rates are constant: SB3's schedules are functions of the progress of one call of ``learn``, which has no meaning in
a stream. ``hidden = None`` means SB3's own network sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.noise import NormalActionNoise

from clbench.agents.continual.batches import rows, take, zip_map
from clbench.agents.networks.outputs import Output
from clbench.agents.sb3.base import ActorCritic, OffPolicyAgent, OneOptimizer, Steps, WaitForEpisode
from clbench.contracts import Spaces
from clbench.errors import ContractError


class SB3PPO(OneOptimizer):
    """PPO (Schulman et al. 2017), with SB3's defaults."""

    name = "sb3-ppo"
    algorithm = PPO

    @dataclass
    class Config:
        """Options.

        Args:
            rollout_steps: environment steps per rollout, over all parallel environments (SB3 counts per environment; its
                default is 2048 with one).
        """

        lr: float = 3e-4
        rollout_steps: int = 2048
        batch_size: int = 64
        n_epochs: int = 10
        gamma: float = 0.99
        gae_lambda: float = 0.95
        clip_range: float = 0.2
        ent_coef: float = 0.0
        vf_coef: float = 0.5
        max_grad_norm: float = 0.5
        hidden: tuple[int, ...] | None = None

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self._rollout: Steps | None = None  # the last one, where continual methods are attached

    def _arguments(self) -> dict[str, Any]:
        c: SB3PPO.Config = self.config
        return {
            "learning_rate": c.lr, "n_steps": self._full_collection(self.bridge.num_envs), "batch_size": c.batch_size,
            "n_epochs": c.n_epochs, "gamma": c.gamma, "gae_lambda": c.gae_lambda, "clip_range": c.clip_range,
            "ent_coef": c.ent_coef, "vf_coef": c.vf_coef, "max_grad_norm": c.max_grad_norm,
        }  # fmt: skip

    def _full_collection(self, num_envs: int) -> int:
        return max(2, self.config.rollout_steps // num_envs)

    def _set_collection(self, steps: int) -> None:
        self.model.n_steps = self.model.rollout_buffer.buffer_size = steps
        self.model.rollout_buffer.reset()

    def _count(self, steps: int) -> None:
        rollout = self._collection * self.bridge.num_envs
        batches = math.ceil(rollout / self.config.batch_size)
        self.updates += steps // rollout * self.config.n_epochs * batches
        self.samples += steps * self.config.n_epochs

    # -- for continual methods ------------------------------------------------------------------------------------------

    def outputs(self, batch: Steps) -> tuple[Output, ...]:
        """The distribution over actions, logits (B, n) or means (B, A), and the value (B, 1).

        The spread of continuous actions is no part of it, so that no method holds it.
        """
        policy = self.model.policy
        found = policy.get_distribution(batch.observations).distribution
        if isinstance(found, torch.distributions.Categorical):
            actions = Output("categorical", found.logits)
        else:
            actions = Output("gaussian", found.mean)
        return actions, Output("gaussian", policy.predict_values(batch.observations))

    def _remember(self) -> None:
        """The last rollout. SB3 has its rows in one axis by now, one environment after the other."""
        buffer = self.model.rollout_buffer

        def own(array: np.ndarray, space: Any) -> torch.Tensor:
            kept = np.array(array, np.uint8 if space.dtype == np.uint8 else array.dtype)  # SB3 has images as floats
            return torch.from_numpy(kept).to(self.device)

        seen, space = buffer.observations, self.model.observation_space
        observations = {k: own(v, space[k]) for k, v in seen.items()} if isinstance(seen, dict) else own(seen, space)
        self._rollout = Steps(observations, own(buffer.actions, self.model.action_space))

    def sample(self, data: None, rng: torch.Generator) -> Steps:
        """``batch_size`` random steps of the last rollout."""
        if self._rollout is None:
            raise ContractError(f"Agent {self.name!r} has made no rollout yet, so there is nothing to sample.")
        size, high = (self.config.batch_size,), rows(self._rollout)
        return take(self._rollout, torch.randint(high, size, generator=rng, device=rng.device).to(self.device))

    def state_dict(self) -> dict[str, Any]:
        rollout = {}
        if self._rollout is not None:
            rollout = {"rollout": zip_map(torch.clone, self._rollout)._asdict()}
        return {**super().state_dict(), **rollout}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        saved = state.get("rollout")
        self._rollout = None if saved is None else zip_map(lambda t: t.clone().to(self.device), Steps(**saved))


class StepDQN(WaitForEpisode, DQN):
    """DQN whose epsilon falls linearly with the environment steps taken so far, not with the progress of one ``learn``."""

    def __init__(self, *args: Any, exploration_steps: int, **kwargs: Any):
        self.exploration_steps = exploration_steps
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.exploration_schedule = self._epsilon

    def _epsilon(self, _progress: float) -> float:
        fraction = min(1.0, self.num_timesteps / self.exploration_steps)
        return self.exploration_initial_eps + fraction * (self.exploration_final_eps - self.exploration_initial_eps)


class SB3DQN(OffPolicyAgent, OneOptimizer):
    """DQN (Mnih et al. 2015), with SB3's defaults but a smaller replay buffer."""

    name = "sb3-dqn"
    algorithm = StepDQN
    requires = frozenset({"env", "discrete"})

    @dataclass
    class Config:
        """Options.

        Args:
            buffer_size: transitions kept, over all parallel environments (SB3's default is a million).
            train_freq: vector steps between two rounds of ``gradient_steps`` updates (-1: one update per transition).
            exploration_steps: environment steps over which epsilon falls from 1 to ``exploration_final``.
            target_update_interval: environment steps between two copies into the target network.
            her: relabel goals in hindsight where observations carry a goal.
            n_sampled_goal: relabelled transitions per real one.
            buffer: what happens to the replay buffer at a boundary.
        """

        lr: float = 1e-4
        buffer_size: int = 100_000
        learning_starts: int = 100
        batch_size: int = 32
        tau: float = 1.0
        gamma: float = 0.99
        train_freq: int = 4
        gradient_steps: int = 1
        target_update_interval: int = 10_000
        exploration_steps: int = 10_000
        exploration_final: float = 0.05
        max_grad_norm: float = 10.0
        hidden: tuple[int, ...] | None = None
        her: bool = True
        n_sampled_goal: int = 4
        buffer: Literal["keep", "clear"] = "keep"

    _counters = (*OffPolicyAgent._counters, "_n_calls", "exploration_rate")

    def _arguments(self) -> dict[str, Any]:
        c: SB3DQN.Config = self.config
        return {
            **super()._arguments(), "target_update_interval": c.target_update_interval,
            "exploration_steps": c.exploration_steps, "exploration_final_eps": c.exploration_final,
            "max_grad_norm": c.max_grad_norm,
        }  # fmt: skip

    def outputs(self, batch: Steps) -> tuple[Output, ...]:
        """The values of all actions (B, n)."""
        return (Output("gaussian", self.model.q_net(batch.observations)),)

    def _explore(self, obs: Any, rng: torch.Generator) -> np.ndarray:
        """Epsilon-greedy, a coin per row."""
        greedy = self._greedy(obs)
        random = torch.randint(int(self.model.action_space.n), greedy.shape, generator=rng, device=rng.device)
        coin = torch.rand(greedy.shape, generator=rng, device=rng.device) < self.model.exploration_rate
        return np.where(coin.cpu().numpy(), random.cpu().numpy(), greedy)


class WaitingSAC(WaitForEpisode, SAC):
    """SAC that waits for the first finished episode where it relabels goals."""


class SB3SAC(OffPolicyAgent, ActorCritic):
    """SAC (Haarnoja et al. 2018), with SB3's defaults but a smaller replay buffer."""

    name = "sb3-sac"
    algorithm = WaitingSAC
    requires = frozenset({"env", "continuous"})

    @dataclass
    class Config:
        """Options; see :class:`SB3DQN.Config`. The entropy coefficient is learned."""

        lr: float = 3e-4
        buffer_size: int = 100_000
        learning_starts: int = 100
        batch_size: int = 256
        tau: float = 0.005
        gamma: float = 0.99
        train_freq: int = 1
        gradient_steps: int = 1
        hidden: tuple[int, ...] | None = None
        her: bool = True
        n_sampled_goal: int = 4
        buffer: Literal["keep", "clear"] = "keep"

    def _action(self, observations: Any) -> torch.Tensor:
        return self.model.actor(observations, deterministic=True)


class WaitingTD3(WaitForEpisode, TD3):
    """TD3 that waits for the first finished episode where it relabels goals."""


class SB3TD3(OffPolicyAgent, ActorCritic):
    """TD3 (Fujimoto et al. 2018), with SB3's defaults but a smaller replay buffer and the paper's exploration noise."""

    name = "sb3-td3"
    algorithm = WaitingTD3
    requires = frozenset({"env", "continuous"})

    @dataclass
    class Config:
        """Options; see :class:`SB3DQN.Config`.

        Args:
            noise: standard deviation of the Gaussian exploration noise, in units of half the range of the action space
                (0.1 in the paper; SB3 has none unless told).
        """

        lr: float = 1e-3
        buffer_size: int = 100_000
        learning_starts: int = 100
        batch_size: int = 256
        tau: float = 0.005
        gamma: float = 0.99
        train_freq: int = 1
        gradient_steps: int = 1
        noise: float = 0.1
        hidden: tuple[int, ...] | None = None
        her: bool = True
        n_sampled_goal: int = 4
        buffer: Literal["keep", "clear"] = "keep"

    def _arguments(self) -> dict[str, Any]:
        shape = self.spaces.action.shape or ()
        noise = NormalActionNoise(np.zeros(shape), np.full(shape, self.config.noise))  # has no memory, so no state
        return {**super()._arguments(), "action_noise": noise}

    def _explore(self, obs: Any, rng: torch.Generator) -> np.ndarray:
        scaled = self.model.policy.scale_action(self._greedy(obs))
        noise = torch.randn(scaled.shape, generator=rng, device=rng.device).cpu().numpy()
        return self.model.policy.unscale_action(np.clip(scaled + self.config.noise * noise, -1, 1))
