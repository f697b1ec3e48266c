"""A latent world model built as one eidetic network: what finished tasks encode and predict never changes.

Eidetic Learning (Dronen and Balestriero 2025, arXiv 2502.09500) applied to PLDM's encoder and predictor (Sobal et al. 2025,
arXiv 2502.14819). Units of all layers belong to tasks, the numbers of the latent too::

    observation -- Fourier features -- hidden ... -- latent                       z_{<=k}: the numbers of owner <= k
    [latent | context | action] -- hidden ... -- head of task k -- change of the whole latent and context

Task ``k`` plans in its *prefix* ``z_{<=k}``: units of later tasks read it with unchanged meaning, so they can build on it.
Its head moves all numbers of the prefix, older ones too, because the same numbers move differently in another task. A
head has a row for every number of the latent; rows of younger numbers are computed and thrown away, and do not exist in
the network that :meth:`EideticWorldModel.extract` gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.agents.jepa.layers import Standardise
from clbench.agents.jepa.model import Keys
from clbench.agents.networks.eidetic.layers import Activation, Heads, Linear, PrefixNorm
from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.ownership import FREE, INPUT, Space
from clbench.agents.networks.eidetic.verify import WHOLE
from clbench.contracts import Stepper
from clbench.errors import ConfigError
from clbench.planners.steppers import Affine, MLPStepper, PredictStepper, fold_action_scale

LatentNorm = Literal["own", "prefix"]
CHUNK = 16  # levels that are averaged by one matrix product


class Features(nn.Module):
    """x (..., n) -> standardised x, then the sines and cosines of ``pi 2^k x / 2``, k = 0..F-1, as in ``StateEncoder``.

    Its statistics are fitted before the first commit and belong to every task: owned units must go on seeing the numbers
    that they were trained on, and later units read them with unchanged meaning.
    """

    frozen = True  # what EideticNetwork.check asks for

    def __init__(self, size: int, frequencies: int = 0):
        super().__init__()
        self.standardise, self.frequencies = Standardise((size,)), frequencies
        self.standardise.frozen = True  # type: ignore[assignment]  # so is what it consists of

    @property
    def size(self) -> int:
        """Numbers in the result."""
        return len(self.standardise.mean) * (1 + 2 * self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardise(x)
        if not self.frequencies:
            return x
        scale = torch.pi * 2.0 ** torch.arange(-1, self.frequencies - 1, device=x.device)
        phase = (x[..., None] * scale.to(x.dtype)).flatten(-2)
        return torch.cat([x, phase.sin(), phase.cos()], -1)


class LevelNorm(PrefixNorm):
    """:class:`PrefixNorm`; with ``own`` by products with 0/1 matrices, all tasks at once, in shapes that never change.

    Variances are of centred numbers; the mean of squares less the squared mean would lose them where the mean is large.

    Args:
        space: of the last axis.
        own: a unit is normalised by the units of its own task alone. Then a latent is a fixed point of its norm, as with
            LayerNorm, and predicting no change means no change.
    """

    def __init__(self, space: Space, *, own: bool = False):
        super().__init__(space)
        self.own = own
        self._averages: tuple[Any, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.own:  # a level has members that are centred by other levels, too
            return super().forward(x)
        assert self.weight is not None and self.bias is not None
        weight, rows, chunks = self.weight(), x.reshape(-1, x.shape[-1]), self.averages(x)
        # a unit reads its own level: the others add exact zeros; units that are killed have weight and bias 0
        centred = rows
        for average, back in chunks:
            centred = torch.addmm(centred, rows @ average, back, alpha=-1)
        squares: Any = centred.square()
        factor: Any = 0.0
        for average, back in chunks:
            factor = factor + torch.rsqrt(squares @ average + self.eps) @ (back * weight)
        return torch.addcmul(self.bias(), centred, factor).view_as(x)

    def averages(self, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per chunk of levels what averages (n, CHUNK) and what hands back to the units (CHUNK, n)."""
        key = (self.axis.key(), like.device, like.dtype)
        if self._averages is None or self._averages[0] != key:
            alive, _, level = self.levels(like.device)
            owners = self.axis.owners()
            members = [(owners == task) & alive for task in owners.unique()]
            chunks = []
            for start in range(0, len(members), CHUNK):
                average, back = like.new_zeros(len(owners), CHUNK), like.new_zeros(CHUNK, len(owners))
                for i, inside in enumerate(members[start : start + CHUNK]):
                    average[:, i] = inside.to(like.dtype) / inside.sum().clamp_min(1)
                    back[i] = level == start + i
                chunks.append((average, back))
            self._averages = key, chunks
        return self._averages[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_averages": None}


class LatentHeads(Heads):
    """A head per task for the change of the latent and the context; a new one is as wide as the latent then is.

    Args:
        inputs: the spaces side by side that heads read.
        latent: the space of the latent.
        context: numbers beside it.
        transfer: as for spaces.
    """

    def __init__(self, inputs: Sequence[Space], latent: Space, context: int, *, transfer: bool):
        super().__init__(inputs, latent.size + context, transfer=transfer)
        self._latent, self.context = [latent], context  # in a list: it belongs to the network, once

    def open(self, *args: Any, **options: Any) -> Linear:
        self.size = self._latent[0].size + self.context
        return super().open(*args, **options)

    def changes(self, out: Tensor) -> Tensor:
        """What a head gives, as a change of [latent | context]: nothing for numbers that came after it."""
        latent, context = out.split([out.shape[-1] - self.context, self.context], -1)
        return torch.cat([F.pad(latent, (0, self._latent[0].size - latent.shape[-1])), context], -1)

    @torch.no_grad()
    def keep(self, task: int, numbers: Tensor) -> None:
        """Of the head of a finished task only the rows of these numbers (L,) bool of the latent, and of the context."""
        layer: Any = self.layers[task]
        space: Any = self.spaces[task]
        rows = torch.cat([numbers[: space.size - self.context], numbers.new_ones(self.context)]).nonzero()[:, 0]
        for parameter in (layer.weight, layer.bias):
            parameter.store = parameter.store.index_select(0, rows)
            parameter.forget()
        space.owner, space.alive = space.owner[rows], space.alive[rows]
        space.version += 1


class EideticWorldModel(EideticNetwork):
    """Encoder and latent dynamics of all tasks.

    Observations are one tensor (..., n + C): what is to be reached, then the context (a velocity), which is standardised
    and carried beside the latent. Latents are (..., L + C), with 0 where a number is pruned. Actions are in units of the
    environment.

    Args:
        size: n.
        context: C.
        actions: A.
        latent: L.
        encoder_hidden: widths of the encoder's hidden layers, each with a PrefixNorm before its activation.
        hidden: widths of the predictor's hidden layers, which have no norm: planning would pay for it.
        frequencies: of the Fourier features, 0 for none.
        activation: of all hidden layers.
        norm: of the latent, in the encoder and after every prediction (tied weights): over the numbers of the ``own`` task,
            or over the whole ``prefix``.
        options: of :class:`EideticNetwork`.
    """

    def __init__(
        self, size: int, context: int, actions: int, *, latent: int, encoder_hidden: Sequence[int], hidden: Sequence[int],
        frequencies: int = 4, activation: str = "relu", norm: LatentNorm = "own", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.parts = (size, context)
        self.features = Features(size, frequencies)
        self.beside = Features(context)
        self.command = Features(actions)
        self.activation = Activation(activation)
        below = self.inputs("observation", self.features.size)
        self.encoder, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, n in enumerate(encoder_hidden):
            space = self.space(f"encoder{i}", n)
            self.encoder.append(Linear(below, space))
            self.norms.append(LevelNorm(space))
            below = space
        state = self.space("latent", latent)
        self.encoder.append(Linear(below, state))
        self.norm = LevelNorm(state, own=norm == "own")
        read = [state, *([self.inputs("context", context)] if context else []), self.inputs("action", actions)]
        self.predictor = nn.ModuleList()
        for i, n in enumerate(hidden):
            space = self.space(f"predictor{i}", n)
            self.predictor.append(Linear(read, space))
            read = [space]
        self.head = LatentHeads(read, state, context, transfer=self.transfer)

    @property
    def latent(self) -> Space:
        """The space of the latent."""
        return self.spaces["latent"]  # type: ignore[return-value]

    @torch.no_grad()
    def fit_normaliser(self, obs: Tensor, action: Tensor) -> None:
        """Means and deviations of a sample (N, n + C), (N, A); before the first commit only.

        Raises:
            ConfigError: a task has been committed, or fewer than two rows.
        """
        if self.committed:
            raise ConfigError(
                "The statistics of the inputs belong to the tasks that were committed; they cannot change."
            )
        if len(action) < 2:
            raise ConfigError(f"The normaliser needs a sample of at least 2 transitions, got {len(action)}.")
        goal, beside = obs.split(self.parts, -1)
        for part, x in ((self.features, goal), (self.beside, beside), (self.command, action)):
            if x.shape[1]:
                part.standardise.fit(x)

    # -- encoding ---------------------------------------------------------------------------------------------------------

    def encode(self, obs: Tensor) -> Tensor:
        """(..., n + C) -> latents (..., L + C)."""
        goal, beside = obs.split(self.parts, -1)
        x = self.features(goal)
        for layer, norm in zip(self.encoder, self.norms, strict=False):
            x = self.activation(norm(layer(x)))
        z = self.norm(self.encoder[-1](x))
        return torch.cat([z, self.beside(beside)], -1) if self.parts[1] else z

    def prefix(self, task: int) -> Tensor:
        """(L,) bool: the numbers of the latent in which ``task`` plans."""
        space = self.latent
        if not self.transfer:
            return (space.owner == task) | (space.candidates if task >= self.committed else space.owner == INPUT)
        return (space.owner <= task) | (space.candidates if task >= self.committed else space.owner == INPUT)

    def own(self, task: int) -> Tensor:
        """(L,) bool: the numbers that belong to ``task``, or may yet; its whole prefix where it has none."""
        space = self.latent
        mine = space.candidates if task >= self.committed else space.owner == task
        return mine if bool(mine.any()) else self.prefix(task)

    # -- dynamics ---------------------------------------------------------------------------------------------------------

    def weights(self, task: int) -> list[tuple[Linear, Affine]]:
        """Layers of the predictor with their effective weights of this moment."""
        if not 0 <= task < len(self.head):
            raise ConfigError(f"There is no head for task {task}; {len(self.head)} have begun.")
        layers: list[Any] = [*self.predictor, self.head.layers[task]]
        return [(layer, (layer.weight(), layer.bias())) for layer in layers]

    def predict(self, z: Tensor, action: Tensor, task: int) -> Tensor:
        """One step of ``task``: z (..., L + C), action (..., A) in units of the environment -> (..., L + C)."""
        return self._step(z, self.command(action), self.weights(task))

    def rollout(self, z: Tensor, actions: Tensor, task: int) -> Tensor:
        """z (B, L + C), actions (B, H, A) -> (B, H, L + C): predictions from the first latent, differentiable."""
        weights, steps = self.weights(task), []  # effective weights are made once
        for action in self.command(actions).unbind(1):
            z = self._step(z, action, weights)
            steps.append(z)
        return torch.stack(steps, 1)

    def _step(self, z: Tensor, command: Tensor, weights: Sequence[tuple[Linear, Affine]]) -> Tensor:
        x = torch.cat([z, command], -1)
        for layer, (weight, bias) in weights:
            assert layer.out is not None
            y = layer.out.tap(F.linear(x, weight, bias))
            x = self.activation(y)
        return self.finish(z + self.head.changes(y))

    def finish(self, z: Tensor) -> Tensor:
        """The norm of the latent on [latent | context]."""
        if not self.parts[1]:
            return self.norm(z)
        latent, context = z.split([self.latent.size, self.parts[1]], -1)
        return torch.cat([self.norm(latent), context], -1)

    def forward(self, obs: Tensor, action: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Observations (B, n + C), actions (B, A) -> latents and predicted next latents of the prefix (B, n_k + C)."""
        z = self.encode(obs)
        after = self.predict(z, action, task)
        context = torch.ones(self.parts[1], dtype=torch.bool, device=z.device)
        kept = torch.cat([self.prefix(task), context]).nonzero()[:, 0]
        return z.index_select(-1, kept), after.index_select(-1, kept)

    def extract(self, task: int) -> Self:
        """As for every eidetic network; the head of ``task`` keeps the rows of its prefix only."""
        alone = super().extract(task)
        alone.head.keep(task, self.prefix(task))
        return alone


class _WholeFeatures(Features):
    """For the exact twin of ``clbench verify``: whole numbers stay whole."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * (1 + 2 * self.frequencies), -1)


WHOLE[Features], WHOLE[LevelNorm] = _WholeFeatures, WHOLE[PrefixNorm]


# -- planning ------------------------------------------------------------------------------------------------------------


def join(keys: Keys, obs: Any, *, goal: bool = False, axes: int = 1) -> Tensor:
    """An observation (a dict of (*axes, ...)) as the tensor (*axes, n + C) that the network takes.

    Args:
        keys: what is what.
        goal: take the goal, with a context of zeros (a point at rest).
        axes: leading axes.
    """

    def part(key: str | None) -> Tensor:
        if key is None or not isinstance(obs, Mapping) or key not in obs:
            found = sorted(obs) if isinstance(obs, Mapping) else "a tensor"
            raise ConfigError(f"The world model needs the key {key!r} of the observation, got {found}.")
        return obs[key].flatten(axes).to(torch.float32)

    beside = [part(k) for k in keys.context]
    return torch.cat(
        [part(keys.target if goal else keys.goal), *(map(torch.zeros_like, beside) if goal else beside)], -1
    )


class TaskModel:
    """The world model of one task, as planners take it (:class:`clbench.WorldModel`).

    Args:
        network: the extracted network of a finished task, or the whole one for the task under way (in eval mode).
        task: its number.
        keys: of the observations.
        distance: numbers of the latent in which distances to goals are taken: those that the task ``own``\\ s, which its
            losses have shaped, or the whole ``prefix``.
    """

    def __init__(self, network: EideticWorldModel, task: int, keys: Keys, *, distance: LatentNorm = "own"):
        self.network, self.task, self.keys = network, task, keys
        self.latent_shape = (network.latent.size + network.parts[1],)
        chosen = network.own(task) if distance == "own" else network.prefix(task)
        self._chosen = chosen.nonzero()[:, 0]
        self.hidden_numbers = 2 * max([s.size for s in network.prunable().values()])

    def encode(self, obs: Any) -> Tensor:
        """Observation -> (B, L + C)."""
        return self.network.encode(join(self.keys, obs))

    def encode_goal(self, obs: Any) -> Tensor:
        """Goal of an observation -> (B, L + C)."""
        return self.network.encode(join(self.keys, obs, goal=True))

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """One step: z (..., L + C), action (..., A) -> (..., L + C)."""
        return self.network.predict(z, action, self.task)

    def goal_features(self, z: Tensor) -> Tensor:
        """Latents (..., L + C) -> the numbers (..., m) in which distances are taken."""
        return z.index_select(-1, self._chosen)

    def stepper(self, rows: int, *, dtype: torch.dtype | None = None) -> Stepper:
        """``predict`` for ``rows`` latents in resident buffers, with the weights of this moment."""
        return _NormedStepper(self.network, self.task, rows, dtype) if self.network.norm.own else PredictStepper(self)


class _NormedStepper:
    """An :class:`MLPStepper` whose latents are finished by a :class:`LevelNorm` of the tasks' own numbers, in place."""

    def __init__(self, network: EideticWorldModel, task: int, rows: int, dtype: torch.dtype | None):
        self.network, self.task = network, task
        self.size = network.latent.size
        self._steps = MLPStepper(
            rows, self._affines, latent=self.size + network.parts[1], activation=network.activation.name, residual=True,
            dtype=dtype,
        )  # fmt: skip
        like, levels = self._steps.latents, len(network.latent.owner.unique())
        self._average = like.new_empty(self.size, levels)
        self._back, self._gain = (like.new_empty(levels, self.size) for _ in range(2))
        self._shift = like.new_empty(self.size)
        self._level = like.new_empty(rows, levels)
        self._centred, self._squares = (like.new_empty(rows, self.size) for _ in range(2))
        self._norm()

    @torch.no_grad()
    def _affines(self) -> list[Affine]:
        first, *rest = [affine for _, affine in self.network.weights(self.task)]
        of_actions = self.network.command.standardise
        weight, bias = rest[-1] if rest else first
        if (
            missing := self.size + self.network.parts[1] - len(weight)
        ) > 0:  # an old head of a network that was widened
            raise ConfigError(f"The head of task {self.task} lacks {missing} numbers of the latent; extract the task.")
        return [fold_action_scale(first, of_actions.mean, of_actions.scale), *rest]

    @torch.no_grad()
    def _norm(self) -> None:
        norm = self.network.norm
        assert norm.weight is not None and norm.bias is not None
        average, back = zip(*norm.averages(self._average), strict=True)
        levels = self._average.shape[1]
        self._average.copy_(torch.cat(average, 1)[:, :levels])
        self._back.copy_(torch.cat(back)[:levels])
        self._gain.copy_(self._back * norm.weight())
        self._shift.copy_(norm.bias())

    def pack(self) -> None:
        """Copy the weights of this moment, in place."""
        self._steps.pack()
        self._norm()

    def load(self, z: Tensor) -> None:
        self._steps.load(z)

    def step(self, action: Tensor) -> Tensor:
        z = self._steps.step(action)
        x = z[:, : self.size]
        mean = torch.mm(x, self._average, out=self._level)
        centred = torch.addmm(x, mean, self._back, alpha=-1, out=self._centred)
        square = torch.mm(torch.square(centred, out=self._squares), self._average, out=self._level)
        factor = torch.mm(square.add_(self.network.norm.eps).rsqrt_(), self._gain, out=self._squares)
        torch.addcmul(self._shift, centred, factor, out=x)
        return z


__all__ = ["FREE", "EideticWorldModel", "Features", "LevelNorm", "TaskModel", "join"]
