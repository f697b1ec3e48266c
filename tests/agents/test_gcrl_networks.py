"""Networks, distances and losses of offline goal-conditioned RL: sizes, axioms, closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from clbench.agents.crl import CRL, contrastive_loss, similarity
from clbench.agents.gcbc import GCBC
from clbench.agents.gciql import GCIQL
from clbench.agents.gcivl import GCIVL, implicit_v_loss
from clbench.agents.gcrl.base import GoalAgent
from clbench.agents.gcrl.losses import awr_loss, ddpg_bc_loss, expectile_loss
from clbench.agents.gcrl.networks import MLP, Actor, Categorical, Gaussian, ImpalaSmall, Input, Shape
from clbench.agents.gcrl.presets import PRESETS
from clbench.agents.gcrl.quasimetrics import IQE, MRN, union_lengths
from clbench.agents.hilp import HILP, hilbert_value
from clbench.agents.hiql import HIQL, length_normalise
from clbench.agents.qrl import QRL
from clbench.config import build
from clbench.contracts import Spaces


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(cls: type[GoalAgent], obs: int, act: int, **options: Any) -> GoalAgent:
    state = Box(-np.inf, np.inf, (obs,), np.float32)
    spaces = Spaces(
        Dict({"observation": state, "achieved_goal": state, "desired_goal": state}), Box(-1, 1, (act,), np.float32)
    )
    config = build(cls.Config, {"preset": "ogbench", **options}, where="test")
    return cls(spaces, config, device=torch.device("cpu"), rng=rng())


# -- sizes (specification, section 3) ------------------------------------------------------------------------------------

SIZES: list[tuple[type[GoalAgent], dict[str, Any], dict[str, tuple[int, int]]]] = [
    (GCBC, {}, {"actor": (528_898, 559_624), "": (528_898, 559_624)}),
    (GCIVL, {}, {"value": (1_062_914, 1_118_210), "actor": (528_898, 559_624), "": (2_654_726, 2_796_044)}),
    (GCIQL, {}, {"value": (531_457, 559_105), "critic": (1_064_962, 1_126_402), "actor": (528_898, 559_624),
                 "": (3_190_279, 3_371_533)}),
    (QRL, {}, {"phi quasimetric": (792_577, 806_401), "dynamics": (1_054_720, 1_057_792), "multiplier": (1, 1),
               "actor": (528_898, 559_624), "": (2_376_196, 2_423_818)}),
    (CRL, {}, {"critic_phi critic_psi": (3_172_352, 3_233_792), "actor": (528_898, 559_624),
               "": (3_701_250, 3_793_416)}),
    (CRL, {"actor_loss": "awr"}, {"value_phi value_psi": (1_585_152, 1_612_800),
                                  "": (3_701_250 + 1_585_152, 3_793_416 + 1_612_800)}),
    (HIQL, {}, {"goal_rep": (536_074, 563_722), "value": (1_071_106, 1_098_754), "low_actor": (532_994, 549_896),
                "high_actor": (533_002, 560_650), "": (3_744_282, 3_871_776)}),
]  # fmt: skip


@pytest.mark.parametrize(("column", "obs", "act"), [(0, 2, 2), (1, 29, 8)])
@pytest.mark.parametrize(("cls", "options", "sizes"), SIZES, ids=[f"{c.__name__} {o}" for c, o, _ in SIZES])
def test_numbers_of_parameters(
    cls: type[GoalAgent], options: dict[str, Any], sizes: Any, column: int, obs: int, act: int
):
    agent = make(cls, obs, act, **options)
    for names, expected in sizes.items():
        if names:
            assert sum(p.numel() for n in names.split() for p in agent.networks[n].parameters()) == expected[column]
        else:
            assert agent.num_parameters == expected[column]


def test_number_of_parameters_of_hilp() -> None:
    """From the shapes in the specification, as its table has no line for HILP."""

    def mlp(*sizes: int, norm: bool) -> int:
        dense = sum(a * b + b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        return dense + (2 * sum(sizes[1:-1]) if norm else 0)

    obs, act, h, d = 2, 2, (512, 512, 512), 32
    phi, q = 2 * mlp(obs, *h, d, norm=True), 2 * mlp(obs + d + act, *h, 1, norm=True)
    actor = mlp(obs + d, *h, act, norm=False) + act
    assert make(HILP, obs, act).num_parameters == 2 * (phi + q) + mlp(obs + d, *h, 1, norm=True) + actor


# -- presets (specification, section 5) ----------------------------------------------------------------------------------


def config_of(cls: type[GoalAgent], preset: str) -> Any:
    return build(cls.Config, {"preset": preset}, where="test")


TABLE = [  # alpha of gcivl, gciql, qrl, crl; of hiql high, low; k; gamma; actor goals of the trajectory, of anywhere
    ("ogbench", 10, 0.3, 0.003, 0.1, 3, 3, 25, 0.99, 1, 0),
    ("pointmaze", 10, 0.003, 0.0003, 0.03, 3, 3, 25, 0.99, 1, 0),
    ("pointmaze-giant", 10, 0.003, 0.0003, 0.03, 3, 3, 25, 0.995, 1, 0),
    ("pointmaze-stitch", 10, 0.003, 0.0003, 0.03, 3, 3, 25, 0.99, 0.5, 0.5),
    ("pointmaze-giant-stitch", 10, 0.003, 0.0003, 0.03, 3, 3, 25, 0.995, 0.5, 0.5),
    ("antmaze", 10, 0.3, 0.003, 0.1, 3, 3, 25, 0.99, 1, 0),
    ("antmaze-giant", 10, 0.3, 0.003, 0.1, 3, 3, 25, 0.995, 1, 0),
    ("antmaze-stitch", 10, 0.3, 0.003, 0.1, 3, 3, 25, 0.99, 0.5, 0.5),
    ("antmaze-giant-stitch", 10, 0.3, 0.003, 0.1, 3, 3, 25, 0.995, 0.5, 0.5),
    ("antmaze-explore", 10, 0.01, 0.001, 0.003, 10, 10, 25, 0.99, 0, 1),
    ("humanoidmaze", 10, 0.1, 0.001, 0.1, 3, 3, 100, 0.995, 1, 0),
    ("humanoidmaze-stitch", 10, 0.1, 0.001, 0.1, 3, 3, 100, 0.995, 0.5, 0.5),
    ("antsoccer", 10, 0.1, 0.003, 0.3, 3, 3, 25, 0.99, 1, 0),
    ("antsoccer-stitch", 10, 0.1, 0.003, 0.3, 3, 3, 25, 0.99, 0.5, 0.5),
    ("manipulation-play", 10, 1, 0.3, 3, 3, 3, 10, 0.99, 1, 0),
    ("manipulation-noisy", 10, 0.03, 0.03, 0.1, 3, 3, 10, 0.99, 1, 0),
    ("powderworld", 3, 3, 3, 3, 3, 3, 10, 0.99, 1, 0),
]


@pytest.mark.parametrize("row", TABLE, ids=[r[0] for r in TABLE])
def test_presets_are_the_published_table(row: Any) -> None:
    preset, gcivl, gciql, qrl, crl, high, low, k, gamma, trajectory, anywhere = row
    configs = {cls: config_of(cls, preset) for cls in (GCBC, GCIVL, GCIQL, QRL, CRL, HIQL)}
    assert [configs[c].alpha for c in (GCIVL, GCIQL, QRL, CRL)] == [gcivl, gciql, qrl, crl]
    hiql = configs[HIQL]
    assert (hiql.high_alpha, hiql.low_alpha, hiql.subgoal_steps) == (high, low, k)
    for cls, config in configs.items():
        assert config.discount == gamma
        assert (config.hidden, config.lr) == ((512, 512, 512), 3e-4)
        assert not config.normalise
        assert config.batch_size == (256 if preset == "powderworld" else 1024)
        expected = (1, 0) if cls is GCBC else (trajectory, anywhere)
        assert (config.actor_p_trajectory, config.actor_p_random) == expected
    assert hiql.low_actor_rep_grad == (True if preset == "powderworld" else None)
    extraction = "awr" if preset == "powderworld" else "auto"
    assert all(configs[c].actor_loss == extraction for c in (GCIQL, QRL, CRL))


def test_every_preset_of_the_reference_is_in_the_table() -> None:
    families = ("ogbench", "pointmaze", "antmaze", "humanoidmaze", "antsoccer", "manipulation", "powderworld")
    assert {name for name in PRESETS if name.startswith(families)} == {r[0] for r in TABLE}


def test_settings_that_no_preset_changes() -> None:
    expectiles = {GCIVL: 0.9, GCIQL: 0.9, HIQL: 0.7, HILP: 0.95}
    for cls, expectile in expectiles.items():
        config = config_of(cls, "ogbench")
        assert (config.expectile, config.tau) == (expectile, 0.005)
    hilp, qrl = config_of(HILP, "ogbench"), config_of(QRL, "ogbench")
    assert (hilp.skill_expectile, hilp.alpha, hilp.skill_dim, hilp.learn_std) == (0.9, 10, 32, True)
    assert (qrl.epsilon, qrl.latent_dim, qrl.quasimetric) == (0.05, 512, "iqe")
    assert (config_of(CRL, "ogbench").latent_dim, config_of(HIQL, "ogbench").rep_dim) == (512, 10)


# -- layers --------------------------------------------------------------------------------------------------------------


def test_layers_are_dense_then_gelu_then_layer_norm() -> None:
    net = MLP((3, 8, 4), rng=rng(), layer_norm=True, members=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=rng(3)))
    x = torch.randn(5, 3, generator=rng(1))
    for e in range(2):
        h = functional.gelu(x @ net.kernels[0][e] + net.biases[0][e], approximate="tanh")
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        h = h * net.scales[0][e] + net.shifts[0][e]
        torch.testing.assert_close(net(x)[e], h @ net.kernels[1][e] + net.biases[1][e])


def test_the_form_for_gpus_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net = MLP((3, 8, 6, 4), rng=rng(), layer_norm=True, members=2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=rng(3)))
    x = torch.randn(5, 3, generator=rng(1))
    looped = net(x)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(net(x), looped)


def test_initialisation_is_xavier_with_independent_members() -> None:
    net = MLP((40, 60, 50), rng=rng(), members=2, final_gain=0.1)
    for parameter, gain in zip(net.kernels, (1.0, 0.1), strict=True):
        kernel = parameter.detach()
        bound = gain * math.sqrt(6 / (kernel.shape[1] + kernel.shape[2]))
        assert float(kernel.abs().max()) <= bound
        assert float(kernel.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert not torch.equal(kernel[0], kernel[1])
    assert not any(b.any() for b in net.biases)


def test_frozen_networks_pass_the_gradient_to_their_input_alone() -> None:
    net = MLP((3, 8, 1), rng=rng(), layer_norm=True)
    x = torch.randn(5, 3, generator=rng(1), requires_grad=True)
    net(x, frozen=True).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("size", [(64, 64), (36, 36), (33, 48)])
def test_small_impala_against_layers_of_torch(size: tuple[int, int]) -> None:
    """With SAME padding computed from its definition: output ceil(n / 2), what is missing split, the rest at the end."""
    net = ImpalaSmall((3, *size), rng=rng())
    with torch.no_grad():
        for b in net.biases:
            b.add_(torch.randn(b.shape, generator=rng(2)) * 0.1)
    image = torch.randint(256, (2, 3, *size), generator=rng(1), dtype=torch.uint8)
    x, weights = image / 255.0, iter(zip(net.kernels, net.biases, strict=True))
    for _ in range(3):
        x = functional.conv2d(x, *next(weights), padding=1)
        pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        x = functional.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2), value=-1e9)
        x = functional.max_pool2d(x, 3, stride=2)
        y = functional.conv2d(functional.relu(x), *next(weights), padding=1)
        x = x + functional.conv2d(functional.relu(y), *next(weights), padding=1)
    expected = functional.gelu(functional.linear(functional.relu(x).flatten(1), *next(weights)), approximate="tanh")
    torch.testing.assert_close(net(image), expected)
    assert net(image).shape == (2, 512)


def test_distributions_against_torch() -> None:
    mean, a, log_std = torch.randn(3, 4, 2, generator=rng()).unbind(0)
    ours = Gaussian(mean, log_std[0])
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std[0].exp()), 1)
    torch.testing.assert_close(ours.log_prob(a), theirs.log_prob(a))
    logits, c = torch.randn(4, 5, generator=rng(1)), torch.tensor([0, 4, 2, 2])
    torch.testing.assert_close(
        Categorical(logits).log_prob(c), torch.distributions.Categorical(logits=logits).log_prob(c)
    )
    assert torch.equal(Categorical(logits).sample(rng(), temperature=0.0), logits.argmax(1))
    assert torch.equal(ours.sample(rng(), temperature=0.0), mean)


def test_learned_deviations_are_bounded() -> None:
    actor = Actor((Shape(2),), (4,), 3, rng=rng(), learn_std=True)
    assert actor.log_std is not None
    for value, expected in ((0.0, 0.0), (9.0, 2.0), (-9.0, -5.0)):
        torch.nn.init.constant_(actor.log_std, value)
        policy = actor(Input(torch.zeros(1, 2)))
        assert isinstance(policy, Gaussian)
        assert policy.log_std.tolist() == [expected] * 3


# -- losses --------------------------------------------------------------------------------------------------------------


def test_value_loss_in_a_case_by_hand() -> None:
    """Members 1, 2 at s and s': the smaller next value decides the sign of A, each member its own residual."""
    v, target_v, target_next = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]), torch.tensor([[4.0], [0.0]])
    # r = -1, gamma = 0.5: A = -1 + 0.5 * 0 - 0 = -1 < 0 (with the mean of 4 and 0 it would be 0 and count as positive)
    expected = 0.1 * ((-1 + 2 - 1) ** 2 + (-1 + 0 - 2) ** 2)
    loss = implicit_v_loss(v, target_v, target_next, torch.zeros(1), 0.5, 0.9)
    assert float(loss) == pytest.approx(expected)
    assert float(implicit_v_loss(v, target_v, target_next, torch.zeros(1), 0.5, 0.1)) == pytest.approx(9 * expected)
    # at the goal: r = 0, nothing follows; A = 0 counts as positive
    loss = implicit_v_loss(v, target_v, target_next, torch.ones(1), 0.5, 0.9)
    assert float(loss) == pytest.approx(0.9 * (1 + 4))


