"""Scripted data of OGBench's point mazes: what the walks do, and that they are functions of their arguments."""

import numpy as np
import pytest
import torch

from clbench.envs.ogbench_maze import RADIUS, Maze
from clbench.envs.ogbench_maze_data import ogbench_maze, statistics
from clbench.errors import ConfigError
from clbench.streams.ogbench_mazes import (
    ENTRIES,
    EXITS,
    centres,
    free_cells,
    next_cells,
    numbers,
    path_lengths,
)


def states_of(data):
    """(E, T + 1, 2) float32, and actions (E, T, 2)."""
    count = len(data.lengths)
    rows = data.observations["observation"].view(count, -1, 2)
    return torch.cat([rows, data.final_observations["observation"][:, None]], 1), data.actions.view(count, -1, 2)


def follows_the_physics(data, step_size):
    """Whether each state is what the environment makes of the state before and the action."""
    states, actions = states_of(data)
    maze = Maze(data.metadata["maze"])
    before, after = states[:, :-1].reshape(-1, 2).t(), states[:, 1:].reshape(-1, 2).t()
    moved = maze.move(before.double(), actions.reshape(-1, 2).t().double(), step_size).float()
    return bool((moved == after).all())


@pytest.mark.parametrize("kind", ["navigate", "stitch"])
def test_states_follow_from_actions(kind):
    data = ogbench_maze(kind=kind, trajectories=40, steps=150, step_size=0.5)
    assert follows_the_physics(data, 0.5)
    assert not follows_the_physics(data, 0.49)  # negative control
    assert len(data) == 40 * 150 and (data.lengths == 150).all()
    assert data.observations["observation"] is data.observations["achieved_goal"]
    assert data.actions.abs().max() <= 1
    found = statistics(data)
    assert found["in_walls"] == 0 and found["coverage"] > 0.9 and found["touching"] < 0.1


def test_smaller_data_are_the_beginning_of_larger_ones():
    small, large = (states_of(ogbench_maze(trajectories=n, steps=t)) for n, t in ((7, 40), (33, 90)))
    assert torch.equal(small[0], large[0][:7, :41]) and torch.equal(small[1], large[1][:7, :40])
    for other in ({"seed": 1}, {"kind": "stitch"}, {"maze": "large"}, {"noise": 0.4}):  # negative controls
        assert not torch.equal(small[1], states_of(ogbench_maze(trajectories=7, steps=40, **other))[1]), other


def test_global_generators_do_not_matter():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ogbench_maze(trajectories=3, steps=20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first.actions, ogbench_maze(trajectories=3, steps=20).actions)


def test_stitch_goes_four_cells_far_and_stays():
    data = ogbench_maze(maze="large", kind="stitch", trajectories=300, steps=200)
    states, _ = states_of(data)
    maze = Maze("large")
    cells = maze.cell(states.reshape(-1, 2).t()).view(300, -1)
    apart = path_lengths("large")[cells[:, 0], cells[:, -1]]
    assert np.bincount(apart).tolist() == [0, 0, 0, 0, 300]
    assert (cells[:, -60:] == cells[:, -1:]).all()
    last = states[:, -1].double() - maze.centres[:, cells[:, -1]].t()
    assert last.norm(dim=1).max() < 1.5  # around the centre, wherever the goal is


def test_navigate_keeps_on_going_to_new_goals():
    states, _ = states_of(ogbench_maze(maze="medium", trajectories=50, steps=1000))
    cells = Maze("medium").cell(states.reshape(-1, 2).t()).view(50, -1)
    visited = [len(np.unique(row)) for row in cells.numpy()]
    moves = (cells[:, 1:] != cells[:, :-1]).double().sum(1)
    assert np.mean(visited) > 12 and moves.mean() > 25
    resting = (cells[:, -200:] == cells[:, -1:]).all(1).double().mean()  # goals far off a centre take long to be met
    stitch, _ = states_of(ogbench_maze(kind="stitch", trajectories=50, steps=1000))
    still = Maze("medium").cell(stitch.reshape(-1, 2).t()).view(50, -1)
    assert resting < 0.2 and (still[:, -200:] == still[:, -1:]).all()  # negative control
    starts = states_of(ogbench_maze(trajectories=3000, steps=1))[0][:, 0]
    maze = Maze("medium")
    cell = maze.cell(starts.t())
    offset = starts.double() - maze.centres[:, cell].t()
    assert offset.abs().max() <= 1 + 1e-6 and (offset.var(0) - 1 / 3).abs().max() < 0.03
    count = torch.bincount(cell, minlength=64)[free_cells("medium")]
    assert count.min() > 60 and count.sum() == 3000  # uniform over 26 free cells: 115 each


def test_actions_are_the_direction_of_the_path_and_noise():
    quiet, actions = states_of(ogbench_maze(kind="stitch", trajectories=200, steps=12, noise=0.0))
    assert ((actions[:, 0].norm(dim=1) - 1).abs() < 1e-5).all()  # unit length without noise
    maze, way = Maze("medium"), next_cells("medium")
    cell = maze.cell(quiet[:, 0].t())
    options = np.stack([way[cell.numpy(), goal] for goal in free_cells("medium")], 1)  # next cells to any goal
    targets = torch.from_numpy(centres("medium")[options]) - quiet[:, 0, None].double()
    cosine = (targets / targets.norm(dim=-1, keepdim=True) * actions[:, 0, None].double()).sum(-1)
    assert (cosine.amax(1) > 1 - 1e-6).all()
    noisy = ogbench_maze(kind="stitch", trajectories=4000, steps=1, noise=0.5)
    first = states_of(ogbench_maze(kind="stitch", trajectories=4000, steps=1, noise=0.0))[1] - noisy.actions[:, None]
    free = (noisy.actions.abs() < 1).all(1)
    assert 0.3 < float(first[free].std()) < 0.5  # clipping takes the tails


def test_teleporters_act_in_the_data():
    states, _ = states_of(ogbench_maze(maze="teleport", trajectories=400, steps=300))
    jump = (states[:, 1:] - states[:, :-1]).norm(dim=-1) > 1
    exits = torch.from_numpy(centres("teleport")[numbers("teleport", EXITS["teleport"])]).float()
    landed = states[:, 1:][jump]
    which = (landed[:, None] == exits).all(-1)
    assert int(jump.sum()) > 100 and (which.sum(1) == 1).all()
    share = which.double().mean(0)
    assert (share - 1 / 3).abs().max() < 5 * (2 / 9 / len(landed)) ** 0.5
    entries = torch.from_numpy(centres("teleport")[numbers("teleport", ENTRIES["teleport"])]).float()
    left = states[:, :-1][jump]
    assert (torch.cdist(left, entries).amin(1) < 1.5 + 0.2 * 2**0.5 + RADIUS).all()
    # nobody is left at a teleporter
    assert (torch.cdist(states.reshape(-1, 2)[1:], entries).amin(1) > 1.0).double().mean() > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maze": "tiny"}, "Unknown maze 'tiny'"),
        ({"kind": "stich"}, "Did you mean 'stitch'"),
        ({"trajectories": 0}, "trajectories must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"step_size": 0.7}, r"step_size must be in \(0, 0.5\]"),
        ({"noise": -0.1}, "noise must be a standard deviation"),
        ({"noise": float("nan")}, "noise must be a standard deviation"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ConfigError, match=message):
        ogbench_maze(**{"trajectories": 2, "steps": 2, **options})
