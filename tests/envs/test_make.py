"""make_env: ids, keywords, devices; concat; episode seeds."""

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clbench
from clbench.contracts import VectorEnv
from clbench.envs.classify import ClassifyVectorEnv
from clbench.envs.concat import concat
from clbench.envs.gymnasium_adapter import GymnasiumVectorEnv
from clbench.envs.make import make_env
from clbench.envs.seeding import EpisodeSeeds
from clbench.errors import ConfigError, ContractError, DataError, MissingExtraError, UnknownNameError


@pytest.mark.parametrize("env_id", ["clbench/Classify-v0", "CartPole-v1", "MiniGrid-Empty-5x5-v0"])
@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
def test_every_kind_of_id_gives_a_vector_env(env_id, autoreset):
    env = make_env(env_id, 3, autoreset=autoreset)
    assert isinstance(env, VectorEnv)
    assert (env.num_envs, env.autoreset, env.device) == (3, autoreset, torch.device("cpu"))
    obs, _ = env.reset(seed=0)
    assert env.single_observation_space.contains(obs[0].numpy())
    obs, reward, terminated, truncated, info = env.step(torch.zeros(3, dtype=torch.int64))
    assert obs.shape[0] == 3 and reward.dtype == torch.float32 and reward.shape == (3,)
    assert terminated.dtype == truncated.dtype == torch.bool
    assert ("final_obs" in info) == (autoreset == "same_step")


def test_our_ids_are_batched_and_others_adapted():
    assert isinstance(make_env("clbench/Classify-v0"), ClassifyVectorEnv)
    assert isinstance(make_env("CartPole-v1"), GymnasiumVectorEnv)
    assert clbench.make_env is make_env


class Plain(gymnasium.Env):
    """An environment that is registered nowhere."""

    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, level: int = 1):
        self.level = level

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random(2).astype(np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


def test_module_and_class(tmp_path, monkeypatch):
    (tmp_path / "my_env_file.py").write_text(
        "import gymnasium, numpy as np\n"
        "class Env(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    def __init__(self, level=1): self.level = level\n"
        "    def reset(self, *, seed=None, options=None): return np.full(2, self.level / 4, np.float32), {}\n"
        "gymnasium.register('test/MyOwn-v0', Env)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert make_env("my_env_file:Env", 2, level=3).reset()[0].tolist() == [[0.75, 0.75]] * 2
    assert make_env("my_env_file:test/MyOwn-v0", level=2).reset()[0].tolist() == [[0.5, 0.5]]
    with pytest.raises(UnknownNameError, match="Unknown key 'levle'.*Did you mean 'level'"):
        make_env("my_env_file:Env", levle=3)
    with pytest.raises(UnknownNameError, match="no module 'no_such_file'"):
        make_env("no_such_file:test/MyOwn-v0")


@pytest.mark.parametrize(
    ("env_id", "nearest"),
    [
        ("CartPol-v1", "CartPole-v1"),
        ("clbench/Clasify-v0", "clbench/Classify-v0"),
        ("MiniGrid-Emty-5x5-v0", "Empty-5x5"),
    ],
)
def test_unknown_id_names_the_nearest(env_id, nearest):
    with pytest.raises(UnknownNameError, match=nearest):
        make_env(env_id)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "message"),
    [
        ("clbench/Classify-v0", {"sorce": "digits"}, "Unknown key 'sorce'.*Did you mean 'source'"),
        ("clbench/Classify-v0", {"rotation": "steep"}, "rotation must be of type float, got 'steep'"),
        ("CartPole-v1", {"sutton_barto": True}, "Did you mean 'sutton_barto_reward'"),
        ("CartPole-v1", {"max_episode_steps": 0}, "max_episode_steps must be a whole number >= 1"),
        ("CartPole-v1", {"num_envs": 0}, "num_envs must be a whole number >= 1"),
        ("CartPole-v1", {"autoreset": "next_step"}, "Unknown value of autoreset 'next_step'"),
        ("CartPole-v1", {"device": "gpu"}, "'gpu' is not a device"),
        ("MiniGrid-Empty-5x5-v0", {"observation": "imag"}, "Did you mean 'image'"),
        ("MiniGrid-Empty-5x5-v0", {"sise": 5}, "Unknown key 'sise'.*Did you mean 'size'"),
    ],
)
def test_bad_arguments_are_named(env_id, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        make_env(env_id, **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("env_id", ["clbench/Classify-v0", "CartPole-v1"])
def test_cuda_without_a_gpu(env_id):
    with pytest.raises(ConfigError, match="no device 'cuda' on this machine"):
        make_env(env_id, device="cuda")


def test_a_missing_package_is_one_sentence():
    def needs_simulator():
        raise gymnasium.error.DependencyNotInstalled("pip install simulator")

    gymnasium.register("test/NeedsSimulator-v0", needs_simulator)
    with pytest.raises(MissingExtraError, match="not installed: pip install simulator"):
        make_env("test/NeedsSimulator-v0")


def test_keywords_are_not_changed():
    kwargs = {"observation": "image", "max_episode_steps": 7}
    make_env("MiniGrid-Empty-5x5-v0", **kwargs)
    assert kwargs == {"observation": "image", "max_episode_steps": 7}


# -- concat ---------------------------------------------------------------------------------------------------------------


def run(env, steps, rng):
    """All that ``steps`` random steps return, as a list of tensors."""
    out = []
    for _ in range(steps):
        actions = torch.randint(int(env.single_action_space.n), (env.num_envs,), generator=rng)
        obs, *rest, info = env.step(actions)
        out += [obs, *rest, *(info[k] for k in sorted(info))]
    return out


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_concat_is_its_parts_row_by_row():
    seeds = [3, 4, 5, 6, 7]
    joint = concat([make_env("CartPole-v1", 2), make_env("CartPole-v1", 3, max_episode_steps=9)])
    parts = [make_env("CartPole-v1", 2), make_env("CartPole-v1", 3, max_episode_steps=9)]
    assert isinstance(joint, VectorEnv) and joint.num_envs == 5 and joint.max_episode_steps == 500
    obs, _ = joint.reset(seed=seeds)
    assert torch.equal(obs, torch.cat([parts[0].reset(seed=seeds[:2])[0], parts[1].reset(seed=seeds[2:])[0]]))
    rng = generator()
    for _ in range(30):
        actions = torch.randint(2, (5,), generator=rng)
        obs, reward, terminated, truncated, info = joint.step(actions)
        expected = [parts[0].step(actions[:2]), parts[1].step(actions[2:])]
        for i, got in enumerate((obs, reward, terminated, truncated)):
            assert torch.equal(got, torch.cat([e[i] for e in expected]))
        assert torch.equal(info["final_obs"], torch.cat([e[4]["final_obs"] for e in expected]))


def test_concat_resets_only_masked_rows_and_splits_options():
    env = concat([make_env("clbench/Classify-v0", 2), make_env("clbench/Classify-v0", 2, rotation=90.0)])
    before, _ = env.reset(seed=1)
    after, _ = env.reset(options={"reset_mask": torch.tensor([False, True, False, False]), "index": [0, 5, 0, 0]})
    x = clbench.data.labelled.load_source("digits").x
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])
    assert torch.equal(after[1], x[5].flatten())


