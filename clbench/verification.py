"""Have finished tasks changed? Evidence about the eidetic networks of a run, or about a network of one's own.

::

    found = verify_run("runs/digits-split/my_agent_MyAgent/seed-0")
    found.ok, found.levels["L2"], found.networks["policy"].max_abs_change

An agent takes part by an attribute ``eidetic``, a mapping of names to its networks. If it commits tasks without probes, it
can give inputs by a method ``eidetic_probes() -> {name: {task: [inputs of forward]}}``. docs/verify.md says what each level
proves. Nothing is written.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clbench.agents.networks.eidetic.network import EideticNetwork
from clbench.agents.networks.eidetic.verify import LEVELS, NAMES, Evidence, Probes, verify
from clbench.contracts import Agent
from clbench.errors import ConfigError, ContractError
from clbench.experiments import SavedRun, cpu_threads, load_agent, read_run
from clbench.loop import blame
from clbench.records import RunDirectory, provenance
from clbench.registry import load_object
from clbench.rng import sealed_global_rng


@dataclass(frozen=True)
class Verification:
    """What was found about one or several networks.

    Args:
        target: what was verified, as the user named it.
        networks: name -> evidence.
        run: what the run directory says: agent, stream, seed, status, provenance; None for a network of one's own.
        notes: what a reader should know besides, one sentence each.
    """

    target: str
    networks: Mapping[str, Evidence]
    run: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        """No level of any network failed, and those that can be judged anywhere (L0, L2, L3) passed."""
        return all(e.ok for e in self.networks.values())

    @property
    def levels(self) -> dict[str, str]:
        """Level -> ``fail`` if it fails for a network, else ``skip`` if it could not be judged for one, else ``pass``."""
        return {level: _worst(e.status[level] for e in self.networks.values()) for level in LEVELS}

    @property
    def max_abs_change(self) -> float:
        """Largest change of an output of a finished task."""
        return max(e.max_abs_change for e in self.networks.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; see docs/verify.md for the keys."""
        several = len(self.networks) > 1

        def detail(level: str) -> str:
            texts = ((f"{n}: " if several else "", e.details[level]) for n, e in self.networks.items())
            return "; ".join(name + text for name, text in texts)

        return {
            "target": self.target,
            "ok": self.ok,
            "levels": self.levels,
            "max_abs_change": _finite(self.max_abs_change),
            "tasks": max(e.tasks for e in self.networks.values()),
            "details": {level: detail(level) for level in LEVELS},
            "networks": {
                n: {**e.to_dict(), "ok": e.ok, "max_abs_change": _finite(e.max_abs_change)}
                for n, e in self.networks.items()
            },
            "run": self.run,
            "notes": list(self.notes),
            "provenance": provenance(),
        }

    def __str__(self) -> str:
        lines = [self.target]
        if self.run is not None:
            lines[0] += " · {stream} · {agent} · seed {seed} · {status}".format(**self.run)
        width = max(map(len, NAMES.values()))
        for name, e in self.networks.items():
            tasks = f"{e.tasks} finished task{'' if e.tasks == 1 else 's'}"
            lines += ["", f"{name}: {tasks}, largest change of an output {e.max_abs_change:g}"]
            lines += [f"  {k}  {NAMES[k]:<{width}}  {e.status[k]:<4}  {e.details[k]}" for k in LEVELS]
        lines += [""] + [f"Note: {note}" for note in self.notes] + [self.verdict]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """The result in one or two sentences."""

        def having(status: str) -> str:
            found = {n: [k for k in LEVELS if e.status[k] == status] for n, e in self.networks.items()}
            return "; ".join(f"{', '.join(levels)} of {name}" for name, levels in found.items() if levels)

        if failed := having("fail"):
            return f"FAILED: {failed}."
        if not self.ok:
            return f"NOT PROVEN: could not be judged: {having('skip')}."
        skipped = having("skip")
        return "Finished tasks have not changed" + (f"; not judged here: {skipped}." if skipped else ".")


