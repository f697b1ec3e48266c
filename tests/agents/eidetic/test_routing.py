"""Routers: densities against a closed form, and what adding a task may change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.agents.networks.eidetic.routing import NoveltyRouter, TrainedRouter, first_maximum
from clbench.agents.networks.eidetic.verify import same
from clbench.errors import ConfigError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(seed: int, n: int = 200, size: int = 4, centre: float = 0.0) -> Tensor:
    return centre + torch.randn(n, size, generator=generator(seed)) @ torch.randn(size, size, generator=generator(seed))


def novelty(tasks: int, size: int = 4) -> NoveltyRouter:
    router = NoveltyRouter()
    for k in range(tasks):
        labels = torch.randint(3, (200,), generator=generator(k))
        router.add(cloud(k, size=size, centre=float(k)), labels)
    return router


def moved(before: Tensor, after: Tensor, new: int) -> bool:
    """Whether a decision went from one old task to another."""
    return bool(((after != before) & (after != new)).any())


@given(tasks=st.integers(1, 5), seed=st.integers(0, 1000), spread=st.floats(0.1, 30))
@settings(max_examples=40, deadline=None)
def test_adding_a_task_moves_decisions_to_the_new_task_only(tasks: int, seed: int, spread: float) -> None:
    router = novelty(tasks)
    x = spread * torch.randn(300, 4, generator=generator(seed))
    before, scores = router.route(x), router.scores(x)
    router.add(cloud(seed, centre=spread), torch.zeros(200, dtype=torch.int64))
    after = router.route(x)
    assert not moved(before, after, tasks)
    assert torch.equal(router.scores(x)[:, :tasks], scores)


def test_negative_control_a_router_that_is_trained_again_moves_old_decisions() -> None:
    """Its scores of old tasks are not frozen, so confusions among old tasks change when a task is added."""
    router = TrainedRouter(4, rng=generator(), updates=60, hidden=16)
    for k in range(3):
        router.add(cloud(k, centre=0.3 * k))
    x = 2 * torch.randn(500, 4, generator=generator(9))
    before = router.route(x)
    router.add(cloud(7, centre=8.0))
    assert moved(before, router.route(x), 3)


def test_negative_control_scores_normalised_over_tasks_are_not_frozen() -> None:
    """Dividing by what all tasks say, with a temperature that depends on their number, lets old scores change."""
    router = novelty(3)
    x = torch.randn(50, 4, generator=generator(1))
    before = router.scores(x).softmax(1)
    router.add(cloud(5, centre=1.0))
    assert not torch.allclose(router.scores(x).softmax(1)[:, :3], before)


def test_densities_against_the_closed_form() -> None:
    x, labels = cloud(0), torch.arange(200) % 2
    router = NoveltyRouter(shrink=0.0, floor=1e-9)
    router.add(x, labels)
    means = torch.stack([x[labels == c].double().mean(0) for c in (0, 1)])
    rest = x.double() - means[labels]
    covariance = rest.T @ rest / len(x) + 1e-9 * torch.eye(4, dtype=torch.float64)
    parts = [torch.distributions.MultivariateNormal(m, covariance).log_prob(x.double()) for m in means]
    expected = torch.stack(parts, 1).add(torch.tensor(0.5).log()).logsumexp(1)
    difference = router.scores(x)[:, 0] - expected
    assert torch.allclose(difference, difference[0].expand_as(difference), atol=1e-6)  # a constant is left out


def test_many_numbers_use_variances_only() -> None:
    router = NoveltyRouter()
    router.add(torch.randn(50, 1500, generator=generator()))
    router.add(3 + torch.randn(50, 1500, generator=generator(1)))
    x = torch.cat([torch.randn(9, 1500, generator=generator(2)), 3 + torch.randn(9, 1500, generator=generator(3))])
    assert router.route(x).tolist() == [0] * 9 + [1] * 9


def test_separate_tasks_are_told_apart() -> None:
    for router in (NoveltyRouter(), TrainedRouter(4, rng=generator(), updates=200)):
        for k in range(3):
            router.add(cloud(k, centre=10.0 * k))
        found = torch.stack([router.route(cloud(k, centre=10.0 * k)) for k in range(3)])
        assert (found == torch.arange(3)[:, None]).float().mean() > 0.95


def test_numbers_that_never_vary_are_no_trouble() -> None:
    router, x = NoveltyRouter(), torch.zeros(20, 3)
    router.add(x)
    router.add(x + 1)
    assert router.route(torch.tensor([[0.0, 0.0, 0.1], [1.0, 1.0, 1.0]])).tolist() == [0, 1]


def test_ties_and_nan_go_to_the_older_task() -> None:
    scores = torch.tensor([[1.0, 1.0], [float("nan"), 0.0], [float("nan"), float("nan")], [0.0, 2.0]])
    assert first_maximum(scores).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("kind", ["novelty", "trained"])
def test_states_go_through_a_file_and_training_goes_on_from_them(kind: str, tmp_path: Any) -> None:
    def new(seed: int) -> Any:
        return NoveltyRouter() if kind == "novelty" else TrainedRouter(4, rng=generator(seed), updates=5, samples=50)

    router, x = new(0), cloud(9)
    router.add(cloud(0))
    router.add(cloud(1))
    torch.save(router.state_dict(), tmp_path / "router.pt")
    other = new(1)
    other.load_state_dict(torch.load(tmp_path / "router.pt", weights_only=True))
    assert same(router.state_dict(), other.state_dict()) and torch.equal(router.route(x), other.route(x))
    for each in (router, other):
        each.add(cloud(2))
    assert same(router.state_dict(), other.state_dict())


def test_what_a_router_needs_is_declared() -> None:
    assert not NoveltyRouter.needs_all_data and TrainedRouter.needs_all_data
    router = TrainedRouter(4, rng=generator(), updates=1, samples=30)
    router.add(cloud(0))
    router.add(cloud(1))
    assert [len(s) for s in router.store] == [30, 30]


@pytest.mark.parametrize("options", [{"shrink": 1.5}, {"floor": 0.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="shrink must be in"):
        NoveltyRouter(**options)
