"""PaRa's arithmetic against projectors that are written out, and against PEFT's DEFT."""

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterEntry, AdapterSet
from difflora_core.adapters.lora import LoRAAdapter
from difflora_core.adapters.para import (
    ParaAdapter,
    least_harmful,
    orthonormal,
    reduced,
)
from difflora_core.errors import LayoutError
from difflora_core.lora.weights import LoRALayer

OUT, IN, RANK = 12, 7, 3


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def projector(directions):
    """B (B'B)^-1 B', the textbook's projector onto a span; numpy, no QR."""
    b = directions.detach().double().numpy()
    return torch.from_numpy(b @ np.linalg.inv(b.T @ b) @ b.T)


def on(layer, *adapters):
    """An attachment of adapters (adapter, strength) to one layer, in this order."""
    net = nn.ModuleDict({"layer": layer})
    entries = tuple(AdapterEntry("layer", a, s) for a, s in adapters)
    return attach(net, AdapterSet(entries))


def gram_schmidt(b):
    """Classical, column after column: Q of the QR whose R has a positive diagonal."""
    columns = []
    for column in b.mT:
        for one in columns:
            column = column - one * (one @ column)
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_q_is_gram_schmidts(seed, rank):
    b = random(OUT, rank, seed=seed)
    q = orthonormal(b)
    torch.testing.assert_close(q, gram_schmidt(b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q @ q.mT, projector(b), rtol=1e-8, atol=1e-8)


def test_q_is_continuous_and_of_float32():
    """LAPACK's own sign jumps where a diagonal entry of R passes zero; ours follows B."""
    b, step = random(OUT, RANK), 1e-6 * random(OUT, RANK, seed=1)
    assert float((orthonormal(b + step) - orthonormal(b)).abs().max()) < 1e-4
    flipped = b * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(orthonormal(flipped), orthonormal(b) * torch.tensor([1.0, -1, 1]))
    assert orthonormal(b.half()).dtype == torch.float32
    stacked = orthonormal(torch.stack([b, 2 * step]))
    torch.testing.assert_close(stacked[0], orthonormal(b))


def test_gradients_flow_through_q():
    b = random(OUT, RANK).requires_grad_()
    assert torch.autograd.gradcheck(orthonormal, (b,))


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_full_strength_leaves_nothing_and_takes_r_from_the_rank(seed, rank):
    weight, b = random(OUT, 2 * OUT, seed=seed), random(OUT, rank, seed=seed + 1)
    q = orthonormal(b)
    once = reduced(weight, q)
    torch.testing.assert_close(once, weight - projector(b) @ weight, rtol=1e-7, atol=1e-8)
    assert float((q.mT @ once).abs().max()) < 1e-12
    torch.testing.assert_close(reduced(once, q), once, rtol=0, atol=1e-13)  # idempotent
    before, after = (np.linalg.matrix_rank(w.numpy(), tol=1e-9) for w in (weight, once))
    assert (before, after) == (OUT, OUT - rank)


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, IN), (2, 5, IN), (2, 3, 4, IN)])
def test_a_linear_layer(strength, bias, shape):
    layer, b = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64), random(OUT, RANK)
    x = random(*shape, seed=2)
    base = layer(x)
    with on(layer, (ParaAdapter(orthonormal(b)), strength)):
        got = layer(x)
    weight = layer.weight - strength * projector(b) @ layer.weight
    torch.testing.assert_close(got, nn.functional.linear(x, weight, layer.bias))
    with on(layer, (ParaAdapter(orthonormal(b)), 0.0)):
        assert torch.equal(layer(x), base)
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution(kernel):
    layer = nn.Conv2d(IN, OUT, kernel, padding=kernel // 2, dtype=torch.float64)
    b, x = random(OUT, RANK), random(2, IN, 6, 5, seed=3)
    with on(layer, (ParaAdapter(orthonormal(b)), 0.7)):
        got = layer(x)
    change = torch.einsum("op,pikl->oikl", projector(b), layer.weight)
    weight = layer.weight - 0.7 * change
    wanted = nn.functional.conv2d(x, weight, layer.bias, padding=kernel // 2)
    torch.testing.assert_close(got, wanted)
    merged = layer.weight + 0.7 * (reduced(layer.weight, orthonormal(b)) - layer.weight)
    torch.testing.assert_close(merged, weight)


def test_two_in_their_order_and_a_lora_after_them():
    layer, x = nn.Linear(IN, OUT, dtype=torch.float64), random(4, IN, seed=5)
    b1, b2 = random(OUT, 2, seed=6), random(OUT, 3, seed=7)
    first, second = ParaAdapter(orthonormal(b1)), ParaAdapter(orthonormal(b2))
    lora = LoRALayer(random(2, IN, seed=8), random(OUT, 2, seed=9), 2.0)
    eye = torch.eye(OUT, dtype=torch.float64)
    reference = (eye - projector(b2)) @ (eye - projector(b1)) @ layer.weight
    with on(layer, (first, 1.0), (second, 1.0)):
        torch.testing.assert_close(layer(x), x @ reference.mT + layer.bias)
    other = (eye - projector(b1)) @ (eye - projector(b2)) @ layer.weight
    assert float((other - reference).detach().abs().max()) > 0.01
    with on(layer, (first, 1.0), (LoRAAdapter(lora), 1.0)):
        wanted = layer.weight - projector(b1) @ layer.weight + lora.up @ lora.down
        torch.testing.assert_close(layer(x), x @ wanted.mT + layer.bias)


def test_the_joint_projector_is_symmetric_and_has_no_order():
    b1, b2 = random(OUT, 2, seed=6), random(OUT, 3, seed=7)
    q, other = (orthonormal(torch.cat(pair, 1)) for pair in ((b1, b2), (b2, b1)))
    assert q.shape == (OUT, 5)
    torch.testing.assert_close(q @ q.mT, (q @ q.mT).mT, rtol=0, atol=1e-15)
    torch.testing.assert_close(q @ q.mT, projector(torch.cat([b1, b2], 1)))
    torch.testing.assert_close(q @ q.mT, other @ other.mT)
    weight = random(OUT, IN, seed=8)
    for b in (b1, b2):  # both are gone, which one after another does not reach
        assert float((orthonormal(b).mT @ reduced(weight, q)).abs().max()) < 1e-12
    twice = reduced(reduced(weight, orthonormal(b1)), orthonormal(b2))
    assert float((orthonormal(b1).mT @ twice).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(OUT, IN), (OUT, 3 * OUT), (OUT, 2, 3, 3)])
def test_the_start_takes_what_matters_least(shape):
    weight = random(*shape, seed=4)
    flat = weight.flatten(1).numpy()
    lost = weight.flatten(1) - reduced(weight, least_harmful(weight, RANK)).flatten(1)
    sigmas = np.linalg.svd(flat, compute_uv=False)
    np.testing.assert_allclose(lost.norm(), np.sqrt((sigmas[-RANK:] ** 2).sum()), rtol=1e-9)
    some = weight.flatten(1) - reduced(weight, orthonormal(random(OUT, RANK))).flatten(1)
    assert lost.norm() < some.norm()
    with pytest.raises(LayoutError, match="no 13 directions"):
        least_harmful(weight, 13)


def test_it_is_pefts_deft_in_its_form_for_para():
    if not hasattr(peft, "DeftConfig"):
        pytest.skip("this version of peft has no DEFT")
    layer, x = nn.Linear(IN, OUT), random(4, IN, dtype=torch.float32)
    net = nn.Sequential()
    net.add_module("layer", layer)
    config = peft.DeftConfig(r=RANK, target_modules=["layer"], decomposition_method="qr", para=True)
    base = layer(x).detach()
    tuned = peft.get_peft_model(net, config)
    b = next(p for n, p in tuned.named_parameters() if "deft_P" in n).detach()
    wanted = tuned(x).detach()
    plain = tuned.get_submodule("base_model.model.layer.base_layer")
    with on(plain, (ParaAdapter(orthonormal(b)), 1.0)):
        torch.testing.assert_close(plain(x), wanted, rtol=1e-5, atol=1e-6)
    assert float((wanted - base).abs().max()) > 0.01


def test_another_width_is_refused():
    layer = nn.Linear(IN, OUT + 1, dtype=torch.float64)
    with (
        on(layer, (ParaAdapter(orthonormal(random(OUT, 1))), 1.0)),
        pytest.raises(LayoutError, match="of 12 outputs, but the layer has 13"),
    ):
        layer(random(2, IN))
