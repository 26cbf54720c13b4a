"""Writes the files in workflows/: `python -m difflora_core.demo.workflows.writer [NAME ...]`.

Every graph is drawn once for the demo and once for SDXL. The demo files are run in real ComfyUI and
their thumbnails are cut from what they made; those for SDXL show the graph. Without names all of
them are written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from ... import __version__
from ...comfy_client import PromptResult
from ...storage.atomic import write_text
from .. import paths
from ..comfyui.server import ComfyServer
from ..examples import write_photos
from ..world.concept_examples import write_concept_photos
from ..world.shipped_styles import write_style_photos
from .builder import Graph
from .concepts import concept_person, one_concept, teach_concept, two_concepts
from .hyperlora import hyperlora_portrait
from .identities import blend, fade_in, invented, pose, prompt_grid
from .library import compress_lora, library
from .needs import files_to_bring, what_is_missing
from .people import (
    edit_face,
    people_by_words,
    portrait,
    quickstart,
    several_photos,
    two_people,
)
from .plan import plan
from .runner import run_workflow
from .styles import apply_style, distil_checkpoint, few_shot_style, para_style, style_person
from .targets import DEMO, GRID_SIDE, SDXL, Target
from .training import refine_person, train_person

FOLDER = paths.ROOT / "workflows"
WORKFLOWS: dict[str, Callable[[Graph, Target], None]] = {
    "quickstart": quickstart,
    "portrait": portrait,
    "several_photos": several_photos,
    "blend": blend,
    "invented_person": invented,
    "two_people": two_people,
    "people_by_words": people_by_words,
    "fade_in": fade_in,
    "controlnet_pose": pose,
    "inpaint_face": edit_face,
    "prompt_grid": prompt_grid,
    "library": library,
    "compress_lora": compress_lora,
    "train_person": train_person,
    "refine_person": refine_person,
    "teach_concept": teach_concept,
    "one_concept": one_concept,
    "two_concepts": two_concepts,
    "concept_person": concept_person,
    "apply_style": apply_style,
    "style_person": style_person,
    "few_shot_style": few_shot_style,
    "para_style": para_style,
    "distil_checkpoint": distil_checkpoint,
}
"""In the order in which an artist may want to meet them."""
FULL_SIZE_ALONE: dict[str, Callable[[Graph, Target], None]] = {
    "hyperlora_portrait": hyperlora_portrait,
}
"""Workflows that the demo world has no model for."""
THUMBNAIL = 384


def build(name: str, target: Target, info: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a workflow file.

    Args:
        name: a key of WORKFLOWS, or of FULL_SIZE_ALONE for SDXL.
        target: DEMO or SDXL.
        info: ComfyUI's /object_info.
    """
    graph = Graph(target.file(name), info, __version__)
    draw = {**WORKFLOWS, **FULL_SIZE_ALONE}[name]
    draw(graph, target)
    if target is SDXL:
        graph.note_first(files_to_bring(graph.nodes))
        for group in graph.groups:
            missing = what_is_missing(group.in_order)
            group.title += f": {missing}" if missing else ""
    return graph.build()


def to_text(workflow: Mapping[str, Any]) -> str:
    """The file's text: readable, one line per small list."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def thumbnail(workflow: Mapping[str, Any], result: PromptResult) -> Image.Image:
    """The comparison grid if there is one, else the first saved pictures; about square."""
    kinds = {node["id"]: node["type"] for node in workflow["nodes"]}
    sources = {link[3]: kinds[link[1]] for link in workflow["links"]}
    saved = [number for number, kind in kinds.items() if kind == "SaveImage"]
    grids = [number for number in saved if sources[number] == "DiffLoRA_CompareGrid"]
    shown = [p[..., :3] for p in result.pictures[str((grids or saved)[0])][:4]]
    if len(shown) == 4:
        shown = [np.concatenate(shown[:2], 1), np.concatenate(shown[2:], 1)]
        sheet = np.concatenate(shown, 0)
    else:
        sheet = np.concatenate(shown, 1)
    if grids and sheet.shape[1] > 3 * sheet.shape[0]:
        sheet = _folded(sheet)
    picture = Image.fromarray(sheet)
    picture.thumbnail((2 * THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return picture


def _folded(strip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A long row of a grid's pictures as two rows."""
    left = -(-strip.shape[1] // (2 * GRID_SIDE)) * GRID_SIDE
    second = strip[:, left:]
    gap = np.full((strip.shape[0], 2 * left - strip.shape[1], 3), 255, np.uint8)
    return np.concatenate([strip[:, :left], np.concatenate([second, gap], 1)], 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    known = [*WORKFLOWS, *FULL_SIZE_ALONE]
    parser = argparse.ArgumentParser(description="Write the workflow files.")
    parser.add_argument("names", nargs="*", choices=[[], *known], help="only these")
    names = parser.parse_args(arguments).names or known
    console = Console(highlight=False)
    write_photos(FOLDER)
    write_concept_photos(FOLDER)
    write_style_photos(FOLDER)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        for name in names:
            write_full_size(name, server)
            if name in WORKFLOWS:
                console.print(f"{name}: {write(name, server):.1f} s")
    return 0


def write(name: str, server: ComfyServer) -> float:
    """Write the demo's file of a workflow and what it drew; returns how long that took."""
    path = FOLDER / f"{DEMO.file(name)}.json"
    workflow = build(name, DEMO, server.client.object_info())
    write_text(path, to_text(workflow))
    result = run_workflow(server, path)
    thumbnail(workflow, result).save(_thumbnail_path(path.stem), quality=88)
    return result.seconds


def write_full_size(name: str, server: ComfyServer) -> None:
    """Write the SDXL file of a workflow, with a picture of its graph.

    What the demo draws would promise the look of another model.
    """
    stem = SDXL.file(name)
    workflow = build(name, SDXL, server.client.object_info())
    write_text(FOLDER / f"{stem}.json", to_text(workflow))
    plan(workflow).save(_thumbnail_path(stem), quality=88)


def _thumbnail_path(stem: str) -> Path:
    return FOLDER / f"{stem}.jpg"


if __name__ == "__main__":
    raise SystemExit(main())
