"""PackNet: tasks that are over give the same numbers bit for bit, whatever is trained later, and capacity adds up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor

from clbench.agents.continual.packnet import PackNet, is_matrix
from clbench.agents.jepa.layers import StackedLayerNorm, StackedLinear
from clbench.contracts import Experience, Spaces, TaskInfo
from clbench.data.dataset import OfflineDataset
from clbench.errors import ConfigError

ADAM = {"optimizer": "adam", "lr": 0.03, "weight_decay": 0.1}
SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


class Forgetful(PackNet):
    """Broken: weights are not put back after the optimiser's step."""

    def after_step(self, params: Any) -> None:
        if self.now and self.learner.progress >= self.config.prune_at:
            self._pack()


class Drifting(PackNet):
    """Broken: biases go on learning after the first task."""

    def _learns(self, i: int) -> Tensor:
        assert self.matrix is not None
        return super()._learns(i) | (not self.matrix[i])


def method(agent: Any) -> Any:
    return next(iter(agent.methods.values()))


@contextlib.contextmanager
def seen(agent: Any, task: int | None) -> Any:
    """The network as it is to act on a task."""
    with torch.no_grad(), method(agent).view(task) or contextlib.nullcontext():
        yield


def name_of(cls: Any) -> str:
    return "packnet" if cls == "packnet" else f"{cls.__module__}:{cls.__qualname__}".rpartition(":")[2]


def toy(lab: SimpleNamespace, cls: Any = "packnet", base: Any = None, agent: Any = None, **options: Any) -> Any:
    more = {name_of(cls): {"tasks": 4, **options}}
    return lab.composed(base or lab.Toy, [cls], agent=agent or {}, **more)


def changed(lab: SimpleNamespace, agent: Any, tasks: Sequence[int], outputs: Any, data: Any = None) -> tuple[set, set]:
    """Trains tasks one after the other. Finished tasks whose outputs changed: under their view, and without it."""
    before: dict[int, Tensor] = {}
    under, without = set(), set()
    for k in tasks:
        lab.phase(agent, (data or lab.data)(k).with_task(k), 12, k, rng=k)
        with seen(agent, k):
            before.setdefault(k, outputs(agent, k))
        for old, values in before.items():
            with seen(agent, old):
                under |= set() if torch.equal(outputs(agent, old), values) else {old}
            without |= set() if torch.equal(outputs(agent, old), values) else {old}
    return under, without


