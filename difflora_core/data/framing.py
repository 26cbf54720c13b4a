"""Which part of a picture is trained on, at which size, and where its face lies there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..vision.preprocess import box_mask
from ..vision.training_pictures import (
    FACE,
    WHOLE,
    TrainingPicture,
    bucket_size,
    bucket_step,
    face_square,
    fitted,
)

SPARE = 2
"""Pillow first brings a picture to so many times its size: large photos cost less."""


@dataclass(frozen=True, eq=False)
class Framed:
    """A picture cut to its bucket.

    Attributes:
        pixels: (H, W, 3) uint8.
        picture: how it was cut; its image is that of `pixels`.
        points: (P, 2) float32, the points asked for in pixels of it.
    """

    pixels: np.ndarray[Any, Any]
    picture: TrainingPicture
    points: Tensor


def frame(
    picture: Image.Image,
    resolution: int,
    box: Tensor | None = None,
    points: Tensor | None = None,
    close: float = 0.0,
) -> Framed:
    """Cuts a picture to its bucket, so that as much of the face stays as can.

    Args:
        picture: RGB, of any size.
        resolution: side in pixels of the square that the base was made for.
        box: (4,) the face x1, y1, x2, y2 in pixels of the picture; None keeps the middle.
        points: (P, 2) that are wanted in pixels of the result.
        close: cuts to the square around the face first, so many times its box; 0 does not. A face
            that fills the picture is not cut out of it.
    """
    points = torch.zeros(0, 2) if points is None else points.float()
    box = None if box is None else box.float()
    framing = WHOLE
    square = None
    if close and box is not None:
        square = face_square(box, picture.height, picture.width, close)
    if square is not None and box is not None:
        left, top, side = square
        picture = picture.crop((left, top, left + side, top + side))
        points = points - torch.tensor([left, top])
        box = box - torch.tensor([left, top, left, top])
        framing = FACE
    original = (picture.height, picture.width)
    height, width = bucket_size(*original, resolution, bucket_step(resolution))
    cover = max(height / original[0], width / original[1])
    near = min(1.0, cover * SPARE)
    if near < 1:
        size = (max(1, round(original[1] * near)), max(1, round(original[0] * near)))
        picture = picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    image = torch.from_numpy(np.asarray(picture).copy()).float() / 255
    mask = None if box is None else box_mask(box * near, *image.shape[:2])
    if mask is not None and not bool(mask.any()):
        mask = None
    cut = fitted(TrainingPicture(image, 0, framing, mask), height, width)
    pixels = (cut.image * 255).round().to(torch.uint8)
    if cut.cut is not None:  # `fitted` always says how it cut
        own = replace(cut.cut, original=original)
        cut = replace(cut, image=pixels.float() / 255, mask=None, cut=own)
        points = points * cover - torch.tensor([own.left, own.top])
    return Framed(pixels.numpy(), cut, points)
