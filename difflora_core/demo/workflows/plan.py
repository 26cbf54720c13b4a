"""A small picture of a workflow's graph: groups, nodes and links in the front end's colours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageDraw

from .drawn_links import TITLE, Box, curve
from .layout import extent
from .shapes import node_height

WIDTH, EDGE = 512, 10
BACKGROUND, NODE, LINK = "#1c1c1c", "#4a4a4a", "#8899aa"


def plan(workflow: Mapping[str, Any]) -> Image.Image:
    """Draws a workflow file as a map, WIDTH pixels wide."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    left = min(node["pos"][0] for node in nodes.values())
    top = min(node["pos"][1] - TITLE for node in nodes.values())
    width, height = extent(workflow)
    scale = (WIDTH - 2 * EDGE) / width
    picture = Image.new("RGB", (WIDTH, round(height * scale) + 2 * EDGE), BACKGROUND)
    pen = ImageDraw.Draw(picture)

    def place(x: float, y: float) -> tuple[float, float]:
        return EDGE + (x - left) * scale, EDGE + (y - top) * scale

    def draw(box: Box, colour: str) -> None:
        pen.rectangle((*place(*box[:2]), *place(box[0] + box[2], box[1] + box[3])), fill=colour)

    for group in workflow["groups"]:
        draw(group["bounding"], group["color"])
    for _, source, output, target, slot, _ in workflow["links"]:
        (x, y), (wide, _), (a, b) = (
            nodes[source]["pos"],
            nodes[source]["size"],
            nodes[target]["pos"],
        )
        ends = curve((x + wide, y + 14 + 20 * output), (a, b + 14 + 20 * slot))
        pen.line([place(*point) for point in ends], fill=LINK)
    for node in nodes.values():
        (x, y), wide = node["pos"], node["size"][0]
        draw((x, y - TITLE, wide, TITLE + node_height(node)), node.get("bgcolor", NODE))
    return picture
