"""Behaviour cloning: it learns, it is exact to resume, and it draws from no generator but the ones it is given."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from clbench.agents.bc import BC
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import GoalSampling, OfflineDataset
from clbench.errors import ConfigError, ContractError, DataError

PLANE = Box(-1, 1, (2,), np.float32)
CLASSIFY = Spaces(PLANE, Discrete(2, start=1))
REGRESS = Spaces(PLANE, Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32)))
STATES = 9
CHAIN = Spaces(Dict({k: Discrete(STATES) for k in ("observation", "achieved_goal", "desired_goal")}), Discrete(2))
ROWS = torch.ones(1000, dtype=torch.bool)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces, seed: int = 0, **options: Any) -> BC:
    config = build(BC.Config, {"hidden": (32,), **options}, "agent")
    return BC(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def train(agent: BC, data: OfflineDataset, updates: int, seed: int = 0) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(dataset=data), updates, rng=generator(seed))]


def act(agent: BC, obs: Any, **options: Any) -> torch.Tensor:
    rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    return agent.act(obs, None, ROWS[:rows], rng=generator(options.pop("seed", 0)), **options)[0]


def classes(n: int, seed: int) -> OfflineDataset:
    """Points of the square, labelled (1 or 2) by the side of the diagonal they are on."""
    x = torch.rand(n, 2, generator=generator(seed)) * 2 - 1
    return OfflineDataset(x, 1 + (x[:, 0] > x[:, 1]).long(), torch.ones(n))


def pairs(n: int = 200) -> OfflineDataset:
    x = torch.rand(n, 2, generator=generator(3)) * 2 - 1
    return OfflineDataset(x, torch.stack([2 * x[:, 0], (x[:, 1] + 1) / 2], 1), torch.ones(n))


def walks(episodes: int = 200, length: int = 12) -> OfflineDataset:
    """Random walks on a chain of states with reflecting ends; actions 0 = left, 1 = right."""
    rng = generator(4)
    state = torch.randint(STATES, (episodes,), generator=rng)
    states, actions = [state], []
    for _ in range(length):
        actions.append(torch.randint(2, (episodes,), generator=rng))
        states.append((states[-1] + 2 * actions[-1] - 1).clamp(0, STATES - 1))
    rows = torch.stack(states[:-1], 1).flatten()
    obs = {"observation": rows, "achieved_goal": rows}
    final = dict.fromkeys(obs, states[-1])
    return OfflineDataset(obs, torch.stack(actions, 1).flatten(), torch.full((episodes,), length), final)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_it_becomes_a_classifier() -> None:
    agent, fresh = make(CLASSIFY), classes(1000, 2)
    train(agent, classes(500, 1), 400)
    assert (act(agent, fresh.observations) == fresh.actions).float().mean() > 0.95


def test_it_regresses_actions_in_the_units_of_the_space() -> None:
    agent, data = make(REGRESS), pairs()
    train(agent, data, 400)
    assert (act(agent, data.observations) - data.actions).abs().mean() < 0.05


def share_of_goals_reached(agent: BC) -> float:
    """From every state to every goal of the chain, greedily, in twice as many steps as needed."""
    state, goal = (v.flatten() for v in torch.meshgrid(torch.arange(STATES), torch.arange(STATES), indexing="ij"))
    reached = state == goal
    for _ in range(2 * STATES):
        step = 2 * act(agent, {"observation": state, "desired_goal": goal}) - 1
        state = (state + step).clamp(0, STATES - 1)
        reached |= state == goal
    return float(reached.float().mean())


def test_with_goals_from_the_future_it_reaches_goals() -> None:
    agent = make(CHAIN)
    train(agent, walks(), 400)
    assert share_of_goals_reached(agent) == 1.0


def test_with_goals_from_anywhere_it_does_not() -> None:
    agent = make(CHAIN, goals={"p_trajectory": 0.0, "p_random": 1.0})
    train(agent, walks(), 400)
    assert share_of_goals_reached(agent) < 0.8


def test_a_data_set_may_bring_the_goals_that_were_pursued() -> None:
    data = walks()
    data = OfflineDataset(
        {"observation": data.observations["observation"], "desired_goal": data.observations["observation"] * 0},
        data.actions, data.lengths,
    )  # fmt: skip
    agent = make(CHAIN)
    assert not agent.sample(data, generator(0)).observations["desired_goal"].any()
    assert math.isfinite(train(agent, data, 2)[-1]["loss"])


def test_images_train() -> None:
    image = Box(0, 255, (1, 16, 16), np.uint8)
    x = torch.zeros(64, 1, 16, 16, dtype=torch.uint8)
    x[32:, :, :8] = 255
    agent = make(Spaces(image, Discrete(2)))
    train(agent, OfflineDataset(x, (torch.arange(64) >= 32).long(), torch.ones(64)), 30)
    assert act(agent, x).tolist() == [0] * 32 + [1] * 32


# -- the loss ----------------------------------------------------------------------------------------------------------


def silent(agent: BC) -> BC:
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.zero_()
    return agent


def test_loss_of_a_network_that_says_nothing() -> None:
    loss, info = silent(make(CLASSIFY)).loss(classes(50, 0).sample(50, generator(0)))
    assert abs(loss.item() - math.log(2)) < 1e-6 and 0 <= float(info["correct"].mean()) <= 1
    batch = pairs().sample(50, generator(0))
    scaled = (batch.actions - torch.tensor([0.0, 0.5])) / torch.tensor([2.0, 0.5])
    loss, _ = silent(make(REGRESS)).loss(batch)
    assert torch.allclose(loss, 0.5 * scaled.square().sum(1).mean())


def test_the_loss_reaches_every_trainable() -> None:
    agent = make(CHAIN)
    agent.loss(walks().sample(64, generator(0), GoalSampling()))[0].backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in agent.trainables)
    assert agent.num_parameters == sum(p.numel() for p in agent.trainables)


def test_metrics_come_every_log_every_updates_and_at_the_end() -> None:
    agent = make(CLASSIFY, log_every=4)
    metrics = train(agent, classes(50, 0), 10)
    assert [m["step"] for m in metrics] == list(range(1, 11))
    assert [m["step"] for m in metrics if "loss" in m] == [4, 8, 10]
    assert agent.costs() == {"updates": 10, "samples": 640}


# -- acting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spaces", [CLASSIFY, REGRESS])
def test_a_row_does_not_depend_on_the_others(spaces: Spaces) -> None:
    agent, x = make(spaces), classes(20, 0).observations
    alone = torch.cat([act(agent, x[i : i + 1]) for i in range(20)])
    assert torch.allclose(act(agent, x), alone, atol=1e-6)


def test_exploring_samples_the_policy() -> None:
    agent, x = make(CLASSIFY), torch.tensor([[0.5, -0.5]]).expand(1000, 2)
    train(agent, classes(100, 0), 3)
    p = torch.softmax(agent.policy(x[:1]), 1)[0, 1].item()
    share = (act(agent, x, explore=True) == 2).float().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / 1000) ** 0.5
    assert len(act(agent, x).unique()) == 1


def test_exploring_with_continuous_actions_is_gaussian_and_stays_in_the_space() -> None:
    agent, x = make(REGRESS, explore_std=0.1), torch.zeros(1000, 2)
    greedy, noisy = act(agent, x)[0], act(agent, x, explore=True)
    assert ((noisy.mean(0) - greedy).abs() < 5 * torch.tensor([0.2, 0.05]) / 1000**0.5).all()
    assert torch.allclose(noisy.std(0), torch.tensor([0.2, 0.05]), rtol=0.12)
    wild = act(make(REGRESS, explore_std=5.0), x, explore=True)
    assert all(REGRESS.action.contains(a) for a in wild.numpy())


def test_inputs_are_left_as_they_are_and_task_ids_are_ignored() -> None:
    agent, data = make(CHAIN), walks()
    before = copy.deepcopy(data.observations)
    obs = {"observation": torch.arange(5), "desired_goal": torch.arange(5)}
    plain = act(agent, obs)
    assert torch.equal(plain, act(agent, obs, task=torch.ones(5, dtype=torch.int64)))
    train(agent, data, 3)
    assert all(torch.equal(before[k], data.observations[k]) for k in before)
    assert obs["observation"].tolist() == [0, 1, 2, 3, 4]


# -- randomness and state ----------------------------------------------------------------------------------------------


def test_everything_is_a_function_of_the_generators_given(tiny: Any) -> None:
    states = []
    outside = torch.get_rng_state()
    for global_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        agent = make(CHAIN, seed)
        train(agent, walks(), 5, seed)
        act(agent, {"observation": torch.arange(5), "desired_goal": torch.arange(5)}, explore=True)
        assert torch.equal(before, torch.get_rng_state())
        states.append(agent.state_dict())
    torch.set_rng_state(outside)
    assert tiny.same(states[0], states[1]) and not tiny.same(states[0], states[2])


def resumed(tiny: Any, spoil: Any = None) -> tuple[Any, Any]:
    """End states of an uninterrupted run and of one that stopped after 7 of 20 updates."""
    data, saved = walks(), {}
    whole, rng = make(CHAIN), generator(9)
    for m in whole.learn(Experience(dataset=data), 20, rng=rng):
        if m["step"] == 7:
            saved = {"agent": tiny.through_file(whole.state_dict()), "rng": rng.get_state()}
    if spoil is not None:
        spoil(saved)
    second, rng = make(CHAIN, seed=77), generator(0)
    second.load_state_dict(saved["agent"])
    rng.set_state(saved["rng"])
    list(second.learn(Experience(dataset=data), 13, rng=rng))
    return whole.state_dict(), second.state_dict()


def test_resuming_in_the_middle_is_exact(tiny: Any) -> None:
    assert tiny.same(*resumed(tiny))


@pytest.mark.parametrize("part", ["policy", "optimizer", "updates", "rng"])
def test_resuming_without_any_part_of_the_state_is_noticed(tiny: Any, part: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        fresh = {**make(CHAIN, seed=77).state_dict(), "rng": generator(0).get_state()}
        where = saved if part == "rng" else saved["agent"]
        where[part] = fresh[part]

    assert not tiny.same(*resumed(tiny, spoil))


def test_states_share_no_memory_with_the_agent(tiny: Any) -> None:
    agent, other = make(CLASSIFY), make(CLASSIFY, seed=1)
    train(agent, classes(50, 0), 3)
    state = agent.state_dict()
    frozen = copy.deepcopy(state)
    other.load_state_dict(state)
    assert tiny.same(other.state_dict(), frozen)
    for each in (agent, other):
        train(each, classes(50, 0), 3)
        assert tiny.same(state, frozen)


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimiser_is_new_for_every_task_unless_told_otherwise(reset: bool) -> None:
    agent = make(CLASSIFY, reset_optimizer=reset)
    train(agent, classes(50, 0), 3)
    agent.start_task(TaskInfo())
    assert bool(agent.state_dict()["optimizer"]["state"]) is not reset


# -- probe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "names"), [((5, 4), ["hidden-1", "features"]), ((5,), ["features"]), ((), ["features"])]
)
def test_the_probe_is_every_hidden_layer_after_its_nonlinearity(hidden: tuple[int, ...], names: list[str]) -> None:
    agent, x = make(CLASSIFY, hidden=hidden, activation="relu"), torch.rand(30, 2, generator=generator(1)) * 2 - 1
    found = agent.probe(x)
    assert list(found) == names and not any(h.requires_grad for h in found.values())
    expected = agent.policy.encoder(x)
    for name, layer in zip(names, agent.policy.head.layers[:-1], strict=False):
        expected = torch.relu(layer(expected))
        assert torch.equal(found[name], expected)
    assert torch.equal(agent.policy.outputs(found["features"]), agent.policy(x))  # it is what the output layer sees


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"hidden": (0,)}, r"hidden must hold positive layer sizes, got \(0,\)"),
        ({"explore_std": -1.0}, "explore_std must be at least 0"),
        ({"goals": {"p_random": 0.5}}, "must be >= 0 and sum to 1"),
        ({"learning_rate": 0.1}, "learning_rate"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(CLASSIFY, **options)


def test_bad_spaces_and_data() -> None:
    with pytest.raises(ConfigError, match="Agent 'bc' needs Box or Discrete actions, but the action space is Multi"):
        make(Spaces(PLANE, MultiDiscrete([2, 2])))
    with pytest.raises(ContractError, match="'bc' learns from a data set, but the experience of this phase has none"):
        next(make(CLASSIFY).learn(Experience(), 1, rng=generator(0)))
    data = OfflineDataset({"observation": torch.zeros(4, dtype=torch.int64)}, torch.zeros(4).long(), torch.ones(4))
    with pytest.raises(DataError, match="has neither achieved_goal nor desired_goal"):
        train(make(CHAIN), data, 1)
