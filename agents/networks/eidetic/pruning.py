"""Which free units a task can do without: importance, and the loop of killing, recovering and judging.

::

    train ----- kill the least important -- recover -- judge --- kill -- recover -- judge --- ... --- finish
                                                        |
                          quality on held-out data has fallen by more than the tolerance: back to before the kill, finish

Only units that nobody owns are candidates. A task may take at most ``1 / (tasks left + 1)`` of the free units of a space;
until it is below that, kills are accepted whatever they cost (the recovery that follows still counts). Quality is a number
of which 1 is perfect and 0 what a trivial baseline has, and the tolerance is additive: a relative one means nothing for
losses, for negative returns, or near 0 (arXiv 2502.09500 uses a relative one on training accuracy).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.ownership import OwnedParameter, Space
from clbench.agents.networks.eidetic.verify import evaluating
from clbench.errors import ConfigError, unknown_name

Losses = Iterable[Callable[[], Tensor]]
CRITERIA = ("l1", "l2", "taylor", "random")


# -- importance ----------------------------------------------------------------------------------------------------------


def importance(
    network: EideticNetwork, criterion: str, *, losses: Losses = (), rng: torch.Generator
) -> dict[str, Tensor]:
    """How much each hidden unit matters: name of its space -> (size,) float; infinite where it is no candidate.

    Args:
        criterion: ``l1`` and ``l2``: norm of a unit's effective weights, summed over the layers that write it, each
            relative to its mean. ``taylor``: the mean over examples of ``|a dL/da|``, to first order the change of the
            loss if the unit's output ``a`` (before a norm) were 0 (Molchanov et al. 2017, with the absolute value inside
            the mean). ``random``: uniform.
        losses: for ``taylor``: functions that give the loss of one batch each.
        rng: for ``random``.

    Raises:
        ConfigError: an unknown criterion, no losses for ``taylor``, or importances that are not finite.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    spaces = network.prunable()
    if criterion == "random":
        draws = {n: torch.rand(s.size, generator=rng, device=rng.device) for n, s in spaces.items()}
        scores = {n: d.to(spaces[n].owner.device) for n, d in draws.items()}
    elif criterion == "taylor":
        scores = _taylor(network, spaces, losses)
    else:
        scores = {n: _norms(network, s, 1 if criterion == "l1" else 2) for n, s in spaces.items()}
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ConfigError(
                f"The importance ({criterion}) of units of {name} is not finite; weights or losses have diverged, so no "
                "unit can be chosen. Lower the learning rate."
            )
    return {n: score.masked_fill(~spaces[n].candidates, math.inf) for n, score in scores.items()}


def per_unit(values: Tensor, parameter: OwnedParameter) -> Tensor:
    """(out size,) -> (size,): sums over the numbers and gates of each unit of the one space that ``parameter`` writes."""
    axis = parameter.out[1]
    (space,) = axis.spaces
    return values.reshape(axis.outer, space.size, space.group * axis.inner).sum((0, 2))


@torch.no_grad()
def _norms(network: EideticNetwork, space: Space, p: int) -> Tensor:
    total = torch.zeros(space.size, device=space.owner.device)
    for _, parameter in network.writers(space):
        powers = parameter().detach().abs().float().pow(p)
        dims = [d for d in range(powers.ndim) if d != parameter.out[0]]
        norm = per_unit(powers.sum(dims), parameter).pow(1 / p)
        chosen = norm[space.candidates]
        total += norm / chosen.mean().clamp_min(1e-12) if len(chosen) else norm
    return total


