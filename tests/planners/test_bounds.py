"""Action bounds: nothing ever leaves them, not even by rounding."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Network, Point, small

from clbench.errors import ConfigError
from clbench.planners.bounds import ActionBounds
from clbench.planners.cem import CEM
from clbench.planners.gradient import Gradient
from clbench.planners.icem import ICEM
from clbench.planners.mppi import MPPI
from clbench.planners.objectives import GoalDistance
from clbench.planners.random_shooting import RandomShooting
from clbench.rng import torch_generator

PLANNERS = [MPPI, CEM, ICEM, RandomShooting, Gradient]
NUMBERS = st.floats(0.01, 100)


SIZES = st.integers(1, 4)


@st.composite
def bounds(draw, size=SIZES):
    n = draw(size)
    low, high = ([draw(NUMBERS) for _ in range(n)] for _ in range(2))
    cap = draw(st.none() | NUMBERS)
    return [-x for x in low], high, cap


def inside(actions, low, high, cap) -> bool:
    """In exact arithmetic, that is float64 here."""
    actions = actions.double()
    box = (actions >= torch.tensor(low, dtype=torch.float64)) & (actions <= torch.tensor(high, dtype=torch.float64))
    return bool(box.all()) and (cap is None or bool((actions.norm(dim=-1) <= cap).all()))


@given(bounds(), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_projected_actions_are_inside_and_what_is_inside_stays(limits, seed):
    made = ActionBounds(*limits)
    raw = torch.randn(32, 3, made.size, generator=torch_generator(seed)) * 3 * made.radius
    projected = made.project(raw)
    assert inside(projected, *limits)
    assert torch.equal(made.project_(raw.clone()), projected)
    deep = raw * 0 + 0.2 * made.center + 0.3 * (projected - made.center)
    if inside(deep * 1.001, *limits):
        assert torch.equal(made.project(deep), deep)


def test_negative_control_a_plain_rescale_leaves_the_cap():
    cap = 1.84
    raw = torch.randn(10_000, 2, generator=torch_generator(0)) * 5
    plain = raw * (cap / raw.norm(dim=-1, keepdim=True)).clamp(max=1)
    assert not inside(plain, [-9, -9], [9, 9], cap)
    assert inside(ActionBounds([-9, -9], [9, 9], cap).project(raw), [-9, -9], [9, 9], cap)


def test_the_norm_cap_keeps_the_direction():
    raw = torch.tensor([[3.0, 4.0], [0.1, 0.0]])
    torch.testing.assert_close(ActionBounds([-9, -9], [9, 9], 1.0).project(raw), torch.tensor([[0.6, 0.8], [0.1, 0.0]]))


def test_float64_bounds_are_rounded_inwards():
    low, high = -0.1, 0.7  # float32 rounds both outwards
    made = ActionBounds([low], [high])
    assert float(made.low) >= low and float(made.high) <= high
    assert not float(np.float32(low)) >= low or not float(np.float32(high)) <= high


@pytest.mark.parametrize("cls", PLANNERS)
@given(limits=bounds(st.just(2)), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_no_planner_leaves_the_bounds(cls, limits, seed):
    model = Point()
    made = ActionBounds(*limits)
    prior = {} if cls is Gradient else {"prior": lambda z, step: torch.full((*z.shape[:2], 2), 1e3)}
    planner = cls(made, small(cls, std=1.0, horizon=4, action_repeat=2), **prior)
    z = torch.randn(2, 2, generator=torch_generator(seed))
    memory = None
    for i in range(2):
        actions, memory = planner.plan(model, z, GoalDistance(z + 1e3), memory, rng=torch_generator(seed, i))
        assert actions.shape == (2, 4, 2) and inside(actions, *limits)
    assert inside(torch.cat(model.seen), *limits)


def test_negative_control_candidates_that_are_not_projected_are_noticed():
    class Careless(ActionBounds):
        def project_(self, actions):
            return actions

    model = Point()
    planner = MPPI(Careless([-1, -1], [1, 1]), small(MPPI, std=1.0))
    planner.plan(model, torch.zeros(1, 2), GoalDistance(torch.ones(1, 2)), None, rng=torch_generator(0))
    assert not inside(torch.cat(model.seen), [-1, -1], [1, 1], None)


def test_bounds_of_a_space():
    made = ActionBounds.of(gymnasium.spaces.Box(-2, 1, (3,), np.float32))
    assert made.size == 3
    assert made.radius.tolist() == [1.5] * 3 and made.center.tolist() == [-0.5] * 3
    free = ActionBounds.of(gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64), max_norm=2.45)
    assert free.radius.tolist() == pytest.approx([2.45] * 2) and free.center.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActionBounds([-1], [1, 1]), "one number per action dimension, got 1 and 2"),
        (lambda: ActionBounds([1.0], [1.0]), "Each low must be below its high"),
        (lambda: ActionBounds([float("nan")], [1.0]), "Each low must be below its high"),
        (lambda: ActionBounds([-1.0], [float("inf")]), "bounded actions.*finite bounds or max_norm"),
        (lambda: ActionBounds([-1.0], [1.0], 0.0), "max_norm must be positive and finite, got 0"),
        (lambda: ActionBounds([0.5], [1.0], 2.0), "With max_norm the box must contain 0"),
        (lambda: ActionBounds.of(gymnasium.spaces.Discrete(3)), r"continuous actions \(a Box\), got Discrete"),
    ],
)
def test_bad_bounds(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_network_with_a_stepper_sees_the_same_bounds():
    """The fast path gets its actions from the same candidates."""
    network, seen = Network(2, 4), []
    stepper = network.stepper

    class Spy:
        def __init__(self, rows):
            self.inner = stepper(rows)

        def load(self, z):
            self.inner.load(z)

        def step(self, action):
            seen.append(action.clone())
            return self.inner.step(action)

    network.stepper = Spy
    MPPI(ActionBounds([-1, -1], [1, 1], 0.9), small(MPPI, std=2.0)).plan(
        network, torch.zeros(2, 2), GoalDistance(torch.ones(2, 2)), None, rng=torch_generator(0)
    )
    assert inside(torch.cat(seen), [-1, -1], [1, 1], 0.9)
