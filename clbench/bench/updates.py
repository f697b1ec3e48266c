"""How many gradient updates per second the offline agents make, beside a training loop written by hand for each method.

Each row is one implementation of one agent::

    {"name", "device", "value", "unit", "ratio_to_limit", "agent", "preset", "implementation", "obs", "act", "seeds",
     "batch_size", "hidden", "threads", "clock", "rounds"}

``value`` is the median over rounds of updates per second (``unit`` is ``"updates/s"``), batches included; with several
seeds, of updates of all seeds together. The limit is :mod:`clbench.bench.minimal_gcrl`, the same maths on the same data
without anything that makes it an agent of a package. ``ratio_to_limit`` is the median over rounds of ours divided by the
hand-written loop's in the same round: 1 is as fast, 2 twice as fast. All implementations of an agent are measured in one
process, in rounds whose order is shuffled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict

from clbench.bench.minimal_gcrl import Loop
from clbench.contracts import Agent, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.registry import resolve
from clbench.rng import torch_generator

# agent, or agent:actor_loss
METHODS = (
    "gcbc", "gcivl", "gciql:awr", "gciql:ddpg-bc", "qrl:awr", "qrl:ddpg-bc", "crl:awr", "crl:ddpg-bc", "hiql", "hilp",
)  # fmt: skip
DEFAULT = ("gcbc", "gcivl", "gciql:awr", "gciql:ddpg-bc", "qrl:ddpg-bc", "crl:ddpg-bc", "hiql", "hilp", "bc", "pldm")
SHAPES = ((2, 2), (29, 8))  # numbers in an observation, in an action: a point's and an ant's
ROUNDS = (5, 25)
SECONDS = 20.0  # for the rounds of an agent, where that makes more than the fewest rounds
SHORT = 0.2  # seconds of one implementation in a round, at least


def point_maze_like(obs: int, act: int, episodes: int = 100, steps: int = 1000) -> OfflineDataset:
    """Random walks: positions (N, obs) are sums of actions (N, act), as far as there are as many."""
    rng = torch_generator(0, "bench", "updates", "data")
    actions = torch.rand(episodes, steps, act, generator=rng) * 2 - 1
    walk = torch.randn(episodes, steps + 1, obs, generator=rng)
    shared = min(obs, act)
    walk[:, 1:, :shared] = 0.2 * actions[..., :shared]
    walk = walk.cumsum(1)
    rows, final = walk[:, :-1].reshape(-1, obs), walk[:, -1].clone()
    return OfflineDataset(
        {"observation": rows, "achieved_goal": rows}, actions.reshape(-1, act), torch.full((episodes,), steps),
        {"observation": final, "achieved_goal": final}, name="walks",
    )  # fmt: skip


def make_agent(method: str, data: OfflineDataset, *, seed: int = 0, device: str = "cpu", **options: Any) -> Agent:
    """An agent for these data; ``method`` may name its actor loss after a colon."""
    name, _, extraction = method.partition(":")
    if extraction:
        options["actor_loss"] = extraction
        if extraction == "awr":
            options["alpha"] = 3.0
    space = Box(-np.inf, np.inf, tuple(data.observations["observation"].shape[1:]), np.float32)
    keys = ("observation", "achieved_goal", "desired_goal")
    spaces = Spaces(Dict(dict.fromkeys(keys, space)), Box(-1, 1, tuple(data.actions.shape[1:]), np.float32))
    cls = resolve("agents", name)
    rng = torch_generator(seed, "bench", "updates", "agent", device=device)
    return cls(spaces, cls.Config(**options), device=torch.device(device), rng=rng)


def hand_written(method: str, data: OfflineDataset, config: Any, seed: int = 0) -> Loop:
    """The hand-written loop of a method, with the options of the agent."""
    rng = torch_generator(seed, "bench", "updates", "limit", device=data.device)
    following = data.next_observation(torch.arange(len(data), device=data.device))["observation"]
    observations = data.observations["observation"]
    return Loop(method.partition(":")[0], observations, following, data.actions, data.final, config, rng)
