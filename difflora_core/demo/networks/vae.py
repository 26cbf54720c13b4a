"""The demo VAE: a small AutoencoderKL (4 x 4 pixels per latent), trained on rendered pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from ...base_model.precision import autocast
from ...config import Config, check_ranges
from ...models.layers import DrawnFrom
from ..world.pool import PicturePool

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 8,
    "sample_size": 64,
}
"""diffusers configuration; 32 channels are the least that 32 normalisation groups allow."""


@dataclass(frozen=True)
class VaeLoss(Config):
    """Weights of the loss.

    `face`: how much more a pixel inside a face box counts; `kl`: of the mean divergence of a
    latent number from the unit Gaussian; `noise`: most spread of what is added to every second
    picture's latents, about as far as those that a base model draws are from real ones.
    """

    face: float = 2.0
    kl: float = 1e-4
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_ranges("VAE loss", self, 0, 1000, "face", "kl", "noise")


class VaeObjective(nn.Module):
    """Reconstruction (L1 + MSE) plus a light KL term; forward maps a batch to (loss, metrics)."""

    def __init__(self, vae: AutoencoderKL, loss: VaeLoss) -> None:
        super().__init__()
        self.vae, self.loss = vae, loss

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of `images` (B, 3, H, W) in [-1, 1] under pixel `weights` (B, 1, H, W).

        The latents are drawn with `noise` (B, 8, H/4, W/4), and `spread` (B, 1, 1, 1) more of it.
        """
        images, weights = batch["images"], batch["weights"]
        moments = self.vae.quant_conv(self.vae.encoder(images)).float()  # B 16 H/4 W/4
        mean, logvar = moments.chunk(2, 1)  # B 8 H/4 W/4 each
        logvar = logvar.clamp(-20, 10)
        z = mean + (logvar.exp() + batch["spread"] ** 2).sqrt() * batch["noise"]
        error = self.vae.decoder(self.vae.post_quant_conv(z)).float() - images  # B 3 H W
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        reconstruction = (weights * (error.abs() + error**2)).mean()
        psnr = -10 * torch.log10((error**2).mean() / 4)
        metrics = {"psnr": psnr.detach(), "kl": kl.detach(), "scale": mean.std().detach()}
        return reconstruction + self.loss.kl * kl, metrics


def vae_batches(
    pool: PicturePool, batch: int, loss: VaeLoss
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Random pictures with weights that favour the faces.

    Args:
        pool: portraits.
        batch: B, pictures per batch.
        loss: how much faces count.

    Returns:
        From a generator to a batch: `images` (B, 3, H, W) in [-1, 1], `weights` (B, 1, H, W), unit
        `noise` (B, 8, H/4, W/4) and `spread` (B, 1, 1, 1).
    """
    height, width = pool.images.shape[1:3]
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(pool), (batch,), generator=generator)
        x0, y0, x1, y1 = pool.boxes[index, 0, :, None, None].unbind(1)
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        images = pool.images[index].permute(0, 3, 1, 2).float() / 127.5 - 1
        noise = torch.randn(batch, 8, height // 4, width // 4, generator=generator)
        weights = 1 + (loss.face - 1) * inside[:, None].float()
        spread = loss.noise * (2 * torch.rand(batch, 1, 1, 1, generator=generator) - 1).relu()
        return {"images": images, "weights": weights, "noise": noise, "spread": spread}

    return draw


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a shift and a scale per channel into the VAE, so that its latents have mean 0, spread 1.

    Only the two 1 x 1 convolutions at the latent change; reconstructions stay the same.

    Args:
        vae: changed in place.
        images: (M, H, W, 3) uint8 pictures to take the statistics from.
    """
    latents = encode_pool(vae, images).float()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    count = len(mean)
    before.bias[:count] = (before.bias[:count] - mean) / std
    before.weight[:count] /= std[:, None, None, None]
    before.bias[count:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, images: Tensor, batch: int = 32) -> Tensor:
    """Latent means (M, 8, H/4, W/4) float16 of pictures (M, H, W, 3) uint8, not yet scaled."""
    parts = []
    for chunk in images.split(batch):
        pixels = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1
        with autocast(pixels.device, "bf16"):
            parts.append(vae.encode(pixels).latent_dist.mean.half())
    return torch.cat(parts).contiguous()


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, batch: int = 32) -> Tensor:
    """Pictures (M, H, W, 3) float32 in [0, 1] of unscaled latents."""
    parts = []
    for chunk in latents.split(batch):
        with autocast(chunk.device, "bf16"):
            parts.append(vae.decode(chunk.float()).sample.float())
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def new_vae(seed: int) -> AutoencoderKL:
    """An untrained demo VAE with weights from `seed`."""
    with DrawnFrom(torch.Generator().manual_seed(seed)):
        return AutoencoderKL(**VAE_CONFIG)
