"""Outputs and owned activations of finished tasks stay bit for bit the same, whatever is done later; and the controls."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.verify import fill_free, verify

KINDS = ("mlp", "conv", "conv_last", "residual", "gru", "attention", "embedding")
NORMS = ("none", "batch", "prefix")


QUICK = (
    "mlp batch",
    "conv batch",
    "conv_last prefix",
    "residual prefix",
    "gru none",
    "attention prefix",
    "embedding batch",
)
ALL = [
    pytest.param(kind, norm, marks=() if f"{kind} {norm}" in QUICK else pytest.mark.slow)
    for kind in KINDS
    for norm in NORMS
]


@pytest.mark.parametrize("kind, norm", ALL)
def test_five_tasks_that_prune_more_and_more(lab: SimpleNamespace, kind: str, norm: str) -> None:
    torch.manual_seed(0)
    net, watch = lab.Zoo(kind, norm), lab.Watch()
    seen = []

    def after(what: str, task: int) -> None:
        seen.append(what)
        assert watch.changed(net) == [], f"{what} of task {task}"

    how = ("random", "l1", "l2")[NORMS.index(norm)]
    lab.live(net, 5, steps=1, how=how, watch=watch, after=after)
    assert net.committed == 5 and watch.changed(net) == []
    assert seen.count("prune") == 12 and len(watch.before) == 5
    for scale in (0.0, 1.0, 1e3):
        fill_free(net, scale, lab.generator(3))
        assert watch.changed(net) == [], f"overwritten with N(0, {scale}^2)"


@pytest.mark.parametrize("transfer", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mlp", "conv", "gru"])
def test_per_configuration_dtypes_and_batches(
    lab: SimpleNamespace, kind: str, dtype: torch.dtype, transfer: bool
) -> None:
    torch.manual_seed(0)
    net = lab.Zoo(kind, "batch" if kind == "conv" else "prefix", transfer=transfer).to(dtype)
    watch = lab.Watch(batches=(1, 7, 256))

    def after(what: str, task: int) -> None:
        if what in ("train", "commit"):
            assert watch.changed(net) == []

    lab.live(net, 3, steps=1, watch=watch, after=after)
    assert watch.changed(net) == []


def test_repeatability_first(lab: SimpleNamespace) -> None:
    """If two passes of the same network differed here, no other comparison would mean anything."""
    net = lab.Zoo("conv", "prefix")
    watch = lab.live(net, 1)
    assert all(watch.changed(net) == [] for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_per_number_of_threads(lab: SimpleNamespace, threads: int) -> None:
    torch.set_num_threads(threads)  # put back by a fixture
    net, watch = lab.Zoo("mlp", "prefix"), lab.Watch(batches=(1, 256))
    lab.live(net, 2, watch=watch)
    lab.live(net, 1, watch=watch)
    assert watch.changed(net) == []


@pytest.mark.parametrize("norm", NORMS)
def test_owned_units_do_the_same_in_training_as_at_test_time(lab: SimpleNamespace, norm: str) -> None:
    """Gains and offsets are not 1 and 0, and the batch has other statistics than those that are stored."""
    net = lab.Zoo("mlp", norm)
    watch = lab.live(net, 2, steps=4)
    net.begin_task(lab.generator(4))
    x = 3 * lab.draw(net, 64, 9) + 1
    for task in watch.before:
        expected = lab.outputs(net, [x], task)
        net.train()
        assert lab.same(expected, [net(x, task=task).detach()])


# -- optimisers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
}


@pytest.mark.parametrize("renew", [False, True], ids=["one object", "new ones"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(lab: SimpleNamespace, name: str, renew: bool) -> None:
    torch.manual_seed(0)
    net, watch = lab.Zoo("residual", "batch"), lab.Watch()

    def after(what: str, task: int) -> None:
        assert watch.changed(net) == [], f"{what} of task {task}"

    lab.live(net, 3, optimizer=OPTIMIZERS[name], watch=watch, after=after, renew=renew)
    assert watch.changed(net) == []


def test_clipping_and_resets_and_averages_of_parameters(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp", "batch")
    watch = lab.live(net, 2)
    net.begin_task(lab.generator(2))
    opt = lab.adamw(net.parameters())
    average = torch.optim.swa_utils.AveragedModel(net)
    for i in range(3):
        lab.loss_of(net, 2, i).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        opt.step()
        average.update_parameters(net)
        with torch.no_grad():
            for p in net.parameters():  # shrink and perturb, clip, through .data as well
                p.mul_(0.9).add_(0.1 * torch.randn_like(p)).clamp_(-1, 1)
                p.data.add_(1.0)
        nn.utils.vector_to_parameters(
            torch.randn_like(nn.utils.parameters_to_vector(net.parameters())), net.parameters()
        )
        assert watch.changed(net) == []
        assert watch.changed(average.module) == []


def test_loss_scaling_of_mixed_precision(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp", "prefix")
    watch = lab.live(net, 2)
    net.begin_task(lab.generator(2))
    opt, scaler = lab.adamw(net.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = lab.loss_of(net, 2, i)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert watch.changed(net) == []


# -- negative controls: each is broken in one way, and the comparison has to see it --------------------------------------


def raw(net: eidetic.EideticNetwork) -> None:
    """Protection by zeroing gradients alone: owned numbers are in the parameter and not in a buffer."""
    for part in net.modules():
        if isinstance(part, eidetic.OwnedParameter):
            part.__class__ = GradientMasked


class GradientMasked(eidetic.OwnedParameter):
    def forward(self, *, private: bool = False) -> Tensor:
        mask = self.trainable().expand_as(self.value)
        with torch.no_grad():  # what is not readable is 0, as it should be
            keep = self.owned() | mask
            self.value.mul_(keep)
        return mask * self.value + (~mask * self.value).detach()


@pytest.mark.parametrize(
    "make, survives",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), True),  # the control of the control: here zero gradients are enough
        (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), False),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), False),
        (lambda p: torch.optim.Adam(p, lr=1e-2), False),
    ],
    ids=["sgd", "adamw decay", "decay", "momentum", "adam moments"],
)
def test_gradient_masks_alone_forget(lab: SimpleNamespace, make: Any, survives: bool) -> None:
    torch.manual_seed(0)
    net = lab.Zoo("mlp")
    raw(net)
    net.begin_task(lab.generator(1))
    opt, watch = make(net.parameters()), lab.Watch()
    for i in range(3):
        lab.step(net, opt, 0, i)
    lab.prune(net, lab.generator(2))
    lab.step(net, opt, 0, 9)
    net.commit()
    watch.add(net, 0)
    for space in net.prunable().values():
        space.revive()
    net.out.open()
    net.begun = True
    opt.add_param_group({"params": net.out.layers[1].parameters()})
    for i in range(3):
        lab.step(net, opt, 1, i)
    assert (watch.changed(net) == []) == survives


def test_averaging_of_owned_numbers_forgets(lab: SimpleNamespace) -> None:
    """tau * x + (1 - tau) * x is not x in floating point: a target network has to copy what is owned."""
    net = lab.Zoo("mlp")
    watch = lab.live(net, 1)
    for _, p in eidetic.ownership.owned_parameters(net):
        p.store.copy_(0.995 * p.store + (1 - 0.995) * p.store)
    assert watch.changed(net) == [0]
    assert verify(net, {0: [lab.draw(net, 4, 0)]}).status["L0"] == "fail"


class PlainNorm(nn.Module):
    """LayerNorm, written so that no name gives it away."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()


