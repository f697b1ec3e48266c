"""What the batched environments share: episode seeds, reset masks, and per-row columns of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from clbench.errors import ConfigError, unknown_name
from clbench.rng import hash_seeds

AUTORESETS = {"same_step": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}


class EpisodeSeeds:
    """One seed per row and episode.

    Row ``i`` has a base seed: ``hash(seed, i)`` after a reset with one seed for the batch, ``seed[i]`` after a reset with
    one seed per row. Its first episode has the base seed itself, its ``n``-th (counted from 0) ``hash(base, n)``. Before
    any seed is given, the batch is seeded with 0, so nothing ever depends on the state of the process.
    """

    def __init__(self, num_envs: int, device: torch.device):
        self.rows = torch.arange(num_envs, device=device)
        self.base = hash_seeds(torch.zeros_like(self.rows), self.rows)
        self.episode = torch.full_like(self.rows, -1)

    def start(self, seed: int | Sequence[int] | None, mask: Tensor) -> None:
        """Begin a new episode in the rows of ``mask`` (B,) bool.

        Raises:
            ConfigError: a negative seed, or a sequence that is not one seed per row.
        """
        if seed is None:
            self.episode = self.episode + mask.to(torch.int64)
            return
        base = self._base(seed)
        self.base = torch.where(mask, base, self.base)
        self.episode = torch.where(mask, torch.zeros_like(self.episode), self.episode)

    def _base(self, seed: int | Sequence[int]) -> Tensor:
        seeds = torch.as_tensor(seed, device=self.rows.device)
        if seeds.is_floating_point() or seeds.shape not in (torch.Size([]), self.rows.shape) or bool((seeds < 0).any()):
            raise ConfigError(
                f"seed must be a whole number >= 0, or one for each of {len(self.rows)} rows, got {seed!r}."
            )
        seeds = seeds.to(torch.int64)
        return hash_seeds(seeds.expand_as(self.rows), self.rows) if seeds.ndim == 0 else seeds.clone()

    def current(self) -> Tensor:
        """The seed (B,) int64 of each row's current episode."""
        return torch.where(self.episode > 0, hash_seeds(self.base, self.episode), self.base)

    def state_dict(self) -> dict[str, Tensor]:
        return {"base": self.base.clone(), "episode": self.episode.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.base = state["base"].to(self.rows.device, copy=True)
        self.episode = state["episode"].to(self.rows.device, copy=True)


def check_batch(num_envs: int, device: Any, autoreset: str) -> torch.device:
    """The device, after checking the arguments that every batched environment has.

    Raises:
        ConfigError: fewer than one environment, an unknown autoreset, or a device that this machine does not have.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
        raise ConfigError(f"num_envs must be a whole number >= 1, got {num_envs!r}.")
    if autoreset not in AUTORESETS:
        raise unknown_name("value of autoreset", str(autoreset), AUTORESETS)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is not a device; give 'cpu', 'cuda' or 'cuda:N'.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"There is no device {str(device)!r} on this machine (torch sees no such GPU); use 'cpu'.")
    return device


def split_options(
    options: Mapping[str, Any] | None, num_envs: int, device: torch.device
) -> tuple[Tensor, dict[str, Any]]:
    """``reset_mask`` (B,) bool (all rows where it is not given), and the other columns; ``options`` is left as it is.

    Raises:
        ConfigError: a column of another length.
    """
    columns = dict(options or {})
    for key, column in columns.items():
        if not hasattr(column, "__len__") or isinstance(column, str) or len(column) != num_envs:
            raise ConfigError(f"The reset option {key!r} must have one entry for each of the {num_envs} rows.")
    mask = columns.pop("reset_mask", None)
    if mask is None:
        return torch.ones(num_envs, dtype=torch.bool, device=device), columns
    return torch.as_tensor(mask, dtype=torch.bool, device=device), columns
