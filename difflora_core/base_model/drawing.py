"""Latents that a base model draws for prompts, with what is attached to it: the one way (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diffusion.sampler import SampleSettings, sample
from .diffusers_base import DiffusersBase
from .protocol import BaseModel, TextCondition, compute_device, predict


@torch.no_grad()
def draw_latents(
    base: BaseModel,
    noise: Tensor,
    text: TextCondition,
    nothing: TextCondition,
    settings: SampleSettings,
    scheduler: object,
) -> Tensor:
    """Scaled latents (B, C, h, w), float32, where the base computes.

    Args:
        base: draws; `predict` is asked, so adapters that are attached to its UNet count.
        noise: (B, C, h, w) unit noise, see `diffusion.sampler.initial_noise`.
        text: B encoded prompts.
        nothing: what guidance starts from: B encoded prompts.
        settings: of the sampling.
        scheduler: a diffusers scheduler that no other picture was drawn with.
    """

    def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        return predict(base, z, timestep, text if conditional else nothing)

    return sample(denoise, noise.to(compute_device(base)), scheduler, settings)


def trailing_ddim(base: DiffusersBase) -> Any:
    """DDIM over the base's own noise schedule; its first step is at pure noise."""
    from diffusers import DDIMScheduler  # noqa: PLC0415  slow, and ComfyUI imports us at its start

    return DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
