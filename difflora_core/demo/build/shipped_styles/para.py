"""The style that ships by PaRa: an old photograph."""

from __future__ import annotations

from ....training.para import PaRaObjective, PaRaTraining
from .base import ShippedStyle

STYLE = ShippedStyle(
    "demo_sepia",
    PaRaObjective,
    # The demo's layers are narrow: 8 of 64 directions are more than the paper's share of 1280.
    PaRaTraining(
        steps=300, batch=8, learning_rate=3e-3, rank=8, targets="all", bound=0.5,
        evaluate_every=50,
    ),
)  # fmt: skip
