"""Objectives are the formulas they say, with and without gradients."""

from __future__ import annotations

import pytest
import torch

from clbench.errors import ConfigError, UnknownNameError
from clbench.planners.objectives import GoalDistance, Sum, Uncertainty
from clbench.rng import torch_generator

RNG = torch_generator(0, "objectives")
Z, GOAL = torch.randn(3, 5, 2, 4, generator=RNG), torch.randn(3, 2, 4, generator=RNG)  # (B, K, E, D), (B, E, D)


def literal(z, goal):
    return ((z - goal[:, None]) ** 2).flatten(2).mean(-1)


def test_goal_distance_with_and_without_gradient():
    torch.testing.assert_close(GoalDistance(GOAL)(Z, 1), literal(Z, GOAL))
    with torch.no_grad():
        objective = GoalDistance(GOAL)
        for z in (Z, Z + 1, Z[:, :2]):
            torch.testing.assert_close(objective(z, 1), literal(z, GOAL))
    z = GOAL[:, None].clone().requires_grad_()  # at the goal, where a norm has no gradient
    GoalDistance(GOAL)(z, 1).sum().backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_results_do_not_change_later():
    with torch.no_grad():
        objective = GoalDistance(GOAL)
        first = objective(Z, 1)
        kept = first.clone()
        objective(Z + 1, 2)
    assert torch.equal(first, kept)


def test_avoidance_per_environment_and_features():
    sign = torch.tensor([1.0, -1.0, 2.0])
    with torch.no_grad():
        torch.testing.assert_close(GoalDistance(GOAL, sign=-1)(Z, 1), -literal(Z, GOAL))
        torch.testing.assert_close(GoalDistance(GOAL, sign=sign)(Z, 1), literal(Z, GOAL) * sign[:, None])
        first = GoalDistance(GOAL, features=lambda z: z[..., :2], sign=sign)
        torch.testing.assert_close(first(Z, 1), literal(Z[..., :2], GOAL[..., :2]) * sign[:, None])
        rows = torch.tensor([2, 0])
        torch.testing.assert_close(first.select(rows)(Z[rows], 1), first(Z, 1)[rows])
        torch.testing.assert_close(first.select(slice(1, 3))(Z[1:3], 1), first(Z, 1)[1:3])


def test_last_step_only():
    last = GoalDistance(GOAL, reduce="last", horizon=3)
    assert not last(Z, 1).any() and not last.select(slice(0, 2))(Z[:2], 2).any()
    torch.testing.assert_close(last(Z, 3), literal(Z, GOAL))
    assert Sum(last, Uncertainty()).horizon == 3


def test_uncertainty_is_the_population_variance_summed_over_features():
    mean = Z.mean(2, keepdim=True)
    expected = 0.1 * 0.5**2 * ((Z - mean) ** 2).mean(2).sum(-1)
    torch.testing.assert_close(Uncertainty(0.1, 0.5)(Z, 2), expected)
    assert not torch.allclose(0.1 * 0.5**2 * Z.var(2).sum(-1), expected)  # the sample variance is another number


def test_a_sum_selects_where_all_parts_do():
    rows = slice(1, 3)
    both = Sum(GoalDistance(GOAL), Uncertainty(0.1))
    assert both.select is not None
    torch.testing.assert_close(both.select(rows)(Z[rows], 1), both(Z, 1)[rows])
    assert Sum(GoalDistance(GOAL), lambda z, step: z.sum((2, 3))).select is None


def test_bad_objectives():
    with pytest.raises(UnknownNameError, match="Unknown value of reduce 'mean'"):
        GoalDistance(GOAL, reduce="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reduce='last' needs the horizon"):
        GoalDistance(GOAL, reduce="last")
    with pytest.raises(ConfigError, match="discount of the uncertainty"):
        Uncertainty(discount=1.5)
    with pytest.raises(ConfigError, match=r"needs latents with a member axis \(B, K, E, D\), got \(3, 5, 4\)"):
        Uncertainty()(torch.zeros(3, 5, 4), 1)
    with pytest.raises(ConfigError, match="at least one objective"):
        Sum()
