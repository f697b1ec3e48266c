"""Behaviour cloning: maximise the likelihood of the actions in the data.

On observations with a ``desired_goal`` this is goal-conditioned behaviour cloning (GCBC: Lynch et al. 2019; Ghosh et
al. 2021, "Learning to Reach Goals via Iterated Supervised Learning"), with goals drawn from the later states of the
same episode. On Classify tasks (one-step episodes, action = class) it is the plain classifier.

The task id, where a stream reveals it, is ignored in joint data and in ``act`` alike, unless ``heads`` asks for an output
layer per task (task-incremental learning).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn

from clbench.agents.networks.encoders import Encoder, Scale
from clbench.agents.networks.mlp import MLP, count_parameters, dense, gelu
from clbench.agents.networks.outputs import Output
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.data.dataset import Batch, GoalSampling, OfflineDataset
from clbench.errors import ConfigError, ContractError, DataError, unknown_name

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "relu": torch.relu}


class Policy(nn.Module):
    """Observation -> logits (B, n) of discrete actions, or the mean (B, A), scaled to [-1, 1], of continuous ones.

    With several ``heads`` each row goes through the output layer of its task.
    """

    def __init__(self, spaces: Spaces, hidden: tuple[int, ...], heads: int = 1, *, rng: torch.Generator,
                 activation: Callable[[Tensor], Tensor] = gelu):  # fmt: skip
        super().__init__()
        action = spaces.action
        outputs = int(action.n) if isinstance(action, Discrete) else int(np.prod(action.shape or ()))
        self.encoder = Encoder(spaces.observation, rng=rng)
        self.head = MLP((self.encoder.size, *hidden, outputs), rng=rng, activation=activation, final_gain=0.1)
        width = (self.encoder.size, *hidden)[-1]
        self.more_heads = nn.ModuleList(dense(width, outputs, rng, 0.1) for _ in range(heads - 1))

    @property
    def output_layers(self) -> list[nn.Linear]:
        """One per head."""
        return [self.head.layers[-1], *self.more_heads]  # type: ignore[list-item]

    def features(self, obs: Any) -> Tensor:
        """(B, D): what the output layer sees."""
        return self.head.features(self.encoder(obs))

    def forward(self, obs: Any, task: Tensor | None = None) -> Tensor:
        return self.outputs(self.features(obs), task)

    def outputs(self, features: Tensor, task: Tensor | None = None) -> Tensor:
        """Features (B, D) and, with several heads, tasks (B,) -> (B, n). A head without a row gets no gradient."""
        layers = self.output_layers
        if len(layers) == 1:
            return layers[0](features)
        if task is None:
            raise ConfigError(
                f"Agent 'bc' with {len(layers)} heads must be told the task; add --reveals task_id, or leave heads at 1."
            )
        result = features.new_empty(len(features), layers[0].out_features)
        for k in task.unique().tolist():
            if not 0 <= k < len(layers):
                raise ConfigError(f"Agent 'bc' has {len(layers)} heads, but there is a task {k}; raise --agent.heads.")
            rows = task == k
            result[rows] = layers[k](features[rows])
        return result


class BC(Agent):
    """(Goal-conditioned) behaviour cloning from an offline data set.

    Raises:
        ConfigError: the action space is neither Box nor Discrete, or an option is out of range.
    """

    requires = frozenset({"dataset"})

    @dataclass
    class Config:
        """Options.

        Args:
            hidden: sizes of the hidden layers.
            activation: of the hidden layers.
            heads: output layers; with more than one, each task (whose id the stream must reveal) has its own.
            optimizer: ``adam`` or plain ``sgd``.
            lr: learning rate.
            batch_size: transitions per update.
            reset_optimizer: start every task with fresh moments of Adam, as is usual in continual learning.
            explore_std: standard deviation of continuous actions when exploring; 1 is half the range of the space. In the
                loss it would be a constant factor, so it is left out there.
            goals: how goals are drawn; by default uniformly from the later states of the episode.
            log_every: updates between two reports of the loss.
        """

        hidden: tuple[int, ...] = (256, 256)
        activation: Literal["gelu", "relu"] = "gelu"
        heads: int = 1
        optimizer: Literal["adam", "sgd"] = "adam"
        lr: float = 1e-3
        batch_size: int = 64
        reset_optimizer: bool = True
        explore_std: float = 1.0
        goals: GoalSampling = field(default_factory=GoalSampling)
        log_every: int = 50

        def __post_init__(self) -> None:
            for name in ("heads", "lr", "batch_size", "log_every"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
            if any(width < 1 for width in self.hidden):
                raise ConfigError(f"hidden must hold positive layer sizes, got {self.hidden}.")
            if self.activation not in ACTIVATIONS:
                raise unknown_name("activation", str(self.activation), ACTIVATIONS, where="agent 'bc'")
            if self.explore_std < 0:
                raise ConfigError(f"explore_std must be at least 0, got {self.explore_std}.")

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        if not isinstance(spaces.action, Box | Discrete):
            raise ConfigError(f"Agent 'bc' needs Box or Discrete actions, but the action space is {spaces.action}.")
        self.config: BC.Config = config
        self.discrete = isinstance(spaces.action, Discrete)
        self.goal_conditioned = isinstance(spaces.observation, Dict) and "desired_goal" in spaces.observation.spaces
        self.scale = Scale(spaces.action).to(device) if isinstance(spaces.action, Box) else None
        self.policy = Policy(
            spaces, config.hidden, config.heads, rng=rng, activation=ACTIVATIONS[config.activation]
        ).to(device)
        self.optimizer = self.new_optimizer()
        self.updates = 0
        self.samples = 0
        self.right: Tensor | int = 0
        self.asked = 0  # predictions before the update on them, since the last report

    # -- loss ---------------------------------------------------------------------------------------------------------

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The parameters that ``loss`` trains."""
        return list(self.policy.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of ``-log pi(a | s, g)`` over the batch, up to a constant: cross-entropy of discrete actions, or
        ``0.5 |a - mu|^2`` of continuous ones in units of half the range of the action space."""
        return self.loss_of(self.policy(batch.observations, batch.task), batch)

    def loss_of(self, output: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`loss` of given outputs (B, n) of the policy."""
        if self.scale is None:
            target = batch.actions.to(torch.int64) - first_action(self.spaces.action)
            loss = nn.functional.cross_entropy(output, target)
            return loss, {"loss": loss.detach(), "correct": (output.detach().argmax(1) == target).to(torch.float32)}
        error = self.scale(batch.actions) - output
        loss = 0.5 * error.square().sum(1).mean()
        return loss, {"loss": loss.detach(), "action_error": error.detach().abs().mean()}

    def outputs(self, batch: Batch) -> tuple[Output]:
        """The policy's distributions, for continual methods."""
        return (Output("gaussian" if self.scale else "categorical", self.policy(batch.observations, batch.task)),)

    def features(self, batch: Batch) -> Tensor:
        """(B, D) before the output layer."""
        return self.policy.features(batch.observations)

    @torch.no_grad()
    def probe(self, obs: Any, task: Tensor | None = None) -> dict[str, Tensor]:
        """(B, D) of each hidden layer after its nonlinearity; the last, ``features``, is what the output layer sees."""
        layers = self.policy.head.hidden(self.policy.encoder(obs))
        names = [*(f"hidden-{i}" for i in range(1, len(layers))), "features"]
        return dict(zip(names, layers or [self.policy.features(obs)], strict=True))

    # -- learning -----------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        if self.config.reset_optimizer:
            self.optimizer = self.new_optimizer()

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` gradient updates on batches drawn with ``rng``."""
        data = experience.dataset
        if data is None:
            raise ContractError("Agent 'bc' learns from a data set, but the experience of this phase has none.")
        for step in range(1, budget + 1):
            info = self.update(self.sample(data, rng))
            report = self.updates % self.config.log_every == 0 or step == budget
            yield {"step": step, **(self._report(info) if report else {})}

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> Batch:
        """A random batch, with goals where the policy takes them."""
        goals = goals_for(data, self.config.goals, self.goal_conditioned, "bc")
        return data.sample(self.config.batch_size, rng, goals)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser on ``loss``."""
        loss, info = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.samples += len(batch.index)
        if "correct" in info:  # of the batch itself; rows that a method replays come after it
            correct = info["correct"]
            self.right = self.right + correct[: len(batch.index)].sum()  # not read here: that would wait for the device
            self.asked += len(batch.index)
            info = {**info, "correct": correct.mean()}
        return info

    def _report(self, info: Mapping[str, Tensor]) -> dict[str, float]:
        """To be logged; ``online_accuracy`` is prequential: of all predictions since the last report, each made before the
        update on it; ``online_count`` says how many they were."""
        report = {("accuracy" if k == "correct" else k): v.item() for k, v in info.items()}
        if self.asked:
            report |= {"online_accuracy": float(self.right) / self.asked, "online_count": float(self.asked)}
        self.right = self.asked = 0
        return report

    def new_optimizer(self) -> torch.optim.Optimizer:
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(self.policy.parameters(), lr=self.config.lr)
        return torch.optim.Adam(self.policy.parameters(), lr=self.config.lr, fused=True)

    # -- acting -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The most likely action, or with ``explore`` one drawn from the policy."""
        draw, std = rng if explore else None, self.config.explore_std
        return to_actions(self.policy(obs, task), self.spaces.action, self.scale, draw, std), memory

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        live = {"policy": dict(self.policy.state_dict()), "optimizer": self.optimizer.state_dict()}
        counts = {"updates": self.updates, "samples": self.samples, "right": int(self.right), "asked": self.asked}
        return {**copy.deepcopy(live), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.updates, self.samples = int(state["updates"]), int(state["samples"])
        self.right, self.asked = int(state["right"]), int(state["asked"])

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples processed so far."""
        return {"updates": self.updates, "samples": self.samples}

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.policy)


def goals_for(data: OfflineDataset, goals: GoalSampling, conditioned: bool, agent: str) -> GoalSampling | None:
    """``goals``; None where the policy takes no goal, or the data bring the goals that were pursued.

    Raises:
        DataError: a goal-conditioned policy, and data without goals.
    """
    if not conditioned or (not data.is_goal and "desired_goal" in data.observations):
        return None
    if not data.is_goal:
        raise DataError(
            f"Agent {agent!r} is goal-conditioned here, but data set {data.name!r} has neither achieved_goal nor "
            "desired_goal; give its observations one of these keys."
        )
    return goals


def to_actions(output: Tensor, space: Any, scale: Scale | None, explore: torch.Generator | None, std: float) -> Tensor:
    """Logits (B, n) -> (B,) int64, or means (B, A) scaled to [-1, 1] -> (B, *shape) within the space.

    Args:
        output: of the policy.
        space: of the actions.
        scale: of a continuous space.
        explore: draw from the policy with this generator, in place of its most likely action.
        std: standard deviation of continuous actions when exploring, in units of half the range.
    """
    if scale is None:
        if explore is None:
            return output.argmax(1) + first_action(space)
        probabilities = torch.softmax(output, 1).to(explore.device)
        drawn = torch.multinomial(probabilities, 1, generator=explore)[:, 0]
        return drawn.to(output.device) + first_action(space)
    if explore is not None:
        output = output + std * torch.randn(output.shape, generator=explore, device=explore.device).to(output.device)
    low, high = (torch.as_tensor(np.asarray(b, np.float32), device=output.device) for b in (space.low, space.high))
    return scale.inverse(output).reshape(-1, *space.shape).clamp(low, high)


def first_action(space: Any) -> int:
    """The number of the first action of a discrete space, 0 for others."""
    return int(space.start) if isinstance(space, Discrete) else 0
