"""Which task an input belongs to, where nobody says.

``novelty``
    One density per task, fitted when the task ends and never changed: ``score_k(x) = log sum_c pi_c N(x; mu_c, Sigma)``
    over the classes of the task (one Gaussian where actions are no classes). The decision is the task with the highest
    score, the older one in a tie. As scores are frozen, adding a task can only move a decision *to the new task*.
``trained``
    A classifier of tasks as in arXiv 2502.09500, trained anew on examples of **all** tasks whenever one ends. It needs a
    store of examples, that is, replay; and what it says about old tasks is not protected.
``newest``
    No router: the newest task answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clbench.errors import ConfigError

FULL_COVARIANCE = 1024  # numbers in an input; beyond, variances only


class NoveltyRouter:
    """Gaussian class densities per task, with a covariance that the classes of a task share.

    Args:
        shrink: weight of a multiple of the identity in the covariance, in [0, 1].
        floor: added to variances, in units of the input squared.
    """

    needs_all_data = False

    def __init__(self, *, shrink: float = 0.1, floor: float = 1e-3):
        if not (0 <= shrink <= 1 and floor > 0):
            raise ConfigError(f"shrink must be in [0, 1] and floor positive, got {shrink} and {floor}.")
        self.shrink, self.floor = shrink, floor
        self.tasks: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(self, x: Tensor, labels: Tensor | None = None) -> None:
        """The next task, from its examples.

        Args:
            x: (N, n).
            labels: (N,) int64 classes, or None.
        """
        x = x.double()
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        means = x.new_zeros(len(counts), x.shape[1]).index_add_(0, inverse, x) / counts[:, None]
        rest = x - means[inverse]
        if x.shape[1] <= FULL_COVARIANCE:
            covariance = rest.mT @ rest / len(x)
            scale = covariance.diagonal().mean()
            eye = torch.eye(len(covariance), dtype=x.dtype, device=x.device)
            covariance = (1 - self.shrink) * covariance + (self.shrink * scale + self.floor) * eye
            root = torch.linalg.cholesky(covariance)
            # whitening matrix: ||(x - mu) @ whiten||^2 is the Mahalanobis distance
            whiten = torch.linalg.solve_triangular(root, eye, upper=False).mT
            log_det = 2 * root.diagonal().log().sum()
        else:
            variance = rest.square().mean(0)
            variance = (1 - self.shrink) * variance + self.shrink * variance.mean() + self.floor
            whiten, log_det = variance.rsqrt(), variance.log().sum()
        prior = (counts / len(x)).log()
        self.tasks.append({"means": means, "whiten": whiten, "constant": prior - 0.5 * log_det})

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """(B, n) -> (B, tasks): log densities up to a constant that all tasks share."""
        return torch.stack([self._score(x.double(), task) for task in self.tasks], 1)

    def _score(self, x: Tensor, task: Mapping[str, Tensor]) -> Tensor:
        rest = x[:, None] - task["means"]
        white = rest @ task["whiten"] if task["whiten"].ndim == 2 else rest * task["whiten"]
        return (task["constant"] - 0.5 * white.square().sum(-1)).logsumexp(1)

    def route(self, x: Tensor) -> Tensor:
        """(B, n) -> (B,) int64 number of the task."""
        return first_maximum(self.scores(x))

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": copy.deepcopy(self.tasks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tasks = copy.deepcopy(list(state["tasks"]))


class TrainedRouter:
    """A classifier of tasks, trained from scratch on a store of examples of all tasks whenever one is added.

    Args:
        size: numbers in an input.
        rng: draws weights and batches; part of the state.
        hidden: width of its hidden layer.
        samples: examples per task that are stored.
        updates: gradient steps whenever a task is added.
    """

    needs_all_data = True

    def __init__(
        self, size: int, *, rng: torch.Generator, hidden: int = 256, samples: int = 1000, updates: int = 500
    ) -> None:
        self.size, self.rng, self.hidden, self.samples, self.updates = size, rng, hidden, samples, updates
        self.store: list[Tensor] = []
        self.net: nn.Sequential | None = None

    @property
    def tasks(self) -> list[Tensor]:
        return self.store

    def add(self, x: Tensor, labels: Tensor | None = None) -> None:
        """The next task, from its examples x (N, n); the classifier is trained again."""
        chosen = torch.randperm(len(x), generator=self.rng, device=self.rng.device)[: self.samples]
        self.store.append(x[chosen.to(x.device)].float().clone())
        data = torch.cat(self.store)
        target = torch.cat([torch.full((len(s),), k, device=x.device) for k, s in enumerate(self.store)])
        self.net = self._new(len(self.store), x.device)
        optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        for _ in range(self.updates):
            rows = torch.randint(len(data), (128,), generator=self.rng, device=self.rng.device).to(x.device)
            loss = nn.functional.cross_entropy(self.net(data[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _new(self, tasks: int, device: torch.device) -> nn.Sequential:
        with torch.device("meta"):
            net = nn.Sequential(nn.Linear(self.size, self.hidden), nn.ReLU(), nn.Linear(self.hidden, tasks))
        net = net.to_empty(device=device)
        with torch.no_grad():
            for layer in (net[0], net[2]):
                bound = 1 / math.sqrt(layer.in_features)  # type: ignore[arg-type]
                for p in layer.parameters():
                    draw = torch.rand(p.shape, generator=self.rng, device=self.rng.device)
                    p.copy_(draw.mul_(2 * bound).sub_(bound))
        return net

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """(B, n) -> (B, tasks): log probabilities."""
        assert self.net is not None
        return self.net(x.float()).log_softmax(1)

    def route(self, x: Tensor) -> Tensor:
        """(B, n) -> (B,) int64 number of the task."""
        return first_maximum(self.scores(x))

    def state_dict(self) -> dict[str, Any]:
        net = None if self.net is None else copy.deepcopy(dict(self.net.state_dict()))
        return {"store": copy.deepcopy(self.store), "net": net, "rng": self.rng.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.store = copy.deepcopy(list(state["store"]))
        self.net = None
        if state["net"] is not None:
            self.net = self._new(len(self.store), self.store[0].device)
            self.net.load_state_dict(state["net"])
        self.rng.set_state(state["rng"])


def first_maximum(scores: Tensor) -> Tensor:
    """(B, K) -> (B,) int64: the largest, the first of equal ones. NaN counts as the smallest."""
    scores = scores.nan_to_num(nan=-math.inf)
    return (scores == scores.amax(1, keepdim=True)).to(torch.int8).argmax(1)
