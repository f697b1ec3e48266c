"""Eidetic behaviour cloning: it learns, and what a finished task does never changes by a bit."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from torch import Tensor, nn

import clbench
from clbench.agents.eidetic_bc import EideticBC
from clbench.agents.networks.eidetic.verify import same, verify
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset
from clbench.errors import CapacityExhausted, ConfigError, ContractError, DataError

PLANE = Box(-1, 1, (2,), np.float32)
CLASSIFY = Spaces(PLANE, Discrete(2, start=1))
REGRESS = Spaces(PLANE, Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)))
STATES = 9
CHAIN = Spaces(Dict({k: Discrete(STATES) for k in ("observation", "achieved_goal", "desired_goal")}), Discrete(2))
ANGLES = (0.0, 0.7, 1.4, 2.1, 2.8)  # of the line that separates the classes, one per task


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces = CLASSIFY, seed: int = 0, **options: Any) -> EideticBC:
    options = {"hidden": (40, 40, 40), "pruning": {"tasks": 5}, "lr": 5e-3, **options}
    config = build(EideticBC.Config, options, "agent")
    return EideticBC(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def lines(task: int, n: int = 400, seed: int = 0, shift: bool = False) -> OfflineDataset:
    """Points of the square, labelled (1 or 2) by their side of a line; with ``shift`` in a region of their own."""
    x = torch.rand(n, 2, generator=generator(100 * seed + task)) * 2 - 1
    angle = ANGLES[task]
    y = 1 + (x @ torch.tensor([math.cos(angle), math.sin(angle)]) > 0).long()
    x = x * 0.15 + torch.tensor([0.35 * (task - 2), 0.0]) if shift else x
    return OfflineDataset(x, y, torch.ones(n))


def walks(episodes: int = 100, length: int = 12) -> OfflineDataset:
    """Random walks on a chain of states with reflecting ends; actions 0 = left, 1 = right."""
    rng = generator(4)
    state = torch.randint(STATES, (episodes,), generator=rng)
    states, actions = [state], []
    for _ in range(length):
        actions.append(torch.randint(2, (episodes,), generator=rng))
        states.append((states[-1] + 2 * actions[-1] - 1).clamp(0, STATES - 1))
    rows = torch.stack(states[:-1], 1).flatten()
    obs = {"observation": rows, "achieved_goal": rows}
    return OfflineDataset(
        obs, torch.stack(actions, 1).flatten(), torch.full((episodes,), length), dict.fromkeys(obs, states[-1])
    )


def train(agent: EideticBC, data: OfflineDataset, updates: int, seed: int = 0) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(dataset=data), updates, rng=generator(seed))]


def task(agent: EideticBC, data: OfflineDataset, updates: int = 80, id: int | None = None) -> list[dict[str, float]]:
    agent.start_task(TaskInfo(id))
    metrics = train(agent, data, updates)
    agent.finish_task()
    return metrics


def act(agent: EideticBC, obs: Any, id: int | None = None, **options: Any) -> Tensor:
    rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    first, ids = torch.ones(rows, dtype=torch.bool), None if id is None else torch.full((rows,), id)
    return agent.act(obs, None, first, rng=generator(0), task=ids, **options)[0]


def accuracy(agent: EideticBC, k: int, id: int | None, shift: bool = False) -> float:
    fresh = lines(k, seed=1, shift=shift)
    return float((act(agent, fresh.observations, id) == fresh.actions).float().mean())


def logits(agent: EideticBC, k: int, batch: int) -> Tensor:
    """What finished task ``k`` gives, as `act` computes it."""
    from clbench.agents.networks.eidetic.policy import prepare

    x = torch.rand(batch, 2, generator=generator(7)) * 2 - 1
    with torch.no_grad():
        return agent._output(prepare(agent.parts, x), k).clone()


# -- zero forgetting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"reset_optimizer": False, "weight_decay": 0.1},
        {"norm": "batch", "pruning": {"tasks": 5, "criterion": "taylor"}},
        {"norm": "prefix", "activation": "gelu", "pruning": {"tasks": 5, "criterion": "random"}},
        {"transfer": False, "pruning": {"tasks": 5, "criterion": "l1"}},
    ],
    ids=["one AdamW with decay", "BatchNorm, taylor", "PrefixNorm, random", "no transfer, l1"],
)
def test_five_tasks_and_not_a_bit_of_an_old_one_moves(options: dict[str, Any]) -> None:
    agent, seen = make(**options), {}
    for k in range(5):
        agent.start_task(TaskInfo(k))
        for m in agent.learn(Experience(dataset=lines(k)), 60, rng=generator(k)):
            if m["step"] % 10 == 0 or "quality" in m:
                assert all(same(v, logits(agent, i, b)) for (i, b), v in seen.items())
        agent.finish_task()
        seen |= {(k, b): logits(agent, k, b) for b in (1, 7, 256)}
        assert all(same(v, logits(agent, i, b)) for (i, b), v in seen.items())
    evidence = verify(agent.network)
    assert evidence.ok and set(evidence.status.values()) <= {"pass", "skip"} and evidence.max_abs_change == 0.0
    assert evidence.status["L1"] == "pass"


def test_negative_control_a_network_whose_weights_are_trained_after_commit_is_caught() -> None:
    agent = make()
    task(agent, lines(0), id=0)
    before = logits(agent, 0, 7)
    with torch.no_grad():
        agent.network.layers[0].weight.store.mul_(1 + 1e-6)
    agent._alone.clear()
    assert not same(before, logits(agent, 0, 7)) and not verify(agent.network).ok


def test_it_learns_all_tasks_and_keeps_them() -> None:
    agent = make()
    for k in range(5):
        task(agent, lines(k), id=k)
    assert min(accuracy(agent, k, k) for k in range(5)) > 0.93
    assert agent.network.capacity().share("free") > 0


def test_the_loop_reports_zero_forgetting(tmp_path: Path) -> None:
    result = clbench.run(
        "digits-permuted", "eidetic-bc", seed=0, budget=60, eval_every=0, out=tmp_path / "run", tensorboard=False,
        stream_options={"tasks": 3}, agent_options={"hidden": (64, 64), "pruning": {"tasks": 3}},
    )  # fmt: skip
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["metrics"]["forgetting"] == 0.0 and saved["reveals"] == "task_id"
    for column, first in enumerate(range(1, 4)):
        assert len({row[column] for row in saved["matrix"][first:]}) == 1
    assert result.metrics["average_performance"] > 0.5


def test_continuous_actions_and_goals() -> None:
    agent, x = make(REGRESS), torch.rand(300, 2, generator=generator(3)) * 2 - 1
    data = OfflineDataset(x, torch.stack([2 * x[:, 0], (x[:, 1] + 1) / 2], 1), torch.ones(300))
    task(agent, data, 200, id=0)
    assert (act(agent, x, 0) - data.actions).abs().mean() < 0.15
    assert all(REGRESS.action.contains(a) for a in act(agent, x, 0, explore=True).numpy())
    chain = make(CHAIN)
    task(chain, walks(), 150)
    state, goal = (v.flatten() for v in torch.meshgrid(torch.arange(STATES), torch.arange(STATES), indexing="ij"))
    reached = state == goal
    for _ in range(2 * STATES):
        state = (state + 2 * act(chain, {"observation": state, "desired_goal": goal}) - 1).clamp(0, STATES - 1)
        reached |= state == goal
    assert bool(reached.all())


def test_images_train() -> None:
    x = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    x[32:, :, :8] = 255
    agent = make(Spaces(Box(0, 255, (1, 16, 16), np.uint8), Discrete(2)), hidden=(16,))
    task(agent, OfflineDataset(x, (torch.arange(64) >= 32).long(), torch.ones(64)), 60)
    assert act(agent, x).tolist() == [0] * 32 + [1] * 32


# -- which task ----------------------------------------------------------------------------------------------------------


def test_without_ids_a_router_decides_and_adding_a_task_only_moves_to_it() -> None:
    agent, x = make(), torch.rand(500, 2, generator=generator(5)) * 2 - 1
    from clbench.agents.networks.eidetic.policy import prepare

    before = None
    for k in range(4):
        task(agent, lines(k, shift=True), id=None)
        now = agent.route(prepare(agent.parts, x))
        if before is not None:
            assert bool(((now == before) | (now == k)).all())
        before = now
    assert min(accuracy(agent, k, None, shift=True) for k in range(4)) > 0.85


def test_ids_that_are_revealed_win_over_the_router() -> None:
    agent = make()
    for k in (0, 2):  # the same inputs, other labels: no router could tell
        task(agent, lines(k), id=k)
    assert accuracy(agent, 0, 0) > 0.93 and accuracy(agent, 2, 2) > 0.93
    both = torch.cat([lines(k, seed=1).observations for k in (0, 2)])
    ids = torch.tensor([0] * 400 + [2] * 400)
    mixed = agent.act(both, None, torch.ones(800, dtype=torch.bool), rng=generator(0), task=ids)[0]
    assert torch.equal(mixed, torch.cat([act(agent, both[:400], 0), act(agent, both[400:], 2)]))


def test_an_id_that_was_never_learned_gets_the_newest_task() -> None:
    agent = make()
    task(agent, lines(0), id=3)
    x = lines(0).observations
    assert torch.equal(act(agent, x, 9), act(agent, x, 3))


@pytest.mark.parametrize(("router", "needs"), [("trained", True), ("newest", None)])
def test_other_routers(router: str, needs: bool | None) -> None:
    agent = make(router=router)
    for k in range(2):
        task(agent, lines(k, shift=True))
    assert getattr(agent.router, "needs_all_data", None) is needs
    assert accuracy(agent, 1, None, shift=True) > 0.85
    assert (accuracy(agent, 0, None, shift=True) > 0.85) == (router == "trained")


def test_a_task_that_comes_back_is_kept_as_it_is() -> None:
    agent = make()
    for k in range(2):
        task(agent, lines(k), id=k)
    before = copy.deepcopy(agent.state_dict())
    metrics = task(agent, lines(0), 80, id=0)
    assert metrics == [{"step": 80, "skipped": 80.0}] and same(before, agent.state_dict())
    assert agent.costs()["updates"] == 160
    task(agent, lines(2), id=2)  # and then a new one
    assert accuracy(agent, 2, 2) > 0.9


# -- capacity, options ---------------------------------------------------------------------------------------------------


def test_a_task_without_room_is_refused_or_trains_its_head_alone() -> None:
    agent = make(pruning={"tasks": 1, "tolerance": 0.0, "train": 0.9, "finish": 0.05})
    task(agent, lines(0), 20, id=0)
    owned = 1 - agent.network.capacity().share("free")
    assert owned == 1.0
    with pytest.raises(CapacityExhausted, match="Task 1 finds no room: hidden0 has 0 free units"):
        agent.start_task(TaskInfo(1))
    agent = make(pruning={"tasks": 1, "tolerance": 0.0, "train": 0.9, "finish": 0.05}, exhausted="head-only")
    for k in range(2):
        task(agent, lines(k), 60, id=k)
    assert accuracy(agent, 0, 0) > 0.9 and accuracy(agent, 1, 1) > 0.7


@pytest.mark.parametrize("reset", [True, False])
def test_a_task_without_room_may_add_units(reset: bool, tmp_path: Path) -> None:
    options = {"pruning": {"tasks": 1, "tolerance": 0.0, "train": 0.9, "finish": 0.05}, "hidden": (16, 12)}
    options |= {"exhausted": "widen", "reset_optimizer": reset}
    agent, seen = make(**options), {}
    for k in range(3):
        task(agent, lines(k), 100, id=k)
        seen[k] = logits(agent, k, 7)
    assert [s.size for s in agent.network.prunable().values()] == [25, 19]  # + 4 + 5, + 3 + 4
    assert all(same(v, logits(agent, k, 7)) for k, v in seen.items())
    assert min(accuracy(agent, k, k) for k in range(3)) > 0.85
    evidence = verify(agent.network)
    assert evidence.ok and evidence.status["L1"] == "pass" and "compared extracted" in evidence.details["L1"]
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    other = make(seed=4, **options)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(other.state_dict(), agent.state_dict())
    for each in (agent, other):
        task(each, lines(3), 20, id=3)
    assert same(other.state_dict(), agent.state_dict())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden": ()}, "hidden must hold at least one"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"held_out": 1.0}, "held_out must be between"),
        ({"weight_decay": -1.0}, "must be at least 0"),
        ({"pruning": {"criterion": "l0"}}, "criterion 'l0'"),
        ({"activation": "step"}, "activation 'step'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make(**options)


def test_spaces_and_data_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="needs Box or Discrete"):
        make(Spaces(PLANE, MultiDiscrete([2, 2])))
    with pytest.raises(ContractError, match="learns from a data set"):
        next(make().learn(Experience(), 3, rng=generator(0)))
    plain = OfflineDataset({"observation": torch.zeros(3, dtype=torch.int64)}, torch.zeros(3).long(), torch.ones(3))
    with pytest.raises(DataError, match="neither achieved_goal nor desired_goal"):
        train(make(CHAIN), plain, 1)


def test_few_rows_are_enough() -> None:
    agent = make(CLASSIFY)
    task(agent, lines(0, n=1), 5)
    task(agent, lines(1, n=3), 5)
    assert agent.network.committed == 2


# -- state ---------------------------------------------------------------------------------------------------------------


def resumed(stop: int, tmp_path: Path, spoil: str = "", **options: Any) -> tuple[Any, Any]:
    """End states of two tasks without interruption, and of a run that was stopped in the second one and loaded anew."""
    whole, rng, saved = make(**options), generator(9), {}
    task(whole, lines(0), 40, id=0)
    whole.start_task(TaskInfo(1))
    for m in whole.learn(Experience(dataset=lines(1)), 40, rng=rng):
        if m["step"] == stop:
            torch.save({"agent": whole.state_dict(), "rng": rng.get_state()}, tmp_path / "state.pt")
            saved = torch.load(tmp_path / "state.pt", weights_only=True)
    whole.finish_task()
    if spoil:
        saved["agent"][spoil] = make(seed=5, **options).state_dict()[spoil]
    second, rng = make(seed=77, **options), generator(0)
    second.load_state_dict(saved["agent"])
    rng.set_state(saved["rng"])
    list(second.learn(Experience(dataset=lines(1)), 40 - stop, rng=rng))
    second.finish_task()
    return whole.state_dict(), second.state_dict()


@pytest.mark.parametrize("stop", [3, 17, 20, 25, 39])
def test_resuming_anywhere_is_exact(stop: int, tmp_path: Path) -> None:
    assert same(*resumed(stop, tmp_path))


@pytest.mark.parametrize("stop", [3, 20])
def test_resuming_with_one_optimizer_for_all_tasks_is_exact(stop: int, tmp_path: Path) -> None:
    assert same(*resumed(stop, tmp_path, reset_optimizer=False, weight_decay=0.1, norm="batch"))


def test_negative_control_a_state_without_the_pruner_is_noticed(tmp_path: Path) -> None:
    assert not same(*resumed(20, tmp_path, spoil="pruner"))


def test_finished_tasks_load_into_a_fresh_agent_bit_for_bit(tmp_path: Path) -> None:
    agent = make(norm="batch")
    for k in range(3):
        task(agent, lines(k), 40, id=k)
    torch.save(agent.state_dict(), tmp_path / "state.pt")
    other = make(seed=3, norm="batch")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(same(logits(agent, k, 7), logits(other, k, 7)) for k in range(3))
    assert verify(other.network).ok


def test_the_quality_is_one_minus_the_loss_over_a_trivial_one() -> None:
    agent, data = make(), lines(0)
    batch = data.batch(torch.arange(400))
    with torch.no_grad():
        for p in agent.network.parameters():
            p.zero_()
    share = (data.actions == 1).double().mean()
    trivial = -(share * share.log() + (1 - share) * (1 - share).log())
    assert agent.quality(batch) == pytest.approx(float(1 - math.log(2) / trivial), abs=1e-5)
    task(agent, data, 200)
    agent.network.begin_task(generator(0))
    assert agent.quality(batch) < 0.5  # a fresh head knows nothing


def test_every_trainable_is_reached_by_the_loss_while_nothing_is_owned() -> None:
    agent = make()
    agent.loss(lines(0).batch(torch.arange(200)))[0].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in agent.trainables)
    assert agent.num_parameters == sum(p.numel() for p in agent.trainables)


def test_gradients_reach_free_rows_only() -> None:
    agent = make()
    task(agent, lines(0), 60, id=0)
    agent.start_task(TaskInfo(1))
    agent.optimizer.zero_grad()
    agent.loss(lines(1).batch(torch.arange(400)))[0].backward()
    for layer in agent.network.layers:
        owned = ~layer.out.free
        grad = layer.weight.value.grad
        assert grad is not None and bool(owned.any())
        assert not bool(grad[owned].any()) and bool(grad[~owned].any())
    head: nn.Module = agent.network.head.layers[0]
    assert all(p.grad is None or not bool(p.grad.any()) for p in head.parameters())
