"""Compare PointMaze's physics with MuJoCo's (needs the package mujoco) and print the figures that docs/point_maze.md cites.

    python scripts/check_point_maze_physics.py

The scene is D4RL's point maze, written anew from its facts. Two conventions of MuJoCo have changed since D4RL was made:
the margin of a contact was the larger of the two geoms' margins and is now their sum, and the inverse weight of a body that
cannot move along one axis was 2/3 of what it is now. PointMaze keeps the old ones; the scene is set up so that any
version of MuJoCo uses them. The last row shows what the difference amounts to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clbench.envs.point_maze import (
    ACTION_REPEAT,
    CONTACT,
    DAMPING,
    DENSITY,
    GEAR,
    INVERSE_WEIGHT,
    MARGIN,
    MAX_SPEED,
    RADIUS,
    TIMESTEP,
    ring_code,
    simulation_step,
    wall_distance,
)
from clbench.streams.maze_layouts import PUBLISHED, SIDE, layout_code, path_lengths, with_ring

FREE_STEPS = 10_000
EPISODES, STEPS = 40, 100  # per layout


def scene(layout: str | None, old: bool = True) -> Any:
    """MuJoCo's model of a layout, or of empty space; ``old`` selects the conventions of D4RL's time."""
    import mujoco

    rows = with_ring(layout).split("/") if layout else []
    walls = "".join(
        f'<geom type="box" pos="{column - 0.5} {row - 0.5} 0" size="0.5 0.5 0.2" contype="2" margin="{MARGIN}"/>'
        for row, text in enumerate(rows)
        for column, letter in enumerate(text)
        if letter == "#"
    )
    ball = f'<geom type="sphere" size="{RADIUS}" density="{DENSITY}" contype="1" margin="{0 if old else MARGIN}"/>'
    joints = "".join(
        f'<joint name="{name}" type="slide" axis="{axis}" damping="{DAMPING}"/>'
        for name, axis in (("x", "1 0 0"), ("y", "0 1 0"))
    )
    motors = "".join(f'<motor joint="{name}" gear="{GEAR}" ctrllimited="true" ctrlrange="-1 1"/>' for name in "xy")
    model = mujoco.MjModel.from_xml_string(f"""
        <mujoco><compiler inertiafromgeom="true"/>
        <option timestep="{TIMESTEP}" gravity="0 0 0" iterations="20" integrator="Euler"/>
        <default><geom condim="1" conaffinity="1"/></default>
        <worldbody>{walls}<body>{ball}{joints}</body></worldbody><actuator>{motors}</actuator></mujoco>""")
    if old:
        model.body_invweight0[1, 0] = INVERSE_WEIGHT
    return model


@dataclass
class Recording:
    """What MuJoCo did in one episode: states before each step and after the last, and the actions."""

    position: np.ndarray  # (T + 1, 2)
    velocity: np.ndarray  # (T + 1, 2)
    action: np.ndarray  # (T, 2)


def record(model: Any, position: Sequence[float], velocity: Sequence[float], actions: np.ndarray) -> Recording:
    """Run MuJoCo with D4RL's clipping of the velocity before each step."""
    import mujoco

    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = position, velocity
    states = np.empty((len(actions) + 1, 2, 2))
    for t, action in enumerate(actions):
        states[t] = data.qpos, data.qvel
        data.qvel[:] = np.clip(data.qvel, -MAX_SPEED, MAX_SPEED)
        data.ctrl[:] = action
        mujoco.mj_step(model, data)
    states[-1] = data.qpos, data.qvel
    return Recording(states[:, 0], states[:, 1], actions)


def free_flight(steps: int = FREE_STEPS) -> Recording:
    """Random actions in empty space; a third of them beyond the bounds, where they are clipped."""
    rng = np.random.default_rng(0)
    return record(scene(None), (0.5, 0.5), (3.0, -2.0), rng.uniform(-1.5, 1.5, (steps, 2)))


def maze_episodes(layout: str, episodes: int, old: bool = True) -> list[Recording]:
    """Episodes in a maze, by turns with the random actions of the data and with one strong push all the time."""
    rng, model = np.random.default_rng(1), scene(layout, old)
    cells = np.flatnonzero(np.diag(path_lengths(layout_code(layout))) == 0)
    recordings = []
    for number in range(episodes):
        row, column = divmod(int(rng.choice(cells)), SIDE)
        angle = rng.uniform(0, 2 * np.pi, STEPS if number % 2 else 1)
        length = rng.uniform(0, 1, angle.shape) if number % 2 else 1.0
        push = np.stack([length * np.cos(angle), length * np.sin(angle)], -1)
        actions = np.repeat(np.broadcast_to(push, (STEPS, 2)), ACTION_REPEAT, 0)
        direction = rng.uniform(0, 2 * np.pi)
        velocity = rng.uniform(0, MAX_SPEED) * np.array([np.cos(direction), np.sin(direction)])
        recordings.append(record(model, (column + 0.5, row + 0.5), velocity.tolist(), actions))
    return recordings


