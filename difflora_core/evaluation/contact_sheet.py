"""The contact sheet of an identity library: its thumbnails with numbers and names."""

from __future__ import annotations

from torch import Tensor

from ..errors import LibraryError
from ..storage.library_file import Library
from ..storage.thumbnail import SIDE, read_thumbnail
from .grid import GridRow, draw_grid


def contact_sheet(library: Library, first: int = 1, count: int = 48, columns: int = 8) -> Tensor:
    """Draws people in lines, each with number and name.

    Args:
        library: whose.
        first: number of the first person shown, from 1.
        count: how many at most.
        columns: pictures side by side.

    Returns:
        (H, W, 3) float32 in [0, 1].

    Raises:
        LibraryError: nobody is there, or a thumbnail is damaged.
        ConfigError: the sheet would be too large.
    """
    people = library.people[first - 1 : first - 1 + count]
    if not people:
        raise LibraryError(
            f"There is nobody to show from number {first} on: the library holds {len(library)}."
        )
    pictures = [read_thumbnail(person.picture) for person in people]
    captions = [f"{first + k} {person.name}" for k, person in enumerate(people)]
    lines = range(0, len(people), columns)
    rows = [GridRow(pictures[k : k + columns], captions=captions[k : k + columns]) for k in lines]
    return draw_grid(rows, SIDE)
