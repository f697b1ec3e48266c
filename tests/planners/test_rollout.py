"""The kernel adds up what a plain loop adds up, in blocks of any size."""

from __future__ import annotations

import pytest
import torch
from worlds import Network, Point, small

from clbench.errors import ConfigError
from clbench.planners import rollout as kernel
from clbench.planners.cem import CEM
from clbench.planners.gradient import Gradient
from clbench.planners.icem import ICEM
from clbench.planners.mppi import MPPI
from clbench.planners.objectives import GoalDistance, Sum, Uncertainty
from clbench.planners.random_shooting import RandomShooting
from clbench.planners.rollout import Rollout, finite_costs, rollout, trajectories
from clbench.rng import torch_generator

RNG = torch_generator(0, "rollout")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def plain(model, z, actions, objective, repeat=1):
    z = z[:, None].expand(-1, actions.shape[2], *z.shape[1:])
    total, step = 0, 0
    for action in actions:
        for _ in range(repeat):
            z, step = model.predict(z, action), step + 1
            total = total + objective(z, step)
    return total


class Ensemble:
    """Three members that move the latent (E, 2) by different amounts."""

    def encode(self, obs):
        return obs[:, None].repeat(1, 3, 1)

    def predict(self, z, action):
        return z + action[..., None, :] * torch.tensor([[0.5], [1.0], [1.5]])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 4, 5, 9, None])
def test_costs_equal_a_plain_loop_for_any_block(fast, repeat, block):
    model, z, goal = Network(fast=fast), randn(5, 6), randn(5, 6)
    actions = randn(4, 5, 7, 2)
    sign = torch.tensor([1.0, -1, 1, 1, -1])
    objective = GoalDistance(goal, sign=sign)
    got = Rollout(model, z, objective, repeat=repeat, block=block)
    expected = plain(model, z, actions, lambda z, t: (z - goal[:, None]).square().mean(-1) * sign[:, None], repeat)
    with torch.no_grad():
        for _ in range(2):  # the buffers are used again
            torch.testing.assert_close(got(actions), expected, rtol=1e-4, atol=1e-5)


def test_negative_control_a_goal_that_is_not_selected_is_noticed():
    class Stuck(GoalDistance):
        def select(self, rows):
            return GoalDistance(self.goal[: len(self.goal[rows])])

    model, z, goal, actions = Network(), randn(4, 6), randn(4, 6), randn(3, 4, 7, 2)
    whole = rollout(model, z, actions, GoalDistance(goal), block=4)
    assert torch.allclose(rollout(model, z, actions, GoalDistance(goal), block=2), whole)
    assert not torch.allclose(rollout(model, z, actions, Stuck(goal), block=2), whole)


def test_an_objective_without_select_goes_in_one_block():
    goal, shapes = randn(4, 2), []

    def objective(z, step):
        shapes.append(z.shape)
        return (z - goal[:, None]).square().sum(-1)

    z, actions = randn(4, 2), randn(3, 4, 7, 2)
    torch.testing.assert_close(rollout(Point(), z, actions, objective, block=1), plain(Point(), z, actions, objective))
    assert set(shapes) == {(4, 7, 2)}


def test_latents_of_an_ensemble_and_the_uncertainty_objective():
    model, obs = Ensemble(), randn(3, 2)
    z, goal = model.encode(obs), model.encode(randn(3, 2))
    actions = randn(4, 3, 5, 2)

    def literal(z, step):
        mean = z.mean(2, keepdim=True)
        variance = ((z - mean) ** 2).sum(2) / 3
        return ((z - goal[:, None]) ** 2).flatten(2).mean(-1) + 0.5 * 0.9**step * variance.sum(-1)

    objective = Sum(GoalDistance(goal), Uncertainty(0.5, 0.9))
    for block in (1, 3):
        got = rollout(model, z, actions, objective, block=block)
        torch.testing.assert_close(got, plain(model, z, actions, literal))


