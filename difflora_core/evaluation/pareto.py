"""Two goals at once, likeness and prompt agreement: fronts of points and their area."""

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


def shortfall(front: Tensor, points: Tensor) -> Tensor:
    """By how much a front has to grow in both goals until every point lies on or below it.

    The additive epsilon indicator (Zitzler et al. 2003) of the line through the front's points: a
    front is the sweep of one setting, and what lies between two of its values can be had too.

    Args:
        front: (..., K, 2) in the order of the setting.
        points: (..., N, 2).

    Returns:
        (...); not above zero where the front is on or above all points already.
    """
    share = torch.linspace(0, 1, 65, dtype=front.dtype)[:, None, None]
    between = torch.lerp(front[..., None, :-1, :], front[..., None, 1:, :], share)
    line = torch.cat([between.flatten(-3, -2), front[..., :1, :]], -2)  # (..., M, 2)
    missing = (points[..., None, :, :] - line[..., :, None, :]).amax(-1)  # (..., M, N)
    return missing.amin(-2).amax(-1)
