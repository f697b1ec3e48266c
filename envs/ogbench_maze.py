"""OGBench's point mazes, batched on tensors, with collisions in closed form instead of MuJoCo.

Source: the pointmaze environments of OGBench (Park et al. 2025, arXiv 2410.20092), re-implemented from its facts. Maps,
tasks and evaluation episodes are in :mod:`clbench.streams.ogbench_mazes`. Cells have side 4, the centre of the cell in row
``i`` and column ``j`` is ``(x, y) = (4 j - 4, 4 i - 4)``, so ``y`` grows downward as the map reads.

A step adds ``step_size`` times the clipped action to the position and pushes the disc of radius 0.7 out of the boxes of the
walls. (OGBench does the same and then lets MuJoCo's soft contacts do the pushing, for 5 simulation steps.)

Inside this module a batch of points is one ``(2, B)`` tensor (row 0 is x, row 1 is y), so that each operation runs over
contiguous columns. Positions are stored as float32 and moved in float64.
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

from clbench.envs.goal_grid import GoalGrid
from clbench.envs.seeding import AUTORESETS, EpisodeSeeds, check_batch, split_options
from clbench.errors import ConfigError, ContractError, DataError, unknown_name
from clbench.rng import hash_uniform
from clbench.streams.ogbench_mazes import (
    ENTRIES,
    EXITS,
    NOISE,
    ORIGIN,
    TASKS,
    UNIT,
    centres,
    numbers,
    oracle_cells,
    walls,
)

RADIUS = 0.7  # of the agent
SUCCESS = 1.0  # distance to the goal
TELEPORT = 1.5  # distance to the centre of a teleporter
STEP_SIZE = 0.2
LARGEST_STEP = 0.5  # longer ones could jump over the corner of a wall
PIXELS = 6  # of pictures for people, per unit of length
TOUCH = 1e-3  # starts may be this much nearer to a wall than the radius (rounding)


# -- geometry -----------------------------------------------------------------------------------------------------------


class Maze:
    """One maze as tensors on a device.

    Attributes:
        walls: (rows, columns) bool.
        low, high: corners (2, 1) float64 of the square of the cells inside the outer walls.
        centres: (2, cells) float64.
        entries, exits: centres (2, n) float64 of the teleporters and of where they lead; ``n = 0`` in most mazes.
    """

    def __init__(self, name: str, device: Any = "cpu"):
        self.name = name
        self.walls = torch.from_numpy(walls(name)).to(device)
        self.rows, self.columns = self.walls.shape
        middle = torch.from_numpy(centres(name)).t().contiguous().to(device)
        self.centres = middle
        self.low = middle[:, :1] + UNIT / 2
        self.high = middle[:, -1:] - UNIT / 2
        self.entries, self.exits = (
            middle[:, torch.from_numpy(numbers(name, cells)).to(device)]
            for cells in (ENTRIES.get(name, ()), EXITS.get(name, ()))
        )

    def is_wall(self, column: Tensor, row: Tensor) -> Tensor:
        """Whether cells are walls; those outside the map are."""
        inside = (column >= 0) & (column < self.columns) & (row >= 0) & (row < self.rows)
        return ~inside | self.walls[row.clamp(0, self.rows - 1), column.clamp(0, self.columns - 1)]

    def cell(self, position: Tensor) -> Tensor:
        """Numbers (B,) int64 of the cells of points (2, B)."""
        column, row = ((position.to(torch.float64) + ORIGIN) / UNIT).floor().to(torch.int64)
        return row.clamp(0, self.rows - 1) * self.columns + column.clamp(0, self.columns - 1)

    def push_out(self, position: Tensor) -> Tensor:
        """The nearest places (2, B) where the disc touches no wall, for centres (2, B) float64 that moved one step.

        Only the three cells beyond the nearest faces of the grid can be touched: beside, above or below, and diagonal.
        Boxes beside or above push along their axis; a corner alone pushes away from itself. A centre that has stepped
        across a corner into a box leaves it through the nearer face.
        """
        at = (position + ORIGIN) / UNIT
        face = at.round()
        offset = position - (UNIT * face - ORIGIN)  # from the nearest faces
        side = torch.where(offset >= 0, 1.0, -1.0).to(offset.dtype)
        (x, y), (beside_x, beside_y) = (
            (face - (side < 0).to(face.dtype)).to(torch.int64),
            (face - (side > 0).to(face.dtype)).to(torch.int64),
        )
        beside = torch.stack([self.is_wall(beside_x, y), self.is_wall(x, beside_y)])
        inside = self.is_wall(x, y)
        depth = torch.where(beside, math.inf, offset.abs())  # to the faces behind which there is room
        leaves = inside & torch.stack([depth[0] <= depth[1], depth[0] > depth[1]])
        pushed = torch.where(~inside & beside, side * offset.abs().clamp(min=RADIUS), offset)
        distance = (offset[0] ** 2 + offset[1] ** 2).sqrt()
        corner = self.is_wall(beside_x, beside_y) & ~inside & ~beside.any(0) & (distance < RADIUS)
        away = torch.where(distance > 0, offset / distance, side / math.sqrt(2))  # exactly on the corner: diagonally
        pushed = torch.where(corner, RADIUS * away, pushed)
        pushed = torch.where(leaves, -side * RADIUS, pushed)
        return position + (pushed - offset)

    def move(self, position: Tensor, action: Tensor, step_size: float) -> Tensor:
        """One step of positions (2, B) with actions (2, B), clipped to +-1; float64 in and out. No teleporters."""
        return self.push_out(position + step_size * action.clamp(-1, 1))

    def teleport(self, position: Tensor, uniform: Tensor) -> Tensor:
        """Points (2, B) after the teleporters; ``uniform`` (B,) in [0, 1) chooses the exit."""
        if not self.entries.shape[1]:
            return position
        offset = position[:, :, None] - self.entries[:, None]
        enters = ((offset[0] ** 2 + offset[1] ** 2).sqrt() <= TELEPORT).any(1)
        number = (uniform * self.exits.shape[1]).to(torch.int64)
        return torch.where(enters, self.exits[:, number].to(position.dtype), position)


def is_success(achieved: Tensor, desired: Tensor) -> Tensor:
    """Within 1.0: positions (..., 2) -> (...) bool."""
    return (achieved - desired).square().sum(-1) <= SUCCESS**2


def goal_reward(achieved: Any, desired: Any) -> Any:
    """0 where the goal is reached, else -1; positions (..., 2), NumPy in, NumPy out."""
    reward = is_success(torch.as_tensor(achieved), torch.as_tensor(desired)).to(torch.float32) - 1
    return reward if isinstance(achieved, Tensor) else reward.numpy()[()]


# -- environments -------------------------------------------------------------------------------------------------------


class OGBenchPointMazeVectorEnv(gymnasium.vector.VectorEnv):
    """OGBench's point maze, ``B`` rows at once, in torch on any device (:class:`clbench.contracts.VectorEnv`).

    Observation: a dict of ``observation``, ``achieved_goal`` (the same tensor) and ``desired_goal``, float32 (B, 2)
    positions. Treat them as read-only: the desired goals are shared between steps until a row is reset.

    Action: (B, 2) in [-1, 1], a displacement in units of ``step_size``; larger ones are clipped.

    Reward: -1 per step, 0 when the goal is reached. Success: within 1.0 of the goal after the step. Episodes end at
    success (unless ``terminate_on_success=False``) and are truncated after ``max_episode_steps``. In the maze
    ``teleport``, an agent within 1.5 of a teleporter is moved to one of three exits, after success was computed; the
    observation is already that of the exit (OGBench shows it one step later).

    Randomness: an episode (task, start, goal, exits) is a pure function of its seed, whatever ``B`` and the device
    (:class:`clbench.envs.seeding.EpisodeSeeds`). Reset options: ``task_id`` (B,), 1 to 5, otherwise a random task;
    ``start`` and ``goal`` (B, 2) instead of the task's, which get noise of +-1 per axis; ``reset_mask`` (B,).

    Args:
        num_envs: rows.
        device: of all tensors.
        autoreset: ``"same_step"`` or ``"disabled"``.
        maze: ``"medium"``, ``"large"``, ``"giant"``, ``"teleport"``, or ``"u"``, a small one for tests.
        step_size: displacement per axis of a full action, at most 0.5; OGBench's is 0.2.
        max_episode_steps: steps until truncation, or ``None``.
        terminate_on_success: whether reaching the goal ends the episode.
        render_mode: for Gymnasium; :meth:`render` always works.

    Raises:
        ConfigError: an option out of its range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        device: Any = "cpu",
        autoreset: str = "same_step",
        maze: str = "medium",
        step_size: float = STEP_SIZE,
        max_episode_steps: int | None = 1000,
        terminate_on_success: bool = True,
        render_mode: str | None = None,
    ):
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ConfigError(f"OGBenchPointMaze: max_episode_steps must be at least 1, got {max_episode_steps}.")
        check_step_size(step_size)
        self.device = check_batch(num_envs, device, autoreset)
        self.num_envs, self.autoreset = num_envs, autoreset
        self.max_episode_steps, self.terminate_on_success = max_episode_steps, terminate_on_success
        self.step_size, self.render_mode = float(step_size), render_mode
        self.maze = Maze(maze, self.device)
        self._tasks = torch.from_numpy(np.stack([numbers(maze, pair) for pair in TASKS[maze]])).to(self.device)
        self._way: Tensor | None = None  # the oracle's table, made when it is asked for
        self.metadata = {"autoreset_mode": AUTORESETS[autoreset], "render_modes": ["rgb_array"], "render_fps": 10}
        self.single_observation_space = observation_space(maze)
        self.single_action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        # the state: position and goal (2, B), steps of the episode (B,), seeds
        self._position = torch.full((2, num_envs), math.nan, device=self.device)
        self._goal = self._position.clone()
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._seeds = EpisodeSeeds(num_envs, self.device)
        self._desired: Tensor | None = None  # the goals as observations; replaced, never written to
        self._bad_action = torch.zeros((), dtype=torch.bool, device=self.device)

    # -- reset ----------------------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in all rows, or in those of ``options["reset_mask"]``; see the class for seeds and options.

        Raises:
            ConfigError: unknown options, wrong shapes, no such task, a goal inside a wall or a start that touches one.
            ContractError: a mask before the first full reset.
        """
        mask, columns = split_options(options, self.num_envs, self.device)
        if self._desired is None and not bool(mask.all()):
            raise ContractError("OGBenchPointMaze: the first reset must reset all rows; leave out reset_mask.")
        for key in columns:
            if key not in (known := ("task_id", "start", "goal")):
                raise unknown_name("reset option", key, ("reset_mask", *known), where="OGBenchPointMaze")
        self._raise_if_bad()
        task = self._task_numbers(columns.pop("task_id", None), mask)
        given = {key: self._points(key, column, mask) for key, column in columns.items()}
        self._begin(mask, seed, task, **given)
        return self._observe(), {"is_success": self._at_goal(self._position)}

    def _task_numbers(self, column: Any, mask: Tensor) -> Tensor | None:
        """``task_id`` as indices (B,) int64 from 0, checked in the rows of ``mask``."""
        if column is None:
            return None
        ids = torch.as_tensor(column).to(self.device)
        wrong = mask & ~((ids >= 1) & (ids <= len(self._tasks)))
        if ids.is_floating_point() or ids.shape != mask.shape or bool(wrong.any()):
            raise ConfigError(
                f"OGBenchPointMaze: task_id must hold whole numbers from 1 to {len(self._tasks)}, one per row, got "
                f"{ids.tolist()}."
            )
        return torch.where(mask, ids.to(torch.int64) - 1, 0)

    def _points(self, key: str, column: Any, mask: Tensor) -> Tensor:
        """A column of points (B, 2) as (2, B) on the device, checked in the rows of ``mask``."""
        values = column.cpu() if isinstance(column, Tensor) else column
        points = torch.as_tensor(np.asarray(values, dtype=np.float32))
        if points.shape != (self.num_envs, 2):
            raise ConfigError(
                f"OGBenchPointMaze: option {key!r} must have shape ({self.num_envs}, 2), got {tuple(points.shape)}."
            )
        points = points.t().contiguous().to(self.device)
        exact = points.to(torch.float64).nan_to_num(math.inf, math.inf, -math.inf).clamp(-1e6, 1e6)
        fits = ~self.maze.walls.flatten()[self.maze.cell(exact)]
        why = "is not in a free cell"
        if key == "start":
            fits &= ((self.maze.push_out(exact) - exact).abs() <= TOUCH).all(0)
            why = f"is not in a free cell, at least {RADIUS:g} from every wall"
        wrong = mask & ~fits
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ConfigError(f"OGBenchPointMaze: the {key} of row {row}, {points[:, row].tolist()}, {why}.")
        return points

    def _begin(
        self,
        mask: Tensor,
        seed: int | Sequence[int] | None = None,
        task: Tensor | None = None,
        start: Tensor | None = None,
        goal: Tensor | None = None,
    ) -> None:
        """New episodes in the rows of ``mask`` (B,), at drawn points or at the given ones (2, B)."""
        self._seeds.start(seed, mask)
        u = hash_uniform(self._seeds.current(), 0, 5).t()
        number = (u[0] * len(self._tasks)).to(torch.int64) if task is None else task
        cells = self._tasks[number].t()  # (2, B): of start and goal
        for state, cell, noise, fixed in (
            (self._position, cells[0], u[1:3], start),
            (self._goal, cells[1], u[3:5], goal),
        ):
            drawn = self.maze.centres[:, cell] + NOISE * (2 * noise - 1)
            state.copy_(torch.where(mask, drawn.to(torch.float32) if fixed is None else fixed, state))
        self._steps = torch.where(mask, 0, self._steps)
        self._desired = self._goal.t().clone(memory_format=torch.contiguous_format)

    def _observe(self) -> dict[str, Tensor]:
        shown = self._position.t().clone(memory_format=torch.contiguous_format)
        desired: Tensor = self._desired  # type: ignore[assignment]
        return {"observation": shown, "achieved_goal": shown, "desired_goal": desired}

    def _at_goal(self, position: Tensor) -> Tensor:
        return (position - self._goal).square().sum(0) <= SUCCESS**2

    # -- step -----------------------------------------------------------------------------------------------------------

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict]:
        """Move all rows by ``actions`` (B, 2) (torch or NumPy).

        Raises:
            ContractError: before the first reset; actions of a wrong shape or type, or not finite (for actions on a GPU
                the last is found at the next ``reset`` or ``state_dict``, so that stepping never waits for the device).
        """
        action = self._columns(actions)
        position = self.maze.move(self._position.to(torch.float64), action, self.step_size).to(torch.float32)
        self._steps += 1
        success = self._at_goal(position)
        self._position = self._teleported(position)
        limit = self.max_episode_steps
        terminated = success.clone() if self.terminate_on_success else torch.zeros_like(success)
        truncated = torch.zeros_like(success) if limit is None else self._steps >= limit
        obs = self._observe()
        info: dict[str, Any] = {"is_success": success}
        if self.autoreset == "same_step":
            ended = terminated | truncated
            info |= {"final_obs": obs, "_final_obs": ended}
            if not ended.is_cpu or bool(ended.any()):
                self._begin(ended)
                obs = self._observe()
        return obs, success.to(torch.float32) - 1, terminated, truncated, info

    def _teleported(self, position: Tensor) -> Tensor:
        """The exit is a function of the episode's seed and the step."""
        if not self.maze.entries.shape[1]:
            return position
        return self.maze.teleport(position, hash_uniform(self._seeds.current(), self._steps, 1)[:, 0])

    def _columns(self, actions: Any) -> Tensor:
        """Checked actions as float64 (2, B)."""
        if self._desired is None:
            raise ContractError("OGBenchPointMaze: call reset before step.")
        actions = torch.as_tensor(actions)
        if actions.shape != (self.num_envs, 2) or not actions.is_floating_point():
            raise ContractError(
                f"OGBenchPointMaze: actions must be float ({self.num_envs}, 2), got {actions.dtype} "
                f"{tuple(actions.shape)}."
            )
        finite = torch.isfinite(actions).all()
        if not finite.is_cpu:
            self._bad_action |= ~finite
        elif not bool(finite):
            row = int((~torch.isfinite(actions).all(1)).nonzero()[0])
            raise ContractError(f"OGBenchPointMaze: the action of row {row} is not finite: {actions[row].tolist()}.")
        columns = actions.to(self.device, torch.float32).t()
        return columns.to(torch.float64, memory_format=torch.contiguous_format)

    def _raise_if_bad(self) -> None:
        if not self._bad_action.is_cpu and bool(self._bad_action):
            raise ContractError("OGBenchPointMaze: an action since the last reset was not finite.")

    def compute_reward(self, achieved_goal: Any, desired_goal: Any, info: Any = None) -> Any:
        """The reward for reaching ``achieved_goal`` when ``desired_goal`` was wanted (hindsight relabelling).

        Positions (..., 2), torch or NumPy -> float32 (...).
        """
        return goal_reward(achieved_goal, desired_goal)

    # -- controllers for reference lines --------------------------------------------------------------------------------

    def oracle_actions(self) -> Tensor:
        """Actions (B, 2) of somebody who knows the map: to the centre of the next cell of a shortest path over cells, and
        within the goal's cell to the goal; around the teleporters where that is possible."""
        if self._way is None:
            self._way = torch.from_numpy(oracle_cells(self.maze.name)).to(self.device)
        cell, goal = self.maze.cell(self._position), self.maze.cell(self._goal)
        target = self.maze.centres[:, self._way[cell, goal]]
        towards = torch.where(cell == goal, self._goal.to(torch.float64), target) - self._position
        length = (towards[0] ** 2 + towards[1] ** 2).sqrt().clamp(min=self.step_size)  # no overshooting
        return (towards / length).t().to(torch.float32, memory_format=torch.contiguous_format)

    def straight_line_actions(self) -> Tensor:
        """Actions (B, 2) that ignore the walls: ``clip(5 (goal - position))``."""
        return (5 * (self._goal - self._position)).clamp(-1, 1).t().contiguous()

    # -- pictures, state ------------------------------------------------------------------------------------------------

    def render(self) -> Any:  # type: ignore[override]
        """Pictures for people, NumPy uint8 (B, H, W, 3), 6 pixels per unit of length: walls dark, agent blue, goal (success
        radius) green, teleporters orange, their exits yellow. Row 0 of the map is at the top."""
        x, y = (
            (torch.arange(int(PIXELS * UNIT * n), device=self.device, dtype=torch.float64) + 0.5) / PIXELS - ORIGIN
            for n in (self.maze.columns, self.maze.rows)
        )
        x, y = x[None, None, :], y[None, :, None]

        def disc(points: Tensor, radius: float) -> Tensor:  # (2, n) -> (n, H, W)
            return (x - points[0][:, None, None]) ** 2 + (y - points[1][:, None, None]) ** 2 < radius**2

        kind = self.maze.walls.to(torch.int64)
        for axis in (0, 1):
            kind = kind.repeat_interleave(int(PIXELS * UNIT), axis)
        kind = torch.where(disc(self.maze.entries, TELEPORT).any(0), 4, kind)
        kind = torch.where(disc(self.maze.exits, SUCCESS).any(0), 5, kind).expand(self.num_envs, -1, -1)
        kind = torch.where(disc(self._goal, SUCCESS), 2, kind)
        kind = torch.where(disc(self._position, RADIUS), 3, kind)
        colours = [[247, 247, 247], [68, 68, 68], [44, 160, 44], [31, 119, 180], [255, 127, 14], [255, 217, 102]]
        return torch.tensor(colours, dtype=torch.uint8, device=self.device)[kind].cpu().numpy()

    def points(self) -> tuple[Tensor, Tensor]:
        """Where agents and goals are, (B, 2) each."""
        return self._position.t().clone(), self._goal.t().clone()

    def goal_grid(self, row: int = 0) -> GoalGrid:
        """The points with half-whole coordinates that the agent's centre can reach."""
        axes = [
            torch.arange(float(low), float(high) + 0.5, 0.5, device=self.device)
            for low, high in zip(self.maze.low, self.maze.high, strict=True)
        ]
        points = torch.cartesian_prod(*axes).t().to(torch.float64)
        free = ~self.maze.walls.flatten()[self.maze.cell(points)]
        points = points[:, free & (self.maze.push_out(points) == points).all(0)]
        place = points.t().to(torch.float32, memory_format=torch.contiguous_format)
        right, bottom = UNIT * self.maze.columns - ORIGIN, UNIT * self.maze.rows - ORIGIN
        return GoalGrid(place, {"observation": place, "achieved_goal": place}, (-ORIGIN, right, bottom, -ORIGIN))

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
                raise DataError(
                    f"OGBenchPointMaze: the state has no entry {name!r}; it is not one of this environment."
                )
        if len(state["steps"]) != self.num_envs:
            raise DataError(
                f"OGBenchPointMaze: the state is of {len(state['steps'])} environments, not of {self.num_envs}."
            )
        for name in _STATE:
            setattr(self, f"_{name}", state[name].to(self.device, copy=True))
        self._seeds.load_state_dict({name: state[name] for name in _SEEDS})
        self._desired = self._goal.t().clone(memory_format=torch.contiguous_format) if bool(state["ready"]) else None


