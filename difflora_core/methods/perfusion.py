"""Perfusion at inference: trained concepts to adapters, with the knobs of each concept.

arXiv 2305.01644: bias and temperature of the gate balance likeness against the prompt after
training; several concepts share a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.perfusion import (
    ConceptMatcher,
    GatedConcept,
    GlobalKeyAdapter,
    PerfusionKeyAdapter,
    PerfusionValueAdapter,
    SigmoidGate,
)
from ..errors import ConfigError, LayoutError
from ..lora.weights import LoRALayer, LoRAWeights
from ..text.new_words import Concept
from .base import AdaptationRequest, Method

Lock = Literal["none", "local", "global"]


@dataclass(frozen=True)
class PerfusionConfig:
    """Knobs of one concept.

    Args:
        bias, temperature: of the gate. perfusion.md 4: temperature 0.15; bias 0.6 to 0.75 with a
            local lock, 0.4 to 0.6 with a global one.
        strength: 0 to 2; 0 leaves the model alone, 1 is the full edit.
        lock: what keys see: the prompt itself, the super-class word at the concept's token, or
            the whole prompt with the super-class word.
        reach: tokens from the word's own on which the concept acts; -1 for all.

    Raises:
        ConfigError: a value is out of range.
    """

    bias: float = 0.6
    temperature: float = 0.15
    strength: float = 1.0
    lock: Lock = "local"
    reach: int = -1

    def __post_init__(self) -> None:
        SigmoidGate(self.bias, self.temperature)
        if not 0.0 <= self.strength <= 2.0:
            raise ConfigError(f"The concept's strength must lie in 0 to 2, got {self.strength}.")
        if self.lock not in get_args(Lock):
            raise ConfigError(f"Unknown key lock {self.lock!r}; {', '.join(get_args(Lock))}.")
        if self.reach < -1:
            raise ConfigError(f"The reach is -1 (all tokens) or more, got {self.reach}.")


@dataclass(frozen=True, eq=False)
class PreparedConcept:
    """A concept together with what the live text encoders say of its super-class.

    Args:
        concept: from a file or from training.
        superclass: i_super (d,), recomputed, never stored.
    """

    concept: Concept
    superclass: Tensor

    def gated(self, config: PerfusionConfig) -> GatedConcept:
        """The concept as the layers see it."""
        reach = None if config.reach < 0 else config.reach
        gate = SigmoidGate(config.bias, config.temperature)
        part = self.concept
        covector = part.covector / (part.covector * part.direction).sum()
        return GatedConcept(part.direction, covector, self.superclass, gate, config.strength, reach)


class Perfusion(Method):
    """Gated, key-locked rank-one edits for one or several concepts.

    Args:
        concepts: each with its knobs.
        exact: orthogonalise several concepts; otherwise each is taken out as if alone.
        superclass_context: (1, L, d) prompt with the super-class words, for a global lock.

    Raises:
        ConfigError: two concepts share a word, a concept of another method, or a global lock
            without that prompt.
        LayoutError: the concepts are for different base models.
    """

    name: ClassVar[str] = "perfusion"
    Config: ClassVar[type[PerfusionConfig]] = PerfusionConfig

    def __init__(
        self,
        concepts: Sequence[tuple[PreparedConcept, PerfusionConfig]],
        exact: bool = False,
        superclass_context: Tensor | None = None,
    ) -> None:
        records = [prepared.concept for prepared, _ in concepts]
        check_together(records, self.name)
        if any(c.lock == "global" for _, c in concepts) and superclass_context is None:
            raise ConfigError(
                "A global key lock needs the prompt written with the super-class word instead of "
                "the concept's word: encode it and connect it as superclass_prompt."
            )
        self.concepts, self.exact, self.context = list(concepts), exact, superclass_context
        gated = [prepared.gated(config) for prepared, config in concepts]
        locked = [g for g, (_, c) in zip(gated, concepts, strict=True) if c.lock == "local"]
        self.matcher = ConceptMatcher(gated, exact)
        self._key_matcher = self.matcher
        if locked and len(locked) < len(gated):
            self._key_matcher = ConceptMatcher(locked, exact)
        self._global = any(c.lock == "global" for _, c in concepts)
        self._local = bool(locked)

    def adapters(self, request: AdaptationRequest) -> AdapterSet:
        """Key and value adapters of every cross-attention layer, at the request's strength."""
        keys: PerfusionKeyAdapter | GlobalKeyAdapter | None = None
        if self._global and self.context is not None:
            keys = GlobalKeyAdapter(self.context)
        elif self._local:
            keys = PerfusionKeyAdapter(self._key_matcher)
        entries = []
        for layer in self.concepts[0][0].concept.values:
            targets = torch.stack([p.concept.values[layer] for p, _ in self.concepts])
            if keys is not None:
                entries.append(AdapterEntry(key_layer(layer), keys, request.strength))
            value = PerfusionValueAdapter(self.matcher, targets)
            entries.append(AdapterEntry(layer, value, request.strength))
        return AdapterSet(tuple(entries))


