"""The benchmark of the planners: rows are complete, the judge is right, memory is counted. No speed is asserted."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clbench.bench.peers as peers
import clbench.bench.rollouts as bench
from clbench.bench.rollouts import (
    CASES,
    LIMIT,
    LOOP,
    OURS,
    PLANNERS,
    Case,
    Problem,
    bench_rollouts,
    limit,
    loop,
    ours,
    peak_bytes,
)
from clbench.cli.main import _main
from clbench.errors import ConfigError, UnknownNameError

SMALL = Case("mlp", 12, 48, envs=3, samples=64, horizon=5, iterations=3)
GRU = replace(SMALL, model="gru")
KEYS = {
    "name", "device", "value", "unit", "ratio_to_limit", "case", "planner", "implementation", "steps_per_second",
    "plan_cost", "zero_plan_cost", "peak_extra_bytes", "B", "K", "H", "D", "iterations", "threads", "precision", "clock",
    "rounds",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return bench_rollouts(["mlp-32-b1", "mlp-32-b32"], quick=True, rounds=2, peers=False, threads=1)


def test_rows_are_complete(rows: list[dict[str, Any]]) -> None:
    json.dumps(rows, allow_nan=False)
    assert len({r["name"] for r in rows}) == len(rows) == 2 * (1 + len(PLANNERS) + 2)
    for row in rows:
        assert row.keys() == KEYS
        assert row["unit"] == "s/plan" and row["device"] == "cpu" and row["threads"] == 1 and row["rounds"] == 2
        assert math.isfinite(row["ratio_to_limit"]) and row["ratio_to_limit"] > 0
        assert row["steps_per_second"] * row["value"] == pytest.approx(
            row["B"] * row["K"] * row["H"] * row["iterations"]
        )
        if row["implementation"] == LIMIT:
            assert row["ratio_to_limit"] == 1 and row["plan_cost"] is None
        else:
            assert (
                row["peak_extra_bytes"] > 4 * row["K"] * row["H"] * bench.ACTIONS
            )  # the candidates of one environment
    assert {(r["planner"], r["implementation"]) for r in rows} == {
        ("", LIMIT), *((p, OURS) for p in PLANNERS), ("cem", LOOP), ("mppi", LOOP)
    }  # fmt: skip


def test_plans_are_better_than_doing_nothing(rows: list[dict[str, Any]]) -> None:
    assert all(r["plan_cost"] < r["zero_plan_cost"] for r in rows if r["plan_cost"] is not None)


def test_sizes_can_be_changed_and_threads_are_restored() -> None:
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    options: dict[str, Any] = {"envs": 1, "samples": 16, "horizon": 3, "iterations": 1, "rounds": 1, "threads": 1}
    found = bench_rollouts(["gru-512-b1"], ["gradient"], peers=False, **options)
    assert [(r["B"], r["K"], r["H"], r["D"], r["iterations"]) for r in found] == [(1, 16, 3, 512, 1)] * 2
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_lower_precision_applies_to_all_and_to_the_limit() -> None:
    options: dict[str, Any] = {"quick": True, "peers": False, "threads": 1}
    found = bench_rollouts(["mlp-32-b1"], ["cem", "gradient"], precision="bfloat16", **options)
    names = (LIMIT, OURS, LOOP, OURS)
    assert [(r["implementation"], r["precision"]) for r in found] == [(n, "bfloat16") for n in names]
    assert all(r["plan_cost"] < r["zero_plan_cost"] for r in found[1:])


@pytest.mark.parametrize("case", [SMALL, GRU], ids=["mlp", "gru"])
def test_gradient_multiplies_in_the_precision_of_its_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bool] = set()
    real = bench.BenchModel.predict

    def watched(model: Any, z: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return real(model, z, action)

    problem = Problem(replace(case, samples=4))
    monkeypatch.setattr(bench.BenchModel, "predict", watched)
    for precision, cast in (("float32", False), ("bfloat16", True)):
        seen.clear()
        plan = ours(problem, "gradient", precision)()
        assert seen == {cast} and plan.dtype == torch.float32 and bool(plan.isfinite().all())


@pytest.mark.parametrize("planner", ["cem", "mppi"])
def test_the_first_noise_does_not_depend_on_our_defaults(planner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(SMALL)
    before = ours(problem, planner, "float32")()
    config = bench.resolve("planners", planner).Config
    real = config.__init__
    monkeypatch.setattr(config, "__init__", lambda self, **options: real(self, **{"std": 0.1, **options}))
    assert torch.equal(ours(problem, planner, "float32")(), before)
    monkeypatch.setattr(bench, "STD", 0.1)
    assert not torch.equal(ours(problem, planner, "float32")(), before)  # negative control


def test_pldm_makes_one_update_per_plan() -> None:
    assert CASES["pldm"].iterations == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_limits_of_all_precisions_are_rows() -> None:
    found = bench_rollouts(["mlp-32-b1"], quick=True, device="cuda", precision="bfloat16", peers=False)
    names = [LIMIT, f"{LIMIT}, float32", f"{LIMIT}, tf32"]
    assert [r["implementation"] for r in found[:3]] == names and len(found) == 3 + len(PLANNERS) + 2
    assert all(r["device"] == "cuda" and r["ratio_to_limit"] > 0 for r in found)
    assert all(r["plan_cost"] < r["zero_plan_cost"] for r in found[3:])


# -- the judge -------------------------------------------------------------------------------------------------------------


def literal_cost(problem: Problem, plan: torch.Tensor) -> list[float]:
    """The judge's cost, number by number, in float64."""
    model, case, costs = problem.model, problem.case, []
    w_in, b_in, w_out, b_out = (w.double().tolist() for w in (model.w_in, model.b_in, model.w_out, model.b_out))
    for env in range(case.envs):
        z, goal, total = problem.z[env].tolist(), problem.goal[env].tolist(), 0.0
        for action in plan[env].tolist():
            inputs = z + [min(max(a, -1.0), 1.0) for a in action]
            if case.model == "mlp":
                hidden = [
                    max(0.0, b + sum(w * x for w, x in zip(row, inputs, strict=True)))
                    for row, b in zip(w_in, b_in, strict=True)
                ]
                z = [
                    b + sum(w * h for w, h in zip(row, hidden, strict=True))
                    for row, b in zip(w_out, b_out, strict=True)
                ]
            else:
                z = literal_gru(w_in, b_in, z, inputs[len(z) :])
            total += sum((x - g) ** 2 for x, g in zip(z, goal, strict=True)) / len(z)
        costs.append(total)
    return costs


