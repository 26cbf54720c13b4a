"""Canonical form against plain float64 linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from difflora_core.errors import LayoutError
from difflora_core.lora.canonical import align_to, canonical, truncated_layer
from difflora_core.lora.weights import LoRALayer, LoRAWeights


def make_layer(seed, out=12, width=9, rank=4, batch=(), alpha=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(*batch, rank, width, generator=generator, dtype=dtype)
    up = torch.randn(*batch, out, rank, generator=generator, dtype=dtype)
    return LoRALayer(down, up, alpha)


def mixed(layer, seed):
    """The same delta with other factors: (up R, R^-1 down)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layer.rank, layer.rank, generator=generator, dtype=torch.float64)
    mixing += 3 * torch.eye(layer.rank)
    return LoRALayer(torch.linalg.solve(mixing, layer.down), layer.up @ mixing, layer.alpha)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 14), st.integers(1, 14), st.booleans()
)
def test_equal_deltas_get_equal_factors(seed, rank, out, width, batched):
    layer = make_layer(seed, out, width, rank, (2,) if batched else ())
    first = canonical(LoRAWeights({"a": layer}))["a"]
    second = canonical(LoRAWeights({"a": mixed(layer, seed + 1)}))["a"]
    scale = layer.delta().abs().max()
    torch.testing.assert_close(first.delta(), layer.delta(), rtol=0, atol=1e-12 * float(scale))
    torch.testing.assert_close(first.up, second.up, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first.down, second.down, rtol=1e-6, atol=1e-7)
    assert first.alpha == first.rank == rank


def test_matches_brute_force_svd():
    layer = make_layer(3)
    u, s, vh = torch.linalg.svd(layer.delta(), full_matrices=False)
    found = canonical(LoRAWeights({"a": layer}))["a"]
    for i in range(layer.rank):
        sign = torch.sign(u[u[:, i].abs().argmax(), i])
        torch.testing.assert_close(found.up[:, i], sign * u[:, i] * s[i].sqrt())
        torch.testing.assert_close(found.down[i], sign * vh[i] * s[i].sqrt())
    balance = found.up.mT @ found.up
    torch.testing.assert_close(balance, found.down @ found.down.mT)


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_truncation_error_is_the_true_error(rank):
    layer = make_layer(7)
    small, error = truncated_layer(layer, rank)
    true = (small.delta() - layer.delta()).norm() / layer.delta().norm()
    torch.testing.assert_close(error, true, rtol=1e-9, atol=1e-12)
    assert small.rank == rank


def test_zero_and_rank_deficient_layers():
    zero = LoRALayer(torch.zeros(4, 5), torch.zeros(6, 4), 4.0)
    small, error = truncated_layer(zero, 2)
    assert error == 0
    assert not small.delta().any()
    layer = make_layer(1)
    doubled = LoRALayer(layer.down[:1].repeat(4, 1), layer.up[:, :1].repeat(1, 4), 4.0)
    found = canonical(LoRAWeights({"a": doubled}))["a"]
    assert not found.up[:, 1:].any()
    assert not found.down[1:].any()
    torch.testing.assert_close(found.delta(), doubled.delta())


def test_float32_input_is_computed_in_float64():
    layer = make_layer(5, out=64, width=48, rank=8)
    single = LoRALayer(layer.down.float(), layer.up.float(), layer.alpha)
    found = canonical(LoRAWeights({"a": single}))["a"]
    assert found.up.dtype == torch.float32
    exact = LoRALayer(single.down.double(), single.up.double(), layer.alpha).delta()
    assert (found.delta().double() - exact).norm() < 1e-6 * exact.norm()


def test_alignment_removes_rotation_and_keeps_delta():
    reference = canonical(LoRAWeights({"a": make_layer(2)}))
    generator = torch.Generator().manual_seed(9)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    layer = reference["a"]
    turned = LoRAWeights({"a": LoRALayer(rotation.mT @ layer.down, layer.up @ rotation, 4.0)})
    aligned = align_to(turned, reference)
    torch.testing.assert_close(aligned["a"].up, layer.up)
    torch.testing.assert_close(aligned["a"].down, layer.down)
    other = canonical(LoRAWeights({"a": make_layer(11)}))
    torch.testing.assert_close(align_to(other, reference)["a"].delta(), other["a"].delta())
    with pytest.raises(LayoutError, match="no layer"):
        align_to(turned, LoRAWeights({"b": layer}))
