"""Stable-Baselines3 agents: exact to resume, sealed, within budget, and true to the algorithms they wrap."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from clbench.agents.sb3 import SB3DQN, SB3PPO, SB3SAC, SB3TD3
from clbench.agents.sb3.base import policy_for
from clbench.agents.sb3.bridge import Bridge
from clbench.config import build
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.errors import ConfigError, ContractError
from clbench.rng import get_global_state, sealed_global_rng, seed_global

SMALL: dict[Any, dict[str, Any]] = {
    SB3PPO: {"rollout_steps": 24, "batch_size": 8, "n_epochs": 2, "hidden": (8,)},
    SB3DQN: {"buffer_size": 120, "learning_starts": 20, "batch_size": 8, "hidden": (8,), "target_update_interval": 30},
    SB3SAC: {"buffer_size": 120, "learning_starts": 20, "batch_size": 8, "hidden": (8,)},
    SB3TD3: {"buffer_size": 120, "learning_starts": 20, "batch_size": 8, "hidden": (8,)},
}
CASES = [
    (SB3PPO, ""), (SB3PPO, "discrete goal"), (SB3PPO, "discrete pixels last"), (SB3DQN, "discrete"),
    (SB3DQN, "discrete goal"), (SB3SAC, ""), (SB3SAC, "goal"), (SB3TD3, ""), (SB3TD3, "goal"),
]  # fmt: skip
OFF_POLICY = [(SB3DQN, "discrete"), (SB3SAC, ""), (SB3TD3, "")]
BUDGET = 200  # more than the replay buffer holds


def name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).replace(" ", "-") or "plain"


def make(tiny: Any, cls: Any, kind: str, num_envs: int = 2, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """An agent and its environment, which has been reset once, as the loop does."""
    env = tiny.Line(num_envs, kind)
    env.reset(seed=1)
    config = build(cls.Config, {**SMALL[cls], **options}, cls.name)
    return cls(env.spaces, config, device=tiny.cpu, rng=tiny.generator(seed)), env


def train(tiny: Any, agent: Any, env: Any, budget: int = BUDGET) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(env=env), budget, rng=tiny.generator(0))]


def first(rows: int) -> torch.Tensor:
    return torch.ones(rows, dtype=torch.bool)


# -- resume ------------------------------------------------------------------------------------------------------------


def interrupted(tiny: Any, cls: Any, kind: str, spoil: Any = None) -> tuple[Any, Any, int]:
    """What an uninterrupted run and one that stopped half-way leave behind, and the resumed environment's resets."""
    agent, env = make(tiny, cls, kind)
    agent.start_task(TaskInfo())
    saved: dict[str, Any] = {}
    metrics = []
    for m in agent.learn(Experience(env=env), BUDGET, rng=tiny.generator(0)):
        if not saved and m["step"] >= BUDGET // 2:
            saved = {"agent": tiny.through_file(agent.state_dict()), "env": env.state_dict(), "step": m["step"]}
        elif saved:
            metrics.append({**m, "step": m["step"] - saved["step"]})
    if spoil is not None:
        spoil(saved["agent"])
    second, line = make(tiny, cls, kind, seed=99)
    line.load_state_dict(saved["env"])
    line.resets = 0
    second.load_state_dict(saved["agent"])
    resumed = {"metrics": train(tiny, second, line, BUDGET - saved["step"])}
    resumed |= {**second.state_dict(), "env": line.state_dict()}
    return {"metrics": metrics, **agent.state_dict(), "env": env.state_dict()}, resumed, line.resets


@pytest.mark.parametrize(("cls", "kind"), CASES, ids=name)
def test_resuming_in_the_middle_is_exact_and_resets_nothing(tiny: Any, cls: Any, kind: str) -> None:
    whole, resumed, resets = interrupted(tiny, cls, kind)
    assert tiny.same(whole, resumed)
    assert resets == 0


COMMON = ("parameters", "counters", "last_obs", "generators", "phase", "episodes")
PARTS = [
    *((SB3PPO, "", part) for part in (*COMMON, "costs")),  # the others derive their costs from SB3's own counter
    *((SB3DQN, "discrete goal", part) for part in (*COMMON, "replay", "action_space")),
    *((SB3SAC, "goal", part) for part in (*COMMON, "replay", "variables")),
    *((SB3TD3, "", part) for part in (*COMMON, "replay")),
]
# SB3 stores the first row's flag but computes no return with it; the number of environments is needed to load at all
WITHOUT_EFFECT = {"last_episode_starts", "num_envs"}


