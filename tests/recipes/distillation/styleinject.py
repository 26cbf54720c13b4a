"""Distillation of StyleInject on the small network."""

from difflora_core.training.styleinject import StyleInjectTraining

CONFIG = StyleInjectTraining.for_distillation(rank=2, learning_rate=0.02, steps=40, batch=2)
LEFT = 0.9
"""Most of the loss after training."""
