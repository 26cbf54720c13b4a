"""Perfusion in the concept benchmarks; its setting is the gate's bias."""

from __future__ import annotations

from dataclasses import replace

from difflora_core.demo.build.concept_training import TRAINING
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig
from difflora_core.training.perfusion import PerfusionObjective, PerfusionTraining

from .base import TrainingSettings, run_settings
from .library import LibraryMethod


class PerfusionMethod(LibraryMethod):
    """Perfusion; several concepts are kept apart exactly."""

    objective = PerfusionObjective
    registered = Perfusion.name

    def label(self, setting: float) -> str:
        """Row name at a bias."""
        return f"{self.name}, bias {setting:g}"

    def config(self, training: TrainingSettings) -> PerfusionTraining:
        """The demo's recipe at these rates."""
        value, word = self.rates
        return replace(TRAINING, value_rate=value, word_rate=word, **run_settings(training))

    def applied(self, prepared: PreparedAdaptation, setting: float) -> AppliedAdaptation:
        """One concept at a bias."""
        gate = {"bias": setting, "temperature": TRAINING.temperature, "reach": TRAINING.reach}
        return AppliedAdaptation(prepared, PerfusionConfig(**gate, combine="exact"))


METHOD = PerfusionMethod(
    "Perfusion",
    rates=(TRAINING.value_rate, TRAINING.word_rate),
    rate_grid=((0.03, 0.001), (0.1, 0.001), (0.3, 0.001), (0.1, 0.006)),
    settings=(0.9, 0.8, 0.75, 0.7, 0.6, 0.45),
    pair_grid=(0.75, 0.6, 0.45),
    pair_setting=0.6,
    usual=PerfusionConfig.bias,
)
