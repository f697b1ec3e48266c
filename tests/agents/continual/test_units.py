"""Hidden units: where they are in each kind of network, that they are watched when they should be, and made anew."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.agents.bc import Policy
from clbench.agents.continual.compose import compose, optimizers_of
from clbench.agents.continual.method import Method
from clbench.agents.continual.units import Activity, Hidden, UnitMethod, find_units
from clbench.agents.gcrl.networks import MLP as StackedMLP
from clbench.agents.jepa.encoders import StateEncoder
from clbench.agents.jepa.layers import initialise
from clbench.agents.jepa.predictors import MLPPredictor
from clbench.agents.networks.mlp import MLP, dense
from clbench.config import build
from clbench.errors import ConfigError
from clbench.testing.fixtures import FIXTURES, Fixture


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Holder:
    """An agent as far as units are concerned."""

    def __init__(self, *nets: nn.Module, targets: tuple[nn.Module, ...] = ()):
        self.nets, self.targets = nn.ModuleList(nets), nn.ModuleList(targets)
        self.config = SimpleNamespace()
        self.trainables = list(self.nets.parameters())
        self.optimizer = torch.optim.Adam(self.trainables, lr=0.01)


def mlp(**options: Any) -> MLP:
    return MLP((5, 7, 6, 3), rng=rng(), activation=torch.relu, **options)


def stacked(**options: Any) -> StackedMLP:
    return StackedMLP((5, 7, 6, 3), rng=rng(), activation=torch.relu, **options)


def meta(make: Any) -> nn.Module:
    with torch.device("meta"):
        module = make()
    initialise(module, rng())
    return module


def sequence(*norms: nn.Module) -> nn.Sequential:
    return nn.Sequential(dense(5, 7, rng()), nn.ReLU(), *norms, dense(7, 6, rng(1)), nn.Tanh(), dense(6, 3, rng(2)))


def predictor(members: int) -> nn.Module:
    return meta(lambda: MLPPredictor(members, 4, 0, 1, hidden=(7, 6), activation="relu", hidden_norm=True, residual=True,
                                     norm=None))  # fmt: skip


NETS = {
    "mlp": mlp, "mlp-norm": lambda: mlp(layer_norm=True), "stacked": stacked,
    "stacked-norm": lambda: stacked(layer_norm=True), "ensemble": lambda: stacked(members=2),
    "ensemble-norm": lambda: stacked(members=2, layer_norm=True), "sequence": sequence,
    "sequence-norm": lambda: sequence(nn.LayerNorm(7)), "predictor": lambda: predictor(1),
    "predictors": lambda: predictor(3), "encoder": lambda: meta(lambda: StateEncoder(5, (7, 6, 3), activation="relu")),
}  # fmt: skip
MEMBERS = {"ensemble": 2, "ensemble-norm": 2, "predictors": 3}


def through(net: Any, x: Tensor) -> Tensor:
    """Five numbers per row; of a predictor, four of the latent and an action."""
    if not isinstance(net, MLPPredictor):
        return net(x)
    members: Any = net.layers[0].weight
    return net(x[None, :, :4].expand(len(members), -1, -1), x[:, 4:])


@pytest.mark.parametrize("kind", NETS)
def test_found_in_every_kind_of_network(kind: str):
    hiddens = find_units(Holder(NETS[kind]()))
    assert [h.shape for h in hiddens] == [(MEMBERS.get(kind, 1), 7), (MEMBERS.get(kind, 1), 6)]


@pytest.mark.parametrize("kind", NETS)
def test_a_units_weights_are_its_own(kind: str):
    """Without its outgoing weights nothing that goes into it has a gradient; other units' weights have one."""
    net = NETS[kind]()
    for hidden in find_units(Holder(net)):
        with torch.no_grad():
            for part in hidden.outgoing:
                part.of(part.parameter)[:, 2] = 0.0
    x = torch.randn(16, 5, generator=rng())
    through(net, x).square().sum().backward()
    for hidden in find_units(Holder(net)):
        gradient = hidden.weight.of(hidden.weight.parameter.grad).abs().sum(-1)  # type: ignore[arg-type]
        if "norm" in kind or kind in ("predictor", "predictors", "encoder"):
            continue  # a norm spreads it
        assert (gradient[:, 2] == 0).all() and (gradient > 0).any(1).all()


