"""The Infusion recipe: a value residual at the concept's token in every cross-attention layer.

arXiv 2404.14007. Nothing else is trained: the word keeps its super-class word's embedding, so all
attention maps stay those of the original model. Residuals start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.base import AdapterSet
from ..adapters.infusion import token_concept
from ..adapters.token_gate import ConceptMatcher
from ..errors import ConfigError
from ..methods.base import Facts, TrainedAdaptation
from ..methods.infusion import Infusion, InfusionConfig, value_adapters
from ..text.encoders import EncodedPrompts
from .adaptation_run import AdaptationTraining, masked_loss
from .concept_task import ConceptTask, learned_words
from .loop import LoopConfig
from .losses import check_guidance


@dataclass(frozen=True)
class InfusionTraining(AdaptationTraining):
    """Settings of the recipe (related.md 2): 500 steps at 0.01.

    `learning_rate`: of the residuals. `threshold`: similarity from which a token can be the
    concept's. `guidance`: see `losses.under_guidance`; 1 is the plain loss. The rest: see
    `AdaptationTraining`.
    """

    steps: int = 500
    learning_rate: float = 0.01
    threshold: float = InfusionConfig.threshold
    guidance: float = 1.0

    def __post_init__(self) -> None:
        InfusionConfig(self.threshold)
        super().__post_init__()
        if not 0 < self.learning_rate <= 10:
            raise ConfigError(f"The learning rate must lie in 0 to 10, got {self.learning_rate}.")
        check_guidance(self.guidance)

    @property
    def loop(self) -> LoopConfig:
        """The run."""
        return self.course(self.learning_rate)


class InfusionObjective(nn.Module):
    """Residuals of J words; forward maps a batch to (loss, metrics). At the start: the base model.

    Args:
        task: the frozen setting. config: the recipe.
    """

    name: ClassVar[str] = Infusion.name
    Config: ClassVar[type[InfusionTraining]] = InfusionTraining

    def __init__(self, task: ConceptTask, config: InfusionTraining) -> None:
        super().__init__()
        self.task, self.config = task, config
        starts = [task.layer_output(path, task.superclasses) for path in task.layers.values()]
        self.values = nn.ParameterList(torch.zeros_like(start) for start in starts)
        self.covectors = torch.stack([task.covariance.covector(i) for i in task.superclasses])

    def prepare(self, prompts: Sequence[str]) -> tuple[EncodedPrompts, AdapterSet]:
        """Encoded prompts, context (B, L, d), and the adapters that belong to them."""
        words = zip(self.task.words, self.task.embeddings, strict=True)
        with torch.no_grad():
            encoded = self.task.text.encode(prompts, {w.word: e for w, e in words})
        rows = zip(self.task.superclasses, self.covectors, strict=True)
        matcher = ConceptMatcher([token_concept(i, c, self.config.threshold) for i, c in rows])
        values = dict(zip(self.task.layers, self.values, strict=True))
        return encoded, value_adapters(matcher, values)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Masked denoising loss () of a batch of `PictureExamples.draw`."""
        return masked_loss(self, batch, self.config.guidance), {}

    @property
    def module_names(self) -> dict[str, str]:
        """Layer name to module path of the values."""
        return dict(self.task.layers)

    @torch.no_grad()
    def adaptations(self, facts: Facts) -> list[TrainedAdaptation]:
        """What was trained so far, one record for each word."""
        task, result = self.task, []
        for row, word in enumerate(learned_words(task, task.embeddings)):
            vectors = (task.superclasses[row], self.covectors[row])
            direction, covector = (vector.cpu().float() for vector in vectors)
            shared = {"direction": direction, "covector": covector}
            layers = {
                layer: {"values": value[row].detach().cpu().clone()}
                for layer, value in zip(task.layers, self.values, strict=True)
            }
            settings = InfusionConfig(self.config.threshold)
            result.append(
                TrainedAdaptation(
                    self.name, task.base_name, settings, shared, layers, word=word, facts=facts
                )
            )
        return result


RECIPE = InfusionObjective
