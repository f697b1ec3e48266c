"""PointMaze: a point mass in a 4 x 4 maze, batched on tensors, with its own physics and renderer.

Source: the Diverse PointMaze of PLDM (Sobal et al. 2025, arXiv 2502.14819), which is D4RL's point maze (Fu et al. 2020,
arXiv 2004.07219) on MuJoCo, re-implemented from its facts. Coordinates are in cells, ``x`` to the right and ``y`` down, as
the layout reads::

    (0, 0)               (4, 0)
       +----+----+----+----+
       | O  | #  | #  | #  |      cell (row, column) is [column, column + 1] x [row, row + 1];
       | O  | O  | O  | O  |      a ring of walls surrounds the four by four cells.
       | O  | O  | #  | O  |      In D4RL's joint coordinates q: x = q[1] - 0.3, y = q[0] - 0.3.
       | O  | O  | #  | #  |
       +----+----+----+----+

Physics: MuJoCo's equations of motion for this scene in closed form, soft contact included. The ball (radius 0.1, density
1000) slides on two axes with damping 1; actions are forces of up to 100 per axis. A simulation step of 0.01 s is

1. velocities are clipped to +-5 per axis (D4RL does that, not MuJoCo);
2. constraint forces of contacts (:func:`contact_acceleration`);
3. semi-implicit Euler, implicit in the damping: ``v += h F / (m + h d)``, then ``p += h v``.

Inside this module a batch of points is one ``(2, B)`` tensor (row 0 is x, row 1 is y), so that each operation runs over
contiguous columns. States are stored as float32 and moved in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from clbench.envs.goal_grid import GoalGrid, lattice
from clbench.envs.seeding import AUTORESETS, EpisodeSeeds, check_batch, split_options
from clbench.envs.two_rooms import FramePool, check_dynamics
from clbench.errors import ConfigError, ContractError, DataError, unknown_name
from clbench.rng import hash_uniform
from clbench.streams.maze_layouts import CELLS, PUBLISHED, SIDE, far_pairs, layout_code, path_lengths
from clbench.streams.ogbench_mazes import following

# -- facts of the scene (D4RL) and of MuJoCo's default contact --------------------------------------------------------
RADIUS, DENSITY = 0.1, 1000.0
MASS = DENSITY * 4 / 3 * math.pi * RADIUS**3
DAMPING, GEAR, TIMESTEP = 1.0, 100.0, 0.01
MAX_SPEED = 5.0  # per axis, before each simulation step
MARGIN = 0.002  # between the surfaces, where contact begins
CONTACT = RADIUS + MARGIN
TIME_CONSTANT = 0.02  # solref = (0.02, 1): critically damped
IMPEDANCE = (0.9, 0.95, 0.001)  # solimp: least, largest, and the depth at which the largest is reached
STIFFNESS = 1 / (IMPEDANCE[1] * TIME_CONSTANT) ** 2
CONTACT_DAMPING = 2 / (IMPEDANCE[1] * TIME_CONSTANT)
INVERSE_WEIGHT = 2 / (3 * MASS)  # MuJoCo averages 1/m over three axes, of which one cannot move

OBSERVATIONS = ("state", "layout", "pixels")
ACTION_REPEAT = 4
SUCCESS = 0.5  # distance to the goal
JITTER, GOAL_HALF = 0.1, 0.25  # around the centre of a cell: starts, goals
GAP = 0.02  # starts and goals to the nearest wall, at least
STIFF, DAMP = 2.0, 0.5  # of the controllers: action per cell, and per cell per second
SPEED_BOUND = 8.0  # of the observation space; 7.4 is the speed along the diagonal, which a corner may turn

# -- pictures ----------------------------------------------------------------------------------------------------------
SIZE, CELL, EDGE = 64, 14, 4  # 4 cells of 14 pixels, and 4 pixels of the ring on each side
DISC = 0.2  # drawn radius of the agent
FLOOR, WALL, GREEN = (
    (225, 225, 225),
    (85, 85, 85),
    (40, 160, 60),
)  # floor and walls are grey, so that only the disc has hue
PATCH = 7  # the disc and its soft edge: 2 * (0.2 * 14 + 0.5) = 6.6 pixels


# -- walls ------------------------------------------------------------------------------------------------------------


def ring_code(codes: Tensor) -> Tensor:
    """Layout codes (B,) with the ring of walls: bit ``6 * (row + 1) + column + 1`` is 1 for a wall -> (B,) int64."""
    ring = sum(1 << (6 * r + c) for r in range(6) for c in range(6) if {r, c} & {0, 5})
    codes = codes.to(torch.int64)
    solid = torch.full_like(codes, ring)
    for row in range(SIDE):
        solid |= ((codes >> (SIDE * row)) & 15) << (6 * (row + 1) + 1)
    return solid


def _is_wall(solid: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Whether cells (column x, row y), -1 to 4, are walls (...,) bool."""
    return (solid >> (6 * y + x + 7)) & 1 == 1


