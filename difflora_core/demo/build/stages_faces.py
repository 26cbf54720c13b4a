"""The stages that train the encoders and judges, from the picture pools; see stages.py."""

from __future__ import annotations

from ...training.loop import Progress
from ...vision.face_encoder import InsightFaceEncoder
from .. import paths
from ..networks.clip_vision import ClipVisionRecipe, train_clip_vision
from ..networks.detector import DetectorRecipe, detection_figures, train_detector
from ..networks.judges import RECIPES, judge_figures, load_judges, train_judge
from ..networks.recogniser import RecogniserRecipe, train_recogniser
from ..world.identities import PARAMETERS
from ..world.pool import PicturePool, cached_pool, portrait_pool
from .stages import Figures, pairs_pool, train_pool, validation_pool


def judge_pool() -> PicturePool:
    """48,000 portraits of 8,000 identities of the split `judge`."""
    return cached_pool(paths.POOLS / "judge.safetensors", lambda: portrait_pool("judge", 8000, 6))


def clip_vision(progress: Progress) -> Figures:
    """Train CLIP vision; the figures are R squared of each parameter in the pooled embedding."""
    measured = train_clip_vision(
        train_pool(),
        ClipVisionRecipe(),
        paths.ARTEFACTS,
        paths.BUILD / "clip_vision",
        validation_pool(),
        progress,
    )
    read = measured["pooled"]
    each = {name: round(value, 3) for name, value in zip(PARAMETERS, read, strict=True)}
    return {"mean_r2": sum(read) / len(read), "r2": each}


def recogniser(progress: Progress) -> Figures:
    """Train the face recogniser."""
    figures = train_recogniser(
        train_pool(),
        RecogniserRecipe(),
        paths.FACES,
        paths.BUILD / "recogniser",
        validation_pool(),
        progress,
    )
    return dict(figures)


def detector(progress: Progress) -> Figures:
    """Train the face detector and measure it inside insightface."""
    run = paths.BUILD / "detector"
    train_detector(train_pool(), pairs_pool(), DetectorRecipe(), paths.FACES, run, progress)
    return dict(detection_figures(InsightFaceEncoder(paths.FACES), validation_pool()))


def judges(progress: Progress) -> Figures:
    """Train the three judges."""
    for name, recipe in RECIPES.items():
        run = paths.BUILD / "judges" / name
        train_judge(name, judge_pool(), recipe, paths.JUDGES, run, progress)
    return dict(judge_figures(load_judges(paths.JUDGES), validation_pool()))
