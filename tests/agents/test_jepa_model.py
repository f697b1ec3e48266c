"""World models: sizes of the published ones, units, context, ensembles, and the equality of every way to take a step."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.agents.jepa.layers import Standardise, StandardiseImage, initialise
from clbench.agents.jepa.model import Architecture, LatentModel
from clbench.agents.networks.mlp import count_parameters
from clbench.config import build
from clbench.contracts import Spaces
from clbench.errors import ConfigError
from clbench.planners.objectives import GoalDistance, Uncertainty
from clbench.planners.rollout import rollout


def vector(n: int) -> Box:
    return Box(-np.inf, np.inf, (n,), np.float32)


def picture(*shape: int) -> Box:
    return Box(0, 255, shape, np.uint8)


def goal_dict(goal: Box, observation: Box | None = None, **context: Box) -> Dict:
    return Dict(observation=observation or goal, achieved_goal=goal, desired_goal=goal, **context)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_model(observation: Any, architecture: Architecture, actions: int = 2, seed: int = 0) -> LatentModel:
    return LatentModel(
        Spaces(observation, Box(-1, 1, (actions,), np.float32)), architecture, rng=generator(seed)
    )  # fmt: skip


def sample(space: Any, *lead: int, seed: int = 0) -> Any:
    """Observations (*lead, ...) of a space; states far from mean 0 and deviation 1."""
    if isinstance(space, Dict):
        return {k: sample(s, *lead, seed=seed + i) for i, (k, s) in enumerate(space.spaces.items())}
    if space.dtype == np.uint8:
        return torch.randint(0, 256, (*lead, *space.shape), generator=generator(seed), dtype=torch.uint8)
    return torch.randn(*lead, *space.shape, generator=generator(seed)) * 3 + 7


ROOMS = goal_dict(picture(2, 65, 65))
MAZE = goal_dict(picture(3, 64, 64), velocity=vector(2))
ANT = goal_dict(vector(2), vector(27))
POINT = goal_dict(vector(2), vector(4))
STATE = goal_dict(vector(2))
SMALL = Architecture(latent=8, hidden=(16,), encoder_hidden=(16,), channels=(4,), kernels=(5,), strides=(4,))


def small(**changes: Any) -> Architecture:
    return dataclasses.replace(SMALL, **changes)


# name, observation space, architecture, number of actions: every kind of latent
MODELS = {
    "state": (STATE, small(), 2),
    "state-context": (POINT, small(), 2),
    "state-ensemble-of-3": (POINT, small(members=3, hidden=(16, 12), hidden_norm=True, activation="mish"), 2),
    "plain": (POINT, small(residual=False, output_norm=False, hidden=()), 2),
    "gru": (STATE, small(predictor="gru"), 2),
    "gru-ensemble": (STATE, small(predictor="gru", members=3, output_norm=False), 2),
    "picture": (goal_dict(picture(2, 20, 20), velocity=vector(2)), small(), 2),
    "box": (vector(3), small(), 3),
    "maze": (goal_dict(picture(3, 24, 24), velocity=vector(2)), Architecture("diverse-maze"), 2),
    "maze-ensemble": (goal_dict(picture(3, 24, 24), velocity=vector(2)), Architecture("diverse-maze", members=2), 2),
    "ant": (ANT, Architecture("state-ensemble", members=2), 8),
    "rooms": (goal_dict(picture(2, 20, 20)), Architecture("two-rooms"), 2),
}


def fitted(name: str) -> tuple[LatentModel, Any, Tensor]:
    """A model with statistics far from the identity, observations (6, ...) and actions (6, A)."""
    space, architecture, actions = MODELS[name]
    model = new_model(space, architecture, actions)
    with torch.no_grad():  # as after training: norms are not the identity
        for norm in (m for m in model.modules() if "LayerNorm" in type(m).__name__):
            for weight in norm.parameters():
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator(5)))
    data = sample(space, 40), torch.randn(40, actions, generator=generator(1)) * 0.2 + 0.5
    model.fit_normaliser(*data)
    return model, sample(space, 6, seed=9), torch.randn(6, actions, generator=generator(2)) * 0.2 + 0.5


# -- sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "name", "actions", "encoder", "predictor", "total", "latent"),
    [
        (ROOMS, "two-rooms", 2, 1_426_096, 793_600, 2_218_672, (512,)),
        (MAZE, "diverse-maze", 2, 33_296, 20_370, 53_666, (18, 26, 26)),
        (ANT, "state-ensemble", 8, 9_120, 1_072_007, 1_080_615, (5, 283)),
    ],
)
def test_parameter_counts_of_pldm(
    space: Dict, name: Any, actions: int, encoder: int, predictor: int, total: int, latent: tuple[int, ...]
) -> None:
    model = new_model(space, Architecture(name), actions)
    counts = [count_parameters(part) for part in (model.encoder, model.predictor, model)]
    assert counts == [encoder, predictor, total], "the shared norm is counted with both parts and once in all"
    assert model.latent_shape == latent
    other = new_model(space, Architecture(name, members=model.members + 1), actions)
    assert count_parameters(other) > total, "the count does depend on the networks"


def test_rooms_predictor_is_the_gru_cell_of_torch() -> None:
    model = new_model(goal_dict(picture(2, 20, 20)), Architecture("two-rooms"))
    cell = torch.nn.GRUCell(2, 512)
    ours: Any = model.predictor.cell
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh"):
            getattr(cell, name).copy_(getattr(ours, name)[0].T)
        cell.bias_ih.copy_(ours.bias_ih[0, 0])
        cell.bias_hh.copy_(ours.bias_hh[0, 0])
    z, action = torch.randn(4, 512, generator=generator()), torch.randn(4, 2, generator=generator(1))
    torch.testing.assert_close(model.predict(z, action), model.encoder.norm(cell(action, z)), rtol=1e-4, atol=1e-5)


def test_rooms_encoder_layer_by_layer() -> None:
    model, obs, _ = fitted("rooms")
    encoder: Any = model.encoder
    x = model.normalise_goal(obs["achieved_goal"])
    for conv, pool, *blocks in encoder.stacks:
        assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)
        x = torch.max_pool2d(torch.conv2d(x, conv.weight, conv.bias, padding=1), 3, 2, 1)
        assert len(blocks) == 2
        for block in blocks:
            inner = torch.relu(torch.conv2d(x, block.first.weight, block.first.bias, padding=1))
            x = torch.relu(x + torch.conv2d(inner, block.second.weight, block.second.bias, padding=1))
    x = torch.nn.functional.linear(x.flatten(1), encoder.dense.weight, encoder.dense.bias)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.encode(obs), x * encoder.norm.weight + encoder.norm.bias, rtol=1e-4, atol=1e-4)


def test_maze_networks_layer_by_layer() -> None:
    model, obs, action = fitted("maze")

    def layer(x: Tensor, conv: Any, norm: Any, groups: int, stride: int, padding: int) -> Tensor:
        x = torch.conv2d(x, conv.weight, conv.bias, stride=stride, padding=padding)
        return torch.relu(torch.group_norm(x, groups, norm.weight, norm.bias))

    e: Any = model.encoder.layers
    x = model.normalise_goal(obs["achieved_goal"])
    for i, (groups, stride, padding) in enumerate([(4, 1, 0), (8, 2, 0), (8, 1, 0), (8, 1, 1)]):
        x = layer(x, e[3 * i], e[3 * i + 1], groups, stride, padding)
    z = model.encode(obs)
    torch.testing.assert_close(z[:, :16], torch.conv2d(x, e[12].weight, e[12].bias), rtol=1e-4, atol=1e-4)

    p: Any = model.predictor.members[0]
    planes = model.normalise_actions(action)[:, :, None, None].expand(-1, -1, *z.shape[2:])
    x = torch.cat([z, planes], 1)
    for i in range(2):
        x = layer(x, p[3 * i], p[3 * i + 1], 4, 1, 1)
    change = torch.conv2d(x, p[6].weight, p[6].bias, padding=1)
    torch.testing.assert_close(model.predict(z, action), z + change, rtol=1e-4, atol=1e-4)


def test_ant_networks_layer_by_layer() -> None:
    model, obs, action = fitted("ant")
    mish = torch.nn.functional.mish

    def norm(x: Tensor, weight: Any = 1.0, bias: Any = 0.0) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias

    e: Any = model.encoder
    x = model.normalise_goal(obs["achieved_goal"]) @ e.layers[0].weight.T + e.layers[0].bias
    x = mish(norm(x, e.norms[0].weight, e.norms[0].bias)) @ e.layers[1].weight.T + e.layers[1].bias
    context = norm(model.normalise_context(obs["observation"]))
    z = torch.cat([norm(x, e.norm.weight, e.norm.bias), context], 1)
    torch.testing.assert_close(model.encode(obs)[:, 1], z, rtol=1e-4, atol=1e-4)

    p: Any = model.predictor
    for member in range(2):
        x = torch.cat([z, model.normalise_actions(action)], 1)
        for linear, hidden in zip(p.layers[:2], p.norms, strict=True):
            x = norm(x @ linear.weight[member] + linear.bias[member], hidden.weight[member], hidden.bias[member])
            x = mish(x)
        x = x @ p.layers[2].weight[member] + p.layers[2].bias[member]
        expected = torch.cat([norm(x[:, :256], e.norm.weight, e.norm.bias), norm(x[:, 256:])], 1)
        torch.testing.assert_close(model.predict(model.encode(obs), action)[:, member], expected, rtol=1e-4, atol=1e-4)


def test_fourier_features_of_states() -> None:
    a = small(frequencies=3)
    model = new_model(STATE, a)
    obs = sample(STATE, 50)
    model.fit_normaliser(obs, torch.randn(50, 2, generator=generator()))
    x = model.normalise_goal(obs["achieved_goal"])
    columns = [x]
    for function in (torch.sin, torch.cos):
        columns.append(
            torch.stack([function(x[:, i] * torch.pi * 2.0 ** (k - 1)) for i in range(2) for k in range(3)], 1)
        )
    e: Any = model.encoder
    hidden = torch.relu(e.norms[0](torch.cat(columns, 1) @ e.layers[0].weight.T + e.layers[0].bias))
    torch.testing.assert_close(model.encode(obs), e.norm(e.layers[1](hidden)), rtol=1e-4, atol=1e-5)
    assert new_model(STATE, small(frequencies=0)).encoder.layers[0].in_features == 2


def test_a_module_with_buffers_cannot_be_initialised() -> None:
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match="Sequential is initialised from a generator and must not have buffers"):
        initialise(module, generator())


def test_only_the_rooms_model_is_blind_to_brightness() -> None:
    for name in ("rooms", "picture", "maze"):
        model, obs, _ = fitted(name)
        dark = (obs["achieved_goal"] // 2).contiguous()
        change = (model.encode({**obs, "achieved_goal": dark}) - model.encode(obs)).abs().mean()
        assert (float(change.detach()) < 0.05) == (name == "rooms")


def test_the_small_encoder_of_images_is_cheap() -> None:
    model = new_model(ROOMS, Architecture())
    operations = []
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(
                lambda m, _, out: operations.append(2 * out[0].numel() * m.weight[0].numel())
            )  # fmt: skip
    model.encode(sample(ROOMS, 1))
    assert len(operations) == 4 and sum(operations) < 4e6


def test_weights_come_from_the_generator_alone() -> None:
    for space, architecture, actions in MODELS.values():
        before = torch.get_rng_state()
        a, b, c = (new_model(space, architecture, actions, seed) for seed in (0, 0, 1))
        assert torch.equal(before, torch.get_rng_state())
        for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
            assert torch.isfinite(x).all() and torch.equal(x, y), name
            assert "norm" in name or x.ndim == 1 or not torch.equal(x, z), name


def test_initialisation_is_that_of_torch() -> None:
    model = new_model(ROOMS, Architecture("two-rooms"))
    for weight, fan_in in [(model.encoder.dense.weight, 2592), (model.predictor.cell.weight_hh, 512)]:
        bound = fan_in**-0.5
        assert float(weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
        assert float(weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=1e-2)


# -- steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_shapes(name: str) -> None:
    model, obs, action = fitted(name)
    z = model.encode(obs)
    assert z.shape == (6, *model.latent_shape)
    assert model.predict(z, action).shape == z.shape
    lead = (2, 3)
    many = model.predict(z.reshape(*lead, *model.latent_shape), action.reshape(*lead, -1))
    torch.testing.assert_close(many.flatten(0, 1), model.predict(z, action))
    features = model.goal_features(z)
    members = () if model.members == 1 else (model.members,)
    assert features.shape == (6, *members, int(np.prod(model.embedding_shape)))
    assert features.shape[-1] + model.context_features(z).shape[-1] == int(np.prod(model.state_shape))


@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_is_predict_again_and_again(name: str) -> None:
    model, obs, _ = fitted(name)
    windows = {k: v[:, None] for k, v in obs.items()} if isinstance(obs, dict) else obs[:, None]
    frames = model.encode_frames(windows)
    assert frames.shape == (6, 1, *model.state_shape)
    actions = torch.randn(6, 3, model.action_dim, generator=generator(3)) * 0.2 + 0.5
    predictions = model.rollout(frames[:, 0], actions)
    z = model.encode(obs)
    for t in range(3):
        z = model.predict(z, actions[:, t])
        torch.testing.assert_close(predictions[:, t], z, rtol=1e-4, atol=1e-5)
    restarted = model.predict(model.encode(obs), actions[:, 2])  # from the first latent: not autoregressive
    assert not torch.allclose(predictions[:, 2], restarted, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_stepper_equals_predict(name: str) -> None:
    model, obs, _ = fitted(name)
    actions = torch.randn(3, 6, model.action_dim, generator=generator(3)) * 0.2 + 0.5
    with torch.no_grad():
        z = model.encode(obs)
        stepper = model.stepper(6)
        for start in (z, z.flip(0)):  # it can be loaded again
            stepper.load(start)
            expected = start
            for action in actions:
                expected = model.predict(expected, action)
                torch.testing.assert_close(stepper.step(action), expected, rtol=1e-4, atol=1e-4)
        model.normalise_actions.mean += 0.5  # a stepper of old weights is noticed
        stepper.load(z)
        stale, fresh = stepper.step(actions[0]).clone(), model.predict(z, actions[0])
        if "maze" not in name:
            assert not torch.allclose(stale, fresh, atol=1e-4)
        stepper = model.stepper(6)
        stepper.load(z)
        torch.testing.assert_close(stepper.step(actions[0]), fresh, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["state-context", "gru-ensemble", "ant"])
def test_a_stepper_in_half_precision_is_near(name: str) -> None:
    model, obs, action = fitted(name)
    with torch.no_grad():
        z = model.encode(obs)
        stepper = model.stepper(6, dtype=torch.bfloat16)
        stepper.load(z)
        new = stepper.step(action.to(torch.bfloat16))
        assert new.dtype == torch.bfloat16
        torch.testing.assert_close(new.float(), model.predict(z, action), rtol=0.1, atol=0.15)


@pytest.mark.parametrize("name", ["state-ensemble-of-3", "gru-ensemble", "maze-ensemble", "ant"])
def test_members_are_independent_networks(name: str) -> None:
    model, obs, action = fitted(name)
    z = model.encode(obs)
    assert all(torch.equal(z[:, 0], z[:, e]) for e in range(model.members)), "encode repeats"
    new = model.predict(z, action)
    assert not torch.allclose(new[:, 0], new[:, 1], atol=1e-3), "the weights differ"
    moved = z.clone()
    moved[:, 0] += 1
    changed = (model.predict(moved, action) - new).abs().flatten(2).amax((0, 2)) > 1e-5
    assert changed.tolist() == [True] + [False] * (model.members - 1)
    new[:, 1].square().sum().backward()
    own = [p for n, p in model.predictor.named_parameters() if p.grad is not None and p.ndim == 3 and "norm" not in n]
    for weight in own:
        silent = [not bool(weight.grad[e].any()) for e in range(model.members)]  # type: ignore[index]
        assert silent == [e != 1 for e in range(model.members)]


@pytest.mark.parametrize("name", ["state-context", "maze", "gru-ensemble", "ant"])
def test_gradients_reach_encoder_predictor_and_first_frame(name: str) -> None:
    model, obs, _ = fitted(name)
    frames = model.encode_frames({k: torch.stack([v, v], 1) for k, v in obs.items()})
    actions = torch.zeros(6, 4, model.action_dim, requires_grad=True)
    model.rollout(frames[:, 0], actions)[:, -1].square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert actions.grad is not None and bool(actions.grad[:, 0].any()), (
        "the last prediction depends on the first action"
    )


@pytest.mark.parametrize("name", MODELS)
def test_training_under_autocast(name: str) -> None:
    """Mixed precision gives about the same predictions and finite gradients."""
    model, obs, _ = fitted(name)
    windows = (
        {k: torch.stack([v, v], 1) for k, v in obs.items()} if isinstance(obs, dict) else torch.stack([obs, obs], 1)
    )
    actions = torch.full((6, 2, model.action_dim), 0.4)
    exact = model.rollout(model.encode_frames(windows)[:, 0], actions)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.rollout(model.encode_frames(windows)[:, 0], actions)
        rough.square().mean().backward()
    assert not torch.equal(rough.float(), exact)
    assert float((rough.float() - exact).detach().norm() / exact.detach().norm()) < 0.1
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


class PredictOnly:
    """The model as a planner sees it without the fast path."""

    def __init__(self, model: LatentModel):
        self.encode, self.predict = model.encode, model.predict


@pytest.mark.parametrize("name", MODELS)
def test_planners_see_the_same_costs_with_and_without_resident_buffers(name: str) -> None:
    model, obs, _ = fitted(name)
    with torch.no_grad():
        z, goal = model.encode(obs), model.encode(obs).flip(0)
    actions = torch.randn(3, 6, 5, model.action_dim, generator=generator(3)) * 0.2 + 0.5
    objective = GoalDistance(goal, features=model.goal_features)
    costs = rollout(model, z, actions, objective)
    torch.testing.assert_close(costs, rollout(PredictOnly(model), z, actions, objective), rtol=1e-3, atol=1e-4)
    assert float(costs.std(1).min()) > 1e-6, "actions matter"
    plain = GoalDistance(goal)
    whole = rollout(model, z, actions, plain)
    assert torch.allclose(costs, whole) == (model.context_dim == 0), "the context is left out of the distance"
    if model.members > 1:
        spread = Uncertainty(weight=1.0)
        doubts = rollout(model, z, actions, spread)
        assert float(doubts.min()) > 0
        torch.testing.assert_close(doubts, rollout(PredictOnly(model), z, actions, spread), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_the_same_on_the_gpu(name: str) -> None:
    model, obs, action = fitted(name)
    with torch.no_grad():
        z = model.encode(obs)
        expected = model.predict(z, action)
        model = model.to("cuda")
        obs = {k: v.cuda() for k, v in obs.items()} if isinstance(obs, dict) else obs.cuda()
        torch.testing.assert_close(model.encode(obs).cpu(), z, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(model.predict(z.cuda(), action.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)
        stepper = model.stepper(6)
        stepper.load(z.cuda())
        torch.testing.assert_close(stepper.step(action.cuda()).cpu(), expected, rtol=1e-2, atol=1e-2)


# -- goals and context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state", "state-context", "state-ensemble-of-3", "picture", "maze", "ant"])
def test_the_goal_is_encoded_as_a_state_at_rest(name: str) -> None:
    model, obs, _ = fitted(name)
    goal = model.encode_goal(obs)
    other = {k: v if k == "desired_goal" else sample(MODELS[name][0][k], 6, seed=77) for k, v in obs.items()}
    assert torch.equal(goal, model.encode_goal(other)), "nothing but the goal counts"
    rest = {k: torch.zeros_like(v) if k in model.keys.context else v for k, v in obs.items()}
    there = {**rest, "achieved_goal": obs["desired_goal"]}
    torch.testing.assert_close(model.encode(there), goal)
    features = model.goal_features(goal)
    torch.testing.assert_close(
        features, model.goal_features(model.encode({**obs, "achieved_goal": obs["desired_goal"]}))
    )
    assert not torch.allclose(features, model.goal_features(model.encode(obs)), atol=1e-3)
    if model.context_dim:
        assert not torch.allclose(model.encode(obs), model.encode(rest), atol=1e-3), "the context is in the latent"
        assert torch.equal(model.goal_features(model.encode(obs)), model.goal_features(model.encode(rest)))


def test_which_keys_are_context() -> None:
    keys = {name: new_model(*MODELS[name]).keys for name in ("state", "state-context", "maze", "box")}
    assert keys["state"].context == () and keys["maze"].context == ("velocity",)
    assert keys["state-context"].context == ("observation",)
    assert keys["box"].goal is None
    model = new_model(Dict(observation=vector(3), speed=vector(1)), small())
    assert (model.keys.goal, model.keys.context) == ("observation", ("speed",))


def test_the_context_is_standardised_beside_the_embedding() -> None:
    model, obs, _ = fitted("state-context")
    mean, scale = model.normalise_context.mean, model.normalise_context.scale
    assert float(mean.min()) > 5 and float(scale.min()) > 2
    torch.testing.assert_close(model.context_features(model.encode(obs)), (obs["observation"] - mean) / scale)
    maze, obs, _ = fitted("maze")
    planes = maze.context_features(maze.encode(obs)).unflatten(1, (2, -1))
    assert torch.equal(planes.amin(2), planes.amax(2)), "planes are constant"
    torch.testing.assert_close(planes[:, :, 0], maze.normalise_context(obs["velocity"]))


def test_the_context_of_the_ant_is_normed_as_it_is_predicted() -> None:
    model, obs, action = fitted("ant")
    for z in (model.encode(obs), model.predict(model.encode(obs), action)):
        context = model.context_features(z)
        torch.testing.assert_close(context.mean(-1), torch.zeros(6, 2), atol=1e-5, rtol=0)
        torch.testing.assert_close(context.var(-1, correction=0), torch.ones(6, 2), atol=1e-3, rtol=0)


def test_a_plain_observation_is_state_and_goal() -> None:
    model, obs, _ = fitted("box")
    assert torch.equal(model.encode(obs), model.encode_goal(obs))


def test_frames_are_encoded_one_by_one() -> None:
    for name in ("state-context", "picture", "maze", "box"):
        model, _, _ = fitted(name)
        windows = sample(MODELS[name][0], 3, 4)
        frames = model.encode_frames(windows)
        for b, t in itertools.product(range(3), range(4)):
            one = (
                {k: v[b : b + 1, t] for k, v in windows.items()} if isinstance(windows, dict) else windows[b : b + 1, t]
            )
            torch.testing.assert_close(frames[b, t], model.encode(one)[0], rtol=1e-4, atol=1e-5)


def test_channel_order_makes_no_difference() -> None:
    first, last = (new_model(picture(*shape), small()) for shape in ((3, 20, 24), (20, 24, 3)))
    images = sample(picture(3, 20, 24), 30)
    actions = torch.randn(30, 2, generator=generator())
    first.fit_normaliser(images, actions)
    last.fit_normaliser(images.permute(0, 2, 3, 1), actions)
    torch.testing.assert_close(first.encode(images), last.encode(images.permute(0, 2, 3, 1)))


# -- units ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.floats(0.1, 100), st.floats(-100, 100), st.integers(0, 999))
def test_standardise_and_back(n: int, d: int, scale: float, shift: float, seed: int) -> None:
    x = torch.randn(n, d, generator=generator(seed)) * scale + shift
    standardise = Standardise((d,))
    assert torch.equal(standardise(x), x), "the identity before it is fitted"
    standardise.fit(x)
    y = standardise(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(d), atol=1e-2, rtol=0)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(d), atol=1e-2, rtol=0)
    torch.testing.assert_close(standardise.inverse(y), x, rtol=1e-4, atol=1e-4 * (scale + abs(shift)))


def test_a_number_that_never_varied_is_not_blown_up() -> None:
    standardise = Standardise((2,))
    standardise.fit(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert standardise(torch.tensor([2.0, 5.1])).tolist() == pytest.approx([0, 0.1], abs=1e-5)


@pytest.mark.parametrize("min_max", [False, True])
def test_images_are_standardised_per_channel(min_max: bool) -> None:
    levels = torch.tensor([3.0, 9.0])[:, None, None]  # channels of different range
    images = (torch.rand(600, 2, 8, 8, generator=generator()) * 20 * levels).to(torch.uint8)
    original = images.clone()
    floats = images.float()
    standardise = StandardiseImage(2, min_max=min_max)
    standardise.fit(images)
    y = standardise(images)
    torch.testing.assert_close(standardise(floats), y)
    assert torch.equal(images, original) and torch.equal(floats, images.float()), "what is given is left alone"
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(2), atol=1e-3, rtol=0)
    stretched = images.float()
    if min_max:
        low, high = (getattr(stretched.flatten(2), f)(2)[..., None, None] for f in ("amin", "amax"))
        stretched = (stretched - low) / (high - low)
    mean, deviation = (getattr(stretched.transpose(0, 1).flatten(1).double(), f)(1) for f in ("mean", "std"))
    expected = (stretched - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(y, expected.float(), atol=1e-3, rtol=1e-3)
    darker = standardise((images // 2).contiguous())
    assert (float((darker - y).abs().mean()) < 0.1) == min_max, "only min-max is blind to brightness"
    assert torch.isfinite(standardise(torch.zeros_like(images))).all()


def test_actions_are_in_units_of_the_environment() -> None:
    """A model whose actions are half as large, with statistics to match, is the same model."""
    model, obs, action = fitted("state-context")
    other = new_model(*MODELS["state-context"])
    other.load_state_dict(model.state_dict())
    other.normalise_actions.mean.copy_(model.normalise_actions.mean / 2)
    other.normalise_actions.scale.copy_(model.normalise_actions.scale / 2)
    z = model.encode(obs)
    torch.testing.assert_close(other.predict(z, action / 2), model.predict(z, action))
    assert not torch.allclose(other.predict(z, action), model.predict(z, action), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_holds_weights_and_statistics(name: str, tiny: Any) -> None:
    model, obs, action = fitted(name)
    other = new_model(*MODELS[name], seed=8)
    z = model.encode(obs)
    assert not torch.allclose(other.encode(obs), z)
    other.load_state_dict(tiny.through_file(model.state_dict()))
    assert torch.equal(other.encode(obs), z) and torch.equal(other.predict(z, action), model.predict(z, action))


# -- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "architecture", "message"),
    [
        (STATE, Architecture("two-rooms"), "'two-rooms' needs uint8 images, but the goal part has shape \\(2,\\)"),
        (STATE, Architecture("diverse-maze"), "'diverse-maze' needs uint8 images"),
        (ROOMS, Architecture("state-ensemble"), "'state-ensemble' needs states, but the goal part is an image"),
        (MAZE, Architecture("two-rooms"), "no place for the context \\['velocity'\\]; use 'small' with predictor='mlp'"),
        (POINT, small(predictor="gru"), "no place for the context \\['observation'\\]"),
        (goal_dict(picture(3, 16, 16)), Architecture("diverse-maze"), "at least 20 x 20, got \\(16, 16\\)"),
        (Discrete(3), small(), "encodes Box observations, but they are Discrete"),
        (Dict(other=vector(2)), small(), "needs the key 'achieved_goal' or 'observation', but .* \\['other'\\]"),
        (goal_dict(vector(2), picture(3, 20, 20)), small(), "besides the goal, a world model takes Box vectors only"),
        (goal_dict(vector(2), mode=Discrete(2)), small(), "The key 'mode' of the observation is Discrete"),
        (
            Dict(achieved_goal=vector(2), desired_goal=vector(3)), small(),
            "'achieved_goal' \\(2,\\) and 'desired_goal' \\(3,\\) must have one shape",
        ),
    ],
)  # fmt: skip
def test_spaces_that_do_not_fit(observation: Any, architecture: Architecture, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_model(observation, architecture)


@pytest.mark.parametrize("space", [Discrete(4), Box(-1, 1, (2, 2), np.float32)])
def test_actions_must_be_a_vector(space: Any) -> None:
    with pytest.raises(ConfigError, match="needs Box actions of one axis, but the action space is"):
        LatentModel(Spaces(STATE, space), small(), rng=generator())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "large"}, "Unknown value of architecture.name 'large'"),
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"frequencies": -1}, "frequencies must be at least 0, got -1"),
        ({"latent": 0}, "latent must be positive, got 0"),
        ({"hidden": (8, 0)}, "hidden must be positive, got \\(8, 0\\)"),
        ({"activation": "step"}, "activation must be one of relu, gelu"),
        ({"channels": (8,)}, "one number per convolution"),
        ({"name": "two-rooms", "latent": 48, "hidden": (64,)}, "'two-rooms' is fixed; latent, hidden can only be set"),
        ({"size": 3}, "Unknown key 'size'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Architecture, options, "architecture")


def test_tensors_that_do_not_fit() -> None:
    model, obs, action = fitted("state-ensemble-of-3")
    z = model.encode(obs)
    with pytest.raises(ConfigError, match="takes actions of 2 numbers, got \\(6, 3\\)"):
        model.predict(z, torch.zeros(6, 3))
    with pytest.raises(ConfigError, match="with equal leading axes, got \\(6, 3, 12\\) and \\(5, 2\\)"):
        model.predict(z, action[:5])
    with pytest.raises(ConfigError, match="z \\(..., 3, 12\\)"):
        model.predict(z[:, 0], action)
    with pytest.raises(ConfigError, match="rollout takes z0 \\(B, 12\\) and actions \\(B, H, 2\\)"):
        model.rollout(z, action[:, None])
    with pytest.raises(ConfigError, match="encodes observations of shape \\(2,\\), got \\(3,\\)"):
        model.encode({**obs, "achieved_goal": torch.zeros(6, 3)})
    with pytest.raises(ConfigError, match="needs the key 'observation' of the observation, got \\['achieved_goal'\\]"):
        model.encode({"achieved_goal": obs["achieved_goal"]})
    with pytest.raises(ConfigError, match="needs the key 'observation' of the observation, got a tensor"):
        model.encode(obs["achieved_goal"])
    with pytest.raises(ConfigError, match="context \\['observation'\\] has 4 numbers, but the observation has 5"):
        model.encode({**obs, "observation": torch.zeros(6, 5)})
    with pytest.raises(ConfigError, match="at least 2 transitions, got 1"):
        model.fit_normaliser({k: v[:1] for k, v in obs.items()}, action[:1])
    with pytest.raises(ConfigError, match="takes actions of 2 numbers, got \\(6, 1\\)"):
        model.fit_normaliser(obs, action[:, :1])
    goalless = new_model(Dict(observation=vector(2)), small())
    with pytest.raises(ConfigError, match="no key 'desired_goal'"):
        goalless.encode_goal({"observation": torch.zeros(1, 2)})
