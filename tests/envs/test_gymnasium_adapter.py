"""The adapter: tensors, seeds, autoreset, exact resume, and what it refuses."""

import io

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from clbench.envs.gymnasium_adapter import GymnasiumVectorEnv
from clbench.envs.make import make_env
from clbench.errors import ConfigError, ContractError, DataError
from clbench.rng import get_global_state, sealed_global_rng

NUMBERS = spaces.Box(-np.inf, np.inf, (2,), np.float64)


class Noise(gymnasium.Env):
    """A random walk; noise from ``self.np_random``, so it is a function of seed and actions. Ends at random times."""

    def __init__(self, observation_space=NUMBERS, action_space=None, values=None, extra=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(3)
        self.values, self.extra = values, extra or {}
        self.actions, self.options = [], None

    def noise(self):
        return self.np_random.normal(size=2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.options, self.seed = self.noise(), options, seed
        return self._obs(), {}

    def step(self, action):
        self.actions.append(action)
        self.x = self.x + self.noise() + np.sum(action)
        return self._obs(), float(self.x[0]), bool(self.np_random.random() < 0.1), False, dict(self.extra)

    def _obs(self):
        return self.x if self.values is None else self.values


class HiddenNoise(Noise):
    """The broken variant: its noise goes on from episode to episode and cannot be replayed."""

    hidden = np.random.default_rng(0)

    def noise(self):
        return HiddenNoise.hidden.normal(size=2)


ENVS = {
    "CartPole-v1": lambda b, **k: make_env("CartPole-v1", b, **k),
    "Pendulum-v1": lambda b, **k: make_env("Pendulum-v1", b, max_episode_steps=20, **k),
    "MiniGrid": lambda b, **k: make_env("MiniGrid-LavaGapS5-v0", b, max_steps=20, **k),
    "MiniGrid goal": lambda b, **k: make_env(
        "MiniGrid-DoorKey-5x5-v0", b, observation="goal-position", max_steps=20, **k
    ),
    "noise": lambda b, **k: GymnasiumVectorEnv(Noise, b, **k),
}


def random_actions(env, rng):
    space = env.single_action_space
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (env.num_envs,), generator=rng)
    return torch.rand((env.num_envs, *space.shape), generator=rng) * 2 - 1


def flatten(value):
    return [t for v in value.values() for t in flatten(v)] if isinstance(value, dict) else [value]


def run(env, steps, seed=0):
    """Everything ``steps`` random steps return, flattened to tensors."""
    rng = torch.Generator().manual_seed(seed)
    return [t for _ in range(steps) for part in env.step(random_actions(env, rng)) for t in flatten(part)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def stored(state):
    """The state after a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- exact resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
@pytest.mark.parametrize("name", ENVS)
def test_resume_is_exact(name, autoreset):
    env, other = ENVS[name](3, autoreset=autoreset), ENVS[name](3, autoreset=autoreset)
    env.reset(seed=5)
    run(env, 33)
    other.load_state_dict(stored(env.state_dict()))
    assert equal(run(env, 40, seed=1), run(other, 40, seed=1))
    a, b = env.reset()[0], other.reset()[0]  # the episodes after that, too
    assert equal(flatten(a), flatten(b))


def test_resume_before_the_first_reset():
    env, other = ENVS["noise"](2), ENVS["noise"](2)
    other.load_state_dict(stored(env.state_dict()))
    assert torch.equal(env.reset()[0], other.reset()[0])


def test_resume_keeps_reset_options():
    env, other = ENVS["noise"](2), ENVS["noise"](2)
    env.reset(seed=[1, 2], options={"goal": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "task_id": [7, 8]})
    other.load_state_dict(stored(env.state_dict()))
    for e in (env, other):
        assert e.envs[1].options["goal"].tolist() == [3.0, 4.0] and e.envs[1].options["task_id"] == 8


def test_reset_options_end_with_their_episode():
    env = make_env("CartPole-v1", 1, max_episode_steps=1)
    obs, _ = env.reset(seed=[0], options={"low": [2.0], "high": [2.4]})  # CartPole's own options: where it starts
    assert float(obs.min()) >= 2
    obs, *_ = env.step(torch.zeros(1, dtype=torch.int64))
    assert float(obs.max()) < 2


def test_resume_remembers_that_success_is_defined():
    env, other = (GymnasiumVectorEnv(lambda: Noise(extra={"success": True})) for _ in range(2))
    env.reset(seed=0)
    env.step(torch.zeros(1, dtype=torch.int64))
    env.reset()
    other.load_state_dict(stored(env.state_dict()))
    assert env.reset()[1].keys() == other.reset()[1].keys() == {"is_success"}


def test_hidden_randomness_is_reported():
    env, other = GymnasiumVectorEnv(HiddenNoise, 2), GymnasiumVectorEnv(HiddenNoise, 2)
    env.reset(seed=5)
    with pytest.raises(DataError, match="row 0 did not lead to the stored observation.*self.np_random"):
        other.load_state_dict(env.state_dict())


def test_state_of_another_environment_is_refused():
    state = ENVS["noise"](2).state_dict()
    with pytest.raises(DataError, match="of 2 x environment, but this is 3 x environment"):
        ENVS["noise"](3).load_state_dict(state)


# -- seeds ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENVS)
def test_rows_are_functions_of_their_seed_alone(name):
    """Three rows at once equal the same three seeds one at a time, through several episodes."""
    batch = ENVS[name](3)
    seeds = [11, 12, 13]
    obs = flatten(batch.reset(seed=seeds)[0])
    singles = [ENVS[name](1) for _ in seeds]
    for i, (env, seed) in enumerate(zip(singles, seeds)):
        assert equal([t[i : i + 1] for t in obs], flatten(env.reset(seed=[seed])[0]))
    rng = torch.Generator().manual_seed(0)
    for _ in range(30):
        actions = random_actions(batch, rng)
        together = [t for part in batch.step(actions)[:4] for t in flatten(part)]
        for i, env in enumerate(singles):
            alone = [t for part in env.step(actions[i : i + 1])[:4] for t in flatten(part)]
            assert equal([t[i : i + 1] for t in together], alone)


def test_one_seed_gives_each_row_and_episode_its_own():
    env = ENVS["noise"](4)
    env.reset(seed=0)
    seen = [e.seed for e in env.envs]
    env.reset()
    seen += [e.seed for e in env.envs]
    assert len(set(seen)) == 8 and all(0 <= s < 2**31 for s in seen)
    again = ENVS["noise"](4)
    again.reset(seed=0)
    assert [e.seed for e in again.envs] == seen[:4]


def test_a_listed_seed_reaches_the_environment_unchanged():
    env = ENVS["noise"](2)
    env.reset(seed=[1_000_000, 1_000_001])
    assert [e.seed for e in env.envs] == [1_000_000, 1_000_001]


def draws_globally(make):
    """Whether 25 steps draw from a process-wide generator."""
    before = get_global_state()
    env = make(2)
    env.reset(seed=0)
    run(env, 25)
    after = get_global_state()
    same = torch.equal(before["torch"], after["torch"]) and torch.equal(before["python"][1], after["python"][1])
    return not (same and torch.equal(before["numpy"][1], after["numpy"][1]) and before["numpy"][2] == after["numpy"][2])


@pytest.mark.parametrize("name", ENVS)
def test_process_wide_generators_are_left_alone(name):
    assert not draws_globally(ENVS[name])


def test_a_draw_from_a_process_wide_generator_would_be_noticed():
    class Careless(Noise):
        def noise(self):
            return np.random.normal(size=2)  # noqa: NPY002

    with sealed_global_rng():
        assert draws_globally(lambda b: GymnasiumVectorEnv(Careless, b))


# -- resets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CartPole-v1", "noise"])
def test_same_step_reset(name):
    """The episode's last observation is in final_obs, and the returned one begins the next episode."""
    auto, manual = ENVS[name](3), ENVS[name](3, autoreset="disabled")
    assert torch.equal(auto.reset(seed=3)[0], manual.reset(seed=3)[0])
    rng, ended = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        actions = random_actions(auto, rng)
        obs, reward, terminated, truncated, info = auto.step(actions)
        last, *rest, _ = manual.step(actions)
        assert equal([reward, terminated, truncated], rest)
        done = terminated | truncated
        assert torch.equal(info["_final_obs"], done)
        assert torch.equal(info["final_obs"][done], last[done])
        fresh, _ = manual.reset(options={"reset_mask": done})
        assert torch.equal(obs, fresh)
        ended += int(done.sum())
    assert ended > 5


def test_reset_mask_leaves_other_rows_and_the_options_alone():
    env = ENVS["noise"](3)
    obs, _ = env.reset(seed=0)
    options = {"reset_mask": torch.tensor([False, True, False])}
    after, _ = env.reset(seed=[9, 9, 9], options=options)
    assert torch.equal(after[[0, 2]], obs[[0, 2]]) and not torch.equal(after[1], obs[1])
    assert list(options) == ["reset_mask"]
    nobody, _ = env.reset(options={"reset_mask": [False] * 3})
    assert torch.equal(nobody, after)


def test_finished_rows_stand_still_when_autoreset_is_disabled():
    env = make_env("CartPole-v1", 2, autoreset="disabled", max_episode_steps=3)
    env.reset(seed=0)
    for _ in range(3):
        obs, *_ = env.step(torch.zeros(2, dtype=torch.int64))
    later, reward, terminated, truncated, _ = env.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(later, obs) and reward.tolist() == [0, 0]
    assert truncated.all() and not terminated.any()
    env.reset()
    assert truncated.all()  # results are the caller's own


def test_first_reset_and_columns_are_checked():
    env = ENVS["noise"](2)
    with pytest.raises(ConfigError, match="call reset"):
        env.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="first reset must be of all rows"):
        env.reset(options={"reset_mask": [True, False]})
    with pytest.raises(ConfigError, match="'task_id' must have one entry for each of the 2 rows"):
        env.reset(options={"task_id": 3})


def test_time_limit():
    assert make_env("CartPole-v1").max_episode_steps == 500
    assert make_env("CartPole-v1", max_episode_steps=7).max_episode_steps == 7
    assert make_env("MiniGrid-Empty-5x5-v0").max_episode_steps == 100
    assert make_env("MiniGrid-Empty-5x5-v0", max_episode_steps=7).max_episode_steps == 7
    assert GymnasiumVectorEnv(Noise).max_episode_steps is None


# -- conversion -----------------------------------------------------------------------------------------------------------


def toy(**kwargs):
    env = GymnasiumVectorEnv(lambda: Noise(**kwargs), 2, name="toy")
    return env, env.reset(seed=0)[0]


def test_float64_becomes_float32_and_uint8_stays():
    env, obs = toy()
    assert obs.dtype == torch.float32 and env.single_observation_space.dtype == np.float32
    assert torch.equal(obs[0], torch.from_numpy(env.envs[0].x.astype(np.float32)))
    image = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    env, obs = toy(observation_space=spaces.Box(0, 255, (3, 2, 2), np.uint8), values=image)
    assert obs.dtype == torch.uint8 and torch.equal(obs[1], torch.from_numpy(image))


def test_discrete_spaces_count_from_zero():
    env, obs = toy(observation_space=spaces.Discrete(5, start=-2), values=-2, action_space=spaces.Discrete(3, start=4))
    assert env.single_observation_space == spaces.Discrete(5) and env.single_action_space == spaces.Discrete(3)
    assert obs.tolist() == [0, 0] and obs.dtype == torch.int64
    env.step(torch.tensor([0, 2]))
    assert [e.actions for e in env.envs] == [[4], [6]]


def test_flat_dict_of_boxes():
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,), np.float64), b=spaces.MultiBinary(3))
    env, obs = toy(observation_space=space, values={"a": np.ones(2), "b": np.array([0, 1, 1], np.int8)})
    assert obs["a"].dtype == torch.float32 and obs["b"].tolist() == [[0, 1, 1]] * 2
    assert env.single_observation_space["a"].dtype == np.float32


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Tuple([NUMBERS]), r"toy, observation: the space Tuple.* has no tensor form"),
        (spaces.Dict(a=NUMBERS, mission=spaces.Text(5)), r"toy, observation 'mission': the space Text"),
        (spaces.Dict(a=spaces.Dict(b=NUMBERS)), r"toy, observation 'a': the space Dict"),
    ],
)
def test_unsupported_observations(space, message):
    with pytest.raises(ContractError, match=message):
        toy(observation_space=space)


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 3]), spaces.Box(0, 5, (2,), np.int64)])
def test_unsupported_actions(space):
    with pytest.raises(ContractError, match="toy: the action space .* is not supported"):
        toy(action_space=space)


