"""The methods that the concept benchmarks compare, one entry each.

An entry says how a method is trained, cached and applied, and which settings its sweep takes. The
baselines, a DreamBooth LoRA and Textual Inversion, are entries like the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.config import Config
from difflora_core.demo.build.concept_training import TRAINING
from difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict
from difflora_core.lora.weights import LoRAWeights
from difflora_core.methods.base import AdaptationRequest
from difflora_core.methods.infusion import Infusion, InfusionConfig
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig, PreparedConcept
from difflora_core.storage.adapter_file import read_concept, write_concept
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.covariance import Covariance
from difflora_core.text.new_words import (
    Concept,
    ConceptText,
    WordEmbedding,
    superclass_token,
    word_encoding,
)
from difflora_core.training.infusion import InfusionObjective, InfusionTraining
from difflora_core.training.perfusion import PerfusionObjective

from .word_objectives import InversionObjective, LoRAObjective, YardstickConfig

Words = Mapping[str, WordEmbedding]


@dataclass(frozen=True)
class TrainingSettings(Config):
    """What all methods share: optimiser steps, pictures per step, seed of batches and noise."""

    steps: int = 400
    batch: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class ConceptModels:
    """The frozen models: base, its text encoders, and their covariance C."""

    base: DiffusersBase
    text: ConceptText
    covariance: Covariance

    @cached_property
    def module_names(self) -> dict[str, str]:
        """Layer name to module path."""
        return self.base.layout("demo", 1).module_names

    def superclass(self, word: str) -> WordEmbedding:
        """Embedding of a super-class word, such as "cat"."""
        return self.text.embedding(superclass_token(self.text, word))


@dataclass(frozen=True, eq=False)
class TrainedConcept:
    """One word by one method.

    `superclass`: the plain word of its kind; `weights`: what the method trained; `seconds`: of
    processor time that took; `size`: bytes of the file; `fingerprint`: of all it depends on.
    """

    method: ConceptMethod
    word: str
    superclass: str
    weights: Any
    seconds: float
    size: int
    fingerprint: str


@dataclass(frozen=True)
class ConceptMethod(ABC):
    """One method.

    `rates`: learning rates, the best of `rate_grid` on validation concepts (`choose_rates` looks
    at them side by side); `settings`: of the sweep from prompt to likeness; `pair_settings`: tried
    with two concepts in one picture.
    """

    name: str
    rates: tuple[float, ...]
    rate_grid: tuple[tuple[float, ...], ...]
    settings: tuple[float, ...]
    pair_settings: tuple[float, ...]

    objective: ClassVar[Callable[..., Any]]

    def label(self, setting: float) -> str:
        """Row name at a setting; the setting is a strength unless the method says otherwise."""
        return f"{self.name} x {setting:g}"

    @abstractmethod
    def config(self, training: TrainingSettings) -> Any:
        """The recipe's settings at this method's learning rates."""

    @abstractmethod
    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdapterSet]:
        """Embeddings of the new words, and adapters, of one or more concepts at a setting."""

    @abstractmethod
    def write(self, path: Path, weights: Any, seconds: float) -> None:
        """Write what an artist would store, in float16, and the seconds it took."""

    @abstractmethod
    def read(self, path: Path, models: ConceptModels) -> tuple[Any, float]:
        """What `write` wrote."""


class _AdaptationMethod(ConceptMethod):
    """A method of the library, whose trained concepts have a file format there."""

    def write(self, path: Path, weights: Concept, seconds: float) -> None:
        write_concept(path, replace(weights, facts={**weights.facts, "seconds": seconds}))

    def read(self, path: Path, models: ConceptModels) -> tuple[Concept, float]:
        concept = read_concept(path)
        return concept, float(concept.facts["seconds"])


class PerfusionMethod(_AdaptationMethod):
    """Perfusion; its setting is the gate's bias."""

    objective = PerfusionObjective

    def label(self, setting: float) -> str:
        return f"{self.name}, bias {setting:g}"

    def config(self, training: TrainingSettings) -> Any:
        value, word = self.rates
        return replace(TRAINING, value_rate=value, word_rate=word, **_run(training))

    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdapterSet]:
        config = PerfusionConfig(setting, TRAINING.temperature, reach=TRAINING.reach)
        prepared = []
        for t in trained:
            kind = models.superclass(t.weights.superclass)
            encoding = word_encoding(models.text, kind, t.weights.contexts)
            prepared.append((PreparedConcept(t.weights, encoding), config))
        words = {t.word: t.weights.embeddings for t in trained}
        return words, Perfusion(prepared, exact=True).adapters(AdaptationRequest())


