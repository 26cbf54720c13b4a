"""`make full-size-road`, also `make bench name=road`: from photos to a model in ComfyUI.

The second part of `make full-size`. The commands that an artist calls, one after another, on a
random SDXL checkpoint and drawn portraits: prepare 8 people, a corpus of 8 LoRAs of 2 steps, both
methods of train at 2 steps, generate, and the exported model in `sdxl_quickstart`, at 256 pixels.
What is asked: does the road hold, how long and how much memory does each stage take. A stopped run
goes on; nothing here says how good a model is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional as F

from difflora_core.demo import paths
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.workflows.needs import SDXL_FILES
from difflora_core.demo.workflows.targets import SDXL_FACES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.errors import DiffLoRAError
from difflora_core.storage.atomic import write_text
from difflora_core.storage.image_files import write_image

from ..command import benchmark_console, command_parser, commit, machine
from .sdxl import graphs
from .sdxl.files import build
from .workflows import COMFYUI, FOLDER, MEMORY, Harness

PEOPLE, PHOTOS, STEPS = 8, 3, 2
LIMIT_MINUTES, LIMIT_GB = 90, 20
MODEL = "difflora-road.safetensors"
WORKFLOW = "sdxl_quickstart"
EVERY = 0.5
"""Seconds between two looks at a stage's memory."""
_LOOPS = ("likeness", "functional-loop", "lae.loop", "dit.loop")


@dataclass(frozen=True)
class Place:
    """What a road leads through.

    `base`: the demo's, or a checkpoint; `faces`, `clip_vision`: of the photos; `side`: in pixels.
    """

    base: str
    faces: Path
    clip_vision: Path
    side: int


@dataclass(frozen=True)
class Stage:
    """What a stage took: `gigabytes` is the most memory of its processes together."""

    name: str
    seconds: float
    gigabytes: float


class StageFailed(DiffLoRAError):
    """A command of the road did not end well."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is 0 when the road held within its limits."""
    options = _options(arguments)
    console = benchmark_console()
    folder = options.folder / "road"
    if options.remove:
        shutil.rmtree(folder, ignore_errors=True)
        (options.folder / "models" / "difflora" / MODEL).unlink(missing_ok=True)
        console.print(f"removed {folder}")
        return 0
    os.environ.update(MEMORY)
    build(options.folder, options.side, console.print)
    models = options.folder / "models"
    place = Place(
        str(models / "checkpoints" / SDXL_FILES["checkpoints"][0]),
        models / "insightface" / "models" / SDXL_FACES,
        models / "clip_vision" / SDXL_FILES["clip_vision"][0],
        options.side,
    )
    stages = walk(place, folder, lambda stage: console.print(line(stage), markup=False))
    stages.append(in_comfyui(folder, options.folder, options.side))
    console.print(table(stages), markup=False)
    minutes, peak = totals(stages)
    good = minutes <= LIMIT_MINUTES and peak <= LIMIT_GB
    held = "within" if good else "NOT within"
    console.print(
        f"{minutes:.0f} minutes, {peak:.1f} GB: {held} {LIMIT_MINUTES} minutes and {LIMIT_GB} GB; "
        f"{machine()}"
    )
    if options.json:
        rows = {stage.name: [stage.seconds, stage.gigabytes] for stage in stages}
        facts = {"stages": rows, "side": options.side, "commit": commit(), "machine": machine()}
        write_text(options.json, json.dumps(facts, indent=1) + "\n")
    return 0 if good else 1


def walk(place: Place, folder: Path, say: Callable[[Stage], None]) -> list[Stage]:
    """Every command of the road, in order.

    Args:
        place: what it leads through.
        folder: where everything lands.
        say: told of each stage when it is through.

    Raises:
        StageFailed: a command ended with a fault; it says which.
    """
    draw_photos(folder / "photos", place.side)
    stages = []
    for name, words in commands(place, folder):
        stages.append(measured(name, words, folder / f"{name.replace(' ', '-')}.log"))
        say(stages[-1])
    return stages


