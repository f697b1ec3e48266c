"""Two-Rooms with a chaser: stay away from a point that follows the shortest path to the agent.

Source: the new task of PLDM (Sobal et al. 2025, arXiv 2502.14819, section on generalisation to a new task). Published are
the chaser's path (shortest and free of collisions), its largest step, the 100 steps of an episode and the distance at which
the agent is caught; the rest is ours and said below.

Free space is two rooms and the door between them, three rectangles, and a simple polygon: one path is the shortest, and it
bends at corners of the door only. It crosses the near and the far side of the door, each at a height within the jambs, and
its length is a convex function of these two heights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from clbench.envs.two_rooms import SIZE, Layout, TwoRoomsEnv, TwoRoomsVectorEnv, dot_position
from clbench.errors import ConfigError

MAX_NORM = 1.84  # of the agent's actions: 2.45 of PLDM's normalised units
CAUGHT = 1.4

# -- the chaser -------------------------------------------------------------------------------------------------------


def shortest_path(start: Tensor, end: Tensor, layout: Layout) -> Tensor:
    """The shortest polyline in free space from ``start`` to ``end``.

    If it crosses the door, its heights at the two sides are either both on the straight line, or one of them is at a jamb.
    The other then is on the straight line to it, or at the nearer jamb: five candidates, of which the shortest is taken.
    A point within the door is a side of no width.

    Args:
        start: (2, B) float64, in free space.
        end: (2, B) float64, in free space.
        layout: of each row.

    Returns:
        (4, 2, B): start, two points between (the end, where nothing is in the way), end.
    """
    (left, upper), (right, lower) = layout.low, layout.high
    (x0, y0), (x1, y1) = start, end
    inside = [(x > left) & (x < right) for x in (x0, x1)]
    near = torch.where(x0 < x1, x0.maximum(left), x0.minimum(right))
    far = torch.where(x0 < x1, x1.minimum(right), x1.maximum(left))
    low = [torch.where(within, y, upper) for within, y in zip(inside, (y0, y1), strict=True)]
    high = [torch.where(within, y, lower) for within, y in zip(inside, (y0, y1), strict=True)]

    def from_start(y: Tensor, x: Tensor = far) -> Tensor:
        """Height at the near side of the line from the start to (x, y), kept within the door."""
        return (y0 + (near - x0) / (x - x0) * (y - y0)).clamp(low[0], high[0])

    def to_end(y: Tensor, x: Tensor = near) -> Tensor:
        """Height at the far side of the line from (x, y) to the end, kept within the door."""
        return (y + (far - x) / (x1 - x) * (y1 - y)).clamp(low[1], high[1])

    first = torch.stack([from_start(y1, x1), low[0], high[0], from_start(low[1]), from_start(high[1])])
    second = torch.stack([to_end(y0, x0), to_end(low[0]), to_end(high[0]), low[1], high[1]])
    length = torch.hypot(near - x0, first - y0) + torch.hypot(far - near, second - first)
    best = (length + torch.hypot(x1 - far, y1 - second)).argmin(0, keepdim=True)
    via = [torch.stack([x, y.gather(0, best)[0]]) for x, y in ((near, first), (far, second))]
    # in one rectangle the straight line is free (and the lines above may have no direction)
    straight = ((x0 <= left) & (x1 <= left)) | ((x0 >= right) & (x1 >= right)) | (inside[0] & inside[1])
    return torch.stack([start, *(torch.where(straight, end, point) for point in via), end])


def walk(path: Tensor, distance: float) -> Tensor:
    """The point (2, B) at ``distance`` from the beginning of polylines (P, 2, B), or their end where they are shorter."""
    position = path[0]
    rest = torch.full_like(position[0], distance)
    for corner in path[1:]:
        step = corner - position
        length = torch.hypot(*step)
        position = position + torch.where(rest < length, rest / length, 1.0) * step
        rest = (rest - length).clamp(min=0)
    return position


# -- environments -----------------------------------------------------------------------------------------------------


class TwoRoomsChaseVectorEnv(TwoRoomsVectorEnv):
    """Two-Rooms with a chaser, ``B`` rows at once (:class:`clbench.contracts.VectorEnv`).

    A step: the agent moves as in :class:`~clbench.envs.two_rooms.TwoRoomsVectorEnv`, its action cut to the norm 1.84; then
    the chaser moves by at most ``chaser_speed`` along the shortest path in free space to where the agent is now.

    Observation: as in Two-Rooms, but ``desired_goal`` is the chaser, new in every step (with pixels, a frame with the
    chaser as its dot; the agent's own frame does not show it). ``goal_sign`` (B, 1) is -1: this goal is to be avoided. A
    world model of Two-Rooms can be used as it is.

    The agent is caught when it is closer than 1.4 pixels to the chaser after both have moved (in a straight line, also
    around a corner). That ends the episode; else it is truncated after ``max_episode_steps``. Reward: 1 per step, 0 when
    caught. Success, in each step: not caught so far. The success of an episode is that of its last step.

    Randomness and state: as in Two-Rooms. By default agent and chaser begin in different rooms, at least 2.6 pixels off
    every wall. Reset options: ``start`` (B, 2) of the agent, ``chaser`` (B, 2), ``reset_mask`` (B,).

    Args:
        num_envs: rows.
        device: of all tensors.
        autoreset: ``"same_step"`` or ``"disabled"``.
        observation: ``"state"`` or ``"pixels"``.
        wall_x: centre of the wall, in [20, 45); a number, or one per row.
        door_y: centre of the door, in [10, 55); a number, or one per row.
        collision: the rule for the agent, as in Two-Rooms.
        noise: standard deviation per axis, for ``"noisy"``.
        chaser_speed: largest step of the chaser, in pixels; the paper has 0.8 to 1.8.
        max_episode_steps: steps until truncation, or ``None``.
        render_mode: for Gymnasium; :meth:`render` always works.

    Raises:
        ConfigError: an option out of its range.
    """

    _points_of: ClassVar[Mapping[str, str]] = {"start": "start", "chaser": "goal"}
    _goal_colour: ClassVar[tuple[int, int, int]] = (214, 39, 40)
    # this goal is to be avoided: there is no controller towards it
    oracle_actions: ClassVar[None] = None  # type: ignore[assignment]
    straight_line_actions: ClassVar[None] = None  # type: ignore[assignment]

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        observation: str = "state",
        wall_x: float | Sequence[float] = 32.0,
        door_y: float | Sequence[float] = 10.0,
        collision: str = "stop",
        noise: float = 0.5,
        chaser_speed: float = 1.0,
        max_episode_steps: int | None = 100,
        render_mode: str | None = None,
    ):
        is_number = isinstance(chaser_speed, int | float) and not isinstance(chaser_speed, bool)
        if not (is_number and chaser_speed >= 0 and math.isfinite(chaser_speed)):
            raise ConfigError(f"Two-Rooms: chaser_speed must be a number of pixels >= 0, got {chaser_speed!r}.")
        super().__init__(
            num_envs, device, autoreset, observation, wall_x, door_y, collision, noise, max_episode_steps,
            goal_sign=True, render_mode=render_mode,
        )  # fmt: skip
        self.chaser_speed = float(chaser_speed)
        self._constant["goal_sign"] = torch.full((num_envs, 1), -1.0, device=self.device)

    def _move(self, action: Tensor) -> None:
        super()._move(action * (MAX_NORM / torch.hypot(*action)).clamp(max=1))
        agent, chaser = (v.to(torch.float64) for v in (self._position, self._goal))
        self._goal = walk(shortest_path(chaser, agent, self._layout), self.chaser_speed).to(torch.float32)
        self._desired = self._show(self._goal)

    def _outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        caught = torch.hypot(*(self._position - self._goal)) < CAUGHT
        return ~caught, 1 - caught.to(torch.float32), caught

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """The reward for an agent at ``achieved_goal`` and a chaser at ``desired_goal``; arguments as in Two-Rooms."""
        points = [torch.as_tensor(v) for v in (achieved_goal, desired_goal)]
        agent, chaser = (dot_position(p) if p.shape[-2:] == (SIZE, SIZE) else p for p in points)
        reward = ((agent - chaser).norm(dim=-1) >= CAUGHT).to(torch.float32)
        return reward if isinstance(achieved_goal, Tensor) else reward.numpy()[()]


class TwoRoomsChaseEnv(TwoRoomsEnv):
    """One environment with NumPy in and out; see :class:`TwoRoomsChaseVectorEnv` for what it does and its options.

    ``max_episode_steps`` is ``None`` by default, because ``gymnasium.make`` adds the limit of 100 steps itself.
    """

    _batch_class: ClassVar[type[TwoRoomsVectorEnv]] = TwoRoomsChaseVectorEnv
