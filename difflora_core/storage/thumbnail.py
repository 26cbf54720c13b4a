"""Thumbnails: small JPEG pictures inside an identity library, which are not trusted when read."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError, LibraryError, counted
from ..vision.preprocess import as_picture, as_pictures

SIDE = 96
QUALITY = 80
MAX_PICTURE_BYTES = 16 * 1024  # even pure noise needs less


def make_thumbnail(image: Tensor) -> bytes:
    """JPEG of the middle square of a picture, SIDE pixels wide, without any metadata.

    Args:
        image: (H, W, 3) in [0, 1].

    Raises:
        ImageError: it is no picture.
    """
    pixels = as_picture(image, "The thumbnail").clamp(0, 1).mul(255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    middle = picture.crop((left, top, left + side, top + side))
    small = middle.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_thumbnails(images: Tensor | None, count: int) -> list[bytes | None]:
    """Thumbnails of `count` people: a picture for each, one picture for all, or none.

    Args:
        images: (count, H, W, 3) or (1, H, W, 3) in [0, 1], or None.
        count: number of people.

    Raises:
        ImageError: another number of pictures, or one that cannot be used.
    """
    if images is None:
        return [None] * count
    pictures = as_pictures(images)
    if len(pictures) not in (1, count):
        raise ImageError(
            f"There are {counted(len(pictures), 'thumbnail')} for {counted(count, 'identity')}: "
            "give one for each, or one for all."
        )
    made: list[bytes | None] = [make_thumbnail(picture) for picture in pictures]
    return made if len(made) == count else made * count


def read_thumbnail(data: bytes | None) -> Tensor:
    """Pixels (SIDE, SIDE, 3) float32 in [0, 1]; grey when there is no picture.

    Raises:
        LibraryError: not a JPEG of that size, or damaged.
    """
    if data is None:
        return torch.full((SIDE, SIDE, 3), 0.5)
    if len(data) > MAX_PICTURE_BYTES:
        raise LibraryError(f"A thumbnail has at most {MAX_PICTURE_BYTES} bytes; got {len(data)}.")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            if opened.size != (SIDE, SIDE):  # before any pixel is unpacked
                raise LibraryError(f"A thumbnail is {SIDE} pixels wide; this is {opened.size}.")
            pixels = np.array(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise LibraryError(f"A thumbnail of this library is damaged: {error}.") from error
    return torch.from_numpy(pixels).float() / 255
