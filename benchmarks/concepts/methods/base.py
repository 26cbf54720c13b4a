"""What an entry of the concept benchmarks says of a method, and what they all work on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from difflora_core.adapters.base import AdapterSet
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.config import Config
from difflora_core.demo.build.concept_training import TRAINING
from difflora_core.text.covariance import Covariance
from difflora_core.text.encoders import EncodedPrompts, TextEncoders, WordEmbedding
from difflora_core.text.new_words import superclass_token

Words = Mapping[str, WordEmbedding]
AdaptersFor = Callable[[EncodedPrompts], AdapterSet]
"""Adapters for prompts, which know where the new words stand."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TrainingSettings(Config):
    """What all methods share.

    `steps`: of the optimiser; `batch`: pictures per step; `seed`: of batches and noise; `guidance`:
    that the loss is taken under (`training.losses.under_guidance`), as the demo's words are taught.
    """

    steps: int = 400
    batch: int = 4
    seed: int = 0
    guidance: float = TRAINING.guidance


@dataclass(frozen=True, eq=False)
class ConceptModels:
    """The frozen models: base, its text encoders, and their covariance C."""

    base: DiffusersBase
    text: TextEncoders
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

    method: ComparedMethod
    word: str
    superclass: str
    weights: Any
    seconds: float
    size: int
    fingerprint: str


@dataclass(frozen=True)
class ComparedMethod(ABC):
    """One method.

    `rates`: learning rates, the best of `rate_grid` on validation concepts (`choose_rates` looks
    at them side by side); `settings`: of the sweep from prompt to likeness; `pair_setting`: for two
    concepts in one picture, the best of `pair_grid` on validation concepts (`choose_pairs`);
    `usual`: the setting that artists start from.
    """

    name: str
    rates: tuple[float, ...]
    rate_grid: tuple[tuple[float, ...], ...]
    settings: tuple[float, ...]
    pair_grid: tuple[float, ...]
    pair_setting: float
    usual: float = 1.0

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
    ) -> tuple[Words, AdaptersFor]:
        """Embeddings of the new words, and what makes adapters, of concepts at a setting."""

    @abstractmethod
    def write(self, path: Path, weights: Any, seconds: float) -> None:
        """Write what an artist would store, in float16, and the seconds it took."""

    @abstractmethod
    def read(self, path: Path, models: ConceptModels) -> tuple[Any, float]:
        """What `write` wrote."""


def run_settings(training: TrainingSettings) -> dict[str, Any]:
    """What every recipe gets: the shared settings, with eight evaluations on the way."""
    return {**training.to_dict(), "evaluate_every": max(1, training.steps // 8)}