@pytest.mark.parametrize(("cls", "kind", "part"), PARTS, ids=name)
def test_resuming_without_any_part_of_the_state_is_noticed(tiny: Any, cls: Any, kind: str, part: str) -> None:
    def spoil(state: dict[str, Any]) -> None:
        zeros = {k: torch.zeros_like(v) for k, v in state["episodes"].items()}
        fresh = {**make(tiny, cls, kind, seed=99)[0].state_dict(), "episodes": zeros}
        state[part] = fresh[part]

    whole, resumed, _ = interrupted(tiny, cls, kind, spoil)
    assert not tiny.same(whole, resumed)


def test_every_entry_of_the_state_is_checked_above(tiny: Any) -> None:
    entries = set(itertools.chain(*(make(tiny, cls, kind)[0].state_dict() for cls, kind in CASES)))
    assert entries == {part for _, _, part in PARTS} | WITHOUT_EFFECT


@pytest.mark.parametrize(("cls", "kind"), CASES, ids=name)
def test_states_are_plain_and_share_no_memory(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind)
    train(tiny, agent, env, 60)
    state = agent.state_dict()
    frozen = copy.deepcopy(state)
    other, line = make(tiny, cls, kind, seed=5)
    other.load_state_dict(tiny.through_file(state))
    assert tiny.same(other.state_dict(), frozen)
    other.load_state_dict(state)
    for each, world in ((agent, env), (other, line)):
        train(tiny, each, world, 60)
        assert tiny.same(state, frozen)


def test_a_second_phase_after_a_resumed_one_is_the_same_too(tiny: Any) -> None:
    ends = []
    for stop in (False, True):
        agent, env = make(tiny, SB3DQN, "discrete goal")
        for m in agent.learn(Experience(env=env), 90, rng=tiny.generator(0)):
            if stop and m["step"] == 64:
                state, world = agent.state_dict(), env.state_dict()
                agent, env = make(tiny, SB3DQN, "discrete goal", seed=4)
                agent.load_state_dict(state)
                env.load_state_dict(world)
                train(tiny, agent, env, 90 - 64)
                break
        agent.finish_task()
        following = tiny.Line(2, "discrete goal")
        following.reset(seed=2)
        agent.start_task(TaskInfo())
        train(tiny, agent, following, 50)
        ends.append(agent.state_dict())
    assert tiny.same(*ends)


# -- randomness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "kind"), CASES, ids=name)
def test_process_wide_generators_neither_matter_nor_change(tiny: Any, cls: Any, kind: str) -> None:
    ends = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        with sealed_global_rng():
            seed_global(global_seed)
            before = get_global_state()
            agent, env = make(tiny, cls, kind, seed=seed)
            train(tiny, agent, env, 60)
            agent.act(env._observe(), None, first(2), rng=tiny.generator(0), explore=True)
            assert tiny.same(before, get_global_state())
        ends.append(agent.state_dict())
    assert tiny.same(ends[0], ends[1]) and not tiny.same(ends[0], ends[2])


@pytest.mark.filterwarnings("ignore:The number of environments used is greater")  # than DQN's target update interval
@pytest.mark.parametrize(("cls", "kind"), CASES, ids=name)
def test_acting_changes_nothing_and_exploring_draws_from_rng(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, num_envs=50)
    train(tiny, agent, env, 150)
    state, obs, rng = agent.state_dict(), env._observe(), tiny.generator(0)
    before = copy.deepcopy(obs)
    draws = rng.get_state()
    greedy, memory = agent.act(obs, "kept", first(50), rng=rng)
    assert torch.equal(draws, rng.get_state()) and memory == "kept"
    explored = [agent.act(obs, None, first(50), rng=tiny.generator(s), explore=True)[0] for s in (1, 1, 2)]
    assert torch.equal(explored[0], explored[1]) and not torch.equal(explored[0], explored[2])
    for actions in (greedy, *explored):
        assert all(env.spaces.action.contains(a) for a in actions.numpy())
    assert tiny.same(agent.state_dict(), state) and tiny.same(obs, before)
    alone = torch.cat([agent.act(env_row(obs, i), None, first(1), rng=rng)[0] for i in range(50)])
    assert torch.allclose(greedy.float(), alone.float(), atol=1e-6)


def env_row(obs: Any, i: int) -> Any:
    return {k: v[i : i + 1] for k, v in obs.items()} if isinstance(obs, dict) else obs[i : i + 1]


