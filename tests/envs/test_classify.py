"""Classify: one-step episodes over a labelled source, its transforms and its data set."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import clbench
from clbench.data.labelled import load_source
from clbench.envs.classify import ClassifyVectorEnv, classify_dataset
from clbench.errors import ConfigError, ContractError, UnknownNameError

DIGITS = load_source("digits")


def rows_of(obs):
    """Source rows of untransformed observations (B, D), by brute force."""
    return [int((DIGITS.x.flatten(1) == o).all(1).nonzero()[0]) for o in obs]


@pytest.mark.parametrize("autoreset", ["same_step", "disabled"])
def test_correct_answers_are_rewarded(autoreset):
    env = ClassifyVectorEnv(16, autoreset=autoreset)
    obs, info = env.reset(seed=0)
    labels = DIGITS.y[rows_of(obs)]
    actions = labels.clone()
    actions[::2] = (actions[::2] + 1) % 10
    right = torch.arange(16) % 2 == 1
    after, reward, terminated, truncated, info = env.step(actions)
    assert torch.equal(reward, right.to(torch.float32)) and torch.equal(info["is_success"], right)
    assert terminated.all() and not truncated.any()
    if autoreset == "same_step":
        assert torch.equal(info["final_obs"], obs) and info["_final_obs"].all() and not torch.equal(after, obs)
    else:
        assert torch.equal(after, obs) and "final_obs" not in info


def test_training_draws_the_whole_train_split_and_nothing_else():
    env = ClassifyVectorEnv(2000)
    seen = set()
    env.reset(seed=0)
    for _ in range(10):
        env.step(torch.zeros(2000, dtype=torch.int64))
        seen |= set(env._rows.tolist())
    assert seen == set(DIGITS.train.tolist())
    env = ClassifyVectorEnv(5000, split="test", classes=(3, 4))
    env.reset(seed=0)
    assert set(env._rows.tolist()) == {r for r in DIGITS.test.tolist() if int(DIGITS.y[r]) in (3, 4)}


def test_draws_are_uniform():
    env = ClassifyVectorEnv(100_000)
    env.reset(seed=1)
    counts = torch.bincount(env._rows, minlength=1797)[DIGITS.train].double()
    expected = 100_000 / 1437
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi2 - 1436) < 5 * (2 * 1436) ** 0.5


def test_index_picks_the_row_of_the_source():
    env = ClassifyVectorEnv(3, classes=(0,))
    obs, _ = env.reset(seed=[1, 2, 3], options={"index": (5, 1796, 0)})
    assert torch.equal(obs, DIGITS.x[[5, 1796, 0]].flatten(1))
    assert env.step(DIGITS.y[[5, 1796, 0]])[1].tolist() == [1, 1, 1]


def test_rows_depend_on_their_seed_alone():
    many, one = ClassifyVectorEnv(3), ClassifyVectorEnv(1)
    many.reset(seed=[5, 6, 7])
    together = [many._rows.clone()] + [many.step(torch.zeros(3, dtype=torch.int64)) and many._rows for _ in range(4)]
    one.reset(seed=[6])
    alone = [one._rows.clone()] + [one.step(torch.zeros(1, dtype=torch.int64)) and one._rows for _ in range(4)]
    assert [int(r[1]) for r in together] == [int(r[0]) for r in alone]


def test_state_round_trip():
    env, other = ClassifyVectorEnv(8), ClassifyVectorEnv(8)
    env.reset(seed=0)
    env.step(torch.zeros(8, dtype=torch.int64))
    state = env.state_dict()
    other.load_state_dict(state)
    a, b = (e.step(torch.arange(8)) for e in (env, other))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    third = ClassifyVectorEnv(8)  # the state was not written to by those steps
    third.load_state_dict(state)
    assert torch.equal(third.step(torch.arange(8))[0], a[0])


def test_reset_mask():
    env = ClassifyVectorEnv(4, autoreset="disabled")
    obs, _ = env.reset(seed=0)
    mask = torch.tensor([True, False, False, True])
    after, _ = env.reset(options={"reset_mask": mask, "index": torch.tensor([1, -5, 99999, 2])})
    assert torch.equal(after[[1, 2]], obs[[1, 2]]) and torch.equal(after[[0, 3]], DIGITS.x[[1, 2]].flatten(1))


# -- transforms -----------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**62))
def test_permutation_moves_pixels_and_loses_none(seed):
    plain, moved = classify_dataset(), classify_dataset(permutation=seed)
    assert torch.equal(plain.observations.sort(1).values, moved.observations.sort(1).values)
    order = [int((moved.observations[:, [j]] == plain.observations).all(0).nonzero()[0]) for j in (20, 30)]
    assert torch.equal(moved.observations[:, [20, 30]], plain.observations[:, order])  # the same for every example
    assert torch.equal(plain.actions, moved.actions)


def test_permutations_of_different_seeds_differ_and_are_stable():
    assert not torch.equal(classify_dataset(permutation=0).observations, classify_dataset(permutation=1).observations)
    # frozen: stored streams name permutations by their seed
    pixels = ClassifyVectorEnv(permutation=12345).examples.pixels
    assert pixels is not None and pixels.sort().values.tolist() == list(range(64))
    assert pixels[:8].tolist() == [0, 5, 7, 52, 57, 16, 9, 22]


def test_rotation_by_right_angles_is_exact():
    x = DIGITS.x[DIGITS.train]
    assert torch.equal(classify_dataset(rotation=360.0).observations, x.flatten(1))
    turned = classify_dataset(rotation=90.0, image=True).observations[:, 0]
    assert torch.allclose(turned, torch.rot90(x, 1, (1, 2)), atol=1e-5)


def test_rotation_is_bilinear_per_picture():
    turned = classify_dataset(rotation=33.0, image=True).observations
    one = ndimage.rotate(DIGITS.x[DIGITS.train[7]].numpy(), 33.0, reshape=False, order=1)
    np.testing.assert_allclose(turned[7, 0].numpy(), one, atol=1e-6)
    assert float(turned.min()) >= 0 and float(turned.max()) <= 1


def test_class_split_keeps_the_head():
    data, env = classify_dataset(classes=(2, 3)), ClassifyVectorEnv(classes=(2, 3))
    assert set(data.actions.tolist()) == {2, 3} and env.single_action_space == gymnasium.spaces.Discrete(10)
    assert len(data) == int(((DIGITS.y[DIGITS.train] == 2) | (DIGITS.y[DIGITS.train] == 3)).sum())


def test_label_permutation_renames_classes_one_to_one():
    plain, renamed = classify_dataset().actions, classify_dataset(label_permutation=4).actions
    pairs = set(zip(plain.tolist(), renamed.tolist()))
    assert len(pairs) == 10 and {b for _, b in pairs} == set(range(10)) and not torch.equal(plain, renamed)
    env = ClassifyVectorEnv(label_permutation=4)
    env.reset(options={"index": [int(DIGITS.train[0])]})
    assert env.step(renamed[:1])[1].tolist() == [1.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"permutation": 3, "rotation": 30.0, "classes": (1, 2), "label_permutation": 5},
        {"image": True},
        {"classes": (4, 1), "relabel": True},
    ],
)
def test_environment_and_data_set_show_the_same(options):
    """What the data set calls right is what the environment rewards, on the same observations."""
    data = classify_dataset(**options)
    env = ClassifyVectorEnv(len(data), **options)
    pool = env.examples.rows
    obs, _ = env.reset(options={"index": pool})
    assert torch.equal(obs, data.observations)
    assert env.step(data.actions)[4]["is_success"].all()
    assert env.single_observation_space.shape == data.observations.shape[1:]


def test_data_set_by_id():
    data = clbench.load_dataset("classify?classes=0,1&permutation=3&split=test")
    assert set(data.actions.tolist()) == {0, 1} and data.num_episodes == len(data) and data.final_observations is None
    assert torch.equal(data.observations, classify_dataset(classes=(0, 1), permutation=3, split="test").observations)


# -- the single environment -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"image": True, "rotation": 45.0}])
@pytest.mark.filterwarnings("ignore")
def test_checkers_of_gymnasium_and_stable_baselines(options):
    env = gymnasium.make("clbench/Classify-v0", render_mode="rgb_array", **options)
    check_env(env.unwrapped)
    sb3_check_env(env.unwrapped)
    env.reset()
    assert env.render().dtype == np.uint8


def test_make_vec_gives_the_batched_class():
    env = gymnasium.make_vec("clbench/Classify-v0", 3, rotation=30.0)
    assert isinstance(env.unwrapped, ClassifyVectorEnv) and env.num_envs == 3
    assert env.observation_space.contains(env.reset(seed=0)[0].numpy())


def test_single_environment_equals_the_batch():
    single, batch = gymnasium.make("clbench/Classify-v0"), ClassifyVectorEnv(1)
    for seed in range(5):
        assert np.array_equal(single.reset(seed=seed)[0], batch.reset(seed=[seed])[0][0].numpy())
    obs, _ = single.reset(options={"index": 10})
    assert np.array_equal(obs, DIGITS.x[10].numpy().ravel())
    assert single.step(int(DIGITS.y[10]))[1:4] == (1.0, True, False)


def test_render_draws_each_row():
    env = ClassifyVectorEnv(2, image=True)
    env.reset(options={"index": [0, 1]})
    frames = env.render()
    assert frames.shape == (2, 64, 64, 3)
    np.testing.assert_array_equal(frames[1, ::8, ::8, 0], np.round(DIGITS.x[1].numpy() * 255).astype(np.uint8))


# -- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "Unknown split 'validation'"),
        ({"classes": (1, 10)}, r"classes of 'digits' are 0 .. 9, got classes=\(1, 10\)"),
        ({"classes": ()}, "got classes="),
        ({"permutation": -1}, "permutation must be a seed >= 0"),
        ({"label_permutation": 0.5}, "label_permutation must be a seed >= 0"),
        ({"rotation": float("inf")}, "rotation must be a finite number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ClassifyVectorEnv(**options)


def test_bad_resets_and_actions():
    env = ClassifyVectorEnv(2)
    for index in ([0, 1797], [-1, 0], [0.5, 1.0], [[0], [1]], [True, False]):
        with pytest.raises(ConfigError, match=r"row numbers in 0 .. 1796"):
            env.reset(options={"index": index})
    with pytest.raises(ConfigError, match=r"unknown reset options \['indx'\]"):
        env.reset(options={"indx": [0, 1]})
    env.reset()
    for actions in (torch.zeros(2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ContractError, match=r"expected int64 \(2,\)"):
            env.step(actions)


def test_vectors_have_no_pictures(tmp_path):
    path = tmp_path / "vectors.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(20, 5)), y=np.arange(20) % 2)
    env = ClassifyVectorEnv(3, source=str(path))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (3, 5) and env.single_observation_space.contains(obs[0].numpy())
    assert env.render().shape[0] == 3
    with pytest.raises(ConfigError, match="image=True needs examples"):
        ClassifyVectorEnv(source=str(path), image=True)
    with pytest.raises(ConfigError, match="rotation needs examples"):
        ClassifyVectorEnv(source=str(path), rotation=10.0)


def test_unknown_option_of_the_data_set():
    with pytest.raises(UnknownNameError, match="Did you mean 'permutation'"):
        clbench.load_dataset("classify?permutaton=1")


# -- labels within a task -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [(2, 3), (7, 0, 4)])
def test_relabel_numbers_classes_by_their_position(classes):
    data, env = classify_dataset(classes=classes, relabel=True), ClassifyVectorEnv(classes=classes, relabel=True)
    assert env.single_action_space == gymnasium.spaces.Discrete(len(classes))
    plain = classify_dataset(classes=classes)
    assert torch.equal(torch.tensor(classes)[data.actions], plain.actions)
    assert torch.equal(data.observations, plain.observations)
    assert not torch.equal(data.actions, plain.actions)  # the option does something


def test_relabelled_classes_may_be_permuted():
    options = {"classes": (2, 5, 9), "relabel": True}
    plain, renamed = classify_dataset(**options), classify_dataset(**options, label_permutation=4)
    pairs = set(zip(plain.actions.tolist(), renamed.actions.tolist()))
    assert len(pairs) == 3 and {b for _, b in pairs} == {0, 1, 2}


@pytest.mark.parametrize("extra", [{}, {"label_permutation": 4}])
def test_no_action_is_right_for_an_example_of_another_class(extra):
    other = int((DIGITS.y == 0).nonzero()[0])
    env = ClassifyVectorEnv(2, classes=(2, 3), relabel=True, **extra)
    env.reset(options={"index": [other, other]})
    assert not env.step(torch.tensor([0, 1]))[4]["is_success"].any()


@pytest.mark.parametrize("classes", [None, (1, 1)])
def test_relabel_needs_different_classes(classes):
    with pytest.raises(ConfigError, match="relabel=True numbers the given classes; list different ones"):
        ClassifyVectorEnv(classes=classes, relabel=True)
