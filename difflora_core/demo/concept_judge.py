"""The judge of concepts: how much of a thing's two colours stands where such a thing stands.

It needs no network and conditions nothing. A concept is two unusual colours on a thing of known
place and size: hats stand at the top, cats at the lower left, cups and flowers at the lower right.
The colours it looks for are those that real pictures have behind the base's VAE, which cannot show
every colour on a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .concepts import DemoConcept, render_concept
from .identities import split_seeds

COLOUR_DISTANCE = 0.16
NEAR = 0.15
PICTURES = 24
THRESHOLD = 0.5
"""Likeness from which a concept can be recognised."""


@dataclass(frozen=True)
class Place:
    """Where things of a kind stand on 64 px (rows, columns), and how many pixels both colours
    have at least."""

    rows: slice
    columns: slice
    main: int
    mark: int


PLACES = {
    "hat": Place(slice(0, 26), slice(6, 58), 60, 24),
    "cup": Place(slice(34, 64), slice(36, 64), 30, 10),
    "cat": Place(slice(34, 64), slice(0, 28), 50, 12),
    "flower": Place(slice(34, 64), slice(36, 64), 10, 4),
}

Palette = tuple[Tensor, Tensor]
"""Main colour and that of the mark, (3,)."""


@dataclass(frozen=True)
class ConceptJudge:
    """Concepts by their words, with the colours that they have on pictures."""

    palettes: Mapping[str, Palette]

    def likeness(self, images: Tensor, concept: DemoConcept) -> Tensor:
        """How like a concept pictures (N, 64, 64, 3) are: (N,) in [0, 1]."""
        return presence(images, concept.kind, self.palettes[concept.word])

    def recognised(self, images: Tensor, concept: DemoConcept) -> Tensor:
        """True where pictures are more like this concept than like any other one: (N,).

        All concepts are looked for in this one's place, so that the colours alone decide.
        """
        own = self.likeness(images, concept)
        others = [
            presence(images, concept.kind, palette)
            for word, palette in self.palettes.items()
            if word != concept.word
        ]
        rival = torch.stack(others).amax(0) if others else torch.zeros_like(own)
        return (own >= THRESHOLD) & (own > rival)


def presence(images: Tensor, kind: str, palette: Palette) -> Tensor:
    """How much of two colours pictures have in the place of a kind: (N,) in [0, 1] (ours).

    Each colour counts by its nearest pixels, by exp(-(distance / COLOUR_DISTANCE)^2 / 2) in RGB;
    the geometric mean of both, so one colour alone is nothing.
    """
    place, parts = PLACES[kind], []
    region = images[:, place.rows, place.columns]
    for colour, count in zip(palette, (place.main, place.mark), strict=True):
        distance = (region - colour).norm(dim=-1).flatten(1)
        nearest = distance.topk(count, largest=False).values
        parts.append(torch.exp(-((nearest / COLOUR_DISTANCE) ** 2) / 2).mean(1))
    return (parts[0] * parts[1]).sqrt()


def concept_judge(
    concepts: Sequence[DemoConcept], through: Callable[[Tensor], Tensor] = lambda images: images
) -> ConceptJudge:
    """A judge that knows concepts from real pictures of people of the split `judge`.

    Args:
        concepts: what it tells apart.
        through: what happens to pictures, for example the base's VAE there and back.
    """
    people, palettes = split_seeds("judge", PICTURES), {}
    for concept in concepts:
        real = render_concept(concept, people, range(PICTURES)).images
        shown = through(real)
        near = [(real - torch.tensor(c)).norm(dim=-1) < NEAR for c in (concept.main, concept.mark)]
        palettes[concept.word] = (shown[near[0]].mean(0), shown[near[1]].mean(0))
    return ConceptJudge(palettes)
