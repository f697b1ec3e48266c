"""The planners: closed forms of their rules, the optimum of a linear-quadratic problem, independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from worlds import LinearQuadratic, Network, Point, small

from clbench.errors import ConfigError, ContractError
from clbench.planners.bounds import ActionBounds
from clbench.planners.cem import CEM, refit
from clbench.planners.gradient import Gradient
from clbench.planners.icem import ICEM
from clbench.planners.mppi import MPPI, control_cost, weights
from clbench.planners.objectives import GoalDistance
from clbench.planners.random_shooting import RandomShooting
from clbench.planners.sampling import elites, shifted, synthesis
from clbench.rng import torch_generator

SAMPLING = [MPPI, CEM, ICEM, RandomShooting]
PLANNERS = [*SAMPLING, Gradient]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "sampling"))


# -- closed forms --------------------------------------------------------------------------------------------------------


def test_mppi_weights():
    costs = randn(3, 7) * 4 + 1000
    literal = [[math.exp(-(c - min(row)) / 0.7) for c in row] for row in costs.double().tolist()]
    expected = torch.tensor([[w / sum(row) for w in row] for row in literal])
    torch.testing.assert_close(weights(costs, 0.7), expected, rtol=1e-3, atol=1e-6)


def test_mppi_update_is_the_weighted_mean():
    planner = MPPI(None, small(MPPI, temperature=0.7, temperature_scale="none"))
    candidates, costs, mean = randn(4, 3, 7, 2), randn(3, 7), randn(3, 4, 2)
    new = planner.update({"mean": mean, "std": mean.abs()}, candidates, costs)
    w = torch.exp(-(costs - costs.amin(1, keepdim=True)) / 0.7)
    w = w / w.sum(1, keepdim=True)
    expected = torch.stack([sum(w[b, k] * candidates[:, b, k] for k in range(7)) for b in range(3)])
    torch.testing.assert_close(new["mean"], expected)
    assert not torch.allclose(
        planner.update({"mean": mean, "std": mean.abs()}, candidates, -costs)["mean"], expected
    )  # the sign matters


def test_mppi_in_units_of_the_spread_does_not_depend_on_the_scale_of_the_costs():
    planner = MPPI(None, small(MPPI, temperature=0.3, temperature_scale="std"))
    state = {"mean": randn(3, 4, 2), "std": torch.ones(3, 4, 2)}
    candidates, costs = randn(4, 3, 7, 2), randn(3, 7)
    torch.testing.assert_close(
        planner.update(state, candidates, costs)["mean"], planner.update(state, candidates, costs * 100 + 5)["mean"]
    )


def test_control_cost_is_the_quadratic_form():
    candidates, mean, std = randn(4, 3, 7, 2), randn(4, 3, 2, seed=1), randn(4, 3, 2, seed=2).abs() + 0.1
    expected = torch.zeros(3, 7)
    for t in range(4):
        for b in range(3):
            inverse = torch.diag(1 / std[t, b] ** 2)
            for k in range(7):
                expected[b, k] += mean[t, b] @ inverse @ (candidates[t, b, k] - mean[t, b])
    torch.testing.assert_close(control_cost(candidates, mean, std), expected, rtol=1e-3, atol=1e-3)


def test_mppi_with_a_single_sample_takes_it():
    planner = MPPI(None, small(MPPI, samples=1, temperature_scale="std"))
    candidates = randn(4, 3, 1, 2)
    new = planner.update({"mean": randn(3, 4, 2), "std": torch.ones(3, 4, 2)}, candidates, randn(3, 1))
    torch.testing.assert_close(new["mean"], candidates[:, :, 0].transpose(0, 1))


def test_cem_refit():
    candidates, costs = randn(4, 3, 9, 2), randn(3, 9)
    best = elites(candidates, costs, 3)
    mean, std = refit(best, torch.full((3, 4, 2), 10.0), torch.full((3, 4, 2), 2.0), momentum=0.25)
    for b in range(3):
        index = sorted(range(9), key=lambda k: float(costs[b, k]))[:3]
        chosen = candidates[:, b, index]  # (T, 3, A)
        torch.testing.assert_close(best[:, b], chosen)
        average = chosen.sum(1) / 3
        deviation = ((chosen - average[:, None]) ** 2).sum(1).div(3).sqrt()
        torch.testing.assert_close(mean[b], 0.75 * average + 0.25 * 10)
        torch.testing.assert_close(std[b], 0.75 * deviation + 0.25 * 2)


@pytest.mark.parametrize("steps", [7, 16])
@pytest.mark.parametrize("color", [0.0, 1.0, 2.0, 3.5])
def test_noise_has_the_power_law_spectrum_and_unit_variance(steps, color):
    covariance = (lambda m: m @ m.T)(synthesis(steps, color).double())
    torch.testing.assert_close(covariance.diagonal(), torch.ones(steps, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    # stationary on the circle, so its eigenvalues are the spectrum
    torch.testing.assert_close(covariance.roll((1, 1), (0, 1)), covariance, rtol=1e-5, atol=1e-5)
    power = torch.fft.rfft(covariance[0]).real[1:]
    k = torch.arange(1, len(power) + 1, dtype=torch.float64)
    slope = (power[-1].log() - power[0].log()) / (k[-1].log() - k[0].log())
    assert float(slope) == pytest.approx(-color, abs=1e-3)
    torch.testing.assert_close(power, power[0] * k**-color, rtol=1e-3, atol=1e-6)


def test_drawn_noise_has_that_spectrum():
    planner = ICEM(None, small(ICEM, color=2.0, horizon=64))
    noise = planner.noise((64, 4000, 2), torch_generator(0)).flatten(1)
    power = torch.fft.rfft(noise, dim=0).abs().square().mean(1)[1:32]
    k = torch.arange(1, 32, dtype=torch.float32)
    x, y = k.log() - k.log().mean(), power.log() - power.log().mean()
    assert float((x * y).sum() / (x * x).sum()) == pytest.approx(-2.0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.05)


def test_shift_repeats_the_last_action():
    plans = torch.arange(10.0).view(2, 5, 1)
    assert shifted(plans, torch.tensor([2, 9]))[..., 0].tolist() == [[2, 3, 4, 4, 4], [9] * 5]
    held = shifted(plans, torch.tensor([1, 2]), repeat=2)[..., 0]
    assert held.tolist() == [[0.5, 1.5, 2.5, 3.5, 4.0], [6, 7, 8, 9, 9]]


# -- quality -------------------------------------------------------------------------------------------------------------

HORIZON = 10
# share of what the optimum saves over doing nothing that the plan may miss
GAPS: dict[Any, tuple[dict[str, Any], float]] = {
    CEM: ({"samples": 256, "iterations": 15, "elites": 32, "min_std": 0.0}, 0.01),
    ICEM: ({"samples": 256, "iterations": 15, "elites": 32, "min_std": 0.0, "color": 1.0}, 0.01),
    MPPI: ({"samples": 256, "iterations": 25, "temperature": 0.2, "std_decay": 0.85}, 0.02),
    RandomShooting: ({"samples": 4000, "std": 0.2}, 0.5),
    Gradient: ({"iterations": 150, "restarts": 2, "lr": 0.05}, 0.002),
}


def gap(cls: Any, **options: Any) -> float:
    """Worst missed share of the saving over the rows of the linear-quadratic problem."""
    world = LinearQuadratic(HORIZON)
    planner = cls(world.bounds, cls.Config(horizon=HORIZON, **options))
    plan, _ = planner.plan(world, world.start, world.objective, None, rng=torch_generator(0))
    nothing = world.cost(torch.zeros_like(plan))
    return float(((world.cost(plan) - world.optimum()) / (nothing - world.optimum())).max())


@pytest.mark.parametrize("cls", PLANNERS)
def test_planners_reach_the_riccati_optimum(cls):
    options, allowed = GAPS[cls]
    assert -1e-4 < gap(cls, **options) < allowed  # below the optimum nothing is possible


def test_negative_control_wrong_updates_miss_the_optimum():
    class Worst(CEM):
        def update(self, state, candidates, costs):
            return super().update(state, candidates, -costs)

    class Unweighted(MPPI):
        def update(self, state, candidates, costs):
            return super().update(state, candidates, costs * 0)

    class Blurred(ICEM):  # ranks sequences of all environments together
        def update(self, state, candidates, costs):
            return super().update(state, candidates, costs.mean(0, keepdim=True).expand_as(costs))

    for cls, base in ((Worst, CEM), (Unweighted, MPPI), (Blurred, ICEM)):
        options, allowed = GAPS[base]
        assert gap(cls, **options) > 5 * allowed


def test_icem_is_better_than_cem_with_the_same_budget():
    budget = {"samples": 64, "iterations": 3, "elites": 8}
    assert gap(ICEM, **budget) < gap(CEM, **budget)


# -- batches -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", PLANNERS)
@pytest.mark.parametrize("many", [False, True], ids=["one generator", "a generator per environment"])
def test_a_plan_does_not_depend_on_its_batch(cls, many):
    z, goal = randn(5, 6), randn(5, 6, seed=1)
    planner = cls(None, small(cls, samples=64) if cls is not Gradient else small(cls))

    def generators(rows):
        return [torch_generator(7, i) for i in rows] if many else torch_generator(7)

    def plan(rows, memory=None):
        rows = list(rows)
        return planner.plan(Network(), z[rows], GoalDistance(goal[rows]), memory, rng=generators(rows))

    together, memory = plan(range(5))
    again, _ = plan(range(5), memory)
    for i in range(5):
        alone, alone_memory = plan([i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plan([i], alone_memory)[0][0], again[i], rtol=1e-3, atol=1e-3)
    permuted, _ = plan([3, 0, 4])
    torch.testing.assert_close(permuted, together[[3, 0, 4]], rtol=1e-3, atol=1e-4)
    if many:  # other noise for each
        assert not torch.allclose(generators([0])[0].get_state(), generators([1])[0].get_state())


def test_negative_control_ranking_across_the_batch_is_noticed():
    class Across(MPPI):
        def update(self, state, candidates, costs):
            return super().update(state, candidates, costs - costs.mean() * randn(*costs.shape, seed=3))

    z, goal, planner = randn(5, 6), randn(5, 6, seed=1), Across(None, small(MPPI))
    plans = [planner.plan(Network(), z[:n], GoalDistance(goal[:n]), None, rng=torch_generator(7))[0][0] for n in (1, 5)]
    assert not torch.allclose(*plans, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", PLANNERS)
def test_the_generator_moves_by_the_same_amount_whatever_is_planned(cls):
    """With early stops too: what is drawn next must not depend on the environments."""
    states = []
    for goal in (torch.zeros(2, 2), torch.full((2, 2), 9.0)):
        rng = torch_generator(0)
        planner = cls(None, small(cls, iterations=6, tolerance=0.3))
        planner.plan(Point(), torch.zeros(2, 2), GoalDistance(goal), None, rng=rng)
        states.append(rng.get_state())
    assert torch.equal(*states)


# -- warm start, early stop, action repeat, prior ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", PLANNERS)
def test_a_warm_start_improves_the_plan(cls):
    world = LinearQuadratic(HORIZON)
    planner = cls(world.bounds, small(cls, horizon=HORIZON, std=0.1))
    memory, costs = None, []
    for i in range(6):
        plan, memory = planner.plan(world, world.start, world.objective, memory, rng=torch_generator(i))
        costs.append(float(world.cost(plan).mean()))
    assert costs[-1] < costs[0]
    cold = cls(world.bounds, small(cls, horizon=HORIZON, std=0.1, warm_start=False))
    again, _ = cold.plan(world, world.start, world.objective, memory, rng=torch_generator(5))
    assert torch.equal(again, cold.plan(world, world.start, world.objective, None, rng=torch_generator(5))[0])


@pytest.mark.parametrize("cls", PLANNERS)
def test_memory_of_another_batch_is_refused(cls):
    planner = cls(None, small(cls))
    goal = GoalDistance(torch.zeros(3, 2))
    _, memory = planner.plan(Point(), torch.zeros(3, 2), goal, None, rng=torch_generator(0))
    with pytest.raises(ContractError, match=rf"not of {cls.__name__} for 2 environments"):
        planner.plan(Point(), torch.zeros(2, 2), GoalDistance(torch.zeros(2, 2)), memory, rng=torch_generator(0))


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, Gradient])
def test_environments_stop_on_their_own(cls):
    """One goal is where the environment is, so nothing can be gained; the other is far."""
    goal = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    options = {"std": 0.3, "returns": "mean"} if cls is not Gradient else {"lr": 0.02}
    calls = []

    class Counted(Point):
        def predict(self, z, action):
            calls.append(1)
            return super().predict(z, action)

    def plan(rows, **more):
        planner = cls(None, small(cls, iterations=12, **options, **more))
        calls.clear()
        plans, _ = planner.plan(
            Counted(), torch.zeros(len(rows), 2), GoalDistance(goal[rows]), None, rng=torch_generator(0)
        )
        return plans, len(calls)

    full, all_calls = plan([0, 1])
    early, _ = plan([0, 1], tolerance=1e-3)
    assert not torch.equal(full[0], early[0]) or cls is Gradient  # the first environment was frozen
    torch.testing.assert_close(early[1], plan([1], tolerance=1e-3)[0][0])
    assert plan([0], tolerance=1e-3)[1] < all_calls  # and alone it ends the search


@pytest.mark.parametrize("cls", PLANNERS)
def test_actions_are_held(cls):
    planner = cls(None, small(cls, horizon=12, action_repeat=3))
    world = LinearQuadratic(12)
    plan, memory = planner.plan(world, world.start, world.objective, None, rng=torch_generator(0))
    assert plan.shape == (3, 12, 2) and memory["mean"].shape == (3, 4, 2)
    assert torch.equal(plan, plan[:, ::3].repeat_interleave(3, 1))


@pytest.mark.parametrize("cls", SAMPLING)
def test_a_good_prior_helps(cls):
    goal = torch.tensor([[2.0, -1.0], [0.0, 2.5]])
    bounds = ActionBounds([-1, -1], [1, 1])

    def towards(z, step):
        return (goal[:, None] - z).clamp(-1, 1)

    z = torch.zeros(2, 2)
    costs = []
    for prior in (None, towards):
        planner = cls(bounds, small(cls, returns="best", std=0.1 if cls is not RandomShooting else 1.0), prior=prior)
        plan, _ = planner.plan(Point(), z, GoalDistance(goal), None, rng=torch_generator(0))
        costs.append((z[:, None] + plan.cumsum(1) - goal[:, None]).square().mean(-1).sum(1))
    path = torch.zeros(2, 2)
    follow = torch.zeros(2)
    for _ in range(4):
        path = path + (goal - path).clamp(-1, 1)
        follow += (path - goal).square().mean(-1)
    assert bool((costs[1] <= follow + 1e-5).all())  # at least as good as following the prior
    assert bool((costs[1] < costs[0]).all())


def test_a_prior_of_the_wrong_shape():
    planner = CEM(None, small(CEM), prior=lambda z, step: z[:, 0])
    with pytest.raises(ContractError, match=r"prior returned actions \(1, 2\), expected \(1, 4, 2\)"):
        planner.plan(Point(), torch.zeros(1, 2), GoalDistance(torch.zeros(1, 2)), None, rng=torch_generator(0))


def test_icem_samples_decay_but_not_below_twice_the_elites():
    planner = ICEM(None, ICEM.Config(samples=100, elites=10, decay=2.0, iterations=5))
    assert [planner.samples_of(i) for i in range(5)] == [100, 50, 25, 20, 20]


# -- bad options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MPPI, {"samples": 0}, "samples must be at least 1, got 0"),
        (MPPI, {"horizon": 10, "action_repeat": 3}, "horizon must be a multiple of action_repeat, got 10 and 3"),
        (MPPI, {"std": 0.0}, "std must be positive and finite"),
        (MPPI, {"temperature": -1.0}, "temperature must be positive"),
        (MPPI, {"temperature_scale": "sd"}, "Unknown value of temperature_scale 'sd'. Did you mean 'std'"),
        (MPPI, {"std_decay": 0.0}, r"std_decay must be in \(0, 1\]"),
        (MPPI, {"control_cost": -1.0}, "control_cost must be at least 0"),
        (MPPI, {"returns": "men"}, "Unknown value of returns 'men'. Did you mean 'mean'"),
        (MPPI, {"precision": "fp8"}, "Unknown value of precision 'fp8'"),
        (MPPI, {"block": 0}, "block must be at least 1"),
        (MPPI, {"tolerance": -0.1}, "tolerance must be at least 0"),
        (CEM, {"elites": 600}, r"elites must be between 2 and samples \(512\), got 600"),
        (CEM, {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        (CEM, {"min_std": 0.7}, r"min_std must be between 0 and std \(0.5\)"),
        (ICEM, {"keep": 1.5}, r"keep must be in \[0, 1\]"),
        (ICEM, {"decay": 0.5}, "decay must be at least 1"),
        (RandomShooting, {"color": 1.0}, "color must be 0"),
        (RandomShooting, {"returns": "mean"}, "returns must be 'best', got 'mean'"),
        (Gradient, {"restarts": 0}, "restarts must be at least 1"),
        (Gradient, {"lr": 0.0}, "lr must be positive"),
        (Gradient, {"std": -1.0}, "std must be at least 0"),
        (Gradient, {"horizon": 4, "action_repeat": 3}, "multiple of action_repeat"),
    ],
)
def test_bad_options(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls.Config(**options)


def test_bad_planners():
    with pytest.raises(ConfigError, match=r"MPPI takes a MPPI.Config, got CEMConfig"):
        MPPI(None, CEM.Config())
    with pytest.raises(ConfigError, match="Gradient takes a Gradient.Config, got CEMConfig"):
        Gradient(None, CEM.Config())
    with pytest.raises(ConfigError, match="20 samples leave nothing to draw beside 24 kept or prior sequences"):
        MPPI(None, MPPI.Config(samples=20), prior=lambda z, step: z)


def test_the_gradient_planner_needs_a_gradient():
    def rank(z, step):
        return z.detach().sum(-1)

    with pytest.raises(ContractError, match="No gradient flows .* use a sampling planner, such as icem"):
        Gradient(None, small(Gradient)).plan(Point(), torch.zeros(1, 2), rank, None, rng=torch_generator(0))


def test_the_gradient_planner_leaves_no_gradients_behind():
    model = torch.nn.Linear(4, 2)

    class World(Point):
        def predict(self, z, action):
            return model(torch.cat([z, action], -1))

    plan, _ = Gradient(None, small(Gradient)).plan(
        World(), torch.zeros(1, 2), GoalDistance(torch.ones(1, 2)), None, rng=torch_generator(0)
    )
    assert model.weight.grad is None and not plan.requires_grad
