"""Infusion at inference: trained value residuals to adapters (arXiv 2404.14007)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..adapters.base import AdapterEntry, AdapterSet
from ..adapters.infusion import InfusionValueAdapter, TokenGate, token_concept
from ..adapters.perfusion import ConceptMatcher
from ..errors import ConfigError
from ..text.new_words import Concept
from .base import AdaptationRequest, Method
from .perfusion import check_together


@dataclass(frozen=True)
class InfusionConfig:
    """Knobs of one concept.

    Args:
        strength: 0 to 2; 0 leaves the model alone, 1 as trained.
        threshold: similarity from which a token can be the concept's, above 0.

    Raises:
        ConfigError: a value is out of range.
    """

    strength: float = 1.0
    threshold: float = 0.7

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 2.0:
            raise ConfigError(f"The concept's strength must lie in 0 to 2, got {self.strength}.")
        TokenGate(self.threshold)


class Infusion(Method):
    """Value residuals at the concept's token, for one or several concepts.

    Args:
        concepts: each with its knobs.

    Raises:
        ConfigError, LayoutError: they cannot share a model, see `check_together`.
    """

    name: ClassVar[str] = "infusion"
    Config: ClassVar[type[InfusionConfig]] = InfusionConfig

    def __init__(self, concepts: Sequence[tuple[Concept, InfusionConfig]]) -> None:
        check_together([concept for concept, _ in concepts], self.name)
        self.concepts = list(concepts)
        self.matcher = ConceptMatcher(
            [
                token_concept(
                    concept.direction,
                    concept.covector / (concept.covector * concept.direction).sum(),
                    config.threshold,
                    config.strength,
                )
                for concept, config in concepts
            ]
        )

    def adapters(self, request: AdaptationRequest) -> AdapterSet:
        """Value adapters of every cross-attention layer, at the request's strength."""
        entries = []
        for layer in self.concepts[0][0].values:
            residuals = torch.stack([concept.values[layer] for concept, _ in self.concepts])
            adapter = InfusionValueAdapter(self.matcher, residuals)
            entries.append(AdapterEntry(layer, adapter, request.strength))
        return AdapterSet(tuple(entries))
