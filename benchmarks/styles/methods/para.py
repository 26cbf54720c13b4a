"""PaRa in the styles benchmark."""

from __future__ import annotations

from difflora_core.training.para import PaRaObjective, PaRaTraining

from .base import StyleRow

PARA = "PaRa"
ROWS = (
    StyleRow(
        PARA,
        PaRaObjective,
        PaRaTraining(rank=8, learning_rate=1e-2, targets="all", bound=0.5),
        rates=(3e-3, 1e-2, 3e-2),
        late=True,
    ),
)
