"""Saving and loading at any moment, in another process too; copies, casts, rollbacks and crashes."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.agents.networks import eidetic
from clbench.agents.networks.eidetic.ownership import owned_parameters
from clbench.agents.networks.eidetic.verify import verify
from clbench.errors import ConfigError, ContractError


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same_state(lab: SimpleNamespace, a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(lab.same(a[k], b[k]) for k in a)


def at(lab: SimpleNamespace, moment: str, **options: Any) -> tuple[eidetic.EideticNetwork, Any]:
    """A network with two finished tasks at a moment of the third, and what watches the two."""
    torch.manual_seed(0)
    net = lab.Zoo("residual", "batch", **options)
    watch = lab.live(net, 2, steps=1, remember=True)
    if moment != "between tasks":
        t = net.begin_task(lab.generator(3))
        opt = lab.adamw(net.parameters())
        lab.step(net, opt, t, 0)
        if moment == "mid-prune":
            lab.prune(net, lab.generator(4))
            lab.step(net, opt, t, 1)
    return net, watch


MOMENTS = ("between tasks", "mid-training", "mid-prune")

SCRIPT = """
import importlib.util, sys, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("zoo", sys.argv[1])
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
from clbench.agents.networks.eidetic.verify import outputs, same, verify
for path in sys.argv[2:]:
    saved = torch.load(path, weights_only=True)
    net = zoo.Zoo("residual", "batch")
    net.load_state_dict(saved["net"])
    found = verify(net)
    assert found.ok and found.status["L1"] == "pass", found.to_dict()
    for task, (probes, expected) in saved["expected"].items():
        assert same(expected, [outputs(net, [p], task) for p in probes]), task
    # goes on as if nothing had happened: the same next step
    if net.begun:
        optimizer = zoo.adamw(net.parameters())
        zoo.step(net, optimizer, net.task, 7)
    else:
        net.begin_task(zoo.generator(7))
    now = net.state_dict()
    assert all(same(now[k], v) for k, v in saved["next"].items())
    net.committed and print("as before")