def test_value_loss_takes_the_smaller_member_for_its_weight() -> None:
    v, next_v = torch.zeros(2, 1), torch.tensor([[6.0], [0.0]])
    for v_now, weight in ((0.0, 0.1), (-1.5, 0.9)):  # A = -1 + 0 - v; the mean of next_v would give 2 > 0 in both
        residual = (-1 + 6) ** 2 + (-1 + 0) ** 2
        loss = implicit_v_loss(v, torch.full((2, 1), v_now), next_v, torch.zeros(1), 1.0, 0.9)
        assert float(loss) == pytest.approx(weight * residual)


@given(st.floats(0.05, 0.95), st.lists(st.floats(-5, 5), min_size=2, max_size=20))
@settings(max_examples=50, deadline=None)
def test_expectile_loss_has_its_minimum_at_the_expectile(kappa: float, values: list[float]) -> None:
    """kappa E[(x - m)+] = (1 - kappa) E[(m - x)+] at the minimum m."""
    x = torch.tensor(values, dtype=torch.float64)
    m = x.mean()
    for _ in range(200):  # the minimum is a weighted mean of the values, with weights by their side
        weight = torch.where(x >= m, kappa, 1 - kappa)
        m = (weight * x).sum() / weight.sum()
    at = float(expectile_loss(x - m, x - m, kappa).mean())
    assert all(float(expectile_loss(x - y, x - y, kappa).mean()) >= at - 1e-9 for y in (m - 0.1, m + 0.1))
    assert float(kappa * torch.relu(x - m).mean()) == pytest.approx(
        float((1 - kappa) * torch.relu(m - x).mean()), abs=1e-6
    )


