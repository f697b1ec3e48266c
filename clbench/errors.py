"""Errors that users see. Each message says what was wrong, where, and what to do.

All derive from :class:`ClbenchError`; the command line prints them as one paragraph and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClbenchError(Exception):
    """Bad input or a broken contract: something the user can put right."""


class ConfigError(ClbenchError, ValueError):
    """A configuration key or value is wrong."""


class UnknownNameError(ConfigError):
    """A name is not in a registry or not a key of a configuration."""


class ContractError(ClbenchError):
    """A plug-in (agent, environment, stream) does not keep the contract of :mod:`clbench.contracts`."""


class DataError(ClbenchError):
    """A data set, checkpoint or run directory is corrupt, truncated or of another version."""


class MissingExtraError(ClbenchError, ImportError):
    """An optional dependency is not installed."""


class CapacityExhausted(ClbenchError):
    """A network has no free units left for another task."""


class Interrupted(ClbenchError):
    """The user asked to stop (Ctrl-C); everything done so far has been saved."""


def unknown_name(kind: str, name: str, known: Iterable[str], where: str = "") -> UnknownNameError:
    """An :class:`UnknownNameError` that proposes the nearest known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"Known: {', '.join(known) or 'none'}."
    return UnknownNameError(f"Unknown {kind} {name!r}{' in ' + where if where else ''}. {hint}")


def missing_extra(package: str, extra: str, why: str) -> MissingExtraError:
    """A :class:`MissingExtraError` of one sentence with the pip line."""
    return MissingExtraError(f"{why} needs the package {package!r}: install it with `pip install 'clbench[{extra}]'`.")
