"""Conformance checks for continual methods: :func:`check_method`.

A method is composed with small agents and checked as what comes out: an agent. So all checks of agents apply, on one task;
the checks below go through several tasks, since what methods do begins with the second.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clbench.agents.continual.batches import tensors
from clbench.agents.continual.compose import compose, field_name
from clbench.agents.continual.method import NEEDS, Method
from clbench.config import build
from clbench.contracts import Agent, Experience, TaskInfo
from clbench.errors import ConfigError, unknown_name
from clbench.rng import get_global_state, sealed_global_rng, set_global_state
from clbench.testing.agents import CLASS_CHECKS as AGENT_CLASS_CHECKS
from clbench.testing.agents import Case, attributes, check_agent
from clbench.testing.core import (
    Checks,
    Failed,
    NotApplicable,
    Report,
    Result,
    clone,
    difference,
    explain,
    run_checks,
    used_generator,
)
from clbench.testing.fixtures import ALL_FIXTURES, Fixture

CLASS_CHECKS: Checks = Checks("Method")
TASK_CHECKS: Checks = Checks("Several tasks")
FITS = "it composes with an agent"
TASKS = 3

MOVES, GOALS = Fixture(discrete=True), Fixture(goal=True)
OFF_POLICY = {"hidden": (8,), "buffer_size": 128, "learning_starts": 16, "batch_size": 8}
# agents small enough to be trained a dozen times in a second or two: options, budget, the task that they are checked on
AGENTS: dict[str, tuple[dict[str, Any], int, Fixture]] = {
    "bc": ({"hidden": (16,), "batch_size": 8, "lr": 0.02}, 12, MOVES),
    "gcbc": ({"hidden": (8,), "batch_size": 8, "lr": 0.02}, 12, GOALS),
    "pldm": (
        {
            "window": 4, "batch_size": 4, "replan_every": 2,
            "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,), "channels": (4, 4, 4)},
            "planner_options": {"horizon": 4, "samples": 8, "elites": 2, "iterations": 1},
        },
        8, GOALS,
    ),
    "sb3-ppo": ({"hidden": (8,), "rollout_steps": 16, "batch_size": 8, "n_epochs": 1}, 64, MOVES),
    "sb3-dqn": ({**OFF_POLICY, "target_update_interval": 32, "lr": 0.01}, 64, MOVES),
    "sb3-sac": (OFF_POLICY, 64, Fixture()),
}  # fmt: skip
USUAL = ("bc", "gcbc", "sb3-ppo")


def check_method(
    cls: type[Method],
    *,
    config: Mapping[str, Any] | None = None,
    agents: Sequence[str | type[Agent]] = USUAL,
) -> Report:
    """Run every check of methods on ``cls``, and every check of agents on its composition with each of ``agents``.

    An agent that the method does not fit is reported as not applicable, unless there is no other.

    Args:
        cls: a subclass of :class:`clbench.Method`.
        config: values of ``cls.Config``; choose few samples and small memories.
        agents: names, or classes, which are checked with their default options.
    """
    report = Report(f"{cls.__module__}:{cls.__qualname__}" if isinstance(cls, type) else repr(cls))
    report.results += run_checks(CLASS_CHECKS, (cls, config), "", cls)
    if not report.ok:
        return report
    refused: list[Result] = []
    found = 0
    with sealed_global_rng():
        for agent in agents:
            name = agent if isinstance(agent, str) else agent.__name__
            try:
                case = case_of(cls, config, agent)
                case.agent()
            except ConfigError as reason:
                refused.append(Result(f"with {name}", True, str(reason), False, group=CLASS_CHECKS.group))
                continue
            except Exception as error:  # noqa: BLE001 (a plug-in may raise anything)
                report.results.append(Result(FITS, False, explain(error, cls), subject=name, group=CLASS_CHECKS.group))
                continue
            found += 1
            report.results.append(Result(FITS, True, subject=name, group=CLASS_CHECKS.group))
            one = check_agent(
                case.cls, config=case.config, budget=case.budget, num_envs=case.num_envs, fixtures=[case.fixture]
            )
            report.results += [dataclasses.replace(r, subject=f"{name}, {r.subject}") for r in one.results]
            report.results += run_checks(TASK_CHECKS, case, f"{name}, {case.subject}", cls)
    if not found and report.ok:
        reasons = " ".join(r.message for r in refused)
        said = f"{cls.__name__} fits none of {', '.join(map(_name, agents))}: {reasons} Give agents= that it fits."
        report.results.append(Result(FITS, False, said, group=CLASS_CHECKS.group))
    report.results += refused
    return report


def _name(agent: str | type[Agent]) -> str:
    return agent if isinstance(agent, str) else agent.__name__


def case_of(cls: type[Method], config: Mapping[str, Any] | None, agent: str | type[Agent]) -> MethodCase:
    """The composition with an agent, watched, on the task that suits the agent.

    Raises:
        ConfigError: the pair does not fit.
    """
    composed = compose(agent, [watched(cls)])
    options, budget, fixture = AGENTS.get(_name(agent), ({}, 12, None))
    fixture = fixture or next(f for f in (MOVES, GOALS, *ALL_FIXTURES) if composed.requires <= f.offers)
    source = "env" if "env" in composed.requires else "dataset"
    return MethodCase(
        composed, {"agent": options, field_name(cls.__qualname__): dict(config or {})}, fixture, source, budget, 4
    )


def watched(cls: type[Method]) -> type[Method]:
    """A subclass whose hooks complain when they touch what is not theirs: process-wide generators, the agent's batch."""

    def watch(name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Method, *args: Any, **kwargs: Any) -> Any:
            batch = args[-1] if name in ("replay", "loss") else None
            before, rows = get_global_state(), [t.clone() for t in tensors(batch)]
            answer = hook(self, *args, **kwargs)
            drew = used_generator(before)
            if drew:
                raise Failed(
                    f"{cls.__name__}.{name} draws from the process-wide generator of {drew}, which belongs to the agent; "
                    "draw with generator=self.rng."
                )
            if difference(rows, list(tensors(batch))):
                raise Failed(f"{cls.__name__}.{name} changed the agent's batch in place; work on a copy.")
            if name == "loss" and not (isinstance(answer, Tensor) and answer.ndim == 0):
                raise Failed(f"{cls.__name__}.loss returned {answer!r}; return base plus a tensor without dimensions.")
            return answer

        return call

    names = ("__init__", *HOOKS)
    wrapped = {n: watch(n, getattr(cls, n)) for n in names if getattr(cls, n) is not getattr(Method, n)}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **wrapped})


