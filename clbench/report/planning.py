"""``planning.png`` of a run: what a world model believes, laid over what is true.

For agents that plan in the latent space of a world model, in environments that give a grid of free positions
(``goal_grid``, see :mod:`clbench.envs.goal_grid`). A latent is decoded to the position of the grid whose encoded
observation is nearest to it: mean squared distance of ``goal_features``, averaged over the members of an ensemble.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from scipy.stats import rankdata
from torch import Tensor

from clbench.contracts import Agent, Task, VectorEnv
from clbench.data.dataset import map_obs
from clbench.envs.goal_grid import GoalGrid
from clbench.envs.make import make_env
from clbench.evaluate import check_actions
from clbench.experiments import RunResult
from clbench.planners.rollout import trajectories
from clbench.records import write_bytes
from clbench.rng import sealed_global_rng, torch_generator

NAME = "planning.png"
MAX_TASKS, EPISODES, MAX_STEPS = 4, 3, 1000
PLANS = 4  # drawn per episode
STRIDE, COLUMNS = 5, 9  # of the strip: plan steps 0, 5, 10, ... (or a multiple), at most so many
CHUNK = 256  # frames encoded together
MODEL = ("encode", "encode_goal", "goal_features", "predict")


def save_planning(result: RunResult) -> Path | None:
    """Draw maps, paths and plan steps of each task into ``planning.png`` of the run directory.

    Returns ``None``, and writes nothing, if the agent has no world model with plans or the environments no grid.
    """
    assert result.agent is not None, "only a run of this process has its agent at hand"
    model = getattr(result.agent, "model", None)
    if not all(hasattr(model, name) for name in MODEL):
        return None
    reveals = result.stream.reveals == "task_id"
    with sealed_global_rng(), torch.no_grad():
        tasks = enumerate(result.stream.tasks[:MAX_TASKS])
        watched = [watch(result.agent, task, number if reveals else None) for number, task in tasks]
        stories = [story for story in watched if story is not None]
        if not stories:
            return None
        picture = _draw(stories)
    path = result.path / NAME
    write_bytes(path, picture)
    return path


# -- positions and latents -----------------------------------------------------------------------------------------------


class Decoder:
    """Reads positions off latents by the nearest of the encoded observations of a grid."""

    def __init__(self, model: Any, grid: GoalGrid):
        self.model, self.grid = model, grid
        count = len(grid.positions)
        parts = [{k: v[i : i + CHUNK] for k, v in grid.observations.items()} for i in range(0, count, CHUNK)]
        self.features = torch.cat([self._features(model.encode(part)) for part in parts])  # (N, n)
        self.positions = grid.positions.cpu().numpy()

    def _features(self, z: Tensor) -> Tensor:
        """Latents (M, *latent) -> (M, n). Averaging over the members of an ensemble changes no order: the mean squared
        distance to a point is that of the members' mean, plus their spread."""
        features = self.model.goal_features(z).to(torch.float32)
        return features.flatten(1, -2).mean(1) if features.ndim > 2 else features

    def decode(self, z: Tensor) -> np.ndarray:
        """Latents (M, *latent) -> rows of the grid (M,)."""
        return torch.cdist(self._features(z), self.features, compute_mode=_EXACT).argmin(1).cpu().numpy()

    def distances(self, goal: Tensor) -> np.ndarray:
        """Mean squared latent distances (N,) of all positions to the encoded goal (1, *latent)."""
        return (self.features - self._features(goal)).square().mean(1).cpu().numpy()


_EXACT = "donot_use_mm_for_euclid_dist"  # the quick way rounds equal points apart


