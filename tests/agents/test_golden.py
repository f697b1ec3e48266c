"""Golden cases of the reference implementations: ours agree, mistakes are caught, the script keeps its contract."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clbench.agents import crl as crl_module
from clbench.agents import gcivl as gcivl_module
from clbench.agents import hilp as hilp_module
from clbench.agents import hiql as hiql_module
from clbench.agents import qrl as qrl_module
from clbench.agents.crl import CRL
from clbench.agents.gcbc import GCBC
from clbench.agents.gciql import GCIQL
from clbench.agents.gcivl import GCIVL
from clbench.agents.gcrl import losses, networks, quasimetrics
from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.agents.gcrl.networks import MLP, Input
from clbench.agents.hilp import HILP
from clbench.agents.hiql import HIQL
from clbench.agents.qrl import QRL
from clbench.errors import DataError
from clbench.testing.golden import Case, check_case, load_parameters, make_agent, make_batch, read_case, read_cases

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "golden_gcrl"
CASES = {case.name: case for case in read_cases(FOLDER)}
DEFAULTS: Any = MLP.__init__.__kwdefaults__
AGENTS = {"gcbc": GCBC, "gcivl": GCIVL, "gciql": GCIQL, "qrl": QRL, "crl": CRL, "hiql": HIQL, "hilp": HILP}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    outcome = check_case(CASES[name])
    assert outcome.ok, str(outcome)
    assert {"loss", "gradients", "parameters after 1"} <= outcome.errors.keys()


def test_every_agent_and_every_parameter_is_checked() -> None:
    assert {case.agent for case in CASES.values()} == AGENTS.keys()
    for case in CASES.values():
        assert case.part("params").keys() == case.part("grads").keys() == case.part("params_after1").keys()


# -- mistakes that the check must catch ----------------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], Any]
MISTAKES: dict[str, tuple[str, Patch]] = {}


def mistake(case: str) -> Callable[[Patch], Patch]:
    """Register a mistake: it patches the code, or returns an agent class to check in place of the real one."""

    def register(patch: Patch) -> Patch:
        MISTAKES[f"{patch.__name__}, {case}"] = case, patch
        return patch

    return register


GCIVL_CASE, CRL_CASE, CRL_AWR = "gcivl_default", "crl_actor_loss-ddpgbc_alpha-0.1", "crl_actor_loss-awr_alpha-3.0"
DDPG, AWR = "gciql_actor_loss-ddpgbc_alpha-0.3", "gciql_actor_loss-awr_alpha-3.0"
QRL_CASE, QRL_AWR, HIQL_CASE = "qrl_actor_loss-ddpgbc_alpha-0.003", "qrl_actor_loss-awr_alpha-3.0", "hiql_default"
HILP_CASE = "hilp_gcrl_default"


@mistake(GCIVL_CASE)
@mistake(HILP_CASE)
def layer_norm_before_the_activation(m: pytest.MonkeyPatch) -> None:
    def forward(self: MLP, x: Tensor, *, frozen: bool = False) -> Tensor:
        def p(group: Any, i: int) -> Tensor:
            return group[i].detach() if frozen else group[i]

        h, last = x.expand(len(self.kernels[0]), *x.shape), len(self.kernels) - 1
        for i in range(last + 1):
            h = torch.baddbmm(p(self.biases, i)[:, None], h, p(self.kernels, i))
            if i < last:
                if len(self.scales):
                    h = functional.layer_norm(h, h.shape[-1:], eps=1e-6)
                    h = h * p(self.scales, i)[:, None] + p(self.shifts, i)[:, None]
                h = self.activation(h)
        return h[0] if self.members is None else h

    m.setattr(MLP, "forward", forward)


@mistake(GCIVL_CASE)
@mistake(QRL_CASE)
@mistake(HIQL_CASE)
def layer_norm_with_the_eps_of_torch(m: pytest.MonkeyPatch) -> None:
    m.setattr(networks, "LAYER_NORM_EPS", 1e-5)


@mistake("gcbc_default")
@mistake(GCIVL_CASE)
def exact_gelu(m: pytest.MonkeyPatch) -> None:
    m.setitem(DEFAULTS, "activation", functional.gelu)


@mistake("gcbc_default")
def relu_for_gelu(m: pytest.MonkeyPatch) -> None:
    m.setitem(DEFAULTS, "activation", torch.relu)


@mistake(HILP_CASE)
def gelu_for_relu_in_the_skill_policy(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HILP):
        def build(self, rng: torch.Generator) -> dict[str, nn.Module]:
            built = super().build(rng)
            built["skill_actor"].net.mlp.activation = networks.gelu  # type: ignore[union-attr]
            return built

    return Broken


@mistake(GCIVL_CASE)
@mistake(AWR)
@mistake(HIQL_CASE)
def targets_move_after_the_step(m: pytest.MonkeyPatch) -> None:
    def update(self: GoalAgent, batch: GoalBatch) -> dict[str, Tensor]:
        loss, info = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.update_targets()
        return info

    m.setattr(GoalAgent, "update", update)


@mistake(GCIVL_CASE)
@mistake(AWR)
@mistake(HIQL_CASE)
@mistake(HILP_CASE)
def targets_stand_still(m: pytest.MonkeyPatch) -> None:
    m.setattr(GoalAgent, "update_targets", lambda self: None)


@mistake("gcbc_default")
@mistake(QRL_CASE)
def weight_decay(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        GoalAgent, "new_optimizer", lambda self: torch.optim.AdamW(self.trainables, self.config.lr, weight_decay=0.1)
    )


@mistake("gcbc_default")
def another_eps_of_adam(m: pytest.MonkeyPatch) -> None:
    m.setattr(GoalAgent, "new_optimizer", lambda self: torch.optim.Adam(self.trainables, self.config.lr, eps=1e-5))


def value_loss_with(*, smallest_in_residual: bool = False, own_weight: bool = False,
                    terminal: bool = True, mean_of_members: bool = False) -> Callable[..., Tensor]:  # fmt: skip
    def loss(v: Tensor, target_v: Tensor, target_next: Tensor, at_goal: Tensor, discount: float, k: float) -> Tensor:
        r, m = at_goal - 1, 1 - at_goal if terminal else torch.ones_like(at_goal)
        least = target_next.amin(0)
        q = r + discount * m * (least.expand_as(v) if smallest_in_residual else target_next)
        advantage = q - v if own_weight else r + discount * m * least - target_v.mean(0)
        terms = losses.expectile_loss(advantage, q - v, k).mean(1)
        return terms.mean() if mean_of_members else terms.sum()

    return loss


VALUE_MISTAKES: dict[str, dict[str, bool]] = {
    "none": {},
    "min over members in the residual": {"smallest_in_residual": True},
    "weight from the residual of the member": {"own_weight": True},
    "bootstraps beyond the goal": {"terminal": False},
    "mean over members for their sum": {"mean_of_members": True},
}


@pytest.mark.parametrize("case", [GCIVL_CASE, HIQL_CASE, HILP_CASE])
@pytest.mark.parametrize("wrong", VALUE_MISTAKES)
def test_mistakes_in_the_implicit_value_loss_are_caught(monkeypatch: pytest.MonkeyPatch, wrong: str, case: str) -> None:
    loss = value_loss_with(**VALUE_MISTAKES[wrong])
    for module in (gcivl_module, hiql_module, hilp_module):
        monkeypatch.setattr(module, "implicit_v_loss", loss)
    assert check_case(CASES[case]).ok == (wrong == "none")


@mistake(GCIVL_CASE)
def expectile_of_the_wrong_side(m: pytest.MonkeyPatch) -> None:
    right = losses.expectile_loss
    m.setattr(gcivl_module, "expectile_loss", lambda a, d, k: right(a, d, 1 - k))


@mistake(GCIVL_CASE)
def advantage_for_the_policy_from_the_target(m: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(GCIVL):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            online, target = self.value, self.target_value
            stand_in = lambda *x: online(*x) if torch.is_grad_enabled() else target(*x)  # noqa: E731
            object.__setattr__(self, "value", stand_in)
            try:
                return super().loss(batch)
            finally:
                object.__setattr__(self, "value", online)

    return Broken


@mistake(AWR)
def target_critic_in_the_policy_of_gciql(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(GCIQL):
        def actor_loss(self, batch: GoalBatch, a: Tensor) -> Tensor:
            with torch.no_grad():
                q = self.target_critic(batch.s, batch.g_a, extra=a).amin(0)
                advantage = q - self.value(batch.s, batch.g_a)
            return losses.awr_loss(self.actor(batch.s, batch.g_a), batch.a, advantage, self.config.alpha)

    return Broken


@mistake(AWR)
def online_critic_in_the_value_of_gciql(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(GCIQL):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            target = self.target_critic
            object.__setattr__(self, "target_critic", self.critic)
            try:
                return super().loss(batch)
            finally:
                object.__setattr__(self, "target_critic", target)

    return Broken


@mistake(HILP_CASE)
def online_critic_in_the_policy_of_hilp(m: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HILP):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            z = batch.more["skills"].flat
            assert z is not None
            with torch.no_grad():
                q = self.skill_critic(batch.s, extra=torch.cat([z, batch.a], 1)).amin(0)
                advantage = q - self.skill_value(batch.s, extra=z)
            right = losses.awr_loss
            m.setattr(hilp_module, "awr_loss", lambda p, a, _, alpha: right(p, a, advantage, alpha))
            return super().loss(batch)

    return Broken


@mistake(HILP_CASE)
def skills_that_end_at_the_goal(m: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HILP):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            value, going_on = self.skill_value, 1 - batch.at_goal
            networks_with_mask = lambda s, *, extra: (  # noqa: E731
                value(s, extra=extra) if torch.is_grad_enabled() else value(s, extra=extra) * going_on
            )
            object.__setattr__(self, "skill_value", networks_with_mask)
            try:
                return super().loss(batch)
            finally:
                object.__setattr__(self, "skill_value", value)

    return Broken


@mistake(HILP_CASE)
def skills_after_the_second_member(m: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HILP):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            phi = self.phi
            object.__setattr__(self, "phi", lambda x: phi(x).flip(0))  # the value loss is symmetric in its members,
            target = self.target_phi
            object.__setattr__(self, "target_phi", lambda x: target(x).flip(0))  # but the reward is not
            try:
                return super().loss(batch)
            finally:
                object.__setattr__(self, "phi", phi)
                object.__setattr__(self, "target_phi", target)

    return Broken


@mistake(GCIVL_CASE)
@mistake(AWR)
@mistake(HIQL_CASE)
def weights_normalised_over_the_batch(m: pytest.MonkeyPatch) -> None:
    def awr(policy: Any, action: Tensor, advantage: Tensor, alpha: float) -> Tensor:
        return -(torch.softmax(alpha * advantage, 0) * len(advantage) * policy.log_prob(action)).mean()

    patch_everywhere(m, "awr_loss", awr)


@mistake(GCIVL_CASE)
def alpha_as_a_divisor(m: pytest.MonkeyPatch) -> None:
    right = losses.awr_loss
    patch_everywhere(m, "awr_loss", lambda p, a, adv, alpha: right(p, a, adv, 1 / alpha))


def patch_everywhere(m: pytest.MonkeyPatch, name: str, function: Any) -> None:
    for cls in AGENTS.values():
        module = sys.modules[cls.__module__]
        if hasattr(module, name):
            m.setattr(module, name, function)


def ddpg_with(*, scale: bool = True, into_scale: bool = False) -> Callable[..., Tensor]:
    def loss(policy: Any, action: Tensor, q: Tensor, alpha: float) -> Tensor:
        size = q.abs().mean() + 1e-6 if scale else torch.ones(())
        return -q.mean() / (size if into_scale else size.detach()) - alpha * policy.log_prob(action).mean()

    return loss


@mistake(DDPG)
@mistake(QRL_CASE)
@mistake(CRL_CASE)
def q_without_its_scale(m: pytest.MonkeyPatch) -> None:
    patch_everywhere(m, "ddpg_bc_loss", ddpg_with(scale=False))


@mistake(DDPG)
@mistake(QRL_CASE)
@mistake(CRL_CASE)
def gradient_into_the_scale_of_q(m: pytest.MonkeyPatch) -> None:
    patch_everywhere(m, "ddpg_bc_loss", ddpg_with(into_scale=True))


@mistake(DDPG)
@mistake(CRL_CASE)
@mistake(QRL_CASE)
def critic_trained_by_the_policy_loss(m: pytest.MonkeyPatch) -> None:
    m.setattr(networks, "_use", lambda parameter, frozen: parameter)


@mistake(CRL_CASE)
@mistake(CRL_AWR)
def info_nce(m: pytest.MonkeyPatch) -> None:
    def loss(phi: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        logits = phi @ psi.mT / phi.shape[-1] ** 0.5
        return -torch.log_softmax(logits, -1).diagonal(dim1=-2, dim2=-1).mean(), logits

    m.setattr(crl_module, "contrastive_loss", loss)


@mistake(CRL_CASE)
@mistake(CRL_AWR)
def logits_without_the_root_of_their_size(m: pytest.MonkeyPatch) -> None:
    right = crl_module.contrastive_loss
    m.setattr(crl_module, "contrastive_loss", lambda phi, psi: right(phi * phi.shape[-1] ** 0.5, psi))


@mistake(HIQL_CASE)
def representation_of_another_length(m: pytest.MonkeyPatch) -> None:
    m.setattr(hiql_module, "length_normalise", lambda x: functional.normalize(x, dim=-1))


@mistake(HIQL_CASE)
def no_renormalisation_of_what_the_high_policy_proposes(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HIQL):
        def policy(self, s: Input, g: Input, achieved: Input, **_: Any) -> Any:
            return self.low_actor(s, extra=self.high_actor(s, g).mode)

    return Broken


@mistake(HIQL_CASE)
def low_policy_trains_the_representation(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HIQL):
        def loss(self, batch: GoalBatch) -> tuple[Tensor, dict[str, Tensor]]:
            self.config = copy.copy(self.config)
            self.config.low_actor_rep_grad = True
            return super().loss(batch)

    return Broken


@mistake(HIQL_CASE)
def value_does_not_train_the_representation(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(HIQL):
        def rho(self, s: Input, g: Input) -> Tensor:
            return super().rho(s, g).detach()

    return Broken


@mistake(QRL_CASE)
def dynamics_do_not_train_the_latents(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(QRL):
        def dynamics_loss(self, batch: GoalBatch, z: Tensor, z_next: Tensor) -> Tensor:
            return super().dynamics_loss(batch, z.detach(), z_next.detach())

    return Broken


@mistake(QRL_CASE)
def dynamics_in_one_direction_only(_: pytest.MonkeyPatch) -> type[GoalAgent]:
    class Broken(QRL):
        def dynamics_loss(self, batch: GoalBatch, z: Tensor, z_next: Tensor) -> Tensor:
            return self.quasimetric(self.step(z, batch.context, batch.a), z_next).mean()

    return Broken


@mistake(QRL_CASE)
@mistake(QRL_AWR)
def lengths_of_intervals_that_overlap_are_added(m: pytest.MonkeyPatch) -> None:
    m.setattr(quasimetrics, "union_lengths", lambda x, y: torch.relu(y - x).sum(-1))


@mistake(QRL_CASE)
@mistake(QRL_AWR)
def the_distance_in_the_other_direction(m: pytest.MonkeyPatch) -> None:
    right = quasimetrics.union_lengths
    m.setattr(quasimetrics, "union_lengths", lambda x, y: right(y, x))


@mistake(QRL_CASE)
@mistake(QRL_AWR)
def multiplier_without_a_gradient(m: pytest.MonkeyPatch) -> None:
    m.setattr(qrl_module.Multiplier, "forward", lambda self: self.log_value.exp().detach())


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case, patch = MISTAKES[name]
    broken = patch(monkeypatch)
    outcome = check_case(CASES[case], broken)
    assert not outcome.ok, str(outcome)


# -- the file format: cases written from our own agents ------------------------------------------------------------------

# our networks -> the reference's names (specification, section 15); the actor's last layer has a name of its own
NAMES: Mapping[str, Mapping[str, str]] = {
    "*": {
        "value": "modules_value/value_net", "target_value": "modules_target_value/value_net",
        "critic": "modules_critic/value_net", "target_critic": "modules_target_critic/value_net",
        "actor": "modules_actor", "low_actor": "modules_low_actor", "high_actor": "modules_high_actor",
        "goal_rep": "modules_goal_rep/layers_0", "phi": "modules_value/phi", "dynamics": "modules_dynamics",
        "critic_phi": "modules_critic/phi", "critic_psi": "modules_critic/psi",
        "value_phi": "modules_value/phi", "value_psi": "modules_value/psi",
    },
}  # fmt: skip
LEAVES = {"kernels": "Dense_{}/kernel", "biases": "Dense_{}/bias", "scales": "LayerNorm_{}/scale",
          "shifts": "LayerNorm_{}/bias"}  # fmt: skip


def reference_name(agent: GoalAgent, name: str) -> tuple[str, bool]:
    """The reference's name of one of our parameters, and whether its first axis is only ours."""
    network, *path = name.split(".")
    if name == "quasimetric.alpha":
        return "modules_value/alpha/value", False
    if name == "multiplier.log_value":
        return "modules_lam/log_value", False
    theirs = NAMES["*"][network]
    if path == ["log_std"]:
        return f"{theirs}/log_stds", False
    mlp: Any = agent.networks.get_submodule(f"{network}.{'net.' if path[0] == 'net' else ''}mlp")
    kind, number = path[-2], int(path[-1])
    leaf = LEAVES[kind].format(number)
    if path[0] == "net":
        discrete = agent.discrete and network != "high_actor"
        last = number == len(mlp.kernels) - 1
        leaf = f"{'logit_net' if discrete else 'mean_net'}/{leaf.split('/')[1]}" if last else f"actor_net/{leaf}"
    return f"{theirs}/{leaf}", mlp.members is None


