"""Batched planners over any world model and objective. They know nothing of agents or environments."""

if __name__ != "clbench.planners":
    raise ImportError("import clbench.planners, not planners: this top-level folder is part of the clbench package")

# name -> ("module:Class", summary)
TABLE: dict[str, tuple[str, str]] = {}
