"""K updates as one CUDA graph: for networks so small that on a GPU launching kernels takes the time.

A graph replays kernels with the addresses that they had when it was recorded. So it holds only what stays where it is:
data, parameters, moments of Adam and the generator's state; counts of updates are kept outside. Nothing of it is part of
the agent's state: between two blocks, an agent with graphs is what it would be without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError

_WARM_UPS = 3  # updates before recording, in which libraries choose their kernels and buffers are made


def recordable(device: torch.device) -> bool:
    """Whether updates can be recorded on this device."""
    return device.type == "cuda"


class UpdateGraph:
    """``count`` times sample, loss, backward, Polyak and Adam; after a warm-up, replayed in one launch.

    The warm-up is no extra: its updates are the first of the training. Recording changes nothing, so updates are the same
    whether they are replayed or not.

    Args:
        agent: a ``GoalAgent``, whose updates.
        data: drawn from; on the agent's device.
        rng: draws the batches; its state moves on with each replay.
        count: K, updates per call.
    """

    def __init__(self, agent: Any, data: OfflineDataset, rng: torch.Generator, count: int):
        self.agent, self.data, self.rng, self.count = agent, data, rng, count
        self._stream = torch.cuda.Stream(rng.device) if rng.device.type == "cuda" else None
        self._forget()

    def _forget(self) -> None:
        self._made_for = self.agent.optimizer, self.agent._encoded
        self._warm_ups = 0
        self._info: dict[str, Tensor] = {}
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> dict[str, Tensor]:
        """``count`` updates.

        Returns:
            Terms to log of the last one, scalars that the next call overwrites.

        Raises:
            ConfigError: the updates cannot be recorded.
        """
        agent = self.agent
        if any(a is not b for a, b in zip(self._made_for, (agent.optimizer, agent._encoded), strict=True)):
            self._forget()  # the recorded addresses are of tensors that the agent has replaced
        updates, samples = agent.updates, agent.samples
        if self._warm_ups < _WARM_UPS:
            _aside(self._run, self._stream)
            self._warm_ups += self.count
        else:
            if self._replay is None:
                with _capturable(agent.optimizer):
                    self._replay = record(self._run, self.rng, self._stream)
            self._replay()
        # Python does not run in a replay, and recording runs it without updates
        agent.updates, agent.samples = updates + self.count, samples + self.count * agent.config.batch_size
        return self._info

    def _run(self) -> None:
        info: dict[str, Tensor] = {}
        for _ in range(self.count):
            info = self.agent.update(self.agent.sample(self.data, self.rng))
        for name, value in info.items():
            if name in self._info:
                self._info[name].copy_(value)
            else:
                self._info[name] = value.clone()


def _aside(run: Callable[[], None], stream: Any) -> None:
    """Run on another stream, after what was before and before what comes; as it is where there are no streams."""
    if stream is None:
        return run()
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def record(run: Callable[[], None], rng: torch.Generator, stream: Any) -> Callable[[], None]:
    """Record ``run`` without running it, and return what replays it.

    Raises:
        ConfigError: it does something that a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        graph.register_generator_state(rng)
        with torch.cuda.graph(graph, stream=stream):
            run()
    except RuntimeError as error:
        raise ConfigError(
            f"The updates could not be recorded as a CUDA graph: {error}. Data that are drawn on the fly, such as rendered "
            "pixels, are a common reason; set updates_per_graph to 0."
        ) from error
    return graph.replay


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Fused Adam is capturable, but wants to be told so; only while it is recorded, for it would be in checkpoints."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in optimizer.param_groups:
            group["capturable"] = False