def export(agent: GoalAgent, values: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    out = {}
    for name, value in values.items():
        theirs, own_axis = reference_name(agent, name)
        out[f"{prefix}/{theirs}"] = (value[0] if own_axis else value).detach().numpy().copy()
    return out


def write_case(base: str, **changes: Any) -> Case:
    """A case of our own agent, with the batch of ``base`` and other options."""
    source = CASES["gcbc_discrete-True" if changes.get("discrete") else base]
    config = {**CASES[base].config, **changes}
    batch = {f"batch/{k}": v for k, v in source.part("batch").items()}
    blank = {"params/modules_actor/logit_net/bias": np.zeros(4, np.float32)}
    agent = make_agent(Case("blank", CASES[base].agent, config, {**batch, **blank}))
    rng = torch.Generator().manual_seed(1)
    own = dict(agent.networks.named_parameters())
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(torch.randn(parameter.shape, generator=rng) * 0.1)
    arrays: dict[str, np.ndarray] = {**batch, **export(agent, own, "params")}
    case = Case(base, CASES[base].agent, config, arrays)
    rows = make_batch(case)
    loss, _ = agent.loss(rows)
    loss.backward()
    arrays["total_loss"] = loss.detach().numpy()
    gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in own.items()}
    arrays.update(export(agent, gradients, "grads"))
    with torch.no_grad():
        policy = agent.policy(rows.s, rows.g_a, rows.achieved, rng=rng, temperature=0.0)
    arrays["greedy_actions"] = (policy.mode if agent.discrete else policy.mode.clamp(-1, 1)).numpy()
    for step in range(1, 6):
        agent.update(rows)
        if step in (1, 5):
            arrays.update(export(agent, own, f"params_after{step}"))
    return case


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.agent != "hilp"])
def test_our_writer_gives_parameters_the_names_of_the_reference(name: str) -> None:
    case = CASES[name]
    agent = make_agent(case)
    names = {reference_name(agent, n)[0]: n for n in dict(agent.networks.named_parameters())}
    assert names.keys() == case.part("params").keys()


