"""UER learns the batch by angles and replays whole logits; agents that it cannot take apart are refused in a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clbench.agents.continual.uer import UER, cosine_logits
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError

SMALL = {"hidden": (8,), "batch_size": 8}


def test_cosine_logits_know_angles_only() -> None:
    rng = torch.Generator().manual_seed(0)
    features, weight = torch.randn(5, 4, generator=rng), torch.randn(3, 4, generator=rng)
    found = cosine_logits(features, weight, 10.0)
    want = [[10 * float(f @ w / (f.norm() * w.norm())) for w in weight] for f in features]
    assert torch.allclose(found, torch.tensor(want), atol=1e-5)
    lengths = torch.tensor([[1.0], [5.0], [0.1]])
    assert torch.allclose(found, cosine_logits(3 * features, lengths * weight, 10.0), atol=1e-5)
    assert not torch.allclose(features @ weight.T, features @ (lengths * weight).T)  # whole logits do not
    assert float(found.abs().max()) <= 10.0


def subset(data: OfflineDataset, rows: torch.Tensor) -> OfflineDataset:
    return OfflineDataset(data.observations[rows], data.actions[rows], torch.ones(int(rows.sum()), dtype=torch.int64))


def parts(agent: Any, batch: Any, scale: float) -> torch.Tensor:
    policy = agent.agent.policy
    features = policy.features(batch.observations)
    return nn.functional.cross_entropy(cosine_logits(features, policy.output_layers[0].weight, scale), batch.actions)


@pytest.mark.parametrize("filled", [False, True])
def test_the_loss_is_of_cosines_on_the_batch_and_of_logits_on_the_memory(lab: SimpleNamespace, filled: bool) -> None:
    agent = lab.composed("bc", ["uer"], agent=SMALL, uer={"memory": 20, "batch_size": 5, "scale": 4.0})
    if filled:
        lab.learn(agent, lab.data(0), 10)
    method, batch = agent.methods["uer"], lab.data(1).sample(8, lab.generator(0))
    rng = torch.Generator()
    rng.set_state(method.rng.get_state())
    replayed = method.memory.sample(5, rng)
    assert (replayed is not None) == filled
    want = parts(agent, batch, 4.0)
    if filled:
        want = want + agent.learner.own_loss(replayed)[0]
    total = agent.agent.loss(batch)[0]
    assert torch.allclose(total, want, atol=1e-5)
    params = agent.trainables
    found, wanted = (torch.autograd.grad(v, params, allow_unused=True) for v in (total, want))
    for f, w in zip(found, wanted, strict=True):
        assert torch.allclose(f, torch.zeros_like(f) if w is None else w, atol=1e-5)
    bias = agent.agent.policy.output_layers[0].bias
    at = next(i for i, p in enumerate(params) if p is bias)
    assert (float(found[at].abs().max()) > 1e-3) == filled  # only whole logits have the bias in them


def test_the_parts_of_other_methods_stay_in_any_order(lab: SimpleNamespace) -> None:
    losses = []
    for methods in (["l2", "uer"], ["uer", "l2"], ["uer"]):
        options = {"l2": {"strength": 3.0}} if "l2" in methods else {}
        agent = lab.composed("bc", methods, agent=SMALL, **options)
        lab.phase(agent, lab.data(0), 1, 0)
        with torch.no_grad():
            for p in agent.trainables:
                p.add_(0.1)
        agent.methods["uer"].rng.manual_seed(0)
        losses.append(float(agent.agent.loss(lab.data(1).sample(8, lab.generator(0)))[0].detach()))
    penalty = 0.5 * 3.0 * 0.01 * agent.num_parameters
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2] + penalty, rel=1e-4)


def test_costs_are_the_batch_again_and_the_replayed_rows(lab: SimpleNamespace) -> None:
    agent = lab.composed("bc", ["uer"], agent=SMALL, uer={"memory": 20, "batch_size": 5})
    lab.learn(agent, lab.data(0), 4)
    costs = agent.method_costs()
    assert costs["extra_forward_samples"] == costs["extra_backward_samples"] == 4 * 8 + 3 * 5


def test_classes_of_an_earlier_task_are_still_told_apart(lab: SimpleNamespace) -> None:
    """Class-incremental: the first task has the classes 0 and 1, the second only 2."""
    whole = lab.data(0, 400)
    tasks = [subset(whole, whole.actions < 2), subset(whole, whole.actions == 2)]

    def right(methods: list[str]) -> float:
        agent = lab.composed("bc", methods, agent={"hidden": (32,), "batch_size": 8, "lr": 3e-3})
        for task, data in enumerate(tasks):
            lab.phase(agent, data, 300, task)
        old = tasks[0]
        first = torch.ones(len(old.actions), dtype=torch.bool)
        actions = agent.act(old.observations, None, first, rng=lab.generator(0))[0]
        return float((actions == old.actions).float().mean())

    assert right(["uer"]) > right([]) + 0.2


def test_agents_that_it_cannot_take_apart_are_refused(lab: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="continuous"):
        lab.composed("bc", ["uer"], spaces=lab.REGRESS)
    with pytest.raises(ConfigError, match="has 3; leave heads at 1"):
        lab.composed("bc", ["uer"], agent={"heads": 3})
    with pytest.raises(ConfigError, match="takes the output layer apart"):
        lab.composed(lab.Toy, ["uer"])
    with pytest.raises(ConfigError, match="features"):
        lab.composed("pldm", ["uer"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, "memory must be"), ({"batch_size": -1}, "memory must be"), ({"scale": 0.0}, "scale")],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UER.Config(**options)