@pytest.mark.parametrize("kind", NETS)
def test_activity_is_that_of_the_activations(kind: str):
    """Units are measured by what the activation gives: for ReLU, E|h| = E h >= 0, and 0 if the bias is very negative.
    The rows count, of every member."""
    net = NETS[kind]()
    agent = Holder(net)
    activity = Activity(agent)
    activity.on = True
    first = activity.hiddens[0]
    with torch.no_grad():
        for part in first.offsets:
            part.of(part.parameter)[-1, 3] = -1e4  # dead in the last member
    x = torch.randn(16, 5, generator=rng())
    through(net, x)
    through(net, x)
    assert activity.rows == [32, 32]
    means = activity.take(0)
    assert means is not None
    size, value = means
    assert torch.equal(size, value) and (size >= 0).all()
    assert size[-1, 3] == 0 and (size[..., 4:].sum() > 0)
    assert activity.take(0) is None


def test_activity_in_closed_form():
    net = mlp()
    activity = Activity(Holder(net))
    activity.on = True
    x = torch.randn(16, 5, generator=rng())
    net(x)
    h1 = torch.relu(net.layers[0](x))
    h2 = torch.relu(net.layers[1](h1))
    for place, h in enumerate((h1, h2)):
        found = activity.take(place)
        assert found is not None
        # the reference calls above went through the layers' hooks too, with the same rows
        assert torch.allclose(found[0][0], h.abs().mean(0), atol=1e-6)
        assert torch.allclose(found[1][0], h.mean(0), atol=1e-6)


def test_members_of_an_ensemble_are_told_apart():
    net = stacked(members=2)
    activity = Activity(Holder(net))
    activity.on = True
    x = torch.randn(16, 5, generator=rng())
    net(x)
    for place in range(2):
        found = activity.take(place)
        assert found is not None
        for member in range(2):
            h = x
            for kernel, bias in list(zip(net.kernels, net.biases, strict=True))[: place + 1]:
                h = torch.relu(h @ kernel[member] + bias[member])
            assert torch.allclose(found[0][member], h.mean(0), atol=1e-6)


def test_what_is_not_counted():
    """Passes without gradients, while switched off, and through copies and targets."""
    net, target = mlp(), mlp().requires_grad_(False)
    stack = stacked()
    activity = Activity(Holder(net, stack, targets=(target,)))
    assert len(activity.hiddens) == 4
    x = torch.randn(4, 5, generator=rng())
    net(x)  # off
    activity.on = True
    with torch.no_grad():
        net(x)
        stack(x)
    target(x)
    copy.deepcopy(net)(x)
    copy.deepcopy(stack)(x)
    assert activity.rows == [0, 0, 0, 0]
    net.features(x)  # as bc calls its network
    stack(x)
    assert activity.rows == [4, 4, 4, 4]


@pytest.mark.parametrize("kind", NETS)
def test_a_new_unit_is_like_one_at_the_start(kind: str):
    net = NETS[kind]()
    agent = Holder(net)
    through(net, torch.randn(16, 5, generator=rng())).square().sum().backward()
    agent.optimizer.step()
    for hidden in find_units(agent):
        before = {part: part.of(part.parameter).clone() for part in (*hidden.incoming, *hidden.outgoing)}
        units = torch.zeros(hidden.shape, dtype=torch.bool)
        units[-1, 1] = units[-1, 4] = True
        hidden.renew(units, rng(3), optimizers_of(agent))
        weight = hidden.weight.of(hidden.weight.parameter)
        assert weight[units].abs().max() <= hidden.bound and not torch.equal(
            weight[units], before[hidden.weight][units]
        )
        for parts, value in ((hidden.offsets, 0), (hidden.gains, 1), (hidden.outgoing, 0)):
            for part in parts:
                assert (part.of(part.parameter)[units] == value).all()
        for part, old in before.items():
            assert torch.equal(part.of(part.parameter)[~units], old[~units])
            for moment in ("exp_avg", "exp_avg_sq"):
                kept = part.of(agent.optimizer.state[part.parameter][moment])
                assert (kept[units] == 0).all() and kept[~units].abs().sum() > 0