# configurations without a file here
OTHERS = [
    ("gcbc_default", {"const_std": False}),
    (GCIVL_CASE, {"discrete": True}),
    (GCIVL_CASE, {"const_std": False}),
    (AWR, {"discrete": True}),
    (CRL_AWR, {"discrete": True}),
    (QRL_CASE, {"quasimetric_type": "mrn"}),
    (QRL_AWR, {"quasimetric_type": "mrn"}),
    (HIQL_CASE, {"low_actor_rep_grad": True}),
    (HIQL_CASE, {"const_std": False}),
]


@pytest.mark.parametrize(("base", "changes"), OTHERS, ids=[f"{b} {c}" for b, c in OTHERS])
def test_cases_of_other_configurations_are_read(base: str, changes: dict[str, Any]) -> None:
    case = write_case(base, **changes)
    names = case.part("params")
    assert check_case(case).ok
    if changes.get("const_std") is False:
        assert any(n.endswith("actor/log_stds") for n in names)
    if "quasimetric_type" in changes:
        assert "modules_value/alpha/value" not in names
    if changes.get("discrete"):
        assert "modules_actor/logit_net/kernel" in names
    if changes.get("low_actor_rep_grad"):  # as it must differ from the case without
        wrong = Case(case.name, case.agent, {**case.config, "low_actor_rep_grad": False}, case.arrays)
        assert not check_case(wrong).ok


