"""Goals that the offline goal-conditioned agents draw: which rows, how far ahead, how often."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict

from clbench.agents.crl import CRL
from clbench.agents.gcbc import GCBC
from clbench.agents.gciql import GCIQL
from clbench.agents.gcivl import GCIVL
from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.agents.hilp import HILP
from clbench.agents.hiql import HIQL
from clbench.agents.qrl import QRL
from clbench.config import build
from clbench.contracts import Spaces
from clbench.data.dataset import OfflineDataset

T, EPISODES, DRAWS, MANY = 1000, 40, 200_000, 1_000_000
ROWS = T * EPISODES
STORED_LAST = -1.0  # what stands in the state after the last action of every episode
GAMMA = 0.99


def rows_as_states(lengths: list[int]) -> OfflineDataset:
    """Every state is the number of its row."""
    row = torch.arange(sum(lengths), dtype=torch.float32)[:, None]
    final = torch.full((len(lengths), 1), STORED_LAST)
    return OfflineDataset(
        {"observation": row, "achieved_goal": row},
        torch.zeros(len(row), 1),
        torch.tensor(lengths),
        {"observation": final, "achieved_goal": final},
    )


DATA = rows_as_states([T] * EPISODES)


def draw(cls: type[GoalAgent], data: OfflineDataset = DATA, draws: int = DRAWS, **options: Any) -> dict[str, Any]:
    """A large batch; every state and goal as the number of its row (int64)."""
    box = Box(-np.inf, np.inf, (1,), np.float32)
    spaces = Spaces(Dict({"observation": box, "achieved_goal": box, "desired_goal": box}), Box(-1, 1, (1,), np.float32))
    given = {"preset": "ogbench", "hidden": (4,), "batch_size": draws, "discount": GAMMA, **options}
    config = build(cls.Config, given, where="test")
    agent = cls(spaces, config, device=torch.device("cpu"), rng=torch.Generator().manual_seed(0))
    batch = agent.sample(data, torch.Generator().manual_seed(1))
    return rows_of(batch)


def rows_of(batch: GoalBatch) -> dict[str, Any]:
    def number(x: Any) -> torch.Tensor:
        return x.flat[:, 0].round().to(torch.int64)

    named = {k: number(v) for k, v in batch.more.items() if k != "skills"}
    return {
        "i": number(batch.s), "next": number(batch.s_next), "value": number(batch.g_v), "actor": number(batch.g_a),
        "at_goal": batch.at_goal, **named,
    }  # fmt: skip


def near(sample: torch.Tensor, expected: float, sigmas: float = 5.0) -> bool:
    """Whether the mean of a sample is where it should be, by its own standard error."""
    x = sample.to(torch.float64)
    return abs(float(x.mean()) - expected) <= sigmas * max(float(x.std()), 1e-3) / math.sqrt(len(x))


ALL = [GCBC, GCIVL, GCIQL, QRL, CRL, HIQL, HILP]
MEAN_GEOMETRIC = 100 * (1 - (1 - GAMMA**T) / (T * (1 - GAMMA)))  # mean over r = 0..999 of sum_{j < r} gamma^j
MEAN_UNIFORM = sum((1 + r) / 2 for r in range(1, T)) / T


def test_the_closed_forms_are_those_of_the_specification() -> None:
    assert (round(MEAN_GEOMETRIC, 1), round(MEAN_UNIFORM, 1)) == (90.0, 250.2)


@pytest.mark.parametrize("cls", ALL)
def test_goals_are_rows_with_an_action(cls: type[GoalAgent]) -> None:
    rows = draw(cls)
    for name in rows.keys() - {"at_goal", "next"}:
        assert int(rows[name].min()) >= 0  # never the state after the last action
        assert int(rows[name].max()) < ROWS
    assert torch.equal(rows["at_goal"].bool(), rows["i"] == rows["value"])
    last = rows["i"] % T == T - 1
    following = torch.where(last, int(STORED_LAST), rows["i"] + 1)
    assert bool((rows["next"] == (following if cls.looks_ahead else rows["i"])).all())
    assert near(rows["i"], (ROWS - 1) / 2)


@pytest.mark.parametrize("cls", [GCIVL, GCIQL, HIQL])
def test_success_rate_of_the_mixture(cls: type[GoalAgent]) -> None:
    assert near(draw(cls)["at_goal"], 0.2 + 0.5 / T + 0.3 / ROWS)


@pytest.mark.parametrize(("cls", "expected"), [
    (GCBC, (0.0, 1.0)), (GCIVL, (0.2, 0.5)), (GCIQL, (0.2, 0.5)), (QRL, (0.0, 0.0)), (CRL, (0.0, 1.0)),
    (HIQL, (0.2, 0.5)), (HILP, (0.0, 0.625)),
])  # fmt: skip
def test_shares_of_the_value_goals(cls: type[GoalAgent], expected: tuple[float, float]) -> None:
    """Of each agent's defaults: the state itself, a later row of the episode, any row."""
    current, trajectory = expected
    rows = draw(cls)
    own = rows["value"] // T == rows["i"] // T
    anywhere = 1 - current - trajectory
    assert near(own, current + trajectory + anywhere / EPISODES)
    assert near(rows["value"] == rows["i"], current + trajectory / T + anywhere / ROWS)


