"""Seeds as a batch axis: what S separate trainings compute, for every offline goal-conditioned agent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clbench.agents.gcrl.base import GoalAgent
from clbench.agents.gcrl.seeds import SeedBatch
from clbench.bench.updates import METHODS, make_agent, point_maze_like
from clbench.contracts import Experience
from clbench.errors import ConfigError

SEEDS, UPDATES = 3, 4
DATA = point_maze_like(2, 2, episodes=6, steps=30)


def fresh(method: str, **options: float) -> list[GoalAgent]:
    given: dict[str, Any] = {"hidden": (16, 16), "batch_size": 12, **options}
    agents = [make_agent(method, DATA, seed=s, **given) for s in range(SEEDS)]
    return [a for a in agents if isinstance(a, GoalAgent)]


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + s) for s in range(SEEDS)]


def alone(agents: list[GoalAgent], updates: int = UPDATES) -> list[GoalAgent]:
    for agent, rng in zip(agents, generators(), strict=True):
        for _ in agent.learn(Experience(dataset=DATA), updates, rng=rng):
            pass
    return agents


def together(agents: list[GoalAgent], updates: int = UPDATES) -> list[GoalAgent]:
    batch = SeedBatch(agents)
    for info in batch.learn(DATA, updates, rngs=generators()):
        assert all(v.shape == (SEEDS,) for v in info.values())
    return batch.unstack()


def distance(a: list[GoalAgent], b: list[GoalAgent]) -> float:
    """The largest difference of any parameter (targets included) or moment of Adam."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert (x.updates, x.samples) == (y.updates, y.samples)
        ours, theirs = dict(x.networks.named_parameters()), dict(y.networks.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, p in ours.items():
            worst = max(worst, float((p - theirs[name]).detach().abs().max()))
            moments, others = x.optimizer.state.get(p, {}), y.optimizer.state.get(theirs[name], {})
            assert moments.keys() == others.keys()
            worst = max(
                [worst, *(float((v - others[k]).abs().max() / (1 + v.abs().max())) for k, v in moments.items())]
            )
    return worst


@pytest.mark.parametrize("method", METHODS)
def test_equals_separate_trainings(method: str) -> None:
    assert distance(alone(fresh(method)), together(fresh(method))) < 2e-4


@pytest.mark.parametrize("method", ["gcivl", "hilp"])
def test_goes_on_from_and_back_to_single_agents(method: str) -> None:
    """Moments of Adam go in and out: 2 + 2 + 2 updates, the middle ones together."""
    one, other = alone(alone(alone(fresh(method), 2), 2), 2), alone(together(alone(fresh(method), 2), 2), 2)
    assert distance(one, other) < 2e-4


@pytest.mark.parametrize("name", ["_update_targets", "_take_moments"])
def test_what_is_left_out_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SeedBatch, name, lambda self: None)
    one, other = (alone(fresh("gcivl", tau=0.5), 2) for _ in range(2))
    one, other = alone(one, 2), together(other, 2)
    assert distance(one, other) > 2e-4


def test_seeds_that_share_a_batch_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    update = SeedBatch.update
    monkeypatch.setattr(SeedBatch, "update", lambda self, batches: update(self, [batches[0]] * SEEDS))
    assert distance(alone(fresh("gcbc")), together(fresh("gcbc"))) > 2e-4


def test_agents_keep_their_weights_until_unstacked() -> None:
    agents = fresh("gcivl")
    before = [p.clone() for a in agents for p in a.networks.parameters()]
    batch = SeedBatch(agents)
    for _ in batch.learn(DATA, 2, rngs=generators()):
        pass
    now = [p for a in agents for p in a.networks.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))
    batch.unstack()
    assert not all(torch.equal(p, q) for p, q in zip(before, now, strict=True))


def test_only_agents_of_one_kind() -> None:
    with pytest.raises(ConfigError, match="one configuration"):
        SeedBatch([*fresh("gcbc"), *fresh("gcivl")])
    with pytest.raises(ConfigError, match="one configuration"):
        SeedBatch([*fresh("gcbc"), *fresh("gcbc", lr=0.5)])
    with pytest.raises(ConfigError, match="at least one agent"):
        SeedBatch([])