def test_it_acts_before_it_has_learned(tiny: Any) -> None:
    for cls, kind in CASES:
        agent, env = make(tiny, cls, kind, num_envs=3)
        assert len(agent.act(env._observe(), None, first(3), rng=tiny.generator(0))[0]) == 3


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "kind"), CASES[:7:2] + OFF_POLICY, ids=name)
@pytest.mark.parametrize(("budget", "num_envs"), [(200, 2), (101, 3), (7, 3), (3, 3)])
def test_budgets_are_never_overshot(tiny: Any, cls: Any, kind: str, budget: int, num_envs: int) -> None:
    agent, env = make(tiny, cls, kind, num_envs=num_envs)
    metrics = train(tiny, agent, env, budget)
    assert env.steps == metrics[-1]["step"] == agent.model.num_timesteps
    assert budget - env.steps == metrics[-1].get("unused_steps", 0)
    full = num_envs * agent._full_collection(num_envs)
    assert 0 <= budget - env.steps < min(full, budget)
    assert env.resets == 2  # ours in make, and one at the start of the phase


def test_fewer_steps_than_environments_are_refused(tiny: Any) -> None:
    agent, env = make(tiny, SB3PPO, "", num_envs=4)
    with pytest.raises(ConfigError, match="a phase of 3 environment steps is too short for 4 parallel environments"):
        train(tiny, agent, env, 3)


def test_costs(tiny: Any) -> None:
    agent, env = make(tiny, SB3PPO, "")
    train(tiny, agent, env, 72)  # 3 rollouts of 24 steps, 2 epochs of 3 batches of 8
    assert agent.costs() == {"updates": 18, "samples": 144}
    assert agent.num_parameters == sum(p.numel() for p in agent.model.policy.parameters())
    agent, env = make(tiny, SB3TD3, "")
    train(tiny, agent, env, 60)  # an update after every 2 steps beyond the first 20
    assert agent.costs() == {"updates": 20, "samples": 160}
    assert 2 * agent.num_parameters == sum(p.numel() for p in agent.model.policy.parameters())  # targets do not count


# -- the bridge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "discrete goal"])
def test_the_bridge_tells_sb3_what_the_environment_says(tiny: Any, kind: str) -> None:
    env, twin = tiny.Line(3, kind), tiny.Line(3, kind)
    bridge = Bridge(env.spaces, 3, "test")
    bridge.connect(env)
    obs, theirs = bridge.reset(), twin.reset()[0]
    rng, ends = np.random.default_rng(0), 0
    for _ in range(60):
        assert tiny.same(_tensors(obs), theirs)
        actions = rng.integers(2, size=3) if kind else rng.uniform(-0.2, 0.2, (3, 1)).astype(np.float32)
        kept = copy.deepcopy(obs)
        previous = obs
        obs, rewards, dones, infos = bridge.step(actions)
        assert tiny.same(_tensors(previous), _tensors(kept))
        theirs, reward, terminated, truncated, info = twin.step(torch.from_numpy(actions + 3 if kind else actions))
        assert (rewards == reward.numpy()).all() and (dones == (terminated | truncated).numpy()).all()
        for i in map(int, np.flatnonzero(dones)):
            ends += 1
            assert infos[i]["TimeLimit.truncated"] == bool(truncated[i])
            assert infos[i]["is_success"] == bool(terminated[i])
            last = env_row(info["final_obs"], i)
            assert tiny.same(_tensors(infos[i]["terminal_observation"]), _first(last))
        assert all(infos[i] == {} for i in np.flatnonzero(~dones))
    assert ends > 5
    assert bridge.pop_metrics().keys() == {"episode_return", "episode_length", "success"} and not bridge.pop_metrics()


def _tensors(obs: Any) -> Any:
    return {k: torch.from_numpy(v) for k, v in obs.items()} if isinstance(obs, dict) else torch.from_numpy(obs)


def _first(obs: Any) -> Any:
    return {k: v[0] for k, v in obs.items()} if isinstance(obs, dict) else obs[0]


def test_another_environment_than_expected_is_refused(tiny: Any) -> None:
    agent, env = make(tiny, SB3SAC, "")
    with pytest.raises(ContractError, match="Agent 'sb3-sac' was made for .* but the environment has"):
        train(tiny, agent, tiny.Line(2, "goal"))
    train(tiny, agent, env, 20)
    with pytest.raises(ContractError, match="needs 2 parallel environments .* got 3"):
        train(tiny, agent, tiny.Line(3))
    env.autoreset = "disabled"
    with pytest.raises(ContractError, match="with autoreset 'same_step', got 2 with 'disabled'"):
        train(tiny, agent, env)


