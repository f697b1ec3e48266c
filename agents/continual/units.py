"""Hidden units of an agent's networks: where their weights are, how active they are, and how one is made anew.

A hidden unit is an output of a dense layer that another dense layer reads, with an activation and maybe a LayerNorm in
between. Found are those of :class:`clbench.agents.networks.mlp.MLP`, :class:`clbench.agents.gcrl.networks.MLP`, the
encoders and predictors of :mod:`clbench.agents.jepa` that are built like the first, and ``nn.Sequential``, among them those
of Stable-Baselines3. Left out are convolutions, and units whose reader is another module (the last layer of an encoder).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clbench.agents.continual.compose import optimizers_of
from clbench.agents.continual.method import Learner, Method
from clbench.agents.gcrl.networks import MLP as StackedMLP
from clbench.agents.jepa.layers import StackedLayerNorm, StackedLinear
from clbench.agents.networks.mlp import MLP
from clbench.errors import ConfigError

PASSIVE = (nn.LayerNorm, nn.Dropout, nn.Identity)  # modules between two dense layers that are no activation


@dataclass(frozen=True)
class Part:
    """A parameter, read unit by unit: (E, n, k), k numbers for each of n units of each of E members (1 for a plain layer).

    Args:
        parameter: a weight (out, in) or (E, in, out), or one number per unit: (n,), (E, n) or (E, 1, n).
        role: ``in``: of weights into the units; ``out``: of weights out of them; ``each``: one number per unit.
    """

    parameter: nn.Parameter
    role: Literal["in", "out", "each"]

    def of(self, tensor: Tensor) -> Tensor:
        """A tensor of the parameter's shape as a view (E, n, k)."""
        t = tensor.detach()
        if self.role == "each":
            return t[None, :, None] if t.ndim == 1 else t[..., None] if t.ndim == 2 else t.mT
        if t.ndim == 2:
            return (t if self.role == "in" else t.mT)[None]
        return t.mT if self.role == "in" else t

    def back(self, values: Tensor) -> Tensor:
        """(E, n, 1) in a shape that broadcasts against the parameter."""
        ndim = self.parameter.ndim
        if self.role == "each":
            return values[0, :, 0] if ndim == 1 else values[..., 0] if ndim == 2 else values.mT
        if ndim == 2:
            return values[0] if self.role == "in" else values[0].mT
        return values.mT if self.role == "in" else values


