"""One iteration of a sampling planner as a CUDA graph: recorded once, replayed with new inputs copied into its buffers.

A rollout is hundreds of small kernels, and on a GPU it is their launches that take the time. The graph holds addresses, not
objects; so everything that differs between plans (latents, weights, goals, noise, the state of the search) is copied into
buffers that stay where they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clbench.planners.rollout import Rollout

State = dict[str, Tensor]
Iterate = Callable[[Rollout, State, Tensor, "Tensor | None"], State]

_KEPT = 4  # graphs per planner; each holds the memory of one iteration
_WARM_UPS = 2  # runs before recording, in which libraries choose their kernels and buffers are made


def capturable(device: torch.device) -> bool:
    """Whether iterations can be recorded on this device."""
    return device.type == "cuda"


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record ``run``, whose inputs and outputs lie in fixed buffers, and return what replays it."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Captured:
    """An iteration with fixed buffers.

    Args:
        iterate: ``(rollout, state, noise, prior sequences) -> state``.
        rollout: of a plan with this model, these shapes and an objective of this kind.
        state: of the search, only its shapes matter.
        noise: likewise.
        fixed: sequences of the prior, likewise.
    """

    def __init__(self, iterate: Iterate, rollout: Rollout, state: State, noise: Tensor, fixed: Tensor | None):
        self._rollout = rollout.separate()
        self._state = {k: v.clone() for k, v in state.items()}
        self._noise, self._fixed = noise.clone(), None if fixed is None else fixed.clone()

        def run() -> None:
            new = iterate(self._rollout, self._state, self._noise, self._fixed)
            for name, value in self._state.items():
                value.copy_(new[name])

        self._replay = capture(run, noise.device)
        if not self._rollout.refreshable():
            raise RuntimeError("the stepper of the world model has no method pack() that copies its weights in place")
        self._rollout.refresh(rollout)

    def begin(self, rollout: Rollout, fixed: Tensor | None) -> None:
        """Take the latents, the objective and the weights of another plan.

        Raises:
            RuntimeError: the weights have other shapes than those recorded.
        """
        self._rollout.refresh(rollout)
        if self._fixed is not None and fixed is not None:
            self._fixed.copy_(fixed)

    def __call__(self, state: State, noise: Tensor) -> State:
        """One iteration; the result lies in the buffers and is valid until the next."""
        for name, value in self._state.items():
            if state[name] is not value:
                value.copy_(state[name])
        self._noise.copy_(noise)
        self._replay()
        return self._state


class GraphCache:
    """The graphs of one planner, the least recently used given up first. Copies of a planner record their own."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Captured] = {}
        self._failed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, ()

    def iteration(
        self, iterate: Iterate, rollout: Rollout, state: State, noise: Tensor, fixed: Tensor | None
    ) -> Callable[[State, Tensor], State]:
        """The recorded iteration for these shapes, with the latents, objective and weights of this plan; or the plain one
        where it cannot be recorded."""

        def plain(state: State, noise: Tensor) -> State:
            return iterate(rollout, state, noise, fixed)

        key = rollout.key()
        if self._failed or key is None or not capturable(noise.device):
            return plain
        # the model is kept by the rollout of the graph, so its id cannot come to mean another
        key = (id(rollout.model), noise.shape, None if fixed is None else fixed.shape, *key)
        try:
            captured = self._graphs.pop(key, None)
            if captured is not None:
                captured.begin(rollout, fixed)
        except RuntimeError:  # layers that have changed their shape: record again
            captured = None
        try:
            captured = captured or Captured(iterate, rollout, state, noise, fixed)
        except RuntimeError as error:
            self._failed = True
            warnings.warn(
                f"Planning goes on without a CUDA graph, which could not be recorded: {error}. cuda_graph=False avoids the "
                "attempt.",
                stacklevel=4,
            )
            return plain
        self._graphs[key] = captured
        while len(self._graphs) > _KEPT:
            del self._graphs[next(iter(self._graphs))]
        return captured
