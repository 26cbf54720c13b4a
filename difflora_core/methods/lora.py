"""A plain LoRA as a trained adaptation: what DiffLoRA, DreamBooth and other programs make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet, LayerAdapter
from ..adapters.lora import LoRAAdapter
from ..adapters.weight_change import WeightChangeAdapter
from ..config import Config
from ..errors import LayoutError
from ..lora.formats.change import Parts, is_constant, is_whole
from ..lora.weights import LoRALayer, LoRAWeights
from .base import AppliedAdaptation, LiveLayers, Method, PreparedAdaptation, TrainedAdaptation

TENSORS = {"down", "up", "alpha"}
_FLOAT8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8"))


@dataclass(frozen=True)
class LoRASettings(Config):
    """A LoRA has a strength, as everything has, and nothing else to set."""


class LoRA(Method):
    """Low-rank sums on linear layers (arXiv 2106.09685). Tensors of a layer: down, up, alpha.

    Layers of LoRA files may also hold any other constant change, in the roles of
    `lora.formats.change`: convolutions, LoHa, LoKr, differences of weights, norms and biases.
    """

    name: ClassVar[str] = "lora"
    Config: ClassVar[type[Config]] = LoRASettings

    @classmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse layers that are no pair of factors.

        Raises:
            LayoutError: a layer has other tensors, factors that do not fit, or several alphas.
        """
        for layer, tensors in adaptation.layers.items():
            other_form = set(tensors) != TENSORS or tensors["down"].ndim > 3
            if other_form and is_constant(tensors) and is_whole(tensors) and not adaptation.shared:
                continue
            if set(tensors) != TENSORS or adaptation.shared:
                raise LayoutError(f"{adaptation.title} does not hold the factors of {layer}.")
            down, up = tensors["down"], tensors["up"]
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
                raise LayoutError(
                    f"{adaptation.title} has factors {tuple(down.shape)} and {tuple(up.shape)} on "
                    f"{layer}, which do not fit each other."
                )
            if tensors["alpha"].numel() != 1:
                raise LayoutError(
                    f"{adaptation.title} has {tensors['alpha'].numel()} numbers for alpha on "
                    f"{layer}; it is one."
                )

    @classmethod
    def layer_sizes(cls, adaptation: TrainedAdaptation) -> dict[str, tuple[int, int]]:
        """In and out features of the plain factors; other forms do not say them."""
        return {
            layer: (tensors["down"].shape[1], tensors["up"].shape[0])
            for layer, tensors in adaptation.layers.items()
            if _plain(tensors)
        }

    @classmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """The LoRAs one after another, each at its strength."""
        entries = AdapterSet(())
        for part in applied:
            layers = part.adaptation.layers
            own = (AdapterEntry(layer, layer_adapter(parts)) for layer, parts in layers.items())
            entries += AdapterSet(tuple(own)).scaled(part.strength)
        return entries

    @classmethod
    def as_lora(
        cls, prepared: PreparedAdaptation, project: LiveLayers, lock_keys: bool = True
    ) -> LoRAWeights:
        """Itself: down (r, in), up (out, r) of every layer."""
        return lora_weights(prepared.adaptation)


def _plain(parts: Parts) -> bool:
    """Whether a layer is a pair of factors of a linear layer."""
    return set(parts) == TENSORS and all(parts[name].ndim == 2 for name in ("down", "up"))


def _pair(parts: Parts) -> bool:
    """Whether a layer is a pair of factors, of a linear layer or of a convolution (LoCon)."""
    if set(parts) != TENSORS or parts["down"].ndim != parts["up"].ndim:
        return False
    return parts["down"].ndim == 2 or (parts["up"].ndim == 4 and parts["up"][0, 0].numel() == 1)


def _factors(parts: Parts) -> LoRALayer:
    """Such a layer; a convolution's down is (r, in, kh, kw), its up (out, r, 1, 1)."""
    down, up = parts["down"], parts["up"]
    kernel = tuple(down.shape[2:])
    return LoRALayer(down.flatten(1), up.flatten(1), float(parts["alpha"]), kernel)


def layer_tensors(parts: Parts, size: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors of a layer of a LoRA file as this method holds them; nothing for an alpha alone.

    Args:
        parts: role to tensor, as `lora.formats.change.keys_by_role` finds them.
        size: of the live layer, see `lora.layout.module_size`. Factors for a linear layer may be
            stored as 1 x 1 kernels, those for a convolution flattened.
    """
    own = {role.removesuffix("_peft"): tensor for role, tensor in parts.items()}
    own = {r: t.half() if t.dtype in _FLOAT8 else t for r, t in own.items()}  # exact
    if "up" in own:
        down = own["down"]
        if len(size) == 2 and "mid" not in own:
            own |= {role: own[role].flatten(1) for role in ("up", "down")}
        elif len(size) > 2 and down.ndim == 2 and down.shape[1] == prod((size[0], *size[2:])):
            own["down"] = down.unflatten(1, (size[0], *size[2:]))
            own["up"] = own["up"].reshape(*own["up"].shape[:2], *(1 for _ in size[2:]))
        own.setdefault("alpha", torch.tensor(float(len(own["down"]))))
    elif set(own) == {"alpha"}:
        return {}
    if "alpha" in own:
        own["alpha"] = own["alpha"].float().reshape(1)
    return own


def layer_adapter(parts: Parts) -> LayerAdapter:
    """The adapter of what `layer_tensors` gives of a layer."""
    return LoRAAdapter(_factors(parts)) if _pair(parts) else WeightChangeAdapter(parts)


def lora_adaptation(weights: LoRAWeights, base: str = "unknown") -> TrainedAdaptation:
    """LoRA weights as a record."""
    layers = {}
    for name, layer in weights.layers.items():
        down, up = layer.down, layer.up
        if layer.kernel:
            down, up = down.unflatten(-1, (-1, *layer.kernel)), up[..., None, None]
        layers[name] = {"down": down, "up": up, "alpha": torch.tensor([float(layer.alpha)])}
    return TrainedAdaptation(LoRA.name, base, LoRASettings(), {}, layers)


def lora_weights(adaptation: TrainedAdaptation) -> LoRAWeights:
    """The record as LoRA weights.

    Raises:
        LayoutError: a layer is no pair of factors.
    """
    others = [name for name, tensors in adaptation.layers.items() if not _pair(tensors)]
    if others:
        raise LayoutError(f"{adaptation.title} is no low-rank sum on {others[0]}.")
    return LoRAWeights({name: _factors(own) for name, own in adaptation.layers.items()})
