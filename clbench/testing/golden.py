"""Golden cases: one batch, all parameters, and what the reference implementation computed from them.

A folder holds ``index.json`` (a list of ``{"file", "agent", "config", ...}``) and one ``.npz`` per case with the keys
``batch/*``, ``params/*``, ``total_loss``, ``grads/*``, ``params_after1/*``, ``params_after5/*`` (after steps of Adam on
the same batch) and ``greedy_actions``. Kernels are (in, out), ensembles have a leading axis; names are those of Flax.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import Tensor

from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.agents.gcrl.networks import Input
from clbench.config import build
from clbench.contracts import Spaces
from clbench.errors import DataError
from clbench.registry import resolve

LOSS, GRADIENTS, PARAMETERS = 1e-5, 1e-4, 2e-6  # tolerances

# option of the reference -> ours; anything else of the same name is taken over, where the agent has it
OPTIONS = {
    "eps": "epsilon", "quasimetric_type": "quasimetric", "skill_temperature": "alpha",
    "value_p_curgoal": "value_p_current", "value_p_trajgoal": "value_p_trajectory",
    "value_p_randomgoal": "value_p_random", "value_geom_sample": "value_geometric",
    "actor_p_trajgoal": "actor_p_trajectory", "actor_p_randomgoal": "actor_p_random",
}  # fmt: skip

# network of the reference -> ours, by agent; "*" for all
NETWORKS: Mapping[str, Mapping[str, str]] = {
    "*": {
        "modules_actor": "actor.net.mlp", "modules_value/value_net": "value.mlp", "modules_critic/value_net": "critic.mlp",
        "modules_target_value/value_net": "target_value.mlp", "modules_target_critic/value_net": "target_critic.mlp",
    },
    "crl": {
        "modules_critic/phi": "critic_phi.mlp", "modules_critic/psi": "critic_psi.mlp",
        "modules_value/phi": "value_phi.mlp", "modules_value/psi": "value_psi.mlp",
    },
    "qrl": {"modules_value/phi": "phi.mlp", "modules_dynamics": "dynamics.mlp"},
    "hiql": {
        "modules_goal_rep/layers_0": "goal_rep.mlp", "modules_low_actor": "low_actor.net.mlp",
        "modules_high_actor": "high_actor.net.mlp",
    },
    "hilp": {
        "networks_value/phi": "phi.mlp", "networks_target_value/phi": "target_phi.mlp",
        "networks_skill_value": "skill_value.mlp", "networks_skill_critic": "skill_critic.mlp",
        "networks_skill_target_critic": "target_skill_critic.mlp", "networks_skill_actor": "skill_actor.net.mlp",
    },
}  # fmt: skip
SCALARS = {
    "modules_actor/log_stds": "actor.log_std", "networks_skill_actor/log_stds": "skill_actor.log_std",
    "modules_low_actor/log_stds": "low_actor.log_std", "modules_high_actor/log_stds": "high_actor.log_std",
    "modules_value/alpha/value": "quasimetric.alpha", "modules_lam/log_value": "multiplier.log_value",
}  # fmt: skip
KINDS = {
    ("Dense", "kernel"): "kernels", ("Dense", "bias"): "biases",
    ("LayerNorm", "scale"): "scales", ("LayerNorm", "bias"): "shifts",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Of one case: the errors by name, and the tolerance that each must stay below."""

    name: str
    errors: Mapping[str, tuple[float, float]]

    @property
    def ok(self) -> bool:
        return all(error < tolerance for error, tolerance in self.errors.values())  # NaN fails

    def __str__(self) -> str:
        parts = [f"{k} {e:.1e}{'' if e < t else f' (must be below {t:.0e})'}" for k, (e, t) in self.errors.items()]
        return f"{'passed' if self.ok else 'FAILED'}  {self.name:<46} {', '.join(parts)}"