def lattice_index(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows (N,) int64 each of the positions (N, 2) on their lattice, from 0."""
    columns = []
    for axis in positions.T:
        values = np.unique(axis)
        step = np.diff(values).min() if len(values) > 1 else 1.0
        columns.append(np.rint((axis - values[0]) / step).astype(np.int64))
    return columns[0], columns[1]


def on_lattice(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (N,) as a picture (rows, columns), NaN where nothing is free."""
    x, y = lattice_index(positions)
    picture = np.full((y.max() + 1, x.max() + 1), np.nan)
    picture[y, x] = values
    return picture


def path_lengths(positions: np.ndarray, source: int) -> np.ndarray:
    """Shortest paths (N,) over the lattice of free ``positions`` (N, 2) to one of them; inf where there is none.

    Steps go to the 8 neighbours, diagonally only between free ones, so that lengths in the open are at most 8.3 % above
    those of the plane.
    """
    x, y = lattice_index(positions)
    index = np.full((y.max() + 3, x.max() + 3), -1)  # with a border that is not free
    index[y + 1, x + 1] = np.arange(len(positions))
    ends, weights = [], []
    for dx, dy in ((1, 0), (0, 1), (1, 1), (1, -1)):
        there, beside, above = index[y + 1 + dy, x + 1 + dx], index[y + 1, x + 1 + dx], index[y + 1 + dy, x + 1]
        here = ((there >= 0) & (beside >= 0) & (above >= 0)).nonzero()[0]
        ends.append(np.stack([here, there[here]]))
        weights.append(np.linalg.norm(positions[here] - positions[there[here]], axis=1))
    edges = np.concatenate(ends, 1)
    graph = coo_array((np.concatenate(weights), (edges[0], edges[1])), shape=(len(positions), len(positions)))
    return dijkstra(graph.tocsr(), directed=False, indices=source)


def nearest(positions: np.ndarray, point: np.ndarray) -> int:
    """The row of ``positions`` (N, 2) that is closest to a point (2,)."""
    return int(np.square(positions - point).sum(1).argmin())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's, over the entries where both are finite; ``None`` where one of them does not vary."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 2 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    return float(np.corrcoef(rankdata(a[both]), rankdata(b[both]))[0, 1])


# -- episodes ------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One evaluation episode.

    Attributes:
        decoder: of its grid.
        start: picture (H, W, 3) of the environment at its beginning.
        goal: (2,).
        latent_goal: (1, *latent).
        path: T + 1 executed positions (2,) positions.
        observations: T + 1 of them, with one row.
        plans: step at which each was made, and its actions (1, H, A).
        outcome: success or failure, and after how many steps.
    """

    decoder: Decoder
    start: np.ndarray
    goal: np.ndarray
    latent_goal: Tensor
    path: list[np.ndarray] = field(default_factory=list)
    observations: list[Any] = field(default_factory=list)
    plans: list[tuple[int, Tensor]] = field(default_factory=list)
    outcome: str = ""

    def planned(self, plan: tuple[int, Tensor]) -> np.ndarray:
        """Rows of the grid (H + 1,) to which the latents of a plan are decoded, its first being the present one."""
        step, actions = plan
        model = self.decoder.model
        z = model.encode(self.observations[step])
        latents = torch.cat([z, trajectories(model, z, actions)[0]])
        return self.decoder.decode(latents)


@dataclass
class Story:
    """The episodes of a task that are drawn."""

    name: str
    episodes: list[Episode]


def watch(agent: Agent, task: Task, task_id: int | None = None) -> Story | None:
    """Play the first evaluation episodes of a task; ``None`` where there is no grid, or the agent keeps no plans.

    Plans are the ``plan`` (B, H, A) of an agent's memory when its ``cursor`` (B,) is 1, as
    :class:`clbench.planners.mpc.MPC` has them, but for those that are not followed because of an escape.
    """
    device = getattr(agent, "device", torch.device("cpu"))
    tasks = task.evaluation.head(EPISODES)
    env = make_env(task.env_id, len(tasks), device, autoreset="disabled", **task.env_kwargs)
    try:
        if not hasattr(env, "goal_grid"):
            return None
        obs, _ = env.reset(seed=list(tasks.seeds), options=dict(tasks.options))
        episodes = _begin(agent, env, obs)
        return Story(task.name, episodes) if _play(agent, env, task, obs, episodes, task_id) else None
    finally:
        env.close()


def _begin(agent: Any, env: Any, obs: Any) -> list[Episode]:
    pictures, goals = env.render(), env.points()[1].cpu().numpy()
    latent_goals = agent.model.encode_goal(obs)
    decoders: list[Decoder] = []
    episodes = []
    for row in range(env.num_envs):
        grid = env.goal_grid(row)
        decoder = next((d for d in decoders if _same(d.grid, grid)), None) or Decoder(agent.model, grid)
        decoders.append(decoder)
        episodes.append(Episode(decoder, pictures[row], goals[row], latent_goals[row : row + 1]))
    return episodes


def _same(a: GoalGrid, b: GoalGrid) -> bool:
    return torch.equal(a.positions, b.positions) and all(
        torch.equal(v, b.observations[k]) for k, v in a.observations.items()
    )


def _play(agent: Agent, env: VectorEnv, task: Task, obs: Any, episodes: list[Episode], task_id: int | None) -> bool:
    """Fill in what happens; whether there were plans."""
    n, device = env.num_envs, env.device
    rng = torch_generator(0, "picture", task.name, device=device)
    ids = None if task_id is None else torch.full((n,), task_id, device=device)
    first, memory = torch.ones(n, dtype=torch.bool, device=device), None
    live = dict(enumerate(episodes))
    _record(env, obs, live)
    for step in range(min(env.max_episode_steps or MAX_STEPS, MAX_STEPS)):
        actions, memory = agent.act(obs, memory, first, rng=rng, task=ids)
        if not (isinstance(memory, Mapping) and "plan" in memory and "cursor" in memory):
            return False
        fresh = memory["cursor"] == 1
        escape = memory.get("escape")
        if isinstance(escape, Mapping) and "escaping" in escape:
            fresh = fresh & ~escape["escaping"]
        made = fresh.tolist()
        for row, episode in live.items():
            if made[row]:
                episode.plans.append((step, memory["plan"][row : row + 1].clone()))
        actions = check_actions(actions, env.single_action_space, n, type(agent).__name__)
        obs, _, terminated, truncated, info = env.step(actions)
        first = torch.zeros_like(first)
        _record(env, obs, live)
        for row in [r for r in live if bool(terminated[r] | truncated[r])]:
            success = "is_success" in info and bool(info["is_success"][row])
            live.pop(row).outcome = f"{'success' if success else 'failure'} after {step + 1} steps"
        if not live:
            break
    return True


def _record(env: Any, obs: Any, live: Mapping[int, Episode]) -> None:
    points = env.points()[0].cpu().numpy()
    for row, episode in live.items():
        episode.path.append(points[row])
        episode.observations.append(map_obs(lambda v: v[row : row + 1], obs))  # noqa: B023


# -- drawing -------------------------------------------------------------------------------------------------------------

PANEL, FRAME = 2.3, 1.25  # inches


def _draw(stories: list[Story]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = PANEL + 2 * FRAME + 0.9
    figure = Figure(figsize=(PANEL * (2 + EPISODES), height * len(stories)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(stories), 1, squeeze=False)[:, 0]
    for part, story in zip(parts, stories, strict=True):
        part.suptitle(story.name, fontsize=10, weight="bold")
        above, below = part.subfigures(2, 1, height_ratios=(PANEL, 2 * FRAME))
        axes = above.subplots(1, 2 + EPISODES)
        for axis in axes:
            axis.axis("off")
        _draw_maps(axes[:2], story.episodes[0])
        for number, (axis, episode) in enumerate(zip(axes[2:], story.episodes, strict=False), start=1):
            _draw_paths(axis, episode, f"episode {number}\n{episode.outcome}")
        _draw_steps(below, story.episodes[0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _draw_maps(axes: Any, episode: Episode) -> None:
    """Latent distances of all positions to the goal, and true ones."""
    positions = episode.decoder.positions
    latent = episode.decoder.distances(episode.latent_goal)
    true = path_lengths(positions, nearest(positions, episode.goal))
    correlation = rank_correlation(latent, true)
    said = "not defined" if correlation is None else f"{correlation:.2f}"
    titles = f"latent distance to the goal\nrank correlation {said}", "shortest path to the goal\n"
    for axis, values, title in zip(axes, (latent, true), titles, strict=True):
        values = np.where(np.isfinite(values), values, np.nan)
        axis.imshow(on_lattice(positions, values), extent=_bounds(positions), cmap="viridis", interpolation="nearest")
        axis.plot(*episode.goal, "*", color="white", markeredgecolor="black", markersize=11)
        _frame(axis, episode, title)


def _draw_paths(axis: Any, episode: Episode, title: str) -> None:
    """The executed path, and some of the plans made on it."""
    from matplotlib import colormaps

    axis.imshow(episode.start, extent=episode.decoder.grid.extent)
    path = np.stack(episode.path)
    axis.plot(path[:, 0], path[:, 1], color="black", linewidth=2.2)
    for i in chosen(len(episode.plans), PLANS):
        color = colormaps["plasma"](0.1 + 0.75 * i / max(len(episode.plans) - 1, 1))
        plan = episode.decoder.positions[episode.planned(episode.plans[i])]
        axis.plot(plan[:, 0], plan[:, 1], color=color, linewidth=1.2)
        axis.plot(*path[episode.plans[i][0]], "o", color=color, markeredgecolor="black", markersize=4.5)
    _frame(axis, episode, title)


def _draw_steps(part: Any, episode: Episode) -> None:
    """Steps of the first plan, above what was observed at those steps."""
    made = episode.plans[0]
    rows = episode.planned(made)
    steps = plan_steps(len(rows) - 1)
    axes = part.subplots(2, len(steps), squeeze=False)
    for line, name in zip(axes, ("planned", "happened"), strict=True):
        for axis in line:
            axis.axis("off")
        line[0].text(-0.06, 0.5, name, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=8)
    for column, step in enumerate(steps):
        grid, row = episode.decoder.grid, rows[step]
        frame = {k: v[row : row + 1] for k, v in grid.observations.items()}
        _draw_frame(axes[0, column], episode, frame, episode.decoder.positions[row])
        axes[0, column].set_title(f"step {step}", fontsize=8)
        then = made[0] + step
        if then < len(episode.path):
            _draw_frame(axes[1, column], episode, episode.observations[then], episode.path[then])


def _draw_frame(axis: Any, episode: Episode, obs: Mapping[str, Tensor], point: np.ndarray) -> None:
    """The image that is observed, or a dot over the free positions."""
    seen = obs["achieved_goal"][0]
    if seen.dtype == torch.uint8 and seen.ndim == 3:
        axis.imshow(as_picture(seen.cpu().numpy()), interpolation="nearest")
        return
    positions = episode.decoder.positions
    free = on_lattice(positions, np.zeros(len(positions)))
    axis.imshow(free, extent=_bounds(positions), cmap="gray", vmin=-1, vmax=0, interpolation="nearest")
    axis.plot(*episode.goal, "*", color="#2ca02c", markersize=8)
    axis.plot(*point, "o", color="#1f77b4", markersize=5)
    _frame(axis, episode)


def _frame(axis: Any, episode: Episode, title: str = "") -> None:
    left, right, bottom, top = episode.decoder.grid.extent
    axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", facecolor="#444444")
    axis.axis("on")
    axis.set(xticks=(), yticks=())
    axis.set_title(title, fontsize=8)


def _bounds(positions: np.ndarray) -> tuple[float, float, float, float]:
    """The edges of the picture of :func:`on_lattice`: half a step beyond the outer positions."""
    x, y = lattice_index(positions)
    low, high = positions.min(0), positions.max(0)
    half = (high - low) / np.maximum([x.max(), y.max()], 1) / 2
    (left, top), (right, bottom) = low - half, high + half
    return left, right, bottom, top


def chosen(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``range(count)``, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def plan_steps(horizon: int) -> list[int]:
    """0, 5, 10, ... up to the horizon, or a multiple of that such that there are at most ``COLUMNS``."""
    multiple = max(1, -(-(horizon + 1) // (STRIDE * COLUMNS)))
    return list(range(0, horizon + 1, STRIDE * multiple))


def as_picture(frame: np.ndarray) -> np.ndarray:
    """An observed image with 1 to 3 channels first or last, uint8, as (H, W, 3); two channels are dark on white."""
    image = np.moveaxis(frame, 0, -1) if frame.shape[0] <= 3 else frame
    if image.shape[-1] == 3:
        return image
    inks = np.array([[224, 136, 75], [187, 187, 187]])[: image.shape[-1]]  # what is taken from white: blue, dark grey
    return np.clip(255 - (image / 255) @ inks, 0, 255).astype(np.uint8)
