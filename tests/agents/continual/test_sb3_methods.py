"""Continual methods on Stable-Baselines3 agents: hooks around every step, sealed randomness, exact resume."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from clbench.agents.continual.compose import compose
from clbench.agents.continual.method import Method
from clbench.agents.networks.outputs import Output
from clbench.agents.sb3 import SB3DQN, SB3PPO, SB3SAC, SB3TD3
from clbench.agents.sb3.base import Steps
from clbench.agents.sb3.bridge import to_numpy
from clbench.config import build
from clbench.contracts import Experience, TaskInfo
from clbench.errors import ConfigError, ContractError

SMALL: dict[Any, dict[str, Any]] = {
    SB3PPO: {"rollout_steps": 16, "batch_size": 8, "n_epochs": 2, "hidden": (8,)},
    SB3DQN: {"buffer_size": 60, "learning_starts": 20, "batch_size": 8, "hidden": (8,), "lr": 1e-2},
    SB3SAC: {"buffer_size": 60, "learning_starts": 20, "batch_size": 8, "hidden": (8,)},
    SB3TD3: {"buffer_size": 60, "learning_starts": 20, "batch_size": 8, "hidden": (8,)},
}
ALL = [
    (SB3PPO, ""), (SB3PPO, "discrete goal"), (SB3DQN, "discrete"), (SB3DQN, "discrete goal"), (SB3SAC, ""),
    (SB3TD3, "goal"),
]  # fmt: skip
PIXELS = (SB3PPO, "discrete pixels last")
BUDGET = 48


def name(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value).replace(" ", "-") or "plain"


class Counts(Method):
    """Counts the steps that it surrounds, and which parameters they moved."""

    before = after = 0
    state = ("before", "after")

    def after_backward(self, params: Any) -> None:
        self.before += 1

    def after_step(self, params: Any) -> None:
        self.after += 1


def make(tiny: Any, cls: Any, kind: str, methods: Any, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """An agent with methods, or without, and its environment of two rows; the agent begins with one for one."""
    env = tiny.Line(2, kind)
    env.reset(seed=1)
    settings = {**SMALL[cls], **{k: v for k, v in options.items() if not isinstance(v, dict)}}
    if methods is None:
        return cls(env.spaces, build(cls.Config, settings, cls.name), device=tiny.cpu, rng=tiny.generator(seed)), env
    composed = compose(cls, methods)
    given = {"agent": settings, **{k: v for k, v in options.items() if isinstance(v, dict)}}
    return composed(
        env.spaces, build(composed.Config, given, "composed"), device=tiny.cpu, rng=tiny.generator(seed)
    ), env


def train(tiny: Any, agent: Any, env: Any, budget: int = BUDGET) -> list[dict[str, float]]:
    return [dict(m) for m in agent.learn(Experience(env=env), budget, rng=tiny.generator(0))]


def two_tasks(tiny: Any, agent: Any, env: Any) -> Any:
    for _ in range(2):
        agent.start_task(TaskInfo())
        train(tiny, agent, env)
        agent.finish_task()
    return agent


# -- the hooks ---------------------------------------------------------------------------------------------------------


class DrawsFromTheProcess(Method):
    """Broken: shifts the agent's random numbers."""

    def loss(self, base: Any, batch: Any) -> Any:
        torch.rand(())
        return base


@pytest.mark.parametrize(("cls", "kind"), [*ALL, PIXELS], ids=name)
def test_methods_of_strength_0_leave_the_agent_as_it_is_bit_for_bit(tiny: Any, cls: Any, kind: str) -> None:
    plain = two_tasks(tiny, *make(tiny, cls, kind, None)).state_dict()
    off = {"ewc": {"strength": 0.0, "samples": 4}, "l2": {"strength": 0.0}}
    composed = two_tasks(tiny, *make(tiny, cls, kind, ["ewc", "l2"], **off))
    found = composed.agent.state_dict()
    assert composed.learner.backward > 0  # the method did run
    assert tiny.same({k: found[k] for k in plain}, plain)


def test_a_method_that_draws_from_the_process_is_noticed_by_the_test_above(tiny: Any) -> None:
    plain = two_tasks(tiny, *make(tiny, SB3SAC, "", None)).state_dict()
    broken = two_tasks(tiny, *make(tiny, SB3SAC, "", [DrawsFromTheProcess])).agent.state_dict()
    assert not tiny.same(plain["parameters"], broken["parameters"])


