"""Eidetic PLDM: a latent world model that plans, learns one task after the other, and forgets nothing.

The world model and the losses are those of PLDM (Sobal et al. 2025, arXiv 2502.14819; see :mod:`clbench.agents.pldm`), the
networks those of Eidetic Learning (Dronen and Balestriero 2025, arXiv 2502.09500): every task trains the free units of one
network, gives back those that it can do without, and keeps the rest for good::

    start_task    fresh free units, a head for the predictor, a fresh inverse model
    learn         PLDM's losses on windows of the task's data; kill units, recover, go back where held-out quality falls
    finish_task   commit: what is alive is stored, and with it all else that acts (action cap, planner, evidence)

Encoder and predictor are one network with one count of tasks; the numbers of the latent are units too. Task ``k`` plans in
its prefix ``z_{<=k}`` with its own head, on the network extracted for it, so what a finished task encodes, predicts and
plans (with a given generator) is constant, bit for bit. Only what acts is protected: the inverse model, the optimiser and
the losses of a task end with it.

Where the stream reveals task ids the right world model plans. Where it reveals boundaries only, the evidence of the world
models themselves decides while acting (see :mod:`clbench.agents.jepa.evidence`). Tasks that differ in their goals
alone have the same dynamics, cannot be told apart by that, and the oldest of them acts; and tasks that differ in one place,
such as where a door is, only once one has been there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor, nn

from clbench.agents.jepa.diagnostics import deviations, probe_r2, rankme
from clbench.agents.jepa.eidetic import EideticWorldModel, LatentNorm, TaskModel, join
from clbench.agents.jepa.evidence import accumulate, calibrate, decide, log_likelihood
from clbench.agents.jepa.losses import (
    context_loss,
    covariance_loss,
    inverse_dynamics_loss,
    new_inverse_head,
    prediction_loss,
    temporal_smoothness_loss,
    variance_loss,
    variance_over_time_loss,
)
from clbench.agents.jepa.model import Keys
from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.pruning import Pruner, Pruning
from clbench.agents.networks.eidetic.verify import evaluating
from clbench.agents.networks.mlp import count_parameters
from clbench.agents.pldm import PRESETS, SIGN
from clbench.config import build
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset, map_obs
from clbench.errors import ConfigError, ContractError
from clbench.planners.bounds import ActionBounds
from clbench.planners.mpc import MPC
from clbench.planners.objectives import GoalDistance
from clbench.registry import resolve

PROBES = 64  # transitions per task that are kept to prove that nothing has changed
JUDGED = 128  # windows at most on which quality is measured
CALIBRATED = 2048  # held-out transitions at most on which evidence is calibrated
SAMPLE = 1024  # rows for normalisation
_SMALL = PRESETS["small"]


class EideticPLDM(Agent):
    """PLDM on an eidetic network: a world model per task, in one network, with zero forgetting.

    Raises:
        ConfigError: spaces that it cannot take, or an option out of range.
        CapacityExhausted: a task begins, and no unit is free.
    """

    requires = frozenset({"dataset", "goal", "continuous", "state", "boundaries"})
    refuses_methods = "its layers protect finished tasks themselves"

    @dataclass
    class Config:
        """Options. Losses, training and planning have the meaning and the values of agent ``pldm``, preset ``small``.

        Args:
            latent: numbers in the latent, shared out among the tasks.
            encoder_hidden: widths of the encoder's hidden layers, all tasks together.
            hidden: widths of the predictor's hidden layers, all tasks together.
            frequencies: Fourier features of the encoder, 0 for none.
            activation: of the hidden layers.
            norm: the latent is normalised over the numbers of a unit's ``own`` task, or over its whole ``prefix``.
            distance: distances to goals are taken in the numbers that the task ``own``s, or in its whole ``prefix``.
            window: H, actions per training window.
            batch_size: windows per update.
            lr: peak learning rate of Adam: linear warm-up over the first tenth of a task, cosine over its last part.
            weight_decay: added to the gradient (L2); it cannot reach what is owned.
            variance: alpha, of the variance term, over the free numbers of the latent.
            covariance: beta, of the covariance term, over the whole prefix; only free numbers can move.
            variance_over_time: of the variance within windows.
            smoothness: delta, of the squared change of the latent per step.
            inverse: omega, of the inverse dynamics model, which is new in every task.
            context: of the prediction of what is observed beside the goal part.
            pruning: when and what is pruned.
            held_out: share of the episodes on which quality is judged. After the last judgement they are trained on, too.
            transfer: let units read those of older tasks.
            exhausted: what to do when no unit is free: raise, or train heads alone (head-only).
            planner: a registered planner.
            planner_options: fields of the planner's ``Config``.
            replan_every: environment steps between two plans.
            escape: see :class:`clbench.planners.mpc.MPC`.
            reduce: latent distances of all steps of a plan (``sum``), or of the last alone.
            cap_actions: keep plans within the largest norm of the actions in the task's data.
            leak: share of the evidence for a task that is forgotten per step, where no task ids are given.
            hysteresis: lead in log likelihood that a task needs to take over.
            log_every: updates between two reports of the losses.
        """

        latent: int = 128
        encoder_hidden: tuple[int, ...] = (256, 256)
        hidden: tuple[int, ...] = (256,)
        frequencies: int = 4
        activation: str = "relu"
        norm: LatentNorm = "own"
        distance: LatentNorm = "own"
        window: int = _SMALL["window"]
        batch_size: int = _SMALL["batch_size"]
        lr: float = _SMALL["lr"]
        weight_decay: float = _SMALL["weight_decay"]
        variance: float = _SMALL["variance"]
        covariance: float = _SMALL["covariance"]
        variance_over_time: float = _SMALL["variance_over_time"]
        smoothness: float = _SMALL["smoothness"]
        inverse: float = _SMALL["inverse"]
        context: float = _SMALL["context"]
        pruning: Pruning = field(default_factory=lambda: Pruning(tasks=5, train=0.3, finish=0.4))
        held_out: float = 0.1
        transfer: bool = True
        exhausted: Literal["raise", "head-only"] = "raise"
        planner: str = _SMALL["planner"]
        planner_options: dict[str, str | float] = field(default_factory=dict)
        replan_every: int = _SMALL["replan_every"]
        escape: float = _SMALL["escape"]
        reduce: Literal["sum", "last"] = "sum"
        cap_actions: bool = True
        leak: float = 0.02
        hysteresis: float = 5.0
        log_every: int = 50

        def __post_init__(self) -> None:
            own = self.planner == _SMALL["planner"]
            self.planner_options = {**(_SMALL["planner_options"] if own else {}), **self.planner_options}
            for name in ("latent", "encoder_hidden", "hidden"):
                value = getattr(self, name)
                if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                    raise ConfigError(f"{name} must be positive, got {value}.")
            for name in ("window", "lr", "replan_every", "log_every"):
                if not getattr(self, name) > 0:
                    raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
            for name in ("frequencies", "weight_decay", "variance", "covariance", "variance_over_time", "smoothness",
                         "inverse", "context", "hysteresis"):  # fmt: skip
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
            for name, values in (
                ("norm", ("own", "prefix")),
                ("distance", ("own", "prefix")),
                ("reduce", ("sum", "last")),
            ):
                if getattr(self, name) not in values:
                    raise ConfigError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
            if self.norm == "own" and self.latent < 2 * self.pruning.tasks:
                raise ConfigError(
                    f"{self.pruning.tasks} tasks share a latent of {self.latent} numbers, but a task that is normalised by "
                    "its own needs at least 2; raise latent, or lower pruning.tasks."
                )
            if self.batch_size < 2:
                raise ConfigError("batch_size must be at least 2: the variance is taken over the batch.")
            if self.window < 2:
                raise ConfigError("window must be at least 2: the variance over time needs several steps.")
            if not 0 < self.held_out < 1 or not 0 <= self.leak < 1:
                raise ConfigError(
                    f"held_out must be between 0 and 1 and leak in [0, 1), got {self.held_out} and {self.leak}."
                )

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self.config: EideticPLDM.Config = config
        self.keys, sizes = _sizes(spaces)
        self.rng = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=rng, device=rng.device)))
        self.network = EideticWorldModel(
            *sizes, latent=config.latent, encoder_hidden=config.encoder_hidden, hidden=config.hidden,
            frequencies=config.frequencies, activation=config.activation, norm=config.norm, transfer=config.transfer,
            exhausted=config.exhausted,
        ).to(device)  # fmt: skip
        self.network.begin_task(self.rng)  # the first task may be acted in before it is trained
        self.inverse_head = self._new_inverse_head()
        # a task that keeps one number of the latent would normalise it away
        least = max(config.pruning.least, 2 if config.norm == "own" else 1)
        self.pruner = Pruner(self.network, dataclasses.replace(config.pruning, least=least))
        self.optimizer = self.new_optimizer()
        self.ids: list[int | None] = []  # task of the network -> id in the stream, where it was revealed
        self.known: int | None = None  # the task of the network that the stream has come back to
        self.acting: list[dict[str, Any]] = []  # per finished task: how it acts
        self.evidence: list[dict[str, Any] | None] = []  # per finished task: calibration of its prediction errors
        self.cap = 0.0  # largest norm of an action in the data of the task under way; 0 before any
        self.kept: dict[str, Tensor] = {}  # what finish_task needs of the data
        self.before: dict[str, float] = {}  # components of quality before the first kill of the task
        self.updates = self.samples = 0
        self._models: dict[int, TaskModel] = {}
        self._controllers: dict[int, tuple[Any, MPC]] = {}
        self.controller(0)  # bounds and samples that no plan could be made with are noticed here

    @property
    def eidetic(self) -> Mapping[str, EideticNetwork]:
        """What `clbench verify` examines."""
        return {"world_model": self.network}

    # -- losses ---------------------------------------------------------------------------------------------------------

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The parameters that ``loss`` trains."""
        return [*(p for p in self.network.parameters() if p.requires_grad), *self.inverse_head.parameters()]

    def loss(self, batch: tuple[Any, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """PLDM's weighted sum on a batch of windows, of the task under way.

        Terms about single numbers of the latent (variances, smoothness) are taken over the free ones, as owned ones would
        add constants only; prediction and covariance are about the whole prefix, which gradients reach where it is free.

        Args:
            batch: observations (B, H + 1, ...) and actions (B, H, A) of ``OfflineDataset.windows``.

        Returns:
            The loss, and its terms before they are weighted.
        """
        config, network, task = self.config, self.network, self.network.task
        observations, actions = batch
        z = network.encode(join(self.keys, observations, axes=2))  # (B, H + 1, L + C)
        predicted = network.rollout(z[:, 0], actions, task)  # (B, H, L + C)
        size = network.latent.size
        prefix, free = network.prefix(task).nonzero()[:, 0], network.own(task).nonzero()[:, 0]
        whole, mine = z.index_select(-1, prefix), z.index_select(-1, free)
        terms = {
            "prediction": prediction_loss(predicted.index_select(-1, prefix), whole[:, 1:]),
            "variance": variance_loss(mine),
            "covariance": covariance_loss(whole),
            "variance_over_time": variance_over_time_loss(mine),
            "smoothness": temporal_smoothness_loss(mine),
            "inverse": inverse_dynamics_loss(self.inverse_head, z, network.command(actions)),
        }
        weights = {"prediction": 1.0, **{k: getattr(config, k) for k in terms if k != "prediction"}}
        if z.shape[-1] > size:
            terms["context"], weights["context"] = context_loss(predicted[..., size:], z[:, 1:, size:]), config.context
        total = torch.stack([weights[k] * v for k, v in terms.items() if weights[k]]).sum()
        return total, {"loss": total.detach(), **{k: v.detach() for k, v in terms.items()}}

    # -- learning -------------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        """A new task; or one that was finished, whose id the stream reveals: it is kept, and nothing is trained."""
        self.known = self.ids.index(task.id) if task.id is not None and task.id in self.ids else None
        if self.known is not None:
            return
        if task.id is None and not self.config.transfer and self.network.committed:
            raise ConfigError(
                "Agent 'eidetic-pldm' cannot tell tasks apart without task ids and without transfer: evidence compares the "
                "numbers that all tasks predict, and there are none. Add --reveals task_id, or let tasks transfer."
            )
        if not self.network.begun:
            self.network.begin_task(self.rng)
        self.ids = [*self.ids[: self.network.task], task.id]
        self.pruner.begin(0)
        self.before, self.cap = {}, 0.0
        self.inverse_head = self._new_inverse_head()
        self.optimizer = self.new_optimizer()

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` gradient updates on windows drawn with ``rng``; pruning is part of them."""
        data = experience.dataset
        if data is None:
            raise ContractError(
                "Agent 'eidetic-pldm' learns from a data set, but the experience of this phase has none."
            )
        if self.known is not None:
            yield {"step": budget, "skipped": float(budget)}
            return
        if self.pruner.left != budget:  # not the rest of a phase that was interrupted
            self._begin_phase(data, budget)
        everything = data.window_starts(self.config.window)
        train, held_out = self._split(data, everything)

        def draw(starts: Tensor, size: int, generator: torch.Generator) -> tuple[Any, Tensor]:
            chosen = starts[torch.randint(len(starts), (size,), generator=generator, device=data.device)]
            return data.windows(chosen, self.config.window)

        judged = draw(held_out, min(JUDGED, len(held_out)), self._fixed(data, "judge"))

        def losses() -> list[Callable[[], Tensor]]:
            source = self._fixed(data, "importance")
            batches = [draw(train, self.config.batch_size, source) for _ in range(4)]
            return [lambda b=b: self.loss(b)[0] for b in batches]

        for step in range(1, budget + 1):
            starts = everything if self.pruner.stage == "finish" else train
            info = self.update(draw(starts, self.config.batch_size, rng))
            pruned = self.pruner.advance(
                quality=lambda: self.quality(judged), losses=losses, optimizer=self.optimizer, rng=rng
            )
            self._models.pop(self.network.task, None)
            if step == budget:
                self._keep(data, everything, held_out)
            report = self.updates % self.config.log_every == 0 or step == budget
            yield {"step": step, **pruned, **({k: v.item() for k, v in info.items()} if report else {})}

    def _begin_phase(self, data: OfflineDataset, budget: int) -> None:
        """What is fixed before the first update.

        The statistics of the inputs come from the first task, for all tasks: owned units go on seeing what they know,
        and younger units build on them. The cap on actions is the task's own.
        """
        count = min(SAMPLE, len(data))
        rows = torch.arange(count, device=data.device) * len(data) // count
        if self.network.committed == 0 and self.updates == 0:
            self.network.fit_normaliser(join(self.keys, data.observation(rows)), data.actions[rows])
        self.cap = max(self.cap, float(data.actions.norm(dim=1).max()))
        self.pruner.begin(budget)

    def update(self, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        """One step of Adam on ``loss``."""
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * schedule(self.pruner.done, self.pruner.total)
        loss, info = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1
        self.samples += batch[1].shape[0] * batch[1].shape[1]
        return info

    @torch.no_grad()
    def quality(self, batch: tuple[Any, Tensor]) -> float:
        """1 + the largest loss of a component since before the first kill, all of them normalised.

        The components are those of :meth:`components`. All must hold: a world model that shrinks its latents would
        predict them well.
        """
        now = self.components(batch)
        self.before = self.before or now  # part of the state: what the task was before anything was killed
        return 1 + min(now[k] - v for k, v in self.before.items())

    @torch.no_grad()
    def components(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """How good the world model is on windows: 1 is perfect, 0 trivial.

        All are about the numbers of the latent that would be the task's own: those of older tasks are there in any case,
        and do not say how much the task needs besides. ``dynamics``: 1 - sum_h E|z^_{t+h} - z_{t+h}|^2 / sum_h E|z_{t+h} -
        z_t|^2, where 0 is to predict that nothing moves. ``probe``: R^2 of what is observed, read off by a linear probe.
        ``rank``: RankMe as a share of how many numbers there are. ``spread``: the smallest standard deviation, at most 1.
        """
        observations, actions = batch
        network, frames = self.network, join(self.keys, observations, axes=2)
        own = network.own(network.task).nonzero()[:, 0]
        with evaluating(network):
            z = network.encode(frames)
            predicted = network.rollout(z[:, 0], actions, network.task).index_select(-1, own)
        z = z.index_select(-1, own)
        moved = (z[:, 1:] - z[:, :1]).square().mean()
        found = {
            "dynamics": float(1 - (predicted - z[:, 1:]).square().mean() / moved.clamp_min(1e-8)),
            "probe": probe_r2(z[:, 0], frames[:, 0, : network.parts[0]]),
            "rank": rankme(z[:, 0]) / min(z[:, 0].shape),
            "spread": min(deviations(z[:, 0])[0], 1.0) if len(z) > 1 else 1.0,
        }
        return {
            k: v for k, v in found.items() if v == v or k == "dynamics"
        }  # a probe of what never varies says nothing

    def finish_task(self) -> None:
        """Commit. All that is alive belongs to the task from now on, and with it all that acts."""
        if self.known is not None or not self.network.begun:
            self.known = None
            return
        settings = self._settings(self.network.task)
        probes = [self.kept["observations"][:PROBES], self.kept["actions"][:PROBES]] if self.kept else None
        task = self.network.commit(probes)
        self.acting.append(settings)
        self._models.pop(task, None)
        if self.kept:
            errors = self._errors(task, *(self.kept[k] for k in ("observations", "actions", "next_observations")))
            variance, floor = calibrate(errors)
            self.evidence.append({"variance": variance, "floor": floor})
        else:  # a task that has seen no data
            self.evidence.append(None)
        self.kept = {}

    def _keep(self, data: OfflineDataset, everything: Tensor, held_out: Tensor) -> None:
        """Transitions for when the task is finished: spread over the held-out windows, or over all where they are few."""
        starts = held_out if len(held_out) >= PROBES else everything
        count = min(CALIBRATED, len(starts))
        # not in order, so that the first of them are a sample too
        order = torch.randperm(len(starts), generator=self._fixed(data, "keep"), device=data.device)[:count]
        observations, actions = data.windows(starts[order], 1)
        frames = join(self.keys, map_obs(torch.clone, observations), axes=2)
        self.kept = {"observations": frames[:, 0].clone(), "actions": actions[:, 0].clone()}
        self.kept["next_observations"] = frames[:, 1].clone()

    def _split(self, data: OfflineDataset, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Windows to train on and to judge on: every n-th episode (or window, where there are few episodes) is held out."""
        period = max(2, round(1 / self.config.held_out))
        place = (
            data.episode[starts] if data.num_episodes >= 2 * period else torch.arange(len(starts), device=data.device)
        )
        out = place % period == period - 1
        if int(out.sum()) < 2 or int((~out).sum()) < 2:
            return starts, starts
        return starts[~out], starts[out]

    def _fixed(self, data: OfflineDataset, name: str) -> torch.Generator:
        """A generator that is the same whenever it is asked for: what it draws is no part of the state."""
        seed = {"judge": 1, "importance": 2, "keep": 3}[name]
        return torch.Generator(data.device).manual_seed(1000 * self.network.task + seed)

    def _new_inverse_head(self) -> nn.Module:
        network = self.network
        shape = (network.latent.size + network.parts[1],)
        return new_inverse_head(shape, len(network.command.standardise.mean), hidden=256, rng=self.rng).to(self.device)

    def new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.trainables, lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    # -- acting ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The next actions of the plans of the task that ``task`` names, or that the evidence speaks for.

        ``memory`` holds per task the controller's memory of all rows, which task each row has, and, where tasks are found
        by evidence, what it is. A row that changes its task begins a new plan.
        """
        rows = len(first)
        chosen, seen = self._choose(obs, memory, first, task)
        plans = {} if memory is None else dict(memory["plans"])
        fresh = first if memory is None else first | (chosen != memory["task"])
        actions = torch.zeros(rows, self.network.command.size, device=self.device)
        noise, drawn = rng.get_state(), None
        for k in chosen.unique().tolist():
            mine = (chosen == k).nonzero()[:, 0]
            rng.set_state(noise)  # a plan must not depend on which tasks others have
            before = None if k not in plans else _rows(plans[k], mine)
            actions[mine], after = self._plan(k, map_obs(lambda v: v[mine], obs), before, fresh[mine], rng)  # noqa: B023
            plans[k] = _spread(after, plans.get(k), mine, rows)
            state = rng.get_state()
            drawn = state if drawn is None or not torch.equal(state, noise) else drawn
        if drawn is not None:
            rng.set_state(drawn)
        if "evidence" in seen:
            seen["action"] = actions.clone()
        return actions, {"plans": plans, "task": chosen, **seen}

    def _plan(self, task: int, obs: Any, memory: Any, first: Tensor, rng: torch.Generator) -> tuple[Tensor, Any]:
        model, controller, settings = self.model(task), self.controller(task), self._settings(task)
        due = controller.due(memory, first)
        rows = due.nonzero()[:, 0] if self.device.type == "cpu" else torch.arange(len(first), device=self.device)
        z, goal = (torch.zeros(len(first), *model.latent_shape, device=self.device) for _ in range(2))
        with evaluating(model.network):
            if len(rows):
                needed = map_obs(lambda v: v[rows], obs)
                z[rows], goal[rows] = model.encode(needed), model.encode_goal(needed)
            horizon = controller.planner.config.horizon
            objective = GoalDistance(goal, reduce=settings["reduce"], horizon=horizon, features=model.goal_features)
            return controller.act(model, z, objective, memory, first, rng=rng)

    def model(self, task: int) -> TaskModel:
        """The world model of a task. Finished ones run alone, so that not a bit depends on what came later."""
        if task not in self._models:
            network = self.network.extract(task) if task < self.network.committed else self.network
            self._models[task] = TaskModel(network, task, self.keys, distance=self._settings(task)["distance"])
        return self._models[task]

    def _settings(self, task: int) -> dict[str, Any]:
        """How a task acts: as it was committed, or by the configuration for the task under way."""
        if task < len(self.acting):
            return self.acting[task]
        c = self.config
        return {
            "cap": self.cap, "planner": c.planner, "options": dict(c.planner_options), "replan_every": c.replan_every,
            "escape": c.escape, "reduce": c.reduce, "distance": c.distance,
        }  # fmt: skip

    def controller(self, task: int) -> MPC:
        """The task's planner in receding horizon, within the action space and the norms seen in its data."""
        settings = self._settings(task)
        # kept, since a planner keeps what it records on a GPU
        if task not in self._controllers or self._controllers[task][0] != settings:
            space = self.spaces.action
            assert isinstance(space, Box)
            allowed = self.config.cap_actions and bool((space.low <= 0).all() and (space.high >= 0).all())
            bounds = ActionBounds.of(space, settings["cap"] if allowed and settings["cap"] > 0 else None)
            planner_class = resolve("planners", settings["planner"])
            options = build(planner_class.Config, settings["options"], where=f"planner {settings['planner']!r}")
            mpc = MPC(planner_class(bounds, options), replan_every=settings["replan_every"], escape=settings["escape"])
            self._controllers[task] = settings, mpc
        return self._controllers[task][1]

    # -- which task -----------------------------------------------------------------------------------------------------

    def _choose(self, obs: Any, memory: Any, first: Tensor, task: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """Task of the network (B,) int64 for each row, and what evidence there is for the memory.

        Ids that have not been learned yet, and all rows before the first commit, get the newest task.
        """
        chosen = torch.full((len(first),), self.network.task, device=self.device)
        if task is not None and None not in self.ids:
            for k, known in enumerate(self.ids):
                chosen[task == known] = k
            return chosen, {}
        if not self.evidence:
            return chosen, {}
        raw = join(self.keys, obs)
        last = memory if memory is not None and "evidence" in memory else None
        return self.weigh(raw, last, first)

    def weigh(self, raw: Tensor, memory: Mapping[str, Any] | None, first: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Observations (B, n + C) and what was seen before -> chosen task (B,), and what is seen now.

        The memory has ``evidence`` (B, K), ``leads`` (B, K) bool (see :func:`clbench.agents.jepa.evidence.decide`), the
        last ``observation`` (B, n + C) and ``action`` (B, A), which the caller adds.
        """
        count = len(self.evidence)
        evidence = torch.zeros(len(raw), count, device=self.device)
        leads = torch.zeros(len(raw), count, dtype=torch.bool, device=self.device)
        if memory is not None and memory["evidence"].shape == evidence.shape:
            new = torch.stack([
                self._likelihood(k, memory["observation"], memory["action"], raw) for k in range(count)
            ], 1)  # fmt: skip
            begun = ~first[:, None]
            evidence = torch.where(begun, accumulate(memory["evidence"], new, self.config.leak), 0.0)
            leads = memory["leads"] & begun
        chosen, leads = decide(evidence, leads, self.config.hysteresis)
        return chosen, {"evidence": evidence, "leads": leads, "observation": raw.clone()}

    def _likelihood(self, task: int, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """(B,): log likelihood of a transition under a finished task."""
        known = self.evidence[task]
        if known is None:
            return torch.full((len(before),), -1e9, device=self.device)
        errors = self._errors(task, before, action, after)
        return log_likelihood(errors, known["variance"], known["floor"])

    @torch.no_grad()
    def _errors(self, task: int, before: Tensor, action: Tensor, after: Tensor) -> Tensor:
        """(B, m): by how much a finished task mispredicts the numbers of the oldest task, which all tasks predict."""
        network = self.model(task).network
        error = network.encode(after) - network.predict(network.encode(before), action, task)
        return error.index_select(-1, (network.latent.owner == 0).nonzero()[:, 0])

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        live = {
            "network": dict(self.network.state_dict()), "inverse_head": dict(self.inverse_head.state_dict()),
            "optimizer": self.optimizer.state_dict(), "kept": self.kept, "acting": self.acting, "evidence": self.evidence,
        }  # fmt: skip
        return {
            **copy.deepcopy(live), "rng": self.rng.get_state(), "pruner": self.pruner.state_dict(), "ids": list(self.ids),
            "known": self.known, "cap": self.cap, "before": dict(self.before), "updates": self.updates,
            "samples": self.samples,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.restore(state["network"])
        self.inverse_head.load_state_dict(state["inverse_head"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        for name in ("kept", "acting", "evidence"):
            setattr(self, name, copy.deepcopy(state[name]))
        self.rng.set_state(state["rng"])
        self.pruner.load_state_dict(state["pruner"])
        self.ids, self.known = list(state["ids"]), state["known"]
        self.cap, self.before = float(state["cap"]), dict(state["before"])
        self.updates, self.samples = int(state["updates"]), int(state["samples"])
        self._models, self._controllers = {}, {}

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples (transitions) processed so far; tasks that come back have none."""
        return {"updates": self.updates, "samples": self.samples}

    @property
    def num_parameters(self) -> int:
        """Of the world model; the head of the inverse model is needed for training only."""
        return count_parameters(self.network)


def schedule(done: int, total: int, *, warm_up: float = 0.1, hold: float = 0.6, final: float = 1e-2) -> float:
    """Factor on the learning rate after ``done`` of ``total`` updates: warm-up, constant while most is pruned, cosine."""
    if done < warm_up * total:
        return (done + 1) / (warm_up * total + 1)
    progress = min(max(done / max(total, 1) - hold, 0.0) / (1 - hold), 1.0)
    return final + (1 - final) * 0.5 * (1 + float(np.cos(np.pi * progress)))


def _sizes(spaces: Spaces) -> tuple[Keys, tuple[int, int, int]]:
    """What is what in observations, and how many numbers have the goal part, the context and an action.

    Raises:
        ConfigError: anything but goal observations of Box vectors and Box actions of one axis.
    """
    action, space = spaces.action, spaces.observation
    if not isinstance(action, Box) or len(action.shape) != 1:
        raise ConfigError(f"Agent 'eidetic-pldm' plans Box actions of one axis, but the action space is {action}.")
    if not isinstance(space, Dict):
        raise ConfigError(
            f"Agent 'eidetic-pldm' plans towards goals, but observations have no key 'desired_goal': {space}."
        )
    if SIGN in space.spaces:
        raise ConfigError(
            f"Agent 'eidetic-pldm' does not avoid goals, but observations have a key {SIGN!r}; use 'pldm'."
        )
    keys = Keys.of(space)
    if keys.target is None:
        raise ConfigError(
            f"Agent 'eidetic-pldm' plans towards goals, but observations have no key 'desired_goal': {space}."
        )
    found = {}
    for key in (keys.goal, *keys.context):
        part = space[key]  # type: ignore[index]
        if not isinstance(part, Box) or part.dtype == np.uint8 or len(part.shape) != 1:
            raise ConfigError(f"Agent 'eidetic-pldm' takes states, Box vectors, but {key!r} is {part}.")
        found[key] = int(part.shape[0])
    goal = found.pop(keys.goal)
    return keys, (goal, sum(found.values()), int(action.shape[0]))


def _rows(tree: Any, rows: Tensor) -> Any:
    """Some rows of all tensors in nested dicts."""
    if isinstance(tree, Mapping):
        return {k: _rows(v, rows) for k, v in tree.items()}
    return tree if tree is None else tree[rows]


def _spread(tree: Any, before: Any, rows: Tensor, total: int) -> Any:
    """The inverse of :func:`_rows`: tensors of ``total`` rows, of ``before`` (or zeros) where they are not given."""
    if isinstance(tree, Mapping):
        return {k: _spread(v, None if before is None else before[k], rows, total) for k, v in tree.items()}
    if tree is None or len(tree) == total:
        return tree
    whole = tree.new_zeros(total, *tree.shape[1:]) if before is None else before
    return whole.index_copy(0, rows, tree)
