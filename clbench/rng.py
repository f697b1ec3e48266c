"""Random numbers by name, not by order of drawing.

Everything random in a run is derived from one seed and a path of names, for example ``(seed, "stream")`` or
``(seed, "evaluation", "maze-3")``. Two parts of a program that use different names can never influence each other, so
the stream is the same for every agent and evaluation cannot change training.

Environments use :func:`hash_uniform`, a counter-based generator: the numbers of one episode are a pure function of its
seed, so they depend neither on the number of parallel environments nor on the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and on every name of the path (SHA-256, stable across versions)."""
    escaped = (f"{type(n).__name__}:{n}".replace("\\", "\\\\").replace("/", "\\/") for n in names)
    text = "/".join([str(int(seed)), *escaped])  # a slash inside a name is no border between names
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def torch_generator(seed: int, *names: str | int, device: Any = "cpu") -> torch.Generator:
    """A ``torch.Generator`` on ``device`` for the path ``names``."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A ``numpy.random.Generator`` (Philox) for the path ``names``."""
    import numpy as np

    return np.random.Generator(np.random.Philox(derive_seed(seed, *names)))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of SplitMix64 (Steele et al. 2014) on int64 tensors; arithmetic wraps, shifts are made logical."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def hash_seeds(seeds: torch.Tensor, *counters: torch.Tensor | int) -> torch.Tensor:
    """Mix int64 ``seeds`` (any shape) with broadcastable ``counters`` into new non-negative int64 seeds."""
    for c in counters:
        seeds = _splitmix64(_splitmix64(seeds) + c)
    return _splitmix64(seeds) & ((1 << 63) - 1)


def hash_uniform(seeds: torch.Tensor, counter: torch.Tensor | int, n: int) -> torch.Tensor:
    """Uniform numbers in [0, 1): ``n`` per seed, a pure function of (seed, counter).

    Args:
        seeds: int64 (B,).
        counter: what the numbers are for, for example the step of the episode; int or int64 (B,).
        n: how many numbers per row.

    Returns:
        float64 (B, n).
    """
    import torch

    key = hash_seeds(seeds, counter)[:, None] + torch.arange(n, device=seeds.device) * 2
    return ((_splitmix64(key) >> 10) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53


def get_global_state() -> dict[str, Any]:
    """The states of the process-wide generators of Python, NumPy and torch (CPU and, where in use, CUDA).

    The result holds only tensors and plain Python values, so that it can be stored in a checkpoint and read back with
    ``weights_only=True``.
    """
    import numpy as np
    import torch

    version, internal, gauss = random.getstate()
    name, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(pos),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_global_state(state: dict[str, Any]) -> None:
    """Restore what :func:`get_global_state` returned."""
    import numpy as np
    import torch

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_global(seed: int) -> None:
    """Seed the process-wide generators. Only for libraries that offer nothing else; see :func:`sealed_global_rng`."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextlib.contextmanager
def sealed_global_rng() -> Iterator[None]:
    """Whatever the block draws from process-wide generators is undone when it ends."""
    state = get_global_state()
    try:
        yield
    finally:
        set_global_state(state)
