"""Two goods at once, likeness and obedience: fronts of points and the area that they dominate."""

from __future__ import annotations

import torch
from torch import Tensor


def hypervolume(points: Tensor, reference: Tensor) -> Tensor:
    """Area that points dominate above a reference point; more is better in both columns.

    Zitzler and Thiele 1998, for two goals.

    Args:
        points: (..., N, 2).
        reference: (2,); points that are not above it in both columns count nothing.

    Returns:
        (...).
    """
    gains = (points - reference).clamp_min(0)
    order = gains[..., 0].argsort(-1, descending=True)
    width = gains[..., 0].gather(-1, order)
    height = gains[..., 1].gather(-1, order).cummax(-1).values
    left = torch.cat([width[..., 1:], torch.zeros_like(width[..., :1])], -1)
    return ((width - left) * height).sum(-1)


def on_or_above(front: Tensor, points: Tensor) -> Tensor:
    """Whether every point lies on or below the line through a front's points (ours).

    A front is one knob's sweep: what lies between two settings can be had by turning the knob.

    Args:
        front: (..., K, 2) in the order of the knob.
        points: (..., N, 2).

    Returns:
        (...) bool: for each point some place on the line is at least as good in both columns.
    """
    share = torch.linspace(0, 1, 65, dtype=front.dtype)[:, None, None]
    between = torch.lerp(front[..., None, :-1, :], front[..., None, 1:, :], share)
    line = torch.cat([between.flatten(-3, -2), front[..., :1, :]], -2)  # (..., M, 2)
    better = (line[..., :, None, :] >= points[..., None, :, :]).all(-1)  # (..., M, N)
    return better.any(-2).all(-1)
