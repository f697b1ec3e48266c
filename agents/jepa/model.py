"""The world model: encoder, optional context, an ensemble of predictors, and the standardisation of their inputs.

PLDM ("Learning from Reward-Free Offline Data: A Case for Planning with Latent Dynamics Models", arXiv 2502.14819).
What is to be reached (``achieved_goal``, ``desired_goal``) is encoded; what else is observed (a velocity, joint angles)
is the *context*: it is carried beside the embedding, predicted with it, and left out of distances between latents.

    latent of one member   (D,) = [embedding | context], or (C, H, W) = planes of the embedding, then of the context
    latent of an ensemble  (E, D) or (E, C, H, W): ``encode`` repeats it, ``predict`` moves each member by its own network

Actions are in the units of the environment everywhere outside of this class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor, nn

from clbench.agents.jepa.encoders import ImpalaEncoder, MazeEncoder, StateEncoder, StridedEncoder
from clbench.agents.jepa.layers import ACTIVATIONS, Standardise, StandardiseImage, initialise
from clbench.agents.jepa.predictors import GRUPredictor, MazePredictor, MLPPredictor
from clbench.agents.networks.encoders import channels_last, image_shape
from clbench.contracts import Spaces, Stepper
from clbench.errors import ConfigError
from clbench.planners.steppers import PredictStepper

GOAL_KEYS = ("achieved_goal", "desired_goal")


@dataclass(frozen=True)
class Architecture:
    """Which networks. The three published ones are fixed but for ``members``; the other options belong to ``small``.

    Args:
        name: ``two-rooms`` (images, GRU), ``diverse-maze`` (images and velocity, convolutions), ``state-ensemble``
            (states, MLPs; for the ant), or ``small``, made for a CPU, for states or images. ``None`` leaves it to the
            preset of the agent; without one it is ``small``.
        members: predictors in the ensemble; by default 5 for ``state-ensemble`` and 1 for the others.
        latent: numbers in the embedding.
        encoder_hidden: hidden layers of the encoder of states.
        frequencies: Fourier features of the encoder of states, 0 for none.
        channels, kernels, strides: of the convolutions of the encoder of images.
        predictor: ``mlp`` or ``gru`` (which has no place for a context).
        hidden: hidden layers of the MLP predictor.
        activation: relu, gelu, mish, silu or tanh.
        hidden_norm: LayerNorm before every activation of the MLP predictor.
        residual: the MLP predicts the change of the latent.
        output_norm: encoder and predictor end with one shared LayerNorm.
    """

    name: Literal["small", "two-rooms", "diverse-maze", "state-ensemble"] | None = None
    members: int | None = None
    latent: int = 32
    encoder_hidden: tuple[int, ...] = (256, 256)
    frequencies: int = 4
    channels: tuple[int, ...] = (16, 32, 32)
    kernels: tuple[int, ...] = (5, 3, 3)
    strides: tuple[int, ...] = (4, 2, 2)
    predictor: Literal["mlp", "gru"] = "mlp"
    hidden: tuple[int, ...] = (256,)
    activation: str = "relu"
    hidden_norm: bool = False
    residual: bool = True
    output_norm: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("small", "two-rooms", "diverse-maze", "state-ensemble"):
            raise ConfigError(
                f"Unknown architecture {self.name!r}; use 'small', 'two-rooms', 'diverse-maze' or 'state-ensemble'."
            )
        if self.members is not None and self.members < 1:
            raise ConfigError(f"members must be at least 1, got {self.members}.")
        if self.frequencies < 0:
            raise ConfigError(f"frequencies must be at least 0, got {self.frequencies}.")
        if self.predictor not in ("mlp", "gru"):
            raise ConfigError(f"predictor must be 'mlp' or 'gru', got {self.predictor!r}.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
        sizes = ("latent", "encoder_hidden", "channels", "kernels", "strides", "hidden")
        for name in sizes:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                raise ConfigError(f"{name} must be positive, got {value}.")
        if not len(self.channels) == len(self.kernels) == len(self.strides):
            raise ConfigError(
                f"channels, kernels and strides need one number per convolution, got {self.channels}, {self.kernels} and "
                f"{self.strides}."
            )
        if self.kind != "small":
            own = [f.name for f in dataclasses.fields(self) if f.name not in ("name", "members")]
            changed = [n for n in own if getattr(self, n) != getattr(type(self), n)]
            if changed:
                raise ConfigError(
                    f"The architecture {self.name!r} is fixed; {', '.join(changed)} can only be set for 'small'."
                )

    @property
    def kind(self) -> str:
        """The name, where it is given."""
        return self.name or "small"

    @property
    def ensemble_size(self) -> int:
        """E."""
        return self.members or (5 if self.name == "state-ensemble" else 1)


@dataclass(frozen=True)
class Keys:
    """Which parts of an observation are used for what; ``goal`` is None where the observation is one tensor."""

    goal: str | None
    target: str | None
    context: tuple[str, ...]

    @staticmethod
    def of(space: gymnasium.Space) -> Keys:
        """Raises ConfigError for a dict without a goal part or with keys that cannot be a context."""
        if not isinstance(space, Dict):
            return Keys(None, None, ())
        spaces = space.spaces
        goal = "achieved_goal" if "achieved_goal" in spaces else "observation"
        if goal not in spaces:
            raise ConfigError(
                f"A world model needs the key 'achieved_goal' or 'observation', but observations have {sorted(spaces)}."
            )
        target = "desired_goal" if "desired_goal" in spaces else None
        if target and spaces[target].shape != spaces[goal].shape:
            raise ConfigError(
                f"{goal!r} {spaces[goal].shape} and 'desired_goal' {spaces[target].shape} must have one shape."
            )
        rest = sorted(k for k in spaces if k not in (goal, *GOAL_KEYS))
        context = tuple(k for k in rest if not (k == "observation" and spaces[k] == spaces[goal]))
        for key in context:
            if not isinstance(spaces[key], Box) or image_shape(spaces[key]) is not None:
                raise ConfigError(
                    f"The key {key!r} of the observation is {spaces[key]}; besides the goal, a world model takes Box "
                    "vectors only."
                )
        return Keys(goal, target, context)


class LatentModel(nn.Module):
    """Encoder and latent dynamics, for training (``encode_frames``, ``rollout``) and planning (the other methods).

    Attributes:
        latent_shape: of what planners see: ``(D,)`` or ``(C, H, W)``, with E in front for an ensemble.
        state_shape: the same without E.
        action_dim: A.
        members: E.

    Args:
        spaces: of one environment. Observations: Box, or a dict with ``achieved_goal`` (or ``observation``); images are
            uint8 with three axes. Actions: a Box of one axis.
        architecture: see :class:`Architecture`.
        rng: draws all weights.

    Raises:
        ConfigError: spaces that the architecture cannot take.
    """

    def __init__(self, spaces: Spaces, architecture: Architecture, *, rng: torch.Generator):
        super().__init__()
        self.architecture = architecture
        self.members = architecture.ensemble_size
        self.action_dim = _action_size(spaces.action)
        self.keys = Keys.of(spaces.observation)
        space = spaces.observation if self.keys.goal is None else spaces.observation[self.keys.goal]  # type: ignore[index]
        if not isinstance(space, Box):
            raise ConfigError(f"A world model encodes Box observations, but {self.keys.goal or 'they'} are {space}.")
        self.image = image_shape(space)
        self._channels_last = self.image is not None and channels_last(space)
        self._goal_shape = tuple(space.shape)
        size = int(np.prod(space.shape))
        context = [spaces.observation[k] for k in self.keys.context]  # type: ignore[index]
        self.context_dim = sum(int(np.prod(s.shape)) for s in context)
        self._check_fit(size)

        with torch.device("meta"):  # weights come from rng alone
            self.encoder = self._new_encoder(size)
            self.embedding_shape: tuple[int, ...] = self.encoder.shape
            self.predictor = self._new_predictor()
        initialise(self, rng)
        self.normalise_goal: Standardise = (
            StandardiseImage(self.image[0], min_max=architecture.kind == "two-rooms")
            if self.image
            else Standardise((size,))
        )
        self.normalise_context = Standardise((self.context_dim,))
        self.normalise_actions = Standardise((self.action_dim,))
        first, *rest = self.embedding_shape
        self.state_shape = (first + self.context_dim, *rest)
        self.latent_shape = self.state_shape if self.members == 1 else (self.members, *self.state_shape)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _check_fit(self, size: int) -> None:
        a = self.architecture
        if a.kind in ("two-rooms", "diverse-maze") and self.image is None:
            raise ConfigError(
                f"The architecture {a.kind!r} needs uint8 images, but the goal part has shape {self._goal_shape}."
            )
        if a.kind == "state-ensemble" and self.image is not None:
            raise ConfigError("The architecture 'state-ensemble' needs states, but the goal part is an image.")
        gru = a.kind == "two-rooms" or (a.kind == "small" and a.predictor == "gru")
        if gru and self.context_dim:
            raise ConfigError(
                f"A GRU predictor has no place for the context {list(self.keys.context)}; use 'small' with "
                "predictor='mlp', or 'diverse-maze'."
            )
        if a.kind == "diverse-maze" and self.image and min(self.image[1:]) < 20:
            raise ConfigError(
                f"The architecture 'diverse-maze' needs images of at least 20 x 20, got {self.image[1:]}."
            )
        if size < 1:
            raise ConfigError("The goal part of the observation is empty.")

    def _new_encoder(self, size: int) -> Any:
        a = self.architecture
        if a.kind == "two-rooms":
            assert self.image
            return ImpalaEncoder(self.image)
        if a.kind == "diverse-maze":
            assert self.image
            return MazeEncoder(self.image)
        if a.kind == "state-ensemble":
            return StateEncoder(size, (32, 256))
        if self.image is None:
            sizes = (*a.encoder_hidden, a.latent)
            return StateEncoder(
                size, sizes, frequencies=a.frequencies, activation=a.activation, output_norm=a.output_norm
            )
        return StridedEncoder(
            self.image, channels=a.channels, kernels=a.kernels, strides=a.strides, size=a.latent, activation=a.activation,
            output_norm=a.output_norm,
        )  # fmt: skip

    def _new_predictor(self) -> MLPPredictor | GRUPredictor | MazePredictor:
        a, first, actions = self.architecture, self.embedding_shape[0], self.action_dim
        if a.kind == "diverse-maze":
            return MazePredictor(self.members, first + self.context_dim, actions)
        if a.kind == "two-rooms" or (a.kind == "small" and a.predictor == "gru"):
            return GRUPredictor(self.members, first, actions, norm=self.encoder.norm)
        ant = a.kind == "state-ensemble"
        return MLPPredictor(
            self.members, first, self.context_dim, actions, hidden=(256, 256) if ant else a.hidden,
            activation="mish" if ant else a.activation, hidden_norm=ant or a.hidden_norm,
            residual=not ant and a.residual, norm=self.encoder.norm, context_norm=ant,
        )  # fmt: skip

    # -- statistics -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_normaliser(self, observations: Any, actions: Tensor) -> None:
        """Means and deviations of a sample: per channel of images, per number of states, context and actions.

        Args:
            observations: tensor (N, ...) or dict of such.
            actions: (N, A), in units of the environment.

        Raises:
            ConfigError: fewer than two rows, or actions of another size.
        """
        self._check_action(actions)
        if len(actions) < 2:
            raise ConfigError(f"The normaliser needs a sample of at least 2 transitions, got {len(actions)}.")
        self.normalise_actions.fit(actions)
        self.normalise_goal.fit(self._goal_part(observations, self.keys.goal))
        if self.context_dim:
            self.normalise_context.fit(self._raw_context(observations))

    # -- encoding -------------------------------------------------------------------------------------------------------

    def encode(self, obs: Any) -> Tensor:
        """Observation (B, ...) -> latent (B, *latent_shape)."""
        return self._repeat(self._encode(obs, self.keys.goal))

    def encode_goal(self, obs: Any) -> Tensor:
        """Goal of an observation (B, ...) -> latent (B, *latent_shape), with a context of zeros (a point at rest).

        A plain tensor is taken as a goal observation. Raises ConfigError where observations have no ``desired_goal``.
        """
        if isinstance(obs, Mapping) and self.keys.target is None:
            raise ConfigError("There is no goal to encode: the observations have no key 'desired_goal'.")
        return self._repeat(self._encode(obs, self.keys.target, context=False))

    def encode_frames(self, obs: Any) -> Tensor:
        """Observations (B, T, ...) -> (B, T, *state_shape), without an axis of members."""
        parts = obs if isinstance(obs, Mapping) else {"": obs}
        if self.keys.goal is not None:
            _part(obs, self.keys.goal)  # what is missing is said here
        used = {k: v for k, v in parts.items() if k in ("", self.keys.goal, *self.keys.context)}
        batch, time = next(iter(used.values())).shape[:2]
        flat = {k: v.flatten(0, 1) for k, v in used.items()}
        z = self._encode(flat if isinstance(obs, Mapping) else flat[""], self.keys.goal)
        return z.unflatten(0, (batch, time))

    def goal_features(self, z: Tensor) -> Tensor:
        """Latents (..., D...) -> the embedding (..., n), flat: where distances are taken. Any leading axes."""
        if len(self.embedding_shape) == 1:
            return z[..., : self.embedding_shape[0]]
        return z[..., : self.embedding_shape[0], :, :].flatten(-3)

    def context_features(self, z: Tensor) -> Tensor:
        """Latents (..., D...) -> the context (..., n), flat (planes of an image-like latent one after the other)."""
        if len(self.embedding_shape) == 1:
            return z[..., self.embedding_shape[0] :]
        return z[..., self.embedding_shape[0] :, :, :].flatten(-3)

    def _encode(self, obs: Any, key: str | None, *, context: bool = True) -> Tensor:
        embedding = self.encoder(self.normalise_goal(self._goal_part(obs, key)))
        if not self.context_dim:
            return embedding
        raw = self._raw_context(obs) if context else embedding.new_zeros(len(embedding), self.context_dim)
        beside = self.normalise_context(raw)
        if embedding.ndim == 4:
            beside = beside[:, :, None, None].expand(-1, -1, *embedding.shape[-2:])
        elif getattr(self.predictor, "context_norm", False):
            beside = nn.functional.layer_norm(beside, beside.shape[-1:])  # as predicted, or it could never be met
        return torch.cat([embedding, beside], 1)

    def _goal_part(self, obs: Any, key: str | None) -> Tensor:
        x = obs if key is None or not isinstance(obs, Mapping) else _part(obs, key)
        if tuple(x.shape[1:]) != self._goal_shape:
            raise ConfigError(
                f"The world model encodes observations of shape {self._goal_shape}, got {tuple(x.shape[1:])}."
            )
        if self.image is None:
            return x.flatten(1)
        return x.movedim(-1, 1) if self._channels_last else x

    def _raw_context(self, obs: Any) -> Tensor:
        context = torch.cat([_part(obs, k).flatten(1).to(torch.float32) for k in self.keys.context], 1)
        if context.shape[1] != self.context_dim:
            raise ConfigError(
                f"The context {list(self.keys.context)} has {self.context_dim} numbers, but the observation has "
                f"{context.shape[1]}."
            )
        return context

    def _repeat(self, z: Tensor) -> Tensor:
        return z if self.members == 1 else z[:, None].expand(len(z), *self.latent_shape)

    # -- dynamics -------------------------------------------------------------------------------------------------------

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """One step: z (..., *latent_shape), action (..., A) in units of the environment -> (..., *latent_shape)."""
        self._check_action(action)
        lead = z.shape[: z.ndim - len(self.latent_shape)]
        if tuple(z.shape[len(lead) :]) != self.latent_shape or lead != action.shape[:-1]:
            raise ConfigError(
                f"The world model predicts from z (..., {', '.join(map(str, self.latent_shape))}) and actions (..., "
                f"{self.action_dim}) with equal leading axes, got {tuple(z.shape)} and {tuple(action.shape)}."
            )
        z = z.reshape(-1, *self.latent_shape)
        z = z[None] if self.members == 1 else z.transpose(0, 1)
        z = self.predictor(z, self.normalise_actions(action.reshape(-1, self.action_dim)))
        z = z[0] if self.members == 1 else z.transpose(0, 1)
        return z.reshape(*lead, *self.latent_shape)

    def stepper(self, rows: int, *, dtype: torch.dtype | None = None) -> Stepper:
        """``predict`` for ``rows`` latents in resident buffers, with the weights of this moment.

        The action's standardisation is folded into the first layer. Convolutions have no such form and are moved by
        ``predict``.
        """
        if isinstance(self.predictor, MazePredictor):
            return PredictStepper(self)
        return self.predictor.stepper(rows, self.normalise_actions, dtype)

    def rollout(self, z0: Tensor, actions: Tensor) -> Tensor:
        """Autoregressive predictions from the first latent, differentiable throughout.

        Args:
            z0: (B, *state_shape), as :meth:`encode_frames` gives them.
            actions: (B, H, A), in units of the environment.

        Returns:
            (B, H, [E,] *state_shape): after actions 1 to H; the axis of members only where E > 1.
        """
        self._check_action(actions)
        if tuple(z0.shape[1:]) != self.state_shape or actions.ndim != 3 or len(actions) != len(z0):
            raise ConfigError(
                f"rollout takes z0 (B, {', '.join(map(str, self.state_shape))}) and actions (B, H, {self.action_dim}), got "
                f"{tuple(z0.shape)} and {tuple(actions.shape)}."
            )
        actions = self.normalise_actions(actions)
        z = z0.expand(self.members, *z0.shape)
        steps = []
        for action in actions.unbind(1):
            z = self.predictor(z, action)
            steps.append(z)
        if self.members == 1:
            return torch.stack([z[0] for z in steps], 1)
        return torch.stack(steps).movedim(2, 0)  # (H, E, B, ...) -> (B, H, E, ...)

    def _check_action(self, action: Tensor) -> None:
        if action.ndim == 0 or action.shape[-1] != self.action_dim:
            raise ConfigError(f"The world model takes actions of {self.action_dim} numbers, got {tuple(action.shape)}.")


def _part(obs: Any, key: str) -> Tensor:
    if not isinstance(obs, Mapping) or key not in obs:
        found = sorted(obs) if isinstance(obs, Mapping) else "a tensor"
        raise ConfigError(f"The world model needs the key {key!r} of the observation, got {found}.")
    return obs[key]


def _action_size(space: gymnasium.Space) -> int:
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ConfigError(f"A world model needs Box actions of one axis, but the action space is {space}.")
    return space.shape[0]
