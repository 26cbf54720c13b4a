"""Trains a row of the table on a task, and keeps what was trained on disk."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from difflora_core.adapters.base import AdapterSet
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation, TrainedAdaptation
from difflora_core.methods.registry import method
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.training.adaptation_run import run_adaptation, run_fingerprint

from ..command import Log, silent
from .methods.base import Course, StyleRow
from .tasks import StyleTask

VERSION = 2
"""To be raised with every change of a recipe: it makes cached styles invalid."""


@dataclass(frozen=True, eq=False)
class TrainedStyle:
    """A style by one row.

    Its facts hold `parameters`, `seconds`, `steps` to the best state, `loss` of that on held-out
    pictures, and `late`: how many times as much the last state has. `size`: bytes of its file;
    `fingerprint`: of all it depends on.
    """

    adaptation: TrainedAdaptation
    size: int
    fingerprint: str

    @property
    def adapters(self) -> AdapterSet:
        """What it puts on the base."""
        own = AppliedAdaptation(PreparedAdaptation(self.adaptation), self.adaptation.settings)
        return method(self.adaptation.method).adapters([own])

    @property
    def costs(self) -> dict[str, float]:
        """Columns of the table that training alone decides."""
        facts = self.adaptation.facts
        return {
            "parameters": float(facts["parameters"]),
            "file_kb": self.size / 1024,
            "best_step": float(facts["steps"]),
            "late_loss": float(facts["late"]),
            "seconds": float(facts["seconds"]),
        }


@dataclass(frozen=True)
class StyleTrainer:
    """Trains styles; those of before are read from `folder`. `log` prints a line."""

    folder: Path
    log: Log = silent

    def train(
        self, task: StyleTask, row: StyleRow, course: Course, last: bool = False
    ) -> TrainedStyle:
        """One row on one task: its best state on held-out pictures, or its last one."""
        objective = task.objective(row.recipe(task.task, row.at(course)))
        same = run_fingerprint(objective, task.examples, task.held_out)
        facts = f"{VERSION} {row.name} {same}" + " last" * last
        name = hashlib.sha256(facts.encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            made = self._trained(objective, task, self.folder / f"{name}.run", last)
            write_adaptation(path, made)
            self.log(f"{row.name} learned a style by seed {course.seed}")
        return TrainedStyle(read_adaptation(path), path.stat().st_size, name)

    def _trained(self, objective: Any, task: StyleTask, run: Path, last: bool) -> TrainedAdaptation:
        """The best or the last state of a run, with facts."""
        started, losses = time.process_time(), [float("nan")]
        late: list[TrainedAdaptation] = []
        if last:  # a run that is taken up at its end would not pass its last state again
            shutil.rmtree(run, ignore_errors=True)

        def watch(
            step: int, total: int, metrics: dict[str, float], preview: Callable[[], Tensor]
        ) -> None:
            losses.append(metrics.get("evaluation", losses[-1]))
            if last and step == total:  # the run ends by going back to its best state
                late.extend(objective.adaptations({}))

        parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        result = run_adaptation(objective, task.examples, run, watch, held_out=task.held_out)
        facts = {
            "parameters": parameters,
            "seconds": time.process_time() - started,
            "loss": result.loss,
            "late": losses[-1] / result.loss,
            "steps": result.step,
        }
        shutil.rmtree(run)
        made = (late or result.adaptations)[0]
        return replace(made, facts={**made.facts, **facts})
