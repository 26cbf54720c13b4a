"""Pictures and faces by quarter turns: a photo may lie on its side or stand on its head."""

from __future__ import annotations

import torch
from torch import Tensor

CLEARLY = 0.1
"""Shortest way from the eyes to the mouth that says where up is, as a share of the box's side."""


def quarter_turns(keypoints: Tensor, side: float) -> int:
    """How often a picture has to be turned by `torch.rot90` for a face to stand upright: 0 to 3.

    Args:
        keypoints: (5, 2) eyes, nose tip, mouth corners, in pixels.
        side: of the face in pixels; points closer together than a tenth of it say nothing.
    """
    x, y = (keypoints[3:].mean(0) - keypoints[:2].mean(0)).tolist()  # from the eyes to the mouth
    if not max(abs(x), abs(y)) > CLEARLY * side:
        return 0
    if abs(y) >= abs(x):
        return 0 if y > 0 else 2
    return 3 if x > 0 else 1


def turn_points(points: Tensor, turns: int, height: int, width: int) -> Tensor:
    """Where points (..., 2) of a picture lie when it is turned by `torch.rot90(picture, turns)`."""
    x, y = points.unbind(-1)
    places = ((x, y), (y, width - x), (width - x, height - y), (height - y, x))
    return torch.stack(places[turns % 4], -1)


def turn_box(box: Tensor, turns: int, height: int, width: int) -> Tensor:
    """A box (4,) x1, y1, x2, y2 in the turned picture."""
    corners = turn_points(box.view(2, 2), turns, height, width)
    return torch.cat([corners.amin(0), corners.amax(0)])
