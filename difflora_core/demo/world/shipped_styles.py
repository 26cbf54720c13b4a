"""The styles that come with the demo world, and pictures to learn one from.

A style is a look that no prompt of the demo asks for: an operation on finished pictures, so that
who is on them and what they do stays what it was. These two have one hue each, which a few pictures
show; those that whole base models learn are in `art_styles`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...storage.image_files import write_image
from .art_styles import LUMA
from .identities import split_seeds
from .scenes import render_portraits

Look = Callable[[Tensor], Tensor]
"""Pictures (B, H, W, 3) in [0, 1] to the same in a style."""

PRUSSIAN, PAPER = (0.03, 0.06, 0.28), (0.66, 0.80, 0.98)
BROWN, CREAM = (0.26, 0.05, 0.17), (1.0, 0.84, 0.62)
EXAMPLE_PHOTOS = 6
FIRST_PERSON = 200
"""Of the split `example`; those before are the people of other workflows."""


def cyanotype(images: Tensor) -> Tensor:
    """A blueprint: one hue, and dark lines where tones change."""
    grey = _grey(images)
    around = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    slope = (around[:, 2:, 1:-1] - around[:, :-2, 1:-1]).abs()
    slope = slope + (around[:, 1:-1, 2:] - around[:, 1:-1, :-2]).abs()
    tones = (0.12 + 1.15 * grey).clamp(0, 1)
    return _between(tones * (1 - 1.2 * (slope - 0.1)).clamp(0.1, 1), PRUSSIAN, PAPER)


def sepia(images: Tensor) -> Tensor:
    """An old photograph: one hue from brown to cream, and more contrast."""
    return _between((0.5 + 1.35 * (_grey(images) - 0.5)).clamp(0, 1), BROWN, CREAM)


SHIPPED: dict[str, Look] = {"demo_cyanotype": cyanotype, "demo_sepia": sepia}
"""File name without suffix to the look in it."""


def style_pictures(look: Look, count: int) -> tuple[Tensor, list[str]]:
    """Pictures (count, H, W, 3) of as many people in a style, and captions that do not name it."""
    people = split_seeds("example", count, FIRST_PERSON)
    made = render_portraits(people, range(count), looks=("photo",))
    return look(made.images), made.captions


def photo_name(style: str, number: int) -> str:
    """Name of a picture in a style: difflora_demo_cyanotype_1.png."""
    return f"difflora_{style}_{number + 1}.png"


def write_style_photos(folder: Path) -> None:
    """Write some pictures of every style as files."""
    for style, look in SHIPPED.items():
        for number, picture in enumerate(style_pictures(look, EXAMPLE_PHOTOS)[0]):
            write_image(picture, folder / photo_name(style, number))


def _grey(images: Tensor) -> Tensor:
    """(B, H, W) of (B, H, W, 3)."""
    return images @ torch.tensor(LUMA)


def _between(share: Tensor, dark: Sequence[float], light: Sequence[float]) -> Tensor:
    """Colours (B, H, W, 3) from dark at 0 to light at 1."""
    first, last = torch.tensor(dark), torch.tensor(light)
    return first + share[..., None] * (last - first)
