"""A change of a layer's weight and bias, added beside the layer instead of into it.

Linear layers, convolutions and norms are linear in their weight and bias. So the layer with the
change is the layer, plus the same function with the change as its weight and bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError
from ..lora.formats.change import Parts, weight_change
from ..lora.layout import module_size
from .base import LayerAdapter


class WeightChangeAdapter(LayerAdapter):
    """Any constant change that LoRA files hold, on a linear layer, convolution or norm. Ours.

    The change is computed from its few numbers at every call, so it takes no memory in between.

    Args:
        parts: roles of one layer, see `lora.formats.change.weight_change`; ``bias`` (out,).
        layer: the live layer.
    """

    def __init__(self, parts: Parts, layer: nn.Module | None = None) -> None:
        self.parts, self.layer = parts, layer

    def on(self, layer: nn.Module) -> LayerAdapter:
        """As it acts on a layer of this kind."""
        return WeightChangeAdapter(self.parts, layer)

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y (B, ..., out) plus what the change makes of x (B, ..., in).

        Raises:
            LayoutError: the change has another size than the layer's weight, or is on no layer
                that is linear in its weight.
        """
        weight, bias = weight_change(self.parts), self.parts.get("bias")
        here = None if bias is None else bias.to(x)
        if weight is None:
            return y if here is None else y + _shaped(here, y, self._channels_first())
        return y + self._function(x, weight.to(x), here)

    def _channels_first(self) -> bool:
        """Whether the layer's outputs are (B, out, ...) and not (B, ..., out)."""
        return hasattr(self.layer, "kernel_size") or hasattr(self.layer, "num_groups")

    def _function(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's function of x, with this weight and bias."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            weight = _like(weight, (layer.out_channels, layer.in_channels, *layer.kernel_size))
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
        if isinstance(layer, nn.GroupNorm):
            shift = torch.zeros_like(weight) if bias is None else bias
            return F.group_norm(x, layer.num_groups, weight, shift, layer.eps)
        if isinstance(layer, nn.LayerNorm):
            shape = layer.normalized_shape
            return F.layer_norm(x, list(shape), _like(weight, tuple(shape)), bias, layer.eps)
        size = module_size(layer)
        if len(size) == 2:
            return F.linear(x, _like(weight, (size[1], size[0])), bias)
        raise LayoutError(f"A change of weights cannot act beside a {type(layer).__name__}.")


def _like(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A change in the shape of the layer's weight; files flatten kernels, or write 1 x 1 ones."""
    if weight.numel() != torch.Size(shape).numel() or len(weight) != shape[0]:
        raise LayoutError(
            f"This change has shape {tuple(weight.shape)}, but the layer's weight has {shape}."
        )
    return weight.reshape(shape)


def _shaped(bias: Tensor, y: Tensor, channels_first: bool) -> Tensor:
    """A bias (out,) to add to y."""
    return bias.view(-1, *[1] * (y.ndim - 2)) if channels_first else bias
