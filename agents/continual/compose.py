"""An agent and continual methods become one agent: :func:`compose`.

The agent's class needs nothing for it. Its ``loss`` is called through the methods, and hooks on its optimisers surround
each step; so an agent whose update is ``self.loss(batch)``, ``backward()``, ``optimizer.step()`` composes as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.agents.continual.batches import concat
from clbench.agents.continual.memory import Memory
from clbench.agents.continual.method import NEEDS, Learner, Method, restore_generator
from clbench.agents.networks.outputs import Output
from clbench.contracts import Agent, Experience, Spaces, TaskInfo
from clbench.errors import ConfigError, ContractError
from clbench.registry import resolve
from clbench.rng import derive_seed

OF_THE_STREAM = frozenset({"boundaries", "task_id"})
# what a method may need of an agent -> the attribute that says the agent has it, and in words
OF_THE_AGENT = {
    "loss": ("loss", "a loss of a batch"),
    "outputs": ("outputs", "outputs of a batch"),
    "batches": ("sample", "batches of the data it learned from"),
    "features": ("features", "features before one output layer"),
    "optimizer": ("new_optimizer", "an optimiser that can be replaced"),
}


class Composed(Agent):
    """An agent with methods; made by :func:`compose`, which fills in the class attributes."""

    agent_class: ClassVar[type[Agent]]
    agent_name: ClassVar[str]
    method_classes: ClassVar[Mapping[str, type[Method]]]
    parts: ClassVar[tuple[type, ...]]  # whose code the results depend on

    def __init__(self, spaces: Spaces, config: Any, *, device: torch.device, rng: torch.Generator):
        super().__init__(spaces, config, device=device, rng=rng)
        self._check_recording(config.agent)
        self.agent = self.agent_class(spaces, config.agent, device=device, rng=rng)
        # after the agent, so that its weights are those it has without methods
        seed = int(torch.randint(2**62, (), generator=rng, device=rng.device))
        self.learner = Learner(self.agent)
        self.rng = torch.Generator(device).manual_seed(derive_seed(seed, "batches"))
        self.methods: dict[str, Method] = {}
        for name, cls in self.method_classes.items():
            generator = torch.Generator(device).manual_seed(derive_seed(seed, "method", name))
            try:
                self.methods[name] = cls(getattr(config, field_name(name)), self.learner, rng=generator)
            except ConfigError as error:
                raise ConfigError(f"Method {name!r} with agent {self.agent_name!r}: {error}") from error
        self._check_methods()
        # those that must have the last word about weights come last around the optimiser's step
        self._around_step = sorted(self.methods.values(), key=lambda m: m.last)
        self._phase = (0, 0)  # units of the present phase: used, in all
        self._data: Any = None
        if self.learner.own_loss is not None:
            self.agent.loss = self._loss  # type: ignore[attr-defined]
        if self._optimizing() is not None:
            self.agent.new_optimizer = self._new_optimizer  # type: ignore[attr-defined]
        self._equip()
        if hasattr(self.agent, "attach"):
            self.agent.attach(self._rebuilt)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """What the agent alone has (its model, its planner) is found here too."""
        if name.startswith("__") or "agent" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.agent, name)

    def _check_recording(self, config: Any) -> None:
        """A compiled or recorded update would go on without the methods."""
        if getattr(config, "compile", False) or getattr(config, "updates_per_graph", 0) > 1:
            raise ConfigError(
                f"Agent {self.agent_name!r} with methods cannot compile its loss or record its updates; leave compile off "
                "and updates_per_graph at 0."
            )

    def _check_methods(self) -> None:
        """Whether the methods can be together."""
        for name, method in self.methods.items():
            for other, theirs in self.methods.items():
                for deed in theirs.does & method.excludes.keys() if other != name else ():
                    raise ConfigError(f"Methods {name!r} and {other!r} cannot be combined: {method.excludes[deed]}.")

    # -- one update -----------------------------------------------------------------------------------------------------

    def _loss(self, batch: Any) -> tuple[Tensor, Any]:
        """In place of the agent's ``loss``: replayed rows, then each method's part."""
        self._attach()
        extra = [found for method in self.methods.values() if (found := method.replay(batch)) is not None]
        for replayed in extra:
            self.learner.count(replayed, backward=True)
        assert self.learner.own_loss is not None
        total, info = self.learner.own_loss(concat([batch, *extra]))
        for method in self.methods.values():
            total = method.loss(total, batch)
        return total, info

    def _attach(self) -> None:
        """Hooks on the agent's optimisers, which it may have made anew."""
        for optimizer in optimizers_of(self.agent):
            if not getattr(optimizer, "clbench_hooked", False):
                optimizer.register_step_pre_hook(self._before_step)
                optimizer.register_step_post_hook(self._after_step)
                optimizer.clbench_hooked = True  # type: ignore[attr-defined]

    def _rebuilt(self) -> None:
        """The agent's parameters and optimisers are new objects."""
        for method in self.methods.values():
            method.rebuilt()
        self._equip()

    def _equip(self) -> None:
        """The method's optimiser in place of the agent's, and hooks on it."""
        if self._optimizing() is not None:
            self.agent.optimizer = self._new_optimizer()  # type: ignore[attr-defined]
        self._attach()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = _params(optimizer)
        if self.learner.own_loss is None:
            self._add_gradients(params)
        with torch.no_grad():
            for method in self._around_step:
                method.after_backward(params)

    def _add_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Of the methods' parts, where the agent hides its loss."""
        with torch.enable_grad():
            zero = torch.zeros((), device=self.device)
            total = zero
            for method in self.methods.values():
                total = method.loss(total, None)
            if not total.requires_grad:
                return
            gradients = torch.autograd.grad(total, params, allow_unused=True)
        for p, gradient in zip(params, gradients, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        params = _params(optimizer)
        with torch.no_grad():
            for method in self._around_step:
                method.after_step(params)

    def _optimizing(self) -> Method | None:
        """The method that brings an optimiser."""
        found = [m for m in self.methods.values() if type(m).new_optimizer is not Method.new_optimizer]
        if len(found) > 1:
            raise ConfigError(
                f"{' and '.join(type(m).__name__ for m in found)} each bring an optimiser of their own; choose one."
            )
        return found[0] if found else None

    def _new_optimizer(self) -> torch.optim.Optimizer:
        method = self._optimizing()
        made = None if method is None else method.new_optimizer(self.learner.params)
        if made is None:
            raise ContractError(f"{type(method).__name__}.new_optimizer returned no optimiser.")
        return made

    # -- learning -------------------------------------------------------------------------------------------------------

    def start_task(self, task: TaskInfo) -> None:
        self._phase = (0, 0)
        self.agent.start_task(task)
        self._attach()
        for method in self.methods.values():
            method.start_task(task)

    def learn(self, experience: Experience, budget: int, *, rng: torch.Generator) -> Iterator[Mapping[str, float]]:
        self._data = experience.dataset
        done, total = self._phase
        if done == total or done + budget != total:  # not the rest of a phase that was interrupted
            done, total = 0, budget
        self._phase = (done, total)
        self.learner.progress = done / max(total, 1)
        with contextlib.closing(self.agent.learn(experience, budget, rng=rng)) as learning:  # type: ignore[type-var]
            for count, metrics in enumerate(learning, start=1):
                self._attach()
                self._phase = (done + int(metrics.get("step", count)), total)
                self.learner.progress = self._phase[0] / total
                if len(metrics) > 1:  # the agent reports, so do the methods
                    metrics = {**metrics, **{k: v for m in self.methods.values() for k, v in m.metrics().items()}}
                yield metrics

    def finish_task(self) -> None:
        self.agent.finish_task()
        # else nothing was learned since the task began, and there are no data to look back on
        if self._phase != (0, 0):
            for method in self.methods.values():
                method.finish_task(self._batches())
        self._data = None

    def _batches(self) -> Iterator[Any]:
        """Fresh batches of the task that ends, drawn apart from those the agent learns from."""
        while True:
            yield self.agent.sample(self._data, self.rng)  # type: ignore[attr-defined]

    # -- acting ---------------------------------------------------------------------------------------------------------

    def act(self, obs: Any, memory: Any, first: Tensor, *, rng: torch.Generator, task: Tensor | None = None,
            explore: bool = False) -> tuple[Tensor, Any]:  # fmt: skip
        """The agent's, with the network as methods want it for each row's task."""

        def plainly(memory: Any) -> tuple[Tensor, Any]:
            return self.agent.act(obs, memory, first, rng=rng, task=task, explore=explore)

        if not any(type(m).view is not Method.view for m in self.methods.values()):
            return plainly(memory)
        # a planner's memory has no rows to be split, so every task in the batch acts for all rows and keeps its own
        memories, kept = memory or {}, {}
        ids = [None] if task is None else task.unique().tolist()
        actions: Tensor | None = None
        for each in ids:
            with self._viewed(each):
                found, kept[each] = plainly(memories.get(each))
            if actions is None or task is None:
                actions = found
            else:
                mine = (task == each).reshape(-1, *(1,) * (found.ndim - 1))
                actions = torch.where(mine, found, actions)
        assert actions is not None
        return actions, {**memories, **kept}

    @contextlib.contextmanager
    def _viewed(self, task: int | None) -> Iterator[None]:
        """The network as methods want it for ``task``."""
        with contextlib.ExitStack() as stack:
            for view in (m.view(task) for m in self.methods.values()):
                if view is not None:
                    stack.enter_context(view)
            yield

    @property
    def probe(self) -> Callable[[Any, Tensor | None], Mapping[str, Tensor]]:
        """The agent's ``probe``, if it has one, with the network as methods want it for each row's task."""
        own = self.agent.probe  # type: ignore[attr-defined]

        def probe(obs: Any, task: Tensor | None = None) -> Mapping[str, Tensor]:
            layers: dict[str, Tensor] = {}
            for each in [None] if task is None else task.unique().tolist():
                with self._viewed(each):
                    found = own(obs, task)
                for name, values in found.items():
                    h = values
                    if name in layers and task is not None:
                        mine = (task == each).reshape(-1, *(1,) * (h.ndim - 1))
                        h = torch.where(mine, h, layers[name])
                    layers[name] = h
            return layers

        return probe

    # -- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "methods": {k: {"state": m.state_dict(), "rng": m.rng.get_state()} for k, m in self.methods.items()},
            "rng": self.rng.get_state(),
            "phase": list(self._phase),
            "extra": [self.learner.forward, self.learner.backward],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.agent.load_state_dict(state["agent"])
        self._attach()
        for name, method in self.methods.items():
            saved = state["methods"][name]
            method.load_state_dict(saved["state"])
            restore_generator(method.rng, saved["rng"])
        restore_generator(self.rng, state["rng"])
        done, total = state["phase"]
        self._phase = (int(done), int(total))
        self.learner.forward, self.learner.backward = (int(n) for n in state["extra"])

    def costs(self) -> dict[str, int]:
        """The agent's own; see :meth:`method_costs` for what methods add."""
        counts: Any = getattr(self.agent, "costs", dict)
        return counts()

    def method_costs(self) -> dict[str, int]:
        """Samples that methods sent through the network in addition, and the bytes of their state."""
        state = {k: m.state_dict() for k, m in self.methods.items()}
        size = sum(t.numel() * t.element_size() for t in _tensors(state))
        return {
            "extra_forward_samples": self.learner.forward,
            "extra_backward_samples": self.learner.backward,
            "method_state_bytes": size,
        }


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def optimizers_of(agent: Any) -> list[torch.optim.Optimizer]:
    """All optimisers whose steps methods surround: ``agent.optimizers`` where there are several, else the one."""
    several = getattr(agent, "optimizers", None)
    return list(several) if several is not None else [agent.optimizer]


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def field_name(method: str) -> str:
    """The name of a method's options: ``ewc-online`` -> ``ewc_online``, ``my_file:MyMethod`` -> ``MyMethod``."""
    return re.split("[:.]", method)[-1].replace("-", "_")


def compose(agent: str | type[Agent], methods: Sequence[str | type[Method]]) -> type[Agent]:
    """The class of ``agent`` with ``methods``; its ``Config`` has the fields ``agent`` and one per method. ::

        compose("bc", ["er", "ewc"]).Config(ewc={"strength": 100.0})

    Raises:
        ConfigError: a pair that does not fit, in one sentence.
        ContractError: something that is no agent or no method.
    """
    name = agent if isinstance(agent, str) else agent.__name__
    agent_class = resolve("agents", agent) if isinstance(agent, str) else agent
    found: dict[str, type[Method]] = {}
    for method in methods:
        label = method if isinstance(method, str) else f"{method.__module__}:{method.__qualname__}"
        cls = resolve("methods", method) if isinstance(method, str) else method
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ContractError(f"Method {label!r} must be a subclass of clbench.Method, got {cls!r}.")
        if field_name(label) in map(field_name, found):
            raise ConfigError(f"Method {label!r} is named twice.")
        check_pair(agent_class, name, cls, label)
        found[label] = cls
    fields: list[Any] = [("agent", agent_class.Config, dataclasses.field(default_factory=agent_class.Config))]
    fields += [(field_name(k), c.Config, dataclasses.field(default_factory=c.Config)) for k, c in found.items()]
    needs = frozenset().union(*(c.requires for c in found.values())) & OF_THE_STREAM
    return type(
        f"{agent_class.__name__}With{''.join(c.__name__ for c in found.values())}",
        (Composed,),
        {
            "__module__": __name__,
            "requires": frozenset(agent_class.requires) | needs,
            "Config": dataclasses.make_dataclass("Config", fields),
            "agent_class": agent_class,
            "agent_name": name,
            "method_classes": found,
            "parts": (agent_class, *found.values(), Memory, Output),
        },
    )


def check_pair(agent_class: type[Agent], agent: str, method_class: type[Method], method: str) -> None:
    """Whether the agent has what the method needs.

    Raises:
        ConfigError: one sentence that says what is missing.
    """
    refusal = getattr(agent_class, "refuses_methods", "")
    if not refusal and not hasattr(agent_class, "trainables"):
        refusal = "it has no parameters that methods could reach (no trainables)"
    if refusal:
        raise ConfigError(f"Method {method!r} does not work with agent {agent!r}: {refusal}.")
    for need in sorted(method_class.requires):
        if need not in NEEDS:
            raise ConfigError(f"Method {method!r} requires {need!r}, which is not one of {sorted(NEEDS)}.")
        if need in OF_THE_AGENT and not hasattr(agent_class, OF_THE_AGENT[need][0]):
            attribute, words = OF_THE_AGENT[need]
            why = (need == "loss" and getattr(agent_class, "hides_loss", "")) or f"it has no {attribute}"
            raise ConfigError(f"Method {method!r} needs {words}, which agent {agent!r} does not offer: {why}.")
