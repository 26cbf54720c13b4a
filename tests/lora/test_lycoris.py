"""LoKr, LoHa and whole weight changes against the SVD of the delta formed in full."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import LoRAFileError
from difflora_core.lora.formats.lycoris import full_layer, loha_layer, lokr_layer
from difflora_core.lora.formats.state_dict import from_state_dict
from difflora_core.lora.layout import LayerShape, LoRALayout


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(layer, error, delta, rank):
    """Best rank-r approximation: optimal error, reported error = true error."""
    values = torch.linalg.svdvals(delta)
    best = values[rank:].norm() / values.norm()
    true = (layer.delta().double() - delta).norm() / delta.norm()
    assert layer.rank == rank
    assert float(error) == pytest.approx(float(best), abs=1e-6)
    assert float(true) == pytest.approx(float(best), abs=1e-5)


@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    rank=st.integers(1, 8),
    alpha=st.sampled_from([None, 1.0, 3.0]),
    factored=st.tuples(st.booleans(), st.booleans()),
)
def test_lokr(sizes, rank, alpha, factored):
    o1, i1, o2, i2 = sizes
    parts, matrices, inner = {}, [], None
    for name, out, width, split in (
        ("lokr_w1", o1, i1, factored[0]),
        ("lokr_w2", o2, i2, factored[1]),
    ):
        if split:
            inner = 2
            a, b = normal(1, out, 2), normal(2, 2, width)
            parts |= {f"{name}_a": a, f"{name}_b": b}
            matrices.append(a @ b)
        else:
            parts[name] = normal(3, out, width)
            matrices.append(parts[name])
    scale = alpha / inner if alpha is not None and inner is not None else 1.0
    layer, error = lokr_layer(parts, alpha, rank)
    check(layer, error, scale * torch.kron(*matrices), rank)


@given(
    out=st.integers(1, 9), width=st.integers(1, 9), inner=st.integers(1, 3), rank=st.integers(1, 5)
)
def test_loha(out, width, inner, rank):
    parts = {
        "hada_w1_a": normal(1, out, inner), "hada_w1_b": normal(2, inner, width),
        "hada_w2_a": normal(3, out, inner), "hada_w2_b": normal(4, inner, width),
    }  # fmt: skip
    first = parts["hada_w1_a"] @ parts["hada_w1_b"]
    second = parts["hada_w2_a"] @ parts["hada_w2_b"]
    layer, error = loha_layer(parts, 2.0, rank)
    check(layer, error, 2.0 / inner * first * second, rank)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 1)])
def test_whole_weight_change(shape):
    delta = normal(5, *shape)
    check(*full_layer(delta, 2), delta, 2)


def test_read_from_a_file_with_the_error_reported():
    layout = LoRALayout("x", 2, (LayerShape("a.to_q", 6, 8), LayerShape("b.to_k", 6, 8)))
    state = {
        "lycoris_a_to_q.lokr_w1": normal(1, 2, 2).float(),
        "lycoris_a_to_q.lokr_w2": normal(2, 4, 3).float(),
        "lycoris_a_to_q.alpha": torch.tensor(4.0),
        "diffusion_model.b.to_k.diff": normal(3, 8, 6).float(),
    }
    result = from_state_dict(state, layout)
    layout.check(result.weights)
    deltas = {"a.to_q": torch.kron(normal(1, 2, 2), normal(2, 4, 3)), "b.to_k": normal(3, 8, 6)}
    lost = total = 0.0
    for name, delta in deltas.items():
        gap = (result.weights[name].delta().double() - delta).norm()
        assert result.report.errors[name] == pytest.approx(float(gap / delta.norm()), rel=1e-4)
        lost, total = lost + gap**2, total + delta.norm() ** 2
    assert result.report.total_error == pytest.approx(float((lost / total).sqrt()), rel=1e-4)
    with pytest.raises(LoRAFileError, match="Choose a rank"):
        from_state_dict(state, {"a.to_q": "a.to_q", "b.to_k": "b.to_k"})
    exact = from_state_dict(state, {"a.to_q": "a.to_q", "b.to_k": "b.to_k"}, rank=6)
    assert exact.report.total_error < 1e-6
