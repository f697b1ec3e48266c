"""UPGD: utility-based perturbed gradient descent, as an optimiser for any network and as continual methods.

The update is the one of the authors' code: in their README the same step is multiplied by 2. They divide bias-corrected
utilities by the largest **uncorrected** one; here both are corrected, as the paper's algorithm has it, so that the most
useful weight has utility 1 from the first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clbench.agents.continual.method import Learner, Method, restore_generator
from clbench.agents.continual.units import Hidden, find_units
from clbench.errors import ConfigError


class UPGD(torch.optim.Optimizer):
    """First-order UPGD with the globally scaled utility (Elsayed & Mahmood 2024)::

        u  = beta u - (1 - beta) g w;   u^ = u / (1 - beta^t);   eta = max u^ over all parameters
        w  = (1 - lr weight_decay) w - lr (g + xi) (1 - sigmoid(u^ / eta)),   xi ~ N(0, sigma^2)

    ``-g w`` is to first order what the loss would rise by if w were 0. A useless weight moves with half the step and half
    the noise, the most useful one with 0.27 of both. Where no utility is positive, eta is the smallest positive number. ::

        PPO("MlpPolicy", env, policy_kwargs={"optimizer_class": UPGD, "optimizer_kwargs": {"adaptive": True, "lr": 3e-4}})

    Args:
        params: as of every optimiser of torch.
        lr, weight_decay, sigma: see above.
        beta: decay of the utility's trace.
        adaptive: Adam's ratio of moments in place of g in the step, not in the utility (AdaUPGD; its form from memory).
        betas, eps: of Adam.
        rng: draws the noise; a number seeds a generator of its own. Its state is part of ``state_dict``.
        units: hidden units whose incoming weights share one gate (feature-wise UPGD); everything else takes plain steps
            with weight decay, without noise. The utility of a unit is ``-h dL/dh``, which is the sum of ``-g w`` over its
            outgoing weights exactly, whatever the activation. (Exact without a norm after the activation.)
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.01, weight_decay: float = 0.001, sigma: float = 0.1,
        beta: float = 0.999, adaptive: bool = False, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        rng: torch.Generator | int = 0, units: Sequence[Hidden] | None = None,
    ):  # fmt: skip
        check(lr, weight_decay, sigma, beta)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "sigma": sigma, "beta": beta,
                                  "adaptive": adaptive, "betas": betas, "eps": eps})  # fmt: skip
        device = self.param_groups[0]["params"][0].device
        self.rng = rng if isinstance(rng, torch.Generator) else torch.Generator(device).manual_seed(rng)
        self.units = units

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, params) for group, params in groups if params]
        if not groups:
            return loss
        gates = self._weight_gates(groups) if self.units is None else self._feature_gates(groups, self.units)
        for group, params in groups:
            change = self._adam(group, params) if group["adaptive"] else [p.grad for p in params]
            noise = self._noise(group, params)
            if self.units is None:
                change = torch._foreach_add(change, noise)
                torch._foreach_mul_(change, [gates[p] for p in params])
            else:  # what has no gate takes the whole step, without noise
                each = zip(params, change, noise, strict=True)
                change = [(g + xi) * gates[p] if p in gates else g for p, g, xi in each]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, change, alpha=-group["lr"])
        return loss

    def _weight_gates(self, groups: Sequence[tuple[dict[str, Any], list[Tensor]]]) -> dict[Tensor, Tensor]:
        """``1 - sigmoid(u^ / eta)`` of every weight."""
        found: dict[Tensor, Tensor] = {}
        for group, params in groups:
            instantaneous = torch._foreach_mul([p.grad for p in params], params)  # type: ignore[arg-type]
            utilities = [self._trace(p, p.shape) for p in params]
            torch._foreach_mul_(utilities, group["beta"])
            torch._foreach_sub_(utilities, instantaneous, alpha=1 - group["beta"])
            corrections = [1 - group["beta"] ** self.state[p]["step"] for p in params]
            found |= zip(params, torch._foreach_div(utilities, corrections), strict=True)
        return dict(zip(found, gate(list(found.values())), strict=True))

    def _feature_gates(
        self, groups: Sequence[tuple[dict[str, Any], list[Tensor]]], units: Sequence[Hidden]
    ) -> dict[Tensor, Tensor]:
        """The gate of each unit, in a shape that broadcasts against each of its incoming parameters."""
        group_of = {p: group for group, params in groups for p in params}
        found: list[tuple[Hidden, Tensor]] = []
        for hidden in units:
            group = group_of.get(hidden.weight.parameter)
            outgoing = [part for part in hidden.outgoing if part.parameter.grad is not None]
            if group is None or not outgoing:
                continue
            products = [part.of(-part.parameter.grad) * part.of(part.parameter) for part in outgoing]  # type: ignore[operator]
            utility = self._trace(hidden.weight.parameter, hidden.shape)
            utility.lerp_(torch.stack([each.sum(-1) for each in products]).sum(0), 1 - group["beta"])
            found.append((hidden, utility / (1 - group["beta"] ** self.state[hidden.weight.parameter]["step"])))
        values = gate([utility for _, utility in found]) if found else []
        gates: dict[Tensor, Tensor] = {}
        for (hidden, _), value in zip(found, values, strict=True):
            for part in hidden.incoming:
                gates[part.parameter] = part.back(value[..., None])
        return gates

    def _trace(self, p: Tensor, shape: Sequence[int]) -> Tensor:
        """The utility's trace at a parameter, whose number of steps is raised by 1."""
        state = self.state[p]
        if "utility" not in state:
            state["step"], state["utility"] = 0, torch.zeros(shape, dtype=p.dtype, device=p.device)
        state["step"] += 1
        return state["utility"]

    def _noise(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
        """One draw for all parameters of a group."""
        draw = torch.randn(sum(p.numel() for p in params), generator=self.rng, device=self.rng.device)
        parts = draw.mul_(group["sigma"]).to(params[0].device).split([p.numel() for p in params])
        return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]

    def _adam(self, group: dict[str, Any], params: Sequence[Tensor]) -> list[Tensor]:
        """``m^ / (sqrt(v^) + eps)``."""
        (beta1, beta2), changes = group["betas"], []
        for p in params:
            state = self.state[p]
            assert p.grad is not None
            if "exp_avg" not in state:
                state["adam_step"], state["exp_avg"], state["exp_avg_sq"] = 0, torch.zeros_like(p), torch.zeros_like(p)
            state["adam_step"] += 1
            mean, square = state["exp_avg"].lerp_(p.grad, 1 - beta1), state["exp_avg_sq"]
            square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            correction1, correction2 = 1 - beta1 ** state["adam_step"], 1 - beta2 ** state["adam_step"]
            changes.append(mean / correction1 / ((square / correction2).sqrt_() + group["eps"]))
        return changes

    def state_dict(self) -> dict[str, Any]:
        """Of every optimiser, and of the generator of the noise."""
        return {**super().state_dict(), "rng": self.rng.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        restore_generator(self.rng, state_dict["rng"])


def gate(utilities: list[Tensor]) -> list[Tensor]:
    """``1 - sigmoid(u / eta)``, eta the largest utility of all."""
    eta = torch.stack([u.max() for u in utilities]).max().clamp_min(torch.finfo(torch.float32).tiny)
    scaled = list(torch._foreach_div(utilities, -eta))
    torch._foreach_sigmoid_(scaled)
    return scaled


def check(lr: float, weight_decay: float, sigma: float, beta: float) -> None:
    """Raises:
    ConfigError: a value out of range.
    """
    if not lr > 0:
        raise ConfigError(f"lr must be positive, got {lr}.")
    if not (weight_decay >= 0 and sigma >= 0):
        raise ConfigError(f"weight_decay and sigma must be at least 0, got {weight_decay}, {sigma}.")
    if not 0 <= beta < 1:
        raise ConfigError(f"beta must be in [0, 1), got {beta}.")


class WeightUPGD(Method):
    """UPGD, weight by weight, in place of the agent's optimiser. It needs no boundaries.

    An agent that makes a fresh optimiser for each task (``reset_optimizer``) forgets the utilities with it.
    """

    requires = frozenset({"optimizer"})
    paper = "Elsayed & Mahmood 2024 (Addressing Loss of Plasticity and Catastrophic Forgetting in Continual Learning)"
    formula = "w <- (1 - lr wd) w - lr (g + xi) (1 - sigmoid(u / max u)), u the trace of -g w, xi ~ N(0, sigma^2)"

    @dataclass
    class Config:
        """Options.

        Args:
            lr: learning rate, in place of the agent's.
            weight_decay: decoupled; times lr.
            sigma: standard deviation of the noise, which is added to the gradient.
            beta: decay of the utility's trace.
            adaptive: Adam's moments in place of the gradient, for reinforcement learning (AdaUPGD).
        """

        lr: float = 0.01
        weight_decay: float = 0.001
        sigma: float = 0.1
        beta: float = 0.999
        adaptive: bool = False

        def __post_init__(self) -> None:
            check(self.lr, self.weight_decay, self.sigma, self.beta)

    units: Sequence[Hidden] | None = None

    def new_optimizer(self, params: Sequence[nn.Parameter]) -> UPGD:
        c = self.config
        return UPGD(params, c.lr, c.weight_decay, c.sigma, c.beta, c.adaptive, rng=self.rng, units=self.units)


class FeatureUPGD(WeightUPGD):
    """UPGD, hidden unit by hidden unit: a unit's incoming weights share the gate of its utility -h dL/dh.

    As in the authors' code, which measures the utility at a gate of 1 behind each unit, other parameters (the output layer)
    take plain steps without noise.

    Raises:
        ConfigError: the agent has no hidden units that :mod:`clbench.agents.continual.units` finds.
    """

    formula = "as upgd, u of a hidden unit: the trace of -h dL/dh = -sum of g w over its outgoing weights"

    @dataclass
    class Config(WeightUPGD.Config):
        """Options: see :class:`WeightUPGD.Config`."""

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        self.rebuilt()

    def rebuilt(self) -> None:
        self.units = find_units(self.learner.agent)
