"""Environments: Gymnasium classes, tensor-native and batched where we own them.

Importing this package registers ``clbench/NAME-v0`` with Gymnasium (string entry points, nothing heavy is loaded). Any
other Gymnasium id works through :func:`clbench.make_env` too.
"""

if __name__ != "clbench.envs":
    raise ImportError("import clbench.envs, not envs: this top-level folder is part of the clbench package")

import gymnasium

# id -> (batched class, summary)
TABLE: dict[str, tuple[str, str]] = {
    "clbench/TwoRooms-v0": (
        "clbench.envs.two_rooms:TwoRoomsVectorEnv",
        "point agent, two rooms joined by a door; state or 2x65x65 pixels (PLDM)",
    ),
    "clbench/TwoRoomsChase-v0": (
        "clbench.envs.two_rooms_chase:TwoRoomsChaseVectorEnv",
        "Two-Rooms with a chaser to stay away from (new task of PLDM)",
    ),
    "clbench/PointMaze-v0": (
        "clbench.envs.point_maze:PointMazeVectorEnv",
        "point mass in a 4x4 maze; state, or 3x64x64 pixels and velocity (Diverse PointMaze of PLDM)",
    ),
    "clbench/OGBenchPointMaze-v0": (
        "clbench.envs.ogbench_maze:OGBenchPointMazeVectorEnv",
        "OGBench's point mazes (medium, large, giant, teleport) with their five tasks; positions",
    ),
    "clbench/Classify-v0": (
        "clbench.envs.classify:ClassifyVectorEnv",
        "any labelled data set as one-step episodes; digits ship with it",
    ),
    "clbench/BitFlip-v0": (
        "clbench.envs.bit_flip:BitFlipVectorEnv",
        "regression on bits by one-step episodes, of which some change slowly (Dohare et al. 2021)",
    ),
}

gymnasium.register(
    id="clbench/TwoRooms-v0",
    entry_point="clbench.envs.two_rooms:TwoRoomsEnv",
    vector_entry_point="clbench.envs.two_rooms:TwoRoomsVectorEnv",
    max_episode_steps=200,
)
gymnasium.register(
    id="clbench/TwoRoomsChase-v0",
    entry_point="clbench.envs.two_rooms_chase:TwoRoomsChaseEnv",
    vector_entry_point="clbench.envs.two_rooms_chase:TwoRoomsChaseVectorEnv",
    max_episode_steps=100,
)
gymnasium.register(
    id="clbench/PointMaze-v0",
    entry_point="clbench.envs.point_maze:PointMazeEnv",
    vector_entry_point="clbench.envs.point_maze:PointMazeVectorEnv",
    max_episode_steps=200,
)
gymnasium.register(
    id="clbench/OGBenchPointMaze-v0",
    entry_point="clbench.envs.ogbench_maze:OGBenchPointMazeEnv",
    vector_entry_point="clbench.envs.ogbench_maze:OGBenchPointMazeVectorEnv",
    max_episode_steps=1000,
)
gymnasium.register(
    id="clbench/Classify-v0",
    entry_point="clbench.envs.classify:ClassifyEnv",
    vector_entry_point="clbench.envs.classify:ClassifyVectorEnv",
)
gymnasium.register(
    id="clbench/BitFlip-v0",
    entry_point="clbench.envs.bit_flip:BitFlipEnv",
    vector_entry_point="clbench.envs.bit_flip:BitFlipVectorEnv",
)
