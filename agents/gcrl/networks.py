"""Networks of offline goal-conditioned RL, with the numerics of OGBench (Park et al. 2025, arXiv 2410.20092) and HILP.

Dense, then GELU (tanh approximation), then LayerNorm (eps 1e-6), for every layer but the last; Xavier-uniform weights. An
ensemble is one module: its members are the first axis of every parameter and of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents.networks.encoders import OneHot, channels_last, flat_encoder, image_shape
from clbench.agents.networks.mlp import gelu, xavier_
from clbench.errors import ConfigError

LAYER_NORM_EPS = 1e-6
GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")
SIGN = "goal_sign"  # an environment may say by this key, per row, whether its goal is to be reached (1) or avoided (-1)


# -- inputs --------------------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """A batch of states or goals: numbers (B, n), an image (B, C, H, W) uint8, or both."""

    flat: Tensor | None
    image: Tensor | None = None

    @property
    def rows(self) -> int:
        """B; 0 where there is neither."""
        part = self.image if self.flat is None else self.flat
        return 0 if part is None else len(part)


def stack_rows(*inputs: Input) -> Input:
    """Several batches as one, so that a network is evaluated once."""
    flat = None if inputs[0].flat is None else torch.cat([x.flat for x in inputs])  # type: ignore[misc]
    image = None if inputs[0].image is None else torch.cat([x.image for x in inputs])  # type: ignore[misc]
    return Input(flat, image)


class Shape(NamedTuple):
    """Of an :class:`Input` without its rows: how many numbers, and (C, H, W)."""

    flat: int
    image: tuple[int, int, int] | None = None


class Raw(nn.Module):
    """Box (B, *shape) -> (B, n) float32; the numbers as they are, or centred and scaled once that is fitted to data.

    ``frequencies`` F > 0 appends the sines and cosines of ``pi 2^k x / 2``, k = 0..F-1 (Tancik et al. 2020, arXiv
    2006.10739): a small MLP of x alone is too smooth to put the two sides of a thin wall apart.
    """

    center: Tensor
    scale: Tensor
    octaves: Tensor

    def __init__(self, size: int, frequencies: int = 0):
        super().__init__()
        self.size = size * (1 + 2 * frequencies)
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        octaves = torch.pi * 2.0 ** torch.arange(-1, frequencies - 1)
        self.register_buffer("octaves", octaves, persistent=False)

    def fit(self, rows: Tensor) -> None:
        """Centre on the mean, divide by the standard deviation, of (N, *shape)."""
        x = rows.reshape(len(rows), -1).to(torch.float32)
        self.center.copy_(x.mean(0))
        deviation = x.std(0, correction=0)
        self.scale.copy_(torch.where(deviation > 1e-6, deviation, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = (x.reshape(len(x), -1).to(torch.float32) - self.center) / self.scale
        if len(self.octaves) == 0:
            return x
        phase = (x[:, :, None] * self.octaves).flatten(1)
        return torch.cat([x, phase.sin(), phase.cos()], 1)


class Inputs(nn.Module):
    """From the keys of a goal environment to the states and goals that networks take.

    The state is ``observation`` and any further keys (such as ``velocity``), the goal is ``desired_goal``. Where states
    and goals are of one space (``same``), as in OGBench, both go through the same transform. Where they are not, what is
    compared with a goal is ``achieved_goal``. ``goal_sign`` says what to do with the goal, and is no part of the state.

    Raises:
        ConfigError: a space that is not supported.
    """

    def __init__(self, space: gymnasium.Space, frequencies: int = 0):
        super().__init__()
        if not isinstance(space, Dict) or any(key not in space.spaces for key in GOAL_KEYS):
            raise ConfigError(f"Goal-conditioned agents need observations with the keys {GOAL_KEYS}, got {space}.")
        spaces = {k: v for k, v in space.spaces.items() if k != SIGN}
        extra = sorted(k for k in spaces if k not in GOAL_KEYS)
        self.same = not extra and spaces["observation"] == spaces["desired_goal"]
        self.state_keys = ["observation", *extra]
        self.context_keys = ([] if spaces["observation"] == spaces["desired_goal"] else ["observation"]) + extra
        self.images = {k: shape for k in spaces if (shape := image_shape(spaces[k])) is not None}
        self.last = {k for k in self.images if channels_last(spaces[k])}  # type: ignore[arg-type]
        kinds = ["observation" if self.same else "desired_goal", *self.state_keys]
        self.transforms = nn.ModuleDict(
            {k: _transform(spaces[k], k, frequencies) for k in dict.fromkeys(kinds) if k not in self.images}
        )
        self._goal_key = kinds[0]
        sizes = {self.images[k][1:] for k in self.images}
        if len(sizes) > 1:
            raise ConfigError(f"Images of states and goals must have one size, got {sorted(sizes)}.")

    def _shape(self, keys: Sequence[str]) -> Shape:
        images = [self.images[k] for k in keys if k in self.images]
        image = (sum(i[0] for i in images), *images[0][1:]) if images else None
        return Shape(sum(int(self.transforms[k].size) for k in keys if k not in self.images), image)  # type: ignore[arg-type]

    @property
    def state_shape(self) -> Shape:
        return self._shape(self.state_keys)

    @property
    def goal_shape(self) -> Shape:
        return self._shape([self._goal_key])

    @property
    def context_shape(self) -> Shape:
        return self._shape(self.context_keys)

    def fit(self, observations: Mapping[str, Tensor]) -> None:
        """Fit centres and scales to rows of the training data; of the goal, to what was achieved."""
        for key, transform in self.transforms.items():
            if isinstance(transform, Raw):
                transform.fit(observations["achieved_goal" if key == "desired_goal" else key])

    def state(self, obs: Mapping[str, Tensor]) -> Input:
        """Observations, (B, ...) each -> states."""
        return self._join(obs, self.state_keys)

    def context(self, obs: Mapping[str, Tensor]) -> Input:
        """What a state has beside its part that is compared with goals (velocities); without numbers where ``same``."""
        return self._join(obs, self.context_keys)

    def _join(self, obs: Mapping[str, Tensor], keys: Sequence[str]) -> Input:
        flats = [self.transforms[k](obs[k]) for k in keys if k in self.transforms]
        images = [self._channels_first(k, obs[k]) for k in keys if k in self.images]
        return Input(
            (flats[0] if len(flats) == 1 else torch.cat(flats, 1)) if flats else None,
            (images[0] if len(images) == 1 else torch.cat(images, 1)) if images else None,
        )

    def goal(self, values: Tensor) -> Input:
        """Achieved or desired goals (B, ...) -> goals."""
        key = self._goal_key
        if key in self.transforms:
            return Input(self.transforms[key](values))
        return Input(None, self._channels_first(key, values))

    def goals(self, *values: Tensor) -> list[Input]:
        """Several batches of achieved or desired goals -> goals; numbers are transformed in one call."""
        if self._goal_key in self.images:
            return [self.goal(v) for v in values]
        flat = self.goal(torch.cat(values)).flat
        assert flat is not None
        return [Input(x) for x in flat.split([len(v) for v in values])]

    def _channels_first(self, key: str, image: Tensor) -> Tensor:
        return image.movedim(-1, 1) if key in self.last else image


def _transform(space: gymnasium.Space, key: str, frequencies: int) -> nn.Module:
    if isinstance(space, Box):
        return Raw(int(np.prod(space.shape)), frequencies)
    transform = flat_encoder(space, f"of key {key!r}")
    assert isinstance(transform, OneHot | nn.Module)
    return transform


# -- layers --------------------------------------------------------------------------------------------------------------


def _use(parameter: Tensor, frozen: bool) -> Tensor:
    return parameter.detach() if frozen else parameter


class MLP(nn.Module):
    """(B, sizes[0]) -> (B, sizes[-1]), or (E, B, sizes[-1]) for ``members=E`` independent networks on the same input.

    Args:
        sizes: input size, hidden sizes, output size.
        rng: draws the weights, member by member.
        members: E; ``None`` is a single network without the axis of members.
        layer_norm: after each activation. On in value networks, off in actors.
        activation: pointwise.
        final_gain: gain of the last layer's initialisation.
    """

    def __init__(
        self, sizes: Sequence[int], *, rng: torch.Generator, members: int | None = None, layer_norm: bool = False,
        activation: Callable[[Tensor], Tensor] = gelu, final_gain: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.activation, self.members = activation, members
        count, pairs = members or 1, list(zip(sizes[:-1], sizes[1:], strict=True))
        self.kernels, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for i, (n_in, n_out) in enumerate(pairs):
            last = i == len(pairs) - 1
            draws = [xavier_(torch.empty(n_in, n_out), rng, final_gain if last else 1.0) for _ in range(count)]
            self.kernels.append(nn.Parameter(torch.stack(draws)))
            self.biases.append(nn.Parameter(torch.zeros(count, n_out)))
            if layer_norm and not last:
                self.scales.append(nn.Parameter(torch.ones(count, n_out)))
                self.shifts.append(nn.Parameter(torch.zeros(count, n_out)))

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """``frozen`` lets the gradient through to ``x``, but not to the parameters."""
        groups = self.kernels, self.biases, self.scales, self.shifts
        # what iterating over a ParameterList gives, without the time it takes
        kernels, biases, scales, shifts = (
            [_use(p, frozen) for p in g._parameters.values() if p is not None] for g in groups
        )
        if self.members is None:
            # biases (1, n) broadcast as they are
            return self._member(
                x,
                [p.squeeze(0) for p in kernels],
                biases,
                [p.squeeze(0) for p in scales],
                [p.squeeze(0) for p in shifts],
            )
        if x.is_cuda:
            return self._stacked(x, kernels, biases, scales, shifts)
        split = [[p.unbind(0) for p in group] for group in (kernels, biases, scales, shifts)]
        return torch.stack([self._member(x, *([p[e] for p in g] for g in split)) for e in range(self.members)])

    def _member(
        self, h: Tensor, kernels: list[Tensor], biases: list[Tensor], scales: list[Tensor], shifts: list[Tensor]
    ) -> Tensor:
        """One network, with fused LayerNorm, which a CPU takes member after member."""
        for i in range(len(kernels) - 1):
            h = self.activation(torch.addmm(biases[i], h, kernels[i]))
            if scales:
                h = torch.layer_norm(h, scales[i].shape, scales[i], shifts[i], LAYER_NORM_EPS)
        return torch.addmm(biases[-1], h, kernels[-1])

    def _stacked(
        self, x: Tensor, kernels: list[Tensor], biases: list[Tensor], scales: list[Tensor], shifts: list[Tensor]
    ) -> Tensor:
        """All members in one launch per operation: what a GPU waits for."""
        h = x.expand(len(kernels[0]), *x.shape)
        for i in range(len(kernels) - 1):
            h = self.activation(torch.baddbmm(biases[i][:, None], h, kernels[i]))
            if scales:
                h = functional.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS) * scales[i][:, None] + shifts[i][:, None]
        return torch.baddbmm(biases[-1][:, None], h, kernels[-1])


class ImpalaSmall(nn.Module):
    """Images (B, C, H, W) uint8 -> (B, size): OGBench's ``impala_small``, for pixels.

    Three stacks (16, 32, 32) of conv 3x3, max-pool 3x3 of stride 2, one residual block (relu, conv, relu, conv, and the
    sum); then relu, dense, GELU. Xavier-uniform weights.
    """

    def __init__(self, image: tuple[int, int, int], *, rng: torch.Generator, size: int = 512,
                 widths: Sequence[int] = (16, 32, 32)):  # fmt: skip
        super().__init__()
        channels, height, width = image
        self.kernels, self.biases = nn.ParameterList(), nn.ParameterList()
        self.stacks = len(widths)
        for n in widths:
            for n_in in (channels, n, n):
                self.kernels.append(nn.Parameter(xavier_(torch.empty(n, n_in, 3, 3), rng)))
                self.biases.append(nn.Parameter(torch.zeros(n)))
            channels, height, width = n, (height + 1) // 2, (width + 1) // 2
        self.kernels.append(nn.Parameter(xavier_(torch.empty(size, channels * height * width), rng)))
        self.biases.append(nn.Parameter(torch.zeros(size)))
        self.size = size

    def forward(self, image: Tensor, *, frozen: bool = False) -> Tensor:
        layers = iter([(_use(k, frozen), _use(b, frozen)) for k, b in zip(self.kernels, self.biases, strict=True)])
        x = image.to(torch.float32) / 255
        for _ in range(self.stacks):
            x = _pool(functional.conv2d(x, *next(layers), padding=1))
            residual = functional.conv2d(torch.relu(x), *next(layers), padding=1)
            x = x + functional.conv2d(torch.relu(residual), *next(layers), padding=1)
        return gelu(functional.linear(torch.relu(x).flatten(1), *next(layers)))


def _pool(x: Tensor) -> Tensor:
    """Max-pool 3x3 of stride 2 with the padding that TensorFlow and JAX call SAME: of even sizes, only at the far end."""
    height, width = (1 + n % 2 for n in x.shape[-2:])
    return functional.max_pool2d(functional.pad(x, (width - 1, 1, height - 1, 1), value=-torch.inf), 3, stride=2)


class Network(nn.Module):
    """An MLP on several inputs side by side: ``[s; g]``, ``[s; g; a]``, ``[s]``, ...

    Images are joined along the channel axis (early fusion) and go through one :class:`ImpalaSmall`, which the members of
    an ensemble share; numbers are appended to its features.

    Args:
        shapes: of the inputs.
        sizes: hidden sizes and output size.
        extra: numbers that are appended (actions).
        squeeze: drop the last axis, of size 1.
        options: of :class:`MLP`.
    """

    def __init__(self, shapes: Sequence[Shape], sizes: Sequence[int], *, rng: torch.Generator, extra: int = 0,
                 squeeze: bool = False, **options: Any):  # fmt: skip
        super().__init__()
        images = [s.image for s in shapes if s.image is not None]
        features = sum(s.flat for s in shapes)
        self.encoder = None
        if images:
            self.encoder = ImpalaSmall((sum(i[0] for i in images), *images[0][1:]), rng=rng)
            features += self.encoder.size
        self.mlp = MLP((features + extra, *sizes), rng=rng, **options)
        self.squeeze = squeeze

    def forward(self, *inputs: Input, extra: Tensor | None = None, frozen: bool = False) -> Tensor:
        parts = [x.flat for x in inputs if x.flat is not None]
        if self.encoder is not None:
            images = [x.image for x in inputs if x.image is not None]
            parts.insert(0, self.encoder(images[0] if len(images) == 1 else torch.cat(images, 1), frozen=frozen))
        if extra is not None:
            parts.append(extra)
        out = self.mlp(parts[0] if len(parts) == 1 else torch.cat(parts, 1), frozen=frozen)
        return out.squeeze(-1) if self.squeeze else out


# -- policies ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gaussian:
    """Diagonal normal distribution: mean (B, A), log standard deviation (A,) (``None``: standard deviation 1)."""

    mean: Tensor
    log_std: Tensor | None = None

    @property
    def std(self) -> Tensor | float:
        return 1.0 if self.log_std is None else torch.exp(self.log_std)

    def log_prob(self, action: Tensor) -> Tensor:
        """(B, A) -> (B,)."""
        z, constant = action - self.mean, 0.5 * float(np.log(2 * np.pi))
        if self.log_std is None:
            return -0.5 * z.square().sum(-1) - constant * z.shape[-1]
        z = z * torch.exp(-self.log_std)
        return (-0.5 * z.square() - self.log_std - constant).sum(-1)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=rng, device=rng.device).to(self.mean.device)
        return self.mean + temperature * self.std * noise


@dataclass(frozen=True)
class Categorical:
    """Classes from logits (B, n)."""

    logits: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        """(B,) int64 -> (B,)."""
        return -functional.cross_entropy(self.logits, action, reduction="none")

    @property
    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def sample(self, rng: torch.Generator, temperature: float = 1.0) -> Tensor:
        chances = torch.softmax(self.logits / max(temperature, 1e-6), -1).to(rng.device)
        return torch.multinomial(chances, 1, generator=rng)[:, 0].to(self.logits.device)


Distribution = Gaussian | Categorical


class Actor(nn.Module):
    """Inputs -> a distribution of actions; no LayerNorm, output layer of gain 0.1 (OGBench).

    Args:
        shapes: of the inputs.
        hidden: sizes of the hidden layers.
        outputs: numbers in an action, or classes.
        extra: numbers that are appended to the inputs (a representation of the goal, a skill).
        discrete: classes.
        learn_std: a learned standard deviation per coordinate in place of 1; its logarithm is kept within [-5, 2].
        options: of :class:`Network`.
    """

    def __init__(self, shapes: Sequence[Shape], hidden: Sequence[int], outputs: int, *, rng: torch.Generator,
                 discrete: bool = False, learn_std: bool = False, **options: Any):  # fmt: skip
        super().__init__()
        self.net = Network(shapes, (*hidden, outputs), rng=rng, final_gain=0.1, **options)
        self.discrete = discrete
        self.log_std = nn.Parameter(torch.zeros(outputs)) if learn_std and not discrete else None

    def forward(self, *inputs: Input, extra: Tensor | None = None) -> Distribution:
        out = self.net(*inputs, extra=extra)
        if self.discrete:
            return Categorical(out)
        return Gaussian(out, None if self.log_std is None else self.log_std.clamp(-5, 2))


def action_size(space: gymnasium.Space) -> int:
    """Numbers in a continuous action, or classes of a discrete one."""
    return int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape or ()))
