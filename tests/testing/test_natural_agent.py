"""An agent as one writes it the first time: plain PyTorch, no generator passed, only discrete actions in mind.

It must pass, with notes on what the loop does for it; what is really wrong with such an agent must still be found, in one
sentence and exit code 1 of ``clbench check``.
"""

# the agents are written as one writes them for oneself, without annotations that would please a type checker
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportCallIssue=false

from __future__ import annotations

import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from clbench import Agent
from clbench.cli.main import main
from clbench.testing import check_agent
from clbench.testing.fixtures import Fixture

MOVES = [Fixture(discrete=True)]
REACH = [Fixture()]


class Natural(Agent):
    requires = frozenset({"dataset"})

    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        inputs = math.prod(spaces.observation.shape)
        self.net = nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, spaces.action.n)).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.net(obs.flatten(1).float()).argmax(1), memory

    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            batch = experience.dataset.sample(16, rng)
            loss = nn.functional.cross_entropy(self.net(batch.observations.flatten(1).float()), batch.actions)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"loss": loss.item()}

    def state_dict(self):
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])


class NaturalRegression(Natural):
    """The same for continuous actions: its actions carry gradients and leave the bounds."""

    def __init__(self, spaces, config, *, device, rng):
        Agent.__init__(self, spaces, config, device=device, rng=rng)
        self.net = nn.Linear(spaces.observation.shape[0], spaces.action.shape[0])
        nn.init.normal_(self.net.weight, std=5.0)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.net(obs), memory

    def learn(self, experience, budget, *, rng):
        for _ in range(budget):
            batch = experience.dataset.sample(16, rng)
            loss = nn.functional.mse_loss(self.net(batch.observations), batch.actions)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield {"loss": loss.item()}


def notes(report):
    return {r.name: r.message for r in report.rows() if r.label == "note"}


def excused(report):
    return {r.name: r.message for r in report.results if r.group == "Kinds of tasks"}


def test_a_natural_agent_passes_and_hears_what_the_loop_does_for_it():
    report = check_agent(Natural, budget=16)
    report.raise_if_failed()
    assert "process-wide generator of torch, which the loop seeds" in notes(report)["it can be constructed"]
    assert "as torch optimisers do" in notes(report)["it learns the next task after the first"]
    assert set(excused(report)) == {"continuous actions", "goal observations"}
    assert "no attribute 'n'" in excused(report)["continuous actions"]
    assert "declare requires = frozenset({'dataset', 'discrete'})" in excused(report)["continuous actions"]
    assert {r.subject for r in report.results if r.name == "act returns valid actions"} == {
        "state, discrete actions, from a data set",
        "pixels, discrete actions, from a data set",
    }


def test_declaring_what_it_needs_silences_the_excuse():
    class Discrete(Natural):
        requires = frozenset({"dataset", "discrete"})

    assert set(excused(check_agent(Discrete, budget=4))) == {"goal observations"}


def test_gradients_are_fine_and_actions_outside_the_bounds_are_clipped():
    report = check_agent(NaturalRegression, budget=16)
    report.raise_if_failed()
    assert "the loop clips them" in notes(report)["act returns valid actions"]
    assert "discrete actions" in excused(report)
    assert "pixel observations" in excused(report) or "goal observations" in excused(report)


def test_fixtures_that_are_named_are_not_excused():
    assert not check_agent(Natural, budget=4, fixtures=REACH).ok
    check_agent(Natural, budget=4, fixtures=MOVES).raise_if_failed()


def test_an_agent_that_names_no_source_is_excused_from_the_one_it_cannot_use():
    class Sourceless(Natural):
        requires = frozenset()

    report = check_agent(Sourceless, budget=4)
    report.raise_if_failed()
    assert "requires = frozenset({'dataset'})" in excused(report)["an environment without a data set"]


class ProcessWideLearning(Natural):
    def learn(self, experience, budget, *, rng):
        for m in super().learn(experience, budget, rng=rng):
            with torch.no_grad():
                self.net[0].bias.add_(random.random() * np.random.rand() * torch.rand(1) * 1e-2)  # noqa: NPY002
            yield m

    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        actions, memory = super().act(obs, memory, first, rng=rng)
        return torch.randint(4, actions.shape) if explore else actions, memory


def test_process_wide_draws_that_the_loop_can_replay_are_noted():
    report = check_agent(ProcessWideLearning, budget=8, fixtures=MOVES)
    report.raise_if_failed()
    found = notes(report)
    assert "learn draws from the process-wide generator of" in found["the same seeds give the same training"]
    assert (
        "act draws from the process-wide generator of torch"
        in found["actions do not depend on process-wide random numbers"]
    )
    quiet = notes(check_agent(Natural, budget=8, fixtures=MOVES))
    assert "the same seeds give the same training" not in quiet
    assert "actions do not depend on process-wide random numbers" not in quiet


# -- broken versions, through the command line -----------------------------------------------------


class WrongShape(Natural):
    def act(self, obs, memory, first, *, rng, task=None, explore=False):
        return self.net(obs.flatten(1).float()), memory


class MissingKey(Natural):
    def state_dict(self):
        return {"net": self.net.state_dict()}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])


class MissingKeyThatIsLoaded(Natural):
    def state_dict(self):
        return {"net": self.net.state_dict()}


class WantsGoals(Natural):
    requires = frozenset({"dataset", "goal"})


class FailsInLearn(Natural):
    def learn(self, experience, budget, *, rng):
        yield {"loss": self.net(experience.dataset.observations).square()}.pop("nothing")


class Dropout(Natural):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        self.net = nn.Sequential(nn.Dropout(), *self.net)


class Unhelpable(Natural):
    def __init__(self, spaces, config, *, device, rng):
        super().__init__(spaces, config, device=device, rng=rng)
        raise RuntimeError("no licence")


@pytest.mark.parametrize(
    ("cls", "check", "sentence"),
    [
        (WrongShape, "act returns valid actions", "actions of shape (4, 4), expected (4,): one whole number per"),
        (MissingKey, "training resumes bit for bit from any yield", "missing from state_dict: self.optimizer is not"),
        (MissingKeyThatIsLoaded, "a saved state comes back in a fresh agent", "raised KeyError: 'optimizer'"),
        (WantsGoals, "it can be constructed", "handle them, or take 'goal' out of requires"),
        (FailsInLearn, "learn yields numbers and consumes its budget", "FailsInLearn.learn raised KeyError: 'nothing'"),
        (Dropout, "actions do not depend on process-wide random numbers", "unless the network is in eval mode"),
        (Unhelpable, "it can be constructed", "raised RuntimeError: no licence (test_natural_agent.py"),
    ],
)
def test_a_broken_version_gets_one_sentence_and_exit_code_1(cls, check, sentence, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "natural_agents", sys.modules[__name__])
    with pytest.raises(SystemExit) as stop:
        main(["check", f"natural_agents:{cls.__name__}"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    lines = out.split("What to change\n")[1].splitlines()
    (line,) = [line for line in lines if line.startswith("  - ")]
    assert line.startswith(f"  - {check} (on ")
    assert sentence in " ".join(" ".join(lines).split())
    assert "Traceback" not in out and ", 1 failed, " in out


def test_the_printed_report_fits_100_columns():
    report = check_agent(Natural, budget=4)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100 < max(map(len, report.text(verbose=True).splitlines()))
    assert lines[-1].endswith(" passed, 0 failed, 2 notes")
    names = [line[10:] for line in lines if line[:10].strip() in ("passed", "FAILED", "note", "n.a.")]
    assert sorted(names) == sorted({r.name for r in report.results})  # one line per check, whatever the kinds of tasks
