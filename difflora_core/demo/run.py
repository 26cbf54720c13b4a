"""`make demo`, the main job: in real ComfyUI the photo of a never-seen person becomes a LoRA.

It runs workflows/quickstart_demo.json as an artist would, trains the person's DreamBooth LoRA
beside it for comparison, and leaves a labelled grid and both LoRA files in output/demo/.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..comfy_client import NodeProgress, PromptResult
from ..config import parse_json
from ..storage.image_files import write_image
from ..storage.lora_file import write_lora_file
from ..vision.grid import GridRow, draw_grid
from . import paths
from .comfyui.server import ComfyServer
from .comfyui.workflow_api import workflow_pictures, workflow_to_prompt
from .examples import DREAMBOOTH, dreambooth_lora, other_pictures, reference_picture
from .networks.base import demo_layout, load_base
from .networks.judges import Judges, load_judges

WORKFLOW = paths.ROOT / "workflows" / "quickstart_demo.json"
OUTPUT = paths.ROOT / "output" / "demo"
COLUMNS = 4
"""Pictures in a line of the grid."""
_DREAMBOOTH_FILE = "dreambooth.safetensors"


@dataclass(frozen=True)
class Row:
    """One line of the grid: pictures (N, H, W, 3) in [0, 1] and how long the LoRA took."""

    label: str
    pictures: Tensor
    seconds: float | None = None


def main() -> int:
    """Run the demo; the exit status is 0 when the grid was written."""
    console = Console(highlight=False)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    console.print("Starting ComfyUI ...")
    with ComfyServer(OUTPUT / "comfyui") as server:
        console.print(f"ComfyUI answers after {time.monotonic() - begun:.0f} s")
        rows = _photo_to_pictures(server, console)
        rows.append(_dreambooth(server, console))
    real = other_pictures()
    judges = load_judges(paths.JUDGES)
    table, similarities = Table(title="likeness to other pictures of the person"), []
    for column in ("pictures", "similarity", "photo to LoRA"):
        table.add_column(column)
    rows.append(Row("other real pictures", real.images))
    for row in rows[1:]:
        similarity = likeness(judges, row.pictures, real.images)
        similarities.append(similarity)
        table.add_row(row.label, f"{similarity:.3f}", f"{row.seconds:.2f} s" if row.seconds else "")
    write_image(_grid(rows, [None, *similarities]), OUTPUT / "grid.png")
    console.print(table)
    console.print(f"{OUTPUT / 'grid.png'} and the LoRA files beside it")
    console.print(f"all in all {time.monotonic() - begun:.0f} s")
    return 0


def likeness(judges: Judges, pictures: Tensor, real: Tensor) -> float:
    """Mean cosine of pictures (N, H, W, 3) to the centre of real pictures of the person."""
    size = real.shape[1:3]
    shown = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2), size, mode="area")
    centre = judges.embed(real).mean(0)
    found = judges.embed(shown.permute(0, 2, 3, 1))
    return float(torch.cosine_similarity(found, centre[None]).mean())


def _photo_to_pictures(server: ComfyServer, console: Console) -> list[Row]:
    """The quickstart workflow: reference, base and personalised pictures."""
    workflow = parse_json(WORKFLOW.read_bytes(), WORKFLOW.name)
    for picture in workflow_pictures(workflow):
        server.client.upload_picture(picture)
    prompt = workflow_to_prompt(workflow, server.client.object_info())
    watch = _Watch(console)
    result = server.client.run(prompt, on_progress=watch)
    console.print(f"workflow finished after {result.seconds:.1f} s")
    saved = sorted(server.output_directory.rglob("*.safetensors"))
    if saved:
        shutil.copyfile(saved[-1], OUTPUT / "predicted.safetensors")
    return [
        Row("reference photo", reference_picture()[None]),
        Row("base model, same prompt and seed", _saved(prompt, result, "base")),
        Row("predicted LoRA", _saved(prompt, result, "personalized"), watch.of("Personalize")),
    ]


def _dreambooth(server: ComfyServer, console: Console) -> Row:
    """The same workflow with the LoRA that was trained for this one person."""
    console.print(f"Training the person's DreamBooth LoRA for comparison: {DREAMBOOTH.steps} steps")
    begun = time.monotonic()
    weights = dreambooth_lora(load_base(paths.BASE))
    seconds = time.monotonic() - begun
    layout = demo_layout(DREAMBOOTH.rank, DREAMBOOTH.targets)
    file = write_lora_file(OUTPUT / _DREAMBOOTH_FILE, weights, layout)
    folder = server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / _DREAMBOOTH_FILE)
    workflow = parse_json(WORKFLOW.read_bytes(), WORKFLOW.name)
    prompt = workflow_to_prompt(workflow, server.client.object_info())
    result = server.client.run(_with_lora_file(prompt), on_progress=_Watch(console))
    return Row("DreamBooth LoRA, 8 pictures", _saved(prompt, result, "personalized"), seconds)


def _with_lora_file(prompt: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The prompt with core's file loader where it applied the predicted LoRA."""
    changed: dict[str, dict[str, Any]] = {}
    for node, entry in prompt.items():
        if entry["class_type"] == "LoraModelLoader":
            inputs = {
                "model": entry["inputs"]["model"],
                "lora_name": _DREAMBOOTH_FILE,
                "strength_model": 1.0,
            }
            changed[node] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        elif entry["class_type"] != "SaveLoRA":
            changed[node] = dict(entry)
    return changed


def _saved(prompt: Mapping[str, Mapping[str, Any]], result: PromptResult, name: str) -> Tensor:
    """Pictures of the SaveImage node whose file prefix ends in `name`."""
    for node, entry in prompt.items():
        prefix = str(entry["inputs"].get("filename_prefix", ""))
        if entry["class_type"] == "SaveImage" and prefix.endswith(name):
            return torch.from_numpy(np.stack(result.pictures[node])[..., :3]).float() / 255
    raise KeyError(f"the workflow saves no pictures under {name}")


class _Watch:
    """Prints a line per node as it runs and remembers how long each took."""

    def __init__(self, console: Console) -> None:
        self.console, self.node, self.begun = console, "", time.monotonic()
        self.seconds: dict[str, float] = {}

    def __call__(self, step: NodeProgress) -> None:
        now = time.monotonic()
        key = f"{step.node_type} ({step.node_id})"
        if key != self.node:
            self._close(now)
            self.node, self.begun = key, now
        self.seconds[key] = now - self.begun
        if step.maximum > 1 and self.console.is_terminal:
            self.console.print(f"  {key}: {step.value:g} of {step.maximum:g}", end="\r")

    def of(self, name: str) -> float | None:
        """Seconds of the node whose type holds `name`."""
        return next((s for key, s in self.seconds.items() if name in key), None)

    def _close(self, now: float) -> None:
        if self.node:
            self.seconds[self.node] = now - self.begun
            self.console.print(f"  {self.node}: {self.seconds[self.node]:.2f} s      ")


def _grid(rows: list[Row], similarities: list[float | None]) -> Tensor:
    """Labelled rows of up to four pictures."""
    lines = []
    for row, similarity in zip(rows, similarities, strict=True):
        words = row.label if similarity is None else f"{row.label}: similarity {similarity:.2f}"
        words += f", LoRA in {row.seconds:.2f} s" if row.seconds else ""
        lines.append(GridRow(list(row.pictures[:COLUMNS]), words))
    return draw_grid(lines)


if __name__ == "__main__":
    raise SystemExit(main())
