"""Streams, schedules, data sets, planners: each check passes what is good and catches what is broken in just that way."""

from __future__ import annotations

import itertools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch

from clbench import registry
from clbench.contracts import Phase, Stream, Task, TaskList
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.errors import ConfigError, ContractError, UnknownNameError
from clbench.planners.cem import CEM
from clbench.rng import get_global_state
from clbench.streams.core import Suite
from clbench.testing import check_dataset, check_planner, check_schedule, check_stream, run_check
from clbench.testing.core import difference
from clbench.testing.fixtures import Fixture, ToyVectorEnv, observe
from clbench.testing.planners import PLANNER_CHECKS
from clbench.testing.streams import DATASET_CHECKS, SCHEDULE_CHECKS, STREAM_CHECKS

FIXTURE = Fixture()


def caught(report, check, message):
    assert check in {r.name for r in report.failures}
    with pytest.raises(ContractError, match=message):
        report.raise_if_failed()


@pytest.fixture
def add(monkeypatch):
    """Register a plug-in for one test."""

    def register(kind: str, target: Any, name: str = "toy") -> str:
        monkeypatch.setitem(registry._LOCAL[kind], name, registry.Entry(name, target))
        return name

    return register


# -- streams ----------------------------------------------------------------------------------------------------------


def toy_data():
    return FIXTURE.dataset()


def shifted_data():
    data = FIXTURE.dataset()
    return OfflineDataset(data.observations, data.actions + 3, data.lengths, data.final_observations)


def wide_data():
    data = FIXTURE.dataset()
    return OfflineDataset(torch.cat([data.observations] * 2, 1), data.actions, data.lengths)


@pytest.fixture
def toys(add):
    add("envs", ToyVectorEnv, "toy/Env-v0")
    for function in (toy_data, shifted_data, wide_data):
        add("datasets", function, function.__name__)


def task(name="a", dataset="toy_data", evaluation=None, **kwargs):
    return Task(name, "toy/Env-v0", kwargs, dataset, evaluation or TaskList.from_seeds(3))


def suite(*tasks):
    return Suite("toy", tasks, updates=4, env_steps=8)


def good(*, rng, steps: int = 8):
    return suite(task("a", max_episode_steps=steps), task("b", max_episode_steps=int(rng.integers(5, 9))))


def fails(*, rng):
    raise ValueError("no such maze")


def fraction_budget(*, rng):
    return Stream("toy", (task(),), (Phase("a", 4.5),))  # type: ignore[arg-type]


def draws_globally(*, rng):
    return suite(task("a", max_episode_steps=random.randint(5, 9)))


_CALLS = itertools.count(5)


def counts_calls(*, rng):
    return suite(task("a", max_episode_steps=next(_CALLS)))


def holds_object(*, rng):
    return suite(task("a", shape=torch.zeros(1)))


def holds_tuple(*, rng):
    return suite(task("a", shape=(1, 2)))


def wrong_visits(*, rng):
    return Stream("toy", (task(),), (Phase("a", 4, 1), Phase("a", 4, 1)))


def two_spaces(*, rng):
    return suite(task("a"), task("b", discrete=True))


def no_match_observations(*, rng):
    return suite(task("a", dataset="wide_data"))


def no_match_actions(*, rng):
    return suite(task("a", dataset="shifted_data"))


class Picky(ToyVectorEnv):
    def reset(self, *, seed=None, options=None):
        if options and "row" in options:
            raise IndexError(f"example {options['row'][0]} of 10")
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        *rest, info = super().step(actions)
        info.pop("is_success")
        return *rest, info


def unplayable(*, rng):
    return suite(Task("a", "toy/Picky-v0", evaluation=TaskList("rows", (1,), {"row": (99,)})))


def no_success(*, rng):
    return suite(Task("a", "toy/Picky-v0", evaluation=TaskList.from_seeds(2)))


def test_a_good_stream_passes(add, toys):
    before = get_global_state()
    report = check_stream(add("streams", good), steps=7)
    report.raise_if_failed()
    assert {r.name for r in report.results if r.status == "passed"} == {c.name for c in STREAM_CHECKS}
    assert difference(before, get_global_state()) is None


