"""Picture tensors to picture files, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..errors import ImageError, shown
from ..vision.preprocess import as_picture
from .atomic import replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def write_image(image: Tensor, file: str | Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a picture (H, W, 3) in [0, 1] as 8 bits per channel; the suffix chooses the format.

    Args:
        image: the picture.
        file: its path.
        texts: kept in the file, if it is a PNG.

    Raises:
        ImageError: The tensor is not a picture, the suffix is unknown, or it cannot be written.
    """
    path = Path(file).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(f"Cannot write {path.name}: use one of {', '.join(SUFFIXES)}.")
    pixels = (as_picture(image) * 255).round().to(torch.uint8).cpu().numpy()
    kind = Image.registered_extensions()[suffix]
    options = {} if not texts else {"pnginfo": _png_info(texts)}
    with replacing(path, ImageError) as temporary:
        Image.fromarray(pixels).save(temporary, format=kind, **options)


def read_image(file: str | Path) -> tuple[Tensor, dict[str, str]]:
    """A picture (H, W, 3) in [0, 1], turned as its EXIF data say, and the texts of a PNG.

    Raises:
        ImageError: it cannot be read.
    """
    with _opened(Path(file)) as picture:
        turned = ImageOps.exif_transpose(picture).convert("RGB")
        return torch.from_numpy(np.array(turned)).float() / 255, _texts(picture)


def read_texts(file: str | Path) -> dict[str, str]:
    """The texts of a PNG as `write_image` keeps them, before the pixels, which are not decoded.

    Raises:
        ImageError: it cannot be read.
    """
    with _opened(Path(file)) as picture:
        return _texts(picture)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An open picture; what fails while it is read is told with its path."""
    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise ImageError(
            f"{shown(str(path), 300)} cannot be read as a picture: {error}."
        ) from error


def _texts(picture: Image.Image) -> dict[str, str]:
    """The texts that were read so far."""
    return {str(k): v for k, v in picture.info.items() if isinstance(v, str)}


def _png_info(texts: Mapping[str, str]) -> PngInfo:
    """Texts as a PNG holds them."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info
