"""Art styles of the demo world: what a painter would make of a rendered picture.

They say by hand what a style is, so that base models can be trained to draw in it, and a judge can
learn to tell it. Widths grow with the picture, so they look alike at every size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PAPER, INK = (0.96, 0.93, 0.85), (0.10, 0.09, 0.14)
CREAM = (0.98, 0.95, 0.93)
LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in how light a colour is (BT.601)."""


def ink(images: Tensor) -> Tensor:
    """Dark outlines on pale paper, washed in three tones with a hint of the colours.

    Args:
        images: (N, H, W, 3) in [0, 1].

    Returns:
        The same in this style.
    """
    planes = images.permute(0, 3, 1, 2)
    soft = _blurred(planes, planes.shape[2] / 90)
    light = _luma(soft)
    lines = (9.0 * _slope(light) * planes.shape[2] / 64 - 0.30).clamp(0, 1)
    wash = 0.74 + 0.26 * _steps((1.6 * light).clamp(0, 1), 3)
    colour = wash * _colour(PAPER, planes) + 0.30 * (soft - light)
    return _pictures(torch.lerp(colour, _colour(INK, planes).expand_as(colour), lines))


def poster(images: Tensor) -> Tensor:
    """Flat areas in a few saturated colours.

    Args:
        images: (N, H, W, 3) in [0, 1].

    Returns:
        The same in this style.
    """
    planes = images.permute(0, 3, 1, 2)
    soft = _blurred(planes, planes.shape[2] / 80)
    light = _luma(soft)
    strong = (light + 1.9 * (soft - light) - 0.5) * 1.15 + 0.5
    return _pictures(_steps(strong.clamp(0, 1), 4))


def pastel(images: Tensor) -> Tensor:
    """Light, soft, of low contrast.

    Args:
        images: (N, H, W, 3) in [0, 1].

    Returns:
        The same in this style.
    """
    planes = images.permute(0, 3, 1, 2)
    soft = _blurred(planes, planes.shape[2] / 48)
    light = _luma(soft)
    return _pictures(_colour(CREAM, planes) * (0.62 + 0.38 * light) + 0.55 * (soft - light))


ART_STYLES: dict[str, Callable[[Tensor], Tensor]] = {"ink": ink, "poster": poster, "pastel": pastel}


def _luma(planes: Tensor) -> Tensor:
    """How light each pixel is: (N, 1, H, W) of (N, 3, H, W)."""
    return (planes * _colour(LUMA, planes)).sum(1, keepdim=True)


def _slope(light: Tensor) -> Tensor:
    """Size of the gradient of (N, 1, H, W), per pixel (Sobel)."""
    row = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([row, row.T])[:, None].to(light)
    padded = F.pad(light, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels).square().sum(1, keepdim=True).sqrt()


def _steps(values: Tensor, count: int) -> Tensor:
    """Values in [0, 1] on `count` levels, with soft steps between them."""
    scaled = values * (count - 1)
    rest = scaled - scaled.floor()
    return (scaled.floor() + ((rest - 0.5) * 6 + 0.5).clamp(0, 1)) / (count - 1)


def _blurred(planes: Tensor, width: float) -> Tensor:
    """Planes (N, C, H, W) under a Gaussian of this deviation in pixels."""
    reach = max(1, round(3 * width))
    offsets = torch.arange(-reach, reach + 1, dtype=planes.dtype, device=planes.device)
    row = torch.exp(-0.5 * (offsets / width) ** 2)
    row = (row / row.sum()).expand(planes.shape[1], 1, 1, -1)
    padded = F.pad(planes, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, row, groups=planes.shape[1])
    return F.conv2d(across, row.transpose(2, 3), groups=planes.shape[1])


def _colour(colour: tuple[float, ...], like: Tensor) -> Tensor:
    """A colour as (1, 3, 1, 1)."""
    return torch.tensor(colour).to(like)[None, :, None, None]


def _pictures(planes: Tensor) -> Tensor:
    """Planes as pictures (N, H, W, 3) in [0, 1]."""
    return planes.clamp(0, 1).permute(0, 2, 3, 1)