@pytest.mark.parametrize(
    "actions", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)]
)
def test_wrong_actions(actions):
    env, _ = toy()
    with pytest.raises(ContractError, match=r"toy: actions are .*, expected int64 \(2,\)"):
        env.step(actions)


def test_box_actions_reach_the_environment_in_its_own_type():
    env, _ = toy(action_space=spaces.Box(-1, 1, (2,), np.float64))
    env.step(torch.tensor([[0.5, 0.25], [0, 0]]))
    assert env.envs[0].actions[0].dtype == np.float64 and env.envs[0].actions[0].tolist() == [0.5, 0.25]
    with pytest.raises(ContractError, match=r"expected float32 \(2, 2\)"):
        env.step(torch.zeros(2))


@pytest.mark.parametrize("bound", [0.4, -0.4])
def test_bounds_that_float32_rounds_outwards_stay_inside(bound):
    space = spaces.Box(-0.4, 0.4, (2,), np.float64)
    assert not space.contains(np.full(2, np.float32(bound), np.float64)), "the rounded number is outside"
    env, _ = toy(action_space=space)
    env.step(torch.full((2, 2), bound))
    assert space.contains(env.envs[0].actions[0]) and env.envs[0].actions[0].tolist() == [bound, bound]
    env.step(torch.full((2, 2), 0.1))
    assert env.envs[0].actions[1].tolist() == [float(np.float32(0.1))] * 2, "nothing else is moved"


