"""What the library's methods are compared with: a DreamBooth LoRA and Textual Inversion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict
from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.text.encoders import WordEmbedding

from ..word_objectives import InversionObjective, LoRAObjective, YardstickConfig
from .base import (
    STRENGTHS,
    AdaptersFor,
    ComparedMethod,
    ConceptModels,
    TrainedConcept,
    TrainingSettings,
    Words,
    run_settings,
)


class _BaselineMethod(ComparedMethod):
    """A method that is here for comparison alone."""

    def config(self, training: TrainingSettings) -> YardstickConfig:
        return YardstickConfig(rate=self.rates[0], **run_settings(training))

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
    ) -> tuple[Words, AdaptersFor]:
        adapters = AdapterSet(())
        for t in trained:
            adapters += lora_adapter_set(t.weights).scaled(setting)
        return {t.word: models.superclass(t.superclass) for t in trained}, lambda _: adapters

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
    ) -> tuple[Words, AdaptersFor]:
        words = {}
        for t in trained:
            pairs = zip(models.superclass(t.superclass), t.weights, strict=True)
            words[t.word] = tuple(torch.lerp(start, end, setting) for start, end in pairs)
        return words, lambda _: AdapterSet(())

    def to_tensors(self, weights: WordEmbedding) -> dict[str, Tensor]:
        return {f"embedding.{k}": e.half().contiguous() for k, e in enumerate(weights)}

    def from_tensors(self, tensors: dict[str, Tensor], models: ConceptModels) -> WordEmbedding:
        return tuple(tensors[f"embedding.{k}"] for k in range(len(tensors)))


DREAMBOOTH = DreamBoothMethod(
    "DreamBooth LoRA",
    rates=(0.003,),
    rate_grid=((0.001,), (0.003,), (0.01,)),
    settings=STRENGTHS,
    pair_grid=(1.0, 0.7, 0.5),
    pair_setting=0.7,
)
INVERSION = InversionMethod(
    "Textual Inversion",
    rates=(0.01,),
    rate_grid=((0.003,), (0.01,), (0.03,)),
    settings=STRENGTHS[1:],
    pair_grid=(1.0, 0.75),
    pair_setting=1.0,
)
