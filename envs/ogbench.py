"""OGBench's own environments (Park et al. 2025, arXiv 2410.20092) as goal environments; needs the extra ``mujoco``.

The id is ``ogbench/NAME`` with the name of an environment (``antmaze-large-v0``) or of a data set of OGBench
(``antmaze-large-navigate-v0``). What OGBench leaves to the process-wide generators and to an unseeded action space is drawn
from the episode's own seed here, so that an episode is a function of its seed and the actions.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from clbench.errors import ConfigError, ContractError, MissingExtraError, unknown_name
from clbench.rng import derive_seed, sealed_global_rng, seed_global

KINDS = ("navigate", "stitch", "explore", "play", "noisy")  # of data sets
TASKS = 5
STEADY = ("pointmaze", "antmaze", "humanoidmaze", "antsoccer")  # steps of these draw nothing, except at teleporters
MAX_SEED = 2**31 - 1


class OGBenchEnv(gymnasium.Wrapper):
    """One environment of OGBench with the keys ``observation``, ``achieved_goal`` (the same) and ``desired_goal``.

    Goals are whole observations, as in OGBench. Episodes end at success. Reset option: ``task_id``, 1 to 5, otherwise a
    random task.

    Args:
        name: of an environment or a data set of OGBench, without ``ogbench/``.
        max_episode_steps: instead of OGBench's own limit.
        render_mode: for Gymnasium.

    Raises:
        MissingExtraError: OGBench is not installed.
        UnknownNameError: no such environment, with the nearest.
    """

    def __init__(self, name: str, *, max_episode_steps: int | None = None, render_mode: str | None = None):
        env_name, known = env_name_of(name), known_envs()
        if env_name not in known:
            raise unknown_name("environment of OGBench", name, known)
        options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
        super().__init__(
            gymnasium.make(env_name, max_episode_steps=max_episode_steps, disable_env_checker=True, **options)
        )
        one = self.env.observation_space
        self.observation_space = spaces.Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), one))
        self._draws = "teleport" in env_name or not env_name.startswith(STEADY)
        self._seed = self._steps = 0
        self._goal: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """As in Gymnasium; ``options`` may hold ``task_id``."""
        given = {key: int(value) for key, value in (options or {}).items() if key == "task_id"}
        for key in options or {}:
            if key != "task_id":
                raise unknown_name("reset option", key, ("task_id",), where="OGBench")
        if given and not 1 <= given["task_id"] <= TASKS:
            raise ConfigError(f"OGBench: task_id must be from 1 to {TASKS}, got {given['task_id']}.")
        self._seed = derive_seed(self._seed, "next") if seed is None else seed
        self._steps = 0
        own = derive_seed(self._seed, "ogbench") & MAX_SEED
        self.env.unwrapped.action_space.seed(own)  # goals are shown after a few random actions
        with sealed_global_rng():
            seed_global(own)
            obs, info = self.env.reset(seed=own, options=given)
        self._goal = np.array(info["goal"])
        return self._with_goal(obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """-> (observation, reward, terminated, truncated, ``{"is_success"}``); the reward is -1, or 0 at the goal."""
        self._steps += 1
        if self._draws:
            with sealed_global_rng():
                seed_global(derive_seed(self._seed, "ogbench", self._steps))
                obs, _, terminated, truncated, info = self.env.step(action)
        else:
            obs, _, terminated, truncated, info = self.env.step(action)
        success = bool(info["success"])
        return self._with_goal(obs), float(success) - 1, bool(terminated), bool(truncated), {"is_success": success}

    def render(self) -> Any:
        """uint8 (H, W, 3).

        Raises:
            ContractError: MuJoCo cannot draw on this machine.
        """
        try:
            return self.env.render()
        except Exception as error:  # what it is depends on the machine's OpenGL
            raise ContractError(
                f"OGBench's pictures need OpenGL ({type(error).__name__}: {error}); without a screen, set MUJOCO_GL=egl or "
                "MUJOCO_GL=osmesa."
            ) from error

    def _with_goal(self, obs: Any) -> dict[str, Any]:
        return {"observation": obs, "achieved_goal": obs, "desired_goal": self._goal}


def env_name_of(name: str) -> str:
    """The environment of a data set: ``antmaze-large-navigate-v0 -> antmaze-large-v0``; other names stay."""
    return "-".join(part for part in name.split("-") if part not in KINDS)


def known_envs() -> list[str]:
    """Names of OGBench's goal-conditioned environments.

    Raises:
        MissingExtraError: OGBench is not installed, or a package that it needs.
    """
    try:
        importlib.import_module("ogbench")
    except ImportError as error:
        raise MissingExtraError(
            f'Environments of OGBench need its package ({error}): pip install "clbench[mujoco]". '
            "Its point mazes are also built in, as clbench/OGBenchPointMaze-v0."
        ) from error
    return [
        name
        for name, spec in gymnasium.registry.items()
        if str(spec.entry_point).startswith("ogbench.") and "singletask" not in name and "online" not in name
    ]
