"""PointMaze's physics: closed forms, optimality of the contact solver, invariants, and MuJoCo itself where installed."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

import clbench.envs.point_maze as point_maze
from clbench.envs.point_maze import (
    CONTACT,
    CONTACT_DAMPING,
    DAMPING,
    GEAR,
    IMPEDANCE,
    INVERSE_WEIGHT,
    MARGIN,
    MASS,
    MAX_SPEED,
    RADIUS,
    SPEED_BOUND,
    STIFFNESS,
    TIMESTEP,
    contact_acceleration,
    move,
    nearest_walls,
    ring_code,
    simulation_step,
    wall_distance,
)
from clbench.streams.maze_layouts import PUBLISHED, all_layouts, layout_code, path_lengths

ROOT = Path(__file__).resolve().parents[2]
EMPTY = torch.zeros(1, dtype=torch.int64)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("physics_check", ROOT / "scripts" / "check_point_maze_physics.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def solid_of(*layouts):
    return ring_code(torch.tensor([layout_code(text) for text in layouts]))


def point(x, y):
    return torch.tensor([[x], [y]], dtype=torch.float64)


# -- without walls ----------------------------------------------------------------------------------------------------


def check_closed_form(step):
    """Constant force: ``v_n = u + (v_0 - u) q^n`` with ``u = F / d``, ``q = m / (m + h d)``; positions sum velocities."""
    force, start, speed, n = point(2.0, -1.5), point(0.3, 0.7), point(3.0, -4.0), 800
    position, velocity = start, speed
    for _ in range(n):
        position, velocity = step(position, velocity, force, EMPTY)
    q, u = MASS / (MASS + TIMESTEP * DAMPING), force / DAMPING
    torch.testing.assert_close(velocity, u + (speed - u) * q**n, atol=1e-12, rtol=0)
    path = start + TIMESTEP * (n * u + (speed - u) * q * (1 - q**n) / (1 - q))
    torch.testing.assert_close(position, path, atol=1e-10, rtol=0)


def test_constant_force_in_closed_form():
    check_closed_form(simulation_step)


def explicit_damping(position, velocity, force, solid):
    velocity = velocity + TIMESTEP * (force - DAMPING * velocity) / MASS
    return position + TIMESTEP * velocity, velocity


def position_first(position, velocity, force, solid):
    return position + TIMESTEP * velocity, simulation_step(position, velocity, force, solid)[1]


@pytest.mark.parametrize("broken", [explicit_damping, position_first])
def test_the_closed_form_catches_other_integrators(broken):
    with pytest.raises(AssertionError):
        check_closed_form(broken)


def test_facts_of_the_scene():
    assert pytest.approx(4.18879, abs=1e-5) == MASS
    assert pytest.approx(23.87, abs=0.01) == GEAR / MASS  # acceleration of the full action
    velocity = move(torch.zeros(2, 1), torch.zeros(2, 1), torch.ones(2, 1), EMPTY)[1]
    assert velocity.max() == pytest.approx(
        4 * TIMESTEP * GEAR / MASS, rel=0.01
    )  # one step of the environment, 4 of MuJoCo


def test_speed_and_action_are_clipped():
    fast = simulation_step(point(0, 0), point(7, -9), point(0, 0), EMPTY)[1]
    torch.testing.assert_close(fast, point(5, -5) * MASS / (MASS + TIMESTEP * DAMPING))
    once, more = (move(torch.zeros(2, 1), torch.zeros(2, 1), point(a, -a), EMPTY)[1] for a in (1.0, 50.0))
    assert torch.equal(once, more)


# -- contacts ---------------------------------------------------------------------------------------------------------


def contact_cases(count, seed=0):
    """Balls close to corners, with one, two or three boxes around them."""
    rng = np.random.default_rng(seed)
    offset = torch.from_numpy(rng.uniform(0.02, 0.11, (2, count)) * rng.choice([-1, 1], (2, count)))
    zero = torch.zeros(count, dtype=torch.float64)
    vectors = torch.stack([offset[0], zero, zero, offset[1], offset[0], offset[1]]).view(3, 2, -1)
    touching = torch.from_numpy(rng.integers(2, size=(3, count)) == 1) & (vectors.norm(dim=1) < CONTACT)
    free = torch.from_numpy(rng.uniform(-30, 30, (2, count)))
    velocity = torch.from_numpy(rng.uniform(-5, 5, (2, count)))
    return free, velocity, vectors, touching


def check_optimal(solver, cases):
    """The gradient of the convex problem, written out from MuJoCo's documentation, vanishes at the solution."""
    free, velocity, vectors, touching = cases
    a = solver(*cases).requires_grad_()
    distance = vectors.norm(dim=1)
    normal = vectors / distance[:, None]
    gap = distance - RADIUS - MARGIN
    d0, d1, width = IMPEDANCE
    x = (gap.abs() / width).clamp(max=1)
    d = d0 + (d1 - d0) * torch.where(x < 0.5, 2 * x**2, 1 - 2 * (1 - x) ** 2)
    reference = -CONTACT_DAMPING * torch.einsum("iab,ab->ib", normal, velocity) - STIFFNESS * d * gap
    slack = (torch.einsum("iab,ab->ib", normal, a) - reference).clamp(max=0)
    cost = MASS / 2 * (a - free).square().sum() + (d / ((1 - d) * INVERSE_WEIGHT) / 2 * slack**2 * touching).sum()
    cost.backward()
    assert a.grad.abs().max() < 1e-8


