"""The baselines of Perfusion on the same batches: a DreamBooth LoRA and Textual Inversion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.text.encoders import EncodedPrompts, WordEmbedding
from difflora_core.training.adaptation_run import AdaptationTraining, masked_loss
from difflora_core.training.concept_task import ConceptTask
from difflora_core.training.loop import LoopConfig


@dataclass(frozen=True)
class YardstickConfig(AdaptationTraining):
    """Settings: `rate` of AdamW, `rank` of the LoRA, `guidance` that the loss is taken under."""

    rate: float = 0.01
    rank: int = 4
    guidance: float = 1.0

    @property
    def loop(self) -> LoopConfig:
        """The run: the same course as that of the concept recipes."""
        return self.course(self.rate)


class WordObjective(nn.Module):
    """One word; forward maps a batch to (masked denoising loss, metrics)."""

    def __init__(self, task: ConceptTask, config: YardstickConfig) -> None:
        super().__init__()
        self.task, self.config = task, config
        self.layout = task.base.layout("demo", config.rank)

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts and the adapters that belong to them."""
        raise NotImplementedError

    @property
    def module_names(self) -> dict[str, str]:
        """Layer name to module path."""
        return self.layout.module_names

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return masked_loss(self, batch, self.config.guidance), {}


class LoRAObjective(WordObjective):
    """DreamBooth: a LoRA on all attention projections; the word starts and stays at its kind."""

    def __init__(self, task: ConceptTask, config: YardstickConfig) -> None:
        super().__init__(task, config)
        generator = torch.Generator().manual_seed(config.seed)
        shapes = list(self.layout)
        self.down = nn.ParameterList(
            torch.randn(config.rank, s.in_features, generator=generator) / math.sqrt(s.in_features)
            for s in shapes
        )
        self.up = nn.ParameterList(torch.zeros(s.out_features, config.rank) for s in shapes)

    def weights(self) -> LoRAWeights:
        """The LoRA; gradients flow."""
        rows = zip(self.layout, self.down, self.up, strict=True)
        rank = float(self.config.rank)
        return LoRAWeights({s.name: LoRALayer(down, up, rank) for s, down, up in rows})

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        words = {self.task.words[0].word: self.task.embeddings[0]}
        with torch.no_grad():
            encoded = self.task.text.encode(prompts, words)
        return encoded, lora_adapter_set(self.weights())

    def adaptations(self, facts: Mapping[str, Any]) -> list[LoRAWeights]:
        """What was trained."""
        del facts
        return [self.weights().detach()]


class InversionObjective(WordObjective):
    """Textual Inversion: the word's embedding in both text encoders and nothing else."""

    def __init__(self, task: ConceptTask, config: YardstickConfig) -> None:
        super().__init__(task, config)
        self.shifts = nn.ParameterList(torch.zeros_like(e) for e in task.embeddings[0])

    def embedding(self) -> WordEmbedding:
        """The word; gradients flow."""
        pairs = zip(self.task.embeddings[0], self.shifts, strict=True)
        return tuple(start + shift for start, shift in pairs)

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        encoded = self.task.text.encode(prompts, {self.task.words[0].word: self.embedding()})
        return encoded, AdapterSet(())

    def adaptations(self, facts: Mapping[str, Any]) -> list[WordEmbedding]:
        """What was trained."""
        del facts
        return [tuple(e.detach().clone() for e in self.embedding())]
