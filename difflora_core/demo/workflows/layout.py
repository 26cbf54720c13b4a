"""Where the nodes of a workflow stand: groups of columns, packed so that all of it opens readable.

First a beam search sets one group after the other; where links then run through titles, groups and
nodes are moved until none does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..comfyui.workflow_api import WorkflowError
from .drawn_links import HEAD, TITLE, Box, Node, crossed, title_box
from .shapes import (
    COLUMN,
    HEIGHT,
    WIDTH,
    Arrangement,
    Group,
    Shape,
    group_shapes,
    node_height,
    note_shapes,
)
from .untangle import untangle

KEPT, LOOKED_AT = 100, 80
"""Unfinished arrangements that are followed up; finished ones whose links are drawn."""


@dataclass(frozen=True)
class Judge:
    """What is wrong with an arrangement.

    Args:
        titles: of the blocks; empty for the note's. links: of the file.
    """

    titles: Sequence[str]
    links: Sequence[Sequence[Any]]

    def crossings(self, one: Arrangement) -> int:
        """How many links pass through the title of a group."""
        named = zip(one.placed, self.titles, strict=False)
        boxes = [title_box(x, y, title) for (x, y, _), title in named if title]
        return int(crossed(one.corners(), one.nodes(), self.links, boxes).any(1).sum())

    def cost(self, one: Arrangement) -> float:
        """How small it is shown, how far links run back, what stands out of its order."""
        right, bottom = one.extent
        corners = one.corners()
        ends = [(corners.get(link[1]), corners.get(link[3])) for link in self.links]
        back = sum(max(0, a[0] + COLUMN - b[0]) for a, b in ends if a and b)
        above = sum(
            x < a + before.width and a < x + shape.width and y < b
            for number, (x, y, shape) in enumerate(one.placed)
            for a, b, before in one.placed[:number]
        )
        mixed = sum(shape.mixed for _, _, shape in one.placed)
        return max(right / WIDTH, bottom / HEIGHT) + back / 6_000 + above / 5 + mixed / 20

    def both(self, one: Arrangement) -> tuple[int, float]:
        """Crossings and cost."""
        return self.crossings(one), self.cost(one)


def arrange(
    note: Node | None, groups: Sequence[Group], links: Sequence[Sequence[Any]]
) -> list[Box]:
    """Set the position of every node; the note stands at the far left.

    Args:
        note: the node that explains the workflow.
        groups: from the first to the last step.
        links: of the file.

    Returns:
        The box of each group.

    Raises:
        WorkflowError: the nodes need more than WIDTH x HEIGHT.
    """
    blocks = [note_shapes(note)] if note else []
    blocks += [group_shapes(group) for group in groups]
    judge = Judge([""] * (note is not None) + [group.title for group in groups], links)
    found = _arrangements(blocks, judge, True) or _arrangements(blocks, judge, False)
    if not found:
        raise WorkflowError(f"The workflow does not fit into {WIDTH} x {HEIGHT}: fewer nodes.")
    nearly = sorted(found, key=judge.cost)[:LOOKED_AT]
    nearly.sort(key=lambda one: sum(judge.both(one)))
    best = untangle(nearly, blocks, judge.both)
    for x, y, shape in best.placed:
        for node, left, top in shape.places:
            node["pos"] = [x + left, y + top]
            if node is note:
                node["size"] = [shape.width, shape.height - HEAD - TITLE]
    rest = best.placed[1:] if note else best.placed
    return [(x, y, shape.width, shape.height) for x, y, shape in rest]


def _arrangements(
    blocks: Sequence[Sequence[Shape]], judge: Judge, forward: bool
) -> list[Arrangement]:
    """Ways to set all blocks, one after the other: a beam search; none when they do not fit."""
    found = [Arrangement()]
    for shapes in blocks:
        further = [
            Arrangement((*start.placed, (x, y, shape)))
            for start in found
            for shape in shapes
            for x, y in start.places(shape, forward)
        ]
        small = sorted(further, key=lambda one: one.hull)[: 2 * KEPT]
        clear = sorted(small, key=judge.crossings)
        found = list(dict.fromkeys([*small[:KEPT], *clear[:KEPT]]))
    return found


def extent(workflow: Mapping[str, Any]) -> tuple[float, float]:
    """Width and height of a file's nodes, which the front end fits into its window."""
    lefts, tops = zip(*((n["pos"][0], n["pos"][1] - TITLE) for n in workflow["nodes"]), strict=True)
    ends = [(n["pos"][0] + n["size"][0], n["pos"][1] + node_height(n)) for n in workflow["nodes"]]
    return max(x for x, _ in ends) - min(lefts), max(y for _, y in ends) - min(tops)