BROKEN_STREAMS = [
    (fails, "the stream can be made", r"fails raised ValueError: no such maze \(test_check_others"),
    (fraction_budget, "the stream can be made", "must be a positive whole number, got 4.5"),
    (
        draws_globally,
        "the same seed gives the same stream",
        "process-wide generator of python; draw from the rng argument",
    ),
    (counts_calls, "the same seed gives the same stream", "two streams of the same seed differ: .*max_episode_steps"),
    (holds_object, "the stream survives being stored as JSON", "JSON cannot store .*; use plain numbers"),
    (holds_tuple, "the stream survives being stored as JSON", "use lists instead of tuples"),
    (wrong_visits, "visits are numbered from 1", "phase 1 is visit 2 of 'a', but is numbered 1; use .*number_visits"),
    (two_spaces, "all tasks share one observation and one action space", "task 'b' has spaces .*; pad or unify them"),
    (
        no_match_observations,
        "data sets load and match the environment",
        r"'wide_data'.*shape \(64, 6\), expected \(64, 3\)",
    ),
    (no_match_actions, "data sets load and match the environment", "'shifted_data'.*outside the action space"),
    (unplayable, "evaluation lists can be played", "IndexError: example 99 of 10"),
    (no_success, "evaluation lists can be played", "measured by success, but its environment gives no"),
]


@pytest.mark.parametrize(("function", "check", "message"), BROKEN_STREAMS, ids=[b[0].__name__ for b in BROKEN_STREAMS])
def test_a_broken_stream_is_caught_with_advice(function, check, message, add, toys):
    add("envs", Picky, "toy/Picky-v0")
    caught(check_stream(add("streams", function)), check, message)


def test_every_stream_check_has_a_broken_stream():
    assert {check for _, check, _ in BROKEN_STREAMS} == {c.name for c in STREAM_CHECKS}


# -- schedules --------------------------------------------------------------------------------------------------------


def in_order(*, num_tasks, budget, rng):
    return [(t, budget) for t in range(num_tasks)]


def numpy_entries(*, num_tasks, budget, rng):
    return [(t, budget) for t in rng.permutation(num_tasks)]


def one_too_many(*, num_tasks, budget, rng):
    return [(num_tasks, num_tasks * budget)]


def empty_phase(*, num_tasks, budget, rng):
    return [(0, 0), (0, budget * num_tasks)]


