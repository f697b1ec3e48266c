"""Evaluation counts every listed episode exactly once, whatever the number of parallel environments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import toys

from clbench import Metric, Spaces, Task, TaskList, make_env
from clbench.errors import ContractError
from clbench.evaluate import Episodes, check_actions, evaluate

EPISODES = 96


def coin_task(**changes: Any) -> Task:
    return Task(
        **{"name": "coin", "env_id": "toys/SlowFailures-v0", "evaluation": TaskList.from_seeds(EPISODES), **changes}
    )


def agent_for(env: Any) -> toys.Walker:
    spaces = Spaces(env.single_observation_space, env.single_action_space)
    return toys.Walker(spaces, None, device=torch.device("cpu"), rng=torch.Generator())


def run(task: Task, num_envs: int, agent: Any = None, function: Any = evaluate) -> Episodes:
    env = make_env(task.env_id, num_envs, autoreset="disabled", **task.env_kwargs)
    return function(agent or agent_for(env), task, env, rng=torch.Generator().manual_seed(0))


def truth() -> np.ndarray:
    """Which episodes succeed, from the environment's own rule, without any loop of ours."""
    seeds = coin_task().evaluation.seeds
    return np.array([toys.gymnasium.utils.seeding.np_random(s)[0].random() < 0.5 for s in seeds], dtype=float)


def first_to_finish(agent: Any, task: Task, env: Any, *, rng: torch.Generator) -> Episodes:
    """The known mistake: start everything, reset rows as they finish, and count the first N episodes that end."""
    total, rows = len(task.evaluation), env.num_envs
    obs, _ = env.reset(seed=[task.evaluation.seeds[i % total] for i in range(rows)])
    scores: list[float] = []
    following = rows
    while len(scores) < total:
        actions, _ = agent.act(obs, None, torch.zeros(rows, dtype=torch.bool), rng=rng)
        obs, _, terminated, truncated, info = env.step(actions)
        done = terminated | truncated
        scores += info["is_success"][done].double().tolist()
        seeds = [task.evaluation.seeds[0]] * rows
        for row in done.nonzero().flatten().tolist():
            seeds[row] = task.evaluation.seeds[0] + following % 100_000
            following += 1
        if bool(done.any()):
            obs, _ = env.reset(seed=seeds, options={"reset_mask": done})
    score = torch.tensor(scores[:total], dtype=torch.float64)
    return Episodes(score, score, score.to(torch.int64), {})


@pytest.mark.parametrize("num_envs", [1, 8, 32, EPISODES, EPISODES + 5])
def test_every_episode_counts_once_for_any_number_of_environments(num_envs: int) -> None:
    result = run(coin_task(), num_envs)
    assert np.array_equal(result.score.numpy(), truth())
    assert torch.equal(result.length, torch.where(result.score == 1, 2, 20))
    assert torch.equal(result.returns, result.score)


def test_negative_control_counting_the_first_to_finish_is_caught() -> None:
    fair = run(coin_task(), 32).score.mean()
    biased = run(coin_task(), EPISODES, function=first_to_finish).score.mean()
    assert abs(float(fair) - truth().mean()) < 1e-12
    assert float(biased) > float(fair) + 0.2, "short episodes (the successes) finish first and are counted more often"


def test_success_is_the_tasks_own_not_terminated() -> None:
    result = run(coin_task(), 8)  # every episode ends with terminated=True
    assert 0.2 < float(result.score.mean()) < 0.8
    other_key = run(coin_task(env_kwargs={"name_of_success": "success"}), 8)
    assert torch.equal(other_key.score, result.score)
    with pytest.raises(ContractError, match=r"gives no info\['is_success'\].*metric='return'"):
        run(coin_task(env_kwargs={"name_of_success": "won"}), 8)


def test_returns_are_normalised_by_fixed_bounds() -> None:
    task = coin_task(metric=Metric("return", low=-1.0, high=3.0))
    assert torch.allclose(run(task, 8).score, (run(coin_task(), 8).returns + 1) / 4)


def test_success_at_any_step_or_at_the_end() -> None:
    """Success shows at step 1 only; the episode goes on to step 3."""

    class Blinks(toys.SlowFailures):
        def step(self, action: Any) -> Any:
            self.t += 1
            return self._obs(), 0.0, self.t == 3, False, {"is_success": self.t == 1}

    toys.gymnasium.register("toys/Blinks-v0", entry_point=Blinks)
    for when, expected in (("end", 0.0), ("ever", 1.0)):
        task = coin_task(env_id="toys/Blinks-v0", metric=Metric("success", when=when))  # type: ignore[arg-type]
        assert run(task, 8).score.unique().tolist() == [expected]


def test_first_and_memory_follow_the_rows() -> None:
    """An agent that counts its own steps must see one ``first`` per episode, on the row that begins it."""

    class Clock(toys.SlowFailures):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = toys.gymnasium.spaces.Box(0.0, 50.0, (1,), np.float32)

        def _obs(self) -> np.ndarray:
            return np.full(1, self.t, np.float32)

    toys.gymnasium.register("toys/Clock-v0", entry_point=Clock)

    class Counts(toys.Walker):
        def act(self, obs, memory, first, *, rng, task=None, explore=False):
            memory = torch.zeros(len(first)) if memory is None else memory
            memory = torch.where(first, 0.0, memory + 1)
            starts.append(int(first.sum()))
            if sum(starts) < EPISODES:  # (afterwards some rows idle)
                assert torch.equal(memory, obs[:, 0]), "memory ran on over the end of an episode"
            return super().act(obs, memory, first, rng=rng)[0], memory

    starts: list[int] = []
    env = make_env("toys/Clock-v0", 8, autoreset="disabled")
    spaces = Spaces(env.single_observation_space, env.single_action_space)
    run(coin_task(env_id="toys/Clock-v0"), 8, Counts(spaces, None, device=torch.device("cpu"), rng=torch.Generator()))
    assert sum(starts) == EPISODES


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([0, 1], "must return .* a torch tensor, got list"),
        (torch.zeros(2, 1, dtype=torch.int64), r"shape \(2, 1\), expected \(2,\)"),
        (torch.zeros(2), "float32 actions for Discrete"),
        (torch.tensor([0, 7]), r"outside 0\.\.1"),
    ],
)
def test_wrong_discrete_actions(actions: Any, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_actions(actions, toys.gymnasium.spaces.Discrete(2), 2, "A")


def test_boxes_are_clipped_and_checked() -> None:
    box = toys.gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    assert check_actions(torch.tensor([[3.0, -3.0]]), box, 1, "A").tolist() == [[1.0, -1.0]]
    with pytest.raises(ContractError, match="NaN or infinite"):
        check_actions(torch.tensor([[float("nan"), 0.0]]), box, 1, "A")
    with pytest.raises(ContractError, match="int64 actions for Box"):
        check_actions(torch.zeros(1, 2, dtype=torch.int64), box, 1, "A")


def test_an_episode_without_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(toys.SlowFailures):
        def step(self, action: Any) -> Any:
            return self._obs(), 0.0, False, False, {"is_success": False}

    toys.gymnasium.register("toys/Endless-v0", entry_point=Endless)
    monkeypatch.setattr("clbench.evaluate.MAX_EPISODE_STEPS", 30)
    with pytest.raises(ContractError, match="did not end within 30 steps.*max_episode_steps"):
        run(coin_task(env_id="toys/Endless-v0"), 4)
