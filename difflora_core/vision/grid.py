"""Pictures side by side with labels, for comparing them by eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import ConfigError
from .preprocess import as_picture

LABEL_HEIGHT = 22
LARGEST_SIDE = 4096
_MARGIN, _FONT_SIZE = 6, 12


@dataclass(frozen=True)
class GridRow:
    """One line of a grid.

    `pictures`: (H, W, 3) in [0, 1] or None for an empty place; `label`: over the whole line, none
    when empty; `captions`: one under each picture, or none at all.
    """

    pictures: Sequence[Tensor | None]
    label: str = ""
    captions: Sequence[str] = ()


def draw_grid(rows: Sequence[GridRow], side: int = 192) -> Tensor:
    """Draw lines of pictures; every place has the shape of the widest picture.

    Args:
        rows: from top to bottom.
        side: height of a place in pixels; smaller pictures are enlarged without smoothing.

    Returns:
        (H, W, 3) float32 in [0, 1], white behind.

    Raises:
        ConfigError: there is no picture, or the grid would be larger than 4096 x 4096 pixels.
        ImageError: a picture cannot be used.
    """
    shown = [[None if p is None else as_picture(p) for p in row.pictures] for row in rows]
    shapes = [picture.shape for line in shown for picture in line if picture is not None]
    if not shapes:
        raise ConfigError("There is no picture to show. Connect at least one.")
    width = round(side * max(shape[1] / shape[0] for shape in shapes))
    columns = max(len(line) for line in shown)
    heights = [side + LABEL_HEIGHT * (bool(r.label) + bool(any(r.captions))) for r in rows]
    if max(columns * width, sum(heights)) > LARGEST_SIDE:
        raise ConfigError(
            f"A grid of {columns * width} x {sum(heights)} pixels is too large. Show fewer "
            "pictures or make them smaller."
        )
    sheet = Image.new("RGB", (columns * width, sum(heights)), "white")
    top = 0
    for row, line, height in zip(rows, shown, heights, strict=True):
        _draw_row(sheet, top, row, line, (width, side))
        top += height
    return torch.from_numpy(np.array(sheet)).float() / 255


def _draw_row(
    sheet: Image.Image,
    top: int,
    row: GridRow,
    pictures: Sequence[Tensor | None],
    place: tuple[int, int],
) -> None:
    """One line: label, pictures in the middle of their places, captions."""
    width, side = place
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    if row.label:
        pen.text((_MARGIN, top + _MARGIN - 1), row.label, fill="black", font=font)
        top += LABEL_HEIGHT
    for k, picture in enumerate(pictures):
        if picture is not None:
            tile = _tile(picture, width, side)
            left = k * width + (width - tile.width) // 2
            sheet.paste(tile, (left, top + (side - tile.height) // 2))
    for k, caption in enumerate(row.captions):
        text = _shortened(caption, font, width - 2 * _MARGIN)
        pen.text((k * width + _MARGIN, top + side + _MARGIN - 1), text, fill="black", font=font)


def _tile(picture: Tensor, width: int, side: int) -> Image.Image:
    """The picture as large as its place allows."""
    height, wide = picture.shape[:2]
    scale = min(side / height, width / wide)
    size = (max(1, round(wide * scale)), max(1, round(height * scale)))
    pixels = (picture.detach().cpu().numpy() * 255).round().astype("uint8")
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text cut to a width in pixels."""
    start = text[: max(width, 1)]  # of a page of text only what may fit is measured
    if start == text and font.getlength(text) <= width:
        return text
    while start and font.getlength(start + "...") > width:
        start = start[:-1]
    return start + "..."
