"""The table as pictures: the same prompts and noise in every line, one line a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from difflora_core.vision.grid import LABEL_HEIGHT, LARGEST_SIDE, GridRow, draw_grid

from .drawing import PictureSampler
from .experiment import Experiment
from .rows import BASE, REAL, Row, labelled

PEOPLE, PROMPTS = 4, 2
"""Of a grid's columns: so many people with so many of the plan's prompts each."""
SIDE = 128
"""Of a picture in pixels; less where a grid of many rows would be too high."""


def picture_grid(
    experiment: Experiment, rows: Sequence[Row], strengths: Mapping[str, float]
) -> Tensor:
    """Photo, real pictures of the prompts, base, and every row at its chosen strength.

    Args:
        experiment: whose first people and prompts are shown.
        rows: of the table.
        strengths: by row; 1 where none is chosen.

    Returns:
        (H, W, 3) in [0, 1].
    """
    artefacts, seeds = experiment.artefacts, experiment.people.seeds[:PEOPLE]
    plan = replace(experiment.plan, scenes=experiment.plan.scenes[:PROMPTS], repeats=0)
    sampler = PictureSampler(artefacts.base, plan, seeds)

    def lines() -> Iterator[tuple[str, Tensor]]:
        photos = experiment.people.photos.images[: len(seeds), :1]
        yield "the photo", photos.expand(-1, len(plan.scenes), -1, -1, -1)
        yield REAL, experiment.people.prompted.images[: len(seeds), : len(plan.scenes)]
        yield BASE, sampler.pictures()
        for row in rows:
            strength = row.chosen(strengths)
            yield labelled(row.name, strength), sampler.pictures(row.weights, strength)

    shown = [GridRow(list(made.flatten(0, 1)), name) for name, made in lines()]
    return draw_grid(shown, min(SIDE, LARGEST_SIDE // len(shown) - LABEL_HEIGHT))
