"""StyleInject and its two parts in the styles benchmark, and what its paper claims."""

from __future__ import annotations

from dataclasses import replace

from difflora_core.adapters.styleinject import PRESETS, StyleInjectPlan
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.styleinject import StyleInjectObjective, StyleInjectTraining

from . import full, lora
from .base import StyleRow

RANK = 4
RATES = (6e-3, 1e-2, 2e-2)
PLAN = PRESETS["distillation"].of_size(4, RANK)
SPREAD_PLAN = replace(PLAN, rank=1, targets=PLAN.spread_targets)

DMA, STA = "DMA alone, n = 4", "STA alone, n = 4"
ONE, FOUR, SIXTEEN = "StyleInject, n = 1", "StyleInject, n = 4", "StyleInject, n = 16"


class SpreadObjective(StyleInjectObjective):
    """STA alone: the spread is learned, and the low-rank change stays at nothing."""

    def __init__(self, task: PictureTask, config: StyleInjectTraining) -> None:
        super().__init__(task, config)
        for part in self.parts:
            for name in ("downs", "up"):
                part[name].requires_grad_(False)


def _row(
    name: str, plan: StyleInjectPlan, recipe: type[StyleInjectObjective] = StyleInjectObjective
) -> StyleRow:
    return StyleRow(name, recipe, StyleInjectTraining(learning_rate=1e-2, plan=plan), RATES)


ROWS = (
    _row(DMA, replace(PLAN, spread_targets=())),
    _row(STA, SPREAD_PLAN, SpreadObjective),
    _row(ONE, PLAN.of_size(1, RANK)),
    _row(FOUR, PLAN),
    _row(SIXTEEN, PLAN.of_size(16, RANK)),
)

CLAIMS = (
    *((FOUR, other) for other in (full.FULL, lora.EQUAL, lora.TIMES_4, lora.TIMES_16)),
    *((FOUR, other) for other in (DMA, STA, ONE)),
    (SIXTEEN, FOUR),
    *((part, lora.EQUAL) for part in (DMA, STA, ONE)),
)
