"""Pictures of a folder as training pictures: one at a time, so that thousands fit into memory.

What is kept of a picture is its latent. A text file of its name beside it says what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..base_model.protocol import BaseModel
from ..errors import ConfigError
from ..storage.image_files import SUFFIXES, read_image
from ..storage.prompt_file import read_prompt_file
from ..vision.training_pictures import WHOLE, TrainingPicture, fitted
from .picture_examples import PictureExamples, picture_examples

Read = Callable[[int, int], None]
"""Called after every picture as (read, count); it may raise InterruptedTraining."""


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, not of those in it, by name.

    Raises:
        ConfigError: there are none, or it cannot be listed.
    """
    try:
        found = sorted(
            path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()
        )
    except OSError as error:
        raise ConfigError(f"The folder {folder.name} cannot be read: {error}.") from error
    if not found:
        raise ConfigError(
            f"There are no pictures in the folder {folder.name}: put some into it, as "
            f"{', '.join(SUFFIXES)}."
        )
    return found


def folder_examples(
    base: BaseModel,
    paths: Sequence[Path],
    size: tuple[int, int],
    prompts: Sequence[str],
    flip: bool = True,
    read: Read | None = None,
) -> PictureExamples:
    """Training pictures from files, each scaled until it covers a size, and cut evenly.

    Args:
        base: encodes the pictures, one by one.
        paths: of the pictures; lines of a .txt file of the same name are the prompts of one.
        size: height and width in pixels.
        prompts: of pictures without such a file.
        flip: also train on mirrored pictures, which come after all others.
        read: see `Read`.

    Raises:
        ImageError: a picture cannot be read.
        ConfigError: a text file cannot be read, or a picture has no prompt.
    """
    latents: list[Tensor] = []
    mirrored: list[Tensor] = []
    lists: list[list[str]] = []
    for number, path in enumerate(paths):
        image = fitted(TrainingPicture(read_image(path)[0], number, WHOLE), *size).image[None]
        own = _caption(path) or list(prompts)
        made = picture_examples(base, image, prompts=[own], flip=flip)
        latents.append(made.latents[:1])
        mirrored.append(made.latents[1:])
        lists.append(own)
        if read is not None:
            read(number + 1, len(paths))
    return PictureExamples(torch.cat([*latents, *mirrored]), lists * (1 + flip))


def joined(parts: Sequence[PictureExamples]) -> PictureExamples:
    """Pictures of one size, one after another; where some have masks, others count wholly."""
    lists = [prompts for part in parts for prompts in part.prompts]
    latents = torch.cat([part.latents for part in parts])
    if all(part.masks is None for part in parts):
        return PictureExamples(latents, lists)
    whole = [torch.ones_like(part.latents[:, 0], dtype=torch.float32) for part in parts]
    own = [w if p.masks is None else p.masks.to(w) for p, w in zip(parts, whole, strict=True)]
    return PictureExamples(latents, lists, torch.cat(own))


def _caption(path: Path) -> list[str]:
    """The lines of the text file beside a picture; none where there is no file."""
    file = path.with_suffix(".txt")
    if not file.exists():
        return []
    return [line.strip() for line in read_prompt_file(file).splitlines() if line.strip()]