def test_nan_names_environment_and_row():
    with pytest.raises(ContractError, match="toy: the observation of row 0 holds NaN"):
        toy(values=np.array([0.0, np.nan]))
    env, _ = toy()
    env.envs[1].x = np.array([np.nan, 0.0])
    env.envs[1].values = np.zeros(2)
    with pytest.raises(ContractError, match="toy: the reward of row 1 is nan after step 1"):
        env.step(torch.zeros(2, dtype=torch.int64))


def test_wrong_observation_shape():
    with pytest.raises(ContractError, match=r"observation of row 0 has shape \(3,\), declared \(2,\)"):
        toy(values=np.zeros(3))


@pytest.mark.parametrize("key", ["is_success", "success"])
def test_success_is_the_environments_own(key):
    env, _ = toy(extra={key: 1.0})
    info = env.step(torch.zeros(2, dtype=torch.int64))[-1]
    assert info["is_success"].tolist() == [True, True] and info["is_success"].dtype == torch.bool
    env, _ = toy()
    assert "is_success" not in env.step(torch.zeros(2, dtype=torch.int64))[-1]


def test_results_are_not_overwritten_by_later_steps():
    env, first = toy()
    copy = first.clone()
    env.step(torch.zeros(2, dtype=torch.int64))
    assert torch.equal(first, copy)


def test_render():
    env = make_env("MiniGrid-Empty-5x5-v0", 2)
    env.reset(seed=0)
    frames = env.render()
    assert frames.shape[0] == 2 and frames.shape[-1] == 3 and frames.dtype == np.uint8 and frames.std() > 0
    with pytest.raises(ContractError, match="toy has no render mode 'rgb_array'"):
        toy()[0].render()


class Greedy(Noise):
    """Writes into the action it is given."""

    def step(self, action):
        action *= 2
        return super().step(action)


def test_an_environment_that_changes_its_action_does_not_change_the_replay():
    env = GymnasiumVectorEnv(lambda: Greedy(action_space=spaces.Box(-1, 1, (2,), np.float32)), 2)
    env.reset(seed=0)
    actions = torch.full((2, 2), 0.25)
    env.step(actions)
    assert env.state_dict()["actions"].eq(0.25).all() and actions.eq(0.25).all()
