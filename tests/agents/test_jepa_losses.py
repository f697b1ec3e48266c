"""Losses of the world models equal slow, literal versions of their formulas, in values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clbench.agents.jepa import losses
from clbench.agents.jepa.layers import StackedLinear
from clbench.agents.networks.mlp import count_parameters
from clbench.errors import ConfigError

# windows, frames, features: fewer and more features than windows, and an image-like latent
SHAPES = [(5, 4, (3,)), (3, 4, (7,)), (3, 3, (2, 2, 2)), (2, 3, (1,))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- the formulas, one number at a time ----------------------------------------------------------------------------------


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def sample_variance(values: list[Tensor], correction: int = 1) -> Tensor:
    m = mean(values)
    return torch.stack([(v - m) ** 2 for v in values]).sum() / (len(values) - correction)


def hinge(variance: Tensor, eps: float = 1e-4) -> Tensor:
    return torch.clamp(1 - (variance + eps) ** 0.5, min=0)


def literal_prediction(p: Tensor, z: Tensor) -> Tensor:
    p = p[:, :, None] if p.ndim == z.ndim else p
    total = torch.zeros((), dtype=z.dtype)
    for e in range(p.shape[2]):
        member = p[:, :, e].flatten(2)
        b, h, d = member.shape
        terms = [(z.flatten(2)[i, t, k] - member[i, t, k]) ** 2 for i in range(b) for t in range(h) for k in range(d)]
        total = total + mean(terms)
    return total


def literal_variance(z: Tensor, steps: range = range(1), correction: int = 1) -> Tensor:
    z = z.flatten(2)
    return mean(
        [
            hinge(sample_variance([z[b, t, d] for b in range(len(z))], correction))
            for t in steps
            for d in range(z.shape[2])
        ]
    )


def literal_covariance(z: Tensor, steps: range = range(1), adjusted: bool = True, centred: bool = True) -> Tensor:
    z = z.flatten(2)
    n, _, size = z.shape
    values = []
    for t in steps:
        m = [mean([z[b, t, d] for b in range(n)]) if centred else torch.zeros(()) for d in range(size)]
        total = torch.zeros((), dtype=z.dtype)
        for i in range(size):
            for j in range(size):
                if i != j:
                    c = sum((z[b, t, i] - m[i]) * (z[b, t, j] - m[j]) for b in range(n)) / (n - 1)
                    total = total + c**2
        values.append(total / (max(size * (size - 1), 1) if adjusted else size))
    return mean(values)


def literal_variance_over_time(z: Tensor, first: int = 1) -> Tensor:
    z = z.flatten(2)
    b, t, d = z.shape
    return mean([hinge(sample_variance([z[i, s, k] for s in range(first, t)])) for i in range(b) for k in range(d)])


def literal_smoothness(z: Tensor) -> Tensor:
    z = z.flatten(2)
    b, t, d = z.shape
    return mean([(z[i, s + 1, k] - z[i, s, k]) ** 2 for i in range(b) for s in range(t - 1) for k in range(d)])


def literal_barlow(p: Tensor, z: Tensor, weight: float, eps: float = 1e-5) -> Tensor:
    a, b = (x.flatten(2).flatten(0, 1) for x in (p, z))
    n, size = a.shape

    def standard(x: Tensor, d: int) -> list[Tensor]:
        column = [x[i, d] for i in range(n)]
        return [(v - mean(column)) / (sample_variance(column, 0) + eps) ** 0.5 for v in column]

    left, right = ([standard(x, d) for d in range(size)] for x in (a, b))
    total = torch.zeros((), dtype=z.dtype)
    for i in range(size):
        for j in range(size):
            c = sum(u * v for u, v in zip(left[i], right[j], strict=True)) / n
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


def assert_same(fast: Callable[..., Tensor], slow: Callable[..., Tensor], *arguments: Tensor) -> None:
    """Equal values and equal gradients with respect to every argument."""
    results = []
    for function in (fast, slow):
        leaves = [a.clone().requires_grad_() for a in arguments]
        value = function(*leaves)
        (value + 0 * leaves[0].sum()).backward()  # a sum without terms has no graph
        results.append([value.detach(), *(a.grad if a.grad is not None else torch.zeros_like(a) for a in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# -- equality ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("windows", "frames", "features"), SHAPES)
def test_losses_of_encodings_equal_their_formulas(windows: int, frames: int, features: tuple[int, ...]) -> None:
    z = randn(windows, frames, *features) * 0.7
    every = range(frames)
    assert_same(losses.variance_loss, literal_variance, z)
    assert_same(lambda z: losses.variance_loss(z, every_step=True), lambda z: literal_variance(z, every), z)
    assert_same(losses.covariance_loss, literal_covariance, z)
    assert_same(lambda z: losses.covariance_loss(z, every_step=True), lambda z: literal_covariance(z, every), z)
    plain = {"adjusted": False}
    assert_same(lambda z: losses.covariance_loss(z, **plain), lambda z: literal_covariance(z, **plain), z)
    assert_same(losses.variance_over_time_loss, literal_variance_over_time, z)
    assert_same(losses.temporal_smoothness_loss, literal_smoothness, z)


@pytest.mark.parametrize(
    ("fast", "broken"),
    [
        (losses.variance_loss, lambda z: literal_variance(z, correction=0)),
        (losses.variance_loss, lambda z: literal_variance(z, range(4))),
        (losses.covariance_loss, lambda z: literal_covariance(z, centred=False)),
        (losses.covariance_loss, lambda z: literal_covariance(z, adjusted=False)),
        (losses.covariance_loss, lambda z: literal_covariance(z, range(4))),
        (losses.variance_over_time_loss, lambda z: literal_variance_over_time(z, first=0)),
    ],
)
@pytest.mark.parametrize("features", [3, 7])
def test_a_wrong_formula_is_noticed(fast: Callable, broken: Callable, features: int) -> None:
    with pytest.raises(AssertionError, match="not close"):
        assert_same(fast, broken, randn(5, 4, features) * 0.7)


@pytest.mark.parametrize(("windows", "frames", "features"), SHAPES)
@pytest.mark.parametrize("members", [None, 1, 3])
def test_prediction_loss_is_summed_over_members(
    windows: int, frames: int, features: tuple[int, ...], members: int | None
) -> None:
    axis = () if members is None else (members,)
    predictions, z = randn(windows, frames, *axis, *features, seed=1), randn(windows, frames, *features)
    assert_same(losses.prediction_loss, literal_prediction, predictions, z)
    assert_same(losses.context_loss, literal_prediction, predictions, z)
    if members == 3:
        averaged = lambda p, z: literal_prediction(p, z) / 3  # noqa: E731
        with pytest.raises(AssertionError, match="not close"):
            assert_same(losses.prediction_loss, averaged, predictions, z)


def test_targets_of_self_prediction_get_no_gradient() -> None:
    predictions, z = randn(3, 2, 4, seed=1), randn(3, 2, 4)
    assert_same(losses.self_prediction_loss, lambda p, z: literal_prediction(p, z.detach()), predictions, z)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(losses.self_prediction_loss, literal_prediction, predictions, z)


@pytest.mark.parametrize(("windows", "frames", "features"), [(5, 2, (3,)), (2, 2, (7,)), (2, 2, (2, 2, 2))])
@pytest.mark.parametrize("members", [None, 2])
def test_barlow_twins(windows: int, frames: int, features: tuple[int, ...], members: int | None) -> None:
    axis = () if members is None else (members,)
    predictions, z = randn(windows, frames, *axis, *features, seed=1), randn(windows, frames, *features)

    def slow(p: Tensor, z: Tensor) -> Tensor:
        parts = [p] if members is None else p.unbind(2)
        return torch.stack([literal_barlow(part, z, 0.02) for part in parts]).sum()

    assert_same(lambda p, z: losses.barlow_twins_loss(p, z, weight=0.02), slow, predictions, z)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(lambda p, z: losses.barlow_twins_loss(p, z, weight=0.03), slow, predictions, z)


def test_barlow_twins_of_equal_white_views_is_zero() -> None:
    white = torch.linalg.qr(randn(32, 4) - randn(32, 4).mean(0)).Q
    white = (white - white.mean(0)) * 32**0.5
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(white.T @ white / 32), white.T, upper=False).T
    assert losses.barlow_twins_loss(white[:, None], white[:, None], eps=0.0) < 1e-20
    assert losses.barlow_twins_loss(white[:, None], white.flip(1)[:, None], eps=0.0) > 3.9


@pytest.mark.parametrize("features", [3, 7])
def test_inner_products_give_the_same_covariance_in_float32(features: int) -> None:
    """The two branches, on the same latents: repeating rows makes them many and changes C by a known factor."""
    z = randn(5, 1, features).float()
    many = z.repeat(4, 1, 1)  # 20 rows: direct form; the sum of squares has the divisor 19 instead of 4 * 4
    direct = losses.covariance_loss(many) * (19 / 16) ** 2
    torch.testing.assert_close(losses.covariance_loss(z), direct, rtol=1e-5, atol=1e-7)


# -- closed forms --------------------------------------------------------------------------------------------------------


def test_collapsed_latents_pay_the_full_hinge() -> None:
    z = torch.ones(6, 4, 5, dtype=torch.float64)
    assert losses.variance_loss(z) == pytest.approx(0.99)
    assert losses.variance_over_time_loss(z) == pytest.approx(0.99)
    assert losses.covariance_loss(z) == 0 and losses.temporal_smoothness_loss(z) == 0
    assert losses.variance_loss(randn(64, 1, 5) * 3) == 0


def test_covariance_of_copies() -> None:
    """D copies of one feature of variance v: every off-diagonal entry is v, so the adjusted loss is v^2."""
    column = randn(50, 1, 1)
    expected = float(column.flatten().var()) ** 2
    assert losses.covariance_loss(column.expand(50, 1, 6)) == pytest.approx(expected)
    assert losses.covariance_loss(column.expand(50, 1, 80)) == pytest.approx(expected)
    assert losses.covariance_loss(column.expand(50, 1, 6), adjusted=False) == pytest.approx(5 * expected)


def test_forward_and_inverse() -> None:
    assert losses.forward_inverse_loss(torch.tensor(2.0), torch.tensor(3.0), weight=0.5) == 4


# -- inverse dynamics ----------------------------------------------------------------------------------------------------


def test_inverse_dynamics_pairs_each_frame_with_the_next() -> None:
    z, actions = randn(3, 4, 2), randn(3, 3, 2, seed=1)

    class Difference(torch.nn.Module):
        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            return after - before

    def slow(z: Tensor, actions: Tensor) -> Tensor:
        terms = [
            (actions[b, t, k] - (z[b, t + 1, k] - z[b, t, k])) ** 2
            for b in range(3) for t in range(3) for k in range(2)
        ]  # fmt: skip
        return mean(terms)

    def swapped(z: Tensor, actions: Tensor) -> Tensor:
        return slow(z.flip(1), actions)

    def fast(z: Tensor, actions: Tensor) -> Tensor:
        return losses.inverse_dynamics_loss(Difference(), z, actions)

    assert_same(fast, slow, z, actions)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(fast, swapped, z, actions)


def test_heads_have_the_sizes_of_pldm() -> None:
    rooms = losses.new_inverse_head((512,), 2, rng=generator())
    assert count_parameters(rooms) == 1024 * 512 + 512 + 512 * 2 + 2
    maze = losses.new_inverse_head((18, 26, 26), 2, rng=generator())
    convs = (36 * 9 * 32 + 32) + 2 * (32 * 9 * 32 + 32) + 3 * 64
    assert count_parameters(maze) == convs + 32 * 6 * 6 * 2 + 2
    assert maze(torch.zeros(3, 18, 26, 26), torch.zeros(3, 18, 26, 26)).shape == (3, 2)


@pytest.mark.parametrize("shape", [(8,), (3, 8, 8)])
def test_heads_depend_on_their_generator_and_on_both_frames(shape: tuple[int, ...]) -> None:
    before = torch.get_rng_state()
    a, b, c = (losses.new_inverse_head(shape, 2, hidden=16, rng=generator(s)) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    x, y = randn(4, *shape).float(), randn(4, *shape, seed=1).float()
    assert torch.equal(a(x, y), b(x, y)) and not torch.equal(a(x, y), c(x, y))
    assert not torch.allclose(a(x, y), a(x, x)) and not torch.allclose(a(x, y), a(y, y))


# -- errors --------------------------------------------------------------------------------------------------------------


def test_too_little_data_is_an_error() -> None:
    one = torch.zeros(1, 3, 4)
    for loss in (losses.variance_loss, losses.covariance_loss):
        with pytest.raises(ConfigError, match="at least 2 windows, got 1; raise batch_size"):
            loss(one)
    with pytest.raises(ConfigError, match="windows of at least 3 frames, got 2"):
        losses.variance_over_time_loss(torch.zeros(4, 2, 4))
    with pytest.raises(ConfigError, match="at least 2 rows"):
        losses.barlow_twins_loss(one[:, :1], one[:, :1])
    with pytest.raises(ConfigError, match="at least 4 x 4, got 3 x 8"):
        losses.new_inverse_head((2, 3, 8), 2, rng=generator())


def test_a_stacked_layer_is_one_linear_layer_per_member() -> None:
    layer = StackedLinear(3, 4, 5)
    with torch.no_grad():
        layer.weight.copy_(randn(3, 4, 5))
        layer.bias.copy_(randn(3, 1, 5))
    x = randn(3, 6, 4).float()
    for e in range(3):
        torch.testing.assert_close(layer(x)[e], x[e] @ layer.weight[e] + layer.bias[e])