def of_toy(agent: Any, task: int) -> Tensor:
    x = torch.rand(9, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return agent.net(x).detach()


def of_bc(agent: Any, task: int) -> Tensor:
    x = torch.rand(9, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return agent.policy(x, torch.full((9,), task)).detach()


# -- zero forgetting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ADAM, SGD], ids=["adam", "sgd"])
@pytest.mark.parametrize("base", ["Toy", "Several", "Hidden"])
@pytest.mark.parametrize("prune_at", [0.5, 1.0])
def test_finished_tasks_never_change(lab: SimpleNamespace, base: str, options: Any, prune_at: float) -> None:
    agent = toy(lab, base=getattr(lab, base), agent=options, prune_at=prune_at)
    under, without = changed(lab, agent, [2, 0, 1, 3], of_toy)
    assert not under
    assert without == {0, 1, 2}  # the weights of later tasks are there


@pytest.mark.parametrize("heads", [1, 4])
def test_finished_tasks_of_a_policy_never_change(lab: SimpleNamespace, heads: int) -> None:
    agent = toy(lab, base="bc", agent={"hidden": (8, 8), "heads": heads})
    under, without = changed(lab, agent, [2, 0, 1, 3], of_bc)
    assert not under
    assert without == {0, 1, 2}


@pytest.mark.parametrize("options", [ADAM, SGD], ids=["adam", "sgd"])
def test_a_step_that_is_not_undone_is_noticed(lab: SimpleNamespace, options: Any) -> None:
    """Gradients of 0 are not enough: momentum and weight decay move weights without one."""
    under, _ = changed(lab, toy(lab, Forgetful, agent=options), [2, 0, 1, 3], of_toy)
    assert under == {0, 1, 2}


def test_biases_that_go_on_learning_are_noticed(lab: SimpleNamespace) -> None:
    under, _ = changed(lab, toy(lab, Drifting), [2, 0, 1, 3], of_toy)
    assert under == {0, 1, 2}


POINT = Box(-1, 1, (2,), np.float32)
PLANE = Spaces(Dict(achieved_goal=POINT, desired_goal=POINT), Box(-0.3, 0.3, (2,), np.float32))
TINY: dict[str, Any] = {
    "window": 4, "batch_size": 16, "replan_every": 2, "weight_decay": 1e-2,
    "architecture": {"latent": 6, "encoder_hidden": (16,), "hidden": (16,)},
    "planner_options": {"horizon": 8, "samples": 32, "elites": 6, "iterations": 2},
}  # fmt: skip


def walks(task: int, episodes: int = 20, length: int = 8) -> OfflineDataset:
    """Random walks, later ones with longer steps and a turn."""
    rng = torch.Generator().manual_seed(task)
    angle = torch.rand(episodes, length, generator=rng) * math.pi + task
    actions = (0.05 + 0.05 * task) * torch.stack([angle.cos(), angle.sin()], 2)
    path = [torch.rand(episodes, 2, generator=rng) * 2 - 1]
    for t in range(length):
        path.append((path[-1] + actions[:, t]).clamp(-1, 1))
    rows = {"achieved_goal": torch.stack(path[:-1], 1).flatten(0, 1)}
    return OfflineDataset(rows, actions.flatten(0, 1), torch.full((episodes,), length), {"achieved_goal": path[-1]})


@pytest.mark.parametrize("members", [1, 2])
def test_a_world_model_predicts_and_plans_the_same(lab: SimpleNamespace, members: int) -> None:
    config = {**TINY, "architecture": {**TINY["architecture"], "members": members}}
    agent = lab.composed("pldm", ["packnet"], spaces=PLANE, agent=config, packnet={"tasks": 3})
    buffers: list[list[Tensor]] = []

    def plan(agent: Any, task: int) -> Tensor:
        """Latents that are predicted, and the actions of a planner with bounds that do not depend on the data."""
        agent.agent.largest_action = 0.0
        batch = walks(9).windows(torch.arange(0, 40, 8), 4)
        rng = torch.Generator().manual_seed(3)
        obs = {k: torch.rand(5, 2, generator=rng) * 2 - 1 for k in ("achieved_goal", "desired_goal")}
        actions, _ = agent.agent.act(obs, None, torch.ones(5, dtype=torch.bool), rng=rng)
        buffers.append([b.clone() for b in agent.model.buffers()])
        return torch.cat([*(o.values.flatten() for o in agent.outputs(batch)), actions.flatten()]).detach()

    under, without = changed(lab, agent, [0, 1, 2], plan, walks)
    assert not under
    assert without == {0, 1}
    # what the method cannot reach: the world model takes its normalisation from the first task, once
    assert buffers[0] and all(lab.equal(buffers[0], later) for later in buffers)


SB3: dict[str, dict[str, Any]] = {
    "sb3-ppo": {"rollout_steps": 16, "batch_size": 8, "n_epochs": 2, "hidden": (8,), "lr": 1e-2},
    "sb3-sac": {"buffer_size": 60, "learning_starts": 20, "batch_size": 8, "hidden": (8,), "lr": 1e-2},
}


@pytest.mark.parametrize("name", SB3)
def test_what_an_online_agent_does_on_finished_tasks_never_changes(
    lab: SimpleNamespace, tiny: SimpleNamespace, name: str
) -> None:
    env = tiny.Line(2)
    env.reset(seed=1)
    agent = lab.composed(name, ["packnet"], spaces=env.spaces, agent=SB3[name], packnet={"tasks": 3})
    obs = torch.rand(20, 2, generator=lab.generator(3)) * 2 - 1
    first, before = torch.ones(20, dtype=torch.bool), {}

    def act(task: int | None) -> Tensor:
        ids = None if task is None else torch.full((20,), task)
        return agent.act(obs, None, first, rng=lab.generator(0), task=ids)[0]

    for k in range(3):
        agent.start_task(TaskInfo(k))
        for _ in agent.learn(Experience(env=env), 48, rng=lab.generator(k)):
            pass
        agent.finish_task()
        before[k] = act(k)
        assert all(torch.equal(act(old), actions) for old, actions in before.items())
        assert all(not torch.equal(act(None), before[old]) for old in range(k))


# -- capacity -----------------------------------------------------------------------------------------------------------


def test_each_task_gets_its_share_of_what_is_free(lab: SimpleNamespace) -> None:
    agent, left = toy(lab), [24, 18]  # weights of the two layers: 4 x 6 and 6 x 3
    shares = []
    for k in range(4):
        lab.phase(agent, lab.data(k), 8, k)
        pack = method(agent)
        weights = [o for o, m in zip(pack.owner, pack.matrix) if m]
        shares.append([int((o == k + 1).sum()) for o in weights])
        assert shares[-1] == [-(-n // (4 - k)) for n in left]
        left = [n - s for n, s in zip(left, shares[-1])]
        for o, m, p in zip(pack.owner, pack.matrix, agent.trainables):
            if m:
                assert not p[o == 0].any()  # given back
                assert p[o == k + 1].any()
            else:
                assert bool((o == 1).all())  # biases are the first task's
        assert pack.metrics()["packnet_free"] == sum(left) / (24 + 18 + 6 + 3)
    assert left == [0, 0]
    assert max(max(s) for s in shares) - min(min(s) for s in shares) <= 2


def test_the_largest_weights_are_kept(lab: SimpleNamespace) -> None:
    agent = toy(lab, prune_at=1.0)  # so that weights are chosen at the very end
    lab.phase(agent, lab.data(0), 8, 0)
    agent.start_task(TaskInfo(1))
    lab.learn(agent, lab.data(1), 8)
    trained, owner = lab.weights(agent), [o.clone() for o in method(agent).owner]
    agent.finish_task()
    for p, before, o, m in zip(agent.trainables, trained, owner, method(agent).matrix):
        if m:
            free = before[o == 0]
            kept = p.detach()[o == 0] != 0
            assert free[kept].abs().min() >= free[~kept].abs().max()
            assert torch.equal(p.detach()[o == 0][kept], free[kept])
            assert torch.equal(p.detach()[o > 0], before[o > 0])


def test_what_is_kept_is_trained_for_the_rest_of_the_phase(lab: SimpleNamespace) -> None:
    agent = toy(lab, agent=ADAM, prune_at=0.5)
    agent.start_task(TaskInfo(0))
    nonzero, owners, weights = [], [], []
    learning = agent.learn(Experience(dataset=lab.data(0)), 20, rng=lab.generator(0))
    for _ in learning:
        weights.append(lab.weights(agent)[0])
        nonzero.append(int((weights[-1] != 0).sum()))
        owners.append(method(agent).owner[0].clone())
    assert nonzero == [24] * 10 + [6] * 10  # of 24 weights a quarter
    assert torch.equal(owners[10], owners[19])
    assert bool((weights[10] != weights[19])[owners[19] == 1].all())
    assert agent.method_costs()["extra_forward_samples"] == 0


def test_free_weights_learn_again(lab: SimpleNamespace) -> None:
    agent = toy(lab, agent={"lr": 0.3})
    for k in range(2):
        lab.phase(agent, lab.data(k), 300, k)
        x = lab.data(k).observations
        with seen(agent, k):
            accuracy = (agent.net(x).argmax(1) == lab.data(k).actions).float().mean()
        assert accuracy > 0.85
    with seen(agent, 0):
        x = lab.data(1).observations
        assert (agent.net(x).argmax(1) == lab.data(1).actions).float().mean() < 0.7  # the first task's weights cannot


def test_one_task_too_many(lab: SimpleNamespace) -> None:
    agent = toy(lab, tasks=2)
    for k in range(2):
        lab.phase(agent, lab.data(k), 2, k)
    agent.start_task(TaskInfo(0))  # a task that comes again needs no room
    agent.finish_task()
    with pytest.raises(ConfigError, match=r"room for 2 tasks, and task 7 is one more; raise tasks\."):
        agent.start_task(TaskInfo(7))


def test_a_phase_without_a_task_id(lab: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="must be told which"):
        toy(lab).start_task(TaskInfo())


def test_a_task_that_comes_again_changes_nothing(lab: SimpleNamespace) -> None:
    agent = toy(lab, agent=ADAM)
    for k in range(2):
        lab.phase(agent, lab.data(k), 8, k)
    before, state = lab.weights(agent), method(agent).state_dict()
    lab.phase(agent, lab.data(5), 8, 0)
    assert lab.equal(before, lab.weights(agent))
    assert lab.equal(state["owner"], method(agent).owner)
    lab.phase(agent, lab.data(2), 8, 2)
    assert method(agent).order == [0, 1, 2]


def test_output_layers_of_other_tasks_stay_whole_and_free(lab: SimpleNamespace) -> None:
    agent = toy(lab, base="bc", agent={"hidden": (8,), "heads": 3})
    heads = [list(layer.parameters()) for layer in agent.policy.output_layers]
    place = {id(p): i for i, p in enumerate(agent.trainables)}
    fresh = [[p.detach().clone() for p in head] for head in heads]
    for k in range(3):
        lab.phase(agent, lab.data(k).with_task(k), 8, k)
        for other in range(3):
            owners = [method(agent).owner[place[id(p)]] for p in heads[other]]
            if other > k:
                assert lab.equal(fresh[other], [p.detach() for p in heads[other]])
                assert not any(o.any() for o in owners)
            else:
                assert all(bool((o == other + 1).all()) for o in owners)


# -- views --------------------------------------------------------------------------------------------------------------


def test_each_row_acts_with_the_weights_of_its_task(lab: SimpleNamespace) -> None:
    agent = toy(lab, base=lab.Toy)
    for k in range(3):
        lab.phase(agent, lab.data(k), 40, k)
    before = lab.weights(agent)
    x = torch.rand(200, 4, generator=lab.generator(1)) * 2 - 1
    task = torch.arange(200) % 4  # one of them was never trained

    def act(task: Tensor | None) -> Tensor:
        return agent.act(x, None, torch.ones(200, dtype=torch.bool), rng=lab.generator(0), task=task)[0]

    alone = torch.stack([act(torch.full((200,), k)) for k in range(4)])
    assert torch.equal(act(task), alone[task, torch.arange(200)])
    assert len({tuple(a.tolist()) for a in alone[:3]}) == 3
    assert torch.equal(alone[3], agent.net(x).argmax(1)) and torch.equal(act(None), alone[3])
    assert lab.equal(before, lab.weights(agent))


def test_the_probe_sees_each_row_with_the_weights_of_its_task(lab: SimpleNamespace) -> None:
    class Probed(lab.Toy):
        def probe(self, obs: Tensor, task: Tensor | None = None) -> dict[str, Tensor]:
            return {"features": self.net.features(obs).detach()}

    agent = toy(lab, base=Probed)
    for k in range(3):
        lab.phase(agent, lab.data(k), 40, k)
    x, task = torch.rand(60, 4, generator=lab.generator(1)), torch.arange(60) % 3
    alone = torch.stack([agent.probe(x, torch.full((60,), k))["features"] for k in range(3)])
    assert torch.equal(agent.probe(x, task)["features"], alone[task, torch.arange(60)])
    assert not torch.equal(alone[0], alone[2])
    assert torch.equal(agent.probe(x)["features"], agent.net.features(x))  # no task: as it is
    assert not hasattr(toy(lab, base=lab.Toy), "probe")


def test_while_a_task_is_trained_it_sees_all_weights(lab: SimpleNamespace) -> None:
    agent = toy(lab)
    lab.phase(agent, lab.data(0), 8, 0)
    agent.start_task(TaskInfo(1))
    lab.learn(agent, lab.data(1), 3)
    with seen(agent, 1):
        under = of_toy(agent, 1)
    assert torch.equal(under, of_toy(agent, 1))
    with seen(agent, 0):
        assert not torch.equal(of_toy(agent, 0), under)


def test_biases_and_norms_are_told_from_weights(lab: SimpleNamespace) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=lab.generator(0))

    assert all(is_matrix(draw(*s)) for s in ((3, 2), (1, 5), (5, 2, 3), (4, 2, 3, 3), (4, 2, 1, 1)))
    assert not any(is_matrix(p) for p in (draw(3), draw(), draw(5, 1, 3), torch.zeros(5, 3), torch.ones(5, 3)))
    linear, norm = StackedLinear(3, 2, 4), StackedLayerNorm(3, 4)
    for p in (*linear.parameters(), *norm.parameters()):
        torch.nn.init.uniform_(p, generator=lab.generator(0))
    assert [is_matrix(p) for p in (*linear.parameters(), *norm.parameters())] == [True, False, False, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": 0}, "tasks must be from 1 to 255"),
        ({"tasks": 256}, "tasks must be from 1 to 255"),
        ({"prune_at": 0.0}, "prune_at must be"),
        ({"prune_at": 1.5}, "prune_at must be"),
        ({"prune_at": float("nan")}, "prune_at must be"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PackNet.Config(**options)
