"""How fast planners are: beside the matrix multiplications they cannot do without, a Python loop over environments, and
other packages.

The problem is the same for all: a random world model that forgets where it began, one goal per environment, actions in a
box, and the running cost ``sum_t mean_d (z_t - goal)_d^2``. Each row is one implementation on one case::

    {"name", "device", "value", "unit", "ratio_to_limit", "case", "planner", "implementation", "steps_per_second",
     "plan_cost", "zero_plan_cost", "peak_extra_bytes", "B", "K", "H", "D", "iterations", "threads", "precision", "clock",
     "rounds"}

``value`` is seconds per plan (``unit`` is ``"s/plan"``), the median over rounds; all ``B`` environments are planned for.
The limit is the time of the model's matrix multiplications alone: all ``B * K`` rows at once, ``H`` steps, all
iterations, into memory that is allocated before; no bias, activation, cost or sampling; on a GPU launched one by one or
replayed as a CUDA graph, whichever is faster. Everything is measured in one
process, in rounds whose order is shuffled, and ``ratio_to_limit`` is the median over rounds of the time divided by that of
the limit in the same round. A slow minute of a shared machine then falls on all of them.

``plan_cost`` is what the returned actions, brought into the bounds, cost under the model (:meth:`Problem.judge`): the mean
over environments, the median over rounds. Nobody is fast by planning less. ``peak_extra_bytes`` is the most memory that
the tensors of one plan held at a time (:func:`peak_bytes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clbench.bench.peers import load_peers
from clbench.contracts import Stepper
from clbench.errors import ConfigError, unknown_name
from clbench.planners.bounds import ActionBounds
from clbench.planners.graphs import capturable, capture
from clbench.planners.objectives import GoalDistance
from clbench.planners.rollout import PRECISIONS, precision_of
from clbench.planners.steppers import GRUStepper, MLPStepper
from clbench.registry import resolve
from clbench.rng import sealed_global_rng, seed_global, torch_generator

ACTIONS = 4
STD = 0.5  # of the first iteration's noise of CEM and MPPI, for all implementations that can be told; iCEM has its own
PLANNERS = ("cem", "icem", "mppi", "random-shooting")  # gradient can be asked for
ROUNDS = (3, 15)
SECONDS = 30.0  # for the rounds of a case, where that makes more than the fewest rounds
_KEPT_BLOCK = 2**25 - 2**16  # bytes: just below the largest threshold that glibc sets by itself
SHORT = 0.1  # seconds: shorter plans are repeated within a round

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

OURS, LOOP, LIMIT = "clbench", "loop over environments", "limit"


@dataclass(frozen=True)
class Case:
    """A size of problem: the model, and how much is planned.

    Args:
        model: ``"mlp"``, ``z' = W2 relu(W1 [z, a] + b1) + b2``, or ``"gru"``, whose hidden state is the latent.
        latent: ``D``.
        hidden: width of the MLP; not used by the GRU.
        envs: ``B``.
        samples: ``K``.
        horizon: ``H``.
        iterations: rounds of sampling and updating.
    """

    model: Literal["mlp", "gru"]
    latent: int
    hidden: int
    envs: int
    samples: int = 512
    horizon: int = 32
    iterations: int = 5

    @property
    def elites(self) -> int:
        return max(2, self.samples // 8)

    @property
    def model_steps(self) -> int:
        """Latents that are moved by one step in a plan."""
        return self.envs * self.samples * self.horizon * self.iterations


CASES: dict[str, Case] = {
    "mlp-512-b1": Case("mlp", 512, 512, 1),
    "mlp-512-b32": Case("mlp", 512, 512, 32),
    "mlp-32-b1": Case("mlp", 32, 256, 1),
    "mlp-32-b32": Case("mlp", 32, 256, 32),
    "gru-512-b1": Case("gru", 512, 512, 1),
    "gru-512-b32": Case("gru", 512, 512, 32),
    # the planning of PLDM on Two-Rooms (arXiv 2502.14819), for 20 environments at once: one update of MPPI per plan
    "pldm": Case("gru", 512, 512, 20, samples=2000, horizon=96, iterations=1),
}
DEFAULT_CASES = ("mlp-32-b1", "mlp-32-b32", "mlp-512-b1", "mlp-512-b32")


# -- the problem ---------------------------------------------------------------------------------------------------------


class BenchModel:
    """A random world model; ``predict`` for all, ``stepper`` for those who can use one."""

    def __init__(self, case: Case, device: str, rng: torch.Generator):
        latent, size = case.latent, latent_inputs(case)
        outputs = 3 * latent if case.model == "gru" else case.hidden

        def normal(*shape: int, std: float) -> Tensor:
            return (torch.randn(*shape, generator=rng) * std).to(device)

        # a gain below one: the latents forget slowly where they began, and stay finite
        self.latent, self.kind = latent, case.model
        self.w_in = normal(outputs, size, std=0.9 / math.sqrt(latent))
        self.w_in[:, latent:] = normal(outputs, ACTIONS, std=0.5 / math.sqrt(ACTIONS))
        self.b_in = normal(outputs, std=0.1)
        self.w_out = normal(latent, case.hidden, std=math.sqrt(2 / case.hidden))
        self.w_out -= self.w_out.mean(1, keepdim=True)  # what all hidden units share does not build up
        self.b_out = normal(latent, std=0.1)

    def encode(self, obs: Any) -> Tensor:
        return obs

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents (..., D), actions (..., A) -> (..., D), with nothing that a plain user would not write."""
        if self.kind == "gru":
            shape = z.shape
            cell = (self.w_in[:, self.latent :], self.w_in[:, : self.latent], self.b_in, self.b_in)
            return torch.gru_cell(action.reshape(-1, ACTIONS), z.reshape(-1, self.latent), *cell).view(shape)
        hidden = torch.relu(functional.linear(torch.cat([z, action], -1), self.w_in, self.b_in))
        return functional.linear(hidden, self.w_out, self.b_out)

    def stepper(self, rows: int, dtype: torch.dtype | None = None) -> Stepper:
        if self.kind == "gru":
            weights = (self.w_in[:, self.latent :], self.w_in[:, : self.latent], self.b_in, self.b_in)
            return GRUStepper(rows, lambda: weights, dtype=dtype)
        layers = [(self.w_in, self.b_in), (self.w_out, self.b_out)]
        return MLPStepper(rows, lambda: layers, latent=self.latent, dtype=dtype)


