"""Pictures without a face, from which the demo world's detector learns what is none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..world.people import draw_item
from ..world.renderer import (
    BACKGROUNDS,
    COLOURS,
    LOOKS,
    OBJECTS,
    Backdrop,
    Painter,
    Pose,
    draw_backdrop,
    finish,
)
from .views import uniform

COARSEST = 5
"""Noise has cells of up to 2 to this power, in pixels."""


def empty_pictures(count: int, generator: torch.Generator) -> Tensor:
    """Backgrounds without people, most of them with a thing on them: (count, 64, 64, 3)."""

    def index(choices: int) -> Tensor:
        return torch.randint(choices, (count,), generator=generator)

    zero = torch.zeros(count)
    pose = Pose(
        x=uniform(count, 16, 48, generator),
        y=uniform(count, 8, 40, generator),
        scale=uniform(count, 14, 24, generator),
        roll=zero,
        yaw=zero,
        expression=index(1),
        shirt=index(1),
        visible=torch.ones(count, dtype=torch.bool),
        item=index(len(OBJECTS)),
        item_colour=index(len(COLOURS)),
        item_shape=uniform(count, -1, 1, generator),
    )
    backdrop = Backdrop(
        look=index(len(LOOKS)),
        background=index(len(BACKGROUNDS)),
        pattern=index(2),
        light=torch.rand(count, 2, generator=generator) * 2 - 1,
        noise=torch.randn(count, 64, 64, generator=generator),
    )
    painter = Painter(count, 64, 64)
    draw_backdrop(painter, backdrop)
    painter.enter(pose, backdrop.look == LOOKS.index("cartoon"))
    draw_item(painter, pose)
    return finish(painter, backdrop).permute(0, 2, 3, 1)


def noise_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Noise from single pixels to soft spots, faint or strong, grey or coloured.

    Returns:
        (count, size, size, 3) in [0, 1].
    """
    pictures = []
    for power in torch.randint(COARSEST + 1, (count,), generator=generator).tolist():
        cells = max(2, size >> power)
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        if float(torch.rand(1, generator=generator)) < 0.3:
            noise = noise[:, :1].expand(-1, 3, -1, -1)
        soft = power > 0 and float(torch.rand(1, generator=generator)) < 0.5
        noise = F.interpolate(noise, (size, size), mode="bicubic" if soft else "nearest")
        middle = uniform(3, 0.2, 0.8, generator)[:, None, None]
        strength = float(uniform(1, 0.05, 0.6, generator))
        pictures.append((middle + strength * noise[0]).clamp(0, 1).permute(1, 2, 0))
    return torch.stack(pictures)


def disc_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Ovals in the colours of skin and others, without a face in them, on plain backgrounds.

    Returns:
        (count, size, size, 3) in [0, 1].
    """
    axis = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre = uniform(2 * count, 0.3, 0.7, generator).view(2, count, 1, 1)
    radius = uniform(2 * count, 0.12, 0.42, generator).view(2, count, 1, 1)
    far = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2
    inside = ((1.15 - far.sqrt()) * 10).clamp(0, 1)[..., None]
    light = uniform(count, 0.25, 1.0, generator)[:, None]
    skin = light * torch.tensor([1.0, 0.76, 0.6]) + uniform(3 * count, -0.1, 0.1, generator).view(
        -1, 3
    )
    other = torch.rand(count, 3, generator=generator)
    colour = torch.where(torch.rand(count, 1, generator=generator) < 0.75, skin, other)
    ground = torch.rand(count, 1, 1, 3, generator=generator)
    return (inside * colour[:, None, None] + (1 - inside) * ground).clamp(0, 1)