@dataclass(frozen=True)
class Case:
    """A golden case, read from its file."""

    name: str
    agent: str
    config: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]

    def part(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays below ``prefix/``, by the rest of their names."""
        return {k.removeprefix(prefix + "/"): v for k, v in self.arrays.items() if k.startswith(prefix + "/")}


def read_index(folder: str | Path) -> list[Mapping[str, Any]]:
    """The entries of ``index.json``, one per case.

    Raises:
        DataError: there is no index, or it lists no cases.
    """
    path = Path(folder) / "index.json"
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}. Name a folder of golden cases.") from error
    if not isinstance(index, list) or not index:
        raise DataError(f"{path} is not a list of golden cases.")
    return index


def read_case(folder: str | Path, entry: Mapping[str, Any]) -> Case:
    """The case of an entry of the index.

    Raises:
        DataError: its file is missing or damaged.
    """
    path = Path(folder) / Path(entry["file"]).name
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"Cannot read {path}: {error}.") from error
    return Case(path.stem, entry["agent"], entry["config"], arrays)


def read_cases(folder: str | Path) -> Iterator[Case]:
    """The cases of ``index.json``.

    Raises:
        DataError: no index, or a file that is missing or damaged.
    """
    for entry in read_index(folder):
        yield read_case(folder, entry)


def check_case(case: Case, agent_class: type[GoalAgent] | None = None) -> Outcome:
    """Loss, gradients, parameters after one and five steps, and greedy actions, beside the reference's.

    Args:
        agent_class: check this class instead of the registered one.
    """
    agent = make_agent(case, agent_class)
    batch = make_batch(case)
    load_parameters(agent, case.part("params"))
    errors: dict[str, tuple[float, float]] = {}
    loss, _ = agent.loss(batch)
    expected = float(case.arrays["total_loss"])
    errors["loss"] = abs(loss.item() - expected) / max(abs(expected), 1e-12), LOSS
    agent.optimizer.zero_grad()
    loss.backward()
    own = dict(agent.networks.named_parameters())
    gradients = [_gradient_error(agent, own, name, g) for name, g in case.part("grads").items()]
    errors["gradients"] = _worst(gradients), GRADIENTS
    if "greedy_actions" in case.arrays:
        errors["actions"] = _action_error(agent, batch, case.arrays["greedy_actions"]), 1e-5
    for step in range(1, 6):
        agent.update(batch)
        after = case.part(f"params_after{step}")
        if after:
            distances = [_distance(agent, own, name, value) for name, value in after.items()]
            errors[f"parameters after {step}"] = _worst(distances), PARAMETERS
    return Outcome(case.name, errors)


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN if any is (``max`` of Python would depend on the order)."""
    return float(np.max(errors))


def check_folder(folder: str | Path) -> Iterator[Outcome]:
    """One outcome per case of a folder."""
    for case in read_cases(folder):
        yield check_case(case)


# -- from the reference's names to ours ----------------------------------------------------------------------------------


def make_agent(case: Case, agent_class: type[GoalAgent] | None = None) -> GoalAgent:
    """The agent with the configuration of the case, on the spaces of its batch."""
    cls = agent_class or resolve("agents", case.agent)
    batch, given = case.part("batch"), dict(case.config)
    options: dict[str, Any] = {"preset": "ogbench", "learn_std": not given.pop("const_std", case.agent != "hilp")}
    options["hidden"] = tuple(given.pop("actor_hidden_dims", None) or given.pop("hidden_dims"))
    for name, value in given.items():
        name = OPTIONS.get(name, name)
        if name in cls.Config.__dataclass_fields__ and value is not None:
            options[name] = value.replace("ddpgbc", "ddpg-bc") if isinstance(value, str) else value
    size = batch["observations"].shape[1]
    goal = Box(-np.inf, np.inf, (size,), np.float32)
    action: Any = Box(-1, 1, (batch["actions"].shape[-1],), np.float32)
    if given.get("discrete"):
        action = Discrete(_classes(case))
    spaces = Spaces(Dict(dict.fromkeys(("observation", "achieved_goal", "desired_goal"), goal)), action)
    rng = torch.Generator().manual_seed(0)
    return cls(spaces, build(cls.Config, options, where=f"case {case.name}"), device=torch.device("cpu"), rng=rng)


def _classes(case: Case) -> int:
    biases = [v for k, v in case.part("params").items() if k.endswith("logit_net/bias")]
    return len(biases[0])


def make_batch(case: Case) -> GoalBatch:
    """The batch of the case; every goal that agents draw is in it."""
    arrays = {k: torch.from_numpy(v) for k, v in case.part("batch").items()}
    arrays = {k: v if k == "actions" else v.to(torch.float32) for k, v in arrays.items()}

    def given(name: str, otherwise: str = "goals") -> Input:
        return Input(arrays.get(name, arrays.get(otherwise)))

    s, s_next = given("observations"), given("next_observations")
    actions = arrays["actions"].to(torch.int64 if case.config.get("discrete") else torch.float32)
    more = {k: Input(v) for k, v in arrays.items() if k.startswith(("low_", "high_", "skills"))}
    at_goal = 1 - arrays["masks"]
    return GoalBatch(
        s, s_next, given("value_goals"), given("actor_goals"), actions, at_goal, s, s_next, Input(None), more
    )


def locate(agent: GoalAgent, name: str) -> tuple[str, bool]:
    """The name of our parameter for one of the reference, and whether it has the axis of members in both."""
    if name in SCALARS:
        return SCALARS[name], True
    for table in (NETWORKS.get(agent.name, {}), NETWORKS["*"]):
        for theirs, ours in table.items():
            if name.startswith(theirs + "/"):
                mlp: Any = agent.networks.get_submodule(ours)
                layer = _layer(ours, name.removeprefix(theirs + "/"), len(mlp.kernels) - 1)
                return f"{ours}.{layer}", mlp.members is not None
    raise DataError(f"Unknown parameter {name!r} of agent {agent.name!r} in a golden case.")


def _layer(ours: str, rest: str, last: int) -> str:
    *path, leaf = rest.split("/")
    if path[-1] in ("mean_net", "logit_net") or (ours.startswith("skill_actor") and path == ["Dense_0"]):
        return f"{KINDS['Dense', leaf]}.{last}"
    found = re.fullmatch(r"(Dense|LayerNorm|layers)_(\d+)", path[-1])
    if found is None:
        raise DataError(f"Unknown layer {rest!r} in a golden case.")
    return f"{KINDS[found[1].replace('layers', 'Dense'), leaf]}.{found[2]}"


def _as_ours(agent: GoalAgent, name: str, value: np.ndarray) -> tuple[str, Tensor]:
    """Our name, and the value in our shape."""
    ours, same = locate(agent, name)
    tensor = torch.from_numpy(np.asarray(value))
    return ours, tensor if same else tensor[None]


@torch.no_grad()
def load_parameters(agent: GoalAgent, values: Mapping[str, np.ndarray]) -> None:
    """Set every parameter to the reference's.

    Raises:
        DataError: one of ours is not among them, one is not ours, or they differ in shape.
    """
    own = dict(agent.networks.named_parameters())
    for name, value in values.items():
        ours, tensor = _as_ours(agent, name, value)
        parameter = own.pop(ours, None)
        if parameter is None:
            raise DataError(f"{name} is {ours}, which agent {agent.name!r} does not have here, or a second time.")
        if parameter.shape != tensor.shape:
            raise DataError(f"{name} has shape {tuple(tensor.shape)}, but ours {tuple(parameter.shape)}.")
        parameter.copy_(tensor)
    if own:
        raise DataError(f"The golden case sets no value for {', '.join(sorted(own))}.")


def _gradient_error(agent: GoalAgent, own: Mapping[str, Tensor], name: str, expected: np.ndarray) -> float:
    ours, tensor = _as_ours(agent, name, expected)
    gradient = own[ours].grad
    difference = tensor if gradient is None else gradient - tensor
    return float(difference.abs().max() / (1e-3 + tensor.abs().max()))


def _distance(agent: GoalAgent, own: Mapping[str, Tensor], name: str, expected: np.ndarray) -> float:
    ours, tensor = _as_ours(agent, name, expected)
    return float((own[ours].detach() - tensor).abs().max())


def _action_error(agent: GoalAgent, batch: GoalBatch, expected: np.ndarray) -> float:
    """The reference's actions are clipped to [-1, 1]; classes must be equal."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mode = agent.policy(batch.s, batch.g_a, batch.achieved, rng=rng, temperature=0.0).mode
    if not agent.discrete:
        mode = mode.clamp(-1, 1)
    return float((mode - torch.from_numpy(np.asarray(expected))).abs().max())
