"""The probe: what an agent's layers compute for fixed inputs, before training and after each phase.

An agent offers ``probe(obs, task) -> {layer: activations (N, D...)}``. The inputs are the first observations of the first
episodes of each task's evaluation list, which is never trained on. The features of a task right after its own first phase
are kept in ``features/``, so that later ones can be compared with them. What is measured: :mod:`clbench.metrics.features`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clbench.contracts import Agent, Task
from clbench.data.dataset import map_obs
from clbench.envs.make import make_env
from clbench.errors import ConfigError, ContractError, DataError
from clbench.evaluate import plugin_error
from clbench.metrics.features import feature_measures, linear_cka, weight_norms
from clbench.records import BROKEN_ARCHIVE, unwritable, write_bytes

INPUTS = 256
Features = Mapping[str, Tensor]
Row = tuple[int, int, str, str, str, str]
"""phase, step, task, layer, measure, value."""


def check_probe(agent: Agent, name: str) -> None:
    """Whether the agent can be probed.

    Raises:
        ConfigError: it does not offer what is needed.
    """
    if not callable(getattr(agent, "probe", None)):
        raise ConfigError(
            f"Agent {name!r} cannot be probed; switch probe off, or give the agent a method probe(obs, task) that returns "
            "the activations (N, D) of its layers by name."
        )


def probe_inputs(task: Task, device: torch.device) -> Any:
    """The observations (N, ...) with which the first ``N <= 256`` episodes of the task's evaluation list begin."""
    episodes = task.evaluation
    n = min(INPUTS, len(episodes))
    env = make_env(task.env_id, n, device, autoreset="disabled", **task.env_kwargs)
    options: dict[str, Any] = {k: list(column[:n]) for k, column in episodes.options.items()}
    everywhere = torch.ones(n, dtype=torch.bool, device=device)
    try:
        obs = env.reset(seed=list(episodes.seeds[:n]), options={**options, "reset_mask": everywhere})[0]
    except Exception as error:
        raise plugin_error(f"environment {task.env_id}", "reset", error) from error
    finally:
        env.close()
    return map_obs(torch.clone, obs)


@torch.no_grad()
def probe_agent(agent: Any, obs: Any, task_id: int | None = None) -> dict[str, Tensor]:
    """``agent.probe`` on observations of one task -> float32 activations (N, D) on the CPU, by layer.

    Raises:
        ContractError: the answer is not what a probe returns.
    """
    rows = len(next(iter(obs.values())) if isinstance(obs, Mapping) else obs)
    ids = None if task_id is None else torch.full((rows,), task_id, dtype=torch.int64, device=agent.device)
    try:
        found = agent.probe(map_obs(torch.clone, obs), ids)
    except Exception as error:
        raise plugin_error(agent, "probe", error) from error
    valid = isinstance(found, Mapping) and all(isinstance(h, Tensor) and h.shape[:1] == (rows,) for h in found.values())
    if not valid:
        raise ContractError(
            f"{type(agent).__name__}.probe must return a mapping of layer names to tensors with one row for each of the "
            f"{rows} observations."
        )
    return {str(k): h.detach().flatten(1).to("cpu", torch.float32).clone() for k, h in found.items()}


def task_rows(phase: int, step: int, task: str, features: Features, own: Features | None) -> list[Row]:
    """The rows of ``probe.csv`` of one task.

    Args:
        features: (N, D) by layer.
        own: of the same inputs right after the task's own first phase; ``None`` before its end.
    """
    rows = []
    for layer, h in features.items():
        values = feature_measures(h)
        if own is not None and layer in own:
            values["cka"] = linear_cka(h, own[layer])
        rows += [(phase, step, task, layer, measure, _text(v)) for measure, v in values.items()]
    return rows


def weight_rows(phase: int, step: int, params: Iterable[Tensor]) -> list[Row]:
    """The rows of ``probe.csv`` of the parameters that the agent trains; they have no task."""
    return [(phase, step, "", "parameters", k, _text(v)) for k, v in weight_norms(params).items()]


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.10g}"


def save_features(path: Path, features: Features) -> None:
    """Write features as ``.npz``, atomically."""
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    buffer = io.BytesIO()
    np.savez(buffer, **{k: h.numpy() for k, h in features.items()})  # type: ignore[arg-type]
    write_bytes(path, buffer.getbuffer())


def load_features(path: str | Path) -> dict[str, Tensor]:
    """What :func:`save_features` wrote: float32 (N, D) by layer.

    Raises:
        DataError: missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {k: torch.from_numpy(archive[k]) for k in archive.files}
    except BROKEN_ARCHIVE as error:
        raise DataError(f"Cannot read the features {path}: {error}. Start the run again with --overwrite.") from error