def test_experience_without_an_environment_is_refused(tiny: Any) -> None:
    agent, _ = make(tiny, SB3PPO, "")
    with pytest.raises(ContractError, match="'sb3-ppo' learns by acting, but the experience of this phase has no env"):
        next(agent.learn(Experience(), 10, rng=tiny.generator(0)))


def test_spaces_that_sb3_cannot_serve_are_one_sentence(tiny: Any) -> None:
    plane = Box(-1, 1, (2,), np.float32)
    for cls, action, reason in (
        (SB3DQN, plane, "only supports .*Discrete"),
        (SB3SAC, Discrete(2), "only supports .*Box"),
        (SB3TD3, Box(-np.inf, np.inf, (1,), np.float32), "must have a finite lower and upper bound"),
    ):
        with pytest.raises(ConfigError, match=f"^Agent '{cls.name}' cannot be made for .*{reason}"):
            cls(Spaces(plane, action), cls.Config(), device=tiny.cpu, rng=tiny.generator(0))


# -- hindsight ---------------------------------------------------------------------------------------------------------


def test_hindsight_rewards_are_the_environments_own(tiny: Any) -> None:
    agent, env = make(tiny, SB3DQN, "discrete goal")
    train(tiny, agent, env)
    with sealed_global_rng():
        seed_global(0)
        batch = agent.model.replay_buffer.sample(200)
    achieved, desired = (batch.next_observations[k].numpy() for k in ("achieved_goal", "desired_goal"))
    reward = env.compute_reward(achieved, desired, None)
    assert (batch.rewards[:, 0].numpy() == reward).all()
    real = env.compute_reward(achieved[:40], desired[:40], None)  # SB3 puts the fifth that is not relabelled first
    assert reward[40:].mean() > real.mean() + 0.1


def test_hindsight_without_compute_reward(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tiny.Line, "compute_reward")
    agent, env = make(tiny, SB3DQN, "discrete goal")
    with pytest.raises(ConfigError, match="the environment has no compute_reward.*set her=false"):
        train(tiny, agent, env)
    agent, env = make(tiny, SB3DQN, "discrete goal", her=False)
    train(tiny, agent, env)
    assert agent.costs()["updates"] > 0


def test_training_waits_for_the_first_finished_episode(tiny: Any) -> None:
    agent, env = make(tiny, SB3DQN, "discrete goal", learning_starts=0, train_freq=1)
    with pytest.raises(RuntimeError, match="before the end of the first episode"):
        agent.model.replay_buffer.sample(4)  # what SB3 does if it does not wait
    train(tiny, agent, env, 60)
    assert 0 < agent.costs()["updates"] < 60 // 2


def test_no_episode_spans_two_phases(tiny: Any) -> None:
    agent, env = make(tiny, SB3DQN, "discrete goal", buffer_size=1000)
    train(tiny, agent, env, 56)
    buffer, boundary = agent.model.replay_buffer, agent.model.replay_buffer.pos
    assert (buffer._current_ep_start != boundary).any()  # otherwise the test shows nothing
    train(tiny, agent, tiny.Line(2, "discrete goal"), 100)
    ends = buffer.ep_start + buffer.ep_length
    assert (ends[:boundary] <= boundary).all() and (buffer.ep_start[boundary : buffer.pos] >= boundary).all()


@pytest.mark.parametrize("kind", ["discrete", "discrete goal"])
def test_the_buffer_is_kept_or_cleared_at_boundaries(tiny: Any, kind: str) -> None:
    for policy, kept in (("keep", True), ("clear", False)):
        agent, env = make(tiny, SB3DQN, kind, buffer=policy, buffer_size=1000)
        agent.start_task(TaskInfo())
        train(tiny, agent, env, 80)
        updates = agent.costs()["updates"]
        agent.start_task(TaskInfo())
        assert agent.model.replay_buffer.size() == (40 if kept else 0)
        train(tiny, agent, env, 16)
        assert agent.model.replay_buffer.size() == (48 if kept else 8)
        assert (agent.costs()["updates"] > updates) is kept  # an empty buffer is filled at random again first


# -- algorithms --------------------------------------------------------------------------------------------------------


