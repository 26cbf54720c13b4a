"""Links as the front end draws them, and which of them pass through the title of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

TITLE, HEAD = 30, 40
"""Height of a node's title and of a group's."""
BESIDE = 9
"""Space between a title and a link at its left."""
STEPS = 96
"""Pieces that a drawn link is looked at in."""

Node = dict[str, Any]
Box = tuple[float, float, float, float]
"""Left, top, width, height."""
Point = tuple[float, float]


def crossed(
    corners: Mapping[int, Point],
    nodes: Mapping[int, Node],
    links: Sequence[Sequence[Any]],
    titles: Sequence[Box],
) -> NDArray[np.bool_]:
    """Which links pass through which titles.

    Args:
        corners: node id to its upper left corner, below its title.
        nodes: of a file, by id.
        links: of the file; those between nodes that have no corner are left out.
        titles: boxes of titles.

    Returns:
        (links, titles), true where one passes through the other.
    """
    ends = np.array(
        [
            (
                *socket(nodes[source], corners[source], output, True),
                *socket(nodes[target], corners[target], slot, False),
            )
            for _, source, output, target, slot, _ in links
            if source in corners and target in corners
        ]
    ).reshape(-1, 2, 2)
    boxes = np.array(titles, float).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    beyond = np.zeros((len(ends), 1, 2))  # how far a link leaves the box of its ends
    beyond[..., 0] = _reach(ends)[:, None]
    near = (ends.min(1)[:, None] - beyond <= high) & (ends.max(1)[:, None] + beyond >= low)
    found: NDArray[np.bool_] = near.all(-1)
    link, title = np.nonzero(found)
    points = curves(ends[link]).round(3)  # ties are decided alike by every processor
    inside = (points >= low[title][:, None]) & (points <= high[title][:, None])
    found[link, title] = inside.all(-1).any(1)
    return found


def title_crossings(workflow: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Links of a file that pass through the title of a group: link id and title each."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    corners = {number: tuple(node["pos"]) for number, node in nodes.items()}
    boxes = [(*group["bounding"], group["title"]) for group in workflow["groups"]]
    titles = [title_box(x, y, title) for x, y, _, _, title in boxes]
    found = crossed(corners, nodes, workflow["links"], titles)
    return [
        (workflow["links"][k][0], workflow["groups"][group]["title"])
        for k, group in np.argwhere(found)
    ]


def title_width(title: str) -> int:
    """How wide the title of a group may be drawn, at 24 pixels in the widest usual font."""
    return 16 + 13 * len(title)


def title_box(x: float, y: float, title: str) -> Box:
    """Where no link should run for the title of a group at x, y."""
    return x - BESIDE, y, title_width(title) + BESIDE, HEAD


def socket(node: Node, corner: Point, slot: int, right: bool) -> Point:
    """Where a link ends at a node: at the right an output, at the left an input."""
    x, y = corner
    if node["flags"].get("collapsed"):
        name = node.get("title") or node["type"]
        return (x + 70 + 5.6 * len(name) if right else x), y - TITLE / 2
    if right:
        return x + node["size"][0] - 9, y + 14 + 20 * slot
    widgets = ["widget" in entry for entry in node.get("inputs", ())]  # they stand below sockets
    if any(widgets[slot : slot + 1]):
        rows = max(widgets.count(False), len(node["outputs"]))
        return x + 10, y + 16 + 20 * rows
    return x + 10, y + 14 + 20 * (slot - widgets[:slot].count(True))


def curves(ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points of links: cubics that leave and enter level.

    Args:
        ends: (links, 2, 2): x and y of the start and of the end.

    Returns:
        (links, STEPS + 1, 2).
    """
    start, end = ends[:, 0], ends[:, 1]
    reach = np.zeros_like(start)
    reach[:, 0] = _reach(ends)
    rows = np.stack((start, start + reach, end - reach, end), 1)
    drawn: NDArray[np.float64] = _weights() @ rows
    return drawn


def _reach(ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far the handles of links stand from their ends, (links,)."""
    reach: NDArray[np.float64] = 0.25 * np.hypot(*(ends[:, 1] - ends[:, 0]).T)
    return reach


def curve(start: Point, end: Point) -> list[Point]:
    """Points of one link."""
    (points,) = curves(np.array([(start, end)], float))
    return [(float(x), float(y)) for x, y in points]


@cache
def _weights() -> NDArray[np.float64]:
    t = np.linspace(0, 1, STEPS + 1)
    return np.stack(((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3), -1)
