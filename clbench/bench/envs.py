"""How fast Two-Rooms is: batched, in a Python loop over single environments, and in Gymnasium's ``AsyncVectorEnv``.

Each row is one measurement::

    {"name", "device", "value", "unit", "ratio_to_limit", "num_envs", "bytes"}

``value`` is environment steps (frames) per second. The limit is the memory: a step (frame) must at least be written, so
with a bandwidth of ``w`` bytes per second, measured by a large copy in the same process, ``w / bytes`` is the most.
``ratio_to_limit`` is that limit divided by ``value``: 1 is as fast as memory allows, 10 is ten times slower.

The single environments are the same code with one row each (:class:`TwoRoomsEnv`), so those rows measure mostly what a
call costs, not what the fastest scalar program could do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from clbench.envs.two_rooms import SIZE, TwoRoomsEnv, TwoRoomsVectorEnv
from clbench.errors import ConfigError

UNITS = {"state": "steps/s", "pixels": "frames/s"}
# what a step must write: the observation, the reward and the two flags
BYTES = {"state": 2 * 4 + 4 + 2, "pixels": 2 * SIZE * SIZE + 4 + 2}
COPY_BYTES = 256 * 2**20
FEW = 16  # environments in the loop; the rate does not depend on their number
WORKERS = 2  # processes of ``AsyncVectorEnv``, one environment in each


def bench_envs(num_envs: int = 4096, device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    """Measure Two-Rooms with state and pixel observations.

    Args:
        num_envs: rows of the batch.
        device: of the batch; the loop and the worker processes always run on the CPU.
        quick: short measurements, for tests; the numbers are rough.

    Returns:
        One dict per measurement, see the module.
    """
    if num_envs < 1:
        raise ConfigError(f"num_envs must be at least 1, got {num_envs}.")
    seconds = 0.05 if quick else 1.0
    limits = {where: _bandwidth(where, seconds, quick) for where in {"cpu", device}}
    rows = [_row("memory bandwidth (copy)", where, limit, "B/s", 1.0) for where, limit in sorted(limits.items())]
    for observation, unit in UNITS.items():
        for name, make, count, where in (
            ("batched", _batched, num_envs, device),
            ("Python loop over single environments", _loop, FEW, "cpu"),
            (f"AsyncVectorEnv, {WORKERS} workers", _workers, WORKERS, "cpu"),
        ):
            step, close = make(count, observation, where)
            try:
                rate = count / _seconds_per_call(step, where, seconds)
            finally:
                close()
            rows.append(
                _row(f"two-rooms {observation}, {name}", where, rate, unit, limits[where] / BYTES[observation] / rate,
                     num_envs=count, bytes=BYTES[observation])
            )  # fmt: skip
    return rows


def _row(name: str, device: str, value: float, unit: str, ratio: float, **extra: Any) -> dict[str, Any]:
    return {"name": name, "device": device, "value": value, "unit": unit, "ratio_to_limit": ratio, **extra}


def _seconds_per_call(function: Callable[[], Any], device: str, seconds: float, repeats: int = 5) -> float:
    """Median over ``repeats`` of the mean time of a call, after a warm-up; all of it takes about ``seconds``."""

    def timed(calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / calls

    timed(2)
    calls = max(1, round(seconds / repeats / timed(3)))
    return statistics.median(timed(calls) for _ in range(repeats))


def _bandwidth(device: str, seconds: float, quick: bool) -> float:
    """Bytes per second that a large copy writes."""
    source = torch.zeros(COPY_BYTES // 8 if quick else COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return source.numel() / _seconds_per_call(lambda: target.copy_(source), device, seconds)


def _actions(count: int, device: str = "cpu") -> torch.Tensor:
    """Uniform actions (64, count, 2), the same in every measurement."""
    rng = torch.Generator().manual_seed(0)
    return ((torch.rand(64, count, 2, generator=rng) * 2 - 1) * 1.8).to(device)


Measured = tuple[Callable[[], Any], Callable[[], Any]]  # one step of all environments; clean up


def _batched(count: int, observation: str, device: str) -> Measured:
    env = TwoRoomsVectorEnv(count, device, observation=observation)
    env.reset(seed=0)
    # ages are spread, as after a long run, so that rows end and are reset at every step
    state = env.state_dict()
    env.load_state_dict(state | {"steps": torch.arange(count, device=device) % 200})
    actions, tick = _actions(count, device), iter(range(2**62))
    return lambda: env.step(actions[next(tick) % 64]), env.close


def _loop(count: int, observation: str, device: str) -> Measured:
    envs = [TwoRoomsEnv(observation=observation, max_episode_steps=200) for _ in range(count)]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    actions, tick = _actions(count).numpy(), iter(range(2**62))

    def step() -> None:
        for env, action in zip(envs, actions[next(tick) % 64], strict=True):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()

    return step, lambda: None


class _Make:
    """Makes one environment in a worker process (a class, so that every start method can send it there)."""

    def __init__(self, observation: str):
        self.observation = observation

    def __call__(self) -> TwoRoomsEnv:
        torch.set_num_threads(1)  # the workers share the cores
        return TwoRoomsEnv(observation=self.observation, max_episode_steps=200)


def _workers(count: int, observation: str, device: str) -> Measured:
    from gymnasium.vector import AsyncVectorEnv

    env = AsyncVectorEnv([_Make(observation)] * count)
    env.reset(seed=0)
    actions, tick = _actions(count).numpy(), iter(range(2**62))
    return lambda: env.step(actions[next(tick) % 64]), env.close
