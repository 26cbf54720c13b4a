"""How the front end shows a workflow: what lies over what, and whether it can be read.

Boxes and links are the front end's own, of a page that has drawn the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ..comfyui.browser import FrontEnd

READABLE = 8 / 14
"""Zoom below which the front end draws no text: its font of 14 pixels would be smaller than 8."""

_SHOWN = """() => {
    app.canvas.draw(true, true);
    const drawn = [...app.graph.links.values()].filter(link => link.path);
    const pen = document.createElement('canvas').getContext('2d');
    const groups = app.graph.groups.map(group => {
        const size = group.font_size ?? 24;
        pen.font = `${size}px Arial`;
        const [left, top] = group.pos, width = pen.measureText(group.title).width;
        pen.lineWidth = size;
        const near = link => {
            const ends = [
                app.graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot),
                app.graph.getNodeById(link.target_id).getInputPos(link.target_slot),
            ];
            const reach = 0.25 * Math.hypot(ends[0][0] - ends[1][0], ends[0][1] - ends[1][1]);
            const [x, y] = [0, 1].map(axis => ends.map(end => end[axis]));
            return Math.min(...x) - reach < left + width && Math.max(...x) + reach > left
                && Math.min(...y) < top + size * 1.4 && Math.max(...y) > top;
        };
        const crosses = link => {
            for (let x = left + 4; x < left + 4 + width; x += size / 2)
                if (pen.isPointInStroke(link.path, x, top + size * 0.7)) return true;
            return false;
        };
        const links = drawn.filter(link => near(link) && crosses(link)).length;
        return {title: group.title, box: [...group.pos, ...group.size], links};
    });
    return {
        zoom: app.canvas.ds.scale,
        links: drawn.length,
        groups,
        nodes: app.graph.nodes.map(node => ({
            name: node.title, box: [...node.boundingRect], note: node.type === 'MarkdownNote',
        })),
    };
}"""


def shown(front_end: FrontEnd) -> dict[str, Any]:
    """Boxes of nodes and groups, links that pass through a group's title, and the zoom."""
    return dict(front_end.page.evaluate(_SHOWN))


def complaints(seen: Mapping[str, Any]) -> list[str]:
    """What an artist would not like to see, in sentences; empty when all is well.

    Args:
        seen: of `shown`.
    """
    nodes, groups, found = seen["nodes"], seen["groups"], []
    if seen["zoom"] < READABLE:
        found.append(f"It opens at a zoom of {seen['zoom']:.2f}: no text is drawn.")
    for things in (nodes, groups):
        for one, other in combinations(things, 2):
            if overlap(one["box"], other["box"]):
                names = [thing.get("name") or thing["title"] for thing in (one, other)]
                found.append(f"{names[0]} covers {names[1]}.")
    for node in nodes:
        homes = [group for group in groups if within(node["box"], group["box"])]
        if len(homes) != (not node["note"]):
            found.append(f"{node['name']} stands in {len(homes)} groups.")
    return found


def crossings(seen: Mapping[str, Any]) -> int:
    """How many links pass through the title of a group."""
    return sum(group["links"] for group in seen["groups"])


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two boxes (left, top, width, height) share more than an edge."""
    (x, y, w, h), (a, b, c, d) = one, other
    return x < a + c and a < x + w and y < b + d and b < y + h


def within(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether a box lies in another."""
    (x, y, w, h), (a, b, c, d) = one, other
    return a <= x and b <= y and x + w <= a + c and y + h <= b + d
