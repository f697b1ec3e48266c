"""Receding-horizon control: every environment on its own clock."""

from __future__ import annotations

import pytest
import torch
from worlds import Point, small

from clbench.errors import ConfigError, ContractError
from clbench.planners.bounds import ActionBounds
from clbench.planners.cem import CEM
from clbench.planners.gradient import Gradient
from clbench.planners.icem import ICEM
from clbench.planners.mpc import MPC
from clbench.planners.mppi import MPPI
from clbench.planners.objectives import GoalDistance
from clbench.planners.random_shooting import RandomShooting
from clbench.rng import torch_generator

MODEL, HORIZON = Point(), 6


class Script:
    """Plans 100 * (number of the plan) + 10 * environment + step; its memory counts the plans of each environment."""

    def __init__(self):
        self.planned: list[list[int]] = []

    def start(self, envs, device):
        return {"plans": torch.zeros(envs, dtype=torch.int64), "moved": torch.zeros(envs, dtype=torch.int64)}

    def shift(self, memory, steps):
        return {**memory, "moved": memory["moved"] + steps}

    def plan(self, model, z, objective, memory, *, rng):
        self.planned.append(z[:, 0].int().tolist())
        count = memory["plans"] + 1
        plan = 100.0 * count[:, None] + 10 * z[:, :1] + torch.arange(HORIZON)
        return plan[..., None], {"plans": count, "moved": memory["moved"]}


class Everywhere:
    """An objective that is the same for all environments."""

    def __call__(self, z, step):
        return z.sum(-1)

    def select(self, rows):
        return self


def run(mpc, first, objective=None, envs=3, memory=None):
    """The actions (steps, B) of a loop in which ``first[t]`` are the environments that begin an episode."""
    z, actions = torch.arange(float(envs))[:, None].repeat(1, 2), []
    for begin in first:
        flags = torch.zeros(envs, dtype=torch.bool)
        flags[begin] = True
        action, memory = mpc.act(MODEL, z, objective or Everywhere(), memory, flags, rng=torch_generator(0))
        actions.append(action[:, 0].int().tolist())
    return actions, memory


@pytest.mark.parametrize("objective", [Everywhere(), lambda z, step: z.sum(-1)], ids=["select", "all rows"])
def test_plans_are_executed_and_renewed_each_on_its_own_clock(objective):
    planner = Script()
    actions, memory = run(MPC(planner, replan_every=3), [[0, 1, 2], [], [], [], [1], [], [], []], objective)
    assert [a[0] for a in actions] == [100, 101, 102, 200, 201, 202, 300, 301]
    # the second environment begins again at step 4: with a fresh memory, and from then on with another clock
    assert [a[1] for a in actions] == [110, 111, 112, 210, 110, 111, 112, 210]
    assert memory["cursor"].tolist() == [2, 1, 2]
    # shifted by the steps executed since the last plan, and not at all after a reset
    assert memory["planner"]["moved"].tolist() == [6, 3, 6]
    if isinstance(objective, Everywhere):  # only those that are due have been planned for
        assert planner.planned == [[0, 1, 2], [0, 1, 2], [1], [0, 2], [1]]


