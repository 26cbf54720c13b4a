"""A map of what the routers say: each picture of a batch is a line through the sampling steps.

The weights of all styles in all layers are a point for every picture and step; the map shows the
two directions in which these points differ most (principal components). Lines that go apart are
pictures that get different mixtures; arXiv 2401.13942 shows its routers by t-SNE, whose distances
mean less and which needs a seed.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import percent
from .routing import FONT_SIZE, LINE, colours_of

SIDE, EDGE, DOT = 384, 24, 4
"""Pixels: of the map, around it, and half of a dot's width."""


def principal_components(points: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, D) by their two directions of largest variance.

    Returns:
        Coordinates (N, 2), float64, and the share (2,) of the variance that each direction has: 0
        where points do not differ. The largest number of a direction is positive, so that the map
        does not turn round by chance.
    """
    fine = points.double()
    centred = fine - fine.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    missing = max(0, 2 - len(sizes))
    sizes = torch.nn.functional.pad(sizes, (0, missing))[:2]
    directions = torch.nn.functional.pad(directions, (0, 0, 0, missing))[:2]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    whole = centred.square().sum()
    shares = sizes.square() / whole if whole > 0 else torch.zeros_like(sizes)
    return centred @ directions.mT, shares


def routing_map(table: Tensor) -> Tensor:
    """A line for each picture, from a ring at the first step to a dot at the last.

    Args:
        table: (T, B, D), see `RoutingTable.by_picture`.

    Returns:
        (H, W, 3) float32 in [0, 1].
    """
    places, shares = principal_components(table.flatten(0, 1))
    reach = places.abs().max().clamp_min(torch.finfo(places.dtype).tiny)  # both axes to one scale
    pixels = (EDGE + (SIDE / 2 - EDGE) * (1 + places / reach)).unflatten(0, table.shape[:2])
    height = SIDE + LINE
    sheet = Image.new("RGB", (SIDE, height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, colour in enumerate(colours_of(table.shape[1])):
        line = [(x, SIDE - y) for x, y in pixels[:, k].tolist()]
        if len(line) > 1:
            pen.line(line, fill=colour, width=1)
        for (x, y), filled in ((line[0], False), (line[-1], True)):
            box = (x - DOT, y - DOT, x + DOT, y + DOT)
            pen.ellipse(box, outline=colour, fill=colour if filled else "white")
    words = "first step: ring, last: dot; " + ", ".join(percent(v) for v in shares.tolist())
    font = ImageFont.load_default(FONT_SIZE)
    pen.text((4, SIDE + 2), f"{words} of what differs", fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).float() / 255
