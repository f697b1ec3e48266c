"""Random numbers by name: paths, the counter-based generator, the process-wide state."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clbench.rng import (
    derive_seed,
    get_global_state,
    hash_seeds,
    hash_uniform,
    numpy_generator,
    sealed_global_rng,
    seed_global,
    set_global_state,
    torch_generator,
)

NAMES = st.lists(st.one_of(st.text(max_size=6), st.text("ab/\\:", max_size=6), st.integers()), max_size=3)


# -- names ---------------------------------------------------------------------------------------------------------------


def test_derive_seed_is_the_sha256_of_the_path() -> None:
    def again(text: str) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") // 2

    assert derive_seed(7) == again("7")
    assert derive_seed(7, "evaluation", 3) == again("7/str:evaluation/int:3")
    assert derive_seed(7, "a/b") == again("7/str:a\\/b")


@given(st.integers(), NAMES, st.integers(), NAMES)
def test_different_paths_have_different_seeds(seed: int, names: list, other_seed: int, other: list) -> None:
    same = (seed, names) == (other_seed, other)
    assert (derive_seed(seed, *names) == derive_seed(other_seed, *other)) == same
    assert 0 <= derive_seed(seed, *names) < 2**63


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a", "b"), (0, "a/str:b")),  # a slash in a name is no border
        ((0, "1"), (0, 1)),
        ((0, "a"), (0, "a", "")),
        ((1, "a"), (11, "a")),
        ((0, "a", "b"), (0, "b", "a")),
        ((0, "a\\", "b"), (0, "a\\/str:b")),
    ],
)
def test_paths_that_look_alike_differ(one: tuple, other: tuple) -> None:
    assert derive_seed(*one) != derive_seed(*other)


def overlaps(seed_of: Callable[[int, int], int]) -> bool:
    """Whether two streams of two neighbouring runs draw the same numbers."""
    draws = [
        tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed_of(run, k))).tolist())
        for run in range(4)
        for k in range(3)
    ]
    return len(set(draws)) < len(draws)


def test_runs_and_streams_share_no_numbers() -> None:
    assert not overlaps(lambda run, k: derive_seed(run, "stream", k))
    assert overlaps(lambda run, k: run + k)  # negative control: the usual `seed + k`


def test_generators_are_independent_by_name_and_repeatable() -> None:
    a, b = (torch.randn(20_000, generator=torch_generator(0, name)) for name in ("agent", "stream"))
    assert torch.equal(a, torch.randn(20_000, generator=torch_generator(0, "agent")))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 20_000**0.5
    c, d = (numpy_generator(0, name).standard_normal(20_000) for name in ("agent", "stream"))
    assert np.array_equal(c, numpy_generator(0, "agent").standard_normal(20_000))
    assert abs(np.corrcoef(c, d)[0, 1]) < 5 / 20_000**0.5


# -- numbers by counter --------------------------------------------------------------------------------------------------

GRID = torch.arange(64)


def neighbours(numbers: Callable[[torch.Tensor, int, int], torch.Tensor]) -> torch.Tensor:
    """(seeds 64, counters 64, n 8): numbers of neighbouring seeds and counters."""
    return torch.stack([numbers(GRID, c, 8) for c in range(64)], dim=1)


def worst_correlation(u: torch.Tensor) -> float:
    """Largest absolute correlation, in standard errors, between numbers one apart along each axis."""
    worst = 0.0
    for axis in range(3):
        x, y = u.narrow(axis, 0, u.shape[axis] - 1), u.narrow(axis, 1, u.shape[axis] - 1)
        r = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        worst = max(worst, abs(float(r)) * x.numel() ** 0.5)
    return worst


def weak_uniform(seeds: torch.Tensor, counter: int, n: int) -> torch.Tensor:
    """A broken generator: seeds and counters are added, not mixed."""
    return hash_uniform(seeds + counter, 0, n)


def linear_uniform(seeds: torch.Tensor, counter: int, n: int) -> torch.Tensor:
    """A broken generator: a golden-ratio sequence, uniform but not independent."""
    k = seeds[:, None] * 512 + counter * 8 + torch.arange(n)
    return (k.double() * 0.6180339887498949) % 1


def uniform_p_value(u: torch.Tensor) -> float:
    return float(stats.kstest(u.flatten().numpy(), "uniform").pvalue)


def test_hash_uniform_is_uniform() -> None:
    u = neighbours(hash_uniform)
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert uniform_p_value(u) > 1e-3
    assert uniform_p_value(u**1.05) < 1e-3  # negative control: slightly bent
    # pairs of successive numbers fill the square evenly
    counts, *_ = np.histogram2d(u[..., ::2].flatten(), u[..., 1::2].flatten(), bins=16, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.flatten()).pvalue > 1e-3


def test_neighbouring_seeds_and_counters_are_uncorrelated() -> None:
    u = neighbours(hash_uniform)
    assert worst_correlation(u) < 4.5
    assert len(u.unique()) == u.numel()
    assert worst_correlation(neighbours(linear_uniform)) > 4.5  # negative controls
    weak = neighbours(weak_uniform)
    assert len(weak.unique()) < weak.numel()


def test_low_bits_are_random_too() -> None:
    bits = torch.stack([(neighbours(hash_uniform) * 2**k).floor() % 2 for k in (1, 20, 40, 53)])
    n = bits[0].numel()
    assert bool(((bits.flatten(1).mean(1) - 0.5).abs() < 4.5 * 0.5 / n**0.5).all())


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8), st.integers(0, 10**6), st.data())
def test_a_row_depends_on_its_seed_alone(seeds: list[int], counter: int, data: st.DataObject) -> None:
    batch = torch.tensor(seeds)
    u = hash_uniform(batch, counter, 5)
    order = torch.tensor(data.draw(st.permutations(range(len(seeds)))))
    assert torch.equal(hash_uniform(batch[order], counter, 5), u[order])
    assert torch.equal(hash_uniform(batch[:1], counter, 5), u[:1])
    assert torch.equal(hash_uniform(batch, torch.full_like(batch, counter), 5), u)  # counters per row
    assert torch.equal(hash_uniform(batch, counter, 3), u[:, :3])  # asking for more changes nothing before


def reference_splitmix(x: int) -> int:
    """SplitMix64 in Python's whole numbers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_hashes_equal_a_reference_in_whole_numbers(seed: int, counter: int) -> None:
    mixed = reference_splitmix((reference_splitmix(seed % 2**64) + counter) % 2**64)
    key = reference_splitmix(mixed) % 2**63
    assert int(hash_seeds(torch.tensor([seed]), counter)[0]) == key
    expected = [((reference_splitmix((key + 2 * j) % 2**64) >> 10) % 2**53) * 2.0**-53 for j in range(3)]
    assert hash_uniform(torch.tensor([seed]), counter, 3)[0].tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hash_uniform_is_the_same_on_the_gpu() -> None:
    seeds = torch.arange(-500, 500) * 10**15
    assert torch.equal(hash_uniform(seeds.cuda(), 3, 7).cpu(), hash_uniform(seeds, 3, 7))


