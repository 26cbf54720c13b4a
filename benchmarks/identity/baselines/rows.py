"""Rows of the baselines: trained once, and trained for each person."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from torch import Tensor

from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.storage.checkpoint import load_model
from difflora_core.vision.features import ImageFeatures

from ..artefacts import Artefacts
from ..people import People
from ..rows import ONE, SEEN, TIMED_PEOPLE, Row, predict, seconds_to_lora, wanted_row
from .base import Baseline, ConditionedPeople, photos_of
from .registry import BASELINES, PERSONAL
from .training import OURS, Budget, file_of, load_baseline


def baseline_rows(
    artefacts: Artefacts, people: People, budget: Budget, wanted: Sequence[str] | None
) -> list[Row]:
    """Rows of every method whose file of this budget is there, and of those without a file.

    Args:
        artefacts: base and encoders.
        people: whose photos.
        budget: by which the files were trained; its steps are also for what learns each person.
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
    for own_rows in PERSONAL:
        rows += own_rows(artefacts, people, budget.steps, wanted)
    return [row for row in rows if wanted_row(row.name, wanted)]


def _names(name: str) -> list[str]:
    return [f"{name}, {photos}" for photos in SEEN]


def _trained_once(artefacts: Artefacts, people: People, name: str, path: Path) -> Iterator[Row]:
    """The rows of a method with a file: from one photo, and from four."""
    size = path.stat().st_size / 1e6
    images = {photos: people.photos.images[:, :count] for photos, count in SEEN.items()}
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