@pytest.mark.parametrize("cls", [GCIVL, CRL, HIQL, HILP])
def test_geometric_distances_of_value_goals(cls: type[GoalAgent]) -> None:
    rows = draw(cls, draws=MANY, value_p_current=0.0, value_p_trajectory=1.0, value_p_random=0.0)
    ahead = rows["value"] - rows["i"]
    assert near(ahead, MEAN_GEOMETRIC)
    assert near(ahead == 0, 1 / T)
    inner = ahead[rows["i"] % T < T // 2]
    assert near(inner == 1, 1 - GAMMA)  # k = 1 is the nearest
    assert near(inner == 2, (1 - GAMMA) * GAMMA)
    assert bool((rows["value"] // T == rows["i"] // T).all())
    assert not near(ahead, MEAN_GEOMETRIC + 1)  # the check is sharp enough for a distance that begins at 0 or 2
    assert not near(ahead, MEAN_GEOMETRIC - 1)


@pytest.mark.parametrize("cls", [GCBC, GCIVL, GCIQL, QRL, CRL, HIQL])
def test_uniform_distances_of_actor_goals(cls: type[GoalAgent]) -> None:
    rows = draw(cls)
    ahead = rows["actor"] - rows["i"]
    assert near(ahead, MEAN_UNIFORM)
    assert near(ahead == 0, 1 / T)
    assert bool((rows["actor"] // T == rows["i"] // T).all())
    assert int((rows["actor"] % T).max()) == T - 1
    early = ahead[rows["i"] % T == 0]
    assert int(early.min()) >= 1
    assert near(ahead == 1, sum(0.5 / (r - 1) if r > 1 else 1.0 for r in range(1, T)) / T)  # ends count half


@pytest.mark.parametrize("cls", [GCIVL, GCIQL, CRL])
def test_value_and_actor_goals_are_independent(cls: type[GoalAgent]) -> None:
    both: dict[str, Any] = {"value_p_current": 0.0, "value_p_trajectory": 0.0, "value_p_random": 1.0}
    rows = draw(cls, actor_p_trajectory=0.0, actor_p_random=1.0, **both)

    def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([x, y]).to(torch.float64))[0, 1])

    limit = 5 / math.sqrt(DRAWS)
    assert abs(correlation(rows["value"], rows["actor"])) < limit
    assert abs(correlation(rows["i"], rows["actor"])) < limit
    assert abs(correlation(rows["i"], rows["value"])) < limit
    assert correlation(rows["value"], rows["value"]) > limit


@pytest.mark.parametrize("cls", ALL)
def test_episodes_of_other_lengths(cls: type[GoalAgent]) -> None:
    """Of a single row, too: its only later row is itself."""
    lengths = [1, 7, 2, 30, 1]
    data = rows_as_states(lengths)
    rows = draw(cls, data, 5000, value_p_current=0.0, value_p_trajectory=1.0, value_p_random=0.0)
    episode, final = data.episode, data.final
    for name in {"value", "actor", "low_actor_goals", "high_actor_targets"} & rows.keys():
        i, goal = rows["i"], rows[name]
        assert torch.equal(episode[goal], episode[i])
        assert bool((goal >= torch.minimum(i + 1, final[i])).all())
        assert bool((goal == i).eq(i == final[i]).all())


# -- HIQL ----------------------------------------------------------------------------------------------------------------


def mean_high_offset(k: int) -> float:
    """Of ``min(k, distance of the goal)``, goals uniform over the rest of the trajectory with halved ends."""
    total = 0.0
    for r in range(1, T):
        if r == 1:
            total += 1
            continue
        weight = torch.full((r,), 1.0 / (r - 1), dtype=torch.float64)
        weight[0] = weight[-1] = 0.5 / (r - 1)
        total += float((weight * torch.arange(1, r + 1).clamp(max=k)).sum())
    return total / T


def test_subgoals_of_hiql() -> None:
    mean_low = (sum(range(25)) + 25 * (T - 25)) / T
    mean_high = mean_high_offset(25)
    # the specification's figures; the second was measured with half of the goals drawn from anywhere
    assert (mean_low, (mean_low + mean_high) / 2) == pytest.approx((24.68, 24.07), abs=0.01)
    for p_random in (0.0, 0.5):
        rows = draw(HIQL, actor_p_trajectory=1 - p_random, actor_p_random=p_random)
        low, high = rows["low_actor_goals"] - rows["i"], rows["high_actor_targets"] - rows["i"]
        assert near(low, mean_low)
        assert near(high, p_random * mean_low + (1 - p_random) * mean_high)
        assert not near(high, mean_low)  # targets stop at the goal
        assert torch.equal(rows["low_actor_goals"], torch.minimum(rows["i"] + 25, DATA.final[rows["i"]]))
        if not p_random:
            assert bool((rows["high_actor_targets"] <= rows["actor"]).all())


def test_subgoals_of_hiql_with_goals_of_anywhere() -> None:
    """A target for a goal of another episode is k steps ahead, or the end."""
    rows = draw(HIQL, actor_p_trajectory=0.5, actor_p_random=0.5)
    away = rows["actor"] // T != rows["i"] // T
    assert near(away, 0.5 * (1 - 1 / EPISODES))
    assert torch.equal(rows["high_actor_targets"][away], rows["low_actor_goals"][away])
    assert bool((rows["high_actor_targets"] // T == rows["i"] // T).all())


@pytest.mark.parametrize("k", [1, 10, 2000])
def test_subgoals_any_number_of_steps_ahead(k: int) -> None:
    rows = draw(HIQL, draws=20_000, subgoal_steps=k)
    assert torch.equal(rows["low_actor_goals"], torch.minimum(rows["i"] + k, DATA.final[rows["i"]]))
    assert bool((rows["high_actor_targets"] - rows["i"] <= k).all())


# -- HILP ----------------------------------------------------------------------------------------------------------------


def test_skills_of_hilp_are_uniform_on_the_sphere_and_fresh() -> None:
    box = Box(-np.inf, np.inf, (1,), np.float32)
    spaces = Spaces(Dict({"observation": box, "achieved_goal": box, "desired_goal": box}), Box(-1, 1, (1,), np.float32))
    config = build(HILP.Config, {"preset": "ogbench", "hidden": (4,), "batch_size": 50_000}, where="test")
    agent = HILP(spaces, config, device=torch.device("cpu"), rng=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    first, second = (agent.sample(DATA, rng).more["skills"].flat for _ in range(2))
    assert first is not None and second is not None
    assert first.shape == (50_000, 32)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50_000))
    assert all(near(first[:, d], 0.0) and near(first[:, d] ** 2, 1 / 32) for d in range(32))
    assert not torch.equal(first, second)
    assert not near(first[:, 0] ** 2, 1 / 31)


# -- negative controls: samplers with a mistake ---------------------------------------------------------------------------


class LastStored(OfflineDataset):
    """Goals one row too far: beyond the last row with an action."""

    def sample_goals(self, index: Any, sampling: Any, rng: Any) -> torch.Tensor:
        return torch.minimum(super().sample_goals(index, sampling, rng) + 1, torch.tensor(ROWS - 1))


class OneGoalForBoth(OfflineDataset):
    """The same draw for the value and for the actor."""

    def sample_goals(self, index: Any, sampling: Any, rng: Any) -> torch.Tensor:
        return super().sample_goals(index, sampling, torch.Generator().manual_seed(7))


def spoiled(cls: type[OfflineDataset]) -> OfflineDataset:
    return cls(DATA.observations, DATA.actions, DATA.lengths, DATA.final_observations)


def test_a_sampler_that_is_one_row_off_is_caught() -> None:
    options: dict[str, Any] = {"value_p_current": 0.0, "value_p_trajectory": 1.0, "value_p_random": 0.0}
    rows = draw(GCIVL, spoiled(LastStored), MANY, **options)
    assert not near(rows["value"] - rows["i"], MEAN_GEOMETRIC)
    assert not near(rows["actor"] - rows["i"], MEAN_UNIFORM, 3.0)
    assert not bool((rows["value"] // T == rows["i"] // T).all())


def test_one_draw_for_both_goals_is_caught() -> None:
    both: dict[str, Any] = {"value_p_current": 0.0, "value_p_trajectory": 0.0, "value_p_random": 1.0}
    rows = draw(GCIVL, spoiled(OneGoalForBoth), actor_p_trajectory=0.0, actor_p_random=1.0, **both)
    assert torch.equal(rows["value"], rows["actor"])
