"""DER++ stores outputs as they were, and its loss is the paper's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.agents.continual.batches import rows
from clbench.agents.continual.derpp import DERpp, distance
from clbench.agents.networks.outputs import Output
from clbench.errors import ConfigError


def everything(agent: Any) -> tuple[Any, tuple[Output, ...]]:
    return agent.methods["derpp"].memory.sample(10**6, torch.Generator().manual_seed(0))


def twin_of(agent: Any, **options: Any) -> DERpp:
    """The method with the same memory and generator."""
    found = DERpp(DERpp.Config(**options), agent.learner, rng=torch.Generator())
    found.load_state_dict(agent.methods["derpp"].state_dict())
    found.rng.set_state(agent.methods["derpp"].rng.get_state())
    return found


def test_the_distance_is_the_mean_over_rows_and_outputs() -> None:
    new = (
        Output("categorical", torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        Output("gaussian", torch.tensor([[5.0], [1.0]])),
    )
    old = (
        Output("categorical", torch.tensor([[1.0, 0.0], [0.0, 4.0]])),
        Output("gaussian", torch.tensor([[2.0], [2.0]])),
    )
    assert float(distance(new, old)) == (4 + 9) / 4 + (9 + 1) / 2


@pytest.mark.parametrize("spaces", ["CLASSIFY", "REGRESS"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (0.3, 0.0), (0.0, 0.7)])
def test_the_loss_is_that_of_the_paper(lab: SimpleNamespace, spaces: str, alpha: float, beta: float) -> None:
    space = getattr(lab, spaces)
    options = {"memory": 20, "batch_size": 4, "alpha": alpha, "beta": beta}
    agent = lab.composed(lab.Toy, ["derpp"], spaces=space, derpp=options)
    lab.learn(agent, lab.data(0, spaces=space), 20)
    batch = lab.data(1, spaces=space).sample(8, lab.generator(0))
    memory, rng = twin_of(agent, **options).memory, torch.Generator()
    rng.set_state(agent.methods["derpp"].rng.get_state())
    own, total = agent.learner.loss(batch), agent.agent.loss(batch)[0]
    want = own
    if alpha:
        x, (z,) = memory.sample(4, rng)
        want = want + alpha * (agent.agent.outputs(x)[0].values - z.values).square().mean()
    if beta:
        x, _ = memory.sample(4, rng)  # another sample
        want = want + beta * agent.learner.loss(x)
    assert torch.allclose(total, want)
    assert not torch.allclose(total, own, rtol=1e-3)
    found, wanted = (torch.autograd.grad(v, agent.trainables) for v in (total, want))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


def test_outputs_are_kept_as_they_were_before_the_update_on_their_row(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["derpp"], derpp={"memory": 100})
    net = agent.agent.net
    first, second = (lab.data(0).sample(8, lab.generator(s)) for s in range(2))
    wanted: dict[tuple[float, ...], torch.Tensor] = {}
    for batch in (first, second):
        with torch.no_grad():
            wanted |= {tuple(x.tolist()): z for x, z in zip(batch.observations, net(batch.observations), strict=True)}
        loss, _ = agent.agent.loss(batch)
        agent.agent.optimizer.zero_grad()
        loss.backward()
        agent.agent.optimizer.step()
    held, (outputs,) = everything(agent)
    assert rows(held) == 16
    assert outputs.kind == "categorical"
    assert not outputs.values.requires_grad
    for x, z in zip(held.observations, outputs.values, strict=True):
        assert torch.allclose(z, wanted[tuple(x.tolist())], atol=1e-6)
    with torch.no_grad():  # those of now are others: the check tells them apart
        assert not torch.allclose(outputs.values, net(held.observations), atol=1e-4)


def test_the_first_update_is_the_agents_own(lab: SimpleNamespace) -> None:
    agent, plain = lab.composed(lab.Toy, ["derpp"]), lab.composed(lab.Toy, [])
    for each in (agent, plain):
        lab.learn(each, lab.data(0), 1)
    assert lab.equal(lab.weights(agent), lab.weights(plain))
    for each in (agent, plain):
        lab.learn(each, lab.data(0), 1)
    assert not lab.equal(lab.weights(agent), lab.weights(plain))


def test_costs_are_two_samples_and_the_rows_that_are_stored(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["derpp"], derpp={"memory": 8})
    lab.learn(agent, lab.data(0), 1)
    costs = agent.method_costs()
    assert (costs["extra_forward_samples"], costs["extra_backward_samples"]) == (8, 0)
    lab.learn(agent, lab.data(0), 100)
    costs = agent.method_costs()
    assert costs["extra_backward_samples"] == 100 * 2 * 8
    stored = costs["extra_forward_samples"] - costs["extra_backward_samples"]
    # a reservoir of 8 takes 8 (H(808) - H(8)) further rows in expectation, about 37; all would be 800
    assert 8 + 15 < stored < 8 + 70


def test_without_weights_there_is_nothing_to_draw(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["derpp"], derpp={"alpha": 0.0, "beta": 0.0})
    plain = lab.composed(lab.Toy, [])
    for each in (agent, plain):
        lab.learn(each, lab.data(0), 5)
    assert lab.equal(lab.weights(agent), lab.weights(plain))
    assert agent.method_costs()["extra_backward_samples"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, "memory must be"), ({"batch_size": -1}, "memory must be"), ({"alpha": -1.0}, "alpha and beta"),
     ({"beta": float("nan")}, "alpha and beta")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DERpp.Config(**options)
