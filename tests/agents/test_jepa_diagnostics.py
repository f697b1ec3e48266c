"""Diagnostics of collapse have known values on latents made for the purpose."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.agents.jepa.diagnostics import deviations, diagnose, probe_r2, rankme


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rank_of_orthonormal_columns_is_their_number_and_of_one_direction_is_one() -> None:
    assert rankme(torch.linalg.qr(randn(50, 8)).Q) == pytest.approx(8, rel=1e-4)
    assert rankme(randn(50, 1) @ randn(1, 8, seed=1)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-3)


def test_rank_follows_the_entropy_of_the_singular_values() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    p = values / values.sum()
    expected = math.exp(-float((p * p.log()).sum()))
    q = torch.linalg.qr(randn(20, 4)).Q
    assert rankme(q * values) == pytest.approx(expected, rel=1e-4)
    squares = values**2 / (values**2).sum()  # the entropy of the eigenvalues of the covariance is another number
    assert abs(math.exp(-float((squares * squares.log()).sum())) - expected) > 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 999))
def test_rank_is_bounded_and_blind_to_scale_and_rotation(n: int, d: int, scale: float, seed: int) -> None:
    z = randn(n, d, seed=seed)
    rotation = torch.linalg.qr(randn(d, d, seed=seed + 1)).Q
    rank = rankme(z)
    assert 1 - 1e-3 <= rank <= min(n, d) + 1e-3
    assert rankme(z * scale @ rotation) == pytest.approx(rank, rel=1e-3)


def test_deviations_find_the_dead_dimension() -> None:
    z = randn(400, 3) * torch.tensor([1.0, 2.0, 0.0])
    smallest, mean = deviations(z)
    assert smallest == 0 and mean == pytest.approx(1, rel=0.1)


def test_the_probe_reads_linear_states_and_nothing_from_noise() -> None:
    z = randn(400, 6)
    state = z @ randn(6, 2, seed=1) + 5
    assert probe_r2(z, state) > 0.999
    assert abs(probe_r2(randn(400, 6, seed=2), state)) < 0.1
    half = probe_r2(z, state + state.std(0) * randn(400, 2, seed=3))
    assert half == pytest.approx(0.5, abs=0.1)


def test_the_probe_is_measured_on_rows_it_was_not_fitted_on() -> None:
    """As many features as fitted rows explain any noise perfectly; held-out rows tell."""
    z, noise = randn(100, 50), randn(100, 1, seed=1)
    fitted = torch.linalg.lstsq(z[::2], noise[::2]).solution
    assert (z[::2] @ fitted - noise[::2]).abs().max() < 1e-3  # what a probe without a held-out half would report
    assert probe_r2(z, noise) < 0.2


def test_the_probe_takes_more_features_than_rows_and_features_of_any_scale() -> None:
    state = randn(200, 2)
    z = state @ randn(2, 300, seed=1)
    assert probe_r2(z, state) > 0.99
    assert probe_r2(z[:, :4] * torch.tensor([1e-3, 1.0, 1e3, 1.0]), state) > 0.99
    constant = torch.cat([state, torch.full((200, 1), 3.0)], 1)
    assert probe_r2(z, constant) == pytest.approx(probe_r2(z, state))


def test_what_cannot_be_measured_is_nan() -> None:
    z = randn(20, 3)
    assert math.isnan(rankme(z.new_full((20, 3), math.nan))) and math.isnan(rankme(torch.zeros(20, 3)))
    assert math.isnan(probe_r2(z, torch.ones(20, 2))) and math.isnan(probe_r2(z[:3], z[:3]))
    assert math.isnan(probe_r2(z / 0, z))


def test_names_in_the_log() -> None:
    z = randn(40, 2, 2, 2)
    assert set(diagnose(z)) == {"rankme", "latent_std_min", "latent_std_mean"}
    assert set(diagnose(z, z.flatten(1)[:, :2])) == {"rankme", "latent_std_min", "latent_std_mean", "probe_r2"}
    assert diagnose(z, z.flatten(1)[:, :2])["probe_r2"] > 0.99
