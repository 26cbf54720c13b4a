"""The concepts that come with the demo world, and pictures to teach one from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...storage.image_files import write_image
from .concepts import CONCEPTS, ConceptPictures, DemoConcept, render_concept
from .identities import split_seeds

HAT, CAT = CONCEPTS[1], CONCEPTS[4]
SHIPPED = {
    "demo_hat": replace(HAT, word="<demo-hat>"),
    "demo_cat": replace(CAT, word="<demo-cat>"),
}
"""File name without suffix to the concept in it."""
EXAMPLE = replace(CONCEPTS[0], word="<my-hat>")
EXAMPLE_PHOTOS = 3
SHIPPED_PHOTOS = 8


def concept_photos(concept: DemoConcept, count: int) -> ConceptPictures:
    """Pictures of people of the split `example` with a concept."""
    people = split_seeds("example", count, 40)
    return render_concept(concept, people, range(1, count + 1))


def example_prompts() -> Sequence[str]:
    """The prompts of the example's pictures."""
    return concept_photos(EXAMPLE, EXAMPLE_PHOTOS).prompts


def photo_name(number: int, mask: bool = False) -> str:
    """Name of a picture of the example, or of its mask."""
    return f"difflora_demo_hat_{number + 1}{'_mask' if mask else ''}.png"


def write_concept_photos(folder: Path) -> None:
    """Write the pictures of the example and their masks as files."""
    photos = concept_photos(EXAMPLE, EXAMPLE_PHOTOS)
    for number in range(EXAMPLE_PHOTOS):
        write_image(photos.images[number], folder / photo_name(number))
        mask = photos.masks[number][..., None].expand(-1, -1, 3)
        write_image(mask, folder / photo_name(number, mask=True))
