"""What recipes and evaluation need of a text-to-image model, and its diffusers implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..lora.layout import LoRALayout, layout_from_unet_config

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: `context` (B, L, C) for cross-attention, `pooled` (B, P)."""

    context: Tensor
    pooled: Tensor

    def select(self, index: Tensor) -> TextCondition:
        """Rows by index; repeats are allowed."""
        return TextCondition(self.context[index], self.pooled[index])


class BaseModel(Protocol):
    """A frozen latent diffusion model with SDXL's conditioning."""

    unet: nn.Module
    alphas_cumprod: Tensor
    prediction_type: str

    def layout(self, base: str, rank: int) -> LoRALayout:
        """LoRA layout of the UNet's attention projections."""

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of images (N, H, W, 3) in [0, 1]."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) in [0, 1] of scaled latents."""

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output for noisy latents (B, C, h, w) at timesteps (B,)."""


def compute_dtype(base: BaseModel) -> torch.dtype:
    """The dtype a base computes in: its own word (`dtype`), or that of its weights."""
    own: torch.dtype | None = getattr(base, "dtype", None)
    return own or next(base.unet.parameters()).dtype


def compute_device(base: BaseModel) -> torch.device:
    """The device a base computes on: its own word (`device`), or where its weights are."""
    own: torch.device | None = getattr(base, "device", None)
    return own or next(base.unet.parameters()).device


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

    def layout(self, base: str, rank: int) -> LoRALayout:
        """LoRA layout of the UNet's attention projections."""
        config: Mapping[str, Any] = self.unet.config
        return layout_from_unet_config(base, dict(config), rank)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        text = self._encode_prompts(unique)
        return text.select(torch.tensor([unique.index(p) for p in prompts]))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of images (N, H, W, 3) in [0, 1]; the posterior's mean."""
        parts = [
            self.vae.encode(chunk.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
            for chunk in images.split(16)
        ]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) in [0, 1] of scaled latents."""
        scaled = latents / self.vae.config.scaling_factor
        parts = [self.vae.decode(chunk).sample for chunk in scaled.split(16)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output for noisy latents (B, C, h, w) at timesteps (B,)."""
        added = {"text_embeds": text.pooled, "time_ids": time_ids(noisy)}
        output: Tensor = self.unet(noisy, timesteps, text.context, added_cond_kwargs=added).sample
        return output


def time_ids(latents: Tensor) -> Tensor:
    """SDXL's size conditioning (B, 6) as ComfyUI fills it in: eight times the latent's size."""
    height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
    row = torch.tensor([height, width, 0, 0, height, width], device=latents.device)
    return row.to(latents.dtype).expand(len(latents), 6)


def stratified_timesteps(count: int, generator: torch.Generator, steps: int = 1000) -> Tensor:
    """Uniform timesteps, one from each of `count` equal strata: less variance, same mean."""
    strata = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    order = torch.randperm(count, generator=generator)
    return (strata * steps).long().clamp(max=steps - 1)[order]
