"""What the demo world's face detector should say, and the loss between that and what it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STRIDES = (8, 16, 32)
"""Pixels per cell of the three maps, as in SCRFD."""

ANCHORS = 2
"""Answers per cell; both learn the same here, insightface expects two."""

_SIZES = ((0.0, 38.0), (30.0, 76.0), (60.0, 1e9))  # face sizes of each map; neighbours overlap
_POSITIVE, _IGNORED = 0.75, 1.5  # distances from the face's centre in strides


@dataclass(frozen=True)
class Targets:
    """What the network should say of a batch at one stride, by cell.

    `positive`, `ignored`: (B, H, W) bool; `boxes`: (B, H, W, 4) and `points`: (B, H, W, 10) in
    strides from the cell's corner; `sizes`: (B, H, W) face size in strides.
    """

    positive: Tensor
    ignored: Tensor
    boxes: Tensor
    points: Tensor
    sizes: Tensor


def assign(boxes: Tensor, points: Tensor, size: int, level: int) -> Targets:
    """Which cells of a level answer for which face.

    A face belongs to the levels whose size range holds it; its cells are those whose corner lies
    within 0.75 strides of its centre, the ones around them are left alone.

    Args:
        boxes: (B, F, 4) in input pixels; NaN where there is no face.
        points: (B, F, 10) likewise.
        size: side of the input.
        level: index into STRIDES.
    """
    stride, (low, high) = STRIDES[level], _SIZES[level]
    axis = torch.arange(size // stride) * float(stride)
    corner = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None, None]
    centre = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None, None]
    extent = ((boxes[..., 2:] - boxes[..., :2]).prod(-1).sqrt())[:, :, None, None]
    far = (corner - centre).abs().amax(-1) / stride
    fits = (extent >= low) & (extent < high)
    seen = ((centre >= 0) & (centre <= size)).all(-1)
    inside = (
        (corner >= boxes[:, :, None, None, :2]) & (corner <= boxes[:, :, None, None, 2:])
    ).all(-1)
    near = far.masked_fill(~(fits & seen), torch.inf).nan_to_num(torch.inf)
    nearest, face = near.min(1)
    positive = nearest <= _POSITIVE
    ignored = ~positive & ((nearest <= _IGNORED) | (inside & ~seen).any(1))
    row = torch.arange(len(boxes))[:, None, None]
    chosen_box, chosen_points = boxes[row, face], points[row, face]
    corner = corner[0, 0]
    distances = torch.cat([corner - chosen_box[..., :2], chosen_box[..., 2:] - corner], -1)
    offsets = chosen_points - corner.repeat(1, 1, 5)
    sizes = extent[:, :, 0, 0][row, face]
    return Targets(positive, ignored, distances / stride, offsets / stride, sizes / stride)


def detection_loss(maps: list[Tensor], targets: list[Targets]) -> Tensor:
    """Focal loss of the scores (arXiv 1708.02002, Eq. 5) and face-relative L1 of the geometry."""
    score, geometry, found = torch.zeros(()), torch.zeros(()), 1
    for y, target in zip(maps, targets, strict=True):
        y, mask = y.float(), target.positive
        wanted = mask[..., None].expand(y.shape[:-1]).float()
        logits = y[..., 0]
        surprise = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        focus = (wanted - logits.sigmoid()).abs().detach() ** 2
        score = score + (surprise * focus * ~target.ignored[..., None]).sum()
        truth = torch.cat([target.boxes, target.points], -1)[mask][:, None]
        error = (y[..., 1:][mask] - truth).abs() / target.sizes[mask][:, None, None]
        geometry = geometry + error.sum() / 14
        found += ANCHORS * int(mask.sum())
    return (score + 4 * geometry) / found
