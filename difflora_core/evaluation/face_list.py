"""The faces of pictures, numbered as the nodes count them, to choose one by eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..vision.face_choice import FaceOptions, choose_faces
from ..vision.face_encoder import DetectedFace, FaceEncoder
from ..vision.grid import LABEL_HEIGHT, LARGEST_SIDE, GridRow, draw_grid
from ..vision.preprocess import as_pictures, crop_square, resize_square, square_around

CROP = 256
_COLUMNS = 6


@dataclass(frozen=True)
class FoundFace:
    """A face: `picture`, from 1; `index` in it, from 0; and what the detector said."""

    picture: int
    index: int
    face: DetectedFace
    crop: Tensor

    @property
    def title(self) -> str:
        """Its numbers, short enough for a caption."""
        return f"photo {self.picture}, face {self.index}"

    @property
    def line(self) -> str:
        """Its numbers in words."""
        x1, y1, x2, y2 = (round(float(value)) for value in self.face.box)
        return (
            f"{self.title}: {x2 - x1} x {y2 - y1} pixels at {x1}, {y1}, score {self.face.score:.2f}"
        )


def list_faces(
    images: Tensor | Sequence[Tensor], faces: FaceEncoder, order: str, region_factor: float = 2.2
) -> list[FoundFace]:
    """Every face of pictures (N, H, W, 3), in the order that `face_index` counts them.

    Raises:
        ImageError: a picture cannot be used.
    """
    options, found = FaceOptions(order=order, every=True), []
    for number, picture in enumerate(as_pictures(images), start=1):
        for index, face in enumerate(choose_faces(faces.detect(picture), options)):
            height, width = picture.shape[:2]
            square = square_around(face.box, height, width, region_factor)
            crop = resize_square(crop_square(picture, *square), CROP)
            found.append(FoundFace(number, index, face, crop))
    return found


def face_sheet(found: Sequence[FoundFace]) -> Tensor:
    """Crops with their numbers: (H, W, 3) in [0, 1]; white where nobody was found."""
    if not found:
        return torch.ones(CROP, CROP, 3)
    rows = [found[start : start + _COLUMNS] for start in range(0, len(found), _COLUMNS)]
    side = min(CROP // 2, LARGEST_SIDE // len(rows) - 2 * LABEL_HEIGHT)
    lines = [GridRow([f.crop for f in row], "", [f.title for f in row]) for row in rows]
    return draw_grid(lines, max(side, 16))
