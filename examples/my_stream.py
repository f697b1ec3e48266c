import numpy as np

from clbench import Metric, Task, TaskList
from clbench.streams import Suite

# a Pendulum step costs at most pi^2 + 0.1 * 8^2 + 0.001 * 2^2, and an episode has 200 steps
WORST = -200 * (np.pi**2 + 0.1 * 8**2 + 0.001 * 2**2)


def pendulum_gravity(*, rng: np.random.Generator, tasks: int = 4, episodes: int = 10) -> Suite:
    """Swing up a pendulum under a gravity that differs between the tasks, drawn from the seed of the run."""
    gravities = rng.uniform(5.0, 15.0, size=tasks).round(2)
    table = [
        Task(
            name=f"gravity-{g:g}",
            env_id="Pendulum-v1",
            env_kwargs={"g": float(g)},
            evaluation=TaskList.from_seeds(episodes),
            metric=Metric("return", low=WORST, high=0.0),
        )
        for g in gravities
    ]
    return Suite("pendulum-gravity", table, updates=2_000, env_steps=10_000)
