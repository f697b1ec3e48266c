"""Memory aware synapses: its importance by brute force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.agents.continual.mas import MAS, sensitivity
from clbench.agents.networks.outputs import Output
from clbench.data.dataset import Batch, OfflineDataset
from clbench.errors import ConfigError


def all_of(data: OfflineDataset) -> Batch:
    return data.batch(torch.arange(len(data)))


def gradients(agent: Any, x: Tensor) -> list[Tensor]:
    """d |f(x)|^2 / d theta per sample (N, *shape) for each parameter, by another route than the method's."""
    params = {k: v.detach() for k, v in agent.net.named_parameters()}

    def length(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(agent.net, params, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(length), (None, 0))(params, x)
    return [found[k] for k in params]


@pytest.mark.parametrize("kind", ["CLASSIFY", "REGRESS"])
def test_importance_is_the_mean_of_absolute_gradients_per_sample(lab: SimpleNamespace, kind: str) -> None:
    spaces = getattr(lab, kind)
    agent, data = lab.composed(lab.Toy, ["mas"], spaces=spaces), lab.data(0, 20, spaces=spaces)
    found = sensitivity(agent.learner, iter([all_of(data)]), 20)
    for w, g in zip(found, gradients(agent, data.observations)):
        torch.testing.assert_close(w, g.abs().mean(0))
        assert not torch.allclose(w, g.mean(0).abs(), rtol=0.05)  # which a whole batch at once would give


def test_a_linear_model_in_closed_form(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["mas"], agent={"hidden": ()}), lab.data(0, 20)
    weight, bias = sensitivity(agent.learner, iter([all_of(data)]), 20)
    f, x = agent.net(data.observations).detach(), data.observations
    torch.testing.assert_close(weight, 2 * torch.einsum("nk,nj->kj", f.abs(), x.abs()) / 20)
    torch.testing.assert_close(bias, 2 * f.abs().mean(0))


def test_several_outputs_are_one_long_output(lab: SimpleNamespace) -> None:
    class Two(lab.Toy):
        def outputs(self, batch: Batch) -> tuple[Output, ...]:
            (one,) = super().outputs(batch)
            return Output(one.kind, one.values[:, :1]), Output("gaussian", one.values[:, 1:])

    one, two = (lab.composed(cls, ["mas"]) for cls in (lab.Toy, Two))
    for a, b in zip(*(sensitivity(agent.learner, iter([all_of(lab.data(0))]), 10) for agent in (one, two))):
        torch.testing.assert_close(a, b)


def test_labels_play_no_part(lab: SimpleNamespace) -> None:
    agent, data = lab.composed(lab.Toy, ["mas"]), lab.data(0)
    other = OfflineDataset(data.observations, 2 - data.actions, data.lengths)
    a, b = (sensitivity(agent.learner, iter([all_of(d)]), 10) for d in (data, other))
    assert lab.equal(a, b)


def test_importances_of_tasks_add_up_and_the_last_task_is_the_anchor(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["mas"], mas={"strength": 0.6, "samples": 16})
    mas = agent.methods["mas"]
    lab.phase(agent, lab.data(0), 5)
    first = [w.clone() for w in mas.importance]
    draws = agent.rng.get_state()
    lab.phase(agent, lab.data(1), 5)
    anchor = lab.weights(agent)
    rng = torch.Generator()
    rng.set_state(draws)
    drawn = [agent.agent.sample(lab.data(1), rng) for _ in range(2)]
    new = sensitivity(agent.learner, iter(drawn), 16)
    for total, a, b in zip(mas.importance, first, new):
        torch.testing.assert_close(total, a + b)
    with torch.no_grad():
        for p in agent.trainables:
            p.add_(torch.randn(p.shape, generator=lab.generator(1)))
    pull = torch.autograd.grad(mas.loss(torch.zeros(()), None), agent.trainables)
    for g, w, p, a in zip(pull, mas.importance, agent.trainables, anchor):
        torch.testing.assert_close(g, 0.6 * w * (p.detach() - a))


def test_a_hidden_loss_makes_no_difference(lab: SimpleNamespace) -> None:
    agents = [lab.composed(cls, ["mas"], mas={"samples": 8}) for cls in (lab.Toy, lab.Hidden)]
    for agent in agents:
        for k in range(2):
            lab.phase(agent, lab.data(k), 10)
    for a, b in zip(*(agent.trainables for agent in agents)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"strength": -1.0}, "strength"), ({"strength": float("nan")}, "strength"), ({"samples": 0}, "samples")],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MAS.Config(**options)