def test_negative_control_a_shared_clock_is_noticed():
    class Shared(MPC):
        def due(self, memory, first):
            return super().due(memory, first).any().expand_as(first)

    actions, _ = run(Shared(Script(), replan_every=3), [[0, 1, 2], [], [1], []])
    assert [a[0] for a in actions] != [100, 101, 102, 200]


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, RandomShooting, Gradient])
@pytest.mark.parametrize("every", [1, 2])
def test_a_row_acts_as_if_it_were_alone(cls, every):
    """Episodes of different lengths in one batch; each with its own generator."""
    mpc = MPC(cls(None, small(cls, horizon=4)), replan_every=every)
    goal = torch.tensor([[2.0, 1.0], [-1.0, 0.5], [0.0, -2.0]])
    begins = [[0, 3], [0, 1], [0]]

    def play(rows):
        z, memory, path = torch.zeros(len(rows), 2), None, []
        generators = [torch_generator(5, i) for i in rows]
        for t in range(5):
            first = torch.tensor([t in begins[i] for i in rows])
            z = torch.where(first[:, None], torch.zeros_like(z), z)
            action, memory = mpc.act(MODEL, z, GoalDistance(goal[rows]), memory, first, rng=generators)
            z = z + action
            path.append(z)
        return torch.stack(path, 1)

    together = play([0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(play([i])[0], together[i], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, RandomShooting, Gradient])
def test_nothing_that_is_passed_in_changes(cls):
    mpc, goal = MPC(cls(None, small(cls)), replan_every=2), GoalDistance(torch.ones(3, 2))
    memory, z = None, torch.zeros(3, 2)
    first = torch.ones(3, dtype=torch.bool)

    def flat(m):
        return {k: v.clone() for k, v in {**m, **m["planner"]}.items() if isinstance(v, torch.Tensor)}

    for t in range(4):
        before = flat(memory) if memory else {}
        old = memory
        _, memory = mpc.act(MODEL, z, goal, memory, first, rng=torch_generator(0, t))
        if old:
            assert all(torch.equal(v, before[k]) for k, v in flat(old).items())
        first = torch.tensor([False, t == 0, False])
    assert not z.any()


def test_a_copied_memory_continues_the_same():
    import copy
    import io

    mpc, goal = MPC(ICEM(None, small(ICEM)), replan_every=2), GoalDistance(torch.ones(2, 2))
    z, first = torch.zeros(2, 2), torch.tensor([True, True])
    _, memory = mpc.act(MODEL, z, goal, None, first, rng=torch_generator(0))
    file = io.BytesIO()
    torch.save(copy.deepcopy(memory), file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    for t in range(1, 4):
        a, memory = mpc.act(MODEL, z, goal, memory, ~first, rng=torch_generator(t))
        b, stored = mpc.act(MODEL, z, goal, stored, ~first, rng=torch_generator(t))
        assert torch.equal(a, b)


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, Gradient])
def test_it_goes_where_it_should(cls):
    mpc, goal = (
        MPC(cls(None, small(cls, samples=128) if cls is not Gradient else small(cls))),
        torch.tensor([[2.5, -1.5]]),
    )
    z, memory = torch.zeros(1, 2), None
    for t in range(8):
        action, memory = mpc.act(
            MODEL, z, GoalDistance(goal), memory, torch.tensor([t == 0]), rng=torch_generator(0, t)
        )
        z = z + action
    assert float((z - goal).norm()) < 0.5 * float(goal.norm())


def test_a_planner_without_warm_start():
    class Plain:
        def plan(self, model, z, objective, memory, *, rng):
            assert memory is None
            return torch.arange(HORIZON).expand(len(z), -1)[..., None] * 1.0, "anything"

    actions, memory = run(MPC(Plain(), replan_every=2), [[0, 1, 2], [], [1], [], []])
    assert actions == [[0] * 3, [1] * 3, [0] * 3, [1] * 3, [0] * 3]
    assert memory["planner"] is None


def test_bad_control():
    with pytest.raises(ConfigError, match="replan_every must be at least 1, got 0"):
        MPC(Script(), replan_every=0)
    with pytest.raises(
        ConfigError, match="replan_every=7 needs plans of as many steps, but the planner's horizon is 6"
    ):
        run(MPC(Script(), replan_every=7), [[0, 1, 2]])
    _, memory = run(MPC(Script()), [[0, 1, 2]])
    with pytest.raises(ContractError, match="memory is of 3 environments, but 2 are to act"):
        run(MPC(Script()), [[]], envs=2, memory=memory)


