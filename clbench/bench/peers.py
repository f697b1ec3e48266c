"""Planners of other packages on the problem of :mod:`clbench.bench.rollouts`, where those packages are installed.

Each is called through its own public classes, with the leanest model and cost that its interface allows, the case's sizes
and the same first standard deviation where that can be set (iCEM: two of them). What differs is said in
``docs/benchmarks.md``.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from clbench.bench.rollouts import Plan, Problem

    Plans = dict[tuple[str, str], Plan]

STD = 0.5
ICEM_STDS = (STD, 1.0)  # ours begins with 1; so that no other is measured at the worse one only
ICEM_ELITES = 30  # stable-worldmodel's default


def load_peers(note: Callable[[str], None]) -> Mapping[str, Callable[[Problem], Plans]]:
    """The packages that can be imported, and what makes their planners for a problem: ``(planner, setting) -> plan``.

    Args:
        note: is told of each package that is left out, and why.
    """
    found = {}
    for name, (modules, make) in PEERS.items():
        if importlib.util.find_spec(modules[0].partition(".")[0]) is None:
            note(f"{name} is not installed and is left out; `pip install {name}` adds its rows.")
            continue
        try:
            for module in modules:
                importlib.import_module(module)
        except (ImportError, AttributeError, OSError, RuntimeError, TypeError) as error:
            note(f"{name} is left out, because it cannot be imported: {type(error).__name__}: {error}")
            continue
        found[name] = make
    return found


# -- stable-worldmodel ---------------------------------------------------------------------------------------------------


class _LeanCost:
    """The cost of candidates (B, K, H, A), brought into the bounds; no trajectory is stored."""

    def __init__(self, problem: Problem):
        self.model = problem.model

    def get_cost(self, info_dict: Mapping[str, Tensor], action_candidates: Tensor) -> Tensor:
        envs, samples = action_candidates.shape[:2]
        z, goal = info_dict["z"].flatten(0, 1), info_dict["goal"][:, :1]
        actions = action_candidates.clamp(-1, 1)
        total = torch.zeros(envs, samples, device=actions.device)
        for t in range(actions.shape[2]):
            z = self.model.predict(z, actions[:, :, t].flatten(0, 1))
            total = total + (z.view(envs, samples, -1) - goal).square().mean(-1)
        return total


def _stable_worldmodel(problem: Problem) -> Plans:
    import gymnasium

    solvers: Any = importlib.import_module("stable_worldmodel.solver")
    case, size = problem.case, problem.bounds.size
    space = gymnasium.spaces.Box(-1, 1, (case.envs, size), np.float32)
    config = SimpleNamespace(horizon=case.horizon, receding_horizon=1, history_len=1, action_block=1, warm_start=False)
    topk = {
        "cem": (solvers.CEMSolver, case.elites, {}),
        "icem": (solvers.ICEMSolver, min(ICEM_ELITES, case.elites), {}),
        "mppi": (solvers.MPPISolver, case.elites, {"temperature": problem.temperature}),
    }
    plans: Plans = {}
    for planner, (solver, elites, options) in topk.items():
        stds = ICEM_STDS if planner == "icem" else (STD,)
        for batch, std in itertools.product(sorted({1, case.envs}), stds):
            made = solver(
                _LeanCost(problem), batch_size=batch, num_samples=case.samples, var_scale=std, n_steps=case.iterations,
                topk=elites, device=problem.device, seed=problem.seed, **options,
            )  # fmt: skip
            made.configure(action_space=space, n_envs=case.envs, config=config)
            setting = f"batch_size={batch}" if std == STD else f"batch_size={batch}, std {std:g}"
            plans[planner, setting] = _solved_by(made, {"z": problem.z, "goal": problem.goal})
    return plans


def _solved_by(solver: Any, info: dict[str, Tensor]) -> Plan:
    return lambda: solver.solve(info)["actions"].clone()


# -- pytorch-mppi --------------------------------------------------------------------------------------------------------


def _pytorch_mppi(problem: Problem) -> Plans:
    mppi: Any = importlib.import_module("pytorch_mppi")
    case, size, model = problem.case, problem.bounds.size, problem.model
    options = {
        "nx": case.latent, "noise_sigma": STD**2 * torch.eye(size, device=problem.device), "num_samples": case.samples,
        "horizon": case.horizon, "device": problem.device, "lambda_": problem.temperature,
        "u_min": problem.bounds.low, "u_max": problem.bounds.high,
    }  # fmt: skip

    def cost_to(goal: Tensor) -> Callable[[Tensor, Tensor], Tensor]:  # of (K, D), or of all environments' (B * K, D)
        return lambda z, _: (z.view(-1, case.samples, case.latent) - goal).square().mean(-1).flatten()

    single = [mppi.MPPI(model.predict, cost_to(goal), **options) for goal in problem.goal[:, None, None]]
    batched = mppi.MPPI_Batched(model.predict, cost_to(problem.goal[:, None]), num_envs=case.envs, **options)

    def refine(planner: Any, z: Tensor) -> Tensor:
        planner.U = torch.zeros_like(planner.U)
        for _ in range(case.iterations):
            planner.command(z, shift_nominal_trajectory=False)
        return planner.U

    @torch.no_grad()
    def one_by_one() -> Tensor:
        return torch.stack([refine(planner, z) for planner, z in zip(single, problem.z, strict=True)])

    @torch.no_grad()
    def together() -> Tensor:
        return refine(batched, problem.z)

    return {("mppi", "MPPI"): one_by_one, ("mppi", "MPPI_Batched"): together}


# -- torchrl -------------------------------------------------------------------------------------------------------------


def _torchrl(problem: Problem) -> Plans:
    data, envs, modules = (
        importlib.import_module(f"torchrl.{name}") for name in ("data", "envs.model_based", "modules.planners")
    )
    tensordict: Any = importlib.import_module("tensordict")
    case, size, device = problem.case, problem.bounds.size, problem.device

    class World(nn.Module):
        """One step of latents (B, K, D) and its reward."""

        def forward(self, state: Any) -> Any:
            z = problem.model.predict(state["hidden"], state["action"])
            reward = -(z - problem.goal[:, None]).square().mean(-1, keepdim=True)
            return state.set("hidden", z).set("reward", reward)

    class Env(envs.ModelBasedEnvBase):
        """Remembers the last candidates and their returns, because the planners return one action only."""

        def __init__(self) -> None:
            super().__init__(World(), device=device)
            hidden = data.Unbounded((case.latent,), device=device)
            self.state_spec = data.Composite(hidden=hidden)
            self.observation_spec = data.Composite(hidden=hidden.clone())
            self.action_spec = data.Bounded(-1, 1, (size,), device=device)
            self.reward_spec = data.Unbounded((1,), device=device)

        def _reset(self, tensordict: Any, **_: Any) -> Any:
            return tensordict

        def rollout(self, *args: Any, **kwargs: Any) -> Any:
            result = super().rollout(*args, **kwargs)
            self.last = result["action"], result["next", "reward"].sum(-2)
            return result

    class ReturnToGo(nn.Module):
        """The sum of the rewards that follow, as the advantage of MPPI: the leanest that it takes. It is counted from the
        best candidate, because MPPIPlanner takes its exponential as it is."""

        def forward(self, state: Any) -> Any:
            to_go = state["next", "reward"].flip(-2).cumsum(-2).flip(-2)
            return state.set("advantage", to_go - to_go.amax(1, keepdim=True))

    env = Env()
    sizes = {
        "planning_horizon": case.horizon, "optim_steps": case.iterations, "num_candidates": case.samples,
        "top_k": case.elites,
    }  # fmt: skip
    inverse = 1 / problem.temperature
    planners = {
        "cem": (modules.CEMPlanner(env, **sizes), 0.0),  # elites count alike
        "mppi": (modules.MPPIPlanner(env, ReturnToGo(), temperature=inverse, **sizes), inverse),
    }

    def run(planner: Any, sharpness: float) -> Plan:
        @torch.no_grad()
        def plan() -> Tensor:
            done = torch.zeros(case.envs, 1, dtype=torch.bool, device=device)
            state = {"hidden": problem.z, "done": done, "terminated": done}
            planner.planning(tensordict.TensorDict(state, [case.envs], device=device))
            actions, returns = env.last  # the mean that the planner took its action from
            best = returns.squeeze(-1).topk(case.elites, 1)
            elites = actions.gather(1, best.indices[..., None, None].expand(-1, -1, *actions.shape[2:]))
            weights = torch.softmax(sharpness * best.values, 1)
            return (weights[..., None, None] * elites).sum(1)

        return plan

    return {(name, ""): run(planner, sharpness) for name, (planner, sharpness) in planners.items()}


# name on the package index -> what must be importable, and what makes its planners
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "stable-worldmodel": (("stable_worldmodel.solver",), _stable_worldmodel),
    "pytorch-mppi": (("pytorch_mppi",), _pytorch_mppi),
    "torchrl": (("torchrl.envs.model_based", "torchrl.modules.planners"), _torchrl),
}
