"""Offline data for Two-Rooms: the random walks of PLDM (Sobal et al. 2025, arXiv 2502.14819, section on data generation).

All trajectories are drawn and rolled out together; the only loop is over time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from clbench.data.dataset import OfflineDataset, Rendered
from clbench.envs.two_rooms import (
    COLLISIONS,
    DOOR_RANGE,
    HALF_DOOR,
    HIGH,
    LOW,
    OBSERVATIONS,
    WALL_RANGE,
    Layout,
    check_dynamics,
    displacement,
    is_free,
    layout_numbers,
    make_layout,
    render_pixels,
)
from clbench.errors import ConfigError, unknown_name
from clbench.rng import numpy_generator

STEP_MEAN, STEP_SD, STEP_LOW, STEP_HIGH = 1.0, 0.4, 0.2, 1.8
DOOR_SD = 1.4
NOISE = 0.5  # of the rule "noisy"
NOMINAL = (1.0, 0.0)
EDGE = 0.01  # forced trajectories start at least this far inside the border

Dynamics = tuple[float, float]  # action gain, friction


def two_rooms(
    *,
    wall_x: float = 32.0,
    door_y: float = 10.0,
    transitions: int = 92_160,
    steps: int = 90,
    kappa: float = 5.0,
    cross_wall_rate: float = 0.6,
    collision: str = "stop",
    observation: str = "state",
    goal_sign: bool = False,
    action_gain: float = 1.0,
    friction: float = 0.0,
    seed: int = 0,
) -> OfflineDataset:
    """Random walks in Two-Rooms, a pure function of the arguments.

    The heading does a random walk with von Mises increments; step lengths are normal (1, 0.4) truncated to [0.2, 1.8].
    A share ``cross_wall_rate`` of the trajectories is laid through the door (walls may still stop them); the others start
    anywhere.

    Args:
        wall_x: centre of the wall, in [20, 45).
        door_y: centre of the door, in [10, 55).
        transitions: ``N``; if it is no multiple of ``steps``, the last trajectory is cut short.
        steps: actions per trajectory, ``T``.
        kappa: concentration of the turns; 5 is the good data of the paper, 1e-6 the random policy.
        cross_wall_rate: share of trajectories laid through the door.
        collision: rule of :data:`clbench.envs.two_rooms.COLLISIONS`; ``"cancel"`` is the reference's generator.
        observation: ``"state"`` (positions), ``"layout"`` (with wall and door beside them) or ``"pixels"`` (rendered from
            stored positions when a batch is drawn).
        goal_sign: add the key ``goal_sign`` (N, 1), all 1, as environments with that option have.
        action_gain: of the environment, which moves by :func:`clbench.envs.two_rooms.displacement`; actions are drawn alike
            under all dynamics.
        friction: of the environment.
        seed: of the generator.

    Returns:
        ``N`` transitions with the keys ``observation`` and ``achieved_goal``, which share one column.

    Raises:
        ConfigError: an argument out of range.
    """
    settings: dict[str, Any] = {
        "wall_x": wall_x, "door_y": door_y, "transitions": transitions, "steps": steps, "kappa": kappa,
        "cross_wall_rate": cross_wall_rate, "collision": collision, "observation": observation, "seed": seed,
    }  # fmt: skip
    _check(**settings)
    check_dynamics("two-rooms", action_gain, friction=friction)
    dynamics = (action_gain, friction)
    rng = numpy_generator(seed, "two-rooms", "data")
    count = -(-transitions // steps)
    layout = make_layout(wall_x, door_y)
    start, actions = _plans(rng, count, steps, kappa, cross_wall_rate, wall_x, door_y, layout, dynamics)
    states = _roll(start, actions, layout, collision, rng, dynamics)

    lengths = torch.full((count,), steps)
    lengths[-1] = transitions - (count - 1) * steps
    final = states[:, -1].clone()
    final[-1] = states[-1, lengths[-1]]
    data = states[:, :-1].reshape(-1, 2)[:transitions]

    def column(position: Tensor) -> dict[str, Any]:
        shared = rendered(position, wall_x, door_y) if observation == "pixels" else position
        columns = {"observation": shared, "achieved_goal": shared}
        if observation == "layout":
            where = layout_numbers(torch.tensor([wall_x]).double(), torch.tensor([door_y]).double())
            columns["layout"] = where.expand(len(position), -1).contiguous()
        return columns | {"goal_sign": torch.ones(len(position), 1)} if goal_sign else columns

    return OfflineDataset(
        column(data), actions.reshape(-1, 2)[:transitions], lengths, column(final), name="two-rooms",
        metadata={"generator": "two-rooms", **settings, **({"goal_sign": True} if goal_sign else {}),
                  **({} if dynamics == NOMINAL else {"action_gain": action_gain, "friction": friction})},
    )  # fmt: skip


def rendered(position: Tensor, wall_x: float, door_y: float) -> Rendered:
    """Positions (N, 2) as pixels (N, 2, 65, 65) that are drawn when indexed."""
    constants = {"wall_x": wall_x, "door_y": door_y}
    columns = {
        key: torch.full((1,), value, device=position.device).expand(len(position)) for key, value in constants.items()
    }
    return Rendered("two-rooms", {"position": position, **columns}, render_pixels)


def _check(*, wall_x: float, door_y: float, transitions: int, steps: int, kappa: float, cross_wall_rate: float,
           collision: str, observation: str, seed: int) -> None:  # fmt: skip
    for name, value, (low, high) in (("wall_x", wall_x, WALL_RANGE), ("door_y", door_y, DOOR_RANGE)):
        if not low <= value < high:
            raise ConfigError(f"two-rooms: {name} must be in [{low:g}, {high:g}), got {value}.")
    for name, value in (("transitions", transitions), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"two-rooms: {name} must be at least 1, got {value}.")
    if not 0 <= cross_wall_rate <= 1:
        raise ConfigError(f"two-rooms: cross_wall_rate must be in [0, 1], got {cross_wall_rate}.")
    if not (kappa > 0 and math.isfinite(kappa)):
        raise ConfigError(f"two-rooms: kappa must be positive, got {kappa} (1e-6 gives uniform headings).")
    for kind, value, known in (("collision", collision, COLLISIONS), ("observation", observation, OBSERVATIONS)):
        if value not in known:
            raise unknown_name(f"value of {kind}", str(value), known, where="data set 'two-rooms'")


# -- plans: start and intended actions of every trajectory ------------------------------------------------------------


def _plans(rng: np.random.Generator, count: int, steps: int, kappa: float, cross_wall_rate: float, wall_x: float,
           door_y: float, layout: Layout, dynamics: Dynamics = NOMINAL) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> starts (E, 2) float64, actions (E, T, 2) float32, in random order."""
    forced = round(cross_wall_rate * count)
    faces = float(layout.low[0, 0]), float(layout.high[0, 0])
    plain = count - forced
    parts = [
        (_free_points(rng, plain, faces), _walk(rng, rng.uniform(0, 2 * math.pi, plain), steps, kappa)),
        _through_door(rng, forced, steps, kappa, faces, wall_x, door_y, dynamics),
    ]
    order = rng.permutation(count)
    starts, actions = (np.concatenate(column)[order] for column in zip(*parts, strict=True))
    return torch.from_numpy(starts), torch.from_numpy(actions)


