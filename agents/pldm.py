"""PLDM: plan in the latent space of a world model that was trained on offline data without rewards.

Sobal et al. 2025, "Learning from Reward-Free Offline Data: A Case for Planning with Latent Dynamics Models" (arXiv
2502.14819). ``learn`` fits encoder ``h`` and predictor ``f`` to windows ``s_0, a_0, ..., s_H`` of the data::

    z_t = h(s_t),   z^_0 = z_0,   z^_{t+1} = f(z^_t, a_t)          rolled out from the first latent, no teacher forcing
    L = L_sim + alpha L_var + beta L_cov + alpha_t L_var_t + delta L_time_sim + omega L_idm + L_context

``act`` encodes observation and goal once and searches actions whose predicted latents come close to the goal's, for all
environments at once, in receding horizon. A new task is a new objective, not a new training.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor, nn

from clbench.agents.jepa.diagnostics import diagnose
from clbench.agents.jepa.losses import (
    barlow_twins_loss,
    context_loss,
    covariance_loss,
    forward_inverse_loss,
    inverse_dynamics_loss,
    new_inverse_head,
    prediction_loss,
    self_prediction_loss,
    temporal_smoothness_loss,
    variance_loss,
    variance_over_time_loss,
)
from clbench.agents.jepa.model import Architecture, LatentModel
from clbench.agents.networks.mlp import count_parameters
from clbench.agents.networks.outputs import Output
from clbench.config import build
from clbench.contracts import Agent, Experience, Objective, Spaces
from clbench.data.dataset import OfflineDataset, Rendered, map_obs
from clbench.errors import ConfigError, ContractError, unknown_name
from clbench.planners.bounds import ActionBounds
from clbench.planners.mpc import MPC
from clbench.planners.objectives import GoalDistance, Sum, Uncertainty
from clbench.registry import resolve

SIGN = "goal_sign"  # an environment may say by this key, per row, whether its goal is to be reached (1) or avoided (-1)
ANTI_COLLAPSE = ("vicreg", "barlow-twins", "self-prediction", "forward-inverse")
SAMPLE = 1024  # rows for normalisation and diagnostics

# Presets fill in every option that is left at None. `small` is ours, tuned for two CPU cores; the others are the paper's
# (v2, tables 13 to 18) with the planner settings of its code.
_PAPER: dict[str, Any] = {
    "window": 15, "batch_size": 64, "lr": 1.75e-4, "weight_decay": 1e-6, "variance": 4.0, "covariance": 6.9,
    "variance_over_time": 0.25, "smoothness": 0.75, "inverse": 0.0, "context": 1.0, "planner": "mppi", "replan_every": 1,
    "escape": 0.0, "uncertainty": 1e-4,
}  # fmt: skip
_MPPI = {"iterations": "1", "temperature": "0.005", "temperature_scale": "none", "control_cost": "1"}
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        **_PAPER, "architecture": Architecture("small"), "window": 16, "lr": 1e-3, "smoothness": 100.0,
        "inverse": 1.0, "planner": "icem", "replan_every": 4, "escape": 0.2,
        "planner_options": {
            "horizon": "40", "samples": "256", "iterations": "2", "std": "1", "color": "3", "elites": "32",
            "returns": "best",
        },
    },
    "two-rooms": {
        **_PAPER, "architecture": Architecture("two-rooms", members=5),
        "planner_options": {**_MPPI, "horizon": "96", "samples": "500", "std": "0.913"},
    },
    "two-rooms-released": {
        **_PAPER, "architecture": Architecture("two-rooms"), "variance": 3.9843, "covariance": 6.9238,
        "variance_over_time": 0.24535, "smoothness": 0.74242, "inverse": 1.072,
        "planner_options": {**_MPPI, "horizon": "96", "samples": "2000", "std": "1.414"},
    },
    "diverse-maze": {
        **_PAPER, "architecture": Architecture("diverse-maze"), "window": 14, "batch_size": 128, "lr": 0.02,
        "variance": 35.0, "covariance": 12.0, "variance_over_time": 2.92, "smoothness": 0.1, "inverse": 5.4,
        "context": 1.41, "replan_every": 4,
        "planner_options": {**_MPPI, "horizon": "100", "samples": "500", "std": "2.236", "temperature": "0.0025"},
    },
    "ant": {
        **_PAPER, "architecture": Architecture("state-ensemble"), "lr": 7.5e-4, "variance": 26.2, "covariance": 0.5,
        "smoothness": 8.1, "inverse": 0.58, "variance_over_time": 0.0, "uncertainty": 1.0,
        "planner_options": {**_MPPI, "horizon": "96", "samples": "500", "std": "2.236"},
    },
}  # fmt: skip


class PLDM(Agent):
    """World model from offline data, and planning with it.

    Raises:
        ConfigError: spaces that the architecture cannot take, or options out of range.
    """

    requires = frozenset({"dataset", "goal", "continuous"})
    loss_compares_rows = True  # variances are taken over the batch

    @dataclass
    class Config:
        """Options; ``None`` is the value of the preset.

        Args:
            preset: ``small`` for a CPU, ``two-rooms``, ``diverse-maze`` and ``ant`` of the paper, or
                ``two-rooms-released`` as in its published code.
            architecture: the networks; those of the published presets are fixed but for ``members``.
            window: H, actions per training window.
            batch_size: windows per update.
            lr: peak learning rate of Adam: linear warm-up over the first tenth of a phase, then cosine.
            weight_decay: added to the gradient (L2).
            variance: alpha, of the variance term (VICReg).
            covariance: beta, of the covariance term (VICReg).
            variance_over_time: of the variance within windows.
            smoothness: delta, of the squared change of the latent per step. Large values shrink the features that change
                fast, and distances become those of slow features: about how long it takes from here to there.
            inverse: omega, of the inverse dynamics model.
            context: of the prediction of what is observed beside the goal part.
            frozen_inverse: leave the head of the inverse model at its random weights, as the paper's code does.
            anti_collapse: ``vicreg`` (the paper), ``barlow-twins`` or ``self-prediction`` (targets without gradient) in its
                place, or ``forward-inverse`` (prediction and inverse model alone).
            planner: a registered planner.
            planner_options: fields of the planner's ``Config``.
            replan_every: environment steps between two plans.
            escape: a plan that brought less than this share of the latent motion it promised is followed by a random action
                (see :class:`clbench.planners.mpc.MPC`); 0, as in the paper, never.
            reduce: latent distances of all steps of a plan (``sum``), or of the last alone.
            uncertainty: weight of the ensemble's disagreement; counts for ensembles only.
            discount: of the disagreement, per step.
            objective: ``reach`` the goal, or ``avoid`` it; where observations have a key ``goal_sign`` (1 or -1), that
                decides per row instead.
            cap_actions: keep plans within the largest norm of the actions in the data, where nothing is known beyond.
            log_every: updates between two reports of the losses.
            diagnose_every: updates between two measurements of collapse (effective rank, spread, linear probe).
        """

        preset: Literal["small", "two-rooms", "two-rooms-released", "diverse-maze", "ant"] = "small"
        architecture: Architecture = field(default_factory=Architecture)
        window: int | None = None
        batch_size: int | None = None
        lr: float | None = None
        weight_decay: float | None = None
        variance: float | None = None
        covariance: float | None = None
        variance_over_time: float | None = None
        smoothness: float | None = None
        inverse: float | None = None
        context: float | None = None
        frozen_inverse: bool = False
        anti_collapse: Literal["vicreg", "barlow-twins", "self-prediction", "forward-inverse"] = "vicreg"
        planner: str | None = None
        planner_options: dict[str, str | float] = field(default_factory=dict)
        replan_every: int | None = None
        escape: float | None = None
        reduce: Literal["sum", "last"] = "sum"
        uncertainty: float | None = None
        discount: float = 0.9
        objective: Literal["reach", "avoid"] = "reach"
        cap_actions: bool = True
        log_every: int = 50
        diagnose_every: int = 500

        def __post_init__(self) -> None:
            if self.preset not in PRESETS:
                raise ConfigError(f"Unknown preset {self.preset!r}; use one of {', '.join(PRESETS)}.")
            preset = PRESETS[self.preset]
            own = self.planner in (None, preset["planner"])
            self.planner_options = {**(preset["planner_options"] if own else {}), **self.planner_options}
            for name, value in preset.items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            networks, mine = preset["architecture"], self.architecture
            if mine.name is None:
                members = mine.members or networks.members
                self.architecture = dataclasses.replace(mine, name=networks.name, members=members)
            for name, values in (
                ("anti_collapse", ANTI_COLLAPSE), ("reduce", ("sum", "last")), ("objective", ("reach", "avoid")),
            ):  # fmt: skip
                if getattr(self, name) not in values:
                    raise unknown_name(f"value of {name}", str(getattr(self, name)), values, where="agent 'pldm'")
            if not 0 <= self.discount <= 1:
                raise ConfigError(f"discount must be in [0, 1], got {self.discount}.")
            for name in ("window", "batch_size", "lr", "replan_every", "log_every", "diagnose_every"):
                if not getattr(self, name) > 0:
                    raise ConfigError(f"{name} must be positive, got {getattr(self, name)}.")
            for name in ("weight_decay", "variance", "covariance", "variance_over_time", "smoothness", "inverse", "context",
                         "uncertainty"):  # fmt: skip
                if not getattr(self, name) >= 0:
                    raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}.")
            if self.batch_size is not None and self.batch_size < 2:
                raise ConfigError("batch_size must be at least 2: the variance is taken over the batch.")

    def __init__(self, spaces: Spaces, config: Config, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        if not isinstance(spaces.action, Box):
            raise ConfigError(f"Agent 'pldm' plans continuous actions, but the action space is {spaces.action}.")
        self.config: Any = config  # resolved: nothing is None
        seen = Spaces(_without_sign(spaces.observation), spaces.action)
        self.model = LatentModel(seen, config.architecture, rng=rng).to(device)
        if self.model.keys.target is None:
            raise ConfigError(
                f"Agent 'pldm' plans towards goals, but observations have no key 'desired_goal': {spaces.observation}."
            )
        self.inverse_head = new_inverse_head(
            self.model.state_shape, self.model.action_dim, hidden=self._inverse_width, rng=rng
        ).to(device)
        self.planner_class = resolve("planners", self.config.planner)
        self.planner_config = build(
            self.planner_class.Config, self.config.planner_options, where=f"planner {self.config.planner!r}"
        )
        self.largest_action = 0.0  # norm, in the data so far; 0 before any
        space = spaces.action  # a norm is capped by moving towards 0, which must be allowed
        self._capped = config.cap_actions and bool((space.low <= 0).all() and (space.high >= 0).all())
        self._controller: tuple[float | None, MPC] | None = None
        self.controller()  # bounds and samples that no plan could be made with are noticed here
        self.optimizer = self.new_optimizer()
        self.updates = self.samples = 0
        self.phase = (0, 0)  # updates of the present call of `learn`: done, in all

    @property
    def _inverse_width(self) -> int:
        return 256 if self.config.preset == "small" else 512

    # -- losses ---------------------------------------------------------------------------------------------------------

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The parameters that ``loss`` trains."""
        head = [] if self.config.frozen_inverse else list(self.inverse_head.parameters())
        return [*self.model.parameters(), *head]

    def loss(self, batch: tuple[Any, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the paper (its appendix on losses, in the means of its code) on a batch of windows.

        Args:
            batch: observations (B, H + 1, ...) and actions (B, H, A) of ``OfflineDataset.windows``.

        Returns:
            The loss, and its terms before they are weighted.
        """
        config, model = self.config, self.model
        observations, actions = batch
        z = model.encode_frames(observations)  # (B, H + 1, D...)
        predicted = model.rollout(z[:, 0], actions)  # (B, H, [E,] D...)
        goal, goal_predicted = model.goal_features(z), model.goal_features(predicted)
        targets = goal[:, 1:]
        no_gradient = config.anti_collapse == "self-prediction"
        terms = {"prediction": (self_prediction_loss if no_gradient else prediction_loss)(goal_predicted, targets)}
        weights = {"prediction": 1.0}
        if config.anti_collapse == "vicreg":
            terms |= {"variance": variance_loss(goal), "covariance": covariance_loss(goal)}
            weights |= {"variance": config.variance, "covariance": config.covariance}
            if config.variance_over_time:
                terms["variance_over_time"] = variance_over_time_loss(goal)
                weights["variance_over_time"] = config.variance_over_time
        elif config.anti_collapse == "barlow-twins":
            terms["barlow_twins"] = barlow_twins_loss(goal_predicted, targets) / targets.shape[-1]
            weights["barlow_twins"] = config.variance
        if config.smoothness and config.anti_collapse != "forward-inverse":
            terms["smoothness"], weights["smoothness"] = temporal_smoothness_loss(goal), config.smoothness
        if config.inverse or config.anti_collapse == "forward-inverse":
            terms["inverse"] = inverse_dynamics_loss(self.inverse_head, z, model.normalise_actions(actions))
            weights["inverse"] = config.inverse
        if model.context_dim:
            terms["context"] = context_loss(model.context_features(predicted), model.context_features(z[:, 1:]))
            weights["context"] = config.context
        if config.anti_collapse == "forward-inverse":
            terms["forward_inverse"] = forward_inverse_loss(terms["prediction"], terms["inverse"])
            weights |= {"forward_inverse": 1.0, "prediction": 0.0, "inverse": 0.0}
        total = torch.stack([weights[k] * v for k, v in terms.items() if weights[k]]).sum()
        return total, {"loss": total.detach(), **{k: v.detach() for k, v in terms.items()}}

    # -- learning -------------------------------------------------------------------------------------------------------

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        """``budget`` gradient updates on windows drawn with ``rng``; a fresh optimiser and schedule per phase."""
        data = experience.dataset
        if data is None:
            raise ContractError("Agent 'pldm' learns from a data set, but the experience of this phase has none.")
        done, total = self.phase
        if done == total or done + budget != total:  # not the rest of a phase that was interrupted
            self._begin_phase(data, budget)
        for step in range(1, budget + 1):
            info = self.update(self.sample(data, rng))
            report: dict[str, float] = {}
            if self.updates % self.config.log_every == 0 or step == budget:
                report = {k: v.item() for k, v in info.items()}
            if self.updates % self.config.diagnose_every == 0 or step == budget:
                report |= self.diagnose(data)
            yield {"step": step, **report}

    def sample(self, data: OfflineDataset, rng: torch.Generator) -> tuple[Any, Tensor]:
        """A random batch of windows: observations (B, H + 1, ...) and actions (B, H, A)."""
        starts = data.window_starts(self.config.window)
        chosen = starts[torch.randint(len(starts), (self.config.batch_size,), generator=rng, device=data.device)]
        return data.windows(chosen, self.config.window)

    @staticmethod
    def samples_in(batch: tuple[Any, Tensor]) -> int:
        """Transitions in a batch of windows."""
        return batch[1].shape[0] * batch[1].shape[1]

    def outputs(self, batch: tuple[Any, Tensor]) -> tuple[Output, ...]:
        """What planning rests on, for continual methods: the latents that are predicted from the first observation, and
        that observation's own latent; (B, n) each."""
        observations, actions = batch
        first = self.model.encode_frames(map_obs(lambda v: v[:, :1], observations))[:, 0]
        predicted = self.model.rollout(first, actions)
        return tuple(Output("gaussian", v.flatten(1)) for v in (first, predicted))

    def _begin_phase(self, data: OfflineDataset, budget: int) -> None:
        """Normalisation comes from the first phase: later ones must not change what earlier weights mean."""
        rows = _spread(len(data), data.device)
        if self.updates == 0:
            self.model.fit_normaliser(data.observation(rows), data.actions[rows])
        self.largest_action = max(self.largest_action, float(data.actions.norm(dim=1).max()))
        self.optimizer = self.new_optimizer()
        self.phase = (0, budget)

    def update(self, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        """One step of Adam on ``loss``."""
        done, total = self.phase
        for group in self.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * schedule(done, total)
        loss, info = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.phase = (done + 1, total)
        self.updates += 1
        self.samples += self.samples_in(batch)
        return info

    @torch.no_grad()
    def diagnose(self, data: OfflineDataset) -> dict[str, float]:
        """Signs of collapse on rows spread over the data: RankMe, spread per dimension, linear probe of the state."""
        rows = _spread(len(data), data.device)
        z = self.model.encode_frames(map_obs(lambda v: v[:, None], data.observation(rows)))[:, 0]
        return diagnose(self.model.goal_features(z), _state_of(data, self.model.keys.goal, rows))

    @torch.no_grad()
    def probe(self, obs: Any, task: Tensor | None = None) -> dict[str, Tensor]:
        """The embedding (B, n) of observations, where distances are taken, as ``features``."""
        z = self.model.encode_frames(map_obs(lambda v: v[:, None], obs))[:, 0]
        return {"features": self.model.goal_features(z)}

    def new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.trainables, lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    # -- acting ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The next actions of the plans; environments whose plan is used up, or that begin an episode, are planned for."""
        controller = self.controller()
        due = controller.due(memory, first)
        rows = due.nonzero()[:, 0] if self.device.type == "cpu" else torch.arange(len(first), device=self.device)
        z, goal = (torch.zeros(len(first), *self.model.latent_shape, device=self.device) for _ in range(2))
        if len(rows):
            needed = map_obs(lambda v: v[rows], obs)
            z[rows], goal[rows] = self.model.encode(needed), self.model.encode_goal(needed)
        return controller.act(self.model, z, self.objective(goal, obs), memory, first, rng=rng)

    def controller(self) -> MPC:
        """The planner in receding horizon, within the action space and, by default, the norms seen in the data."""
        cap = self.largest_action if self._capped and self.largest_action > 0 else None
        # kept, since a planner keeps what it records on a GPU
        if self._controller is None or self._controller[0] != cap:
            bounds = ActionBounds.of(self.spaces.action, cap)
            planner = self.planner_class(bounds, self.planner_config)
            self._controller = cap, MPC(planner, replan_every=self.config.replan_every, escape=self.config.escape)
        return self._controller[1]

    def objective(self, goal: Tensor, obs: Any = None) -> Objective:
        """Distance to encoded goals (B, *latent), towards or away from them, and the disagreement of an ensemble."""
        sign: float | Tensor = -1.0 if self.config.objective == "avoid" else 1.0
        if isinstance(obs, Mapping) and SIGN in obs:
            sign = obs[SIGN].reshape(-1).to(torch.float32)
        distance = GoalDistance(
            goal, reduce=self.config.reduce, horizon=self.planner_config.horizon, features=self.model.goal_features,
            sign=sign,
        )  # fmt: skip
        if self.model.members == 1 or not self.config.uncertainty:
            return distance
        return Sum(distance, Uncertainty(self.config.uncertainty, self.config.discount))

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        live = {
            "model": dict(self.model.state_dict()), "inverse_head": dict(self.inverse_head.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        counts = {"updates": self.updates, "samples": self.samples, "phase": list(self.phase)}
        return {**copy.deepcopy(live), **counts, "largest_action": self.largest_action}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inverse_head.load_state_dict(state["inverse_head"])
        self.optimizer = self.new_optimizer()
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.updates, self.samples = int(state["updates"]), int(state["samples"])
        done, total = state["phase"]
        self.phase, self.largest_action = (int(done), int(total)), float(state["largest_action"])

    def costs(self) -> dict[str, int]:
        """Gradient updates and training samples (transitions) processed so far."""
        return {"updates": self.updates, "samples": self.samples}

    @property
    def num_parameters(self) -> int:
        """Of the world model; the head of the inverse model is needed for training only."""
        return count_parameters(self.model)


def schedule(done: int, total: int, *, warm_up: float = 0.1, final: float = 1e-3) -> float:
    """Factor on the learning rate after ``done`` of ``total`` updates: linear warm-up, then a cosine down to ``final``.

    The paper's code runs one pass more than its schedule, in which the rate rises again; here it does not.
    """
    first = warm_up * total
    if done < first:
        return (done + 1) / (first + 1)
    progress = (done - first) / max(total - first, 1)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _without_sign(space: gymnasium.Space) -> gymnasium.Space:
    if not isinstance(space, Dict) or SIGN not in space.spaces:
        return space
    return Dict({k: v for k, v in space.spaces.items() if k != SIGN})


def _spread(total: int, device: Any) -> Tensor:
    """Up to ``SAMPLE`` rows spread evenly over ``total``."""
    count = min(SAMPLE, total)
    return torch.arange(count, device=device) * total // count


def _state_of(data: OfflineDataset, key: str | None, rows: Tensor) -> Tensor | None:
    """What a linear probe should read off a latent: the state behind a rendered column, or the observed numbers."""
    column: Any = data.observations if key is None else data.observations[key]
    if isinstance(column, Rendered):
        column = column.columns.get("position")
    return column[rows] if isinstance(column, Tensor) and column.ndim == 2 and column.is_floating_point() else None