def _taylor(network: EideticNetwork, spaces: Mapping[str, Space], losses: Losses) -> dict[str, Tensor]:
    totals = {n: torch.zeros(s.size, device=s.owner.device) for n, s in spaces.items()}
    count = 0
    with evaluating(network):
        for loss in losses:
            for space in spaces.values():
                space.taps = []
            try:
                with torch.enable_grad():
                    value = loss()
                    taps = [(n, v, d) for n, s in spaces.items() for v, d in s.taps or [] if v.requires_grad]
                    grads = torch.autograd.grad(value, [v for _, v, _ in taps], allow_unused=True)
            finally:
                for space in spaces.values():
                    space.taps = None
            for (name, output, dim), grad in zip(taps, grads, strict=True):
                if grad is None:
                    continue
                product = (output.detach() * grad).abs().float()
                numbers = product.sum([d for d in range(product.ndim) if d != dim % product.ndim])
                totals[name] += numbers.reshape(spaces[name].size, -1).sum(1)
            count += 1
    if count == 0:
        raise ConfigError("The criterion 'taylor' needs losses of at least one batch.")
    return {n: t / count for n, t in totals.items()}


def choose(score: Tensor, space: Space, kill: int) -> Tensor:
    """(size,) bool: the ``kill`` candidates with the lowest scores; among equal ones the first."""
    order = score.masked_fill(~space.candidates, math.inf).argsort(stable=True)
    mask = torch.zeros_like(space.alive)
    mask[order[:kill]] = True
    return mask & space.candidates


# -- the loop ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning:
    """Options.

    Args:
        criterion: ``l1``, ``l2``, ``taylor`` or ``random``, see :func:`importance`.
        step: share of a space's candidates that one kill removes (more where a task is far above its share).
        tolerance: how much quality on held-out data may fall below the best seen, 1 being perfect.
        tasks: tasks that the network is planned for; each may take ``1 / (tasks left + 1)`` of what is free.
        train: share of a task's budget before the first kill.
        recover: share of a task's budget between a kill and its judgement.
        finish: share of a task's budget after the last judgement.
        least: units of each space that a task keeps at least.
    """

    criterion: Literal["l1", "l2", "taylor", "random"] = "l2"
    step: float = 0.2
    tolerance: float = 0.01
    tasks: int = 10
    train: float = 0.4
    recover: float = 0.02
    finish: float = 0.2
    least: int = 1

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise unknown_name("criterion", str(self.criterion), CRITERIA)
        if not 0 < self.step < 1:
            raise ConfigError(f"step must be between 0 and 1, got {self.step}.")
        if not self.tolerance >= 0:
            raise ConfigError(f"tolerance must be at least 0, got {self.tolerance}.")
        if self.tasks < 1 or self.least < 1:
            raise ConfigError(f"tasks and least must be at least 1, got {self.tasks} and {self.least}.")
        if not (0 <= self.train < 1 and 0 < self.recover <= 1 and 0 <= self.finish < 1):
            raise ConfigError(f"train, recover and finish are shares of a budget, got {self}.")
        if self.train + self.finish >= 1:
            raise ConfigError(f"train and finish leave nothing to prune in: {self.train} + {self.finish} >= 1.")