def literal_gru(weight: list[list[float]], bias: list[float], z: list[float], action: list[float]) -> list[float]:
    size, new = len(z), []
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for i in range(size):
        of_z, of_a = [], []
        for row, b in ((weight[g * size + i], bias[g * size + i]) for g in range(3)):
            of_z.append(b + sum(w * x for w, x in zip(row[:size], z, strict=True)))
            of_a.append(b + sum(w * x for w, x in zip(row[size:], action, strict=True)))
        reset, update = sigmoid(of_z[0] + of_a[0]), sigmoid(of_z[1] + of_a[1])
        new.append((1 - update) * math.tanh(of_a[2] + reset * of_z[2]) + update * z[i])
    return new


@pytest.mark.parametrize("case", [SMALL, GRU], ids=["mlp", "gru"])
def test_the_judge_equals_a_literal_loop(case: Case) -> None:
    problem = Problem(case)
    plan = torch.randn(case.envs, case.horizon, bench.ACTIONS, generator=torch.Generator().manual_seed(1)) * 2
    assert problem.judge(plan).tolist() == pytest.approx(literal_cost(problem, plan), rel=1e-4)
    assert problem.judge(plan).tolist() == pytest.approx(problem.judge(plan.clamp(-1, 1)).tolist())
    for broken in (plan.flip(1), plan.roll(1, 0), plan.clamp(-0.5, 0.5)):  # steps or environments swapped, other bounds
        assert problem.judge(broken).tolist() != pytest.approx(literal_cost(problem, plan), rel=1e-3)