# -- the class -------------------------------------------------------------------------------------------------------------

IS_METHOD = "it is a Method subclass"
HOOKS = ("start_task", "replay", "loss", "after_backward", "after_step", "finish_task", "view", "new_optimizer")


@CLASS_CHECKS.add(IS_METHOD)
def _is_method(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise Failed(f"{cls!r} is not a subclass of clbench.Method; write `class {getattr(cls, '__name__', 'MyMethod')}"
                     "(Method)`.")  # fmt: skip
    return None


@CLASS_CHECKS.add("its hooks take the arguments of the contract", needs=IS_METHOD)
def _signatures(given: tuple[Any, Any]) -> str | None:
    cls, x = given[0], None
    calls: dict[str, tuple[tuple, dict]] = {name: ((x, x), {}) for name in (*HOOKS, "load_state_dict")}
    calls |= {
        "__init__": ((x, x, x), {"rng": x}),
        "loss": ((x, x, x), {}),
        "state_dict": ((x,), {}),
        "metrics": ((x,), {}),
    }
    for name, (args, kwargs) in calls.items():
        try:
            inspect.signature(getattr(cls, name)).bind(*args, **kwargs)
        except TypeError as error:
            bare = [p.replace(annotation=p.empty) for p in inspect.signature(getattr(Method, name)).parameters.values()]
            raise Failed(
                f"{cls.__name__}.{name} cannot be called as the composition does ({error}); define it as "
                f"{name}{inspect.Signature(bare)}."
            ) from error
    return None


@CLASS_CHECKS.add("its Config is a dataclass whose fields all have defaults", needs=IS_METHOD)
def _config(given: tuple[Any, Any]) -> str | None:
    same = next(c for c in AGENT_CLASS_CHECKS if c.name.startswith("Config is a dataclass"))
    return same.run(given)


@CLASS_CHECKS.add("requires names only known needs", needs=IS_METHOD)
def _requires(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    if not isinstance(cls.requires, frozenset | set):
        raise Failed(f"{cls.__name__}.requires is a {type(cls.requires).__name__}; write frozenset({{...}}).")
    for name in sorted(cls.requires - set(NEEDS)):
        raise Failed(str(unknown_name("need", str(name), NEEDS, where=f"{cls.__name__}.requires")))
    return None


@CLASS_CHECKS.add("it says what it is: summary, paper and formula", needs=IS_METHOD)
def _card(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    for name in ("__doc__", "paper", "formula"):
        text = vars(cls).get(name) if name == "__doc__" else getattr(cls, name)
        if not (isinstance(text, str) and text.strip()):
            what = "a docstring" if name == "__doc__" else f"the class attribute {name}, a sentence"
            raise Failed(f"{cls.__name__} has no {name.strip('_')}; add {what}.")
    return None


@CLASS_CHECKS.add("pairs that do not fit are refused in one sentence", needs=IS_METHOD)
def _refusals(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    pairs: list[tuple[str, list[type[Method]]]] = [("random", [cls]), ("eidetic-bc", [cls]), ("bc", [cls, cls])]
    for agent, methods in pairs:
        try:
            compose(agent, methods)
        except ConfigError as error:
            if not str(error).rstrip().endswith("."):
                raise Failed(f"with {agent} it is refused with {str(error)!r}; make it a sentence.") from error
        else:
            raise Failed(f"{cls.__name__} composes with {agent} ({len(methods)} times), which has no place for it.")
    return None


# -- several tasks ---------------------------------------------------------------------------------------------------------

LEARNS = "it learns one task after the other"


@dataclasses.dataclass
class Moment:
    """All that a checkpoint holds at one moment; ``live``: the method's state as it was given, ``kept``: a copy."""

    task: int
    consumed: int
    agent: dict[str, Any]
    live: Any
    kept: Any
    rng: Tensor
    env: dict[str, Any] | None
    process_wide: dict[str, Any]
    attributes: dict[str, Any]


def _id(case: Case, task: int) -> int | None:
    return task if "task_id" in case.cls.requires else None


def _experience(case: Case, task: int) -> Experience:
    """Of a task: other tasks want other actions."""
    experience = case.fixture.experience(case.source, case.num_envs, task, _id(case, task))
    data = experience.dataset
    if data is not None:
        data.actions = (data.actions + task) % 4 if case.fixture.discrete else data.actions * (-1) ** task
    return experience


def _walk(
    case: Case, at: Moment | None = None,
    between: Callable[[int, int, Agent, Experience, torch.Generator], None] | None = None,
) -> tuple[Agent, dict[str, Any]]:  # fmt: skip
    """Three tasks, from the beginning or from a moment on; ``between`` is called at every yield and boundary."""
    agent = case.agent(seed=0 if at is None else 1)
    if at is not None:
        agent.load_state_dict(clone(at.agent))
    for task in range(0 if at is None else at.task, TASKS):
        experience = _experience(case, task)
        rng, consumed = case.rng(task, "learn"), 0
        if at is not None and task == at.task:
            consumed = at.consumed
            set_global_state(at.process_wide)
        if at is not None and consumed:
            rng.set_state(at.rng)
            if experience.env is not None and at.env is not None:
                experience.env.load_state_dict(at.env)
        else:
            agent.start_task(TaskInfo(_id(case, task), None))
        for count, metrics in enumerate(case.steps(agent, experience, rng, case.budget - consumed), start=1):
            if between is not None:
                between(task, consumed + int(metrics.get("step", count)), agent, experience, rng)
        agent.finish_task()
        if between is not None:
            between(task + 1, 0, agent, experience, rng)
    return agent, clone(agent.state_dict())


class MethodCase(Case):
    """A composition on one task."""

    @cached_property
    def walked(self) -> tuple[Agent, dict[str, Any]]:
        """Three tasks without interruption: the agent, and its state; nobody trains it any further."""
        return _walk(self)


@TASK_CHECKS.add("the agent begins with the weights that it has without the method")
def _same_start(case: MethodCase) -> str | None:
    with_method: Any = case.agent()
    plain_class = with_method.agent_class
    case.seed_process()
    options = build(plain_class.Config, (case.config or {})["agent"], f"{plain_class.__name__}.Config")
    plain = plain_class(case.fixture.spaces, options, device=case.device, rng=case.rng(0, "agent"))
    theirs, ours = ([p.detach() for p in a.trainables] for a in (plain, with_method.agent))
    changed = difference(theirs, ours, "the parameters")
    if changed:
        raise Failed(f"{changed}; do not change parameters in __init__: runs with and without the method are compared.")
    return None


@TASK_CHECKS.add(LEARNS)
def _learns(case: MethodCase) -> str | None:
    agent: Any = case.walked[0]
    for name, value in agent.method_costs().items():
        if not (isinstance(value, int) and value >= 0):
            raise Failed(f"method_costs()[{name!r}] is {value!r}; count with learner.count(batch, backward=...).")
    return None


@TASK_CHECKS.add("stopped in any task, it resumes bit for bit", needs=LEARNS)
def _resumes(case: MethodCase) -> str | None:
    expected = case.walked[1]
    moments: list[Moment] = []

    def look(task: int, consumed: int, agent: Any, experience: Experience, rng: torch.Generator) -> None:
        live = agent.state_dict()
        env = None if experience.env is None or not consumed else clone(experience.env.state_dict())
        if consumed < case.budget and task < TASKS:
            moments.append(
                Moment(task, consumed, clone(live), live["methods"], clone(live["methods"]), rng.get_state(), env,
                       get_global_state(), attributes(agent))
            )  # fmt: skip

    changed = difference(expected, _walk(case, between=look)[1], "state_dict()")
    if changed:
        raise Failed(f"a second training from the same seeds, with states saved in between, differs: {changed}; state_dict "
                     "must only read, and nothing may be drawn but from self.rng.")  # fmt: skip
    shared = next((m for m in moments if difference(m.live, m.kept)), None)
    if shared is not None:
        raise Failed("state_dict returns live tensors, which training went on to change; return copies.")
    for at in _some(moments):
        agent: Any = case.agent(seed=1)
        given = clone(at.agent)
        agent.load_state_dict(given)
        now = attributes(agent)
        lost = [k for k, v in at.attributes.items() if "." in k and (k not in now or difference(v, now[k]))]
        # into the method's state only: agents may keep references, which check_agent notes
        if difference(at.kept, agent.state_dict()["methods"]):
            raise Failed(f"after load_state_dict in task {at.task + 1}, the method's state differs; load every key.")
        changed = difference(expected, _walk(case, at)[1], "state_dict()")
        if changed:
            suspects = f"; {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} not restored" if lost else ""
            raise Failed(
                f"saved after {at.consumed} of {case.budget} units of task {at.task + 1} and resumed, training ends "
                f"differently: {changed}{suspects}; something that the method needs is missing from its state."
            )
    return None


def _some(moments: list[Moment]) -> list[Moment]:
    """One in the first task, each boundary, and the middle of each later task."""
    inside = [m for m in moments if m.consumed]
    of = [[m for m in inside if m.task == task] for task in range(TASKS)]
    return [*(each[len(each) // 2] for each in of if each), *(m for m in moments if not m.consumed)]


@TASK_CHECKS.add("a state that was loaded stays as it is", needs=LEARNS)
def _shares_no_memory(case: MethodCase) -> str | None:
    state = case.walked[1]
    agent: Any = case.agent(seed=1)
    given = clone(state)
    agent.load_state_dict(given)
    agent.start_task(TaskInfo(_id(case, 0), None))
    for _ in case.steps(agent, _experience(case, 0), case.rng(9, "learn")):
        pass
    agent.finish_task()
    changed = difference(state["methods"], given["methods"], "the state")
    if changed:
        raise Failed(f"{changed} after training went on: load_state_dict keeps references to its tensors; copy them.")
    return None


@TASK_CHECKS.add("acting changes nothing, in any task", needs=LEARNS)
def _acting(case: MethodCase) -> str | None:
    def evaluate(task: int, consumed: int, agent: Any, experience: Experience, rng: torch.Generator) -> None:
        if not consumed or consumed >= case.budget // 2:
            before = clone(agent.state_dict())
            _act(case, agent, case.observation(4, seed=consumed), torch.tensor([0, 1, 0, 7]))
            changed = difference(before, agent.state_dict(), "state_dict()")
            if changed:
                raise Failed(f"acting changed the agent in task {task + 1}: {changed}; view must put everything back.")

    changed = difference(case.walked[1], _walk(case, between=evaluate)[1], "state_dict()")
    if changed:
        raise Failed(f"training with evaluations in between ends differently: {changed}; acting must leave no trace.")
    return None


@TASK_CHECKS.add("rows of several tasks act as they do alone", needs=LEARNS)
def _mixed(case: MethodCase) -> str | None:
    if "task_id" not in case.cls.requires:
        raise NotApplicable("it does not ask for the task")
    if case.stochastic:  # each task in the batch draws in turn
        raise NotApplicable("the agent acts at random even with explore=False")
    agent = case.walked[0]
    obs, tasks = case.observation(32), torch.arange(32) % TASKS
    together = _act(case, agent, obs, tasks)
    for each in range(TASKS):
        alone = _act(case, agent, obs, torch.full((32,), each))
        rows = tasks == each
        if difference(together[rows], alone[rows]):
            raise Failed(f"rows of task {each} act differently beside rows of other tasks; view(task) must not depend on "
                         "the view before.")  # fmt: skip
    return None


def _act(case: Case, agent: Agent, obs: Any, task: Tensor) -> Tensor:
    first = torch.ones(len(task), dtype=torch.bool)
    task_or_none = task if "task_id" in case.cls.requires else None
    with sealed_global_rng(), torch.no_grad():
        return agent.act(obs, None, first, rng=case.rng(0, "act"), task=task_or_none)[0].clone()
