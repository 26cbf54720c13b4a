"""Muon against torch's own, and against singular values in float64."""

import pytest
import torch
from torch import nn

from difflora_core.training import muon
from difflora_core.training.muon import Muon, orthogonal

SHAPES = [(6, 17), (17, 6), (9, 9)]


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_singular_values(matrix):
    """What the iterations do to each singular value, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def after_steps(optimizer_of, shape, count=4):
    """A matrix after some steps along known gradients."""
    weight = nn.Parameter(random(shape, 0))
    optimizer = optimizer_of([weight])
    for number in range(count):
        weight.grad = random(shape, 1 + number)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_polynomial_of_singular_values(shape):
    matrix = random(shape, 3)
    expected = by_singular_values(matrix)
    made = orthogonal(matrix, torch.float32)
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=1e-4)
    assert float((orthogonal(matrix, torch.bfloat16).double() - expected).abs().max()) > 1e-4
    values = torch.linalg.svdvals(made)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_in_bfloat16_it_is_the_one_of_torch(shape, monkeypatch):
    monkeypatch.setattr(muon, "imitates_bfloat16", lambda device: False)
    own = after_steps(lambda p: Muon(p, 0.02, weight_decay=0.3), shape)
    torchs = after_steps(lambda p: torch.optim.Muon(p, 0.02, weight_decay=0.3), shape)
    torch.testing.assert_close(own, torchs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_bfloat16_is_imitated_it_takes_float32(shape, monkeypatch):
    """Nesterov's momentum, the decay, and the rate by the shape, derived anew in float64."""
    monkeypatch.setattr(muon, "imitates_bfloat16", lambda device: True)
    made = after_steps(lambda p: Muon(p, 0.02, weight_decay=0.3), shape)
    weight, momentum = random(shape, 0).double(), torch.zeros(shape).double()
    for number in range(4):
        gradient = random(shape, 1 + number).double()
        momentum = 0.95 * momentum + 0.05 * gradient
        change = by_singular_values(0.05 * gradient + 0.95 * momentum)
        scale = max(1, shape[0] / shape[1]) ** 0.5
        weight = weight * (1 - 0.02 * 0.3) - 0.02 * scale * change
    torch.testing.assert_close(made.double(), weight, atol=1e-5, rtol=1e-4)


def test_a_matrix_without_a_gradient_stays_and_a_vector_is_refused():
    weight = nn.Parameter(random((3, 4), 0))
    Muon([weight], 0.1).step()
    assert torch.equal(weight, random((3, 4), 0))
    with pytest.raises(ValueError, match=r"one has the shape \[5\]"):
        Muon([nn.Parameter(torch.zeros(5))], 0.1)
