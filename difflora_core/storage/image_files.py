"""Picture files to reference tensors, and tensors to picture files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ImageError
from ..vision.preprocess import as_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def read_image(file: str | Path) -> Tensor:
    """Read a picture file upright, as its author sees it.

    Grey, palette, CMYK, 16-bit and transparent files all work; transparency is laid over white,
    the camera's rotation mark is applied, the first frame of an animation is taken.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        ImageError: No such file, not a picture, cut short, or absurdly large.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise ImageError(f"The picture {path} does not exist.")
    try:
        with Image.open(path) as opened:
            pixels = _pixels(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise ImageError(f"The picture {path} is too large to be opened: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's readers raise
        raise ImageError(
            f"The picture {path} cannot be read ({error}). Save it again as PNG or JPEG."
        ) from error
    return as_picture(torch.from_numpy(pixels), f"The picture {path.name}")


def write_image(image: Tensor, file: str | Path) -> None:
    """Write a picture (H, W, 3) in [0, 1] as 8 bits per channel; the suffix chooses the format.

    Raises:
        ImageError: The tensor is not a picture, or the suffix is unknown.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"Cannot write {path.name}: use one of {', '.join(SUFFIXES)}.")
    pixels = (as_picture(image) * 255).round().to(torch.uint8).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _pixels(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """8-bit or float pixels (H, W) or (H, W, C) of any Pillow mode."""
    if image.mode.startswith("I"):  # 16-bit grey
        return np.asarray(image, dtype=np.float32) / 65535
    if image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info:
        return np.array(image)
    transparent = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
    return np.array(image.convert("RGBA" if transparent else "RGB"))
