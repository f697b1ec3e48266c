"""The goal sampler of offline goal-conditioned RL against its specification.

Exact probabilities are written down here from the specification and compared with draws by chi-square; the same test must
reject samplers with the mistakes that are easy to make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clbench.data.dataset import GoalSampling, OfflineDataset
from clbench.rng import torch_generator

Sampler = Callable[[OfflineDataset, torch.Tensor, GoalSampling, torch.Generator], torch.Tensor]

MIXED = GoalSampling(0.2, 0.5, 0.3, geometric=True)  # the defaults of GCIVL
SAMPLINGS = {
    "geometric": GoalSampling(geometric=True, discount=0.7),
    "uniform": GoalSampling(),
    "mixed-geometric": GoalSampling(0.2, 0.5, 0.3, geometric=True, discount=0.7),
    "mixed-uniform": GoalSampling(0.1, 0.6, 0.3),
    "current": GoalSampling(1.0, 0.0, 0.0),
    "random": GoalSampling(0.0, 0.0, 1.0),
    "next": GoalSampling(geometric=True, discount=0.0),
}


def data_of(lengths: Sequence[int]) -> OfflineDataset:
    rows = torch.arange(float(sum(lengths)))[:, None]
    return OfflineDataset(
        {"observation": rows, "achieved_goal": rows}, torch.zeros(len(rows), 1), torch.tensor(list(lengths))
    )


def sample(data: OfflineDataset, index: torch.Tensor, how: GoalSampling, rng: torch.Generator) -> torch.Tensor:
    return data.sample_goals(index, how, rng)


def exact(lengths: Sequence[int], how: GoalSampling) -> np.ndarray:
    """P(goal row | state row), (N, N), from the specification."""
    n = sum(lengths)
    ends = np.repeat(np.cumsum(lengths) - 1, lengths)
    trajectory = np.zeros((n, n))
    for i, final in enumerate(ends):
        if i == final:
            trajectory[i, i] = 1
        elif how.geometric:
            for k in range(1, final - i):
                trajectory[i, i + k] = (1 - how.discount) * how.discount ** (k - 1)
            trajectory[i, final] = how.discount ** (final - i - 1)
        elif i + 1 == final:
            trajectory[i, final] = 1
        else:  # rounding gives both ends half the share of what lies between them
            trajectory[i, i + 1 : final + 1] = 1 / (final - i - 1)
            trajectory[i, [i + 1, final]] /= 2
    return how.p_current * np.eye(n) + how.p_trajectory * trajectory + how.p_random / n


def p_value(sampler: Sampler, how: GoalSampling, lengths: Sequence[int] = (1, 2, 5, 3), draws: int = 20_000) -> float:
    """Chi-square of the goals drawn for every state row; 0 where an impossible goal was drawn."""
    data, probability = data_of(lengths), exact(lengths, how)
    n = len(data)
    index = torch.arange(n).repeat(draws)
    goals = sampler(data, index, how, torch_generator(0, "goals"))
    if int(goals.min()) < 0 or int(goals.max()) >= n:
        return 0.0
    counts = torch.bincount(index * n + goals, minlength=n * n).reshape(n, n).numpy()
    possible = probability > 0
    if counts[~possible].any():
        return 0.0
    expected = probability[possible] * draws
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    freedom = int(possible.sum()) - n
    return float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0


@pytest.mark.parametrize("how", SAMPLINGS.values(), ids=SAMPLINGS)
def test_goals_have_the_specified_distribution(how: GoalSampling) -> None:
    assert np.allclose(exact((1, 2, 5, 3), how).sum(1), 1)
    assert p_value(sample, how) > 1e-3


def broken(mistake: str) -> Sampler:
    """The sampler written again, with one mistake (none for the empty name)."""

    def draw(data: OfflineDataset, index: torch.Tensor, how: GoalSampling, rng: torch.Generator) -> torch.Tensor:
        n, size = len(data), index.shape
        final = data.final[index]
        if mistake == "last stored state":
            final = final + 1
        u, *coins = torch.rand(3, *size, generator=rng, dtype=torch.float64)
        if how.geometric:
            k = torch.floor(torch.log1p(-u) / np.log(how.discount)).long() + (mistake != "geometric from zero")
            if mistake == "discount of the complement":
                k = torch.floor(torch.log1p(-u) / np.log(1 - how.discount)).long() + 1
            trajectory = torch.minimum(index + k, final)
            if mistake == "wraps at the end":
                trajectory = torch.where(index + k > final, index, index + k)
        else:
            low = index if mistake == "uniform with the state" else torch.minimum(index + 1, final)
            place = low * u + final * (1 - u)
            trajectory = (place.floor() if mistake == "floor" else place.round()).long()
        rand = torch.randint(n, size, generator=rng)
        if mistake == "random within the episode":
            rand = data.starts[data.episode[index]] + (rand % data.lengths[data.episode[index]])
        share = how.p_trajectory if mistake == "share not conditional" else how.p_trajectory / (1 - how.p_current)
        goal = torch.where(coins[0] < share, trajectory, rand)
        return torch.where((coins[0] if mistake == "one coin" else coins[1]) < how.p_current, index, goal)

    return draw


@pytest.mark.parametrize("name", ["mixed-geometric", "mixed-uniform"])
def test_the_chi_square_accepts_the_sampler_written_again(name: str) -> None:
    assert p_value(broken(""), SAMPLINGS[name]) > 1e-3


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        ("last stored state", "geometric"),
        ("last stored state", "uniform"),
        ("geometric from zero", "geometric"),
        ("discount of the complement", "geometric"),
        ("wraps at the end", "geometric"),
        ("uniform with the state", "uniform"),
        ("floor", "uniform"),
        ("share not conditional", "mixed-geometric"),
        ("random within the episode", "mixed-geometric"),
        ("one coin", "mixed-uniform"),
    ],
)
def test_the_chi_square_rejects_mistakes(mistake: str, name: str) -> None:
    assert p_value(broken(mistake), SAMPLINGS[name]) < 1e-6


# -- the self-checks of the specification: 1000 transitions per episode, discount 0.99 -----------------------------------

LONG = (1000,) * 4
DRAWS = 1_000_000


def close(values: torch.Tensor, mean: float) -> bool:
    """Whether the sample mean is within 4.5 standard errors."""
    values = values.double()
    return abs(float(values.mean()) - mean) < 4.5 * float(values.std()) / len(values) ** 0.5


def offsets(sampler: Sampler, geometric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    data, rng = data_of(LONG), torch_generator(0, "self-check")
    index = data.sample_index(DRAWS, rng)
    return index, sampler(data, index, GoalSampling(geometric=geometric, discount=0.99), rng) - index


@pytest.mark.parametrize(("geometric", "mean"), [(True, 90.0), (False, 250.2)])
def test_mean_distance_of_trajectory_goals(geometric: bool, mean: float) -> None:
    left = np.arange(1000)  # transitions that are left after the state
    analytic = (1 - 0.99**left).mean() / 0.01 if geometric else np.where(left > 0, (1 + left) / 2, 0).mean()
    assert round(float(analytic), 1) == mean
    assert close(offsets(sample, geometric)[1], float(analytic))


@pytest.mark.parametrize("geometric", [True, False])
def test_share_of_trajectory_goals_that_are_the_state(geometric: bool) -> None:
    index, offset = offsets(sample, geometric)
    assert close((offset == 0).float(), 0.001)
    assert torch.equal(offset == 0, index % 1000 == 999)


def share_of_success(success: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    data = data_of(LONG)
    return success(data.sample(DRAWS, torch_generator(0, "self-check"), MIXED))


def test_share_of_success() -> None:
    mean = 0.2 + 0.5 * 0.001 + 0.3 / sum(LONG)
    assert abs(mean - 0.2005) < 1e-4
    assert close(share_of_success(lambda batch: batch.success), mean)
    # negative controls: the next state compared with the goal, and goals that a distance calls reached
    assert not close(share_of_success(lambda batch: (batch.index + 1 == batch.goal_index).float()), mean)
    assert not close(share_of_success(lambda batch: ((batch.index - batch.goal_index).abs() <= 2).float()), mean)


def test_success_is_equality_of_rows_not_of_observations() -> None:
    """An agent that stands still meets the same state again and again; only the goal's own row is its goal."""
    still = torch.zeros(8, 1)
    data = OfflineDataset({"observation": still, "achieved_goal": still}, torch.zeros(8, 1), torch.tensor([8]))
    batch = data.sample(4000, torch_generator(0, "still"), GoalSampling(geometric=True))
    assert torch.equal(batch.success.bool(), batch.index == batch.goal_index)
    assert 0 < float(batch.success.mean()) < 0.5


