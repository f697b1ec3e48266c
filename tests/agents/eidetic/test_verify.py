"""The evidence itself: what each level says, and when it says that it cannot say anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.verify import LEVELS, configuration, verify
from clbench.errors import ConfigError

KINDS = ("mlp", "conv", "conv_last", "residual", "gru", "attention", "embedding")
SLOW = [pytest.param(k, marks=() if k in ("mlp", "conv", "attention") else pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", SLOW)
@pytest.mark.parametrize("transfer", [True, False])
def test_all_levels_pass(lab: SimpleNamespace, kind: str, transfer: bool) -> None:
    torch.manual_seed(0)
    net = lab.Zoo(kind, "batch" if kind in ("conv", "gru") else "prefix", transfer=transfer)
    lab.live(net, 2, steps=1, remember=True)
    net.begin_task(lab.generator(0))
    lab.prune(net, lab.generator(1))
    before, mode = net.snapshot(), net.training
    found = verify(net)
    averages = kind == "attention"  # a mean over positions is not exact
    assert found.ok and found.max_abs_change == 0 and found.tasks == 2
    assert found.status == {k: "skip" if averages and k == "L4" else "pass" for k in LEVELS}, found.details
    after = net.state_dict()
    assert all(lab.same(before[k], after[k]) for k in before) and net.training == mode
    assert all(s.taps is None for s in net.all_spaces().values())
    assert set(found.to_dict()) == {"levels", "details", "tasks", "max_abs_change"}


def test_nothing_to_judge_is_not_a_pass(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    found = verify(net)
    assert not found.ok and set(found.status.values()) == {"skip"}
    lab.live(net, 1)
    found = verify(net)  # no probes are known
    assert not found.ok and found.status["L0"] == "pass" and found.status["L2"] == "skip"
    assert "give probes" in found.details["L2"]
    assert verify(net, {0: [lab.draw(net, 3, 0)]}).ok


def test_tasks_without_probes_are_tried_on_those_of_others(lab: SimpleNamespace) -> None:
    """A task that nobody gave probes for is not left out."""
    net = lab.unchecked(lab.Zoo)("mlp")
    net.n2 = _Mean(1)
    lab.live(net, 2)
    x = [lab.draw(net, 4, 0)]
    assert verify(net, {1: x}).status["L2"] == "fail"


class _Mean(nn.Module):
    """Mixes units, but for some inputs alone."""

    def __init__(self, above: float):
        super().__init__()
        self.above = above

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        return x + torch.where(mean.abs() > self.above, mean, 0.0)


def test_coupling_that_training_has_not_shown_yet(lab: SimpleNamespace) -> None:
    """Below the threshold nothing happens; overwriting everything free finds it, comparing outputs does not."""
    torch.manual_seed(0)
    net = lab.unchecked(lab.Zoo)("mlp")
    net.n2 = _Mean(20.0)
    lab.live(net, 2, remember=True)
    found = verify(net)
    assert (found.status["L1"], found.status["L2"]) == ("pass", "fail") and not found.ok
    assert found.max_abs_change > 0 and "N(0, 1000^2)" in found.details["L2"]


class _Leak(eidetic.Linear):
    """A dependence on younger units that rounding hides: only a derivative shows it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + (x.sum(-1, keepdim=True) * 1e-38) * 1e-30


def test_influence_that_rounds_to_nothing_in_outputs(lab: SimpleNamespace) -> None:
    torch.manual_seed(0)
    net = lab.unchecked(lab.Zoo)("mlp").double()
    net.l3 = _Leak(net.spaces["b"], net.spaces["c"]).double()
    lab.live(net, 2, remember=True)
    found = verify(net)
    assert found.status["L1"] == "pass" and found.status["L3"] == "fail", found.to_dict()