@pytest.mark.parametrize("base", ["gcbc_discrete-True", "qrl_actor_loss-awr_alpha-3.0_discrete-True", AWR, HILP_CASE])
def test_any_precision_is_read(base: str) -> None:
    def other(v: np.ndarray) -> np.ndarray:
        return v.astype(np.int64 if v.dtype.kind == "i" else np.float64)

    case = CASES[base]
    changed = Case(case.name, case.agent, case.config, {k: other(v) for k, v in case.arrays.items()})
    assert check_case(changed).ok


def test_every_single_number_counts() -> None:
    """Also NaN, which compares as neither larger nor smaller."""
    case = CASES[GCIVL_CASE]
    for key in ("total_loss", "grads/modules_value/value_net/Dense_1/kernel", "greedy_actions",
                "grads/modules_target_value/value_net/Dense_0/bias", "params_after5/modules_actor/mean_net/bias",
                "params_after1/modules_target_value/value_net/LayerNorm_0/scale"):  # fmt: skip
        for wrong in (np.nan, np.inf, 0.01):
            value = np.array(case.arrays[key], copy=True)
            value.reshape(-1)[-1] += wrong
            assert not check_case(Case(case.name, case.agent, case.config, {**case.arrays, key: value})).ok, (
                key,
                wrong,
            )


