"""Changes of every constant family against brute force, times a factor, and under other names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.files.families import FAMILIES
from difflora_core.adapters.weight_change import WeightChangeAdapter
from difflora_core.errors import LayoutError, LoRAFileError
from difflora_core.lora.formats.change import (
    is_constant,
    is_whole,
    keys_by_role,
    scaled_parts,
    scaled_state,
    weight_change,
)
from difflora_core.lora.formats.known_names import with_known_names

SHAPES = {"weight": (16, 32), "kernel": (16, 32, 3, 3), "norm": (16,)}
CONSTANT = [f for f in FAMILIES if f.constant and f.target == "weight" and f.layer != "text"]
CONSTANT = [f for f in CONSTANT if f.name != "IA3"]


def example(family, seed):
    """Roles of one layer, and the layer's shape."""
    kernel = "onvolution" in family.name or "kernel" in family.name
    shape = SHAPES["norm" if "norm" in family.name else "kernel" if kernel else "weight"]
    state = {f"x.{k}": t for k, t in family.tensors(shape, torch.float32, seed).items()}
    ((_, keys),) = keys_by_role(state).items()
    return {role: state[key] for role, key in keys.items()}, state, shape


@given(
    family=st.sampled_from(CONSTANT), factor=st.sampled_from([-2.0, 0.0, 0.3, 1.0]),
    alpha=st.sampled_from([None, 0.0, 3.0]),
)  # fmt: skip
def test_change_and_its_multiples(family, factor, alpha):
    parts, state, shape = example(family, seed=3)
    scale = 1.0
    if alpha is not None and family.scales:
        parts["alpha"], scale = torch.tensor(alpha), alpha / 4
    fine = {key.removeprefix("x."): tensor.double() for key, tensor in state.items()}
    true = family.change(fine, torch.zeros(shape, dtype=torch.float64), scale, factor)
    assert is_constant(parts)
    assert is_whole(parts)
    scaled = weight_change(scaled_parts(parts, factor)).double()
    torch.testing.assert_close(scaled.reshape(true.shape), true, rtol=1e-5, atol=1e-5)


def test_what_no_file_can_scale_is_named():
    state = {"lora_unet_a.oft_blocks": torch.ones(2, 2, 2), "lora_te_b.diff": torch.ones(2, 2)}
    scaled, left = scaled_state(state, lambda stem: 0.5)
    assert left == ["lora_unet_a"]
    assert scaled["lora_unet_a.oft_blocks"] is state["lora_unet_a.oft_blocks"]
    torch.testing.assert_close(scaled["lora_te_b.diff"], torch.full((2, 2), 0.5))
    assert scaled_state(state, lambda stem: 1.0) == (state, [])


@pytest.mark.parametrize(
    "parts", [{"up"}, {"down", "alpha"}, {"lokr_w1"}, {"diff", "up", "down"}, {"alpha"}]
)
def test_half_a_layer_is_no_layer(parts):
    assert not is_whole(dict.fromkeys(parts, torch.ones(2, 2)))


def test_a_small_file_does_not_become_gigabytes():
    side = 1_000_000
    state = {
        "x.lokr_w1": torch.ones(1, 1), "x.lokr_t2": torch.ones(1, 1, 3, 3),
        "x.lokr_w2_a": torch.ones(1, side), "x.lokr_w2_b": torch.ones(1, side),
    }  # fmt: skip
    with pytest.raises(LoRAFileError, match="too large for any model"):
        with_known_names(state, {}, {"x"})
    del state["x.lokr_w2_b"]
    with pytest.raises(LoRAFileError, match="lacks a tensor"):
        with_known_names(state, {}, {"x"})


def peft(**extra):
    stem = "unet.a.to_q"
    state = {
        f"{stem}.lora_A.me.weight": torch.ones(2, 4),
        f"{stem}.lora_B.me.weight": torch.ones(3, 2),
    }
    return state | {f"{stem}.{name}": tensor for name, tensor in extra.items()}


def test_peft_is_renamed():
    state = peft(alpha=torch.tensor(6.0))
    state["unet.a.to_q.lora_magnitude_vector"] = torch.arange(3.0)
    state["unet.a.to_q.lora_B.me.bias"] = torch.ones(3)
    known = with_known_names(state, {"unet.a.to_q": "b.to_q"}, ())
    assert set(known) == {
        f"lora_unet_b_to_q.{name}"
        for name in ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "diff_b")
    }
    assert known["lora_unet_b_to_q.dora_scale"].shape == (3, 1)
    torch.testing.assert_close(known["lora_unet_b_to_q.diff_b"], torch.full((3,), 3.0))
    same = {"lora_unet_b_to_q.lora_down.weight": torch.ones(2, 2), "other": torch.ones(1)}
    assert with_known_names(same, {"unet.a.to_q": "b.to_q"}, {"lora_unet_b_to_q"}) == same


def test_two_names_for_one_layer():
    state = peft() | {"lora_unet_b_to_q.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(LoRAFileError, match="under two names"):
        with_known_names(state, {"unet.a.to_q": "b.to_q"}, {"lora_unet_b_to_q"})


def test_a_change_is_the_layers_own_function():
    """A layer with the change in its weight and bias, against the change beside it."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        nn.Linear(4, 6): (2, 3, 4), nn.Conv2d(4, 6, 3, stride=2, padding=1): (2, 4, 5, 5),
        nn.GroupNorm(2, 4): (2, 4, 3, 3), nn.LayerNorm(4): (2, 3, 4),
    }  # fmt: skip
    for layer, size in layers.items():
        x = torch.randn(size, generator=generator)
        parts = {
            "diff": torch.randn(layer.weight.shape, generator=generator),
            "bias": torch.randn(len(layer.weight), generator=generator),
        }
        plain = layer(x)
        for roles in (("diff", "bias"), ("diff",), ("bias",)):
            own = {role: parts[role] for role in roles}
            got = WeightChangeAdapter(own).on(layer).edit(x, plain)
            state = {k: v.clone() for k, v in layer.state_dict().items()}
            with torch.no_grad():
                layer.weight += own.get("diff", 0)
                layer.bias += own.get("bias", 0)
            torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)
            layer.load_state_dict(state)


@pytest.mark.parametrize("layer", [nn.Linear(5, 6), nn.Conv2d(4, 6, 1), nn.SiLU()])
def test_a_change_of_another_size_is_refused(layer):
    adapter = WeightChangeAdapter({"diff": torch.ones(6, 4, 3, 3)}).on(layer)
    x = torch.ones(2, 5) if isinstance(layer, nn.Linear) else torch.ones(2, 4, 3, 3)
    with pytest.raises(LayoutError, match=r"This change has shape|cannot act beside"):
        adapter.edit(x, layer(x))