def test_steps_are_counted_from_one():
    steps = []
    rollout(Point(), randn(1, 2), randn(2, 1, 3, 2), lambda z, t: steps.append(t) or z[..., 0], repeat=2)
    assert steps == [1, 2, 3, 4]


def test_trajectories_are_what_predict_gives():
    model, z, actions = Network(), randn(3, 6), randn(3, 4, 2)
    path = trajectories(model, z, actions)
    assert path.shape == (3, 4, 6)
    torch.testing.assert_close(path[:, 0], model.predict(z, actions[:, 0]))
    torch.testing.assert_close(path[:, 3], model.predict(path[:, 2], actions[:, 3]))


# -- costs that are not finite ---------------------------------------------------------------------------------------------


def test_replaced_costs_are_the_worst_of_their_row_and_counted():
    nan, inf = float("nan"), float("inf")
    costs, replaced = finite_costs(torch.tensor([[1.0, nan, 3.0], [inf, -inf, 2.0], [nan, nan, inf], [1.0, 2.0, 3.0]]))
    assert costs.tolist() == [[1, 3, 3], [2, 2, 2], [0, 0, 0], [1, 2, 3]]
    assert replaced.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("cls", [MPPI, CEM, Gradient])
def test_a_model_that_breaks_down_does_not_spoil_the_plan_and_is_reported(cls):
    class Broken(Point):
        def predict(self, z, action):
            z = z + action
            return torch.where(z[..., :1] > 0.6, torch.nan, z)

    planner = cls(None, small(cls))
    z = torch.tensor([[0.0, 0.0], [-9.0, 0.0]])  # the second is far from what breaks the model
    objective = GoalDistance(torch.tensor([[0.5, 0.0], [-9.0, 0.5]]))
    with pytest.warns(UserWarning, match=rf"{cls.__name__}: \d+ costs .* not finite and count as the worst"):
        actions, memory = planner.plan(Broken(), z, objective, None, rng=torch_generator(0))
    assert bool(torch.isfinite(actions).all())
    assert memory["replaced"][0] > 0 and memory["replaced"][1] == 0
    good, _ = planner.plan(Point(), z, objective, None, rng=torch_generator(0))
    torch.testing.assert_close(actions[1], good[1])


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, RandomShooting, Gradient])
def test_an_iteration_without_a_finite_cost_does_not_count_as_the_best(cls):
    """The model breaks down in the first iteration only; costs are far above 0."""

    class BreaksOnce(Point):
        def predict(self, z, action):
            return super().predict(z, action) * (torch.nan if len(self.seen) < 4 else 1.0)

    options = {"iterations": 4, "tolerance": 1e-9} | ({} if cls is Gradient else {"returns": "best"})
    goal = torch.full((2, 2), 9.0)
    with pytest.warns(UserWarning, match="not finite"):
        plan, memory = cls(None, small(cls, **options)).plan(
            BreaksOnce(), torch.zeros(2, 2), GoalDistance(goal), None, rng=torch_generator(0)
        )
    assert bool((memory["replaced"] > 0).all())
    assert bool((plan.sum((1, 2)) > 1).all())  # towards the goal, which is not where the search began


# -- bad input -------------------------------------------------------------------------------------------------------------


def test_a_horizon_longer_than_memory_allows():
    for cls in (MPPI, Gradient):
        planner = cls(None, small(cls, horizon=10**9))
        with pytest.raises(ConfigError, match=r"would need about .* GiB .*are free on cpu: lower samples or horizon"):
            planner.plan(Point(), torch.zeros(4, 2), GoalDistance(torch.zeros(4, 2)), None, rng=torch_generator(0))


def test_the_memory_check_counts_what_is_free(monkeypatch):
    z = torch.zeros(64, 512)
    for free, fits in ((2**40, True), (2**20, False)):
        monkeypatch.setattr(kernel, "available_bytes", lambda device, free=free: free)
        if fits:
            kernel.check_memory(z, 96, 2000, 2)
        else:
            with pytest.raises(
                ConfigError, match="64 environments with 2000 samples and 96 distinct actions of 2 numbers"
            ):
                kernel.check_memory(z, 96, 2000, 2)
    monkeypatch.setattr(kernel, "available_bytes", lambda device: None)  # where it cannot be told, nothing is refused
    kernel.check_memory(z, 96, 2000, 2)


