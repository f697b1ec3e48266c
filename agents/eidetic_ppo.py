"""Eidetic PPO: an online agent that forgets nothing of a task once it is finished.

Proximal policy optimisation (Schulman et al. 2017, of Stable-Baselines3) whose actor is an eidetic network (Dronen and
Balestriero 2025, arXiv 2502.09500): the units that a task keeps are stored for good. ::

    start_task    fresh free units, a new head, a new critic and optimiser
    learn         rollouts and PPO; at the end units are killed, and what is left imitates the policy that there was before
    finish_task   commit: what is alive is stored and never changes again

Protected is exactly what acts when a finished task is met again: the trunk, its head and, for continuous actions, its
standard deviation. The critic only serves learning and owns nothing. Nothing that is estimated from data stands between
observation and action (no running normaliser), so there is nothing else that could drift.

Pruning needs no environment. It distils: the outputs of the trained policy on the states that it visited last are the
teacher's, and KL(teacher || policy) is what the smaller network is trained and judged by.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from clbench.agents.networks.eidetic.acting import ActsByTask, RouterName, flat, new_router
from clbench.agents.networks.eidetic.layers import Heads, Linear
from clbench.agents.networks.eidetic.network import EideticNetwork, Exhausted
from clbench.agents.networks.eidetic.ownership import Axis, OwnedParameter, Space, owned_parameters
from clbench.agents.networks.eidetic.policy import EideticPolicy, prepare
from clbench.agents.networks.eidetic.pruning import Pruner, Pruning
from clbench.agents.networks.eidetic.verify import evaluating
from clbench.agents.networks.encoders import ConvEncoder, Parts, Scale
from clbench.agents.networks.mlp import MLP
from clbench.agents.sb3.algorithms import SB3PPO
from clbench.agents.sb3.bridge import to_numpy
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.errors import ConfigError, ContractError

PROBES = 64  # observations per task that are kept to prove that nothing has changed
YIELDS = 50  # of a whole distillation; in between it cannot be interrupted
HIDDEN_GAIN = math.sqrt(2)  # of orthogonal initial weights, as in SB3
HEAD_GAIN = 0.01  # a new head starts near zero, as in SB3: whatever features it finds, it explores


# -- networks -------------------------------------------------------------------------------------------------------------


class Numbers(Parts):
    """Observations as :class:`Parts` gives them, but bounded numbers divided by their largest magnitude and not centred.

    One-hot vectors stay sparse, so that a step moves the weights of what was seen and no others. Like all of ``Parts`` this
    depends on the space alone.
    """

    def __init__(self, space: Any):
        super().__init__(space)
        for scale in self.flats:
            if isinstance(scale, Scale):
                scale.radius += scale.center.abs()
                scale.center.zero_()


@torch.no_grad()
def make_orthogonal(network: EideticNetwork, rng: torch.Generator) -> None:
    """Orthogonal rows, and biases of 0, for all units that no task owns; what is owned is stored elsewhere."""
    heads = {id(p) for h in network.all_heads() for p in h.modules()}
    for _, parameter in owned_parameters(network):
        if not parameter.bound:  # gains, offsets, standard deviations: constant at first
            continue
        free = parameter.out[1].expand(lambda s: s.free).nonzero()[:, 0]
        if parameter.inputs is None:
            parameter.value[free] = 0.0
        elif len(free):
            fresh = torch.empty(len(free), parameter.value[0].numel(), device=rng.device)
            nn.init.orthogonal_(fresh, HEAD_GAIN if id(parameter) in heads else HIDDEN_GAIN, generator=rng)
            parameter.value[free] = fresh.reshape(-1, *parameter.value.shape[1:]).to(parameter.value)


class GaussianHeads(Heads):
    """Heads for continuous actions: a mean, linear in the features, and a standard deviation of each action per task.

    ``log_std`` (A,) belongs to the outputs of its head, so it is committed, hashed and kept with them.
    """

    def open(self, *arguments: Any, **options: Any) -> Linear:
        layer = super().open(*arguments, **options)
        layer.log_std = OwnedParameter((self.size,), (0, Axis((self.spaces[-1],))), constant=0.0).to(  # type: ignore[arg-type]
            layer.weight.value
        )
        return layer


class GaussianPolicy(EideticPolicy):
    """As :class:`EideticPolicy`, giving mean (B, A) and log standard deviation (B, A)."""

    def heads(self, inputs: Space | Sequence[Space], size: int) -> Heads:
        return GaussianHeads(inputs, size, transfer=self.transfer)

    def forward(self, *inputs: Tensor, task: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        mean = super().forward(*inputs, task=task)
        return mean, self.head.layers[task].log_std().expand_as(mean)  # type: ignore[operator]


class Critic(nn.Module):
    """Prepared inputs -> values (B, 1): images through convolutions, an MLP on everything."""

    def __init__(self, parts: Parts, hidden: Sequence[int], *, rng: torch.Generator):
        super().__init__()
        self.vectors = int(parts.flat_size > 0)
        self.convs = nn.ModuleList(ConvEncoder(*shape, rng=rng, high=1.0) for shape in parts.image_shapes)
        size = parts.flat_size + sum(int(m.size) for m in self.convs)  # type: ignore[arg-type]
        self.mlp = MLP([size, *hidden, 1], rng=rng, activation=torch.tanh)
        for layer in self.mlp.layers:
            gain = 1.0 if layer is self.mlp.layers[-1] else HIDDEN_GAIN
            nn.init.orthogonal_(layer.weight, gain, generator=rng)  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor) -> Tensor:
        vectors, images = inputs[: self.vectors], inputs[self.vectors :]
        return self.mlp(torch.cat([*vectors, *(f(x) for f, x in zip(self.convs, images, strict=True))], 1))


class EideticActorCritic(ActorCriticPolicy):
    """What SB3's PPO calls: actions, values, log probabilities and entropies of the task under way.

    Args:
        observation_space, action_space, lr_schedule: from SB3.
        hidden: of the actor.
        critic_hidden: of the critic.
        actor: further options of :class:`EideticPolicy`.
        options: further ones from SB3.
    """

    actor: EideticPolicy
    critic: Critic

    def __init__(
        self, observation_space: Any, action_space: Any, lr_schedule: Any, *, hidden: Sequence[int],
        critic_hidden: Sequence[int], actor: Mapping[str, Any], **options: Any,
    ) -> None:  # fmt: skip
        self.sizes = (tuple(hidden), tuple(critic_hidden), dict(actor))
        super().__init__(observation_space, action_space, lr_schedule, **options)

    def _build(self, lr_schedule: Any) -> None:
        """Called by SB3's constructor in place of its own networks."""
        hidden, _, options = self.sizes
        self.parts = Numbers(self.observation_space)
        discrete = isinstance(self.action_space, Discrete)
        outputs = int(self.action_space.n) if discrete else int(np.prod(self.action_space.shape or ()))  # type: ignore[attr-defined]
        self.actor = (EideticPolicy if discrete else GaussianPolicy)(self.parts, outputs, hidden, **options)
        self._lr = lr_schedule
        self.begin_task()

    def begin_task(self) -> None:
        """Free units and a head for the next task, unless one has begun; a new critic and a new optimiser in any case.

        Draws from the process-wide generator, as all of SB3 does.
        """
        rng = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        if not self.actor.begun:
            self.actor.begin_task(rng)
            make_orthogonal(self.actor, rng)
        self.critic = Critic(self.parts, self.sizes[1], rng=rng).to(self.device)
        self.renew_optimizer()

    def renew_optimizer(self) -> None:
        self.optimizer = self.optimizer_class(self.parameters(), lr=self._lr(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """The actor may have other heads then, and an optimiser has to know them."""
        self.actor.restore({k.removeprefix("actor."): v for k, v in state_dict.items() if k.startswith("actor.")})
        answer = super().load_state_dict(state_dict, *args, **options)
        self.renew_optimizer()
        return answer

    # -- what SB3 asks for ----------------------------------------------------------------------------------------------

    def inputs(self, obs: Any) -> list[Tensor]:
        """Observations as SB3 has them -> the inputs of both networks."""
        return prepare(self.parts, obs)

    def distribution(self, inputs: Sequence[Tensor]) -> Distribution:
        """Of the actions of the task under way (or the last one)."""
        output = self.actor(*inputs, task=self.actor.task)
        if isinstance(output, tuple):
            return self.action_dist.proba_distribution(*output)  # type: ignore[call-arg]
        return self.action_dist.proba_distribution(action_logits=output)  # type: ignore[call-arg]

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.inputs(obs)
        distribution = self.distribution(inputs)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        return actions.reshape((-1, *(self.action_space.shape or ()))), self.critic(*inputs), log_prob

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = self.inputs(obs)
        distribution = self.distribution(inputs)
        return self.critic(*inputs), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        return self.distribution(self.inputs(obs))

    def predict_values(self, obs: Any) -> Tensor:
        return self.critic(*self.inputs(obs))


# -- distillation: pure functions -----------------------------------------------------------------------------------------
# outputs of a policy are logits (B, A), or mean and log standard deviation (B, A) each


def divergence(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """KL(teacher || student) per row, (B,), in nats."""
    if len(teacher) == 1:
        p, q = teacher[0].log_softmax(1), student[0].log_softmax(1)
        return (p.exp() * (p - q)).sum(1)
    (mean, log_std), (other, other_log_std) = teacher, student
    ratio = ((2 * log_std).exp() + (mean - other).square()) / (2 * other_log_std).exp()
    return (other_log_std - log_std + 0.5 * (ratio - 1)).sum(1)


def marginal(teacher: Sequence[Tensor]) -> list[Tensor]:
    """The best policy that ignores what it sees, (1, A): mean probabilities, or the Gaussian with the same moments."""
    if len(teacher) == 1:
        return [teacher[0].softmax(1).mean(0, keepdim=True).clamp_min(1e-12).log()]
    mean, log_std = teacher
    variance = (2 * log_std).exp().mean(0, keepdim=True) + mean.var(0, correction=0, keepdim=True)
    return [mean.mean(0, keepdim=True), 0.5 * variance.log()]


def quality(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> float:
    """1 - KL(teacher || student) / KL(teacher || marginal): 1 is the teacher itself, 0 a policy that sees nothing."""
    trivial = divergence(teacher, marginal(teacher)).mean()
    return float(1 - divergence(teacher, student).mean() / trivial.clamp_min(1e-8))


def as_list(output: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


# -- the agent ------------------------------------------------------------------------------------------------------------


class EideticPPO(ActsByTask, SB3PPO):
    """PPO with zero forgetting.

    Where the stream reveals task ids the right head answers, and what a finished task does is constant, bit for bit. Where
    it reveals boundaries only, a router decides (see :mod:`clbench.agents.networks.eidetic.routing`), which can be wrong.
    A task that comes back with an id that was finished is kept as it is, and nothing is trained.

    Raises:
        ConfigError: the action space is neither Box nor Discrete, or an option is out of range.
        CapacityExhausted: a task begins, and no unit is free.
    """

    name = "eidetic-ppo"
    requires = frozenset({"env", "boundaries"})
    refuses_methods = "its layers protect finished tasks themselves"

    @dataclass
    class Config(SB3PPO.Config):
        """Options; see :class:`SB3PPO.Config` for those of PPO.

        Args:
            batch_size, ent_coef: larger than SB3's: the actor is larger, and a new task has to be explored anew.
            hidden: widths of the actor's hidden layers, shared by all tasks.
            critic_hidden: widths of the critic's hidden layers; there is one critic at a time.
            norm: before each activation of the actor: none or prefix (PrefixNorm).
            activation: of the actor: relu, tanh, gelu, silu, mish, elu or sigmoid.
            pruning: what is pruned; shares of the budget are shares of ``distil_updates``.
            distil_updates: gradient updates of a task that prune and distil; they take no environment steps. At most one
                per observation that was kept.
            distil_lr: their learning rate.
            distil_batch: their batch size.
            visited: so many of the latest observations of a task are kept until it is finished.
            transfer: let units read those of older tasks.
            exhausted: what to do when no unit is free: raise, train heads alone (head-only), or add units (widen).
            router: who decides where no task id is given: novelty, trained (keeps examples of all tasks) or newest.
        """

        batch_size: int = 256
        ent_coef: float = 0.01
        hidden: tuple[int, ...] = (256, 256)
        critic_hidden: tuple[int, ...] = (64, 64)
        norm: Literal["none", "prefix"] = "none"
        activation: str = "tanh"
        pruning: Pruning = field(default_factory=lambda: Pruning(tasks=5, train=0.0, recover=0.04, finish=0.3))
        distil_updates: int = 1000
        distil_lr: float = 1e-3
        distil_batch: int = 256
        visited: int = 4096
        transfer: bool = True
        exhausted: Exhausted = "raise"
        router: RouterName = "novelty"

        def __post_init__(self) -> None:
            for name in ("lr", "distil_lr", "distil_updates", "distil_batch", "visited"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
            for name in ("hidden", "critic_hidden"):
                if not getattr(self, name) or any(width < 1 for width in getattr(self, name)):
                    raise ConfigError(f"{name} must hold at least one positive layer size, got {getattr(self, name)}.")

    config: EideticPPO.Config

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        if not isinstance(spaces.action, Box | Discrete):
            raise ConfigError(f"Agent {self.name!r} needs Box or Discrete actions, but got {spaces.action}.")
        super().__init__(spaces, config, device=device, rng=rng)
        with self._own_generators():
            draw = functools.partial(torch.randint, 2**62, ())
            self._init_tasks(new_router(config.router, self.policy.parts, draw, device))
        self.visited: Any = None  # the latest observations of the task under way, as SB3 has them
        self.pruner: Pruner | None = None  # from the last rollout of a task until it is finished
        self.distiller: torch.optim.Optimizer | None = None
        self.teacher: list[Tensor] = []  # what the trained policy gives for the observations in `visited`
        self.report: dict[str, float] = {}  # of the last rollout, held back until the distillation is over

    def _policy(self) -> tuple[Any, dict[str, Any]]:
        c = self.config
        options = {
            "norm": c.norm, "activation": c.activation, "transfer": c.transfer, "exhausted": c.exhausted,
        }  # fmt: skip
        return EideticActorCritic, {"hidden": c.hidden, "critic_hidden": c.critic_hidden, "actor": options}

    @property
    def policy(self) -> EideticActorCritic:
        return self.model.policy

    @property
    def network(self) -> EideticPolicy:
        """The actor."""
        return self.policy.actor

    # -- learning -----------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        """A new task; or one that was finished, whose id the stream reveals: it is kept, and nothing is trained."""
        super().start_task(task)
        if self._comes_back(task.id):
            return
        with self._own_generators():
            self.policy.begin_task()
        self.ids = [*self.ids[: self.network.task], task.id]
        self._forget_data()

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` environment steps, counted over all parallel environments; distillation draws with ``rng``.

        The last rollout is reported only when the distillation after it is over: until then the phase's budget counts as
        not quite spent, so the run can be stopped, and taken up again, in the midst of the distillation.
        """
        if experience.env is None:
            raise ContractError(f"Agent {self.name!r} learns by acting, but the experience of this phase has no env.")
        if self.known is not None:
            yield {"step": budget, "skipped": float(budget)}
            return
        before = 0  # steps that have been reported
        if not (self.pruner is not None and self._left == budget):
            for metrics in super().learn(experience, budget, rng=rng):
                self._visit()
                if metrics["step"] + self._collection * self.bridge.num_envs <= budget:
                    before = int(metrics["step"])
                    yield metrics
                else:
                    self.report = {k: v for k, v in metrics.items() if k != "step"}
            self._left = budget - before
            self._begin_distillation()
        rollout = self._collection * self.bridge.num_envs
        last = before + (budget - before) // rollout * rollout
        for metrics in self._distil(rng):
            yield {"step": before, **metrics}
        metrics, self.report, self._left = {**self.report, **self._kept_units()}, {}, 0
        yield {"step": last, **metrics}

    def _visit(self) -> None:
        """Keep what the rollout has seen; SB3 has its rows in one axis by now, one environment after the other."""
        seen = self.model.rollout_buffer.observations

        def newest(name: str | None) -> Tensor:
            rows = torch.from_numpy(np.array(seen if name is None else seen[name])).to(self.device)
            before = self.visited if name is None or self.visited is None else self.visited[name]
            return (rows if before is None else torch.cat([before, rows]))[-self.config.visited :].clone()

        self.visited = {k: newest(k) for k in seen} if isinstance(seen, dict) else newest(None)

    # -- pruning by distillation --------------------------------------------------------------------------------------

    def _begin_distillation(self) -> None:
        """The policy as it is now becomes the teacher."""
        with torch.no_grad(), evaluating(self.network):
            inputs = self.policy.inputs(self.visited)
            self.teacher = [y.clone() for y in as_list(self.network(*inputs, task=self.network.task))]
        self.pruner = Pruner(self.network, self.config.pruning)
        self.pruner.begin(min(self.config.distil_updates, len(inputs[0])))
        self.distiller = self._new_distiller()

    def _new_distiller(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=self.config.distil_lr)

    def _distil(self, rng: torch.Generator) -> Iterator[dict[str, float]]:
        """What is left of the distillation."""
        assert self.pruner is not None and self.distiller is not None
        pruner, distiller, size = self.pruner, self.distiller, self.config.distil_batch
        inputs = self.policy.inputs(self.visited)
        train, held_out = split(len(inputs[0]), self.device)
        every = max(1, math.ceil(pruner.total / YIELDS))

        def loss(rows: Tensor) -> Tensor:
            student = as_list(self.network(*(x[rows] for x in inputs), task=self.network.task))
            return divergence([y[rows] for y in self.teacher], student).mean()

        @torch.no_grad()
        def judged() -> float:
            with evaluating(self.network):
                student = as_list(self.network(*(x[held_out] for x in inputs), task=self.network.task))
            return quality([y[held_out] for y in self.teacher], student)

        def losses() -> list[Any]:
            return [lambda r=rows: loss(r) for rows in train.chunk(math.ceil(len(train) / 1024))]

        self.network.train()
        report: dict[str, float] = {}
        while pruner.left:
            rows = train[torch.randint(len(train), (size,), generator=rng, device=rng.device).to(self.device)]
            value = loss(rows)
            distiller.zero_grad()
            value.backward()
            distiller.step()
            self.updates += 1
            self.samples += size
            report |= pruner.advance(quality=judged, losses=losses, optimizer=distiller, rng=rng)
            if pruner.left and pruner.done % every == 0:
                yield {"distil_kl": float(value.detach()), **report}
                report = {}
        self.report = {**self.report, **report, "quality": judged()}

    def _kept_units(self) -> dict[str, float]:
        """Share of all hidden units that the task takes."""
        spaces = self.network.prunable().values()
        return {"units": sum(int(s.candidates.sum()) for s in spaces) / sum(s.size for s in spaces)}

    def finish_task(self) -> None:
        """Commit. All that is alive belongs to the task from now on."""
        if self.known is not None or not self.network.begun:
            self.known = None
            return
        probes = None
        if self.visited is not None:
            if self.pruner is None:
                self._begin_distillation()
            assert self.pruner is not None
            if self.pruner.left:  # learn was closed before its end; the next task needs room all the same
                for _ in self._distil(torch.Generator(self.device).manual_seed(self.network.task)):
                    pass
            inputs = self.policy.inputs(self.visited)
            rows = torch.linspace(0, len(inputs[0]) - 1, min(PROBES, len(inputs[0])), device=self.device).long()
            probes = [x[rows].clone() for x in inputs]
            if self.router is not None and self.ids[-1] is None:
                self.router.add(flat(inputs))
        self.network.commit(probes)
        self._forget_data()

    def _forget_data(self) -> None:
        """Nothing of a task's data outlives it but its probes."""
        self.visited, self.pruner, self.distiller, self.teacher, self.report = None, None, None, [], {}

    # -- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The most likely action (or with ``explore`` a drawn one) of the task that ``task`` names, or the router finds."""
        inputs = self.policy.inputs(self.policy.obs_to_tensor(to_numpy(obs))[0])
        chosen = self.route(inputs, task)
        parts: list[Tensor] = []
        for k in chosen.unique().tolist():
            rows = chosen == k
            found = as_list(self._output([x[rows] for x in inputs], k))
            parts = parts or [y.new_zeros(len(chosen), y.shape[1]) for y in found]
            for whole, y in zip(parts, found, strict=True):
                whole[rows] = y
        return self._actions(parts, rng, explore), memory

    def _actions(self, output: Sequence[Tensor], rng: torch.Generator, explore: bool) -> Tensor:
        """Outputs -> actions as the environment takes them."""
        if len(output) == 1:
            if explore:
                probabilities = output[0].softmax(1).to(rng.device)
                actions = torch.multinomial(probabilities, 1, generator=rng)[:, 0].to(self.device)
            else:
                actions = output[0].argmax(1)
            return actions + self.bridge.first_action
        mean, log_std = output
        if explore:
            mean = mean + log_std.exp() * torch.randn(mean.shape, generator=rng, device=rng.device).to(mean)
        space = self.spaces.action
        low, high = (torch.as_tensor(np.asarray(b, np.float32), device=self.device) for b in (space.low, space.high))  # type: ignore[attr-defined]
        return mean.reshape(-1, *(space.shape or ())).clamp(low, high)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        distilling = None
        if self.pruner is not None and self.distiller is not None:
            distilling = {"pruner": self.pruner.state_dict(), "optimizer": copy.deepcopy(self.distiller.state_dict())}
        return {
            **super().state_dict(), **self._tasks_state(),
            "visited": copy.deepcopy(self.visited), "teacher": [y.clone() for y in self.teacher],
            "distilling": distilling, "report": dict(self.report),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_tasks(state)
        self.report = dict(state["report"])
        self.visited, self.teacher = copy.deepcopy(state["visited"]), [y.clone() for y in state["teacher"]]
        self.pruner = self.distiller = None
        if state["distilling"] is not None:
            self.pruner, self.distiller = Pruner(self.network, self.config.pruning), self._new_distiller()
            self.pruner.load_state_dict(state["distilling"]["pruner"])
            self.distiller.load_state_dict(copy.deepcopy(state["distilling"]["optimizer"]))


def split(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows to distil on and rows to judge on: every eighth of 40 blocks, as neighbours in time are nearly the same."""
    rows = torch.arange(count, device=device)
    out = rows // max(1, count // 40) % 8 == 7
    return (rows[~out], rows[out]) if bool(out.any()) else (rows, rows)
