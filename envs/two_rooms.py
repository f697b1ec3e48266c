"""Two-Rooms: a point agent in two rooms joined by a door, batched on tensors, plus its collision rules and renderer.

Source: the environment of PLDM (Sobal et al. 2025, arXiv 2502.14819), re-implemented from its facts. Geometry in pixels
of a 65 x 65 picture, ``y`` grows downward::

    4                wall_x                60
    +------------------#-------------------+  4
    |                  #                   |
    |                      door_y +- 4     |        wall: the open strip (wall_x - 1, wall_x + 1) outside the door
    |                  #                   |        free: the closed square [4, 60]^2 without it
    +------------------#-------------------+  60

Inside this module a batch of points is one ``(2, B)`` tensor (row 0 is x, row 1 is y), so that each operation runs over
contiguous columns. Positions are stored as float32 and moved in float64. All faces are float32 numbers and rounding is
monotone, so rounding the result can put a point onto a face but never into a wall.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from clbench.envs.goal_grid import GoalGrid, lattice
from clbench.envs.seeding import EpisodeSeeds, check_batch, split_options
from clbench.errors import ConfigError, ContractError, DataError, unknown_name
from clbench.rng import hash_uniform

SIZE = 65
LOW, HIGH = 4.0, 60.0  # the outer border
HALF_WALL, HALF_DOOR = 1.0, 4.0
DOT = 1.3  # standard deviation of the drawn dot
MARGIN = 2 * DOT  # of starts and goals to every wall
PATCH, REACH = 9, 4.33  # the dot is 0 beyond sqrt(2 * 1.3^2 * ln 255) = 4.328 pixels: at most 9 x 9 pixels
MAX_ACTION = 1.8
OBSERVATIONS = ("state", "layout", "pixels")
WALL_RANGE, DOOR_RANGE = (20.0, 45.0), (10.0, 55.0)
PUSH = 0.3  # rule "noisy": distance to a side after touching it


# -- geometry ---------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Faces of the wall and of the door: ``low`` = (left face, upper jamb), ``high`` = (right face, lower jamb).

    Both are float64 (2, B), or (2, 1) where all rows share one layout.
    """

    low: Tensor
    high: Tensor


def make_layout(wall_x: Any, door_y: Any, device: Any = "cpu") -> Layout:
    """Faces for wall columns and door rows: scalars or (B,)."""
    centre = torch.stack([torch.atleast_1d(torch.as_tensor(v, dtype=torch.float64)) for v in (wall_x, door_y)])
    half = torch.tensor([[HALF_WALL], [HALF_DOOR]], dtype=torch.float64)
    faces = [(centre - half), (centre + half)]
    return Layout(*(f.to(torch.float32).to(device=device, dtype=torch.float64) for f in faces))


def is_free(position: Tensor, layout: Layout) -> Tensor:
    """Whether points (2, B) are in free space (the faces of walls included) -> (B,) bool."""
    in_square = ((position >= LOW) & (position <= HIGH)).all(0)
    in_strip = (position[0] > layout.low[0]) & (position[0] < layout.high[0])
    in_door = (position[1] >= layout.low[1]) & (position[1] <= layout.high[1])
    return in_square & (~in_strip | in_door)


def stop_at_walls(position: Tensor, action: Tensor, layout: Layout, noise: Tensor | None = None) -> Tensor:
    """Move along the straight line until a wall would be entered, and stop on its face.

    On a face, the point may move away or slide along it. Times are fractions of the step. A coordinate that does not move
    gives times of +-inf, or NaN exactly on a face; NaN compares false, which is "not entered", as it should be.

    Args:
        position: (2, B) float64, in free space.
        action: (2, B) float64, any length.
        layout: of each row.
        noise: unused (the signature of all rules).

    Returns:
        (2, B) float64; the hit coordinate is exactly that of the face.
    """
    at_low, at_high = (layout.low - position) / action, (layout.high - position) / action
    enter, leave = torch.minimum(at_low, at_high), torch.maximum(at_low, at_high)
    (strip_in, door_in), (strip_out, door_out) = enter, leave  # when the line is in the strip, and at the door's height
    begin = strip_in.clamp(min=0)
    too_early = door_in > begin
    meet = torch.where(too_early, begin, torch.maximum(door_out, begin))
    hit = (begin < strip_out) & (too_early | (door_out < strip_out))
    # the later of both borders on each axis; an axis that does not move gives +-inf (fmax drops NaN)
    border = torch.fmax((LOW - position) / action, (HIGH - position) / action).abs().amin(0)
    time = torch.minimum(border, torch.where(hit, meet, 1.0)).clamp(max=1)
    x, y = torch.addcmul(position, time, action).clamp(LOW, HIGH)
    entered, left = (
        torch.where(action > 0, layout.low, layout.high)[0],
        torch.where(action > 0, layout.high, layout.low)[1],
    )
    return torch.stack([torch.where(time == strip_in, entered, x), torch.where(time == door_out, left, y)])


