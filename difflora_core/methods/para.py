"""PaRa: trained directions are taken out of the outputs of layers (arXiv 2406.05641)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.para import ParaAdapter, orthonormal, reduced
from ..config import Config, check_range
from ..errors import ConfigError, LayoutError, percent
from ..lora.weights import LoRALayer, LoRAWeights
from .base import (
    AppliedAdaptation,
    LiveLayers,
    PreparedAdaptation,
    StyleMethod,
    TrainedAdaptation,
    WeightEdit,
    settings_as,
)

BOUND = 1 / 40
"""Share of a layer's outputs that may go, by the paper: 16 of 640, 32 of 1280."""
TENSORS = {"directions", "width"}
KERNEL = "kernel"
SAME_LINE = 1e-3
"""Directions are different when each has this share of its length outside the others' span."""


@dataclass(frozen=True)
class PaRaConfig(Config):
    """Settings of PaRa.

    Args:
        bound: largest share of a layer's outputs that may be taken out, by all PaRa adaptations on
            a model together; pictures collapse beyond it. Above 0, at most 1.

    Raises:
        ConfigError: a value is out of range.
    """

    bound: float = BOUND

    def __post_init__(self) -> None:
        check_range("PaRa", "bound", self.bound, 1e-6, 1)


class PaRa(StyleMethod):
    """Fewer directions for the outputs of linear layers and convolutions.

    Tensors of a layer: `directions` (out, r), orthonormal, `width` (1,), that of its input, and
    `kernel` (2,) of a convolution. Of the base model they hold nothing: what they take out is what
    the model at hand has there.
    """

    name: ClassVar[str] = "para"
    Config: ClassVar[type[Config]] = PaRaConfig
    of_base: ClassVar[bool] = True

    @classmethod
    def check(cls, adaptation: TrainedAdaptation) -> None:
        """Refuse other tensors, and directions that are not different ones.

        Raises:
            LayoutError: it has a word, or it says which layer.
        """
        super().check(adaptation)
        for layer, tensors in adaptation.layers.items():
            if set(tensors) - {KERNEL} != TENSORS or adaptation.shared:
                raise LayoutError(f"{adaptation.title} does not hold the directions of {layer}.")
            directions, width = tensors["directions"], tensors["width"]
            shape = tuple(directions.shape)
            if directions.ndim != 2 or not 0 < shape[1] <= shape[0]:
                raise LayoutError(f"{adaptation.title} has directions {shape} on {layer}.")
            sizes = torch.cat([width.flatten(), tensors.get(KERNEL, torch.ones(2)).flatten()])
            if sizes.shape != (3,) or not bool((sizes.round() >= 1).all()):
                raise LayoutError(f"{adaptation.title} does not say how large {layer} is.")
            fine = directions.to(torch.promote_types(directions.dtype, torch.float32))
            outside = torch.linalg.qr(fine)[1].diagonal().abs()
            if not bool((outside > SAME_LINE * fine.norm(dim=0)).all()):
                raise LayoutError(f"{adaptation.title} has directions on {layer} that coincide.")

    @classmethod
    def restored(cls, adaptation: TrainedAdaptation) -> TrainedAdaptation:
        """The same, its directions orthonormal again: what is taken out is taken out wholly."""
        layers = {
            layer: {**tensors, "directions": orthonormal(tensors["directions"])}
            for layer, tensors in adaptation.layers.items()
        }
        return replace(adaptation, layers=layers)

    @classmethod
    def layer_sizes(cls, adaptation: TrainedAdaptation) -> dict[str, tuple[int, ...]]:
        """Features of input and output; of a convolution channels, and its kernel."""
        sizes = {}
        for layer, tensors in adaptation.layers.items():
            kernel = tensors[KERNEL].tolist() if KERNEL in tensors else []
            sizes[layer] = (int(tensors["width"]), len(tensors["directions"]), *map(round, kernel))
        return sizes

    @classmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """One after another: (I - s2 Q2 Q2') (I - s1 Q1 Q1') W0; the order matters.

        Raises:
            ConfigError: together they take out more than their bound.
        """
        check_bound(applied)
        return super().adapters(applied)

    @classmethod
    def one(cls, applied: AppliedAdaptation) -> AdapterSet:
        """(I - s Q Q') W0; below 0 the directions grow instead of going."""
        layers = applied.adaptation.layers.items()
        return AdapterSet(
            tuple(
                AdapterEntry(n, ParaAdapter(t["directions"]), applied.strength) for n, t in layers
            )
        )

    @classmethod
    def weight_edits(cls, applied: AppliedAdaptation) -> dict[str, WeightEdit]:
        """(I - Q Q') W of every layer."""
        layers = applied.adaptation.layers
        return {n: WeightEdit(reduced, (t["directions"],)) for n, t in layers.items()}

    @classmethod
    def as_lora(
        cls, prepared: PreparedAdaptation, project: LiveLayers, lock_keys: bool = True
    ) -> LoRAWeights:
        """Exactly the same for one checkpoint: up = -Q, down = Q' W.

        Raises:
            LayoutError: a layer of another size.
            ConfigError: the model lacks these directions already.
        """
        del lock_keys
        adaptation, layers, found = prepared.adaptation, {}, 0.0
        for layer, tensors in adaptation.layers.items():
            weight = project.weight(layer).flatten(1)
            q = tensors["directions"].to(weight)
            if len(weight) != len(q):
                raise LayoutError(
                    f"{adaptation.title} does not fit layer {layer}: {len(q)} outputs instead of "
                    f"{len(weight)}."
                )
            down = q.mT @ weight
            found = max(found, float(down.norm() / weight.norm().clamp_min(1e-30)))
            kernel = cls.layer_sizes(adaptation)[layer][2:]
            layers[layer] = LoRALayer(down, -q, float(q.shape[1]), kernel)
        if found < 1e-5:
            raise ConfigError(
                f"There is nothing left to take out: {adaptation.title} is on the connected model "
                "already. Connect the model as it was before it was applied."
            )
        return LoRAWeights(layers)


