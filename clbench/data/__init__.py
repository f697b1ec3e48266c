"""Offline data: flat tensors with an episode index, the goal sampler, storage, and data sets by name."""

from clbench.data.recipes import RECIPES

TABLE: dict[str, tuple[str, str]] = {
    "two-rooms": ("clbench.envs.two_rooms_data:two_rooms", "Two-Rooms random walks (PLDM 2.1), any wall and door"),
    "point-maze": ("clbench.envs.point_maze_data:point_maze", "PointMaze, random actions (PLDM 2.3), any layouts"),
    "ogbench-maze": ("clbench.envs.ogbench_maze_data:ogbench_maze", "OGBench's point mazes, scripted walks, any size"),
    "classify": ("clbench.envs.classify:classify_dataset", "labelled examples as one-step episodes of an expert"),
    "bit-flip": ("clbench.envs.bit_flip:bit_flip_dataset", "bits and their targets as one-step episodes of an expert"),
    **{name: (f"clbench.data.published:{recipe.attribute}", recipe.summary) for name, recipe in RECIPES.items()},
}

# Observations that are drawn when a batch is drawn: name in the file -> the function. Files can only name these.
RENDERERS: dict[str, str] = {
    "two-rooms": "clbench.envs.two_rooms:render_pixels",
    "point-maze": "clbench.envs.point_maze:render_pixels",
}
