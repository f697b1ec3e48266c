"""The one episode/task loop: train on the stream, evaluate in between, checkpoint, stop and resume.

A run is a list of *segments*, each one call of ``agent.learn``. A phase is one segment; where the stream reveals nothing, a
phase is cut into equal segments, so that a new call says nothing about a new task. Between two yields of ``learn`` the loop
may evaluate, write a checkpoint, or stop. Everything random is derived by name from the run's seed, so what happens in
evaluation cannot reach training, and a segment can be taken up again from the states in the checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from clbench.contracts import Agent, Experience, Phase, Spaces, Stream, Task, TaskInfo, VectorEnv
from clbench.data.dataset import OfflineDataset, Rendered
from clbench.data.fit import check_fits
from clbench.data.registry import load_dataset
from clbench.envs.concat import concat
from clbench.envs.make import make_env
from clbench.errors import ClbenchError, ConfigError, ContractError, DataError, Interrupted
from clbench.evaluate import check_actions, evaluate, plugin_error
from clbench.metrics.plasticity import COUNT
from clbench.probe import check_probe, load_features, probe_agent, probe_inputs, save_features, task_rows, weight_rows
from clbench.records import (
    RunDirectory,
    changed_entries,
    flatten_state,
    load_checkpoint,
    save_checkpoint,
    state_bytes,
    state_digest,
)
from clbench.rng import derive_seed, get_global_state, sealed_global_rng, seed_global, set_global_state, torch_generator

Unit = Literal["updates", "env_steps"]
SEGMENTS_PER_HIDDEN_PHASE = 10
LOG_POINTS_PER_PHASE = 200
KEPT_BYTES = 4 << 30  # of data sets between phases; with hundreds of tasks not all can stay in memory
YIELDS_PER_UNIT = 10  # an agent that yields more often than this has forgotten to stop


# -- what a stream must offer an agent -----------------------------------------------------------------------------------


def experience_unit(agent_class: type[Agent], stream: Stream) -> Unit:
    """What a budget counts for this agent: environment steps if an environment drives it, else gradient updates."""
    if "env" in agent_class.requires:
        return "env_steps"
    if "dataset" in agent_class.requires or all(t.dataset_id for t in stream.trained):
        return "updates"
    return "env_steps"


def check_requirements(agent_class: type[Agent], agent_name: str, stream: Stream, spaces: Spaces) -> None:
    """Compare what the agent requires with what the stream gives, before anything is trained.

    Raises:
        ConfigError: one sentence that names the requirement and the way out.
    """
    import gymnasium

    obs = spaces.observation
    is_goal = isinstance(obs, gymnasium.spaces.Dict) and "desired_goal" in obs.spaces
    part = obs["observation"] if isinstance(obs, gymnasium.spaces.Dict) and "observation" in obs.spaces else obs
    pixels = isinstance(part, gymnasium.spaces.Box) and part.dtype == "uint8" and len(part.shape) == 3
    discrete = isinstance(spaces.action, gymnasium.spaces.Discrete)
    without_data = [t.name for t in stream.trained if not t.dataset_id]
    told = {"task_id": ("task_id",), "boundaries": ("task_id", "boundaries")}
    met = {
        "dataset": (not without_data, f"the tasks {without_data} have no data set"),
        "env": (True, ""),
        "goal": (is_goal, "its observations have no desired_goal"),
        "task_id": (stream.reveals in told["task_id"], f"it reveals {stream.reveals!r}; add --reveals task_id"),
        "boundaries": (
            stream.reveals in told["boundaries"],
            f"it reveals {stream.reveals!r}; add --reveals boundaries",
        ),
        "discrete": (discrete, f"its actions are {spaces.action}"),
        "continuous": (not discrete, f"its actions are {spaces.action}"),
        "pixels": (pixels, f"its observations are {obs}"),
        "state": (not pixels, f"its observations are {obs}"),
    }
    if isinstance(agent_class.requires, str):
        raise ConfigError(f"Agent {agent_name!r}: requires must be a set, as frozenset({{{agent_class.requires!r}}}).")
    for requirement in sorted(agent_class.requires):
        if requirement not in met:
            raise ConfigError(f"Agent {agent_name!r} requires {requirement!r}, which is not one of {sorted(met)}.")
        ok, reason = met[requirement]
        if not ok:
            raise ConfigError(
                f"Agent {agent_name!r} requires {requirement!r}, but stream {stream.name!r} does not offer it: {reason}."
            )


def common_spaces(stream: Stream, device: torch.device) -> Spaces:
    """The spaces of all tasks, which must be equal.

    Raises:
        ConfigError: they are not.
    """
    found: Spaces | None = None
    for task in stream.tasks:
        with blame(task.env_id, "__init__"):
            env = make_env(task.env_id, 1, device, autoreset="disabled", **task.env_kwargs)
        spaces = Spaces(env.single_observation_space, env.single_action_space)
        env.close()
        if found is not None and spaces != found:
            raise ConfigError(
                f"The spaces change within stream {stream.name!r}: task {task.name!r} has observations "
                f"{spaces.observation} and actions {spaces.action}, task {stream.tasks[0].name!r} has "
                f"{found.observation} and {found.action}. All tasks of a stream must share their spaces."
            )
        found = spaces
    assert found is not None
    return found


MakeAgent = Callable[[Spaces, torch.device, torch.Generator], Agent]


def new_agent(make_agent: MakeAgent, spaces: Spaces, device: torch.device, seed: int) -> Agent:
    """The agent of a run with that seed; while a run lasts, the process-wide generators belong to it (see
    :func:`clbench.experiments.run`)."""
    seed_global(derive_seed(seed, "agent", "global"))
    return make_agent(spaces, device, torch_generator(seed, "agent", "init", device=device))


def segments_of(stream: Stream, least: int = 1) -> list[tuple[int, int]]:
    """(phase index, budget) per call of ``learn``, of ``least`` units where phases allow; see the module's docstring."""
    if stream.reveals != "nothing":
        return [(i, p.budget) for i, p in enumerate(stream.phases)]
    common, shortest = math.gcd(*(p.budget for p in stream.phases)), min(p.budget for p in stream.phases)
    target = max(1, shortest // SEGMENTS_PER_HIDDEN_PHASE, min(least, shortest))
    size = max(d for d in range(1, min(target, common) + 1) if common % d == 0)
    if size * 10 < target:  # no useful common divisor: nearly equal segments are the best that can be done
        size = target
    segments = []
    for i, phase in enumerate(stream.phases):
        count = math.ceil(phase.budget / size)
        segments += [(i, phase.budget * (k + 1) // count - phase.budget * k // count) for k in range(count)]
    return segments


def dataset_bytes(data: OfflineDataset) -> int:
    """Bytes of the columns of a data set, those it draws from included; a column under two names counts once."""
    columns = list(data.observations.values() if isinstance(data.observations, Mapping) else [data.observations])
    tensors = [t for c in columns for t in (c.columns.values() if isinstance(c, Rendered) else [c])]
    return sum(t.nbytes for t in {id(t): t for t in [data.actions, *tensors]}.values())


# -- counting ------------------------------------------------------------------------------------------------------------


# what an agent may use of an environment: the contract, and what goes with it in Gymnasium
VISIBLE = frozenset(
    {
        "num_envs", "device", "autoreset", "max_episode_steps", "single_observation_space", "single_action_space",
        "observation_space", "action_space", "metadata", "render_mode", "compute_reward", "render", "state_dict",
        "load_state_dict", "close",
    }
)  # fmt: skip


class MeteredEnv:
    """A training environment that counts its steps and the time they take, and checks what the agent sends.

    Actions of a ``Box`` are clipped to its bounds, as in evaluation. Unless the stream reveals the task, attributes that
    are not part of the contract (the position of a wall, the number of a permutation) are not there.
    """

    def __init__(self, env: VectorEnv, agent_name: str, revealed: bool = True):
        self._env, self._agent_name, self._revealed = env, agent_name, revealed
        self.steps, self.seconds = 0, 0.0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not (self._revealed or name in VISIBLE):
            raise AttributeError(f"{name!r} is no part of clbench.VectorEnv, and this stream does not reveal the task")
        return getattr(self._env, name)

    def reset(self, **arguments: Any) -> Any:
        start = time.perf_counter()
        answer = self._env.reset(**arguments)
        self.seconds += time.perf_counter() - start
        return answer

    def step(self, actions: Any) -> Any:
        start = time.perf_counter()
        space, rows = self._env.single_action_space, self._env.num_envs
        sent = check_actions(torch.as_tensor(actions), space, rows, f"{self._agent_name}.learn sent")
        answer = self._env.step(sent.to(self._env.device))
        self.seconds += time.perf_counter() - start
        self.steps += self._env.num_envs
        return answer


@dataclass
class Position:
    """How far a run is; with the agent, generator and environment states this is all that a checkpoint holds."""

    segment: int = 0
    consumed: int = 0  # units within the segment
    inside: bool = False  # whether the segment has begun (start_task called, environment reset)
    done_before: int = 0  # units of all earlier segments
    evaluated: int = -1  # step of the last evaluation, -1 for none
    evaluated_phase: int = -1
    logged: int = 0  # step of the last row of train.csv
    env_steps: int = 0
    updates: int = 0
    past_updates: int = 0  # of agents that were replaced by a fresh one (protocol "independent")
    past_samples: int = 0
    past_extra: dict[str, int] = field(default_factory=dict)  # what methods of those agents added
    probed: int = -1  # phase of the last probe, -1 for none
    online: dict[str, float] = field(default_factory=dict)  # sums of reports without a row of train.csv

    @property
    def step(self) -> int:
        return self.done_before + self.consumed


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself needs to know (the rest of a run's configuration belongs to :mod:`clbench.experiments`).

    Args:
        seed: of the run.
        device: torch device.
        eval_every: units between evaluations within a phase; ``None`` for ten per phase, 0 for phase ends only.
        eval_start: evaluate before training, too.
        evaluate: ``False`` for no evaluation at all.
        eval_envs: parallel environments in evaluation (at most the length of the list).
        num_envs: parallel training environments.
        fresh_agent: a new agent for every phase, evaluated on its own task only (protocol ``independent``).
        checkpoint_seconds: wall time between checkpoints (they are also written at the end of every segment).
        tensorboard: write TensorBoard event files.
        probe: measure the agent's features before training and after each phase (see :mod:`clbench.probe`).
    """

    seed: int = 0
    device: str = "cpu"
    eval_every: int | None = None
    eval_start: bool = True
    evaluate: bool = True
    eval_envs: int = 512
    num_envs: int = 8
    fresh_agent: bool = False
    checkpoint_seconds: float = 20.0
    tensorboard: bool = True
    probe: bool = False


@dataclass
class Timing:
    """Wall time of this process, by what it was spent on (seconds)."""

    learn: float = 0.0
    environment: float = 0.0
    evaluate: float = 0.0
    evaluate_environment: float = 0.0
    evaluate_act: float = 0.0
    checkpoint: float = 0.0


@dataclass
class Loop:
    """One run of one agent on one stream. :meth:`run` trains to the end, or until ``should_stop`` raises.

    Args:
        stream: the stream.
        make_agent: ``(spaces, device, rng) -> Agent``.
        agent_name: for messages and the checkpoint.
        directory: where everything is written; must be open.
        fingerprint: of the configuration; a checkpoint of another one is refused.
        should_stop: called often; raises :class:`Interrupted` to stop.
        on_progress: called with (position, latest metrics, latest scores).
    """

    stream: Stream
    make_agent: MakeAgent
    agent_name: str
    settings: LoopSettings
    directory: RunDirectory
    unit: Unit
    fingerprint: str = ""
    should_stop: Callable[[], None] = lambda: None
    on_progress: Callable[[Position, Mapping[str, float], Mapping[str, float]], None] = lambda *_: None
    position: Position = field(default_factory=Position)
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        self.device = torch.device(self.settings.device)
        self.segments = segments_of(self.stream, 8 * self.settings.num_envs if self.unit == "env_steps" else 1)
        self._phase_starts = [sum(b for i, b in self.segments if i < k) for k in range(len(self.stream.phases))]
        self._reveals_task = self.stream.reveals == "task_id"
        self.scores: dict[str, float] = {}
        self._eval_envs: dict[str, VectorEnv] = {}
        self._datasets: dict[str, OfflineDataset] = {}
        self._probe_inputs: dict[str, Any] = {}
        self._purity_checked = False
        self._warned = False
        self._last_checkpoint = time.monotonic()
        self._checkpoint_cost = 0.0
        self._readable = False  # whether a checkpoint of this process has been read back
        self._writer: Any = None
        self._purge_step: int | None = None
        self.spaces = common_spaces(self.stream, self.device)
        self.agent = self._new_agent()
        if self.settings.probe:
            check_probe(self.agent, self.agent_name)

    # -- the loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train through all segments.

        Raises:
            Interrupted: ``should_stop`` asked for it; a checkpoint has been written.
            ContractError: the agent or an environment broke its contract.
        """
        learn_state = None
        if self.directory.checkpoint.exists():
            learn_state = self._restore()
        else:
            self.directory.eval.restart()
            self.directory.train.restart()
            if self.settings.probe:
                self.directory.probe.restart()
            with sealed_global_rng():
                self._load(self.stream.phases[0])  # data that do not fit are better known before the first evaluation
        try:
            self._evaluate_between_segments()
            self._probe_between_segments()
            while self.position.segment < len(self.segments):
                self._run_segment(learn_state)
                learn_state = None
                self._evaluate_between_segments()
                self._probe_between_segments()
        except (Interrupted, KeyboardInterrupt) as stop:
            raise Interrupted("Stopped by the user.") from stop
        finally:
            self._close()

    def _evaluate_between_segments(self) -> None:
        """Row 0 before training, row i after phase i, and what is due within a phase. Training up to here is saved."""
        segment = self.position.segment
        if self.position.inside or (segment == 0 and (self.settings.fresh_agent or not self.settings.eval_start)):
            return
        phase = 0 if segment == 0 else self.segments[segment - 1][0] + 1
        if self._within_phase(segment) and not self._evaluation_due(phase - 1):
            return
        if self._evaluate_now(phase):
            self._checkpoint(None)

    def _within_phase(self, segment: int) -> bool:
        """Whether ``segment`` goes on with the phase of the one before."""
        return 0 < segment < len(self.segments) and self.segments[segment - 1][0] == self.segments[segment][0]

    def _evaluation_due(self, index: int) -> bool:
        """Whether a multiple of ``eval_every`` of phase ``index`` has passed since the last evaluation."""
        every, start = self.settings.eval_every, self._phase_starts[index]
        every = max(1, self.stream.phases[index].budget // 10) if every is None else every
        since, last = self.position.step - start, max(self.position.evaluated - start, 0)
        return every > 0 and since // every > last // every

    def _run_segment(self, learn_state: Mapping[str, Any] | None) -> None:
        position = self.position
        index, budget = self.segments[position.segment]
        phase = self.stream.phases[index]
        begins = not self._within_phase(position.segment)
        told = self.stream.reveals != "nothing"
        rng = torch_generator(self.settings.seed, "agent", "learn", position.segment, device=self.device)
        with sealed_global_rng():
            experience, meter = self._experience(phase)
        if learn_state is not None:  # resumed inside this segment
            rng.set_state(learn_state["rng"])
            if experience.env is not None:
                with sealed_global_rng():
                    experience.env.load_state_dict(learn_state["env"])
        else:
            if self.settings.fresh_agent and begins:
                past = self._own_costs()
                position.past_updates += past.get("updates", 0)
                position.past_samples += past.get("samples", 0)
                position.past_extra = self._method_costs()
                self.agent = self._new_agent()
                self._evaluate_now(phase=index + 1)
            if experience.env is not None:
                with blame(f"environment of task {phase.task}", "reset"):
                    experience.env.reset(seed=derive_seed(self.settings.seed, "stream", "env", position.segment))
            if told:
                with blame(self.agent, "start_task"):
                    self.agent.start_task(self._task_info(phase))
            position.inside = True
        self._learn(experience, meter, rng, phase, index)
        if told:
            with blame(self.agent, "finish_task"):
                self.agent.finish_task()
        position.done_before += budget
        position.consumed, position.inside, position.segment = 0, False, position.segment + 1
        if experience.env is not None:
            experience.env.close()
        self._checkpoint(None)

    def _learn(
        self, experience: Experience, meter: MeteredEnv | None, rng: torch.Generator, phase: Phase, index: int
    ) -> None:
        """Drive one call of ``agent.learn`` to the end of its budget."""
        position, budget = self.position, self.segments[self.position.segment][1]
        resumed_at = position.consumed
        steps_before = position.env_steps
        log_every = max(1, phase.budget // LOG_POINTS_PER_PHASE)

        def pause() -> None:
            """Between two yields, when the agent's state is whole: evaluate where due, stop if asked, save now and then."""
            try:
                if self._evaluation_due(index):
                    self._evaluate_now(phase=index + 1)
                self.should_stop()
            except Interrupted:  # a KeyboardInterrupt may come between two statements: nothing is whole then
                self._checkpoint(self._learn_state(rng, experience))
                raise
            age = time.monotonic() - self._last_checkpoint
            if age > max(self.settings.checkpoint_seconds, 10 * self._checkpoint_cost):
                self._checkpoint(self._learn_state(rng, experience))

        if resumed_at:
            pause()  # an evaluation may have been due when the run stopped
        with contextlib.closing(self._timed_learn(experience, budget - resumed_at, rng)) as learning:
            for count, metrics in enumerate(learning, start=1):
                if count > YIELDS_PER_UNIT * budget + 100:
                    raise ContractError(
                        f"{self.agent_name}.learn goes on after its budget of {budget} (yield {count}); return when the "
                        "budget is consumed."
                    )
                position.consumed = self._units(metrics, count, resumed_at, budget)
                if meter is not None:
                    position.env_steps = steps_before + meter.steps
                self._log(metrics, index + 1, log_every)
                self.on_progress(position, metrics, self.scores)
                # what the agent does after its last yield belongs to this segment: no pause before it is done
                if position.consumed < budget:
                    pause()
        position.consumed = budget
        if position.online and not self._within_phase(position.segment + 1):
            self._write_log({}, index + 1)  # what the phase's last row leaves out
        if meter is not None:
            position.env_steps = steps_before + meter.steps
            self.timing.environment += meter.seconds
        if self.unit == "updates":
            position.updates += budget

    def _timed_learn(
        self, experience: Experience, budget: int, rng: torch.Generator
    ) -> Generator[Mapping[str, float], None, None]:
        """``agent.learn`` with its time measured and its exceptions in one sentence."""
        iterator = None
        try:
            while True:
                start = time.perf_counter()
                try:
                    if iterator is None:
                        iterator = iter(self.agent.learn(experience, budget, rng=rng))
                    metrics = next(iterator)
                except StopIteration:
                    return
                except (ClbenchError, KeyboardInterrupt):
                    raise
                except Exception as error:
                    raise plugin_error(self.agent, "learn", error) from error
                finally:
                    self.timing.learn += time.perf_counter() - start
                if not isinstance(metrics, Mapping):
                    raise ContractError(
                        f"{self.agent_name}.learn must yield mappings of metric names to floats, "
                        f'got {type(metrics).__name__}; write `yield {{"loss": ...}}`, not return.'
                    )
                yield metrics
        finally:
            if isinstance(iterator, Generator):
                iterator.close()

    def _units(self, metrics: Mapping[str, float], count: int, resumed_at: int, budget: int) -> int:
        """Units of the segment consumed so far: what the agent says, or one per yield."""
        said = metrics.get("step")
        try:
            consumed = resumed_at + (count if said is None else int(said))
        except (TypeError, ValueError, OverflowError) as error:
            raise ContractError(f"{self.agent_name}.learn yielded step={said!r}; it must be a whole number.") from error
        if said is not None and not self.position.consumed <= consumed <= budget:
            raise ContractError(
                f"{self.agent_name}.learn yielded step={int(said)} after {self.position.consumed - resumed_at}, with a "
                f"budget of {budget - resumed_at}: 'step' counts the units consumed since the call began; it may not "
                "fall or exceed the budget."
            )
        return min(consumed, budget)

    # -- experience -----------------------------------------------------------------------------------------------------

    def _experience(self, phase: Phase) -> tuple[Experience, MeteredEnv | None]:
        """New objects for every segment, so that identity reveals nothing. Draws nothing from the agent's generators, as
        a resumed run makes them at other moments."""
        tasks, parts = [self.stream.task(n) for n in phase.tasks], self._load(phase)
        with_env = "env" in self.agent.requires or not parts
        dataset, env = None, None
        if parts:
            dataset = copy.copy(parts[0]) if len(parts) == 1 else OfflineDataset.concatenate(parts)
        if with_env:
            rows = [
                self.settings.num_envs // len(tasks) + (i < self.settings.num_envs % len(tasks))
                for i in range(len(tasks))
            ]
            if min(rows) < 1:
                raise ConfigError(
                    f"Joint training of {len(tasks)} tasks needs at least as many environments; raise --num-envs."
                )
            envs = [make_env(t.env_id, n, self.device, **t.env_kwargs) for t, n in zip(tasks, rows, strict=True)]
            env = MeteredEnv(envs[0] if len(envs) == 1 else concat(envs), self.agent_name, self._reveals_task)
        return Experience(dataset, env), env  # type: ignore[arg-type]

    def _load(self, phase: Phase) -> list[OfflineDataset]:
        """The data sets of a phase, one per task; none where the agent learns from an environment alone."""
        requires, tasks = self.agent.requires, [self.stream.task(n) for n in phase.tasks]
        with_data = all(t.dataset_id for t in tasks) and ("dataset" in requires or "env" not in requires)
        return [self._dataset(t) for t in tasks] if with_data else []

    def _dataset(self, task: Task) -> OfflineDataset:
        assert task.dataset_id is not None
        if task.name not in self._datasets:
            revealed = self.stream.tasks.index(task) if self._reveals_task else None
            with blame(f"data set {task.dataset_id}", "load"):
                data = load_dataset(task.dataset_id, self.device).with_task(revealed)
            check_fits(data, self.spaces, f"Data set {task.dataset_id!r} of task {task.name!r}")
            if not self._reveals_task:  # its id says which task it is
                data.name, data.metadata = "dataset", {}
            self._datasets[task.name] = data
            while len(self._datasets) > 1 and sum(map(dataset_bytes, self._datasets.values())) > KEPT_BYTES:
                self._datasets.pop(next(iter(self._datasets)))  # the oldest; made again, the same, when it is needed
        return self._datasets[task.name]

    def _task_info(self, phase: Phase) -> TaskInfo:
        if not self._reveals_task or not isinstance(phase.task, str):
            return TaskInfo()
        return TaskInfo([t.name for t in self.stream.tasks].index(phase.task), phase.task)

    def _new_agent(self) -> Agent:
        return new_agent(self.make_agent, self.spaces, self.device, self.settings.seed)

    # -- evaluation -----------------------------------------------------------------------------------------------------

    def _evaluate_now(self, phase: int) -> bool:
        """One row of the performance matrix, or a point of the learning curves; changes nothing in training.

        Returns whether there was something to do.
        """
        position = self.position
        if not self.settings.evaluate or (position.evaluated, position.evaluated_phase) == (position.step, phase):
            return False
        start = time.perf_counter()
        current = self.stream.phases[phase - 1].tasks if phase else ()
        tasks = [t for t in self.stream.tasks if not self.settings.fresh_agent or t.name in current]
        before = None if self._purity_checked else state_digest(self._agent_state())
        rows: list[tuple[Any, ...]] = []
        with sealed_global_rng():
            for task in tasks:
                number = self.stream.tasks.index(task)
                episodes = evaluate(
                    self.agent,
                    task,
                    self._eval_env(task),
                    rng=torch_generator(self.settings.seed, "evaluation", task.name, device=self.device),
                    task_id=number if self._reveals_task else None,
                    should_stop=self.should_stop,
                )
                visit = sum(task.name in p.tasks for p in self.stream.phases[:phase])
                self.scores[task.name] = float(episodes.score.mean())
                self.timing.evaluate_environment += episodes.seconds["environment"]
                self.timing.evaluate_act += episodes.seconds["act"]
                rows += [
                    (phase, visit, position.step, task.name, i, f"{s:.10g}", f"{r:.10g}", n)
                    for i, (s, r, n) in enumerate(
                        zip(episodes.score.tolist(), episodes.returns.tolist(), episodes.length.tolist(), strict=True)
                    )
                ]
        if before is not None:
            self._check_purity(before)
        self.directory.eval.append(rows)
        position.evaluated, position.evaluated_phase = position.step, phase
        if self._tensorboard() is not None:
            for task in tasks:
                self._writer.add_scalar(f"evaluation/{task.name}", self.scores[task.name], position.step)
        self.timing.evaluate += time.perf_counter() - start
        return True

    def _check_purity(self, before: Mapping[str, str]) -> None:
        changed = changed_entries(before, state_digest(self._agent_state()))
        if changed:
            raise ContractError(
                f"Evaluation changed the agent {self.agent_name!r} (first changed entry of state_dict: {changed[0]!r}); "
                "act must not change the agent when explore=False."
            )
        self._purity_checked = True

    # -- probe ----------------------------------------------------------------------------------------------------------

    def _probe_between_segments(self) -> None:
        """Measures of the agent's features before training and after each phase; changes nothing in training."""
        position, segment = self.position, self.position.segment
        phase = 0 if segment == 0 else self.segments[segment - 1][0] + 1
        if not self.settings.probe or position.inside or position.probed == phase or self._within_phase(segment):
            return
        if self.settings.fresh_agent and phase == 0:
            return
        start = time.perf_counter()
        first = position.probed < 0
        before = state_digest(self._agent_state()) if first else {}
        with sealed_global_rng():
            rows = self._probe_rows(phase)
        changed = changed_entries(before, state_digest(self._agent_state())) if first else []
        if changed:
            raise ContractError(
                f"The probe changed the agent {self.agent_name!r} (first changed entry of state_dict: {changed[0]!r}); "
                "probe must not change the agent."
            )
        self.directory.probe.append(rows)
        position.probed = phase
        self.timing.evaluate += time.perf_counter() - start
        self._checkpoint(None)

    def _probe_rows(self, phase: int) -> list[tuple[Any, ...]]:
        """The rows of all tasks; of a fresh agent's own task alone."""
        phases, step = self.stream.phases, self.position.step
        rows: list[tuple[Any, ...]] = []
        for number, task in enumerate(self.stream.tasks):
            if self.settings.fresh_agent and task.name not in phases[phase - 1].tasks:
                continue
            self.should_stop()
            if task.name not in self._probe_inputs:
                self._probe_inputs[task.name] = probe_inputs(task, self.device)
            found = probe_agent(self.agent, self._probe_inputs[task.name], number if self._reveals_task else None)
            visits = [i for i, p in enumerate(phases, start=1) if task.name in p.tasks]
            own, file = None, self.directory.features / f"task-{number}.npz"
            if visits and phase == visits[0]:
                save_features(file, found)
                own = found
            elif visits and phase > visits[0]:
                own = load_features(file)
            rows += task_rows(phase, step, task.name, found, own)
        return rows + weight_rows(phase, step, getattr(self.agent, "trainables", ()))

    def _eval_env(self, task: Task) -> VectorEnv:
        if task.name not in self._eval_envs:
            rows = max(1, min(self.settings.eval_envs, len(task.evaluation)))
            self._eval_envs[task.name] = make_env(
                task.env_id, rows, self.device, autoreset="disabled", **task.env_kwargs
            )
        return self._eval_envs[task.name]

    # -- checkpoint and resume ------------------------------------------------------------------------------------------

    def _learn_state(self, rng: torch.Generator, experience: Experience) -> dict[str, Any]:
        return {
            "rng": rng.get_state(),
            "env": None if experience.env is None else experience.env.state_dict(),
        }

    def _agent_state(self) -> dict[str, Any]:
        with blame(self.agent, "state_dict"):
            state = self.agent.state_dict()
        for path, leaf in flatten_state(state):
            if not isinstance(leaf, torch.Tensor | bool | int | float | str | None):
                raise ContractError(
                    f"{type(self.agent).__name__}.state_dict() holds a {type(leaf).__name__} at {path!r}; only tensors and "
                    "plain Python values (numbers, text, lists, dicts) can be stored."
                )
        return state

    def _checkpoint(self, learn_state: Mapping[str, Any] | None) -> None:
        start = time.perf_counter()
        for log in (self.directory.eval, self.directory.train, self.directory.probe):
            log.sync()
        save_checkpoint(
            self.directory.checkpoint,
            {
                "fingerprint": self.fingerprint,
                "agent_name": self.agent_name,
                "position": dataclasses.asdict(self.position),
                "agent": self._agent_state(),
                "global_rng": get_global_state(),
                "learn": learn_state,
                "eval_rows": self.directory.eval.rows,
                "train_rows": self.directory.train.rows,
                "train_header": self.directory.train.header,
                "scores": self.scores,
                **({"probe_rows": self.directory.probe.rows} if self.settings.probe else {}),
            },
        )
        if not self._readable:  # better now than after hours of training
            self._read_back()
        self._checkpoint_cost = time.perf_counter() - start
        self.timing.checkpoint += self._checkpoint_cost
        self._last_checkpoint = time.monotonic()

    def _read_back(self) -> None:
        """Refuse an agent whose state could be written but not read again, or not by a new agent."""
        try:
            saved = load_checkpoint(self.directory.checkpoint)["agent"]
            with sealed_global_rng():
                twin = self._new_agent()
                with blame(twin, "load_state_dict"):
                    twin.load_state_dict(saved)
                with blame(twin, "state_dict"):
                    lost = changed_entries(state_digest(saved), state_digest(twin.state_dict()))
            if lost:
                raise ContractError(
                    f"{type(twin).__name__}.load_state_dict does not restore the entry {lost[0]!r} of state_dict; a "
                    "run that was stopped could not go on from its checkpoint."
                )
        except ContractError:
            self.directory.checkpoint.unlink()
            raise
        except DataError as error:
            self.directory.checkpoint.unlink()
            raise ContractError(
                f"{type(self.agent).__name__}.state_dict() cannot be stored: it may hold only tensors and plain Python "
                "values (numbers, text, lists, dicts), no NumPy arrays or other objects."
            ) from error
        self._readable = True

    def _restore(self) -> Mapping[str, Any] | None:
        """Load the checkpoint; returns the state inside a segment, or ``None`` between segments."""
        path = self.directory.checkpoint
        saved = load_checkpoint(path)
        if saved.get("agent_name") != self.agent_name or saved.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"Checkpoint {path} belongs to another run (agent {saved.get('agent_name')!r}, this one is "
                f"{self.agent_name!r}, or other settings or another version); use --overwrite to start "
                "again or --out for another folder."
            )
        self.position = Position(**saved["position"])
        with blame(self.agent, "load_state_dict"):
            self.agent.load_state_dict(saved["agent"])
        self.scores = dict(saved["scores"])
        self.directory.eval.restart(saved["eval_rows"])
        self.directory.train.restart(saved["train_rows"], saved["train_header"])
        if self.settings.probe:
            self.directory.probe.restart(saved["probe_rows"])
        set_global_state(saved["global_rng"])
        self._purity_checked = self._readable = True
        self._purge_step = self.position.step + 1  # what a killed process logged beyond the checkpoint
        return saved["learn"] if self.position.inside else None

    # -- logs -----------------------------------------------------------------------------------------------------------

    def _log(self, metrics: Mapping[str, float], phase: int, log_every: int) -> None:
        values = {k: _number(v, f"{self.agent_name}.learn yielded {k}") for k, v in metrics.items() if k != "step"}
        position = self.position
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        if bad and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.agent_name}.learn reports {bad[0]}={values[bad[0]]} at step {position.step}.", stacklevel=2
            )
        self._collect_online(values)
        if values and position.step - position.logged >= log_every:
            self._write_log(values, phase)

    def _collect_online(self, values: Mapping[str, float]) -> None:
        """Add up ``online_*``: averages over the ``online_count`` samples since the agent's last report.

        Reports that come too often for ``train.csv`` are part of the next row, so that nothing is lost of them.
        """
        count, sums = values.get(COUNT, 0.0), self.position.online
        if count > 0:
            for key in (k for k in values if k.startswith("online_")):
                sums[key] = sums.get(key, 0.0) + (count if key == COUNT else count * values[key])

    def _write_log(self, values: Mapping[str, float], phase: int) -> None:
        """A row of ``train.csv``."""
        position, sums = self.position, self.position.online
        online = {k: v if k == COUNT else v / sums[COUNT] for k, v in sums.items()}
        position.online, position.logged = {}, position.step
        values = {**values, **online}
        texts = {k: repr(v) if k in online else f"{v:.8g}" for k, v in values.items()}  # online ones are exact
        self.directory.train.append_mapping({"step": position.step, "phase": phase, **texts})
        if self._tensorboard() is not None:
            for key, value in values.items():
                self._writer.add_scalar(f"train/{key}", value, position.step)

    def _tensorboard(self) -> Any:
        if self._writer is None and self.settings.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self.directory.path), purge_step=self._purge_step)
        return self._writer

    def _close(self) -> None:
        for log in (self.directory.eval, self.directory.train, self.directory.probe):
            log.sync()
        if self._writer is not None:
            self._writer.close()
        for env in self._eval_envs.values():
            env.close()

    # -- cost -----------------------------------------------------------------------------------------------------------

    def _own_costs(self) -> dict[str, int]:
        """What the agent itself counts, if it does (``costs() -> {"updates": int, "samples": int}``)."""
        counts: Any = getattr(self.agent, "costs", dict)
        return {k: int(v) for k, v in counts().items()}

    def _method_costs(self) -> dict[str, int]:
        """What continual methods cost beside the agent's own updates, where it is combined with any."""
        counts: Any = getattr(self.agent, "method_costs", dict)
        past = {k: v for k, v in self.position.past_extra.items() if k.startswith("extra_")}
        return {k: int(v) + past.get(k, 0) for k, v in counts().items()}

    def cost(self) -> dict[str, int | None]:
        """Deterministic counts (wall time and memory are measured, and go to timing.json)."""
        own, position = self._own_costs(), self.position
        parameters = getattr(self.agent, "num_parameters", None)
        return {
            "env_steps": position.env_steps,
            "updates": position.past_updates + own["updates"] if "updates" in own else position.updates,
            "samples": position.past_samples + own["samples"] if "samples" in own else None,
            "parameters": None if parameters is None else int(parameters),
            "state_bytes": state_bytes(self._agent_state()),
            "evaluation_episodes": self.directory.eval.rows,
            **self._method_costs(),
        }


def _number(value: Any, what: str) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ContractError(f"{what}={value!r}; metrics are single numbers.") from error


@contextlib.contextmanager
def blame(plugin: Any, what: str) -> Iterator[None]:
    """An exception inside a plug-in's method becomes one sentence."""
    try:
        yield
    except ClbenchError:
        raise
    except Exception as error:
        raise plugin_error(plugin, what, error) from error


def phase_records(stream: Stream) -> Sequence[Mapping[str, Any]]:
    """The phases as plain values, for config.json."""

    def record(phase: Phase) -> Mapping[str, Any]:
        task = phase.task if isinstance(phase.task, str) else list(phase.task)
        return {"task": task, "budget": phase.budget, "visit": phase.visit}

    return [record(p) for p in stream.phases]
