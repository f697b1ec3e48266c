"""Our batched tensor environments as Stable-Baselines3's ``VecEnv``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from stable_baselines3.common.vec_env import VecEnv

from clbench.contracts import Spaces, VectorEnv
from clbench.errors import ConfigError, ContractError


def to_numpy(obs: Any) -> Any:
    """Tensors (or a dict of them) as NumPy arrays of their own, so that nobody else's memory is shared."""
    return {k: to_numpy(v) for k, v in obs.items()} if isinstance(obs, Mapping) else obs.detach().cpu().numpy().copy()


class Bridge(VecEnv):
    """A ``VecEnv`` whose environment is plugged in with :meth:`connect`; without one it only states the spaces.

    SB3 expects the last observation of an episode in ``infos[i]["terminal_observation"]`` and a mark on episodes that were
    cut by a time limit; both follow from the SAME_STEP convention of :class:`clbench.contracts.VectorEnv`. It also sums up
    the finished episodes for the log.

    Args:
        spaces: of one environment. Discrete actions are renumbered from 0, as SB3 wants them.
        num_envs: rows.
        agent: name for error messages.
    """

    env: VectorEnv | None = None

    def __init__(self, spaces: Spaces, num_envs: int, agent: str):
        action = copy.deepcopy(spaces.action)  # SB3 samples from it, and a space has a generator of its own
        self.first_action = 0
        if isinstance(action, Discrete):
            self.first_action, action = int(action.start), Discrete(int(action.n))
        super().__init__(num_envs, spaces.observation, action)
        self.spaces, self.agent = spaces, agent
        self.returns = np.zeros(num_envs)
        self.lengths = np.zeros(num_envs, np.int64)
        self.finished: list[tuple[float, int, bool | None]] = []

    def connect(self, env: VectorEnv) -> None:
        """Use ``env`` from now on, without resetting it.

        Raises:
            ContractError: its spaces, its number of rows or its autoreset mode do not fit.
        """
        theirs = Spaces(env.single_observation_space, env.single_action_space)
        if theirs != self.spaces:
            raise ContractError(f"Agent {self.agent!r} was made for {self.spaces}, but the environment has {theirs}.")
        if env.num_envs != self.num_envs or env.autoreset != "same_step":
            raise ContractError(
                f"Agent {self.agent!r} needs {self.num_envs} parallel environments with autoreset 'same_step', got "
                f"{env.num_envs} with {env.autoreset!r}."
            )
        self.env = env

    def pop_metrics(self) -> dict[str, float]:
        """Means over the episodes that ended since the last call; empty if none did."""
        if not self.finished:
            return {}
        returns, lengths, successes = zip(*self.finished, strict=True)
        metrics = {"episode_return": float(np.mean(returns)), "episode_length": float(np.mean(lengths))}
        if successes[0] is not None:
            metrics["success"] = float(np.mean(successes))
        self.finished.clear()
        return metrics

    # -- what SB3 calls -----------------------------------------------------------------------------------------------

    def reset(self) -> Any:
        self.returns[:], self.lengths[:] = 0, 0
        obs, _ = self._connected().reset()
        return to_numpy(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        env = self._connected()
        obs, reward, terminated, truncated, info = env.step(self.to_tensor(self._actions, env.device))
        rewards, terminations, truncations = to_numpy(reward), to_numpy(terminated), to_numpy(truncated)
        dones = terminations | truncations
        self.returns += rewards
        self.lengths += 1
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            self._finish(np.flatnonzero(dones), truncations & ~terminations, info, infos)
        return to_numpy(obs), rewards, dones, infos

    def _finish(self, rows: np.ndarray, cut: np.ndarray, info: Mapping[str, Any], infos: list[dict[str, Any]]) -> None:
        """Fill in ``infos`` of the rows whose episode ended in this step."""
        final = to_numpy(info["final_obs"])
        success = to_numpy(info["is_success"]) if "is_success" in info else None
        for i in rows:
            last = {k: v[i] for k, v in final.items()} if isinstance(final, dict) else final[i]
            infos[i] = {"terminal_observation": last, "TimeLimit.truncated": bool(cut[i])}
            if success is not None:
                infos[i]["is_success"] = bool(success[i])
            self.finished.append((float(self.returns[i]), int(self.lengths[i]), infos[i].get("is_success")))
        self.returns[rows], self.lengths[rows] = 0, 0

    def to_tensor(self, actions: np.ndarray, device: torch.device) -> torch.Tensor:
        """SB3's actions as the environment takes them: (B,) int64 or (B, A) float32."""
        discrete = isinstance(self.action_space, Discrete)
        tensor = torch.from_numpy(np.array(actions, np.int64 if discrete else np.float32)).to(device)
        return tensor + self.first_action if discrete else tensor

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """``compute_reward`` for hindsight relabelling; nothing else is offered."""
        if method_name != "compute_reward":
            raise ContractError(
                f"Agent {self.agent!r}: Stable-Baselines3 asked for {method_name!r}, which is not offered."
            )
        reward = compute_reward(self._connected(), self.agent)(*method_args, **method_kwargs)
        return [np.asarray(reward)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise AttributeError(attr_name)

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        """The environment belongs to the loop."""

    def _connected(self) -> VectorEnv:
        if self.env is None:
            raise ContractError(f"Agent {self.agent!r} has no environment yet; call learn with experience.env.")
        return self.env


def compute_reward(env: VectorEnv, agent: str) -> Any:
    """The environment's ``compute_reward(achieved_goal (N, ...), desired_goal (N, ...), infos) -> (N,)``, in NumPy.

    Raises:
        ConfigError: it has none, so goals cannot be relabelled in hindsight.
    """
    method = getattr(env, "compute_reward", None)
    if method is None:
        raise ConfigError(
            f"Agent {agent!r} relabels goals in hindsight, but the environment has no compute_reward(achieved_goal, "
            "desired_goal, infos); add the method to the environment or set her=false."
        )
    return method
