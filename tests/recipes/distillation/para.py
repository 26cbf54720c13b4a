"""Distillation of PaRa on the small network."""

from dataclasses import replace

from difflora_core.training.para import PaRaTraining

COURSE = {"steps": 40, "batch": 2, "learning_rate": 0.05}
CONFIG = replace(PaRaTraining.for_distillation(rank=1, **COURSE), bound=0.5)
LEFT = 0.999
"""Most of the loss after training."""