def test_regression_weights_are_clipped_and_without_gradient() -> None:
    mean = torch.zeros(3, 1, requires_grad=True)
    advantage = torch.tensor([0.0, 0.1, 50.0], requires_grad=True)
    awr_loss(Gaussian(mean, torch.zeros(1)), torch.ones(3, 1), advantage, 10.0).backward()
    assert advantage.grad is None
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad[:, 0], -torch.tensor([1.0, math.e, 100.0]) / 3)


def test_q_is_scaled_by_its_size_without_gradient() -> None:
    q = torch.tensor([-1.0, -3.0], requires_grad=True)
    policy = Gaussian(torch.zeros(2, 1), torch.zeros(1))
    loss = ddpg_bc_loss(policy, torch.ones(2, 1), q, 0.5)
    loss.backward()
    log_prob = -0.5 - 0.5 * math.log(2 * math.pi)
    assert float(loss.detach()) == pytest.approx(1.0 - 0.5 * log_prob, abs=1e-5)  # negative q keep their sign
    torch.testing.assert_close(q.grad, torch.tensor([-0.25, -0.25]))


def test_contrastive_loss_is_binary_over_all_pairs() -> None:
    phi, psi = torch.randn(2, 2, 5, 8, generator=rng()).unbind(0)
    loss, logits = contrastive_loss(phi, psi)
    total = 0.0
    for j in range(2):
        for i in range(5):
            for k in range(5):
                logit = float(phi[j, i] @ psi[j, k]) / math.sqrt(8)
                total += math.log1p(math.exp(-logit if i == k else logit))
    assert float(loss) == pytest.approx(total / 50, rel=1e-5)
    torch.testing.assert_close(logits.diagonal(dim1=-2, dim2=-1), similarity(phi, psi))