# -- invariants ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.booleans(), st.floats(0, 0.999), st.integers(0, 99))
def test_trajectory_goals_lie_ahead_in_the_same_episode(
    lengths: list[int], geometric: bool, discount: float, seed: int
) -> None:
    data, rng = data_of(lengths), torch_generator(seed, "invariant")
    index = data.sample_index(64, rng)
    goals = data.sample_goals(index, GoalSampling(geometric=geometric, discount=discount), rng)
    assert torch.equal(data.episode[goals], data.episode[index])
    assert bool((goals <= data.final[index]).all())
    assert torch.equal(goals == index, index == data.final[index])  # the state itself only where nothing is left
    assert bool((goals >= index).all())


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 99))
def test_goals_are_rows_of_the_data(lengths: list[int], seed: int) -> None:
    """Never the observation after the last action: it is a next observation only."""
    data, rng = data_of(lengths), torch_generator(seed, "rows")
    batch = data.sample(64, rng, MIXED)
    assert batch.goal_index is not None
    assert torch.equal(batch.observations["desired_goal"].flatten(), batch.goal_index.float())
    assert bool(((batch.goal_index >= 0) & (batch.goal_index < len(data))).all())


def test_states_are_uniform_and_random_goals_do_not_depend_on_them() -> None:
    data, rng = data_of((1, 2, 5)), torch_generator(0, "independent")
    index = data.sample_index(200_000, rng)
    goals = data.sample_goals(index, SAMPLINGS["random"], rng)
    assert stats.chisquare(torch.bincount(index, minlength=8).numpy()).pvalue > 1e-3
    table = torch.bincount(index * 8 + goals, minlength=64).reshape(8, 8).numpy()
    assert stats.chi2_contingency(table).pvalue > 1e-3  # type: ignore[union-attr]


