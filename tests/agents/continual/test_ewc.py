"""Elastic weight consolidation: four estimates of the Fisher information against closed forms, and its quadratics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.agents.continual import ewc
from clbench.agents.continual.ewc import fisher_information
from clbench.data.dataset import Batch, OfflineDataset
from clbench.errors import ConfigError


def all_of(data: OfflineDataset) -> Batch:
    return data.batch(torch.arange(len(data)))


def estimate(agent: Any, kind: Any, batches: list[Batch], samples: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return fisher_information(agent.learner, iter(batches), samples, kind, rng)


def moments(agent: Any, data: OfflineDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax regression: inputs with a 1 (N, 5), probabilities (N, 3), one-hot labels (N, 3)."""
    layer = agent.net.layers[0]
    p = torch.softmax(data.observations @ layer.weight.detach().T + layer.bias.detach(), 1)
    return torch.cat([data.observations, torch.ones(len(data), 1)], 1), p, torch.nn.functional.one_hot(data.actions, 3)


def as_one(fisher: list[Tensor]) -> Tensor:
    """Weight and bias of one layer as one matrix."""
    return torch.cat([fisher[0], fisher[1][:, None]], 1)


def jacobians(agent: Any, x: Tensor, function: Any) -> list[Tensor]:
    """d function(output) / d theta per sample: (N, K, *shape) for each parameter, by another route than the method's."""
    params = {k: v.detach() for k, v in agent.net.named_parameters()}

    def of_one(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return function(torch.func.functional_call(agent.net, params, (x[None],))[0])

    found: Any = torch.func.vmap(torch.func.jacrev(of_one), (None, 0))(params, x)
    return [found[k] for k in params]


# -- the Fisher information -----------------------------------------------------------------------------------------------


def test_exact_is_the_closed_form_of_softmax_regression(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["ewc"], agent={"hidden": ()}), lab.data(0, 20)
    x, p, _ = moments(agent, data)
    # diagonal of E (diag(p) - p p^T) (x) x x^T
    right = torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / len(x)
    torch.testing.assert_close(as_one(estimate(agent, "exact", [all_of(data)], 20)), right)


def test_exact_sums_over_all_outputs_of_all_samples(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["ewc"], agent={"hidden": (6, 5)}), lab.data(0, 20)
    p = torch.softmax(agent.net(data.observations).detach(), 1)
    found = estimate(agent, "exact", [all_of(data)], 20)
    for f, j in zip(found, jacobians(agent, data.observations, lambda o: torch.log_softmax(o, 0))):
        torch.testing.assert_close(f, torch.einsum("nk,nk...->...", p, j.square()) / len(p))


def test_exact_of_gaussian_outputs_is_the_sum_of_squared_jacobians(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["ewc"], spaces=lab.REGRESS), lab.data(0, 20, spaces=lab.REGRESS)
    found = estimate(agent, "exact", [all_of(data)], 20)
    for f, j in zip(found, jacobians(agent, data.observations, lambda o: o)):
        torch.testing.assert_close(f, j.square().sum(1).mean(0))


def errors(found: list[list[Tensor]], right: list[Tensor]) -> Tensor:
    """In standard errors of the mean over repetitions, all numbers of all parameters."""
    draws = torch.stack([torch.cat([t.flatten() for t in f]) for f in found]).double()
    spread = draws.std(0) / len(draws) ** 0.5
    return (draws.mean(0) - torch.cat([t.flatten() for t in right])).abs() / (spread + 1e-9)


@pytest.mark.parametrize("kind", ["CLASSIFY", "REGRESS"])
def test_sampled_is_exact_on_average(lab: SimpleNamespace, kind: str) -> None:
    spaces = getattr(lab, kind)
    agent = lab.composed(lab.Toy, ["ewc"], spaces=spaces, agent={"hidden": ()})
    lab.phase(agent, lab.data(0, spaces=spaces), 20)
    batch = all_of(lab.data(0, 6, spaces=spaces))
    exact = estimate(agent, "exact", [batch], 6)
    assert errors([estimate(agent, "sampled", [batch], 6, seed=i) for i in range(150)], exact).max() < 4.5
    empirical = estimate(agent, "empirical", [batch], 6)  # the same check notices another Fisher
    noise = torch.Generator().manual_seed(0)
    jittered = [[t * (1 + 0.3 * torch.randn(t.shape, generator=noise)) for t in empirical] for _ in range(150)]
    assert errors(jittered, exact).max() > 4.5


def test_empirical_squares_the_gradient_of_each_sample(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["ewc-empirical"], agent={"hidden": ()}), lab.data(0, 20)
    x, p, y = moments(agent, data)
    right = torch.einsum("nk,nj->kj", (p - y).square(), x.square()) / len(x)
    torch.testing.assert_close(as_one(estimate(agent, "empirical", [all_of(data)], 20)), right)


def test_batch_squares_the_gradient_of_the_mean(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["ewc"], agent={"hidden": ()}), lab.data(0, 20)
    x, p, y = moments(agent, data)
    right = (torch.einsum("nk,nj->kj", p - y, x) / len(x)).square()
    torch.testing.assert_close(as_one(estimate(agent, "batch", [all_of(data)], 20)), right)


def test_at_an_optimum_the_batch_variant_is_smaller_by_the_size_of_a_batch(lab: SimpleNamespace) -> None:
    size, batches = 16, 200
    agent = lab.composed(lab.Toy, ["ewc"], agent={"hidden": ()})
    rng = lab.generator(3)
    x = torch.rand(size * batches, 4, generator=rng) * 2 - 1
    p = torch.softmax(agent.net(x).detach(), 1)
    y = torch.multinomial(p, 1, generator=rng)[:, 0]  # the model is right about these labels
    data = OfflineDataset(x, y, torch.ones(len(x), dtype=torch.int64))
    drawn = [data.batch(torch.arange(i * size, (i + 1) * size)) for i in range(batches)]
    per_sample = as_one(estimate(agent, "empirical", drawn, 1000)).sum()
    per_batch = as_one(estimate(agent, "batch", drawn, size * batches)).sum()
    assert 0.8 < float(size * per_batch / per_sample) < 1.25


def test_weights_without_a_part_have_no_importance(lab: SimpleNamespace) -> None:
    agent = lab.composed("bc", ["ewc-exact"], agent={"hidden": (5,), "heads": 2})
    lab.phase(agent, lab.data(0).with_task(0), 3, 0)
    other = [
        f for p, f in zip(agent.trainables, agent.methods["ewc-exact"].fisher) if p is agent.policy.more_heads[0].weight
    ]
    assert len(other) == 1 and not other[0].any()
    assert all(f.any() for f in agent.methods["ewc-exact"].fisher[:-2])


# -- its quadratics ----------------------------------------------------------------------------------------------------


def live(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tasks: int, **options: Any) -> tuple[Any, Any, Any]:
    """An agent after ``tasks`` with known importances, of which some are 0: agent, [F_k], [theta_k]."""
    agent = lab.composed(lab.Toy, ["ewc"], ewc={"strength": 3.0, **options})
    fishers, thetas = [], []

    def known(learner: Any, *_: Any) -> list[Tensor]:
        rng = lab.generator(len(fishers))
        fishers.append([torch.rand(p.shape, generator=rng).sub_(0.3).relu_() for p in learner.params])
        for f in fishers[-1]:
            f.view(-1)[0] = 0  # in every task
        return [f.clone() for f in fishers[-1]]

    monkeypatch.setattr(ewc, "fisher_information", known)
    for k in range(tasks):
        lab.phase(agent, lab.data(k), 5)
        thetas.append(lab.weights(agent))
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(torch.randn(p.shape, generator=lab.generator(8)))
    return agent, fishers, thetas


def pull(agent: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(agent.methods["ewc"].loss(torch.zeros(()), None), agent.trainables)


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_quadratic_is_the_sum_of_the_tasks(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tasks: int
) -> None:
    agent, fishers, thetas = live(lab, monkeypatch, tasks)
    for i, (g, p) in enumerate(zip(pull(agent), agent.trainables)):
        right = sum(3.0 * f[i] * (p.detach() - theta[i]) for f, theta in zip(fishers, thetas))
        torch.testing.assert_close(g, right)
    # with the last task's anchor for all of them, as is often seen, it would be something else
    wrong = [3.0 * sum(f[0] for f in fishers) * (agent.trainables[0].detach() - thetas[-1][0])]
    assert torch.allclose(wrong[0], pull(agent)[0]) is (tasks == 1)


def test_online_decays_and_is_anchored_at_the_last_task(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, fishers, thetas = live(lab, monkeypatch, 3, online=True, decay=0.8)
    for i, (g, p) in enumerate(zip(pull(agent), agent.trainables)):
        fisher = 0.8**2 * fishers[0][i] + 0.8 * fishers[1][i] + fishers[2][i]
        torch.testing.assert_close(g, 3.0 * fisher * (p.detach() - thetas[-1][i]))


def test_online_reaches_its_fixed_point(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = lab.composed(lab.Toy, ["ewc-online"], ewc_online={"decay": 0.5})
    monkeypatch.setattr(ewc, "fisher_information", lambda learner, *_: [torch.ones_like(p) for p in learner.params])
    for n in range(1, 25):
        agent.methods["ewc-online"].finish_task(iter(()))
        expected = (1 - 0.5**n) / (1 - 0.5)
        assert all(torch.allclose(f, torch.tensor(expected)) for f in agent.methods["ewc-online"].fisher)
    assert abs(expected - 1 / (1 - 0.5)) < 1e-6


def test_a_hidden_loss_gets_the_same_spring(lab: SimpleNamespace) -> None:
    agents = [lab.composed(cls, ["ewc"], ewc={"strength": 10.0}) for cls in (lab.Toy, lab.Hidden)]
    plain = lab.composed(lab.Toy, [])
    for agent in (*agents, plain):
        lab.phase(agent, lab.data(0), 5)
        lab.phase(agent, lab.data(1), 10)
    for a, b in zip(*(agent.trainables for agent in agents)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(plain.trainables[0], agents[0].trainables[0], atol=1e-3)


# -- costs and options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "count"),
    [("ewc", "sampled", 13), ("ewc", "exact", 13), ("ewc", "empirical", 13), ("ewc", "batch", 16), ("mas", "", 13)],
)
def test_what_it_sends_through_the_network_is_counted(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, method: str, kind: str, count: int
) -> None:
    """Against the rows that the network really sees."""
    agent = lab.composed(lab.Toy, [method], **{method: {"samples": 13, **({"fisher": kind} if kind else {})}})
    seen = []
    agent.net.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    lab.phase(agent, lab.data(0), 5)
    assert sum(seen) == 5 * 8 + count  # batches of 8
    back = 3 * count if kind == "exact" else count  # one pass back per class
    assert (agent.method_costs()["extra_forward_samples"], agent.method_costs()["extra_backward_samples"]) == (
        count,
        back,
    )
    numbers = sum(p.numel() for p in agent.trainables)
    assert agent.method_costs()["method_state_bytes"] == 2 * 4 * numbers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"strength": float("nan")}, "strength must be at least 0"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"decay": 1.5}, "decay must be in"),
        ({"decay": float("nan")}, "decay must be in"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ewc.EWC.Config(**options)


def test_an_unknown_fisher(lab: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="fisher"):
        lab.composed(lab.Toy, ["ewc"], ewc={"fisher": "diagonal"})


@pytest.mark.parametrize("kind", ["empirical", "batch"])
def test_a_fisher_of_the_loss_needs_a_loss(lab: SimpleNamespace, kind: str) -> None:
    with pytest.raises(ConfigError, match="needs a loss of a batch"):
        lab.composed(lab.Hidden, ["ewc"], ewc={"fisher": kind})