def test_the_constraint_of_qrl_and_its_multiplier() -> None:
    """Steps that are too long: the value loss pays lambda C, and lambda alone rises with C - epsilon."""
    agent = make(QRL, 2, 1, hidden=(8,), latent_dim=16, actor_loss="awr", alpha=1.0)
    assert isinstance(agent, QRL)
    torch.nn.init.constant_(agent.multiplier.log_value, math.log(3.0))
    with torch.no_grad():
        agent.phi.mlp.kernels[-1].mul_(20)
    from clbench.testing.golden import Case, make_batch

    x = np.random.default_rng(0).normal(size=(4, 6, 2)).astype(np.float32)
    arrays = {
        "batch/observations": x[0], "batch/next_observations": x[1], "batch/value_goals": x[2],
        "batch/actor_goals": x[3], "batch/actions": np.zeros((6, 1), np.float32), "batch/masks": np.ones(6, np.float32),
    }  # fmt: skip
    batch = make_batch(Case("long steps", "qrl", {}, arrays))
    loss, info = agent.loss(batch)
    loss.backward()
    d = agent.quasimetric
    z, z_next, z_goal = (agent.phi(Input(torch.from_numpy(v))) for v in x[:3])
    excess = torch.relu(d(z, z_next) - 1)
    constraint = excess.square().mean().item()
    assert constraint > 1
    apart = float((100 * functional.softplus(5 - d(z, z_goal) / 100)).mean())
    assert float(info["value_loss"]) == pytest.approx(apart + 3 * constraint, rel=1e-5)
    assert agent.multiplier.log_value.grad is not None
    assert float(agent.multiplier.log_value.grad) == pytest.approx(3 * (0.05 - constraint), rel=1e-4)