def with_epsilon(data: OfflineDataset, index: torch.Tensor, how: GoalSampling, rng: torch.Generator) -> torch.Tensor:
    """The denominator that the reference had before June 2025."""
    coin = torch.rand(index.shape, generator=rng, dtype=torch.float64)
    rand = torch.full_like(index, -1)
    return torch.where(coin < how.p_trajectory / (1 - how.p_current + 1e-6), index, rand)


@pytest.mark.parametrize("p_current", [0.0, 0.2, 0.5])
def test_no_random_goal_slips_in_where_none_was_asked_for(monkeypatch: pytest.MonkeyPatch, p_current: float) -> None:
    """Too rare for statistics (1e-6), so the coin shows its largest value."""
    data, index = data_of((50, 50)), torch.zeros(1000, dtype=torch.int64)
    how, rng = GoalSampling(p_current, 1 - p_current, 0.0), torch_generator(0, "coin")
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, 1 - 2.0**-53, dtype=torch.float64))
    assert bool((data.sample_goals(index, how, rng) < 50).all())
    assert bool((with_epsilon(data, index, how, rng) == -1).all())  # negative control


def test_rows_beyond_the_precision_of_float32() -> None:
    """Long data sets: rows above 2^24 have no float32 of their own."""
    data = data_of((3,))
    first = 2**24 + 1
    data.final = torch.full((first + 3,), first + 2)  # stands for an episode at the end of a long data set
    index = torch.full((3000,), first)
    data.sample_index = lambda size, rng: torch.zeros(size, dtype=torch.int64)  # type: ignore[method-assign]
    goals = data.sample_goals(index, GoalSampling(), torch_generator(0, "far"))
    assert goals.unique().tolist() == [first + 1, first + 2]
    assert float(torch.tensor(first, dtype=torch.float32)) != first  # negative control: float32 cannot say it
