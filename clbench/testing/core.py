"""What all conformance checks share: results, reports, isolation of failures, and comparison of states.

A check is a small function with a name in words. It returns ``None`` or a note, raises :class:`Failed` with a sentence
that says what to change, or :class:`NotApplicable`. Any other exception is a failure of that check too: the message then
names the method, the error, and the file and line of the plug-in.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.errors import ClbenchError, ContractError
from clbench.rng import get_global_state

Status = str  # "passed" | "failed" | "not applicable"
NOT_CHECKED = "not checked, because"
_HERE = str(Path(__file__).resolve().parent)


class Failed(ContractError):
    """The plug-in does not do what the check asks; the message says what to change."""


class NotApplicable(ContractError):
    """The check does not concern this plug-in; the message says why."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Outcome of one check.

    Args:
        name: of the check, in words.
        ok: ``False`` if the plug-in fails it.
        message: what to change if it failed, why it does not apply, or a note.
        applies: ``False`` where the check does not concern the plug-in (``ok`` is then ``True``).
        subject: what the check was run on, for example the name of a fixture.
        details: the traceback of an unexpected exception, for ``--traceback``.
        group: the heading under which reports show it.
    """

    name: str
    ok: bool
    message: str = ""
    applies: bool = True
    subject: str = ""
    details: str = dataclasses.field(default="", compare=False)
    group: str = ""

    @property
    def status(self) -> Status:
        return "failed" if not self.ok else "passed" if self.applies else "not applicable"

    @property
    def label(self) -> str:
        """The status in a table: a passed check with something to say is a note."""
        return {"failed": "FAILED", "not applicable": "n.a."}.get(self.status, "note" if self.message else "passed")


@dataclasses.dataclass
class Report:
    """All results of one plug-in.

    Args:
        target: what was checked.
        results: one per check and subject.
    """

    target: str
    results: list[Result] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(r.ok for r in self.results)

    @property
    def failures(self) -> list[Result]:
        return [r for r in self.results if not r.ok]

    def raise_if_failed(self) -> None:
        """Do nothing if every check passed.

        Raises:
            ContractError: the text of the report's failures.
        """
        if not self.ok:
            raise ContractError(
                f"{self.target} fails {len(self.rows(only_failed=True))} conformance check(s).\n{self.text()}"
            )

    def rows(self, only_failed: bool = False) -> list[Result]:
        """One result per check: the first failure of any subject, else a note, else a pass, else why it does not apply."""
        groups: dict[str, list[Result]] = {}
        for r in self.results:
            groups.setdefault(r.name, []).append(r)
        order = ("FAILED", "note", "passed", "n.a.")
        rows = [min(group, key=lambda r: order.index(r.label)) for group in groups.values()]
        return [r for r in rows if not (only_failed and r.ok)]

    def text(self, verbose: bool = False, width: int | None = None) -> str:
        """Plain text: what to change, and the counts; with ``verbose`` the table of all checks and the notes too.

        Args:
            width: break sentences into lines of this many columns.
        """
        rows, lines = self.rows(), []
        if verbose:
            lines += [self.target, *_table(rows), ""]
            said = [r for r in rows if r.ok and r.message and not r.message.startswith(NOT_CHECKED)]
            lines += _sentences("Notes", said, width)
        lines += _sentences("What to change", [r for r in rows if not r.ok], width)
        failed, notes = (sum(r.label == s for r in rows) for s in ("FAILED", "note"))
        passed = sum(r.status == "passed" for r in rows)
        lines.append(f"{self.target}: {passed} passed, {failed} failed, {notes} note{'s' if notes != 1 else ''}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text(verbose=True, width=100)


def _table(rows: list[Result]) -> list[str]:
    """One line per check, under the headings of their groups."""
    lines = []
    for group in dict.fromkeys(r.group for r in rows):
        lines += ["", group] if group else [""]
        lines += [f"  {r.label:<8}{r.name}" for r in rows if r.group == group]
    return lines


def _sentences(heading: str, rows: list[Result], width: int | None) -> list[str]:
    if not rows:
        return []
    lines = [heading]
    for r in rows:
        where = f" (on {r.subject})" if r.subject and not r.ok else ""
        line = f"  - {r.name}{where}: {r.message}"
        lines += [line] if width is None else textwrap.wrap(
            line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )  # fmt: skip
    return [*lines, ""]


@dataclasses.dataclass(frozen=True)
class Check:
    """A named check; ``needs`` names checks without whose success it makes no sense."""

    name: str
    run: Callable[[Any], str | None]
    needs: tuple[str, ...] = ()
    group: str = ""


class Checks(list[Check]):
    """A list of checks, with the heading under which reports show them and a decorator that adds to the list."""

    def __init__(self, group: str = ""):
        super().__init__()
        self.group = group

    def add(self, name: str, needs: str | tuple[str, ...] = ()) -> Callable[[Callable[[Any], str | None]], Callable]:
        def register(function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
            self.append(Check(name, function, (needs,) if isinstance(needs, str) else needs, self.group))
            return function

        return register


def run_checks(checks: Iterable[Check], case: Any, subject: str, plugin: Any) -> Iterator[Result]:
    """Run ``checks`` on ``case``; a check whose prerequisite failed or was left out is not applicable."""
    passed: set[str] = set()
    for check in checks:
        missing = [n for n in check.needs if n not in passed]
        if missing:
            reason = f"{NOT_CHECKED} {missing[0]!r} did not pass"
            yield Result(check.name, True, reason, False, subject, group=check.group)
            continue
        result = run_one(check, case, subject, plugin)
        if result.status == "passed":
            passed.add(check.name)
        yield result


def run_one(check: Check, case: Any, subject: str, plugin: Any) -> Result:
    """One check; whatever it raises (except Ctrl-C) becomes its result."""
    ok, applies, message, details = True, True, "", ""
    try:
        message = check.run(case) or ""
    except NotApplicable as reason:
        applies, message = False, str(reason)
    except Failed as failure:
        ok, message = False, str(failure)
    except Exception as error:  # noqa: BLE001 (a plug-in may raise anything; it must not stop the other checks)
        ok, message = False, explain(error, plugin)
        details = "".join(traceback.format_exception(error))
    return Result(check.name, ok, message, applies, subject, details, check.group)


def used_generator(before: dict[str, Any]) -> str | None:
    """Which process-wide generator moved since ``before = get_global_state()``."""
    changed = difference(before, get_global_state())
    return None if changed is None else changed.split("'")[1]


def explain(error: BaseException, plugin: Any) -> str:
    """One sentence: which method of the plug-in raised what, and where."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _ours(f.filename)]
    said = " ".join(str(error).split()) or "(no message)"
    what = said if isinstance(error, ClbenchError) else f"{type(error).__name__}: {said}"
    if not frames:
        return f"{_name(plugin)} made the check stop with {what}"
    sources = _sources(plugin)
    own = [f for f in frames if os.path.realpath(f.filename) in sources]
    if not own and isinstance(error, ClbenchError):
        return said  # our own message about the plug-in, raised by our own code
    at = own[-1] if own else frames[-1]
    label = _label(plugin, own[0].name) + " raised " if own else ""
    return f"{label}{what} ({os.path.basename(at.filename)}, line {at.lineno}, in {at.name})"


