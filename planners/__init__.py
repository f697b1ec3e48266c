"""Batched planners over any world model and objective. They know nothing of agents or environments."""

if __name__ != "clbench.planners":
    raise ImportError("import clbench.planners, not planners: this top-level folder is part of the clbench package")

# name -> ("module:Class", summary)
TABLE: dict[str, tuple[str, str]] = {
    "mppi": ("clbench.planners.mppi:MPPI", "average of sampled action sequences, weighted by exp(-cost / temperature)"),
    "cem": ("clbench.planners.cem:CEM", "cross-entropy method: a Gaussian is refitted to the cheapest sequences"),
    "icem": ("clbench.planners.icem:ICEM", "CEM with noise that is smooth in time and elites that are kept"),
    "random-shooting": ("clbench.planners.random_shooting:RandomShooting", "the cheapest of uniformly drawn sequences"),
    "gradient": ("clbench.planners.gradient:Gradient", "Adam on the actions through the world model, with restarts"),
}