def commands(place: Place, folder: Path) -> list[tuple[str, list[str]]]:
    """Name and words of each command."""
    dataset, corpus, run = (str(folder / name) for name in ("dataset", "corpus", "run"))
    faces, clip = str(place.faces), str(place.clip_vision)
    model, photo = f"{run}/difflora-model.safetensors", folder / "photos" / "p0" / "0.png"
    prepare = ["prepare", str(folder / "photos"), dataset, "--faces", faces, "--workers", "1"]
    prepare += ["--resolution", str(place.side), "--framing", "face", "--encoding", "png"]
    prepare += ["--smallest-face", "8", "--choices.same-person", "0.2", "--smallest", "16"]
    make = ["corpus", dataset, corpus, "--base", place.base, "--group", "2"]
    make += [
        "--training.steps",
        str(STEPS),
        "--training.warmup",
        "1",
        "--training.precision",
        "bf16",
    ]
    train = ["train", dataset, run, "--base", place.base, "--clip-vision", clip]
    train += ["--method", "both", "--corpus", corpus, "--held-out", "0", "--samples", "0"]
    for loop in _LOOPS:
        train += [f"--{loop}.steps", str(STEPS), f"--{loop}.warmup", "1", f"--{loop}.ema", "0"]
    train += ["--functional.batch", "2", "--functional-loop.accumulate", "2"]
    train += ["--functional-loop.precision", "bf16", "--functional-loop.checkpointing"]
    train += ["--lae.batch", "2", "--dit.batch", "4"]
    out = str(folder / "person.safetensors")
    generate = ["generate", model, str(photo), "--out", out, "--faces", faces]
    generate += ["--clip-vision", clip]
    named = (("prepare", prepare), ("corpus", make), ("train", train), ("generate", generate))
    return [(name, words) for name, words in named]


def measured(name: str, words: Sequence[str], log: Path) -> Stage:
    """Runs a command; what it says goes to a file.

    Raises:
        StageFailed: its exit status is not 0.
    """
    begun, most = time.monotonic(), 0
    with log.open("w") as said:
        started = subprocess.Popen(
            [sys.executable, "-m", "difflora_core", *words],
            cwd=paths.ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            while started.poll() is None:
                most = max(most, _memory(started.pid))
                time.sleep(EVERY)
        finally:
            if started.poll() is None:
                started.terminate()
                started.wait()
    if started.returncode:
        end = " ".join(log.read_text().splitlines()[-3:])
        raise StageFailed(f"{name} failed with {started.returncode}: {end} (all of it: {log})")
    return Stage(name, time.monotonic() - begun, most / 1e9)


def _memory(pid: int) -> int:
    """Bytes in memory of a process and of those that it started."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in family)
    except psutil.Error:  # it has just ended
        return 0


def in_comfyui(folder: Path, base: Path, side: int) -> Stage:
    """The exported model in the quickstart workflow; its LoRA has to change the picture.

    Raises:
        StageFailed: the workflow failed, or the picture stayed as it was.
    """
    shutil.copy(folder / "run" / "difflora-model.safetensors", base / "models" / "difflora" / MODEL)
    with ComfyServer(base, arguments=COMFYUI) as server:
        harness = Harness(server, graphs.base_prompt(SDXL_FILES["checkpoints"][0], side), side)
        prompt = with_model(graphs.small_prompt(WORKFLOW, harness.info, side), MODEL)
        row = harness.row(WORKFLOW, prompt)
    if row.problem or not row.changed or row.restored is False:
        raise StageFailed(f"{WORKFLOW}: {row.problem or 'the picture did not change as it should'}")
    return Stage(WORKFLOW, sum(row.seconds.values()), row.peak_gb)


def with_model(prompt: Mapping[str, Any], name: str) -> graphs.Prompt:
    """A prompt that loads another DiffLoRA model."""
    return {
        key: {**node, "inputs": {**node["inputs"], "model_name": name}}
        if node["class_type"] == "DiffLoRA_LoadModel"
        else node
        for key, node in prompt.items()
    }


def draw_photos(folder: Path, side: int) -> None:
    """A folder of drawn portraits for each person, enlarged, with captions."""
    for who, seed in enumerate(split_seeds("train", PEOPLE, 500)):
        own = render_portraits([seed] * PHOTOS, range(PHOTOS), looks=("photo",))
        planes = own.images.movedim(-1, 1)
        large = F.interpolate(planes, (side, side), mode="bicubic").clamp(0, 1).movedim(1, -1)
        for number, image in enumerate(large):
            path = folder / f"p{who}" / f"{number}.png"
            if not path.exists():
                write_image(image.to(torch.float32), path)
                write_text(path.with_suffix(".txt"), own.captions[number])


def line(stage: Stage) -> str:
    """One stage for who waits."""
    return f"{stage.name}: {stage.seconds:.0f} s, {stage.gigabytes:.1f} GB"


def table(stages: Sequence[Stage]) -> str:
    """All stages in Markdown."""
    rows = [f"| {s.name} | {s.seconds:.0f} | {s.gigabytes:.1f} |" for s in stages]
    return "\n".join(["| stage | seconds | peak GB |", "|---|---|---|", *rows])


def totals(stages: Sequence[Stage]) -> tuple[float, float]:
    """Minutes of all, and the most memory of one."""
    minutes = sum(stage.seconds for stage in stages) / 60
    return minutes, max(stage.gigabytes for stage in stages)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("From photos to a model in ComfyUI, at full size.", threads=None)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the random files")
    parser.add_argument("--side", type=int, default=graphs.SIDE, help="of pictures, in pixels")
    parser.add_argument("--remove", action="store_true", help="delete what was made, and end")
    return parser.parse_args(arguments)