"""


def test_a_fresh_process_goes_on_from_any_moment(lab: SimpleNamespace, tmp_path: Path) -> None:
    files = []
    for moment in MOMENTS:
        net, watch = at(lab, moment)
        expected = {k: (probes, seen[0]) for k, (probes, seen) in watch.before.items()}
        state = copy.deepcopy(dict(net.state_dict()))
        if net.begun:
            lab.step(net, lab.adamw(net.parameters()), net.task, 7)
        else:
            net.begin_task(lab.generator(7))
        files.append(str(tmp_path / moment.replace(" ", "_")))
        torch.save({"net": state, "expected": expected, "next": dict(net.state_dict())}, files[-1])
    conftest = str(Path(__file__).with_name("conftest.py"))
    command = [sys.executable, "-c", SCRIPT, conftest, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as before") == 3


@pytest.mark.parametrize("moment", MOMENTS)
def test_states_survive_a_file_and_copies(lab: SimpleNamespace, moment: str) -> None:
    net, watch = at(lab, moment)
    state = through_file(net.state_dict())
    other = lab.Zoo("residual", "batch")
    other.load_state_dict(state)
    for it in (other, copy.deepcopy(net)):
        assert watch.changed(it) == [] and same_state(lab, it.state_dict(), net.state_dict())
        assert (it.begun, it.committed, it.digests) == (net.begun, net.committed, net.digests)
    # a copy is one: nothing done to it reaches the original
    before = copy.deepcopy(dict(net.state_dict()))
    if other.begun:
        lab.prune(other, lab.generator(5))
        other.commit()
    lab.live(other, 1, steps=1)
    assert same_state(lab, before, net.state_dict())


def test_loading_into_networks_in_any_condition(lab: SimpleNamespace) -> None:
    """Fresh; with tasks and heads of its own, more or fewer; mid-prune; wider state than network."""
    early = copy.deepcopy(dict(lab.Zoo("residual", "batch").state_dict()))
    net, watch = at(lab, "mid-prune")
    late = copy.deepcopy(dict(net.state_dict()))
    for moment, tasks in (("between tasks", 0), ("mid-prune", 0), ("mid-training", 2)):
        other, _ = at(lab, moment)
        if tasks:
            lab.prune(other, lab.generator(5))
            other.commit()
            lab.live(other, tasks, steps=1)
        other.load_state_dict(late)
        assert watch.changed(other) == [] and same_state(lab, late, other.state_dict())
        other.load_state_dict(early)
        assert same_state(lab, early, other.state_dict()) and len(other.out) == 0
        other.load_state_dict(late)
        assert watch.changed(other) == []
    net.widen({"a": 3, "r": 2}, lab.generator(0))
    other = lab.Zoo("residual", "batch")
    other.load_state_dict(through_file(net.state_dict()))
    assert other.spaces["a"].size == 19 and same_state(lab, net.state_dict(), other.state_dict())


def test_inside_an_ordinary_module(lab: SimpleNamespace) -> None:
    """Two networks in one module, with a prefix, next to layers of torch."""

    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = lab.Zoo("mlp", "prefix"), lab.Zoo("residual", "batch")
            self.other = nn.Linear(3, 3)

    agent, fresh = Agent(), Agent()
    watches = [lab.live(n, k) for n, k in ((agent.actor, 1), (agent.critic, 3))]
    agent.actor.begin_task(lab.generator(0))
    fresh.load_state_dict(through_file(agent.state_dict()))
    assert watches[0].changed(fresh.actor) == watches[1].changed(fresh.critic) == []
    assert (fresh.actor.begun, fresh.critic.begun, fresh.critic.committed) == (True, False, 3)
    assert torch.equal(fresh.other.weight, agent.other.weight)


def test_a_network_in_a_network(lab: SimpleNamespace) -> None:
    """The outer one counts the tasks for both."""

    class Outer(eidetic.EideticNetwork):
        def __init__(self) -> None:
            super().__init__()
            self.inner = lab.Zoo("mlp", "batch")
            y = self.inputs("y", 3)
            self.extra = self.heads(y, 3)

        def forward(self, x: Tensor, task: int) -> Tensor:
            return self.extra(x[:, :3], task) + self.inner(x, task)

    net = Outer()
    watch = lab.live(net, 3, remember=True)
    assert watch.changed(net) == [] and verify(net).ok
    other = Outer()
    other.load_state_dict(through_file(net.state_dict()))
    assert watch.changed(other) == []


def test_states_of_other_things_are_refused(lab: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match="no '_extra_state'"):
        lab.Zoo("mlp").load_state_dict({"a": torch.zeros(1)})


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_casting_before_the_first_commit(lab: SimpleNamespace) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        net = lab.Zoo("mlp", "batch").to(dtype)
        watch = lab.live(net, 2)
        assert watch.changed(net) == [] and {p.dtype for p in net.parameters()} == {dtype}


def test_another_dtype_is_refused_with_a_reason(lab: SimpleNamespace) -> None:
    net, watch = at(lab, "between tasks")
    state = copy.deepcopy(dict(net.state_dict()))
    with pytest.raises(ConfigError, match="would round"):
        lab.Zoo("residual", "batch").bfloat16().load_state_dict(state)
    cast = copy.deepcopy(net).bfloat16()
    assert verify(cast).status["L0"] == "skip" and "float32" in verify(cast).details["L0"]
    with pytest.raises(ConfigError, match="committed in torch.float32, it is torch.bfloat16"):
        cast.begin_task(lab.generator(0))
    # there and back through a wider type loses nothing, and is found to have lost nothing; through a narrower one it has
    assert verify(copy.deepcopy(net).double().float()).ok
    assert verify(cast.float()).status["L0"] == "fail"
    net.begin_task(lab.generator(0))
    net.double()
    with pytest.raises(ConfigError, match="Cannot commit"):
        net.commit()
    net.float().commit()
    assert watch.changed(net) == []


def test_casts_reach_the_protection_as_well(lab: SimpleNamespace) -> None:
    """A mask that was made before a cast must not be used after it."""
    net, _ = at(lab, "mid-prune")
    watch, wide = lab.Watch(), net.double()
    for k in range(2):
        watch.add(wide, k)
    opt = lab.adamw(wide.parameters())
    for i in range(2):
        lab.step(wide, opt, 2, i)
    assert watch.changed(wide) == []


# -- begin, commit, rollback -------------------------------------------------------------------------------------------


def test_a_second_begin_or_commit_is_rejected_and_changes_nothing(lab: SimpleNamespace) -> None:
    for moment, call in (("between tasks", "commit"), ("mid-prune", "begin")):
        net, _ = at(lab, moment)
        before = copy.deepcopy(dict(net.state_dict()))
        with pytest.raises(ContractError):
            net.commit() if call == "commit" else net.begin_task(lab.generator(0))
        assert same_state(lab, before, net.state_dict())


def test_rollback_is_exact(lab: SimpleNamespace) -> None:
    """Weights, masks, statistics, heads; and training from there is what it was, with the optimizer's own state."""
    net, watch = at(lab, "mid-prune")
    opt = lab.adamw(net.parameters())
    lab.step(net, opt, 2, 1)
    kept, kept_opt = net.snapshot(), copy.deepcopy(opt.state_dict())
    parameters = list(net.parameters())

    def go_on() -> dict[str, Any]:
        lab.step(net, opt, 2, 2)
        lab.prune(net, lab.generator(9))
        lab.step(net, opt, 2, 3)
        return copy.deepcopy(dict(net.state_dict()))

    first = go_on()
    net.restore(kept)
    opt.load_state_dict(kept_opt)
    assert same_state(lab, kept, net.state_dict()) and all(a is b for a, b in zip(parameters, net.parameters()))
    assert same_state(lab, first, go_on()) and watch.changed(net) == []
    # further back: fewer tasks and heads, and narrower
    net.commit()
    net.widen({"a": 2}, lab.generator(0))
    net.begin_task(lab.generator(1))
    net.restore(kept)
    assert same_state(lab, kept, net.state_dict()) and len(net.out) == 3 and net.spaces["a"].size == 16
    assert watch.changed(net) == []


