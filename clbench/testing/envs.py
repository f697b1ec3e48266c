"""Conformance checks for batched environments: :func:`check_env` and the list of checks it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor

from clbench.contracts import TaskList, VectorEnv
from clbench.envs.make import make_env
from clbench.errors import ClbenchError
from clbench.rng import get_global_state, sealed_global_rng, seed_global
from clbench.testing.core import (
    Checks,
    Failed,
    NotApplicable,
    Report,
    clone,
    difference,
    row,
    run_checks,
    state_problem,
)

ENV_CHECKS: Checks = Checks()
SPACES = "it has spaces, a size, a device and an autoreset mode"
RESETS = "reset gives observations inside the space"
STEPS = "step gives five answers of the right shapes and types"
SAME_STEP = "finished rows are reset inside the step"
REPEATS = "the same seeds and actions give the same episodes"


def check_env(
    env: str | Callable[..., VectorEnv],
    *,
    steps: int = 24,
    success: bool | None = None,
    evaluation: TaskList | None = None,
    **kwargs: Any,
) -> Report:
    """Run every environment check on ``env``.

    Args:
        env: an environment id, ``"module:Class"``, or a batched class (``num_envs``, ``device``, ``autoreset``).
        steps: how many steps each check takes.
        success: whether ``info["is_success"]`` must be there (a task's metric needs it); ``None`` checks it where it is.
        evaluation: an evaluation list whose reset options must be accepted.
        kwargs: of the environment.
    """

    def make(num_envs: int, autoreset: str = "same_step") -> VectorEnv:
        if isinstance(env, str):
            return make_env(env, num_envs, "cpu", autoreset=autoreset, **kwargs)
        return env(num_envs=num_envs, device="cpu", autoreset=autoreset, **kwargs)

    report = Report(env if isinstance(env, str) else f"{env.__module__}:{getattr(env, '__qualname__', env)}")
    with sealed_global_rng():
        case = Case(make, steps, success, evaluation)
        report.results += run_checks(ENV_CHECKS, case, "", case.plugin if isinstance(env, str) else env)
    return report


@dataclasses.dataclass
class Step:
    """What one step returned, and the actions that led to it."""

    actions: Tensor
    obs: Any
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    info: dict[str, Any]

    @property
    def done(self) -> Tensor:
        return self.terminated | self.truncated


@dataclasses.dataclass
class Case:
    """One environment; makes batches and rolls them out."""

    make: Callable[..., VectorEnv]
    steps: int
    success: bool | None
    evaluation: TaskList | None

    @property
    def plugin(self) -> Any:
        """The class behind an id, for messages (a string if it cannot even be made)."""
        try:
            return type(self.make(1))
        except Exception:  # noqa: BLE001 (the first check reports it)
            return "the environment"

    def actions(self, env: VectorEnv, seeds: Sequence[int], step: int) -> Tensor:
        """Random actions (B, ...) that depend for each row only on its entry of ``seeds`` and on ``step``."""
        space = env.single_action_space
        rows = []
        for seed in seeds:
            rng = np.random.default_rng([seed, step])
            if isinstance(space, gymnasium.spaces.Discrete):
                rows.append(torch.tensor(int(space.start + rng.integers(space.n))))
            else:
                low, high = (np.clip(b, -1e3, 1e3) for b in (space.low, space.high))  # type: ignore[attr-defined]
                rows.append(torch.from_numpy(rng.uniform(low, high).astype(np.float32)))
        return torch.stack(rows).to(env.device)

    def rollout(
        self, env: VectorEnv, seeds: Sequence[int], first: int = 0, last: int | None = None, keep: bool = True
    ) -> list[Step]:
        """Steps ``first`` to ``last`` with :meth:`actions` on an environment that has been reset."""
        record = []
        for t in range(first, self.steps if last is None else last):
            actions = self.actions(env, seeds, t)
            answer: Any = env.step(actions)
            if not (isinstance(answer, tuple) and len(answer) == 5):
                raise Failed("step must return (observation, reward, terminated, truncated, info).")
            values: Any = clone(answer) if keep else answer
            record.append(Step(actions, *values))
        return record

    def fresh(self, seeds: Sequence[int], autoreset: str = "same_step") -> tuple[VectorEnv, Any, dict]:
        """A new batch with one seed per row, its first observation and info."""
        env = self.make(len(seeds), autoreset)
        obs, info = env.reset(seed=list(seeds))
        return env, clone(obs), info


def _rows(obs: Any) -> int:
    return len(next(iter(obs.values())) if isinstance(obs, Mapping) else obs)


def check_observation(obs: Any, space: gymnasium.Space, batch: int, device: torch.device, where: str) -> None:
    """Raise :class:`Failed` unless ``obs`` is a batch of members of ``space`` on ``device``."""
    if isinstance(space, gymnasium.spaces.Dict):
        if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
            keys = sorted(obs) if isinstance(obs, Mapping) else type(obs).__name__
            raise Failed(
                f"{where} is {keys}, expected a dict with the keys {sorted(space.spaces)} of the observation space."
            )
        for key, part in space.spaces.items():
            check_observation(obs[key], part, batch, device, f"{where}[{key!r}]")
        return
    if not isinstance(obs, Tensor):
        raise Failed(f"{where} is a {type(obs).__name__}; return torch tensors on the environment's device.")
    if tuple(obs.shape) != (batch, *(space.shape or ())):
        raise Failed(
            f"{where} has shape {tuple(obs.shape)}, expected {(batch, *(space.shape or ()))}: one row per environment."
        )
    wanted = torch.from_numpy(np.zeros(1, space.dtype)).dtype
    if obs.dtype != wanted:
        raise Failed(f"{where} has dtype {obs.dtype}, but its space says {space.dtype}; change one of them.")
    if obs.device.type != torch.device(device).type:
        raise Failed(f"{where} is on {obs.device}, expected {device}.")
    if not batch_space(space, batch).contains(obs.detach().cpu().numpy()):
        low, high = obs.min().item(), obs.max().item()
        raise Failed(
            f"{where} has values in [{low:.4g}, {high:.4g}], outside its space {space}; widen the space or clamp."
        )


@ENV_CHECKS.add(SPACES)
def _spaces(case: Case) -> str | None:
    for batch in (1, 3):
        env = case.make(batch)
        missing = [
            n for n in ("reset", "step", "render", "state_dict", "load_state_dict", "close") if not hasattr(env, n)
        ]
        if missing:
            raise Failed(
                f"{type(env).__name__} has no {', '.join(missing)}; see clbench.VectorEnv for what each must do."
            )
        for name in ("single_observation_space", "single_action_space"):
            if not isinstance(getattr(env, name, None), gymnasium.Space):
                raise Failed(
                    f"{type(env).__name__}.{name} is {getattr(env, name, None)!r}; set it to a Gymnasium space."
                )
        if not isinstance(env.single_action_space, gymnasium.spaces.Discrete | gymnasium.spaces.Box):
            raise Failed(f"the action space is {env.single_action_space}; only Discrete and Box are supported.")
        for name, wanted in (("num_envs", batch), ("autoreset", "same_step")):
            if getattr(env, name, None) != wanted:
                raise Failed(
                    f"{type(env).__name__}.{name} is {getattr(env, name, None)!r}, expected {wanted!r}; set it "
                    "in __init__."
                )
        for name in ("device", "max_episode_steps"):
            if not hasattr(env, name):
                raise Failed(f"{type(env).__name__} has no attribute {name!r}; set it in __init__.")
        env.close()
    return None


@ENV_CHECKS.add(RESETS, needs=SPACES)
def _resets(case: Case) -> str | None:
    for batch in (1, 3):
        env = case.make(batch)
        for seed in (5, list(range(batch)), None):
            answer = env.reset(seed=seed)
            if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
                raise Failed("reset must return (observation, info), info a dict.")
            check_observation(answer[0], env.single_observation_space, batch, env.device, "the observation of reset")
    return None


@ENV_CHECKS.add(STEPS, needs=RESETS)
def _steps(case: Case) -> str | None:
    for seeds in ([3], [3, 4, 5]):
        env, batch = case.fresh(seeds)[0], len(seeds)
        for s in case.rollout(env, seeds):
            check_observation(s.obs, env.single_observation_space, batch, env.device, "the observation of step")
            for name, value, dtype in (
                ("reward", s.reward, torch.float32),
                ("terminated", s.terminated, torch.bool),
                ("truncated", s.truncated, torch.bool),
            ):
                _column(name, value, dtype, batch)
            if not bool(torch.isfinite(s.reward).all()):
                raise Failed(f"reward is {s.reward.tolist()}; rewards must be finite.")
            if not isinstance(s.info, dict):
                raise Failed(f"info is a {type(s.info).__name__}; return a dict of columns.")
    return None


def _column(name: str, value: Any, dtype: torch.dtype, batch: int) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != (batch,) or value.dtype != dtype:
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise Failed(f"{name} is {got}, expected a tensor ({batch},) {dtype}: one entry per environment.")


@ENV_CHECKS.add("info['is_success'] is a boolean per row", needs=STEPS)
def _success(case: Case) -> str | None:
    for s in case.rollout(case.fresh([3, 4, 5])[0], [3, 4, 5]):
        if "is_success" in s.info:
            _column("info['is_success']", s.info["is_success"], torch.bool, 3)
        elif case.success:
            raise Failed(
                "info has no 'is_success', but the task is measured by success; add a (B,) bool tensor to every step."
            )
        else:
            raise NotApplicable("the environment does not define success")
    return None


@ENV_CHECKS.add("episodes end by max_episode_steps", needs=STEPS)
def _truncation(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env = case.fresh(seeds)[0]
    limit = env.max_episode_steps
    if limit is None:
        raise NotApplicable("the environment has no limit of steps")
    if limit > 1000:
        raise NotApplicable(f"the limit of {limit} steps takes too long to reach here")
    length = torch.zeros(3, dtype=torch.int64)
    for s in case.rollout(env, seeds, last=min(4 * limit, limit + 200) + 1):
        length += 1
        if bool((length > limit).any()):
            raise Failed(
                f"an episode went on after max_episode_steps={limit} steps; set truncated for rows that reach it."
            )
        early = s.truncated.cpu() & (length < limit)
        if bool(early.any()):
            raise Failed(
                f"an episode was truncated after {int(length[early][0])} of {limit} steps; end it by terminated if the "
                "task is over, and truncate only at max_episode_steps."
            )
        length[s.done.cpu()] = 0
    return None


@ENV_CHECKS.add(SAME_STEP, needs=STEPS)
def _same_step(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env, twin = case.fresh(seeds)[0], case.fresh(seeds, "disabled")[0]
    running = torch.ones(
        3, dtype=torch.bool, device=env.device
    )  # rows in their first episode, comparable with the twin
    for t in range(min(env.max_episode_steps or 200, 1000) + 1):
        auto, plain = (case.rollout(e, seeds, t, t + 1)[0] for e in (env, twin))
        final, valid = auto.info.get("final_obs"), auto.info.get("_final_obs")
        if final is None or valid is None:
            raise Failed(
                "info has no 'final_obs' and '_final_obs' in autoreset mode 'same_step'; add both to every step."
            )
        _column("info['_final_obs']", valid, torch.bool, 3)
        if not torch.equal(valid, auto.done):
            raise Failed(
                f"info['_final_obs'] is {valid.tolist()}, but the finished rows are {auto.done.tolist()}; "
                "they must agree."
            )
        check_observation(final, env.single_observation_space, 3, env.device, "info['final_obs']")
        ended = auto.done & running
        _ended(auto, plain, final, ended)
        running &= ~ended
        if not bool(running.any()):
            return _started(case, env, auto)
    if bool(running.all()):
        raise NotApplicable("no episode ended")
    return None


def _ended(auto: Step, plain: Step, final: Any, ended: Tensor) -> None:
    """Compare rows whose first episode ends in this step with the same rows of an environment without autoreset."""
    if difference(_masked(final, ended), _masked(plain.obs, ended)):
        raise Failed(
            "info['final_obs'] of a finished row is not the last observation of its episode; take it before the reset."
        )
    if "is_success" in auto.info and difference(auto.info["is_success"][ended], plain.info["is_success"][ended]):
        raise Failed("info['is_success'] of a finished row speaks of the new episode; compute it before the reset.")


def _started(case: Case, env: VectorEnv, step: Step) -> str | None:
    """After an autoreset, the row must run a whole new episode."""
    limit = env.max_episode_steps
    if limit is None or limit < 2:
        return None
    again = case.rollout(env, [13, 14, 15], 0, 1)[0]
    if bool((again.truncated & step.done).any()):
        raise Failed(
            "a row was truncated again right after its reset; the step counter must start anew with each episode."
        )
    return None


def _masked(obs: Any, mask: Tensor) -> Any:
    return {k: v[mask] for k, v in obs.items()} if isinstance(obs, Mapping) else obs[mask]


@ENV_CHECKS.add("reset_mask resets only the masked rows", needs=STEPS)
def _reset_mask(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env = case.fresh(seeds, "disabled")[0]
    steps = case.rollout(env, seeds, 0, 1)
    mask = torch.tensor([False, True, False], device=env.device)
    obs, _ = env.reset(seed=[103, 104, 105], options={"reset_mask": mask})
    check_observation(obs, env.single_observation_space, 3, env.device, "the observation of reset(reset_mask)")
    if difference(_masked(steps[-1].obs, ~mask), _masked(obs, ~mask)):
        raise Failed(
            "reset(options={'reset_mask': mask}) changed rows outside the mask; leave them, and return their "
            "observations as they are."
        )
    fresh = case.fresh([104])[1]
    if difference(_masked(obs, mask), fresh):
        raise Failed("a row reset by mask with its own seed does not begin that seed's episode; use seed[i] for row i.")
    alone = case.fresh([104], "disabled")[0]
    after, expected = case.rollout(env, [3, 104, 5], 1, 2)[0], case.rollout(alone, [104], 1, 2)[0]
    if difference(row(after.obs, 1), expected.obs):
        raise Failed(
            "a row that was reset by mask goes on differently than a new episode; reset its step counter and "
            "all its state."
        )
    return None


@ENV_CHECKS.add("an episode is a function of its seed alone", needs=STEPS)
def _function_of_seed(case: Case) -> str | None:
    seeds, other = [11, 12, 13], [99, 13, 11, 12]
    env, obs, _ = case.fresh(seeds, "disabled")
    twin, obs2, _ = case.fresh(other, "disabled")
    alive = torch.ones(3, dtype=torch.bool)
    for t in range(case.steps + 1):
        for i, seed in enumerate(seeds):
            j = other.index(seed)
            changed = alive[i] and difference(row(obs, i), row(obs2, j))
            if changed:
                raise Failed(
                    f"the episode of seed {seed} differs after {t} steps between row {i} of 3 and row {j} of 4; "
                    "derive all randomness of a row from seed[row] (for example clbench.rng.hash_uniform)."
                )
        a, b = case.rollout(env, seeds, t, t + 1)[0], case.rollout(twin, other, t, t + 1)[0]
        obs, obs2 = a.obs, b.obs
        alive &= ~a.done.cpu()
    starts = [clone(case.fresh([seed])[1]) for seed in range(20, 36)]
    if not any(difference(starts[0], s) for s in starts[1:]):
        return "all seeds give the same first observation"
    return None


@ENV_CHECKS.add(REPEATS, needs=STEPS)
def _repeats(case: Case) -> str | None:
    for seed in (7, [3, 4, 5]):
        records = []
        for _ in range(2):
            env = case.make(3)
            obs, _ = env.reset(seed=seed)
            records.append([clone(obs), *(dataclasses.astuple(s) for s in case.rollout(env, [3, 4, 5]))])
        changed = difference(records[0], records[1])
        if changed:
            raise Failed(
                "two batches with the same seeds and actions differ; draw all randomness from the seed of reset."
            )
    return None


@ENV_CHECKS.add("it uses no process-wide random numbers", needs=REPEATS)
def _global(case: Case) -> str | None:
    records = []
    for seed in (1, 2):
        seed_global(seed)
        before = get_global_state()
        env, obs, _ = case.fresh([3, 4, 5])
        records.append([obs, *(dataclasses.astuple(s) for s in case.rollout(env, [3, 4, 5]))])
        changed = difference(before, get_global_state())
        if changed:
            raise Failed(
                f"the environment used the process-wide generator of {changed.split(chr(39))[1]}; draw from the "
                "seed of reset."
            )
    if difference(records[0], records[1]):
        raise Failed("episodes depend on the process-wide seed; draw from the seed of reset.")
    return None


@ENV_CHECKS.add("state_dict continues bit for bit in the middle of episodes", needs=REPEATS)
def _state(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env = case.fresh(seeds)[0]
    half = max(1, case.steps // 3)
    case.rollout(env, seeds, 0, half)
    live = env.state_dict()
    bad = state_problem(live, "state_dict()")
    if bad:
        raise Failed(bad)
    saved = clone(live)
    expected = case.rollout(env, seeds, half)
    changed = difference(saved, live, "state_dict()")
    if changed:
        raise Failed(
            f"a state taken earlier changed while the environment went on ({changed}); copy tensors in "
            "state_dict (.clone())."
        )
    other = case.make(3)
    other.reset(seed=77)
    given = clone(saved)
    other.load_state_dict(given)
    got = case.rollout(other, seeds, half)
    changed = difference([dataclasses.astuple(s) for s in expected], [dataclasses.astuple(s) for s in got])
    if changed:
        raise Failed(
            f"saved after {half} steps and loaded into a new batch, the episodes go on differently; save every "
            "tensor that step reads (positions, step counters, seeds, numbers of episodes)."
        )
    changed = difference(saved, given, "state")
    if changed:
        raise Failed(
            f"stepping after load_state_dict(state) changed the given {changed}; copy what you keep (.clone())."
        )
    return None


@ENV_CHECKS.add("step does not change its actions", needs=STEPS)
def _actions(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env = case.fresh(seeds)[0]
    for t in range(4):
        actions = case.actions(env, seeds, t)
        before = actions.clone()
        env.step(actions)
        if difference(before, actions):
            raise Failed("step changed the actions that it was given; work on a copy.")
    return None


@ENV_CHECKS.add("what a step returned does not change later", needs=STEPS)
def _aliasing(case: Case) -> str | None:
    seeds = [3, 4, 5]
    env = case.make(3)
    first = env.reset(seed=seeds)[0]
    kept, copies = [first], [clone(first)]
    for s in case.rollout(env, seeds, keep=False):
        kept.append((s.obs, s.reward, s.terminated, s.truncated, dict(s.info)))
        copies.append(clone(kept[-1]))
    changed = difference(copies, kept)
    if changed:
        raise Failed(
            "a later step changed a tensor that an earlier one returned; return new tensors (or clones of buffers)."
        )
    return None


@ENV_CHECKS.add("the evaluation list can be played", needs=STEPS)
def _evaluation(case: Case) -> str | None:
    if case.evaluation is None:
        raise NotApplicable("no evaluation list was given")
    tasks = case.evaluation.head(3)
    n = len(tasks)
    env = case.make(n, "disabled")
    obs, _ = env.reset(seed=list(tasks.seeds), options=dict(tasks.options))
    check_observation(
        obs, env.single_observation_space, n, env.device, "the first observation of an evaluation episode"
    )
    case.rollout(env, list(tasks.seeds), 0, 1)
    return None


@ENV_CHECKS.add("render gives pictures of all rows", needs=STEPS)
def _render(case: Case) -> str | None:
    env = case.fresh([3, 4, 5])[0]
    try:
        frames = env.render()
    except (NotImplementedError, ClbenchError) as error:
        if not str(error):
            raise Failed(
                "render raised NotImplementedError without a message; say what the user should do instead."
            ) from error
        raise NotApplicable(f"render says: {error}") from error
    if frames is None:
        raise Failed("render returned None; return a (B, H, W, 3) uint8 array or raise an error that says what to do.")
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != 3 or frames.shape[-1] != 3:
        raise Failed(f"render returned {frames.shape} {frames.dtype}, expected (3, H, W, 3) uint8.")
    return None
