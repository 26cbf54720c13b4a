"""What an entry of the styles benchmark says of a method, and what all entries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from difflora_core.config import Config
from difflora_core.training.adaptation_run import AdaptationTraining
from difflora_core.training.picture_task import PictureTask

LOOKS = 6
"""Times that a run is judged on held-out pictures."""
LATE_STEPS, LATE_RATE = 4, 4.0
"""Of late training: times the steps, and times the rate that is a row's best."""


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
    the course; their `learning_rate` is the best of `rates` on held-out pictures (`style_rates`
    looks at them side by side). Rates are high because the base is tiny. `option_of`: the row that
    it differs from by one option which the paper leaves open; `late`: it is also trained for long.
    """

    name: str
    recipe: Callable[[PictureTask, Any], Any]
    settings: AdaptationTraining
    rates: tuple[float, ...]
    option_of: str = ""
    late: bool = False

    def at(self, course: Course) -> AdaptationTraining:
        """Its settings on a course; no run ends early, so that late training can be seen."""
        looks = max(1, course.steps // LOOKS)
        return replace(self.settings, **course.to_dict(), evaluate_every=looks, patience=0)

    def with_rate(self, rate: float) -> StyleRow:
        """The same at another learning rate."""
        settings: Any = self.settings
        return replace(self, settings=replace(settings, learning_rate=rate))

    def long(self, course: Course) -> tuple[StyleRow, Course]:
        """The row and the course of late training: more steps at more than the best rate."""
        settings: Any = self.settings
        row = self.with_rate(LATE_RATE * settings.learning_rate)
        return row, replace(course, steps=LATE_STEPS * course.steps)