def test_contact_solver_is_optimal():
    cases = contact_cases(20_000)
    assert min(cases[3].sum(0).bincount()) > 500  # with 0, 1, 2 and 3 contacts
    check_optimal(contact_acceleration, cases)


def one_contact_at_a_time(free, velocity, vectors, touching):
    """Broken: pushes of several contacts are added as if each were alone."""
    result = free.clone()
    for i in range(3):
        alone = touching & (torch.arange(3)[:, None] == i)
        result += contact_acceleration(free, velocity, vectors, alone) - free
    return result


def always_pushing(free, velocity, vectors, touching):
    """Broken: contacts also pull (all of them count as active)."""
    return free + (contact_acceleration(free - 1000 * vectors.sum(0), velocity, vectors, touching) - free) * 0.9


@pytest.mark.parametrize("broken", [one_contact_at_a_time, always_pushing, lambda free, *_: free])
def test_the_optimality_check_catches_broken_solvers(broken):
    with pytest.raises(AssertionError):
        check_optimal(broken, contact_cases(2000))


def test_a_ball_pressed_against_a_wall_rests_at_the_depth_of_the_closed_form():
    # at rest the acceleration is 0, so the push is D r with r = k d g and D = d / ((1 - d) w)
    def push(depth):
        x = min(depth / IMPEDANCE[2], 1)
        d = IMPEDANCE[0] + (IMPEDANCE[1] - IMPEDANCE[0]) * (2 * x**2 if x < 0.5 else 1 - 2 * (1 - x) ** 2)
        return d / ((1 - d) * INVERSE_WEIGHT) * STIFFNESS * d * depth

    depth = brentq(lambda g: push(g) - GEAR, 0, 0.01)
    solid = solid_of("OO##/OO##/####/####")
    position, velocity = point(0.5, 0.5), point(0, 0)
    for _ in range(500):
        position, velocity = simulation_step(position, velocity, point(-GEAR, 0), solid)
    assert float(position[0]) == pytest.approx(CONTACT - depth, abs=1e-6)
    assert velocity.abs().max() < 1e-8


def test_nearest_walls_are_all_that_can_be_touched():
    texts = all_layouts()[::400]
    rng = np.random.default_rng(0)
    for text in texts:
        free = [divmod(c, 4) for c in np.flatnonzero(np.diag(path_lengths(layout_code(text))) == 0)]
        cells = np.array(free)[rng.integers(len(free), size=200)][:, ::-1]
        inside = rng.uniform(0.03, 0.97, cells.shape)
        position = torch.from_numpy((cells + inside).T.copy())
        rows = ["######", *(f"#{row}#" for row in text.split("/")), "######"]
        distances = []
        for r in range(6):
            for c in range(6):
                if rows[r][c] == "#":
                    box = torch.tensor([[c - 1.0], [r - 1.0]], dtype=torch.float64)
                    distances.append((position - position.clamp(box, box + 1)).norm(dim=0))
        every = torch.stack(distances)
        solid = solid_of(text).expand(200)
        near = every.amin(0) < 0.5
        torch.testing.assert_close(wall_distance(position, solid)[near], every.amin(0)[near])
        vectors, walls = nearest_walls(position, solid)
        assert torch.equal((walls & (vectors.norm(dim=1) < CONTACT)).sum(0), (every < CONTACT).sum(0))


