"""ReDo: its score in closed form, which units it renews and when, and that renewing a dead unit changes no output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.agents.bc import BC
from clbench.agents.continual.redo import ReDo
from clbench.errors import ConfigError

CLASSIFIER: dict[str, Any] = {"hidden": (8, 6), "batch_size": 16, "activation": "relu"}


def kill(layer: Any, units: list[int]) -> None:
    """ReLU units that never speak."""
    with torch.no_grad():
        layer.weight[units] = 0.0
        layer.bias[units] = -1.0


def test_score_in_closed_form():
    size = torch.tensor([[1.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(ReDo.score(size), torch.tensor([[0.5, 1.5, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))


def test_dead_units_wake_up_when_it_is_time(lab: SimpleNamespace):
    """Not before, and no other unit is touched."""
    options = {"agent": {**CLASSIFIER, "optimizer": "sgd", "lr": 1e-9}}
    agent: Any = lab.composed(BC, ["redo"], redo={"every": 4, "tau": 0.0}, **options)
    first, second, last = agent.policy.head.layers
    kill(first, [1, 5])
    kill(second, [2])
    before = [p.clone() for p in agent.trainables]
    lab.learn(agent, lab.data(0), 3)
    assert agent.methods["redo"].metrics() == {"redo_dormant": 0.0, "redo_renewed": 0.0}
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(agent.trainables, before, strict=True))
    lab.learn(agent, lab.data(0), 1)
    assert agent.methods["redo"].metrics() == {"redo_dormant": pytest.approx(3 / 14), "redo_renewed": 3.0}
    for layer, reader, dead in ((first, second, [1, 5]), (second, last, [2])):
        assert (layer.weight[dead].abs().sum(1) > 0).all() and (layer.bias[dead] == 0).all()
        others = [i for i in range(len(reader.weight)) if not (reader is second and i == 2)]  # 2 is itself fresh
        assert (reader.weight[others][:, dead] == 0).all()
    alive = [0, 2, 3, 4, 6, 7]
    assert torch.allclose(first.weight[alive], before[0][alive], atol=1e-6)
    assert torch.allclose(second.weight[:2][:, alive], before[2][:2][:, alive], atol=1e-6)
    lab.learn(agent, lab.data(0), 4)
    assert agent.methods["redo"].metrics()["redo_renewed"] == 3.0  # they are awake


def test_renewing_the_dead_changes_no_output(lab: SimpleNamespace):
    """Renewing units that speak does."""
    changes = []
    for tau in (0.0, 2.0):
        options = {"agent": {**CLASSIFIER, "optimizer": "sgd", "lr": 1e-9}}
        agent: Any = lab.composed(BC, ["redo"], redo={"every": 1, "tau": tau}, **options)
        for layer in agent.policy.head.layers[:-1]:
            kill(layer, [0, 3])
        x = lab.data(0).observations
        before = agent.policy(x).detach()
        lab.learn(agent, lab.data(0), 1)
        assert agent.methods["redo"].renewed >= 4
        changes.append((agent.policy(x) - before).abs().max().item())
    assert changes[0] < 1e-6 < 1e-3 < changes[1]


def test_tau_decides(lab: SimpleNamespace):
    """All units of a score up to tau, by brute force over the batches that were drawn."""
    for tau in (0.3, 0.8):
        options = {"agent": {**CLASSIFIER, "optimizer": "sgd", "lr": 1e-9}}
        agent: Any = lab.composed(BC, ["redo"], redo={"every": 3, "tau": tau}, **options)
        rng, expected = lab.generator(0), 0
        rows = torch.cat([agent.agent.sample(lab.data(0), rng).observations for _ in range(3)])
        h = rows
        for layer in agent.policy.head.layers[:-1]:
            h = torch.relu(layer(h)).detach()
            expected += int((h.mean(0) <= tau * h.mean()).sum())
        lab.learn(agent, lab.data(0), 3)
        assert agent.methods["redo"].renewed == expected > 0


def test_moments_of_renewed_units_are_gone(lab: SimpleNamespace):
    agent: Any = lab.composed(BC, ["redo"], redo={"every": 10, "tau": 0.8}, agent={**CLASSIFIER, "hidden": (8,)})
    lab.learn(agent, lab.data(0), 10)
    first, second = agent.policy.head.layers
    renewed = (second.weight == 0).all(0)
    assert renewed.any()
    state = agent.agent.optimizer.state
    for moment in ("exp_avg", "exp_avg_sq"):
        assert (state[first.weight][moment][renewed] == 0).all() and (
            state[second.weight][moment][:, renewed] == 0
        ).all()
        assert state[first.weight][moment][~renewed].abs().sum() > 0


def test_with_an_optimiser_per_layer_each_is_checked_on_its_own(lab: SimpleNamespace):
    agent: Any = lab.composed(lab.Several, ["redo"], redo={"every": 2, "tau": 2.0}, agent={"hidden": (6, 5)})
    lab.learn(agent, lab.data(0), 3)
    assert agent.methods["redo"].updates == [1, 1] and agent.methods["redo"].renewed > 0


def test_values_out_of_range_are_refused(lab: SimpleNamespace):
    for wrong in ({"every": 0}, {"tau": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            lab.composed(lab.Toy, ["redo"], redo=wrong)