def solid_of(layout: str | None) -> torch.Tensor:
    """Walls (1,) for :func:`clbench.envs.point_maze.simulation_step`."""
    return ring_code(torch.tensor([layout_code(layout)])) if layout else torch.zeros(1, dtype=torch.int64)


def step_errors(recordings: Sequence[Recording], layout: str | None, step: Any = simulation_step) -> np.ndarray:
    """One step of ours from each of MuJoCo's states -> largest difference in position and velocity, and whether in contact.

    Returns:
        (N, 3): position, velocity, contact (0 or 1).
    """
    before, after, speed, next_speed, action = (
        torch.from_numpy(np.concatenate(part).T.copy())
        for part in zip(
            *((r.position[:-1], r.position[1:], r.velocity[:-1], r.velocity[1:], r.action) for r in recordings),
            strict=True,
        )
    )
    solid = solid_of(layout).expand(before.shape[1])
    position, velocity = step(before, speed, GEAR * action.clamp(-1, 1), solid)
    errors = [(position - after).abs().amax(0), (velocity - next_speed).abs().amax(0)]
    return torch.stack([*errors, (wall_distance(before, solid) < CONTACT).double()], 1).numpy()


def trajectory_errors(recordings: Sequence[Recording], layout: str | None) -> np.ndarray:
    """Whole episodes of ours with MuJoCo's first states and actions -> difference of positions (episodes, T)."""
    position, velocity = (
        torch.from_numpy(np.stack([v[0] for v in part]).T.copy())
        for part in zip(*((r.position, r.velocity) for r in recordings), strict=True)
    )
    solid = solid_of(layout).expand(len(recordings))
    errors = []
    for t in range(len(recordings[0].action)):
        action = torch.from_numpy(np.stack([r.action[t] for r in recordings]).T.copy())
        position, velocity = simulation_step(position, velocity, GEAR * action.clamp(-1, 1), solid)
        there = torch.from_numpy(np.stack([r.position[t + 1] for r in recordings]).T.copy())
        errors.append((position - there).abs().amax(0))
    return torch.stack(errors, 1).numpy()


def figures() -> list[tuple[str, str]]:
    """What is compared, and the result."""
    import mujoco

    flight = free_flight()
    rows = [
        ("MuJoCo", mujoco.__version__),
        (
            f"without contact: largest error of the position in one trajectory of {FREE_STEPS:,} random steps",
            f"{trajectory_errors([flight], None).max():.0e}",
        ),
    ]
    one, whole, new = [], [], []
    for layout in PUBLISHED:
        recordings = maze_episodes(layout, EPISODES)
        one.append(step_errors(recordings, layout))
        whole.append(trajectory_errors(recordings, layout))
        new.append(step_errors(maze_episodes(layout, EPISODES, old=False), layout))
    errors, paths, other = np.concatenate(one), np.concatenate(whole), np.concatenate(new)
    touching = errors[:, 2] == 1
    close = (paths.max(1) < 1e-3).mean()
    contact = f"in contact ({touching.sum():,} states): largest error after one step"
    return [
        *rows,
        (f"{contact}, position", f"{errors[touching, 0].max():.0e}"),
        (f"{contact}, velocity", f"{errors[touching, 1].max():.0e}"),
        (
            f"{len(paths)} episodes of {paths.shape[1]} steps with contacts: share in which the position stays within 1e-3",
            f"{close:.1%}",
        ),
        ("the same, largest error of the position", f"{paths.max():.0e}"),
        (
            "conventions of this MuJoCo instead of D4RL's: mean difference of the position after one step in contact",
            f"{other[other[:, 2] == 1, 0].mean():.0e}",
        ),
        ("the same, largest difference", f"{other[:, 0].max():.0e}"),
    ]


def main() -> int:
    try:
        rows = figures()
    except ImportError:
        print("This check needs the package mujoco: pip install 'clbench[mujoco]'", file=sys.stderr)
        return 2
    for name, value in rows:
        print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
