"""What a network's activations say about its plasticity: inactive units, ranks, drift of features, size of weights.

Every function takes activations ``h`` (N, D...) of one layer on a fixed batch that is never trained on, one row per
input; further axes are flattened. Names differ between papers for the same number and agree for different ones, so each
docstring has the formula. ``s_1 >= s_2 >= ...`` are the singular values of the matrix ``Phi`` (N, D) of the activations,
which is not centred. What is not defined (activations that are not finite, a rank of nothing) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from clbench.errors import DataError

TAUS = (0.0, 0.025, 0.1)
"""Thresholds of Sokar et al. 2023."""
RANKME_EPS = 1e-7
_ROUNDING = 1e-12  # a share that reaches its threshold but for rounding has reached it


def _matrix(h: Tensor) -> Tensor | None:
    """``h`` as (N, D) float64; ``None`` where no measure is defined."""
    h = h.detach().flatten(1).to(torch.float64)
    return h if h.numel() and bool(torch.isfinite(h).all()) else None


# -- inactive units ----------------------------------------------------------------------------------------------------


def dormant_share(h: Tensor, tau: float = 0.0) -> float:
    """Share of the D units with ``s_i = E_x |h_i(x)| / ((1/D) sum_k E_x |h_k(x)|) <= tau``: tau-dormant units.

    Sokar et al. 2023 (The Dormant Neuron Phenomenon), definition 1. A layer that is silent on all inputs is all dormant.
    """
    h_ = _matrix(h)
    if h_ is None:
        return math.nan
    size = h_.abs().mean(0)
    return float((size <= tau * size.mean()).to(torch.float64).mean())


def never_active_share(h: Tensor) -> float:
    """Share of the D units with ``h_i(x) = 0`` for every one of the N inputs: dead units of a rectifier.

    It equals ``dormant_share(h, 0)``. Units of tanh or GELU are hardly ever exactly 0, and this is 0 whatever they do.
    """
    h_ = _matrix(h)
    return math.nan if h_ is None else float((h_ == 0).all(0).to(torch.float64).mean())


def rarely_active_share(h: Tensor, below: float = 0.01) -> float:
    """Share of the D units that are active (``h_i(x) != 0``) on less than this share of the N inputs.

    Dohare et al. 2024 (Loss of plasticity in deep continual learning) call them dormant, with 1 % of the inputs.
    """
    h_ = _matrix(h)
    if h_ is None:
        return math.nan
    active = (h_ != 0).to(torch.float64).mean(0)
    return float((active < below).to(torch.float64).mean())


def zero_share(h: Tensor) -> float:
    """Share of the N D activations that are exactly 0: sparsity, which is not dormancy.

    Elsayed & Mahmood 2024 (UPGD) report it, of one input at a time. A network of which half the units are off for each
    input has 0.5 here, and may have no unit that is off for all of them.
    """
    h_ = _matrix(h)
    return math.nan if h_ is None else float((h_ == 0).to(torch.float64).mean())


# -- ranks -------------------------------------------------------------------------------------------------------------


def _singular_values(h: Tensor) -> Tensor | None:
    phi = _matrix(h)
    return None if phi is None or not bool(phi.any()) else torch.linalg.svdvals(phi)


def effective_rank(h: Tensor) -> float:
    """``exp(-sum_k q_k ln q_k)`` with ``q_k = s_k / sum_j s_j``: the exponential of the entropy of the spectrum.

    Roy & Vetterli 2007 (The effective rank). Between 1 and min(N, D).
    """
    return _entropy_rank(_singular_values(h))


def _entropy_rank(s: Tensor | None, eps: float = 0.0) -> float:
    if s is None:
        return math.nan
    return float(torch.exp(torch.special.entr(s / s.sum() + eps).sum()))


def rankme(h: Tensor, eps: float = RANKME_EPS) -> float:
    """``exp(-sum_k p_k log p_k)`` with ``p_k = s_k / sum_j s_j + eps``: :func:`effective_rank` but for ``eps``.

    RankMe (Garrido et al. 2023, arXiv 2210.02885), definition 1. Not centred, as in the paper.

    Args:
        h: (N, D...); use a few hundred rows, the rank cannot exceed their number.
        eps: of the paper.
    """
    return _entropy_rank(_singular_values(h), eps)


def stable_rank(h: Tensor) -> float:
    """``||Phi||_F^2 / ||Phi||_2^2 = sum_k s_k^2 / s_1^2``: the stable rank of linear algebra (Rudelson & Vershynin 2007).

    What the code of Dohare et al. 2024 calls stable rank is :func:`srank`.
    """
    return _stable_rank(_singular_values(h))


def _stable_rank(s: Tensor | None) -> float:
    return math.nan if s is None else float((s / s[0]).square().sum())


def srank(h: Tensor, delta: float = 0.01) -> float:
    """``min {k : sum_{i<=k} s_i / sum_i s_i >= 1 - delta}``: singular values, not squared, that make up 99 % of their
    sum.

    Kumar et al. 2021 (Implicit under-parameterization), there ``srank_delta``.
    """
    return _how_many(_singular_values(h), delta)


def approximate_rank(h: Tensor, delta: float = 0.01) -> float:
    """``min {k : sum_{i<=k} s_i^2 / sum_i s_i^2 >= 1 - delta}``: principal directions that carry 99 % of ``||Phi||_F^2``.

    Yang et al. 2020 (Harnessing structures for value-based planning). Squares fall faster: never above :func:`srank`.
    """
    s = _singular_values(h)
    return _how_many(None if s is None else s.square(), delta)


def _how_many(falling: Tensor | None, delta: float = 0.01) -> float:
    if falling is None:
        return math.nan
    share = falling.cumsum(0) / falling.sum()
    return float((share < 1 - delta - _ROUNDING).sum() + 1)


# -- change ------------------------------------------------------------------------------------------------------------


def linear_cka(x: Tensor, y: Tensor) -> float:
    """``CKA = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)``, the columns of X and Y centred: how alike two layers are.

    Kornblith et al. 2019 (Similarity of neural network representations revisited), linear kernel. Between 0 and 1; 1 for
    features that are a rotation, a reflection, a shift or a multiple of each other. It is computed from the (N, N) Gram
    matrices ``K = X X^T`` and ``L = Y Y^T`` as ``<K, L>_F / (||K||_F ||L||_F)``, which is the same. N should exceed both
    D by far: of few inputs in many dimensions, independent features too look alike. NaN for features that do not depend
    on the input.

    Args:
        x: (N, D...) features of N inputs.
        y: (N, E...) features of the same inputs, in the same order.

    Raises:
        DataError: the numbers of rows differ.
    """
    if len(x) != len(y):
        raise DataError(f"CKA compares features of the same inputs, got {len(x)} and {len(y)} rows.")
    grams = []
    for h in (x, y):
        m = _matrix(h)
        if m is None or bool((m == m[:1]).all()):
            return math.nan
        m = m - m.mean(0)
        gram = m @ m.T
        grams.append(gram / torch.linalg.matrix_norm(gram))
    return float((grams[0] * grams[1]).sum())


@torch.no_grad()
def weight_norms(params: Iterable[Tensor]) -> dict[str, float]:
    """``weight_mean_abs``: mean of ``|w|`` over all numbers; ``weight_l2``: ``sqrt(sum w^2)``. Both grow as plasticity is
    lost.

    Dohare et al. 2024 report the first. NaN without parameters.
    """
    numbers = [p.detach().to(torch.float64).flatten() for p in params]
    if not numbers:
        return {"weight_mean_abs": math.nan, "weight_l2": math.nan}
    w = torch.cat(numbers)
    return {"weight_mean_abs": float(w.abs().mean()), "weight_l2": float(torch.linalg.vector_norm(w))}


def feature_measures(h: Tensor) -> dict[str, float]:
    """What a probe writes down of one layer: dormant shares and ranks, all of one decomposition."""
    s = _singular_values(h)
    return {
        **{f"dormant_{tau:g}": dormant_share(h, tau) for tau in TAUS},
        "rarely_active": rarely_active_share(h),
        "zeros": zero_share(h),
        "effective_rank": _entropy_rank(s),
        "stable_rank": _stable_rank(s),
        "srank": _how_many(s),
        "approximate_rank": _how_many(None if s is None else s.square()),
        "rankme": _entropy_rank(s, RANKME_EPS),
    }


# -- what features still tell ------------------------------------------------------------------------------------------


@torch.no_grad()
def retrained_head_accuracy(
    features_train: Tensor, y_train: Tensor, features_test: Tensor, y_test: Tensor, *, ridge: float = 1e-3
) -> float:
    """Accuracy of a new linear head on frozen features: what the features of a task still tell, whatever the old head
    says.

    Kim & Han 2023 (On the Stability-Plasticity Dilemma of Class-Incremental Learning) retrain the head on features of
    each phase. If it is as good on those of phase k as on those of the task's own phase, the features were not forgotten.
    The head here is the closed form of ridge regression to one-hot classes on standardised features: minimises ``|Y - X W
    - b|^2 + ridge N |W|^2``; it has no learning rate that a result could depend on.

    Args:
        features_train: (N, D...).
        y_train: (N,) integer classes.
        features_test: (M, D...), of other inputs.
        y_test: (M,); a class that the training rows lack is wrong.
        ridge: strength.

    Returns:
        NaN for features that are not finite, or no rows.
    """
    x, test = _matrix(features_train), _matrix(features_test)
    if x is None or test is None:
        return math.nan
    classes, index = y_train.unique(return_inverse=True)
    y = torch.nn.functional.one_hot(index, len(classes)).to(x)
    mean, scale, y_mean = x.mean(0), x.std(0, correction=0), y.mean(0)
    scale = torch.where(scale > 1e-8, scale, 1.0)
    weights = ridge_weights((x - mean) / scale, y - y_mean, ridge * len(x))
    chosen = classes[((test - mean) / scale @ weights + y_mean).argmax(1)]
    return float((chosen == y_test).to(torch.float64).mean())


def ridge_weights(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """``(X^T X + penalty)^-1 X^T Y``, through the smaller of the two Gram matrices: (N, D), (N, K) -> (D, K)."""
    n, d = x.shape
    if d > n:
        return x.T @ torch.linalg.solve(x @ x.T + penalty * torch.eye(n, dtype=x.dtype, device=x.device), y)
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(d, dtype=x.dtype, device=x.device), x.T @ y)
