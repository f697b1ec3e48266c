"""``clbench/Classify-v0``: a labelled data set as an environment of one-step episodes."""

from __future__ import annotations

import functools
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
from clbench.data.labelled import Labelled, load_source
from clbench.envs.seeding import AUTORESETS, EpisodeSeeds, check_batch, split_options
from clbench.errors import ConfigError, ContractError
from clbench.rng import hash_seeds, hash_uniform


class Examples:
    """A source under a task's transforms; what the environment and its data set share.

    Args: see :class:`ClassifyVectorEnv`.

    Raises:
        ConfigError: an option that does not fit the source.
        DataError: a missing or malformed source.
    """

    def __init__(
        self,
        source: str,
        split: str,
        permutation: int | None,
        rotation: float,
        classes: tuple[int, ...] | None,
        label_permutation: int | None,
        image: bool,
        relabel: bool,
        device: torch.device,
    ):
        data = load_source(source)
        self.table = _table(source, float(rotation), str(device))
        self.shape = (1, *data.x.shape[1:]) if image else (data.x[0].numel(),)
        if image and data.x.ndim != 3:
            raise ConfigError(f"Classify: image=True needs examples (H, W), but {source!r} has vectors.")
        self.low, self.high = _bounds(source)
        self.pixels = _permutation("permutation", permutation, self.table.shape[1], device)
        self.rows = _pool(data, source, split, classes).to(device)
        numbers = _numbers(data.num_classes, classes, relabel)
        self.num_classes = int(numbers.max()) + 1
        labels = _permutation("label_permutation", label_permutation, self.num_classes, device)
        self.labels = numbers[data.y].to(device)
        if labels is not None:
            self.labels = torch.where(self.labels < 0, -1, labels[self.labels])

    def observe(self, rows: Tensor) -> Tensor:
        """Observations (B, D) or (B, 1, H, W) float32 of source rows (B,)."""
        x = self.table.index_select(0, rows)
        x = x if self.pixels is None else x.index_select(1, self.pixels)
        return x.reshape(-1, *self.shape)


