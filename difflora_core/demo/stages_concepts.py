"""The stages of taught words: their judge, and those that ship; see stages.py."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from ..storage.perfusion_file import write_concept
from ..training.captions import captions
from ..training.covariance import build_covariance
from ..training.loop import Progress
from ..training.perfusion import train_perfusion
from . import paths
from .base import load_base
from .concept_examples import SHIPPED, SHIPPED_PHOTOS, concept_photos
from .concept_judge import judge_pictures, train_concept_judge
from .concept_lesson import TRAINING, concept_lesson
from .concepts import CONCEPTS, DemoConcept, demo_concept_text, render_concept
from .identities import split_seeds
from .stages import Figures
from .views import Report

CAPTIONS = 10_000
JUDGED = 40


def judge(progress: Report) -> Figures:
    """Train the judge of concepts; the figures are shares of real pictures that it recognises."""
    base = load_base(paths.BASE)

    def through(images: Tensor) -> Tensor:
        return base.decode_latents(base.encode_images(images))

    pictures = judge_pictures(through, paths.POOLS / "judge_things.safetensors", progress)
    trained = train_concept_judge(pictures, paths.CONCEPT_JUDGE, progress=progress)
    people = split_seeds("validation", JUDGED, 3000)
    shares: dict[str, list[float]] = {"real": [], "through_vae": []}
    for concept in CONCEPTS:
        real = render_concept(concept, people, range(JUDGED)).images
        for name, shown in (("real", real), ("through_vae", through(real))):
            shares[name].append(float(trained.recognised(shown, concept).float().mean()))
    return {name: sum(each) / len(each) for name, each in shares.items()}


def concepts(progress: Progress) -> Figures:
    """Teach the words that ship."""
    base, text = load_base(paths.BASE, paths.WORDS), demo_concept_text(paths.BASE, paths.WORDS)
    covariance = build_covariance(text, captions(CAPTIONS, "demo"))
    figures: Figures = {}

    def teach(name: str, concept: DemoConcept, folder: Path) -> None:
        photos = concept_photos(concept, SHIPPED_PHOTOS)
        task, examples = concept_lesson(base, text, covariance, concept, photos)
        result = train_perfusion(
            task, examples, TRAINING, folder, lambda step, of, seen, _: progress(step, of, seen)
        )
        written = write_concept(paths.CONCEPTS / f"{name}.safetensors", result.concepts[0])
        figures[name] = {"loss": result.loss, "step": result.step, "bytes": written.size}

    for name, concept in SHIPPED.items():
        teach(name, concept, paths.BUILD / "concepts" / name)
    shutil.rmtree(paths.BUILD / "concepts")
    return figures
