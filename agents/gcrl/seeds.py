"""Several trainings of one agent at once: the seeds are the first axis of every parameter.

What S separate trainings would compute, in one pass: the loss is vectorised over the seeds (``torch.func``), batches come
from each seed's own generator, and one Adam steps all. ``clbench bench updates --seeds S`` says whether it pays: it saves
launches, not arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError


class _Loss(nn.Module):
    """The loss of an agent as a function of its networks."""

    def __init__(self, agent: GoalAgent):
        super().__init__()
        self.networks, self._loss = agent.networks, agent.loss

    def forward(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch)


class SeedBatch:
    """S agents of one class and configuration that learn together from one data set.

    Args:
        agents: freshly made, or trained by the same number of updates. They keep what they have learned until
            :meth:`unstack`.

    Raises:
        ConfigError: no agents, agents that differ in more than their weights, or agents with an update of their own.
    """

    def __init__(self, agents: Sequence[GoalAgent]):
        if not agents or any(
            type(a) is not type(agents[0]) or a.config != agents[0].config or a.updates != agents[0].updates
            or a.spaces != agents[0].spaces for a in agents
        ):  # fmt: skip
            raise ConfigError(
                "SeedBatch needs at least one agent, and all of one class, one configuration, the same spaces and the same "
                "number of updates; make them with different generators."
            )
        if type(agents[0]).update is not GoalAgent.update:
            raise ConfigError(
                f"SeedBatch makes the update that most offline goal-conditioned agents share, but {agents[0].name!r} has "
                "its own; train its seeds one after the other."
            )
        self.agents = list(agents)
        self._first = agents[0]
        self._loss = _Loss(self._first)
        values, _ = stack_module_state([_Loss(a) for a in self.agents])
        targets = tuple(f"networks.{name}." for name in self._first.targets)
        self.parameters: dict[str, Tensor] = {
            k: v.detach().requires_grad_(not k.startswith(targets)) for k, v in values.items()
        }
        trained = [v for v in self.parameters.values() if v.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=self._first.config.lr, fused=True)
        self._take_moments()

    def learn(
        self, data: OfflineDataset, budget: int, *, rngs: Sequence[torch.Generator]
    ) -> Iterator[Mapping[str, Tensor]]:
        """``budget`` updates of every seed, with batches drawn with its own generator; yields terms (S,) to log."""
        for agent in self.agents:
            agent.prepare(data)
        for _ in range(budget):
            yield self.update([agent.sample(data, rng) for agent, rng in zip(self.agents, rngs, strict=True)])

    def update(self, batches: Sequence[GoalBatch]) -> dict[str, Tensor]:
        """One step of Adam of every seed on its batch."""
        flat = [tree_flatten(vars(batch)) for batch in batches]
        structure = flat[0][1]
        # an image or numbers that a state does not have are None
        leaves = [None if x[0] is None else torch.stack(x) for x in zip(*(leaves for leaves, _ in flat), strict=True)]

        def loss(parameters: dict[str, Tensor], leaves: list[Tensor | None]) -> tuple[Tensor, dict[str, Tensor]]:
            return functional_call(self._loss, parameters, (GoalBatch(**tree_unflatten(leaves, structure)),))

        axes = [None if x is None else 0 for x in leaves]
        losses, info = vmap(loss, in_dims=(0, axes))(self.parameters, leaves)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self._update_targets()
        self.optimizer.step()
        for agent, batch in zip(self.agents, batches, strict=True):
            agent.updates += 1
            agent.samples += len(batch)
        return info

    @torch.no_grad()
    def _update_targets(self) -> None:
        for target, source in self._first.targets.items():
            names = [k for k in self.parameters if k.startswith(f"networks.{target}.")]
            old = [self.parameters[k] for k in names]
            new = [self.parameters[k.replace(target, source, 1)] for k in names]
            torch._foreach_lerp_(old, new, self._first.config.tau)

    @torch.no_grad()
    def _take_moments(self) -> None:
        """Adam goes on where the agents' own have stopped."""
        for name, parameter in self._first.networks.named_parameters():
            if parameter in self._first.optimizer.state:
                states = [a.optimizer.state[a.networks.get_parameter(name)] for a in self.agents]
                stacked = {k: torch.stack([s[k] for s in states]) for k in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[self.parameters[f"networks.{name}"]] = {
                    "step": states[0]["step"].clone(),
                    **stacked,
                }

    @torch.no_grad()
    def unstack(self) -> list[GoalAgent]:
        """The agents, with what they have learned; they can go on alone."""
        for e, agent in enumerate(self.agents):
            for name, parameter in agent.networks.named_parameters():
                stacked = self.parameters[f"networks.{name}"]
                parameter.copy_(stacked[e])
                state = self.optimizer.state.get(stacked)
                if state:
                    own = {k: state[k][e].clone() for k in ("exp_avg", "exp_avg_sq")}
                    agent.optimizer.state[parameter] = {"step": state["step"].clone(), **own}
        return self.agents
