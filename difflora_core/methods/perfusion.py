"""Perfusion at inference: trained concepts to adapters, with the settings of each concept.

arXiv 2305.01644: bias and temperature of the gate balance likeness against the prompt after
training; several concepts share a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet, Strength
from ..adapters.perfusion import GlobalKeyAdapter, PerfusionKeyAdapter, PerfusionValueAdapter
from ..adapters.token_gate import ConceptMatcher, GatedConcept, SigmoidGate
from ..config import Config
from ..errors import ConfigError, LayoutError, counted
from ..lora.weights import LoRALayer, LoRAWeights
from .base import (
    AppliedAdaptation,
    ConceptMethod,
    LiveLayers,
    PreparedAdaptation,
    settings_as,
    unit_covector,
)

Lock = Literal["none", "local", "global"]
Combine = Literal["approximate", "exact"]
KeyAdapter = tuple[PerfusionKeyAdapter | GlobalKeyAdapter, Strength]


@dataclass(frozen=True)
class PerfusionConfig(Config):
    """Settings of one concept.

    Args:
        bias, temperature: of the gate. perfusion.md 4: temperature 0.15; bias 0.6 to 0.75 with a
            local lock, 0.4 to 0.6 with a global one.
        lock: what keys see: the prompt itself, the super-class word at the concept's token, or
            the whole prompt with the super-class word.
        reach: tokens from the word's own on which the concept acts; -1 for all.
        combine: beside other concepts: "exact" keeps those apart that resemble each other,
            "approximate" takes each out as if it were alone.

    Raises:
        ConfigError: a value is out of range.
    """

    bias: float = 0.6
    temperature: float = 0.15
    lock: Lock = "local"
    reach: int = -1
    combine: Combine = "approximate"

    def __post_init__(self) -> None:
        SigmoidGate(self.bias, self.temperature)
        if self.lock not in get_args(Lock):
            raise ConfigError(f"Unknown key lock {self.lock!r}; {', '.join(get_args(Lock))}.")
        if self.combine not in get_args(Combine):
            raise ConfigError(
                f"Concepts are combined {' or '.join(get_args(Combine))}, not {self.combine!r}."
            )
        if self.reach < -1:
            raise ConfigError(f"The reach is -1 (all tokens) or more, got {self.reach}.")

    def gated(
        self,
        vectors: tuple[Tensor, Tensor, Tensor],
        strength: Strength = 1.0,
        since: Tensor | None = None,
    ) -> GatedConcept:
        """A concept under these settings, as the layers see it.

        Args:
            vectors: its direction, covector and super-class word, each (d,).
            strength: see `GatedConcept`.
            since: see `GatedConcept`.
        """
        reach = None if self.reach < 0 else self.reach
        gate = SigmoidGate(self.bias, self.temperature)
        return GatedConcept(*vectors, gate, strength, reach, since)


class Perfusion(ConceptMethod):
    """Gated, key-locked rank-one edits for one or several concepts."""

    name: ClassVar[str] = "perfusion"
    Config: ClassVar[type[Config]] = PerfusionConfig

    @classmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """Key and value adapters of every cross-attention layer.

        Raises:
            ConfigError: a global lock without the prompt it needs.
        """
        cls.check_together(applied)
        settings = [settings_as(PerfusionConfig, part.settings) for part in applied]
        gated = [
            own.gated(_vectors(part.prepared), part.strength, part.since)
            for part, own in zip(applied, settings, strict=True)
        ]
        exact = any(s.combine == "exact" for s in settings)
        matcher = ConceptMatcher(gated, exact)
        keys = _key_adapter(applied, settings, gated, matcher)
        layers = applied[0].adaptation.layers
        values = {layer: cls.values(applied, layer) for layer in layers}
        return key_and_value_adapters(matcher, values, keys)

    @classmethod
    def as_lora(
        cls, prepared: PreparedAdaptation, project: LiveLayers, lock_keys: bool = True
    ) -> LoRAWeights:
        """The ungated edit as a rank-one LoRA: W' = W + (o* - W i*) c' (section 4).

        Without a gate it leaks onto neighbouring words; 0.6 to 0.8 is a good strength.

        Args:
            prepared: the concept.
            project: layer name and encodings (n, in) to what that layer makes of them (n, out).
            lock_keys: keep the layout of the super-class word.

        Raises:
            ConfigError: a concept of another method.
            LayoutError: a layer of another width.
        """
        concept = prepared.adaptation
        cls.check_together([AppliedAdaptation(prepared, PerfusionConfig())])
        direction = concept.shared["direction"]
        dtype = torch.promote_types(direction.dtype, torch.float32)
        covector = unit_covector(concept).to(dtype)[None]
        rows = torch.stack([direction.to(dtype), _superclass(prepared).to("cpu", dtype)])
        layers = {}
        for layer, tensors in concept.layers.items():
            target = tensors["values"]
            own, _ = project(layer, rows).to("cpu", dtype)
            if own.shape != target.shape:
                raise LayoutError(
                    f"{concept.title} does not fit layer {layer}: "
                    f"{counted(len(target), 'value')} for an output of {len(own)}."
                )
            layers[layer] = LoRALayer(covector, (target.to(dtype) - own)[:, None], 1.0)
            if lock_keys:
                key = key_layer(layer)
                own, locked = project(key, rows).to("cpu", dtype)
                layers[key] = LoRALayer(covector, (locked - own)[:, None], 1.0)
        return LoRAWeights(layers)


def key_and_value_adapters(
    matcher: ConceptMatcher, values: Mapping[str, Tensor], keys: KeyAdapter | None
) -> AdapterSet:
    """The adapters of every cross-attention layer, in training and when drawing.

    Args:
        matcher: of J concepts, shared by all layers.
        values: value layer to its o* (J, out); gradients flow into them.
        keys: adapter and strength of the key layers beside them; None leaves those alone.
    """
    entries = []
    for layer, targets in values.items():
        if keys is not None:
            entries.append(AdapterEntry(key_layer(layer), *keys))
        entries.append(AdapterEntry(layer, PerfusionValueAdapter(matcher, targets)))
    return AdapterSet(tuple(entries))


def _vectors(prepared: PreparedAdaptation) -> tuple[Tensor, Tensor, Tensor]:
    """Direction, covector and super-class word of a concept, each (d,)."""
    concept = prepared.adaptation
    return concept.shared["direction"], unit_covector(concept), _superclass(prepared)


def _key_adapter(
    applied: Sequence[AppliedAdaptation],
    settings: Sequence[PerfusionConfig],
    gated: Sequence[GatedConcept],
    matcher: ConceptMatcher,
) -> KeyAdapter | None:
    """What the keys of all layers see, and in which samples; None leaves them alone.

    One global lock decides for the whole prompt.
    """
    whole = [part for part, s in zip(applied, settings, strict=True) if s.lock == "global"]
    if whole:
        given = [p for p in reversed(whole) if p.superclass_prompt is not None]
        asked = next((p for p in given if _acts(p.strength)), given[0] if given else None)
        if asked is None or asked.superclass_prompt is None:
            raise ConfigError(
                "A global key lock needs the prompt written with the super-class word instead of "
                "the concept's word: encode it and connect it as superclass_prompt."
            )
        rows = asked.strength
        samples = (rows != 0).to(rows) if isinstance(rows, Tensor) else float(rows != 0)
        return GlobalKeyAdapter(asked.superclass_prompt), samples
    locked = [g for g, s in zip(gated, settings, strict=True) if s.lock == "local"]
    if not locked:
        return None
    own = matcher if len(locked) == len(gated) else ConceptMatcher(locked, matcher.exact)
    return PerfusionKeyAdapter(own), 1.0


def _acts(strength: Strength) -> bool:
    """True unless a strength is 0 everywhere."""
    return bool((strength != 0).any()) if isinstance(strength, Tensor) else strength != 0


def _superclass(prepared: PreparedAdaptation) -> Tensor:
    if prepared.superclass is None:
        raise ConfigError(
            f"{prepared.adaptation.title} needs its super-class word encoded: load it with the "
            "CLIP of its base model."
        )
    return prepared.superclass


def key_layer(value_layer: str) -> str:
    """Name of the key projection beside a value projection."""
    return value_layer.removesuffix("to_v") + "to_k"
