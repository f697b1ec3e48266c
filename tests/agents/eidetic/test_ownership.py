"""Spaces, axes and owned parameters: what is free moves, what is owned cannot, and autograd behaves as without them."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.ownership import owned_parameters
from clbench.agents.networks.eidetic.verify import forbidden
from clbench.errors import ConfigError


def mixed(transfer: bool = True) -> tuple[eidetic.Linear, eidetic.Space, eidetic.Space]:
    """8 -> 6; rows 0-1 belong to task 0, 2 to task 1, row 3 is dead; columns 0-2 and 3 likewise, 4 and 5 dead."""
    a, b = eidetic.Space(8, transfer=transfer), eidetic.Space(6, transfer=transfer)
    layer = eidetic.Linear(a, b)
    for p in (layer.weight, layer.bias):
        assert p is not None
        p.reset(torch.Generator().manual_seed(0))
    for task, (columns, rows) in enumerate(((3, 2), (4, 3))):
        a.kill(torch.arange(8) >= columns)
        b.kill(torch.arange(6) >= rows)
        for p in (layer.weight, layer.bias):
            assert p is not None
            p.settle()
        for s in (a, b):
            s.claim(task)
            s.revive()
    a.kill((torch.arange(8) == 4) | (torch.arange(8) == 5))
    b.kill(torch.arange(6) == 3)
    return layer, a, b


def slow(p: eidetic.OwnedParameter, stored: Tensor) -> Tensor:
    """The effective weights, entry by entry, from the table of the paper."""
    assert p.inputs is not None
    rows, columns = p.out[1].spaces[0], p.inputs[1].spaces[0]
    w = torch.zeros_like(p.value)
    for i in range(rows.size):
        for j in range(columns.size):
            older = int(columns.owner[j]) <= int(rows.owner[i])
            same = columns.owner[j] == rows.owner[i] or columns.owner[j] == eidetic.INPUT
            if not (older if p.transfers else same):
                continue
            if rows.owner[i] != eidetic.FREE:
                w[i, j] = stored[i, j]
            elif rows.alive[i] and columns.alive[j]:
                w[i, j] = p.value[i, j]
    return w


@pytest.mark.parametrize("transfer", [True, False])
def test_effective_weights_and_their_gradient_entry_by_entry(transfer: bool) -> None:
    layer, a, b = mixed(transfer)
    p = layer.weight
    with torch.no_grad():
        p.value.copy_(torch.randn_like(p.value))
    expected = slow(p, p.store.clone())
    assert torch.equal(p(), expected)
    assert (expected[:2, :3] != 0).all() and (expected[:2, 3:] == 0).all() and (expected[2, 4:] == 0).all()
    assert bool((expected[2, :3] != 0).all()) == transfer

    (grad,) = torch.autograd.grad((p() * torch.ones_like(p.value)).sum(), p.value)
    trainable = p.trainable().expand_as(grad)
    assert torch.equal(grad, trainable.float())
    assert not trainable[:4].any() and not trainable[:, 4:6].any() and trainable[4:, 6:].all()
    assert bool(trainable[4:, :4].all()) == transfer
    # as layers use it, with the gradient masked in place
    x = torch.randn(5, 8)
    (fast,) = torch.autograd.grad(layer(x).square().sum(), p.value)
    leaf = expected.clone().requires_grad_()
    assert layer.bias is not None
    (plain,) = torch.autograd.grad(F.linear(x, leaf, layer.bias().detach()).square().sum(), leaf)
    assert torch.equal(fast, torch.where(trainable, plain, 0.0))


def test_shared_gradients_are_not_written_into() -> None:
    """``w1 + w2`` hands the same gradient to both."""
    (one, _, _), (two, _, _) = mixed(), mixed()
    two.weight.out[1].spaces[0].kill(torch.arange(6) == 5)
    grads = torch.autograd.grad((one.weight() + two.weight()).square().sum(), [one.weight.value, two.weight.value])
    assert bool((grads[0][5] != 0).any()) and not bool((grads[1][5] != 0).any())


@pytest.mark.parametrize("hostile", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_what_the_parameter_holds_at_owned_and_dead_entries_means_nothing(hostile: float) -> None:
    layer, _, _ = mixed()
    before = layer.weight().detach().clone()
    with torch.no_grad():
        layer.weight.value.masked_fill_(~layer.weight.trainable(), hostile)
    assert torch.equal(layer.weight(), before)
    x = torch.randn(3, 8, requires_grad=True)
    for grad in torch.autograd.grad(layer(x).sum(), [x, layer.weight.value]):
        assert bool(grad.isfinite().all())


def test_writes_through_data_and_views_are_seen_where_free_and_ignored_where_owned() -> None:
    layer, _, _ = mixed()
    p = layer.weight
    old = p().detach().clone()
    p.value.data[:] = 3.0
    p.value.detach()[4].fill_(2.0)
    new = p().detach()
    assert torch.equal(new[:3], old[:3]) and new[4, 7] == 2.0 and new[5, 7] == 3.0
    p.value.data = torch.full((6, 8), 7.0)
    assert p()[5, 7] == 7.0 and torch.equal(p()[:3], old[:3])


def test_graphs_of_changed_weights_raise_as_in_torch() -> None:
    layer, a, _ = mixed()
    x = torch.randn(4, 8, requires_grad=True)

    def change() -> None:
        with torch.no_grad():
            layer.weight.value.add_(1.0)

    # two forwards of the same weights, then both graphs: fine
    one, two = layer(x).sum(), layer(x).square().sum()
    one.backward()
    two.backward()
    # the optimizer steps between forward and backward
    stale = layer(x).sum()
    change()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    # the weights are used again in between, and only the gradient of the input is asked for
    stale = layer(x).sum()
    change()
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(stale, x)
    # pruning in between changes weights, too
    stale = layer(x).sum()
    a.kill(torch.arange(8) == 7)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(stale, x)


def test_second_derivatives() -> None:
    layer, _, _ = mixed()
    layer.double()
    value = layer.weight.value
    x = torch.randn(3, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), value, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), value)
    trainable = layer.weight.trainable().expand_as(second)
    assert bool((second[~trainable] == 0).all()) and bool((second[trainable] != 0).all())


def test_masks_made_in_inference_mode_serve_in_training() -> None:
    net = eidetic.BatchNorm(space := eidetic.Space(4))
    prefix, (layer, a, _) = eidetic.PrefixNorm(space), mixed()
    a.kill(torch.arange(8) == 6)
    space.kill(torch.arange(4) == 1)
    with torch.inference_mode():
        net(torch.randn(3, 4)), prefix(torch.randn(3, 4)), layer(torch.randn(2, 8))
    x = torch.randn(3, 4, requires_grad=True)
    (net(x).sum() + prefix(x).sum() + layer(torch.randn(2, 8)).sum()).backward()


def test_copies_make_masks_of_their_own() -> None:
    layer, _, _ = mixed()
    layer(torch.randn(2, 8))
    other = copy.deepcopy(layer)
    space = other.weight.out[1].spaces[0]
    assert space is other.out and space is not layer.out
    space.kill(torch.arange(6) == 5)
    assert bool((other.weight()[5] == 0).all()) and bool((layer.weight()[5] != 0).any())


def test_owners_only_change_from_free(lab: SimpleNamespace) -> None:
    net, before = lab.Zoo("residual"), {}

    def after(what: str, task: int) -> None:
        for name, space in net.all_spaces().items():
            old = before.get(name)
            if old is not None:
                changed = old != space.owner
                assert bool((old[changed] == eidetic.FREE).all())
                assert bool((space.owner[changed] == task).all()) and (what == "commit" or not changed.any())
            before[name] = space.owner.clone()

    lab.live(net, 4, steps=1, after=after)


def test_killing_owned_units_is_refused() -> None:
    _, a, _ = mixed()
    before = a.alive.clone()
    with pytest.raises(ConfigError, match="owned"):
        a.kill(torch.arange(8) == 0)
    assert torch.equal(a.alive, before)


def test_nothing_flows_from_younger_to_older_and_owned_numbers_never_move(lab: SimpleNamespace) -> None:
    """The static invariants, for heads and biases too, after every step of the optimizer."""
    net = lab.Zoo("attention", "batch")
    record: dict[str, Tensor] = {}

    def owned() -> dict[str, Tensor]:
        found = {n: p().detach().masked_fill(~p.owned(), 0.0) for n, p in owned_parameters(net)}
        return found

    def after(what: str, task: int) -> None:
        assert forbidden(net) == ""
        now = owned()
        for name, value in record.items():
            if what != "commit":
                assert torch.equal(value, now[name]), (what, task, name)
        if what == "commit":
            for name, value in now.items():
                if name in record:
                    was = record[name] != 0
                    assert torch.equal(value[was], record[name][was])
            record.update(now)
            assert [net.digest(k) for k in range(task + 1)] == net.digests

    lab.live(net, 4, steps=1, after=after)
    assert {"out.layers.0.weight", "out.layers.0.bias"} <= set(record)


def test_negative_control_a_weight_from_young_to_old_is_found() -> None:
    class Net(eidetic.EideticNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spaces["a"], self.spaces["b"] = mixed()
            self.committed = 2

    net = Net()
    assert forbidden(net) == ""
    net.layer.weight.store[0, 7] = 1e-30
    assert "layer.weight" in forbidden(net)


# -- axes ----------------------------------------------------------------------------------------------------------------


def test_axes_follow_flattened_planes() -> None:
    """Columns of a layer after Flatten, in both orders: by a picture whose pixels say their channel."""
    space = eidetic.Space(3)
    space.owner.copy_(torch.tensor([0, 1, 2]))
    planes = space.owner[:, None, None].expand(3, 2, 2)
    first, last = eidetic.Axis((space,), inner=4), eidetic.Axis((space,), outer=4)
    assert torch.equal(first.owners(), planes.flatten())
    assert torch.equal(last.owners(), planes.permute(1, 2, 0).flatten())


def test_axes_grow_as_their_spaces_do() -> None:
    a, b = eidetic.Space(2, group=2), eidetic.Space(3)
    axis = eidetic.Axis((a, b), inner=2, outer=2)
    source = axis.gather({a: torch.tensor([0, 1, -1])})
    block = [0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11, 12, 13]
    assert source.tolist() == block + [i + 14 if i >= 0 else -1 for i in block]


def test_spaces_need_units() -> None:
    with pytest.raises(ConfigError, match="at least one unit"):
        eidetic.Space(0)
