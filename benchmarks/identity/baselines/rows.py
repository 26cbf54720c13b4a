"""Rows of the baselines: trained once, and trained for each person."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from torch import Tensor

from difflora_core.demo import paths
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.storage.checkpoint import load_model
from difflora_core.text.clip_pair import ClipPairText
from difflora_core.vision.features import ImageFeatures

from ..artefacts import Artefacts
from ..drawing import groups, select
from ..dreambooth import GROUP, concatenate
from ..people import PHOTOS, People, RealPictures
from ..rows import (
    ALL,
    HEADLINE,
    ONE,
    TIMED_PEOPLE,
    Row,
    first_photos,
    predict,
    seconds_to_lora,
    wanted_row,
)
from .base import Baseline, ConditionedPeople, photos_of
from .hyperdreambooth import STEPS, relaxed, relaxed_config
from .registry import BASELINES
from .textual_inversion import InversionConfig, learn_people
from .training import OURS, Budget, file_of, load_baseline

RELAXED = f"{HEADLINE}, HyperDreamBooth's refinement, {STEPS} steps"
COUNTS = {ONE: 1, "4 photos": 4}


def baseline_rows(
    artefacts: Artefacts, people: People, budget: Budget, wanted: Sequence[str] | None
) -> list[Row]:
    """Rows of every method whose file of this budget is there, and of those without a file.

    Args:
        artefacts: base and encoders.
        people: whose photos.
        budget: by which the files were trained; its steps are also those of Textual Inversion.
        wanted: as in `rows.wanted_row`.
    """
    names = [
        name for name in (*OURS, *BASELINES) if any(wanted_row(n, wanted) for n in _names(name))
    ]
    rows = []
    for name in names:
        path = file_of(name, budget, artefacts.cache / "baselines", artefacts.base_hash)
        if path.exists():
            rows += list(_trained_once(artefacts, people, name, path))
        else:
            artefacts.log(f"left out: {name}, run make bench name=train_baselines")
    for count, photos in ((1, ONE), (PHOTOS, ALL)):
        config = InversionConfig(steps=budget.steps)
        name = f"Textual Inversion, {photos}, {config.steps} steps"
        if wanted_row(name, wanted):
            rows.append(_inversion(artefacts, people, count, name, config))
    if wanted_row(RELAXED, wanted) and "functional" in artefacts.models:
        rows.append(_relaxed(artefacts, people))
    return [row for row in rows if wanted_row(row.name, wanted)]


def _names(name: str) -> list[str]:
    return [f"{name}, {photos}" for photos in COUNTS]


def _trained_once(artefacts: Artefacts, people: People, name: str, path: Path) -> Iterator[Row]:
    """The rows of a method with a file: from one photo, and from four."""
    size = path.stat().st_size / 1e6
    images = {photos: people.photos.images[:, :count] for photos, count in COUNTS.items()}
    features = {photos: artefacts.features(shown) for photos, shown in images.items()}
    if name in OURS:
        model: DiffLoRAModel = load_model(path).eval().requires_grad_(False)
        for photos, seen in features.items():
            seconds = seconds_to_lora(artefacts, model, images[photos])
            yield Row(f"{name}, {photos}", predict(model, seen), seconds, megabytes=size)
        return
    method = load_baseline(name, path, artefacts.base, features[ONE][0].sizes)
    for photos, shown in images.items():
        made = conditioned(artefacts, method, features[photos], shown)
        seconds = median(
            _seconds(artefacts, method, person[None]) for person in shown[:TIMED_PEOPLE]
        )
        yield Row(f"{name}, {photos}", made, seconds, megabytes=size)


def conditioned(
    artefacts: Artefacts, method: Baseline, features: Sequence[ImageFeatures], images: Tensor
) -> ConditionedPeople:
    """A method on photos (I, N, H, W, 3) of I people, with the points of each first one."""
    return ConditionedPeople(method, photos_of(features, images, artefacts.encoders[0]))


def _seconds(artefacts: Artefacts, method: Baseline, images: Tensor) -> float:
    """From the photos (1, N, H, W, 3) of one person to what is drawn with."""
    started = time.perf_counter()
    conditioned(artefacts, method, artefacts.features(images), images)
    return time.perf_counter() - started


def _inversion(
    artefacts: Artefacts, people: People, count: int, name: str, config: InversionConfig
) -> Row:
    """A word for everybody from the first photos; seconds are of one person in the group."""
    pictures = first_photos(people, count)
    folder = artefacts.cache / "inversion"
    text = text_encoders()
    made = learn_people(artefacts.base, text, pictures, config, folder)
    return Row(name, made, made.seconds)


def text_encoders() -> ClipPairText:
    """The text encoders of the demo base, which can learn words."""
    return demo_concept_text(paths.BASE)


def _relaxed(artefacts: Artefacts, people: People) -> Row:
    """The shipped model's prediction, tuned on its photo at twice the rank."""
    pictures, parts = first_photos(people, 1), []
    guess = predict(artefacts.models["functional"], artefacts.features(pictures.images))
    config = relaxed_config(artefacts.layout.rank)
    for group in groups(len(people), GROUP):
        chosen = RealPictures(pictures.images[group], [pictures.captions[k] for k in group])
        examples = artefacts.trainer.examples(chosen, [people.seeds[k] for k in group])
        parts.append(relaxed(artefacts.base, select(guess, group), examples, config))
    per_step = artefacts.trainer.seconds_alone(pictures, config)
    return Row(RELAXED, concatenate(parts), per_step * config.steps)
