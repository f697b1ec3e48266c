"""Experience replay trains on the union of batch and memory, and the memory holds the past only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clbench.agents.continual.batches import concat, flatten, rows
from clbench.agents.continual.er import ER
from clbench.contracts import TaskInfo
from clbench.errors import ConfigError


def batches_of(lab: SimpleNamespace, count: int, size: int = 8) -> list[Any]:
    rng = lab.generator(9)
    return [lab.data(0).sample(size, rng) for _ in range(count)]


def gradient(agent: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, agent.trainables))


def test_the_gradient_is_that_of_the_union(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["er"], er={"memory": 5})
    first, second = batches_of(lab, 2)
    agent.agent.loss(first)
    twin = ER(ER.Config(memory=5), agent.learner, rng=lab.generator(0))
    twin.load_state_dict(agent.methods["er"].state_dict())
    twin.rng.set_state(agent.methods["er"].rng.get_state())
    replayed = twin.replay(second)
    found = gradient(agent, agent.agent.loss(second)[0])

    def per_row(batch: Any) -> list[torch.Tensor]:
        return [g * rows(batch) for g in gradient(agent, agent.learner.loss(batch))]

    union = [(a + b) / 13 for a, b in zip(per_row(second), per_row(replayed), strict=True)]
    mean_of_means = [(a / 8 + b / 5) / 2 for a, b in zip(per_row(second), per_row(replayed), strict=True)]
    assert rows(replayed) == 5
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, union, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, mean_of_means, strict=True))


def test_replayed_rows_were_seen_before(lab: SimpleNamespace) -> None:
    """Also within the batch: what is replayed beside a batch is never of it."""
    agent = lab.composed(lab.Toy, ["er"], er={"memory": 64})
    method, seen = agent.methods["er"], []
    for batch in batches_of(lab, 6):
        replayed = method.replay(batch)
        if seen:
            past = {tuple(r) for r in torch.cat(seen).tolist()}
            assert all(tuple(r) in past for r in replayed.observations.tolist())
        else:
            assert replayed is None
        seen.append(batch.observations)


def test_the_memory_never_holds_rows_of_the_future(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["er"], er={"memory": 30})
    past: set[tuple[float, ...]] = set()
    for task in range(3):
        past |= {tuple(r) for r in lab.data(task).observations.tolist()}
        lab.phase(agent, lab.data(task), 10, task)
        held = agent.methods["er"].memory.sample(99, lab.generator(0)).observations.tolist()
        assert len(held) == 30
        assert all(tuple(r) in past for r in held)
    old = {tuple(r) for r in lab.data(0).observations.tolist()}
    assert 0 < sum(tuple(r) in old for r in held) < 30  # and it has not forgotten the first task


@pytest.mark.parametrize(("size", "replayed"), [(0, 8), (3, 3), (50, 20)])
def test_costs_are_the_replayed_rows(lab: SimpleNamespace, size: int, replayed: int) -> None:
    """From the second update on; no more than the memory has."""
    agent = lab.composed(lab.Toy, ["er"], er={"memory": 20, "batch_size": size})
    costs = []
    for batch in batches_of(lab, 6):
        agent.agent.loss(batch)
        costs.append(agent.method_costs())
    assert costs[0]["extra_forward_samples"] == costs[0]["extra_backward_samples"] == 0
    for name in ("extra_forward_samples", "extra_backward_samples"):
        assert costs[-1][name] - costs[-2][name] == replayed
    held = sum(
        t.numel() * t.element_size() for t in flatten(agent.methods["er"].memory.sample(99, lab.generator(0)))[0]
    )
    assert costs[-1]["method_state_bytes"] >= held


def test_it_remembers_what_finetuning_forgets(lab: SimpleNamespace) -> None:
    def error(methods: list[Any], **options: Any) -> float:
        agent = lab.composed(lab.Toy, methods, **options)
        for task in range(2):
            lab.phase(agent, lab.data(task), 300, task)
        with torch.no_grad():
            return float(agent.learner.loss(lab.data(0).sample(64, lab.generator(0))))

    assert error(["er"], er={"memory": 64}) < 0.6 * error([])


def test_balanced_memory_shares(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["er-balanced"], er_balanced={"memory": 20})
    for task, updates in enumerate((40, 20, 3)):
        lab.phase(agent, lab.data(task), updates, task)
    assert sorted(len(s) for s in agent.methods["er-balanced"].memory.slots) == [6, 7, 7]


def test_without_boundaries_it_works_all_the_same(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["er"], er={"memory": 10})
    lab.learn(agent, lab.data(0), 5)
    assert len(agent.methods["er"].memory) == 10
    assert "boundaries" not in type(agent).requires


def test_other_methods_see_the_batch_without_replayed_rows(lab: SimpleNamespace) -> None:
    sizes: list[int] = []

    class Look(ER):
        def replay(self, batch: Any) -> Any:
            return None

        def loss(self, base: torch.Tensor, batch: Any) -> torch.Tensor:
            sizes.append(rows(batch))
            return base

    agent = lab.composed(lab.Toy, ["er", Look])
    lab.learn(agent, lab.data(0), 4)
    assert sizes == [8] * 4
    assert rows(concat(batches_of(lab, 2))) == 16  # what it would be with them


@pytest.mark.parametrize("options", [{"memory": 0}, {"batch_size": -1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="memory must be at least 1 and batch_size at least 0"):
        ER.Config(**options)


def test_a_boundary_alone_changes_nothing(lab: SimpleNamespace) -> None:
    agent = lab.composed(lab.Toy, ["er"])
    before = lab.weights(agent)
    agent.start_task(TaskInfo(0))
    agent.start_task(TaskInfo(1))
    assert lab.equal(before, lab.weights(agent))
    assert len(agent.methods["er"].memory) == 0
