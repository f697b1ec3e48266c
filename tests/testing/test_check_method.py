"""Every check of continual methods passes a good method and catches one broken in just that way, with advice."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from clbench.agents.continual.compose import compose
from clbench.agents.continual.method import Method
from clbench.errors import ConfigError
from clbench.rng import get_global_state
from clbench.testing import check_method, run_check
from clbench.testing.core import difference
from clbench.testing.methods import CLASS_CHECKS, TASK_CHECKS, USUAL
from clbench.testing.target import _kind


class Good(Method):
    """A noisy anchor whose strength fades: has everything that a careless author can break."""

    requires = frozenset({"boundaries", "outputs", "batches"})
    paper = "nobody 2024"
    formula = "loss + heat |theta - anchor|^2"
    state: Any = ("anchor", "trace", "heat")

    @dataclass
    class Config:
        strength: float = 1.0

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        self.anchor = None
        self.trace = torch.zeros(3)
        self.heat = config.strength

    def loss(self, base, batch):
        if self.anchor is None:
            return base
        return base + self.heat * sum((p - a).square().sum() for p, a in zip(self.learner.params, self.anchor))

    def after_step(self, params):
        self.heat *= 0.99
        self.trace.add_(self.heat)

    def finish_task(self, batches):
        size = self.learner.outputs(next(batches))[0].values.abs().mean()
        noise = torch.randn((), generator=self.rng)
        self.anchor = [v + 0.01 * size.detach() * noise for v in self.learner.values()]


class GoodByTask(Good):
    """The same, acting with weights of each task's own: the negative of what they were when it was finished."""

    requires = Good.requires | {"task_id"}
    state = (*Good.state, "own", "now")

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        self.own: dict[str, Any] = {}
        self.now = -1

    def start_task(self, task):
        self.now = task.id

    def finish_task(self, batches):
        super().finish_task(batches)
        self.own[str(self.now)] = [-v for v in self.learner.values()]

    def view(self, task):
        return self.learner.holding(self.own[str(task)]) if str(task) in self.own else None


def names(report):
    return {r.name for r in report.failures}


@pytest.mark.parametrize(("cls", "agents"), [(Good, USUAL), (GoodByTask, ("bc",))])
def test_good_methods_pass(cls, agents):
    before = get_global_state()
    report = check_method(cls, agents=agents)
    report.raise_if_failed()
    passed = {r.name for r in report.results if r.status == "passed"}
    missing = {c.name for c in (*CLASS_CHECKS, *TASK_CHECKS)} - passed
    assert missing == (set() if cls is GoodByTask else {"rows of several tasks act as they do alone"})
    assert {r.subject.partition(",")[0] for r in report.results if r.subject} == set(agents)
    assert difference(before, get_global_state()) is None


# -- the class ---------------------------------------------------------------------------------------------------------


class NoMethod:
    pass


class UnknownNeed(Good):
    """."""

    requires = frozenset({"boundarys"})


class NoPaper(Good):
    """."""

    paper = ""


class NoSummary(Good):
    paper = "somebody"


class NoDefaults(Good):
    """."""

    @dataclass
    class Config:
        strength: float


class OldHook(Good):
    """."""

    def finish_task(self):  # type: ignore[override]
        pass


CLASSES = [
    (NoMethod, "it is a Method subclass", "(Method)"),
    (UnknownNeed, "requires names only known needs", "'boundaries'"),
    (NoPaper, "it says what it is: summary, paper and formula", "paper"),
    (NoSummary, "it says what it is: summary, paper and formula", "docstring"),
    (NoDefaults, "its Config is a dataclass whose fields all have defaults", "strength"),
    (OldHook, "its hooks take the arguments of the contract", "finish_task(self, batches)"),
]


@pytest.mark.parametrize(("cls", "check", "advice"), CLASSES, ids=lambda v: getattr(v, "__name__", ""))
def test_faults_of_the_class(cls, check, advice):
    report = check_method(cls)
    assert names(report) - {"pairs that do not fit are refused in one sentence"} == {check}
    assert advice in report.text()


def test_a_method_that_would_fit_anything_is_noticed(monkeypatch):
    monkeypatch.setattr("clbench.agents.continual.compose.check_pair", lambda *arguments: None)
    assert names(check_method(Good)) == {"pairs that do not fit are refused in one sentence"}


# -- what it does ------------------------------------------------------------------------------------------------------


class HiddenState(Good):
    """Half of what it needs is not in its state."""

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        self.warmth = 1.0

    def after_step(self, params):
        self.warmth *= 1.1
        self.heat = self.warmth


class NoAnchor(Good):
    """Its anchor is not in its state: only a boundary shows it."""

    state = ("trace", "heat")


class OwnGenerator(Good):
    """A generator of its own that is not saved."""

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        self.own = torch.Generator().manual_seed(0)

    def after_step(self, params):
        self.heat *= float(0.5 + torch.rand((), generator=self.own))


class NotLoaded(Good):
    """Saves what it does not load."""

    def load_state_dict(self, state):
        super().load_state_dict({**state, "heat": 1.0})


class NotPlain(Good):
    """An object in its state."""

    def state_dict(self):
        return {**super().state_dict(), "tasks": {1, 2}}


class LiveState(Good):
    """Gives its own tensors away."""

    def state_dict(self):
        return {name: getattr(self, name) for name in self.state}


class KeepsState(Good):
    """Goes on in the tensors that it was given."""

    def load_state_dict(self, state):
        for name in self.state:
            setattr(self, name, state[name])


class DrawsInLoss(Good):
    """Draws what belongs to the agent."""

    def loss(self, base, batch):
        torch.rand(())
        return super().loss(base, batch)