def test_concat_gives_equal_parts_different_episodes():
    env = concat([make_env("CartPole-v1", 2), make_env("CartPole-v1", 2)])
    obs, _ = env.reset(seed=0)
    assert len(torch.unique(obs, dim=0)) == 4 and torch.equal(env.reset(seed=0)[0], obs)


def test_concat_state_continues_bit_for_bit():
    def make():
        return concat([make_env("CartPole-v1", 2), make_env("CartPole-v1", 1)])

    env, other = make(), make()
    env.reset(seed=0)
    run(env, 25, generator())
    other.load_state_dict(env.state_dict())
    assert equal(run(env, 25, generator(1)), run(other, 25, generator(1)))
    with pytest.raises(DataError, match="2 joined environments, not 1"):
        concat([make_env("CartPole-v1")]).load_state_dict(env.state_dict())


def test_concat_fills_info_that_one_part_lacks():
    class Both(Plain):
        def step(self, action):
            return np.zeros(2, np.float32), 0.0, False, False, {"is_success": True}

    env = concat([GymnasiumVectorEnv(Plain, 2), GymnasiumVectorEnv(Both, 1)])
    env.reset(seed=0)
    assert env.step(torch.zeros(3, dtype=torch.int64))[-1]["is_success"].tolist() == [False, False, True]


def test_concat_refuses_different_environments():
    with pytest.raises(ContractError, match="Environments 0 and 1 cannot be joined: single_observation_space"):
        concat([make_env("CartPole-v1"), make_env("clbench/Classify-v0")])
    with pytest.raises(ContractError, match="autoreset is same_step and disabled"):
        concat([make_env("CartPole-v1"), make_env("CartPole-v1", autoreset="disabled")])
    with pytest.raises(ConfigError, match="at least one"):
        concat([])


# -- seeds ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=6))
def test_seeds_of_a_row_depend_on_its_own_episodes_only(seed, masks):
    """Row i after its n-th episode has the seed it would have if no other row had ended an episode."""
    seeds = EpisodeSeeds(3, torch.device("cpu"))
    seeds.start(seed, torch.ones(3, dtype=torch.bool))
    for mask in masks:
        seeds.start(None, torch.tensor(mask))
    for i in range(3):
        alone = EpisodeSeeds(3, torch.device("cpu"))
        alone.start(seed, torch.ones(3, dtype=torch.bool))
        for _ in range(sum(mask[i] for mask in masks)):
            alone.start(None, torch.arange(3) == i)
        assert seeds.current()[i] == alone.current()[i]


def test_seeds_of_different_rows_and_episodes_differ():
    seeds, seen = EpisodeSeeds(50, torch.device("cpu")), []
    seeds.start(0, torch.ones(50, dtype=torch.bool))
    for _ in range(20):
        seen += seeds.current().tolist()
        seeds.start(None, torch.ones(50, dtype=torch.bool))
    assert len(set(seen)) == len(seen)


def test_one_seed_per_row_is_the_seed_of_the_episode():
    seeds = EpisodeSeeds(2, torch.device("cpu"))
    seeds.start([7, 9], torch.ones(2, dtype=torch.bool))
    assert seeds.current().tolist() == [7, 9]
    seeds.start([1, 2], torch.tensor([False, True]))
    assert seeds.current().tolist() == [7, 2]


@pytest.mark.parametrize("seed", [-1, [1, 2, 3], 0.5, [1, -2]])
def test_bad_seeds(seed):
    with pytest.raises(ConfigError, match="seed must be a whole number >= 0"):
        make_env("clbench/Classify-v0", 2).reset(seed=seed)


@pytest.mark.parametrize(("env_id", "length"), [("clbench/TwoRooms-v0", 200), ("clbench/Classify-v0", 1)])
def test_gymnasiums_own_wrappers_work_on_single_environments(env_id, length):
    env = gymnasium.make_vec(env_id, num_envs=2, vectorization_mode="sync")
    env = gymnasium.wrappers.vector.RecordEpisodeStatistics(env)
    env.reset(seed=0)
    still = np.zeros_like(env.action_space.sample())
    infos = [env.step(still)[4] for _ in range(length)]
    assert infos[-1]["episode"]["l"].tolist() == [length] * 2
    assert not any("episode" in info for info in infos[:-1])
