"""Random styles of StyleInject."""

import torch

STYLED = ("attn1.to_q", "attn1.to_v", "attn2.to_q", "attn2.to_v", "in_layers.2")
SPREADING = ("attn1.to_q", "attn2.to_v", "in_layers.2")
"""Layers of a style, and those that get another spread."""


def maker(parts, model):
    """Makes a random style of attention and convolutions of the demo base."""
    adapters, method = (
        parts("difflora_core.adapters.styleinject"),
        parts("difflora_core.methods.styleinject"),
    )
    module_size = parts("difflora_core.lora.layout").module_size
    prepared = parts("difflora_core.methods.base").PreparedAdaptation

    def make(seed=1, styles=3, spread=True):
        generator, layers = torch.Generator().manual_seed(seed), {}
        plan = adapters.StyleInjectPlan(
            styles=styles, rank=2, targets=STYLED, spread_targets=SPREADING
        )
        for shape in parts("nodes.host.base").unet_layout(model, "demo", 1, STYLED):
            size = module_size(model.model.diffusion_model.get_submodule(shape.name))
            layer = adapters.new_layer(
                size, plan, spread and shape.name.endswith(SPREADING), generator
            )
            layer.up.normal_(0, 0.3, generator=generator)
            layer.router.normal_(0, 0.5, generator=generator)
            if layer.spread is not None:
                layer.spread.normal_(0, 0.3, generator=generator)
                layer.spread_bias.normal_(0, 0.3, generator=generator)
            layers[shape.name] = layer
        return prepared(method.style_adaptation(layers, adapters.StyleInjectConfig(), "demo"))

    return make