class DrawsAtTheEnd(Good):
    """Draws what belongs to the agent."""

    def finish_task(self, batches):
        super().finish_task(batches)
        torch.randn(3)


class DrawsAtTheStart(Good):
    """Draws what belongs to the agent."""

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        self.trace = torch.rand(3)


class ChangesBatch(Good):
    """Works in the agent's batch."""

    def loss(self, base, batch):
        if batch is not None:
            batch.observations.mul_(0.5)
        return super().loss(base, batch)


class ChangesWeights(Good):
    """Begins elsewhere than the agent alone."""

    def __init__(self, config, learner, *, rng):
        super().__init__(config, learner, rng=rng)
        with torch.no_grad():
            learner.params[0].mul_(0.5)


class VectorLoss(Good):
    """One loss per parameter."""

    def loss(self, base, batch):
        return base + torch.zeros(2)


class Raises(Good):
    """Fails at its second task."""

    def start_task(self, task):
        if self.anchor is not None:
            raise ZeroDivisionError("no second task")


class ActsOnce(GoodByTask):
    """Does not put the weights back."""

    def view(self, task):
        if str(task) not in self.own:
            return None
        for p, value in zip(self.learner.params, self.own[str(task)], strict=True):
            p.data.copy_(value)
        return contextlib.nullcontext()


class CountsViews(GoodByTask):
    """Acting moves its state."""

    def view(self, task):
        self.heat += 1.0
        return super().view(task)


class RemembersTheView(GoodByTask):
    """Acts on the task before."""

    before = None

    def view(self, task):
        task, self.before = self.before, task
        return super().view(task)


CLOCK = itertools.count()


class Clock(Good):
    """No two trainings are the same."""

    def after_step(self, params):
        super().after_step(params)
        self.heat += 1e-3 * next(CLOCK)


BEHAVIOUR = [
    (HiddenState, {"stopped in any task, it resumes bit for bit"}, "HiddenState.warmth is not restored"),
    (NoAnchor, {"stopped in any task, it resumes bit for bit"}, "NoAnchor.anchor is not restored"),
    (OwnGenerator, {"stopped in any task, it resumes bit for bit"}, "missing from its state"),
    (NotLoaded, {"stopped in any task, it resumes bit for bit"}, "load every key"),
    (NotPlain, {"state_dict holds only tensors and plain values"}, "builtins.set"),
    (LiveState, {"stopped in any task, it resumes bit for bit"}, "return copies"),
    (KeepsState, {"a state that was loaded stays as it is"}, "copy them"),
    (
        DrawsInLoss,
        {"it learns one task after the other"},
        "DrawsInLoss.loss draws from the process-wide generator of torch",
    ),
    (DrawsAtTheEnd, {"it learns one task after the other"}, "DrawsAtTheEnd.finish_task draws"),
    (DrawsAtTheStart, {"it composes with an agent"}, "DrawsAtTheStart.__init__ draws"),
    (ChangesBatch, {"it learns one task after the other"}, "ChangesBatch.loss changed the agent's batch in place"),
    (ChangesWeights, {"the agent begins with the weights that it has without the method"}, "do not change parameters"),
    (VectorLoss, {"it learns one task after the other"}, "without dimensions"),
    (Raises, {"it learns one task after the other"}, "ZeroDivisionError: no second task (test_check_method.py"),
    (ActsOnce, {"acting changes nothing, in any task"}, "view must put everything back"),
    (CountsViews, {"acting changes nothing, in any task"}, "acting changed the agent in task 1"),
    (RemembersTheView, {"rows of several tasks act as they do alone"}, "must not depend on the view before"),
    (Clock, {"stopped in any task, it resumes bit for bit"}, "from the same seeds"),
]


@pytest.mark.parametrize(("cls", "checks", "advice"), BEHAVIOUR, ids=lambda v: getattr(v, "__name__", ""))
def test_faults_of_behaviour(cls, checks, advice):
    report = check_method(cls, agents=["bc"])
    assert checks <= names(report)
    assert advice in report.text()


def test_a_draw_in_the_midst_of_a_sealed_update_is_noticed_too():
    """Stable-Baselines3 agents install generators of their own, so that nothing of the process would move."""
    report = check_method(DrawsInLoss, agents=["sb3-ppo"])
    assert "DrawsInLoss.loss draws from the process-wide generator of torch" in report.text()


# -- which agents ------------------------------------------------------------------------------------------------------


class NeedsLoss(Good):
    """."""

    requires = Good.requires | {"loss"}


def test_agents_that_it_does_not_fit_are_told_apart():
    report = check_method(NeedsLoss, agents=["bc", "sb3-ppo"])
    assert report.ok
    (row,) = [r for r in report.results if r.name == "with sb3-ppo"]
    assert not row.applies and "hides" not in row.message and "its own training" in row.message
    report = check_method(NeedsLoss, agents=["sb3-ppo"])
    assert names(report) == {"it composes with an agent"} and "fits none of sb3-ppo" in report.text()


def test_config_is_the_methods():
    assert check_method(Good, config={"strength": 2.0}, agents=["bc"]).ok
    report = check_method(Good, config={"strenght": 2.0}, agents=["bc"])
    assert "strength" in report.text() and not report.ok


def test_methods_are_found_by_name_and_by_class():
    assert _kind("l2") == _kind("methods/l2") == ("methods", "l2")
    report = run_check(f"{__name__}:NoPaper")
    assert not report.ok and "NoPaper has no paper" in report.text()


def test_a_class_inside_another_has_an_option_group_too():
    class Inner(Good):
        """."""

    fields = compose("bc", [Inner]).Config.__dataclass_fields__
    assert set(fields) == {"agent", "Inner"}
    with pytest.raises(ConfigError, match="named twice"):
        compose("bc", [Inner, Inner])
