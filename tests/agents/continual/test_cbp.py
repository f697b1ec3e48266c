"""Continual backpropagation: utilities by hand, how many units are renewed, which, and what their readers keep."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.agents.bc import BC
from clbench.agents.continual.compose import compose
from clbench.config import build
from clbench.errors import ConfigError
from clbench.testing.fixtures import FIXTURES

STILL: dict[str, Any] = {
    "hidden": (8, 6), "batch_size": 16, "activation": "relu", "optimizer": "sgd", "lr": 1e-12, "reset_optimizer": False,
}  # fmt: skip


@pytest.mark.parametrize("rho", [0.0, 0.003, 0.02])
def test_as_many_are_renewed_as_rho_says(lab: SimpleNamespace, rho: float):
    """With maturity 0 all units are old after their first update, so a layer of n units loses rho n per update."""
    agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": rho, "maturity": 0}, agent={**STILL, "batch_size": 1})
    lab.learn(agent, lab.data(0), 200)
    expected = int(200 * rho * 8 + 1e-9) + int(200 * rho * 6 + 1e-9)
    assert abs(agent.methods["cbp"].renewed - expected) <= 2


def test_the_young_are_left_alone(lab: SimpleNamespace):
    agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": 1.0, "maturity": 10}, agent=STILL)
    cbp = agent.methods["cbp"]
    lab.learn(agent, lab.data(0), 10)
    assert cbp.renewed == 0
    lab.learn(agent, lab.data(0), 1)
    assert cbp.renewed == 14 and all((age == 0).all() for age in cbp.age)  # all at once, at rho = 1
    lab.learn(agent, lab.data(0), 10)
    assert cbp.renewed == 14
    lab.learn(agent, lab.data(0), 1)
    assert cbp.renewed == 28


def test_utility_and_mean_in_closed_form(lab: SimpleNamespace):
    agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": 0.0, "decay": 0.7}, agent=STILL)
    rng, cbp = lab.generator(0), agent.methods["cbp"]
    utility = [torch.zeros(8), torch.zeros(6)]
    mean = [torch.zeros(8), torch.zeros(6)]
    first, second, last = agent.policy.head.layers
    for _ in range(3):
        h = agent.agent.sample(lab.data(0), rng).observations
        for k, (layer, reader) in enumerate(((first, second), (second, last))):
            h = torch.relu(layer(h)).detach()
            utility[k] = 0.7 * utility[k] + 0.3 * h.abs().mean(0) * reader.weight.detach().abs().sum(0)
            mean[k] = 0.7 * mean[k] + 0.3 * h.mean(0)
    lab.learn(agent, lab.data(0), 3)
    for k in range(2):
        assert torch.allclose(cbp.utility[k][0], utility[k], atol=1e-6)
        assert torch.allclose(cbp.mean[k][0], mean[k], atol=1e-6)


def test_the_least_useful_goes(lab: SimpleNamespace):
    """A unit that no one listens to, and not another; the next one is the next."""
    agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": 0.06, "maturity": 4, "decay": 0.5}, agent=STILL)
    first, second, last = agent.policy.head.layers
    with torch.no_grad():
        second.weight[:, 3] *= 1e-6
        last.weight[:, 2] *= 1e-6
    before = [p.clone() for p in agent.trainables]
    updates = 4 + 3  # 3 * 0.06 * 8 = 1.44 units of the first layer, 3 * 0.06 * 6 = 1.08 of the second
    lab.learn(agent, lab.data(0), updates)
    assert agent.methods["cbp"].renewed == 2
    changed = [~torch.isclose(p, q, rtol=1e-4, atol=1e-7) for p, q in zip(agent.trainables, before, strict=True)]
    assert changed[0].any(1).nonzero()[:, 0].tolist() == [3]
    changed[2][:, 3] = False  # outgoing weights of the first one
    assert changed[2].any(1).nonzero()[:, 0].tolist() == [2]
    assert (second.weight[:2, 3] == 0).all() and (last.weight[:, 2] == 0).all()


def test_readers_keep_what_a_unit_gave_on_average(lab: SimpleNamespace):
    """A unit that always gives 0.5: its readers' biases take over, and no output changes. Where its mean is not known,
    because it is zeroed, outputs do change."""
    changes = []
    for known in (True, False):
        agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": 0.05, "maturity": 3}, agent={**STILL, "hidden": (8,)})
        cbp, (first, last) = agent.methods["cbp"], agent.policy.head.layers
        with torch.no_grad():
            first.weight[1], first.bias[1] = 0.0, 0.5
            last.weight[:, 1] = torch.tensor([0.01, 0.02, 0.01])
            last.weight[:, [0, 2, 3, 4, 5, 6, 7]] *= 100
        x = lab.data(0).observations
        before = agent.policy(x).detach()
        lab.learn(agent, lab.data(0), 5)  # 2 * 0.05 * 8 < 1
        assert cbp.renewed == 0
        if not known:
            cbp.mean[0].zero_()
        lab.learn(agent, lab.data(0), 1)
        assert cbp.renewed == 1 and (last.weight[:, 1] == 0).all()
        changes.append((agent.policy(x) - before).abs().max().item())
    assert changes[0] < 1e-5 < 4e-3 < changes[1]


def test_a_new_unit_begins_anew(lab: SimpleNamespace):
    agent: Any = lab.composed(BC, ["cbp"], cbp={"rho": 0.05, "maturity": 3}, agent={**STILL, "hidden": (8,)})
    cbp = agent.methods["cbp"]
    lab.learn(agent, lab.data(0), 6)
    age = cbp.age[0][0]
    assert age.tolist().count(0) == 1 and age.tolist().count(6) == 7
    unit = int(age.argmin())
    assert cbp.utility[0][0, unit] == 0 == cbp.mean[0][0, unit] and (cbp.utility[0][0] > 0).sum() >= 4


def test_members_of_an_ensemble_are_counted_apart():
    cls = compose("hiql", ["cbp"])
    fixture = next(f for f in FIXTURES if cls.requires <= f.offers and not f.pixels)
    options = {"agent": {"hidden": (10,), "batch_size": 8}, "cbp": {"rho": 0.1, "maturity": 0}}
    rng = torch.Generator().manual_seed(0)
    agent: Any = cls(fixture.spaces, build(cls.Config, options, "hiql"), device=torch.device("cpu"), rng=rng)
    cbp = agent.methods["cbp"]
    for _ in agent.learn(fixture.experience("dataset", 1, 0), 3, rng=rng):
        pass
    members = sum(h.shape[0] for h in cbp.activity.hiddens)
    assert members > len(cbp.activity.hiddens)  # there is an ensemble
    assert abs(cbp.renewed - 3 * members) <= members  # 0.1 * 10 units of each, up to rounding


def test_values_out_of_range_are_refused(lab: SimpleNamespace):
    for wrong in ({"rho": 2.0}, {"maturity": -1}, {"decay": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            lab.composed(lab.Toy, ["cbp"], cbp=wrong)
