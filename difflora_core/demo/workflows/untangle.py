"""Moves the groups of a workflow, and nodes in them, until no link runs through a group's title.

Simulated annealing from an arrangement that is good otherwise; what it does is set by that alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from .shapes import GAP, Arrangement, Shape, columns, in_window

TRIES = ((4_000, 0.4), *6 * ((12_000, 0.8),))
"""Moves of each try, and its temperature at the start in units of the cost. Each has chances of its
own; the next one starts only where a crossing is left."""
COLD = 0.01
"""Temperature at the end of a try."""
ROOM = (0, 0, 20, 40, 60, 80)
"""Further space between a group's title and its nodes."""
STEP, FAR = 10, 20
"""Of the grid that groups stand on; how many steps one is moved at once."""

Cost = Callable[[Arrangement], tuple[int, float]]
"""Links through titles, and what else is wrong with an arrangement."""


def untangle(
    starts: Sequence[Arrangement], blocks: Sequence[Sequence[Shape]], cost: Cost
) -> Arrangement:
    """An arrangement of the same blocks with as few links through titles as can be found.

    Args:
        starts: where they may stand, the best first; their first block stays at the left.
        blocks: ways to set each block.
        cost: of an arrangement.

    Returns:
        The first of `starts` when its cost is not undercut.
    """
    best, least = starts[0], cost(starts[0])
    for seed, (moves, warm) in enumerate(TRIES):
        if not least[0]:
            break
        found, reached = _try(starts[seed % len(starts)], blocks, cost, moves, warm, Random(seed))
        if reached < least:
            best, least = found, reached
    return best


def _try(
    start: Arrangement,
    blocks: Sequence[Sequence[Shape]],
    cost: Cost,
    moves: int,
    warm: float,
    chance: Random,
) -> tuple[Arrangement, tuple[int, float]]:
    """One cooling: the best that it came by."""
    here, spent = start, cost(start)
    best, least = here, spent
    for move in range(moves):
        heat = warm * (1 - move / moves) + COLD
        there = _moved(here, blocks, chance)
        if there is None:
            continue
        needed = cost(there)
        worse = sum(needed) - sum(spent)
        if worse <= 0 or chance.random() < math.exp(-worse / heat):
            here, spent = there, needed
            if needed < least:
                best, least = here, needed
    return best, least


def _moved(
    here: Arrangement, blocks: Sequence[Sequence[Shape]], chance: Random
) -> Arrangement | None:
    """One change by chance; none when things would touch or leave the window."""
    placed = list(here.placed)
    number, other = (chance.randrange(len(placed)) for _ in range(2))
    x, y, shape = placed[number]
    kind = chance.random()
    if kind < 0.3:
        x += STEP * chance.randint(-FAR, FAR)
        y += STEP * chance.randint(-FAR, FAR)
    elif kind < 0.55:
        a, b, beside = placed[other]
        x = chance.choice((x, a, a + beside.width + GAP, a - shape.width - GAP))
        y = chance.choice((y, 0, b, b + beside.height + GAP, b - shape.height - GAP))
    elif kind < 0.65:
        a, b, beside = placed[other]
        placed[other] = (x, y, beside)
        x, y = a, b
    elif kind < 0.75 or number == 0:
        shape = chance.choice(blocks[number])
    else:
        shape = _reset(shape, chance)
    placed[number] = (x, y, shape)
    there = Arrangement(tuple(placed))
    return there if placed[0][0] == 0 and in_window(there) else None


def _reset(shape: Shape, chance: Random) -> Shape:
    """The same nodes in another order, in other columns, or lower in their group."""
    rows = shape.columns
    if len(rows) > 1 and shape.by_columns and chance.random() < 0.7:
        k = chance.randrange(len(rows) - 1)
        if chance.random() < 0.5:
            k, n = (chance.randrange(len(rows)) for _ in range(2))
            if rows[k] and rows[n]:
                i, j = chance.randrange(len(rows[k])), chance.randrange(len(rows[n]))
                rows[k][i], rows[n][j] = rows[n][j], rows[k][i]
        elif chance.random() < 0.5 and len(rows[k]) > 1:
            rows[k + 1].insert(0, rows[k].pop())
        elif len(rows[k + 1]) > 1:
            rows[k].append(rows[k + 1].pop(0))
        return columns(rows)
    room = chance.choice(ROOM) - shape.room
    places = tuple((node, left, top + room) for node, left, top in shape.places)
    return replace(shape, height=shape.height + room, places=places)