def test_fresh_weights_have_the_scale_of_the_networks():
    net = MLP((50, 400, 30), rng=rng())
    hidden = find_units(Holder(net))[0]
    assert hidden.bound == pytest.approx(net.layers[0].weight.abs().max().item(), rel=1e-3)  # type: ignore[union-attr]
    encoder = meta(lambda: StateEncoder(50, (400, 30)))
    assert find_units(Holder(encoder))[0].bound == pytest.approx(encoder.layers[0].weight.abs().max().item(), rel=1e-3)  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    "kind", [k for k in NETS if "norm" not in k and k not in ("predictor", "predictors", "encoder")]
)
def test_renewing_dead_units_changes_no_output(kind: str):
    net = NETS[kind]()
    agent = Holder(net)
    first, second = find_units(agent)
    x = torch.randn(16, 5, generator=rng())
    units = torch.zeros(first.shape, dtype=torch.bool)
    units[-1, 2] = True
    with torch.no_grad():
        for part in first.offsets:
            part.of(part.parameter)[units] = -1e4
        before = through(net, x)
        first.renew(units, rng(5))
        assert torch.allclose(through(net, x), before, atol=1e-6)
        # of a living one it does, which the line above would notice
        first.renew(~units, rng(5))
        assert not torch.allclose(through(net, x), before, atol=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "stacked", "ensemble", "sequence"])
def test_handing_over_keeps_the_mean_of_what_is_read(kind: str):
    """Exactly for a unit that gives the same for every row: here by a weight of 0 and a bias."""
    net = NETS[kind]()
    hidden = find_units(Holder(net))[0]
    x = torch.randn(16, 5, generator=rng())
    units = torch.zeros(hidden.shape, dtype=torch.bool)
    units[-1, 2] = True
    with torch.no_grad():
        hidden.weight.of(hidden.weight.parameter)[units] = 0.0
        hidden.offsets[0].of(hidden.offsets[0].parameter)[units] = 0.7
        before = through(net, x)
        hidden.hand_over(units, torch.full(hidden.shape, 0.7))
        assert not torch.allclose(through(net, x), before, atol=1e-3)  # counted twice so far
        hidden.renew(units, rng(5))
        assert torch.allclose(through(net, x), before, atol=1e-5)


def test_several_heads_read_the_same_units():
    spaces = next(f for f in FIXTURES if "discrete" in f.offers and "goal" not in f.offers).spaces
    policy = Policy(spaces, (6,), heads=3, rng=rng())
    assert len(find_units(Holder(policy))[0].outgoing) == 3


def test_no_hidden_units_is_an_error(lab: SimpleNamespace):
    for method in ("redo", "cbp", "upgd-feature"):
        with pytest.raises(ConfigError, match="no hidden units.*set hidden layers"):
            lab.composed(lab.Toy, [method], agent={"hidden": ()})


def test_compiled_updates_are_refused():
    agent = Holder(mlp())
    agent.config = SimpleNamespace(compile=True)
    with pytest.raises(ConfigError, match="compile"):
        Activity(agent)


class Loud(Method):
    """Sends rows through the network beside the agent's loss, with and without gradients."""

    def replay(self, batch: Any) -> None:
        self.learner.outputs(batch)

    def loss(self, base: Tensor, batch: Any) -> Tensor:
        return base + 0 * self.learner.loss(batch)


class Count(UnitMethod):
    """Keeps the rows of each update."""

    def after_step(self, params: Any) -> None:
        self.seen = list(self.activity.rows)
        for place in self.places(params):
            self.activity.take(place)