@pytest.mark.parametrize("case", [SMALL, GRU], ids=["mlp", "gru"])
def test_stepper_and_predict_are_the_same_model(case: Case) -> None:
    problem = Problem(case)
    rng = torch.Generator().manual_seed(2)
    z, actions = torch.randn(7, case.latent, generator=rng), torch.randn(4, 7, bench.ACTIONS, generator=rng)
    stepper = problem.model.stepper(7)
    stepper.load(z)
    for action in actions:
        z = problem.model.predict(z, action)
        torch.testing.assert_close(stepper.step(action), z)


@pytest.mark.parametrize("name", ["mlp-32-b32", "mlp-512-b1", "gru-512-b1"])
def test_the_goals_differ_and_the_problem_is_tame(name: str) -> None:
    problem = Problem(replace(CASES[name], envs=4))
    assert 1e-3 < problem.zero_plan_cost < 1e3 and problem.temperature > 0
    assert (problem.goal[0] - problem.goal[1]).abs().max() > 1e-2


# -- implementations and the limit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SMALL, GRU], ids=["mlp", "gru"])
@pytest.mark.parametrize(
    "make", [lambda p: loop(p, "cem"), lambda p: loop(p, "mppi"), lambda p: ours(p, "cem", "float32")]
)
def test_implementations_plan_for_every_environment(case: Case, make: Callable[[Problem], Callable[[], Any]]) -> None:
    problem = Problem(case)
    plan = make(problem)()
    assert plan.shape == (case.envs, case.horizon, bench.ACTIONS)
    costs, idle = problem.judge(plan), problem.judge(torch.zeros_like(plan))
    assert bool((costs < idle).all())


