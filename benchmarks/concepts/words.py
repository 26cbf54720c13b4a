"""Trains new words by every method, and caches them on disk."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difflora_core.demo.build.concept_training import concept_training_set, wordings
from difflora_core.demo.world.concepts import ConceptPictures, DemoConcept, render_concept
from difflora_core.demo.world.identities import split_seeds
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.concept_task import ConceptTask
from difflora_core.training.picture_examples import PictureExamples

from ..command import Log, silent
from .methods.base import ComparedMethod, ConceptModels, TrainedConcept, TrainingSettings

PHOTOS = 4
VERSION = 4
"""To be raised with every change of a recipe: it makes cached words invalid."""


@dataclass(frozen=True)
class ConceptTrainer:
    """Trains words on one base; what was trained is cached in `folder`.

    `base_hash`: of the base's file; `log`: prints a line.
    """

    models: ConceptModels
    base_hash: str
    folder: Path
    log: Log = silent

    def train(
        self, concept: DemoConcept, method: ComparedMethod, training: TrainingSettings
    ) -> TrainedConcept:
        """One word by one method, from the cache where possible."""
        photos = training_photos(concept)
        config = method.config(training)
        name = self._fingerprint(concept, method, config, photos)
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            started = time.process_time()
            task, examples = self.training_set(concept, photos)
            objective = method.objective(task, config)
            run = self.folder / f"{name}.run"
            result = run_adaptation(objective, examples, run)
            seconds = time.process_time() - started
            method.write(path, result.adaptations[0], seconds)
            shutil.rmtree(run)
            self.log(
                f"{method.name} learned {concept.word} in {seconds:.0f} s (step {result.step})"
            )
        weights, seconds = method.read(path, self.models)
        size = path.stat().st_size
        return TrainedConcept(method, concept.word, concept.kind, weights, seconds, size, name)

    def train_each(
        self, concepts: Sequence[DemoConcept], method: ComparedMethod, training: TrainingSettings
    ) -> dict[str, TrainedConcept]:
        """Each of these by one method, by its word."""
        return {c.word: self.train(c, method, training) for c in concepts}

    def training_set(
        self, concept: DemoConcept, photos: ConceptPictures
    ) -> tuple[ConceptTask, PictureExamples]:
        """The task and its pictures."""
        models = self.models
        return concept_training_set(models.base, models.text, models.covariance, concept, photos)

    def _fingerprint(
        self, concept: DemoConcept, method: ComparedMethod, config: Any, photos: ConceptPictures
    ) -> str:
        """Digest of all that the trained word depends on."""
        prompts = [wordings(prompt) for prompt in photos.prompts]
        facts = (VERSION, self.base_hash, method.name, repr(config), repr(concept), prompts)
        digest = hashlib.sha256(repr(facts).encode())
        digest.update((photos.images * 255).round().byte().numpy().tobytes())
        digest.update(self.models.covariance.matrix.float().numpy().tobytes())
        return digest.hexdigest()[:32]


def training_photos(concept: DemoConcept) -> ConceptPictures:
    """PHOTOS pictures of different people of the split `train` with the concept."""
    people = split_seeds("train", PHOTOS, 90_000)
    return render_concept(concept, people, range(1, PHOTOS + 1))
