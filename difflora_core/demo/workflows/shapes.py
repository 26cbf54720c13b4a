"""What the layout of a workflow sets: shapes of groups and notes, and arrangements of them.

The front end opens a template so that its nodes fill three quarters of the window, and draws no
text below a zoom of 0.57. In a window of 1600 x 900 that leaves WIDTH x HEIGHT for the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

from .drawn_links import HEAD, TITLE, Box, Node, title_width

WIDTH, HEIGHT = 2076, 1158
"""Largest extent of a workflow's nodes, in units of the canvas."""
COLUMN, GAP = 240, 20
"""Width of a column; space between columns, nodes and groups."""
PAD = GAP // 2
NOTE_WIDTHS = (280, 340, 400, 460)
MOST_COLUMNS = 4


@dataclass
class Group:
    """Nodes that stand in a box with a title; `wide`: of two columns' width."""

    title: str
    wide: bool = False
    nodes: list[tuple[int, Node]] = field(default_factory=list)

    @property
    def in_order(self) -> list[Node]:
        """Its nodes column by column, as they were asked for."""
        return [node for _, node in sorted(self.nodes, key=lambda pair: pair[0])]


@dataclass(frozen=True, eq=False)
class Shape:
    """One way to set a block: its size, and where its nodes stand in it."""

    width: int
    height: int
    places: tuple[tuple[Node, int, int], ...]

    @property
    def columns(self) -> list[list[Node]]:
        """Its nodes as they stand below each other."""
        lefts = sorted({left for _, left, _ in self.places})
        return [[node for node, left, _ in self.places if left == at] for at in lefts]

    @property
    def by_columns(self) -> bool:
        """Whether its nodes are of a column's width."""
        return all(node["size"][0] == COLUMN for node, _, _ in self.places)

    @property
    def mixed(self) -> int:
        """How many nodes stand directly after one that was asked for later."""
        ids = [node["id"] for node, _, _ in self.places]
        return sum(after < before for before, after in pairwise(ids))

    @property
    def room(self) -> int:
        """Further space between its title and its nodes."""
        return min(top for _, _, top in self.places) - HEAD - TITLE


@dataclass(frozen=True, eq=False)
class Arrangement:
    """Shapes at their places, in the order of the blocks."""

    placed: tuple[tuple[int, int, Shape], ...] = ()

    @property
    def extent(self) -> tuple[int, int]:
        """Right and lower end."""
        right = max((x + shape.width for x, _, shape in self.placed), default=0)
        return right, max((y + shape.height for _, y, shape in self.placed), default=0)

    @property
    def hull(self) -> int:
        """Area of all that lies left of and above something."""
        edges = sorted(((x + s.width, y + s.height) for x, y, s in self.placed), reverse=True)
        area = low = 0
        for (right, bottom), nearer in zip(edges, [*edges[1:], (0, 0)], strict=True):
            low = max(low, bottom)
            area += (right - nearer[0]) * low
        return area

    def corners(self) -> dict[int, tuple[int, int]]:
        """Node id to its upper left corner, below its title."""
        return {
            node["id"]: (x + left, y + top)
            for x, y, shape in self.placed
            for node, left, top in shape.places
        }

    def nodes(self) -> dict[int, Node]:
        """What is placed, by its id."""
        return {node["id"]: node for _, _, shape in self.placed for node, _, _ in shape.places}

    def fits(self, box: Box) -> bool:
        """Whether a box touches nothing that is placed."""
        x, y, width, height = box
        return all(
            x >= a + s.width + GAP or a >= x + width + GAP
            or y >= b + s.height + GAP or b >= y + height + GAP
            for a, b, s in self.placed
        )  # fmt: skip

    def places(self, shape: Shape, forward: bool) -> list[tuple[int, int]]:
        """Where a further block may stand: beside or below others.

        `forward`: not left of the one before.
        """
        first = self.placed[-1][0] if self.placed and forward else 0
        lefts = {x for x, _, _ in self.placed} | {x + s.width + GAP for x, _, s in self.placed}
        tops = {0} | {y + s.height + GAP for _, y, s in self.placed}
        return [
            (x, y)
            for x in sorted(lefts or {0})
            for y in sorted(tops)
            if x >= first
            and x + shape.width <= WIDTH + PAD
            and y + shape.height <= HEAD + HEIGHT + PAD
            and self.fits((x, y, shape.width, shape.height))
        ]


