"""Infusion at inference: trained value residuals to adapters (arXiv 2404.14007)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.infusion import InfusionValueAdapter, token_concept
from ..adapters.token_gate import ConceptMatcher, TokenGate
from ..config import Config
from .base import AppliedAdaptation, ConceptMethod, settings_as, unit_covector


@dataclass(frozen=True)
class InfusionConfig(Config):
    """Settings of one concept.

    Args:
        threshold: similarity from which a token can be the concept's, 0 to 3, above 0.

    Raises:
        ConfigError: a value is out of range.
    """

    threshold: float = 0.7

    def __post_init__(self) -> None:
        TokenGate(self.threshold)


class Infusion(ConceptMethod):
    """Value residuals at the concept's token, for one or several concepts."""

    name: ClassVar[str] = "infusion"
    Config: ClassVar[type[Config]] = InfusionConfig

    @classmethod
    def adapters(cls, applied: Sequence[AppliedAdaptation]) -> AdapterSet:
        """Value adapters of every cross-attention layer."""
        cls.check_together(applied)
        concepts = []
        for part in applied:
            threshold = settings_as(InfusionConfig, part.settings).threshold
            concept = part.adaptation
            vectors = (concept.shared["direction"], unit_covector(concept))
            concepts.append(token_concept(*vectors, threshold, part.strength, part.since))
        layers = applied[0].adaptation.layers
        values = {layer: cls.values(applied, layer) for layer in layers}
        return value_adapters(ConceptMatcher(concepts), values)


def value_adapters(matcher: ConceptMatcher, values: Mapping[str, Tensor]) -> AdapterSet:
    """The adapters of every cross-attention layer, in training and when drawing.

    Args:
        matcher: of J concepts, shared by all layers.
        values: value layer to its residuals (J, out); gradients flow into them.
    """
    return AdapterSet(
        tuple(
            AdapterEntry(layer, InfusionValueAdapter(matcher, residuals))
            for layer, residuals in values.items()
        )
    )
