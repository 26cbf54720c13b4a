"""Teaches the words that are to ship; see stages.py. Not a stage of the build yet: what is learned
in the demo world is not good enough to show."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..models.concept import SLOT
from ..storage.perfusion_file import write_concept
from ..training.captions import captions
from ..training.concept_task import NewWord, concept_examples, prepare_task
from ..training.covariance import build_covariance
from ..training.loop import Progress
from ..training.perfusion import PerfusionTraining, train_perfusion
from . import paths
from .base import load_base
from .concept_examples import SHIPPED, SHIPPED_PHOTOS, concept_photos
from .concepts import DemoConcept, demo_concept_text
from .stages import Figures

CAPTIONS = 10_000
TRAINING = PerfusionTraining(steps=400, value_rate=0.1, carry=1.0)


def concepts(progress: Progress) -> Figures:
    """Teach the words that ship."""
    base, text = load_base(paths.BASE), demo_concept_text(paths.BASE)
    covariance = build_covariance(text, captions(CAPTIONS, "demo"))
    figures: Figures = {}

    def teach(name: str, concept: DemoConcept, folder: Path) -> None:
        photos = concept_photos(concept, SHIPPED_PHOTOS)
        words = [NewWord(concept.word, concept.kind)]
        contexts = [prompt.replace(concept.word, SLOT) for prompt in photos.prompts]
        task = prepare_task(base, text, covariance, words, contexts, "demo")
        prompts = [[prompt] for prompt in photos.prompts]
        examples = concept_examples(base, photos.images, words, photos.masks, prompts, flip=False)
        result = train_perfusion(
            task, examples, TRAINING, folder, lambda step, of, seen, _: progress(step, of, seen)
        )
        written = write_concept(paths.CONCEPTS / f"{name}.safetensors", result.concepts[0])
        figures[name] = {"loss": result.loss, "step": result.step, "bytes": written.size}

    for name, concept in SHIPPED.items():
        teach(name, concept, paths.BUILD / "concepts" / name)
    shutil.rmtree(paths.BUILD / "concepts")
    return figures
