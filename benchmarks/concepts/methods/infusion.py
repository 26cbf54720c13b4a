"""Infusion in the concept benchmarks."""

from __future__ import annotations

from difflora_core.methods.infusion import Infusion
from difflora_core.training.infusion import InfusionObjective, InfusionTraining

from .base import STRENGTHS, TrainingSettings, run_settings
from .library import LibraryMethod


class InfusionMethod(LibraryMethod):
    """Infusion."""

    objective = InfusionObjective
    registered = Infusion.name

    def config(self, training: TrainingSettings) -> InfusionTraining:
        """The recipe at its rate."""
        return InfusionTraining(learning_rate=self.rates[0], **run_settings(training))


METHOD = InfusionMethod(
    "Infusion",
    rates=(0.3,),
    rate_grid=((0.03,), (0.1,), (0.3,), (1.0,)),
    settings=STRENGTHS,
    pair_grid=(1.0, 0.75, 0.5),
    pair_setting=0.5,
)