def spends_half(*, num_tasks, budget, rng):
    return [(t, budget // 2) for t in range(num_tasks)]


def own_seed(*, num_tasks, budget, rng):
    tasks = np.random.permutation(num_tasks)  # noqa: NPY002
    return [(int(t), budget) for t in tasks]


_TURN = itertools.count()


def remembers(*, num_tasks, budget, rng):
    start = next(_TURN)
    return [((start + t) % num_tasks, budget) for t in range(num_tasks)]


BROKEN_SCHEDULES = [
    (numpy_entries, "it gives pairs (task, budget)", "must be a pair of Python ints"),
    (one_too_many, "it gives pairs (task, budget)", "names task 1 of 1"),
    (empty_phase, "it gives pairs (task, budget)", "leave out empty phases"),
    (spends_half, "it spends num_tasks * budget units", "make 30 units instead of 60"),
    (own_seed, "the same generator gives the same schedule", "process-wide generator of numpy"),
    (remembers, "the same generator gives the same schedule", "keep no state between calls"),
]


@pytest.mark.parametrize(
    ("function", "check", "message"), BROKEN_SCHEDULES, ids=[b[0].__name__ for b in BROKEN_SCHEDULES]
)
def test_a_broken_schedule_is_caught_with_advice(function, check, message):
    caught(check_schedule(function), check, message)


def test_a_good_schedule_passes_and_every_check_has_a_broken_one():
    check_schedule(in_order).raise_if_failed()
    check_schedule("cyclic", cycles=3).raise_if_failed()
    assert {check for _, check, _ in BROKEN_SCHEDULES} == {c.name for c in SCHEDULE_CHECKS}


# -- data sets --------------------------------------------------------------------------------------------------------


def global_data():
    data = toy_data()
    data.observations += 0.01 * torch.rand(data.observations.shape)
    return data


def nan_data():
    data = toy_data()
    return OfflineDataset(data.observations / 0, data.actions, data.lengths, check=False)


def double_actions():
    data = toy_data()
    return OfflineDataset(data.observations, data.actions.double(), data.lengths)


def double_data():
    data = toy_data()
    return OfflineDataset(data.observations.double(), data.actions, data.lengths)


def with_goals():
    data = Fixture(goal=True).dataset()
    obs = {**data.observations, "desired_goal": data.observations["achieved_goal"]}
    return OfflineDataset(obs, data.actions, data.lengths)


def another_each_time():
    data = toy_data()
    data.observations += next(_CALLS)
    return data


def rendered(render):
    data = toy_data()
    columns = {"position": data.observations[:, :2]}
    return OfflineDataset(Rendered("toy", columns, render), data.actions, data.lengths)


def rendered_well():
    return rendered(lambda c: observe(c["position"], None, pixels=True, goal=False))


def rendered_anew():
    return rendered(lambda c: c["position"] + next(_CALLS))


def rendered_from_one_buffer():
    buffer = torch.zeros(200, 2)
    original = toy_data().observations[:, :2]

    def render(columns):
        rows = len(columns["position"])
        if not bool(buffer.any()):
            buffer[: len(original)] = original
        return buffer[:rows]

    return rendered(render)


BROKEN_DATA = [
    (lambda: 3, "it loads and its columns fit together", "returned a int; return a clbench.OfflineDataset"),
    (global_data, "it loads and its columns fit together", "process-wide generator of torch"),
    (nan_data, "it loads and its columns fit together", "NaN or infinite values"),
    (double_actions, "it loads and its columns fit together", "actions are torch.float64; use float32"),
    (double_data, "observations have one type each", "observations are torch.float64; use float32"),
    (with_goals, "observations have one type each", "desired_goal; leave it out"),
    (another_each_time, "loading it twice gives the same data", "make it a function of its options"),
    (rendered_anew, "drawing a batch changes nothing", "a renderer must be a function of its columns"),
    (rendered_from_one_buffer, "drawing a batch changes nothing", "a renderer must return new tensors"),
]


@pytest.mark.parametrize(("function", "check", "message"), BROKEN_DATA, ids=[b[0].__name__ for b in BROKEN_DATA])
def test_a_broken_data_set_is_caught_with_advice(function, check, message):
    caught(check_dataset(function), check, message)


@pytest.mark.parametrize(
    "function", [toy_data, rendered_well, Fixture(goal=True).dataset, Fixture(pixels=True).dataset]
)
def test_good_data_sets_pass(function):
    check_dataset(function).raise_if_failed()


def test_every_data_set_check_has_a_broken_data_set():
    assert {check for _, check, _ in BROKEN_DATA} == {c.name for c in DATASET_CHECKS}


# -- planners ---------------------------------------------------------------------------------------------------------


class Shooting:
    """Best of K random action sequences (B, H, 2), the memory being the last plan (B, H, 2)."""

    samples, horizon = 256, 3

    def plan(self, model, z, objective, memory, *, rng):
        shape = (len(z), self.samples, self.horizon, 2)
        actions = (torch.rand(shape, generator=rng) - 0.5) * 0.6
        if memory is not None:
            actions[:, 0] = memory
        cost, state = torch.zeros(shape[:2]), z[:, None].expand(-1, self.samples, -1)
        for h in range(self.horizon):
            state = model.predict(state, actions[:, :, h])
            cost = cost + objective(state, h)
        plan = actions[torch.arange(len(z)), self.best(cost)]
        return plan, plan

    def best(self, cost):
        return cost.argmin(1)


class FlatPlan(Shooting):
    def plan(self, model, z, objective, memory, *, rng):
        actions, memory = super().plan(model, z, objective, memory, rng=rng)
        return actions.flatten(1), memory


class NaNPlan(Shooting):
    def plan(self, model, z, objective, memory, *, rng):
        actions, memory = super().plan(model, z, objective, memory, rng=rng)
        return actions / 0, memory


class GlobalPlan(Shooting):
    def plan(self, model, z, objective, memory, *, rng):
        torch.rand(1)
        return super().plan(model, z, objective, memory, rng=rng)


class RemembersPlan(Shooting):
    calls = 0

    def plan(self, model, z, objective, memory, *, rng):
        self.calls += 1
        actions, memory = super().plan(model, z, objective, memory, rng=rng)
        return actions + 0.01 * self.calls, memory


class WritesLatent(Shooting):
    def plan(self, model, z, objective, memory, *, rng):
        z += 0.1
        return super().plan(model, z, objective, memory, rng=rng)


class BestOfAll(Shooting):
    def best(self, cost):
        return cost.max(0).values.argmax().expand(len(cost)) if len(cost) > 1 else super().best(cost)


class FirstRowsPlan(CEM):
    def plan(self, model, z, objective, memory, *, rng):
        actions, memory = super().plan(model, z, objective, memory, rng=rng)
        return actions[:1].expand_as(actions), memory


class AveragedCosts(CEM):
    def update(self, state, candidates, costs):
        return super().update(state, candidates, costs.mean(0, keepdim=True).expand_as(costs))


class Unbounded(Shooting):
    bounds = types.SimpleNamespace(low=torch.tensor([-0.2, -0.2]), high=torch.tensor([0.2, 0.2]))


class LongSteps(Shooting):
    bounds = types.SimpleNamespace(low=torch.tensor([-1.0, -1.0]), high=torch.tensor([1.0, 1.0]), max_norm=0.35)


class Averaged(Shooting):
    def plan(self, model, z, objective, memory, *, rng):
        actions = (torch.rand(len(z), self.samples, 3, 2, generator=rng) - 0.5) * 0.6
        path = model.predict(z[:, None, None], actions.cumsum(2))
        weights = torch.softmax(-objective(path, 0).sum(2), 1)
        return torch.einsum("bk,bkha->bha", weights, actions), None


BROKEN_PLANNERS = [
    (FlatPlan, "plan returns actions (B, H, A)", r"expected \(1, H, 2\)"),
    (NaNPlan, "plan returns actions (B, H, A)", "NaN or infinite actions"),
    (GlobalPlan, "the same generator state gives the same plan", "process-wide generator; pass generator=rng"),
    (RemembersPlan, "the same generator state gives the same plan", "keep state in memory"),
    (WritesLatent, "plan does not change its inputs", r"changed its argument 'z' in place; work on a copy"),
    (BestOfAll, "a plan does not depend on the other rows of the batch", "never across rows"),
    (FirstRowsPlan, "a plan does not depend on the other rows of the batch", "never across rows"),
    (AveragedCosts, "a plan does not depend on the other rows of the batch", "never across rows"),
    (Unbounded, "candidates and plans stay within the action bounds", "outside of its bounds.*project candidates"),
    (LongSteps, "candidates and plans stay within the action bounds", "outside of its bounds.*project candidates"),
    (Averaged, "a world model that gives NaN does not break the plan", "replace costs that are not finite"),
]


@pytest.mark.parametrize(("cls", "check", "message"), BROKEN_PLANNERS, ids=[b[0].__name__ for b in BROKEN_PLANNERS])
def test_a_broken_planner_is_caught_with_advice(cls, check, message):
    caught(check_planner(cls), check, message)


def test_a_good_planner_passes_and_every_check_has_a_broken_one():
    check_planner(Shooting).raise_if_failed()
    check_planner(Shooting()).raise_if_failed()
    assert {check for _, check, _ in BROKEN_PLANNERS} == {c.name for c in PLANNER_CHECKS}


# -- run_check --------------------------------------------------------------------------------------------------------

AGENT = '''
import torch
from clbench import Agent
from clbench.testing.fixtures import ToyVectorEnv as Env
from clbench.streams.core import Suite
from clbench.data.dataset import OfflineDataset
from clbench.testing.fixtures import Fixture

class Mean(Agent):
    """Always the mean action of the data."""

    requires = frozenset({"dataset", "continuous"})

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.mean = torch.zeros(spaces.action.shape, device=device)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.mean.expand(len(first), -1).clone(), memory

    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            batch = experience.dataset.sample(16, rng)
            self.mean = 0.9 * self.mean + 0.1 * batch.actions.mean(0)
            yield {"size": float(self.mean.norm())}

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"].clone()


class Wrong(Mean):
    def learn(self, experience, budget, *, rng):
        raise RuntimeError("out of coffee")
        yield

def data(n: int = 3) -> OfflineDataset:
    return Fixture().dataset()

def schedule(*, num_tasks, budget, rng):
    return [(t, budget) for t in range(num_tasks)]

def stream(*, rng) -> Suite:
    raise ValueError("not yet")

class Planner:
    def plan(self, model, z, objective, memory, *, rng):
        return torch.zeros(len(z), 2, 2), None

number = 3
'''


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    (tmp_path / "third_party_plugin.py").write_text(AGENT)
    monkeypatch.chdir(tmp_path)
    return "third_party_plugin"


@pytest.mark.parametrize("attribute", ["Mean", "Env", "data", "schedule", "Planner"])
def test_run_check_finds_out_what_a_third_partys_plugin_is(third_party, attribute):
    run_check(f"{third_party}:{attribute}").raise_if_failed()


def test_run_check_names_the_line_that_failed(third_party):
    report = run_check(f"{third_party}:Wrong")
    line = AGENT.splitlines().index('        raise RuntimeError("out of coffee")') + 1
    assert (
        f"Wrong.learn raised RuntimeError: out of coffee (third_party_plugin.py, line {line}, in learn)"
        in report.text()
    )


def test_run_check_tells_a_stream_by_what_it_returns(third_party):
    assert "stream raised ValueError: not yet" in run_check(f"{third_party}:stream").text()


def test_run_check_refuses_what_is_no_plugin(third_party):
    with pytest.raises(ConfigError, match="is 3, which is no plug-in: give an Agent class"):
        run_check(f"{third_party}:number")


def test_run_check_takes_registered_names():
    run_check("random").raise_if_failed()
    run_check("schedules/uniform").raise_if_failed()
    with pytest.raises(UnknownNameError, match="Unknown plug-in 'randm'. Did you mean 'random'"):
        run_check("randm")


def test_run_check_asks_when_a_name_is_ambiguous(add):
    add("planners", Shooting, "random")
    with pytest.raises(ConfigError, match="write agents/random or planners/random"):
        run_check("random")