def test_the_agents_own_rows_are_counted(lab: SimpleNamespace):
    """Not those of methods around it, nor of acting."""
    agent = lab.composed(lab.Toy, [Loud, Count], agent={"batch_size": 5})
    lab.learn(agent, lab.data(0), 2)
    count = list(agent.methods.values())[1]
    assert count.activity.on is False
    assert count.seen == [5]
    agent.act(torch.zeros(3, 4), None, torch.ones(3, dtype=torch.bool), rng=rng())
    agent.learner.loss(agent.agent.sample(lab.data(0), rng()))
    assert count.activity.rows == [0]


def test_rows_are_counted_where_the_loss_is_hidden(lab: SimpleNamespace):
    agent = lab.composed(lab.Hidden, [Count], agent={"batch_size": 5})
    lab.learn(agent, lab.data(0), 2)
    assert next(iter(agent.methods.values())).seen == [5]


AGENTS: dict[str, dict[str, Any]] = {
    "bc": {"hidden": (16,), "batch_size": 8}, "gcbc": {"hidden": (8,), "batch_size": 8},
    "hiql": {"hidden": (8,), "batch_size": 8},
    "pldm": {
        "window": 4, "batch_size": 4, "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,)},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_units_of_real_agents_are_seen_in_an_update(name: str):
    cls = compose(name, [Count])
    fixture: Fixture = next(f for f in FIXTURES if cls.requires <= f.offers and "pixels" not in f.offers)
    agent: Any = cls(
        fixture.spaces, build(cls.Config, {"agent": AGENTS[name]}, name), device=torch.device("cpu"), rng=rng()
    )
    next(iter(agent.learn(fixture.experience("dataset", 1, 0), 2, rng=rng())))
    count = next(iter(agent.methods.values()))
    assert len(count.seen) >= 1 and all(n > 0 for n in count.seen)
    hiddens: list[Hidden] = count.activity.hiddens
    assert all(sum(p is h.weight.parameter for p in agent.trainables) == 1 for h in hiddens)


def test_networks_that_are_built_anew_are_the_ones_that_count(lab: SimpleNamespace):
    """As Stable-Baselines3's are for the first environment with several rows."""

    class Rebuilding(lab.Toy):
        def attach(self, rebuilt: Any) -> None:
            self.rebuilt = rebuilt

    agent: Any = lab.composed(Rebuilding, [Count, "l2-init", "upgd-feature"])
    inner, count = agent.agent, next(iter(agent.methods.values()))
    inner.net = MLP((4, 6, 3), rng=rng(8), activation=torch.tanh)
    lab.learn(agent, lab.data(0), 1)
    assert count.places(inner.trainables) == []  # what would be without the word
    inner.rebuilt()
    assert lab.equal(agent.methods["l2-init"].initial, lab.weights(agent))
    lab.learn(agent, lab.data(0), 1)
    assert count.places(inner.trainables) == [0] and count.seen == [8]
    assert inner.optimizer.units[0].weight.parameter is inner.net.layers[0].weight


def test_policies_of_stable_baselines3():
    """What reads the last hidden layer is outside of the sequence."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy_net = nn.Sequential(dense(5, 7, rng()), nn.Tanh())
            self.value_net = nn.Sequential(dense(5, 6, rng()), nn.Tanh())

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp_extractor, self.action_net, self.value_net = Body(), dense(7, 3, rng()), dense(6, 1, rng())

    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latent_pi = nn.Sequential(dense(5, 7, rng()), nn.ReLU(), dense(7, 8, rng()), nn.ReLU())
            self.mu, self.log_std = dense(8, 3, rng()), dense(8, 3, rng())

    ppo, sac = Policy(), Actor()
    hiddens = find_units(Holder(ppo))
    assert [h.shape[1] for h in hiddens] == [7, 6]
    assert [h.outgoing[0].parameter for h in hiddens] == [ppo.action_net.weight, ppo.value_net.weight]
    hiddens = find_units(Holder(sac))
    assert [[p.parameter for p in h.outgoing] for h in hiddens] == [
        [sac.latent_pi[2].weight], [sac.mu.weight, sac.log_std.weight],
    ]  # fmt: skip
    activity = Activity(Holder(sac))
    activity.on = True
    h = sac.latent_pi(torch.randn(16, 5, generator=rng()))
    sac.mu(h)
    sac.log_std(h)
    assert activity.rows == [16, 16]
