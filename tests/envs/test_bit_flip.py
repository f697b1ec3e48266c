"""BitFlip: the target network by brute force, one flip per task, seeds, the data set."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from clbench import load_dataset, make_stream, run
from clbench.contracts import Stream
from clbench.envs.bit_flip import BitFlipVectorEnv, Target, bit_flip_dataset
from clbench.errors import ConfigError, ContractError, UnknownNameError
from clbench.streams.bit_flipping import mean_square

CPU = torch.device("cpu")
ROWS = 64
FROZEN_V, FROZEN_W = [-1, -1, 1, 1, 1, -1, 1, -1], [1, 1, 1, 1, 1, -1, 1, 1]


def brute_force(target, x, beta, bound):
    """The published formula, unit by unit: active where sum_j v_ij x_j > beta (m + 1) - S_i."""
    answers = []
    for row in x.tolist():
        y = 0.0
        for v, w in zip(target.v.tolist(), target.w.tolist(), strict=True):
            threshold = round(beta * len(row), 9) - sum(weight < 0 for weight in v)
            y += w * (sum(a * b for a, b in zip(v, row, strict=True)) > threshold)
        answers.append(max(-bound, min(bound, y)))
    return torch.tensor(answers)


@pytest.mark.parametrize(("bits", "units", "beta", "bound"), [(20, 100, 0.7, 10.0), (5, 9, 0.5, 2.0), (6, 4, 0.3, 5.0)])
def test_target_is_the_published_network(bits, units, beta, bound):
    target = Target((1, 0, 1), bits, units, beta, 7, bound, CPU)
    x = target.observe(torch.randint(2, (50, bits - 3), generator=torch.Generator().manual_seed(0)).float())
    expected = brute_force(target, x, beta, bound)
    assert torch.equal(target(x), expected) and len(set(expected.tolist())) > 1
    assert not torch.equal(target(x), brute_force(target, x, beta + 0.2, bound))  # the comparison can fail


def test_weights_are_signs_and_a_function_of_the_network():
    a, b = (Target((0,), 20, 100, 0.7, network, 10.0, CPU) for network in (0, 1))
    assert set(a.v.unique().tolist()) == set(a.w.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(a.v, b.v) and not torch.equal(a.w, b.w)
    assert abs(float(a.v.mean())) < 5 / math.sqrt(a.v.numel())
    # frozen: stored streams name networks by their seed
    assert a.v[0].tolist() == Target((0,), 20, 3, 0.7, 0, 10.0, CPU).v[0].tolist()
    assert (a.v[0, :8].tolist(), a.w[:8].tolist()) == (FROZEN_V, FROZEN_W)


def test_mean_square_is_that_of_all_networks_and_inputs():
    """For 3 bits and 2 units by enumeration of all weights and inputs."""
    total = []
    for v in itertools.product((-1, 1), repeat=4):
        for x in itertools.product((0, 1), repeat=3):
            agree = sum((weight > 0) == bit for weight, bit in zip(v, (*x, 1), strict=True))
            total.append(agree > 0.6 * 4)
    share = sum(total) / len(total)
    assert mean_square(3, 2, 0.6) == pytest.approx(2 * share)  # signs w cancel across units: E y^2 = n P(active)
    assert mean_square() == pytest.approx(3.917694, abs=1e-6) and mean_square(3, 2, 0.6) != mean_square(3, 2, 0.8)


def test_reward_is_the_negative_squared_error():
    env = BitFlipVectorEnv(ROWS, autoreset="disabled")
    obs, _ = env.reset(seed=0)
    y = env.target(obs)
    error = torch.linspace(-3, 3, ROWS)
    after, reward, terminated, truncated, info = env.step((y + error)[:, None])
    assert torch.allclose(reward, -error.square(), atol=1e-5) and terminated.all() and not truncated.any() and not info
    assert torch.equal(after, obs) and env.step(y[:, None])[1].abs().max() == 0


def test_inputs_are_slow_bits_random_bits_and_one():
    env = BitFlipVectorEnv(4000, slow=(1, 0, 0, 1), bits=9)
    obs, _ = env.reset(seed=3)
    assert torch.equal(obs[:, :4], torch.tensor([1.0, 0, 0, 1]).expand(4000, -1)) and bool((obs[:, -1] == 1).all())
    share = obs[:, 4:9].mean(0)
    assert bool(((share - 0.5).abs() < 5 * 0.5 / math.sqrt(4000)).all())
    counts = torch.bincount((obs[:, 4:9] @ (2.0 ** torch.arange(5))).long(), minlength=32).double()
    assert abs(float(((counts - 125) ** 2 / 125).sum()) - 31) < 5 * math.sqrt(62)  # all 32 patterns alike


def test_rows_depend_on_their_seed_alone_and_the_single_class_equals_the_batch():
    many = BitFlipVectorEnv(3)
    together = [many.reset(seed=[5, 6, 7])[0]] + [many.step(torch.zeros(3, 1))[0] for _ in range(4)]
    one = BitFlipVectorEnv(1)
    alone = [one.reset(seed=[6])[0]] + [one.step(torch.zeros(1, 1))[0] for _ in range(4)]
    assert all(torch.equal(a[1], b[0]) for a, b in zip(together, alone, strict=True))
    assert len({tuple(a[0].tolist()) for a in alone}) > 1
    single = gymnasium.make("clbench/BitFlip-v0", network=3)
    batch = BitFlipVectorEnv(1, network=3)
    for seed in range(5):
        obs = batch.reset(seed=[seed])[0]
        assert np.array_equal(single.reset(seed=seed)[0], obs[0].numpy())
        assert single.step(np.array([0.5]))[1] == pytest.approx(-float((0.5 - batch.target(obs)[0]) ** 2))


@pytest.mark.filterwarnings("ignore")
def test_checkers_of_gymnasium_and_stable_baselines():
    env = gymnasium.make("clbench/BitFlip-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    sb3_check_env(env.unwrapped)


def test_render_draws_the_bits():
    env = BitFlipVectorEnv(2, slow=(1, 0), bits=4)
    obs, _ = env.reset(seed=0)
    frames = env.render()
    assert frames.shape == (2, 16, 80, 3)
    assert np.array_equal(frames[:, 8, 8::16, 0], (obs * 255).numpy())


# -- the data set and the stream ------------------------------------------------------------------------------------------


def test_data_set_holds_the_targets_of_the_environment():
    options = {"slow": (1, 0, 1), "bits": 12, "network": 5}
    data, env = bit_flip_dataset(**options, transitions=ROWS, seed=1), BitFlipVectorEnv(ROWS, **options)
    assert torch.equal(data.actions[:, 0], env.target(data.observations)) and data.num_episodes == ROWS
    same, other = (bit_flip_dataset(**options, transitions=ROWS, seed=s) for s in (1, 2))
    assert torch.equal(data.observations, same.observations) and not torch.equal(data.observations, other.observations)


def test_one_bit_flips_at_each_boundary():
    stream = make_stream("bit-flipping", seed=2)
    bits = [task.env_kwargs["slow"] for task in stream.tasks]
    assert len(bits) == 200 and [p.budget for p in stream.phases] == [1000] * 200
    assert all(sum(a != b for a, b in zip(x, y, strict=True)) == 1 for x, y in itertools.pairwise(bits))
    flipped = {
        next(i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b) for x, y in itertools.pairwise(bits)
    }
    assert flipped == set(range(15))  # every slow bit flips now and then
    assert len({task.env_kwargs["network"] for task in stream.tasks}) == 1
    first, second = (load_dataset(t.dataset_id) for t in stream.tasks[:2])
    assert bool((first.observations[:, :15] == torch.tensor(bits[0])).all())
    assert bool((second.observations[:, :15] == torch.tensor(bits[1])).all())
    assert int((first.observations[0, :15] != second.observations[0, :15]).sum()) == 1


def test_stream_is_plain_values_and_a_function_of_the_seed():
    stream = make_stream("bit-flipping", seed=2, options={"tasks": 5})
    assert Stream.from_dict(stream.to_dict()) == stream == make_stream("bit-flipping", seed=2, options={"tasks": 5})
    assert make_stream("bit-flipping", seed=3, options={"tasks": 5}) != stream
    assert {t.metric.low for t in stream.tasks} == {-mean_square()} and stream.tasks[0].metric.high == 0


def test_a_learner_learns_each_task_and_the_scores_say_so(tmp_path):
    """Regression by bc: near 1 on the task that it was just trained on, and more than for a policy that always says 0."""
    result = run(
        "bit-flipping", "bc", seed=0, budget=300, eval_every=0, out=tmp_path, tensorboard=False,
        stream_options={"tasks": 3, "episodes": 32, "transitions": 500}, agent_options={"hidden": (64,), "lr": 3e-3},
    )  # fmt: skip
    matrix = result.results["matrix"]
    trained = [matrix[i + 1][i] for i in range(3)]
    assert min(trained) > 0.95 > max(matrix[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow": (0, 2)}, "slow must hold bits"),
        ({"bits": 10}, "of which 15 are slow, got bits=10"),
        ({"units": 0}, "units must be at least 1"),
        ({"beta": 1.0}, "beta must be in"),
        ({"network": -1}, "network must be a seed"),
        ({"bound": 0.0}, "bound must be a positive number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        BitFlipVectorEnv(**options)


def test_bad_stream_options_actions_and_resets():
    for options, message in (
        ({"tasks": 0}, "tasks must be"),
        ({"slow": 21}, "from 1 to bits=20"),
        ({"beta": 1.0}, "beta in"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_stream("bit-flipping", options=options)
    with pytest.raises(ConfigError, match="transitions must be at least 1"):
        bit_flip_dataset(transitions=0)
    env = BitFlipVectorEnv(2)
    with pytest.raises(UnknownNameError, match="reset option"):
        env.reset(options={"indx": [0, 1]})
    env.reset()
    for actions in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)):
        with pytest.raises(ContractError, match="expected float32"):
            env.step(actions)
