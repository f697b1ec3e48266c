"""How many gradient updates per second the offline agents make, beside a training loop written by hand for each method.

Each row is one implementation of one agent::

    {"name", "device", "value", "unit", "ratio_to_limit", "agent", "preset", "implementation", "obs", "act", "seeds",
     "updates_per_graph", "batch_size", "hidden", "threads", "clock", "rounds", "memory_ratio"}

``value`` is the median over rounds of updates per second (``unit`` is ``"updates/s"``), batches included; with several
seeds, of updates of all seeds together. The limit is :mod:`clbench.bench.minimal_gcrl`, the same maths on the same data
without anything that makes it an agent of a package. ``ratio_to_limit`` is the median over rounds of ours divided by the
hand-written loop's in the same round: 1 is as fast, 2 twice as fast. All implementations of an agent are measured in one
process, in rounds whose order is shuffled.

``eidetic:mlp``, ``eidetic:mlp-paper`` and ``eidetic:cnn`` measure what ownership costs, see :mod:`clbench.bench.eidetic`:
their limit is the plain network, and ``memory_ratio`` the bytes of ours divided by its bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.spaces import Box, Dict

from clbench.agents.gcrl.base import GoalAgent
from clbench.agents.gcrl.seeds import SeedBatch
from clbench.bench import eidetic
from clbench.bench.minimal_gcrl import LOSSES, Loop
from clbench.bench.rollouts import CLOCKS, LIMIT, OURS, _wait
from clbench.contracts import Agent, Experience, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError, unknown_name
from clbench.registry import resolve
from clbench.rng import sealed_global_rng, seed_global, torch_generator

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


# -- measuring -----------------------------------------------------------------------------------------------------------

BATCHED = "clbench, seeds as a batch"
Update = Callable[[], Any]


def bench_updates(
    agents: Sequence[str] = DEFAULT, *, preset: Literal["small", "ogbench"] = "small", obs: int = 2, act: int = 2,
    seeds: int = 1, updates_per_graph: int = 0, device: str = "cpu", threads: int | None = None, rounds: int | None = None,
    clock: Literal["wall", "cpu"] = "wall", quick: bool = False, note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure the updates of agents.

    Args:
        agents: gcbc, gcivl, gciql, qrl, crl, hiql, hilp, bc, pldm; with an actor loss after a colon where there are two, as
            in gciql:awr. bc and pldm have no limit. Or eidetic:mlp, eidetic:mlp-paper, eidetic:cnn, beside plain networks.
        preset: small or ogbench; bc and pldm have their own defaults.
        obs: numbers in an observation, which is also what is achieved.
        act: numbers in an action.
        seeds: trainings at once; with more than one, ours are also measured with the seeds as an axis of all tensors.
        updates_per_graph: K > 1: ours as CUDA graphs of K updates each; on a CPU, one by one.
        device: where everything is computed.
        threads: of torch during the measurement; default as they are.
        rounds: times that everything is measured; default as many as fit 20 seconds, at least 5.
        clock: "wall" time, or the "cpu" time of the process, which on a machine that is shared says more if there is one
            thread; a thread that waits for others counts too.
        quick: tiny sizes and one round, for tests; the numbers mean nothing.
        note: is told how far it is.

    Returns:
        One dict per implementation and agent, see the module.

    Raises:
        ConfigError: unknown names, or sizes below 1.
    """
    agents = [name for names in agents for name in names.split(",")]
    known = sorted({*DEFAULT, *METHODS, *(m.partition(":")[0] for m in METHODS), *eidetic.SHAPES})
    for kind, names, choices in (("agent", agents, known), ("preset", [preset], ("small", "ogbench")),
                                 ("clock", [clock], CLOCKS)):  # fmt: skip
        for name in names:
            if name not in choices:
                raise unknown_name(kind, name, choices)
    if updates_per_graph < 0:
        raise ConfigError(f"updates_per_graph must be at least 0, got {updates_per_graph}.")
    for name, value in {"obs": obs, "act": act, "seeds": seeds, "rounds": rounds, "threads": threads}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    before = torch.get_num_threads()
    data = point_maze_like(obs, act, *((5, 120) if quick else ())).to(device)
    rows: list[dict[str, Any]] = []
    with sealed_global_rng():
        torch.set_num_threads(threads or before)
        try:
            for method in agents:
                seed_global(0)  # nn.Linear draws from the process-wide generator
                if method in eidetic.SHAPES:
                    updates, config, memory = eidetic.implementations(method, device, quick)
                    updates = {OURS: updates["ours"], LIMIT: updates["plain"]}
                    times = _measure(updates, rounds or (1 if quick else None), CLOCKS[clock], device, method, note)
                    measured = _rows(times, method, 1, config, (obs, act), 1, device, clock)
                    ratios = {OURS: memory, LIMIT: 1.0}
                    rows += [
                        {**r, "obs": None, "act": None, "memory_ratio": ratios[r["implementation"]]} for r in measured
                    ]
                    continue
                options: dict[str, Any] = {"hidden": (16, 16), "batch_size": 8} if quick else {}
                if method.partition(":")[0] in LOSSES:
                    options |= {"preset": preset, "updates_per_graph": updates_per_graph}
                if method == "pldm":
                    options.pop("hidden", None)
                updates, config = _implementations(method, data, options, seeds, device)
                times = _measure(updates, rounds or (1 if quick else None), CLOCKS[clock], device, method, note)
                rows += _rows(times, method, _per_call(options), config, (obs, act), seeds, device, clock)
        finally:
            torch.set_num_threads(before)
    return rows


