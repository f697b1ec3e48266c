"""Every agent check passes a good agent and catches an agent broken in just that way, with advice."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from clbench import Agent
from clbench.data.dataset import GoalSampling
from clbench.errors import ContractError
from clbench.rng import get_global_state
from clbench.testing import check_agent
from clbench.testing.agents import AGENT_CHECKS, CLASS_CHECKS
from clbench.testing.core import difference
from clbench.testing.fixtures import ALL_FIXTURES, Fixture

DATA = [Fixture()]
MOVES = [Fixture(discrete=True)]


class Good(Agent):
    """Linear behaviour cloning with momentum and a memory: has everything that a careless author can break."""

    requires = frozenset({"dataset"})

    @dataclass
    class Config:
        lr: float = 0.01

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        action: Any = spaces.action
        observation: Any = spaces.observation
        dict_of = isinstance(observation, gymnasium.spaces.Dict)
        parts: list[Any] = list(observation.spaces.values()) if dict_of else [observation]
        self.size = sum(int(np.prod(p.shape)) for p in parts)
        self.discrete = isinstance(spaces.action, gymnasium.spaces.Discrete)
        self.out = int(action.n) if self.discrete else action.shape[0]
        self.weight = torch.randn(self.size, self.out, generator=rng) * 0.1
        self.momentum = torch.zeros_like(self.weight)
        self.updates = 0

    def flat(self, obs):
        parts = [obs[k] for k in sorted(obs)] if isinstance(obs, dict) else [obs]
        return torch.cat([p.flatten(1).float() / (255 if p.dtype == torch.uint8 else 1) for p in parts], 1)

    def scores(self, obs):
        return self.flat(obs) @ self.weight

    def choose(self, scores):
        if self.discrete:
            return scores.argmax(1)
        space: Any = self.spaces.action
        low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
        return scores.clamp(low, high)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        scores = self.scores(obs)
        memory = torch.zeros_like(scores) if memory is None else memory
        memory = torch.where(first[:, None], 0, memory) * 0.5 + scores
        noise = torch.randn(scores.shape, generator=rng) if explore else 0
        return self.choose(memory + noise), memory

    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            yield {"loss": self.update(experience.dataset, rng)}

    def update(self, dataset, rng):
        batch = dataset.sample(8, rng, GoalSampling() if dataset.is_goal else None)
        wanted = torch.nn.functional.one_hot(batch.actions, self.out).float() if self.discrete else batch.actions
        error = self.scores(batch.observations) - wanted
        self.momentum = 0.9 * self.momentum + self.flat(batch.observations).T @ error / 8
        self.weight = self.weight - self.config.lr * self.momentum
        self.updates += 1
        return float(error.square().mean())

    def state_dict(self):
        return {"weight": self.weight, "momentum": self.momentum, "updates": self.updates}

    def load_state_dict(self, state):
        self.weight, self.momentum, self.updates = state["weight"].clone(), state["momentum"].clone(), state["updates"]


class GoodOnline(Good):
    """The same, cloning its own exploration: the last observation belongs to the state."""

    requires = frozenset({"env"})

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.last = None

    def learn(self, experience, budget, *, rng):
        env = experience.env
        if self.last is None:
            self.last = self.flat(env.reset()[0])
        for step in range(0, budget, env.num_envs):
            actions = self.choose(self.last @ self.weight + torch.randn(env.num_envs, self.out, generator=rng))
            obs, reward, *_ = env.step(actions)
            self.weight = self.weight + self.config.lr * reward.mean() * self.last.mean(0)[:, None]
            self.last = self.flat(obs)
            yield {"step": step + env.num_envs, "reward": float(reward.mean())}

    def start_task(self, task):
        self.last = None

    def state_dict(self):
        return {**super().state_dict(), "last": self.last}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.last = None if state["last"] is None else state["last"].clone()


def names(report):
    return {r.name for r in report.failures}


def notes(report):
    return {r.name: r.message for r in report.rows() if r.label == "note"}


@pytest.mark.parametrize("cls", [Good, GoodOnline])
def test_good_agents_pass_on_every_kind_of_task(cls):
    report = check_agent(cls, budget=8, num_envs=4, fixtures=ALL_FIXTURES)
    report.raise_if_failed()
    assert {r.name for r in report.results if r.status == "passed"} >= {
        c.name for c in (*CLASS_CHECKS, *AGENT_CHECKS)
    } - ({"learn does not change the data set"} if cls is GoodOnline else set())


def test_checking_leaves_the_process_wide_generators_alone():
    before = get_global_state()
    check_agent(Good, budget=4, fixtures=DATA)
    assert difference(before, get_global_state()) is None


# -- one broken agent per check --------------------------------------------------------------------


class NotAnAgent:
    pass


class NoAct(Agent):
    def learn(self, experience, budget, *, rng):
        yield {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class WrongSignature(Good):
    def act(self, obs, memory, first):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().act(obs, memory, first, rng=torch.Generator())


class NoDataclass(Good):
    class Config:
        lr: float = 0.1


class NoDefault(Good):
    @dataclass
    class Config:
        lr: float = field()


class UnknownRequirement(Good):
    requires = frozenset({"datasets"})


class Impossible(Good):
    requires = frozenset({"discrete", "continuous"})


class FailsInInit(Good):
    def __init__(self, spaces, config, *, device, rng):
        raise ValueError("only two dimensions")


class Squeezed(Good):
    def choose(self, scores):
        return super().choose(scores)[:, :1]


class DoublePrecision(Good):
    def choose(self, scores):
        return super().choose(scores).double()


class OutsideOfMoves(Good):
    def choose(self, scores):
        return super().choose(scores) + 4


class NotANumber(Good):
    def choose(self, scores):
        return super().choose(scores) * float("nan")


class NoPair(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return super().act(obs, memory, first, rng=rng)[0]


class FailsWithMemory(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        actions, memory = super().act(obs, memory, first, rng=rng, explore=explore)
        return actions, "memory"


class IgnoresFirst(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return super().act(obs, memory, torch.zeros_like(first), rng=rng, explore=explore)


class BatchStatistics(Good):
    def scores(self, obs):
        x = self.flat(obs)
        return (x - x.mean(0)) @ self.weight


class KeepsStateOnItself(Good):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.previous = 0.0

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        actions, memory = super().act(obs, memory, first, rng=rng, explore=explore)
        answer, self.previous = actions * 0.5 + self.previous, float(actions.mean()) * 0.1
        return self.choose(answer), memory


class ChangesObs(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        obs -= 0.1
        return super().act(obs, memory, first, rng=rng, explore=explore)


class ChangesMemory(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        actions, new = super().act(obs, memory, first, rng=rng, explore=explore)
        return actions, new if memory is None else memory.copy_(new)


class CountsCalls(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        self.updates += 1
        return super().act(obs, memory, first, rng=rng, explore=explore)


class DrawsFromInitGenerator(Good):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.rng = rng

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        torch.rand(1, generator=self.rng)
        return super().act(obs, memory, first, rng=rng, explore=explore)


class DependsOnTheProcess(Good):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        actions, memory = super().act(obs, memory, first, rng=rng, explore=explore)
        return self.choose(actions * np.random.rand()), memory  # noqa: NPY002


class ChanceInInit(Good):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.weight = self.weight + random.SystemRandom().random() * 0.1


class ArrayInState(Good):
    def state_dict(self):
        return {**super().state_dict(), "weight": self.weight.numpy()}


class FailsInLearn(Good):
    def update(self, dataset, rng):
        raise RuntimeError("the loss exploded")


class LearnIsNoGenerator(Good):
    def learn(self, experience, budget, *, rng):
        return [{"loss": 1.0}]


class YieldsTensor(Good):
    def learn(self, experience, budget, *, rng):
        for m in super().learn(experience, budget, rng=rng):
            yield {"loss": torch.tensor(m["loss"])}


class YieldsNaN(Good):
    def update(self, dataset, rng):
        super().update(dataset, rng)
        return float("nan")


class StepFalls(Good):
    def learn(self, experience, budget, *, rng):
        yield {"step": budget}
        yield {"step": 1}


class StopsEarly(Good):
    def learn(self, experience, budget, *, rng):
        return super().learn(experience, budget // 2, rng=rng)


class Overspends(Good):
    def learn(self, experience, budget, *, rng):
        return super().learn(experience, budget * 2, rng=rng)


class OverspendsSteps(GoodOnline):
    def learn(self, experience, budget, *, rng):
        for m in super().learn(experience, 2 * budget, rng=rng):
            yield {**m, "step": m["step"] // 2}


class YieldsForever(Good):
    def learn(self, experience, budget, *, rng):
        while True:
            yield {"step": 0}


class CannotBeClosed(Good):
    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            try:
                yield {"loss": self.update(experience.dataset, rng)}
            except GeneratorExit:
                yield {}


class ForgetsToSeed(Good):
    def learn(self, experience, budget, *, rng):
        return super().learn(experience, budget, rng=torch.Generator().manual_seed(_COUNTER.random_seed()))


class _Counter:
    value = 0

    def random_seed(self):
        self.value += 1
        return self.value


_COUNTER = _Counter()


class ChanceInLearn(Good):
    def update(self, dataset, rng):
        self.weight = self.weight + random.SystemRandom().random() * 1e-3
        return super().update(dataset, rng)


class OwnGenerator(Good):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.own = torch.Generator().manual_seed(0)

    def update(self, dataset, rng):
        return super().update(dataset, self.own)


class ChangesData(Good):
    def update(self, dataset, rng):
        dataset.actions.mul_(0.999)
        return super().update(dataset, rng)


class EvaluationReachesTraining(Good):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.scale = 1.0

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        self.scale = 0.5  # like a network left in evaluation mode
        return super().act(obs, memory, first, rng=rng, explore=explore)

    def update(self, dataset, rng):
        self.momentum = self.momentum * self.scale
        self.scale = 1.0
        return super().update(dataset, rng)


class ForgetsToLoad(Good):
    def load_state_dict(self, state):
        self.weight, self.updates = state["weight"].clone(), state["updates"]


class ForgetsToSaveWeight(Good):
    def state_dict(self):
        return {"momentum": self.momentum, "updates": self.updates}

    def load_state_dict(self, state):
        self.momentum, self.updates = state["momentum"].clone(), state["updates"]


class ForgetsToSaveMomentum(Good):
    def state_dict(self):
        return {"weight": self.weight, "updates": self.updates}

    def load_state_dict(self, state):
        self.weight, self.updates = state["weight"].clone(), state["updates"]


class LocalVariable(Good):
    def learn(self, experience, budget, *, rng):
        decay = 1.0
        for _ in range(budget):
            decay *= 0.9
            loss = self.update(experience.dataset, rng)
            self.weight = self.weight * (1 - 0.01 * decay)
            yield {"loss": loss}


class StateDictWrites(Good):
    def state_dict(self):
        self.momentum = self.momentum * 0.5
        return super().state_dict()


class SavingReachesTraining(Good):
    saved = False

    def state_dict(self):
        self.saved = True
        return super().state_dict()

    def update(self, dataset, rng):
        self.momentum = self.momentum * (0.5 if self.saved else 1)
        return super().update(dataset, rng)


class TrainsOnce(Good):
    trained = False

    def learn(self, experience, budget, *, rng):
        if not self.trained:
            yield from super().learn(experience, budget, rng=rng)
        self.trained = True

    def state_dict(self):
        return {**super().state_dict(), "trained": self.trained}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.trained = state["trained"]


BROKEN: list[tuple[Any, str, str]] = [
    (
        NotAnAgent,
        "it is an Agent subclass with all methods",
        "not a subclass of clbench.Agent; write `class NotAnAgent",
    ),
    (NoAct, "it is an Agent subclass with all methods", "NoAct does not define act"),
    (
        WrongSignature,
        "its methods take the arguments of the contract",
        r"define it as act\(self, obs, memory, first, \*, rng",
    ),
    (NoDataclass, "Config is a dataclass whose fields all have defaults", "decorate it with @dataclass"),
    (NoDefault, "Config is a dataclass whose fields all have defaults", "field 'lr' .* has no default; give it one"),
    (UnknownRequirement, "requires names only known requirements", "'datasets'.*Did you mean 'dataset'"),
    (Impossible, "there is a task that meets requires", "no task can meet at once"),
    (
        FailsInInit,
        "it can be constructed",
        r"FailsInInit.__init__ raised ValueError: only two dimensions \(test_check_agent",
    ),
    (Squeezed, "act returns valid actions", r"shape \(4, 1\), expected \(4, 2\): one row per environment"),
    (DoublePrecision, "act returns valid actions", r"float64, expected torch.float32: convert"),
    (OutsideOfMoves, "act returns valid actions", "the action [4-7], outside 0 to 3; check the argmax"),
    (NotANumber, "act returns valid actions", "NaN or infinite actions"),
    (NoPair, "act returns valid actions", r"return the pair \(actions, memory\)"),
    (FailsWithMemory, "act accepts the memory that it returned", "FailsWithMemory.act raised"),
    (IgnoresFirst, "a row that begins an episode forgets the one before", "reset their memory where `first`"),
    (BatchStatistics, "actions do not depend on the other rows of the batch", "act mixes rows"),
    (KeepsStateOnItself, "the same generator state gives the same actions", "keep nothing between calls"),
    (ChangesObs, "act does not change its inputs", r"changed its argument 'obs' in place; work on a copy \(obs.clone"),
    (ChangesMemory, "act does not change its inputs", "'memory' in place"),
    (
        CountsCalls,
        "evaluation leaves the agent unchanged",
        r"state_dict\(\)\['updates'\] is 0 in one and 1 in the other",
    ),
    (DrawsFromInitGenerator, "evaluation leaves the agent unchanged", "draw only from the rng given to act"),
    (
        DependsOnTheProcess,
        "actions do not depend on process-wide random numbers",
        "differently when the process-wide seed changes",
    ),
    (ChanceInInit, "the same generator state gives the same actions", "draw the initial weights from the rng given"),
    (
        ArrayInState,
        "state_dict holds only tensors and plain values",
        r"\['weight'\] is a numpy.ndarray; store only tensors",
    ),
    (
        FailsInLearn,
        "learn yields numbers and consumes its budget",
        r"FailsInLearn.learn raised RuntimeError: the loss exploded",
    ),
    (LearnIsNoGenerator, "learn yields numbers and consumes its budget", "returned a list; make it a generator"),
    (YieldsTensor, "learn yields numbers and consumes its budget", r"'loss': Tensor; yield names and Python floats"),
    (YieldsNaN, "learn yields numbers and consumes its budget", "'loss' = nan"),
    (StepFalls, "learn yields numbers and consumes its budget", "'step' fell from 8 to 1"),
    (StopsEarly, "learn yields numbers and consumes its budget", "ended after 4 of 8 units; each yield counts as one"),
    (Overspends, "learn yields numbers and consumes its budget", "16 units for a budget of 8"),
    (OverspendsSteps, "learn yields numbers and consumes its budget", "took 16 environment steps for a budget of 8"),
    (YieldsForever, "learn yields numbers and consumes its budget", "yielded 801 times for a budget of 8"),
    (CannotBeClosed, "learn stops when it is closed between two yields", "do not catch GeneratorExit"),
    (ForgetsToSeed, "the same seeds give the same training", "draw only from the rng given to learn"),
    (ChanceInLearn, "the same seeds give the same training", "draw only from the rng given to learn"),
    (OwnGenerator, "training resumes bit for bit from any yield", "or a generator of its own"),
    (ChangesData, "learn does not change the data set", "changed dataset.actions in place"),
    (EvaluationReachesTraining, "evaluation between updates does not change training", "act must not touch"),
    (ForgetsToLoad, "a saved state comes back in a fresh agent", r"\['momentum'\] differs .*; load every key"),
    (
        ForgetsToSaveWeight,
        "a saved state comes back in a fresh agent",
        "self.weight is not restored; save all that act uses",
    ),
    (
        ForgetsToSaveMomentum,
        "training resumes bit for bit from any yield",
        "missing from state_dict: self.momentum is not rest",
    ),
    (LocalVariable, "training resumes bit for bit from any yield", "perhaps a local variable of learn"),
    (StateDictWrites, "a saved state comes back in a fresh agent", "two calls of state_dict in a row differ"),
    (SavingReachesTraining, "training resumes bit for bit from any yield", "state_dict must only read"),
    (TrainsOnce, "it learns the next task after the first", "consumed 0 of 8 units; each call has a budget of its own"),
]


@pytest.mark.parametrize(("cls", "check", "message"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_a_broken_agent_is_caught_with_advice(cls, check, message):
    fixtures = {Impossible: None, OutsideOfMoves: MOVES}.get(cls, DATA)
    report = check_agent(cls, budget=8, fixtures=fixtures)
    assert check in names(report)
    with pytest.raises(ContractError, match=message):
        report.raise_if_failed()


def test_every_check_has_a_broken_agent():
    assert {check for _, check, _ in BROKEN} >= {c.name for c in (*CLASS_CHECKS, *AGENT_CHECKS)}


def test_a_failure_does_not_stop_the_other_checks():
    report = check_agent(FailsInLearn, budget=8, fixtures=DATA)
    assert names(report) == {"learn yields numbers and consumes its budget"}
    skipped = {r.name: r.message for r in report.results if not r.applies}
    assert (
        "because 'learn yields numbers and consumes its budget' did not pass"
        in skipped["the same seeds give the same training"]
    )
    assert {r.name for r in report.results if r.status == "passed"} >= {"act does not change its inputs"}


def test_the_report_has_a_sentence_and_no_traceback():
    report = check_agent(FailsInLearn, budget=8, fixtures=DATA)
    (failure,) = report.failures
    assert "test_check_agent.py, line" in failure.message and "\n" not in failure.message
    assert "Traceback" not in str(report) and "Traceback" in failure.details


def test_an_unmet_requirement_is_one_sentence():
    class Moves(Good):
        requires = frozenset({"dataset", "discrete"})

    report = check_agent(Moves, budget=4, fixtures=DATA)
    assert "Moves requires ['discrete'], which the task 'state, continuous actions' does not offer" in report.text()
    check_agent(Moves, budget=4, fixtures=MOVES).raise_if_failed()


def test_an_agent_without_goals_is_not_blamed_for_refusing_them():
    class NoDict(Good):
        def flat(self, obs):
            if isinstance(obs, dict):
                raise TypeError("no dicts, please")
            return super().flat(obs)

    report = check_agent(NoDict, budget=4)
    report.raise_if_failed()
    (reason,) = {r.message for r in report.results if r.name == "goal observations"}
    assert "does not handle goal observations (NoDict.act raised TypeError: no dicts, please" in reason

    class NeedsGoals(NoDict):
        requires = frozenset({"dataset", "goal"})

    assert not check_agent(NeedsGoals, budget=4).ok  # who asks for goals must take them


def test_a_state_of_live_tensors_is_allowed_with_a_note():
    class Live(Good):
        def update(self, dataset, rng):
            loss = super().update(dataset, rng)
            self.total += 1
            return loss

        def __init__(self, spaces, config, *, device, rng):
            super().__init__(spaces, config, device=device, rng=rng)
            self.total = torch.zeros(())

        def state_dict(self):
            return {**super().state_dict(), "total": self.total}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.total = state["total"].clone()

    report = check_agent(Live, budget=4, fixtures=DATA)
    report.raise_if_failed()
    assert "state_dict returns live tensors" in notes(report)["it learns the next task after the first"]
    assert "it learns the next task after the first" not in notes(check_agent(Good, budget=4, fixtures=DATA))


def test_unknown_configuration_keys_are_caught():
    report = check_agent(Good, config={"learning_rate": 1.0}, budget=4, fixtures=DATA)
    assert "Unknown key 'learning_rate'" in report.text()


def test_an_agent_that_acts_at_random_is_exempt_from_comparing_rows():
    class Noisy(Good):
        def act(self, obs, memory, first, *, rng, task=None, explore=False):
            return super().act(obs, memory, first, rng=rng, explore=True)

    report = check_agent(Noisy, budget=4, fixtures=DATA)
    report.raise_if_failed()
    exempt = {r.name for r in report.results if not r.applies}
    assert "actions do not depend on the other rows of the batch" in exempt


def test_an_online_agent_that_forgets_its_last_observation_is_caught():
    class Forgets(GoodOnline):
        def state_dict(self):
            return {**super().state_dict(), "last": None}

    report = check_agent(Forgets, budget=16, fixtures=DATA)
    assert "self.last is not restored" in report.text()


def test_task_ids_reach_an_agent_that_requires_them():
    class PerTask(Good):
        requires = frozenset({"dataset", "task_id"})
        seen: list = []

        def start_task(self, task):
            self.seen.append(task.id)

        def act(self, obs, memory, first, *, rng, task=None, explore=False):
            self.seen.append(task.shape[0] if task is not None else None)
            return super().act(obs, memory, first, rng=rng, explore=explore)

        def update(self, dataset, rng):
            self.seen.append(None if dataset.task is None else int(dataset.task[0]))
            return super().update(dataset, rng)

    check_agent(PerTask, budget=4, fixtures=DATA).raise_if_failed()
    assert None not in PerTask.seen and set(PerTask.seen) >= {0, 1, 7}