def latent_inputs(case: Case) -> int:
    """Inputs of the model's first multiplication: latent and action."""
    return case.latent + ACTIONS


class Problem:
    """What all implementations plan for: latents ``z`` and ``goal`` (B, D), ``model``, actions in [-1, 1].

    The goal is what a hidden sequence of actions reaches, from a state of rest: four parts of the horizon, each with an
    action of its own that is at least half as strong as allowed.
    """

    def __init__(self, case: Case, device: str = "cpu", seed: int = 0):
        rng = torch_generator(seed, "bench", "problem")
        self.case, self.device, self.seed = case, device, seed
        self.model = BenchModel(case, device, rng)
        self.bounds = ActionBounds([-1.0] * ACTIONS, [1.0] * ACTIONS)
        with torch.no_grad():
            z = torch.randn(case.envs, case.latent, generator=rng).to(device)
            idle = torch.zeros(case.envs, ACTIONS, device=device)
            for _ in range(case.horizon):
                z = self.model.predict(z, idle)  # where it rests
            self.z = z
            pieces = torch.rand(case.envs, 4, ACTIONS, generator=rng) - 0.5
            pieces = (pieces + 0.5 * pieces.sign()).to(device)
            for step in range(case.horizon):
                z = self.model.predict(z, pieces[:, 4 * step // case.horizon])
            self.goal = z
            self.zero_plan_cost = float(self.judge(torch.zeros(case.envs, case.horizon, ACTIONS)).mean())
            tries = torch.randn(64, case.envs, case.horizon, ACTIONS, generator=rng) * STD
            costs = torch.stack([self.judge(plan) for plan in tries])
        # of MPPI's weights, in units of the cost, for implementations that do not scale it themselves
        self.temperature = 0.1 * float(costs.std(0).mean())

    def judge(self, plan: Tensor) -> Tensor:
        """Costs (B,) of plans (B, H, A), brought into the bounds as an environment would do."""
        z, total = self.z, torch.zeros(len(self.z), device=self.device)
        with torch.no_grad():
            for action in plan.to(self.device).clamp(-1, 1).unbind(1):
                z = self.model.predict(z, action)
                total = total + (z - self.goal).square().mean(-1)
        return total

    def generator(self, *names: str) -> torch.Generator:
        return torch_generator(self.seed, "bench", *names, device=self.device)


# -- implementations -----------------------------------------------------------------------------------------------------

Plan = Callable[[], Tensor]  # one plan (B, H, A), from nothing
Make = Callable[["Problem"], Mapping[tuple[str, str], Plan]]  # (planner, setting) -> plan


@dataclass(frozen=True)
class Contender:
    """One implementation of one planner; a ``peer`` is not ours and may fail."""

    planner: str
    implementation: str
    plan: Callable[[], Tensor | None]
    peer: bool = False


def ours(problem: Problem, planner: str, precision: str) -> Plan:
    """A planner of clbench with its default options and the case's sizes; CEM and MPPI with :data:`STD`."""
    case, cls = problem.case, resolve("planners", planner)
    options: dict[str, Any] = {"horizon": case.horizon, "iterations": case.iterations}
    if planner == "gradient":
        options["restarts"] = case.samples
    else:
        options |= {"samples": case.samples, "precision": precision}
    if planner in ("cem", "mppi"):
        options["std"] = STD
    if planner == "cem":
        options["elites"] = case.elites
    elif planner == "icem":
        options["elites"] = min(cls.Config.elites, case.elites)
    made = cls(problem.bounds, cls.Config(**options))
    rng = problem.generator(OURS, planner)

    def plan() -> Tensor:
        return made.plan(problem.model, problem.z, GoalDistance(problem.goal), None, rng=rng)[0]

    return _in_precision(plan, precision, problem.device) if planner == "gradient" else plan  # it has no such option


def loop(problem: Problem, planner: Literal["cem", "mppi"]) -> Plan:
    """One environment at a time, a list of latents that are stacked for the cost: how planning code is usually written."""
    case, model, rng = problem.case, problem.model, problem.generator(LOOP, planner)

    def costs_of(env: int, actions: Tensor) -> Tensor:
        z, latents = problem.z[env].repeat(case.samples, 1), []
        for t in range(case.horizon):
            z = model.predict(z, actions[:, t])
            latents.append(z)
        return (torch.stack(latents, 1) - problem.goal[env]).square().mean(-1).sum(1)

    def plan_for(env: int) -> Tensor:
        mean = torch.zeros(case.horizon, ACTIONS, device=problem.device)
        std = torch.full_like(mean, STD)
        for _ in range(case.iterations):
            noise = torch.randn(case.samples, *mean.shape, generator=rng, device=problem.device)
            actions = (mean + std * noise).clamp(-1, 1)
            costs = costs_of(env, actions)
            if planner == "cem":
                best = actions[costs.topk(case.elites, largest=False).indices]
                mean, std = best.mean(0), best.std(0)
            else:
                weight = torch.softmax(-costs / problem.temperature, 0)
                mean = (weight[:, None, None] * actions).sum(0)
        return mean

    @torch.no_grad()
    def plan() -> Tensor:
        return torch.stack([plan_for(env) for env in range(case.envs)])

    return plan


def limit(case: Case, device: str, precision: str) -> Callable[[], None]:
    """The model's matrix multiplications of one plan; on a GPU one by one or as a CUDA graph, whichever is faster."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rows, inputs = case.envs * case.samples, latent_inputs(case)
    widths = [inputs, 3 * case.latent] if case.model == "gru" else [inputs, case.hidden, case.latent]
    layers = [torch.full((a, b), 0.01, dtype=dtype, device=device) for a, b in zip(widths, widths[1:], strict=False)]
    buffers = [torch.full((rows, n), 0.01, dtype=dtype, device=device) for n in widths]

    @torch.no_grad()
    def multiply() -> None:
        with precision_of("tf32" if precision == "tf32" else "float32", torch.device(device)):
            for _ in range(case.iterations * case.horizon):
                for source, layer, target in zip(buffers, layers, buffers[1:], strict=False):
                    torch.mm(source, layer, out=target)

    if not capturable(torch.device(device)):
        return multiply
    try:
        return _fastest([multiply, capture(multiply, torch.device(device))], device)
    except RuntimeError:  # not everything can be recorded everywhere
        return multiply


def _fastest(
    runs: Sequence[Callable[[], None]], device: str, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], None]:
    """The one with the shortest of a few times, after one to warm up."""

    def seconds(run: Callable[[], None]) -> float:
        _wait(device)
        begin = clock()
        run()
        _wait(device)
        return clock() - begin

    return min(runs, key=lambda run: min([seconds(run) for _ in range(4)][1:]))


def _contenders(
    problem: Problem, planners: Sequence[str], precision: str, peers: Mapping[str, Make], note: Callable[[str], None]
) -> Iterator[Contender]:
    device = problem.device
    yield Contender("", LIMIT, limit(problem.case, device, precision))
    for other in PRECISIONS if torch.device(device).type == "cuda" else ():
        if other != precision:
            yield Contender("", f"{LIMIT}, {other}", limit(problem.case, device, other))
    for planner in planners:
        yield Contender(planner, OURS, ours(problem, planner, precision))
        if planner == "cem" or planner == "mppi":
            yield Contender(planner, LOOP, _in_precision(loop(problem, planner), precision, device))
    for peer, make in peers.items():
        try:
            plans = make(problem)
        except Exception as error:  # noqa: BLE001 - other versions of a package may raise anything
            note(f"{peer} is left out, because it cannot be set up: {type(error).__name__}: {error}")
            continue
        for (planner, setting), plan in plans.items():
            if planner in planners:
                name = f"{peer}, {setting}" if setting else peer
                yield Contender(planner, name, _in_precision(plan, precision, device), peer=True)


def _in_precision(plan: Plan, precision: str, device: str) -> Plan:
    """The same under autocast or TF32, where that is asked for, so that all do the same arithmetic."""

    def cast() -> Tensor:
        with precision_of(precision, torch.device(device)):
            return plan()

    return cast


# -- measuring -----------------------------------------------------------------------------------------------------------


def bench_rollouts(
    cases: Sequence[str] = DEFAULT_CASES, planners: Sequence[str] = PLANNERS, *, device: str = "cpu",
    precision: str = "float32", threads: int | None = None, rounds: int | None = None, peers: bool = True,
    clock: Literal["wall", "cpu"] = "wall", samples: int | None = None, horizon: int | None = None,
    iterations: int | None = None, envs: int | None = None, quick: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure planners on cases.

    Args:
        cases: mlp-512-b1, mlp-512-b32, mlp-32-b1, mlp-32-b32, gru-512-b1, gru-512-b32, pldm; ``docs/benchmarks.md``
            says what they are.
        planners: cem, icem, mppi, random-shooting, gradient.
        device: where everything is computed.
        precision: of the matrix multiplications, those of the limit included: float32, tf32 or bfloat16.
        threads: of torch during the measurement; default as they are.
        rounds: times that everything is measured; default as many as fit half a minute, at least 3.
        peers: also measure other packages, where they are installed.
        clock: "wall" time, or the "cpu" time of the process, which on a machine that is shared says more if there is one
            thread; a thread that waits for others counts too.
        samples: instead of the cases' ``K``.
        horizon: instead of the cases' ``H``.
        iterations: instead of the cases' own.
        envs: instead of the cases' ``B``.
        quick: tiny sizes and one round, for tests; the numbers mean nothing.
        note: is told what is left out and why, and how far it is.

    Returns:
        One dict per implementation and case, see the module.

    Raises:
        ConfigError: unknown names, or sizes below 1.
    """
    for kind, names, known in (
        ("case", cases, CASES), ("planner", planners, (*PLANNERS, "gradient")), ("precision", [precision], PRECISIONS),
        ("clock", [clock], CLOCKS),
    ):  # fmt: skip
        for name in names:
            if name not in known:
                raise unknown_name(kind, name, known)
    sizes = {"envs": envs, "samples": samples, "horizon": horizon, "iterations": iterations}
    for name, value in {**sizes, "rounds": rounds, "threads": threads}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}.")
    if quick:
        sizes = {"envs": 2, "samples": 64, "horizon": 4, "iterations": 2} | {k: v for k, v in sizes.items() if v}
        rounds = rounds or 1
    changes = {k: v for k, v in sizes.items() if v is not None}
    rows, before = [], torch.get_num_threads()
    others = load_peers(note) if peers else {}
    # other packages draw from the process-wide generator, and print
    with sealed_global_rng(), contextlib.redirect_stdout(io.StringIO()):
        torch.set_num_threads(threads or before)
        try:
            for name in cases:
                case = dataclasses.replace(CASES[name], **changes)
                rows += _bench_case(name, case, planners, device, precision, rounds, clock, others, note)
        finally:
            torch.set_num_threads(before)
    return rows


def _bench_case(
    name: str, case: Case, planners: Sequence[str], device: str, precision: str, rounds: int | None, clock: str,
    peers: Mapping[str, Make], note: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    _settle_allocator()
    problem = Problem(case, device)
    seed_global(problem.seed)  # some peers draw from the process-wide generators
    contenders, peaks, calls, total = [], {}, {}, 0.0
    for contender in _contenders(problem, planners, precision, peers, note):
        begin = time.perf_counter()
        try:
            peaks[contender] = peak_bytes(contender.plan, device)
        except Exception as error:
            if not contender.peer:
                raise
            note(f"{contender.implementation} ({contender.planner}) failed: {type(error).__name__}: {error}")
            continue
        seconds = time.perf_counter() - begin
        contenders.append(contender)
        calls[contender] = max(1, round(SHORT / seconds))
        total += seconds * calls[contender]
    rounds = rounds or min(max(round(SECONDS / total), ROUNDS[0]), ROUNDS[1])
    note(f"{name}: {len(contenders)} rows, {rounds} rounds of at most about {math.ceil(total)} s")
    times, costs = _measure(contenders, calls, rounds, problem, CLOCKS[clock])
    below = times[contenders[0]]
    return [
        {
            "name": " ".join(filter(None, (name, c.planner, c.implementation))),
            "device": device,
            "value": statistics.median(times[c]),
            "unit": "s/plan",
            "ratio_to_limit": statistics.median(t / b for t, b in zip(times[c], below, strict=True)),
            "case": name,
            "planner": c.planner,
            "implementation": c.implementation,
            "steps_per_second": case.model_steps / statistics.median(times[c]),
            "plan_cost": statistics.median(costs[c]) if costs[c] else None,
            "zero_plan_cost": problem.zero_plan_cost,
            "peak_extra_bytes": peaks[c],
            "B": case.envs,
            "K": case.samples,
            "H": case.horizon,
            "D": case.latent,
            "iterations": case.iterations,
            "threads": torch.get_num_threads(),
            "precision": precision,
            "clock": clock,
            "rounds": rounds,
        }
        for c in contenders
    ]


def _settle_allocator() -> None:
    """Free one large block: glibc then keeps blocks up to this size instead of giving them back to the system.

    It would do so anyway once any of the implementations has freed such a block, and those that allocate much become much
    faster by it; without this call the result of one would depend on who else is measured.
    """
    torch.empty(_KEPT_BLOCK, dtype=torch.uint8)


def _measure(
    contenders: Sequence[Contender], calls: Mapping[Contender, int], rounds: int, problem: Problem,
    clock: Callable[[], float],
) -> tuple[dict[Contender, list[float]], dict[Contender, list[float]]]:  # fmt: skip
    """Seconds per plan, and costs of a plan, of each contender in each round; the order differs from round to round."""
    times: dict[Contender, list[float]] = {c: [] for c in contenders}
    costs: dict[Contender, list[float]] = {c: [] for c in contenders}
    order = torch_generator(problem.seed, "bench", "order")
    for _ in range(rounds):
        for i in torch.randperm(len(contenders), generator=order).tolist():
            contender = contenders[i]
            plan: Tensor | None = None
            _wait(problem.device)
            begin = clock()
            for _ in range(calls[contender]):
                plan = contender.plan()
            _wait(problem.device)
            times[contender].append((clock() - begin) / calls[contender])
            if plan is not None:
                costs[contender].append(float(problem.judge(plan).mean()))
    return times, costs


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that tensors made within a call held at a time.

    On a CPU the storages of the results of all operations are counted; what an operation allocates and frees inside of
    itself is not seen. On a GPU the caching allocator is asked.
    """
    if torch.device(device).type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        function()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(s) for s in _storages((args, kwargs))}  # views and results in place are nothing new
        for storage in _storages(result):
            key = id(storage)
            if key not in given and key not in self._known:
                self._known[key] = storage.nbytes()
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, key).atexit = False
        return result

    def _free(self, key: int) -> None:
        self.held -= self._known.pop(key)


def _storages(values: Any) -> list[Any]:
    return [t.untyped_storage() for t in tree_leaves(values) if isinstance(t, Tensor)]