@dataclass(frozen=True)
class Hidden:
    """The units between two dense layers.

    Args:
        weight: into the units.
        offsets: biases of the units, and offsets of their norm: 0 at the start.
        gains: of their norm: 1 at the start.
        outgoing: weights of the layers that read the units.
        readers: biases of these layers, (out,) or (E, ..., out), None where there is none.
        bound: fresh incoming weights are uniform in [-bound, bound].
        normed: a norm follows the activation.
    """

    weight: Part
    offsets: tuple[Part, ...]
    gains: tuple[Part, ...]
    outgoing: tuple[Part, ...]
    readers: tuple[nn.Parameter | None, ...]
    bound: float
    normed: bool

    @property
    def incoming(self) -> tuple[Part, ...]:
        return (self.weight, *self.offsets, *self.gains)

    @property
    def shape(self) -> tuple[int, int]:
        """E, n."""
        members, n, _ = self.weight.of(self.weight.parameter).shape
        return members, n

    def zeros(self) -> Tensor:
        """(E, n)."""
        p = self.weight.parameter
        return torch.zeros(self.shape, device=p.device, dtype=p.dtype)

    @torch.no_grad()
    def renew(self, units: Tensor, rng: torch.Generator, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Fresh incoming weights, no outgoing ones, and no memory of them in the optimisers (state of a parameter's
        shape: moments, utilities; Adam's count of steps is not a unit's own and stays).

        Args:
            units: (E, n) bool.
            rng: draws the weights.
            optimizers: of the agent.
        """
        index = units.nonzero(as_tuple=True)
        weight = self.weight.of(self.weight.parameter)
        draw = torch.rand(len(index[0]), weight.shape[2], generator=rng, device=rng.device)
        weight[index] = draw.mul_(2 * self.bound).sub_(self.bound).to(weight)
        for parts, value in ((self.offsets, 0.0), (self.gains, 1.0), (self.outgoing, 0.0)):
            for part in parts:
                part.of(part.parameter)[index] = value
        for part in (*self.incoming, *self.outgoing):
            for optimizer in optimizers:
                for kept in optimizer.state.get(part.parameter, {}).values():
                    if isinstance(kept, Tensor) and kept.shape == part.parameter.shape:
                        part.of(kept)[index] = 0.0

    @torch.no_grad()
    def hand_over(self, units: Tensor, mean: Tensor) -> None:
        """Add what ``units`` (E, n) bool give on average, ``mean`` (E, n), to the biases of the layers that read them."""
        given = torch.where(units, mean, 0.0)[:, None]  # (E, 1, n)
        for part, bias in zip(self.outgoing, self.readers, strict=True):
            if bias is not None:
                bias += (given @ part.of(part.parameter)).reshape(bias.shape)


# -- where they are ------------------------------------------------------------------------------------------------------

Watch = Callable[[Callable[[int, Tensor, int | None], None], int], None]  # (record(place, h, member), first place)


def find_units(agent: Any) -> list[Hidden]:
    """The hidden units of the networks that the agent trains, in a fixed order.

    Raises:
        ConfigError: there are none.
    """
    return [hidden for hiddens, _ in _chains(agent) for hidden in hiddens]


def _chains(agent: Any) -> list[tuple[list[Hidden], Watch]]:
    """The hidden layers of each network, and how to watch them."""
    trained = {id(p) for p in agent.trainables}
    modules = list(_modules(agent))
    heads: dict[int, Sequence[nn.Linear]] = {}  # first output layer -> all that read the same features
    for layers in (getattr(m, "output_layers", None) for m in modules):
        if layers:
            heads[id(layers[0])] = layers
    tails = _tails(modules)
    found: list[tuple[list[Hidden], Watch]] = []
    for module in modules:
        if isinstance(module, StackedMLP):
            chain = _stacked_chain(module)
        elif isinstance(module, nn.Sequential):
            chain = _sequential_chain(module, tails.get(id(module), []))
        elif isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "activation"):
            chain = _layers_chain(module, heads)
        else:
            continue
        if chain[0] and all(id(h.weight.parameter) in trained for h in chain[0]):  # not targets and other copies
            found.append(chain)
    if not found:
        raise ConfigError(
            "no hidden units were found in its networks: dense layers (MLP or nn.Sequential) with at least one hidden "
            "layer are looked for; set hidden layers, or choose a method that works on weights."
        )
    return found


def _modules(agent: Any) -> Iterator[nn.Module]:
    """All modules that the agent holds, also in the ``policy`` of what it holds, each once."""
    seen: set[int] = set()
    for value in vars(agent).values():
        for holder in (value, getattr(value, "policy", None)):
            for module in holder.modules() if isinstance(holder, nn.Module) else ():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module


def _tails(modules: Sequence[Any]) -> dict[int, list[nn.Linear]]:
    """The layers that read the end of a sequence elsewhere: in the policies of Stable-Baselines3."""
    tails: dict[int, list[nn.Linear]] = {}
    for module in modules:
        body = getattr(module, "mlp_extractor", None)
        if body is not None:  # PPO
            tails[id(body.policy_net)], tails[id(body.value_net)] = [module.action_net], [module.value_net]
        elif hasattr(module, "latent_pi"):  # the actor of SAC
            tails[id(module.latent_pi)] = [r for r in (module.mu, module.log_std) if isinstance(r, nn.Linear)]
    return tails


def _layers_chain(module: Any, heads: dict[int, Sequence[nn.Linear]]) -> tuple[list[Hidden], Watch]:
    """``layers``, ``norms``, ``activation``. Our MLPs normalise after the activation, those of the world models before."""
    layers, after = list(module.layers), isinstance(module, MLP)
    hiddens: list[Hidden] = []
    if not all(isinstance(layer, nn.Linear | StackedLinear) for layer in layers):
        return hiddens, lambda record, first: None
    for i, (layer, reader) in enumerate(zip(layers[:-1], layers[1:], strict=True)):
        norm = module.norms[i] if i < len(module.norms) else None
        hiddens.append(_hidden(layer, norm, heads.get(id(reader), [reader]), xavier=after, after=after))

    def watch(record: Callable[[int, Tensor, int | None], None], first: int) -> None:
        def watch_layer(i: int) -> None:
            mine = layers[i]

            def hook(layer: nn.Module, args: Any, z: Tensor) -> None:
                if layer is mine and z.requires_grad:
                    z = z.detach()
                    h = module.activation(z if after else module.norms[i](z))
                    record(first + i, h, None)

            mine.register_forward_hook(hook)

        for i in range(len(hiddens)):
            watch_layer(i)

    return hiddens, watch


def _sequential_chain(module: nn.Sequential, tail: Sequence[nn.Linear]) -> tuple[list[Hidden], Watch]:
    """Dense layers of a sequence with nothing but activations, norms and dropout between them, and behind the last one if
    the layers ``tail`` read the sequence."""
    parts = [*module, *tail[:1]]
    dense = [i for i, part in enumerate(parts) if isinstance(part, nn.Linear)]
    hiddens: list[Hidden] = []
    read_by: list[nn.Module] = []  # the module that reads what the activation gives
    for i, j in zip(dense[:-1], dense[1:], strict=True):
        between = parts[i + 1 : j]
        active = [k for k, part in enumerate(between) if not isinstance(part, PASSIVE)]
        norms = [k for k, part in enumerate(between) if isinstance(part, nn.LayerNorm)]
        simple = all(isinstance(p, PASSIVE) or next(p.parameters(), None) is None for p in between)
        if len(active) == 1 and len(norms) <= 1 and simple:
            after = bool(norms) and norms[0] > active[0]
            norm = between[norms[0]] if norms else None
            hiddens.append(_hidden(parts[i], norm, tail if j == len(module) else [parts[j]], xavier=False, after=after))
            read_by.append(parts[i + 1 + active[0] + 1])

    def watch(record: Callable[[int, Tensor, int | None], None], first: int) -> None:
        def watch_reader(place: int, mine: nn.Module) -> None:
            def hook(reader: nn.Module, args: tuple[Tensor, ...]) -> None:
                if reader is mine and args[0].requires_grad:
                    record(place, args[0], None)

            mine.register_forward_pre_hook(hook)

        for k, reader in enumerate(read_by):
            watch_reader(first + k, reader)

    return hiddens, watch


def _stacked_chain(module: StackedMLP) -> tuple[list[Hidden], Watch]:
    """Kernels (E, in, out) without modules of their own: the activation is watched, which is called once per hidden layer
    (of each member, one after the other, on a CPU)."""
    kernels, biases, gains, offsets = (list(g) for g in (module.kernels, module.biases, module.scales, module.shifts))
    hiddens = []
    for i, (kernel, reader) in enumerate(zip(kernels[:-1], kernels[1:], strict=True)):
        own = [biases[i], *(offsets[i : i + 1])]
        hiddens.append(
            Hidden(
                Part(kernel, "in"), tuple(Part(p, "each") for p in own),
                tuple(Part(p, "each") for p in gains[i : i + 1]), (Part(reader, "out"),), (biases[i + 1],),
                (6 / (kernel.shape[1] + kernel.shape[2])) ** 0.5, bool(gains),
            )
        )  # fmt: skip
    count = len(hiddens)

    def watch(record: Callable[[int, Tensor, int | None], None], first: int) -> None:
        activation, calls = module.activation, [0]

        def begin(called: nn.Module, args: Any) -> None:
            calls[0] = 0 if called is module else -(10**9)  # a copy of the network does not count

        def watched(z: Tensor) -> Tensor:
            h = activation(z)
            place, calls[0] = calls[0], calls[0] + 1
            if place >= 0 and h.requires_grad:
                one_by_one = module.members is not None and not h.is_cuda
                record(first + place % count, h, place // count if one_by_one else None)
            return h

        if count:
            module.register_forward_pre_hook(begin)
            module.activation = watched

    return hiddens, watch


def _hidden(layer: Any, norm: Any, readers: Sequence[Any], *, xavier: bool, after: bool) -> Hidden:
    """Of a dense layer, its norm and the dense layers that read it."""
    weight = layer.weight
    fan_in, n = (weight.shape[1], weight.shape[2]) if weight.ndim == 3 else (weight.shape[1], weight.shape[0])
    normed = isinstance(norm, nn.LayerNorm | StackedLayerNorm)
    gain, offset = (norm.weight, norm.bias) if normed else (None, None)
    return Hidden(
        weight=Part(weight, "in"),
        offsets=tuple(Part(p, "each") for p in (layer.bias, offset) if p is not None),
        gains=() if gain is None else (Part(gain, "each"),),
        outgoing=tuple(Part(r.weight, "out") for r in readers),
        readers=tuple(r.bias for r in readers),
        bound=(6 / (fan_in + n)) ** 0.5 if xavier else fan_in**-0.5,  # as mlp.dense, or as torch
        normed=normed and after,
    )


# -- how active they are --------------------------------------------------------------------------------------------------


class Activity:
    """Sums of ``|h|`` and ``h`` over the rows that the agent's networks saw in passes with gradients.

    Args:
        agent: its networks are watched from now on.
    """

    def __init__(self, agent: Any):
        if getattr(agent.config, "compile", False) or getattr(agent.config, "updates_per_graph", 0) > 1:
            raise ConfigError("hidden units cannot be watched in compiled or recorded updates; set compile to False and "
                              "updates_per_graph to 0.")  # fmt: skip
        self.hiddens: list[Hidden] = []
        self.on = False
        for hiddens, watch in _chains(agent):
            watch(self._record, len(self.hiddens))
            self.hiddens += hiddens
        self.size = [h.zeros() for h in self.hiddens]
        self.value = [h.zeros() for h in self.hiddens]
        self.rows = [0] * len(self.hiddens)

    def _record(self, place: int, h: Tensor, member: int | None) -> None:
        """Activations (..., n) of a plain layer or of one member, or (E, ..., n) of all."""
        if not self.on:
            return
        h = h.detach()
        size, value = self.size[place], self.value[place]
        together = member is None and len(size) > 1
        h = h.reshape(len(size) if together else 1, -1, h.shape[-1])
        into = slice(None) if member is None else slice(member, member + 1)
        size[into] += h.abs().sum(1)
        value[into] += h.sum(1)
        self.rows[place] += h.shape[1] if not member else 0

    def take(self, place: int) -> tuple[Tensor, Tensor] | None:
        """Means of ``|h|`` and ``h``, (E, n) each, since the last call; None where no row was seen."""
        rows = self.rows[place]
        if rows == 0:
            return None
        means = self.size[place] / rows, self.value[place] / rows
        self.size[place].zero_()
        self.value[place].zero_()
        self.rows[place] = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"size": self.size, "value": self.value, "rows": self.rows})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in ((self.size, state["size"]), (self.value, state["value"])):
            for into, values in zip(own, saved, strict=True):
                into.copy_(values)
        self.rows = [int(n) for n in state["rows"]]


class UnitMethod(Method):
    """Base of methods that renew hidden units by their activity in the agent's own updates.

    Counted are the rows of the agent's loss, replayed ones among them; not acting, targets, or other methods' passes.
    Agents that hide their loss: every pass with gradients.

    Raises:
        ConfigError: the agent has no hidden units that are found.
    """

    def __init__(self, config: Any, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.activity = Activity(learner.agent)
        self.activity.on = learner.own_loss is None
        self._next = False  # whether the agent's loss comes next, and not another method's call of it
        if learner.own_loss is not None:
            learner.own_loss = self._watching(learner.own_loss)

    def _watching(self, own_loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The agent's loss, during which activity is counted if the agent itself asks for it."""

        def loss(batch: Any) -> Any:
            self.activity.on, self._next = self._next, False
            try:
                return own_loss(batch)
            finally:
                self.activity.on = False

        return loss

    def replay(self, batch: Any) -> None:
        self._next = True

    def rebuilt(self) -> None:
        self.activity = Activity(self.learner.agent)
        self.activity.on = self.learner.own_loss is None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return optimizers_of(self.learner.agent)

    def places(self, params: Sequence[nn.Parameter]) -> list[int]:
        """The hidden layers whose incoming weights are among ``params``."""
        mine = {id(p) for p in params}
        return [i for i, h in enumerate(self.activity.hiddens) if id(h.weight.parameter) in mine]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "activity": self.activity.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.activity.load_state_dict(state["activity"])
