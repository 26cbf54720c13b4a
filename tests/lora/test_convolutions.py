"""Convolutions of LoRA files: read whole in every family, written again, or counted."""

import pytest
import torch
import torch.nn.functional as F

from difflora_core.commands.bases import unet_config
from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import LoRAFileError
from difflora_core.lora.canonical import truncated_layer
from difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict
from difflora_core.lora.layout import unet_name_map
from difflora_core.lora.weights import LoRALayer, LoRAWeights

LAYOUT, NAMES = demo_layout(2), unet_name_map(unet_config("demo"))


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONVOLUTIONS = {
    "LoCon": {
        "lora_down.weight": normal(0, 2, 8, 3, 3),
        "lora_up.weight": normal(1, 8, 2, 1, 1),
        "alpha": torch.tensor(3.0),
    },
    "Tucker": {
        "lora_down.weight": normal(2, 2, 8, 1, 1),
        "lora_mid.weight": normal(3, 2, 2, 3, 3),
        "lora_up.weight": normal(4, 8, 2, 1, 1),
        "alpha": torch.tensor(1.0),
    },
    "whole": {"diff": normal(5, 8, 8, 3, 3)},
    "LoKr": {"lokr_w1": normal(6, 2, 4), "lokr_w2": normal(7, 4, 2, 3, 3)},
    "1 x 1": {
        "lora_down.weight": normal(8, 2, 8, 1, 1),
        "lora_up.weight": normal(9, 8, 2, 1, 1),
        "alpha": torch.tensor(2.0),
    },
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_read_whole_and_written_again(kind):
    """LyCORIS's own formulas, applied by convolving a picture, say what a layer does."""
    parts, x = CONVOLUTIONS[kind], normal(10, 2, 8, 5, 5)
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    scale = float(parts.get("alpha", 2.0)) / 2
    if kind == "whole":
        wanted = F.conv2d(x, parts["diff"], padding=1)
    elif kind == "LoKr":
        whole = torch.einsum("ai, bjhw -> abijhw", parts["lokr_w1"], parts["lokr_w2"])
        wanted = F.conv2d(x, whole.reshape(8, 8, 3, 3), padding=1)
    else:
        inner = F.conv2d(x, parts["lora_down.weight"], padding=1 if kind == "LoCon" else 0)
        if kind == "Tucker":
            inner = F.conv2d(inner, parts["lora_mid.weight"], padding=1)
        wanted = scale * F.conv2d(inner, parts["lora_up.weight"])
    state = {f"{stem}.{key}": tensor for key, tensor in parts.items()}
    for rank in (8, 3):
        layer = from_state_dict(state, NAMES, rank).weights["input_blocks.1.0.in_layers.2"]
        again = to_state_dict(LoRAWeights({"input_blocks.1.0.in_layers.2": layer}))
        down, up = again[f"{stem}.lora_down.weight"], again[f"{stem}.lora_up.weight"]
        factor = float(again[f"{stem}.alpha"]) / len(down)
        found = factor * F.conv2d(F.conv2d(x, down, padding=len(down[0, 0]) // 2), up)
        computed = kind in ("whole", "LoKr")
        assert len(down) == (rank if computed else 2)
        if not computed or rank == 8:  # 8 outputs have no more components
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        small = truncated_layer(layer, 1)[0]
        assert small.kernel == layer.kernel  # a smaller rank stays a convolution


def test_convolutions_that_a_layout_lacks_are_counted():
    first = next(iter(LAYOUT))
    layer = LoRALayer(normal(0, 2, first.in_features), normal(1, first.out_features, 2), 2.0)
    state = to_state_dict(LoRAWeights({first.name: layer}))
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    state |= {f"{stem}.{key}": tensor for key, tensor in CONVOLUTIONS["LoCon"].items()}
    state["lora_te1_text_model_encoder_layers_0_mlp_fc1.diff"] = torch.ones(4, 4)
    report = from_state_dict(state, LAYOUT).report
    assert set(report.unused.values()) == {"convolutions", "text encoders"}
    assert "1 of convolutions, 1 of text encoders" in report.summary()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_down.weight": torch.ones(2, 8, 3, 3)}, "two of its factors have a kernel"),
        ({"lora_mid.weight": torch.ones(2, 3, 3, 3)}, "the core of the convolution does not fit"),
        ({"lora_mid.weight": torch.ones(3, 2, 3, 3)}, "do not fit together"),
    ],
)
def test_damaged_convolutions_are_named(change, said):
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    parts = {**CONVOLUTIONS["Tucker"], **change}
    with pytest.raises(LoRAFileError, match=said):
        from_state_dict({f"{stem}.{key}": tensor for key, tensor in parts.items()}, NAMES)
