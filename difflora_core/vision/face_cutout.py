"""The face alone, cut out along its outline on grey: what some models are trained to look at.

Source: HyperLoRA (arXiv:2503.16944), whose identity network sees the face and nothing around it.
The outline joins points of insightface's `landmark_2d_106`: from ear to ear over the chin, and back
over the brows. Its border is soft, so that it does not look like an edge of the face.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from ..errors import EncoderError
from .face_encoder import DetectedFace, FaceEncoder

GREY = 127 / 255
OUTLINE = (
    *(1, *range(9, 17), *range(2, 9), 0),  # one ear to the chin
    *(*range(24, 17, -1), *range(32, 24, -1), 17),  # the chin to the other ear
    *(101, *range(105, 101, -1), 50, 51, 49, 48, 43),  # back over the brows
)
_MASK_SIDE, _BLUR = 512, 15  # pixels; the blur is that of a mask of this side
_MASK_REACH = 0.8  # half side of the mask's square over the larger extent of the outline


@dataclass(frozen=True)
class Square:
    """An upright square in pixels of a picture; it may reach over the border.

    Attributes:
        x, y: its centre.
        half: half its side.
    """

    x: float
    y: float
    half: float

    def corners(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom as whole pixels; at least one pixel."""
        left, top = round(self.x - self.half), round(self.y - self.half)
        right, bottom = round(self.x + self.half), round(self.y + self.half)
        return left, top, max(right, left + 1), max(bottom, top + 1)


def face_square(landmarks: Tensor) -> Square:
    """The square that shows the face: .75 of the larger extent each way, a little raised.

    Args:
        landmarks: (106, 2) x and y in pixels.
    """
    low, high = landmarks.amin(0), landmarks.amax(0)
    half = 0.75 * float((high - low).max())
    x, y = ((low + high) / 2).tolist()
    return Square(x, y - half / 8, half)


def cut_out(picture: Tensor, landmarks: Tensor) -> Tensor:
    """The face on grey, in its square; black where the picture ends.

    Args:
        picture: (H, W, 3) in [0, 1].
        landmarks: (106, 2) x and y in its pixels.

    Returns:
        (S, S', 3) in [0, 1]; the sides may differ by a pixel.
    """
    mask = _soft_mask(landmarks, *picture.shape[:2]).to(picture)[..., None]
    return cut(GREY + mask * (picture - GREY), face_square(landmarks))


def seen_closely(encoder: FaceEncoder, picture: Tensor, face: DetectedFace) -> DetectedFace:
    """The face with the embedding that it has in a square of twice its own, cut from the picture.

    The detector sees the face there at one size whatever the photo; where it finds nothing, the
    embedding of the whole photo stays.

    Args:
        encoder: found the face.
        picture: (H, W, 3) in [0, 1].
        face: of that picture, with its landmarks.

    Raises:
        EncoderError: the face has no landmarks; it says which file is missing.
    """
    square = face_square(landmarks_of(face))
    found = encoder.detect(cut(picture, replace(square, half=2 * square.half)))
    middle = 2 * square.half
    near = min(found, key=lambda other: _distance(other, middle), default=face)
    return replace(face, embedding=near.embedding)


def landmarks_of(face: DetectedFace) -> Tensor:
    """The 106 points (106, 2) of a face.

    Raises:
        EncoderError: the face analysis gave none.
    """
    if face.landmarks is None:
        raise EncoderError(
            "The face analysis gives no outline of the face (106 points): put 2d106det.onnx, which "
            "antelopev2 and buffalo_l have, into the folder of its package and load it again."
        )
    return face.landmarks


def cut(picture: Tensor, square: Square) -> Tensor:
    """What a square shows of a picture (H, W, C); black outside."""
    left, top, right, bottom = square.corners()
    height, width = picture.shape[:2]
    rows = slice(max(top, 0), max(min(bottom, height), 0))
    columns = slice(max(left, 0), max(min(right, width), 0))
    inside = picture[rows, columns]
    over = (max(-left, 0), max(-top, 0))
    out = picture.new_zeros(bottom - top, right - left, picture.shape[-1])
    out[over[1] : over[1] + len(inside), over[0] : over[0] + inside.shape[1]] = inside
    return out


def _soft_mask(landmarks: Tensor, height: int, width: int) -> Tensor:
    """(H, W) in [0, 1]: 1 on the face, 0 outside, soft at the outline."""
    outline = landmarks[list(OUTLINE)].float()
    extent = float((outline.amax(0) - outline.amin(0)).max())
    x, y = outline.mean(0).tolist()
    left, top, right, bottom = Square(x, y, _MASK_REACH * extent).corners()
    drawn = Image.new("L", (width, height), 0)
    ImageDraw.Draw(drawn).polygon([tuple(point) for point in outline.tolist()], fill=255)
    small = drawn.crop((left, top, right, bottom)).resize(
        (_MASK_SIDE, _MASK_SIDE), Image.Resampling.BICUBIC
    )
    blurred = small.filter(ImageFilter.GaussianBlur(_BLUR))
    mask = Image.new("L", (width, height), 0)
    mask.paste(blurred.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
    return torch.from_numpy(np.asarray(mask).copy()).float() / 255


def _distance(face: DetectedFace, middle: float) -> float:
    """From the middle of a face's box to the middle of a square."""
    x1, y1, x2, y2 = face.box.tolist()
    return math.hypot((x1 + x2) / 2 - middle, (y1 + y2) / 2 - middle)
