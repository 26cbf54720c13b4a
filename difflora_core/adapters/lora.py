"""Low-rank sum: y + alpha / r * up @ down @ x, one LoRA for all samples or one for each."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError, counted
from ..lora.weights import LoRALayer, LoRAWeights
from .base import AdapterEntry, AdapterSet, LayerAdapter


class LoRAAdapter(LayerAdapter):
    """LoRA on one layer (arXiv 2106.09685, Eq. 3); on a convolution `ConvLoRAAdapter` takes over.

    With factors (r, in), (out, r) every sample gets the same edit; with (B, r, in), (B, out, r)
    sample b gets LoRA b. An input batch of n * B (guidance repeats the batch) repeats the LoRAs.

    Args:
        layer: the factors; gradients flow into them.

    Raises:
        LayoutError: the factors have more than one batch dimension.
    """

    def __init__(self, layer: LoRALayer) -> None:
        if len(layer.batch_shape) > 1:
            raise LayoutError(f"A LoRA takes one batch dimension, got {tuple(layer.batch_shape)}.")
        self.layer = layer

    def on(self, layer: nn.Module) -> LayerAdapter:
        """Itself, or what does the same with a convolution's stride and padding."""
        return ConvLoRAAdapter(self.layer, layer) if hasattr(layer, "kernel_size") else self

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + alpha / r * up @ down @ x; x (B, ..., in), y (B, ..., out).

        Raises:
            LayoutError: when the batch is not a multiple of the number of LoRAs, or widths differ.
        """
        layer = self.layer
        if x.shape[-1] != layer.in_features or y.shape[-1] != layer.out_features:
            raise LayoutError(
                f"This LoRA is for a layer of {layer.in_features} to {layer.out_features} "
                f"features, but was attached to one of {x.shape[-1]} to {y.shape[-1]}."
            )
        down, up = layer.down.to(x), layer.scaling * layer.up.to(x)  # scaled where it costs least
        if not layer.batch_shape:
            return y + F.linear(F.linear(x, down), up)
        count = layer.batch_shape[0]
        if x.shape[0] % count:
            raise LayoutError(
                f"A batch of {counted(x.shape[0], 'sample')} cannot be shared by "
                f"{counted(count, 'LoRA')}: the number of samples must be a multiple."
            )
        if x.shape[0] > count:
            repeats = x.shape[0] // count
            down, up = down.repeat(repeats, 1, 1), up.repeat(repeats, 1, 1)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # (B, N, in)
        change = torch.bmm(torch.bmm(flat, down.mT), up.mT)  # (B, N, r) -> (B, N, out)
        return y + change.reshape(y.shape)


class ConvLoRAAdapter(LayerAdapter):
    """LoRA on a convolution: a convolution to r channels, and one of 1 x 1 from there (LoCon).

    Args:
        layer: the factors of one LoRA; down (r, in * height * width of the kernel).
        conv: the live layer, a `nn.Conv2d` or a host's class of it.

    Raises:
        LayoutError: the factors are a batch, or do not fit the convolution.
    """

    def __init__(self, layer: LoRALayer, conv: Any) -> None:
        wanted = (conv.in_channels * math.prod(conv.kernel_size), conv.out_channels)
        if layer.batch_shape or (layer.in_features, layer.out_features) != wanted:
            raise LayoutError(
                f"This LoRA is for a layer of {layer.in_features} to {layer.out_features} "
                f"features, but was attached to a convolution of {wanted[0]} to {wanted[1]}; a "
                "convolution takes one LoRA for all samples."
            )
        self.layer, self.kernel = layer, (conv.in_channels, *conv.kernel_size)
        self.places = (conv.stride, conv.padding, conv.dilation)

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y + alpha / r * up @ down of every patch; x (B, in, h, w), y (B, out, h', w')."""
        down = self.layer.down.to(x).unflatten(-1, self.kernel)  # (r, in, kh, kw)
        inner = F.conv2d(x, down, None, *self.places)  # (B, r, h', w')
        return y + self.layer.scaling * F.conv2d(inner, self.layer.up.to(x)[..., None, None])


def lora_adapter_set(weights: LoRAWeights) -> AdapterSet:
    """AdapterSet of a LoRA or a batch of LoRAs, in the order of its layers."""
    return AdapterSet(
        tuple(AdapterEntry(name, LoRAAdapter(layer)) for name, layer in weights.layers.items())
    )
