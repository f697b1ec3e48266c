"""``clbench verify``: have finished tasks changed? Evidence about a run, or about a network of one's own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

from clbench.errors import ConfigError

DESCRIPTION = (
    "Evidence, in five levels, that the eidetic networks of a run have not changed what finished tasks compute. Nothing in "
    "the run directory is changed. Exit code 0 if nothing failed and L0, L2 and L3 passed, else 1."
)


def verify(arguments: list[str], parse: Callable[..., Any]) -> int:
    """The verb ``verify``. Returns 1 if a level fails, or one that can be judged anywhere was not."""
    if not any(not a.startswith("-") for a in arguments) and not {"-h", "--help"} & set(arguments):
        raise ConfigError(
            "Say what to verify: clbench verify RUN_DIR, or clbench verify module:attribute for a network of your own."
        )
    parsed = parse(_arguments(), arguments, "clbench verify", DESCRIPTION)
    # what a plug-in prints must not get between the braces
    with contextlib.redirect_stdout(sys.stderr) if parsed.json else contextlib.nullcontext():
        from clbench.verification import verify_target

        found = verify_target(parsed.target, probes=parsed.probes, device=parsed.device)
    print(json.dumps(found.to_dict(), indent=1, allow_nan=False) if parsed.json else found)
    return 0 if found.ok else 1


def _arguments() -> type:
    import tyro

    def option(help: str) -> Any:
        return tyro.conf.arg(help=help)

    target = option("a run directory; or module:attribute, an EideticNetwork or a function that returns one")
    rows = option("use only the first N rows of the inputs that an agent or your function gives (default: all)")
    fields: list[Any] = [
        ("target", Annotated[str, tyro.conf.Positional, target]),
        ("json", Annotated[bool, option("print one JSON object")], False),
        ("probes", Annotated[int | None, rows], None),
        ("device", Annotated[str | None, option("torch device (default: that of the run)")], None),
    ]
    return dataclasses.make_dataclass("Verify", fields)
