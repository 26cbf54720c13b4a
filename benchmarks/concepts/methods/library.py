"""A method of the library as an entry: trained, cached and applied by the road of every method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from difflora_core.adapters.base import AdapterSet
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation, TrainedAdaptation
from difflora_core.methods.registry import method
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.text.encoders import EncodedPrompts
from difflora_core.text.new_words import word_encoding

from .base import AdaptersFor, ComparedMethod, ConceptModels, TrainedConcept, Words


@dataclass(frozen=True)
class LibraryMethod(ComparedMethod):
    """A method of the registry; its setting is a strength unless it says otherwise.

    `registered`: its name there.
    """

    registered: ClassVar[str]

    def applied(self, prepared: PreparedAdaptation, setting: float) -> AppliedAdaptation:
        """One concept at a setting."""
        return AppliedAdaptation(prepared, prepared.adaptation.settings, setting)

    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdaptersFor]:
        """Embeddings of the new words, and what makes adapters, of concepts at a setting."""
        applied = {}
        for concept in trained:
            word = concept.weights.word
            encoding = word_encoding(models.text, models.superclass(word.superclass), word.contexts)
            prepared = PreparedAdaptation(concept.weights, encoding)
            applied[concept.word] = self.applied(prepared, setting)

        def adapters(prompts: EncodedPrompts) -> AdapterSet:
            there = [own.spoken(prompts.since(word)) for word, own in applied.items()]
            heard = [own for own in there if torch.as_tensor(own.strength).any()]
            return method(self.registered).adapters(heard) if heard else AdapterSet(())

        return {concept.word: concept.weights.word.embeddings for concept in trained}, adapters

    def write(self, path: Path, weights: TrainedAdaptation, seconds: float) -> None:
        """Write its file, and the seconds it took."""
        write_adaptation(path, replace(weights, facts={**weights.facts, "seconds": seconds}))

    def read(self, path: Path, models: ConceptModels) -> tuple[TrainedAdaptation, float]:
        """What `write` wrote."""
        concept = read_adaptation(path)
        return concept, float(concept.facts["seconds"])
