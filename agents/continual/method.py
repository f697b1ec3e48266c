"""What a continual method is: six optional hooks around an agent's update, a state, and a declaration of its needs.

A method knows the agent only as a :class:`Learner`: parameters, a loss of a batch, outputs of a batch. So it works on a
classifier, a policy, a critic and a world model alike.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.agents.continual.batches import rows, zip_map
from clbench.agents.networks.outputs import Output
from clbench.contracts import TaskInfo

DEEDS = ("replays rows", "moves weights at boundaries")
NEEDS = ("boundaries", "task_id", "loss", "outputs", "batches", "features", "optimizer")


class Learner:
    """An agent as methods see it. What its own update does not need is counted: ``forward`` and ``backward`` are samples
    (rows of batches) that methods send through the network in addition.

    Args:
        agent: has ``trainables``, and as far as methods need them ``loss(batch)``, ``outputs(batch)``,
            ``sample(data, rng)``, ``features(batch)``, ``new_optimizer()``.
    """

    def __init__(self, agent: Any):
        self.agent = agent
        self.own_loss = getattr(agent, "loss", None)  # before anything is put in its place
        self.progress = 0.0  # share of the phase's budget that is used up
        self.forward = self.backward = 0

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that the agent trains, always in the same order."""
        return list(self.agent.trainables)

    @property
    def device(self) -> torch.device:
        return self.agent.device

    def loss(self, batch: Any) -> Tensor:
        """The agent's own loss, without any method's part."""
        assert self.own_loss is not None
        self.count(batch, backward=torch.is_grad_enabled())
        return self.own_loss(batch)[0]

    def outputs(self, batch: Any) -> tuple[Output, ...]:
        """What the agent computes for each row of the batch."""
        self.count(batch, backward=torch.is_grad_enabled())
        return self.agent.outputs(batch)

    def count(self, batch: Any, *, backward: bool) -> None:
        """Add a batch to the costs."""
        n = self.samples(batch)
        self.forward += n
        self.backward += n if backward else 0

    def samples(self, batch: Any) -> int:
        """As the agent counts them: rows, unless it says otherwise (``samples_in``)."""
        return getattr(self.agent, "samples_in", rows)(batch)

    def values(self) -> list[Tensor]:
        """Copies of the parameters as they are now."""
        return [p.detach().clone() for p in self.params]

    @contextlib.contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The parameters are ``values`` inside, and bit for bit what they were afterwards. No gradients inside."""
        params = self.params
        kept = [p.data for p in params]
        try:
            with torch.no_grad():
                for p, value in zip(params, values, strict=True):
                    p.data = value
                yield
        finally:
            for p, value in zip(params, kept, strict=True):
                p.data = value


class Method:
    """Base of continual methods. Every hook is optional.

    With several methods each hook is called in the order in which they are listed, but for those that come ``last`` around
    the optimiser's step. One update of the agent is::

        batch  = the agent's own
        extra  = replay(batch) of each method               # rows to be trained on in addition
        total  = agent.loss(batch and extra)
        total  = loss(total, batch) of each method
        total.backward();  after_backward(params) of each method
        optimizer.step();  after_step(params) of each method

    Class attributes:
        requires: of :data:`NEEDS`: what it cannot do without, of the stream (``boundaries``; ``task_id``, also while
            acting) and of the agent (``loss``, ``outputs``, ``features`` of a batch; ``batches`` in ``finish_task``; an
            ``optimizer`` that can be replaced). Checked at start-up.
        does: what other methods may have to know, of :data:`DEEDS`.
        excludes: which of these another method may not do, and why.
        last: ``after_backward`` and ``after_step`` come after those of all other methods.
        paper, formula: for the method's card.
        Config: a dataclass whose fields all have defaults.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    does: frozenset[str] = frozenset()
    excludes: ClassVar[Mapping[str, str]] = {}
    last: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""

    @dataclass
    class Config:
        """No options."""

    def __init__(self, config: Any, learner: Learner, *, rng: torch.Generator):
        self.config, self.learner, self.rng = config, learner, rng

    # -- the six hooks ------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        """A boundary, after the agent's own ``start_task``."""

    def replay(self, batch: Any) -> Any | None:
        """Rows to train on beside the agent's ``batch``, in a batch of the same kind; None for none."""
        return None

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        """``base``, the loss so far, plus the method's own part.

        ``batch`` is the agent's own, without replayed rows. Agents that hide their loss (Stable-Baselines3) call it with a
        loss of 0 and the batch None, and add the gradient of what comes back to theirs.
        """
        return base

    def after_backward(self, params: Sequence[nn.Parameter]) -> None:
        """Gradients (``p.grad``, None where a parameter had no part) are there; they may be changed. No autograd."""

    def after_step(self, params: Sequence[nn.Parameter]) -> None:
        """The optimiser has moved ``params``; they may be changed. No autograd."""

    def finish_task(self, batches: Iterator[Any]) -> None:
        """The other side of the boundary. ``batches``: fresh draws of the data of the task that ends, without end."""

    # -- for methods that own parameters or the optimiser ----------------------------------------------------------------

    def view(self, task: int | None) -> AbstractContextManager[None] | None:
        """The network as it is to act on ``task``; None: as it is. (Masks, parameters of a task's own.)"""
        return None

    def new_optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
        """The optimiser in place of the agent's; None: the agent's own. At most one method may have one."""
        return None

    def rebuilt(self) -> None:
        """The agent's networks are new objects with new weights, before anything was learned (Stable-Baselines3's, when
        the first environment has more rows than expected): take from them again what was taken in ``__init__``."""

    # -- state --------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Numbers to log, now and then."""
        return {}

    state: ClassVar[
        tuple[str, ...]
    ] = ()  # attributes that make up the state: tensors and plain values, None before use

    def state_dict(self) -> dict[str, Any]:
        """Everything the future depends on; the generator is kept by the composition."""
        return {name: copy.deepcopy(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state:
            setattr(self, name, zip_map(lambda t: t.to(self.learner.device, copy=True), copy.deepcopy(state[name])))


def restore_generator(rng: torch.Generator, state: Tensor) -> None:
    """Continue where ``state`` was taken. A state of a GPU's generator means nothing to a CPU's, and the other way round:
    there it is the seed of something new, which is enough to act."""
    state = state.cpu()
    if len(state) == len(rng.get_state()):
        rng.set_state(state)
    else:
        rng.manual_seed(int(hashlib.sha256(state.numpy().tobytes()).hexdigest()[:15], 16))