def _walk(rng: np.random.Generator, heading: np.ndarray, steps: int, kappa: float) -> np.ndarray:
    """Actions (E, T, 2) float32 of heading walks; the first action has the given heading (E,)."""
    turns = rng.vonmises(0.0, kappa, (len(heading), steps))
    turns[:, 0] = 0.0
    angle = heading[:, None] + np.cumsum(turns, axis=1)
    length = _truncated_normal(rng, STEP_MEAN, STEP_SD, STEP_LOW, STEP_HIGH, angle.shape)
    return np.stack([length * np.cos(angle), length * np.sin(angle)], -1).astype(np.float32)


def _truncated_normal(
    rng: np.random.Generator, mean: float, sd: float, low: float, high: float, shape: Any
) -> np.ndarray:
    """By the inverse of the distribution function."""
    first, last = ndtr((low - mean) / sd), ndtr((high - mean) / sd)
    return np.clip(mean + sd * ndtri(rng.uniform(first, last, shape)), low, high)


def _free_points(rng: np.random.Generator, count: int, faces: tuple[float, float]) -> np.ndarray:
    """Uniform in the square (E, 2); points in the wall's strip are drawn again in one of the rooms."""
    points = rng.uniform(LOW, HIGH, (count, 2))
    again = rng.uniform(size=count)
    room = np.where(rng.uniform(size=count) < 0.5, LOW + (faces[0] - LOW) * again, faces[1] + (HIGH - faces[1]) * again)
    in_strip = (points[:, 0] > faces[0]) & (points[:, 0] < faces[1])
    points[:, 0] = np.where(in_strip, room, points[:, 0])
    return points