def join(first: TrainedAdaptation, second: TrainedAdaptation) -> TrainedAdaptation:
    """Two adaptations as one that has no order: Q = QR([B1 B2]) of rank r1 + r2 (ours).

    One after another, the second projection brings back some of what the first took out, where
    their directions are not orthogonal; the joint one takes out both spans. Layers that only one of
    them has stay as they are. Facts and settings are the first one's.

    Raises:
        ConfigError: one is of another method, or together they take out more than their bound.
        LayoutError: they are for different base models, or share a direction.
    """
    for part in (first, second):
        if part.method != PaRa.name:
            raise ConfigError(
                f"{part.title} was trained by {part.method}; only PaRa can be joined with PaRa."
            )
    sizes, others = PaRa.layer_sizes(first), PaRa.layer_sizes(second)
    wrong = [name for name in sizes if others.get(name, sizes[name]) != sizes[name]]
    if wrong:
        raise LayoutError(
            f"{first.title} ({first.base}) and {second.title} ({second.base}) are for different "
            f"base models: {wrong[0]} has other sizes."
        )
    check_bound([AppliedAdaptation(PreparedAdaptation(a), a.settings) for a in (first, second)])
    layers = {**second.layers, **first.layers}
    for name in first.layers.keys() & second.layers.keys():
        own = [part.layers[name]["directions"] for part in (first, second)]
        layers[name] = {**layers[name], "directions": torch.cat(own, 1)}
    both = replace(first, layers=layers)
    PaRa.check(both)
    return PaRa.restored(both)


def check_bound(applied: Sequence[AppliedAdaptation]) -> None:
    """Refuse adaptations that together take out more of a layer than the largest of their bounds.

    Raises:
        ConfigError: naming the layer.
    """
    bounds = [settings_as(PaRaConfig, part.settings).bound for part in applied]
    bound = max(bounds, default=BOUND)
    ranks: dict[str, int] = {}
    for part in applied:
        for layer, tensors in part.adaptation.layers.items():
            ranks[layer] = ranks.get(layer, 0) + tensors["directions"].shape[1]
            check_rank(layer, ranks[layer], len(tensors["directions"]), bound)


def check_rank(layer: str, rank: int, outputs: int, bound: float) -> None:
    """Refuse a rank that takes out more than `bound` of a layer's outputs.

    Raises:
        ConfigError: it does.
    """
    if rank > bound * outputs + 1e-6:
        raise ConfigError(
            f"PaRa would take {rank} of {outputs} directions ({percent(rank / outputs, 1)}) out "
            f"of {layer}; beyond {percent(bound, 1)} pictures collapse. Use fewer or lower ranks "
            f"({int(bound * outputs + 1e-6)} in all here), or train on pictures "
            "with a higher bound on purpose."
        )