def test_a_point_on_a_face_touches_the_wall_on_either_side_of_it():
    solid = solid_of("####/#OOO/OO#O/#O#O").expand(4)
    faces = torch.tensor([[1.0, 1.5], [1.5, 1.0], [2.0, 2.5], [2.5, 2.0]], dtype=torch.float64).t()
    assert wall_distance(faces, solid).tolist() == [0, 0, 0, 0]
    inside = torch.tensor([[1.2, 1.5], [1.5, 1.2], [2.2, 2.5], [2.5, 2.2]], dtype=torch.float64).t()
    assert wall_distance(inside, solid).tolist() == pytest.approx([0.2, 0.2, 0, 0])


def test_wall_distance_is_zero_inside_walls_and_outside():
    solid = solid_of(PUBLISHED[0]).expand(5)
    points = torch.tensor([[0.5, 0.5], [-0.1, 2.5], [1e9, 2.5], [math.nan, 1.0], [1.5, 1.5]], dtype=torch.float64).t()
    assert wall_distance(points, solid).tolist()[:4] == [0, 0, 0, 0]
    assert wall_distance(points, solid)[4] > 0.4


def wildest(count, seed):
    """Balls anywhere in random layouts at full speed, and actions that change direction rarely."""
    rng = np.random.default_rng(seed)
    texts = [str(t) for t in rng.choice(all_layouts(), count)]
    cells = [rng.choice(np.flatnonzero(np.diag(path_lengths(layout_code(t))) == 0)) for t in texts]
    cells = np.stack([np.array(cells) % 4, np.array(cells) // 4])
    position = torch.from_numpy(cells + rng.uniform(0.11, 0.89, cells.shape))
    velocity = torch.from_numpy(rng.choice([-5.0, 5.0, 0.3], cells.shape))
    pushes = torch.from_numpy(rng.choice([-1.0, 1.0, 0.0], (12, 2, count)).repeat(20, 0))
    return position.float(), velocity.float(), pushes, solid_of(*texts)


def check_stays_outside(push_back):
    position, velocity, pushes, solid = wildest(3000, seed=0)
    for push in pushes:
        position, velocity = push_back(position, velocity, push, solid)
        assert wall_distance(position.double(), solid).min() > 0.02  # the GAP that the environment asks of starts
        assert velocity.abs().max() < SPEED_BOUND


def test_no_ball_enters_a_wall_and_speeds_stay_in_the_space():
    assert point_maze.GAP == 0.02
    check_stays_outside(lambda p, v, a, s: move(p, v, a, s, repeat=1))


def test_balls_without_contacts_enter_walls():
    with pytest.raises(AssertionError):
        check_stays_outside(lambda p, v, a, s: move(p, v, a, torch.zeros_like(s), repeat=1))


def test_balls_without_corners_enter_walls(monkeypatch):
    def sides_only(position, solid):
        vectors, walls = nearest_walls(position, solid)
        return vectors, walls & torch.tensor([[True], [True], [False]])

    monkeypatch.setattr(point_maze, "nearest_walls", sides_only)
    with pytest.raises(AssertionError):
        check_stays_outside(lambda p, v, a, s: move(p, v, a, s, repeat=1))


def test_mirrored_mazes_give_mirrored_paths():
    position, velocity, pushes, solid = (v if i == 2 else v.clone() for i, v in enumerate(wildest(200, seed=1)))
    position, velocity = position.double(), velocity.double()

    def transpose(code):
        return sum(((code >> (6 * r + c)) & 1) << (6 * c + r) for r in range(6) for c in range(6))

    def flip(code):
        return sum(((code >> (6 * r + c)) & 1) << (6 * r + 5 - c) for r in range(6) for c in range(6))

    sign = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    middle = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    paths = [
        (position, velocity, solid, lambda v: v, lambda p: p),
        (position.flip(0), velocity.flip(0), transpose(solid), lambda v: v.flip(0), lambda p: p.flip(0)),
        (middle + sign * position, sign * velocity, flip(solid), lambda v: sign * v, lambda p: middle + sign * p),
    ]
    ends = []
    for p, v, walls, turn, back in paths:
        for push in pushes[:60]:
            p, v = simulation_step(p, v, GEAR * turn(push), walls)
        ends.append(back(p))
    # corners magnify rounding
    assert ((ends[0] - ends[1]).abs().amax(0) < 1e-9).double().mean() > 0.99
    assert ((ends[0] - ends[2]).abs().amax(0) < 1e-9).double().mean() > 0.99
    assert (ends[0] - position).abs().amax(0).median() > 0.1


def test_rows_do_not_influence_each_other():
    position, velocity, pushes, solid = wildest(97, seed=2)
    together = [(position, velocity)]
    for push in pushes[:40]:
        together.append(move(*together[-1], push, solid))
    for row in range(0, 97, 7):
        alone = (position[:, [row]], velocity[:, [row]])
        for push in pushes[:40]:
            alone = move(*alone, push[:, [row]], solid[[row]])
        assert torch.equal(alone[0][:, 0], together[-1][0][:, row])
        assert torch.equal(alone[1][:, 0], together[-1][1][:, row])


def test_rows_without_contact_are_not_touched_by_the_shortcut():
    # the path of other devices, where all rows go through the solver, gives the same as the one of the CPU
    position, velocity, pushes, solid = wildest(500, seed=3)
    position, velocity = position.double(), velocity.double()
    for push in pushes[:40]:
        velocity = velocity.clamp(-MAX_SPEED, MAX_SPEED)
        force = GEAR * push
        free = (force - DAMPING * velocity) / MASS
        everywhere = contact_acceleration(free, velocity, *point_maze._contacts(position, solid))
        shortcut = free.clone()
        point_maze._push_back(shortcut, velocity, position, solid)
        torch.testing.assert_close(shortcut, everywhere, atol=1e-11, rtol=1e-12)
        position, velocity = simulation_step(position, velocity, force, solid)


# -- MuJoCo -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mujoco():
    return pytest.importorskip("mujoco", reason="the comparison needs the package mujoco")


def test_ten_thousand_steps_without_contact_as_in_mujoco(mujoco, script):
    flight = script.free_flight(10_000)
    assert np.abs(flight.velocity).max() > MAX_SPEED  # the clip matters
    assert script.trajectory_errors([flight], None).max() < 1e-9


def test_contacts_as_in_mujoco(mujoco, script):
    for layout in PUBLISHED:
        recordings = script.maze_episodes(layout, 6)
        errors = script.step_errors(recordings, layout)
        touching = errors[:, 2] == 1
        assert touching.sum() > 200
        assert errors[~touching, :2].max() < 1e-12
        assert errors[touching, 0].max() < 1e-5  # MuJoCo's solver stops at a tolerance
        assert np.median(script.trajectory_errors(recordings, layout).max(1)) < 1e-4


def test_the_comparison_catches_other_contacts(mujoco, script, monkeypatch):
    recordings = script.maze_episodes(PUBLISHED[0], 6)

    def error():
        return script.step_errors(recordings, PUBLISHED[0])[:, 0].max()

    good = error()
    for name, value in (("CONTACT", RADIUS), ("STIFFNESS", STIFFNESS / 2), ("CONTACT_DAMPING", 0.0),
                        ("INVERSE_WEIGHT", 1 / MASS)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(point_maze, name, value)
            assert error() > 1e-5 > good, name


def test_the_check_prints_its_figures(mujoco, script, monkeypatch, capsys):
    for name, value in (("FREE_STEPS", 50), ("EPISODES", 2)):
        monkeypatch.setattr(script, name, value)
    assert script.main() == 0
    assert "in contact" in capsys.readouterr().out


def test_the_check_says_what_is_missing(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert script.main() == 2
    assert "needs the package mujoco" in capsys.readouterr().err