# -- process-wide state --------------------------------------------------------------------------------------------------


def draws() -> list[float]:
    """One number of every kind; Gaussian ones leave a second value cached in Python and NumPy."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
        float(torch.randn(())),
    ]


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_global_state_survives_a_checkpoint(seed: int, drawn: int) -> None:
    with sealed_global_rng():
        seed_global(seed)
        for _ in range(drawn):
            draws()
        buffer = io.BytesIO()
        torch.save(get_global_state(), buffer)
        expected = [draws() for _ in range(3)]
        seed_global(0)
        buffer.seek(0)
        set_global_state(torch.load(buffer, weights_only=True))
        assert [draws() for _ in range(3)] == expected


def test_global_state_without_the_cached_gaussians_is_not_enough() -> None:
    """Negative control: a state that forgets the cached second value continues differently."""
    with sealed_global_rng():
        seed_global(3)
        draws()
        state = get_global_state()
        expected = draws()
        state["python"][2] = None
        state["numpy"][3] = 0
        set_global_state(state)
        got = draws()
        assert got[1] != expected[1] and got[3] != expected[3]


def test_sealed_block_leaves_no_trace_even_when_it_fails() -> None:
    with sealed_global_rng():
        seed_global(1)
        expected = draws()
        seed_global(1)
        with pytest.raises(ZeroDivisionError), sealed_global_rng():
            draws()
            raise ZeroDivisionError
        assert draws() == expected
        seed_global(1)
        draws()  # negative control: not sealed
        assert draws() != expected


def test_seed_global_takes_large_seeds() -> None:
    with sealed_global_rng():
        seed_global(derive_seed(0, "agent"))
        first = draws()
        seed_global(derive_seed(0, "agent"))
        assert draws() == first
