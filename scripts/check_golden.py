"""Compare the offline goal-conditioned agents with the numbers of their reference implementations.

    python scripts/check_golden.py FOLDER

FOLDER holds golden cases (see clbench/testing/golden.py); tests/data/golden_gcrl has some. One line per case, and a last
line `N passed, M failed`; the exit code is 1 if any failed, 2 if FOLDER has no index.
"""

from __future__ import annotations

import argparse
import sys

import torch

from clbench.errors import ClbenchError
from clbench.testing.golden import check_case, read_case, read_index


def _name(entry: object) -> str:
    return str(entry.get("file") if isinstance(entry, dict) else entry).removesuffix(".npz")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="with index.json and one .npz per case")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    passed = failed = 0
    try:
        index = read_index(folder)
    except ClbenchError as error:
        print(error, file=sys.stderr)
        return 2
    for entry in index:
        try:
            outcome = check_case(read_case(folder, entry))
            ok, line = outcome.ok, str(outcome)
        except Exception as error:  # noqa: BLE001  a case that cannot be computed has failed; the others still count
            ok, line = False, f"FAILED  {_name(entry):<46} {type(error).__name__}: {error}"
        print(line)
        passed, failed = passed + ok, failed + (not ok)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
