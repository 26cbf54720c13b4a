"""SDXL's classes from diffusers as a base model, full size or tiny."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..lora.layout import (
    ATTENTION_PROJECTIONS,
    LoRALayout,
    layout_from_unet_config,
    unet_name_map,
)
from .protocol import PIXELS, TextCondition

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


class DiffusersBase:
    """SDXL's classes from diffusers, full size or tiny.

    Args:
        unet, vae: modules, already frozen. encode_prompts: prompts to TextCondition.
        scheduler: gives noise schedule and prediction type.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        encode_prompts: Callable[[Sequence[str]], TextCondition],
        scheduler: DDIMScheduler,
    ) -> None:
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self._encode_prompts = encode_prompts
        self.alphas_cumprod: Tensor = scheduler.alphas_cumprod
        self.prediction_type: str = scheduler.config.prediction_type

    def layout(
        self, base: str, rank: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    ) -> LoRALayout:
        """LoRA layout of the UNet's layers whose names end so."""
        config: Mapping[str, Any] = self.unet.config
        return layout_from_unet_config(base, dict(config), rank, targets)

    @property
    def module_names(self) -> dict[str, str]:
        """Canonical name to module path of every layer, whichever of them a LoRA edits."""
        return {layer: path for path, layer in unet_name_map(dict(self.unet.config)).items()}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        text = self._encode_prompts(unique)
        return text.select(torch.tensor([unique.index(p) for p in prompts]))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of images (N, H, W, 3) in [0, 1]; the posterior's mean.

        float32 or better, whatever the VAE computes in, and where it computes, wherever the images
        are.
        """
        dtype, count = self._vae_dtype, _at_once(images.shape[1] * images.shape[2])
        place = next(self.vae.parameters()).device
        parts = [
            self.vae.encode((chunk.permute(0, 3, 1, 2) * 2 - 1).to(place, dtype)).latent_dist.mean
            for chunk in images.split(count)
        ]
        fine = torch.promote_types(dtype, torch.float32)
        return torch.cat(parts).to(fine) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) in [0, 1] of scaled latents."""
        scaled = (latents / self.vae.config.scaling_factor).to(self._vae_dtype)
        count = _at_once(scaled.shape[2] * scaled.shape[3] * 8**2)
        parts = [self.vae.decode(chunk).sample.float() for chunk in scaled.split(count)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output for noisy latents (B, C, h, w) at timesteps (B,)."""
        sizes = time_ids(noisy) if text.time_ids is None else text.time_ids.to(noisy.device)
        added = {"text_embeds": text.pooled, "time_ids": sizes}
        output: Tensor = self.unet(noisy, timesteps, text.context, added_cond_kwargs=added).sample
        return output


def _at_once(pixels: int) -> int:
    """Pictures of a size that the VAE sees at once: 16, or one of 1024 x 1024."""
    return max(1, min(16, 2**20 // pixels))


def time_ids(latents: Tensor) -> Tensor:
    """SDXL's size conditioning (B, 6) as ComfyUI fills it in: eight times the latent's size."""
    height, width = latents.shape[-2] * PIXELS, latents.shape[-1] * PIXELS
    row = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
    return row.to(latents.dtype).expand(len(latents), 6)