class Quantised(nn.Module):
    """Activations rounded to 8 bits on a scale that is taken from the batch at hand."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max() / 127
        return x + (torch.round(x / scale) * scale - x).detach()


class Spectral(eidetic.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight()
        return F.linear(x, weight / torch.linalg.matrix_norm(weight, 2))


class SumOfAll(eidetic.Linear):
    """Reads its input past the wiring: a reader whose columns nobody masks."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.sum(-1, keepdim=True)


class Undeclared(eidetic.Linear):
    """A reader that says it reads given numbers, and so has no columns to cut."""

    def __init__(self, inputs: eidetic.Space, out: eidetic.Space):
        super().__init__(eidetic.Space(inputs.size, owner=eidetic.INPUT), out)


class MovingNorm(eidetic.BatchNorm):
    """BatchNorm whose statistics of owned channels move, as they would in an ordinary one."""

    def _update(self, mean: Tensor, var: Tensor, trained: Tensor) -> None:
        super()._update(mean, var, torch.ones_like(trained))


def broken(lab: SimpleNamespace, which: str) -> eidetic.EideticNetwork:
    net = lab.unchecked(lab.Zoo)("conv" if which == "flatten" else "mlp", "batch" if which == "statistics" else "none")
    spaces = net.spaces
    if which == "layer norm":
        net.n2 = PlainNorm()
    elif which == "quantisation":
        net.n2 = Quantised()
    elif which == "spectral norm":
        net.l2 = Spectral(spaces["a"], spaces["b"])
    elif which == "sum":
        net.l3 = SumOfAll(spaces["b"], spaces["c"])
    elif which == "undeclared":
        net.l3 = Undeclared(spaces["b"], spaces["c"])
    elif which == "statistics":
        for part in net.modules():
            if type(part) is eidetic.BatchNorm:
                part.__class__ = MovingNorm
    elif which == "flatten":  # columns as if channels came last
        net.l3 = eidetic.Linear(spaces["b"], spaces["c"], repeat=9, channels_last=True)
    return net


BROKEN = ("layer norm", "quantisation", "spectral norm", "sum", "undeclared", "statistics", "flatten")


@pytest.mark.parametrize("which", ["nothing", *BROKEN])
def test_broken_layers_are_found(lab: SimpleNamespace, which: str) -> None:
    torch.manual_seed(0)
    net = broken(lab, which)
    recorded = which != "undeclared"  # that one cannot be extracted, which recording does
    watch = lab.live(net, 2, remember=recorded)
    # training goes on: the comparison of outputs has to see it
    net.begin_task(lab.generator(5))
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    for i in range(3):
        lab.step(net, opt, 2, i)
    assert (watch.changed(net) == []) == (which == "nothing")
    found = verify(net, {0: [lab.draw(net, 5, 77)]})
    assert found.ok == (which == "nothing"), found.to_dict()
    if recorded:
        assert found.status["L1"] == ("pass" if which == "nothing" else "fail")
    if which not in ("nothing", "statistics"):
        assert found.status["L2"] == "fail"
    if which == "statistics":
        assert found.status["L0"] == "fail"


def test_pruning_that_reaches_owned_units_is_refused_and_found(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp", "prefix")
    watch = lab.live(net, 2, remember=True)
    space = net.spaces["b"]
    owned = ~space.free
    with pytest.raises(eidetic.ownership.ConfigError, match="Only free units"):
        space.kill(owned)
    assert watch.changed(net) == []
    space.alive[owned.nonzero()[0]] = False  # past the method
    assert watch.changed(net) == [0, 1]
    assert verify(net).status["L0"] == "fail"