def steps_taken(agent: Any) -> int:
    """Of all optimisers of the networks, as Adam has counted them."""
    return sum(int(max(s["step"] for s in o.state.values())) for o in agent.optimizers)


@pytest.mark.parametrize(("cls", "kind"), ALL, ids=name)
def test_every_step_is_surrounded_from_the_first_on(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, [Counts])
    old = agent.model
    train(tiny, agent, env)
    assert agent.model is not old  # rebuilt for two rows, in the midst of learn
    counts = agent.methods[f"{__name__}:Counts"]
    assert counts.before == counts.after == steps_taken(agent.agent) > 0


def test_steps_are_missed_by_an_agent_that_does_not_say_that_it_was_rebuilt(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SB3PPO, "attach", lambda self, rebuilt: None)
    agent, env = make(tiny, SB3PPO, "", [Counts])
    train(tiny, agent, env)
    assert agent.methods[f"{__name__}:Counts"].before < steps_taken(agent.agent)


@pytest.mark.parametrize(("cls", "kind"), ALL, ids=name)
def test_what_a_rebuilt_agent_tells_methods_are_its_own_weights(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, ["l2-init"])
    before, old = agent.learner.values(), agent.model
    train(tiny, agent, env)
    assert agent.model is not old
    assert tiny.same(agent.methods["l2-init"].initial, before)