def in_window(arrangement: Arrangement) -> bool:
    """Whether nothing touches and all of it is readable."""
    right, bottom = arrangement.extent
    edge = min(min(x, y) for x, y, _ in arrangement.placed)
    if edge < 0 or right > WIDTH + PAD or bottom > HEAD + HEIGHT + PAD:
        return False
    boxes = [(x, y, x + s.width + GAP, y + s.height + GAP) for x, y, s in arrangement.placed]
    return all(
        x >= c or a >= r or y >= d or b >= e
        for (x, y, r, e), (a, b, c, d) in combinations(boxes, 2)
    )


def node_height(node: Node) -> int:
    """What a node takes of its column, without its title."""
    return 0 if node["flags"].get("collapsed") else int(node["size"][1])


def note_height(text: str, width: int) -> int:
    """Height of a note with its text, without its title."""
    lines = sum(1 + len(line) // (width // 5) for line in text.splitlines())
    return 50 + 14 * lines


def note_shapes(note: Node) -> list[Shape]:
    """The note in several widths."""
    heights = [(w, note_height(note["widgets_values"][0], w) + TITLE) for w in NOTE_WIDTHS]
    return [Shape(w, HEAD + h, ((note, 0, HEAD + TITLE),)) for w, h in heights if h <= HEIGHT]


def group_shapes(group: Group) -> list[Shape]:
    """The group in one column, in two, and so on."""
    if group.wide:
        return [_wide(group.in_order)]
    shapes = {}
    for count in range(1, MOST_COLUMNS + 1):
        shape = columns(_split(group.in_order, count))
        if shape.height <= HEAD + HEIGHT + PAD:
            shapes[shape.width] = shape
    wide_enough = [s for s in shapes.values() if s.width >= title_width(group.title)]
    return wide_enough or list(shapes.values())


def columns(rows: Sequence[Sequence[Node]]) -> Shape:
    """Columns of nodes in a box with a title."""
    places, heights = [], []
    for k, column in enumerate(rows):
        top = HEAD
        for node in column:
            places.append((node, PAD + k * (COLUMN + GAP), top + TITLE))
            top += TITLE + node_height(node) + PAD
        heights.append(top)
    return Shape(len(rows) * (COLUMN + GAP), max(heights), tuple(places))


def _wide(nodes: Sequence[Node]) -> Shape:
    """Folded nodes side by side, below them the others in two columns' width."""
    top, places = HEAD, []
    folded = [node for node in nodes if not node_height(node)]
    for k, node in enumerate(folded):
        places.append((node, PAD + (k + 1) % 2 * (COLUMN + GAP), top + TITLE))
        top += (TITLE + PAD) * (k % 2 or k + 1 == len(folded))
    for node in nodes:
        if node_height(node):
            node["size"][0] = 2 * COLUMN + GAP
            places.append((node, PAD, top + TITLE))
            top += TITLE + node_height(node) + PAD
    return Shape(2 * (COLUMN + GAP), top, tuple(places))


def _split(nodes: Sequence[Node], count: int) -> list[list[Node]]:
    """Nodes in their order in at most so many columns, the highest of which is as low as can be."""
    heights = [TITLE + node_height(node) + PAD for node in nodes]
    limit = max(heights)
    while True:
        rows: list[list[Node]] = [[]]
        used = 0
        for node, height in zip(nodes, heights, strict=True):
            if rows[-1] and used + height > limit:
                rows.append([])
                used = 0
            rows[-1].append(node)
            used += height
        if len(rows) <= count:
            return rows
        limit += 10