def _through_door(rng: np.random.Generator, count: int, steps: int, kappa: float, faces: tuple[float, float], wall_x: float,
                  door_y: float, dynamics: Dynamics = NOMINAL) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Starts (E, 2) and actions (E, T, 2) that pass a point of the door if no wall stops them before.

    From the door one walk leads left and one right. The first ``s`` actions of the left walk, reversed, lead to the door;
    then the right walk goes on from its second action. Half of the trajectories are run backwards.
    """
    door_height = _truncated_normal(rng, door_y, DOOR_SD, door_y - HALF_DOOR, door_y + HALF_DOOR, count)
    door = np.stack([rng.uniform(*faces, count), door_height], -1)
    before = rng.integers(1, steps + 1, count)
    leftwards = math.pi + rng.uniform(-math.pi / 4, math.pi / 4, count)
    left, right = _walk(rng, leftwards, steps, kappa), _walk(rng, leftwards + math.pi, steps, kappa)
    time = np.arange(steps) - before[:, None]  # negative before the door
    to_door = -np.take_along_axis(left, np.clip(-1 - time, 0, None)[..., None], 1)
    onwards = np.take_along_axis(right, np.clip(time + 1, 0, steps - 1)[..., None], 1)
    actions = np.where((time < 0)[..., None], to_door, onwards)
    backwards = rng.uniform(size=count) < 0.5
    actions = np.where(backwards[:, None, None], -actions[:, ::-1], actions)
    before = np.where(backwards, steps - before, before)
    moved = displacement(torch.from_numpy(actions).movedim(-1, 0), *dynamics).movedim(0, -1).numpy()
    path = np.where((np.arange(steps) < before[:, None])[..., None], moved, 0).sum(1, dtype=np.float64)
    starts = np.clip(door - path, LOW + EDGE, HIGH - EDGE)
    in_strip = (starts[:, 0] > faces[0]) & (starts[:, 0] < faces[1])
    in_wall = in_strip & (np.abs(starts[:, 1] - door_y) > HALF_DOOR)
    nearest = np.where(starts[:, 0] < wall_x, faces[0] - EDGE, faces[1] + EDGE)
    starts[:, 0] = np.where(in_wall, nearest, starts[:, 0])
    return starts, actions


def _roll(start: Tensor, actions: Tensor, layout: Layout, collision: str, rng: np.random.Generator,
          dynamics: Dynamics = NOMINAL) -> Tensor:  # fmt: skip
    """Apply actions (E, T, 2) from starts (E, 2) -> states (E, T + 1, 2) float32."""
    collide = COLLISIONS[collision]
    count, steps, _ = actions.shape
    position = start.t().to(torch.float32).contiguous()
    states = torch.empty(count, steps + 1, 2)
    states[:, 0] = position.t()
    for t in range(steps):
        noise = torch.from_numpy(rng.normal(0.0, NOISE, (2, count))) if collision == "noisy" else None
        moves = displacement(actions[:, t].t().to(torch.float64, memory_format=torch.contiguous_format), *dynamics)
        position = collide(position.to(torch.float64), moves, layout, noise).to(torch.float32)
        states[:, t + 1] = position.t()
    return states


# -- what the data are like -------------------------------------------------------------------------------------------


def statistics(dataset: OfflineDataset, sample: int = 1000) -> dict[str, float]:
    """Numbers to compare with the paper, over the trajectories of full length.

    Args:
        dataset: made by :func:`two_rooms`.
        sample: trajectories used for the pair distance (the first ones; their order is random).

    Returns:
        ``action_sd`` (per axis); ``door_passing``: share of trajectories with states on both sides of the wall;
        ``blocked``: share of transitions without displacement; ``pair_distance``: mean over trajectories of the largest
        distance between two of their states, in pixels; ``in_walls``: share of states inside a wall (0 unless broken).
    """
    settings = dataset.metadata
    observed, final = dataset.observations["observation"], dataset.final_observations["observation"]
    if isinstance(observed, Rendered):
        observed, final = observed.columns["position"], final.columns["position"]
    steps = int(dataset.lengths[0])
    full = int((dataset.lengths == steps).sum())
    states = torch.cat([observed[: full * steps].reshape(full, steps, 2), final[:full, None]], 1)
    layout = make_layout(settings["wall_x"], settings["door_y"], device=states.device)
    x = states[..., 0]
    passing = (x.amin(1) < layout.low[0]) & (x.amax(1) > layout.high[0])
    blocked = (states[:, 1:] == states[:, :-1]).all(-1)
    pairs = torch.cdist(states[:sample], states[:sample]).flatten(1).amax(1)
    free = is_free(states.reshape(-1, 2).t().to(torch.float64), layout)
    return {
        "action_sd": float(dataset.actions.std(0).mean()),
        "door_passing": float(passing.double().mean()),
        "blocked": float(blocked.double().mean()),
        "pair_distance": float(pairs.mean()),
        "in_walls": 1 - float(free.double().mean()),
    }
