"""Counting who owns what, running out of units, shares, widening, and the network of one task alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.ownership import owned_parameters
from clbench.agents.networks.eidetic.verify import verify, whole_twin
from clbench.errors import CapacityExhausted, ConfigError

KINDS = ("mlp", "conv", "conv_last", "residual", "gru", "attention", "embedding")


@pytest.mark.parametrize("transfer", [True, False])
def test_accounting_sums_to_one_and_counts_what_is_there(lab: SimpleNamespace, transfer: bool) -> None:
    net = lab.Zoo("residual", transfer=transfer)
    for tasks in (0, 1, 1, 1):
        lab.live(net, tasks, steps=1)
        found = net.capacity()
        assert found.live + found.dead + found.free == pytest.approx(1)
        owners = ["free", *map(str, range(net.committed))]
        assert sum(found.share(o) for o in owners) == pytest.approx(1)
        for name, units in found.units.items():
            assert sum(units.values()) == net.prunable()[name].size
        live = dead = free = 0
        for _, p in owned_parameters(net):
            if p.inputs is None:
                continue
            # weights of a young unit to an old one are 0, all others of owned units are not
            owned = p.owned().expand_as(p.value)
            nonzero = int((p().detach()[owned] != 0).sum())
            live, dead, free = live + nonzero, dead + int(owned.sum()) - nonzero, free + int((~owned).sum())
        total = live + dead + free
        assert (found.live, found.dead, found.free) == pytest.approx((live / total, dead / total, free / total))
    assert found.reuse[0] == 0 and (found.reuse[2] > 0) == transfer


def test_running_out_raises_and_changes_nothing(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    lab.live(net, 1, passes=(0,))  # nothing pruned: everything is taken
    with pytest.raises(CapacityExhausted, match="a has 0 free units"):
        net.begin_task(lab.generator(0))
    assert not net.begun and len(net.out) == 1
    few = lab.Zoo("mlp", least=9)
    lab.live(few, 1, passes=(1,))
    with pytest.raises(CapacityExhausted, match="of 9 needed"):
        few.begin_task(lab.generator(0))
    net.widen({"a": 4, "b": 4, "c": 4}, lab.generator(0))
    assert net.begin_task(lab.generator(0)) == 1


@pytest.mark.parametrize("norm", ["none", "batch", "prefix"])
def test_heads_alone_when_there_is_no_room(lab: SimpleNamespace, norm: str) -> None:
    net = lab.Zoo("mlp", norm, exhausted="head-only")
    watch = lab.live(net, 1, passes=(0,))
    lab.live(net, 2, passes=(0,), watch=watch, remember=True)
    assert net.committed == 3 and watch.changed(net) == [] and verify(net, {0: [lab.draw(net, 4, 0)]}).ok
    assert net.capacity().share("0") == 1
    # without transfer a head would have nothing to read
    apart = lab.Zoo("mlp", norm, exhausted="head-only", transfer=False)
    lab.live(apart, 1, passes=(0,))
    with pytest.raises(CapacityExhausted):
        apart.begin_task(lab.generator(0))


def test_shares(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    net.begin_task(lab.generator(0))
    with pytest.raises(ConfigError, match="16 of the 16 units of a, more than its share of 0.5"):
        net.commit(cap=0.5)
    assert net.begun and net.committed == 0
    lab.prune(net, lab.generator(1))
    with pytest.raises(ConfigError, match="share of 0.49"):
        net.commit(cap=0.49)  # 7.84 units are not 8
    net.commit(cap=0.5)
    assert net.capacity().units["a"] == {"0": 8, "free": 8}


def test_options_are_checked(lab: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="exhausted"):
        lab.Zoo("mlp", exhausted="ask")
    net = lab.Zoo("mlp")
    for units in ({"nothing": 1}, {"a": 0}, {"x": 1}):
        with pytest.raises(ConfigError, match="widen adds"):
            net.widen(units, lab.generator(0))
    with pytest.raises(ConfigError, match="not committed"):
        net.extract(0)
    with pytest.raises(ConfigError, match="no head for task 0"):
        net(lab.draw(net, 2, 0), task=0)


# -- widening and extraction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_widening_and_extraction(lab: SimpleNamespace, kind: str, transfer: bool) -> None:
    """Extracted networks bit for bit, their exact twins, and the whole network up to rounding; then life goes on."""
    torch.manual_seed(0)
    net = lab.Zoo(kind, "batch" if kind.startswith("conv") else "prefix", transfer=transfer)
    watch = lab.live(net, 2, steps=1, remember=True)
    x = lab.draw(net, 6, 3)
    twin = whole_twin(net, lab.generator(4))
    given = x if kind == "embedding" else torch.randint(0, 3, x.shape, generator=lab.generator(5)).double()
    exact = [lab.outputs(twin, [given], k) for k in range(2)]
    block = [lab.outputs(net.extract(k), [x], k) for k in range(2)]
    dense = [lab.outputs(net, [x], k) for k in range(2)]
    units = {n: 1 + i for i, n in enumerate(net.prunable())}
    for it in (net, twin):
        it.widen(units, lab.generator(6))
    assert lab.same(exact, [lab.outputs(twin, [given], k) for k in range(2)])
    assert lab.same(exact, [lab.outputs(twin.extract(k), [given], k) for k in range(2)])
    assert lab.same(block, [lab.outputs(net.extract(k), [x], k) for k in range(2)])
    for before, k in zip(dense, range(2)):
        torch.testing.assert_close(before, lab.outputs(net, [x], k))
        torch.testing.assert_close(before, block[k])
        # what tasks own has the same hash, and a smaller network holds it all
        assert net.digest(k) == net.digests[k]
    small = net.extract(0)
    assert sum(s.size for s in small.all_spaces().values()) < sum(s.size for s in net.all_spaces().values())
    after = lab.Watch()
    for k in watch.before:
        after.add(net, k)
    lab.live(net, 1, steps=1, watch=after)
    assert after.changed(net) == [] and lab.same(block, [lab.outputs(net.extract(k), [x], k) for k in range(2)])


def test_negative_control_a_twin_that_is_not_exact(lab: SimpleNamespace) -> None:
    """In float32 with ordinary weights the extracted network rounds differently, so the comparison can fail."""
    torch.manual_seed(0)
    net = lab.Zoo("mlp")
    lab.live(net, 2)
    x = lab.draw(net, 256, 0)
    assert not lab.same(lab.outputs(net, [x], 0), lab.outputs(net.extract(0), [x], 0))


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention", "gru", "embedding"])
@pytest.mark.parametrize("transfer", [True, False])
def test_a_task_without_a_unit_of_its_own_in_a_space(lab: SimpleNamespace, kind: str, transfer: bool) -> None:
    """Spaces may be empty in what is extracted."""
    net = lab.Zoo(kind, "prefix", transfer=transfer)
    lab.live(net, 1, steps=1)
    t = net.begin_task(lab.generator(0))
    for space in net.prunable().values():
        space.kill(space.free)
    net.commit([x := lab.draw(net, 3, 0)])
    torch.testing.assert_close(lab.outputs(net, [x], t), lab.outputs(net.extract(t), [x], t))
    assert verify(net).ok


def test_extracted_networks_follow_nothing(lab: SimpleNamespace) -> None:
    net = lab.Zoo("residual", "batch")
    lab.live(net, 1)
    alone, x = net.extract(0), lab.draw(net, 4, 0)
    before = lab.outputs(alone, [x], 0)
    lab.live(net, 2)
    assert lab.same(before, lab.outputs(alone, [x], 0))
    assert not alone.training and not any(p.requires_grad for p in alone.parameters())
    assert net.spaces["a"].owner is not alone.spaces["a"].owner
    assert eidetic.FREE not in alone.spaces["a"].owner