def control(mpc, blocked, steps, seed=0, begin=()):
    """Actions (steps, B, 2) and memories of a world in which ``blocked[b]`` environments do not move at all."""
    z, rng, memory = torch.zeros(len(blocked), 2), torch_generator(seed), None
    stays = torch.tensor(blocked)[:, None]
    objective, actions, memories = GoalDistance(torch.full((len(blocked), 2), 50.0)), [], []
    for step in range(steps):
        first = torch.full((len(blocked),), step == 0 or step in begin)
        action, memory = mpc.act(MODEL, z, objective, memory, first, rng=rng)
        z = torch.where(stays, z, MODEL.predict(z, action))
        actions.append(action)
        memories.append(memory)
    return torch.stack(actions), memories


def escaping(replan_every=2, escape=0.5, **options):
    return MPC(ICEM(config=small(ICEM)), replan_every=replan_every, escape=escape, **options)


def test_what_does_not_move_as_promised_takes_random_actions_longer_each_time():
    actions, memories = control(escaping(), [False, True], 24)
    times = torch.stack([m["escape"]["times"] for m in memories])
    assert times[:, 0].tolist() == [0] * 24  # it moves as its plans promise, and follows them
    assert all(torch.equal(a[0], m["plan"][0, m["cursor"][0] - 1]) for a, m in zip(actions, memories, strict=True))
    # plan (2 steps), escape (2), plan (2), escape (4), plan (2), escape (6), plan (2), escape (8)...
    assert times[:, 1].tolist() == [0] * 2 + [1] * 4 + [2] * 6 + [3] * 8 + [4] * 4
    escapes = [slice(2, 4), slice(6, 10), slice(12, 18)]
    held = [actions[s, 1].unique(dim=0) for s in escapes]
    assert [len(h) for h in held] == [1, 1, 1]  # one action, held
    assert len(torch.cat(held).unique(dim=0)) == 3  # another one each time
    assert bool((actions.abs() <= 1).all()) and bool((torch.cat(held).abs().amax(1) > 0.99).all())


def test_negative_control_without_escape_a_blocked_environment_never_tries_anything_else():
    actions, memories = control(escaping(escape=0.0), [False, True], 24)
    assert "escape" not in memories[0]
    assert bool((actions > 0).all())  # both push towards the goal for ever
    assert not bool((control(escaping(), [False, True], 24)[0][:, 1] > 0).all())


def test_a_new_episode_forgets_that_the_last_one_was_stuck():
    _, memories = control(escaping(), [True], 12, begin=(5,))
    times = [int(m["escape"]["times"]) for m in memories]
    assert times == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 2]


def test_after_an_escape_the_planner_begins_afresh_since_its_plan_was_not_followed():
    class Watched(Script):
        """Plans that move; its memory sums up by how much it has been shifted."""

        def plan(self, model, z, objective, memory, *, rng):
            return torch.ones(len(z), HORIZON, 2), {"plans": memory["plans"] + 1, "moved": memory["moved"]}

    bounds = ActionBounds([-1, -1], [1, 1])
    _, memories = control(MPC(Watched(), replan_every=2, escape=0.5, bounds=bounds), [False, True], 8, begin=())
    moved = torch.stack([m["planner"]["moved"] for m in memories])
    assert moved[:, 0].tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    # plan (2 steps), escape (2; the plan made at its start still goes on from one that was followed), plan (2), escape (2)
    assert [bool(m["escape"]["escaping"][1]) for m in memories] == [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    assert moved[:, 1].tolist() == [0, 0, 2, 2, 0, 0, 2, 2]
    assert torch.stack([m["planner"]["plans"] for m in memories])[:, 1].tolist() == [1, 1, 2, 2, 1, 1, 2, 2]


def test_bad_escapes():
    with pytest.raises(ConfigError, match="escape must be in \\[0, 1\\), got 1.0"):
        escaping(escape=1.0)
    with pytest.raises(ConfigError, match="give bounds"):
        MPC(Script(), escape=0.5)
