"""Every environment check passes the toy environment and catches one broken in just that way, with advice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from clbench.contracts import TaskList, VectorEnv
from clbench.errors import ContractError
from clbench.rng import get_global_state
from clbench.testing import check_env
from clbench.testing.core import difference
from clbench.testing.envs import ENV_CHECKS
from clbench.testing.fixtures import ALL_FIXTURES, ToyVectorEnv

LIST = TaskList.from_seeds(3)


@pytest.mark.parametrize("fixture", ALL_FIXTURES, ids=lambda f: f.name)
def test_the_toy_environment_passes_in_every_kind(fixture):
    kinds = {"discrete": fixture.discrete, "pixels": fixture.pixels, "goal": fixture.goal}
    report = check_env(ToyVectorEnv, success=True, evaluation=LIST, **kinds)
    report.raise_if_failed()
    assert all(r.status == "passed" for r in report.results)
    assert isinstance(fixture.env(1), VectorEnv)


def test_a_gymnasium_environment_passes_by_its_id():
    check_env("CartPole-v1", steps=8).raise_if_failed()


def test_checking_leaves_the_process_wide_generators_alone():
    before = get_global_state()
    check_env(ToyVectorEnv)
    assert difference(before, get_global_state()) is None


class NoSpaces(ToyVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.single_action_space


class NoRender(ToyVectorEnv):
    render = property()  # type: ignore[assignment]


class FailsInStep(ToyVectorEnv):
    def step(self, actions):
        raise KeyError("door")


class DoubleObservation(ToyVectorEnv):
    def _observe(self):
        return super()._observe().double()


class OutsideSpace(ToyVectorEnv):
    def _observe(self):
        return super()._observe() * 3


class ForgetsBatch(ToyVectorEnv):
    def _observe(self):
        return super()._observe()[0]


class ArrayObservation(ToyVectorEnv):
    def _observe(self):
        return super()._observe().numpy()


class NoGoalKey(ToyVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "goal": True})

    def _observe(self):
        obs = super()._observe()
        return {k: v for k, v in obs.items() if k != "desired_goal"}


class FloatDone(ToyVectorEnv):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward, terminated.float(), truncated, info


class InfiniteReward(ToyVectorEnv):
    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        return obs, reward / 0, terminated, truncated, info


class NoSuccess(ToyVectorEnv):
    def step(self, actions):
        *answer, info = super().step(actions)
        return *answer, {k: v for k, v in info.items() if k != "is_success"}


class NeverTruncates(ToyVectorEnv):
    def step(self, actions):
        self.steps = torch.zeros_like(self.steps)
        return super().step(actions)


class TruncatesEarly(ToyVectorEnv):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_episode_steps = 8

    def _success(self):
        return torch.zeros_like(super()._success())

    def step(self, actions):
        self.steps = self.steps + 1
        return super().step(actions)


class FinalIsNew(ToyVectorEnv):
    def step(self, actions):
        obs, *rest, info = super().step(actions)
        return obs, *rest, {**info, "final_obs": obs} if "final_obs" in info else info


class SuccessOfNewEpisode(ToyVectorEnv):
    def step(self, actions):
        *rest, info = super().step(actions)
        return *rest, {**info, "is_success": self._success()}


class NoFinal(ToyVectorEnv):
    def step(self, actions):
        *rest, info = super().step(actions)
        info.pop("_final_obs", None)
        return *rest, info


class IgnoresMask(ToyVectorEnv):
    def _start(self, mask):
        super()._start(torch.ones_like(mask))


class MaskKeepsSteps(ToyVectorEnv):
    """A row that was reset by mask keeps part of its old state."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.push = torch.zeros(self.num_envs, 2)

    def step(self, actions):
        self.push = self.push + 0.01
        self.position = (self.position + self.push).clamp(-1, 1)
        return super().step(actions)


class RowIndexInSeed(ToyVectorEnv):
    def reset(self, *, seed=None, options=None):
        if isinstance(seed, list) and options is None:
            seed = [s + i for i, s in enumerate(seed)]
        return super().reset(seed=seed, options=options)


class OwnGenerator(ToyVectorEnv):
    made = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        OwnGenerator.made += 1
        self.noise = torch.Generator().manual_seed(OwnGenerator.made)

    def step(self, actions):
        self.position = (self.position + 0.01 * torch.randn(self.position.shape, generator=self.noise)).clamp(-1, 1)
        return super().step(actions)


class GlobalNoise(ToyVectorEnv):
    def reset(self, *, seed=None, options=None):
        np.random.rand()  # noqa: NPY002
        return super().reset(seed=seed, options=options)


class ForgetsSteps(ToyVectorEnv):
    def state_dict(self):
        return {k: v for k, v in super().state_dict().items() if k != "steps"}


class ArrayState(ToyVectorEnv):
    def state_dict(self):
        return {k: v.numpy() for k, v in super().state_dict().items()}


