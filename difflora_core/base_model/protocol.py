"""What recipes and evaluation need of a text-to-image model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..lora.layout import ATTENTION_PROJECTIONS, LoRALayout

PIXELS = 8
"""Of a picture's side for each of the latent's, as SDXL's VAE has them."""


@dataclass(frozen=True)
class TextCondition:
    """Encoded prompts: `context` (B, L, C) for cross-attention, `pooled` (B, P).

    `time_ids`: (B, 6) what SDXL is told of each picture beside (arXiv 2307.01952, 2.2): its height
    and width before it was scaled, top and left of what was cut out, height and width drawn. None:
    whole pictures of the size that is drawn.
    """

    context: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None

    def select(self, index: Tensor) -> TextCondition:
        """Rows by index (n,), which may repeat: a condition of n prompts."""
        sizes = None if self.time_ids is None else self.time_ids[index]
        return TextCondition(self.context[index], self.pooled[index], sizes)


def told_sizes(time_ids: Tensor, height: int, latent_height: int) -> Tensor:
    """Sizes of pictures as hosts tell them: a latent pixel counts for PIXELS, whatever the VAE.

    Args:
        time_ids: (..., 6) in pixels of the pictures, see `TextCondition`.
        height: of one of the pictures.
        latent_height: of its latent.
    """
    return time_ids * (PIXELS * latent_height / height)


class BaseModel(Protocol):
    """A frozen latent diffusion model with SDXL's conditioning."""

    unet: nn.Module
    alphas_cumprod: Tensor
    prediction_type: str

    def layout(
        self, base: str, rank: int, targets: tuple[str, ...] = ATTENTION_PROJECTIONS
    ) -> LoRALayout:
        """LoRA layout of the UNet's layers whose names end so."""

    def encode_prompts(self, prompts: Sequence[str]) -> TextCondition:
        """Encode prompts."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of images (N, H, W, 3) in [0, 1]."""

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (N, H, W, 3) in [0, 1] of scaled latents."""

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
        """The UNet's output for noisy latents (B, C, h, w) at timesteps (B,)."""


def layer_weight(base: BaseModel, path: str) -> Tensor:
    """The weight of a layer of the UNet, float32 or better: its own word (`weight`), or as it is.

    Args:
        base: the base model.
        path: of the module.
    """
    own: Callable[[str], Tensor] | None = getattr(base, "weight", None)
    weight = base.unet.get_parameter(f"{path}.weight").detach() if own is None else own(path)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def compute_dtype(base: BaseModel) -> torch.dtype:
    """The dtype a base computes in: its own word (`dtype`), or that of its weights."""
    own: torch.dtype | None = getattr(base, "dtype", None)
    return own or next(base.unet.parameters()).dtype


def compute_device(base: BaseModel) -> torch.device:
    """The device a base computes on: its own word (`device`), or where its weights are."""
    own: torch.device | None = getattr(base, "device", None)
    return own or next(base.unet.parameters()).device


def predict(base: BaseModel, noisy: Tensor, timesteps: Tensor, text: TextCondition) -> Tensor:
    """The base's answer (B, C, h, w) to noisy float32 latents, in their dtype, asked in its own.

    Args:
        base: the base model.
        noisy: (B, C, h, w) where the base computes.
        timesteps: (B,).
        text: B encoded prompts, anywhere.
    """
    seen = noisy.to(compute_dtype(base))
    here = TextCondition(text.context.to(seen), text.pooled.to(seen), text.time_ids)
    return base.predict(seen, timesteps, here).to(noisy)
