import itertools
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import ConfigError
from difflora_core.lora.block_groups import GroupStrengths, layer_groups
from difflora_core.lora.layout import (
    SDXL_UNET_CONFIG,
    layout_from_unet_config,
    sdxl_layout,
    unet_name_map,
)

GROUPS = [field.name for field in fields(GroupStrengths)]


def test_every_attention_layer_has_one_block_and_one_attention(sd15_config):
    layouts = sdxl_layout(4), layout_from_unet_config("sd15", sd15_config, 4), demo_layout()
    for layer in itertools.chain(*layouts):
        block, attention = layer_groups(layer.name)
        # the diffusers path is an independent witness of where the layer is
        side = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}[
            layer.diffusers_name.split(".")[0]
        ]
        assert GROUPS.index(block) == side
        assert (attention == "cross_attention") == (".attn2." in layer.diffusers_name)


def test_known_counts_of_sdxl():
    counts = {group: 0 for group in GROUPS}
    for layer in sdxl_layout(4):
        for group in layer_groups(layer.name):
            counts[group] += 1
    # transformer depths: 2 x 2 + 2 x 10 in, 10 in the middle, 3 x 10 + 3 x 2 out; 8 matrices each
    assert list(counts.values()) == [24 * 8, 10 * 8, 36 * 8, 280, 280]


def test_layers_outside_all_groups_keep_their_strength():
    outside = [n for n in unet_name_map(SDXL_UNET_CONFIG).values() if not layer_groups(n)]
    assert {name.split(".")[0] for name in outside} == {"time_embed", "label_emb", "out"}
    assert GroupStrengths(0, 0, 0, 0, 0).of("time_embed.0") == 1
    assert GroupStrengths(0, 0, 0, 0, 0).of("te1.text_model.encoder.layers.0.mlp.fc1") == 1


strength = st.floats(-3, 3).filter(lambda value: abs(value) > 1e-3)


@given(st.lists(strength, min_size=5, max_size=5))
def test_factors_are_products(values):
    strengths = GroupStrengths(*values)
    factors = dict(zip(GROUPS, values, strict=True))
    for shape in demo_layout():
        block = shape.name.split("_")[0]
        kind = "self_attention" if "attn1" in shape.name else "cross_attention"
        wanted = factors[f"{block}_block{'s' * (block != 'middle')}"] * factors[kind]
        assert strengths.of(shape.name) == pytest.approx(wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_strength_must_be_finite(bad):
    with pytest.raises(ConfigError, match="middle_block"):
        GroupStrengths(middle_block=bad)