class Slope(Method):
    """Adds the sum of all parameters to the loss, so 1 to every gradient; keeps the gradients that it saw."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.seen: list[torch.Tensor] = []

    def loss(self, base: Any, batch: Any) -> Any:
        assert batch is None
        return base + torch.stack([p.sum() for p in self.learner.params]).sum()

    def after_backward(self, params: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in params]))


@pytest.mark.parametrize(("cls", "kind"), [(SB3PPO, ""), (SB3DQN, "discrete")], ids=name)
def test_the_gradient_of_a_method_is_added_after_the_agents_was_clipped(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, [Slope], max_grad_norm=1e-6)
    train(tiny, agent, env)
    seen = agent.methods[f"{__name__}:Slope"].seen
    assert seen
    for gradient in seen:
        assert torch.allclose(gradient, torch.ones_like(gradient), atol=1e-5)


@pytest.mark.parametrize(("cls", "kind"), ALL, ids=name)
def test_trainables_are_what_the_optimisers_change_in_a_fixed_order(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, None)
    train(tiny, agent, env, 24)
    before = [p.detach().clone() for p in agent.trainables]
    names = {id(p): n for n, p in agent.model.policy.named_parameters()}
    order = [names[id(p)] for p in agent.trainables]
    assert len(set(order)) == len(order) and not any("target" in n for n in order)
    assert {n for n in names.values() if "target" not in n} == set(order)
    train(tiny, agent, env)
    names = {id(p): n for n, p in agent.model.policy.named_parameters()}
    assert order == [names[id(p)] for p in agent.trainables]
    assert any(not torch.equal(p, q) for p, q in zip(before, agent.trainables, strict=True))


def test_a_strong_anchor_holds_the_weights_and_the_entropy_coefficient_goes_on(tiny: Any) -> None:
    moved = {}
    for strength in (0.0, 1e4):
        agent, env = make(tiny, SB3SAC, "", ["l2"], l2={"strength": strength})
        agent.start_task(TaskInfo())
        train(tiny, agent, env)
        agent.finish_task()
        anchor, entropy = agent.learner.values(), agent.model.log_ent_coef.item()
        agent.start_task(TaskInfo())
        train(tiny, agent, env)
        distance = [(p.detach() - a).square().sum() for p, a in zip(agent.learner.params, anchor, strict=True)]
        moved[strength] = float(torch.stack(distance).sum().sqrt())
        assert agent.model.log_ent_coef.item() != entropy
    assert 0 < moved[1e4] < 0.5 * moved[0.0]


# -- outputs and batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "kind"), [*ALL, PIXELS], ids=name)
def test_outputs_are_what_acts(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, [Counts])
    train(tiny, agent, env)
    batch = agent.agent.sample(None, tiny.generator(3))
    found = agent.agent.outputs(batch)
    assert all(o.values.shape[0] == SMALL[cls]["batch_size"] and o.values.requires_grad for o in found)
    acts = agent.model.predict(to_numpy(batch.observations), deterministic=True)[0]
    values = found[0].values.detach()
    if "discrete" in kind:
        assert torch.equal(values.argmax(1), torch.from_numpy(acts))
    elif cls is SB3PPO:
        low, high = env.spaces.action.low[0], env.spaces.action.high[0]
        assert torch.allclose(values.clamp(float(low), float(high)), torch.from_numpy(acts))
    else:
        assert torch.allclose(values, torch.from_numpy(agent.model.policy.scale_action(acts)), atol=1e-6)
    kinds = {SB3PPO: 2, SB3DQN: 1, SB3SAC: 3, SB3TD3: 3}
    assert len(found) == kinds[cls] and all(isinstance(o, Output) for o in found)
    reached = torch.autograd.grad(
        torch.stack([o.values.sum() for o in found]).sum(), agent.trainables, allow_unused=True
    )
    free = [p for p, g in zip(agent.trainables, reached, strict=True) if g is None]
    spread = {SB3PPO: 0 if "discrete" in kind else 1, SB3SAC: 2}.get(cls, 0)  # log_std, which no output depends on
    assert len(free) == spread


@pytest.mark.parametrize(("cls", "kind"), ALL, ids=name)
def test_batches_come_from_the_present_phase_and_from_the_generator_alone(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, [Counts])
    train(tiny, agent, env, 40)
    older = everything(agent.agent)
    train(tiny, agent, env, 24)
    newer = everything(agent.agent)
    process = torch.get_rng_state()
    seen: set[Any] = set()
    for seed in range(20):
        batch = agent.agent.sample(None, tiny.generator(seed))
        assert tiny.same(tuple(agent.agent.sample(None, tiny.generator(seed))), tuple(batch))
        seen |= keys(batch)
    assert torch.equal(process, torch.get_rng_state())
    assert seen == newer  # all of them, and none that only the phase before had
    assert older - seen


def keys(batch: Steps) -> set[Any]:
    seen = batch.observations
    columns = [*seen.values()] if isinstance(seen, dict) else [seen]
    table = torch.cat([c.flatten(1).float() for c in (*columns, batch.actions)], 1)
    return {tuple(row) for row in table.tolist()}


def everything(agent: Any) -> set[Any]:
    """All steps of the present phase (off-policy: the 12 latest of each row, which is what the second phase has)."""
    if isinstance(agent, SB3PPO):
        return keys(agent._rollout)  # type: ignore[arg-type]
    buffer = agent.model.replay_buffer
    rows = [(buffer.pos - 1 - i) % buffer.buffer_size for i in range(12)]
    seen = buffer.observations
    picked = {k: v[rows] for k, v in seen.items()} if isinstance(seen, dict) else seen[rows]
    flat = {k: torch.from_numpy(v).flatten(0, 1) for k, v in picked.items()} if isinstance(picked, dict) else (
        torch.from_numpy(picked).flatten(0, 1))  # fmt: skip
    return keys(Steps(flat, torch.from_numpy(buffer.actions[rows]).flatten(0, 1)))


@pytest.mark.parametrize("cls", [SB3PPO, SB3DQN], ids=name)
def test_an_agent_that_has_not_acted_has_no_batches(tiny: Any, cls: Any) -> None:
    agent, _ = make(tiny, cls, "discrete", [Counts])
    with pytest.raises(ContractError, match="nothing to sample"):
        agent.agent.sample(None, tiny.generator(0))


def test_an_agent_without_methods_keeps_no_rollout(tiny: Any) -> None:
    agent, env = make(tiny, SB3PPO, "", None)
    train(tiny, agent, env)
    assert "rollout" not in agent.state_dict()


# -- resume ------------------------------------------------------------------------------------------------------------


def halted(tiny: Any, cls: Any, kind: str, stop: int, methods: Any, spoil: str | None = None, **options: Any) -> Any:
    """The state after two tasks, saved and loaded into a new agent ``stop`` steps into the first (0: not)."""
    agent, env = make(tiny, cls, kind, methods, **options)
    for task in range(2):
        agent.start_task(TaskInfo())
        for m in agent.learn(Experience(env=env), 4 * BUDGET, rng=tiny.generator(0)):
            if task == 0 and stop and m["step"] >= stop:
                saved, world, step = tiny.through_file(agent.state_dict()), env.state_dict(), int(m["step"])
                agent, env = make(tiny, cls, kind, methods, seed=7, **options)
                if spoil is not None:
                    saved["agent"].pop(spoil)
                agent.load_state_dict(saved)
                env.load_state_dict(world)
                if step < 4 * BUDGET:
                    train(tiny, agent, env, 4 * BUDGET - step)
                break
        agent.finish_task()
    return agent.state_dict()


@pytest.mark.parametrize("stop", [BUDGET, 4 * BUDGET], ids=["midway", "before-finish"])
@pytest.mark.parametrize(("cls", "kind"), [*ALL, PIXELS], ids=name)
def test_resuming_with_a_method_is_exact(tiny: Any, cls: Any, kind: str, stop: int) -> None:
    options: Any = {"ewc": {"strength": 10.0, "samples": 4}}
    whole = halted(tiny, cls, kind, 0, ["ewc"], **options)
    assert tiny.same(whole, halted(tiny, cls, kind, stop, ["ewc"], **options))


def test_the_rollout_is_needed_to_resume_before_the_task_is_finished(tiny: Any) -> None:
    with pytest.raises(ContractError, match="nothing to sample"):
        halted(tiny, SB3PPO, "", 4 * BUDGET, ["ewc"], spoil="rollout", ewc={"samples": 4})


# -- an optimiser in place of SB3's ------------------------------------------------------------------------------------


class PlainSGD(Method):
    """Brings an optimiser."""

    @dataclass
    class Config:
        """Options."""

        lr: float = 0.123

    def new_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.config.lr, momentum=0.5)


@pytest.mark.parametrize(("cls", "kind"), [(SB3PPO, ""), (SB3DQN, "discrete")], ids=name)
def test_a_methods_optimiser_stays_when_the_model_is_rebuilt(tiny: Any, cls: Any, kind: str) -> None:
    agent, env = make(tiny, cls, kind, [PlainSGD, Counts])
    train(tiny, agent, env)
    assert type(agent.model.policy.optimizer) is torch.optim.SGD
    assert agent.model.policy.optimizer.param_groups[0]["lr"] == 0.123  # not the agent's own
    assert agent.methods[f"{__name__}:Counts"].before > 0
    other, _ = make(tiny, cls, kind, [PlainSGD, Counts], seed=3)
    other.load_state_dict(tiny.through_file(agent.state_dict()))
    assert type(other.model.policy.optimizer) is torch.optim.SGD
    assert tiny.same(other.state_dict(), agent.state_dict())
    whole = halted(tiny, cls, kind, 0, [PlainSGD])
    assert tiny.same(whole, halted(tiny, cls, kind, BUDGET, [PlainSGD]))


def test_the_optimiser_that_an_agent_makes_itself_is_like_sb3s(tiny: Any) -> None:
    agent, _ = make(tiny, SB3PPO, "", None)
    theirs, ours = agent.model.policy.optimizer, agent.new_optimizer()
    assert type(theirs) is type(ours) and theirs.defaults == ours.defaults
    assert tiny.same(theirs.state_dict(), ours.state_dict())


# -- pairs that do not fit ---------------------------------------------------------------------------------------------


HIDDEN = (
    "Method 'er' needs a loss of a batch, which agent {!r} does not offer: Stable-Baselines3 computes it inside its "
)
SENTENCES = {
    ("sb3-ppo", "er"): HIDDEN.format("sb3-ppo") + "own training.",
    ("sb3-dqn", "er"): HIDDEN.format("sb3-dqn")
    + "own training; the agent has a replay buffer of its own, which keeps the steps of earlier tasks "
    "(--agent.buffer keep).",
    (
        "eidetic-ppo",
        "l2",
    ): "Method 'l2' does not work with agent 'eidetic-ppo': its layers protect finished tasks themselves.",
}


@pytest.mark.parametrize(("agent", "method"), SENTENCES)
def test_methods_that_need_the_loss_are_refused_in_one_sentence(agent: str, method: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(agent, [method])
    assert str(error.value) == SENTENCES[agent, method]


def test_a_second_optimiser_is_refused_by_agents_that_have_two() -> None:
    class Needs(PlainSGD):
        requires = frozenset({"optimizer"})

    with pytest.raises(ConfigError, match="an optimiser that can be replaced, which agent 'sb3-sac' does not offer"):
        compose("sb3-sac", [Needs])
