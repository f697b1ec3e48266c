"""The loss compiled, where it is asked for: one graph, with element-wise operations fused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clbench.errors import ConfigError


@functools.cache
def _compiled(loss: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(loss, fullgraph=True, dynamic=False)


def compiled_loss(agent: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """``agent.loss(batch)`` of a ``GoalAgent``, compiled at its first use.

    Raises:
        ConfigError: it cannot be compiled, for one because there is no C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        return _compiled(type(agent).loss)(agent, batch)
    except TorchDynamoException as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])  # more is a traceback
        raise ConfigError(
            f"Agent {agent.name!r}: the loss could not be compiled ({reason}). torch.compile needs a C++ compiler, "
            "such as g++; install one, or leave compile off."
        ) from error