def _worst(statuses: Iterable[str]) -> str:
    found = set(statuses)
    return next(s for s in ("fail", "skip", "pass") if s in found)


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# -- what is verified ----------------------------------------------------------------------------------------------------


def verify_target(target: str, *, probes: int | None = None, device: str | None = None) -> Verification:
    """A run directory, or ``module:attribute``; as :func:`verify_run` and :func:`verify_object`."""
    if ":" in target and not Path(target).exists():
        if device is not None:
            raise ConfigError("--device is for run directories; your own network is verified on the device it is on.")
        return verify_object(target, probes=probes)
    return verify_run(target, probes=probes, device=device)


def verify_run(path: str | Path, *, probes: int | None = None, device: str | None = None) -> Verification:
    """All levels for all networks of the agent of a run, finished or interrupted, as its last checkpoint has it.

    Args:
        path: a run directory. Nothing in it is changed.
        probes: use only so many rows of the inputs that the agent gives (recorded ones are used as they are).
        device: in place of the one that the run was made on.

    Raises:
        ConfigError: no run directory, or no task has been finished.
        ContractError: an agent without eidetic networks, or one that cannot be loaded.
        DataError: no checkpoint, or a damaged one.
    """
    _check_rows(probes)
    saved = read_run(path, device=device)
    config = saved.resolved.config
    with sealed_global_rng(), cpu_threads(config.threads):
        agent = load_agent(saved)
        networks = networks_of(agent, config.agent)
        given = _given_by(agent, networks)
        _check_finished(networks.values(), f"The run in {path}")
        found = {n: _verify(network, given.get(n, {}), n, probes) for n, network in networks.items()}
        notes = _notes(saved, networks)
    run = {
        "stream": config.stream,
        "agent": config.label,
        "seed": config.seed,
        "status": RunDirectory(saved.path).status(),
        "agent_code_changed": _code_changed(saved),
        "provenance": saved.record.get("provenance"),
    }
    return Verification(str(path), found, run, notes)


def verify_object(target: str, *, probes: int | None = None) -> Verification:
    """All levels for ``module:attribute``: a network, or a function without arguments that returns one.

    The function may also return a pair of the network and ``{task: [inputs of forward]}``.

    Args:
        target: as ``my_net:network``.
        probes: use only so many rows of the inputs that the function gives.

    Raises:
        ConfigError: it is something else, or no task has been finished.
    """
    _check_rows(probes)
    with sealed_global_rng():
        found = load_object(target)
        if callable(found) and not isinstance(found, nn.Module):
            found = _call(found, target)
        network, given = found if isinstance(found, tuple) and len(found) == 2 else (found, {})
        if not isinstance(network, EideticNetwork):
            raise ConfigError(
                f"{target!r} gives {_words(found)}; verify takes an EideticNetwork, or a function without arguments that "
                "returns one, or returns a pair (network, {task: [inputs of forward]})."
            )
        _check_finished([network], repr(target))
        return Verification(target, {"network": _verify(network, given, "network", probes)})


def _call(function: Any, target: str) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(f"{target!r} cannot be called without arguments ({error}); give them defaults.") from error
    except ValueError:  # built in: there is no signature to look at
        pass
    with blame(target.partition(":")[0], target.partition(":")[2]):
        return function()


def networks_of(agent: Agent, name: str) -> dict[str, EideticNetwork]:
    """The eidetic networks that an agent exposes.

    Args:
        agent: with an attribute ``eidetic``.
        name: for messages.

    Raises:
        ContractError: there are none, or the attribute is something else.
    """
    with blame(agent, "eidetic"):
        found = getattr(agent, "eidetic", {})
    if not isinstance(found, Mapping) or not all(isinstance(n, EideticNetwork) for n in found.values()):
        raise ContractError(
            f"Agent {name!r}: its attribute 'eidetic' must map names to EideticNetworks, got {_words(found)}; see "
            "docs/verify.md."
        )
    if not found:
        raise ContractError(
            f"Agent {name!r} has no eidetic networks, so there is nothing that could be verified: it may change what it "
            "has learned at any time. Agents that keep finished tasks show their networks by an attribute 'eidetic' "
            "(docs/verify.md)."
        )
    return {str(k): v for k, v in found.items()}


