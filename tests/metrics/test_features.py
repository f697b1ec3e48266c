"""Measures of activations: closed forms, brute force, invariants, and the definitions that they are mistaken for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.agents.jepa import diagnostics
from clbench.errors import DataError
from clbench.metrics import features as f


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(n, d, seed=seed)).Q


RANKS = [f.effective_rank, f.stable_rank, f.srank, f.approximate_rank, f.rankme]
shapes = st.tuples(st.integers(2, 12), st.integers(1, 9), st.integers(0, 99))


# -- inactive units ------------------------------------------------------------------------------------------------------


def test_dormant_share_counts_units_against_the_mean_of_the_layer() -> None:
    h = torch.tensor([[1.0, 0.0, -0.2, 3.0], [-1.0, 0.0, 0.2, 3.0]])  # mean sizes 1, 0, 0.2, 3; their mean 1.05
    assert [f.dormant_share(h, tau) for tau in (0.0, 0.1, 0.2, 0.96, 3.0)] == [0.25, 0.25, 0.5, 0.75, 1.0]


def test_a_silent_layer_is_all_dormant_and_has_no_rank() -> None:
    h = torch.zeros(5, 3)
    assert f.dormant_share(h) == f.never_active_share(h) == f.zero_share(h) == 1
    assert all(math.isnan(rank(h)) for rank in RANKS) and math.isnan(f.linear_cka(h, h))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_measured(bad: float) -> None:
    h = torch.full((4, 2), bad)
    assert all(math.isnan(v) for v in f.feature_measures(h).values())


@given(shapes, st.floats(0, 1.5), st.floats(0.01, 100))
def test_dormancy_is_what_the_definition_says_whatever_the_scale(shape, tau: float, scale: float) -> None:
    n, d, seed = shape
    h = torch.relu(randn(n, d, seed=seed) - 0.8)
    sizes = [sum(abs(float(h[x, i])) for x in range(n)) / n for i in range(d)]
    mean = sum(sizes) / d
    expected = sum(s / mean <= tau for s in sizes) / d if mean else 1.0
    if any(math.isclose(s, tau * mean, rel_tol=1e-9) and s for s in sizes):
        return  # a tie, which rounding decides
    assert f.dormant_share(h, tau) == pytest.approx(expected)
    assert f.dormant_share(scale * h, tau) == pytest.approx(expected)


def test_sparsity_rarity_and_dormancy_are_three_things() -> None:
    alternating = torch.eye(200)  # every unit is off for 199 of 200 inputs, none always
    assert f.zero_share(alternating) == pytest.approx(0.995)
    assert f.rarely_active_share(alternating) == 1.0  # active on 0.5 % of the inputs
    assert f.dormant_share(alternating, 0.1) == f.never_active_share(alternating) == 0.0
    faint = torch.ones(10, 4)
    faint[:, 0] = 1e-9  # always active, but too small to matter
    assert f.dormant_share(faint, 0.025) == 0.25 and f.rarely_active_share(faint) == f.zero_share(faint) == 0


def test_rarely_active_is_strictly_below_the_share() -> None:
    h = torch.zeros(100, 2)
    h[0] = 1.0
    assert f.rarely_active_share(h, 0.01) == 0 and f.rarely_active_share(h, 0.011) == 1


# -- ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 5, 40])
def test_ranks_of_orthonormal_features_and_of_one_direction(d: int) -> None:
    q = 7 * orthonormal(64, d)
    assert f.effective_rank(q) == pytest.approx(d) and f.stable_rank(q) == pytest.approx(d)
    assert f.rankme(q) == pytest.approx(d, rel=1e-3)
    assert f.srank(q) == f.approximate_rank(q) == math.ceil(0.99 * d - 1e-9)
    line = randn(64, 1) @ randn(1, d, seed=1)
    for rank in RANKS:
        assert rank(line) == pytest.approx(1, abs=1e-4)


def test_ranks_of_a_known_spectrum() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.02], dtype=torch.float64)
    phi = orthonormal(30, 5) @ torch.diag(s) @ orthonormal(5, 5, seed=1)
    q = (s / s.sum()).numpy()
    assert f.effective_rank(phi) == pytest.approx(math.exp(-(q * np.log(q)).sum()))
    assert f.stable_rank(phi) == pytest.approx(float((s**2).sum()) / 16)
    assert (
        f.srank(phi) == 4 and f.approximate_rank(phi) == 4
    )  # 7.5 / 7.52; 21 / 21.25 = 0.9882 < 0.99 without the fourth
    assert f.approximate_rank(phi, 0.02) == 3 and f.srank(phi, 0.02) == 4  # squared or not is another number


@given(shapes)
def test_order_and_bounds_of_ranks(shape) -> None:
    n, d, seed = shape
    phi = randn(n, d, seed=seed)
    most = min(n, d) * (1 + 1e-9)
    for rank in (f.effective_rank, f.stable_rank, f.srank, f.approximate_rank):
        assert 1 - 1e-9 <= rank(phi) <= most
        assert rank(3 * phi @ orthonormal(d, d, seed=seed + 1)) == pytest.approx(rank(phi), rel=1e-6)
    assert f.approximate_rank(phi) <= f.srank(phi)
    assert f.rankme(phi) == pytest.approx(f.effective_rank(phi), rel=1e-3)


def test_what_a_probe_writes_is_each_of_them() -> None:
    h = torch.relu(randn(40, 9) - 1)
    alone = {r.__name__: r(h) for r in RANKS} | {f"dormant_{t:g}": f.dormant_share(h, t) for t in f.TAUS}
    assert f.feature_measures(h) == alone | {"rarely_active": f.rarely_active_share(h), "zeros": f.zero_share(h)}


def test_there_is_one_rankme() -> None:
    assert diagnostics.rankme is f.rankme


def test_negative_control_centred_features_have_another_rank() -> None:
    phi = randn(50, 4) + 10
    assert f.effective_rank(phi) < 0.7 * f.effective_rank(phi - phi.mean(0))


# -- change --------------------------------------------------------------------------------------------------------------


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """The biased estimate, element by element: tr(K H L H) / (n - 1)^2."""
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ h @ m @ h)) / (n - 1) ** 2


@given(st.integers(3, 20), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_cka_is_normalised_hsic_and_the_feature_form(n: int, d: int, e: int, seed: int) -> None:
    x, y = randn(n, d, seed=seed) + 5, randn(n, e, seed=seed + 1000) - 3
    k, m = (x @ x.T).numpy(), (y @ y.T).numpy()
    assert f.linear_cka(x, y) == pytest.approx(hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m)), rel=1e-6)
    xc, yc = x - x.mean(0), y - y.mean(0)
    norm = torch.linalg.matrix_norm
    assert f.linear_cka(x, y) == pytest.approx(float(norm(yc.T @ xc) ** 2 / (norm(xc.T @ xc) * norm(yc.T @ yc))))


@given(st.integers(0, 99), st.floats(0.01, 50))
def test_cka_is_blind_to_rotation_scale_and_shift_and_to_nothing_else(seed: int, scale: float) -> None:
    x = randn(40, 5, seed=seed)
    turned = scale * x @ orthonormal(5, 5, seed=seed + 1) + 2
    assert f.linear_cka(x, x) == pytest.approx(1) and f.linear_cka(x, turned) == pytest.approx(1)
    stretched = x * torch.tensor(
        [30.0, 1, 1, 1, 1]
    )  # no isotropic scaling: linear, invertible, but not the same features
    assert f.linear_cka(x, stretched) < 0.9
    assert f.linear_cka(x, x[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]) < 0.5


def test_cka_of_independent_features_is_about_zero_where_there_are_many_inputs() -> None:
    assert f.linear_cka(randn(3000, 4), randn(3000, 4, seed=1)) < 0.01
    assert f.linear_cka(randn(10, 500), randn(10, 500, seed=1)) > 0.8  # few inputs: the warning of the docstring


def test_cka_wants_the_same_inputs() -> None:
    with pytest.raises(DataError, match="3 and 4 rows"):
        f.linear_cka(randn(3, 2), randn(4, 2))


def test_weight_norms() -> None:
    params = [torch.tensor([[3.0, -4.0]]), torch.tensor([0.0, 12.0])]
    assert f.weight_norms(params) == {"weight_mean_abs": 4.75, "weight_l2": 13.0}
    assert all(math.isnan(v) for v in f.weight_norms([]).values())


# -- retrained head ------------------------------------------------------------------------------------------------------


def blobs(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (rows,), generator=torch.Generator().manual_seed(seed))
    return 6 * torch.eye(3, dtype=torch.float64)[y] + randn(rows, 3, seed=seed + 1), y + 4


def test_a_new_head_reads_classes_off_features_that_have_them() -> None:
    (x, y), (test, y_test) = blobs(200, 0), blobs(200, 10)
    assert f.retrained_head_accuracy(x, y, test, y_test) > 0.98
    turn = randn(3, 3, seed=5)  # an old head would be lost, a new one is not: nothing was forgotten
    assert f.retrained_head_accuracy(x @ turn, y, test @ turn, y_test) > 0.98


def test_a_new_head_finds_nothing_in_noise_or_constants() -> None:
    y, y_test = blobs(200, 0)[1], blobs(200, 10)[1]
    assert f.retrained_head_accuracy(randn(200, 3, seed=7), y, randn(200, 3, seed=8), y_test) < 0.45
    constant = torch.ones(200, 3)
    share = float((y_test == y.mode().values).double().mean())  # the most frequent class is the best guess
    assert f.retrained_head_accuracy(constant, y, constant, y_test) == pytest.approx(share)


def test_a_class_that_was_not_there_is_wrong() -> None:
    x, y = blobs(90, 0)
    only = y != 6
    accuracy = f.retrained_head_accuracy(x[only], y[only], x, y)
    assert accuracy == pytest.approx(float(only.double().mean()), abs=0.02)


@settings(max_examples=20)
@given(st.integers(0, 99), st.sampled_from([(5, 12), (12, 5)]))
def test_ridge_weights_minimise_the_penalised_error(seed: int, shape: tuple[int, int]) -> None:
    n, d = shape
    x, y = randn(n, d, seed=seed), randn(n, 2, seed=seed + 1)
    w = f.ridge_weights(x, y, 0.3)
    assert torch.allclose(x.T @ (x @ w - y) + 0.3 * w, torch.zeros(d, 2, dtype=torch.float64), atol=1e-9)