def test_parameters_that_are_not_ours_or_missing_are_named() -> None:
    case = CASES[GCIVL_CASE]
    agent, params = make_agent(case), case.part("params")
    with pytest.raises(DataError, match="sets no value for .*actor.net.mlp.biases.2"):
        load_parameters(agent, {k: v for k, v in params.items() if k != "modules_actor/mean_net/bias"})
    with pytest.raises(DataError, match=r"Unknown parameter 'modules_critic2/Dense_0/bias'"):
        load_parameters(agent, {**params, "modules_critic2/Dense_0/bias": np.zeros(1, np.float32)})
    with pytest.raises(DataError, match=r"actor.log_std, which agent 'gcivl' does not have"):
        load_parameters(agent, {**params, "modules_actor/log_stds": np.zeros(2, np.float32)})
    with pytest.raises(DataError, match=r"has shape \(1, 5\), but ours \(1, 2\)"):
        load_parameters(agent, {**params, "modules_actor/mean_net/bias": np.zeros(5, np.float32)})


# -- the script ----------------------------------------------------------------------------------------------------------


def script(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_golden.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Two good cases, which tests may spoil."""
    index = [e for e in json.loads((FOLDER / "index.json").read_text()) if e["agent"] == "gcbc"]
    for entry in index:
        (tmp_path / entry["file"]).write_bytes((FOLDER / entry["file"]).read_bytes())
    (tmp_path / "index.json").write_text(json.dumps(index))
    yield tmp_path


def test_script_counts_what_passed_and_what_failed(folder: Path) -> None:
    done = script(folder)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "2 passed, 0 failed"), done
    index = json.loads((folder / "index.json").read_text())
    case = read_case(folder, index[0])
    np.savez(folder / index[0]["file"], **{**case.arrays, "total_loss": case.arrays["total_loss"] * 1.001})
    (folder / index[1]["file"]).write_bytes(b"PK\x03\x04 cut off")
    third = {**index[0], "file": "third.npz"}
    (folder / "third.npz").write_bytes((FOLDER / index[0]["file"]).read_bytes())
    (folder / "index.json").write_text(json.dumps([*index, third]))
    done = script(folder)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 passed, 2 failed"), done
    assert [line.split()[:2] for line in done.stdout.splitlines()[:-1]] == [
        ["FAILED", "gcbc_default"], ["FAILED", "gcbc_discrete-True"], ["passed", "third"]
    ]  # fmt: skip


def test_script_refuses_a_folder_without_cases(tmp_path: Path) -> None:
    done = script(tmp_path)
    assert done.returncode == 2
    assert "index.json" in done.stderr
    for text in ("[]", "{", '{"file": 1}'):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(DataError, match="index.json"):
            list(read_cases(tmp_path))
