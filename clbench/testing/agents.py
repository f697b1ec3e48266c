"""Conformance checks for agents: :func:`check_agent` and the list of checks it runs."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import gymnasium
import torch
from torch import Tensor

from clbench.config import build
from clbench.contracts import REQUIREMENTS, Agent, Experience, TaskInfo
from clbench.errors import unknown_name
from clbench.rng import (
    derive_seed,
    get_global_state,
    sealed_global_rng,
    seed_global,
    set_global_state,
    torch_generator,
)
from clbench.testing.core import (
    Check,
    Checks,
    Failed,
    NotApplicable,
    Report,
    Result,
    clone,
    difference,
    explain,
    row,
    run_checks,
    state_problem,
    storages,
    used_generator,
)
from clbench.testing.fixtures import ALL_FIXTURES, FIXTURES, Fixture

CLASS_CHECKS: Checks = Checks("Class")
ACTING: Checks = Checks("Construction and acting")
LEARNING: Checks = Checks("Learning")
SAVING: Checks = Checks("Saving and resuming")
KINDS = "Kinds of tasks"
TOLERANCE = 1e-5  # of actions computed alone or in a batch, relative to the range of the action space


def check_agent(
    cls: type[Agent],
    *,
    config: Mapping[str, Any] | None = None,
    budget: int = 128,
    num_envs: int = 4,
    fixtures: Sequence[Fixture] | None = None,
) -> Report:
    """Run every agent check on ``cls``, on toy tasks of every kind that its ``requires`` allows.

    Kinds on which the agent cannot be constructed or stops at its first ``act`` or ``learn`` are reported as not
    applicable, unless there is no other, or they are named in ``fixtures``.

    Args:
        cls: a subclass of :class:`clbench.Agent`.
        config: values of ``cls.Config``; choose small networks, batches and buffers.
        budget: units of each ``learn`` call; a multiple of ``num_envs``, enough for the agent to update itself.
        num_envs: parallel environments during ``learn``.
        fixtures: the tasks that the agent must cope with, instead of finding out.
    """
    report = Report(f"{cls.__module__}:{cls.__qualname__}" if isinstance(cls, type) else repr(cls))
    report.results += run_checks(CLASS_CHECKS, (cls, config), "", cls)
    if not report.ok:
        return report
    allowed = [f for f in (*FIXTURES, *ALL_FIXTURES) if cls.requires <= f.offers]
    chosen = list(dict.fromkeys(allowed) if fixtures is None else fixtures)
    unmet = next((f for f in chosen if not cls.requires <= f.offers), None)
    if unmet or not chosen:
        report.results.append(Result(FITS, False, _unmet(cls, unmet), group=CLASS_CHECKS.group))
        return report
    report.results.append(Result(FITS, True, group=CLASS_CHECKS.group))
    cases = [Case(cls, config, f, source, budget, num_envs) for f in chosen for source in _sources(cls)]
    with sealed_global_rng():
        if fixtures is None:
            cases, results = _handled(cases)
            report.results += results
        for case in cases:
            report.results += run_checks(AGENT_CHECKS, case, case.subject, cls)
    return report


FITS = "there is a task that meets requires"


def _unmet(cls: type[Agent], fixture: Fixture | None) -> str:
    needs = sorted(cls.requires)
    if fixture is None:
        return (
            f"{cls.__name__}.requires is {needs}, which no task can meet at once; take out what contradicts the rest."
        )
    missing = sorted(cls.requires - fixture.offers)
    return (
        f"{cls.__name__} requires {missing}, which the task {fixture.name!r} does not offer (it offers "
        f"{sorted(fixture.offers)}); choose other fixtures."
    )


def _sources(cls: type[Agent]) -> tuple[str, ...]:
    """What ``learn`` is given; an agent that names neither source must cope with each."""
    named = cls.requires & {"dataset", "env"}
    if len(named) == 2:
        return ("both",)
    return (next(iter(named)),) if named else ("dataset", "env")


# -- which kinds of tasks the agent handles --------------------------------------------------------

# property of a task -> (in words, what to require to be spared it)
PROPERTIES: dict[str, tuple[str, str]] = {
    "discrete": ("discrete actions", "continuous"),
    "continuous": ("continuous actions", "discrete"),
    "dataset": ("a data set without an environment", "env"),
    "env": ("an environment without a data set", "dataset"),
    "both": ("a data set and an environment", ""),
    "goal": ("goal observations", ""),  # requires has no word for *no goals*
    "no goal": ("observations without goals", "goal"),
    "pixels": ("pixel observations", "state"),
    "state": ("state observations", "pixels"),
}


@dataclasses.dataclass(frozen=True)
class Refusal:
    """How far an agent gets on a task (0: construction, 1: ``act``, 2: ``learn``), and what stops it."""

    reached: int
    reason: str


def _refusal(case: Case) -> Refusal | None:
    """What the agent raises when it is constructed, first acts or first learns; wrong answers are for the checks."""
    reached = 0
    try:
        agent = case.agent()
        reached = 1
        case.act(agent, case.observation(4))
        reached = 2
        case.begin(agent)
        next(case.steps(agent, case.experience(), case.rng(0, "learn")), None)
    except Failed:
        return None
    except Exception as error:  # noqa: BLE001 (any failure is a refusal)
        return Refusal(reached, explain(error, case.cls))
    return None


def _handled(cases: Sequence[Case]) -> tuple[list[Case], list[Result]]:
    """The cases to check, and a result for each property of tasks that the agent does not handle.

    An agent that handles nothing is checked where it gets furthest: that says best what is wrong. Of the kinds that
    are not among the most telling ones only the first that is handled counts, and only where there is no other.
    """
    refused: list[tuple[Case, Refusal]] = []
    handled: list[Case] = []
    for case in cases:
        usual = case.fixture in FIXTURES
        if not usual and handled:
            break
        refusal = _refusal(case)
        if refusal is None:
            handled.append(case)
        else:
            refused.append((case, refusal))
    if not handled:
        return [max(refused, key=lambda r: r[1].reached)[0]], []
    known = set().union(*(case.properties for case in handled))
    results = {}
    for case, refusal in refused:
        name, message = _not_handled(case, refusal, known)
        results.setdefault(name, Result(name, True, message, False, case.subject, group=KINDS))
    return handled, list(results.values())


def _not_handled(case: Case, refusal: Refusal, known: set[str]) -> tuple[str, str]:
    """The property of a task that no handled task has, in words, and what to declare."""
    culprit = next((p for p in case.properties if p not in known), None)
    words, instead = (case.subject, "") if culprit is None else PROPERTIES[culprit]
    needs = ", ".join(repr(r) for r in sorted({*case.cls.requires, instead}))
    advice = f"; declare requires = frozenset({{{needs}}}) to say so" if instead else ""
    return words, f"the agent does not handle {words} ({refusal.reason}){advice}."


@dataclasses.dataclass
class Snapshot:
    """All that a checkpoint holds, taken between two yields of ``learn``, and what to compare a restored agent with."""

    consumed: int
    agent: dict[str, Any]
    rng: Tensor
    env: dict[str, Any] | None
    process_wide: dict[str, Any]
    attributes: dict[str, Any]


@dataclasses.dataclass
class Run:
    """What one training run left behind; ``drew``: the process-wide generator that it moved."""

    agent: Agent
    metrics: list[Mapping[str, float]]
    consumed: list[int]
    state: dict[str, Any]
    action: Tensor
    experience: Experience
    drew: str | None = None


_FROM = {"dataset": "a data set", "env": "an environment", "both": "a data set and an environment"}


@dataclasses.dataclass
class Case:
    """One agent class on one toy task; makes agents, observations and training runs for the checks."""

    cls: type[Agent]
    config: Mapping[str, Any] | None
    fixture: Fixture
    source: str
    budget: int
    num_envs: int

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def subject(self) -> str:
        return f"{self.fixture.name}, from {_FROM[self.source]}"

    @property
    def properties(self) -> tuple[str, ...]:
        """Of :data:`PROPERTIES`, the one that most often stops an agent first."""
        f = self.fixture
        return (
            "discrete" if f.discrete else "continuous",
            self.source,
            "goal" if f.goal else "no goal",
            "pixels" if f.pixels else "state",
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self.fixture.device)

    def rng(self, seed: int, name: str = "rng") -> torch.Generator:
        return torch_generator(seed, "testing", name, device=self.device)

    @property
    def task_id(self) -> int | None:
        return 0 if "task_id" in self.cls.requires else None

    @staticmethod
    def seed_process(seed: int = 0) -> None:
        seed_global(derive_seed(seed, "testing", "global"))

    def agent(self, seed: int = 0, rng: torch.Generator | None = None) -> Agent:
        """A new agent; as in the loop, the process-wide generators are seeded by name and then belong to it."""
        self.seed_process(seed)
        config = build(self.cls.Config, self.config, f"{self.name}.Config")
        rng = rng or self.rng(seed, "agent")
        return self.cls(self.fixture.spaces, config, device=self.device, rng=rng)

    def experience(self) -> Experience:
        return self.fixture.experience(self.source, self.num_envs, 0, self.task_id)

    def observation(self, batch: int, seed: int = 0) -> Any:
        """First observations of ``batch`` episodes."""
        seeds = list(range(1000 * seed, 1000 * seed + batch))
        return self.fixture.env(batch, "disabled").reset(seed=seeds)[0]

    def act(
        self, agent: Agent, obs: Any, memory: Any = None, first: Tensor | None = None, *,
        rng: torch.Generator | None = None, explore: bool = False, global_seed: int = 0,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """``agent.act`` as the loop calls it: without gradients, its process-wide draws undone (and seeded)."""
        with sealed_global_rng():
            seed_global(global_seed)
            return self.answer(agent, obs, memory, first, rng=rng, explore=explore)

    def answer(
        self, agent: Agent, obs: Any, memory: Any = None, first: Tensor | None = None, *,
        rng: torch.Generator | None = None, explore: bool = False,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """``agent.act`` with the arguments that the loop would give, without gradients."""
        batch = len(next(iter(obs.values())) if isinstance(obs, Mapping) else obs)
        first = torch.ones(batch, dtype=torch.bool, device=self.device) if first is None else first
        task = None if self.task_id is None else torch.full((batch,), self.task_id, device=self.device)
        with torch.no_grad():
            answer = agent.act(obs, memory, first, rng=rng or self.rng(0, "act"), task=task, explore=explore)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise Failed(f"act returned a {type(answer).__name__}; return the pair (actions, memory).")
        return answer

    def begin(self, agent: Agent) -> None:
        agent.start_task(TaskInfo(self.task_id, None))

    def steps(self, agent: Agent, experience: Experience, rng: torch.Generator, budget: int | None = None) -> Iterator:
        """``agent.learn``, which must return an iterator."""
        steps = agent.learn(experience, self.budget if budget is None else budget, rng=rng)
        if not hasattr(steps, "__next__"):
            raise Failed(
                f"learn returned a {type(steps).__name__}; make it a generator: yield a dict of metrics now and then."
            )
        return steps

    def train(self, between: Callable[[Agent, Experience, torch.Generator, int], None] | None = None) -> Run:
        """One whole ``learn`` call; ``between(agent, experience, rng, consumed)`` is called at every yield."""
        agent, experience, rng = self.agent(), self.experience(), self.rng(0, "learn")
        self.begin(agent)
        return self.spend(agent, experience, rng, between)

    def spend(
        self,
        agent: Agent,
        experience: Experience,
        rng: torch.Generator,
        between: Callable[[Agent, Experience, torch.Generator, int], None] | None = None,
    ) -> Run:
        """Drive ``agent.learn`` to its end."""
        metrics, consumed, process_wide = [], [], get_global_state()
        for m in self.steps(agent, experience, rng):
            metrics.append(m)
            consumed.append(_units(m, len(metrics)))
            if between is not None:
                between(agent, experience, rng, consumed[-1])
            if len(metrics) > 100 * self.budget:
                raise Failed(
                    f"learn has yielded {len(metrics)} times for a budget of {self.budget}; it must end by itself."
                )
        return self.finished(agent, metrics, consumed, experience, used_generator(process_wide))

    def finished(
        self, agent: Agent, metrics: list, consumed: list[int], experience: Experience, drew: str | None = None
    ) -> Run:
        action = self.act(agent, self.observation(7))[0].clone()
        return Run(agent, metrics, consumed, clone(agent.state_dict()), action, experience, drew)

    def compare(self, expected: Run, got: Run) -> str | None:
        """Where two runs end differently, in words."""
        return difference(expected.state, got.state, "state_dict()") or difference(
            expected.action, got.action, "the actions after training"
        )

    @cached_property
    def reference(self) -> Run:
        """Training without interruption."""
        return self.train()

    @cached_property
    def stochastic(self) -> bool:
        """Whether the agent draws its actions at random even with ``explore=False``."""
        agent, obs = self.agent(), self.observation(32)
        first, second = (self.act(agent, obs, rng=self.rng(s, "act"), global_seed=s)[0] for s in (0, 1))
        return difference(first, second) is not None


def _units(metrics: Any, yields: int) -> int:
    step = metrics.get("step") if isinstance(metrics, Mapping) else None
    return yields if step is None else int(step)


# -- the class -------------------------------------------------------------------------------------


@CLASS_CHECKS.add("it is an Agent subclass with all methods")
def _is_agent(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    if not (isinstance(cls, type) and issubclass(cls, Agent)):
        raise Failed(
            f"{cls!r} is not a subclass of clbench.Agent; write `class {getattr(cls, '__name__', 'MyAgent')}(Agent)`."
        )
    missing = sorted(cls.__abstractmethods__)
    if missing:
        raise Failed(
            f"{cls.__name__} does not define {', '.join(missing)}; every agent needs act, learn, state_dict and "
            "load_state_dict."
        )
    return None


@CLASS_CHECKS.add("its methods take the arguments of the contract", needs="it is an Agent subclass with all methods")
def _signatures(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    x: Any = None
    calls: dict[str, tuple[tuple, dict]] = {
        "__init__": ((x, x, x), {"device": x, "rng": x}),
        "act": ((x, x, x, x), {"rng": x, "task": x, "explore": x}),
        "learn": ((x, x, x), {"rng": x}),
        "start_task": ((x, x), {}),
        "finish_task": ((x,), {}),
        "state_dict": ((x,), {}),
        "load_state_dict": ((x, x), {}),
    }
    for name, (args, kwargs) in calls.items():
        try:
            inspect.signature(getattr(cls, name)).bind(*args, **kwargs)
        except TypeError as error:
            raise Failed(
                f"{cls.__name__}.{name} cannot be called as the loop does ({error}); define it as {name}{_plain(name)}."
            ) from error
    return None


def _plain(method: str) -> str:
    """The signature of a method of the contract, without annotations."""
    signature = inspect.signature(getattr(Agent, method))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


@CLASS_CHECKS.add(
    "Config is a dataclass whose fields all have defaults", needs="it is an Agent subclass with all methods"
)
def _config(given: tuple[Any, Any]) -> str | None:
    cls, values = given
    config: Any = cls.Config
    fields = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    forgotten = sorted(set(vars(config).get("__annotations__", {})) - fields)
    if not dataclasses.is_dataclass(config) or forgotten:
        raise Failed(f"{cls.__name__}.Config is not a dataclass (fields {forgotten}); decorate it with @dataclass.")
    where = f"{cls.__name__}.Config"
    for given_values in (None, values):
        build(cls.Config, given_values, where)
    return None


@CLASS_CHECKS.add("requires names only known requirements", needs="it is an Agent subclass with all methods")
def _requires(given: tuple[Any, Any]) -> str | None:
    cls = given[0]
    if not isinstance(cls.requires, frozenset | set):
        raise Failed(f"{cls.__name__}.requires is a {type(cls.requires).__name__}; write frozenset({{...}}).")
    for name in sorted(cls.requires - REQUIREMENTS):
        raise Failed(str(unknown_name("requirement", str(name), REQUIREMENTS, where=f"{cls.__name__}.requires")))
    return None


# -- construction and acting -----------------------------------------------------------------------

BUILT = "it can be constructed"
ACTS = "act returns valid actions"
LEARNS = "learn yields numbers and consumes its budget"
DETERMINISTIC = "the same seeds give the same training"
RESTORES = "a saved state comes back in a fresh agent"
STATE = "state_dict holds only tensors and plain values"


@ACTING.add(BUILT)
def _built(case: Case) -> str | None:
    try:
        agent = case.agent()
        after = get_global_state()
    except Exception as error:
        raise Failed(f"{explain(error, case.cls)}; {_way_out(case)}") from error
    case.seed_process()
    drew = used_generator(after)
    case.begin(agent)
    agent.finish_task()
    return drew and (
        f"initialised from the process-wide generator of {drew}, which the loop seeds; draw from rng to be independent "
        "of it."
    )


def _way_out(case: Case) -> str:
    if "goal" in case.cls.requires:
        return (
            "observations of tasks with goals are dicts (observation, achieved_goal, desired_goal): handle them, or take "
            "'goal' out of requires."
        )
    return f"if the agent is not meant for this kind of task ({case.fixture.name}), say so in requires."


@ACTING.add(STATE, needs=BUILT)
def _state_plain(case: Case) -> str | None:
    return _check_state(case, case.agent().state_dict(), "before training")


def _check_state(case: Case, state: Any, when: str) -> None:
    bad = state_problem(state, "state_dict()")
    if bad:
        raise Failed(f"{when}, {bad}")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)
    changed = difference(dict(state), back, "state_dict()")
    if changed:
        raise Failed(f"{when}, a saved state is not what comes back: {changed}; store tensors and plain values.")
    return None


@ACTING.add(ACTS, needs=BUILT)
def _acts(case: Case) -> str | None:
    agent, notes = case.agent(), []
    for batch in (4, 1, 7):
        for explore in (False, True):
            actions, _ = case.act(agent, case.observation(batch), explore=explore)
            notes.append(check_actions(actions, case.fixture.spaces.action, batch, case.device))
    return next(filter(None, notes), None)


def check_actions(actions: Any, space: gymnasium.Space, batch: int, device: torch.device) -> str | None:
    """Raise :class:`Failed` unless ``actions`` are a batch for ``space`` on ``device``; note what the loop will clip."""
    if not isinstance(actions, Tensor):
        raise Failed(f"act returned actions of type {type(actions).__name__}; return a torch tensor.")
    if isinstance(space, gymnasium.spaces.Discrete):
        shape, dtype, why = (batch,), torch.int64, "one whole number per environment"
    else:
        shape, dtype, why = (
            (batch, *(space.shape or ())),
            torch.float32,
            "one row per environment, one column per action dimension",
        )
    if tuple(actions.shape) != shape:
        raise Failed(f"act returned actions of shape {tuple(actions.shape)}, expected {shape}: {why}.")
    if actions.dtype != dtype:
        raise Failed(
            f"act returned actions of dtype {actions.dtype}, expected {dtype}: convert with actions.to({dtype})."
        )
    if actions.device.type != device.type:
        raise Failed(f"act returned actions on {actions.device}, expected {device}: keep them on self.device.")
    if not bool(torch.isfinite(actions.double()).all()):
        raise Failed("act returned NaN or infinite actions; check the network's inputs and outputs.")
    return _check_bounds(actions, space)


def _check_bounds(actions: Tensor, space: gymnasium.Space) -> str | None:
    if isinstance(space, gymnasium.spaces.Discrete):
        low, high = int(space.start), int(space.start) + int(space.n) - 1
        if bool(((actions < low) | (actions > high)).any()):
            raise Failed(
                f"act returned the action {int(actions.max() if actions.max() > high else actions.min())}, outside "
                f"{low} to {high}; check the argmax or the sampling."
            )
    elif isinstance(space, gymnasium.spaces.Box):
        low, high = (torch.as_tensor(b).to(actions.device) for b in (space.low, space.high))
        slack = 1e-6 * (high - low)
        if bool(((actions < low - slack) | (actions > high + slack)).any()):
            return (
                "some actions lie outside the bounds of spaces.action; the loop clips them, but a learner that does "
                "not know of the clipping may learn less well."
            )
    return None


@ACTING.add("act accepts the memory that it returned", needs=ACTS)
def _memory(case: Case) -> str | None:
    agent, memory = case.agent(), None
    for step in range(3):
        first = torch.tensor([step == 0, step == 0, step == 2, False], device=case.device)
        actions, memory = case.act(agent, case.observation(4, seed=step), memory, first if step else None)
        check_actions(actions, case.fixture.spaces.action, 4, case.device)
    return None


@ACTING.add("a row that begins an episode forgets the one before", needs="act accepts the memory that it returned")
def _first(case: Case) -> str | None:
    if case.stochastic:
        raise NotApplicable("the agent acts at random even with explore=False")
    agent, fresh = case.agent(), case.observation(4, seed=9)
    expected, _ = case.act(agent, fresh)
    _, memory = case.act(agent, case.observation(4, seed=1))
    if memory is None:
        raise NotApplicable("the agent keeps no memory")
    none = torch.zeros(4, dtype=torch.bool, device=case.device)
    _, memory = case.act(agent, case.observation(4, seed=2), memory, none)
    first = torch.tensor([True, False, True, False], device=case.device)
    actions, _ = case.act(agent, fresh, memory, first)
    if not _close(actions[first], expected[first], case.fixture.spaces.action):
        raise Failed(
            "act gives rows with first=True another action than a new episode gets; reset their memory where `first`."
        )
    return None


@ACTING.add("actions do not depend on the other rows of the batch", needs=ACTS)
def _batch_invariance(case: Case) -> str | None:
    if case.stochastic:
        raise NotApplicable("the agent acts at random even with explore=False")
    agent, obs = case.agent(), case.observation(7)
    together, _ = case.act(agent, obs)
    alone = torch.cat([case.act(agent, row(obs, i))[0] for i in range(7)])
    if not _close(together, alone, case.fixture.spaces.action):
        raise Failed(
            f"7 rows computed together give {together[0].tolist()} for row 0, alone {alone[0].tolist()}: act "
            "mixes rows; use running statistics (eval mode) instead of batch statistics and index by row."
        )
    return None


def _close(a: Tensor, b: Tensor, space: gymnasium.Space) -> bool:
    if isinstance(space, gymnasium.spaces.Box):
        span = torch.as_tensor(space.high - space.low).to(a.device).clamp(max=1e3)
        return bool(((a - b).abs() <= TOLERANCE * span).all())
    return torch.equal(a, b)


@ACTING.add("the same generator state gives the same actions", needs=ACTS)
def _act_deterministic(case: Case) -> str | None:
    agent, twin, obs = case.agent(), case.agent(), case.observation(7)
    for explore in (False, True):
        expected, _ = case.act(agent, obs, explore=explore)
        case.act(agent, case.observation(7, seed=3), explore=explore)
        again, _ = case.act(agent, obs, explore=explore)
        if difference(expected, again):
            raise Failed(
                f"act(explore={explore}) answers the same question differently the second time; it must keep nothing "
                "between calls (use memory) and draw only from rng."
            )
        other, _ = case.act(twin, obs, explore=explore)
        if difference(expected, other):
            raise Failed(
                f"two agents built from the same seed act differently (explore={explore}); draw the initial weights "
                "from the rng given to __init__ and actions from the rng given to act."
            )
    return None


@ACTING.add("act does not change its inputs", needs=ACTS)
def _act_inputs(case: Case) -> str | None:
    agent = case.agent()
    _, memory = case.act(agent, case.observation(4))
    for explore in (False, True):
        given = {"obs": case.observation(4), "memory": memory, "first": torch.tensor([True, False, True, False])}
        given = {**given, "first": given["first"].to(case.device)}
        before = clone(given)
        case.act(agent, given["obs"], given["memory"], given["first"], explore=explore)
        changed = next((k for k in given if difference(before[k], given[k])), None)
        if changed:
            raise Failed(f"act changed its argument {changed!r} in place; work on a copy ({changed}.clone()).")
    return None


@ACTING.add("evaluation leaves the agent unchanged", needs=(ACTS, STATE))
def _act_pure(case: Case) -> str | None:
    own = case.rng(0, "agent")
    agent = case.agent(rng=own)
    before, rng = clone(agent.state_dict()), own.get_state()
    for explore in (False, True):
        case.act(agent, case.observation(7), explore=explore)
        changed = difference(before, agent.state_dict(), "state_dict()")
        if changed:
            raise Failed(
                f"act(explore={explore}) changed the agent: {changed}; act must change nothing in the agent, "
                "keep per-episode state in memory."
            )
        if not torch.equal(rng, own.get_state()):
            raise Failed("act drew from the generator given to __init__; draw only from the rng given to act.")
    return None


@ACTING.add("actions do not depend on process-wide random numbers", needs=ACTS)
def _act_global(case: Case) -> str | None:
    agent, obs = case.agent(), case.observation(32)
    one, two = (case.act(agent, obs, global_seed=seed)[0] for seed in (1, 2))
    if difference(one, two):
        raise Failed(
            "act(explore=False) answers differently when the process-wide seed changes, so evaluation would measure "
            "chance; draw from the rng given to act, or nothing (dropout draws unless the network is in eval mode)."
        )
    before = get_global_state()
    for explore in (False, True):
        case.answer(agent, obs, explore=explore)
    drew = used_generator(before)
    return drew and f"act draws from the process-wide generator of {drew}, which the loop seals in evaluation."


# -- learning --------------------------------------------------------------------------------------


@LEARNING.add(LEARNS, needs=ACTS)
def _learns(case: Case) -> str | None:
    run = case.reference
    if not run.metrics:
        raise Failed("learn yielded nothing; yield a dict of metrics at least once per call.")
    before = 0
    for i, m in enumerate(run.metrics):
        if not isinstance(m, Mapping):
            raise Failed(f"learn yielded a {type(m).__name__}; yield a dict from names to numbers.")
        for key, value in m.items():
            if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, int | float):
                raise Failed(
                    f"learn yielded {key!r}: {type(value).__name__}; yield names and Python floats (use .item())."
                )
            if not math.isfinite(value):
                raise Failed(
                    f"learn yielded {key!r} = {value}; leave a metric out while it is undefined, and look for "
                    "diverging losses."
                )
        if run.consumed[i] < before:
            raise Failed(
                f"'step' fell from {before} to {run.consumed[i]}; it counts units since this call of learn began."
            )
        before = run.consumed[i]
    return _check_budget(case, run)


def _check_budget(case: Case, run: Run) -> str | None:
    if run.consumed[-1] > case.budget:
        raise Failed(
            f"learn reports {run.consumed[-1]} units for a budget of {case.budget}; stop when the budget is spent."
        )
    if run.consumed[-1] < case.budget:
        raise Failed(
            f"learn ended after {run.consumed[-1]} of {case.budget} units; each yield counts as one unit, so yield "
            "{'step': units consumed so far} when a yield stands for more."
        )
    env = run.experience.env
    if case.source == "env" and env is not None:
        stepped = int(getattr(env, "calls", 0)) * case.num_envs
        if stepped > case.budget:
            raise Failed(
                f"learn took {stepped} environment steps for a budget of {case.budget} (a step of {case.num_envs} "
                f"environments costs {case.num_envs} units)."
            )
    return f"yields {len(run.metrics)} times in {case.budget} units" if len(run.metrics) < 4 else None


@LEARNING.add("learn stops when it is closed between two yields", needs=LEARNS)
def _closes(case: Case) -> str | None:
    agent = case.agent()
    case.begin(agent)
    steps = case.steps(agent, case.experience(), case.rng(0, "learn"))
    next(steps)
    close = getattr(steps, "close", None)
    if close is None:
        raise Failed(f"learn returned a {type(steps).__name__} that cannot be closed; make learn a generator function.")
    try:
        close()
    except RuntimeError as error:
        raise Failed(
            f"learn went on after it was closed ({error}); do not catch GeneratorExit or bare exceptions around yield."
        ) from error
    agent.finish_task()
    _check_state(case, agent.state_dict(), "after learn was closed")
    case.act(agent, case.observation(2))
    return None


@LEARNING.add(DETERMINISTIC, needs=LEARNS)
def _learn_deterministic(case: Case) -> str | None:
    changed = case.compare(case.reference, case.train())
    if changed:
        raise Failed(
            f"two trainings from the same seeds differ: {changed}; draw only from the rng given to learn, and iterate "
            "over nothing unordered (sets)."
        )
    drew = case.reference.drew
    return drew and (
        f"learn draws from the process-wide generator of {drew}, which the loop seeds, and restores when a run resumes; "
        "draw from rng to be independent of it."
    )


@LEARNING.add("learn does not change the data set", needs=LEARNS)
def _learn_inputs(case: Case) -> str | None:
    if case.source == "env":
        raise NotApplicable("the agent learns from an environment")
    pristine, used = case.experience().dataset, case.reference.experience.dataset
    for name in ("observations", "actions", "lengths", "final_observations", "task", "episode", "starts", "final"):
        if difference(getattr(pristine, name), getattr(used, name)):
            raise Failed(f"learn changed dataset.{name} in place; other agents and tasks share it, so work on a copy.")
    return None


@LEARNING.add("evaluation between updates does not change training", needs=DETERMINISTIC)
def _evaluation_free(case: Case) -> str | None:
    def evaluate(agent: Agent, _experience: Experience, _rng: torch.Generator, consumed: int) -> None:
        memory = None
        for step in range(2):
            obs, first = case.observation(3, seed=step + consumed), torch.full((3,), step == 0, device=case.device)
            _, memory = case.act(agent, obs, memory, first, rng=case.rng(consumed, "evaluation"))

    changed = case.compare(case.reference, case.train(evaluate))
    if changed:
        raise Failed(
            f"training with evaluations between yields ends differently: {changed}; act must not touch the networks' "
            "mode, buffers, counters or generators that learn uses."
        )
    return None


# -- saving and resuming ---------------------------------------------------------------------------


@SAVING.add(RESTORES, needs=(LEARNS, STATE))
def _round_trip(case: Case) -> str | None:
    saved = case.reference.state
    _check_state(case, case.reference.agent.state_dict(), "after training")
    changed = difference(saved, case.reference.agent.state_dict(), "state_dict()")
    if changed:
        raise Failed(f"two calls of state_dict in a row differ: {changed}; state_dict must only read.")
    fresh = case.agent(seed=1)
    fresh.load_state_dict(clone(saved))
    changed = difference(saved, fresh.state_dict(), "state_dict()")
    if changed:
        raise Failed(f"after load_state_dict, {changed}; load every key that state_dict saves.")
    actions, _ = case.act(fresh, case.observation(7))
    if difference(case.reference.action, actions):
        raise Failed(
            f"a restored agent acts differently{_suspects(case.reference.agent, fresh)}; save all that act uses."
        )
    return None


@SAVING.add("training resumes bit for bit from any yield", needs=(DETERMINISTIC, RESTORES))
def _resumes(case: Case) -> str | None:
    snapshots: list[Snapshot] = []

    def snapshot(agent: Agent, experience: Experience, rng: torch.Generator, consumed: int) -> None:
        env = None if experience.env is None else clone(experience.env.state_dict())
        state = clone(agent.state_dict())
        snapshots.append(Snapshot(consumed, state, rng.get_state(), env, get_global_state(), attributes(agent)))

    changed = case.compare(case.reference, case.train(snapshot))
    if changed:
        raise Failed(f"calling state_dict between yields changes training: {changed}; state_dict must only read.")
    n = len(snapshots)
    for i in sorted({0, n // 3, n // 2, n - 2} & set(range(n))):
        _resume(case, snapshots[i])
    return None


def _resume(case: Case, at: Snapshot) -> None:
    agent, experience, rng = case.agent(seed=1), case.experience(), case.rng(5, "other")
    agent.load_state_dict(clone(at.agent))
    rng.set_state(at.rng)
    if experience.env is not None and at.env is not None:
        experience.env.load_state_dict(at.env)
    suspects = _differing(at.attributes, attributes(agent))
    rest = case.budget - at.consumed
    set_global_state(at.process_wide)
    if rest > 0:
        for _ in case.steps(agent, experience, rng, rest):
            pass
    changed = case.compare(case.reference, case.finished(agent, [], [], experience))
    if changed:
        raise Failed(
            f"saved after {at.consumed} of {case.budget} units and resumed, training ends differently: "
            f"{changed}; something that learn needs is missing from "
            f"state_dict{suspects or ' (perhaps a local variable of learn, or a generator of its own)'}."
        )


def attributes(agent: Any) -> dict[str, Any]:
    """The attributes of an agent that can be compared: tensors, numbers, containers, and what has a ``state_dict``.

    Where it is composed with continual methods, theirs too.
    """
    found = {}
    methods: Mapping[str, Any] = vars(agent).get("methods", {}) if hasattr(agent, "method_classes") else {}
    for method in methods.values():
        found |= {f"{type(method).__name__}.{k}": v for k, v in attributes(method).items()}
    for name, value in vars(agent).items():
        if value is methods:
            continue
        if isinstance(value, torch.Generator):
            continue  # the loop's generators are saved by the loop
        if hasattr(value, "state_dict"):
            found[name] = clone(value.state_dict())
        elif isinstance(value, bool | int | float | str | Tensor | list | tuple | Mapping):
            found[name] = clone(value)
    return found


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [k if "." in k else f"self.{k}" for k in before if k not in after or difference(before[k], after[k])]
    return f": {', '.join(names)} {'is' if len(names) == 1 else 'are'} not restored" if names else ""


def _suspects(agent: Agent, restored: Agent) -> str:
    return _differing(attributes(agent), attributes(restored))


@SAVING.add("it learns the next task after the first", needs=RESTORES)
def _next_task(case: Case) -> str | None:
    given = clone(case.reference.state)
    agent = case.agent(seed=1)
    agent.load_state_dict(given)
    live = agent.state_dict()
    then = clone(live)
    case.begin(agent)
    second = case.spend(agent, case.experience(), case.rng(1, "learn"))
    agent.finish_task()
    if not second.consumed or second.consumed[-1] != case.budget:
        raise Failed(
            f"the second call of learn consumed {second.consumed[-1] if second.consumed else 0} of {case.budget} units; "
            "each call has a budget of its own, so compare it with counters that start with the call."
        )
    if difference(case.reference.state, given) or storages(given) & storages(agent.state_dict()):
        return (
            "load_state_dict keeps references to the tensors of state, as torch optimisers do: the loop reads states "
            "from a file, but hand over a copy of a state that you keep."
        )
    if difference(then, live):
        return "state_dict returns live tensors: the loop writes them at once, but clone a state that you keep."
    return None


AGENT_CHECKS: list[Check] = [*ACTING, *LEARNING, *SAVING]
