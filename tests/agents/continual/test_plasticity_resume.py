"""Plasticity methods on real agents: training that stops in the middle and goes on in a new object ends bit for bit where
the uninterrupted one ends, and the state must be whole for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.agents.continual.batches import tensors
from clbench.agents.continual.compose import compose, field_name
from clbench.config import build
from clbench.contracts import TaskInfo
from clbench.testing.fixtures import FIXTURES

AGENTS: dict[str, dict[str, Any]] = {
    "bc": {"hidden": (8, 6), "batch_size": 8, "activation": "relu"}, "gcbc": {"hidden": (8, 6), "batch_size": 8},
    "hiql": {"hidden": (8,), "batch_size": 8},
    "pldm": {
        "window": 4, "batch_size": 4, "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,)},
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "upgd": {}, "upgd-feature": {"adaptive": True}, "shrink-perturb": {}, "shrink-perturb-task": {},
    "l2-init": {"strength": 0.01}, "redo": {"every": 5, "tau": 0.7}, "cbp": {"rho": 0.05, "maturity": 2},
}  # fmt: skip
PHASE, STOP = 12, 7


def trained(agent: str, method: str, spoil: Callable[[dict[str, Any]], Any] | None = None, *, stop: bool = True) -> Any:
    """Two phases; with ``stop`` the second goes on in a new object half-way, from a state that ``spoil`` changes."""
    cls = compose(agent, [method])
    fixture = next(f for f in FIXTURES if cls.requires <= f.offers and not f.pixels)
    options = {"agent": AGENTS[agent], field_name(method): METHODS[method]}

    def new(seed: int) -> Any:
        config = build(cls.Config, options, agent)
        return cls(fixture.spaces, config, device=torch.device("cpu"), rng=torch.Generator().manual_seed(seed))

    def learn(of: Any, start: int, end: int, rng: torch.Generator) -> None:
        learning = of.learn(fixture.experience("dataset", 1, 0, 0), PHASE - start, rng=rng)
        for _ in range(start, end):
            next(learning)
        learning.close()

    one, rng = new(0), torch.Generator().manual_seed(5)
    one.start_task(TaskInfo(None))
    learn(one, 0, PHASE, rng)
    one.finish_task()
    one.start_task(TaskInfo(None))
    learn(one, 0, STOP if stop else PHASE, rng)
    if not stop:
        return one
    state = one.state_dict()
    if spoil is not None:
        spoil(state)
    other = new(9)
    other.load_state_dict(state)
    for kept in tensors(state["methods"]):  # what is loaded shares no memory with the state
        kept.zero_()
    learn(other, STOP, PHASE, rng)
    return other


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.trainables, b.trainables, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("agent", AGENTS)
def test_training_goes_on_bit_for_bit(agent: str, method: str):
    whole = trained(agent, method, stop=False)
    resumed = trained(agent, method)
    assert same(whole, resumed)
    assert all(torch.isfinite(p).all() for p in whole.trainables)
    a, b = whole.state_dict()["methods"][method], resumed.state_dict()["methods"][method]
    assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
    metrics = whole.methods[method].metrics()
    assert metrics == resumed.methods[method].metrics()
    assert all(v > 0 for k, v in metrics.items() if k.endswith("renewed"))  # there was something to be resumed


def forget_generator(state: dict[str, Any], method: str) -> None:
    state["methods"][method]["rng"] = torch.Generator().manual_seed(77).get_state()


def forget_utility(state: dict[str, Any], method: str) -> None:
    for kept in state["agent"]["optimizer"]["state"].values():
        kept["utility"].zero_()


def forget_activity(state: dict[str, Any], method: str) -> None:
    for kept in state["methods"][method]["state"]["activity"]["size"]:
        kept.zero_()


def forget(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any], str], None]:
    def spoil(state: dict[str, Any], method: str) -> None:
        kept = state["methods"][method]["state"]
        kept[name] = value(kept[name])

    return spoil


def shuffled(values: list[Tensor]) -> list[Tensor]:
    return [v.flip(-1) for v in values]


@pytest.mark.parametrize(
    ("method", "spoil"),
    [
        ("upgd", forget_generator), ("upgd", forget_utility), ("shrink-perturb", forget_generator),
        ("l2-init", forget("initial", lambda v: [t + 1 for t in v])), ("redo", forget_generator),
        ("redo", forget("updates", lambda v: [0 for _ in v])), ("redo", forget_activity), ("cbp", forget_generator),
        ("cbp", forget("utility", shuffled)), ("cbp", forget("age", lambda v: [t * 0 for t in v])),
        ("cbp", forget("mean", lambda v: [t + 1 for t in v])), ("cbp", forget("due", lambda v: [t + 0.5 for t in v])),
    ],
)  # fmt: skip
def test_each_part_of_the_state_is_needed(method: str, spoil: Callable[[dict[str, Any], str], None]):
    """Each is changed in turn, and training then ends elsewhere."""
    whole = trained("bc", method, stop=False)
    assert not same(whole, trained("bc", method, lambda state: spoil(state, method)))