def _implementations(
    method: str, data: OfflineDataset, options: Mapping[str, Any], seeds: int, device: str
) -> tuple[dict[str, Update], Any]:
    """What makes the updates of a graph (one without graphs) of every seed, by implementation; and the resolved options."""
    name, count = method.partition(":")[0], _per_call(options)

    def learning(agent: Agent, seed: int) -> Iterator[Mapping[str, float]]:
        rng = torch_generator(seed, "bench", "updates", "learn", device=device)
        for metrics in agent.learn(Experience(dataset=data), 10**9, rng=rng):
            if metrics["step"] % count == 0:  # with graphs all are
                yield metrics

    agents = [make_agent(method, data, seed=seed, device=device, **options) for seed in range(seeds)]
    loops = [learning(agent, seed) for seed, agent in enumerate(agents)]
    config = agents[0].config
    updates: dict[str, Update] = {OURS: lambda: [next(loop) for loop in loops]}
    if name in LOSSES:
        written = [hand_written(method, data, config, seed) for seed in range(seeds)]
        updates[LIMIT] = lambda: [loop.update() for _ in range(count) for loop in written]
    if name in LOSSES and seeds > 1:
        others = [make_agent(method, data, seed=seed, device=device, **options) for seed in range(seeds)]
        batch = SeedBatch([a for a in others if isinstance(a, GoalAgent)])
        rngs = [torch_generator(seed, "bench", "updates", "learn", device=device) for seed in range(seeds)]
        together = batch.learn(data, 10**9, rngs=rngs)
        updates[BATCHED] = lambda: [next(together) for _ in range(count)]
    return updates, config


def _per_call(options: Mapping[str, Any]) -> int:
    """Updates that are measured as one."""
    return max(1, options.get("updates_per_graph", 0))


def _measure(
    updates: Mapping[str, Update], rounds: int | None, clock: Callable[[], float], device: str, method: str,
    note: Callable[[str], None],
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds per call of each implementation in each round; the order differs from round to round."""
    calls: dict[str, int] = {}
    seconds = 0.0
    for name, update in updates.items():
        for _ in range(3):
            update()
        once = _seconds(update, 3, time.perf_counter, device)
        calls[name] = max(1, round(SHORT / once))
        seconds += once * calls[name]
    rounds = rounds or min(max(round(SECONDS / seconds), ROUNDS[0]), ROUNDS[1])
    note(f"{method}: {len(updates)} rows, {rounds} rounds of about {seconds:.1f} s")
    times: dict[str, list[float]] = {name: [] for name in updates}
    order, names = torch_generator(0, "bench", "order"), list(updates)
    for _ in range(rounds):
        for i in torch.randperm(len(names), generator=order).tolist():
            name = names[i]
            times[name].append(_seconds(updates[name], calls[name], clock, device))
    return times


def _seconds(update: Update, calls: int, clock: Callable[[], float], device: str) -> float:
    _wait(device)
    begin = clock()
    for _ in range(calls):
        update()
    _wait(device)
    return (clock() - begin) / calls


def _rows(
    times: Mapping[str, list[float]], method: str, count: int, config: Any, shape: tuple[int, int], seeds: int,
    device: str, clock: str,
) -> list[dict[str, Any]]:  # fmt: skip
    limit = times.get(LIMIT)
    return [
        {
            "name": f"{method} {name}",
            "device": device,
            "value": count * seeds / statistics.median(own),
            "unit": "updates/s",
            "ratio_to_limit": limit and statistics.median(b / a for a, b in zip(own, limit, strict=True)),
            "agent": method,
            "preset": getattr(config, "preset", None),
            "implementation": name,
            "obs": shape[0],
            "act": shape[1],
            "seeds": seeds,
            "memory_ratio": None,
            "updates_per_graph": config.updates_per_graph if name == OURS and count > 1 else 0,
            "batch_size": config.batch_size,
            "hidden": list(config.hidden) if hasattr(config, "hidden") else None,
            "threads": torch.get_num_threads(),
            "clock": clock,
            "rounds": len(own),
        }
        for name, own in times.items()
    ]