# -- distances -----------------------------------------------------------------------------------------------------------


def points(seed: int, count: int = 3, groups: int = 3, size: int = 4, scale: float = 2.0) -> Tensor:
    """(count, 1, D) in double precision; some coordinates coincide, as ties are where sorting goes wrong."""
    draw = torch.randn(count, 1, groups * size, generator=rng(seed), dtype=torch.float64) * scale
    return torch.where(torch.rand(draw.shape, generator=rng(seed + 1)) < 0.3, draw.round(), draw)


def iqe(x: Tensor, y: Tensor) -> Tensor:
    return IQE(3)(x, y)


def mrn(x: Tensor, y: Tensor) -> Tensor:
    return MRN()(x, y)


def hilbert(x: Tensor, y: Tensor) -> Tensor:
    return -hilbert_value(x, y)


Distance = Callable[[Tensor, Tensor], Tensor]
SLACK = 1e-3  # of the clamps in the roots: 1e-6 for MRN, 1e-3 for HILP


def obeys_the_axioms(d: Distance, seeds: range = range(200), slack: float = SLACK) -> bool:
    """d(x, x) = 0, d >= 0, d(x, z) <= d(x, y) + d(y, z)."""
    for seed in seeds:
        x, y, z = points(7 * seed)
        if abs(float(d(x, x))) > slack or float(d(x, y)) < 0 or float(d(x, z)) > float(d(x, y) + d(y, z)) + 1e-9:
            return False
    return True


