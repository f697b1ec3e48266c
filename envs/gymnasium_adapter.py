"""Any Gymnasium environment as a :class:`clbench.VectorEnv`: single environments, stepped one after the other.

Every episode is started with a seed of its own, so the state of a row is (seed, reset options, actions since the
episode began). That is what :meth:`GymnasiumVectorEnv.state_dict` stores and what ``load_state_dict`` replays: exact
for every environment that is deterministic given its seed, without pickling simulators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from clbench.envs.seeding import EpisodeSeeds, check_batch, split_options
from clbench.errors import ConfigError, ContractError, DataError

MAX_SEED = 2**31 - 1
SUCCESS_KEYS = ("is_success", "success")


class GymnasiumVectorEnv:
    """``num_envs`` Gymnasium environments as one batch of tensors.

    Observations: ``Box`` (64-bit floats become float32, other types stay), ``Discrete`` (int64, counted from 0),
    ``MultiDiscrete``, ``MultiBinary``, and a flat ``Dict`` of those. Actions: ``Box`` (float32) or ``Discrete`` (int64,
    counted from 0). ``info["is_success"]`` is the environment's own ``is_success`` or ``success``. With
    ``autoreset="disabled"`` a finished row stands still until it is reset: its last observation, reward 0.

    Args:
        make: makes one environment.
        num_envs: ``B``.
        device: of all tensors.
        autoreset: see :class:`clbench.VectorEnv`.
        name: for messages and for the check of stored states.

    Raises:
        ContractError: a space that has no tensor form.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        name: str = "environment",
    ):
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset, self.name = num_envs, autoreset, name
        self.envs = [make() for _ in range(num_envs)]
        first = self.envs[0]
        self.single_observation_space = tensor_space(first.observation_space, name)
        self.single_action_space = _action_space(first.action_space, name)
        self.max_episode_steps = _time_limit(first)
        if first.has_wrapper_attr("compute_reward"):
            self.compute_reward = first.get_wrapper_attr("compute_reward")
        self._seeds = EpisodeSeeds(num_envs, torch.device("cpu"))
        self._options: list[dict[str, Any] | None] = [None] * num_envs
        self._actions: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        self._obs: list[Any] = [None] * num_envs
        self._over = np.zeros((2, num_envs), dtype=bool)  # terminated, truncated; only without autoreset
        self._has_success = False

    # -- the protocol -----------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`; columns of ``options`` reach each environment as its own ``options``."""
        mask, columns = split_options(options, self.num_envs, torch.device("cpu"))
        rows = mask.nonzero()[:, 0].tolist()
        if any(o is None for i, o in enumerate(self._obs) if i not in rows):
            raise ConfigError(f"{self.name}: the first reset must be of all rows.")
        self._seeds.start(seed, mask)
        for i in rows:
            self._options[i] = {key: _plain(column[i]) for key, column in columns.items()} or None
        success = np.zeros(self.num_envs, dtype=bool)
        success[rows] = self._begin(rows)
        return self._tensors(self._obs), self._info(success)

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`.

        Raises:
            ContractError: actions of the wrong shape or type; NaN in an observation or a reward.
        """
        array = self._action_array(actions)
        if self._obs[0] is None:
            raise ConfigError(f"{self.name}: call reset() before step().")
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        over = np.zeros((2, self.num_envs), dtype=bool)
        success = np.zeros(self.num_envs, dtype=bool)
        for i in range(self.num_envs):
            if self._over[:, i].any():
                over[:, i] = self._over[:, i]
            else:
                rewards[i], over[0, i], over[1, i], success[i] = self._advance(i, array[i])
        info = self._info(success)
        obs, done = self._tensors(self._obs), over[0] | over[1]
        if self.autoreset == "disabled":
            self._over = over
        else:
            info["final_obs"], info["_final_obs"] = obs, self._to(done)
            if done.any():
                self._seeds.start(None, torch.from_numpy(done))
                ended = done.nonzero()[0].tolist()
                for i in ended:
                    self._options[i] = None
                self._begin(ended)
                obs = self._tensors(self._obs)
        return obs, self._to(rewards), self._to(over[0]), self._to(over[1]), info

    def render(self) -> np.ndarray:
        """(B, H, W, 3) uint8.

        Raises:
            ContractError: the environment draws no pictures.
        """
        frames = [env.render() if env.render_mode == "rgb_array" else None for env in self.envs]
        if any(not isinstance(f, np.ndarray) for f in frames):
            raise ContractError(f"{self.name} has no render mode 'rgb_array', so it cannot be pictured.")
        return np.stack(frames).astype(np.uint8)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Seeds, reset options and the actions since each episode began, from which the rows are replayed."""
        return {
            "name": self.name,
            "seeds": self._seeds.state_dict(),
            "options": [None if o is None else dict(o) for o in self._options],
            "lengths": torch.tensor([len(a) for a in self._actions]),
            "actions": torch.from_numpy(np.array([a for row in self._actions for a in row])),
            "observation": None if self._obs[0] is None else self._tensors(self._obs),
            "has_success": self._has_success,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replay the stored episodes.

        Raises:
            DataError: the state is of another environment, or the replay does not end in the stored observation: the
                environment is not a function of its seed and the actions.
        """
        if state["name"] != self.name or len(state["lengths"]) != self.num_envs:
            raise DataError(
                f"The stored state is of {len(state['lengths'])} x {state['name']}, "
                f"but this is {self.num_envs} x {self.name}."
            )
        self._seeds.load_state_dict(state["seeds"])
        self._has_success = state["has_success"]
        self._options = [None if o is None else dict(o) for o in state["options"]]
        self._actions = [[] for _ in range(self.num_envs)]
        self._over[:] = False
        if state["observation"] is None:
            self._obs = [None] * self.num_envs
            return
        actions = iter(state["actions"].cpu().numpy())
        self._begin(range(self.num_envs))
        for i, length in enumerate(state["lengths"].tolist()):
            for _ in range(length):
                _, self._over[0, i], self._over[1, i], _ = self._advance(i, next(actions))
        self._check_replay(state["observation"])

    def close(self) -> None:
        for env in self.envs:
            env.close()

    # -- rows ----------------------------------------------------------------------------------------------------

    def _begin(self, rows: Iterable[int]) -> list[bool]:
        """Start the episodes of ``rows`` with their current seeds and options; -> success of each."""
        seeds = self._seeds.current().tolist()
        success = []
        for i in rows:
            options = self._options[i]
            arrays = options and {k: np.array(v) if isinstance(v, list) else v for k, v in options.items()}
            obs, info = self.envs[i].reset(seed=seeds[i] & MAX_SEED, options=arrays)
            self._actions[i] = []
            self._over[:, i] = False
            self._obs[i] = self._checked(obs, i)
            success.append(self._success(info))
        return success

    def _advance(self, i: int, action: np.ndarray) -> tuple[float, bool, bool, bool]:
        """-> reward, terminated, truncated, success."""
        self._actions[i].append(action)
        obs, reward, terminated, truncated, info = self.envs[i].step(self._native(action))
        if not np.isfinite(float(reward)):
            raise ContractError(f"{self.name}: the reward of row {i} is {reward} after step {len(self._actions[i])}.")
        self._obs[i] = self._checked(obs, i)
        return float(reward), bool(terminated), bool(truncated), self._success(info)

    def _success(self, info: Mapping[str, Any]) -> bool:
        for key in SUCCESS_KEYS:
            if key in info:
                self._has_success = True
                return bool(info[key])
        return False

    def _native(self, action: np.ndarray) -> Any:
        space = self.envs[0].action_space
        if isinstance(space, spaces.Discrete):
            return space.start + space.dtype.type(action)  # type: ignore[union-attr]
        if not isinstance(space, spaces.Box) or space.dtype == np.float32:
            return action.copy()  # the stored one must stay as it is, for the replay
        # a bound that is no float32 number may have been rounded outwards: it stands for the bound itself
        ours: spaces.Box = self.single_action_space  # type: ignore[assignment]
        at_low, at_high = action == ours.low, action == ours.high
        return np.where(at_low, space.low, np.where(at_high, space.high, action)).astype(space.dtype)

    def _checked(self, obs: Any, i: int) -> Any:
        """A copy of the observation as arrays of the declared types."""
        space, own = self.single_observation_space, self.envs[i].observation_space
        if isinstance(space, spaces.Dict):
            if not isinstance(obs, Mapping) or set(obs) != set(space):
                raise ContractError(f"{self.name}: observation of row {i} must be a dict of {list(space)}.")
            return {k: self._array(obs[k], space[k], own[k], f"{k!r} of row {i}") for k in space}  # type: ignore[index]
        return self._array(obs, space, own, f"of row {i}")

    def _array(self, value: Any, space: spaces.Space, own: spaces.Space, where: str) -> np.ndarray:
        array = np.array(value)
        if array.shape != space.shape:
            raise ContractError(f"{self.name}: observation {where} has shape {array.shape}, declared {space.shape}.")
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ContractError(f"{self.name}: the observation {where} holds NaN; the environment must not return it.")
        if isinstance(own, spaces.Discrete):
            array = array - own.start
        return array.astype(space.dtype)

    # -- tensors ----------------------------------------------------------------------------------------------------

    def _action_array(self, actions: Any) -> np.ndarray:
        array = actions.detach().cpu().numpy() if isinstance(actions, Tensor) else np.asarray(actions)
        space = self.single_action_space
        expected = (self.num_envs, *(space.shape or ()))
        kind = "i" if isinstance(space, spaces.Discrete) else "f"
        if array.shape != expected or array.dtype.kind != kind:
            raise ContractError(
                f"{self.name}: actions are {array.dtype} {array.shape}, "
                f"expected {'int64' if kind == 'i' else 'float32'} {expected} for the action space {space}."
            )
        return array.astype(space.dtype)

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy()).to(self.device)

    def _tensors(self, rows: Sequence[Any]) -> Any:
        if isinstance(self.single_observation_space, spaces.Dict):
            return {k: self._to(np.stack([r[k] for r in rows])) for k in self.single_observation_space}
        return self._to(np.stack(rows))

    def _info(self, success: np.ndarray) -> dict[str, Any]:
        return {"is_success": self._to(success)} if self._has_success else {}

    def _check_replay(self, stored: Any) -> None:
        replayed = self._tensors(self._obs)
        if not isinstance(stored, Mapping):
            stored, replayed = {"": stored}, {"": replayed}
        for key in replayed:
            same = (stored[key].to(self.device) == replayed[key]).reshape(self.num_envs, -1).all(1)
            if not bool(same.all()):
                raise DataError(
                    f"{self.name}: replaying the stored actions of row {int((~same).nonzero()[0])} did not lead to "
                    "the stored observation, so the run cannot be resumed exactly; the environment must draw all its "
                    "random numbers from self.np_random, which reset(seed=...) seeds."
                )


def tensor_space(space: spaces.Space, name: str) -> spaces.Space:
    """The space of the tensors that stand for observations of ``space``.

    Raises:
        ContractError: the space, or an entry of it, has no tensor form.
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _leaf_space(sub, f"{name}, observation {key!r}") for key, sub in space.items()})
    return _leaf_space(space, f"{name}, observation")


def _leaf_space(space: spaces.Space, where: str) -> spaces.Space:
    if isinstance(space, spaces.Box):
        return _float32_box(space)
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return space
    raise ContractError(
        f"{where}: the space {space} has no tensor form; supported are Box, Discrete, MultiDiscrete, MultiBinary and a "
        "flat Dict of them. Wrap the environment (gymnasium.wrappers.FlattenObservation, FilterObservation)."
    )


def _float32_box(space: spaces.Box) -> spaces.Box:
    if space.dtype.kind != "f" or space.dtype == np.float32:
        return space
    return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def _action_space(space: spaces.Space, name: str) -> spaces.Space:
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return _float32_box(space)
    raise ContractError(f"{name}: the action space {space} is not supported; wrap it to a Discrete or a Box of floats.")


def _time_limit(env: gymnasium.Env) -> int | None:
    """Steps after which episodes are truncated: by the ``TimeLimit`` wrapper or the environment's own ``max_steps``."""
    limits = [env.spec and env.spec.max_episode_steps, getattr(env.unwrapped, "max_steps", None)]
    return min((int(limit) for limit in limits if limit), default=None)


def _plain(value: Any) -> Any:
    """A reset option as plain Python values, so that it can be stored."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
