"""``clbench/BitFlip-v0``: slowly changing regression, the bit-flipping problem, as one-step episodes.

Source: Dohare, Sutton & Mahmood 2021 (arXiv 2108.06325), and Dohare et al. 2024 (Nature 632, "Loss of plasticity in deep
continual learning"). The sizes are those of the authors' published configuration; the formula of the target is from memory
of the papers.

An input has ``m`` bits and a constant 1. The first ``f`` bits are slow: they stay through a task, and one of them flips
between two tasks; the others are random in every example. The target is a network of ``n`` linear threshold units with
weights ``v_ij`` and ``w_i`` of +1 or -1, drawn once:

    y = sum_i w_i [sum_j v_ij x_j > theta_i],   theta_i = beta (m + 1) - S_i,   S_i = number of negative weights of unit i.

As ``sum_j v_ij x_j + S_i`` counts the inputs that agree with the signs of the weights (1 with +1, 0 with -1), a unit is
active where more than a fraction ``beta`` of the inputs agree. A learner with few units can fit one task but not all, so it
has to go on learning. Ours: no output bias, and ``y`` is cut to ``+-bound`` (5 standard deviations), so that the space of
predictions is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from clbench.data.dataset import OfflineDataset
from clbench.envs.seeding import AUTORESETS, EpisodeSeeds, check_batch, split_options
from clbench.errors import ConfigError, ContractError, unknown_name
from clbench.rng import hash_seeds, hash_uniform, torch_generator
from clbench.streams.bit_flipping import BETA, BITS, SLOW, UNITS, needed

BOUND = 10.0
ZEROS = (0,) * SLOW


class Target:
    """Inputs and targets of one task; what the environment and its data set share.

    Args: see :class:`BitFlipVectorEnv`.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self, slow: Sequence[int], bits: int, units: int, beta: float, network: int, bound: float, device: torch.device
    ):
        _check(slow, bits, units, beta, network, bound)
        self.random, self.bound, self.needed = bits - len(slow), bound, needed(bits, beta)
        self.slow = torch.tensor(slow, dtype=torch.float32, device=device)
        rows = hash_seeds(torch.full((units,), network), torch.arange(units))
        signs = (hash_uniform(rows, 0, bits + 2) < 0.5).to(torch.float32).to(device) * 2 - 1
        self.v, self.w = signs[:, :-1].contiguous(), signs[:, -1].contiguous()  # (n, m + 1), (n,)

    def observe(self, random: Tensor) -> Tensor:
        """Random bits (B, m - f) -> inputs (B, m + 1) float32: slow bits, random bits, 1."""
        slow, one = self.slow.expand(len(random), -1), torch.ones_like(self.w[:1]).expand(len(random), 1)
        return torch.cat([slow, random, one], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs (B, m + 1) -> targets (B,). All sums are of small whole numbers, so exact on every device."""
        agree = x @ self.v.t() + (self.v < 0).sum(1)
        return ((agree > self.needed).to(torch.float32) @ self.w).clamp(-self.bound, self.bound)


class BitFlipVectorEnv(gymnasium.vector.VectorEnv):
    """One-step episodes: observation = input, action = prediction, reward = -(prediction - target)^2.

    | | |
    |---|---|
    | observation | ``(B, m + 1)`` float32: slow bits, random bits, the constant 1 |
    | action | ``(B, 1)`` float32 in ``+-bound``: the prediction, not clipped here |
    | episode | one step, always ``terminated`` |
    | random bits | a function of the episode's seed |

    Args:
        num_envs: ``B``.
        device: of all tensors.
        autoreset: see :class:`clbench.VectorEnv`.
        slow: values of the ``f`` slow bits, each 0 or 1.
        bits: ``m``, slow and random ones.
        units: ``n``, of the target network.
        beta: fraction of inputs that must agree with a unit's weights to make it active.
        network: seed of the target network.
        bound: the largest absolute value of targets and predictions.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        slow: tuple[int, ...] = ZEROS,
        bits: int = BITS,
        units: int = UNITS,
        beta: float = BETA,
        network: int = 0,
        bound: float = BOUND,
    ):
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset, self.max_episode_steps = num_envs, autoreset, 1
        self.target = Target(slow, bits, units, beta, network, bound, self.device)
        self.single_observation_space = spaces.Box(0.0, 1.0, (bits + 1,), np.float32)
        self.single_action_space = spaces.Box(-bound, bound, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AUTORESETS[autoreset], "render_modes": ["rgb_array"]}
        self._seeds = EpisodeSeeds(num_envs, self.device)
        self._random = torch.zeros(num_envs, self.target.random, device=self.device)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`; there are no reset options but ``reset_mask``.

        Raises:
            UnknownNameError: another option.
        """
        mask, columns = split_options(options, self.num_envs, self.device)
        for key in columns:
            raise unknown_name("reset option", key, ("reset_mask",), where="BitFlip")
        self._seeds.start(seed, mask)
        self._random = torch.where(mask[:, None], self._draw(), self._random)
        return self.target.observe(self._random), {}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`.

        Raises:
            ContractError: actions are not (B, 1) floats.
        """
        actions = torch.as_tensor(actions, device=self.device)
        if actions.shape != (self.num_envs, 1) or not actions.is_floating_point():
            raise ContractError(
                f"BitFlip: actions are {actions.dtype} {tuple(actions.shape)}, expected float32 ({self.num_envs}, 1)."
            )
        obs = self.target.observe(self._random)
        reward = -(actions[:, 0].to(torch.float32) - self.target(obs)).square()
        done = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        info: dict[str, Any] = {}
        if self.autoreset == "same_step":
            info["final_obs"], info["_final_obs"] = obs, done
            self._seeds.start(None, done)
            self._random = self._draw()
            obs = self.target.observe(self._random)
        return obs, reward, done, torch.zeros_like(done), info

    def render(self) -> np.ndarray:
        """(B, 16, 16 (m + 1), 3) uint8: bits as squares, 1 is white."""
        grey = (self.target.observe(self._random) * 255).to(torch.uint8).cpu().numpy()
        return np.repeat(grey.repeat(16, 1)[:, None, :, None], 16, 1).repeat(3, -1)

    def state_dict(self) -> dict[str, Any]:
        return {"seeds": self._seeds.state_dict(), "random": self._random.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seeds.load_state_dict(state["seeds"])
        self._random = state["random"].to(self.device, copy=True)

    def _draw(self) -> Tensor:
        """Random bits (B, m - f), each row a function of its episode's seed."""
        return (hash_uniform(self._seeds.current(), 0, self.target.random) < 0.5).to(torch.float32)


