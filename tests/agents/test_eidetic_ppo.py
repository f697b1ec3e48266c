"""Eidetic PPO: finished policies never change, pruning costs little and no environment steps, resuming is exact."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from clbench.agents import eidetic_ppo
from clbench.agents.eidetic_ppo import EideticActorCritic, EideticPPO, Numbers, divergence, marginal, quality, split
from clbench.agents.networks.eidetic import FREE, verify
from clbench.agents.networks.eidetic.policy import EideticPolicy
from clbench.agents.networks.eidetic.pruning import Pruning
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.errors import CapacityExhausted, ConfigError, ContractError
from clbench.testing.fixtures import Fixture

SMALL: dict[str, Any] = {
    "hidden": (16, 12), "critic_hidden": (8,), "rollout_steps": 24, "batch_size": 8, "n_epochs": 2, "visited": 60,
    "pruning": {"tasks": 3, "train": 0.0, "recover": 0.1}, "distil_updates": 20, "distil_batch": 16,
}  # fmt: skip
KINDS = ["discrete", "", "discrete goal", "discrete pixels last"]
BUDGET = 96  # four rollouts
ROWS = 20


def make(tiny: Any, kind: str, seed: int = 0, cls: Any = EideticPPO, **options: Any) -> Any:
    spaces = tiny.Line(1, kind).spaces
    config = build(cls.Config, {**SMALL, **options}, cls.name)
    return cls(spaces, config, device=tiny.cpu, rng=tiny.generator(seed))


def world(tiny: Any, kind: str, seed: int) -> Any:
    env = tiny.Line(2, kind)
    env.reset(seed=seed)
    return env


def learn(tiny: Any, agent: Any, env: Any, budget: int = BUDGET, rng: Any = None) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(env=env), budget, rng=rng or tiny.generator(0))]


def train(tiny: Any, agent: Any, kind: str, number: int, task: TaskInfo | None = None) -> list[dict[str, float]]:
    """One whole task, whose world depends on ``number``."""
    agent.start_task(TaskInfo(number) if task is None else task)
    metrics = learn(tiny, agent, world(tiny, kind, 10 + number))
    agent.finish_task()
    return metrics


def observations(tiny: Any, kind: str, rows: int = ROWS, seed: int = 5) -> Any:
    env = tiny.Line(rows, kind)
    return env.reset(seed=seed)[0]


def first(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.bool)


def answers(tiny: Any, agent: Any, kind: str, task: int) -> list[Tensor]:
    """What the agent does in ``task``: outputs of the whole network, of the part that acts, and actions."""
    obs = observations(tiny, kind)
    ids = torch.full((ROWS,), task)
    inputs = agent.policy.inputs(agent.policy.obs_to_tensor({k: v.numpy() for k, v in obs.items()}
                                 if isinstance(obs, dict) else obs.numpy())[0])  # fmt: skip
    with torch.no_grad():
        whole = agent.network(*inputs, task=task)
    drawn = agent.act(obs, None, first(ROWS), rng=tiny.generator(1), task=ids, explore=True)[0]
    greedy = agent.act(obs, None, first(ROWS), rng=tiny.generator(1), task=ids)[0]
    whole = list(whole) if isinstance(whole, tuple) else [whole]
    return [*(y.clone() for y in whole), *(y.clone() for y in agent._output(inputs, task)), drawn, greedy]


def unchanged(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- zero forgetting ---------------------------------------------------------------------------------------------------


def forgotten(tiny: Any, agent: Any, kind: str) -> list[int]:
    """Trains three tasks; which of them answer in another way than when they were finished, at any yield after."""
    recorded: dict[int, list[Tensor]] = {}
    changed: set[int] = set()

    def look() -> None:
        changed.update(k for k, before in recorded.items() if not unchanged(before, answers(tiny, agent, kind, k)))

    for number in range(3):
        agent.start_task(TaskInfo(number))
        look()
        for i, _ in enumerate(
            agent.learn(Experience(env=world(tiny, kind, 10 + number)), BUDGET, rng=tiny.generator(0))
        ):
            if i in (0, 1, 5):  # after rollouts, at the first kill, and in the middle of the distillation
                look()
        agent.finish_task()
        look()
        recorded[number] = answers(tiny, agent, kind, number)
    return sorted(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_finished_task_does_never_changes_by_a_bit(tiny: Any, kind: str) -> None:
    agent = make(tiny, kind)
    assert forgotten(tiny, agent, kind) == []
    assert len(agent.network.capacity().reuse) == 3 and agent.network.capacity().reuse[1] > 0
    evidence = verify(agent.eidetic["policy"])
    assert evidence.status == dict.fromkeys(("L0", "L1", "L2", "L3", "L4"), "pass"), evidence.details


def test_prefix_norm_is_kept_too(tiny: Any) -> None:
    assert forgotten(tiny, make(tiny, "discrete", norm="prefix"), "discrete") == []


class LayerNormed(EideticPolicy):
    """An actor with a plain LayerNorm, hidden from the check: it mixes owned and free units."""

    def features(self, *inputs: Tensor) -> Tensor:
        x = super().features(*inputs)
        return nn.functional.layer_norm(x, x.shape[1:])


class Unprotected(EideticPPO):
    """The weights of finished tasks are trained on."""

    def start_task(self, task: TaskInfo) -> None:
        for space in self.network.prunable().values():
            owned = space.owner < FREE
            space.owner.masked_fill_(owned, FREE)
        super().start_task(task)


def test_the_comparison_notices_a_plain_layer_norm(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eidetic_ppo, "EideticPolicy", LayerNormed)
    agent = make(tiny, "discrete")
    assert forgotten(tiny, agent, "discrete") == [0, 1]
    assert not verify(agent.network).ok


def test_a_layer_norm_in_sight_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Normed(EideticPolicy):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.norm = nn.LayerNorm(12)

    monkeypatch.setattr(eidetic_ppo, "EideticPolicy", Normed)
    with pytest.raises(ConfigError, match="'norm' is a LayerNorm.*eidetic.PrefixNorm"):
        make(tiny, "discrete")


def test_the_comparison_notices_weights_that_nobody_protects(tiny: Any) -> None:
    assert 0 in forgotten(tiny, make(tiny, "discrete", cls=Unprotected), "discrete")


@pytest.mark.parametrize("discrete", [True, False])
def test_the_toy_of_the_conformance_suite_is_kept_too(discrete: bool) -> None:
    fixture = Fixture(discrete=discrete)
    config = build(EideticPPO.Config, SMALL, "eidetic-ppo")
    agent = EideticPPO(fixture.spaces, config, device=torch.device("cpu"), rng=torch.Generator().manual_seed(0))
    for number in range(2):
        agent.start_task(TaskInfo(number))
        for _ in agent.learn(fixture.experience("env", 4, number), BUDGET, rng=torch.Generator().manual_seed(0)):
            pass
        agent.finish_task()
    assert verify(agent.network).ok


# -- what is learned anew ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["discrete", ""])
def test_critic_and_optimiser_begin_anew_with_every_task(tiny: Any, kind: str) -> None:
    agent = make(tiny, kind)
    agent.start_task(TaskInfo(0))
    start = copy.deepcopy(dict(agent.policy.critic.state_dict()))
    learn(tiny, agent, world(tiny, kind, 10))
    trained = copy.deepcopy(dict(agent.policy.critic.state_dict()))
    assert not tiny.same(start, trained) and agent.policy.optimizer.state
    agent.finish_task()
    agent.start_task(TaskInfo(1))
    fresh = dict(agent.policy.critic.state_dict())
    assert not agent.policy.optimizer.state
    for name, value in fresh.items():
        if name.endswith("weight"):  # biases start at zero
            assert not torch.equal(value, trained[name]) and not torch.equal(value, start[name])
        else:
            assert not bool(value.any()) and bool(trained[name].any())
    mine = {id(p) for group in agent.policy.optimizer.param_groups for p in group["params"]}
    assert mine == {id(p) for p in agent.policy.parameters()}


def test_the_standard_deviation_belongs_to_its_task(tiny: Any) -> None:
    agent = make(tiny, "")

    def log_std(task: int) -> Tensor:
        return agent.network.head.layers[task].log_std().detach().clone()

    train(tiny, agent, "", 0)
    old = log_std(0)
    assert bool((old != 0).all())
    agent.start_task(TaskInfo(1))
    assert bool((log_std(1) == 0).all())
    learn(tiny, agent, world(tiny, "", 11))
    agent.finish_task()
    with torch.no_grad():  # what an optimiser can reach
        agent.network.head.layers[0].log_std.value.fill_(9.0)
        agent.network.head.layers[1].log_std.value.fill_(9.0)
    assert torch.equal(log_std(0), old) and not torch.equal(log_std(1), old)
    obs = observations(tiny, "", 1)
    inputs = agent.policy.inputs(obs)
    mean, std = agent._output(inputs, 0)
    assert torch.equal(std, old[None])
    agent._alone[0].head.layers[0].log_std.store.fill_(-20.0)  # certain of its mean
    narrow = agent.act(obs, None, first(1), rng=tiny.generator(3), task=torch.zeros(1), explore=True)[0]
    assert torch.allclose(narrow, mean.clamp(-0.2, 0.2), atol=1e-6)


# -- ids and routing ---------------------------------------------------------------------------------------------------


def test_a_task_that_comes_back_is_kept_and_skipped(tiny: Any) -> None:
    agent = make(tiny, "discrete")
    for number in range(2):
        train(tiny, agent, "discrete", number)
    before, env = agent.state_dict(), world(tiny, "discrete", 10)
    agent.start_task(TaskInfo(0))
    assert learn(tiny, agent, env) == [{"step": BUDGET, "skipped": float(BUDGET)}]
    assert tiny.same({**agent.state_dict(), "known": None}, before) and env.steps == 0
    agent.finish_task()
    assert tiny.same(agent.state_dict(), before)
    train(tiny, agent, "discrete", 2)
    assert agent.network.committed == 3 and agent.ids == [0, 1, 2]


def test_rows_of_a_batch_may_be_of_different_tasks(tiny: Any) -> None:
    agent = make(tiny, "")
    for number in (7, 4):
        train(tiny, agent, "", number)
    obs, ids = observations(tiny, ""), torch.tensor([7, 4, 4, 7, 99] * 4)
    mixed = agent.act(obs, None, first(ROWS), rng=tiny.generator(0), task=ids)[0]
    for row, task in enumerate(ids.tolist()):
        inputs = agent.policy.inputs(obs[row : row + 1])
        wanted = agent._output(inputs, {7: 0}.get(task, 1))[0].clamp(-0.2, 0.2)  # ids that are not known: the newest
        assert torch.allclose(mixed[row : row + 1], wanted, atol=1e-6)


def test_without_ids_a_new_task_only_takes_decisions_over(tiny: Any) -> None:
    agent = make(tiny, "discrete")
    inputs = agent.policy.inputs(observations(tiny, "discrete", 300))
    decisions = []
    for number in range(3):
        train(tiny, agent, "discrete", number, TaskInfo())
        decisions.append(agent.route(inputs))
    assert len(agent.router.tasks) == 3
    for k in (1, 2):
        moved = decisions[k] != decisions[k - 1]
        assert bool(moved.any()) and bool((decisions[k][moved] == k).all())
    assert torch.equal(agent.route(inputs, torch.zeros(300)), decisions[-1])  # ids that were never revealed in training


def test_with_ids_the_router_has_nothing_to_keep(tiny: Any) -> None:
    agent = make(tiny, "discrete")
    train(tiny, agent, "discrete", 0)
    assert agent.router.tasks == []
    assert make(tiny, "discrete", router="newest").router is None


# -- pruning by distillation -------------------------------------------------------------------------------------------


def test_divergences_are_those_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(50, 3, generator=rng) for _ in range(4))
    assert torch.allclose(divergence([a], [b]), kl_divergence(Categorical(logits=a), Categorical(logits=b)), atol=1e-6)
    p, q = (Independent(Normal(m, s.exp()), 1) for m, s in ((a, b), (c, d)))
    assert torch.allclose(divergence([a, b], [c, d]), kl_divergence(p, q), rtol=1e-4, atol=1e-5)


def test_quality_is_one_for_the_teacher_and_zero_for_the_best_blind_policy() -> None:
    rng = torch.Generator().manual_seed(0)
    for teacher in ([torch.randn(200, 4, generator=rng)], [torch.randn(200, 2, generator=rng) for _ in range(2)]):
        blind = [y.expand(200, -1) for y in marginal(teacher)]
        assert quality(teacher, teacher) == 1
        assert quality(teacher, blind) == pytest.approx(0, abs=1e-6)
        for _ in range(20):  # no other blind policy is better
            other = [y + 0.1 * torch.randn(y.shape[1], generator=rng) for y in blind]
            assert quality(teacher, other) < 0


def test_held_out_rows_are_whole_stretches() -> None:
    train_rows, held_out = split(4096, torch.device("cpu"))
    assert sorted([*train_rows.tolist(), *held_out.tolist()]) == list(range(4096))
    assert 0.1 < len(held_out) / 4096 < 0.15
    edges = int((held_out.diff() > 1).sum()) + 1
    assert len(held_out) / edges > 50
    assert [len(r) for r in split(3, torch.device("cpu"))] == [3, 3]  # too few to hold some out


SOLVABLE: dict[str, Any] = {"rollout_steps": 256, "batch_size": 64, "n_epochs": 10, "lr": 3e-3, "visited": 512,
                            "hidden": (32, 32), "distil_updates": 300, "distil_batch": 64, "distil_lr": 3e-3}  # fmt: skip


def test_distillation_stays_within_the_tolerance_and_needs_no_environment(tiny: Any) -> None:
    tolerance = 0.05
    pruning = {"tasks": 1, "train": 0.0, "recover": 0.05, "finish": 0.2, "tolerance": tolerance}
    agent = make(tiny, "discrete", **SOLVABLE, pruning=pruning)
    env = world(tiny, "discrete", 1)
    agent.start_task(TaskInfo(0))
    metrics = learn(tiny, agent, env, 2048)
    assert env.steps == metrics[-1]["step"] == 2048
    assert agent.costs() == {"updates": 8 * 10 * 4 + 300, "samples": 2048 * 10 + 300 * 64}
    assert metrics[-1]["units"] < 0.7
    # paired: teacher and student on the same observations
    inputs = agent.policy.inputs(agent.visited)
    rows = split(len(inputs[0]), tiny.cpu)[1]
    with torch.no_grad():
        student = [agent.network(*(x[rows] for x in inputs), task=0)]
    teacher = [agent.teacher[0][rows]]
    assert divergence(teacher, marginal(teacher)).mean() > 0.1  # the policy looks at what it sees
    assert quality(teacher, student) == pytest.approx(metrics[-1]["quality"])
    assert quality(teacher, student) > 1 - 2 * tolerance


class Blunt(EideticPPO):
    """Kills as many units, and recovers nothing."""

    def _new_distiller(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.network.parameters(), lr=0.0)


def test_it_is_the_distillation_that_keeps_the_policy(tiny: Any) -> None:
    pruning = {"tasks": 6, "train": 0.0, "recover": 0.05, "finish": 0.2, "tolerance": 0.0}
    found = {}
    for cls in (EideticPPO, Blunt):
        agent = make(tiny, "discrete", cls=cls, **SOLVABLE, pruning=pruning)
        agent.start_task(TaskInfo(0))
        found[cls] = learn(tiny, agent, world(tiny, "discrete", 1), 1024)[-1]
        assert found[cls]["units"] <= 1 / 6
    assert 1 - found[EideticPPO]["quality"] < 0.5 * (1 - found[Blunt]["quality"])


def test_every_task_finds_room(tiny: Any) -> None:
    agent = make(tiny, "discrete", pruning={"tasks": 4, "train": 0.0, "recover": 0.1})
    for number in range(4):
        train(tiny, agent, "discrete", number)
    for units in agent.network.capacity().units.values():
        assert all(units[str(k)] >= 1 for k in range(4))


def test_where_nothing_is_free_a_task_is_refused_or_trains_its_head_alone(tiny: Any) -> None:
    full = {"hidden": (4, 4), "pruning": {"tasks": 1, "train": 0.0, "recover": 0.1, "tolerance": 0.0}}
    agent = make(tiny, "discrete", **full)
    train(tiny, agent, "discrete", 0)
    assert agent.network.capacity().share("free") == 0
    with pytest.raises(CapacityExhausted, match="Task 1 finds no room"):
        agent.start_task(TaskInfo(1))
    agent = make(tiny, "discrete", **full, exhausted="head-only")
    assert forgotten(tiny, agent, "discrete") == []
    assert not unchanged(answers(tiny, agent, "discrete", 0), answers(tiny, agent, "discrete", 1))


def test_where_nothing_is_free_units_may_be_added(tiny: Any) -> None:
    full = {"hidden": (4, 4), "pruning": {"tasks": 1, "train": 0.0, "recover": 0.1, "tolerance": 0.0}}
    agent, before = make(tiny, "discrete", **full, exhausted="widen"), {}
    for number in range(3):
        train(tiny, agent, "discrete", number)
        # what acts stays bit for bit; sums of the whole network have other lengths now and may be rounded differently
        before[number] = answers(tiny, agent, "discrete", number)[1:]
    assert all(unchanged(v, answers(tiny, agent, "discrete", k)[1:]) for k, v in before.items())
    assert all(s.size > 4 for s in agent.network.prunable().values())
    other = make(tiny, "discrete", **full, exhausted="widen")
    other.load_state_dict(tiny.through_file(agent.state_dict()))
    assert tiny.same(other.state_dict(), agent.state_dict())


@pytest.mark.parametrize(("budget", "last"), [(101, 96), (48, 48), (30, 24), (7, 6)])
def test_budgets_are_never_overshot(tiny: Any, budget: int, last: int) -> None:
    agent, env = make(tiny, "discrete", distil_updates=3), world(tiny, "discrete", 1)
    agent.start_task(TaskInfo(0))
    metrics = learn(tiny, agent, env, budget)
    assert env.steps == metrics[-1]["step"] == last == budget - metrics[-1].get("unused_steps", 0)
    assert all(m["step"] < last for m in metrics[:-1])  # so the run can be stopped there


def test_a_task_that_was_cut_short_leaves_room_all_the_same(tiny: Any) -> None:
    agent = make(tiny, "discrete")
    agent.start_task(TaskInfo(0))
    learning = agent.learn(Experience(env=world(tiny, "discrete", 1)), BUDGET, rng=tiny.generator(0))
    next(learning)
    learning.close()
    agent.finish_task()
    assert agent.network.capacity().share("0") <= 1 / 3
    train(tiny, agent, "discrete", 1)


class Marked:
    """A line whose second number says which task it is."""

    def __init__(self, env: Any, mark: float):
        self.env, self.mark = env, mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def _mark(self, obs: Tensor) -> Tensor:
        return torch.stack([obs[:, 0], torch.full((len(obs),), self.mark)], 1)

    def reset(self, **arguments: Any) -> Any:
        obs, info = self.env.reset(**arguments)
        return self._mark(obs), info

    def step(self, actions: Tensor) -> Any:
        obs, *rest, info = self.env.step(actions)
        return self._mark(obs), *rest, {**info, "final_obs": self._mark(info["final_obs"])}


def test_only_observations_of_the_task_under_way_are_kept(tiny: Any) -> None:
    agent = make(tiny, "discrete", rollout_steps=48)
    for number in range(3):
        agent.start_task(TaskInfo(number))
        for m in agent.learn(
            Experience(env=Marked(world(tiny, "discrete", number), number / 4)),  # type: ignore[arg-type]
            BUDGET,
            rng=tiny.generator(0),
        ):
            assert bool((agent.visited[:, 1] == number / 4).all())
            assert len(agent.visited) == (60 if m["step"] == BUDGET or agent.pruner else 48)
        agent.finish_task()
        left = agent.state_dict()
        assert left["visited"] is left["distilling"] is None and left["teacher"] == [] and left["report"] == {}
    assert [len(r["inputs"][0]) for r in agent.network.references] == [60] * 3  # and probes, by design


# -- state -------------------------------------------------------------------------------------------------------------


def all_yields(tiny: Any, agent: Any, kind: str) -> Iterator[tuple[Mapping[str, float], dict[str, Any]]]:
    """Metrics and saved states of the second task of ``agent``, at each yield."""
    env, rng = world(tiny, kind, 11), tiny.generator(0)
    agent.start_task(TaskInfo(1))
    for m in agent.learn(Experience(env=env), BUDGET, rng=rng):
        state = {"agent": tiny.through_file(agent.state_dict()), "env": env.state_dict(), "rng": rng.get_state()}
        yield m, copy.deepcopy(state)


def resumed(tiny: Any, kind: str, state: dict[str, Any], step: float) -> dict[str, Any]:
    """What comes of a state in an agent that has done something else."""
    agent, env, rng = make(tiny, kind, seed=9), tiny.Line(2, kind), tiny.generator(7)
    for number in range(2):
        train(tiny, agent, kind, number)
    env.load_state_dict(state["env"])
    rng.set_state(state["rng"])
    agent.load_state_dict(state["agent"])
    last = learn(tiny, agent, env, int(BUDGET - step), rng)[-1]
    agent.finish_task()
    return {"last": {**last, "step": last["step"] + step}, "agent": agent.state_dict(), "env": env.state_dict()}


@pytest.mark.parametrize("kind", ["discrete", "", "discrete goal"])
def test_it_resumes_exactly_from_any_yield(tiny: Any, kind: str) -> None:
    agent = make(tiny, kind)
    train(tiny, agent, kind, 0)
    found = list(all_yields(tiny, agent, kind))
    agent.finish_task()
    whole = {"last": dict(found[-1][0]), "agent": agent.state_dict(), "env": found[-1][1]["env"]}
    distilling = [i for i, (_, s) in enumerate(found) if s["agent"]["distilling"] is not None]
    assert len(distilling) > 10 and distilling[-1] == len(found) - 1 and distilling[0] == 1  # chunks of two rollouts
    for i in (0, distilling[0], distilling[5], len(found) - 2):
        metrics, state = found[i]
        assert metrics["step"] < BUDGET
        assert tiny.same(resumed(tiny, kind, state, metrics["step"]), whole), i


@pytest.mark.parametrize("part", ["visited", "teacher", "distilling", "report", "ids", "parameters", "generators"])
def test_resuming_without_any_part_of_the_state_is_noticed(tiny: Any, part: str) -> None:
    agent = make(tiny, "discrete")
    train(tiny, agent, "discrete", 0)
    found = list(all_yields(tiny, agent, "discrete"))
    agent.finish_task()
    whole = {"last": dict(found[-1][0]), "agent": agent.state_dict(), "env": found[-1][1]["env"]}
    metrics, state = found[-6]
    other = make(tiny, "discrete", seed=3)
    train(tiny, other, "discrete", 0)
    other_state = list(all_yields(tiny, other, "discrete"))[-3][1]["agent"]
    state["agent"][part] = [0, 7] if part == "ids" else other_state[part]
    if part == "report":
        state["agent"][part] = {}
    assert not tiny.same(resumed(tiny, "discrete", state, metrics["step"]), whole)


def test_a_known_task_is_still_known_after_a_stop(tiny: Any) -> None:
    agent = make(tiny, "discrete")
    train(tiny, agent, "discrete", 0)
    agent.start_task(TaskInfo(0))
    other = make(tiny, "discrete", seed=4)
    other.load_state_dict(tiny.through_file(agent.state_dict()))
    assert learn(tiny, other, world(tiny, "discrete", 1)) == [{"step": BUDGET, "skipped": float(BUDGET)}]


@pytest.mark.parametrize("router", ["novelty", "trained"])
def test_routers_are_part_of_the_state(tiny: Any, router: str) -> None:
    agent, other = make(tiny, "discrete", router=router), make(tiny, "discrete", router=router, seed=3)
    for number in range(2):
        train(tiny, agent, "discrete", number, TaskInfo())
    other.load_state_dict(tiny.through_file(agent.state_dict()))
    inputs = agent.policy.inputs(observations(tiny, "discrete", 100))
    assert torch.equal(agent.route(inputs), other.route(inputs))
    assert tiny.same(agent.state_dict(), other.state_dict())


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "hidden must hold"),
        ({"critic_hidden": (0,)}, "critic_hidden must hold"),
        ({"distil_updates": 0}, "distil_updates must be positive"),
        ({"distil_lr": -1.0}, "distil_lr must be positive"),
        ({"visited": 0}, "visited must be positive"),
    ],
)
def test_options_out_of_range(tiny: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tiny, "discrete", **options)


def test_what_it_cannot_do_is_one_sentence(tiny: Any) -> None:
    plane = tiny.Line(1, "").spaces.observation
    with pytest.raises(ConfigError, match="'eidetic-ppo' needs Box or Discrete actions"):
        EideticPPO(Spaces(plane, MultiBinary(2)), EideticPPO.Config(), device=tiny.cpu, rng=tiny.generator(0))
    with pytest.raises(ContractError, match="'eidetic-ppo' learns by acting"):
        next(make(tiny, "discrete").learn(Experience(), 10, rng=tiny.generator(0)))


def test_it_is_an_sb3_policy_and_explores_at_first(tiny: Any) -> None:
    agent = make(tiny, "discrete", pruning=Pruning(tasks=3, train=0.0))
    assert isinstance(agent.model.policy, EideticActorCritic)
    inputs = agent.policy.inputs(observations(tiny, "discrete"))
    for number in range(2):
        agent.start_task(TaskInfo(number))
        probabilities = agent.policy.distribution(inputs).distribution.probs
        assert bool(((probabilities - 0.5).abs() < 0.02).all())
        learn(tiny, agent, world(tiny, "discrete", number))
        agent.finish_task()


def test_a_task_starts_with_weights_of_the_size_that_sb3_has(tiny: Any) -> None:
    agent = make(tiny, "discrete", hidden=(400, 400), norm="prefix")
    last, head = agent.network.layers[1].weight(), agent.network.head.layers[0].weight()
    assert float(last.detach().var()) == pytest.approx(2 / 400, rel=0.05)
    assert 0.004 < float(head.detach().norm(dim=1).max()) < 0.0101
    assert bool((agent.network.norms[0].weight() == 1).all()) and not agent.network.layers[1].bias().any()


def test_bounded_numbers_are_scaled_but_not_centred() -> None:
    low, high = np.array([[0, -3, -1, -np.inf], [31, 2, 1, np.inf]], np.float32)
    space = Dict(a=Box(low, high), b=Discrete(2, start=5))
    vectors, images = Numbers(space)({"a": torch.tensor([[31.0, -3.0, 0.5, 7.0]]), "b": torch.tensor([6])})
    assert images == [] and torch.equal(torch.cat(vectors, 1), torch.tensor([[1.0, -1.0, 0.5, 7.0, 0.0, 1.0]]))
