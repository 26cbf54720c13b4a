"""Plans of StyleInject: the parameters of the paper's table, and what is refused."""

import pytest
import torch

from difflora_core.adapters.styleinject import (
    ATTENTION,
    CONVOLUTIONS,
    PRESETS,
    READS_TEXT,
    StyleInjectConfig,
    StyleInjectPlan,
    new_layer,
)
from difflora_core.errors import ConfigError
from difflora_core.lora.layout import SDXL_UNET_CONFIG, layout_from_unet_config

SD15_UNET_CONFIG = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


@pytest.mark.parametrize(
    ("config", "plan", "expected"),
    [
        (SD15_UNET_CONFIG, StyleInjectPlan(1, 32, spread_targets=ATTENTION), 3_338_304),
        (SD15_UNET_CONFIG, StyleInjectPlan(4, 32, spread_targets=ATTENTION), 8_411_136),
        (SD15_UNET_CONFIG, PRESETS["paper_table"], 28_702_464),
        (SDXL_UNET_CONFIG, StyleInjectPlan(4, 16, spread_targets=ATTENTION), 33_710_080),
    ],
)
def test_parameters_are_those_of_the_papers_table(config, plan, expected):
    """3.34 M, 8.41 M and 28.70 M for n = 1, 4, 16 at r = 32 on SD1.5; SDXL by the same formula."""
    layout = layout_from_unet_config("base", config, 1, plan.targets)
    assert len(layout) == (64 if config is SD15_UNET_CONFIG else 280)
    total = 0
    with torch.device("meta"):
        for shape in layout:
            spread = shape.name.endswith(plan.spread_targets)
            layer = new_layer((shape.in_features, shape.out_features), plan, spread)
            assert layer.downs.is_meta
            total += layer.numel()
    assert total == expected


def test_plans_and_options_are_strict():
    assert PRESETS["recommended"] == StyleInjectPlan()
    assert set(PRESETS["distillation"].targets) == {*ATTENTION, *CONVOLUTIONS}
    assert not set(PRESETS["recommended"].spread_targets) & set(READS_TEXT)
    for plan in PRESETS.values():
        assert StyleInjectPlan.from_json(plan.to_json()) == plan
    for bad in ({"styles": 0}, {"rank": 0}, {"styles": 65}, {"alpha": -1.0}):
        with pytest.raises(ConfigError, match="must lie in"):
            StyleInjectPlan(**bad)
    with pytest.raises(ConfigError, match=r"attn2.to_k cannot get another spread"):
        StyleInjectPlan(spread_targets=("attn2.to_k",))
    for bad in ({"routing": "layer"}, {"pooling": "max"}, {"spread": "none"}):
        with pytest.raises(ConfigError, match="unknown value"):
            StyleInjectConfig(**bad)
