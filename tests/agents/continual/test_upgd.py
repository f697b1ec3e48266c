"""UPGD: one step in closed form, what its utility means, its noise, its state."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from clbench.agents.continual.units import find_units
from clbench.agents.continual.upgd import UPGD, gate
from clbench.agents.networks.mlp import MLP
from clbench.errors import ConfigError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(count: int = 2) -> list[nn.Parameter]:
    draw = rng(1)
    made = [nn.Parameter(torch.randn(3, 4 + i, generator=draw)) for i in range(count)]
    for p in made:
        p.grad = torch.randn(p.shape, generator=draw)
    return made


def grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def test_two_steps_in_closed_form():
    params = parameters()
    w, g = [p.detach().clone() for p in params], grads(params)
    optimizer = UPGD(params, lr=0.1, weight_decay=0.2, sigma=0.3, beta=0.9, rng=rng(7))
    noise = rng(7)
    trace = [torch.zeros_like(x) for x in w]
    for t in (1, 2):
        optimizer.step()
        xi = (0.3 * torch.randn(sum(x.numel() for x in w), generator=noise)).split([x.numel() for x in w])
        trace = [0.9 * u - 0.1 * gi * wi for u, gi, wi in zip(trace, g, w, strict=True)]
        corrected = [u / (1 - 0.9**t) for u in trace]
        eta = max(u.max() for u in corrected)
        w = [
            (1 - 0.1 * 0.2) * wi - 0.1 * (gi + e.view(wi.shape)) * (1 - torch.sigmoid(u / eta))
            for wi, gi, e, u in zip(w, g, xi, corrected, strict=True)
        ]
        for p, expected in zip(params, w, strict=True):
            assert torch.allclose(p, expected, atol=1e-6)


def test_gates():
    """Half at no utility, the logistic function of -1 at the largest, more than half where a weight does harm."""
    found = torch.cat(gate([torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])]))
    assert torch.allclose(found, 1 - torch.sigmoid(torch.tensor([0.0, 1.0, 0.5, -0.5])))
    assert found[0] == 0.5 and found[3] > 0.5
    assert torch.equal(gate([torch.zeros(3)])[0], torch.full((3,), 0.5))  # before there is any utility
    assert torch.allclose(gate([torch.tensor([0.0, -1.0])])[0], torch.tensor([0.5, 1.0]))  # all of it harmful


def trained(seed: int = 0) -> tuple[nn.Module, Any]:
    """A small network on a small problem, and its loss."""
    net = MLP((4, 8, 3), rng=rng(seed), activation=torch.tanh)
    x = torch.randn(64, 4, generator=rng(2))
    y = (x @ torch.randn(4, 3, generator=rng(3))).argmax(1)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(x), y)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    net.zero_grad()
    return net, loss


def agreement(sign: float = -1.0, gradient: bool = True) -> float:
    """Rank correlation of ``sign g w`` with the rise of the loss if a weight were 0, by brute force."""
    net, loss = trained()
    loss().backward()
    base, first, exact = loss().item(), [], []
    for p in net.parameters():
        assert p.grad is not None
        first += (sign * (p.grad if gradient else 1.0) * p.detach()).flatten().tolist()
        flat = p.detach().view(-1)
        for i in range(len(flat)):
            kept = flat[i].item()
            flat[i] = 0.0
            exact.append(loss().item() - base)
            flat[i] = kept
    result: Any = spearmanr(first, exact)
    return float(result.statistic)


def test_utility_ranks_weights_by_what_the_loss_would_rise():
    assert agreement() > 0.7
    assert agreement(sign=1.0) < -0.7  # the sign matters,
    assert abs(agreement(gradient=False)) < 0.4  # and the gradient


def test_the_optimisers_utility_is_the_one_that_ranks():
    net, loss = trained()
    loss().backward()
    expected = [-(p.grad * p.detach()) for p in net.parameters() if p.grad is not None]
    optimizer = UPGD(net.parameters(), lr=1e-9, beta=0.0)
    optimizer.step()
    for p, u in zip(net.parameters(), expected, strict=True):
        assert torch.allclose(optimizer.state[p]["utility"], u)


def feature_step(net: nn.Module, loss: Any, **options: Any) -> UPGD:
    holder = SimpleNamespace(net=net, trainables=list(net.parameters()))
    optimizer = UPGD(net.parameters(), beta=0.0, rng=rng(7), units=find_units(holder), **options)
    loss().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, nn.functional.gelu])
def test_utility_of_a_unit_is_minus_h_dl_dh(activation: Any):
    """By the gradient of a factor in front of each unit, as the authors' code has it."""
    net = MLP((4, 8, 6, 3), rng=rng(), activation=activation)
    x, y = torch.randn(5, 4, generator=rng(2)), torch.tensor([0, 1, 2, 1, 0])
    factors = [torch.ones(8, requires_grad=True), torch.ones(6, requires_grad=True)]
    h = x
    for layer, a in zip(net.layers, factors, strict=False):
        h = activation(layer(h)) * a
    nn.functional.cross_entropy(net.layers[-1](h), y).backward()
    net.zero_grad()
    optimizer = feature_step(net, lambda: nn.functional.cross_entropy(net(x), y), lr=1e-9)
    for layer, a in zip(net.layers, factors, strict=False):
        assert a.grad is not None
        assert torch.allclose(optimizer.state[layer.weight]["utility"][0], -a.grad, atol=1e-6)  # type: ignore[index]


