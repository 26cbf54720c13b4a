"""Losses against brute force in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.training.losses import (
    angular_loss,
    kl_loss,
    relative_delta_loss,
    weight_preserved_loss,
)


def tokens(seed, shape=(3, 4, 5)):
    """Estimate, target, mask with the first and last value of token 1 missing, scale."""
    g = torch.Generator().manual_seed(seed)
    estimate, target = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    mask = torch.ones(shape[1:], dtype=torch.bool)
    mask[1, 3:] = False
    scale = torch.rand(shape[1], 1, generator=g, dtype=torch.float64) + 0.5
    return estimate, target * mask, mask, scale


@given(st.integers(0, 10_000), st.floats(0, 5), st.sampled_from([0.5, 1, 2]), st.floats(0.5, 10))
def test_weight_preserved_loss_is_its_formula(seed, strength, power, cap):
    estimate, target, mask, scale = tokens(seed)
    above = below = 0.0
    for b in range(3):
        for t in range(4):
            values = [i for i in range(5) if mask[t, i]]
            m = sum(abs(target[b, t, i].item()) for i in values) / len(values)
            for i in values:
                w = target[b, t, i].item()
                omega = 1 + strength * min(abs(w) / m, cap) ** power
                above += omega * ((estimate[b, t, i].item() - w) / scale[t, 0].item()) ** 2
                below += omega
    loss = weight_preserved_loss(estimate, target, mask, scale, strength, power, cap)
    assert loss.item() == pytest.approx(above / below)


def test_strength_zero_is_plain_mse():
    estimate, target, mask, _ = tokens(4)
    full = torch.ones_like(mask)
    loss = weight_preserved_loss(estimate, target, full, strength=0)
    assert loss == torch.nn.functional.mse_loss(estimate, target)
    loss = weight_preserved_loss(estimate, target, mask, strength=0)
    torch.testing.assert_close(loss, (estimate - target)[:, mask].square().mean())


def test_large_weights_count_more():
    target = torch.tensor([[[0.1, 1.0]]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    off = torch.tensor([[[0.5, 0.0]]], dtype=torch.float64)
    on_small = weight_preserved_loss(target + off, target, mask)
    on_large = weight_preserved_loss(target + off.flip(-1), target, mask)
    assert on_large > on_small
    zero = weight_preserved_loss(off, torch.zeros_like(off), mask)
    assert torch.isfinite(zero)


def test_delta_losses_are_those_of_full_matrices():
    g = torch.Generator().manual_seed(2)

    def batch(alpha):
        return LoRAWeights(
            {
                name: LoRALayer(
                    torch.randn(3, 2, 6, generator=g, dtype=torch.float64),
                    torch.randn(3, 5, 2, generator=g, dtype=torch.float64).requires_grad_(),
                    alpha,
                )
                for name in ("a", "b")
            }
        )

    estimate, target = batch(2.0), batch(1.0)
    x = torch.cat([estimate[n].delta().flatten(1) for n in ("a", "b")], 1)
    y = torch.cat([target[n].delta().flatten(1) for n in ("a", "b")], 1)
    cosine = torch.nn.functional.cosine_similarity(x, y).mean()
    torch.testing.assert_close(angular_loss(estimate, target), 1 - cosine)
    relative = ((x - y).square().sum(1) / y.square().sum(1)).mean()
    torch.testing.assert_close(relative_delta_loss(estimate, target), relative)
    own = torch.autograd.grad(relative_delta_loss(estimate, target), estimate["a"].up)[0]
    brute = torch.autograd.grad(relative, estimate["a"].up)[0]
    torch.testing.assert_close(own, brute)


def test_kl_is_that_of_torch():
    g = torch.Generator().manual_seed(5)
    mean, log_variance = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(q, p).mean()
    torch.testing.assert_close(kl_loss(mean, log_variance), expected)
