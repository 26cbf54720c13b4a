"""Train Identity LoRA and core's Train LoRA in one ComfyUI: seconds a step, memory, loss.

One person, the same photos, prompt, rank, batch, rate and precision, no gradient checkpointing.
Each trainer runs for several lengths at a constant rate: the slope of the seconds is the price of a
step, and what each length leaves is judged alike, by the denoising loss on pictures of the person
that neither has seen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.evaluation.report import Report
from difflora_core.lora.formats.state_dict import from_state_dict
from difflora_core.lora.layout import unet_name_map
from difflora_core.lora.weights import LoRAWeights
from difflora_core.storage.image_files import write_image
from difflora_core.storage.lora_file import read_lora_file

from ..comfyui_run import Measured, run
from .drawing import PictureSampler, unseen_latents
from .experiment import Experiment
from .people import PHOTOS, RealPictures

PROMPT = "photo of a person"
LENGTHS, QUICK_LENGTHS = (10, 50, 100, 200), (10, 30, 60)
RANK, BATCH, RATE = 4, 4, 0.001
OURS = "DiffLoRA_TrainLoRA"
CORE = "TrainLoraNode"
TRAINERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ours, attention": (OURS, {"layers": "attention"}),
    "ours, all layers": (OURS, {"layers": "all"}),
    "core, weights patched": (CORE, {"bypass_mode": False}),
    "core, bypass": (CORE, {"bypass_mode": True}),
}
_COMMON = {
    OURS: {
        "captions": PROMPT,
        "trigger": "",
        "file_name": "trained",
        "factors": "both",
        "schedule": "constant",
        "loss": "uniform",
        "even_steps": False,
        "resolution": 0,
        "mirror": False,
        "held_out": 0,
        "prior_weight": 1.0,
        "prior_prompt": PROMPT,
        "on_missing_face": "skip",
        "face_order": "largest",
        "face_index": 0,
        "accumulate": 1,
        "memory": "fast",
    },
    CORE: {
        "grad_accumulation_steps": 1,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
    },
}
"""Widgets of each node beside those of TRAINERS and the shared ones."""


def compare_trainers(
    experiment: Experiment, quick: bool, console: Console
) -> dict[str, dict[str, float]]:
    """A row for each trainer; prints the table."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    judge = _Judge(experiment)
    rows: dict[str, dict[str, float]] = {"base": {"loss at 0": judge.loss(None)}}
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        photos = upload_photos(server, experiment)
        info = server.client.object_info()
        for name, (kind, own) in TRAINERS.items():
            seconds, rows[name] = [], {}
            for steps in lengths:
                server.client.free()
                done = run(server, prompt(photos, kind, own, steps), info)
                seconds.append(done.seconds[kind])
                weights = _written(server, experiment)
                rows[name][f"loss at {steps}"] = judge.loss(weights)
            rows[name] |= {"seconds_per_step": slope(lengths, seconds), **_sizes(done, weights)}
            console.print(f"{name}: {rows[name]['seconds_per_step']:.2f} s a step")
    digits = {"layers": 0, "peak_gb": 2, **{f"loss at {n}": 4 for n in (0, *lengths)}}
    console.print(Report(rows).to_markdown(digits))
    return rows


def slope(lengths: tuple[int, ...], seconds: list[float]) -> float:
    """Seconds a step: the least-squares slope, so that what is done once does not count."""
    return float(np.polyfit(lengths, seconds, 1)[0])


def prompt(
    photos: list[str], kind: str, own: Mapping[str, Any], steps: int
) -> dict[str, dict[str, Any]]:
    """The graph of one training; its LoRA is saved by core's node."""
    nodes: dict[str, dict[str, Any]] = {"demo": _node("DiffLoRA_LoadDemo")}
    last: list[Any] = []
    for number, photo in enumerate(photos):
        nodes[f"photo{number}"] = _node("LoadImage", image=photo)
        if number:
            pair = {"image1": last, "image2": [f"photo{number}", 0]}
            nodes[f"batch{number}"] = _node("ImageBatch", **pair)
        last = [f"batch{number}" if number else "photo0", 0]
    shared = {"model": ["demo", 0], "steps": steps, "rank": RANK, "batch_size": BATCH}
    shared |= {"learning_rate": RATE, "seed": 0, **_COMMON[kind], **own}
    if kind == OURS:
        shared |= {"clip": ["demo", 1], "vae": ["demo", 2], "images": last}
    else:
        nodes["latents"] = _node("VAEEncode", pixels=last, vae=["demo", 2])
        nodes["words"] = _node("CLIPTextEncode", clip=["demo", 1], text=PROMPT)
        shared |= {"latents": ["latents", 0], "positive": ["words", 0]}
    nodes["train"] = _node(kind, **shared)
    nodes["save"] = _node("SaveLoRA", lora=["train", 0], prefix="loras/trained", steps=0)
    return nodes


class _Judge:
    """The denoising loss on unseen pictures of the first person."""

    def __init__(self, experiment: Experiment) -> None:
        base, seeds = experiment.artefacts.base, experiment.people.seeds[:1]
        self.base = base
        self.names = {ldm: path for path, ldm in unet_name_map(dict(base.unet.config)).items()}
        pictures = experiment.people.unseen
        own = RealPictures(pictures.images[:1], pictures.captions[:1])
        self.unseen = unseen_latents(base, own, experiment.plan, seeds)
        self.sampler = PictureSampler(base, experiment.plan, seeds)

    def loss(self, weights: LoRAWeights | None) -> float:
        """Under a LoRA; None for the base alone."""
        applied = AdapterSet(()) if weights is None else lora_adapter_set(weights)
        with attach(self.base.unet, applied, names=self.names):
            return float(self.sampler.losses(self.unseen).mean())


def upload_photos(server: ComfyServer, experiment: Experiment) -> list[str]:
    """The first person's photos in ComfyUI's input folder."""
    names = []
    for number in range(PHOTOS):
        path = server.base_directory / f"photo{number}.png"
        write_image(experiment.people.photos.images[0, number], path)
        names.append(server.client.upload_picture(path))
    return names


def _written(server: ComfyServer, experiment: Experiment) -> LoRAWeights:
    """The newest LoRA that was saved: its factors; what else core trains (norms) is left out."""
    files = server.output_directory.glob("loras/trained*")
    newest = max(files, key=lambda path: path.stat().st_mtime_ns)
    names = unet_name_map(dict(experiment.artefacts.base.unet.config))
    return from_state_dict(read_lora_file(newest).tensors, names).weights


def _sizes(done: Measured, weights: LoRAWeights) -> dict[str, float]:
    return {"peak_gb": done.peak_gb, "layers": float(len(weights))}


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