def _jambs(position: Tensor, action: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Does the line cross a jamb from within? -> (downwards (B,), upwards (B,), point of crossing (2, B))."""
    y, target = position[1], position[1] + action[1]
    down, up = (y <= layout.high[1]) & (target > layout.high[1]), (y >= layout.low[1]) & (target < layout.low[1])
    time = (torch.where(down, layout.high[1], layout.low[1]) - y) / action[1]
    point = torch.addcmul(position, time, action)
    within = (point[0] >= layout.low[0]) & (point[0] <= layout.high[0])
    return down & within, up & within, point


def cancel_at_walls(position: Tensor, action: Tensor, layout: Layout, noise: Tensor | None = None) -> Tensor:
    """The rule of the reference's data generator: a step that would cross a border, a jamb or the wall does not happen.

    Arguments and result as in :func:`stop_at_walls`.
    """
    target = position + action
    blocked = ((target < LOW) | (target > HIGH)).any(0)
    down, up, _ = _jambs(position, action, layout)
    blocked |= down | up
    for face, outside in ((layout.low[0], torch.le), (layout.high[0], torch.ge)):
        crosses = outside(position[0], face) != outside(target[0], face)
        y = position[1] + (face - position[0]) / action[0] * action[1]
        blocked |= crosses & ~((y >= layout.low[1]) & (y <= layout.high[1]))
    return torch.where(blocked, position, target)


def noisy_at_walls(position: Tensor, action: Tensor, layout: Layout, noise: Tensor | None = None) -> Tensor:
    """The rule of the reference's evaluation: the point of contact plus noise, kept on the side the agent came from.

    Differs from the reference only where that leaves the rooms: a point exactly on a jamb counts as inside the door, and
    the result is clamped to the outer square.

    Args:
        position: (2, B) float64, in free space.
        action: (2, B) float64.
        layout: of each row.
        noise: (2, B) float64, for example normal with standard deviation 0.5.
    """
    if noise is None:
        noise = torch.zeros_like(position)
    target = position + action
    # 1. jambs: back into the opening
    down, up, point = _jambs(position, action, layout)
    back = torch.where(down, layout.high[1] - noise[1].abs(), layout.low[1] + noise[1].abs())
    at_jamb = torch.stack([point[0] + noise[0], back.clamp(layout.low[1], layout.high[1])])
    # 2. the room as a box with a hole in one vertical side
    in_left = position[0] < (layout.low[0] + layout.high[0]) / 2
    low, high = torch.full_like(position, LOW), torch.full_like(position, HIGH)
    low[0] = torch.where(in_left, LOW, layout.high[0])
    high[0] = torch.where(in_left, layout.low[0], HIGH)
    times = []
    for side, has_hole in ((low, ~in_left), (high, in_left)):
        crosses = (position - side).sign() * (target - side).sign() <= 0
        time = torch.nan_to_num((side - position) / action, nan=0.0, posinf=math.inf, neginf=math.inf)
        y = position[1] + time[0] * action[1]
        crosses[0] &= ~(has_hole & (y >= layout.low[1]) & (y <= layout.high[1]))
        times.append(torch.where(crosses, time, math.inf))
    first_low = times[0] <= times[1]
    per_axis = torch.minimum(*times)
    time = per_axis.amin(0)
    blocked = time < math.inf
    # 3. contact, noise (its normal part points to where the agent came from), and a gap to every side
    side = torch.where(first_low, low, high)
    came_from = (position - side).sign()
    came_from = torch.where(came_from == 0, torch.where(first_low, 1.0, -1.0), came_from)
    along = position + torch.where(blocked, time, 0.0) * action + noise
    normal_x = per_axis[0] <= per_axis[1]
    is_normal = torch.stack([normal_x, ~normal_x])
    contact = torch.where(is_normal, side + came_from * noise.abs(), along)
    contact = torch.where(contact <= low, low + PUSH, torch.where(contact >= high, high - PUSH, contact))
    moved = torch.where(blocked, contact, target)
    return torch.where(down | up, at_jamb, moved).clamp(LOW, HIGH)


def displacement(action: Tensor, gain: float, friction: float) -> Tensor:
    """What actions (2, B) move in free space: ``gain a``, shortened by ``friction`` pixels, to 0 where it is shorter.

    With gain 1 and no friction these are the actions themselves.
    """
    if gain == 1 and friction == 0:
        return action
    moved = gain * action
    length = torch.hypot(*moved)
    return moved * (1 - friction / length.clamp(min=1e-12)).clamp(min=0)


AUTORESET_MODES = {"same_step": AutoresetMode.SAME_STEP, "disabled": AutoresetMode.DISABLED}
COLLISIONS = {"stop": stop_at_walls, "noisy": noisy_at_walls, "cancel": cancel_at_walls}


def sample_start_goal(uniform: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The paper's "medium" episodes: start and goal in different rooms, 2.6 pixels off every wall.

    Args:
        uniform: (B, 5) in [0, 1): two points and the coin that says which of them is the start.
        layout: of each row.

    Returns:
        start (2, B), goal (2, B), float64.
    """
    u = uniform.t()
    low, high = LOW + MARGIN, HIGH - MARGIN
    y = low + (high - low) * u[1:4:2]
    left = torch.stack([low + (layout.low[0] - MARGIN - low) * u[0], y[0]])
    right_low = layout.high[0] + MARGIN
    right = torch.stack([right_low + (high - right_low) * u[2], y[1]])
    from_left = u[4] < 0.5
    return torch.where(from_left, left, right), torch.where(from_left, right, left)


# -- pictures ---------------------------------------------------------------------------------------------------------


def background(wall_x: Tensor, door_y: Tensor) -> Tensor:
    """Frames without the dot, uint8 (B, 2, 65, 65): channel 1 is 255 on wall columns outside the door and on the border."""
    pixel = torch.arange(SIZE, device=wall_x.device)
    columns = ((pixel - wall_x[:, None]).abs() <= HALF_WALL).to(torch.uint8) * 255
    rows = ((pixel - door_y[:, None]).abs() > HALF_DOOR).to(torch.uint8) * 255
    line = ((pixel == LOW) | (pixel == HIGH)).to(torch.uint8) * 255
    frames = torch.zeros(len(wall_x), 2, SIZE, SIZE, dtype=torch.uint8, device=wall_x.device)
    torch.bitwise_and(rows[:, :, None], columns[:, None, :], out=frames[:, 1])
    frames[:, 1] |= line[:, None] | line
    return frames


def draw_dots(frames: Tensor, position: Tensor) -> Tensor:
    """Draw dots at positions (2, B) into empty channels 0 of frames (B, 2, 65, 65), in place."""
    position = position.to(torch.float64)[:, :, None]
    corner = (position - REACH).ceil().clamp(0, SIZE - PATCH)
    pixels = corner + torch.arange(PATCH, device=position.device)  # (2, B, 9)
    gauss = torch.exp(-((pixels - position) ** 2) / (2 * DOT**2))  # the dot is a product of its two axes
    dot = ((255 * gauss[1])[:, :, None] * gauss[0][:, None, :]).to(torch.uint8)  # conversion truncates
    pixels = pixels.to(torch.int64)
    index = (pixels[1] * SIZE)[:, :, None] + pixels[0][:, None, :]
    count = len(frames)
    frames.view(count, -1).scatter_(1, index.view(count, -1), dot.view(count, -1))
    return frames


def render_pixels(columns: Mapping[str, Tensor]) -> Tensor:
    """Observations from states: channel 0 is the dot, channel 1 the walls.

    ``dot(u, v) = floor(clip(255 exp(-|(u, v) - p|^2 / (2 * 1.3^2)), 0, 255))`` on the integer grid, stored at
    [row v, column u].

    Args:
        columns: ``position`` (B, 2), ``wall_x`` (B,), ``door_y`` (B,).

    Returns:
        uint8 (B, 2, 65, 65).
    """
    return draw_dots(background(columns["wall_x"], columns["door_y"]), columns["position"].t())


class FramePool:
    """Memory for frames (B, 2, 65, 65), or (B, *frame), that is used again when no tensor refers to it any more.

    On a CPU, fresh memory of this size costs several times more (page faults) than filling it. On other devices torch does
    the same itself.
    """

    KEEP = 4

    def __init__(self, num_envs: int, device: torch.device, frame: tuple[int, ...] = (2, SIZE, SIZE)):
        self.shape, self.device = (num_envs, *frame), device
        self._free: list[np.ndarray] = []

    def copy_of(self, source: Tensor) -> Tensor:
        """``source`` (or what broadcasts to a batch of frames) in memory of its own."""
        if self.device.type != "cpu":
            return source.expand(self.shape).clone(memory_format=torch.contiguous_format)
        memory = self._free.pop() if self._free else np.empty(self.shape, np.uint8)
        handle = memory.view()  # lives as long as the storage of the tensor made from it
        weakref.finalize(handle, self._give_back, memory).atexit = False
        return torch.from_numpy(handle).copy_(source)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self.KEEP:
            self._free.append(memory)


def dot_position(frames: Tensor) -> Tensor:
    """Where the dot is: intensity centroid of channel 0, uint8 (..., 2, 65, 65) -> float32 (..., 2), within 0.1 pixel."""
    dots = frames[..., 0, :, :].to(torch.float32)
    pixel = torch.arange(SIZE, device=frames.device, dtype=torch.float32)
    total = dots.sum((-1, -2)).clamp(min=1)
    return torch.stack([(dots.sum(-2) * pixel).sum(-1) / total, (dots.sum(-1) * pixel).sum(-1) / total], -1)


def is_success(achieved: Tensor, desired: Tensor) -> Tensor:
    """Mean squared coordinate error below 1, that is, closer than sqrt(2) pixels: (..., 2), (..., 2) -> (...) bool."""
    return ((achieved - desired) ** 2).mean(-1) < 1


def goal_reward(achieved: Any, desired: Any) -> Any:
    """-1, or 0 at the goal, for states (..., 2) or pixels (..., 2, 65, 65); NumPy in, NumPy out."""
    points = [torch.as_tensor(v) for v in (achieved, desired)]
    points = [dot_position(p) if p.shape[-2:] == (SIZE, SIZE) else p for p in points]
    reward = is_success(*points).to(torch.float32) - 1
    return reward if isinstance(achieved, Tensor) else reward.numpy()[()]


# -- environments -----------------------------------------------------------------------------------------------------


class TwoRoomsVectorEnv(gymnasium.vector.VectorEnv):
    """Two-Rooms, ``B`` rows at once, in torch on any device (:class:`clbench.contracts.VectorEnv`).

    Observation: a dict of ``observation``, ``achieved_goal`` (the same tensor) and ``desired_goal``; each float32 (B, 2)
    positions in 0..65 (``"state"``, ``"layout"``) or uint8 (B, 2, 65, 65) (``"pixels"``). ``"layout"`` adds ``layout``
    float32 (B, 2), the places of wall and door (:func:`layout_numbers`), which pictures show and states do not. Treat them
    as read-only: the desired goals are shared between steps until a row is reset.

    Action: displacement (B, 2) in pixels, nominally within +-1.8 per axis; the environment does not clip it, as the
    reference. With other dynamics it moves the agent by :func:`displacement`.

    Reward: -1 per step, 0 when the goal is reached (the reference's is always 0). Success: mean squared coordinate error
    below 1. Episodes end at success (unless ``terminate_on_success=False``, as in the reference) and are truncated after
    ``max_episode_steps``.

    Randomness: an episode (start, goal, noise) is a pure function of its seed, whatever ``B`` and the device
    (:class:`clbench.envs.seeding.EpisodeSeeds`). Reset options: ``start`` (B, 2), ``goal`` (B, 2), ``reset_mask`` (B,).

    Args:
        num_envs: rows.
        device: of all tensors.
        autoreset: ``"same_step"`` or ``"disabled"``.
        observation: ``"state"``, ``"layout"`` or ``"pixels"``.
        wall_x: centre of the wall, in [20, 45); a number, or one per row.
        door_y: centre of the door, in [10, 55); a number, or one per row.
        collision: ``"stop"`` (:func:`stop_at_walls`), or as the reference: ``"noisy"`` (evaluation), ``"cancel"`` (data).
        noise: standard deviation per axis, for ``"noisy"``.
        max_episode_steps: steps until truncation, or ``None``.
        terminate_on_success: whether reaching the goal ends the episode.
        goal_sign: add the key ``goal_sign`` (B, 1) to the observations: 1, goals are to be reached. So the spaces are those
            of :class:`clbench.envs.two_rooms_chase.TwoRoomsChaseVectorEnv`, where it is -1.
        action_gain: factor of actions; -1 reverses them.
        friction: pixels by which every move is shortened, >= 0.
        render_mode: for Gymnasium; :meth:`render` always works.

    Raises:
        ConfigError: an option out of its range.
    """

    # reset options that are points, and the state that each sets
    _points_of: ClassVar[Mapping[str, str]] = {"start": "start", "goal": "goal"}
    _goal_colour: ClassVar[tuple[int, int, int]] = (44, 160, 44)

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
        max_episode_steps: int | None = 200,
        terminate_on_success: bool = True,
        goal_sign: bool = False,
        action_gain: float = 1.0,
        friction: float = 0.0,
        render_mode: str | None = None,
    ):
        check_dynamics("Two-Rooms", action_gain, friction=friction)
        for kind, value, known in (
            ("observation", observation, OBSERVATIONS),
            ("collision", collision, COLLISIONS),
        ):
            if value not in known:
                raise unknown_name(f"value of {kind}", str(value), known, where="Two-Rooms")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ConfigError(f"Two-Rooms: max_episode_steps must be at least 1, got {max_episode_steps}.")
        if not (noise >= 0 and math.isfinite(noise)):
            raise ConfigError(f"Two-Rooms: noise must be a standard deviation >= 0, got {noise}.")
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset = num_envs, autoreset
        self.max_episode_steps, self.terminate_on_success = max_episode_steps, terminate_on_success
        self.noise, self.render_mode = noise, render_mode
        self.action_gain, self.friction = float(action_gain), float(friction)
        self.pixels = observation == "pixels"
        self._collide = COLLISIONS[collision]
        self.wall_x = _positions("wall_x", wall_x, WALL_RANGE, num_envs).to(self.device)
        self.door_y = _positions("door_y", door_y, DOOR_RANGE, num_envs).to(self.device)
        self._layout = make_layout(*torch.broadcast_tensors(self.wall_x, self.door_y), device=self.device)
        self._background = background(*torch.broadcast_tensors(self.wall_x, self.door_y))
        self._frames = FramePool(num_envs, self.device)
        self.metadata = {"autoreset_mode": AUTORESET_MODES[autoreset], "render_modes": ["rgb_array"], "render_fps": 10}
        self.single_observation_space = observation_space(observation, goal_sign)
        self.single_action_space = spaces.Box(-MAX_ACTION, MAX_ACTION, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # what does not change within an episode, beside positions
        self._constant = {"goal_sign": torch.ones(num_envs, 1, device=self.device)} if goal_sign else {}
        if observation == "layout":
            self._constant["layout"] = layout_numbers(self.wall_x, self.door_y).expand(num_envs, -1)
        self._all_rows = torch.arange(num_envs, device=self.device)
        # the state: position and goal (2, B), steps of the episode (B,), seeds
        self._position = torch.full((2, num_envs), math.nan, device=self.device)
        self._goal = self._position.clone()
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._seeds = EpisodeSeeds(num_envs, self.device)
        self._desired: Tensor | None = None  # the goals as observations; replaced, never written to
        self._bad_action = torch.zeros((), dtype=torch.bool, device=self.device)

    # -- reset ------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in all rows, or in those of ``options["reset_mask"]``; see the class for seeds and options.

        Raises:
            ConfigError: unknown options, wrong shapes, a start or goal inside a wall.
            ContractError: a mask before the first full reset.
        """
        mask, columns = split_options(options, self.num_envs, self.device)
        if self._desired is None and not bool(mask.all()):
            raise ContractError("Two-Rooms: the first reset must reset all rows; leave out reset_mask.")
        for key in columns:
            if key not in self._points_of:
                raise unknown_name("reset option", key, ("reset_mask", *self._points_of), where="Two-Rooms")
        given = {self._points_of[key]: self._points(key, column, mask) for key, column in columns.items()}
        self._raise_if_bad()
        self._begin(mask, seed, **given)
        return self._observe(), {"is_success": self._outcome()[0]}

    def _points(self, key: str, column: Any, mask: Tensor) -> Tensor:
        """A column of points (B, 2) as (2, B) on the device, checked in the rows of ``mask``."""
        values = column.cpu() if isinstance(column, Tensor) else column
        points = torch.as_tensor(np.asarray(values, dtype=np.float32))
        if points.shape != (self.num_envs, 2):
            raise ConfigError(
                f"Two-Rooms: option {key!r} must have shape ({self.num_envs}, 2), got {tuple(points.shape)}."
            )
        points = points.t().contiguous().to(self.device)
        wrong = mask & ~is_free(points.to(torch.float64), self._layout)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ConfigError(f"Two-Rooms: the {key} of row {row}, {points[:, row].tolist()}, is not in a room.")
        return points

    def _begin(
        self,
        mask: Tensor,
        seed: int | Sequence[int] | None = None,
        start: Tensor | None = None,
        goal: Tensor | None = None,
    ) -> None:
        """New episodes in the rows of ``mask`` (B,), at drawn points or at the given ones (2, B)."""
        self._seeds.start(seed, mask)
        rows = self._rows(mask)
        chosen = mask[rows]  # on a CPU all true; elsewhere the rows are all rows, so that nothing waits for the device
        drawn = sample_start_goal(hash_uniform(self._seeds.current()[rows], 0, 5), self._layout_of(rows))
        for state, new, fixed in ((self._position, drawn[0], start), (self._goal, drawn[1], goal)):
            new = new.to(torch.float32) if fixed is None else fixed[:, rows]
            state[:, rows] = torch.where(chosen, new, state[:, rows])
        self._steps = torch.where(mask, 0, self._steps)
        self._desired = self._show(self._goal, rows, self._desired)

    def _rows(self, mask: Tensor) -> Tensor:
        return mask.nonzero().squeeze(1) if mask.is_cpu else self._all_rows

    def _layout_of(self, rows: Tensor) -> Layout:
        return Layout(*(v if v.shape[1] == 1 else v[:, rows] for v in self._layout))

    # -- observation ------------------------------------------------------------------------------------------------

    def _show(self, points: Tensor, rows: Tensor | None = None, old: Tensor | None = None) -> Tensor:
        """Points (2, B) as observations; only ``rows`` differ from the observations ``old``, which stay as they are."""
        if not self.pixels:
            return points.t().clone(memory_format=torch.contiguous_format)
        if rows is None or old is None:
            return draw_dots(self._frames.copy_of(self._background), points)
        frames = self._frames.copy_of(old)
        new = self._background.expand(frames.shape)[rows].clone(memory_format=torch.contiguous_format)
        frames[rows] = draw_dots(new, points[:, rows])
        return frames

    def _observe(self, rows: Tensor | None = None, old: Tensor | None = None) -> dict[str, Tensor]:
        shown = self._show(self._position, rows, old)
        obs: dict[str, Any] = {"observation": shown, "achieved_goal": shown, "desired_goal": self._desired}
        return obs | self._constant

    # -- step -------------------------------------------------------------------------------------------------------

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict]:
        """Move all rows by ``actions`` (B, 2) (torch or NumPy).

        Raises:
            ContractError: before the first reset; actions of a wrong shape or type, or not finite (for actions on a GPU
                the last is found at the next ``reset`` or ``state_dict``, so that stepping never waits for the device).
        """
        action = self._columns(actions)
        self._move(action)
        self._steps += 1
        success, reward, terminated = self._outcome()
        limit = self.max_episode_steps
        truncated = torch.zeros_like(success) if limit is None else self._steps >= limit
        obs = self._observe()
        info: dict[str, Any] = {"is_success": success}
        if self.autoreset == "same_step":
            ended = terminated | truncated
            info |= {"final_obs": obs, "_final_obs": ended}
            if not ended.is_cpu or bool(ended.any()):
                self._begin(ended)
                obs = self._observe(self._rows(ended), obs["observation"])
        return obs, reward, terminated, truncated, info

    def _move(self, action: Tensor) -> None:
        """What one step does to the positions; ``action`` float64 (2, B)."""
        action = displacement(action, self.action_gain, self.friction)
        noise = self._wall_noise() if self._collide is noisy_at_walls else None
        self._position = self._collide(self._position.to(torch.float64), action, self._layout, noise).to(torch.float32)

    def _outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """Success, reward and whether the episode is over, each (B,), of the present positions."""
        success = (self._position - self._goal).square_().sum(0) < 2  # mean over two coordinates below 1
        over = success.clone() if self.terminate_on_success else torch.zeros_like(success)
        return success, success.to(torch.float32) - 1, over

    def _columns(self, actions: Any) -> Tensor:
        """Checked actions as float64 (2, B)."""
        if self._desired is None:
            raise ContractError("Two-Rooms: call reset before step.")
        actions = torch.as_tensor(actions)
        if actions.shape != (self.num_envs, 2) or not actions.is_floating_point():
            raise ContractError(
                f"Two-Rooms: actions must be float ({self.num_envs}, 2), got {actions.dtype} {tuple(actions.shape)}."
            )
        finite = torch.isfinite(actions).all()
        if not finite.is_cpu:
            self._bad_action |= ~finite
        elif not bool(finite):
            row = int((~torch.isfinite(actions).all(1)).nonzero()[0])
            raise ContractError(f"Two-Rooms: the action of row {row} is not finite: {actions[row].tolist()}.")
        columns = actions.to(self.device, torch.float32).t()
        return columns.to(torch.float64, memory_format=torch.contiguous_format)

    def _raise_if_bad(self) -> None:
        if not self._bad_action.is_cpu and bool(self._bad_action):
            raise ContractError("Two-Rooms: an action since the last reset was not finite.")

    def _wall_noise(self) -> Tensor:
        """Normal noise (2, B) for this step (Box-Muller), a function of the episode's seed and the step."""
        u = hash_uniform(self._seeds.current(), self._steps + 1, 2)
        radius = torch.sqrt(-2 * torch.log1p(-u[:, 0])) * self.noise
        return torch.stack([radius * torch.cos(2 * math.pi * u[:, 1]), radius * torch.sin(2 * math.pi * u[:, 1])])

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """The reward for reaching ``achieved_goal`` when ``desired_goal`` was wanted (hindsight relabelling).

        States (..., 2) or pixels (..., 2, 65, 65), torch or NumPy -> float32 (...). Pixels are decoded by the centroid of
        the dot, so within 0.1 pixel of the success radius the answer may differ from the state's.
        """
        return goal_reward(achieved_goal, desired_goal)

    # -- controllers for reference lines ----------------------------------------------------------------------------

    def oracle_actions(self) -> Tensor:
        """Actions (B, 2) of somebody who knows the walls: straight on within a room, else through the door, one pixel
        clear of its jambs."""
        position, goal = self._position.to(torch.float64), self._goal.to(torch.float64)
        (left, upper), (right, lower) = self._layout
        side, goal_side = ((p[0] >= right).to(torch.int64) - (p[0] <= left).to(torch.int64) for p in (position, goal))
        at_door = (position[1] >= upper) & (position[1] <= lower)
        # at the height of the door one pixel behind its far side, else one pixel in front of its near side
        x = torch.where(torch.where(at_door, goal_side, side) > 0, right + 1, left - 1)
        y = torch.where(at_door, goal[1], position[1]).clamp(upper + 1, lower - 1)
        straight = (side == goal_side) | (at_door & (goal_side == 0))
        return self._towards(torch.where(straight, goal, torch.stack([x, y])))

    def straight_line_actions(self) -> Tensor:
        """Actions (B, 2) that ignore the walls: along the straight line to the goal, as far as a step leads."""
        return self._towards(self._goal.to(torch.float64))

    def _towards(self, target: Tensor) -> Tensor:
        """The longest actions (B, 2) within the action space that lead towards points (2, B), not beyond them."""
        way = target - self._position
        if self.action_gain != 1 or self.friction != 0:  # the action whose displacement is the way
            way = way * (1 + self.friction / torch.hypot(*way).clamp(min=1e-12)) / self.action_gain
        return (way * (MAX_ACTION / way.abs().amax(0)).clamp(max=1)).t().to(torch.float32).contiguous()

    # -- pictures, state --------------------------------------------------------------------------------------------

    def render(self) -> Any:  # type: ignore[override]
        """Pictures for people, NumPy uint8 (B, 260, 260, 3): walls dark, agent blue, goal (success radius) green."""
        scale = 4
        grid = (torch.arange(SIZE * scale, device=self.device, dtype=torch.float64) + 0.5) / scale - 0.5
        x, y = grid[None, None, :], grid[None, :, None]
        low, high = (v[:, :, None, None] for v in self._layout)
        solid = (x > low[0]) & (x < high[0]) & ((y < low[1]) | (y > high[1]))
        solid = solid | (x < LOW) | (x > HIGH) | (y < LOW) | (y > HIGH)

        def disc(points: Tensor, radius: float) -> Tensor:
            return (x - points[0][:, None, None]) ** 2 + (y - points[1][:, None, None]) ** 2 < radius**2

        colours = torch.tensor([[247, 247, 247], [68, 68, 68], self._goal_colour, [31, 119, 180]], device=self.device)
        kind = solid.to(torch.int64).expand(self.num_envs, -1, -1)
        kind = torch.where(disc(self._goal, math.sqrt(2)), 2, kind)
        kind = torch.where(disc(self._position, DOT), 3, kind)
        return colours.to(torch.uint8)[kind].cpu().numpy()

    def points(self) -> tuple[Tensor, Tensor]:
        """Where agents and goals are, (B, 2) each, in pixels."""
        return self._position.t().clone(), self._goal.t().clone()

    def goal_grid(self, row: int = 0) -> GoalGrid:
        """The free points with whole coordinates of a row's rooms (about 3150)."""
        layout = Layout(*(v if v.shape[1] == 1 else v[:, row : row + 1] for v in self._layout))
        points = lattice(torch.arange(LOW, HIGH + 1, device=self.device))
        points = points[:, is_free(points.to(torch.float64), layout)]
        place = shown = points.t().contiguous()
        if self.pixels:
            empty = self._background[row if len(self._background) > 1 else 0]
            shown = draw_dots(empty.repeat(points.shape[1], 1, 1, 1), points)
        edge = SIZE - 0.5
        observations = {"observation": shown, "achieved_goal": shown}
        if "layout" in self._constant:
            observations["layout"] = self._constant["layout"][row].expand(len(place), -1)
        return GoalGrid(place, observations, (-0.5, edge, edge, -0.5))

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes, as tensors; valid in the middle of episodes."""
        self._raise_if_bad()
        state = {name: getattr(self, f"_{name}").clone() for name in _STATE}
        return state | self._seeds.state_dict() | {"ready": torch.tensor(self._desired is not None)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken.

        Raises:
            DataError: missing entries, or a state of another number of rows.
        """
        for name in (*_STATE, *_SEEDS, "ready"):
            if name not in state:
                raise DataError(f"Two-Rooms: the state has no entry {name!r}; it is not one of this environment.")
        if len(state["steps"]) != self.num_envs:
            raise DataError(f"Two-Rooms: the state is of {len(state['steps'])} environments, not of {self.num_envs}.")
        for name in _STATE:
            setattr(self, f"_{name}", state[name].to(self.device, copy=True))
        self._seeds.load_state_dict({name: state[name] for name in _SEEDS})
        self._desired = self._show(self._goal) if bool(state["ready"]) else None


_STATE, _SEEDS = ("position", "goal", "steps"), ("base", "episode")


def observation_space(observation: str, goal_sign: bool = False) -> spaces.Dict:
    """The goal dict of one environment."""
    one: spaces.Space = spaces.Box(0.0, float(SIZE), (2,), np.float32)
    if observation == "pixels":
        one = spaces.Box(0, 255, (2, SIZE, SIZE), np.uint8)
    keys: dict[str, spaces.Space] = dict.fromkeys(("observation", "achieved_goal", "desired_goal"), one)
    if goal_sign:
        keys["goal_sign"] = spaces.Box(-1.0, 1.0, (1,), np.float32)
    if observation == "layout":
        keys["layout"] = spaces.Box(-1.0, 1.0, (2,), np.float32)
    return spaces.Dict(keys)


def layout_numbers(wall_x: Tensor, door_y: Tensor) -> Tensor:
    """Positions of wall and door (B,) as numbers float32 (B, 2), their ranges scaled to [-1, 1)."""
    pairs = zip(torch.broadcast_tensors(wall_x, door_y), (WALL_RANGE, DOOR_RANGE), strict=True)
    return torch.stack([2 * (v - low) / (high - low) - 1 for v, (low, high) in pairs], 1).to(torch.float32)


def check_dynamics(where: str, action_gain: float, **resistance: float) -> None:
    """Refuse a gain that is 0 or not finite, and resistances (friction, damping) below 0."""
    if not (action_gain != 0 and math.isfinite(action_gain)):
        raise ConfigError(f"{where}: action_gain must be a number other than 0, got {action_gain}.")
    for name, value in resistance.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{where}: {name} must be a number >= 0, got {value}.")


def _positions(name: str, value: Any, limits: tuple[float, float], num_envs: int) -> Tensor:
    """A wall or door position as float64 (1,), or (B,) where rows differ."""
    try:
        positions = torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Two-Rooms: {name} must be a number or one number per row, got {value!r}.") from error
    if positions.shape not in ((1,), (num_envs,)):
        raise ConfigError(
            f"Two-Rooms: {name} has shape {tuple(positions.shape)}; give a number, or {num_envs} of them."
        )
    if not bool(((positions >= limits[0]) & (positions < limits[1])).all()):
        raise ConfigError(f"Two-Rooms: {name} must be in [{limits[0]:g}, {limits[1]:g}), got {positions.tolist()}.")
    return positions


class TwoRoomsEnv(gymnasium.Env):
    """One Two-Rooms environment with NumPy in and out; see :class:`TwoRoomsVectorEnv` for what it does and its options.

    ``max_episode_steps`` is ``None`` by default, because ``gymnasium.make`` adds the limit of 200 steps itself.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    _batch_class: ClassVar[type[TwoRoomsVectorEnv]] = TwoRoomsVectorEnv

    def __init__(self, *, render_mode: str | None = None, max_episode_steps: int | None = None, **options: Any):
        if render_mode not in (None, "rgb_array"):
            raise unknown_name("render_mode", str(render_mode), ("rgb_array",), where="Two-Rooms")
        self._batch = self._batch_class(1, autoreset="disabled", max_episode_steps=max_episode_steps, **options)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = render_mode
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """As in Gymnasium; ``options`` may hold the points of the batched class, each (2,)."""
        super().reset(seed=seed)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**62))
        self._seeded = True
        columns = {key: np.asarray(value, dtype=np.float32)[None] for key, value in (options or {}).items()}
        obs, info = self._batch.reset(seed=None if seed is None else [seed], options=columns)
        return self._numpy(obs), {"is_success": bool(info["is_success"][0])}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:  # type: ignore[override]
        """``action`` (2,) -> (observation, reward, terminated, truncated, info)."""
        obs, reward, terminated, truncated, info = self._batch.step(np.asarray(action, dtype=np.float32)[None])
        flags = bool(terminated[0]), bool(truncated[0])
        return self._numpy(obs), float(reward[0]), *flags, {"is_success": bool(info["is_success"][0])}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """As that of the batched class (used by hindsight replay)."""
        return self._batch.compute_reward(achieved_goal, desired_goal, info)

    def render(self) -> Any:
        """uint8 (260, 260, 3) with ``render_mode="rgb_array"``, else ``None``."""
        return self._batch.render()[0] if self.render_mode == "rgb_array" else None

    @staticmethod
    def _numpy(obs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {key: value[0].numpy().copy() for key, value in obs.items()}
