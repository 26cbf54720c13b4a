"""`make bench name=overhead args='--quick --perfusion --json FILE'`: the price in sampling.

Real ComfyUI, one server, the demo world's base on the CPU. Every round samples once in each way,
in an order that rotates, so that a machine that gets slower slows every row; ratios to the plain
base are taken within a round. Only the steps are timed: loading and patching come before them.
`ratio` is wall time, `cpu_ratio` the server's own processor time, which other programs on the
machine disturb less. `base_again` is the base a second time: the noise of the measurement.
--perfusion measures taught words instead, on a full-size SDXL UNet (concept_price.py).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from difflora_core.demo.comfyui.client import Progress
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.examples import reference_picture
from difflora_core.demo.workflows.masked_people import PERSONALIZE
from difflora_core.evaluation.report import Report
from difflora_core.storage.image_files import write_image

from ..command import (
    benchmark_console,
    command_parser,
    commit,
    machine,
    set_threads,
    write_report,
)
from .concept_price import price

STEPS, BATCH = 10, 2
ROUNDS, QUICK_ROUNDS = 25, 7
BASE = "base"
_MODEL, _CLIP, _VAE = (["demo", output] for output in range(3))
_PLAIN = (["words", 0], ["nothing", 0])
ROWS: Mapping[str, tuple[Any, tuple[Any, Any]]] = {
    BASE: (_MODEL, _PLAIN),
    "base_again": (_MODEL, _PLAIN),
    "lora_patch": (["patched", 0], _PLAIN),
    "lora_timed": (["timed", 0], _PLAIN),
    "lora_hook": (_MODEL, (["hooked", 0], ["hooked", 1])),
    "lora_hook_positive": (_MODEL, (["hooked", 0], ["nothing", 0])),
    "two_hooks_by_mask": (_MODEL, (["people", 0], ["people", 1])),
}
"""Name to model, and positive and negative prompt."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("The price of a LoRA while sampling.", threads=None)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument(
        "--perfusion", action="store_true", help="concepts on full-size SDXL instead"
    )
    options = parser.parse_args(arguments)
    console, rounds = benchmark_console(), QUICK_ROUNDS if options.quick else ROUNDS
    if options.perfusion:
        set_threads(1)
        report = Report(price(rounds), {"rounds": rounds, "commit": commit(), "machine": machine()})
        return finish(report, options.json, console)
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        times = measure(server, rounds)
    facts = {"rounds": rounds, "steps": STEPS, "batch": BATCH, "quick": options.quick}
    facts |= {"commit": commit(), "machine": machine()}
    return finish(Report(table(times), facts), options.json, console)


def finish(report: Report, path: Path | None, console: Console) -> int:
    """Print the table, and write it where asked to."""
    console.print(report.to_markdown({"seconds_per_step": 4, "projections": 0}))
    write_report(report, path, console)
    return 0


@dataclass
class Watch:
    """Notes when the sampler's steps end, and how much processor time the server has used."""

    server: psutil.Process
    steps: list[tuple[float, float, float]] = field(default_factory=list)

    def __call__(self, step: Progress) -> None:
        if step.node_type == "KSampler" and step.value:
            used = self.server.cpu_times()
            self.steps.append((step.value, time.perf_counter(), used.user + used.system))

    def per_step(self) -> tuple[float, float]:
        """Wall and processor seconds of a step, without the first one."""
        (first, *begun), (last, *ended) = self.steps[0], self.steps[-1]
        wall, processor = ((b - a) / (last - first) for a, b in zip(begun, ended, strict=True))
        return wall, processor


def measure(server: ComfyServer, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds per step of every row, round by round; a first round warms up."""
    picture = server.base_directory / "person.png"
    write_image(reference_picture(), picture)
    photo = server.client.upload_picture(picture)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
    names = list(ROWS)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            watch = Watch(psutil.Process(server.pid))
            # A seed of its own, or equal rows would come out of ComfyUI's cache.
            seed = number * len(names) + names.index(name)
            server.client.run(prompt(photo, name, seed), on_progress=watch)
            if number:
                times[name].append(watch.per_step())
    return times


def table(times: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds; ratios are taken within a round first."""
    rows = {}
    for name, values in times.items():
        pairs = list(zip(values, times[BASE], strict=True))
        rows[name] = {
            "seconds_per_step": statistics.median(wall for wall, _ in values),
            "ratio": statistics.median(own[0] / base[0] for own, base in pairs),
            "cpu_ratio": statistics.median(own[1] / base[1] for own, base in pairs),
        }
    return rows


def prompt(photo: str, row: str, seed: int) -> dict[str, dict[str, Any]]:
    """The graph of one row."""
    model, (positive, negative) = ROWS[row]
    half = {"width": 32, "height": 64}
    nodes = {
        "demo": _node("DiffLoRA_LoadDemo"),
        "photo": _node("LoadImage", image=photo),
        "lora": _node("DiffLoRA_Personalize", images=["photo", 0], **PERSONALIZE),
        "patched": _node("DiffLoRA_ApplyLoRA", **_WHOLE),
        "timed": _node("DiffLoRA_ApplyLoRA", **_WHOLE | {"end_percent": 0.999}),
        "hook": _node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=1.0),
        "other": _node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=0.5),
        "words": _node("CLIPTextEncode", clip=_CLIP, text="photo of a person"),
        "nothing": _node("CLIPTextEncode", clip=_CLIP, text=""),
        "black": _node("SolidMask", value=0.0, width=64, height=64),
        "white": _node("SolidMask", value=1.0, **half),
        "left": _masked(0),
        "right": _masked(half["width"]),
        "hooked": _node("PairConditioningSetProperties", **_NEW, hooks=["hook", 0]),
        "one": _node("PairConditioningSetProperties", **_NEW, hooks=["hook", 0], mask=["left", 0]),
        "people": _node(
            "PairConditioningSetPropertiesAndCombine",
            **_NEW,
            positive=["one", 0],
            negative=["one", 1],
            hooks=["other", 0],
            mask=["right", 0],
        ),
        "empty": _node("EmptyLatentImage", width=64, height=64, batch_size=BATCH),
        "pixels": _node("VAEDecode", samples=["sampler", 0], vae=_VAE),
        "show": _node("PreviewImage", images=["pixels", 0]),
    }
    nodes["sampler"] = _node(
        "KSampler", model=model, positive=positive, negative=negative, seed=seed, **_SAMPLING
    )
    return nodes


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _masked(x: int) -> dict[str, Any]:
    """Half of the picture, from column x on."""
    where = {"destination": ["black", 0], "source": ["white", 0], "x": x, "y": 0}
    return _node("MaskComposite", **where, operation="add")


_PARTS = ("input_blocks", "middle_block", "output_blocks", "self_attention", "cross_attention")
_WHOLE = {
    "model": _MODEL,
    "lora": ["lora", 0],
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "positive_only": False,
    **dict.fromkeys(_PARTS, 1.0),
}
_NEW = {
    "positive_NEW": ["words", 0],
    "negative_NEW": ["nothing", 0],
    "strength": 1.0,
    "set_cond_area": "default",
}
_SAMPLING = {
    "latent_image": ["empty", 0],
    "steps": STEPS,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "normal",
    "denoise": 1.0,
}
