"""Large generated data sets on disk, so that they are made once.

The cache can never change a result: a file is found by everything its content depends on (id, options, the source code of
the generator, versions of the libraries that draw the numbers), and its checksums are verified when it is read. A damaged
file is made again; a folder that cannot be written is done without. The whole folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from clbench.data.dataset import OfflineDataset
from clbench.data.storage import load_stored_dataset, save_dataset
from clbench.errors import ClbenchError, DataError
from clbench.records import content_hash
from clbench.registry import load_object

WORTH_IT = 1_000_000  # transitions; fewer are made faster than they are worth keeping


def data_folder() -> Path:
    """``$CLBENCH_DATA``, else ``$XDG_CACHE_HOME/clbench/data``, else ``~/.cache/clbench/data``."""
    if os.environ.get("CLBENCH_DATA"):
        return Path(os.environ["CLBENCH_DATA"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache and os.path.isabs(cache) else Path("~/.cache").expanduser()) / "clbench" / "data"


def safe_name(text: str) -> str:
    """``text`` as one part of a path."""
    return re.sub(r"[^\w.=-]", "_", text).lstrip(".") or "_"


def cache_path(name: str, options: Mapping[str, Any], code: Iterable[str]) -> Path:
    """Where the data set ``name`` with these options is kept.

    Args:
        code: modules whose source the content depends on, and files in packages (``package/file.json``).
    """
    sources = {source: _source_hash(source) for source in code}
    libraries = {package: metadata.version(package) for package in ("numpy", "scipy", "torch")}
    key = content_hash([name, dict(options), sources, libraries])
    return data_folder() / "generated" / f"{safe_name(name)}-{key}.npz"


def cached(
    name: str, options: Mapping[str, Any], transitions: int, make: Callable[[], OfflineDataset], code: Iterable[str]
) -> OfflineDataset:
    """What ``make`` returns, from the cache where it is there; see the module's docstring.

    Args:
        name: of the data set, without options.
        options: all that ``make`` depends on besides the name.
        transitions: size; below :data:`WORTH_IT` nothing is stored.
        code: modules that ``make`` runs, and files in packages that it reads (``package/file.json``).
    """
    if transitions < WORTH_IT:
        return _plain(make())
    path = cache_path(name, options, code)
    if is_kept(path):
        try:
            return load_stored_dataset(path)
        except DataError as error:
            warnings.warn(f"The cached data set {name!r} is made again: {error}", stacklevel=2)
    data = _plain(make())
    with contextlib.suppress(ClbenchError, OSError):  # a full or read-only disk: the data are here all the same
        path.parent.mkdir(parents=True, exist_ok=True)
        save_dataset(data, path)
    return data


def is_kept(path: Path) -> bool:
    """Whether the cache has this file; not so in folders that cannot be searched."""
    try:
        return path.exists()
    except OSError:
        return False


def _plain(data: OfflineDataset) -> OfflineDataset:
    """With metadata as a file gives them back (lists instead of tuples)."""
    data.metadata = json.loads(json.dumps(data.metadata))
    return data


def _source_hash(source: str) -> str:
    package, _, file = source.rpartition("/")
    if package:
        content = importlib.resources.files(package).joinpath(file).read_bytes()
    else:
        load_object(f"{source}:__name__")
        content = Path(sys.modules[source].__file__ or "").read_bytes()
    return hashlib.sha256(content).hexdigest()
