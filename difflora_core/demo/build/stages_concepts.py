"""The stages of taught words: their judge, and those that ship; see stages.py."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...base_model.diffusers_base import DiffusersBase
from ...storage.adapter_file import write_adaptation
from ...text.captions import captions
from ...text.covariance import build_covariance
from ...training.adaptation_run import run_adaptation
from ...training.loop import Progress
from .. import paths
from ..networks.base import load_base
from ..networks.concept_judge import judge_pictures, train_concept_judge
from ..networks.concept_text import demo_concept_text
from ..networks.judges import (
    PROMPTS,
    Judges,
    JudgeTraining,
    attribute_accuracy,
    load_judge,
    save_judge,
)
from ..networks.views import attribute_labels
from ..world.concept_examples import SHIPPED, SHIPPED_PHOTOS, concept_photos
from ..world.concepts import CONCEPTS, DemoConcept, render_concept
from ..world.identities import split_seeds
from .concept_training import concept_objective, concept_training_set
from .stages import Figures, validation_pool
from .stages_faces import judge_pool

CAPTIONS = 10_000
JUDGED = 40
PROMPT_PICTURES, CHUNK = 24_000, 200


def judge(progress: Progress) -> Figures:
    """Train the judge of concepts; the figures are shares of real pictures that it recognises."""
    through = partial(_through_vae, load_base(paths.BASE))
    pictures = judge_pictures(through, paths.POOLS / "judge_things.safetensors", progress)
    trained = train_concept_judge(
        pictures, paths.CONCEPT_JUDGE, paths.BUILD / "concept_judge", progress=progress
    )
    people = split_seeds("validation", JUDGED, 3000)
    shares: dict[str, list[float]] = {"real": [], "through_vae": []}
    for concept in CONCEPTS:
        real = render_concept(concept, people, range(JUDGED)).images
        for name, shown in (("real", real), ("through_vae", through(real))):
            shares[name].append(float(trained.recognised(shown, concept).float().mean()))
    return {name: sum(each) / len(each) for name, each in shares.items()}


def prompt_judge(progress: Progress) -> Figures:
    """Train the classifier that says whether pictures of taught words show the rest of the prompt.

    Half of its pictures went through the VAE, which makes a sad face more like a neutral one.
    The figures are its shares of right answers on pictures of other people.
    """
    base, pool = load_base(paths.BASE), judge_pool().head(PROMPT_PICTURES)
    for start in range(0, len(pool), CHUNK):
        blurred = pool.images[start : start + CHUNK : 2]
        blurred.copy_((_through_vae(base, blurred / 255) * 255).round())
    training = JudgeTraining("attributes", pool, PROMPTS)
    training.run(paths.BUILD / "prompt_judge", progress)
    save_judge(training.model, PROMPTS, paths.PROMPT_JUDGE)
    judges, unseen = Judges({"attributes": load_judge(paths.PROMPT_JUDGE)}), validation_pool()
    labels, real = attribute_labels(unseen.scenes), unseen.images / 255
    blurred = torch.cat([_through_vae(base, part) for part in real.split(CHUNK)])
    shown = {"real": real, "through_vae": blurred}
    return {name: attribute_accuracy(judges, p, labels) for name, p in shown.items()}


def _through_vae(base: DiffusersBase, images: Tensor) -> Tensor:
    """Pictures (N, H, W, 3) in [0, 1] as the base's VAE gives them back."""
    return base.decode_latents(base.encode_images(images))


def concepts(progress: Progress) -> Figures:
    """Teach the words that ship."""
    base, text = load_base(paths.BASE), demo_concept_text(paths.BASE)
    covariance = build_covariance(text, captions(CAPTIONS, "demo"))
    figures: Figures = {}

    def teach(name: str, concept: DemoConcept, folder: Path) -> None:
        photos = concept_photos(concept, SHIPPED_PHOTOS)
        task, examples = concept_training_set(base, text, covariance, concept, photos)
        result = run_adaptation(
            concept_objective(task),
            examples,
            folder,
            lambda step, of, seen, _: progress(step, of, seen),
        )
        written = write_adaptation(paths.CONCEPTS / f"{name}.safetensors", result.adaptations[0])
        figures[name] = {"loss": result.loss, "step": result.step, "bytes": written.size}

    for name, concept in SHIPPED.items():
        teach(name, concept, paths.BUILD / "concepts" / name)
    shutil.rmtree(paths.BUILD / "concepts")
    return figures