_STATE, _SEEDS = ("position", "goal", "steps"), ("base", "episode")


def check_step_size(step_size: float) -> None:
    """Raise :class:`ConfigError` for a step that could jump over the corner of a wall, or that is none."""
    if not 0 < step_size <= LARGEST_STEP:
        raise ConfigError(f"OGBenchPointMaze: step_size must be in (0, {LARGEST_STEP:g}], got {step_size}.")


def observation_space(maze: str) -> spaces.Dict:
    """The goal dict of one environment: positions within the outer walls."""
    shape = Maze(maze)
    low, high = (corner[:, 0].numpy().astype(np.float32) for corner in (shape.low, shape.high))
    place = spaces.Box(low, high, dtype=np.float32)
    return spaces.Dict({"observation": place, "achieved_goal": place, "desired_goal": place})


class OGBenchPointMazeEnv(gymnasium.Env):
    """One maze with NumPy in and out; see :class:`OGBenchPointMazeVectorEnv` for what it does and its options.

    ``max_episode_steps`` is ``None`` by default, because ``gymnasium.make`` adds the limit of 1000 steps itself.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, *, render_mode: str | None = None, max_episode_steps: int | None = None, **options: Any):
        if render_mode not in (None, "rgb_array"):
            raise unknown_name("render_mode", str(render_mode), ("rgb_array",), where="OGBenchPointMaze")
        self._batch = OGBenchPointMazeVectorEnv(1, autoreset="disabled", max_episode_steps=max_episode_steps, **options)
        self.observation_space = self._batch.single_observation_space
        self.action_space = self._batch.single_action_space
        self.render_mode = render_mode
        self._seeded = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """As in Gymnasium; ``options`` may hold ``start``, ``goal`` (2,) and ``task_id``."""
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
        """As :meth:`OGBenchPointMazeVectorEnv.compute_reward` (used by hindsight replay)."""
        return goal_reward(achieved_goal, desired_goal)

    def render(self) -> Any:
        """uint8 (H, W, 3) with ``render_mode="rgb_array"``, else ``None``."""
        return self._batch.render()[0] if self.render_mode == "rgb_array" else None

    @staticmethod
    def _numpy(obs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        return {key: value[0].numpy().copy() for key, value in obs.items()}
