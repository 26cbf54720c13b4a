"""The `down` factors that all LoRAs of an autoencoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...lora.layout import LoRALayout
from ...lora.weights import LoRALayer


def project(layer: LoRALayer, shared: Tensor) -> LoRALayer:
    """Least-squares fit of a layer's delta W by `up @ shared`."""
    inverse = torch.linalg.pinv(shared.detach().float()).to(layer.down)  # in r
    up = layer.scaling * layer.up @ (layer.down @ inverse)
    down = shared.to(layer.down).expand(*layer.batch_shape, -1, -1)
    return LoRALayer(down, up, float(layer.rank))


def random_down(
    layout: LoRALayout, learned: bool, generator: torch.Generator | None
) -> nn.ParameterDict:
    """Row-orthonormal random `down` per layer, stacked by input size: (layers, r, in)."""
    stacks = nn.ParameterDict()
    for size in sorted({shape.in_features for shape in layout.layers}):
        count = sum(shape.in_features == size for shape in layout.layers)
        value = torch.empty(count, layout.rank, size)
        if not value.is_meta:
            value.normal_(generator=generator)
            if size >= layout.rank:
                value = torch.linalg.qr(value.mT)[0].mT.contiguous()
        stacks[str(size)] = nn.Parameter(value, requires_grad=learned)
    return stacks
