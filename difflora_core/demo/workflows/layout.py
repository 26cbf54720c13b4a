"""Where the nodes of a workflow stand: groups of columns, packed so that all of it opens readable.

The front end opens a template so that its nodes fill three quarters of the window, and draws no
text below a zoom of 0.57. In a window of 1600 x 900 that leaves WIDTH x HEIGHT for the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..comfyui.workflow_api import WorkflowError

WIDTH, HEIGHT = 2076, 1158
"""Largest extent of a workflow's nodes, in units of the canvas."""
COLUMN, GAP, TITLE, HEAD = 240, 20, 30, 40
"""Width of a column; space between columns, nodes and groups; a node's title; a group's title."""
PAD = GAP // 2
NOTE_WIDTHS = (280, 340, 400, 460)
MOST_COLUMNS = 4
KEPT, LOOKED_AT = 100, 80
"""Unfinished arrangements that are followed up; finished ones whose links are drawn."""

Node = dict[str, Any]
Box = tuple[float, float, float, float]
"""Left, top, width, height."""


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


def node_height(node: Node) -> int:
    """What a node takes of its column, without its title."""
    return 0 if node["flags"].get("collapsed") else int(node["size"][1])


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
    blocks = [_note_shapes(note)] if note else []
    blocks += [_group_shapes(group) for group in groups]
    titles = [""] * (note is not None) + [group.title for group in groups]
    found = _arrangements(blocks, titles, links, True)
    found = found or _arrangements(blocks, titles, links, False)
    if not found:
        raise WorkflowError(f"The workflow does not fit into {WIDTH} x {HEIGHT}: fewer nodes.")
    nearly = sorted(found, key=lambda one: _cost(one, links))[:LOOKED_AT]
    best = min(nearly, key=lambda one: _crossings(one, titles, links) + _cost(one, links))
    for x, y, shape in best.placed:
        for node, left, top in shape.places:
            node["pos"] = [x + left, y + top]
            if node is note:
                node["size"] = [shape.width, shape.height - HEAD - TITLE]
    rest = best.placed[1:] if note else best.placed
    return [(x, y, shape.width, shape.height) for x, y, shape in rest]


