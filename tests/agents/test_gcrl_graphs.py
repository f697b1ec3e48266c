"""Updates in graphs are the updates: same parameters, moments, targets and generator. On a CPU, recording is played by
running again: what is tested there is what is recorded, when, and what happens around it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from clbench.agents.gcrl import base, compiled, graphs
from clbench.agents.gcrl.base import GoalAgent, GoalBatch
from clbench.bench.updates import METHODS, make_agent, point_maze_like
from clbench.contracts import Experience
from clbench.data.dataset import OfflineDataset, map_obs
from clbench.errors import ConfigError

DATA = point_maze_like(2, 2, episodes=6, steps=30)
K = 4
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def fresh(method: str = "gcivl", device: str = "cpu", **options: Any) -> GoalAgent:
    agent = make_agent(method, DATA.to(device), device=device, **{"hidden": (16, 16), "batch_size": 12, **options})
    assert isinstance(agent, GoalAgent)
    return agent


def generator(device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def train(agent: GoalAgent, budget: int, rng: torch.Generator, data: OfflineDataset = DATA) -> list[dict[str, float]]:
    return [dict(x) for x in agent.learn(Experience(dataset=data.to(agent.device)), budget, rng=rng)]


class Tape:
    """Stands for graphs: counts what is recorded, and runs at each replay; recording itself runs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.recorded: list[bool] = []  # whether Adam was told
        self.replayed = 0
        self.agent: Any = None
        monkeypatch.setattr(base, "recordable", lambda device: True)
        monkeypatch.setattr(graphs, "record", self.record)

    def record(self, run: Callable[[], None], rng: torch.Generator, stream: Any) -> Callable[[], None]:
        self.recorded.append(all(g["capturable"] for g in self.agent.optimizer.param_groups))
        kept = self.agent.optimizer.param_groups  # the kernel that was recorded does not ask again

        def replay() -> None:
            self.replayed += 1
            assert kept is self.agent.optimizer.param_groups, "a graph of another optimiser"
            run()

        return replay


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    return Tape(monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_a_rest_equal_single_updates(method: str, tape: Tape, tiny: Any) -> None:
    """4 + 4 + 4 + 3 of 15: the first is the warm-up, two are replayed, the rest is done one by one."""
    one, other = fresh(method), fresh(method, updates_per_graph=K)
    tape.agent = other
    rng, rng_other = generator(), generator()
    plain, blocks = train(one, 15, rng), train(other, 15, rng_other)
    assert [x["step"] for x in blocks] == [4, 8, 12, 13, 14, 15]
    assert len(tape.recorded) == 1 and tape.replayed == 2
    assert tiny.same(one.state_dict(), other.state_dict()) and one.costs() == other.costs()
    assert torch.equal(rng.get_state(), rng_other.get_state())
    assert plain[-1] == blocks[-1]


def test_losses_are_of_the_last_update_of_a_block(tape: Tape) -> None:
    one, other = fresh(log_every=1), fresh(log_every=6, updates_per_graph=K)
    tape.agent = other
    plain, blocks = train(one, 24, generator()), train(other, 24, generator())
    # 6, 12, 18 and 24 have passed at 8, 12, 20, 24
    assert [x["step"] for x in blocks if len(x) > 1] == [8, 12, 20, 24]
    assert all(x == plain[int(x["step"]) - 1] for x in blocks if len(x) > 1)


def test_few_updates_in_a_graph_are_warmed_up_longer(tape: Tape) -> None:
    tape.agent = agent = fresh(updates_per_graph=2)
    train(agent, 10, generator())
    assert len(tape.recorded) == 1 and tape.replayed == 3  # 2 + 2 before it


def test_adam_is_marked_only_while_it_is_recorded(tape: Tape) -> None:
    tape.agent = agent = fresh(updates_per_graph=K)
    train(agent, 8, generator())
    assert tape.recorded == [True]
    assert not any(g["capturable"] for g in agent.optimizer.param_groups)


@pytest.mark.parametrize("change", ["data", "task", "state", "state within"])
def test_what_is_replaced_is_recorded_again(change: str, tape: Tape, tiny: Any) -> None:
    """New data, fresh moments, or another state: equal to an agent without graphs, and a second recording."""
    agents = fresh("gcivl"), fresh("gcivl", updates_per_graph=K)
    tape.agent, other = agents[1], point_maze_like(2, 2, episodes=4, steps=25)
    for agent in agents:
        rng = generator()
        if change == "state within":
            for info in agent.learn(Experience(dataset=DATA), 24, rng=rng):
                if info["step"] == 12:
                    agent.load_state_dict(tiny.through_file(agent.state_dict()))
            continue
        train(agent, 12, rng)
        if change == "task":
            agent.start_task(None)  # type: ignore[arg-type]
        if change == "state":
            agent.load_state_dict(tiny.through_file(agent.state_dict()))
        train(agent, 12, rng, other if change == "data" else DATA)
    assert tiny.same(agents[0].state_dict(), agents[1].state_dict())
    assert len(tape.recorded) == 2


def test_negative_control_a_graph_of_replaced_tensors_is_noticed(tape: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.UpdateGraph, "_forget", lambda self, once=graphs.UpdateGraph._forget: (
        None if hasattr(self, "_replay") else once(self)))  # fmt: skip
    tape.agent = agent = fresh(updates_per_graph=K)
    with pytest.raises(AssertionError, match="another optimiser"):
        for info in agent.learn(Experience(dataset=DATA), 24, rng=generator()):
            if info["step"] == 12:
                agent.load_state_dict(agent.state_dict())


@pytest.mark.parametrize("stop", [4, 8, 13])
def test_a_run_that_stops_goes_on_as_if_it_had_not(stop: int, tape: Tape, tiny: Any) -> None:
    """Between any two yields everything is in the agent's state and the generator's."""
    tape.agent = whole = fresh("hilp", updates_per_graph=K)
    rng = generator()
    train(whole, 15, rng)
    first, rng_first = fresh("hilp", updates_per_graph=K), generator()
    tape.agent = first
    for info in first.learn(Experience(dataset=DATA), 15, rng=rng_first):
        if info["step"] == stop:
            break
    second, rng_second = fresh("hilp", updates_per_graph=K), generator()
    second.load_state_dict(tiny.through_file(first.state_dict()))
    rng_second.set_state(rng_first.get_state())
    tape.agent = second
    train(second, 15 - stop, rng_second)
    assert tiny.same(whole.state_dict(), second.state_dict())
    assert torch.equal(rng.get_state(), rng_second.get_state())


@pytest.mark.parametrize("broken", ["generator", "targets"])
def test_negative_control_what_is_not_recorded_is_noticed(broken: str, tape: Tape, tiny: Any) -> None:
    one, other = fresh(tau=0.5), fresh(tau=0.5, updates_per_graph=K)
    tape.agent = other
    rng, rng_other = generator(), generator()
    train(one, 12, rng)
    record = tape.record

    def without(run: Callable[[], None], rng: torch.Generator, stream: Any) -> Callable[[], None]:
        state, replay = rng.get_state(), record(run, rng, stream)

        def partly() -> None:
            before = [p.clone() for p in other.networks["target_value"].parameters()]
            if broken == "generator":
                rng.set_state(state)  # as a generator that was not registered
            replay()
            if broken == "targets":
                for p, old in zip(other.networks["target_value"].parameters(), before, strict=True):
                    p.data.copy_(old)

        return partly

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "record", without)
        train(other, 12, rng_other)
    assert not tiny.same(one.state_dict(), other.state_dict())


