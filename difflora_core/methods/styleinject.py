"""StyleInject at inference: a trained style to adapters, and to a plain LoRA (arXiv 2401.13942)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.styleinject import (
    READS_TEXT,
    StyleInjectAdapter,
    StyleInjectConfig,
    StyleLayer,
)
from ..config import Config
from ..errors import LayoutError, counted
from ..lora.weights import LoRALayer, LoRAWeights
from .base import AppliedAdaptation, PreparedAdaptation, StyleMethod, TrainedAdaptation, settings_as

PLAIN = {"downs", "up", "router", "alpha"}
SPREAD = {"spread", "spread_bias"}


class StyleInject(StyleMethod):
    """Routed low-rank changes and spreads. Tensors of a layer: those of `StyleLayer`."""

    name: ClassVar[str] = "styleinject"
    Config: ClassVar[type[Config]] = StyleInjectConfig

    @classmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse tensors that are no layer of a style.

        Raises:
            LayoutError: it has a word, a layer has other tensors, or they do not fit each other.
        """
        super().check(adaptation)
        for layer, tensors in adaptation.layers.items():
            if set(tensors) not in (PLAIN, PLAIN | SPREAD) or adaptation.shared:
                raise LayoutError(f"{adaptation.title} does not hold the parts of {layer}.")
        style_layers(adaptation)

    @classmethod
    def layer_sizes(cls, adaptation: TrainedAdaptation) -> dict[str, tuple[int, ...]]:
        """In and out features, and the kernels of convolutions."""
        return {name: layer.size for name, layer in style_layers(adaptation).items()}

    @classmethod
    def one(cls, applied: AppliedAdaptation) -> AdapterSet:
        """An adapter for each layer."""
        config = settings_as(StyleInjectConfig, applied.settings)
        layers = style_layers(applied.adaptation)
        return style_adapters(layers, config).scaled(applied.strength)

    @classmethod
    def as_lora(
        cls,
        prepared: PreparedAdaptation,
        project: Callable[[str, Tensor], Tensor],
        lock_keys: bool = True,
    ) -> LoRAWeights:
        """The low-rank change of its styles mixed evenly; freeze it first for another mixture."""
        layers = {}
        for name, layer in style_layers(frozen(prepared.adaptation)).items():
            factors = (layer.downs.flatten(1), layer.up, float(layer.alpha))
            layers[name] = LoRALayer(*factors, kernel=layer.kernel)
        return LoRAWeights(layers)

    @classmethod
    def lost_as_lora(cls, adaptation: TrainedAdaptation) -> tuple[str, ...]:
        """The choice between styles, and the spread."""
        layers = style_layers(adaptation).values()
        lost = []
        if (styles := max(layer.styles for layer in layers)) > 1:
            lost.append(f"its {counted(styles, 'style')} are mixed evenly, whatever the picture")
        if spread := sum(layer.spread is not None for layer in layers):
            lost.append(f"the spread of the base model stays in {counted(spread, 'layer')}")
        return tuple(lost)


def style_layers(adaptation: TrainedAdaptation) -> dict[str, StyleLayer]:
    """The record's layers.

    Raises:
        LayoutError: their tensors do not fit each other; it names the layer.
    """
    layers = {}
    for name, tensors in adaptation.layers.items():
        try:
            layers[name] = StyleLayer(**tensors)
        except LayoutError as error:
            raise LayoutError(f"{adaptation.title}, layer {name}: {error}") from error
    return layers


def style_adaptation(
    layers: Mapping[str, StyleLayer], config: StyleInjectConfig, base: str
) -> TrainedAdaptation:
    """Layers as a record."""
    tensors = {name: layer.tensors() for name, layer in layers.items()}
    return TrainedAdaptation(StyleInject.name, base, config, {}, tensors)


def style_adapters(layers: Mapping[str, StyleLayer], config: StyleInjectConfig) -> AdapterSet:
    """The adapters of all layers, in training and when drawing; gradients flow into the layers."""
    entries = []
    for name, layer in layers.items():
        text = name.endswith(READS_TEXT)
        entries.append(AdapterEntry(name, StyleInjectAdapter(layer, config, text, name)))
    return AdapterSet(tuple(entries))


def frozen(
    adaptation: TrainedAdaptation, routing: Mapping[str, Tensor] | None = None
) -> TrainedAdaptation:
    """The same with one fixed mixture for every picture: a style of n = 1, about n times smaller.

    Args:
        adaptation: a style.
        routing: layer to the weights (n,) of its styles, for example a mean over pictures; even
            weights unless given.

    Raises:
        LayoutError: a layer has no weights, or not one for each of its styles.
    """
    layers = {}
    for name, layer in style_layers(adaptation).items():
        even = torch.full((layer.styles,), 1 / layer.styles).to(layer.downs)
        weights = even if routing is None else routing.get(name, even[:0]).to(layer.downs)
        if weights.shape != (layer.styles,) or not bool(torch.isfinite(weights).all()):
            raise LayoutError(
                f"{adaptation.title} needs {counted(layer.styles, 'weight')} for its styles on "
                f"{name}, got {weights.tolist()}."
            )
        gamma = layer.gamma(weights)
        layers[name] = replace(
            layer,
            downs=layer.mixed(weights),
            router=torch.zeros_like(layer.router[:1]),
            spread=None if layer.spread is None else torch.zeros_like(layer.spread[:, :1]),
            spread_bias=gamma,
        )
    return replace(adaptation, layers={name: layer.tensors() for name, layer in layers.items()})
