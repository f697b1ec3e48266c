"""Resident buffers move latents as the plain network does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from clbench.errors import ConfigError, ContractError, UnknownNameError
from clbench.planners import steppers
from clbench.planners.steppers import (
    ACTIVATIONS,
    GRUStepper,
    MLPStepper,
    PredictStepper,
    fold_action_scale,
    make_stepper,
)
from clbench.rng import torch_generator


@pytest.fixture(autouse=True, params=[False, True], ids=["exact", "whole cache lines"])
def both_layouts(request, monkeypatch):
    """The layout of a CPU and of a GPU."""
    monkeypatch.setattr(steppers, "_whole_lines", lambda device: request.param)


RNG = torch_generator(0, "steppers")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RNG)


def affines(sizes, members=()):
    return [(randn(*members, o, i) / i**0.5, randn(*members, o) * 0.3) for i, o in itertools.pairwise(sizes)]


def norm(size, members=()):
    return 1 + 0.1 * randn(*members, size), 0.1 * randn(*members, size), 1e-5


def layer_norm(x, parameters):
    weight, bias, eps = parameters
    return functional.layer_norm(x, x.shape[-1:], None, None, eps) * weight + bias


def mlp(z, a, layers, activation, norms, residual, final):
    """One network, written plainly."""
    x = torch.cat([z, a], -1)
    for i, (weight, bias) in enumerate(layers):
        x = functional.linear(x, weight, bias)
        if i < len(layers) - 1:
            x = layer_norm(x, norms[i]) if norms else x
            x = ACTIVATIONS[activation](x.clone())
    x = z + x if residual else x
    return layer_norm(x, final) if final else x


def check(stepper, step, z, steps=3, actions=2):
    """Several steps, and a second load, give what ``step`` gives."""
    for _ in range(2):
        stepper.load(z)
        expected = z
        for _ in range(steps):
            a = randn(len(z), actions)
            expected = step(expected, a)
            torch.testing.assert_close(stepper.step(a), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("depth", "residual", "norms", "final"), [
    (1, False, False, False), (2, True, False, True), (3, False, True, True), (2, True, True, False),
])  # fmt: skip
@pytest.mark.parametrize("members", [(), (3,)])
def test_mlp_stepper(activation, depth, residual, norms, final, members):
    latent, rows = 5, 7
    sizes = [latent + 2, *[12, 9, 16][: depth - 1], latent]
    layers = affines(sizes, members)
    hidden = [norm(n, members) for n in sizes[1:-1]] if norms else None
    last = norm(latent, members) if final else None
    stepper = MLPStepper(
        rows, lambda: layers, latent=latent, activation=activation, norms=(lambda: hidden) if hidden else None,
        residual=residual, final_norm=(lambda: last) if last else None,
    )  # fmt: skip

    def member(parameters, e):
        return [tuple(p[e] if isinstance(p, torch.Tensor) else p for p in pair) for pair in parameters]

    def step(z, a):
        if not members:
            return mlp(z, a, layers, activation, hidden, residual, last)
        parts = [
            mlp(z[:, e], a, member(layers, e), activation, member(hidden, e) if hidden else None, residual,
                member([last], e)[0] if last else None)
            for e in range(members[0])
        ]  # fmt: skip
        return torch.stack(parts, 1)

    check(stepper, step, randn(rows, *members, latent))


@pytest.mark.parametrize("tied", [False, True])
def test_gru_stepper(tied):
    cell, last = nn.GRUCell(2, 6), nn.LayerNorm(6)
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
    stepper = GRUStepper(
        5,
        lambda: tuple(w.detach() for w in weights),
        norm=(lambda: (last.weight.detach(), last.bias.detach(), last.eps)) if tied else None,
    )
    with torch.no_grad():
        check(stepper, lambda z, a: last(cell(a, z)) if tied else cell(a, z), randn(5, 6))


def test_gru_stepper_of_an_ensemble():
    cells = [nn.GRUCell(2, 6) for _ in range(3)]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    stacked = tuple(torch.stack([getattr(c, n).detach() for c in cells]) for n in names)
    with torch.no_grad():
        check(
            GRUStepper(5, lambda: stacked),
            lambda z, a: torch.stack([c(a, z[:, e]) for e, c in enumerate(cells)], 1),
            randn(5, 3, 6),
        )


def test_packing_again_takes_the_weights_of_that_moment():
    layers = affines([7, 9, 5])
    stepper = MLPStepper(4, lambda: layers, latent=5)
    layers = affines([7, 9, 5])
    z, a = randn(4, 5), randn(4, 2)

    def moved():
        stepper.load(z)
        return stepper.step(a).clone()

    expected = mlp(z, a, layers, "relu", None, False, None)
    assert not torch.allclose(moved(), expected)
    stepper.pack()
    torch.testing.assert_close(moved(), expected)


def test_no_fresh_memory_per_step():
    """All that is ever returned lies in the buffers that were there at the beginning."""
    layers = affines([7, 9, 5])
    stepper = MLPStepper(4, lambda: layers, latent=5)
    stepper.load(randn(4, 5))
    views = [stepper.step(randn(4, 2)) for _ in range(3)]
    assert len({v.data_ptr() for v in views}) == 1


def test_actions_in_environment_units():
    mean, std = torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25])
    for members in ((), (3,)):
        weight, bias = affines([7, 4], members)[0]
        z, a = randn(6, 5), randn(6, 2)
        folded, shift = fold_action_scale((weight, bias), mean, std)
        inner = torch.cat([z, (a - mean) / std], -1) @ weight.mT + bias[..., None, :]
        torch.testing.assert_close(torch.cat([z, a], -1) @ folded.mT + shift[..., None, :], inner)
        without = fold_action_scale((weight, None), mean, std)[1]
        torch.testing.assert_close(without, shift - bias)


def test_a_model_without_a_stepper_is_moved_by_predict():
    class Model:
        def encode(self, obs):
            return obs

        def predict(self, z, action):
            return z + action

    stepper = make_stepper(Model(), 3)
    assert isinstance(stepper, PredictStepper)
    stepper.load(torch.zeros(3, 2))
    stepper.step(torch.ones(3, 2))
    assert torch.equal(stepper.step(torch.ones(3, 2)), torch.full((3, 2), 2.0))


def test_a_predict_that_changes_the_shape():
    class Model:
        def encode(self, obs):
            return obs

        def predict(self, z, action):
            return z[..., :1]

    stepper = make_stepper(Model(), 3)
    stepper.load(torch.zeros(3, 2))
    with pytest.raises(ContractError, match=r"Model.predict returned \(3, 1\) for latents \(3, 2\)"):
        stepper.step(torch.ones(3, 2))


def test_wrong_layers():
    with pytest.raises(UnknownNameError, match="Unknown activation 'rellu'. Did you mean 'relu'"):
        MLPStepper(1, lambda: affines([7, 5]), latent=5, activation="rellu")
    with pytest.raises(ConfigError, match=r"do not take \[z, a\] to z with 4 features"):
        MLPStepper(1, lambda: affines([7, 5]), latent=4)


def test_bfloat16_is_close():
    layers = affines([7, 32, 5])
    z, a = randn(64, 5), randn(64, 2)
    stepper = MLPStepper(64, lambda: layers, latent=5, dtype=torch.bfloat16)
    stepper.load(z)
    got = stepper.step(a)
    assert got.dtype == torch.bfloat16
    expected = mlp(z, a, layers, "relu", None, False, None)
    error = (got.float() - expected).abs().max()
    assert 0 < error < 0.05
