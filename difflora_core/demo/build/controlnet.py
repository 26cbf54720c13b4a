"""The demo ControlNet: five face points say where a face is, how large and how turned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ...base_model.diffusers_base import DiffusersBase
from ...base_model.drawing import draw_latents, trailing_ddim
from ...base_model.precision import autocast
from ...config import parse_json
from ...diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from ...storage.safetensors_io import read_file, write_atomic
from ...training.controlnet import (
    ControlledBase,
    ControlLoRA,
    ControlNetConfig,
    KeypointPictures,
    control_pictures,
    fit,
)
from ...training.loop import LoopConfig, Progress
from ...vision.face_encoder import InsightFaceEncoder
from .. import paths
from ..networks.base import load_base
from ..world.identities import split_seeds
from ..world.pool import PicturePool
from ..world.scenes import render_portraits
from .stages import Figures, pairs_pool, pool_latents

POSED, PAIRS = 6000, 2000
"""Training pictures of one person, and of two."""
SPREAD = 3.0
"""Heads on the training pictures vary three times as much in place, size and roll as portraits."""
PIXELS_PER_LATENT = 4

LOOP = LoopConfig(
    steps=320,
    learning_rate=2e-3,
    warmup=30,
    decay=0.5,
    weight_decay=0.0,
    ema=0.98,
    precision="bf16",
    checkpoint_every=40,
    log_every=20,
    seed=6,
)
CONFIG = ControlNetConfig(batch=16, rank=16)

MEASURED = 48
"""Pictures of validation people that the error of the points is measured on."""


def controlnet(progress: Progress) -> Figures:
    """The stage: train, write the file, measure."""
    base = load_base(paths.BASE)
    posed, pairs = posed_pool("train", POSED), pairs_pool().head(PAIRS)
    sets = [
        (0.85, _with_latents(base, "posed", posed)),
        (0.15, _with_latents(base, "pairs", pairs)),
    ]
    control = ControlLoRA(base, CONFIG.rank, torch.Generator().manual_seed(6))
    fit(control, base, sets, LOOP, paths.BUILD / "controlnet", CONFIG, progress)
    save_controlnet(control, paths.CONTROLNET)
    trained = load_controlnet(paths.CONTROLNET, base)
    held_out = posed_pool("validation", MEASURED)
    figures: Figures = {}
    for name, used in (("without", None), ("with", trained)):
        found, pixels = point_errors(base, used, held_out)
        figures |= {f"points_px_{name}": pixels, f"faces_found_{name}": found}
    return figures


def posed_pool(split: str, count: int) -> PicturePool:
    """Portraits of `count` people of a split with widely varying heads."""
    seeds = split_seeds(split, count)
    parts = [
        render_portraits(seeds[k : k + 256], [1_000_000] * len(seeds[k : k + 256]), spread=SPREAD)
        for k in range(0, count, 256)
    ]
    return PicturePool(
        images=torch.cat([(part.images * 255).round().byte() for part in parts]),
        identities=torch.tensor(seeds),
        captions=[caption for part in parts for caption in part.captions],
        scenes=[scene for part in parts for scene in part.scenes],
        keypoints=torch.cat([part.keypoints for part in parts]),
        boxes=torch.cat([part.boxes for part in parts]),
    )


def save_controlnet(control: ControlLoRA, path: Path) -> None:
    """Write one float16 file that ComfyUI's ControlNet loader reads."""
    tensors = {name: tensor.half() for name, tensor in control.state().items()}
    facts = {"format": "difflora-demo-controlnet-1", "rank": json.dumps(control.rank)}
    write_atomic(tensors, facts, path)


def load_controlnet(path: Path, base: DiffusersBase) -> ControlLoRA:
    """The ControlNet of the demo base, frozen."""
    tensors, facts = read_file(path, "ControlNet of the demo base")
    rank = parse_json(facts["rank"], "the rank")
    control = ControlLoRA(base, rank, torch.Generator().manual_seed(0))
    control.load_state(tensors)
    return control.requires_grad_(False)


@torch.no_grad()
def draw_controlled(
    base: DiffusersBase, control: ControlLoRA | None, pool: PicturePool, guidance: float = 2.0
) -> Tensor:
    """Pictures (M, H, W, 3) in [0, 1] for a pool's captions, at its key points if `control`."""
    text, null = base.encode_prompts(pool.captions), base.encode_prompts([""] * len(pool))
    side = pool.images.shape[1] // PIXELS_PER_LATENT
    noise = initial_noise(seeded_generators(range(len(pool))), (8, side, side))
    if control is not None:
        data = KeypointPictures(noise, pool.keypoints, pool.captions, PIXELS_PER_LATENT)
        hints = control_pictures(data, torch.arange(len(pool)))
        base = ControlledBase(base, control, hints)
    settings = SampleSettings(15, guidance)
    with autocast(torch.device("cpu"), "bf16"):
        z = draw_latents(base, noise, text, null, settings, trailing_ddim(base))
        return base.decode_latents(z)


def point_errors(
    base: DiffusersBase, control: ControlLoRA | None, pool: PicturePool
) -> tuple[float, float]:
    """Share of drawn pictures with a face, and how far its points are from the asked ones.

    The distance is the mean over the five points in pixels of a 64 pixel picture, then over the
    pictures with a face.
    """
    faces = InsightFaceEncoder(paths.FACES)
    errors = []
    for image, asked in zip(draw_controlled(base, control, pool), pool.keypoints, strict=True):
        found = faces.detect(image)
        if found:
            best = max(found, key=lambda face: face.score)
            errors.append(float((best.keypoints - asked[0]).norm(dim=1).mean()))
    return len(errors) / len(pool), sum(errors) / max(1, len(errors))


def _with_latents(base: DiffusersBase, name: str, pool: PicturePool) -> KeypointPictures:
    latents = pool_latents(base.vae, name, pool)
    return KeypointPictures(latents, pool.keypoints, pool.captions, PIXELS_PER_LATENT)