def test_on_a_cpu_updates_are_single(tiny: Any) -> None:
    one, other = fresh(), fresh(updates_per_graph=K)
    plain, same = train(one, 9, generator()), train(other, 9, generator())
    assert plain == same and [x["step"] for x in same] == list(range(1, 10))
    assert tiny.same(one.state_dict(), other.state_dict())


def test_refused() -> None:
    with pytest.raises(ConfigError, match="updates_per_graph must be at least 0, got -1"):
        fresh(updates_per_graph=-1)
    with pytest.raises(
        ConfigError, match="'hilp-zero-shot' cannot be recorded as a CUDA graph.*updates_per_graph to 0"
    ):
        fresh("hilp-zero-shot", updates_per_graph=K)
    fresh("hilp-zero-shot", updates_per_graph=1)


def on_meta(data: OfflineDataset) -> OfflineDataset:
    new = copy.copy(data)
    for name, value in vars(data).items():
        if isinstance(value, torch.Tensor | dict):
            setattr(new, name, map_obs(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, value))
    return new


@pytest.fixture
def on_gpu_like(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], GoalBatch]:
    """Samples, evaluates the loss and goes backward on the meta device, where nothing can be read: what a GPU need not
    wait for. Only Polyak and Adam are left out."""

    def update(method: str) -> GoalBatch:
        agent = fresh(method)
        agent.prepare(DATA)
        assert agent._encoded is not None
        meta = on_meta(DATA)
        agent._encoded = meta, on_meta(agent._encoded[1])
        agent.device, agent.networks = torch.device("meta"), agent.networks.to("meta")
        for name in ("randint", "rand", "randn"):  # a generator has no meta device
            draw = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda *a, draw=draw, generator, **k: draw(*a, **{**k, "device": "meta"}))
        batch = agent.sample(meta, generator())
        agent.loss(batch)[0].backward()
        return batch

    return update


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_what_was_drawn(method: str, on_gpu_like: Callable[[str], GoalBatch]) -> None:
    agent = fresh(method)
    agent.prepare(DATA)
    kinds = [[(x.shape, x.dtype) for x in tree_leaves(vars(batch)) if x is not None]
             for batch in (agent.sample(DATA, generator()), on_gpu_like(method))]  # fmt: skip
    assert kinds[0] == kinds[1] and len(kinds[0]) >= 8


