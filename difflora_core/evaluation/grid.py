"""Variants beside a reference, and the people of a library, as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import LibraryError
from ..storage.library_file import Library
from ..storage.thumbnail import SIDE, read_thumbnail
from ..vision.grid import GridRow, draw_grid


def compare_grid(
    variants: Tensor,
    reference: Tensor | None = None,
    labels: Sequence[str] = (),
    columns: int = 4,
    side: int = 192,
) -> Tensor:
    """A reference at the left of the first line, variants in lines beside it, all with captions.

    Args:
        variants: (N, H, W, 3) in [0, 1].
        reference: (>= 1, H, W, 3), the first is shown; None leaves its column out.
        labels: captions of the variants; those that are missing are numbered.
        columns: variants in a line.
        side: height of each picture in pixels.

    Returns:
        (H, W, 3) float32 in [0, 1].
    """
    captions = [*labels[: len(variants)]]
    captions += [str(k) for k in range(len(captions) + 1, len(variants) + 1)]
    first = [] if reference is None else [reference[0]]
    blank = [None] * len(first)
    rows = []
    for start in range(0, len(variants), columns):
        part = slice(start, start + columns)
        lead, name = (blank, [""] * len(blank)) if start else (first, ["reference"] * len(first))
        rows.append(GridRow([*lead, *variants[part]], "", [*name, *captions[part]]))
    return draw_grid(rows, side)


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
