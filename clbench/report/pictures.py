"""``rollout.png`` of a run: what the trained agent does in the first evaluation episodes of each task."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.contracts import Agent, Task
from clbench.envs.make import make_env
from clbench.evaluate import check_actions
from clbench.experiments import RunResult
from clbench.records import write_bytes
from clbench.rng import sealed_global_rng, torch_generator

FRAMES, MAX_TASKS, MAX_STEPS = 6, 5, 1000


def save_rollout(result: RunResult) -> Path | None:
    """Draw one row of pictures per task into ``rollout.png`` of the run directory.

    Returns ``None``, and writes nothing, if the environments cannot be rendered.
    """
    assert result.agent is not None, "only a run of this process has its agent at hand"
    rows = []
    with sealed_global_rng(), torch.no_grad():
        for number, task in enumerate(result.stream.tasks[:MAX_TASKS]):
            frames = _frames(result.agent, task, number if result.stream.reveals == "task_id" else None)
            if frames is None:
                return None
            rows.append((task.name, frames))
    path = result.path / "rollout.png"
    write_bytes(path, _draw(rows))
    return path


def _frames(agent: Agent, task: Task, task_id: int | None) -> list[tuple[str, np.ndarray]] | None:
    """(caption, picture (H, W, 3)) of one episode over time, or of several episodes where they last one step."""
    episodes = task.evaluation.head(FRAMES)
    n = len(episodes)
    device = getattr(agent, "device", torch.device("cpu"))
    env = make_env(task.env_id, n, device, autoreset="disabled", **task.env_kwargs)
    rng = torch_generator(0, "picture", task.name, device=device)
    ids = None if task_id is None else torch.full((n,), task_id, device=device)
    try:
        obs, _ = env.reset(seed=list(episodes.seeds), options=dict(episodes.options))
        first, memory = torch.ones(n, dtype=torch.bool, device=device), None
        try:
            start = env.render()
        except Exception:  # noqa: BLE001 (a picture is a courtesy: whatever goes wrong in a renderer, do without)
            return None
        story: list[tuple[int, np.ndarray]] = [(0, start[0])]
        outcome = ""
        for t in range(1, min(env.max_episode_steps or MAX_STEPS, MAX_STEPS) + 1):
            actions, memory = agent.act(obs, memory, first, rng=rng, task=ids)
            actions = check_actions(actions, env.single_action_space, n, type(agent).__name__)
            obs, _, terminated, truncated, info = env.step(actions)
            first = torch.zeros_like(first)
            done = terminated | truncated
            if t == 1 and bool(done.all()):  # one-step episodes: show several of them
                success = info.get("is_success", [None] * n)
                return [(_word(s), picture) for s, picture in zip(success, start, strict=True)]
            story.append((t, env.render()[0]))
            if bool(done[0]):
                outcome = _word(info["is_success"][0]) if "is_success" in info else ""
                break
        chosen = np.unique(np.linspace(0, len(story) - 1, FRAMES).round().astype(int))
        captions = [f"step {story[i][0]}" for i in chosen]
        captions[-1] += f", {outcome}" if outcome else ""
        return [(c, story[i][1]) for c, i in zip(captions, chosen, strict=True)]
    finally:
        env.close()


def _word(success: Any) -> str:
    return "" if success is None else ("success" if bool(success) else "failure")


def _draw(rows: list[tuple[str, list[tuple[str, np.ndarray]]]]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * FRAMES, 1.75 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), FRAMES, squeeze=False)
    for line, (name, frames) in zip(axes, rows, strict=True):
        for axis in line:
            axis.axis("off")
        for axis, (caption, picture) in zip(line, frames, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(caption, fontsize=8)
        line[0].text(
            -0.06, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=8
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
