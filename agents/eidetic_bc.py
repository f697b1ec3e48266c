"""Eidetic behaviour cloning: a classifier or goal-conditioned policy from offline data that forgets nothing.

Dronen and Balestriero 2025, "Eidetic Learning: an Efficient and Provable Solution to Catastrophic Forgetting" (arXiv
2502.09500). Every task trains the free units of one network, gives back those that it can do without, and keeps the
rest for good::

    start_task    fresh free units, a new head
    learn         maximise the likelihood of the actions; kill units, recover, go back where held-out quality falls too far
    finish_task   commit: what is alive is stored and never changes again

Where the stream reveals task ids the right head answers, and what a finished task does is constant, bit for bit. Where it
reveals boundaries only, a router decides (see :mod:`clbench.agents.networks.eidetic.routing`), which can be wrong.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor, nn

from clbench.agents.bc import first_action, goals_for, to_actions
from clbench.agents.networks.eidetic.acting import ActsByTask, RouterName, flat, new_router
from clbench.agents.networks.eidetic.network import Exhausted
from clbench.agents.networks.eidetic.policy import EideticPolicy, Norm, prepare
from clbench.agents.networks.eidetic.pruning import Pruner, Pruning
from clbench.agents.networks.eidetic.verify import evaluating
from clbench.agents.networks.encoders import Parts, Scale
from clbench.agents.networks.mlp import count_parameters
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.data.dataset import Batch, GoalSampling, OfflineDataset
from clbench.errors import ConfigError, ContractError

PROBES = 64  # observations per task that are kept to prove that nothing has changed
EVALUATED = 1024  # rows at most on which quality is measured
FITTED = 5000  # rows at most that a router sees


class EideticBC(ActsByTask, Agent):
    """(Goal-conditioned) behaviour cloning with zero forgetting.

    Raises:
        ConfigError: the action space is neither Box nor Discrete, or an option is out of range.
        CapacityExhausted: a task begins, and no unit is free.
    """

    requires = frozenset({"dataset", "boundaries"})
    refuses_methods = "its layers protect finished tasks themselves"

    @dataclass
    class Config:
        """Options.

        Args:
            hidden: widths of the hidden layers, shared by all tasks.
            norm: before each activation: none, batch (BatchNorm with frozen statistics) or prefix (PrefixNorm).
            activation: relu, tanh, gelu, silu, mish, elu or sigmoid.
            lr: learning rate.
            weight_decay: of AdamW; it cannot reach what is owned.
            batch_size: transitions per update.
            reset_optimizer: start every task with fresh moments. The guarantee does not need it.
            pruning: when and what is pruned.
            held_out: share of the episodes on which quality is judged. After the last judgement they are trained on, too.
            transfer: let units read those of older tasks.
            exhausted: what to do when no unit is free: raise, train heads alone (head-only), or add units (widen).
            router: who decides where no task id is given: novelty, trained (keeps examples of all tasks) or newest.
            explore_std: standard deviation of continuous actions when exploring, in units of half the range.
            goals: how goals are drawn; by default uniformly from the later states of the episode.
            log_every: updates between two reports of the loss.
        """

        hidden: tuple[int, ...] = (512, 512)
        norm: Norm = "none"
        activation: str = "relu"
        lr: float = 2e-3
        weight_decay: float = 0.0
        batch_size: int = 64
        reset_optimizer: bool = True
        pruning: Pruning = field(default_factory=Pruning)
        held_out: float = 0.1
        transfer: bool = True
        exhausted: Exhausted = "raise"
        router: RouterName = "novelty"
        explore_std: float = 1.0
        goals: GoalSampling = field(default_factory=GoalSampling)
        log_every: int = 50

        def __post_init__(self) -> None:
            for name in ("lr", "batch_size", "log_every"):
                if getattr(self, name) <= 0:
                    raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
            if not self.hidden or any(width < 1 for width in self.hidden):
                raise ConfigError(f"hidden must hold at least one positive layer size, got {self.hidden}.")
            if not 0 < self.held_out < 1:
                raise ConfigError(f"held_out must be between 0 and 1, got {self.held_out}.")
            if self.explore_std < 0 or self.weight_decay < 0:
                raise ConfigError(
                    f"explore_std and weight_decay must be at least 0, got {self.explore_std} and {self.weight_decay}."
                )

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        action = spaces.action
        if not isinstance(action, Box | Discrete):
            raise ConfigError(f"Agent 'eidetic-bc' needs Box or Discrete actions, but the action space is {action}.")
        self.config: EideticBC.Config = config
        self.goal_conditioned = isinstance(spaces.observation, Dict) and "desired_goal" in spaces.observation.spaces
        self.scale = Scale(action).to(device) if isinstance(action, Box) else None
        self.parts = Parts(spaces.observation).to(device)
        outputs = int(action.n) if isinstance(action, Discrete) else int(np.prod(action.shape or ()))
        self.rng = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        self.network = EideticPolicy(
            self.parts, outputs, config.hidden, norm=config.norm, activation=config.activation,
            transfer=config.transfer, exhausted=config.exhausted,
        ).to(device)  # fmt: skip
        self.network.begin_task(self.rng)  # the first task may be acted in before it is trained
        draw = functools.partial(torch.randint, 2**62, (), generator=self.rng, device=device)
        self._init_tasks(new_router(config.router, self.parts, draw, device))
        self.pruner = Pruner(self.network, config.pruning)
        self.optimizer = self.new_optimizer()
        self.kept: dict[str, Tensor] = {}  # what finish_task needs of the data
        self.updates = self.samples = 0

    # -- loss -----------------------------------------------------------------------------------------------------------

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The parameters that ``loss`` trains."""
        return [p for p in self.network.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of ``-log pi(a | s, g)`` of the task under way, up to a constant, as for ``bc``."""
        output = self.network(*prepare(self.parts, batch.observations), task=self.network.task)
        losses = self._losses(output, batch.actions)
        return losses.mean(), {"loss": losses.detach().mean()}

    def _losses(self, output: Tensor, actions: Tensor) -> Tensor:
        """(B,): cross-entropy, or half the squared error in units of half the range."""
        if self.scale is None:
            return nn.functional.cross_entropy(
                output, actions.to(torch.int64) - first_action(self.spaces.action), reduction="none"
            )
        return 0.5 * (self.scale(actions) - output).square().sum(1)

    # -- learning -------------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        """A new task; or one that was finished, whose id the stream reveals: it is kept, and nothing is trained."""
        if self._comes_back(task.id):
            return
        if not self.network.begun:
            self.network.begin_task(self.rng)
        self.ids = [*self.ids[: self.network.task], task.id]
        self.pruner.begin(0)
        if self.config.reset_optimizer:
            self.optimizer = self.new_optimizer()
        elif new := self.network.new_parameters(self.optimizer):
            head = {id(p) for p in self.network.head.layers[-1].parameters()}
            if all(id(p) in head for p in new):
                self.optimizer.add_param_group({"params": new})
            else:  # the network was widened, so its parameters are others now
                self.optimizer = self.new_optimizer()

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` gradient updates on batches drawn with ``rng``; pruning is part of them."""
        data = experience.dataset
        if data is None:
            raise ContractError("Agent 'eidetic-bc' learns from a data set, but the experience of this phase has none.")
        if self.known is not None:
            yield {"step": budget, "skipped": float(budget)}
            return
        if self.pruner.left != budget:
            self.pruner.begin(budget)
        goals = goals_for(data, self.config.goals, self.goal_conditioned, "eidetic-bc")
        train, held_out = self._split(data)
        everything = torch.arange(len(data), device=data.device)

        def draw(rows: Tensor, size: int, generator: torch.Generator) -> Batch:
            chosen = rows[torch.randint(len(rows), (size,), generator=generator, device=data.device)]
            return data.batch(chosen, None if goals is None else data.sample_goals(chosen, goals, generator))

        judged = draw(held_out, min(EVALUATED, len(held_out)), self._fixed(data, "judge"))

        def losses() -> list[Any]:
            source = self._fixed(data, "importance")
            batches = [draw(train, 4 * self.config.batch_size, source) for _ in range(4)]
            return [lambda b=b: self.loss(b)[0] for b in batches]

        for step in range(1, budget + 1):
            rows = everything if self.pruner.stage == "finish" else train
            info = self.update(draw(rows, self.config.batch_size, rng))
            pruned = self.pruner.advance(
                quality=lambda: self.quality(judged), losses=losses, optimizer=self.optimizer, rng=rng
            )
            if step == budget:
                self._keep(data, draw)
            report = self.updates % self.config.log_every == 0 or step == budget
            yield {"step": step, **pruned, **({k: v.item() for k, v in info.items()} if report else {})}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the optimiser on ``loss``."""
        self.network.train()
        loss, info = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.samples += len(batch.index)
        return info

    @torch.no_grad()
    def quality(self, batch: Batch) -> float:
        """1 - loss / loss of a constant answer: 1 is perfect, 0 what ignoring the observation gives."""
        with evaluating(self.network):
            output = self.network(*prepare(self.parts, batch.observations), task=self.network.task)
        own = self._losses(output, batch.actions).mean()
        if self.scale is None:
            counts = torch.bincount(batch.actions.to(torch.int64) - first_action(self.spaces.action)).double()
            share = counts[counts > 0] / counts.sum()
            trivial = -(share * share.log()).sum()
        else:
            scaled = self.scale(batch.actions)
            trivial = 0.5 * (scaled - scaled.mean(0)).square().sum(1).mean()
        return float(1 - own / trivial.clamp_min(1e-8))

    def finish_task(self) -> None:
        """Commit. All that is alive belongs to the task from now on."""
        if self.known is not None or not self.network.begun:
            self.known = None
            return
        inputs = [self.kept[k] for k in sorted(self.kept) if k.startswith("probe")]
        self.network.commit(inputs or None)
        if "fit" in self.kept and self.router is not None:
            self.router.add(self.kept["fit"], self.kept.get("labels"))
        self.kept = {}

    def _keep(self, data: OfflineDataset, draw: Any) -> None:
        """Probes, and examples for the router, for when the task is finished."""
        source = self._fixed(data, "keep")
        rows = torch.arange(len(data), device=data.device)
        probes = prepare(self.parts, draw(rows, PROBES, source).observations)
        self.kept = {f"probe{i}": p.clone() for i, p in enumerate(probes)}
        batch = draw(rows, min(FITTED, 4 * len(data)), source)
        if self.router is not None:
            self.kept["fit"] = flat(prepare(self.parts, batch.observations))
            if self.scale is None:
                self.kept["labels"] = batch.actions.to(torch.int64)

    def _split(self, data: OfflineDataset) -> tuple[Tensor, Tensor]:
        """Rows to train on and rows to judge on: every n-th episode (or row, where there are few episodes) is held out."""
        rows = torch.arange(len(data), device=data.device)
        period = max(2, round(1 / self.config.held_out))
        place = data.episode if data.num_episodes >= 2 * period else rows
        out = place % period == period - 1
        if not bool(out.any()):
            return rows, rows
        return rows[~out], rows[out]

    def _fixed(self, data: OfflineDataset, name: str) -> torch.Generator:
        """A generator that is the same whenever it is asked for: what it draws is no part of the state."""
        seed = {"judge": 1, "importance": 2, "keep": 3}[name]
        return torch.Generator(data.device).manual_seed(1000 * self.network.task + seed)

    def new_optimizer(self) -> torch.optim.AdamW:
        c = self.config
        return torch.optim.AdamW(self.trainables, lr=c.lr, weight_decay=c.weight_decay, fused=True)

    # -- acting ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The most likely action of the task that ``task`` names, or that the router finds."""
        inputs = prepare(self.parts, obs)
        chosen = self.route(inputs, task)
        output = inputs[0].new_zeros(len(chosen), self.network.head.size)
        for k in chosen.unique().tolist():
            rows = chosen == k
            output[rows] = self._output([x[rows] for x in inputs], k)
        draw, std = rng if explore else None, self.config.explore_std
        return to_actions(output, self.spaces.action, self.scale, draw, std), memory

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        live = {"network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict(), "kept": self.kept}
        return {
            **copy.deepcopy(live), **self._tasks_state(), "rng": self.rng.get_state(), "pruner": self.pruner.state_dict(),
            "updates": self.updates, "samples": self.samples,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.restore(state["network"])
        self.optimizer = self.new_optimizer()
        saved = copy.deepcopy(state["optimizer"])
        if len(saved["param_groups"]) > 1:  # one object for all tasks: a group per task that has begun
            self.optimizer = self._regrouped([len(g["params"]) for g in saved["param_groups"]])
        self.optimizer.load_state_dict(saved)
        self.kept = copy.deepcopy(state["kept"])
        self.rng.set_state(state["rng"])
        self.pruner.load_state_dict(state["pruner"])
        self._load_tasks(state)
        self.updates, self.samples = int(state["updates"]), int(state["samples"])

    def _regrouped(self, sizes: Sequence[int]) -> torch.optim.AdamW:
        """The first group has the network with its first head, each other one a later head."""
        heads = [list(h.parameters()) for h in self.network.head.layers]
        later = {id(p) for head in heads[len(heads) - len(sizes) + 1 :] for p in head}
        groups = [[p for p in self.trainables if id(p) not in later], *heads[len(heads) - len(sizes) + 1 :]]
        optimizer = self.new_optimizer()
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group({"params": group, "lr": self.config.lr})
        return optimizer

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples processed so far; phases in which nothing is trained have none."""
        return {"updates": self.updates, "samples": self.samples}

    @property
    def num_parameters(self) -> int:
        return count_parameters(self.network)
