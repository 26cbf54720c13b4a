"""The ways to learn a style that are compared: one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from difflora_core.adapters.styleinject import PRESETS, StyleInjectPlan
from difflora_core.config import Config
from difflora_core.training.adaptation_run import AdaptationTraining
from difflora_core.training.concept_task import PictureTask
from difflora_core.training.lora.objective import LoRAObjective, LoRATraining
from difflora_core.training.para import PaRaObjective, PaRaTraining
from difflora_core.training.styleinject import StyleInjectObjective, StyleInjectTraining

from .objectives import FullObjective, FullTraining, SpreadObjective

LOOKS = 10
"""Times that a run is judged on held-out pictures."""
RANK = 4
"""Of StyleInject; the LoRA of the equal row has as many parameters as n = 4 of this rank."""
STYLEINJECT_RATE, LORA_RATE, PARA_RATE = 6e-3, 6e-3, 3e-3
"""Rates are high because the base is tiny; those of StyleInject and PaRa are the demo's."""


@dataclass(frozen=True)
class Course(Config):
    """What all rows share: optimiser steps, pictures per step, seed of start, batches and noise."""

    steps: int = 400
    batch: int = 4
    seed: int = 0


@dataclass(frozen=True)
class StyleRow:
    """A way to learn a style.

    `name`: in the table. `recipe`: makes its objective of a task and settings. `settings`: but for
    the course.
    """

    name: str
    recipe: Callable[[PictureTask, Any], Any]
    settings: AdaptationTraining

    def at(self, course: Course) -> AdaptationTraining:
        """Its settings on a course; no run ends early, so that late training can be seen."""
        looks = max(1, course.steps // LOOKS)
        return replace(self.settings, **course.to_dict(), evaluate_every=looks, patience=0)


def _lora(name: str, rank: int) -> StyleRow:
    """A LoRA of attention and convolutions, at a constant rate as the paper's."""
    settings = LoRATraining(
        rank=rank,
        learning_rate=LORA_RATE,
        targets="attention_and_convolutions",
        schedule="constant",
        weighting="uniform",
    )
    return StyleRow(name, LoRAObjective, settings)


def _styleinject(
    name: str, plan: StyleInjectPlan, recipe: type[StyleInjectObjective] = StyleInjectObjective
) -> StyleRow:
    """StyleInject on the layers of a plan."""
    return StyleRow(name, recipe, StyleInjectTraining(learning_rate=STYLEINJECT_RATE, plan=plan))


PLAN = PRESETS["distillation"].of_size(4, RANK)
SPREAD_PLAN = replace(PLAN, rank=1, targets=PLAN.spread_targets)

FULL, LORA = "full fine-tune", "LoRA, equal"
LORA_4, LORA_16 = "LoRA, 4 x the parameters", "LoRA, 16 x the parameters"
DMA, STA = "DMA alone, n = 4", "STA alone, n = 4"
ONE, FOUR, SIXTEEN = "StyleInject, n = 1", "StyleInject, n = 4", "StyleInject, n = 16"
PARA = "PaRa"

ROWS: Mapping[str, StyleRow] = {
    row.name: row
    for row in (
        StyleRow(FULL, FullObjective, FullTraining()),
        _lora(LORA, rank=11),
        _lora(LORA_4, rank=45),
        _lora(LORA_16, rank=180),
        _styleinject(DMA, replace(PLAN, spread_targets=())),
        _styleinject(STA, SPREAD_PLAN, SpreadObjective),
        _styleinject(ONE, PLAN.of_size(1, RANK)),
        _styleinject(FOUR, PLAN),
        _styleinject(SIXTEEN, PLAN.of_size(16, RANK)),
        StyleRow(
            PARA,
            PaRaObjective,
            PaRaTraining(rank=8, learning_rate=PARA_RATE, targets="all", bound=0.5),
        ),
    )
}

CLAIMS = (
    *((FOUR, other) for other in (FULL, LORA, LORA_4, LORA_16, DMA, STA, ONE)),
    (SIXTEEN, FOUR),
    (ONE, LORA),
)
"""What the paper of StyleInject finds: the first row of a pair is more like the teacher."""