class InfusionMethod(_AdaptationMethod):
    """Infusion."""

    objective = InfusionObjective

    def config(self, training: TrainingSettings) -> Any:
        return InfusionTraining(learning_rate=self.rates[0], **_run(training))

    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdapterSet]:
        pairs = [(t.weights, InfusionConfig(setting)) for t in trained]
        words = {t.word: t.weights.embeddings for t in trained}
        return words, Infusion(pairs).adapters(AdaptationRequest())


class _BaselineMethod(ConceptMethod):
    """A method that is here for comparison alone."""

    def config(self, training: TrainingSettings) -> YardstickConfig:
        return YardstickConfig(rate=self.rates[0], **_run(training))

    @abstractmethod
    def to_tensors(self, weights: Any) -> dict[str, Tensor]:
        """Weights as named float16 tensors."""

    @abstractmethod
    def from_tensors(self, tensors: dict[str, Tensor], models: ConceptModels) -> Any:
        """What `to_tensors` took."""

    def write(self, path: Path, weights: Any, seconds: float) -> None:
        write_atomic(self.to_tensors(weights), {"seconds": repr(seconds)}, path)

    def read(self, path: Path, models: ConceptModels) -> tuple[Any, float]:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
            return self.from_tensors(tensors, models), float(file.metadata()["seconds"])


class DreamBoothMethod(_BaselineMethod):
    """A LoRA on all attention projections; the word stays at its super-class."""

    objective = LoRAObjective

    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdapterSet]:
        adapters = AdapterSet(())
        for t in trained:
            adapters += lora_adapter_set(t.weights).scaled(setting)
        return {t.word: models.superclass(t.superclass) for t in trained}, adapters

    def to_tensors(self, weights: LoRAWeights) -> dict[str, Tensor]:
        return to_state_dict(weights, dtype=torch.float16)

    def from_tensors(self, tensors: dict[str, Tensor], models: ConceptModels) -> LoRAWeights:
        layout = models.base.layout("demo", YardstickConfig(1, 1).rank)
        return from_state_dict(tensors, layout).weights


class InversionMethod(_BaselineMethod):
    """Textual Inversion; the setting mixes from the super-class to the trained embedding."""

    objective = InversionObjective

    def apply(
        self, models: ConceptModels, trained: Sequence[TrainedConcept], setting: float
    ) -> tuple[Words, AdapterSet]:
        words = {}
        for t in trained:
            pairs = zip(models.superclass(t.superclass), t.weights, strict=True)
            words[t.word] = tuple(torch.lerp(start, end, setting) for start, end in pairs)
        return words, AdapterSet(())

    def to_tensors(self, weights: WordEmbedding) -> dict[str, Tensor]:
        return {f"embedding.{k}": e.half().contiguous() for k, e in enumerate(weights)}

    def from_tensors(self, tensors: dict[str, Tensor], models: ConceptModels) -> WordEmbedding:
        return tuple(tensors[f"embedding.{k}"] for k in range(len(tensors)))


def _run(training: TrainingSettings) -> dict[str, int]:
    """What every recipe gets: the shared settings, with eight evaluations on the way."""
    return {**training.to_dict(), "evaluate_every": max(1, training.steps // 8)}


STRENGTHS = (0.25, 0.5, 0.75, 1.0)
PERFUSION = PerfusionMethod(
    "Perfusion",
    rates=(TRAINING.value_rate, TRAINING.word_rate),
    rate_grid=((0.03, 0.001), (0.1, 0.001), (0.3, 0.001), (0.1, 0.006)),
    settings=(0.9, 0.8, 0.75, 0.7, 0.6, 0.45),
    pair_settings=(0.6, 0.45),
)
INFUSION = InfusionMethod(
    "Infusion",
    rates=(0.3,),
    rate_grid=((0.03,), (0.1,), (0.3,), (1.0,)),
    settings=STRENGTHS,
    pair_settings=(1.0, 0.5),
)
DREAMBOOTH = DreamBoothMethod(
    "DreamBooth LoRA",
    rates=(0.003,),
    rate_grid=((0.001,), (0.003,), (0.01,)),
    settings=STRENGTHS,
    pair_settings=(1.0, 0.7),
)
INVERSION = InversionMethod(
    "Textual Inversion",
    rates=(0.01,),
    rate_grid=((0.003,), (0.01,), (0.03,)),
    settings=STRENGTHS[1:],
    pair_settings=(1.0,),
)
METHODS: Mapping[str, ConceptMethod] = {
    method.name: method for method in (PERFUSION, INFUSION, DREAMBOOTH, INVERSION)
}