def nearest_walls(position: Tensor, solid: Tensor) -> tuple[Tensor, Tensor]:
    """The three boxes that a ball in a free cell can touch: beside it, above or below it, and diagonal.

    Args:
        position: (2, B) float64.
        solid: (B,), see :func:`ring_code`.

    Returns:
        vectors (3, 2, B) from the nearest point of each box to the ball's centre, and which boxes are walls (3, B) bool.
    """
    face = position.round().clamp_(0, SIDE)
    offset = position - face  # from the nearest faces of the grid; its sign says on which side the ball is
    beyond = offset > 0
    x, y = (face - (~beyond).to(face.dtype)).to(torch.int64)
    beside_x, beside_y = (face - beyond.to(face.dtype)).to(torch.int64)
    walls = torch.stack(
        [_is_wall(solid, beside_x, y), _is_wall(solid, x, beside_y), _is_wall(solid, beside_x, beside_y)]
    )
    zero = torch.zeros_like(offset[0])
    vectors = torch.stack([offset[0], zero, zero, offset[1], offset[0], offset[1]]).view(3, 2, -1)
    return vectors, walls


def wall_distance(position: Tensor, solid: Tensor) -> Tensor:
    """Distance (B,) of points (2, B) to the nearest wall of their quarter cell: 0 inside walls, inf if there is none."""
    position = position.nan_to_num(-1.0)  # in the ring
    vectors, walls = nearest_walls(position, solid)
    distance = torch.where(walls, _length(vectors), math.inf).amin(0)
    (x, y), (left, above) = (cell.clamp(-1, SIDE).to(torch.int64) for cell in (position.floor(), position.ceil() - 1))
    inside = _is_wall(solid, x, y)
    for near_x, near_y in ((left, y), (x, above), (left, above)):  # a point on a face is of the cells on both sides
        inside |= _is_wall(solid, near_x, near_y)
    return torch.where(inside, 0.0, distance)


# -- physics ----------------------------------------------------------------------------------------------------------


def contact_acceleration(free: Tensor, velocity: Tensor, vectors: Tensor, touching: Tensor) -> Tensor:
    """The acceleration (2, B) with soft contacts: MuJoCo's convex problem with up to three frictionless contacts.

    It minimises ``m/2 |a - a0|^2 + sum_i D_i/2 min(0, n_i a - r_i)^2`` where ``a0`` is the acceleration without contact,
    ``n_i`` the normals, ``r_i = -b n_i v - k d_i g_i`` the reference accelerations for depths ``g_i < 0``, and
    ``D_i = d_i / ((1 - d_i) w)`` with the impedance ``d_i``. Source: MuJoCo's documentation, "Computation": constraint
    model and solver parameters. Which terms are active has at most 8 answers; each is a 2 x 2 linear system, and the one
    of least cost is the minimum, because the problem is convex.

    Args:
        free: (2, B) ``a0``.
        velocity: (2, B).
        vectors: (3, 2, B), see :func:`nearest_walls`.
        touching: (3, B) bool.
    """
    distance = _length(vectors)
    nx, ny = (vectors / distance.clamp(min=1e-12)[:, None]).unbind(1)  # (3, B) each
    depth = distance - CONTACT
    least, largest, width = IMPEDANCE
    x = (depth.abs() / width).clamp(max=1)
    impedance = least + (largest - least) * torch.where(x <= 0.5, 2 * x**2, 1 - 2 * (1 - x) ** 2)
    reference = -CONTACT_DAMPING * (nx * velocity[0] + ny * velocity[1]) - STIFFNESS * impedance * depth
    weight = torch.where(touching, impedance / ((1 - impedance) * INVERSE_WEIGHT), 0.0)

    subset = torch.arange(8, device=free.device)[:, None]
    members = [(subset >> i & 1).to(free.dtype) for i in range(3)]  # (8, 1) each

    def over_subsets(terms: Tensor) -> Tensor:  # (3, B) -> (8, B); no matmul, whose rounding depends on B
        return members[0] * terms[0] + members[1] * terms[1] + members[2] * terms[2]

    xx, yy = MASS + over_subsets(weight * nx**2), MASS + over_subsets(weight * ny**2)
    xy = over_subsets(weight * nx * ny)
    right_x = MASS * free[0] + over_subsets(weight * nx * reference)
    right_y = MASS * free[1] + over_subsets(weight * ny * reference)
    determinant = xx * yy - xy**2
    ax, ay = (yy * right_x - xy * right_y) / determinant, (xx * right_y - xy * right_x) / determinant  # (8, B)
    cost = MASS * ((ax - free[0]) ** 2 + (ay - free[1]) ** 2)
    for i in range(3):
        cost += weight[i] * (nx[i] * ax + ny[i] * ay - reference[i]).clamp(max=0) ** 2
    best = cost.argmin(0, keepdim=True)
    return torch.cat([ax.gather(0, best), ay.gather(0, best)])


