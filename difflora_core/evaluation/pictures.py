"""Pictures of an evaluation on disk: `PERSON/01-1.png` is prompt 1, seed 1, of a row's folder.

A picture holds what it was drawn with, as a digest, and a digest of its own pixels: what is there
is not drawn again, and what was changed since is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ImageError, shown
from ..storage.image_files import SUFFIXES, read_image, write_image

KEY, PIXELS, SECONDS, LORA_SECONDS, PROMPT = (
    *("difflora.key", "difflora.pixels", "difflora.seconds", "difflora.lora_seconds"),
    "prompt",
)
"""Texts of a picture's file."""
NAMING = "PERSON/PROMPT-SEED.png, both numbers from 1: anna/03-1.png; anything may follow the seed"
"""How pictures of other programs are named."""
_NUMBERS = re.compile(r"0*(\d{1,6})-0*(\d{1,6})(?!\d)")


@dataclass(frozen=True, order=True)
class Cell:
    """A picture's place: `person` by name, `prompt` and `seed` by number from 0."""

    person: str
    prompt: int
    seed: int

    def path(self, folder: Path) -> Path:
        """Its file in the folder of a row."""
        return folder / self.person / f"{self.prompt + 1:02d}-{self.seed + 1}.png"


def is_drawn(path: Path, key: str) -> bool:
    """Whether a picture is there as it was drawn, with what the key stands for."""
    try:
        image, texts = read_image(path)
    except ImageError:
        return False
    return texts.get(KEY) == key and texts.get(PIXELS) == _pixel_digest(image)


def keep(image: Tensor, path: Path, key: str, facts: Mapping[str, str]) -> None:
    """Writes a picture (H, W, 3) in [0, 1] with its key and facts.

    Raises:
        ImageError: it cannot be written.
    """
    write_image(image, path, {KEY: key, PIXELS: _pixel_digest(image), **facts})


def foreign_pictures(
    folder: Path, people: Sequence[str], prompts: int, seeds: int
) -> dict[Cell, Path]:
    """Pictures that another program drew, named as NAMING says.

    Args:
        folder: with one folder a person.
        people: names of those who count.
        prompts: of the protocol; pictures of others are left out.
        seeds: of each prompt.

    Raises:
        ImageError: none is there, or one place has two.
    """
    found: dict[Cell, Path] = {}
    for person in people:
        files = sorted((folder / person).glob("*")) if (folder / person).is_dir() else []
        for path in files:
            numbers = _NUMBERS.match(path.stem)
            if numbers is None or path.suffix.lower() not in SUFFIXES:
                continue
            cell = Cell(person, int(numbers[1]) - 1, int(numbers[2]) - 1)
            if not (0 <= cell.prompt < prompts and 0 <= cell.seed < seeds):
                continue
            if cell in found:
                raise ImageError(
                    f"{shown(found[cell].name)} and {shown(path.name)} of {shown(person)} are both "
                    f"prompt {cell.prompt + 1}, seed {cell.seed + 1}: leave one."
                )
            found[cell] = path
    if not found:
        raise ImageError(
            f"{shown(str(folder), 300)} holds no picture of these people. Pictures are named "
            f"{NAMING}."
        )
    return found


def seconds_of(texts: Mapping[str, str], name: str) -> float:
    """A time from a picture's texts; NaN where it has none."""
    try:
        return float(texts.get(name, "nan"))
    except ValueError:
        return float("nan")


def _pixel_digest(image: Tensor) -> str:
    """SHA-256 of the 8-bit values."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
    return hashlib.sha256(pixels.numpy().data).hexdigest()
