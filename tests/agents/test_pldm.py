"""Agent pldm: its presets are the published ones, resuming is exact, plans keep within bounds and move the right way.

Each guarantee has a variant that is broken on purpose, which the same check must notice.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Space
from torch import Tensor

import clbench
from clbench.agents import pldm
from clbench.agents.jepa.model import Architecture
from clbench.agents.pldm import PLDM, PRESETS, SIGN, schedule
from clbench.cli.main import main
from clbench.config import build
from clbench.contracts import Experience, Spaces
from clbench.data.dataset import OfflineDataset
from clbench.envs.point_maze_data import point_maze
from clbench.envs.two_rooms_data import two_rooms
from clbench.errors import ClbenchError, ConfigError, ContractError, DataError, UnknownNameError
from clbench.streams.dataset_task import stream_of
from clbench.testing.fixtures import Fixture

POINT = Box(-1, 1, (2,), np.float32)
LIMIT = 0.3
PLANE = Spaces(Dict(achieved_goal=POINT, desired_goal=POINT), Box(-LIMIT, LIMIT, (2,), np.float32))
TINY: dict[str, Any] = {
    "window": 4, "batch_size": 16, "replan_every": 2,
    "architecture": {"latent": 6, "encoder_hidden": (16,), "hidden": (16,), "channels": (4, 4, 4)},
    "planner_options": {"horizon": 8, "samples": 32, "elites": 6, "iterations": 2},
}  # fmt: skip


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(spaces: Spaces = PLANE, seed: int = 0, **options: Any) -> PLDM:
    config = build(PLDM.Config, {**TINY, **options}, "agent")
    return PLDM(spaces, config, device=torch.device("cpu"), rng=generator(seed))


def train(agent: PLDM, data: OfflineDataset, updates: int, seed: int = 0) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(dataset=data), updates, rng=generator(seed))]


def walks(episodes: int = 50, length: int = 12, *, scale: float = 0.2, seed: int = 0) -> OfflineDataset:
    """Random walks in the square, in which steps are at most ``scale`` long."""
    rng = generator(seed)
    angle = torch.rand(episodes, length, generator=rng) * 2 * math.pi
    size = scale * torch.rand(episodes, length, generator=rng).sqrt()
    actions = size[..., None] * torch.stack([angle.cos(), angle.sin()], 2)
    path = [torch.rand(episodes, 2, generator=rng) * 2 - 1]
    for t in range(length):
        path.append((path[-1] + actions[:, t]).clamp(-1, 1))
    rows = {"achieved_goal": torch.stack(path[:-1], 1).flatten(0, 1)}
    return OfflineDataset(rows, actions.flatten(0, 1), torch.full((episodes,), length), {"achieved_goal": path[-1]})


def points(count: int, seed: int = 0) -> dict[str, Tensor]:
    here, goal = (torch.rand(2, count, 2, generator=generator(seed)) * 2 - 1).unbind()
    return {"achieved_goal": here, "desired_goal": goal}


def act(agent: PLDM, obs: Any, memory: Any = None, *, first: Any = None, seed: int = 0) -> tuple[Tensor, Any]:
    rows = len(next(iter(obs.values())))
    first = torch.full((rows,), memory is None) if first is None else torch.as_tensor(first)
    return agent.act(obs, memory, first, rng=generator(seed))


class Identity:
    """A world model of the plane that needs no training: latents are positions, with an axis of members for more than one.

    Members move by actions that differ by ``disagreement``.
    """

    embedding_shape: tuple[int, ...] = (2,)

    def __init__(self, members: int = 1, disagreement: float = 0.0):
        self.members = members
        self.latent_shape = (2,) if members == 1 else (members, 2)
        self.gain = 1 + disagreement * torch.linspace(-1, 1, members) if members > 1 else torch.ones(1)

    def encode(self, obs: Any) -> Tensor:
        return self._repeat(obs["achieved_goal"])

    def encode_goal(self, obs: Any) -> Tensor:
        return self._repeat(obs["desired_goal"])

    def _repeat(self, x: Tensor) -> Tensor:
        return x if self.members == 1 else x[:, None].expand(-1, self.members, -1)

    def goal_features(self, z: Tensor) -> Tensor:
        return z

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        return z + action if self.members == 1 else z + action[..., None, :] * self.gain[:, None]


def with_model(model: Any, **options: Any) -> PLDM:
    agent = make(**options)
    agent.model = model
    return agent


def walk(agent: PLDM, obs: dict[str, Tensor], steps: int) -> Tensor:
    """Positions (B, 2) after following the agent in the plane."""
    here, memory = obs["achieved_goal"], None
    for step in range(steps):
        actions, memory = act(agent, {**obs, "achieved_goal": here}, memory, seed=step)
        here = here + actions
    return here


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset: str) -> None:
    config = build(PLDM.Config, {"preset": preset}, "agent")
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert all(value is not None for value in vars(config).values())
    again = build(PLDM.Config, dataclasses.asdict(config), "agent")  # as config.json has it
    assert again == config
    build_planner(config)


def build_planner(config: PLDM.Config) -> Any:
    cls = pldm.resolve("planners", str(config.planner))
    return build(cls.Config, config.planner_options, "planner")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", ["lr", "window", "variance", "uncertainty", "replan_every"])
def test_one_option_leaves_the_rest_of_the_preset(preset: str, option: str) -> None:
    config = build(PLDM.Config, {"preset": preset, option: 3}, "agent")
    expected = {**PRESETS[preset], option: 3}
    assert {name: getattr(config, name) for name in expected} == expected


def test_options_of_the_planner_and_of_the_networks_join_those_of_the_preset() -> None:
    config = build(
        PLDM.Config,
        {"preset": "two-rooms", "planner_options": {"samples": 7}, "architecture": {"members": 2}},
        "agent",
    )
    assert config.planner_options == {**PRESETS["two-rooms"]["planner_options"], "samples": 7}
    assert (config.architecture.name, config.architecture.members) == ("two-rooms", 2)
    other = build(PLDM.Config, {"planner": "random-shooting", "planner_options": {"samples": 7}}, "agent")
    assert other.planner_options == {"samples": 7}  # what is meant for one planner is not given to another
    with pytest.raises(ConfigError, match="The architecture 'diverse-maze' is fixed; latent can only be set for"):
        build(PLDM.Config, {"preset": "diverse-maze", "architecture": {"latent": 64}}, "agent")


def chosen_on_the_command_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    chosen = {}
    monkeypatch.setattr("clbench.experiments.run", lambda **v: chosen.update(v["agent_options"]) or exit())
    with pytest.raises(SystemExit):
        main(["run", "two-rooms/size-5078-v0", "--agent", "pldm", *arguments])
    return build(PLDM.Config, chosen, "agent")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_the_command_line(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--agent.preset", preset, "--agent.window", "9", "--agent.planner-options", "samples", "99"]
    got = chosen_on_the_command_line(arguments, monkeypatch)
    options = {"preset": preset, "window": 9, "planner_options": {"samples": "99"}}
    assert got == build(PLDM.Config, options, "agent")
    default = dataclasses.asdict(PLDM.Config())  # the mistake: to start from what another preset has filled in
    if preset != "small":
        assert got != build(PLDM.Config, {**default, **options}, "agent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"window": -1}, "window must be positive, got -1"),
        ({"replan_every": 0}, "replan_every must be positive, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2: the variance is taken over the batch"),
        ({"smoothness": -1}, "smoothness must be at least 0, got -1"),
        ({"preset": "smal"}, r"small"),
        ({"anti_collapse": "vicregg"}, r"vicreg"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"planner": "icam"}, "icem"),
        ({"planner_options": {"sampels": 64}}, "Unknown key 'sampels' in planner 'icem'.*'samples'"),
        ({"planner_options": {"samples": "many"}}, "planner 'icem'.samples must be of type int, got 'many'"),
        ({"planner_options": {"samples": 8, "elites": 20}}, r"elites must be between 2 and samples \(8\), got 20"),
        ({"architecture": {"latent": 0}}, "latent must be positive, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


def pixels(channels: int, size: int, *, velocity: bool = False) -> Spaces:
    image, fast = Box(0, 255, (channels, size, size), np.uint8), Box(-5, 5, (2,), np.float32)
    keys: dict[str, Space] = {"observation": image, "achieved_goal": image, "desired_goal": image}
    return Spaces(Dict({**keys, "velocity": fast} if velocity else keys), POINT)


def ant() -> Spaces:
    joints = Box(-np.inf, np.inf, (27,), np.float32)
    return Spaces(Dict(observation=joints, achieved_goal=POINT, desired_goal=POINT), Box(-1, 1, (8,), np.float32))


@pytest.mark.parametrize(
    ("preset", "members", "spaces", "count"),
    [
        ("two-rooms", 1, pixels(2, 65), 2_218_672),
        ("two-rooms-released", None, pixels(2, 65), 2_218_672),
        ("two-rooms", None, pixels(2, 65), 1_426_096 + 5 * (793_600 - 1024)),
        ("diverse-maze", None, pixels(3, 64, velocity=True), 53_666),
        ("ant", None, ant(), 1_080_615),
    ],
)
def test_published_presets_have_the_published_numbers_of_parameters(
    preset: str, members: int | None, spaces: Spaces, count: int
) -> None:
    options = {"preset": preset, "architecture": {"members": members}}
    agent = PLDM(spaces, build(PLDM.Config, options, "agent"), device=torch.device("cpu"), rng=generator(0))
    assert agent.num_parameters == count
    assert len(agent.trainables) > len(list(agent.model.parameters()))  # the head is trained, but no part of the model


# -- losses ------------------------------------------------------------------------------------------------------------

ANTI_COLLAPSE = ("vicreg", "barlow-twins", "self-prediction", "forward-inverse")
MIXED = Fixture(goal=True).spaces  # positions as goals, and an observation with more: a context
COEFFICIENTS = {
    "variance": "variance_loss", "covariance": "covariance_loss", "variance_over_time": "variance_over_time_loss",
    "smoothness": "temporal_smoothness_loss", "inverse": "inverse_dynamics_loss", "context": "context_loss",
}  # fmt: skip


@pytest.mark.parametrize("anti_collapse", ANTI_COLLAPSE)
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("kind", [Fixture(goal=True), Fixture(goal=True, pixels=True)], ids=["state", "pixels"])
def test_every_kind_of_training_takes_a_few_steps(anti_collapse: str, members: int, kind: Fixture) -> None:
    agent = make(kind.spaces, anti_collapse=anti_collapse, architecture={**TINY["architecture"], "members": members})
    before = copy.deepcopy(agent.model.state_dict())
    found = train(agent, kind.dataset(), 4)
    assert [m["step"] for m in found] == [1, 2, 3, 4]
    assert all(math.isfinite(v) for m in found for v in m.values())
    assert found[-1].keys() >= {"loss", "prediction", "rankme", "latent_std_min", "latent_std_mean"}
    assert ("probe_r2" in found[-1]) is not kind.pixels  # these pictures come without the state behind them
    assert any(not torch.equal(before[k], v) for k, v in agent.model.state_dict().items())


def test_collapse_is_prevented_by_the_terms_that_are_there_for_it() -> None:
    none: dict[str, Any] = {"variance": 0, "covariance": 0, "variance_over_time": 0, "inverse": 0}
    options: dict[str, Any] = {"lr": 3e-3, "smoothness": 1.0}
    network = {**TINY["architecture"], "output_norm": False}
    kept, lost = make(architecture=network, **options), make(architecture=network, **options, **none)
    spread = [train(agent, walks(), 200)[-1]["latent_std_mean"] for agent in (kept, lost)]
    assert spread[0] > 5 * spread[1]


def batch(data: OfflineDataset, agent: PLDM) -> tuple[Any, Tensor]:
    starts = data.window_starts(agent.config.window)
    return data.windows(starts[torch.randint(len(starts), (16,), generator=generator(1))], agent.config.window)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_loss_is_linear_in_every_coefficient(name: str) -> None:
    data = Fixture(goal=True).dataset()
    options: dict[str, Any] = {name: 2.0}
    agent = make(MIXED, **options)
    some = batch(data, agent)
    loss, terms = agent.loss(some)
    agent.config = dataclasses.replace(agent.config, **{name: 5.0})
    more, _ = agent.loss(some)
    assert torch.isclose(more - loss, 3 * terms[name], rtol=1e-3, atol=1e-6)
    assert terms[name] > 0


def literal(agent: PLDM, some: tuple[Any, Tensor]) -> Tensor:
    """The formulas of docs/pldm.md, spelled out, for latents of six features and what is left as context."""
    observations, actions = some
    model, config = agent.model, agent.config
    z = model.encode_frames(observations)
    predicted = model.rollout(z[:, 0], actions)
    members = [predicted[:, :, e] for e in range(model.members)] if model.members > 1 else [predicted]
    goal, last = z[..., :6], z[:, 1:, :6]
    targets = last.detach() if config.anti_collapse == "self-prediction" else last
    prediction = sum(((p[..., :6] - targets) ** 2).mean() for p in members)
    context = sum(((p[..., 6:] - z[:, 1:, 6:]) ** 2).mean() for p in members)
    standard = (actions - model.normalise_actions.mean) / model.normalise_actions.scale
    pairs = torch.cat([z[:, :-1], z[:, 1:]], -1)
    inverse = ((agent.inverse_head.layers(pairs) - standard) ** 2).mean()  # type: ignore[operator]
    smoothness = ((goal[:, 1:] - goal[:, :-1]) ** 2).mean()
    if config.anti_collapse == "forward-inverse":  # prediction and inverse model alone, and what carries the context on
        return config.context * context + inverse + 0.1 * prediction
    total = config.smoothness * smoothness + config.context * context + prediction + config.inverse * inverse
    if config.anti_collapse == "barlow-twins":
        for p in members:
            a, b = (v.flatten(0, 1) - v.flatten(0, 1).mean(0) for v in (p[..., :6], last))
            a, b = (v / (v.var(0, correction=0) + 1e-5).sqrt() for v in (a, b))
            c = a.T @ b / len(a)
            off = c[~torch.eye(6, dtype=torch.bool)]
            total = total + config.variance * (((1 - c.diagonal()) ** 2).sum() + 5e-3 * (off**2).sum()) / 6
    if config.anti_collapse == "vicreg":
        off = torch.cov(goal[:, 0].T)[~torch.eye(6, dtype=torch.bool)]
        total = total + config.variance * (1 - (goal[:, 0].var(0) + 1e-4).sqrt()).relu().mean()
        total = total + config.covariance * (off**2).sum() / 30
        total = total + config.variance_over_time * (1 - (last.var(1) + 1e-4).sqrt()).relu().mean()
    return total


@pytest.mark.parametrize("anti_collapse", ANTI_COLLAPSE)
@pytest.mark.parametrize("members", [1, 3])
def test_the_loss_and_its_gradients_are_those_of_the_formulas(anti_collapse: str, members: int) -> None:
    data = Fixture(goal=True).dataset()
    agent = make(MIXED, anti_collapse=anti_collapse, context=0.7, smoothness=2.0, inverse=0.6,
                 architecture={**TINY["architecture"], "members": members})  # fmt: skip
    train(agent, data, 3)
    some = batch(data, agent)
    loss, expected = agent.loss(some)[0], literal(agent, some)
    assert torch.isclose(loss, expected, rtol=1e-4)
    got, wanted = (torch.autograd.grad(v, agent.trainables, allow_unused=True) for v in (loss, expected))
    for x, y in zip(got, wanted, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.allclose(x, y, rtol=1e-3, atol=1e-5)


def gradients(agent: PLDM, data: OfflineDataset) -> list[Tensor | None]:
    for parameter in agent.trainables:
        parameter.grad = None
    agent.loss(batch(data, agent))[0].backward()
    return [p.grad for p in agent.trainables]


def equal(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_term_without_weight_has_no_gradient(name: str, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the term is, even NaN; with a weight it counts."""
    options: dict[str, Any] = {name: weight}
    data, agent = Fixture(goal=True).dataset(), make(MIXED, **options)
    plain = gradients(agent, data)
    original = getattr(pldm, COEFFICIENTS[name])
    monkeypatch.setattr(pldm, COEFFICIENTS[name], lambda *a, **k: original(*a, **k) * math.nan)
    assert equal(plain, gradients(agent, data)) is (weight == 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_inverse_model_keeps_its_random_weights(frozen: bool) -> None:
    agent = make(frozen_inverse=frozen, inverse=1.0)
    before = copy.deepcopy(dict(agent.inverse_head.state_dict()))
    train(agent, walks(), 5)
    assert all(torch.equal(before[k], v) for k, v in agent.inverse_head.state_dict().items()) is frozen
    alone = dict.fromkeys(("variance", "covariance", "variance_over_time", "smoothness"), 0.0)
    agents = [make(frozen_inverse=frozen, inverse=w, **alone) for w in (0.0, 1.0)]
    encoders = [gradients(a, walks())[0] for a in agents]
    assert encoders[0] is not None and encoders[1] is not None
    assert not torch.equal(encoders[0], encoders[1])  # the encoder learns from it in both cases


# -- learning ----------------------------------------------------------------------------------------------------------


def test_the_schedule() -> None:
    rates = [schedule(i, 1000) for i in range(1000)]
    assert all(a < b for a, b in zip(rates[:100], rates[1:101], strict=True))
    assert all(a > b for a, b in zip(rates[100:-1], rates[101:], strict=True))
    assert rates[100] == max(rates) == 1.0 and rates[0] < 0.02 and rates[-1] < 0.002
    assert abs(rates[550] - 0.5005) < 1e-6  # half of the cosine
    assert all(0 < schedule(i, n) <= 1 for n in (1, 2, 3, 11) for i in range(n + 2))


class Recorded(PLDM):
    """Remembers the learning rate of every update."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rates: list[float] = []

    def update(self, batch: Any) -> dict[str, Tensor]:
        info = super().update(batch)
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return info


def recorded(seed: int) -> Recorded:
    return Recorded(PLANE, build(PLDM.Config, TINY, "agent"), device=torch.device("cpu"), rng=generator(seed))


def resumed(tiny: Any, spoil: Any = None) -> tuple[Recorded, Recorded]:
    """After 20 updates of a second phase: a run left alone, and one that was stopped after 7 of them."""
    data, saved = walks(), {}
    whole, rng = recorded(0), generator(9)
    train(whole, walks(seed=1), 6)
    whole.rates.clear()
    for m in whole.learn(Experience(dataset=data), 20, rng=rng):
        if m["step"] == 7:
            saved = {"agent": tiny.through_file(whole.state_dict()), "rng": rng.get_state()}
    if spoil is not None:
        spoil(saved)
    second, rng = recorded(77), generator(0)
    second.load_state_dict(saved["agent"])
    rng.set_state(saved["rng"])
    list(second.learn(Experience(dataset=data), 13, rng=rng))
    return whole, second


def test_resuming_in_the_middle_of_a_phase_is_exact(tiny: Any) -> None:
    whole, second = resumed(tiny)
    assert tiny.same(whole.state_dict(), second.state_dict())
    assert whole.rates[7:] == second.rates
    assert whole.rates == [whole.config.lr * schedule(i, 20) for i in range(20)]


@pytest.mark.parametrize("part", ["model", "inverse_head", "optimizer", "updates", "samples", "phase", "rng"])
def test_resuming_without_any_part_of_the_state_is_noticed(tiny: Any, part: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        fresh = {**recorded(77).state_dict(), "rng": generator(0).get_state()}
        where = saved if part == "rng" else saved["agent"]
        where[part] = fresh[part]

    whole, second = resumed(tiny, spoil)
    assert not tiny.same(whole.state_dict(), second.state_dict())
    assert (whole.rates[7:] == second.rates) is (part != "phase")


def test_states_share_no_memory_with_the_agent(tiny: Any) -> None:
    agent, other = make(), make(seed=1)
    train(agent, walks(), 3)
    state = agent.state_dict()
    frozen = copy.deepcopy(state)
    other.load_state_dict(state)
    assert tiny.same(other.state_dict(), frozen)
    for each in (agent, other):
        train(each, walks(), 3)
        assert tiny.same(state, frozen)


def test_a_new_phase_has_a_new_schedule_and_optimiser() -> None:
    agent = recorded(0)
    train(agent, walks(), 8)
    train(agent, walks(), 8)
    assert agent.rates[:8] == agent.rates[8:]
    assert {int(s["step"]) for s in agent.optimizer.state_dict()["state"].values()} == {8}
    assert agent.costs() == {"updates": 16, "samples": 16 * 16 * 4}


def normalisers(agent: PLDM) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in agent.model.state_dict().items() if "normalise" in k}


@pytest.mark.parametrize("forgets", [False, True])
def test_a_second_task_leaves_the_normaliser_as_it_is(tiny: Any, forgets: bool) -> None:
    agent = make()
    fresh = normalisers(agent)
    train(agent, walks(scale=0.1), 3)
    first = normalisers(agent)
    assert not tiny.same(fresh, first)
    if forgets:  # the broken variant: it does not know that it has learned before
        agent.updates = 0
    train(agent, walks(scale=0.3, seed=5), 3)
    assert tiny.same(first, normalisers(agent)) is not forgets


def test_the_largest_action_is_that_of_all_data_so_far() -> None:
    agent, sizes = make(), []
    for scale in (0.1, 0.25, 0.05):
        data = walks(scale=scale)
        train(agent, data, 2)
        sizes.append((agent.largest_action, float(data.actions.norm(dim=1).max())))
    assert sizes[0][0] == sizes[0][1] and sizes[1][0] == sizes[1][1] > sizes[0][0]
    assert sizes[2][0] == sizes[1][0]


def test_windows_of_one_action_have_no_variance_over_time() -> None:
    with pytest.raises(ConfigError, match="variance over time needs windows of at least 3 frames, got 2"):
        train(make(window=1), walks(), 1)
    assert math.isfinite(train(make(window=1, variance_over_time=0), walks(), 1)[-1]["loss"])


def test_metrics_come_as_often_as_asked() -> None:
    found = train(make(log_every=3, diagnose_every=4), walks(), 10)
    assert [m["step"] for m in found if "loss" in m] == [3, 6, 9, 10]
    assert [m["step"] for m in found if "rankme" in m] == [4, 8, 10]


# -- acting ------------------------------------------------------------------------------------------------------------


def test_a_trained_agent_reaches_goals_and_an_untrained_one_does_not() -> None:
    agent = make(
        batch_size=64, lr=5e-3, smoothness=10.0,
        architecture={"latent": 8, "encoder_hidden": (32,), "hidden": (32,), "frequencies": 0},
        planner_options={"horizon": 16, "samples": 64, "elites": 8, "iterations": 2},
    )  # fmt: skip
    inside = {k: v * 0.9 for k, v in points(40).items()}

    def share() -> float:
        return float(((walk(agent, inside, 12) - inside["desired_goal"]).norm(dim=1) < 0.3).float().mean())

    before = share()
    train(agent, walks(200), 400)
    assert before < 0.4 and share() > 0.75


def test_acting_changes_nothing(tiny: Any) -> None:
    agent, obs = make(), points(4)
    train(agent, walks(), 3)
    outside = torch.get_rng_state()
    state, given = copy.deepcopy(agent.state_dict()), copy.deepcopy(obs)
    actions, memory = act(agent, obs)
    kept = copy.deepcopy(memory)
    again, _ = act(agent, obs)
    act(agent, points(4, 7), memory, seed=3)
    act(agent, obs, memory, first=[True, False, True, False])
    assert torch.equal(actions, again) and tiny.same(obs, given)
    assert tiny.same(agent.state_dict(), state) and tiny.same(memory, kept)
    assert torch.equal(outside, torch.get_rng_state())


PLANNERS: dict[str, dict[str, Any]] = {
    "icem": {"samples": 24, "elites": 4}, "cem": {"samples": 24, "elites": 4}, "mppi": {"samples": 24},
    "random-shooting": {"samples": 24}, "gradient": {},
}  # fmt: skip


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("cap", [True, False])
def test_plans_stay_within_the_box_and_the_norms_seen_in_the_data(planner: str, cap: bool) -> None:
    options = {"planner": planner, "planner_options": {"horizon": 6, "iterations": 2, **PLANNERS[planner]}}
    agent = make(cap_actions=cap, **options)
    train(agent, walks(scale=0.1), 2)
    agent.model = Identity()  # type: ignore[assignment]
    far = {"achieved_goal": torch.full((6, 2), -0.9), "desired_goal": torch.full((6, 2), 0.9)}
    memory, norms = None, []
    for step in range(4):
        actions, memory = act(agent, far, memory, seed=step)
        plans = memory["plan"]
        assert actions.shape == (6, 2) and plans.shape == (6, 6, 2)
        assert bool((plans.abs() <= LIMIT).all())
        norms.append(float(plans.norm(dim=-1).max()))
    # what a goal far away makes a planner want to do, and what the data have shown
    assert (max(norms) <= agent.largest_action) is cap
    assert agent.largest_action <= 0.1


def test_a_box_without_rest_is_not_capped() -> None:
    ahead = Spaces(PLANE.observation, Box(np.array([0.1, -1.0], np.float32), np.array([0.3, 1.0], np.float32)))
    agent = make(ahead)
    train(agent, walks(scale=0.01), 2)
    _, memory = act(agent, points(3))
    assert bool((memory["plan"][..., 0] >= 0.1).all() and (memory["plan"][..., 0] <= 0.3).all())


def differences(agent: PLDM, steps: int = 5) -> float:
    """The largest difference between actions for five environments at once and one by one, with the same noise."""
    obs, largest = points(5), 0.0
    together: Any = None
    alone: list[Any] = [None] * 5
    for step in range(steps):
        actions, together = act(agent, obs, together, seed=step)
        for i in range(5):
            one, alone[i] = act(agent, {k: v[i : i + 1] for k, v in obs.items()}, alone[i], seed=step)
            largest = max(largest, float((one[0] - actions[i]).abs().max()))
        obs = {**obs, "achieved_goal": obs["achieved_goal"] + actions}
    return largest


class BatchMean(Identity):
    """The mistake of batch statistics."""

    def encode(self, obs: Any) -> Tensor:
        return obs["achieved_goal"] - obs["achieved_goal"].mean(0)


def test_many_environments_at_once_are_the_same_as_one_by_one() -> None:
    trained = make()
    train(trained, walks(), 20)
    assert differences(trained) < 1e-4
    assert differences(with_model(Identity())) < 1e-5
    assert differences(with_model(BatchMean())) > 1e-2


def test_rows_plan_on_their_own_clock_and_forget_what_ended() -> None:
    agent, obs = with_model(Identity(), replan_every=3), points(3)
    _, memory = act(agent, obs)
    assert memory["cursor"].tolist() == [1, 1, 1]
    _, later = act(agent, obs, memory, first=[False, True, False], seed=1)
    assert later["cursor"].tolist() == [2, 1, 2]
    assert torch.equal(later["plan"][0], memory["plan"][0]) and not torch.equal(later["plan"][1], memory["plan"][1])
    fresh, _ = act(agent, {k: v[1:2] for k, v in obs.items()}, seed=1)
    assert torch.allclose(later["plan"][1, 0], fresh[0], atol=1e-6)  # nothing of the episode before


@pytest.mark.parametrize("objective", ["reach", "avoid"])
@pytest.mark.parametrize("told", [True, False])
def test_rows_move_towards_or_away_from_their_goals(objective: str, told: bool) -> None:
    """Also where only some rows are planned for: the second half of them is one step behind."""
    agent = with_model(Identity(), objective=objective, replan_every=2)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    obs = {"achieved_goal": torch.zeros(4, 2), "desired_goal": torch.full((4, 2), 0.4)}
    obs |= {SIGN: sign[:, None]} if told else {}
    here, memory = obs["achieved_goal"], None
    for step in range(5):
        first = torch.tensor([step == 0, step == 0, step <= 1, step <= 1])
        actions, memory = act(agent, {**obs, "achieved_goal": here}, memory, first=first, seed=step)
        here = here + actions
    nearer = (here - 0.4).norm(dim=1) < (obs["achieved_goal"] - 0.4).norm(dim=1)
    expected = sign if told else torch.full((4,), 1.0 if objective == "reach" else -1.0)  # the key replaces the option
    assert nearer.tolist() == (expected > 0).tolist()


def test_the_sign_is_no_part_of_what_is_encoded() -> None:
    signed = Dict({**PLANE.observation.spaces, SIGN: Box(-1, 1, (1,), np.float32)})  # type: ignore[attr-defined]
    agent = make(Spaces(signed, PLANE.action))
    assert agent.model.context_dim == 0
    train(agent, walks(), 2)
    act(agent, {**points(3), SIGN: torch.ones(3, 1)})


def test_uncertainty_is_the_discounted_variance_of_the_members(tiny: Any) -> None:
    agent = make(uncertainty=0.5, discount=0.8, architecture={**TINY["architecture"], "members": 4})
    obs = points(3)
    goal = agent.model.encode_goal(obs)
    z = torch.randn(3, 7, 4, 6, generator=generator(3))
    distance = (z - goal[:, None]).square().mean((2, 3))
    expected = distance + 0.5 * 0.8**3 * z.var(2, correction=0).sum(-1)
    assert torch.allclose(agent.objective(goal, obs)(z, 3), expected, rtol=1e-5)
    agent.config = dataclasses.replace(agent.config, uncertainty=0.0)
    assert torch.allclose(agent.objective(goal, obs)(z, 3), distance, rtol=1e-5)


def test_distances_are_those_of_what_is_to_be_reached() -> None:
    """Not of the context, which is another number at the goal than on the way."""
    agent = make(MIXED)
    goal = torch.randn(2, 9, generator=generator(1))
    z = torch.randn(2, 5, 9, generator=generator(2))
    moved = z.clone()
    moved[..., 6:] += 10
    cost = agent.objective(goal)(z, 1)
    assert torch.allclose(cost, (z - goal[:, None])[..., :6].square().mean(2), rtol=1e-5)
    assert torch.allclose(agent.objective(goal)(moved, 1), cost)
    moved[..., :6] += 10
    assert not torch.allclose(agent.objective(goal)(moved, 1), cost)


def test_uncertain_ensembles_stay_where_they_agree() -> None:
    sure, unsure = (with_model(Identity(3, 0.8), uncertainty=w, discount=1.0) for w in (0.0, 100.0))
    obs = {"achieved_goal": torch.zeros(2, 2), "desired_goal": torch.full((2, 2), 0.5)}
    moved = [float(walk(agent, obs, 4).norm(dim=1).mean()) for agent in (sure, unsure)]
    assert moved[0] > 0.4 > 0.2 > moved[1]


def test_only_the_last_step_counts_if_asked() -> None:
    agent, obs = make(reduce="last"), points(2)
    goal = agent.model.encode_goal(obs)
    z = torch.randn(2, 5, 6, generator=generator(3))
    assert float(agent.objective(goal, obs)(z, 7).abs().max()) == 0
    assert torch.allclose(agent.objective(goal, obs)(z, 8), (z - goal[:, None]).square().mean(2), rtol=1e-5)
    act(agent, obs)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("poisoned", [True, False])
def test_costs_that_are_not_finite_are_replaced_counted_and_reported(planner: str, poisoned: bool) -> None:
    options = {"planner": planner, "planner_options": {"horizon": 6, "iterations": 2, **PLANNERS[planner]}}
    agent = make(**options)
    train(agent, walks(), 2)
    if poisoned:
        with torch.no_grad():
            for parameter in agent.model.predictor.parameters():
                parameter.fill_(math.nan)
    memory: Any = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            actions, memory = act(agent, points(4), memory, seed=step)
            assert bool(actions.isfinite().all()) and bool((memory["plan"].abs() <= LIMIT).all())
    assert bool((memory["planner"]["replaced"] > 0).all()) is poisoned
    assert any("were not finite and count as the worst" in str(w.message) for w in caught) is poisoned


def test_training_that_diverges_goes_on_and_says_so() -> None:
    agent = make()
    with torch.no_grad():
        agent.trainables[0].fill_(math.nan)
    found = train(agent, walks(), 2)[-1]
    assert math.isnan(found["loss"]) and math.isnan(found["rankme"])


def test_too_large_for_the_memory() -> None:
    agent = make(planner_options={"horizon": 8, "samples": 10**12, "elites": 6})
    with pytest.raises(ConfigError, match="would need about .* GiB .* are free on cpu: lower samples or horizon"):
        act(agent, points(2))


def test_a_horizon_too_long_for_the_memory() -> None:
    options = {"horizon": 10**7, "samples": 32, "elites": 6}
    with pytest.raises(ConfigError, match="10000000 distinct actions would need about .* GiB, but .*: lower horizon"):
        make(planner_options=options)
    make(planner_options={**options, "color": 0})


# -- observations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["clbench/TwoRooms-v0", "clbench/PointMaze-v0"])
@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_environments_of_ours(env_id: str, observation: str) -> None:
    rooms = "Two" in env_id
    env = clbench.make_env(env_id, num_envs=3, device="cpu", observation=observation)
    data = (two_rooms if rooms else point_maze)(transitions=200, observation=observation)
    agent = make(Spaces(env.single_observation_space, env.single_action_space))
    found = train(agent, data, 2)[-1]
    assert math.isfinite(found["loss"]) and math.isfinite(found["probe_r2"])
    assert agent.model.keys.context == (() if rooms else ("velocity",) if observation == "pixels" else ("observation",))
    obs, _ = env.reset(seed=0)
    memory, first = None, torch.ones(3, dtype=torch.bool)
    for step in range(3):
        actions, memory = agent.act(obs, memory, first, rng=generator(step))
        assert bool((actions.norm(dim=1) <= agent.largest_action).all())
        obs, _, terminated, truncated, _ = env.step(actions)
        first = terminated | truncated


# -- runs --------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {"tensorboard": False, "eval_every": 0, "agent_options": TINY, "budget": 3}


@pytest.mark.parametrize("observation", ["state", "pixels"])
def test_a_run_from_the_name_of_a_data_set(observation: str, tmp_path: Any) -> None:
    result = clbench.run(
        "two-rooms/size-634-v0", "pldm", out=tmp_path, stream_options={"observation": observation, "episodes": 2}, **RUN
    )
    assert result.results["status"] == "complete"
    assert isinstance(result.agent, PLDM)
    cost = result.results["cost"]
    assert (cost["updates"], cost["parameters"]) == (3, result.agent.num_parameters)


def test_the_ablations_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spec = importlib.util.spec_from_file_location(
        "ablate_pldm", Path(__file__).parents[2] / "scripts" / "ablate_pldm.py"
    )
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    for variant in script.VARIANTS.values():
        build(PLDM.Config, dict(variant.options), "agent")
        stream_of(variant.data)
    tiny = {k: script.Variant({**TINY, **v.options}, "two-rooms/size-634-v0") for k, v in script.VARIANTS.items()}
    monkeypatch.setattr(script, "VARIANTS", {k: tiny[k] for k in ("full", "no-variance")})
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    arguments = ["--budget", "2", "--episodes", "1", "--out", str(tmp_path)]
    script.main([*arguments, "--seeds", "0"])
    times = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("checkpoint.pt")}
    table = script.main([*arguments, "--seeds", "0,1", "--write"])
    assert len(times) == 2 and all(f.stat().st_mtime_ns == t for f, t in times.items())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["full", "no-variance"]
    assert all(len(row) == len(rows[0]) and row[1] == "2" and row[7] == "2" for row in rows[2:])
    assert all(1 <= float(row[4]) <= 6 and float(row[5]) <= 1 for row in rows[2:])
    assert table in (tmp_path / "results" / "ablate_pldm.md").read_text()
    with pytest.raises(SystemExit):
        script.main(["--variants", "full,no-varience"])
    assert "unknown variants no-varience; there are full, no-variance" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("digits-split", "'pldm' requires 'continuous'"),
        ("minigrid-5", "'pldm' requires 'continuous'"),
    ],
)
def test_streams_that_it_cannot_do(stream: str, message: str, tmp_path: Any) -> None:
    with pytest.raises(ClbenchError, match=message) as error:
        clbench.run(stream, "pldm", out=tmp_path / "run", **RUN)
    assert "\n" not in str(error.value)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        (Spaces(PLANE.observation, Discrete(4)), "'pldm' plans continuous actions, but the action space is Discrete"),
        (Spaces(PLANE.observation, Box(-1, 1, (2, 2), np.float32)), "needs Box actions of one axis"),
        (Spaces(PLANE.observation, Box(-np.inf, np.inf, (2,), np.float32)), "Planners need bounded actions"),
        (Spaces(POINT, PLANE.action), "'pldm' plans towards goals, but observations have no key 'desired_goal'"),
        (Spaces(Dict(observation=POINT), PLANE.action), "observations have no key 'desired_goal'"),
        (Spaces(Dict(position=POINT), PLANE.action), "needs the key 'achieved_goal' or 'observation'"),
        (
            Spaces(Dict(achieved_goal=POINT, desired_goal=Box(-1, 1, (3,), np.float32)), PLANE.action),
            "must have one shape",
        ),
        (Spaces(Dict(achieved_goal=Discrete(3), desired_goal=Discrete(3)), PLANE.action), "encodes Box observations"),
    ],
)
def test_bad_spaces(spaces: Spaces, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(spaces)


@pytest.mark.parametrize(("preset", "message"), [("two-rooms", "needs uint8 images"), ("ant", "needs states")])
def test_presets_for_other_observations(preset: str, message: str) -> None:
    spaces = PLANE if preset == "two-rooms" else pixels(2, 65)
    config = build(PLDM.Config, {"preset": preset}, "agent")
    with pytest.raises(ConfigError, match=message):
        PLDM(spaces, config, device=torch.device("cpu"), rng=generator(0))


def changed(data: OfflineDataset, **changes: Any) -> OfflineDataset:
    parts = {k: getattr(data, k) for k in ("observations", "actions", "lengths", "final_observations")}
    return OfflineDataset(**{**parts, **changes})


def poison(data: OfflineDataset, where: str) -> OfflineDataset:
    column = (data.actions if where == "actions" else data.observations["achieved_goal"]).clone()
    column[3, 0] = math.nan
    return changed(data, **({"actions": column} if where == "actions" else {"observations": {"achieved_goal": column}}))


BAD_DATA: list[tuple[Any, type[ClbenchError], str]] = [
    (lambda d: walks(length=3), DataError, r"no window of 4 actions: the longest episode has 3; lower the length"),
    (lambda d: poison(d, "actions"), DataError, r"actions holds NaN or infinite values in 1 rows, the first is row 3"),
    (lambda d: poison(d, "observations"), DataError, r"achieved_goal holds NaN or infinite values in 1 rows"),
    (lambda d: changed(d, actions=d.actions.repeat(1, 2)), ConfigError, r"takes actions of 2 numbers, got \(600, 4\)"),
    (
        lambda d: OfflineDataset({"position": d.observations["achieved_goal"]}, d.actions, d.lengths),
        ConfigError,
        r"needs the key 'achieved_goal' of the observation, got \['position'\]",
    ),
    (
        lambda d: OfflineDataset({"achieved_goal": d.observations["achieved_goal"].repeat(1, 2)}, d.actions, d.lengths),
        ConfigError,
        r"encodes observations of shape \(2,\), got \(4,\)",
    ),
]


@pytest.mark.parametrize(("spoil", "kind", "message"), BAD_DATA)
@pytest.mark.parametrize("trained", [False, True])
def test_bad_data(spoil: Any, kind: type[ClbenchError], message: str, trained: bool) -> None:
    """In the first task and in a later one; a model that was trained before is not harmed."""
    agent = make()
    if trained:
        train(agent, walks(), 2)
    before = copy.deepcopy(agent.model.state_dict())
    shape = message.replace("600", r"\d+") if not trained else message.replace(r"\(600, 4\)", r"\(16, 4, 4\)")
    with pytest.raises(kind, match=shape) as error:
        train(agent, spoil(walks()), 1)
    assert "\n" not in str(error.value)
    if trained:
        assert all(torch.equal(before[k], v) for k, v in agent.model.state_dict().items())


def test_other_mistakes() -> None:
    with pytest.raises(ContractError, match="'pldm' learns from a data set, but the experience of this phase has none"):
        next(make().learn(Experience(), 1, rng=generator(0)))
    with pytest.raises(ConfigError, match="needs plans of as many steps, but the planner's horizon is 8"):
        act(make(replan_every=9), points(2))
    with pytest.raises(UnknownNameError):
        make(planner="newton")
    agent = make()
    _, memory = act(agent, points(3))
    with pytest.raises(ContractError, match="memory is of 3 environments, but 2 are to act; pass None to begin anew"):
        act(agent, points(2), memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anti_collapse": "vicregg"}, "value of anti_collapse 'vicregg'"),
        ({"objective": "avoids"}, "value of objective 'avoids'"),
        ({"reduce": "mean"}, "value of reduce 'mean'"),
        ({"discount": 1.5}, "discount must be in \\[0, 1\\], got 1.5"),
    ],
)
def test_options_are_checked_in_python_too(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLDM.Config(**options)


def test_an_architecture_that_is_named_is_not_the_presets() -> None:
    named = PLDM.Config(preset="ant", architecture=Architecture("small", members=5))
    assert (named.architecture.kind, named.architecture.members, named.smoothness) == ("small", 5, 8.1)
    assert PLDM.Config(preset="ant", architecture=Architecture(members=2)).architecture.kind == "state-ensemble"
    assert PLDM.Config().architecture.kind == "small"


def test_the_probe_is_the_embedding_that_distances_are_taken_in() -> None:
    agent, obs = make(), points(5)
    train(agent, walks(), 2)
    found = agent.probe(obs)
    assert list(found) == ["features"] and not found["features"].requires_grad
    z = agent.model.encode(obs)
    assert torch.allclose(found["features"], agent.model.goal_features(z).reshape(5, -1), atol=1e-6)
    alone = agent.probe({k: v[2:3] for k, v in obs.items()})["features"]
    assert torch.allclose(alone, found["features"][2:3], atol=1e-6)
