"""Draws docs/pictures/ anew: `make pictures`, from runs of the demo's workflows in real ComfyUI."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from ...comfy_client import PromptResult
from .. import paths
from ..comfyui.server import ComfyServer
from .runner import read_workflow, run_workflow
from .targets import GRID_SIDE

WORKFLOWS = paths.ROOT / "workflows"
FOLDER = paths.ROOT / "docs" / "pictures"
SIDE, GAP, LABEL, FONT_SIZE = 176, 8, 26, 15
"""Pixels: height of a picture, between pictures, height of a line of labels, height of its font."""

Place = tuple[str, str | tuple[str, int]]
"""A label, and what stands above it: a file in workflows/, or one picture of a Save Image node,
by the end of its prefix and its number. A grid counts as the pictures in it."""


@dataclass(frozen=True)
class Strip:
    """A picture of the documentation: `workflow` that draws it, `rows` of places."""

    workflow: str
    rows: Sequence[Sequence[Place]]


STRIPS = {
    "quickstart": Strip(
        "quickstart_demo",
        [
            [
                ("the photo", "difflora_demo_person.png"),
                *[("with the LoRA", ("personalized", k)) for k in range(4)],
            ],
            [("", ""), *[("the base model", ("base", k)) for k in range(4)]],
        ],
    ),
    "two_people": Strip(
        "two_people_demo",
        [
            [
                ("first photo", "difflora_demo_person.png"),
                ("second photo", "difflora_demo_second_person.png"),
                ("each LoRA in a mask of its own", ("two_people", 0)),
                ("both LoRAs on the whole picture", ("two_people_without_masks", 0)),
            ]
        ],
    ),
    "invented_person": Strip(
        "invented_person_demo",
        [
            [
                (label, ("invented", k))
                for k, label in enumerate(
                    ("photo, smiling", "photo, surprised", "cartoon, a cup", "painting, sad")
                )
            ]
        ],
    ),
    "blend": Strip(
        "blend_demo",
        [
            [
                (label, ("from_a_to_b", k))
                for k, label in enumerate(("A", "3/4 A", "half A, half B", "3/4 B", "B"))
            ]
        ],
    ),
    "taught_word": Strip(
        "teach_concept_demo",
        [
            [(f"picture {k} of the hat", f"difflora_demo_hat_{k}.png") for k in (1, 2, 3)]
            + [("wearing a <my-hat>", ("taught_word", k)) for k in range(3)]
        ],
    ),
}
"""File name without suffix to what is in it."""


def saved_pictures(
    workflow: Mapping[str, Any], result: PromptResult
) -> dict[tuple[str, int], Image.Image]:
    """What the workflow's Save Image nodes saved, by the end of their prefix and by number."""
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    sources = {link[3]: kinds[link[1]] for link in workflow["links"]}
    found: dict[tuple[str, int], Image.Image] = {}
    for node in workflow["nodes"]:
        if node["type"] != "SaveImage":
            continue
        name = node["widgets_values"][0].rsplit("/")[-1]
        pictures = [Image.fromarray(p[..., :3]) for p in result.pictures[str(node["id"])]]
        if sources[node["id"]] == "DiffLoRA_CompareGrid":
            grid = pictures[0]
            lefts = range(0, grid.width, GRID_SIDE)
            pictures = [grid.crop((left, 0, left + GRID_SIDE, GRID_SIDE)) for left in lefts]
        found |= {(name, number): picture for number, picture in enumerate(pictures)}
    return found


def draw(strip: Strip, saved: Mapping[tuple[str, int], Image.Image]) -> Image.Image:
    """Rows of labelled pictures of equal height, enlarged smoothly."""
    rows = [[_place(what, saved) for _, what in row] for row in strip.rows]
    width = max(sum(p.width for p in row) + GAP * (len(row) - 1) for row in rows)
    height = len(rows) * (SIDE + LABEL)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for top, row, pictures in zip(range(0, height, SIDE + LABEL), strip.rows, rows, strict=True):
        left = 0
        for (label, _), picture in zip(row, pictures, strict=True):
            sheet.paste(picture, (left, top))
            pen.text((left + 2, top + SIDE + 4), label, "black", font)
            left += picture.width + GAP
    return sheet


def _place(
    what: str | tuple[str, int], saved: Mapping[tuple[str, int], Image.Image]
) -> Image.Image:
    """One picture at the height of its row; white where there is none."""
    if not what:
        return Image.new("RGB", (SIDE, SIDE), "white")
    picture = Image.open(WORKFLOWS / what) if isinstance(what, str) else saved[what]
    size = (SIDE * picture.width // picture.height, SIDE)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def main() -> int:
    """Runs the workflows and writes the pictures."""
    console = Console(highlight=False)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        for name, strip in STRIPS.items():
            path = WORKFLOWS / f"{strip.workflow}.json"
            saved = saved_pictures(read_workflow(path), run_workflow(server, path))
            draw(strip, saved).save(FOLDER / f"{name}.jpg", quality=90)
            console.print(f"docs/pictures/{name}.jpg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
