"""Contact sheets: the people of a dataset to look at, with what was left out of theirs and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DatasetError, counted
from ..storage.image_files import write_image
from ..vision.grid import GridRow, draw_grid
from .catalogue import Catalogue, Choice
from .choices import UNUSABLE
from .pictures import open_picture
from .sources import Source

SIDE = 128
COLUMNS = 12
ROWS = 20
"""Lines of a sheet. A person takes as many as are needed, at most PERSON_ROWS."""
PERSON_ROWS = 4
NOBODY = "nobody recognised"


def draw_sheets(catalogue: Catalogue, source: Source, folder: Path, most: int) -> list[Path]:
    """Draws the people of whom most was left out, then the others.

    Args:
        catalogue: with its choices.
        source: of the pictures.
        folder: for `sheet-000.png` and so on; sheets of another run there are removed.
        most: sheets.

    Returns:
        The files.

    Raises:
        DatasetError: one cannot be written.
    """
    lines: list[GridRow] = []
    paths: list[Path] = []
    for person in catalogue.by_losses(most * ROWS):
        lines += _person_rows(catalogue, source, person)
        while len(lines) >= ROWS and len(paths) < most:
            paths.append(_write(folder, len(paths), lines[:ROWS]))
            lines = lines[ROWS:]
        if len(paths) == most:
            break
    if lines and len(paths) < most:
        paths.append(_write(folder, len(paths), lines))
    for old in sorted(folder.glob("sheet-*.png")):
        if old not in paths:
            old.unlink()
    return paths


def _write(folder: Path, number: int, lines: Sequence[GridRow]) -> Path:
    """One sheet as a file."""
    path = folder / f"sheet-{number:03d}.png"
    write_image(draw_grid(lines, SIDE), path)
    return path


def _person_rows(catalogue: Catalogue, source: Source, person: str) -> list[GridRow]:
    """The lines of a person: what was left out comes first."""
    most = PERSON_ROWS * COLUMNS
    gone = list(catalogue.choices("WHERE person=? AND kind<>''", person, most=most))
    kept = list(catalogue.choices("WHERE person=? AND kind=''", person, most=most))
    of_kept, of_gone = catalogue.count_of(person)
    shown = [*gone[: most - min(len(kept), COLUMNS)], *kept][:most]
    label = f"{person or NOBODY}: {counted(of_kept, 'picture')}, {of_gone} left out"
    rows = []
    for start in range(0, len(shown), COLUMNS):
        part = shown[start : start + COLUMNS]
        tiles = [_tile(catalogue, source, choice) for choice in part]
        tiles += [_blank()] * (COLUMNS - len(tiles))
        captions = [_caption(choice) for choice in part]
        rows.append(GridRow(tiles, label if start == 0 else "", captions))
    return rows


def _caption(choice: Choice) -> str:
    """How alike the face is, or why the picture is left out."""
    if choice.kind:
        return f"x {choice.reason if choice.kind == UNUSABLE else choice.kind}"
    return f"{choice.likeness:.2f}" if choice.face >= 0 else ""


def _tile(catalogue: Catalogue, source: Source, choice: Choice) -> Tensor:
    """The whole picture, small; grey where it cannot be opened."""
    known = catalogue.known(choice.key)
    if choice.kind == UNUSABLE:
        return torch.full((SIDE, SIDE, 3), 0.8)
    try:
        picture = open_picture(source.read(known.place))
    except DatasetError:
        return torch.full((SIDE, SIDE, 3), 0.8)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return torch.from_numpy(np.asarray(square).copy()).float() / 255


def _blank() -> Tensor:
    """An empty place, which gives every line the same width."""
    return torch.ones(SIDE, SIDE, 3)
