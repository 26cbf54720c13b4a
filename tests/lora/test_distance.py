"""Distances against brute force on the full delta W."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflora_core.errors import LayoutError
from difflora_core.lora import distance
from difflora_core.lora.weights import LoRALayer, LoRAWeights


def make(seed, batch=(), rank=3, alpha=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, out, width in (("a", 7, 5), ("b", 4, 9)):
        down = torch.randn(*batch, rank, width, generator=generator, dtype=dtype)
        up = torch.randn(*batch, out, rank, generator=generator, dtype=dtype)
        layers[name] = LoRALayer(down, up, alpha)
    return LoRAWeights(layers)


def flat(weights):
    """Reference: all deltas as one vector."""
    return torch.cat([layer.delta().flatten(-2) for layer in weights.layers.values()], -1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_against_brute_force(seed, rank_a, rank_b, batched):
    batch = (2,) if batched else ()
    a, b = make(seed, batch, rank_a), make(seed + 1, (), rank_b, alpha=5.0)
    x, y = flat(a), flat(b)
    torch.testing.assert_close(distance.inner_product(a, b), (x * y).sum(-1))
    torch.testing.assert_close(distance.squared_norm(a), x.square().sum(-1))
    torch.testing.assert_close(distance.squared_error(a, b), (x - y).square().sum(-1))
    torch.testing.assert_close(distance.relative_error(a, b), (x - y).norm(dim=-1) / y.norm())
    torch.testing.assert_close(
        distance.cosine_similarity(a, b), torch.nn.functional.cosine_similarity(x, y, dim=-1)
    )
    for layer in a.layers.values():
        values = torch.linalg.svdvals(layer.delta())[..., : min(rank_a, 4)]
        torch.testing.assert_close(distance.layer_spectrum(layer), values)


def test_equal_loras_and_gauge():
    a = make(1)
    assert float(distance.relative_error(a, a)) < 1e-7
    assert float(distance.spectral_error(a, a, 3)) < 1e-20
    half = LoRAWeights({n: LoRALayer(2 * v.down, v.up / 2, v.alpha) for n, v in a.layers.items()})
    assert float(distance.relative_error(half, a)) < 1e-7
    torch.testing.assert_close(
        distance.cosine_similarity(a.scaled(-3.0), a), torch.tensor(-1.0, dtype=torch.float64)
    )


def test_zero_lora_gives_numbers():
    zero = make(1).scaled(0.0)
    assert float(distance.cosine_similarity(zero, make(2))) == 0.0
    assert float(distance.relative_error(zero, make(2))) == pytest.approx(1.0)


def test_gradients():
    down = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    up = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    down.requires_grad_()
    up.requires_grad_()
    target = LoRAWeights({"a": make(3)["a"]})

    def loss(d, u):
        weights = LoRAWeights({"a": LoRALayer(d, u, 3.0)})
        spectral = distance.spectral_error(weights, target, 2)
        angular = distance.cosine_similarity(weights, target)
        return distance.squared_relative_error(weights, target) + spectral + angular

    assert torch.autograd.gradcheck(loss, (down, up))


def test_gradient_exists_for_a_fresh_lora():
    down = torch.randn(3, 5, generator=torch.Generator().manual_seed(4)).requires_grad_()
    up = torch.zeros(7, 3, requires_grad=True)
    weights = LoRAWeights({"a": LoRALayer(down, up, 3.0)})
    target = LoRAWeights({"a": make(3, dtype=torch.float32)["a"]})
    (
        distance.spectral_error(weights, target, 3) + distance.squared_error(weights, target)
    ).backward()
    assert torch.isfinite(up.grad).all()
    assert torch.isfinite(down.grad).all()


def test_different_layers_are_refused():
    a = make(1)
    with pytest.raises(LayoutError, match="different layers"):
        distance.inner_product(a, LoRAWeights({"a": a["a"]}))
    swapped = LoRAWeights({"a": a["b"], "b": a["a"]})
    with pytest.raises(LayoutError, match="cannot be compared"):
        distance.inner_product(a, swapped)