class Pruner:
    """Decides after each update whether to kill, to judge, or to go back. Its whole state is plain values and tensors.

    Args:
        network: whose free units are pruned.
        config: see :class:`Pruning`.
    """

    def __init__(self, network: EideticNetwork, config: Pruning):
        self.network, self.config = network, config
        self.begin(0)

    def begin(self, total: int) -> None:
        """A new task with a budget of ``total`` updates."""
        self.total, self.done, self.passes = total, 0, 0
        self.stage: str = "train"
        self.best = -math.inf
        self.due = round(self.config.train * total)
        self.forced = False  # whether the last kill stands whatever it cost
        self.kept: dict[str, Any] | None = None  # the last accepted state

    @property
    def left(self) -> int:
        """Updates of this task that are still to come."""
        return self.total - self.done

    def allowed(self, space: Space) -> int:
        """Units of ``space`` that the task may take at most."""
        tasks_left = max(self.config.tasks - self.network.committed - 1, 0)
        return max(self.config.least, int(space.free.sum()) // (tasks_left + 1))

    def over(self) -> bool:
        """Whether the task has more than its share of some space."""
        return any(int(s.candidates.sum()) > self.allowed(s) for s in self.network.prunable().values())

    def advance(
        self, *, quality: Callable[[], float], optimizer: torch.optim.Optimizer, rng: torch.Generator,
        losses: Callable[[], Losses] = tuple,
    ) -> dict[str, float]:  # fmt: skip
        """To be called after each update. Returns numbers to report, most often none.

        Args:
            quality: on held-out data; 1 is perfect, 0 trivial.
            optimizer: goes back with the weights.
            rng: of the training; goes back with the weights, and draws for ``random``.
            losses: batches for the criterion ``taylor``; others need none.
        """
        self.done += 1
        last = self.total - round(self.config.finish * self.total)
        report: dict[str, float] = {}
        if self.stage != "finish" and self.done >= self.due:
            report = self._judge(quality, optimizer, rng)
            if self.stage != "finish":
                recover = max(1, round(self.config.recover * self.total))
                if self.done + recover > last or not self._kill(last, recover, losses, optimizer, rng):
                    self._finish()
                self.due = self.done + recover
        if self.done >= self.total and self.stage != "finish":
            self._finish()
        if self.stage == "finish" and self.over():  # no time was left to do it in steps
            self._trim(losses, rng)
        return report

    def _judge(self, quality: Callable[[], float], optimizer: Any, rng: torch.Generator) -> dict[str, float]:
        """Accept what the last kill has left, or go back to before it."""
        now = float(quality())
        if not math.isfinite(now):
            raise ConfigError(f"The quality on held-out data is {now}; training has diverged. Lower the learning rate.")
        accepted = self.forced or now >= self.best - self.config.tolerance
        if self.kept is not None and not accepted:
            self.network.restore(self.kept["network"])
            optimizer.load_state_dict(copy.deepcopy(self.kept["optimizer"]))
            rng.set_state(self.kept["rng"])
            self._finish()
        self.best = max(self.best, now)
        return {"quality": now, "accepted": float(accepted), "passes": self.passes, "units": self._units()}

    def _kill(
        self, last: int, recover: int, losses: Callable[[], Losses], optimizer: Any, rng: torch.Generator
    ) -> bool:
        """One kill; False if there is nothing to kill. The state before it is kept."""
        spaces = self.network.prunable()
        before = {"network": self.network.snapshot(), "optimizer": copy.deepcopy(optimizer.state_dict())}
        before["rng"] = rng.get_state()
        forced = self.over()
        passes = max(1, (last - self.done) // recover // 2)  # to be within the share at half time
        counts = {}
        for name, space in spaces.items():
            alive, allowed = int(space.candidates.sum()), self.allowed(space)
            share = self.config.step
            if alive > allowed:
                share = max(share, 1 - (allowed / alive) ** (1 / passes))
            elif forced:
                share = 0.0  # others have to come down first
            counts[name] = min(math.ceil(share * alive), max(alive - self.config.least, 0))
        if not any(counts.values()):
            return False
        scores = importance(self.network, self.config.criterion, losses=losses(), rng=rng)
        for name, space in spaces.items():
            space.kill(choose(scores[name], space, counts[name]))
        self.kept, self.forced, self.stage = before, forced, "prune"
        self.passes += 1
        return True

    def _trim(self, losses: Callable[[], Losses], rng: torch.Generator) -> None:
        scores = importance(self.network, self.config.criterion, losses=losses(), rng=rng)
        for name, space in self.network.prunable().items():
            space.kill(choose(scores[name], space, max(int(space.candidates.sum()) - self.allowed(space), 0)))

    def _finish(self) -> None:
        self.stage, self.kept = "finish", None

    def _units(self) -> float:
        """Share of all units that the task has at present."""
        spaces = self.network.prunable().values()
        return sum(int(s.candidates.sum()) for s in spaces) / max(sum(s.size for s in spaces), 1)

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        names = ("total", "done", "passes", "stage", "best", "due", "forced")
        return {**{n: getattr(self, n) for n in names}, "kept": copy.deepcopy(self.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("total", "done", "passes", "stage", "best", "due", "forced"):
            setattr(self, name, state[name])
        self.kept = copy.deepcopy(state["kept"])