def test_epsilon_falls_with_the_steps_taken(tiny: Any) -> None:
    agent, env = make(tiny, SB3DQN, "discrete", exploration_steps=400, exploration_final=0.2)
    for phase in (1, 2, 3):
        train(tiny, agent, env, BUDGET)
        expected = max(0.2, 1 - 0.8 * phase * BUDGET / 400)
        assert agent.model.exploration_rate == pytest.approx(expected)


def test_one_call_or_many_chunks_make_no_difference(tiny: Any) -> None:
    """The sum of our chunks is what SB3 does in one call."""
    for cls, kind in CASES:
        if "pixels" in kind:
            continue  # slow, and the same code
        chunked, env = make(tiny, cls, kind)
        train(tiny, chunked, env, 192)
        whole, twin = make(tiny, cls, kind)
        whole._begin_phase(twin, 192)
        with whole._own_generators():
            whole.model.learn(192, reset_num_timesteps=False)
        for key in ("parameters", "counters", "last_obs", "replay", "generators"):
            assert tiny.same(chunked.state_dict().get(key), whole.state_dict().get(key)), (cls, kind, key)


def test_networks_fit_the_observations() -> None:
    image = Box(0, 255, (2, 65, 65), np.uint8)
    assert policy_for(image)[0] == "CnnPolicy"
    assert policy_for(Box(0, 255, (7, 7, 3), np.uint8))[0] == "MlpPolicy"
    assert policy_for(Box(-1, 1, (3,), np.float32))[0] == "MlpPolicy"
    name, options = policy_for(Dict(a=image))
    assert name == "MultiInputPolicy"
    space = Dict(a=image, b=Box(0, 255, (7, 7, 3), np.uint8), c=Box(-1, 1, (3,), np.float32))
    features = options["features_extractor_class"](space)
    obs = {"a": torch.zeros(5, 2, 65, 65), "b": torch.zeros(5, 7, 7, 3), "c": torch.zeros(5, 3)}
    assert features(obs).shape == (5, 256 + 7 * 7 * 3 + 3) == (5, features.features_dim)


@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 7, 7), (40, 40, 3)])
def test_images_of_any_size_and_order_act(tiny: Any, shape: tuple[int, ...]) -> None:
    image = Box(0, 255, shape, np.uint8)
    obs = torch.randint(256, (4, *shape), dtype=torch.uint8, generator=tiny.generator(0))
    goal = Dict(observation=image, achieved_goal=image, desired_goal=image)
    for space, value in ((image, obs), (goal, dict.fromkeys(goal.spaces, obs))):
        agent = SB3DQN(
            Spaces(space, Discrete(3)), SB3DQN.Config(buffer_size=10), device=tiny.cpu, rng=tiny.generator(0)
        )
        actions, _ = agent.act(value, None, first(4), rng=tiny.generator(0))
        assert actions.shape == (4,) and actions.dtype == torch.int64


def success_rate(tiny: Any, agent: Any, kind: str) -> float:
    env = tiny.Line(200, kind)
    obs, _ = env.reset(seed=7)
    done = torch.zeros(200, dtype=torch.bool)
    won = torch.zeros(200, dtype=torch.bool)
    for _ in range(env.max_episode_steps):
        actions, _ = agent.act(obs, None, first(200), rng=tiny.generator(0))
        obs, _, terminated, truncated, _ = env.step(actions)
        won |= terminated & ~done
        done |= terminated | truncated
    return float(won.float().mean())


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "kind", "budget"), [(SB3PPO, "discrete", 12_000), (SB3DQN, "discrete goal", 8000),
                                                     (SB3SAC, "goal", 6000), (SB3TD3, "", 4000)], ids=name)  # fmt: skip
def test_it_learns(tiny: Any, cls: Any, kind: str, budget: int) -> None:
    options: dict[str, Any] = {"hidden": (64, 64), "batch_size": 64, "lr": 1e-3}
    if cls is SB3PPO:
        options |= {"rollout_steps": 400, "n_epochs": 10}
    else:
        options |= {"buffer_size": 10_000, "learning_starts": 200, "gamma": 0.9}
    if cls is SB3DQN:
        options |= {"exploration_steps": 4000, "target_update_interval": 200}
    agent, env = make(tiny, cls, kind, num_envs=4, **options)
    before = success_rate(tiny, agent, kind)
    train(tiny, agent, env, budget)
    assert success_rate(tiny, agent, kind) > max(0.8, before)
