"""Encoders transform by the space alone; blocks are initialised from the given generator alone."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text
from hypothesis import given, settings
from hypothesis import strategies as st

from clbench.agents.networks.encoders import Encoder, Scale, image_shape
from clbench.agents.networks.mlp import MLP, conv, count_parameters, dense
from clbench.errors import ConfigError


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(0.5, 50)), min_size=1, max_size=4), st.integers(0, 999))
def test_scale_maps_the_bounds_to_plus_minus_one_and_back(bounds: list[tuple[float, float]], seed: int) -> None:
    low = np.array([b[0] for b in bounds], np.float32)
    high = np.array([b[0] + b[1] for b in bounds], np.float32)
    scale = Scale(Box(low, high))
    ends = scale(torch.from_numpy(np.stack([low, high])))
    assert torch.allclose(ends, torch.tensor([[-1.0], [1.0]]).expand(2, len(bounds)), atol=1e-4)
    x = torch.rand(5, len(bounds), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(scale(scale.inverse(x)), x, atol=1e-4)


def test_unbounded_coordinates_are_left_as_they_are() -> None:
    space = Box(np.array([-np.inf, 0.0], np.float32), np.array([np.inf, 10.0], np.float32))
    assert torch.equal(Scale(space)(torch.tensor([[123.0, 10.0]])), torch.tensor([[123.0, 1.0]]))


@pytest.mark.parametrize(
    ("space", "value", "expected"),
    [
        (Discrete(3), torch.tensor([2, 0]), [[0, 0, 1], [1, 0, 0]]),
        (Discrete(3, start=5), torch.tensor([5, 6]), [[1, 0, 0], [0, 1, 0]]),
        (MultiDiscrete([2, 3]), torch.tensor([[1, 2]]), [[0, 1, 0, 0, 1]]),
        (MultiBinary(2), torch.tensor([[0, 1]], dtype=torch.int8), [[-1, 1]]),
        (Box(0, 255, (1, 2, 1), np.uint8), torch.tensor([[[[0], [255]]]], dtype=torch.uint8), [[-1, 1]]),
    ],
)
def test_flat_encodings(space: Any, value: torch.Tensor, expected: list[list[float]]) -> None:
    encoder = Encoder(space, rng=torch.Generator())
    assert torch.equal(encoder(value), torch.tensor(expected, dtype=torch.float32))
    assert encoder.size == len(expected[0]) and count_parameters(encoder) == 0


def test_what_counts_as_an_image() -> None:
    assert image_shape(Box(0, 255, (2, 65, 65), np.uint8)) == (2, 65, 65)
    assert image_shape(Box(0, 255, (40, 30, 3), np.uint8)) == (3, 40, 30)
    assert image_shape(Box(0, 255, (7, 7, 3), np.uint8)) is None
    assert image_shape(Box(0, 1, (3, 64, 64), np.float32)) is None


def test_channel_order_makes_no_difference() -> None:
    picture = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = Encoder(Box(0, 255, (3, 20, 30), np.uint8), rng=torch.Generator().manual_seed(1))
    last = Encoder(Box(0, 255, (20, 30, 3), np.uint8), rng=torch.Generator().manual_seed(1))
    assert torch.equal(first(picture), last(picture.permute(0, 2, 3, 1)))


def test_observation_and_goal_images_are_fused_and_the_achieved_goal_is_not_read() -> None:
    image = Box(0, 255, (2, 20, 20), np.uint8)
    encoder = Encoder(Dict(observation=image, achieved_goal=image, desired_goal=image), rng=torch.Generator())
    assert encoder.convs[0].convs[0].in_channels == 4  # type: ignore[union-attr, index]
    obs = {k: torch.zeros(1, 2, 20, 20, dtype=torch.uint8) for k in ("observation", "achieved_goal", "desired_goal")}
    base = encoder(obs)
    assert torch.equal(base, encoder({**obs, "achieved_goal": obs["achieved_goal"] + 9}))
    for key in ("observation", "desired_goal"):
        assert not torch.equal(base, encoder({**obs, key: obs[key] + 200}))


def test_further_keys_of_a_goal_dict_are_read_between_observation_and_goal() -> None:
    image, speed = Box(0, 255, (3, 20, 20), np.uint8), Box(-6, 6, (2,), np.float32)
    space = Dict(observation=image, achieved_goal=image, velocity=speed, desired_goal=image, angle=Box(-1, 1, (1,)))
    encoder = Encoder(space, rng=torch.Generator().manual_seed(0))
    assert encoder.parts.flat_keys == ["angle", "velocity"] and encoder.parts.image_keys == [
        ["observation", "desired_goal"]
    ]
    obs = {k: torch.zeros(1, 3, 20, 20, dtype=torch.uint8) for k in ("observation", "achieved_goal", "desired_goal")}
    obs |= {"velocity": torch.zeros(1, 2), "angle": torch.zeros(1, 1)}
    base = encoder(obs)
    assert not torch.equal(base, encoder({**obs, "velocity": torch.ones(1, 2)}))
    assert torch.equal(base, encoder({**obs, "achieved_goal": obs["achieved_goal"] + 9}))


def test_two_keys_give_the_network_they_always_gave() -> None:
    place = Box(0, 4, (2,), np.float32)
    encoder = Encoder(Dict(observation=place, achieved_goal=place, desired_goal=place), rng=torch.Generator())
    assert encoder.parts.flat_keys == ["observation", "desired_goal"]


def test_images_and_vectors_are_joined() -> None:
    space = Dict(picture=Box(0, 255, (1, 20, 20), np.uint8), speed=Box(-1, 1, (3,), np.float32), keys=Discrete(2))
    encoder = Encoder(space, rng=torch.Generator())
    obs = {"picture": torch.zeros(4, 1, 20, 20, dtype=torch.uint8), "speed": torch.zeros(4, 3), "keys": torch.ones(4)}
    assert encoder.size == 256 + 3 + 2 and encoder(obs).shape == (4, encoder.size)


def test_unsupported_observations_are_refused() -> None:
    with pytest.raises(ConfigError, match="Observations 'word' of Text.* are not supported; use Box, Discrete"):
        Encoder(Dict(word=Text(5)), rng=torch.Generator())


def test_initialisation_is_xavier_uniform() -> None:
    layer = dense(300, 500, torch.Generator().manual_seed(0), gain=0.5)
    bound = 0.5 * (6 / 800) ** 0.5
    assert float(layer.weight.detach().abs().max()) <= bound
    assert abs(float(layer.weight.detach().std()) / (bound / 3**0.5) - 1) < 0.01
    assert not layer.bias.any()
    kernel = conv(8, 16, torch.Generator().manual_seed(0)).weight.detach()
    assert abs(float(kernel.std()) / (2 / (9 * 8 + 9 * 16)) ** 0.5 - 1) < 0.05


def test_layers_depend_on_their_generator_only() -> None:
    before = torch.get_rng_state()
    a, b, c = (MLP((3, 8, 2), rng=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.layers[0].weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]
    torch.nn.Linear(3, 8)  # the usual constructor does draw, so the check above can fail
    assert not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)


def test_order_is_activation_then_norm_and_the_last_layer_is_bare() -> None:
    mlp = MLP((3, 8, 2), rng=torch.Generator().manual_seed(0), layer_norm=True)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    hidden = torch.nn.functional.gelu(mlp.layers[0](x), approximate="tanh")
    hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(mlp(x), mlp.layers[1](hidden), atol=1e-5)


def test_size_of_the_reference_actor() -> None:
    # OGBench's GCBC actor on 2-dimensional observations, goals and actions has 528,898 parameters
    assert count_parameters(MLP((4, 512, 512, 512, 2), rng=torch.Generator())) == 528_898


def test_images_of_symbols_are_scaled_by_their_own_bound() -> None:
    """Numbers up to 10 divided by 255 would all look like black; the bound of the space tells."""
    features = []
    for high in (10, 255):
        space = Box(0, high, (3, 16, 16), np.uint8)
        encoder = Encoder(space, rng=torch.Generator().manual_seed(0))
        features.append(encoder(torch.full((1, 3, 16, 16), high, dtype=torch.uint8)))
    assert torch.equal(features[0], features[1]), "the brightest image of either space is all ones"
