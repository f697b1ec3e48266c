"""UER: the new is learned by angles alone, the old is replayed with norms and angles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clbench.agents.continual.batches import rows
from clbench.agents.continual.memory import Memory, check_sizes
from clbench.agents.continual.method import Learner, Method
from clbench.errors import ConfigError


class UER(Method):
    """Replay for online class-incremental learning without a bias towards the newest classes.

    A logit is ``w_k . f(x) + b_k = |w_k| |f(x)| cos(w_k, f(x)) + b_k``. In the paper's analysis the bias sits in the
    angles, while norms help to remember. So the present batch is learned with the cosines alone, replayed rows with whole
    logits. One acts with whole logits.

    From memory of the paper, to be checked: that the losses of the batch and of replayed rows have equal weight, and that
    ``b`` takes no part in the cosine logits. ``scale`` is an option of ours. The base loss is not replaced: the part of the
    present batch in it is exchanged, so that other methods' parts stay, at the price of one more pass of the batch. (With
    another method that replays, that part would be another one, so the two exclude each other.)
    """

    requires = frozenset({"loss", "features"})
    excludes = {"replays rows": "UER has a memory of its own, and takes the batch's part of the loss apart"}
    paper = "Lin et al. 2023 (UER: A Heuristic Bias Addressing Approach for Online Continual Learning)"
    formula = "CE(scale cos(w, f(x)), y) on the batch + CE(w . f(x'') + b, y'') on rows drawn from the memory"

    @dataclass
    class Config:
        """Options.

        Args:
            memory: rows that are kept.
            batch_size: rows replayed per update; 0: as many as the batch has.
            scale: of the cosines, in place of the product of the norms.
        """

        memory: int = 200
        batch_size: int = 0
        scale: float = 10.0

        def __post_init__(self) -> None:
            check_sizes(self.memory, self.batch_size)
            if not self.scale > 0:
                raise ConfigError(f"scale must be positive, got {self.scale}.")

    def __init__(self, config: Config, learner: Learner, *, rng: torch.Generator):
        super().__init__(config, learner, rng=rng)
        agent = learner.agent
        layers = getattr(getattr(agent, "policy", None), "output_layers", None)
        if layers is None or not hasattr(agent, "loss_of"):
            raise ConfigError("UER takes the output layer apart, and the agent shows none; use it with 'bc'.")
        if not getattr(agent, "discrete", False):
            raise ConfigError("UER is for classes, that is discrete actions; the actions here are continuous.")
        if len(layers) != 1:
            raise ConfigError(f"UER is for one output layer, but the agent has {len(layers)}; leave heads at 1.")
        self.memory = Memory(config.memory, device=learner.device)

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        agent = self.learner.agent
        layer = agent.policy.output_layers[0]
        self.learner.count(batch, backward=True)
        features = agent.features(batch)
        cosine = cosine_logits(features, layer.weight, self.config.scale)
        base = base + agent.loss_of(cosine, batch)[0] - agent.loss_of(layer(features), batch)[0]
        replayed = self.memory.sample(self.config.batch_size or rows(batch), self.rng)
        self.memory.add(batch, self.rng)
        return base if replayed is None else base + self.learner.loss(replayed)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])


def cosine_logits(features: Tensor, weight: Tensor, scale: float) -> Tensor:
    """``scale`` times the cosine of features (B, D) and of the weights (n, D) of each class: (B, n)."""
    return scale * functional.linear(functional.normalize(features, dim=1), functional.normalize(weight, dim=1))
