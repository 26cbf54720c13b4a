"""Picture tensors to picture files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError
from ..vision.preprocess import as_picture
from .atomic import replacing

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def write_image(image: Tensor, file: str | Path) -> None:
    """Write a picture (H, W, 3) in [0, 1] as 8 bits per channel; the suffix chooses the format.

    Raises:
        ImageError: The tensor is not a picture, the suffix is unknown, or it cannot be written.
    """
    path = Path(file).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(f"Cannot write {path.name}: use one of {', '.join(SUFFIXES)}.")
    pixels = (as_picture(image) * 255).round().to(torch.uint8).cpu().numpy()
    kind = Image.registered_extensions()[suffix]
    with replacing(path, ImageError) as temporary:
        Image.fromarray(pixels).save(temporary, format=kind)