@given(st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("d", [iqe, mrn, hilbert], ids=["iqe", "mrn", "hilbert"])
def test_distances_obey_the_axioms(d: Distance, seed: int) -> None:
    assert obeys_the_axioms(d, range(seed, seed + 1))


@pytest.mark.parametrize("d", [iqe, mrn], ids=["iqe", "mrn"])
def test_quasimetrics_are_not_symmetric(d: Distance) -> None:
    x, y = torch.zeros(1, 12), torch.ones(1, 12)
    assert abs(float(d(x, y)) - float(d(y, x))) > 0.5


@given(st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_the_hilbert_distance_is_symmetric(seed: int) -> None:
    x, y, _ = points(seed)
    assert float(hilbert(x, y)) == float(hilbert(y, x))


WRONG: dict[str, Distance] = {
    "squared": lambda x, y: (x - y).square().sum(-1),
    "signed": lambda x, y: (y - x).mean(-1),
    "product of groups": lambda x, y: union_lengths(*(v.unflatten(-1, (3, 4)) for v in (x, y))).prod(-1),
    "smallest group": lambda x, y: union_lengths(*(v.unflatten(-1, (3, 4)) for v in (x, y))).amin(-1),
    "gaps": lambda x, y: torch.maximum(x, y).amax(-1) - x.amin(-1),
    "not from the left": lambda x, y: torch.relu(torch.maximum(x, y) - torch.cummax(x, -1).values).sum(-1),
}


@pytest.mark.parametrize("name", WRONG)
def test_distances_with_a_mistake_are_caught(name: str) -> None:
    assert not obeys_the_axioms(WRONG[name])


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_length_of_unions_of_intervals(count: int, seed: int) -> None:
    """Against the sum over elementary pieces between all ends that some interval covers."""
    x, y = points(seed, 2, 1, count)[:, 0]
    ends = sorted({*x.tolist(), *y.tolist()})
    covered = 0.0
    for low, high in zip(ends[:-1], ends[1:], strict=True):
        middle = (low + high) / 2
        covered += (high - low) * any(a < middle < b for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert float(union_lengths(x, y)) == pytest.approx(covered, abs=1e-9)


def test_gradients_of_unions_of_intervals() -> None:
    x, y = (v.clone().requires_grad_(True) for v in points(5, 2)[:, 0])
    assert torch.autograd.gradcheck(lambda a, b: union_lengths(a, b), (x, y + 0.01))


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_representations_of_goals_have_one_length(seed: int) -> None:
    z = length_normalise(torch.randn(4, 10, generator=rng(seed)))
    torch.testing.assert_close(z.norm(dim=1), torch.full((4,), math.sqrt(10)))
