"""Which methods may be together, and that guarantees survive the company of others."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import clbench
from clbench.agents.continual.memory import Memory
from clbench.agents.continual.method import restore_generator
from clbench.agents.continual.packnet import PackNet
from clbench.errors import ConfigError


class NotLast(PackNet):
    """Broken: comes where it is listed, so that a later method may change what it has put back."""

    last = False


def change(lab: SimpleNamespace, methods: list[Any], **options: Any) -> float:
    """Largest change of the first task's outputs under its view by two more tasks."""
    name = next(m if isinstance(m, str) else m.__name__ for m in methods if m == "packnet" or not isinstance(m, str))
    agent: Any = lab.composed("bc", methods, agent={"hidden": (16,), "lr": 0.01, "batch_size": 8},
                              **{name: {"tasks": 3}}, **options)  # fmt: skip
    packnet = next(m for m in agent.methods.values() if isinstance(m, PackNet))
    x = lab.data(0).observations

    def outputs() -> torch.Tensor:
        view = packnet.view(0)
        assert view is not None
        with view:
            return agent.agent.policy(x).clone()

    lab.phase(agent, lab.data(0), 60, 0)
    lab.phase(agent, lab.data(1), 1, 1)
    before = outputs()
    lab.phase(agent, lab.data(1), 60, 2)
    return float((outputs() - before).abs().max())


ACTIVE = {"cbp": {"rho": 0.05, "maturity": 1}, "redo": {"every": 5, "tau": 1.0}, "shrink_perturb": {"decay": 0.1}}


@pytest.mark.parametrize("other", ["shrink-perturb", "cbp", "redo", "upgd", "er", "ewc"])
@pytest.mark.parametrize("first", [True, False])
def test_packnet_keeps_its_word_beside_others(lab: SimpleNamespace, other: str, first: bool) -> None:
    field = other.replace("-", "_")
    options = {field: ACTIVE[field]} if field in ACTIVE else {}
    assert change(lab, ["packnet", other] if first else [other, "packnet"], **options) == 0


@pytest.mark.parametrize("other", ["shrink-perturb", "cbp", "redo"])
def test_without_the_last_word_it_could_not(lab: SimpleNamespace, other: str) -> None:
    field = other.replace("-", "_")
    assert change(lab, [NotLast, other], **{field: ACTIVE[field]}) > 0


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (["packnet", "shrink-perturb-task"], {}, "weights that finished tasks own must stay"),
        (["shrink-perturb-task", "packnet"], {}, "weights that finished tasks own must stay"),
        (["packnet", "shrink-perturb"], {"shrink_perturb": {"when": "task"}}, "weights that finished tasks own"),
        (["er", "uer"], {}, "UER has a memory of its own"),
        (["upgd", "upgd-feature"], {}, "choose one"),
    ],
)
def test_what_cannot_be_together_is_refused(lab: SimpleNamespace, methods: list[str], options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        lab.composed("bc", methods, **options)


def test_the_empirical_fisher_needs_a_loss_of_single_samples(lab: SimpleNamespace) -> None:
    from gymnasium.spaces import Box, Dict

    from clbench.contracts import Spaces

    point = Box(-1, 1, (2,))
    spaces = Spaces(Dict(observation=point, achieved_goal=point, desired_goal=point), Box(-1, 1, (2,)))
    for agent in ("pldm", "crl"):
        with pytest.raises(ConfigError, match="compares samples with each other"):
            lab.composed(agent, ["ewc-empirical"], spaces=spaces)
        lab.composed(agent, ["ewc"], spaces=spaces)


def test_a_head_belongs_to_its_task_as_a_whole(lab: SimpleNamespace) -> None:
    """With several output layers; the one layer of several tasks is shared."""
    for heads, whole in ((3, True), (1, False)):
        agent: Any = lab.composed("bc", ["packnet"], agent={"hidden": (16,), "heads": heads}, packnet={"tasks": 3})
        lab.phase(agent, lab.data(0).with_task(0 if heads > 1 else None), 30, 0)
        owner = agent.methods["packnet"].owner
        place = [id(p) for p in agent.trainables].index(id(agent.agent.policy.output_layers[0].weight))
        assert bool((owner[place] == 1).all()) == whole


def test_more_tasks_than_rows(lab: SimpleNamespace) -> None:
    """Each task has the same chance of being among those that are remembered (else the first fill the memory)."""
    tasks, size, seeds = 24, 6, 400
    kept: Counter[int] = Counter()
    for seed in range(seeds):
        memory, rng = Memory(size, "task"), lab.generator(seed)
        for task in range(tasks):
            memory.start_group()
            memory.add(torch.full((5,), task), rng)
        drawn = memory.sample(size, rng).tolist()
        assert len(drawn) == len(set(drawn)) == size
        kept.update(drawn)
    expected = seeds * size / tasks
    chi2 = sum((kept[t] - expected) ** 2 / expected for t in range(tasks))
    assert chi2 < 60, kept  # 23 degrees of freedom: 1e-4 of samples are above 56


def test_a_world_model_counts_transitions(lab: SimpleNamespace) -> None:
    """Replayed windows are counted in the unit of the agent's own samples."""
    from clbench.agents.pldm import PLDM

    observations, actions = torch.zeros(4, 9, 2), torch.zeros(4, 8, 2)
    assert PLDM.samples_in((observations, actions)) == 32


def test_a_generator_of_another_kind_of_device(lab: SimpleNamespace) -> None:
    """A GPU's state (16 bytes) seeds a CPU's generator, always the same way; a state of its own kind is taken as it is."""
    foreign = torch.arange(16, dtype=torch.uint8)
    first, second, own = lab.generator(1), lab.generator(2), lab.generator(3)
    restore_generator(first, foreign)
    restore_generator(second, foreign)
    assert first.get_state().equal(second.get_state())
    restore_generator(first, own.get_state())
    assert first.get_state().equal(own.get_state())


def test_costs_of_fresh_agents_are_added_up(tmp_path: Any) -> None:
    common = {"method": "er", "budget": 8, "eval_every": 0, "tensorboard": False, "stream_options": {"tasks": 3}}
    cost = [
        clbench.run("digits-permuted", "bc", protocol=p, out=tmp_path / p, **common).results["cost"]  # type: ignore[arg-type]
        for p in ("sequential", "independent")
    ]
    # each of three fresh agents has nothing to replay in its first update
    assert cost[0]["extra_forward_samples"] == cost[1]["extra_forward_samples"] + 2 * 64


@pytest.mark.parametrize("option", [{"compile": True}, {"updates_per_graph": 4}])
def test_updates_that_would_go_past_the_methods_are_refused(lab: SimpleNamespace, option: Any) -> None:
    from gymnasium.spaces import Box, Dict

    from clbench.contracts import Spaces

    point = Box(-1, 1, (2,))
    spaces = Spaces(Dict(observation=point, achieved_goal=point, desired_goal=point), Box(-1, 1, (2,)))
    with pytest.raises(ConfigError, match="cannot compile its loss or record its updates"):
        lab.composed("gcbc", ["er"], spaces=spaces, agent=option)
    lab.composed("gcbc", ["er"], spaces=spaces)