class BitFlipEnv(gymnasium.Env):
    """One ``clbench/BitFlip-v0``; its options are those of :class:`BitFlipVectorEnv`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None, **options: Any):
        self._batch = BitFlipVectorEnv(1, "cpu", "disabled", **options)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**31)) if seed is None else seed
        obs, _ = self._batch.reset(seed=[episode], options={key: [value] for key, value in (options or {}).items()})
        return obs[0].numpy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, _ = self._batch.step(np.asarray(action, np.float32)[None])
        return obs[0].numpy(), float(reward[0]), True, False, {}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        return self._batch.render()[0] if self.render_mode == "rgb_array" else None


def bit_flip_dataset(
    *,
    slow: tuple[int, ...] = ZEROS,
    bits: int = BITS,
    units: int = UNITS,
    beta: float = BETA,
    network: int = 0,
    bound: float = BOUND,
    transitions: int = 10_000,
    seed: int = 0,
) -> OfflineDataset:
    """``transitions`` examples of one task as one-step episodes whose actions are the targets.

    Args: ``seed`` draws the random bits; the others as in :class:`BitFlipVectorEnv`.

    Raises:
        ConfigError: an option out of its range.
    """
    if transitions < 1:
        raise ConfigError(f"bit-flip: transitions must be at least 1, got {transitions}.")
    target = Target(slow, bits, units, beta, network, bound, torch.device("cpu"))
    draw = torch_generator(seed, "bit-flip", "data")
    x = target.observe(torch.randint(2, (transitions, target.random), generator=draw).to(torch.float32))
    return OfflineDataset(x, target(x)[:, None], torch.ones(transitions, dtype=torch.int64), name="bit-flip")


def _check(slow: Sequence[int], bits: int, units: int, beta: float, network: int, bound: float) -> None:
    if any(bit not in (0, 1) for bit in slow):
        raise ConfigError(f"BitFlip: slow must hold bits, 0 or 1, got {slow!r}.")
    if bits < max(len(slow), 1):
        raise ConfigError(f"BitFlip: bits counts all bits, of which {len(slow)} are slow, got bits={bits}.")
    if units < 1:
        raise ConfigError(f"BitFlip: units must be at least 1, got {units}.")
    if not 0 <= beta < 1:
        raise ConfigError(f"BitFlip: beta must be in [0, 1), got {beta}.")
    if isinstance(network, bool) or not isinstance(network, int) or network < 0:
        raise ConfigError(f"BitFlip: network must be a seed >= 0, got {network!r}.")
    if not (bound > 0 and math.isfinite(bound)):
        raise ConfigError(f"BitFlip: bound must be a positive number, got {bound}.")
