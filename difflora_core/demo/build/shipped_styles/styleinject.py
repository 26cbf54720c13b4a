"""The style that ships by StyleInject: a blueprint."""

from __future__ import annotations

from ....adapters.styleinject import ATTENTION, StyleInjectPlan
from ....training.styleinject import StyleInjectObjective, StyleInjectTraining
from .base import ShippedStyle

PLAN = StyleInjectPlan(
    styles=4,
    rank=2,
    targets=(*ATTENTION, "out_layers.3"),
    spread_targets=("attn1.to_q", "attn2.to_q", "out_layers.3"),
)
"""As for distillation, with one convolution of a block: the other one doubles the file."""
STYLE = ShippedStyle(
    "demo_cyanotype",
    StyleInjectObjective,
    StyleInjectTraining(steps=400, batch=6, learning_rate=6e-3, plan=PLAN, patience=0),
)
