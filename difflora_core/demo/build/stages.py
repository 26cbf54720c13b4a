"""The stages that rebuild the demo world, each from the files of the stages before it.

Every stage is deterministic by its seeds, can be interrupted and resumed, and returns the figures
that it measured; build.py runs them in order and writes the manifest.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...errors import CheckpointError
from ...storage.safetensors_io import read_file, write_atomic
from ...training.fingerprint import fingerprint
from ...training.loop import Hooks, LoopConfig, Progress, train
from .. import paths
from ..networks.base import BaseObjective, base_batches, new_base, save_base
from ..networks.vae import (
    VaeLoss,
    VaeObjective,
    decode_latents,
    encode_pool,
    new_vae,
    standardise_latents,
    vae_batches,
)
from ..world.pool import PicturePool, cached_pool, pair_pool, portrait_pool

Figures = dict[str, object]

VAE_LOOP = LoopConfig(
    steps=6000,
    learning_rate=2e-3,
    warmup=100,
    decay=0.35,
    weight_decay=0.0,
    precision="bf16",
    log_every=100,
    compile=True,
)
VAE_BATCH = 4
DECODER_LOOP = LoopConfig(
    steps=6000,
    learning_rate=5e-4,
    warmup=300,
    decay=0.5,
    weight_decay=0.0,
    ema=0.995,
    log_every=100,
    seed=4,
    compile=True,
)
DECODER_LOSS = VaeLoss(face=3.0, noise=0.15)
DECODER_BATCH = 8
BASE_LOOP = LoopConfig(
    steps=2900,
    learning_rate=1e-3,
    matrix_rate=0.015,
    warmup=150,
    decay=0.35,
    ema=0.998,
    precision="bf16",
    checkpoint_every=200,
    log_every=25,
    seed=1,
)
BASE_BATCH = 32


def train_pool() -> PicturePool:
    """50,000 portraits of 5,000 training identities; a third of the captions describe them."""
    return cached_pool(
        paths.POOLS / "train.safetensors", lambda: portrait_pool("train", 5000, 10, describe=0.35)
    )


def pairs_pool() -> PicturePool:
    """4,000 wide pictures of two training identities."""
    return cached_pool(paths.POOLS / "pairs.safetensors", lambda: pair_pool("train", 4000, 4000))


def drawn_pool() -> PicturePool:
    """The portraits that the base learns to draw: 3,000 people with 10 pictures."""
    return train_pool().head(30_000)


def validation_pool() -> PicturePool:
    """1,200 portraits of 100 validation identities."""
    return cached_pool(
        paths.POOLS / "validation.safetensors", lambda: portrait_pool("validation", 100, 12)
    )


def pictures(progress: Progress) -> Figures:
    """Render the pools."""
    counts = {}
    for k, pool in enumerate((train_pool, pairs_pool, validation_pool)):
        counts[pool.__name__] = len(pool())
        progress(k + 1, 3, {})
    return dict(counts)


def vae(progress: Progress) -> Figures:
    """Train the VAE on portraits."""
    model, loss = new_vae(0), VaeLoss()
    folder = paths.BUILD / "vae"
    pool = train_pool()
    hooks = Hooks(progress, fingerprint=fingerprint(loss, VAE_BATCH, pool.images))
    train(VaeObjective(model, loss), vae_batches(pool, VAE_BATCH, loss), VAE_LOOP, folder, hooks)
    standardise_latents(model, pool.images[:4096])
    model.save_pretrained(folder / "trained")
    return through_vae(model)


def decoder(progress: Progress) -> Figures:
    """Train the VAE's decoder on, alone: finer pictures of the same latents.

    Whatever was learned on the latents stays as it is. On whole pictures, because the decoder's
    normalisation takes its statistics of them.
    """
    model = AutoencoderKL.from_pretrained(paths.BUILD / "vae" / "trained")
    before = through_vae(model)
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
    pool, folder = train_pool(), paths.BUILD / "decoder"
    hooks = Hooks(progress, fingerprint=fingerprint(DECODER_LOSS, DECODER_BATCH, pool.images))
    draw = vae_batches(pool, DECODER_BATCH, DECODER_LOSS)
    train(VaeObjective(model, DECODER_LOSS), draw, DECODER_LOOP, folder, hooks)
    model.save_pretrained(paths.TRAINED_VAE)
    return through_vae(model) | {f"{name}_before": value for name, value in before.items()}


def through_vae(model: AutoencoderKL) -> Figures:
    """Mean PSNR (dB) of validation people's pictures through a VAE, and in their face boxes."""
    pool = validation_pool().head(256)
    truth = pool.images.float() / 255
    error = (decode_latents(model, encode_pool(model, pool.images).float()) - truth).square()
    boxes = pool.boxes[:, 0].round().int().clamp_min(0).tolist()
    faces = [part[y0:y1, x0:x1] for part, (x0, y0, x1, y1) in zip(error, boxes, strict=True)]
    both = {"psnr_db": list(error), "psnr_db_faces": faces}
    return {
        name: float(torch.stack([-10 * part.mean().log10() for part in parts]).mean())
        for name, parts in both.items()
    }


def base(progress: Progress) -> Figures:
    """Train UNet and text encoders on the latents; the stage `words` goes on from them."""
    model = AutoencoderKL.from_pretrained(paths.TRAINED_VAE)
    portraits, pairs, held_out = drawn_pool(), pairs_pool().head(2000), validation_pool()
    latents = [
        pool_latents(model, name, pool)
        for name, pool in (("train", portraits), ("pairs", pairs), ("validation", held_out))
    ]
    unet, text = new_base(1)
    objective = BaseObjective(unet, text)
    draw = base_batches((latents[0], portraits), (latents[1], pairs), BASE_BATCH)
    data = (latents[0], portraits.captions, latents[1], pairs.captions, BASE_BATCH)
    hooks = Hooks(progress, fingerprint=fingerprint(*data))
    train(objective, draw, BASE_LOOP, paths.BUILD / "base", hooks)
    save_base(paths.FIRST_BASE, unet, text, model)
    return {"validation_loss": base_loss(objective, latents[2], held_out)}


@torch.no_grad()
def base_loss(objective: BaseObjective, latents: Tensor, pool: PicturePool) -> float:
    """Mean v loss on fixed noise of 8 batches of a pool and its scaled latents (M, C, h, w).

    The draws are always the same, so the figure can be compared between runs.
    """
    draw = base_batches((latents, pool), (latents, pool), 64)
    losses = []
    for step in range(8):
        batch = draw(torch.Generator().manual_seed(900 + step))
        losses.append(float(objective(batch)[0]))
    return sum(losses) / len(losses)


def pool_latents(model: AutoencoderKL, name: str, pool: PicturePool) -> Tensor:
    """Latents (M, 8, h, w) of a pool, kept on disk under `name`."""
    path = paths.BUILD / "latents" / f"{name}.safetensors"
    if not path.exists():
        write_atomic({"latents": encode_pool(model, pool.images)}, {}, path)
    latents = read_file(path, "file of latents")[0].get("latents")
    if latents is None or len(latents) != len(pool):
        raise CheckpointError(f"{path} is not of these pictures; delete it to encode them anew.")
    return latents
