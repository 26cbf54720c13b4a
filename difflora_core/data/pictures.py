"""A picture file that nobody vouches for, to pixels; or the reason why not."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from ..errors import DatasetError, shown
from ..limits import PICTURE_PIXELS

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""What Pillow may open: all of these are read by libraries, none starts another program."""
WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
LONGEST_RATIO = 8.0
"""A strip longer than so many times its width is no picture to train on."""


def open_picture(data: bytes, smallest: int = 1) -> Image.Image:
    """The picture of a file: RGB, 8 bits, turned as its EXIF data say.

    Transparent pixels are laid over white. A picture of 16 bits loses the lower 8.

    Args:
        data: the file.
        smallest: pixels that the shorter side must have.

    Raises:
        DatasetError: it cannot be used; the message is the reason alone, for lists.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notices about EXIF data and large pictures
            with Image.open(io.BytesIO(data), formats=_known()) as opened:
                _check_size(opened, smallest)
                opened.load()
                ImageOps.exif_transpose(opened, in_place=True)
                return _plain(opened)
    except DatasetError:
        raise
    except Exception as damage:  # Pillow's readers raise what their formats make them meet
        what = shown(str(damage) or type(damage).__name__, 120).split(" <_io")[0]
        raise DatasetError(f"it cannot be read as a picture: {what}") from damage


def _known() -> list[str]:
    """The formats that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(opened: Image.Image, smallest: int) -> None:
    """Refuses a picture by what its header says, before any pixel is unpacked."""
    width, height = opened.size
    if width * height > PICTURE_PIXELS:
        raise DatasetError(f"it has {width} x {height} pixels, more than {PICTURE_PIXELS}")
    if min(width, height) < smallest:
        raise DatasetError(f"it is too small: {width} x {height} pixels, {smallest} are needed")
    if max(width, height) > LONGEST_RATIO * min(width, height):
        raise DatasetError(f"it is a strip: {width} x {height} pixels")
    if opened.format != "MPO" and getattr(opened, "is_animated", False):
        raise DatasetError("it is animated, or has several pages: save one of them as a picture")


def _plain(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in WIDE:
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
            raise DatasetError("its pixels are not of 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")