def _length(vectors: Tensor) -> Tensor:
    """(3, 2, B) -> (3, B); rounded the same way whatever B."""
    return (vectors[:, 0] ** 2 + vectors[:, 1] ** 2).sqrt()


def simulation_step(
    position: Tensor, velocity: Tensor, force: Tensor, solid: Tensor, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """One step of 0.01 s.

    Args:
        position: (2, B) float64, in free cells.
        velocity: (2, B) float64.
        force: (2, B) float64.
        solid: (B,), see :func:`ring_code`; 0 is empty space.
        damping: force per speed.

    Returns:
        position (2, B), velocity (2, B).
    """
    velocity = velocity.clamp(-MAX_SPEED, MAX_SPEED)
    acceleration = (force - damping * velocity) / MASS
    if acceleration.is_cpu:
        _push_back(acceleration, velocity, position, solid)
    else:  # all rows, so that nothing waits for the device
        acceleration = contact_acceleration(acceleration, velocity, *_contacts(position, solid))
    velocity = velocity + TIMESTEP * MASS / (MASS + TIMESTEP * damping) * acceleration
    return position + TIMESTEP * velocity, velocity


def _contacts(position: Tensor, solid: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors from the nearest walls (3, 2, B), and which are touched (3, B) bool."""
    vectors, walls = nearest_walls(position, solid)
    return vectors, walls & (_length(vectors) < CONTACT)


def _push_back(acceleration: Tensor, velocity: Tensor, position: Tensor, solid: Tensor) -> None:
    """Add the acceleration by contacts in place, looking only at rows near a face of the grid."""
    rows = ((position - position.round()).abs_() < CONTACT).any(0).nonzero()[:, 0]
    if not len(rows):
        return
    vectors, touching = _contacts(position[:, rows], solid[rows])
    hit = touching.any(0).nonzero()[:, 0]
    if not len(hit):
        return
    rows = rows[hit]
    acceleration[:, rows] = contact_acceleration(
        acceleration[:, rows], velocity[:, rows], vectors[..., hit], touching[:, hit]
    )


def move(
    position: Tensor, velocity: Tensor, action: Tensor, solid: Tensor, repeat: int = ACTION_REPEAT, gain: float = 1.0,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``repeat`` simulation steps with one action; float32 in and out, (2, B) each. Actions are clipped to +-1, then
    multiplied by ``gain``."""
    force = gain * GEAR * action.to(torch.float64).clamp(-1, 1)
    position, velocity = position.to(torch.float64), velocity.to(torch.float64)
    for _ in range(repeat):
        position, velocity = simulation_step(position, velocity, force, solid, damping)
    return position.to(torch.float32), velocity.to(torch.float32)


# -- pictures ---------------------------------------------------------------------------------------------------------


def background(codes: Tensor) -> Tensor:
    """Pictures without the agent, uint8 (B, 3, 64, 64), of layouts (B,) given as codes."""
    device = codes.device
    cell = (torch.arange(SIZE, device=device) - EDGE).div(
        CELL, rounding_mode="floor"
    ) + 1  # of a row or column of pixels
    grid = torch.arange(6, device=device)
    is_wall = (ring_code(codes)[:, None, None] >> (6 * grid[:, None] + cell)) & 1 == 1  # (B, 6, 64): equal rows once
    floor, wall = (torch.tensor(colour, dtype=torch.uint8, device=device)[:, None, None] for colour in (FLOOR, WALL))
    return torch.where(is_wall[:, None], wall, floor).index_select(2, cell)


def draw_discs(frames: Tensor, position: Tensor) -> Tensor:
    """Draw the agent at positions (2, B) into frames (B, 3, 64, 64), in place; the edge is blended over one pixel."""
    centre = EDGE + CELL * position.to(torch.float64)[:, :, None]
    corner = (centre - PATCH / 2).round().clamp(0, SIZE - PATCH)
    pixels = corner + torch.arange(PATCH, device=position.device)  # (2, B, 7)
    across, down = (pixels + 0.5 - centre).square()
    cover = (DISC * CELL + 0.5 - (down[:, :, None] + across[:, None, :]).sqrt()).clamp(0, 1).flatten(1)[:, None]
    columns, rows = pixels.to(torch.int64)
    index = (SIZE * rows[:, :, None] + columns[:, None, :]).flatten(1)[:, None].expand(-1, 3, -1)
    flat = frames.view(len(frames), 3, -1)
    old = flat.gather(2, index).to(torch.float64)
    green = torch.tensor(GREEN, dtype=torch.float64, device=frames.device)[:, None]
    flat.scatter_(2, index, (old + cover * (green - old)).round().to(torch.uint8))
    return frames


def render_pixels(columns: Mapping[str, Tensor]) -> Tensor:
    """Observations from states, seen from above.

    The window is the four by four cells with 4/14 of a cell of the ring on each side. Floor and walls are grey, the agent
    is a green disc of radius 0.2 whose edge is blended linearly over one pixel.

    Args:
        columns: ``position`` (B, 2) in cells, ``layout`` (B,) codes of layouts.

    Returns:
        uint8 (B, 3, 64, 64).
    """
    return draw_discs(background(columns["layout"]), columns["position"].t())


def disc_position(frames: Tensor) -> Tensor:
    """Where the agent is: centroid of green minus red, uint8 (..., 3, 64, 64) -> float32 (..., 2), within 0.02 cells."""
    cover = (frames[..., 1, :, :].to(torch.float32) - frames[..., 0, :, :].to(torch.float32)).clamp(min=0)
    pixel = (torch.arange(SIZE, device=frames.device, dtype=torch.float32) + 0.5 - EDGE) / CELL
    total = cover.sum((-1, -2)).clamp(min=1)
    return torch.stack([(cover.sum(-2) * pixel).sum(-1) / total, (cover.sum(-1) * pixel).sum(-1) / total], -1)


def layout_bits(codes: Tensor) -> Tensor:
    """Layouts (B,) as observations float32 (B, 16): 1 for a wall, row by row."""
    return ((codes[:, None].to(torch.int64) >> torch.arange(CELLS, device=codes.device)) & 1).to(torch.float32)


def is_success(achieved: Tensor, desired: Tensor) -> Tensor:
    """Closer than 0.5: positions (..., 2) -> (...) bool."""
    return (achieved - desired).square().sum(-1) < SUCCESS**2


def goal_reward(achieved: Any, desired: Any) -> Any:
    """0 where the goal is reached, else -1; positions or pixels, torch or NumPy (also as a mixture of shapes (...,))."""
    points = [torch.as_tensor(v) for v in (achieved, desired)]
    points = [disc_position(p) if p.dtype == torch.uint8 else p for p in points]
    reward = is_success(*points).to(torch.float32) - 1
    return reward if isinstance(achieved, Tensor) else reward.numpy()[()]


# -- environments -----------------------------------------------------------------------------------------------------


class PointMazeVectorEnv(gymnasium.vector.VectorEnv):
    """PointMaze, ``B`` rows at once, in torch on any device (:class:`clbench.contracts.VectorEnv`).

    Observation: a dict. ``"state"``: ``observation`` float32 (B, 4) = (x, y, vx, vy), ``achieved_goal`` and
    ``desired_goal`` (B, 2) positions. ``"pixels"``: ``observation`` uint8 (B, 3, 64, 64), ``achieved_goal`` (the same
    tensor), ``velocity`` float32 (B, 2), ``desired_goal`` the picture of the agent at the goal. ``"layout"``: as
    ``"state"``, with ``layout`` float32 (B, 16), 1 for a wall, row by row. Treat them as read-only: goals and layouts are
    shared between steps until a row is reset.

    Action: (B, 2) in [-1, 1], a force per axis (23.9 cells/s^2 at 1), held for ``action_repeat`` simulation steps of
    0.01 s; larger ones are clipped.

    Reward: -1 per step, 0 when the goal is reached. Success: closer than 0.5 to the goal at the end of a step. Episodes
    end at success (unless ``terminate_on_success=False``, as in the reference) and are truncated after
    ``max_episode_steps``.

    Randomness: an episode (start, goal) is a pure function of its seed and layout, whatever ``B`` and the device
    (:class:`clbench.envs.seeding.EpisodeSeeds`). Start and goal are at least 5 steps of the grid apart (3 where the
    layout has no such pair). Reset options: ``start``, ``goal``, ``velocity`` (B, 2); ``layout``, one per row, for these
    episodes only; ``reset_mask`` (B,).

    Args:
        num_envs: rows.
        device: of all tensors.
        autoreset: ``"same_step"`` or ``"disabled"``.
        layout: text or name of the maze (:func:`clbench.streams.maze_layouts.layout_code`), or one per row.
        observation: ``"state"``, ``"layout"`` or ``"pixels"``.
        action_repeat: simulation steps per step.
        max_episode_steps: steps until truncation, or ``None``.
        terminate_on_success: whether reaching the goal ends the episode.
        action_gain: factor of actions, after they were clipped; -1 reverses them.
        damping: force per speed, >= 0; D4RL has 1, which halves a speed in 2.9 s.
        render_mode: for Gymnasium; :meth:`render` always works.

    Raises:
        ConfigError: an option out of its range, or no layout.
    """

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        layout: str | Sequence[str] = PUBLISHED[0],
        observation: str = "state",
        action_repeat: int = ACTION_REPEAT,
        max_episode_steps: int | None = 200,
        terminate_on_success: bool = True,
        action_gain: float = 1.0,
        damping: float = DAMPING,
        render_mode: str | None = None,
    ):
        if observation not in OBSERVATIONS:
            raise unknown_name("value of observation", str(observation), OBSERVATIONS, where="PointMaze")
        for name, count in (("max_episode_steps", max_episode_steps), ("action_repeat", action_repeat)):
            if count is not None and count < 1:
                raise ConfigError(f"PointMaze: {name} must be at least 1, got {count}.")
        check_dynamics("PointMaze", action_gain, damping=damping)
        self.action_gain, self.damping = float(action_gain), float(damping)
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset = num_envs, autoreset
        self.max_episode_steps, self.terminate_on_success = max_episode_steps, terminate_on_success
        self.action_repeat, self.render_mode = action_repeat, render_mode
        self.pixels, self.observation = observation == "pixels", observation
        self.layout = [layout] * num_envs if isinstance(layout, str) else list(layout)
        if len(self.layout) != num_envs:
            raise ConfigError(f"PointMaze: layout has {len(self.layout)} entries; give one, or {num_envs} of them.")
        self.metadata = {"autoreset_mode": AUTORESETS[autoreset], "render_modes": ["rgb_array"], "render_fps": 25}
        self.single_observation_space = observation_space(observation)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._all_rows = torch.arange(num_envs, device=self.device)
        self._frames = FramePool(num_envs, self.device, (3, SIZE, SIZE))
        # the state: position, velocity and goal (2, B), layout and steps of the episode (B,), seeds
        self._position = torch.full((2, num_envs), math.nan, device=self.device)
        self._velocity, self._goal = self._position.clone(), self._position.clone()
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._seeds = EpisodeSeeds(num_envs, self.device)
        self._own = torch.tensor([layout_code(text) for text in self.layout]).to(self.device)
        self._enter(self._own)
        self._desired: Tensor | None = None  # the goals as observations; replaced, never written to
        self._bad_action = torch.zeros((), dtype=torch.bool, device=self.device)

    def _enter(self, layout: Tensor) -> None:
        """All that follows from the rows' layouts (B,)."""
        self._layout = self._own if torch.equal(layout, self._own) else layout
        self._solid = ring_code(layout)
        codes, self._table = layout.cpu().unique(return_inverse=True)
        pairs = [torch.from_numpy(far_pairs(code)) for code in codes.tolist()]
        self._count = torch.tensor([len(p) for p in pairs]).to(self.device)
        self._pairs = torch.nn.utils.rnn.pad_sequence(pairs, batch_first=True).to(self.device)
        self._table = self._table.to(self.device)
        self._codes, self._way = codes, None  # the oracle's table is made when it is asked for
        self._bits = layout_bits(layout)
        if self.pixels:
            self._background = background(layout[:1] if len(codes) == 1 else layout)

    # -- reset ------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in all rows, or in those of ``options["reset_mask"]``; see the class for seeds and options.

        Raises:
            ConfigError: unknown options, wrong shapes, no layout, a start or goal inside a wall or too near to one.
            ContractError: a mask before the first full reset.
        """
        mask, columns = split_options(options, self.num_envs, self.device)
        if self._desired is None and not bool(mask.all()):
            raise ContractError("PointMaze: the first reset must reset all rows; leave out reset_mask.")
        for key in columns:
            if key not in (known := ("layout", "start", "goal", "velocity")):
                raise unknown_name("reset option", key, ("reset_mask", *known), where="PointMaze")
        self._raise_if_bad()
        layout = self._layouts(columns.pop("layout", None), mask)
        solid = ring_code(layout)
        given = {key: self._points(key, column, mask, solid) for key, column in columns.items()}
        if not torch.equal(layout, self._layout):
            self._enter(layout)
        self._begin(mask, seed, **given)
        return self._observe(), {"is_success": self._at_goal()}

    def _layouts(self, column: Sequence[str] | None, mask: Tensor) -> Tensor:
        """The rows' layouts (B,) after a reset of ``mask``."""
        new = self._own
        if column is not None:
            chosen = [layout_code(text) if begins else 0 for text, begins in zip(column, mask.tolist(), strict=True)]
            new = torch.tensor(chosen).to(self.device)
        return torch.where(mask, new, self._layout)

    def _points(self, key: str, column: Any, mask: Tensor, solid: Tensor) -> Tensor:
        """A column of vectors (B, 2) as (2, B) on the device, checked in the rows of ``mask``."""
        values = column.cpu() if isinstance(column, Tensor) else column
        points = torch.as_tensor(np.asarray(values, dtype=np.float32))
        if points.shape != (self.num_envs, 2):
            raise ConfigError(
                f"PointMaze: option {key!r} must have shape ({self.num_envs}, 2), got {tuple(points.shape)}."
            )
        points = points.t().contiguous().to(self.device)
        if key == "velocity":
            wrong, why = mask & ~(points.abs() <= SPEED_BOUND).all(0), f"must be within +-{SPEED_BOUND:g} per axis"
        else:
            wrong = mask & (wall_distance(points.to(torch.float64), solid) < GAP)
            why = f"must be in a free cell, at least {GAP:g} from every wall"
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ConfigError(f"PointMaze: the {key} of row {row}, {points[:, row].tolist()}, {why}.")
        return points

    def _begin(
        self,
        mask: Tensor,
        seed: int | Sequence[int] | None = None,
        start: Tensor | None = None,
        goal: Tensor | None = None,
        velocity: Tensor | None = None,
    ) -> None:
        """New episodes in the rows of ``mask`` (B,), at drawn points or at the given ones (2, B)."""
        self._seeds.start(seed, mask)
        rows = self._rows(mask)
        chosen = mask[rows]  # on a CPU all true; elsewhere the rows are all rows, so that nothing waits for the device
        drawn = self._draw(rows)
        still = torch.zeros_like(drawn[0])
        for state, new, fixed in (
            (self._position, drawn[0], start),
            (self._goal, drawn[1], goal),
            (self._velocity, still, velocity),
        ):
            new = new.to(torch.float32) if fixed is None else fixed[:, rows]
            state[:, rows] = torch.where(chosen, new, state[:, rows])
        self._steps = torch.where(mask, 0, self._steps)
        self._desired = self._show(self._goal, rows, self._desired)

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Start and goal of the rows' episodes, (2, n) float64 each."""
        u = hash_uniform(self._seeds.current()[rows], 0, 5).t()
        table = self._table[rows]
        pair = self._pairs[table, (u[0] * self._count[table]).to(torch.int64)].t()  # (2, n): cells of start and goal
        centre = torch.stack([pair % SIDE, pair.div(SIDE, rounding_mode="floor")], 1) + 0.5  # (2, 2, n)
        return centre[0] + JITTER * (2 * u[1:3] - 1), centre[1] + GOAL_HALF * (2 * u[3:5] - 1)

    def _rows(self, mask: Tensor) -> Tensor:
        return mask.nonzero().squeeze(1) if mask.is_cpu else self._all_rows

    # -- observation ------------------------------------------------------------------------------------------------

    def _show(self, points: Tensor, rows: Tensor | None = None, old: Tensor | None = None) -> Tensor:
        """Points (2, B) as goals; only ``rows`` differ from the observations ``old``, which stay as they are."""
        if not self.pixels:
            return points.t().clone(memory_format=torch.contiguous_format)
        if rows is None or old is None:
            return draw_discs(self._frames.copy_of(self._background), points)
        frames = self._frames.copy_of(old)
        new = self._background.expand(frames.shape)[rows].clone(memory_format=torch.contiguous_format)
        frames[rows] = draw_discs(new, points[:, rows])
        return frames

    def _observe(self, rows: Tensor | None = None, old: Tensor | None = None) -> dict[str, Tensor]:
        shown = self._show(self._position, rows, old)
        desired: Tensor = self._desired  # type: ignore[assignment]
        if not self.pixels:
            state = torch.cat([self._position, self._velocity]).t().contiguous()
            obs = {"observation": state, "achieved_goal": shown, "desired_goal": desired}
            return obs | {"layout": self._bits} if self.observation == "layout" else obs
        velocity = self._velocity.t().clone(memory_format=torch.contiguous_format)
        return {"observation": shown, "achieved_goal": shown, "velocity": velocity, "desired_goal": desired}

    def _at_goal(self) -> Tensor:
        return (self._position - self._goal).square().sum(0) < SUCCESS**2

    # -- step -------------------------------------------------------------------------------------------------------

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict]:
        """Push all rows with ``actions`` (B, 2) (torch or NumPy).

        Raises:
            ContractError: before the first reset; actions of a wrong shape or type, or not finite (for actions on a GPU
                the last is found at the next ``reset`` or ``state_dict``, so that stepping never waits for the device).
        """
        action = self._columns(actions)
        self._position, self._velocity = move(
            self._position, self._velocity, action, self._solid, self.action_repeat, self.action_gain, self.damping
        )
        self._steps += 1
        success = self._at_goal()
        limit = self.max_episode_steps
        terminated = success.clone() if self.terminate_on_success else torch.zeros_like(success)
        truncated = torch.zeros_like(success) if limit is None else self._steps >= limit
        obs = self._observe()
        info: dict[str, Any] = {"is_success": success}
        if self.autoreset == "same_step":
            ended = terminated | truncated
            info |= {"final_obs": obs, "_final_obs": ended}
            if not ended.is_cpu or bool(ended.any()):
                obs = self._restart(ended, obs)
        return obs, success.to(torch.float32) - 1, terminated, truncated, info

    def _restart(self, ended: Tensor, obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Begin new episodes in the rows of ``ended``, each in its own layout; -> the observation."""
        if self._layout is not self._own:  # only after a reset with layouts
            layout = torch.where(ended, self._own, self._layout)
            if not torch.equal(layout, self._layout):
                self._enter(layout)
        self._begin(ended)
        return self._observe(self._rows(ended), obs["achieved_goal"])

    def _columns(self, actions: Any) -> Tensor:
        """Checked actions as float64 (2, B)."""
        if self._desired is None:
            raise ContractError("PointMaze: call reset before step.")
        actions = torch.as_tensor(actions)
        if actions.shape != (self.num_envs, 2) or not actions.is_floating_point():
            raise ContractError(
                f"PointMaze: actions must be float ({self.num_envs}, 2), got {actions.dtype} {tuple(actions.shape)}."
            )
        finite = torch.isfinite(actions).all()
        if not finite.is_cpu:
            self._bad_action |= ~finite
        elif not bool(finite):
            row = int((~torch.isfinite(actions).all(1)).nonzero()[0])
            raise ContractError(f"PointMaze: the action of row {row} is not finite: {actions[row].tolist()}.")
        columns = actions.to(self.device, torch.float32).t()
        return columns.to(torch.float64, memory_format=torch.contiguous_format)

    def _raise_if_bad(self) -> None:
        if not self._bad_action.is_cpu and bool(self._bad_action):
            raise ContractError("PointMaze: an action since the last reset was not finite.")

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """The reward for reaching ``achieved_goal`` when ``desired_goal`` was wanted (hindsight relabelling).

        Positions (..., 2) or pixels (..., 3, 64, 64), torch or NumPy -> float32 (...). Pixels are decoded by the centroid
        of the disc, so within 0.02 of the success radius the answer may differ from the state's.
        """
        return goal_reward(achieved_goal, desired_goal)

    # -- controllers for reference lines ----------------------------------------------------------------------------

    def oracle_actions(self) -> Tensor:
        """Actions (B, 2) of somebody who knows the layout: a damped pull to the centre of the next cell of a shortest path
        over cells, and within the goal's cell to the goal."""
        if self._way is None:
            ways = [torch.from_numpy(following(path_lengths(code), SIDE)) for code in self._codes.tolist()]
            self._way = torch.stack(ways).to(self.device)
        cell, goal = (self._cell(points) for points in (self._position, self._goal))
        target = self._way[self._table, cell, goal]
        centre = torch.stack([target % SIDE, target.div(SIDE, rounding_mode="floor")]) + 0.5
        return self._pull(torch.where(cell == goal, self._goal, centre))

    def straight_line_actions(self) -> Tensor:
        """Actions (B, 2) that ignore the walls: a damped pull to the goal."""
        return self._pull(self._goal)

    @staticmethod
    def _cell(points: Tensor) -> Tensor:
        """Numbers (B,) of the cells of points (2, B)."""
        column, row = points.floor().clamp(0, SIDE - 1).to(torch.int64)
        return SIDE * row + column

    def _pull(self, target: Tensor) -> Tensor:
        pull = (STIFF * (target - self._position) - DAMP * self._velocity) / self.action_gain
        return pull.clamp(-1, 1).t().contiguous()

    # -- pictures, state --------------------------------------------------------------------------------------------

    def render(self) -> Any:  # type: ignore[override]
        """Pictures for people, NumPy uint8 (B, 256, 256, 3): walls dark, agent blue, goal (success radius) green.

        The point (x, y) is at column ``56 x + 16`` and row ``56 y + 16``.
        """
        scale = 4
        at = ((torch.arange(SIZE * scale, device=self.device, dtype=torch.float64) + 0.5) / scale - EDGE) / CELL
        x, y = at[None, None, :], at[None, :, None]
        cell = at.floor().to(torch.int64)
        solid = _is_wall(self._solid[:, None, None], cell[None, None, :], cell[None, :, None])

        def disc(points: Tensor, radius: float) -> Tensor:
            return (x - points[0][:, None, None]) ** 2 + (y - points[1][:, None, None]) ** 2 < radius**2

        colours = torch.tensor([[247, 247, 247], [68, 68, 68], [44, 160, 44], [31, 119, 180]], device=self.device)
        kind = torch.where(disc(self._goal, SUCCESS), 2, 0)
        kind = torch.where(solid, 1, kind)
        kind = torch.where(disc(self._position, DISC), 3, kind)
        return colours.to(torch.uint8)[kind].cpu().numpy()

    def points(self) -> tuple[Tensor, Tensor]:
        """Where agents and goals are, (B, 2) each, in cells."""
        return self._position.t().clone(), self._goal.t().clone()

    def goal_grid(self, row: int = 0) -> GoalGrid:
        """Points 0.1 cells apart that the ball's centre can reach in the layout of a row, at rest there."""
        layout = self._layout[row : row + 1]
        points = lattice((torch.arange(10 * SIDE, device=self.device) + 0.5) / 10)
        points = points[:, wall_distance(points.to(torch.float64), ring_code(layout)) > RADIUS]
        place, still = points.t().contiguous(), torch.zeros_like(points.t())
        if self.pixels:
            shown = draw_discs(background(layout).repeat(len(place), 1, 1, 1), points)
            observations = {"observation": shown, "achieved_goal": shown, "velocity": still}
        else:
            observations = {"observation": torch.cat([place, still], 1), "achieved_goal": place}
            if self.observation == "layout":
                observations["layout"] = layout_bits(layout).expand(len(place), -1)
        low, high = -EDGE / CELL, (SIZE - EDGE) / CELL
        return GoalGrid(place, observations, (low, high, high, low))

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
                raise DataError(f"PointMaze: the state has no entry {name!r}; it is not one of this environment.")
        if len(state["steps"]) != self.num_envs:
            raise DataError(f"PointMaze: the state is of {len(state['steps'])} environments, not of {self.num_envs}.")
        for name in _STATE:
            setattr(self, f"_{name}", state[name].to(self.device, copy=True))
        self._enter(self._layout)
        self._seeds.load_state_dict({name: state[name] for name in _SEEDS})
        self._desired = self._show(self._goal) if bool(state["ready"]) else None


_STATE, _SEEDS = ("position", "velocity", "goal", "layout", "steps"), ("base", "episode")


def observation_space(observation: str) -> spaces.Dict:
    """The goal dict of one environment, for each of :data:`OBSERVATIONS`."""
    place = spaces.Box(0.0, float(SIDE), (2,), np.float32)
    speed = spaces.Box(-SPEED_BOUND, SPEED_BOUND, (2,), np.float32)
    if observation == "pixels":
        picture = spaces.Box(0, 255, (3, SIZE, SIZE), np.uint8)
        keys = {"observation": picture, "achieved_goal": picture, "velocity": speed, "desired_goal": picture}
        return spaces.Dict(keys)
    low, high = (np.concatenate([getattr(place, side), getattr(speed, side)]) for side in ("low", "high"))
    state = spaces.Box(low, high, dtype=np.float32)
    keys: dict[str, spaces.Space] = {"observation": state, "achieved_goal": place, "desired_goal": place}
    if observation == "layout":
        keys["layout"] = spaces.Box(0.0, 1.0, (CELLS,), np.float32)
    return spaces.Dict(keys)


class PointMazeEnv(gymnasium.Env):
    """One PointMaze environment with NumPy in and out; see :class:`PointMazeVectorEnv` for what it does and its options.

    ``max_episode_steps`` is ``None`` by default, because ``gymnasium.make`` adds the limit of 200 steps itself.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, *, render_mode: str | None = None, max_episode_steps: int | None = None, **options: Any):
        if render_mode not in (None, "rgb_array"):
            raise unknown_name("render_mode", str(render_mode), ("rgb_array",), where="PointMaze")
        self._batch = PointMazeVectorEnv(1, autoreset="disabled", max_episode_steps=max_episode_steps, **options)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = render_mode
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """As in Gymnasium; ``options`` may hold ``start``, ``goal``, ``velocity`` (2,) and ``layout``."""
        super().reset(seed=seed)
        if seed is None and not self._seeded:
            seed = int(self.np_random.integers(2**62))
        self._seeded = True
        columns = {key: [value] for key, value in (options or {}).items()}
        obs, info = self._batch.reset(seed=None if seed is None else [seed], options=columns)
        return self._numpy(obs), {"is_success": bool(info["is_success"][0])}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:  # type: ignore[override]
        """``action`` (2,) -> (observation, reward, terminated, truncated, info)."""
        obs, reward, terminated, truncated, info = self._batch.step(np.asarray(action, dtype=np.float32)[None])
        flags = bool(terminated[0]), bool(truncated[0])
        return self._numpy(obs), float(reward[0]), *flags, {"is_success": bool(info["is_success"][0])}

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """As :meth:`PointMazeVectorEnv.compute_reward` (used by hindsight replay)."""
        return goal_reward(achieved_goal, desired_goal)

    def render(self) -> Any:
        """uint8 (256, 256, 3) with ``render_mode="rgb_array"``, else ``None``."""
        return self._batch.render()[0] if self.render_mode == "rgb_array" else None

    @staticmethod
    def _numpy(obs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {key: value[0].numpy().copy() for key, value in obs.items()}
