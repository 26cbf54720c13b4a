"""LoRAWeights to one vector and back: what a shard of LoRAs stores. Exact inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError
from .layout import LoRALayout
from .weights import LoRALayer, LoRAWeights


def flatten(layout: LoRALayout, weights: LoRAWeights) -> Tensor:
    """The values of one LoRA or a batch: layer by layer, down then up, row by row. Ours.

    Args:
        layout: layers, shapes and rank.
        weights: factors (..., r, in) and (..., out, r); the scale alpha / r is folded into ``up``.

    Returns:
        (..., numel) in the dtype of the weights.

    Raises:
        LayoutError: when layers, shapes or rank differ from the layout.
    """
    layout.check(weights)
    parts = []
    for shape in layout:
        layer = weights[shape.name].folded()
        parts += [layer.down.flatten(-2), layer.up.flatten(-2)]
    return torch.cat(parts, dim=-1)


def unflatten(layout: LoRALayout, flat: Tensor) -> LoRAWeights:
    """Inverse of ``flatten``; alpha = r. The factors are views of the vector.

    Args:
        layout: as in ``flatten``.
        flat: (..., numel).

    Raises:
        LayoutError: when the vector has another length.
    """
    if flat.ndim < 1 or flat.shape[-1] != layout.numel:
        raise LayoutError(
            f"Expected {layout.numel} values of a LoRA for {layout.base}, got {tuple(flat.shape)}."
        )
    layers, start, rank = {}, 0, layout.rank
    for shape in layout:
        middle = start + rank * shape.in_features
        end = middle + rank * shape.out_features
        down = flat[..., start:middle].unflatten(-1, (rank, shape.in_features))
        up = flat[..., middle:end].unflatten(-1, (shape.out_features, rank))
        layers[shape.name] = LoRALayer(down, up, float(rank))
        start = end
    return LoRAWeights(layers)