def check_together(concepts: Sequence[Concept], method: str) -> None:
    """Refuse concepts that cannot share a model.

    Raises:
        ConfigError: none, another method, or one word twice.
        LayoutError: different base models or layers.
    """
    if not concepts:
        raise ConfigError("There is no concept to apply.")
    for concept in concepts:
        if concept.method != method:
            raise ConfigError(
                f"The concept {concept.word} was trained by {concept.method}, not by {method}."
            )
    words = [concept.word for concept in concepts]
    if len(set(words)) < len(words):
        raise ConfigError(
            f"Two concepts share the word {max(words, key=words.count)}: train or load one of "
            "them under another word."
        )
    first = concepts[0]
    for other in concepts[1:]:
        sizes = [{n: len(v) for n, v in c.values.items()} for c in (first, other)]
        if sizes[0] != sizes[1] or first.direction.shape != other.direction.shape:
            raise LayoutError(
                f"The concepts {first.word} ({first.base}) and {other.word} ({other.base}) are "
                "for different base models."
            )


def key_layer(value_layer: str) -> str:
    """Name of the key projection beside a value projection."""
    return value_layer.removesuffix("to_v") + "to_k"


def concept_lora(
    prepared: PreparedConcept, project: Callable[[str, Tensor], Tensor], lock_keys: bool = True
) -> LoRAWeights:
    """The ungated edit as a rank-one LoRA: W' = W + (o* - W i*) c' (section 4, before the gate).

    Without a gate it leaks onto neighbouring words; 0.6 to 0.8 is a good strength.

    Args:
        prepared: a Perfusion concept.
        project: layer name and encodings (n, in) to what that layer makes of them (n, out).
        lock_keys: also lock the keys.

    Raises:
        ConfigError: a concept of another method.
        LayoutError: a layer of another width.
    """
    concept = prepared.concept
    check_together([concept], "perfusion")
    dtype = torch.promote_types(concept.direction.dtype, torch.float32)
    covector = prepared.gated(PerfusionConfig()).covector.to(dtype)[None]
    rows = torch.stack([concept.direction.to(dtype), prepared.superclass.to("cpu", dtype)])
    layers = {}
    for layer, target in concept.values.items():
        own, _ = project(layer, rows).to("cpu", dtype)
        if own.shape != target.shape:
            raise LayoutError(
                f"The concept {concept.word} does not fit layer {layer}: {len(target)} values for "
                f"an output of {len(own)}."
            )
        layers[layer] = LoRALayer(covector, (target.to(dtype) - own)[:, None], 1.0)
        if lock_keys:
            key = key_layer(layer)
            own, locked = project(key, rows).to("cpu", dtype)
            layers[key] = LoRALayer(covector, (locked - own)[:, None], 1.0)
    return LoRAWeights(layers)
