"""Several batched environments as one: the rows of the first, then those of the second, and so on (joint training)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.contracts import VectorEnv
from clbench.envs.seeding import split_options
from clbench.errors import ConfigError, ContractError, DataError
from clbench.rng import derive_seed


class ConcatVectorEnv:
    """The rows of batched environments of equal spaces, device and autoreset; see :class:`clbench.VectorEnv`."""

    def __init__(self, envs: Sequence[VectorEnv]):
        if not envs:
            raise ConfigError("concat needs at least one environment.")
        first = envs[0]
        for k, env in enumerate(envs[1:], start=1):
            for kind in ("single_observation_space", "single_action_space", "device", "autoreset"):
                if getattr(env, kind) != getattr(first, kind):
                    raise ContractError(
                        f"Environments 0 and {k} cannot be joined: {kind} is {getattr(first, kind)} and "
                        f"{getattr(env, kind)}; all tasks of a stream must share their spaces."
                    )
        self.envs = tuple(envs)
        self.sizes = [env.num_envs for env in envs]
        self.num_envs, self.device, self.autoreset = sum(self.sizes), first.device, first.autoreset
        self.single_observation_space = first.single_observation_space
        self.single_action_space = first.single_action_space
        limits = [env.max_episode_steps for env in envs]
        self.max_episode_steps = None if None in limits else max(limit for limit in limits if limit is not None)
        if all(hasattr(env, "compute_reward") for env in envs):
            self.compute_reward = first.compute_reward  # type: ignore[attr-defined]

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        mask, columns = split_options(options, self.num_envs, self.device)
        results, start = [], 0
        for k, env in enumerate(self.envs):
            rows = slice(start, start + env.num_envs)
            start = rows.stop
            if seed is not None and not isinstance(seed, int):
                if len(seed) != self.num_envs:
                    raise ConfigError(f"seed has {len(seed)} entries for {self.num_envs} rows.")
                own: Any = seed[rows]
            else:
                own = None if seed is None else derive_seed(seed, "concat", k)
            part = {key: column[rows] for key, column in columns.items()}
            results.append(env.reset(seed=own, options={"reset_mask": mask[rows], **part}))
        return _join([obs for obs, _ in results]), self._join_info([info for _, info in results])

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        if len(actions) != self.num_envs:
            raise ContractError(f"There are {len(actions)} actions for {self.num_envs} rows; give one per row.")
        parts = torch.as_tensor(actions, device=self.device).split(self.sizes)
        obs, rewards, terminated, truncated, infos = zip(*(env.step(a) for env, a in zip(self.envs, parts)))
        return _join(obs), torch.cat(rewards), torch.cat(terminated), torch.cat(truncated), self._join_info(infos)

    def render(self) -> np.ndarray:
        return np.concatenate([env.render() for env in self.envs])

    def state_dict(self) -> dict[str, Any]:
        return {"envs": [env.state_dict() for env in self.envs]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["envs"]) != len(self.envs):
            raise DataError(f"The stored state is of {len(state['envs'])} joined environments, not {len(self.envs)}.")
        for env, part in zip(self.envs, state["envs"]):
            env.load_state_dict(part)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _join_info(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Per-row entries of all environments; rows of an environment that lacks an entry get zeros."""
        joined: dict[str, Any] = {}
        for key in dict.fromkeys(key for info in infos for key in info):
            have = next(info[key] for info in infos if key in info)
            if isinstance(have, Tensor | Mapping):
                joined[key] = _join([info.get(key, _zeros(have, n)) for info, n in zip(infos, self.sizes)])
        return joined


def concat(envs: Sequence[VectorEnv]) -> VectorEnv:
    """One batch of the rows of ``envs``, in order.

    Raises:
        ContractError: environments of different spaces, devices or autoreset.
    """
    return ConcatVectorEnv(envs)


def _join(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Mapping):
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return torch.cat(list(parts))


def _zeros(like: Any, n: int) -> Any:
    if isinstance(like, Mapping):
        return {key: _zeros(value, n) for key, value in like.items()}
    return like.new_zeros((n, *like.shape[1:]))
