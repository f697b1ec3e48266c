"""The conformance suites over everything that is registered: a new entry is tested the moment it has a name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from clbench.data.recipes import RECIPES
from clbench.registry import entries, resolve
from clbench.testing import check_agent, check_env, check_method, run_check
from clbench.testing.fixtures import ALL_FIXTURES, FIXTURES, Fixture
from clbench.testing.methods import FITS, USUAL

# discrete actions allow awr only; ddpg-bc, the default, is checked in tests/agents/test_gcrl_streams.py
GOALS: dict[str, Any] = {"hidden": (8,), "batch_size": 8}
# options that make a registered agent small and quick; an agent that is not named here is checked with its defaults
CONFIGS: dict[str, dict[str, Any]] = {
    "bc": {"hidden": (16,), "batch_size": 8},
    "eidetic-bc": {"hidden": (16, 8), "batch_size": 8, "pruning": {"tasks": 3, "recover": 0.1}},
    "eidetic-ppo": {
        "hidden": (16, 8), "critic_hidden": (8,), "rollout_steps": 32, "batch_size": 16, "n_epochs": 2,
        "pruning": {"tasks": 3, "train": 0.0, "recover": 0.1}, "distil_updates": 12, "distil_batch": 8, "visited": 48,
    },
    "pldm": {
        "window": 4, "batch_size": 4, "replan_every": 2,
        "architecture": {"latent": 4, "encoder_hidden": (8,), "hidden": (8,), "channels": (4, 4, 4)},
        "planner_options": {"horizon": 8, "samples": 16, "elites": 4, "iterations": 1},
    },
    "eidetic-pldm": {
        "window": 4, "batch_size": 4, "replan_every": 2, "latent": 12, "encoder_hidden": (12,), "hidden": (12,),
        "planner_options": {"horizon": 8, "samples": 16, "elites": 4, "iterations": 1},
        "pruning": {"tasks": 3, "recover": 0.1},
    },
    "gcbc": GOALS,
    "gcivl": GOALS,
    "gciql": {**GOALS, "actor_loss": "awr", "alpha": 3.0},
    "qrl": {**GOALS, "actor_loss": "awr", "alpha": 3.0, "latent_dim": 16},
    "crl": {**GOALS, "actor_loss": "awr", "alpha": 3.0, "latent_dim": 16},
    "hiql": GOALS,
    "hilp": GOALS,
    "hilp-zero-shot": {**GOALS, "map_hidden": (8, 8)},
    "sb3-ppo": {"hidden": (16,), "rollout_steps": 32, "batch_size": 16, "n_epochs": 2},
    "sb3-dqn": {
        "hidden": (16,), "buffer_size": 256, "learning_starts": 32, "batch_size": 8, "target_update_interval": 32,
    },
    "sb3-sac": {"hidden": (16,), "buffer_size": 256, "learning_starts": 32, "batch_size": 8},
    "sb3-td3": {"hidden": (16,), "buffer_size": 256, "learning_starts": 32, "batch_size": 8},
}  # fmt: skip
# enough for several updates and for two interruptions in the middle
OFFLINE = ("gcbc", "gcivl", "gciql", "qrl", "crl", "hiql", "hilp", "hilp-zero-shot")
SB3 = ("sb3-ppo", "sb3-dqn", "sb3-sac", "sb3-td3")
BUDGETS = {
    **dict.fromkeys(("bc", "eidetic-bc", "pldm", "eidetic-pldm", *OFFLINE), 12),
    **dict.fromkeys((*SB3, "eidetic-ppo"), 192),
}


def check(name: str, candidates: Sequence[Fixture]) -> None:
    cls = resolve("agents", name)
    # named, so that a kind of task which the agent says it can do is never excused
    fixtures = [f for f in candidates if cls.requires <= f.offers] or [
        f for f in ALL_FIXTURES if cls.requires <= f.offers
    ]
    check_agent(cls, config=CONFIGS.get(name), budget=BUDGETS.get(name, 32), fixtures=fixtures).raise_if_failed()


@pytest.mark.parametrize("name", entries("agents"))
def test_agents(name: str):
    check(name, FIXTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", entries("agents"))
def test_agents_on_every_kind_of_task(name: str):
    check(name, ALL_FIXTURES)


# values of options, whatever method has them, that make it quick
QUICK: dict[str, Any] = {"samples": 8, "memory": 24}
ONLY_BC = {"uer"}  # its logits are those of a softmax classifier


def check_composed(name: str, agents: Sequence[str]) -> set[str]:
    """The agents that the method fits."""
    cls = resolve("methods", name)
    known = {f.name for f in dataclasses.fields(cls.Config)}
    report = check_method(cls, config={k: v for k, v in QUICK.items() if k in known}, agents=agents)
    report.raise_if_failed()
    return {r.subject for r in report.results if r.name == FITS and r.ok}


@pytest.mark.parametrize("name", entries("methods"))
def test_methods(name: str):
    fits = check_composed(name, USUAL)
    assert "bc" in fits and (len(fits) > 1 or name in ONLY_BC)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["pldm", "sb3-dqn", "sb3-sac"])
@pytest.mark.parametrize("name", entries("methods"))
def test_methods_on_more_agents(name: str, agent: str):
    check_composed(name, ["bc", agent])


OTHERS = [(kind, name) for kind in ("envs", "streams", "schedules", "datasets", "planners") for name in entries(kind)]
LARGE = {name for name, recipe in RECIPES.items() if recipe.settings["transitions"] > 400_000}
MARKED = [pytest.param(*o, marks=pytest.mark.slow if o[1] in LARGE else [], id=f"{o[0]}/{o[1]}") for o in OTHERS]


@pytest.mark.parametrize(("kind", "name"), MARKED)
def test_everything_else(kind: str, name: str):
    run_check(f"{kind}/{name}").raise_if_failed()


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("clbench/TwoRooms-v0", {"observation": "pixels", "max_episode_steps": 20}),
    ("clbench/TwoRooms-v0", {"collision": "noisy", "max_episode_steps": 20}),
    ("clbench/Classify-v0", {"image": True, "split": "test", "rotation": 30.0, "classes": (3, 4)}),
    ("MiniGrid-Empty-5x5-v0", {"observation": "image", "max_episode_steps": 20}),
    ("MiniGrid-FourRooms-v0", {"observation": "goal-position", "max_episode_steps": 20}),
    ("MiniGrid-DoorKey-5x5-v0", {"observation": "goal-image", "max_episode_steps": 20}),
    ("CartPole-v1", {}),
    ("Pendulum-v1", {}),
    ("MountainCarContinuous-v0", {"max_episode_steps": 20}),
]


@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=[f"{e} {k}" for e, k in VARIANTS])
def test_variants_of_environments(env_id: str, kwargs: dict[str, Any]):
    check_env(env_id, **kwargs).raise_if_failed()
