"""Small world models for the tests of the planners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clbench.planners.bounds import ActionBounds
from clbench.planners.steppers import MLPStepper
from clbench.rng import torch_generator


class Point:
    """A latent (..., 2) that is moved by the action; remembers the actions it has seen."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        self.seen.append(action.detach().reshape(-1, action.shape[-1]).clone())
        return z + action


class Network:
    """``z' = W2 relu(W1 [z, a] + b1) + b2``, with or without a stepper."""

    def __init__(self, latent: int = 6, hidden: int = 16, actions: int = 2, *, fast: bool = True, seed: int = 0):
        rng = torch_generator(seed, "network")
        self.latent = latent
        self.w1 = torch.randn(hidden, latent + actions, generator=rng) / (latent + actions) ** 0.5
        self.b1 = torch.randn(hidden, generator=rng) * 0.1
        self.w2 = torch.randn(latent, hidden, generator=rng) / hidden**0.5
        self.b2 = torch.randn(latent, generator=rng) * 0.1
        if fast:
            self.stepper = self._stepper

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        hidden = torch.relu(functional.linear(torch.cat([z, action], -1), self.w1, self.b1))
        return functional.linear(hidden, self.w2, self.b2)

    def _stepper(self, rows: int, dtype: torch.dtype | None = None) -> MLPStepper:
        layers = lambda: [(self.w1, self.b1), (self.w2, self.b2)]  # noqa: E731
        return MLPStepper(rows, layers, latent=self.latent, dtype=dtype)


class LinearQuadratic:
    """``x' = A x + B u`` with the cost ``sum_t x_t' Q x_t + u_(t-1)' R u_(t-1)``; the latent is ``[x, u]``, so that the
    cost is a function of the latent."""

    def __init__(self, horizon: int):
        self.horizon = horizon
        self.a = torch.tensor([[1.0, 0.2], [0.0, 1.0]])
        self.b = torch.tensor([[0.0, 0.1], [0.2, 0.0]])
        self.q, self.r = torch.diag(torch.tensor([1.0, 0.3])), torch.diag(torch.tensor([0.1, 0.2]))
        self.start = torch.tensor([[0.5, -0.3, 0.0, 0.0], [-0.4, 0.5, 0.0, 0.0], [0.2, 0.4, 0.0, 0.0]])
        self.bounds = ActionBounds([-2.0, -2.0], [2.0, 2.0])

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        return torch.cat([z[..., :2] @ self.a.T + action @ self.b.T, action], -1)

    def objective(self, z: Tensor, step: int) -> Tensor:
        x, u = z[..., :2], z[..., 2:]
        return ((x @ self.q) * x).sum(-1) + ((u @ self.r) * u).sum(-1)

    def cost(self, actions: Tensor) -> Tensor:
        """Costs (B,) of plans (B, H, A) from :attr:`start`."""
        z, total = self.start, torch.zeros(len(self.start))
        for step, action in enumerate(actions.unbind(1), 1):
            z = self.predict(z, action)
            total = total + self.objective(z, step)
        return total

    def optimum(self) -> Tensor:
        """``x_0' P_0 x_0`` (B,) by the Riccati recursion, without bounds."""
        a, b, q, r = (m.double() for m in (self.a, self.b, self.q, self.r))
        p = q
        for t in reversed(range(self.horizon)):
            gain = torch.linalg.solve(r + b.T @ p @ b, b.T @ p @ a)
            p = (q if t else torch.zeros_like(q)) + a.T @ p @ a - a.T @ p @ b @ gain
        x = self.start[:, :2].double()
        return ((x @ p) * x).sum(-1).float()


def small(cls: Any, **options: Any) -> Any:
    """A planner with few samples, for tests that do not ask how good its plan is."""
    sizes: dict[str, Any] = {"horizon": 4}
    if "samples" in cls.Config.__dataclass_fields__:
        sizes |= {"samples": 48, "iterations": 2, "prior_samples": 4}
    else:
        sizes |= {"iterations": 5, "restarts": 3}
    if "elites" in cls.Config.__dataclass_fields__:
        sizes["elites"] = 8
    return cls.Config(**{**sizes, **options})
