"""Agent eidetic-pldm: what finished tasks encode, predict and plan never changes, whatever is learned afterwards.

Each guarantee has a variant that is broken on purpose, which the same check must notice.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from clbench.agents.eidetic_pldm import EideticPLDM
from clbench.agents.jepa import eidetic as world
from clbench.agents.jepa import evidence
from clbench.agents.jepa.eidetic import EideticWorldModel, LevelNorm
from clbench.agents.networks.eidetic.layers import PrefixNorm
from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.ownership import owned_parameters
from clbench.agents.networks.eidetic.verify import fill_free, verify
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset, map_obs
from clbench.errors import CapacityExhausted, ConfigError
from clbench.planners.rollout import rollout
from clbench.planners.steppers import PredictStepper

POINT = Box(-1, 1, (2,), np.float32)
SPEED = Box(-1, 1, (1,), np.float32)
PLANE = Spaces(Dict(achieved_goal=POINT, desired_goal=POINT), Box(-0.3, 0.3, (2,), np.float32))
MOVING = Spaces(Dict(achieved_goal=POINT, desired_goal=POINT, speed=SPEED), Box(-0.3, 0.3, (2,), np.float32))
TINY: dict[str, Any] = {
    "window": 4, "batch_size": 16, "replan_every": 2, "latent": 18, "encoder_hidden": (24,), "hidden": (24,), "lr": 3e-3,
    "planner_options": {"horizon": 8, "samples": 32, "elites": 6, "iterations": 2},
    "pruning": {"tasks": 3, "recover": 0.1},
}  # fmt: skip
BUDGET = 40


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces = PLANE, seed: int = 0, cls: type[EideticPLDM] = EideticPLDM, **options: Any) -> EideticPLDM:
    config = build(EideticPLDM.Config, {**TINY, **options}, "agent")
    return cls(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def walks(
    turn: float = 0.0, episodes: int = 30, length: int = 12, *, scale: float = 0.2, seed: int = 0, speed: bool = False,
    shift: float = 0.0,
) -> OfflineDataset:  # fmt: skip
    """Random walks in the square, where actions are turned by an angle: the dynamics of a task."""
    rng = generator(seed)
    angle = torch.rand(episodes, length, generator=rng) * 2 * math.pi
    size = scale * torch.rand(episodes, length, generator=rng).sqrt()
    actions = size[..., None] * torch.stack([angle.cos(), angle.sin()], 2)
    moves = size[..., None] * torch.stack([(angle + turn).cos(), (angle + turn).sin()], 2)
    path = [torch.rand(episodes, 2, generator=rng) * 2 - 1]
    for t in range(length):
        path.append((path[-1] + moves[:, t]).clamp(-1, 1))
    states = torch.stack(path, 1) + shift
    rows = {"achieved_goal": states[:, :-1].flatten(0, 1)}
    last = {"achieved_goal": states[:, -1]}
    if speed:
        rows["speed"], last["speed"] = size.flatten()[:, None], size[:, -1:]
    return OfflineDataset(rows, actions.flatten(0, 1), torch.full((episodes,), length), last)


def learn(agent: EideticPLDM, data: OfflineDataset, budget: int = BUDGET, *, task: int | None = None) -> list[Any]:
    agent.start_task(TaskInfo(task, None))
    metrics = [dict(m) for m in agent.learn(Experience(dataset=data), budget, rng=generator(1))]
    agent.finish_task()
    return metrics


def points(count: int = 5, seed: int = 0, *, speed: bool = False) -> dict[str, Tensor]:
    here, goal = (torch.rand(2, count, 2, generator=generator(seed)) * 2 - 1).unbind()
    return {"achieved_goal": here, "desired_goal": goal} | ({"speed": torch.rand(count, 1)} if speed else {})


def ids(task: int, count: int = 5) -> Tensor:
    return torch.full((count,), task, dtype=torch.int64)


def follow(
    agent: EideticPLDM, task: Tensor | None, obs: dict[str, Tensor], steps: int = 3, turn: float = 0.0
) -> Tensor:
    """Actions (steps, B, A) with a fixed generator, in a plane where actions are turned."""
    memory, found, rng = None, [], generator(3)
    for step in range(steps):
        first = torch.full((len(obs["achieved_goal"]),), step == 0)
        actions, memory = agent.act(obs, memory, first, rng=rng, task=task)
        found.append(actions)
        obs = {**obs, "achieved_goal": obs["achieved_goal"] + turned(actions, turn)}
    return torch.stack(found)


def turned(actions: Tensor, turn: float) -> Tensor:
    c, s = math.cos(turn), math.sin(turn)
    return actions @ torch.tensor([[c, s], [-s, c]])


def behaviour(agent: EideticPLDM, task: int, spaces: Spaces = PLANE) -> dict[str, Tensor]:
    """All that a finished task computes: latents, goals, predictions, an open-loop plan, and actions in closed loop."""
    obs, model = points(speed=spaces is MOVING), agent.model(task)
    with torch.no_grad():
        z, goal = model.encode(obs), model.encode_goal(obs)
        actions = torch.rand(5, 2, generator=generator(2)) - 0.5
        controller, objective = agent.controller(task), world_objective(agent, task, goal)
        plan, _ = controller.planner.plan(model, z, objective, None, rng=generator(4))
        known = agent.ids[task]
        followed = follow(agent, None if known is None else ids(known), obs)
        return {"z": z, "goal": goal, "next": model.predict(z, actions), "plan": plan, "actions": followed}


def world_objective(agent: EideticPLDM, task: int, goal: Tensor) -> Any:
    from clbench.planners.objectives import GoalDistance

    return GoalDistance(goal, features=agent.model(task).goal_features)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])]


@pytest.fixture(scope="module")
def three() -> tuple[EideticPLDM, list[dict[str, Tensor]]]:
    """An agent with three tasks, and what each did when it was finished."""
    agent, seen = make(), []
    for k in range(3):
        learn(agent, walks(turn=k * 2.0, seed=k, scale=0.2 + 0.05 * k), task=k)
        seen.append(behaviour(agent, k))
    return agent, seen


# -- nothing is forgotten ----------------------------------------------------------------------------------------------


def test_old_tasks_are_bitwise_unchanged(three: tuple[EideticPLDM, list[dict[str, Tensor]]]) -> None:
    agent, seen = three
    agent._models, agent._controllers = {}, {}  # nothing is kept that could hide a change
    for k in range(3):
        assert not changed(seen[k], behaviour(agent, k))
    owners = agent.network.latent.owner.tolist()
    assert {0, 1, 2} <= set(owners)
    assert [s["z"].shape[1] for s in seen] == [sum(o <= k for o in owners) for k in range(3)]  # prefixes


def test_every_level_of_evidence_passes(three: tuple[EideticPLDM, list[dict[str, Tensor]]]) -> None:
    network = three[0].eidetic["world_model"]
    found = verify(network)
    assert found.ok and found.tasks == 3 and found.max_abs_change == 0
    assert found.status == dict.fromkeys(("L0", "L1", "L2", "L3", "L4"), "pass"), found.details


def test_extracted_networks_hold_their_prefix_and_nothing_else(
    three: tuple[EideticPLDM, list[dict[str, Tensor]]],
) -> None:
    network = three[0].network
    obs, action = torch.rand(7, 2), torch.rand(7, 2)
    for k in range(3):
        alone = network.extract(k)
        size = int((network.latent.owner <= k).sum())
        head: Any = alone.head.layers[k]
        assert alone.latent.size == size == head.weight().shape[0]
        whole, few = network.eval()(obs, action, k), alone(obs, action, k)
        for a, b in zip(whole, few, strict=True):
            assert a.shape == b.shape == (7, size)
            assert torch.allclose(a, b, atol=1e-4)
        again = copy.deepcopy(network)
        fill_free(again, 1e3, generator(0))
        for other in again.spaces.values():  # infinite values in younger units reach no extracted network
            for _, parameter in again.writers(other):  # type: ignore[arg-type]
                parameter.value.data.fill_(math.inf)
        assert all(torch.equal(a, b) for a, b in zip(again.extract(k)(obs, action, k), few, strict=True))


class Unprotected(EideticPLDM):
    """The head of the first task goes on learning: it is moved after every other task."""

    def finish_task(self) -> None:
        super().finish_task()
        if self.network.committed > 1:
            self.network.head.layers[0].weight.store.data.add_(1e-3)  # type: ignore[union-attr]
            self._models.clear()


class Drifting(EideticPLDM):
    """Statistics of inputs are those of the newest task."""

    def _begin_phase(self, data: OfflineDataset, budget: int) -> None:
        super()._begin_phase(data, budget)
        self.network.features.standardise.fit(data.observations["achieved_goal"])  # type: ignore[call-overload]
        self._models.clear()


class OneCap(EideticPLDM):
    """All tasks act within the largest action of any."""

    def _settings(self, task: int) -> dict[str, Any]:
        largest = max([self.cap, *(s["cap"] for s in self.acting)])
        return {**super()._settings(task), "cap": largest}


@pytest.mark.parametrize(
    ("cls", "parts", "level"),
    [
        (EideticPLDM, [], ""),
        (Unprotected, ["next"], "L0"),
        (Drifting, ["z"], "L1"),
        (OneCap, ["plan"], ""),
    ],
)
def test_what_is_not_protected_is_noticed(cls: type[EideticPLDM], parts: list[str], level: str) -> None:
    agent = make(cls=cls)
    learn(agent, walks(), task=0)
    before = behaviour(agent, 0)
    learn(agent, walks(1.0, seed=1, scale=0.3, shift=0.5), 20, task=1)
    found = changed(before, behaviour(agent, 0))
    assert set(parts) <= set(found) and (parts or not found)
    evidence = verify(agent.network)
    assert evidence.ok is not bool(level) and (not level or evidence.status[level] == "fail")


def test_caps_and_planners_belong_to_tasks_and_statistics_to_the_first() -> None:
    agent = make()
    learn(agent, walks(scale=0.1), 20, task=0)
    mean = agent.network.features.standardise.mean.clone()
    learn(agent, walks(scale=0.25, shift=3.0), 20, task=1)
    assert torch.equal(agent.network.features.standardise.mean, mean)
    assert [round(s["cap"], 2) for s in agent.acting] == [0.1, 0.25]
    for k, cap in ((0, 0.1), (1, 0.25)):
        moved = follow(agent, ids(k), points()).norm(dim=-1)
        assert cap / 2 < float(moved.max()) <= cap + 1e-4
    other = make(replan_every=1, planner="mppi", planner_options={"horizon": 6, "samples": 16})
    other.load_state_dict(agent.state_dict())
    assert torch.equal(follow(other, ids(0), points()), follow(agent, ids(0), points()))  # plans as it was committed
    with pytest.raises(ConfigError, match="statistics of the inputs belong to the tasks"):
        agent.network.fit_normaliser(torch.rand(5, 2), torch.rand(5, 2))


def test_an_id_that_comes_back_is_kept_and_its_budget_skipped(
    three: tuple[EideticPLDM, list[dict[str, Tensor]]],
) -> None:
    agent = make(seed=1)
    agent.load_state_dict(three[0].state_dict())
    before = agent.costs()
    assert learn(agent, walks(), 7, task=1) == [{"step": 7, "skipped": 7.0}]
    assert agent.costs() == before and agent.network.committed == 3
    with pytest.raises(CapacityExhausted, match="Task 3 finds no room"):
        learn(make_full(agent), walks(), 7, task=9)


def make_full(agent: EideticPLDM) -> EideticPLDM:
    for space in agent.network.prunable().values():
        space.owner.clamp_(max=2)
        space.version += 1
    return agent


# -- the network ---------------------------------------------------------------------------------------------------------


def test_the_level_norm_is_the_prefix_norm() -> None:
    class Net(EideticNetwork):
        def __init__(self) -> None:
            super().__init__()
            space = self.space("h", 40)
            self.norms = torch.nn.ModuleList([PrefixNorm(space), LevelNorm(space), LevelNorm(space, own=True)])

    net = Net()
    space: Any = net.spaces["h"]
    space.owner = torch.randint(0, 20, (40,), generator=generator(0)).to(
        torch.int16
    )  # more levels than one product has
    space.owner[30:] = torch.iinfo(torch.int16).max
    space.kill(torch.arange(40) >= 37)
    x = torch.where(torch.arange(40) >= 37, 0.0, torch.randn(3, 5, 40, generator=generator(1)))
    for _, parameter in owned_parameters(net):
        parameter.store = torch.where(space.alive, parameter.fresh((40,), generator(2)), 0.0)
    prefix, level, own = (norm(x) for norm in net.norms)
    assert torch.allclose(prefix, level, atol=1e-4)
    for task in space.owner.unique().tolist():
        mine = ((space.owner == task) & space.alive).nonzero()[:, 0]
        expected = torch.nn.functional.layer_norm(x[..., mine], (len(mine),))
        assert torch.allclose(own[..., mine], expected, atol=1e-3)
    assert not bool(own[..., 37:].any()) and not torch.allclose(own, prefix, atol=1e-2)


@pytest.mark.parametrize("offset", [0.0, 30.0, 3000.0])
def test_the_level_norm_is_exact_where_means_are_large(offset: float) -> None:
    """The mean of squares less the squared mean, in float32, would be off by hundreds for the last offset."""

    class Net(EideticNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.norm = LevelNorm(self.space("h", 32), own=True)

    x = offset + torch.randn(8, 32, generator=generator(0))
    expected = torch.nn.functional.layer_norm(x.double(), (32,)).float()
    assert torch.allclose(Net().norm(x), expected, atol=2e-6 * max(offset, 1))


@pytest.mark.parametrize("norm", ["own", "prefix"])
@pytest.mark.parametrize("spaces", [PLANE, MOVING], ids=["goal", "context"])
def test_the_stepper_is_predict(norm: str, spaces: Spaces) -> None:
    agent = make(spaces, norm=norm)
    for k in range(2):
        learn(agent, walks(float(k), seed=k, speed=spaces is MOVING), 20, task=k)
    agent.start_task(TaskInfo(5, None))
    for k in range(3):  # the last one is under way
        model = agent.model(k)
        model.network.eval()
        with torch.no_grad():
            z = model.encode(points(speed=spaces is MOVING))
            actions = torch.rand(6, 5, 4, 2, generator=generator(5)) - 0.5
            cost = rollout(model, z, actions, lambda z, step: z.square().mean(-1))
            slow = rollout(Slow(model), z, actions, lambda z, step: z.square().mean(-1))
        assert torch.allclose(cost, slow, rtol=1e-4, atol=1e-4)
        assert isinstance(model.stepper(3), PredictStepper) == (norm == "prefix")


class Slow:
    """A world model without its stepper."""

    def __init__(self, model: Any):
        self.encode, self.predict = model.encode, model.predict


def test_widening_changes_no_finished_task(three: tuple[EideticPLDM, list[dict[str, Tensor]]]) -> None:
    agent = make(seed=1)
    agent.load_state_dict(three[0].state_dict())
    agent.network.widen({"latent": 6, "predictor0": 5, "encoder0": 4}, generator(0))
    agent.network.begin_task(agent.rng)
    head: Any = agent.network.head.layers[3]
    assert head.weight().shape == (24, 29)  # a new head is as wide as the latent now is
    for k in range(3):
        assert not changed(three[1][k], behaviour(agent, k))
    assert torch.isfinite(agent.network.predict(torch.rand(2, 24), torch.rand(2, 2), 3)).all()
    assert verify(agent.network).ok


# -- losses --------------------------------------------------------------------------------------------------------------


def test_anti_collapse_reaches_free_numbers_only() -> None:
    agent = make(variance_over_time=1.0)
    learn(agent, walks(), task=0)
    agent.start_task(TaskInfo(1, None))
    data = walks(1.0, seed=1)
    starts = data.window_starts(4)
    batch = data.windows(starts[:16], 4)
    loss, terms = agent.loss(batch)
    agent.network.zero_grad()
    loss.backward()
    owned = agent.network.latent.owner == 0
    assert 0 < int(owned.sum()) < 18
    for _, parameter in owned_parameters(agent.network):
        rows = parameter.out[1].owners() == 0
        grad = parameter.value.grad
        if grad is None:  # a head of another task
            assert bool(rows.all())
            continue
        assert not bool(grad.index_select(parameter.out[0], rows.nonzero()[:, 0]).any())
    last = agent.network.encoder[-1].weight.value.grad  # type: ignore[union-attr]
    assert bool((last[~owned].abs().sum(1) > 0).all())  # type: ignore[index]
    # decorrelation is from what older tasks have: without them the term is another
    z = agent.network.encode(world.join(agent.keys, batch[0], axes=2))
    assert not torch.isclose(terms["covariance"], world_covariance(z[..., ~owned]))
    assert torch.isclose(terms["covariance"], world_covariance(z))


def world_covariance(z: Tensor) -> Tensor:
    from clbench.agents.jepa.losses import covariance_loss

    return covariance_loss(z)


def test_quality_falls_with_dynamics_and_with_collapse() -> None:
    agent = make()
    data = walks()
    agent.start_task(TaskInfo(0, None))
    for _ in agent.learn(Experience(dataset=data), 60, rng=generator(1)):
        pass
    judged = data.windows(data.window_starts(4)[:64], 4)
    good = agent.components(judged)
    assert good.keys() == {"dynamics", "probe", "rank", "spread"}
    agent.before = {}
    assert agent.quality(judged) == 1.0
    network = agent.network
    state = network.snapshot()
    with torch.no_grad():
        network.head.layers[0].weight.value.normal_(generator=generator(0))  # type: ignore[union-attr]
    assert agent.components(judged)["dynamics"] < good["dynamics"] - 0.1
    assert agent.quality(judged) < 0.9
    network.restore(state)
    with torch.no_grad():  # one constant latent is predicted well, and worth nothing
        network.encoder[-1].weight.value.mul_(1e-6)  # type: ignore[union-attr]
        network.norm.weight.value.mul_(1e-6)  # type: ignore[union-attr]
    found = agent.components(judged)
    assert found["spread"] < good["spread"] - 0.1 and agent.quality(judged) < 0.9


def test_quality_does_not_lean_on_older_tasks() -> None:
    """Older numbers alone would pass for a good latent, and a task would give back all that it needs."""
    agent = make()
    learn(agent, walks(), task=0)
    agent.start_task(TaskInfo(1, None))
    data = walks(1.0, seed=1)
    judged = data.windows(data.window_starts(4)[:64], 4)
    before = agent.components(judged)
    free = agent.network.latent.free
    with torch.no_grad():
        agent.network.encoder[-1].weight.value[free] *= 1e-9  # type: ignore[union-attr, operator, index]
        agent.network.encoder[-1].bias.value[free] = torch.arange(float(free.sum()))  # type: ignore[union-attr, operator, index]
    after = agent.components(judged)
    assert before["probe"] > 0.5 and after["probe"] < 0.1 and after["spread"] < 0.1


def test_every_task_learns_its_own_dynamics() -> None:
    agent = make()
    for k in range(2):
        found = learn(agent, walks(2.0 * k, seed=k), 150, task=k)
        losses = [m["prediction"] for m in found if "prediction" in m]
        assert losses[-1] < losses[0]
        assert found[-1]["step"] == 150
    # each task predicts its own dynamics better than the other's
    for k in range(2):
        errors = [float(prediction_error(agent, j, walks(2.0 * k, seed=9))) for j in range(2)]
        assert errors[k] < errors[1 - k]


def prediction_error(agent: EideticPLDM, task: int, data: OfflineDataset) -> Tensor:
    observations, actions = data.windows(data.window_starts(1), 1)
    frames = world.join(agent.keys, observations, axes=2)
    return agent._errors(task, frames[:, 0], actions[:, 0], frames[:, 1]).square().mean()


# -- which task ------------------------------------------------------------------------------------------------------------


def test_evidence_finds_the_dynamics() -> None:
    agent = make(
        smoothness=1.0, frequencies=0, hidden=(48,), encoder_hidden=(48,), batch_size=64,
        pruning={"tasks": 2, "train": 0.2, "recover": 0.05},
    )  # fmt: skip
    for k in range(2):
        learn(agent, walks(math.pi * k, 200, seed=k), 200)
    assert agent.ids == [None, None]
    for k in range(2):
        data = walks(math.pi * k, episodes=40, seed=7)
        states = data.observations["achieved_goal"].reshape(40, 12, 2)  # type: ignore[index]
        actions = data.actions.reshape(40, 12, 2)
        memory = None
        for t in range(12):
            chosen, memory = agent.weigh(states[:, t], memory, torch.full((40,), t == 0))
            memory["action"] = actions[:, t]
        assert torch.eq(chosen, k).double().mean() > 0.9
    plane = points()
    follow(agent, None, plane, 3, turn=math.pi)  # acts on what it finds


@pytest.mark.parametrize(
    ("hysteresis", "prior"), [(0.0, False), (2.0, False), (0.0, True)], ids=["leak", "hysteresis", "shared prior"]
)
def test_adding_a_task_moves_decisions_to_it_only(hysteresis: float, prior: bool) -> None:
    """On any trajectory of likelihoods. With a prior that all tasks share, as Bayes has it, others move, too."""
    rng = generator(0)
    likelihood = torch.randn(60, 400, 4, generator=rng) * 2

    def decisions(tasks: int) -> Tensor:
        s, leads, found = torch.zeros(400, tasks), torch.zeros(400, tasks, dtype=torch.bool), []
        for t in range(60):
            s = evidence.accumulate(s, likelihood[t, :, :tasks], 0.05)
            if prior:  # rho / (K - 1) from each task to each other
                belief = s.softmax(1)
                s = (0.7 * belief + 0.3 * (1 - belief) / (tasks - 1)).log()
            chosen, leads = evidence.decide(s, leads, hysteresis)
            found.append(chosen)
        return torch.stack(found)

    before, after = decisions(3), decisions(4)
    moved = before != after
    if prior:
        assert not bool((after[moved] == 3).all())
    else:
        assert bool(moved.any()) and bool((after[moved] == 3).all())


def test_a_finished_agent_routes_old_rows_the_same_or_to_the_new_task() -> None:
    agent = make()
    for k in range(2):
        learn(agent, walks(math.pi * k, seed=k), 30)
    data = walks(1.0, episodes=30, seed=8)

    def routed() -> Tensor:
        memory, found = None, []
        states = data.observations["achieved_goal"].reshape(30, 12, 2)  # type: ignore[index]
        for t in range(12):
            chosen, memory = agent.weigh(states[:, t], memory, torch.full((30,), t == 0))
            memory["action"] = data.actions.reshape(30, 12, 2)[:, t]
            found.append(chosen)
        return torch.stack(found)

    before = routed()
    learn(agent, walks(1.0, seed=4), 30)
    after = routed()
    moved = before != after
    assert bool((after[moved] == 2).all()) and bool(moved.any())


def test_rows_of_different_tasks_act_together() -> None:
    """With one generator, a row's plan does not depend on which tasks the other rows have."""
    agent = make()
    for k in range(2):
        learn(agent, walks(2.0 * k, seed=k), 20, task=k)
    obs = points(6)
    mixed = follow(agent, torch.tensor([0, 1, 0, 1, 1, 0]), obs, 5)
    for k, rows in ((0, [0, 2, 5]), (1, [1, 3, 4])):
        alone = follow(agent, ids(k, 3), map_obs(lambda v, rows=rows: v[rows], obs), 5)
        assert torch.allclose(alone, mixed[:, rows], atol=1e-5)