def test_negative_control_shapes_that_depend_on_values_are_noticed(
    on_gpu_like: Callable[[str], GoalBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    following = OfflineDataset.next_observation

    def as_on_a_cpu(self: OfflineDataset, index: torch.Tensor) -> Any:
        rows = (index == self.final[index]).nonzero()[:, 0]
        return following(self, index) if len(rows) else self.observation(index)

    monkeypatch.setattr(OfflineDataset, "next_observation", as_on_a_cpu)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        on_gpu_like("gcivl")


@pytest.mark.parametrize("method", METHODS)
def test_next_states_are_looked_up_where_the_loss_needs_them(method: str) -> None:
    agent = fresh(method)
    agent.prepare(DATA)
    batch = agent.sample(DATA, generator())
    other = dataclasses.replace(batch, s_next=batch.g_v, achieved_next=batch.g_v)
    assert (float(agent.loss(batch)[0]) != float(agent.loss(other)[0])) == agent.looks_ahead


# -- compiled ------------------------------------------------------------------------------------------------------------


def test_a_loss_that_cannot_be_compiled_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, **options, backend=broken))
    compiled._compiled.cache_clear()
    with pytest.raises(ConfigError, match="'gcbc': the loss could not be compiled .*No working.*leave compile off"):
        train(fresh("gcbc", compile=True), 1, generator())
    compiled._compiled.cache_clear()


@pytest.mark.slow
def test_without_a_compiler() -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match="No working C.. compiler.*install one, or leave compile off"),
    ):
        train(fresh("gcbc", compile=True, batch_size=13), 1, generator())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_loss_is_one_graph(method: str, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """Traced as a whole, and once for all agents of one configuration; what is traced computes the same."""
    traced = []

    def backend(graph: Any, example: Any) -> Any:
        traced.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, **options, backend=backend))
    compiled._compiled.cache_clear()
    for _ in range(2):
        one, other = fresh(method), fresh(method, compile=True)
        train(one, 3, generator())
        train(other, 3, generator())
        assert tiny.same(one.state_dict(), other.state_dict())
    assert len(traced) == 1
    compiled._compiled.cache_clear()


@pytest.mark.slow
def test_a_compiled_loss_trains_the_same() -> None:
    one, other = fresh("gcivl"), fresh("gcivl", compile=True)
    plain, fused = train(one, 4, generator()), train(other, 4, generator())
    assert plain[-1] == pytest.approx(fused[-1], rel=1e-4)
    for p, q in zip(one.networks.parameters(), other.networks.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# -- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("method", METHODS)
def test_gpu_graphs_make_the_updates(method: str) -> None:
    """Same generator, same updates: graphs, single updates on the GPU."""
    one, other = fresh(method, "cuda"), fresh(method, "cuda", updates_per_graph=K)
    rng, rng_other = generator("cuda"), generator("cuda")
    plain, blocks = train(one, 15, rng), train(other, 15, rng_other)
    assert [x["step"] for x in blocks] == [4, 8, 12, 13, 14, 15]
    assert torch.equal(rng.get_state(), rng_other.get_state())
    assert one.costs() == other.costs()
    for p, q in zip(one.networks.parameters(), other.networks.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert plain[-1] == pytest.approx(blocks[-1], rel=1e-2, abs=1e-3)


@pytest.mark.gpu
@CUDA
def test_gpu_graphs_with_a_compiled_loss() -> None:
    one, other = fresh("gcivl", "cuda"), fresh("gcivl", "cuda", updates_per_graph=K, compile=True)
    train(one, 12, generator("cuda"))
    train(other, 12, generator("cuda"))
    for p, q in zip(one.networks.parameters(), other.networks.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