class ClassifyVectorEnv(gymnasium.vector.VectorEnv):
    """One-step episodes: observation = input, action = class, reward = 1 if correct, else 0; success = correct.

    | | |
    |---|---|
    | observation | ``(B, D)`` float32; with ``image=True`` ``(B, 1, H, W)`` |
    | action | ``(B,)`` int64, one of all classes of the source; with ``relabel``, one of ``classes``, by its position |
    | episode | one step, always ``terminated`` |
    | which example | drawn uniformly from ``split`` (and ``classes``) by the episode's seed |
    | reset option ``index`` (B,) | the example's row number in the source, whatever ``split`` and ``classes`` say |

    Args:
        num_envs: ``B``.
        device: of all tensors.
        autoreset: see :class:`clbench.VectorEnv`.
        source: ``"digits"``, a ``.npz`` file or an IDX folder, see :func:`clbench.data.labelled.load_source`.
        split: what examples are drawn from, ``"train"`` or ``"test"``.
        permutation: seed of a fixed permutation of the pixels, applied after the rotation; ``None`` for none.
        rotation: degrees, counter-clockwise; bilinear, the picture keeps its size, corners are filled with 0.
        classes: draw only examples of these classes (numbered before ``label_permutation``); the actions stay all.
        label_permutation: seed of a fixed permutation of the labels.
        image: channel-first pictures instead of flat vectors.
        relabel: number the classes by their position in ``classes``, and offer no other action. No action is right for an
            example of another class (reset option ``index``).
    """

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        source: str = "digits",
        split: str = "train",
        permutation: int | None = None,
        rotation: float = 0.0,
        classes: tuple[int, ...] | None = None,
        label_permutation: int | None = None,
        image: bool = False,
        relabel: bool = False,
    ):
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset, self.max_episode_steps = num_envs, autoreset, 1
        self.examples = ex = Examples(
            source, split, permutation, rotation, classes, label_permutation, image, relabel, self.device
        )
        self.single_observation_space = spaces.Box(ex.low, ex.high, ex.shape, np.float32)
        self.single_action_space = spaces.Discrete(ex.num_classes)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AUTORESETS[autoreset], "render_modes": ["rgb_array"]}
        self._seeds = EpisodeSeeds(num_envs, self.device)
        self._rows = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`; the option ``index`` (B,) picks examples by their row number in the source.

        Raises:
            ConfigError: an unknown option, or an index that is no row of the source.
        """
        mask, columns = split_options(options, self.num_envs, self.device)
        index = columns.pop("index", None)
        if columns:
            raise ConfigError(f"Classify: unknown reset options {sorted(columns)}; known are 'index' and 'reset_mask'.")
        self._seeds.start(seed, mask)
        rows = self._draw() if index is None else self._given(index, mask)
        self._rows = torch.where(mask, rows, self._rows)
        return self.examples.observe(self._rows), {"is_success": torch.zeros_like(mask)}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """See :class:`clbench.VectorEnv`.

        Raises:
            ContractError: actions are not (B,) whole numbers.
        """
        actions = torch.as_tensor(actions, device=self.device)
        if actions.shape != (self.num_envs,) or actions.is_floating_point():
            raise ContractError(
                f"Classify: actions are {actions.dtype} {tuple(actions.shape)}, expected int64 ({self.num_envs},)."
            )
        correct = actions == self.examples.labels[self._rows]
        done = torch.ones_like(correct)
        info: dict[str, Any] = {"is_success": correct}
        obs = self.examples.observe(self._rows)
        if self.autoreset == "same_step":
            info["final_obs"], info["_final_obs"] = obs, done
            self._seeds.start(None, done)
            self._rows = self._draw()
            obs = self.examples.observe(self._rows)
        return obs, correct.to(torch.float32), done, torch.zeros_like(done), info

    def render(self) -> np.ndarray:
        """(B, H, W, 3) uint8: the examples in grey, enlarged to at least 64 pixels; vectors as squares where they fit."""
        shown = self.examples.observe(self._rows)
        side = math.isqrt(shown[0].numel())
        square = (side, side) if side * side == shown[0].numel() else (1, -1)
        shown = shown.reshape(self.num_envs, *(self.examples.shape[1:] or square))
        low, high = self.examples.low, self.examples.high
        grey = ((shown - low) / (high - low) * 255).round().to(torch.uint8).cpu().numpy()
        factor = -(-64 // max(grey.shape[1:]))
        return np.repeat(grey.repeat(factor, 1).repeat(factor, 2)[..., None], 3, -1)

    def state_dict(self) -> dict[str, Any]:
        return {"seeds": self._seeds.state_dict(), "rows": self._rows.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seeds.load_state_dict(state["seeds"])
        self._rows = state["rows"].to(self.device, copy=True)

    def _draw(self) -> Tensor:
        """Source rows (B,), each a function of the row's episode seed."""
        pool = self.examples.rows
        u = hash_uniform(self._seeds.current(), 0, 1)[:, 0]
        return pool[(u * len(pool)).to(torch.int64)]

    def _given(self, index: Any, mask: Tensor) -> Tensor:
        rows = torch.as_tensor(index, device=self.device)
        n = len(self.examples.labels)
        whole = not rows.is_floating_point() and rows.dtype != torch.bool and rows.shape == mask.shape
        if not whole or bool((mask & ((rows < 0) | (rows >= n))).any()):
            raise ConfigError(f"Classify: the option 'index' must hold row numbers in 0 .. {n - 1}, got {index!r}.")
        return rows


class ClassifyEnv(gymnasium.Env):
    """One ``clbench/Classify-v0``: observations, actions and options of :class:`ClassifyVectorEnv`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        source: str = "digits",
        split: str = "train",
        permutation: int | None = None,
        rotation: float = 0.0,
        classes: tuple[int, ...] | None = None,
        label_permutation: int | None = None,
        image: bool = False,
        relabel: bool = False,
        render_mode: str | None = None,
    ):
        self._batch = ClassifyVectorEnv(
            1, "cpu", "disabled", source, split, permutation, rotation, classes, label_permutation, image, relabel
        )
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """``options={"index": i}`` picks an example by its row number in the source."""
        super().reset(seed=seed)
        episode = int(self.np_random.integers(2**31)) if seed is None else seed
        obs, _ = self._batch.reset(seed=[episode], options={key: [value] for key, value in (options or {}).items()})
        return obs[0].numpy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, _, _, info = self._batch.step(torch.tensor([int(action)]))
        return obs[0].numpy(), float(reward[0]), True, False, {"is_success": bool(info["is_success"][0])}

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        return self._batch.render()[0] if self.render_mode == "rgb_array" else None


def classify_dataset(
    *,
    source: str = "digits",
    split: str = "train",
    permutation: int | None = None,
    rotation: float = 0.0,
    classes: tuple[int, ...] | None = None,
    label_permutation: int | None = None,
    image: bool = False,
    relabel: bool = False,
) -> OfflineDataset:
    """Labelled examples as one-step episodes whose actions are the labels; options of :class:`ClassifyVectorEnv`."""
    cpu = torch.device("cpu")
    examples = Examples(source, split, permutation, rotation, classes, label_permutation, image, relabel, cpu)
    rows = examples.rows
    return OfflineDataset(
        examples.observe(rows), examples.labels[rows], torch.ones(len(rows), dtype=torch.int64), name="classify"
    )


@functools.lru_cache(maxsize=16)
def _table(source: str, rotation: float, device: str) -> Tensor:
    """All examples of a source (N, D) float32, rotated; shared between environments, never written to."""
    x = load_source(source).x
    if not np.isfinite(rotation):
        raise ConfigError(f"Classify: rotation must be a finite number of degrees, got {rotation}.")
    if rotation % 360 != 0:
        from scipy import ndimage

        if x.ndim != 3:
            raise ConfigError(f"Classify: rotation needs examples (H, W), but {source!r} has vectors.")
        turned = ndimage.rotate(x.numpy(), rotation, axes=(1, 2), reshape=False, order=1, mode="constant", cval=0.0)
        x = torch.from_numpy(turned)
    return x.flatten(1).to(device)


@functools.lru_cache(maxsize=16)
def _bounds(source: str) -> tuple[float, float]:
    """Of the observations; kept, as a stream may have hundreds of tasks on one large source."""
    x = load_source(source).x
    return min(0.0, float(x.min())), max(1.0, float(x.max()))


def _permutation(name: str, seed: int | None, n: int, device: torch.device) -> Tensor | None:
    """The permutation of ``n`` things that ``seed`` stands for, the same on every machine and version."""
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"Classify: {name} must be a seed >= 0, got {seed!r}.")
    stream = hash_seeds(torch.tensor([seed]), len(name))  # pixels and labels use different numbers
    return hash_uniform(stream, 0, n)[0].argsort(stable=True).to(device)


def _numbers(num_classes: int, classes: tuple[int, ...] | None, relabel: bool) -> Tensor:
    """(num_classes,) int64: the number of each class; -1 for classes that have none."""
    if not relabel:
        return torch.arange(num_classes)
    if classes is None or len(set(classes)) != len(classes):
        raise ConfigError(
            f"Classify: relabel=True numbers the given classes; list different ones, got classes={classes!r}."
        )
    numbers = torch.full((num_classes,), -1)
    numbers[list(classes)] = torch.arange(len(classes))
    return numbers


def _pool(data: Labelled, source: str, split: str, classes: tuple[int, ...] | None) -> Tensor:
    rows = data.rows(split)
    if classes is None:
        return rows
    wrong = [c for c in classes if not (isinstance(c, int) and 0 <= c < data.num_classes)]
    if wrong or not classes:
        raise ConfigError(f"Classify: classes of {source!r} are 0 .. {data.num_classes - 1}, got classes={classes!r}.")
    rows = rows[torch.isin(data.y[rows], torch.tensor(classes))]
    if len(rows) == 0:
        raise ConfigError(f"Classify: the split {split!r} of {source!r} has no example of the classes {classes!r}.")
    return rows
