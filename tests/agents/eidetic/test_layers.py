"""Each layer against torch's while nothing is owned, and what is particular to it once something is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.ownership import owned_parameters
from clbench.errors import ConfigError


def like(ours: eidetic.OwnedParameter | None, theirs: Tensor) -> None:
    assert ours is not None
    with torch.no_grad():
        ours.value.copy_(theirs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b)


def test_layers_of_free_units_are_those_of_torch() -> None:
    torch.manual_seed(0)
    s = eidetic.Space
    linear, theirs = eidetic.Linear([s(3), s(2)], s(4)), nn.Linear(5, 4)
    like(linear.weight, theirs.weight), like(linear.bias, theirs.bias)
    x = torch.randn(7, 2, 5)
    close(linear(x), theirs(x))

    conv, theirs = eidetic.Conv2d(s(3), s(4), 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, 2, 1)
    like(conv.weight, theirs.weight), like(conv.bias, theirs.bias)
    x = torch.randn(2, 3, 6, 6)
    close(conv(x), theirs(x))
    close(conv(x.to(memory_format=torch.channels_last)), theirs(x))
    close(conv(x.transpose(2, 3)), theirs(x.transpose(2, 3).contiguous()))

    embedding, theirs = eidetic.Embedding(5, s(4)), nn.Embedding(5, 4)
    like(embedding.weight, theirs.weight)
    close(embedding(torch.arange(5)), theirs(torch.arange(5)))

    gru, theirs = eidetic.GRUCell(s(3), s(4)), nn.GRUCell(3, 4)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        like(getattr(gru, name), getattr(theirs, name))
    x, h = torch.randn(6, 3), torch.randn(6, 4)
    close(gru(x, h), theirs(x, h))

    norm, theirs = eidetic.PrefixNorm([s(3), s(5)]), nn.LayerNorm(8)
    x = torch.randn(6, 8)
    close(norm(x), theirs(x))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_torch(causal: bool) -> None:
    torch.manual_seed(0)
    stream = eidetic.Space(6)
    ours, theirs = eidetic.MultiheadAttention(stream, eidetic.Space(2, group=3), stream, causal=causal), None
    theirs = nn.MultiheadAttention(6, 2, batch_first=True)
    for i, part in enumerate((ours.query, ours.key, ours.value)):
        like(part.weight, theirs.in_proj_weight[6 * i : 6 * i + 6])
        like(part.bias, theirs.in_proj_bias[6 * i : 6 * i + 6])
    like(ours.output.weight, theirs.out_proj.weight), like(ours.output.bias, theirs.out_proj.bias)
    x = torch.randn(3, 5, 6)
    mask = ~torch.ones(5, 5, dtype=torch.bool).tril() if causal else None
    close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(16, 6), (8, 6, 4, 5)])
def test_batch_norm_of_free_channels_is_that_of_torch(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    ours = eidetic.BatchNorm(eidetic.Space(6), momentum=momentum).double()
    theirs = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(6, momentum=momentum).double()
    with torch.no_grad():
        for a, b in ((ours.weight.value, theirs.weight), (ours.bias.value, theirs.bias)):
            a.copy_(torch.randn(6)), b.copy_(a)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64) * 2 + 1
        x.requires_grad_()
        a, b = ours(x), theirs(x)
        close(a, b)
        g = torch.randn_like(a)
        wanted = [x, ours.weight.value, ours.bias.value]
        for p, q in zip(torch.autograd.grad(a, wanted, g), torch.autograd.grad(b, [x, *theirs.parameters()], g)):
            close(p, q)
    close(ours.running_mean, theirs.running_mean), close(ours.running_var, theirs.running_var)
    close(ours.eval()(x), theirs.eval()(x))


def owned_norm(kind: Any, **options: Any) -> Any:
    """A norm of 6 numbers: 0-1 of task 0, 2 of task 1, 3-4 free, 5 pruned; gains and offsets are not 1 and 0."""
    space = eidetic.Space(6)
    norm = kind(space, **options).double()
    with torch.no_grad():
        norm.weight.value.copy_(torch.linspace(0.5, 2, 6)), norm.bias.value.copy_(torch.linspace(-1, 1, 6))
    if kind is eidetic.BatchNorm:
        norm.running_mean.copy_(torch.linspace(0, 1, 6)), norm.running_var.copy_(torch.linspace(1, 4, 6))
    norm.weight.settle(), norm.bias.settle()
    space.owner[:3] = torch.tensor([0, 0, 1])
    space.kill(torch.arange(6) == 5)
    return norm


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_owned_channels(momentum: float | None) -> None:
    norm = owned_norm(eidetic.BatchNorm, momentum=momentum)
    x = (5 * torch.randn(8, 6, 3, 3, dtype=torch.float64) + 2).requires_grad_()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    train = norm.train()(x)
    test = norm.eval()(x)
    # owned: the stored statistics in both modes; free: those of the batch; pruned: 0
    assert torch.equal(train[:, :3], test[:, :3]) and not torch.equal(train[:, 3:5], test[:, 3:5])
    assert bool((train[:, 5] == 0).all())
    reference = nn.BatchNorm2d(6).double()
    with torch.no_grad():
        reference.weight.copy_(norm.weight.value), reference.bias.copy_(norm.bias.value)
    theirs = reference(x)
    close(train[:, 3:5], theirs[:, 3:5])
    # gradients: of fixed statistics where owned, through the statistics where free
    g = torch.randn_like(train)
    (dx,) = torch.autograd.grad(train, x, g)
    (free,) = torch.autograd.grad(theirs, x, g)
    close(dx[:, 3:5], free[:, 3:5])
    scale = norm.weight().detach() / (norm.running_var + norm.eps).sqrt()
    close(dx[:, :3], g[:, :3] * scale[:3, None, None])
    assert bool((dx[:, 5] == 0).all())
    # statistics of owned and pruned channels do not move, with infinite batches neither
    norm.train()(torch.full_like(x, torch.inf))
    still = [0, 1, 2, 5]
    assert torch.equal(norm.running_mean[still], mean[still]) and torch.equal(norm.running_var[still], var[still])
    assert not bool((mean[3:5] == norm.running_mean[3:5]).any())
    assert not bool(norm.weight.trainable()[:3].any())


def test_batch_norm_of_a_single_row_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="at least 2 values"):
        eidetic.BatchNorm(eidetic.Space(3))(torch.randn(1, 3))


def test_prefix_norm_unit_by_unit() -> None:
    norm = owned_norm(eidetic.PrefixNorm)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = norm(x)
    for i, members in enumerate(([0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])):
        part = x[:, members]
        expected = (x[:, i] - part.mean(1)) / (part.var(1, correction=0) + norm.eps).sqrt()
        close(y[:, i], expected * norm.weight.value[i] + norm.bias.value[i])
    assert bool((y[:, 5] == 0).all())


def test_prefix_norm_without_transfer_where_a_level_is_empty() -> None:
    """All free units pruned: no mean of nothing, and no NaN in anybody's gradient."""
    space = eidetic.Space(4, transfer=False)
    norm = eidetic.PrefixNorm(space)
    norm.weight.settle(), norm.bias.settle()  # type: ignore[union-attr]
    space.owner[:2] = 0
    space.kill(torch.arange(4) > 1)
    x = torch.randn(3, 4, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()
    assert bool(y.isfinite().all()) and x.grad is not None and bool(x.grad.isfinite().all())


def test_a_killed_unit_is_cut_from_every_reader(lab: SimpleNamespace) -> None:
    """Outputs do not depend on what a killed unit would be: completeness of the wiring, for every kind of network."""
    for kind in ("mlp", "conv", "conv_last", "residual", "gru", "attention", "embedding"):
        for norm in ("none", "batch", "prefix"):
            net = lab.Zoo(kind, norm)
            net.begin_task(lab.generator(0))
            for space in net.prunable().values():
                space.kill(torch.arange(space.size) % 3 == 0)
            x = lab.draw(net, 4, 1)
            before = lab.outputs(net, [x], 0)
            with torch.no_grad():
                for _, p in owned_parameters(net):
                    p.value.copy_(torch.where(p.trainable(), p.value, 1e6))
            assert lab.same(before, lab.outputs(net, [x], 0)), (kind, norm)


def test_new_units_train_and_owned_ones_get_no_gradient(lab: SimpleNamespace) -> None:
    for kind in ("mlp", "conv", "residual", "gru", "attention", "embedding"):
        torch.manual_seed(0)
        net = lab.Zoo(kind, "prefix")
        lab.live(net, 1)
        t = net.begin_task(lab.generator(2))
        net.train().zero_grad()
        sum(lab.loss_of(net, t, i) for i in range(8)).backward()  # type: ignore[union-attr]
        for name, p in owned_parameters(net):
            if name.startswith("out.layers.0"):
                assert p.value.grad is None
                continue
            grad = p.value.grad
            assert grad is not None
            moving = grad.movedim(p.out[0], 0).reshape(p.out[1].size, -1).abs().sum(1) > 0
            # an offset of all keys alike changes no attention
            assert torch.equal(moving, p.rows()) or name == "att.key.bias", name
            assert not bool((moving & ~p.rows()).any()), name
            assert bool(moving.any()), name


def test_learning_goes_down_for_a_later_task(lab: SimpleNamespace) -> None:
    torch.manual_seed(0)
    net = lab.Zoo("mlp", "batch")
    lab.live(net, 2)
    t = net.begin_task(lab.generator(2))
    opt = torch.optim.Adam(net.parameters(), lr=3e-2)
    first = lab.loss_of(net.train(), t, 5)
    for _ in range(60):
        lab.step(net, opt, t, 5)
    assert lab.loss_of(net, t, 5) < 0.3 * first


# -- what the network refuses --------------------------------------------------------------------------------------------


class MyNorm(nn.LayerNorm): ...


class Scale(eidetic.layers.EideticLayer):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def frozen(module: nn.Module, really: bool = True) -> nn.Module:
    module.frozen = True  # type: ignore[assignment]
    return module.requires_grad_(not really)


@pytest.mark.parametrize(
    "part, words",
    [
        (lambda: nn.LayerNorm(16), "use eidetic.PrefixNorm"),
        (lambda: MyNorm(16, elementwise_affine=False), "use eidetic.PrefixNorm"),
        (lambda: nn.Linear(16, 16), "use eidetic.Linear"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(16)), "use eidetic.BatchNorm"),
        (lambda: nn.Softmax(-1), "softmax"),
        (lambda: nn.ChannelShuffle(2), "not known whether it mixes"),
        (Scale, "no task owns"),
        (lambda: nn.utils.parametrizations.spectral_norm(eidetic.Linear(s := eidetic.Space(4), s).weight, "value"),
         "parametrization"),
        (lambda: eidetic.Linear(eidetic.Space(16), eidetic.Space(16)), "no part of the network"),
        (lambda: frozen(nn.Linear(16, 16), really=False), "require gradients"),
    ],
)  # fmt: skip
def test_layers_that_break_the_guarantee_are_refused(lab: SimpleNamespace, part: Any, words: str) -> None:
    net = lab.Zoo("mlp")
    net.n2 = part()
    with pytest.raises(ConfigError, match=words):
        net.begin_task(lab.generator(0))


def test_weights_of_the_network_itself_are_refused(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    net.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="The network itself has weights"):
        net.begin_task(lab.generator(0))


def test_layers_added_after_the_first_task_are_refused_too(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    lab.live(net, 1)
    net.n3 = nn.LayerNorm(16)
    with pytest.raises(ConfigError, match="LayerNorm"):
        net.begin_task(lab.generator(0))


def test_frozen_modules_are_allowed_and_hashed(lab: SimpleNamespace) -> None:
    net = lab.Zoo("mlp")
    net.n1 = nn.Identity()
    net.pretrained = frozen(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    lab.live(net, 1)
    assert net.digest(0) == net.digests[0]
    with torch.no_grad():
        net.pretrained[0].bias.add_(1e-6)  # type: ignore[union-attr,index]
    assert net.digest(0) != net.digests[0]
