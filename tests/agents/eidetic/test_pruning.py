"""Importance against brute force, and the loop: only free units, shares kept, the last accepted state comes back."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.pruning import CRITERIA, Pruner, Pruning, choose, importance
from clbench.agents.networks.eidetic.verify import observe, outputs, same
from clbench.errors import ConfigError, UnknownNameError

N_IN, CLASSES = 6, 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class MLP(eidetic.EideticNetwork):
    def __init__(self, hidden: tuple[int, ...] = (12, 10, 8), norm: bool = False, **options: Any):
        super().__init__(**options)
        below = self.inputs("x", N_IN)
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, size in enumerate(hidden):
            space = self.space(f"h{i}", size)
            self.layers.append(eidetic.Linear(below, space))
            self.norms.append(eidetic.BatchNorm(space) if norm else nn.Identity())
            below = space
        self.act = eidetic.Activation("tanh")
        self.head = self.heads(below, CLASSES)

    def forward(self, x: Tensor, task: int) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.act(norm(layer(x)))
        return self.head(x, task)


def data(seed: int = 0, n: int = 256) -> tuple[Tensor, Tensor]:
    rng = generator(seed)
    x = torch.randn(n, N_IN, generator=rng)
    return x, (x @ torch.randn(N_IN, CLASSES, generator=rng)).argmax(1)


def loss_of(network: MLP, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(network(x, task=network.task), y)


def fit(network: MLP, x: Tensor, y: Tensor, updates: int = 60) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(updates):
        optimizer.zero_grad()
        loss_of(network, x, y).backward()
        optimizer.step()
    return optimizer


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


# -- importance ----------------------------------------------------------------------------------------------------------


def change_without(network: MLP, name: str, x: Tensor, y: Tensor) -> Tensor:
    """By brute force: how much the loss changes without each unit of a space."""
    full, changes = loss_of(network, x, y).item(), []
    for i in range(network.prunable()[name].size):
        other = copy.deepcopy(network)
        mask = torch.zeros(other.prunable()[name].size, dtype=torch.bool)
        mask[i] = True
        other.prunable()[name].kill(mask)
        changes.append(abs(loss_of(other, x, y).item() - full))
    return torch.tensor(changes)


def agreement(criterion: str) -> float:
    """Rank correlation of importance and brute force: the mean over three networks and three layers."""
    found = []
    for seed in range(3):
        network, (x, y) = MLP(), data(seed)
        network.begin_task(generator(seed))
        fit(network, x, y, 20)
        losses = [
            lambda rows=rows, n=network, x=x, y=y: loss_of(n, x[rows], y[rows]) for rows in torch.arange(256).split(64)
        ]
        scores = importance(network, criterion, losses=losses, rng=generator(seed))
        found += [rank_correlation(scores[name], change_without(network, name, x, y)) for name in scores]
    return sum(found) / len(found)


def test_taylor_ranks_units_as_leaving_them_out_does() -> None:
    assert agreement("taylor") > 0.5


def test_negative_control_random_importance_does_not() -> None:
    assert agreement("random") < 0.3


def test_taylor_against_its_definition() -> None:
    network, (x, y) = MLP((5,)), data(n=32)
    network.begin_task(generator())
    first, head = network.layers[0], network.head.layers[0]
    a = (x @ first.weight().T + first.bias()).detach().requires_grad_()
    value = nn.functional.cross_entropy(torch.tanh(a) @ head.weight().T + head.bias(), y)
    (g,) = torch.autograd.grad(value, a)
    scores = importance(network, "taylor", losses=[lambda: loss_of(network, x, y)], rng=generator())["h0"]
    assert torch.allclose(scores, (a * g).abs().sum(0).detach(), atol=1e-6)


@pytest.mark.parametrize(("criterion", "p"), [("l1", 1), ("l2", 2)])
def test_norms_of_every_layer_are_those_of_its_rows(criterion: str, p: int) -> None:
    network = MLP()
    network.begin_task(generator())
    network.prunable()["h0"].kill(torch.arange(12) < 4)
    scores = importance(network, criterion, rng=generator())
    for i, layer in enumerate(network.layers):
        norms = layer.weight().detach().norm(p, dim=1)
        alive = network.prunable()[f"h{i}"].candidates
        assert torch.allclose(scores[f"h{i}"][alive], (norms / norms[alive].mean())[alive], atol=1e-5)
        assert bool((scores[f"h{i}"][~alive] == math.inf).all())


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_later_layers_are_ranked_by_their_weights_not_by_index(criterion: str) -> None:
    """After the first layer was pruned, permuting the units of the second permutes what is chosen."""
    network = MLP((12, 10))
    network.begin_task(generator())
    network.prunable()["h0"].kill(torch.arange(12) % 3 == 0)
    order = torch.randperm(10, generator=generator(5))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.layers[1].weight.value.copy_(network.layers[1].weight.value[order])
    chosen = [choose(importance(n, criterion, rng=generator())["h1"], n.prunable()["h1"], 4) for n in (network, other)]
    assert torch.equal(chosen[0][order], chosen[1]) and not torch.equal(chosen[0], chosen[1])


def test_negative_control_infinite_scores_rank_by_index() -> None:
    """With +inf in single weights, as in one published code, every row of the next layer has the same norm."""
    network = MLP((12, 10))
    network.begin_task(generator())
    dead = torch.arange(12) % 3 == 0
    weight = network.layers[1].weight().detach().clone()
    weight[:, dead] = math.inf
    broken = weight.norm(2, dim=1)
    order = torch.randperm(10, generator=generator(5))
    space = network.prunable()["h1"]
    assert torch.equal(choose(broken, space, 4), choose(broken[order], space, 4))


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seed=st.integers(0, 50), kill=st.integers(0, 14))
@settings(max_examples=20, deadline=None)
def test_owned_units_are_never_chosen(criterion: str, seed: int, kill: int) -> None:
    network, (x, y) = MLP(), data()
    network.begin_task(generator(seed))
    for space in network.prunable().values():
        space.kill(torch.rand(space.size, generator=generator(seed)) < 0.5)
    network.commit()
    network.begin_task(generator(seed + 1))
    with torch.no_grad():  # equal scores, among which the index decides
        network.layers[1].weight.value.fill_(0.5)
    scores = importance(network, criterion, losses=[lambda: loss_of(network, x, y)], rng=generator(seed))
    for name, space in network.prunable().items():
        mask = choose(scores[name], space, kill)
        assert not bool((mask & ~space.free).any())
        assert int(mask.sum()) == min(kill, int(space.free.sum()))


def test_negative_control_killing_owned_units_is_refused() -> None:
    network = MLP((12,))
    network.begin_task(generator())
    network.prunable()["h0"].kill(torch.arange(12) < 6)
    network.commit()
    network.begin_task(generator())
    lowest_of_all = torch.zeros(12, dtype=torch.bool)
    lowest_of_all[network.layers[0].weight().norm(dim=1).argsort()[:8]] = True
    with pytest.raises(ConfigError, match="Only free units"):
        network.prunable()["h0"].kill(lowest_of_all)


def test_random_is_uniform_over_candidates() -> None:
    network = MLP((4,))
    network.begin_task(generator())
    rng, counts = generator(3), torch.zeros(4)
    for _ in range(2000):
        counts += choose(importance(network, "random", rng=rng)["h0"], network.prunable()["h0"], 1)
    assert ((counts / 2000 - 0.25).abs() < 5 * (0.25 * 0.75 / 2000) ** 0.5).all()


def test_scores_that_are_not_finite_are_refused() -> None:
    network = MLP()
    network.begin_task(generator())
    with torch.no_grad():
        network.layers[1].weight.value[0, 0] = math.nan
    with pytest.raises(ConfigError, match="importance .* of units of h1 is not finite"):
        importance(network, "l2", rng=generator())
    with pytest.raises(UnknownNameError, match="criterion 'l3'"):
        importance(network, "l3", rng=generator())
    with pytest.raises(ConfigError, match="losses of at least one batch"):
        importance(network, "taylor", rng=generator())


def test_dead_units_and_zero_gradients_have_scores() -> None:
    network, (x, _) = MLP(), data()
    network.begin_task(generator())
    scores = importance(network, "taylor", losses=[lambda: 0 * network(x, task=0).sum()], rng=generator())
    assert all(bool((s == 0).all()) for s in scores.values())


def test_importance_leaves_the_network_alone() -> None:
    network, (x, y) = MLP(norm=True), data()
    network.begin_task(generator())
    fit(network, x, y, 5)
    before, modes = copy.deepcopy(dict(network.state_dict())), [m.training for m in network.modules()]
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    importance(network, "taylor", losses=[lambda: loss_of(network, x, y)], rng=generator())
    assert same(before, dict(network.state_dict())) and modes == [m.training for m in network.modules()]
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, (p for p in network.parameters() if p.grad is not None)))


# -- the loop ------------------------------------------------------------------------------------------------------------


def task(network: MLP, config: Pruning, seed: int, total: int = 60, quality: Any = None) -> tuple[Pruner, list[dict]]:
    """A whole task with its pruning; the network is left before commit."""
    x, y = data(seed)
    network.begin_task(generator(seed))
    pruner, rng = Pruner(network, config), generator(seed)
    pruner.begin(total)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)

    def held_out() -> float:
        return 1 - loss_of(network, x[:64], y[:64]).item() / math.log(CLASSES)

    reports = []
    for _ in range(total):
        rows = torch.randint(64, 256, (32,), generator=rng)
        optimizer.zero_grad()
        loss_of(network, x[rows], y[rows]).backward()
        optimizer.step()
        report = pruner.advance(
            quality=quality or held_out, losses=lambda: [lambda: loss_of(network, x, y)], optimizer=optimizer, rng=rng
        )
        if report:
            reports.append(report)
    return pruner, reports


@pytest.mark.parametrize("criterion", CRITERIA)
def test_later_tasks_may_prune_more_and_nothing_old_moves(criterion: str) -> None:
    """Tasks that prune less and less and then more and more: the schedule that broke the published code."""
    network, seen = MLP((24, 20, 16), norm=True), []
    for t, tasks in enumerate((2, 4, 6, 8, 12)):
        task(network, Pruning(criterion=criterion, tasks=tasks, step=0.1 + 0.1 * t, tolerance=0.1), seed=t)
        for k, (probe, before) in enumerate(seen):
            assert same(before, observe(network, [probe], k))
        network.commit()
        probe = data(100 + t, 16)[0]
        seen.append((probe, observe(network, [probe], t)))
    assert all(same(before, observe(network, [probe], k)) for k, (probe, before) in enumerate(seen))
    assert network.capacity().share("free") > 0


def test_shares_are_kept_and_the_last_planned_task_may_take_all() -> None:
    network = MLP((30, 21))
    taken = []
    for t in range(3):
        task(network, Pruning(tasks=3, tolerance=0.0), seed=t)
        for space in network.prunable().values():
            assert int(space.candidates.sum()) <= max(1, int(space.free.sum()) // (3 - t))
        network.commit()
        taken.append(int((network.prunable()["h0"].owner == t).sum()))
    assert taken[0] <= 10 and sum(taken) <= 30


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_share_is_kept_with_any_budget(total: int) -> None:
    network = MLP()
    pruner, _ = task(network, Pruning(tasks=4), seed=0, total=total)
    assert pruner.stage == "finish" and not pruner.over()


def test_kills_are_accepted_while_quality_holds_and_undone_when_it_falls() -> None:
    network = MLP((40, 40))
    qualities = iter([0.9, 0.895, 0.91, 0.2])  # before; kept; better, and the new best; too low
    config = Pruning(tasks=1, tolerance=0.01, train=0.2, recover=0.05, finish=0.3, step=0.25)
    pruner, reports = task(network, config, seed=0, total=60, quality=lambda: next(qualities))
    assert [r["accepted"] for r in reports] == [1.0, 1.0, 1.0, 0.0]
    assert [int(s.candidates.sum()) for s in network.prunable().values()] == [22, 22]  # 40, 30, 22; 16 was undone
    assert pruner.best == 0.91 and pruner.stage == "finish" and pruner.kept is None


@pytest.mark.parametrize("values", [[-5.0, -5.005, -6.0], [0.0, -0.009, -0.02]])
def test_the_tolerance_is_additive_also_below_zero(values: list[float]) -> None:
    network, qualities = MLP((40,)), iter(values)
    _, reports = task(network, Pruning(tasks=1, tolerance=0.01), seed=0, quality=lambda: next(qualities))
    assert [r["accepted"] for r in reports] == [1.0, 1.0, 0.0]


def test_a_rollback_restores_weights_masks_statistics_moments_and_generator() -> None:
    network, (x, y) = MLP((20,), norm=True), data()
    network.begin_task(generator())
    pruner, rng = Pruner(network, Pruning(tasks=1, train=0.0, recover=0.1, finish=0.0)), generator(4)
    pruner.begin(20)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    qualities = iter([1.0, 0.0])
    saved: dict[str, Any] = {}

    def step() -> None:
        rows = torch.randint(256, (32,), generator=rng)
        optimizer.zero_grad()
        loss_of(network, x[rows], y[rows]).backward()
        optimizer.step()

    def state() -> dict[str, Any]:
        now = {"network": dict(network.state_dict()), "optimizer": optimizer.state_dict(), "rng": rng.get_state()}
        return copy.deepcopy(now)

    def quality() -> float:
        if not saved:
            saved.update(state())
        return next(qualities)

    while pruner.stage != "finish":
        step()
        pruner.advance(quality=quality, losses=list, optimizer=optimizer, rng=rng)
    assert pruner.passes == 1 and same(saved, state())


def test_negative_control_a_rollback_without_the_moments_is_noticed() -> None:
    network, (x, y) = MLP((20,)), data()
    network.begin_task(generator())
    optimizer = fit(network, x, y, 5)
    before = copy.deepcopy({"network": dict(network.state_dict()), "optimizer": optimizer.state_dict()})
    snapshot = network.snapshot()
    optimizer.zero_grad()
    loss_of(network, x, y).backward()
    optimizer.step()
    network.restore(snapshot)
    after = {"network": dict(network.state_dict()), "optimizer": optimizer.state_dict()}
    assert same(before["network"], after["network"]) and not same(before, after)


def test_the_state_of_a_pruner_goes_through_a_file(tmp_path: Any) -> None:
    network = MLP((20,))
    network.begin_task(generator())
    pruner = Pruner(network, Pruning(tasks=2, train=0.1, recover=0.1, finish=0.1))
    pruner.begin(30)
    optimizer = fit(network, *data(), updates=1)
    for _ in range(8):
        pruner.advance(quality=lambda: 0.5, losses=list, optimizer=optimizer, rng=generator())
    assert pruner.kept is not None
    torch.save(pruner.state_dict(), tmp_path / "state.pt")
    other = Pruner(network, pruner.config)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(pruner.state_dict(), other.state_dict())


def test_diverged_training_is_said() -> None:
    network = MLP()
    with pytest.raises(ConfigError, match="quality on held-out data is nan"):
        task(network, Pruning(), seed=0, quality=lambda: math.nan)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"criterion": "l0"}, "criterion 'l0'"),
        ({"step": 1.0}, "step must be between"),
        ({"tolerance": -0.1}, "tolerance must be at least 0"),
        ({"tasks": 0}, "at least 1"),
        ({"train": 0.8, "finish": 0.2}, "nothing to prune in"),
        ({"recover": 0.0}, "shares of a budget"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Pruning(**options)


def test_pruned_outputs_are_those_of_a_network_without_the_units() -> None:
    """A killed unit has no influence: any weights of its row and columns give the same."""
    network, (x, _) = MLP(norm=True), data()
    network.begin_task(generator())
    mask = torch.arange(10) < 4
    network.prunable()["h1"].kill(mask)
    before = outputs(network, [x], 0)
    with torch.no_grad():
        network.layers[1].weight.value[mask] = 1e6
        network.layers[1].bias.value[mask] = 1e6
        network.layers[2].weight.value[:, mask] = 1e6
    assert same(before, outputs(network, [x], 0))