def test_the_levels_of_a_network_that_changed(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp", "batch")
    lab.live(net, 2, remember=True)
    good = net.snapshot()
    owned = (net.spaces["b"].owner == 0).nonzero()[0, 0]

    def shift_weight() -> None:
        net.l2.weight.store[owned, net.spaces["a"].owner.argmin()] += 1e-3

    def shift_bias() -> None:
        net.l2.bias.store[owned] += 1e-3

    def shift_gain() -> None:
        net.n2.weight.store[owned] += 1e-3

    def shift_statistics() -> None:
        net.n2.running_mean[owned] += 1e-3

    def shift_head() -> None:
        net.out.layers[0].bias.store[0] += 1e-3

    def give_away() -> None:
        net.spaces["b"].owner[owned] = 1

    def set_free() -> None:
        net.spaces["b"].owner[owned] = eidetic.FREE

    assert verify(net).ok
    for change in (shift_weight, shift_bias, shift_gain, shift_statistics, shift_head, give_away, set_free):
        net.restore(good)
        change()
        found = verify(net)
        assert found.status["L0"] == "fail" and not found.ok, change.__name__
        if change.__name__.startswith("shift"):
            assert found.status["L1"] == "fail" and found.max_abs_change > 0, change.__name__


def test_other_configurations_are_not_compared(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    lab.live(net, 1, remember=True)
    torch.set_num_threads(2)
    found = verify(net)
    assert found.status["L1"] == "skip" and "recorded for" in found.details["L1"] and found.ok
    # recorded once more here, the record of the other configuration stays
    net.remember(0, net.references[0]["inputs"])
    assert verify(net).status["L1"] == "pass" and len(net.references[0]["seen"]) == 2
    torch.set_num_threads(1)
    assert verify(net).status["L1"] == "pass"


def test_a_network_that_differs_from_pass_to_pass_is_not_judged(lab: SimpleNamespace) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    net = lab.Zoo("mlp")
    net.n1 = Noise()
    lab.live(net, 1, remember=True)
    found = verify(net)
    assert found.status["L1"] == found.status["L2"] == "skip" and not found.ok


def test_several_inputs_and_outputs(lab: SimpleNamespace) -> None:
    class Net(eidetic.EideticNetwork):
        def __init__(self) -> None:
            super().__init__()
            x, y, a, b = self.inputs("x", 3), self.inputs("y", 2), self.space("a", 8), self.space("b", 8)
            self.l1, self.l2 = eidetic.Linear([x, y], a), eidetic.Linear(y, b)
            self.norm, self.pi, self.v = eidetic.PrefixNorm([a, b]), self.heads([a, b], 3), self.heads(b, 1)

        def forward(self, x: Tensor, y: Tensor, task: int) -> list[Tensor]:
            a, b = self.l1(torch.cat([x, y], -1)), self.l2(y)
            return [self.pi(torch.relu(self.norm(torch.cat([a, b], -1))), task), self.v(torch.relu(b), task)]

    net, opt = Net(), None
    inputs = [torch.randn(6, 3), torch.randn(6, 2)]
    for t in range(3):
        net.begin_task(lab.generator(t))
        opt = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):
            opt.zero_grad()
            sum(v.square().mean() for v in net(*inputs, task=t)).backward()  # type: ignore[union-attr]
            opt.step()
        lab.prune(net, lab.generator(t))
        net.commit(inputs)
    found = verify(net)
    assert found.status == dict.fromkeys(LEVELS, "pass"), found.details
    net.widen({"a": 2, "b": 1}, lab.generator(0))
    assert verify(net).status["L2"] == "pass" and verify(net).status["L4"] == "pass"


# -- after widening and casting, and where nothing can be judged ---------------------------------------------------------


class Small(eidetic.EideticNetwork):
    def __init__(self, **options: Any):
        super().__init__(**options)
        hidden = self.space("h", 12)
        self.first = eidetic.Linear(self.inputs("x", 5), hidden)
        self.act = eidetic.Activation("relu")
        self.out = self.heads(hidden, 2)

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        return self.out(self.act(self.first(x)), task)


def small(kind: type[Small] = Small, **options: Any) -> Small:
    network = kind(**options)
    network.begin_task(torch.Generator().manual_seed(0))
    network.prunable()["h"].kill(torch.arange(12) < 6)
    network.commit([torch.randn(16, 5, generator=torch.Generator().manual_seed(1))])
    return network


def test_after_widening_extracted_networks_are_compared() -> None:
    network = small()
    network.widen({"h": 37}, torch.Generator().manual_seed(2))
    evidence = verify(network)
    assert evidence.status["L1"] == "pass" and "widened since" in evidence.details["L1"] and evidence.ok
    network.first.weight.store[11] += 1
    assert verify(network).status["L1"] == "fail"


def test_a_network_that_was_cast_is_tried_in_its_dtype() -> None:
    evidence = verify(small().double())
    assert evidence.status["L0"] == evidence.status["L1"] == "skip" and not evidence.ok
    assert evidence.status["L2"] == evidence.status["L3"] == evidence.status["L4"] == "pass"


def test_without_gradients_the_influence_is_not_judged() -> None:
    class Silent(Small):
        def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x, task)

    evidence = verify(small(Silent))
    assert evidence.status["L3"] == "skip" and "carry no gradient" in evidence.details["L3"] and not evidence.ok


def test_frozen_parameters_are_asked_about_too() -> None:
    class Leak(Small):
        def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
            return super().forward(x, task) + self.first.weight.value.sum()

    assert verify(small(Leak).requires_grad_(False)).status["L3"] == "fail"
    assert verify(small().requires_grad_(False)).status["L3"] == "pass"


def test_names_of_methods_and_heads_of_other_tasks_are_refused() -> None:
    class Shadow(Small):
        def __init__(self) -> None:
            super().__init__()
            self.heads = self.heads(self.spaces["h"], 2)

    with pytest.raises(ConfigError, match="Shadow.heads is a method"):
        Shadow()
    network = small()
    network.begin_task(torch.Generator().manual_seed(3))
    network.commit()
    with pytest.raises(ConfigError, match="network of task 0 alone; it has no head for task 1"):
        network.extract(0)(torch.zeros(1, 5), task=1)


def test_an_optimizer_can_be_given_the_new_head() -> None:
    network = small()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network.begin_task(torch.Generator().manual_seed(3))
    new = network.new_parameters(optimizer)
    assert {id(p) for p in new} == {id(p) for p in network.out.layers[1].parameters()}
    optimizer.add_param_group({"params": new})
    assert network.new_parameters(optimizer) == []


def test_a_machine_that_rounds_differently_is_another_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by another result of the fixed computation, as another processor or library gives it."""
    network, x = small(), [torch.zeros(1, 5)]
    before = configuration(network, x)
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda v: tanh(v) * (1 + 2**-23))
    assert configuration(network, x) != before
    evidence = verify(network)
    assert evidence.status["L1"] == "skip" and "0 of 1 tasks have a record" in evidence.details["L1"] and evidence.ok


def test_tasks_without_a_record_here_are_no_pass() -> None:
    """Two tasks, one of them recorded with another number of threads, changed since."""
    network, threads = small(), torch.get_num_threads()
    network.begin_task(torch.Generator().manual_seed(3))
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        network.commit([torch.zeros(4, 5)])
    finally:
        torch.set_num_threads(threads)
    evidence = verify(network)
    assert evidence.status["L1"] == "skip" and "1 of 2 tasks have a record" in evidence.details["L1"]
    network.first.weight.store[11] += 1  # of the first task, which can be judged
    assert verify(network).status["L1"] == "fail"
