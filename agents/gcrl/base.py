"""One loop of updates for the offline goal-conditioned agents; what sets them apart is in their own files.

Goals are drawn anew for every batch, for the value and the actor independently (OGBench's sampler, see
:meth:`clbench.data.dataset.OfflineDataset.sample_goals`). "At the goal" means that the goal is this very row of the data.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents.gcrl.compiled import compiled_loss
from clbench.agents.gcrl.graphs import UpdateGraph, recordable
from clbench.agents.gcrl.networks import SIGN, Categorical, Distribution, Input, Inputs, action_size
from clbench.agents.gcrl.presets import PRESETS, preset_of
from clbench.agents.networks.encoders import Scale
from clbench.agents.networks.mlp import count_parameters
from clbench.agents.networks.outputs import Output
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.data.dataset import GoalSampling, OfflineDataset
from clbench.errors import ConfigError, ContractError, DataError, unknown_name

FIT_ROWS = 10_000  # from which the inputs are normalised
KEPT_BYTES = 2**27  # of data that are encoded once instead of batch by batch

Preset = Literal[
    "small", "small-pointmaze", "ogbench",
    "pointmaze", "pointmaze-giant", "antmaze", "antmaze-giant", "antmaze-explore", "humanoidmaze",
    "antsoccer", "pointmaze-stitch", "pointmaze-giant-stitch", "antmaze-stitch", "antmaze-giant-stitch",
    "humanoidmaze-stitch", "antsoccer-stitch", "manipulation-play", "manipulation-noisy", "powderworld", "two-rooms",
    "diverse-maze",
]  # fmt: skip


@dataclass(frozen=True)
class GoalBatch:
    """``B`` transitions with relabelled goals.

    Args:
        s, s_next: states.
        g_v, g_a: goals of the value and of the actor.
        a: actions as the networks take them: (B, A) scaled to [-1, 1], or (B,) classes from 0.
        at_goal: (B,) 1 where the value's goal is the state itself.
        achieved, achieved_next: the states as goals; the states themselves where both are of one space.
        context: what a state has beside what is compared with goals.
        more: what only some agents draw, by name.
    """

    s: Input
    s_next: Input
    g_v: Input
    g_a: Input
    a: Tensor
    at_goal: Tensor
    achieved: Input
    achieved_next: Input
    context: Input
    more: Mapping[str, Input]

    def __len__(self) -> int:
        return len(self.a)


@dataclass
class GoalConfig:
    """Options of every offline goal-conditioned agent; ``None`` is the value of the preset.

    Args:
        preset: ``small`` (ours, for a CPU; ``small-pointmaze`` with the alphas of OGBench's point mazes), ``ogbench`` (the
            reference's defaults), or a family of data sets of its published table; ``two-rooms`` and ``diverse-maze`` are
            PLDM's choices for its comparison.
        hidden: sizes of the hidden layers of all networks.
        lr: learning rate of Adam.
        batch_size: transitions per update.
        discount: gamma; also of geometric goals.
        normalise: centre and scale states and goals by statistics of the first data. The reference does not.
        frequencies: sines and cosines per number of states and goals. The reference has none.
        value_p_current, value_p_trajectory, value_p_random: how the value's goals are drawn; they sum to 1.
        value_geometric: the value's trajectory goals at a geometric distance instead of uniformly.
        actor_p_trajectory, actor_p_random: how the actor's goals are drawn; they sum to 1.
        learn_std: a learned standard deviation per coordinate of continuous actions, in place of 1.
        reset_optimizer: start every task with fresh moments of Adam.
        log_every: updates between two reports of the losses.
        compile: the loss with ``torch.compile``; results are equal up to rounding. The first update takes long.
        updates_per_graph: K > 1: on a CUDA device, K updates are recorded as one CUDA graph and replayed in one launch. The
            agent then yields after every K updates; what is left of a budget is done one by one. 0 or 1, and on a CPU any
            number: one by one.
    """

    preset: Preset = "small"
    hidden: tuple[int, ...] | None = None
    lr: float | None = None
    batch_size: int | None = None
    discount: float | None = None
    normalise: bool | None = None
    frequencies: int | None = None
    value_p_current: float | None = None
    value_p_trajectory: float | None = None
    value_p_random: float | None = None
    value_geometric: bool | None = None
    actor_p_trajectory: float | None = None
    actor_p_random: float | None = None
    learn_std: bool | None = None
    reset_optimizer: bool = True
    log_every: int = 50
    compile: bool = False
    updates_per_graph: int = 0

    agent = ""  # whose column of the table of presets

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown_name("preset", str(self.preset), PRESETS, where=f"agent {self.agent!r}")
        for name, value in preset_of(self.agent, self.preset).items():
            if hasattr(self, name) and getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("lr", "batch_size", "log_every", "alpha", "high_alpha", "low_alpha", "subgoal_steps", "rep_dim",
                     "latent_dim", "skill_dim"):  # fmt: skip
            value = getattr(self, name, None)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}.")
        if self.updates_per_graph < 0:
            raise ConfigError(f"updates_per_graph must be at least 0, got {self.updates_per_graph}.")
        for name in ("expectile", "skill_expectile"):
            value = getattr(self, name, None)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {value}.")
        tau = getattr(self, "tau", None)
        if tau is not None and not 0 < tau <= 1:
            raise ConfigError(f"tau must be in (0, 1], got {tau}.")
        if self.hidden is not None and (not self.hidden or min(self.hidden) < 1):
            raise ConfigError(f"hidden must hold at least one positive layer size, got {self.hidden}.")
        _ = self.value_sampling, self.actor_sampling  # they check the probabilities

    @property
    def value_sampling(self) -> GoalSampling:
        return _sampling(
            self.value_p_current, self.value_p_trajectory, self.value_p_random, self.value_geometric, self.discount
        )

    @property
    def actor_sampling(self) -> GoalSampling:
        return _sampling(0.0, self.actor_p_trajectory, self.actor_p_random, False, self.discount)


def _sampling(current: Any, trajectory: Any, random: Any, geometric: Any, discount: Any) -> GoalSampling:
    return GoalSampling(current, trajectory, random, geometric, discount)


class GoalAgent(Agent):
    """Base of the offline goal-conditioned agents.

    A subclass makes its networks in ``build``, and defines ``loss`` and ``policy``. One Adam trains all networks in one
    backward pass of the sum of the losses. Networks named in ``targets`` follow theirs by Polyak averaging, **before** the
    optimiser's step: the target moves towards the parameters of the step that ends, as in the reference.

    Raises:
        ConfigError: spaces that the networks cannot take, or options out of range.
    """

    requires = frozenset({"dataset", "goal"})
    targets: ClassVar[Mapping[str, str]] = {}  # target network -> network
    avoids: ClassVar[bool] = False  # whether ``policy`` takes ``sign`` (B, 1): -1 where the goal is to be avoided
    looks_ahead: ClassVar[bool] = (
        True  # whether ``loss`` uses next states; if not, a batch has the states in their place
    )
    graphs: ClassVar[bool] = True  # whether updates can be recorded as a CUDA graph

    @dataclass
    class Config(GoalConfig):
        """Options: see :class:`GoalConfig`."""

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.config: Any = config  # resolved: nothing is None
        if not isinstance(spaces.action, Box | Discrete):
            raise ConfigError(f"Agent {self.name!r} needs Box or Discrete actions, got {spaces.action}.")
        if isinstance(spaces.observation, Dict) and SIGN in spaces.observation.spaces and not self.avoids:
            raise ConfigError(
                f"Agent {self.name!r} can only reach goals, but observations have the key {SIGN!r}: some goals are to be "
                "avoided. Use hilp, hilp-zero-shot or pldm."
            )
        if config.updates_per_graph > 1 and not self.graphs:
            raise ConfigError(
                f"The updates of agent {self.name!r} cannot be recorded as a CUDA graph, because the CPU has a part in "
                "them; set updates_per_graph to 0."
            )
        self.discrete = isinstance(spaces.action, Discrete)
        self.action_size = action_size(spaces.action)
        self.inputs = Inputs(spaces.observation, config.frequencies).to(device)
        self.scale = Scale(spaces.action).to(device) if isinstance(spaces.action, Box) else None
        self.networks = nn.ModuleDict(self.build(rng)).to(device)
        for target, source in self.targets.items():
            self.networks[target] = copy.deepcopy(self.networks[source]).requires_grad_(False)
        for name, network in self.networks.items():
            setattr(self, name, network)
        self.optimizer = self.new_optimizer()
        self.updates = self.samples = 0
        self._encoded: tuple[OfflineDataset, OfflineDataset] | None = None  # data, and the same as networks take them

    @property
    def name(self) -> str:
        return str(self.Config.agent)

    @property
    def actor_options(self) -> dict[str, Any]:
        return {"discrete": self.discrete, "learn_std": self.config.learn_std}

    # -- what an agent is -------------------------------------------------------------------------------------------

    @abstractmethod
    def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
        """The networks by name, without targets; each becomes an attribute."""

    @abstractmethod
    def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum that one step of Adam lowers, and terms to log."""

    @abstractmethod
    def policy(self, s: Input, g: Input, achieved: Input, *, rng: torch.Generator, temperature: float) -> Distribution:
        """Actions for states and goals; temperature 0 is greedy on every level."""

    def outputs(self, batch: GoalBatch) -> tuple[Output, ...]:
        """The policy's distributions (a Gaussian with unit variance), greedy above; for continual methods. Values and
        representations are not among them."""
        drawn = torch.Generator(self.device)  # needed by a signature: at temperature 0 nothing is drawn
        policy = self.policy(batch.s, batch.g_a, batch.achieved, rng=drawn, temperature=0.0)
        if isinstance(policy, Categorical):
            return (Output("categorical", policy.logits),)
        return (Output("gaussian", policy.mean),)

    # -- learning ---------------------------------------------------------------------------------------------------

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The parameters that ``loss`` trains."""
        return [p for name, network in self.networks.items() if name not in self.targets for p in network.parameters()]

    def start_task(self, task: TaskInfo) -> None:
        if self.config.reset_optimizer:
            self.optimizer = self.new_optimizer()

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` gradient updates on batches drawn with ``rng``; yields after each, or after each graph of them."""
        data = experience.dataset
        if data is None:
            raise ContractError(
                f"Agent {self.name!r} learns from a data set, but the experience of this phase has none."
            )
        self.prepare(data)
        count, every, step = self.config.updates_per_graph, self.config.log_every, 0
        graph = UpdateGraph(self, data, rng, count) if count > 1 and recordable(self.device) else None
        while step < budget:
            before = self.updates
            if graph is not None and budget - step >= count:
                info = graph()
                step += count
            else:
                info = self.update(self.sample(data, rng))
                step += 1
            report = self.updates // every > before // every or step == budget
            yield {"step": step, **({k: v.item() for k, v in info.items()} if report else {})}

    def prepare(self, data: OfflineDataset) -> None:
        """Before the first update on ``data``: check it, and fit the inputs to the first data there are.

        Raises:
            DataError: goals cannot be drawn.
        """
        if not data.is_goal:
            raise DataError(
                f"Agent {self.name!r} draws goals from what was achieved, but data set {data.name!r} has no achieved_goal; "
                "give its observations this key."
            )
        if self.config.normalise and self.updates == 0:  # once: later data must not change what the weights mean
            count = min(FIT_ROWS, len(data))
            self.inputs.fit(data.observation(torch.arange(count, device=data.device) * len(data) // count))
        self._encoded = (data, self._encode(data)) if self._is_small(data) else None

    def _is_small(self, data: OfflineDataset) -> bool:
        """Whether all states fit into :data:`KEPT_BYTES` as numbers that networks take."""
        observed = data.observations["observation"]
        same = self.inputs.same and observed is data.observations["achieved_goal"]
        shape = self.inputs.goal_shape
        return (
            same and shape.image is None and isinstance(observed, Tensor) and 4 * len(data) * shape.flat <= KEPT_BYTES
        )

    def _encode(self, data: OfflineDataset) -> OfflineDataset:
        """Data whose states and actions are as networks take them."""

        def states(observations: Any) -> Any:
            if observations is None:
                return None
            values = self.inputs.goal(observations["observation"]).flat
            return {"observation": values, "achieved_goal": values}

        return OfflineDataset(
            states(data.observations), self.encode_actions(data.actions), data.lengths, states(data.final_observations),
            check=False,
        )  # fmt: skip

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> GoalBatch:
        """A random batch with goals."""
        index = data.sample_index(self.config.batch_size, rng)
        value_goal = data.sample_goals(index, self.config.value_sampling, rng)
        actor_goal = data.sample_goals(index, self.config.actor_sampling, rng)
        return self.batch(data, index, value_goal, actor_goal)

    def batch(
        self, data: OfflineDataset, index: Tensor, value_goal: Tensor, actor_goal: Tensor, **more: Tensor
    ) -> GoalBatch:
        """The batch of rows ``index`` (B,) with goals of rows ``value_goal``, ``actor_goal`` and ``more``, (B,) each."""
        encoded = self._encoded is not None and self._encoded[0] is data
        if self._encoded is not None and encoded:
            data = self._encoded[1]
        obs = data.observation(index)
        following = data.next_observation(index) if self.looks_ahead else obs
        key = "observation" if self.inputs.same else "achieved_goal"
        values, actions = data.observations["achieved_goal"], data.actions[index]
        goal = values[value_goal]
        goals = [goal, goal if actor_goal is value_goal else values[actor_goal], *(values[r] for r in more.values())]
        parts = [obs[key], following[key], *goals]
        inputs = [Input(x) for x in parts] if encoded else self.inputs.goals(*parts)
        achieved, achieved_next, g_v, g_a, *rest = inputs
        s, s_next = achieved, achieved_next
        if not self.inputs.same:
            s, s_next = self.inputs.state(obs), self.inputs.state(following)
        return GoalBatch(
            s, s_next, g_v, g_a, actions if encoded else self.encode_actions(actions),
            (index == value_goal).to(torch.float32), achieved, achieved_next, self.inputs.context(obs),
            dict(zip(more, rest, strict=True)),
        )  # fmt: skip

    def update(self, batch: GoalBatch) -> dict[str, Tensor]:
        """One step of Adam on ``loss``."""
        loss, info = compiled_loss(self, batch) if self.config.compile else self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.update_targets()
        self.optimizer.step()
        self.updates += 1
        self.samples += len(batch)
        return info

    @torch.no_grad()
    def update_targets(self) -> None:
        """``target <- (1 - tau) target + tau online``."""
        for target, source in self.targets.items():
            old, new = (tuple(self.networks[name].parameters()) for name in (target, source))
            torch._foreach_lerp_(old, new, self.config.tau)

    def new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.trainables, lr=self.config.lr, fused=True)

    # -- actions ----------------------------------------------------------------------------------------------------

    def encode_actions(self, actions: Tensor) -> Tensor:
        """Of the environment -> (B, A) in [-1, 1], or (B,) classes from 0."""
        if self.scale is not None:
            return self.scale(actions)
        return actions.to(torch.int64) - self._start

    def as_input(self, actions: Tensor) -> Tensor:
        """Actions as the input of a critic (B, A): classes are one-hot."""
        return functional.one_hot(actions, self.action_size).to(torch.float32) if self.discrete else actions

    @property
    def _start(self) -> int:
        return int(self.spaces.action.start) if isinstance(self.spaces.action, Discrete) else 0

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The mean or most likely action, or with ``explore`` one drawn from the policy."""
        s, g = self.inputs.state(obs), self.inputs.goal(obs["desired_goal"])
        achieved = s if self.inputs.same else self.inputs.goal(obs["achieved_goal"])
        sign = {"sign": obs[SIGN].reshape(-1, 1).to(torch.float32)} if self.avoids and SIGN in obs else {}
        policy = self.policy(s, g, achieved, rng=rng, temperature=1.0 if explore else 0.0, **sign)
        action = policy.sample(rng) if explore else policy.mode
        if self.scale is None:
            return action + self._start, memory
        space = self.spaces.action
        assert isinstance(space, Box)
        low, high = (torch.as_tensor(np.asarray(b, np.float32), device=self.device) for b in (space.low, space.high))
        return self.scale.inverse(action).reshape(-1, *space.shape).clamp(low, high), memory

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        live = {
            "networks": dict(self.networks.state_dict()), "inputs": dict(self.inputs.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        return {**copy.deepcopy(live), "updates": self.updates, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.inputs.load_state_dict(state["inputs"])
        self._encoded = None
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.updates, self.samples = int(state["updates"]), int(state["samples"])

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples processed so far."""
        return {"updates": self.updates, "samples": self.samples}

    @property
    def num_parameters(self) -> int:
        """Of all networks, targets included."""
        return count_parameters(self.networks) + sum(
            p.numel() for t in self.targets for p in self.networks[t].parameters()
        )


def choose_extraction(agent: GoalAgent) -> None:
    """Settle ``auto``: ``ddpg-bc`` for continuous actions, ``awr`` with OGBench's alpha for discrete ones.

    Raises:
        ConfigError: ``ddpg-bc`` where it cannot be, for it differentiates Q by the mean action.
    """
    if agent.config.actor_loss == "auto":
        choice = {"actor_loss": "awr", "alpha": 3.0} if agent.discrete else {"actor_loss": "ddpg-bc"}
        agent.config = dataclasses.replace(agent.config, **choice)
    if agent.config.actor_loss != "ddpg-bc":
        return
    if agent.discrete:
        raise ConfigError(
            f"Agent {agent.name!r}: actor_loss 'ddpg-bc' needs continuous actions, but they are {agent.spaces.action}; set "
            "actor_loss to 'awr' and alpha to 3."
        )
    if agent.config.learn_std:
        raise ConfigError(f"Agent {agent.name!r}: actor_loss 'ddpg-bc' improves the mean action; leave learn_std off.")
