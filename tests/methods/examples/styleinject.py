"""What StyleInject could have trained on the small network."""

import torch

from difflora_core.adapters.styleinject import StyleInjectConfig, StyleInjectPlan, new_layer
from difflora_core.methods.base import PreparedAdaptation
from difflora_core.methods.styleinject import style_adaptation


def example(prepared, encodings):
    """Three styles of rank two on one value layer, whose spread changes, and any encodings."""
    g = torch.Generator().manual_seed(3)
    layer = new_layer((6, 4), StyleInjectPlan(styles=3, rank=2), spread=True, generator=g)
    for tensor in (layer.up, layer.router, layer.spread, layer.spread_bias):
        tensor.normal_(generator=g)
    layers = {"middle_block.attn2.to_v": layer}
    made = style_adaptation(layers, StyleInjectConfig(), "tiny")
    return PreparedAdaptation(made.to(torch.float64)), encodings()