def _ours(filename: str) -> bool:
    path = os.path.realpath(filename)
    return path.startswith(_HERE) or os.path.basename(path) in ("contextlib.py", "functools.py")


def _name(plugin: Any) -> str:
    return plugin if isinstance(plugin, str) else getattr(plugin, "__name__", type(plugin).__name__)


def _label(plugin: Any, function: str) -> str:
    return f"{_name(plugin)}.{function}" if inspect.isclass(plugin) else _name(plugin)


def _sources(plugin: Any) -> set[str]:
    """The files that a plug-in is written in: its own, and those of its base classes outside the contract."""
    parts = inspect.getmro(plugin)[:-1] if inspect.isclass(plugin) else (plugin,)
    for composed in getattr(plugin, "parts", ()):  # an agent with continual methods
        parts += inspect.getmro(composed)[:-1]
    found = set()
    for part in parts:
        try:
            found.add(os.path.realpath(inspect.getsourcefile(part) or ""))
        except (TypeError, OSError):  # built in, typed at a prompt, or a string
            continue
    return found


# -- trees of tensors and plain values -------------------------------------------------------------


def clone(tree: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples of tensors, arrays and plain values."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if isinstance(tree, Mapping):
        return {k: clone(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [clone(v) for v in tree]
    if isinstance(tree, tuple):
        return tuple(clone(v) for v in tree)
    return tree


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two trees first differ, bit for bit, as a path and a phrase; ``None`` if they are equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _tensor_difference(a.detach(), b.detach(), where)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return None if a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b) else f"{where} differs"
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in a:
            if key not in b:
                return f"{where}[{key!r}] is missing from one of them"
        for key in b:
            if key not in a:
                return f"{where}[{key!r}] is missing from one of them"
        return next((d for k in a if (d := difference(a[k], b[k], f"{where}[{k!r}]"))), None)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where} has {len(a)} entries in one and {len(b)} in the other"
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}[{i}]"))), None)
    if isinstance(a, float) and isinstance(b, float) and a != a and b != b:
        return None
    if type(a) is not type(b):
        return f"{where} is a {type(a).__name__} in one and a {type(b).__name__} in the other"
    try:
        return None if bool(a == b) else f"{where} is {a!r} in one and {b!r} in the other"
    except (TypeError, ValueError, RuntimeError):
        return None  # values that cannot be compared say nothing