# -- the rest ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 21, 39])
def test_resuming_is_exact(stop: int) -> None:
    def begin() -> tuple[EideticPLDM, OfflineDataset]:
        agent = make()
        learn(agent, walks(), 20, task=0)
        agent.start_task(TaskInfo(1, None))
        return agent, walks(1.0, seed=1)

    agent, data = begin()
    rng = generator(1)
    steps = agent.learn(Experience(dataset=data), BUDGET, rng=rng)
    for _ in range(stop):
        next(steps)
    state, drawn = copy.deepcopy(agent.state_dict()), rng.get_state()
    for _ in steps:
        pass
    agent.finish_task()
    other, again = make(seed=5), generator(7)
    other.load_state_dict(state)
    again.set_state(drawn)
    for _ in other.learn(Experience(dataset=data), BUDGET - stop, rng=again):
        pass
    other.finish_task()
    for k in range(2):
        assert not changed(behaviour(agent, k), behaviour(other, k))
    assert agent.network.digests == other.network.digests


@pytest.mark.parametrize(
    ("spaces", "options", "message"),
    [
        (PLANE, {"window": 1}, "window must be at least 2"),
        (PLANE, {"batch_size": 1}, "batch_size must be at least 2"),
        (PLANE, {"latent": 0}, "latent must be positive"),
        (PLANE, {"norm": "layer"}, "norm"),
        (PLANE, {"held_out": 0.0}, "held_out must be between 0 and 1"),
        (PLANE, {"smoothness": -1.0}, "smoothness must be at least 0"),
        (PLANE, {"planner_options": {"sampels": 64}}, "Unknown key 'sampels' in planner 'icem'"),
        (Spaces(PLANE.observation, Discrete(3)), {}, "Box actions of one axis"),
        (Spaces(POINT, PLANE.action), {}, "no key 'desired_goal'"),
        (
            Spaces(Dict(dict.fromkeys(("achieved_goal", "desired_goal"), Box(0, 255, (3, 8, 8), np.uint8))), PLANE.action),
            {},
            "takes states, Box vectors",
        ),
        (
            Spaces(Dict(achieved_goal=POINT, desired_goal=POINT, goal_sign=SPEED), PLANE.action),
            {},
            "does not avoid goals",
        ),
    ],
)  # fmt: skip
def test_bad_options(spaces: Spaces, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make(spaces, **options)
    assert "\n" not in str(error.value)


def test_context_is_carried_beside_and_left_out_of_goals() -> None:
    agent = make(MOVING)
    learn(agent, walks(speed=True), 20, task=0)
    model, obs = agent.model(0), points(speed=True)
    z, goal = model.encode(obs), model.encode_goal(obs)
    assert z.shape == goal.shape == (5, agent.network.extract(0).latent.size + 1)
    rest = agent.network.beside.standardise(torch.zeros(5, 1))
    assert torch.equal(goal[:, -1:], rest) and not torch.equal(z[:, -1:], rest)
    assert model.goal_features(z).shape[1] == z.shape[1] - 1
    assert isinstance(agent.eidetic["world_model"], EideticWorldModel)
    assert verify(agent.network).ok


def test_without_ids_and_without_transfer_tasks_cannot_be_told_apart() -> None:
    agent = make(transfer=False)
    learn(agent, walks(0.0), 10)
    with pytest.raises(ConfigError, match="cannot tell tasks apart without task ids and without transfer"):
        agent.start_task(TaskInfo())
    agent.start_task(TaskInfo(1))


def test_a_task_needs_two_numbers_of_its_own_to_normalise_by() -> None:
    with pytest.raises(ConfigError, match="5 tasks share a latent of 9 numbers"):
        make(latent=9, pruning={"tasks": 5})
    agent = make(latent=10, pruning={"tasks": 5})
    for k in range(2):
        learn(agent, walks(float(k)), 10, task=k)
        assert int(agent.network.own(k).sum()) == 2