def _arrangements(
    blocks: Sequence[Sequence[Shape]],
    titles: Sequence[str],
    links: Sequence[Sequence[Any]],
    forward: bool,
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
        clear = sorted(small, key=lambda one: _crossings(one, titles, links))
        found = list(dict.fromkeys([*small[:KEPT], *clear[:KEPT]]))
    return found


def note_height(text: str, width: int) -> int:
    """Height of a note with its text, without its title."""
    lines = sum(1 + len(line) // (width // 5) for line in text.splitlines())
    return 50 + 14 * lines


def _note_shapes(note: Node) -> list[Shape]:
    heights = [(w, note_height(note["widgets_values"][0], w) + TITLE) for w in NOTE_WIDTHS]
    return [Shape(w, HEAD + h, ((note, 0, HEAD + TITLE),)) for w, h in heights if h <= HEIGHT]


def _group_shapes(group: Group) -> list[Shape]:
    """The group in one column, in two, and so on."""
    if group.wide:
        return [_wide(group.in_order)]
    shapes = {}
    for count in range(1, MOST_COLUMNS + 1):
        shape = _columns(_split(group.in_order, count))
        if shape.height <= HEAD + HEIGHT + PAD:
            shapes[shape.width] = shape
    wide_enough = [s for s in shapes.values() if s.width >= title_box(0, 0, group.title)[2]]
    return wide_enough or list(shapes.values())


def _columns(columns: Sequence[Sequence[Node]]) -> Shape:
    """Columns of nodes in a box with a title."""
    places, heights = [], []
    for k, column in enumerate(columns):
        top = HEAD
        for node in column:
            places.append((node, PAD + k * (COLUMN + GAP), top + TITLE))
            top += TITLE + node_height(node) + PAD
        heights.append(top)
    return Shape(len(columns) * (COLUMN + GAP), max(heights), tuple(places))


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
        columns: list[list[Node]] = [[]]
        used = 0
        for node, height in zip(nodes, heights, strict=True):
            if columns[-1] and used + height > limit:
                columns.append([])
                used = 0
            columns[-1].append(node)
            used += height
        if len(columns) <= count:
            return columns
        limit += 10


def _cost(arrangement: Arrangement, links: Sequence[Sequence[Any]]) -> float:
    """How small it has to be shown, how far its links run back, and what stands above its cause."""
    right, bottom = arrangement.extent
    corners = arrangement.corners()
    ends = [(corners.get(link[1]), corners.get(link[3])) for link in links]
    back = sum(max(0, a[0] + COLUMN - b[0]) for a, b in ends if a and b)
    above = sum(
        x < a + before.width and a < x + shape.width and y < b
        for number, (x, y, shape) in enumerate(arrangement.placed)
        for a, b, before in arrangement.placed[:number]
    )
    return max(right / WIDTH, bottom / HEIGHT) + back / 6_000 + above / 5


def _crossings(
    arrangement: Arrangement, titles: Sequence[str], links: Sequence[Sequence[Any]]
) -> int:
    """How many links pass through the title of a group."""
    corners = arrangement.corners()
    nodes: dict[int, Node] = {}
    for _, _, shape in arrangement.placed:
        nodes |= {node["id"]: node for node, _, _ in shape.places}
    named = zip(arrangement.placed, titles, strict=False)
    boxes = [title_box(x, y, title) for (x, y, _), title in named if title]
    count = 0
    for _, source, output, target, slot, _ in links:
        if source not in corners or target not in corners:
            continue
        ends = [
            _socket(nodes[number], corners[number], place, right)
            for number, place, right in ((source, output, True), (target, slot, False))
        ]
        near = [box for box in boxes if _near(box, *ends)]
        if near:
            points = curve(*ends)
            count += any(inside(point, box) for box in near for point in points)
    return count


def _near(box: Box, start: tuple[float, float], end: tuple[float, float]) -> bool:
    """Whether a link between two points may come near a box."""
    (x, y, width, height), reach = box, COLUMN
    return (
        min(start[1], end[1]) < y + height
        and max(start[1], end[1]) > y
        and min(start[0], end[0]) - reach < x + width
        and max(start[0], end[0]) + reach > x
    )


def _socket(node: Node, corner: tuple[int, int], slot: int, right: bool) -> tuple[float, float]:
    """About where a socket is drawn."""
    x, y = corner
    if node["flags"].get("collapsed"):
        return (x + 140 if right else x), y - TITLE / 2
    return (x + node["size"][0] if right else x), y + 14 + 20 * slot


def title_box(x: float, y: float, title: str) -> Box:
    """Where the title of a group is drawn."""
    return x, y, 16 + 13 * len(title), HEAD


def curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of a link as the front end draws it: a cubic that leaves and enters level."""
    reach = 0.25 * ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
    rows = (start, (start[0] + reach, start[1]), (end[0] - reach, end[1]), end)
    points = []
    for k in range(41):
        t = k / 40
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (
            sum(weight * point[axis] for weight, point in zip(weights, rows, strict=True))
            for axis in (0, 1)
        )
        points.append((x, y))
    return points


def inside(point: Sequence[float], box: Box) -> bool:
    """Whether a point lies in a box."""
    x, y, width, height = box
    return x <= point[0] <= x + width and y <= point[1] <= y + height


def extent(workflow: Mapping[str, Any]) -> tuple[float, float]:
    """Width and height of a file's nodes, which the front end fits into its window."""
    lefts, tops = zip(*((n["pos"][0], n["pos"][1] - TITLE) for n in workflow["nodes"]), strict=True)
    ends = [(n["pos"][0] + n["size"][0], n["pos"][1] + node_height(n)) for n in workflow["nodes"]]
    return max(x for x, _ in ends) - min(lefts), max(y for _, y in ends) - min(tops)
