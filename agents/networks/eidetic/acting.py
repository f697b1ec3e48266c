"""What agents share whose finished tasks act alone: ids that were revealed, a router, and networks of finished tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.policy import EideticPolicy
from clbench.agents.networks.eidetic.routing import NoveltyRouter, TrainedRouter
from clbench.agents.networks.eidetic.verify import evaluating
from clbench.agents.networks.encoders import Parts

RouterName = Literal["novelty", "trained", "newest"]


class ActsByTask:
    """Mixed into an agent with a ``network`` (:class:`EideticPolicy`).

    Attributes:
        ids: task of the network -> id in the stream, None where it was not revealed.
        known: the task of the network that the stream has come back to, if it has.
        router: decides where no ids are given; None for the newest task.
    """

    network: EideticPolicy
    ids: list[int | None]
    known: int | None
    router: NoveltyRouter | TrainedRouter | None

    def _init_tasks(self, router: NoveltyRouter | TrainedRouter | None) -> None:
        self.ids, self.known, self.router = [], None, router
        self._alone: dict[int, EideticPolicy] = {}

    @property
    def eidetic(self) -> Mapping[str, EideticNetwork]:
        """What `clbench verify` examines."""
        return {"policy": self.network}

    def _comes_back(self, id: int | None) -> bool:
        """Whether the task that begins was finished before: it is kept as it is then."""
        self.known = self.ids.index(id) if id is not None and id in self.ids else None
        return self.known is not None

    def route(self, inputs: Sequence[Tensor], task: Tensor | None = None) -> Tensor:
        """Prepared inputs and task ids (B,), where revealed -> task of the network (B,) int64.

        Ids that have not been learned yet get the newest task.
        """
        chosen = torch.full((len(inputs[0]),), self.network.task, device=inputs[0].device)
        if task is not None and None not in self.ids:
            for k, known in enumerate(self.ids):
                chosen[task == known] = k
            return chosen
        if self.router is not None and len(self.router.tasks) > 0:
            return self.router.route(flat(inputs))
        return chosen

    def _output(self, inputs: Sequence[Tensor], task: int) -> Any:
        """What the network gives. Finished tasks run alone, so that not a bit of theirs depends on what came later."""
        if task >= self.network.committed:
            with evaluating(self.network):
                return self.network(*inputs, task=task)
        if task not in self._alone:
            self._alone[task] = self.network.extract(task)
        return self._alone[task](*inputs, task=task)

    def _tasks_state(self) -> dict[str, Any]:
        router = None if self.router is None else self.router.state_dict()
        return {"ids": list(self.ids), "known": self.known, "router": router}

    def _load_tasks(self, state: Mapping[str, Any]) -> None:
        self.ids, self.known = list(state["ids"]), state["known"]
        if self.router is not None:
            self.router.load_state_dict(copy.deepcopy(state["router"]))
        self._alone = {}


def new_router(
    name: RouterName, parts: Parts, draw: Callable[[], Tensor], device: torch.device
) -> NoveltyRouter | TrainedRouter | None:
    """The router of that name for observations that consist of ``parts``; one that draws gets its seed from ``draw``."""
    if name == "newest":
        return None
    if name == "novelty":
        return NoveltyRouter()
    size = parts.flat_size + sum(c * h * w for c, h, w in parts.image_shapes)
    return TrainedRouter(size, rng=torch.Generator(device).manual_seed(int(draw())))


def flat(inputs: Sequence[Tensor]) -> Tensor:
    """Prepared inputs -> what routers see, (B, n)."""
    return torch.cat([x.flatten(1).to(torch.float32) for x in inputs], 1)
