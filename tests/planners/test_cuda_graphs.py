"""An iteration that is recorded and replayed plans what the plain one plans. On a CPU, recording is played by running
again: what is tested there is that everything that changes between plans is copied into the buffers that stay."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from worlds import Network, Point, small

from clbench.planners import graphs
from clbench.planners.cem import CEM
from clbench.planners.icem import ICEM
from clbench.planners.mppi import MPPI
from clbench.planners.objectives import GoalDistance, Sum
from clbench.planners.random_shooting import RandomShooting
from clbench.planners.steppers import PredictStepper
from clbench.rng import torch_generator

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "graphs"))


class Tape:
    """Stands for a graph: runs during the warm-ups and at each replay, and counts."""

    def __init__(self, monkeypatch):
        self.recorded = self.replayed = 0
        monkeypatch.setattr(graphs, "capturable", lambda device: True)
        monkeypatch.setattr(graphs, "capture", self.capture)

    def capture(self, run, device):
        self.recorded += 1
        run()
        run()

        def replay():
            self.replayed += 1
            run()

        return replay


@pytest.fixture
def tape(monkeypatch):
    return Tape(monkeypatch)


def plans(planner, model, change):
    """Three plans from different latents, goals and weights, each warm-started."""
    memory, out = None, []
    for i in range(3):
        sign = torch.tensor([1.0, -1.0]) if change else 1.0
        objective = GoalDistance(randn(2, 6, seed=10 + i), sign=sign)
        if change:
            model.w1 = model.w1 * 1.1
        plan, memory = planner.plan(model, randn(2, 6, seed=i), objective, memory, rng=torch_generator(i))
        out += [plan, memory["mean"]]
    return out


@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, RandomShooting])
@pytest.mark.parametrize("change", [False, True])
def test_replayed_plans_equal_plain_ones(cls, change, tape):
    options = {"decay": 1.5, "elites": 4} if cls is ICEM else {}
    expected = plans(cls(None, small(cls, cuda_graph=False, iterations=3, **options)), Network(), change)
    got = plans(cls(None, small(cls, iterations=3, **options)), Network(), change)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert tape.recorded == (3 if cls is ICEM else 1)  # one for each number of samples
    assert tape.replayed == 9


def test_a_prior_is_copied_too(tape):
    def prior(z, step):
        return z[..., :2]

    expected = plans(CEM(None, small(CEM, cuda_graph=False), prior=prior), Network(), True)
    for a, b in zip(plans(CEM(None, small(CEM), prior=prior), Network(), True), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert tape.recorded == 1


@pytest.mark.parametrize("broken", ["weights", "goal"])
def test_negative_control_what_is_not_copied_is_noticed(broken, tape, monkeypatch):
    def refresh(self, other):
        self.z.copy_(other.z)
        if broken == "goal":
            for stepper in self._steppers.values():
                stepper.pack()
        else:
            for old, new in zip(self.objective.tensors(), other.objective.tensors(), strict=True):
                old.copy_(new)

    expected = plans(CEM(None, small(CEM, cuda_graph=False)), Network(), True)
    monkeypatch.setattr(graphs.Rollout, "refresh", refresh)
    got = plans(CEM(None, small(CEM)), Network(), True)
    assert not all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_what_cannot_be_recorded_runs_plainly(tape):
    z, goal = randn(2, 2), GoalDistance(randn(2, 2, seed=1))
    for model, objective, options in (
        (Point(), goal, {}),  # no resident buffers
        (Network(2), lambda z, step: z.square().sum(-1), {}),  # an objective without key
        (Network(2), Sum(goal, lambda z, step: z.square().sum(-1)), {}),
        (Network(2), type("Mine", (GoalDistance,), {})(randn(2, 2)), {}),  # of whose data nothing is known
        (Network(2), goal, {"block": 1}),
        (Network(2), goal, {"cuda_graph": False}),
    ):
        CEM(None, small(CEM, **options)).plan(model, z, objective, None, rng=torch_generator(0))
    assert tape.recorded == 0


def test_weights_of_another_shape_are_recorded_again(tape):
    planner, model, z = CEM(None, small(CEM)), Network(2), randn(2, 2)
    for hidden in (16, 16, 24):
        model.w1, model.b1, model.w2 = randn(hidden, 4), randn(hidden), randn(2, hidden)
        goal = GoalDistance(randn(2, 2, seed=1))
        got, _ = planner.plan(model, z, goal, None, rng=torch_generator(0))
        plain, _ = CEM(None, small(CEM, cuda_graph=False)).plan(model, z, goal, None, rng=torch_generator(0))
        torch.testing.assert_close(got, plain)
    assert tape.recorded == 2


def test_a_failed_recording_falls_back_and_says_so_once(monkeypatch):
    def fail(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capturable", lambda device: True)
    monkeypatch.setattr(graphs, "capture", fail)
    planner = CEM(None, small(CEM))
    with pytest.warns(UserWarning, match="without a CUDA graph, which could not be recorded: operation not permitted"):
        first = plans(planner, Network(), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = plans(planner, Network(), False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_stepper_that_cannot_take_new_weights_is_not_replayed(tape):
    class Frozen:
        def load(self, z):
            self.z = z

        def step(self, action):
            self.z = self.z + action
            return self.z

    model = Network(2)
    model.stepper = lambda rows: Frozen()
    with pytest.warns(UserWarning, match=r"has no method pack\(\)"):
        CEM(None, small(CEM)).plan(model, randn(2, 2), GoalDistance(randn(2, 2)), None, rng=torch_generator(0))
    assert tape.replayed == 0


class Module(torch.nn.Module):
    """Offers its ``predict`` for recording."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def predict(self, z, action):
        return self.layer(torch.cat([z, action], -1))

    def stepper(self, rows):
        return PredictStepper(self)