class KeepsLoaded(ToyVectorEnv):
    def load_state_dict(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    def step(self, actions):
        self.steps += 1
        self.steps -= 1
        self.position.mul_(0.99)
        return super().step(actions)


class ChangesActions(ToyVectorEnv):
    def step(self, actions):
        return super().step(actions.clamp_(-0.1, 0.1))


class Buffered(ToyVectorEnv):
    def _observe(self):
        obs = super()._observe()
        if not hasattr(self, "buffer"):
            self.buffer = obs
        return self.buffer.copy_(obs)


class NoReset(ToyVectorEnv):
    def reset(self, *, seed=None, options=None):
        if options and "example" in options:
            raise ValueError("unknown option 'example'")
        return super().reset(seed=seed, options=options)


class GreyPicture(ToyVectorEnv):
    def render(self):
        return super().render()[..., 0]


class SilentRender(ToyVectorEnv):
    def render(self):
        raise NotImplementedError


BROKEN: list[tuple[Any, str, str]] = [
    (
        NoSpaces,
        "it has spaces, a size, a device and an autoreset mode",
        "single_action_space is None; set it to a Gymnasium",
    ),
    (NoRender, "it has spaces, a size, a device and an autoreset mode", "has no render; see clbench.VectorEnv"),
    (DoubleObservation, "reset gives observations inside the space", "float64, but its space says float32; change one"),
    (OutsideSpace, "reset gives observations inside the space", "outside its space .*; widen the space or clamp"),
    (
        ForgetsBatch,
        "reset gives observations inside the space",
        r"shape \(3,\), expected \(1, 3\): one row per environment",
    ),
    (ArrayObservation, "reset gives observations inside the space", "is a ndarray; return torch tensors"),
    (NoGoalKey, "reset gives observations inside the space", "expected a dict with the keys .*'desired_goal'"),
    (
        FailsInStep,
        "step gives five answers of the right shapes and types",
        r"FailsInStep.step raised KeyError: 'door' \(test_",
    ),
    (
        FloatDone,
        "step gives five answers of the right shapes and types",
        r"terminated is \(1,\) torch.float32, expected",
    ),
    (InfiniteReward, "step gives five answers of the right shapes and types", "rewards must be finite"),
    (NoSuccess, "info['is_success'] is a boolean per row", "add a .B,. bool tensor to every step"),
    (NeverTruncates, "episodes end by max_episode_steps", "went on after max_episode_steps=8 steps; set truncated"),
    (TruncatesEarly, "episodes end by max_episode_steps", "truncated after 4 of 8 steps"),
    (FinalIsNew, "finished rows are reset inside the step", "not the last observation of its episode; take it before"),
    (SuccessOfNewEpisode, "finished rows are reset inside the step", "speaks of the new episode; compute it before"),
    (NoFinal, "finished rows are reset inside the step", "add both to every step"),
    (IgnoresMask, "reset_mask resets only the masked rows", "changed rows outside the mask"),
    (MaskKeepsSteps, "reset_mask resets only the masked rows", "goes on differently than a new episode"),
    (RowIndexInSeed, "an episode is a function of its seed alone", "derive all randomness of a row from seed"),
    (OwnGenerator, "the same seeds and actions give the same episodes", "draw all randomness from the seed of reset"),
    (GlobalNoise, "it uses no process-wide random numbers", "used the process-wide generator of numpy"),
    (ForgetsSteps, "state_dict continues bit for bit in the middle of episodes", "save every tensor that step reads"),
    (
        ArrayState,
        "state_dict continues bit for bit in the middle of episodes",
        "is a numpy.ndarray; store only tensors",
    ),
    (
        KeepsLoaded,
        "state_dict continues bit for bit in the middle of episodes",
        "changed the given state.*copy what you keep",
    ),
    (ChangesActions, "step does not change its actions", "changed the actions that it was given"),
    (Buffered, "what a step returned does not change later", "return new tensors"),
    (NoReset, "the evaluation list can be played", "NoReset.reset raised ValueError: unknown option 'example'"),
    (GreyPicture, "render gives pictures of all rows", r"expected \(3, H, W, 3\) uint8"),
    (SilentRender, "render gives pictures of all rows", "without a message; say what the user should do"),
]


@pytest.mark.parametrize(("cls", "check", "message"), BROKEN, ids=[b[0].__name__ for b in BROKEN])
def test_a_broken_environment_is_caught_with_advice(cls, check, message):
    evaluation = TaskList("with-options", (1, 2, 3), {"example": (0, 1, 2)})
    report = check_env(cls, success=True, evaluation=evaluation)
    assert check in {r.name for r in report.failures}
    with pytest.raises(ContractError, match=message):
        report.raise_if_failed()


def test_every_check_has_a_broken_environment():
    assert {check for _, check, _ in BROKEN} == {c.name for c in ENV_CHECKS}


def test_an_unregistered_id_is_a_failure_with_the_nearest_name():
    report = check_env("CartPole-v7")
    assert "CartPole-v1" in report.text() and not report.ok