@pytest.mark.parametrize(
    ("case", "products"),
    [
        (SMALL, {(192, 16, 48), (192, 48, 12)}),  # (rows, inputs, outputs): [z, a] -> hidden -> z
        (GRU, {(192, 16, 36)}),  # [z, a] -> three gates
    ],
)
def test_the_limit_multiplies_these_shapes_and_nothing_else(
    case: Case, products: set[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.append((*a.shape, b.shape[1]))
        return real(a, b, out=out)

    run = limit(case, "cpu", "float32")
    monkeypatch.setattr(torch, "mm", counted)
    assert peak_bytes(run) == 0
    assert set(seen) == products and len(seen) == len(products) * case.horizon * case.iterations


def test_the_faster_of_two_limits_is_taken() -> None:
    now = 0.0

    def taking(*seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def run() -> None:
            nonlocal now
            now += left.pop(0)

        return run

    slow, fast = taking(1, 5, 4, 5), taking(9, 5, 3, 6)  # the first, to warm up, does not count
    assert bench._fastest([slow, fast], "cpu", lambda: now) is fast
    slow, fast = taking(1, 5, 4, 5), taking(9, 5, 3, 6)
    assert bench._fastest([fast, slow], "cpu", lambda: now) is fast


# -- memory ----------------------------------------------------------------------------------------------------------------


def test_peak_bytes_counts_what_lives_at_the_same_time() -> None:
    held = torch.zeros(1000)

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000)

    def together() -> list[torch.Tensor]:
        return [torch.zeros(1000) for _ in range(5)]

    def in_place_and_views() -> torch.Tensor:
        return held.view(10, 100).add_(1).t()[3:]

    assert peak_bytes(one_after_the_other) == 4000
    assert peak_bytes(together) == 20_000
    assert peak_bytes(in_place_and_views) == 0
    assert peak_bytes(lambda: held + 1 + held) == 8000


def test_a_stored_trajectory_needs_more_memory() -> None:
    """What the column is for: the loop stacks its latents, the planner does not."""
    problem = Problem(Case("mlp", 64, 64, envs=1, samples=128, horizon=16, iterations=1))
    trajectory = 4 * 128 * 16 * 64
    assert peak_bytes(loop(problem, "cem")) > 2 * trajectory > 2 * peak_bytes(ours(problem, "cem", "float32"))


# -- other packages --------------------------------------------------------------------------------------------------------


def test_absent_and_broken_packages_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_peer.py").write_text("raise ImportError('needs more')")
    (tmp_path / "good_peer.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    good = lambda problem: {  # noqa: E731
        ("cem", "zeros"): lambda: torch.zeros(problem.case.envs, problem.case.horizon, bench.ACTIONS),
        ("mppi", "fails"): lambda: torch.zeros(0)[0],
    }
    found = {f"{kind}-peer": ((f"{kind}_peer",), good) for kind in ("absent", "broken", "good")}
    monkeypatch.setattr(peers, "PEERS", found)
    notes: list[str] = []
    result = bench_rollouts(["mlp-32-b1"], quick=True, threads=1, note=notes.append)
    assert "absent-peer is not installed" in notes[0] and "pip install absent-peer" in notes[0]
    assert "broken-peer is left out" in notes[1] and "needs more" in notes[1]
    assert "good-peer, fails (mppi) failed: IndexError" in notes[2]
    assert "mlp-32-b1: " in notes[3] and len(notes) == 4
    (row,) = (r for r in result if "good-peer" in r["name"])
    assert row["plan_cost"] == pytest.approx(row["zero_plan_cost"])


def test_a_package_that_cannot_be_set_up_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Problem) -> Any:
        raise TypeError("unexpected keyword argument")

    def plans(problem: Problem) -> Any:
        return {("cem", ""): lambda: torch.zeros(problem.case.envs, problem.case.horizon, bench.ACTIONS)}

    monkeypatch.setattr(peers, "PEERS", {"new": (("json",), fails), "old": (("json",), plans)})
    notes: list[str] = []
    result = bench_rollouts(["mlp-32-b1"], ["cem"], quick=True, threads=1, note=notes.append)
    assert "new is left out, because it cannot be set up: TypeError: unexpected keyword" in notes[0]
    assert [r["implementation"] for r in result] == [LIMIT, OURS, LOOP, "old"]


def test_icem_of_stable_worldmodel_is_measured_with_both_first_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[tuple[float, int]]] = {"CEMSolver": [], "ICEMSolver": [], "MPPISolver": []}

    def solver(name: str) -> Callable[..., Any]:
        def make(cost: Any, **options: Any) -> Any:
            made[name].append((options["var_scale"], options["batch_size"]))
            return SimpleNamespace(configure=lambda **_: None)

        return make

    fake = SimpleNamespace(**{name: solver(name) for name in made})
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: fake)
    names = [setting for planner, setting in peers._stable_worldmodel(Problem(SMALL)) if planner == "icem"]
    assert names == ["batch_size=1", "batch_size=1, std 1", "batch_size=3", "batch_size=3, std 1"]
    assert made["ICEMSolver"] == [(0.5, 1), (1.0, 1), (0.5, 3), (1.0, 3)]
    assert made["CEMSolver"] == made["MPPISolver"] == [(0.5, 1), (0.5, 3)]


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("case", [SMALL, GRU], ids=["mlp", "gru"])
def test_installed_packages_plan_the_same_problem(name: str, case: Case) -> None:
    modules, make = peers.PEERS[name]
    if importlib.util.find_spec(modules[0].partition(".")[0]) is None or name not in peers.load_peers(lambda _: None):
        pytest.skip(f"{name} cannot be imported")
    problem = Problem(replace(case, samples=256))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for plan in make(problem).values():
            actions = plan()
            assert actions.shape == (case.envs, case.horizon, bench.ACTIONS)
            assert problem.judge(actions).mean() < problem.zero_plan_cost


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cases": ["mlp-32-b2"]}, UnknownNameError, "Did you mean 'mlp-32-b32'"),
        ({"planners": ["cen"]}, UnknownNameError, "Did you mean 'cem'"),
        ({"precision": "float16"}, UnknownNameError, "'bfloat16'"),
        ({"samples": 0}, ConfigError, "samples must be at least 1"),
        ({"threads": 0}, ConfigError, "threads must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bench_rollouts(**{"quick": True, **options})


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "bench",
        "rollouts",
        "--quick",
        "--threads",
        "1",
        "--no-peers",
        "--case",
        "mlp-32-b1",
        "--planner",
        "cem",
    ]
    assert _main(arguments) == 0
    table = capsys.readouterr().out
    assert "mlp-32-b1 cem clbench" in table and "x limit" in table
    assert _main([*arguments, "--json"]) == 0
    assert [r["implementation"] for r in json.loads(capsys.readouterr().out)] == [LIMIT, OURS, LOOP]