def test_predict_is_recorded_until_its_weights_move(tape):
    planner, model, z, goal = CEM(None, small(CEM)), Module(), randn(2, 2), GoalDistance(randn(2, 2, seed=1))

    def both():
        plans = [
            p.plan(model, z, goal, None, rng=torch_generator(0))[0]
            for p in (planner, CEM(None, small(CEM, cuda_graph=False)))
        ]
        torch.testing.assert_close(*plans)
        return tape.recorded

    assert both() == 1
    with torch.no_grad():
        model.layer.weight.mul_(1.5)  # in place, as an optimiser does
    assert both() == 1
    model.layer = torch.nn.Linear(4, 2)
    assert both() == 2


def test_copies_of_a_planner_record_their_own(tape):
    planner = CEM(None, small(CEM))
    plans(planner, Network(), False)
    for twin in (copy.deepcopy(planner), pickle.loads(pickle.dumps(planner))):
        assert not twin._graphs._graphs
        plans(twin, Network(), False)
    assert tape.recorded == 3


def test_few_graphs_are_kept(tape):
    planner = CEM(None, small(CEM))
    for envs in (1, 2, 3, 4, 5, 6, 1):
        planner.plan(Network(), randn(envs, 6), GoalDistance(randn(envs, 6)), None, rng=torch_generator(0))
    assert len(planner._graphs._graphs) == 4 and tape.recorded == 7


# -- on a GPU ------------------------------------------------------------------------------------------------------------


def on_gpu(model: Network) -> Network:
    for name in ("w1", "b1", "w2", "b2"):
        setattr(model, name, getattr(model, name).cuda())
    return model


def gpu_plans(cls, **options):
    planner, model, memory, out = cls(None, small(cls, iterations=3, **options)), on_gpu(Network()), None, []
    for i in range(3):
        model.w1 = model.w1 * 1.1
        objective = GoalDistance(randn(2, 6, seed=10 + i).cuda())
        rng = torch_generator(i)  # of the CPU, so that both devices see the same noise
        plan, memory = planner.plan(model, randn(2, 6, seed=i).cuda(), objective, memory, rng=rng)
        out.append(plan.cpu())
    return out


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("cls", [MPPI, CEM, ICEM, RandomShooting])
def test_gpu_plans_equal_cpu_plans_with_and_without_a_graph(cls):
    model, planner, memory = Network(), cls(None, small(cls, iterations=3)), None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # recording must not fail
        recorded, plain = gpu_plans(cls), gpu_plans(cls, cuda_graph=False)
    for i in range(3):
        model.w1 = model.w1 * 1.1
        objective = GoalDistance(randn(2, 6, seed=10 + i))
        plan, memory = planner.plan(model, randn(2, 6, seed=i), objective, memory, rng=torch_generator(i))
        torch.testing.assert_close(recorded[i], plain[i], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(recorded[i], plan, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_lower_precision_changes_a_plan_little(precision):
    for a, b in zip(gpu_plans(MPPI, precision=precision), gpu_plans(MPPI), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.1)