def test_a_units_weights_share_its_gate():
    net, loss = trained()
    before = copy.deepcopy(net)
    optimizer = feature_step(net, loss, lr=0.1, weight_decay=0.0, sigma=0.0)
    u = optimizer.state[net.layers[0].weight]["utility"][0]  # type: ignore[index,union-attr]
    shares = 1 - torch.sigmoid(u / u.max())
    for old, new in zip(before.named_parameters(), net.named_parameters(), strict=True):
        moved, whole = old[1] - new[1], 0.1 * new[1].grad  # type: ignore[operator]
        share = torch.ones(()) if old[0].startswith("layers.1") else shares if moved.ndim == 1 else shares[:, None]
        assert torch.allclose(moved, share * whole, atol=1e-7)  # the output layer takes the whole step


def test_only_units_are_stirred():
    net, loss = trained()
    before = copy.deepcopy(net)
    loss().backward()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    UPGD(net.parameters(), weight_decay=0.0, rng=rng(), units=find_units(SimpleNamespace(
        net=net, trainables=list(net.parameters())))).step()  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(before.parameters(), net.parameters(), strict=True)]
    assert same == [False, False, True, True]


def test_noise_has_the_size_it_says():
    p = nn.Parameter(torch.zeros(100_000))
    p.grad = torch.zeros_like(p)
    UPGD([p], lr=0.5, sigma=0.2, weight_decay=0.0, rng=3).step()
    assert float(p.detach().std()) == pytest.approx(0.5 * 0.2 * 0.5, rel=0.02)  # lr sigma gate
    q = nn.Parameter(torch.zeros(100_000))
    q.grad = torch.zeros_like(q)
    UPGD([q], lr=0.5, sigma=0.2, weight_decay=0.0, rng=4).step()
    assert not torch.equal(p, q)


def test_adaptive_is_adam_where_every_gate_is_half():
    """Weights of 0 have no utility; twice the rate makes up for the gate."""
    ours, theirs = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    adam = torch.optim.Adam([theirs], lr=0.01)
    upgd = UPGD([ours], lr=0.02, weight_decay=0.0, sigma=0.0, adaptive=True)
    draw = rng()
    for _ in range(3):
        gradient = torch.randn(5, generator=draw)
        with torch.no_grad():
            ours.zero_()
            theirs.zero_()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        upgd.step()
        adam.step()
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    params = parameters()
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer = UPGD(params)
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state


@pytest.mark.parametrize("adaptive", [False, True])
def test_its_state_is_complete(adaptive: bool):
    """Two steps, or one, saved and loaded into another, and one; not without the generator."""

    def run(steps: int, params: list[nn.Parameter], optimizer: UPGD) -> None:
        for _ in range(steps):
            optimizer.step()

    def fresh(seed: int) -> tuple[list[nn.Parameter], UPGD]:
        params = parameters()
        return params, UPGD(params, lr=0.1, adaptive=adaptive, rng=seed)

    whole, optimizer = fresh(5)
    run(3, whole, optimizer)
    first, optimizer = fresh(5)
    run(1, first, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())

    def go_on(state: dict[str, Any]) -> list[nn.Parameter]:
        second, optimizer = fresh(99)
        for p, q in zip(second, first, strict=True):
            p.data.copy_(q.data)
        optimizer.load_state_dict(state)
        run(2, second, optimizer)
        return second

    assert all(torch.equal(p, q) for p, q in zip(whole, go_on(saved), strict=True))
    other = {**saved, "rng": rng(6).get_state()}
    assert not all(torch.equal(p, q) for p, q in zip(whole, go_on(other), strict=True))


def test_it_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    params = parameters()
    UPGD(params).step()
    assert torch.equal(state, torch.random.get_rng_state())


def test_values_out_of_range_are_refused():
    refused: list[dict[str, Any]] = [{"lr": 0.0}, {"sigma": -1.0}, {"weight_decay": -1.0}, {"beta": 1.0}]
    for wrong in refused:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            UPGD(parameters(), **wrong)


def test_it_is_the_agents_optimiser(lab: SimpleNamespace):
    agent = lab.composed(lab.Toy, ["upgd"], upgd={"lr": 0.3})
    assert isinstance(agent.agent.optimizer, UPGD) and agent.agent.optimizer.param_groups[0]["lr"] == 0.3
    assert agent.agent.optimizer.rng is agent.methods["upgd"].rng
