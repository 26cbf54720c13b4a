"""The table as pictures: the same prompts and noise in every line, one line a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from difflora_core.vision.grid import GridRow, draw_grid

from .drawing import PictureSampler
from .experiment import Experiment
from .rows import BASE, REAL, Row

PEOPLE, PROMPTS = 4, 2
"""Of a grid's columns: so many people with so many of the plan's prompts each."""
SIDE = 128


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
    sampler = PictureSampler(artefacts.base, artefacts.layout, plan, seeds)

    def lines() -> Iterator[tuple[str, Tensor]]:
        photos = experiment.people.photos.images[: len(seeds), :1]
        yield "the photo", photos.expand(-1, len(plan.scenes), -1, -1, -1)
        yield REAL, experiment.people.prompted.images[: len(seeds), : len(plan.scenes)]
        yield BASE, sampler.pictures()
        for row in rows:
            strength = strengths.get(row.strength_of, 1.0)
            name = row.name if strength == 1.0 else f"{row.name} x {strength:g}"
            yield name, sampler.pictures(row.weights, strength)

    return draw_grid([GridRow(list(made.flatten(0, 1)), name) for name, made in lines()], SIDE)