def _given_by(agent: Agent, networks: Mapping[str, EideticNetwork]) -> Mapping[str, Any]:
    """What ``eidetic_probes`` returns, if the agent has it."""
    method = getattr(agent, "eidetic_probes", None)
    if method is None:
        return {}
    with blame(agent, "eidetic_probes"):
        given = method()
    if not isinstance(given, Mapping) or not given.keys() <= networks.keys():
        raise ContractError(
            f"{type(agent).__name__}.eidetic_probes must return {{name: {{task: [inputs of forward]}}}} with names of "
            f"{', '.join(networks)}, got {_words(given)}."
        )
    return given


def _words(value: Any) -> str:
    """The type of something, that of what is inside included."""
    inside = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    )
    parts = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in list(inside)[:4])
    return type(value).__name__ + (f" ({parts})" if parts else "")


# -- checks and notes ----------------------------------------------------------------------------------------------------


def _check_rows(probes: int | None) -> None:
    if probes is not None and probes < 1:
        raise ConfigError(f"probes must be a positive number of rows, got {probes}.")


def _check_finished(networks: Iterable[EideticNetwork], what: str) -> None:
    if not any(network.committed for network in networks):
        raise ConfigError(
            f"{what} has not finished a task yet, so there is nothing to verify: a network owns what it has learned once "
            "the task is committed. Verify it after the first one."
        )


def _verify(network: EideticNetwork, given: Any, name: str, rows: int | None) -> Evidence:
    probes = _checked(network, given, name, rows)
    with blame(network, f"forward (network {name!r})"):
        return verify(network, probes)


def _checked(network: EideticNetwork, given: Any, name: str, rows: int | None) -> Probes:
    """Probes as they should be, on the network's device, the first ``rows`` rows."""

    def wrong(value: Any) -> ContractError:
        return ContractError(
            f"Probes of network {name!r} must be {{task: [inputs of forward]}}, whole numbers to lists of tensors, got "
            f"{_words(value)}."
        )

    if not isinstance(given, Mapping):
        raise wrong(given)
    device, probes = next(network.parameters()).device, {}
    for task, inputs in given.items():
        if not isinstance(task, int) or isinstance(inputs, Tensor) or not isinstance(inputs, Sequence):
            raise wrong({task: inputs})
        if not inputs or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs):
            raise wrong(inputs)
        probes[task] = [x.detach()[:rows].to(device) for x in inputs]
    return probes


def _code_changed(saved: SavedRun) -> bool:
    return saved.record.get("agent_code") != saved.resolved.agent_code


def _notes(saved: SavedRun, networks: Mapping[str, EideticNetwork]) -> list[str]:
    notes = []
    if _code_changed(saved):
        notes.append(
            f"the code of agent {saved.resolved.config.agent!r} is not that of the run any more; what follows is about the "
            "weights of the run in the code of today."
        )
    then, now = saved.record.get("provenance") or {}, provenance()
    other = [f"{k} {then.get(k)} (here {now[k]})" for k in ("clbench", "torch") if then.get(k) != now[k]]
    if other:
        notes.append(f"the run was made with {' and '.join(other)}; other versions may round differently.")
    stream = saved.resolved.stream
    if saved.resolved.config.protocol == "independent":
        notes.append(
            f"of the {len(stream.phases)} agents of this run, one per task, only the last is in the checkpoint; what "
            "follows is about that one."
        )
    if stream.reveals != "nothing" and saved.resolved.config.protocol == "sequential":
        segments = saved.checkpoint.get("position", {}).get("segment", 0)
        phases = stream.phases[:segments]  # a phase is one segment where boundaries are told
        trained = len({task for phase in phases for task in phase.tasks})
        notes += [
            f"{trained} tasks of the stream have been trained, {name!r} has committed {network.committed}: what it learned "
            "besides is not protected."
            for name, network in networks.items()
            if network.committed < trained
        ]
    return notes


__all__ = ["Verification", "networks_of", "verify_object", "verify_run", "verify_target"]
