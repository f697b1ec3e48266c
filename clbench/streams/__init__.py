"""Streams: pure schedules (which task now) over tables of tasks (what a task is)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clbench.streams.core import Suite, make_stream

# name -> ("module:function", summary); a function returns a Suite (tasks and default budgets) or a whole Stream
TABLE: dict[str, tuple[str, str]] = {
    "two-rooms-doors": ("clbench.streams.two_rooms:two_rooms_doors", "Two-Rooms with 5 wall and door positions"),
    "two-rooms-chase": (
        "clbench.streams.two_rooms_chase:two_rooms_chase",
        "learn Two-Rooms, then keep away from a chaser without further training",
    ),
    "maze-layouts": ("clbench.streams.maze_layouts:maze_layouts", "PointMaze, 5 layouts (up to 40) as tasks"),
    "two-rooms-dynamics": (
        "clbench.streams.two_rooms:two_rooms_dynamics",
        "Two-Rooms, 5 tasks that differ in what actions do: gain, friction, reversal",
    ),
    "point-maze-dynamics": (
        "clbench.streams.maze_layouts:point_maze_dynamics",
        "PointMaze, 5 tasks that differ in what actions do: gain, damping, reversal",
    ),
    "digits-permuted": ("clbench.streams.digits:digits_permuted", "digits under fixed pixel permutations, 10 tasks"),
    "digits-split": (
        "clbench.streams.digits:digits_split",
        "digits, two classes at a time, 5 tasks; class-, domain- or task-incremental",
    ),
    "digits-rotated": ("clbench.streams.digits:digits_rotated", "digits rotated by fixed angles, 5 tasks"),
    "digits-online-inputs": (
        "clbench.streams.digits:digits_online_inputs",
        "online: 200 short tasks, each with a pixel permutation of its own",
    ),
    "digits-online-labels": (
        "clbench.streams.digits:digits_online_labels",
        "online: 200 short tasks, each with a label permutation of its own",
    ),
    "bit-flipping": (
        "clbench.streams.bit_flipping:bit_flipping",
        "regression that changes slowly: 200 tasks, one input bit flips between two",
    ),
    "minigrid-5": ("clbench.streams.minigrid:minigrid_5", "five MiniGrid rooms that share the action space"),
}

# name -> ("module:function", summary); see clbench.streams.schedules
SCHEDULES: dict[str, tuple[str, str]] = {
    name: (f"clbench.streams.schedules:{name.replace('-', '_')}", summary)
    for name, summary in {
        "sequential": "each task once, in order",
        "cyclic": "the sequence several times over",
        "shuffled": "each task once per cycle, in random order",
        "uniform": "a task drawn uniformly for each phase",
        "markov": "stay with a probability, else move to another task",
        "blurred": "neighbouring tasks alternate around each boundary",
        "power-law": "a task's probability falls as a power law of the time since it was last seen",
    }.items()
}

_LAZY = ("Suite", "make_stream")
__all__ = ["SCHEDULES", "TABLE", "Suite", "make_stream"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from clbench.streams import core

        return getattr(core, name)
    raise AttributeError(f"module 'clbench.streams' has no attribute {name!r}")
