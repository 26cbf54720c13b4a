"""LoRA in the styles benchmark: of attention and convolutions, at a constant rate as the paper's.

Ranks are those at which it has as many parameters as StyleInject of n = 4, and 4 and 16 times as
many.
"""

from __future__ import annotations

from dataclasses import replace

from difflora_core.training.lora.objective import LoRAObjective, LoRATraining

from .base import StyleRow

EQUAL, TIMES_4, TIMES_16 = "LoRA, equal", "LoRA, 4 x the parameters", "LoRA, 16 x the parameters"


def _row(name: str, rank: int, rate: float, *others: float) -> StyleRow:
    settings = LoRATraining(
        rank=rank,
        learning_rate=rate,
        targets="attention_and_convolutions",
        schedule="constant",
        weighting="uniform",
    )
    return StyleRow(name, LoRAObjective, settings, (rate, *others))


ROWS = (
    replace(_row(EQUAL, 11, 2e-3, 6e-3, 2e-2), late=True),
    _row(TIMES_4, 45, 2e-3, 6e-3, 2e-2),
    _row(TIMES_16, 180, 2e-3, 6e-4, 6e-3),
)
