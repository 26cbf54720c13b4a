"""Writes the files in workflows/: `python -m difflora_core.demo.workflow_files [NAME ...]`.

Every graph is drawn once for the demo and once for SDXL; the demo files are run in real ComfyUI and
their thumbnails are cut from what they made. Without names all of them are written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
from PIL import Image
from rich.console import Console

from . import paths
from .comfy_client import PromptResult
from .comfy_server import ComfyServer
from .examples import write_photos
from .workflow_builder import Graph
from .workflow_graphs import edit_face, portrait, quickstart, several_photos, two_people
from .workflow_identities import blend, fade_in, invented, pose, prompt_grid
from .workflow_library import compress_lora, library
from .workflow_worlds import DEMO, SDXL, World
from .workflows import run_workflow

FOLDER = paths.ROOT / "workflows"
WORKFLOWS: dict[str, Callable[[Graph, World], None]] = {
    "quickstart": quickstart,
    "portrait": portrait,
    "several_photos": several_photos,
    "blend": blend,
    "invented_person": invented,
    "two_people": two_people,
    "fade_in": fade_in,
    "controlnet_pose": pose,
    "inpaint_face": edit_face,
    "prompt_grid": prompt_grid,
    "library": library,
    "compress_lora": compress_lora,
}
"""In the order in which an artist may want to meet them."""
THUMBNAIL = 384


def build(name: str, world: World, info: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a workflow file.

    Args:
        name: a key of WORKFLOWS.
        world: DEMO or SDXL.
        info: ComfyUI's /object_info.
    """
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    graph = Graph(world.file(name), info, project["version"])
    WORKFLOWS[name](graph, world)
    return graph.build()


def to_text(workflow: Mapping[str, Any]) -> str:
    """The file's text: readable, one line per small list."""
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def thumbnail(workflow: Mapping[str, Any], result: PromptResult) -> Image.Image:
    """What the first saving node made, side by side, at most 384 pixels wide or high."""
    saved = [n["id"] for n in workflow["nodes"] if n["type"] == "SaveImage"]
    pictures = [p[..., :3] for node in saved for p in result.pictures.get(str(node), [])[:2]]
    shapes = {p.shape for p in pictures}
    sheet = Image.fromarray(np.concatenate(pictures[:2], 1) if len(shapes) == 1 else pictures[0])
    sheet.thumbnail((2 * THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the workflow files.")
    parser.add_argument("names", nargs="*", choices=[[], *WORKFLOWS], help="only these")
    names = parser.parse_args(arguments).names or list(WORKFLOWS)
    console = Console(highlight=False)
    write_photos(FOLDER)
    with ComfyServer(paths.ROOT / "output" / "workflows") as server:
        for name in names:
            seconds = write(name, server)
            console.print(f"{name}: {seconds:.1f} s")
    return 0


def write(name: str, server: ComfyServer) -> float:
    """Write both files of a workflow and both thumbnails; returns how long the demo ran."""
    info = server.client.object_info()
    for world in (SDXL, DEMO):
        path = FOLDER / f"{world.file(name)}.json"
        workflow = build(name, world, info)
        path.write_text(to_text(workflow), encoding="utf-8")
    result = run_workflow(server, path)
    picture = thumbnail(workflow, result)
    for world in (SDXL, DEMO):
        picture.save(_thumbnail_path(world.file(name)), quality=88)
    return result.seconds


def _thumbnail_path(stem: str) -> Path:
    return FOLDER / f"{stem}.jpg"


if __name__ == "__main__":
    raise SystemExit(main())
