"""Five face points as a picture: the form that face ControlNets are conditioned on.

Red and green eyes, a blue nose, yellow and magenta mouth corners on black, each point joined to
the nose by a darker stroke of its colour, as the InstantID ControlNet expects (arXiv:2401.07519).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ImageError

POINT_COLOURS = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (1.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
)
"""Left eye, right eye, nose, left and right mouth corner, as seen in the picture."""

NOSE = 2
STROKE_BRIGHTNESS = 0.6
# Ten and four pixels on a picture of 1024, as those ControlNets were trained; small pictures get
# marks that still cover whole pixels.
_POINT_RADIUS, _SMALLEST_POINT = 10 / 1024, 1.7
_STROKE_RADIUS, _SMALLEST_STROKE = 4 / 1024, 0.8


def keypoint_picture(faces: Tensor, height: int, width: int) -> Tensor:
    """Draw the five points of any number of faces.

    Args:
        faces: (F, 5, 2) left eye, right eye, nose tip, left and right mouth corner, x and y in
            pixels of the picture. Faces with a NaN (none was found) are left out, and so is what
            lies outside; F may be 0.
        height: of the picture, at least 1.
        width: of the picture, at least 1.

    Returns:
        (height, width, 3) float32 in [0, 1], black where nothing is; edges are soft by one pixel.

    Raises:
        ImageError: The shape is no set of five points, or the picture has no pixels.
    """
    if faces.ndim != 3 or faces.shape[1:] != (5, 2):
        raise ImageError(f"Expected five points (x, y) per face, got {tuple(faces.shape)}.")
    if height < 1 or width < 1:
        raise ImageError(f"A picture of {width} x {height} pixels cannot hold face points.")
    side = min(height, width)
    stroke = max(side * _STROKE_RADIUS, _SMALLEST_STROKE)
    disc = max(side * _POINT_RADIUS, _SMALLEST_POINT)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([x, y], -1)  # H W 2
    colours = torch.tensor(POINT_COLOURS, dtype=torch.float32)
    picture = torch.zeros(height, width, 3)
    shown = faces[faces.isfinite().flatten(1).all(1)].cpu().float()
    for face in shown:
        for point in (0, 1, 3, 4):
            colour = colours[point] * STROKE_BRIGHTNESS
            picture = _paint(picture, _distance(pixels, face[NOSE], face[point]) - stroke, colour)
        for point in range(5):
            distance = (pixels - face[point]).norm(dim=-1) - disc
            picture = _paint(picture, distance, colours[point])
    return picture


def _paint(picture: Tensor, distance: Tensor, colour: Tensor) -> Tensor:
    """Lay a colour over the pixels whose distance to the shape's edge (H, W) is negative."""
    cover = (0.5 - distance).clamp(0, 1)[..., None]
    return torch.lerp(picture, colour.expand_as(picture), cover)


def _distance(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distance (H, W) of pixels (H, W, 2) to a segment."""
    along = end - start
    share = ((pixels - start) @ along / along.square().sum().clamp_min(1e-9)).clamp(0, 1)
    return (pixels - start - share[..., None] * along).norm(dim=-1)
