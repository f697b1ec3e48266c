"""Compare clbench/OGBenchPointMaze-v0 with OGBench's own mazes on MuJoCo and print the figures of docs/ogbench_maze.md.

    pip install "clbench[mujoco]" && python scripts/check_ogbench_maze.py

Errors of one step from the same states, and success of two controllers in both, from the same starts to the same goals.
Prints nothing where OGBench is not installed.
"""

from __future__ import annotations

import sys
from importlib import metadata

import gymnasium
import numpy as np
import torch

from clbench.envs.ogbench_maze import STEP_SIZE, Maze, OGBenchPointMazeVectorEnv
from clbench.rng import sealed_global_rng, seed_global
from clbench.streams.ogbench_mazes import TASKS, centres, free_cells, next_cells

MAZES = ("medium", "large", "giant")  # teleporters draw from another generator
STATES = 4000  # per maze
EPISODES = 30  # per task of the medium maze
LIMIT, STUCK = 1000, 50  # steps; without movement for so many, a controller without memory stays there


def states(maze: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (N, 2) that touch no wall, most of them near one, and actions (N, 2)."""
    rng = np.random.default_rng(0)
    middle = centres(maze)[free_cells(maze)]
    points = middle[rng.integers(len(middle), size=40 * STATES)] + rng.uniform(-2, 2, (40 * STATES, 2))
    columns = torch.from_numpy(points).t()
    shape = Maze(maze)
    fits = (shape.push_out(columns) == columns).all(0)
    push = torch.from_numpy(rng.uniform(-0.3, 0.3, points.shape)).t()
    near = (shape.push_out(columns + push) != columns + push).any(0)
    chosen = np.concatenate([points[(fits & near).numpy()][: STATES // 2], points[fits.numpy()][: STATES // 2]])
    return chosen, rng.uniform(-1, 1, chosen.shape)


def one_step(maze: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors of the position (N,) after one step, and whether a wall was touched (N,)."""
    env = gymnasium.make(f"pointmaze-{maze}-v0", disable_env_checker=True).unwrapped
    position, action = states(maze)
    env.reset(seed=0)
    theirs = []
    for point, move in zip(position, action, strict=True):
        env.set_xy(point)  # type: ignore[attr-defined]
        theirs.append(env.step(move)[0])
    ours = Maze(maze).move(torch.from_numpy(position).t(), torch.from_numpy(action).t(), STEP_SIZE).t().numpy()
    touched = np.abs(ours - position - STEP_SIZE * action).max(1) > 1e-9
    return np.linalg.norm(ours - np.stack(theirs), axis=1), touched


def towards(maze: str, controller: str, position: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """The action of a controller (2,)."""
    if controller == "straight line":
        return np.clip(5 * (goal - position), -1, 1)
    shape = Maze(maze)
    cell, last = (int(shape.cell(torch.from_numpy(p[:, None]))) for p in (position, goal))
    target = goal if cell == last else centres(maze)[next_cells(maze)[cell, last]]
    return (target - position) / max(float(np.linalg.norm(target - position)), STEP_SIZE)


def successes(maze: str, controller: str) -> tuple[np.ndarray, np.ndarray]:
    """Success of theirs and ours (tasks, episodes), from the same starts."""
    env = gymnasium.make(f"pointmaze-{maze}-v0", disable_env_checker=True)
    theirs, starts, goals = [], [], []
    for task in range(1, len(TASKS[maze]) + 1):
        for _ in range(EPISODES):
            position, info = env.reset(options={"task_id": task})
            starts.append(position)
            goals.append(info["goal"])
            still, reached = 0, False
            for _ in range(LIMIT):
                before = position
                position, _, reached, _, _ = env.step(towards(maze, controller, position, goals[-1]))
                still = still + 1 if np.abs(position - before).max() < 1e-5 else 0
                if reached or still > STUCK:
                    break
            theirs.append(reached)
    ours = torch.zeros(len(starts), dtype=torch.bool)
    batch = OGBenchPointMazeVectorEnv(len(starts), autoreset="disabled", maze=maze)
    batch.reset(options={"start": np.stack(starts), "goal": np.stack(goals)})
    act = batch.straight_line_actions if controller == "straight line" else batch.oracle_actions
    for _ in range(LIMIT):
        ours |= batch.step(act())[4]["is_success"]
    return np.reshape(theirs, (-1, EPISODES)), ours.numpy().reshape(-1, EPISODES)


def main() -> int:
    try:
        import ogbench.locomaze  # noqa: F401 (registers the mazes)
    except ImportError:
        return 0
    print(f"OGBench: {metadata.version('ogbench')}")
    print(f"MuJoCo: {metadata.version('mujoco')}")
    for maze in MAZES:
        error, touched = one_step(maze)
        print(f"{maze}, one step without contact: largest error of the position: {error[~touched].max():.0e}")
        found = error[touched]
        label = (
            f"{maze}, one step that touches a wall ({touched.sum():,} states): mean and largest error of the position"
        )
        print(f"{label}: {found.mean():.3f}, {found.max():.3f}")
    for controller in ("shortest path", "straight line"):
        with sealed_global_rng():
            seed_global(0)  # OGBench draws from NumPy's process-wide generator
            theirs, ours = successes("medium", controller)
        agree = (theirs == ours).mean()
        label = f"medium, {controller}, {theirs.size} episodes: success in OGBench, here, and share of equal outcomes"
        print(f"{label}: {theirs.mean():.3f}, {ours.mean():.3f}, {agree:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