def refused(monkeypatch, free, model, objective, envs=32, planner=None):
    """Whether a plan of 32 environments is refused where so many bytes are free."""
    monkeypatch.setattr(kernel, "_SMALL", 0)
    monkeypatch.setattr(kernel, "available_bytes", lambda device: free)
    try:
        (planner or CEM(None, small(CEM, horizon=1, samples=512, iterations=1))).plan(
            model, torch.zeros(envs, 64), objective, None, rng=torch_generator(0)
        )
    except ConfigError as error:
        assert "lower samples or horizon" in str(error)
        return True
    return False


def test_the_memory_check_knows_that_all_environments_go_in_one_block_without_select(monkeypatch):
    class Still(Point):
        def predict(self, z, action):
            return z

    goal = GoalDistance(torch.zeros(32, 64))
    between = 8 * 2**20  # a block of 8 environments needs 4.3 MiB, all of them need 17 MiB
    assert not refused(monkeypatch, between, Still(), goal)
    assert refused(monkeypatch, between, Still(), lambda z, step: goal(z, step))
    assert not refused(monkeypatch, 4 * between, Still(), lambda z, step: goal(z, step))


@pytest.mark.parametrize("cls", [CEM, Gradient])
def test_the_memory_check_counts_hidden_layers(cls, monkeypatch):
    class Wide(torch.nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.first, self.last = torch.nn.Linear(66, hidden), torch.nn.Linear(hidden, 64)

        def encode(self, obs):
            return obs

        def predict(self, z, action):
            return self.last(torch.relu(self.first(torch.cat([z, action], -1))))

    class Told(Point):
        hidden_numbers = 4096

        def predict(self, z, action):
            return torch.cat([z[..., :2] + action, z[..., 2:]], -1)

    options = {"horizon": 1, "iterations": 1} | ({"samples": 128} if cls is CEM else {"restarts": 128})
    planner, free, goal = cls(None, small(cls, **options)), 2**20, GoalDistance(torch.zeros(1, 64))
    assert not refused(monkeypatch, free, Wide(8), goal, 1, planner)
    assert refused(monkeypatch, free, Wide(4096), goal, 1, planner)
    assert refused(monkeypatch, free, Told(), goal, 1, planner)
    Told.hidden_numbers = 8
    assert not refused(monkeypatch, free, Told(), goal, 1, planner)


def test_hidden_numbers_are_those_of_the_widest_layer():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 500, 3), torch.nn.Linear(9, 40), torch.nn.Linear(40, 7))
    assert kernel.hidden_numbers(layers) == 2 * 40
    layers.stacked = torch.nn.Parameter(torch.zeros(3, 9, 30))  # an ensemble of three
    assert kernel.hidden_numbers(layers) == 2 * 90
    assert kernel.hidden_numbers(Point()) == 0


def test_available_bytes_is_a_sensible_number():
    free = kernel.available_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("cls", [MPPI, Gradient])
def test_an_objective_for_another_horizon(cls):
    late = GoalDistance(torch.zeros(1, 2), reduce="last", horizon=9)
    with pytest.raises(ConfigError, match="counts step 9 only, but the planner's horizon is 4"):
        cls(None, small(cls)).plan(Point(), torch.zeros(1, 2), late, None, rng=torch_generator(0))


def test_bfloat16_costs_are_float32_and_close():
    z, goal, actions = randn(3, 6), randn(3, 6), randn(4, 3, 16, 2)
    for fast in (True, False):
        model = Network(fast=fast)
        with torch.no_grad():
            exact = Rollout(model, z, GoalDistance(goal))(actions)
            rough = Rollout(model, z, GoalDistance(goal), precision="bfloat16")(actions)
        assert rough.dtype == torch.float32
        assert 0 < float((rough - exact).abs().max()) < 0.05 * float(exact.max())