def _tensor_difference(a: torch.Tensor, b: torch.Tensor, where: str) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{where} is {tuple(a.shape)} {a.dtype} in one and {tuple(b.shape)} {b.dtype} in the other"
    b = b.to(a.device)
    if a.is_floating_point():
        same = torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isnan(), b.isnan())
        if not same:
            return f"{where} differs (by up to {float((a.double() - b.double()).abs().max()):.2g})"
        return None
    return None if torch.equal(a, b) else f"{where} differs"


def storages(tree: Any) -> set[int]:
    """Addresses of the memory of all non-empty tensors in a tree."""
    if isinstance(tree, torch.Tensor):
        return {tree.untyped_storage().data_ptr()} if tree.numel() else set()
    values: Iterable[Any] = (
        tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    )
    return set().union(*(storages(v) for v in values))


def not_plain(tree: Any, where: str) -> str | None:
    """The path and type of the first value that is neither a tensor nor a plain Python value."""
    if tree is None or isinstance(tree, torch.Tensor) or type(tree) in (bool, int, float, str, bytes):
        return None
    if isinstance(tree, Mapping):
        return next((d for k, v in tree.items() if (d := not_plain(v, f"{where}[{k!r}]"))), None)
    if type(tree) in (list, tuple):
        return next((d for i, v in enumerate(tree) if (d := not_plain(v, f"{where}[{i}]"))), None)
    return f"{where} is a {type(tree).__module__}.{type(tree).__qualname__}"


def state_problem(state: Any, where: str) -> str | None:
    """What is wrong with a ``state_dict``: it must be a dict of tensors and plain values that loads without pickles."""
    if not isinstance(state, dict):
        return f"{where} returned a {type(state).__name__}; return a dict."
    bad = not_plain(state, where)
    if bad:
        return f"{bad}; store only tensors, numbers, strings, None, and lists, tuples or dicts of those "
        "(tensor.tolist(), .item())."
    return None


def moved(obs: Any, device: Any) -> Any:
    """An observation on another device."""
    return {k: v.to(device) for k, v in obs.items()} if isinstance(obs, Mapping) else obs.to(device)


def row(obs: Any, index: int) -> Any:
    """Row ``index`` of an observation, as a batch of one."""
    return {k: v[index : index + 1] for k, v in obs.items()} if isinstance(obs, Mapping) else obs[index : index + 1]
