"""Evaluation: fixed lists of episodes, all rows at once, no side effects.

Unbiased: every episode of the list is counted exactly once, whatever the number of parallel environments. (Counting the
first N episodes that finish would favour short ones.) Success is the task's own, never ``terminated``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch

from clbench.contracts import Agent, Metric, Task, VectorEnv
from clbench.errors import ClbenchError, ContractError

MAX_EPISODE_STEPS = 100_000  # a guard for environments that declare no limit of their own


@dataclass
class Episodes:
    """Results of one evaluation, one entry per episode of the list, in the list's order; seconds spent."""

    score: torch.Tensor
    returns: torch.Tensor
    length: torch.Tensor
    seconds: dict[str, float]


def plugin_error(plugin: Any, what: str, error: Exception) -> ContractError:
    """One sentence for an exception inside somebody's class: which, where, what."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    file, line = next((f for f in reversed(frames) if "site-packages" not in f[0]), frames[-1]) if frames else ("?", 0)
    name = plugin if isinstance(plugin, str) else type(plugin).__name__
    return ContractError(f"{name}.{what} raised {type(error).__name__} at {file}:{line}: {error}")


def check_actions(actions: Any, space: gymnasium.Space, num_envs: int, who: str) -> torch.Tensor:
    """The actions of an agent as the environment takes them, int64 or float32; boxes are clipped to their bounds.

    Args:
        who: for messages: the name of the agent, or who did what (``"Name.learn sent"``).

    Raises:
        ContractError: wrong type, shape, dtype, NaN, or an index outside a discrete space.
    """
    did = who if " " in who else f"{who}.act returned"
    if not isinstance(actions, torch.Tensor):
        raise ContractError(
            f"{who}.act must return (actions, memory) with actions a torch tensor, got {type(actions).__name__}."
        )
    expected = (num_envs, *(space.shape or ()))
    if tuple(actions.shape) != expected:
        raise ContractError(
            f"{did} actions of shape {tuple(actions.shape)}, expected {expected}: one row per environment"
            f"{', one column per action dimension' if len(expected) > 1 else ''}."
        )
    if isinstance(space, gymnasium.spaces.Discrete):
        if actions.is_floating_point() or actions.dtype == torch.bool:
            raise ContractError(f"{did} {actions.dtype} actions for {space}; return int64 indices.")
        low, high = int(space.start), int(space.start + space.n - 1)
        if bool(((actions < low) | (actions > high)).any()):
            raise ContractError(f"{did} an action outside {low}..{high}; check the argmax or the sampling.")
        return actions.to(torch.int64)
    if not actions.is_floating_point():
        raise ContractError(f"{did} {actions.dtype} actions for {space}; return floats.")
    if not bool(torch.isfinite(actions).all()):
        raise ContractError(f"{did} NaN or infinite actions; the weights or the inputs are not finite.")
    if isinstance(space, gymnasium.spaces.Box):
        low, high = (torch.as_tensor(b, dtype=torch.float32, device=actions.device) for b in (space.low, space.high))
        return actions.to(torch.float32).clamp(low, high)
    return actions


def evaluate(
    agent: Agent,
    task: Task,
    env: VectorEnv,
    *,
    rng: torch.Generator,
    task_id: int | None = None,
    should_stop: Callable[[], None] = lambda: None,
) -> Episodes:
    """Run the episodes of ``task.evaluation`` in ``env`` (autoreset ``"disabled"``), each exactly once.

    Rows take the next episode of the list when theirs ends; rows that find the list empty idle until the others are done.

    Args:
        rng: for agents that draw; deterministic agents give the same result for any ``env.num_envs``.
        task_id: revealed to the agent, or ``None``.
        should_stop: called at every step; raises to abandon the evaluation.

    Raises:
        ContractError: the agent or the environment breaks the contract; the sentence says how.
    """
    episodes, metric = task.evaluation, task.metric
    assert isinstance(metric, Metric)
    total, rows, device, who = len(episodes), env.num_envs, env.device, type(agent).__name__
    episode = torch.arange(rows, device=device)  # which episode of the list each row plays; >= total: idle
    following = rows
    returns = torch.zeros(total, dtype=torch.float64, device=device)
    length = torch.zeros(total, dtype=torch.int64, device=device)
    success = torch.zeros(total, dtype=torch.bool, device=device)
    row_return = torch.zeros(rows, dtype=torch.float64, device=device)
    row_length = torch.zeros(rows, dtype=torch.int64, device=device)
    row_success = torch.zeros(rows, dtype=torch.bool, device=device)
    ids = None if task_id is None else torch.full((rows,), task_id, dtype=torch.int64, device=device)
    limit = env.max_episode_steps or MAX_EPISODE_STEPS
    seconds = {"environment": 0.0, "act": 0.0}
    plugins: dict[str, tuple[Any, str]] = {"environment": (f"environment {task.env_id}", "step"), "act": (agent, "act")}

    def begin(mask: torch.Tensor) -> Any:
        chosen = [min(int(e), total - 1) for e in episode.tolist()]
        options: dict[str, Any] = {k: [column[i] for i in chosen] for k, column in episodes.options.items()}
        return env.reset(seed=[episodes.seeds[i] for i in chosen], options={**options, "reset_mask": mask})[0]

    def timed(kind: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            value = function()
        except ClbenchError:
            raise
        except Exception as error:
            raise plugin_error(*plugins[kind], error) from error
        seconds[kind] += time.perf_counter() - start
        return value

    first = torch.ones(rows, dtype=torch.bool, device=device)
    memory: Any = None
    with torch.no_grad():
        obs = timed("environment", lambda: begin(first))
        while True:
            should_stop()
            answer = timed("act", lambda: agent.act(obs, memory, first, rng=rng, task=ids, explore=False))  # noqa: B023
            if not (isinstance(answer, tuple) and len(answer) == 2):
                raise ContractError(f"{who}.act must return the pair (actions, memory), got {type(answer).__name__}.")
            actions, memory = check_actions(answer[0], env.single_action_space, rows, who).to(device), answer[1]
            obs, reward, terminated, truncated, info = timed("environment", lambda: env.step(actions))  # noqa: B023
            playing = episode < total
            done = (terminated | truncated) & playing
            row_return += torch.where(playing, reward.to(torch.float64), 0.0)
            row_length += playing
            if metric.kind == "success":
                now = _success(info, task, done)
                row_success = (row_success | now) if metric.when == "ever" else now
            first = torch.zeros_like(done)
            if bool(done.any()):
                finished = episode[done]
                returns[finished], length[finished], success[finished] = (
                    row_return[done],
                    row_length[done],
                    row_success[done],
                )
                # rows that finished take the next episodes of the list, in row order
                episode = torch.where(done, following + done.cumsum(0) - 1, episode)
                following += int(done.sum())
                row_return, row_length = row_return.masked_fill(done, 0), row_length.masked_fill(done, 0)
                row_success = row_success & ~done
                if not bool((episode < total).any()):
                    break
                again = done & (episode < total)
                if bool(again.any()):
                    obs = timed("environment", lambda: begin(again))  # noqa: B023
                    first = again
            elif bool((row_length > limit).any()):
                raise ContractError(
                    f"Task {task.name!r}: an evaluation episode of {task.env_id} did not end within {limit} steps; give "
                    "the environment a limit with env_kwargs={'max_episode_steps': N}."
                )
    score = (
        success.to(torch.float64) if metric.kind == "success" else (returns - metric.low) / (metric.high - metric.low)
    )
    if not bool(torch.isfinite(score).all()):
        raise ContractError(f"Task {task.name!r}: {task.env_id} gave NaN or infinite rewards during evaluation.")
    return Episodes(score.cpu(), returns.cpu(), length.cpu(), seconds)


def _success(info: Mapping[str, Any], task: Task, done: torch.Tensor) -> torch.Tensor:
    """The task's own word; it may be missing as long as no episode ends."""
    for key in ("is_success", "success"):
        if key in info:
            return torch.as_tensor(info[key]).to(torch.bool)
    if not bool(done.any()):
        return torch.zeros_like(done)
    raise ContractError(
        f"Task {task.name!r} is scored by success, but {task.env_id} gives no info['is_success']; add it to the "
        "environment or use metric='return' with bounds."
    )