def test_snapshots_do_not_share_memory_with_the_network(lab: SimpleNamespace) -> None:
    net, _ = at(lab, "mid-training")
    kept = net.snapshot()
    copied = copy.deepcopy(kept)
    lab.step(net, lab.adamw(net.parameters()), 2, 1)
    net.commit([lab.draw(net, 2, 0)])
    assert same_state(lab, copied, kept)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["settle", "claim", "digest", "remember"])
def test_a_crash_in_the_middle_of_commit_leaves_no_half(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    net, watch = at(lab, "mid-prune")
    before = copy.deepcopy(dict(net.state_dict()))
    owner = {"settle": eidetic.OwnedParameter, "claim": eidetic.Space}.get(where, eidetic.EideticNetwork)
    real, calls = getattr(owner, where), []

    def fails(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == (4 if where in ("settle", "claim") else 1):
            raise error("in the middle")
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fails)
        with pytest.raises(error, match="in the middle"):
            net.commit([lab.draw(net, 3, 0)])
    assert same_state(lab, before, net.state_dict()) and net.begun and watch.changed(net) == []
    net.commit([lab.draw(net, 3, 0)])
    assert watch.changed(net) == [] and verify(net).ok


# -- numbers that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_overflowing_free_unit(lab: SimpleNamespace, bad: float) -> None:
    """The extracted networks of finished tasks survive it; the task under way cannot be committed."""
    net, watch = at(lab, "mid-training")
    x = lab.draw(net, 5, 3)
    before = [lab.outputs(net.extract(k), [x], k) for k in range(2)]
    good = net.snapshot()
    free = net.spaces["a"].candidates.nonzero()[0]
    with torch.no_grad():
        net.up[0].weight.value[free] = bad
    assert lab.same(before, [lab.outputs(net.extract(k), [x], k) for k in range(2)])
    assert watch.changed(net) == [0, 1]  # the negative control: the whole network does not survive 0 * inf
    state = copy.deepcopy(dict(net.state_dict()))
    with pytest.raises(ConfigError, match="up.0.weight holds NaN or infinite values"):
        net.commit()
    assert same_state(lab, state, net.state_dict())
    net.restore(good)
    assert watch.changed(net) == []
    # pruned, it does no harm
    with torch.no_grad():
        net.up[0].weight.value[free] = bad
    net.spaces["a"].kill(torch.arange(16) == free)
    net.commit()
    assert watch.changed(net) == []


def test_statistics_that_are_not_finite(lab: SimpleNamespace) -> None:
    net, watch = at(lab, "mid-prune")
    net.norms[0].running_var[net.spaces["r"].candidates.nonzero()[:1]] = torch.nan
    with pytest.raises(ConfigError, match="norms.0.running_var"):
        net.commit()
    net.spaces["r"].kill(net.norms[0].running_var.isnan())
    net.commit()
    assert watch.changed(net) == [] and verify(net).ok
    net.begin_task(lab.generator(0))
    assert bool(net.norms[0].running_var.isfinite().all())


def test_signed_zeros_are_the_same_value(lab: SimpleNamespace) -> None:
    assert lab.same([torch.tensor([0.0, torch.nan])], [torch.tensor([-0.0, torch.nan])])
    assert not lab.same([torch.tensor([0.0])], [torch.tensor([1e-45])])


def test_what_is_kept_besides_the_parameters_is_one_copy(lab: SimpleNamespace) -> None:
    """A store as large as the weights while something is owned, and no masks of that size."""
    net, _ = at(lab, "mid-prune")
    net.train()(lab.draw(net, 4, 0), task=2)
    weights = [p for _, p in owned_parameters(net) if p.value.ndim > 1]
    for p in weights:
        plan = p._plan[1]  # type: ignore[index]
        held = [v for v in vars(plan).values() if isinstance(v, Tensor)] + list(plan.keep) if plan else []
        assert p.store.numel() in (0, p.value.numel())
        assert all(v.numel() <= max(p.value.shape) for v in held)
