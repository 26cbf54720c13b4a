"""Pictures that a base model draws with a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..adapters.attach import attach
from ..adapters.lora import lora_adapter_set
from ..base_model.diffusers_base import DiffusersBase
from ..base_model.protocol import TextCondition, compute_device, predict
from ..diffusion.sampler import SampleSettings, initial_noise, sample, seeded_generators
from ..lora.weights import LoRAWeights


@torch.no_grad()
def draw(
    base: DiffusersBase,
    weights: LoRAWeights,
    names: Mapping[str, str],
    text: TextCondition,
    seeds: Sequence[int],
    settings: SampleSettings,
    shape: Sequence[int],
) -> Tensor:
    """Latents of N prompts under one LoRA; the base's UNet is as before afterwards.

    Args:
        base: draws.
        weights: the LoRA.
        names: its layers to the base's modules, see `LoRALayout.module_names`.
        text: N encoded prompts, and the empty one for guidance behind them.
        seeds: N, one a picture: the same gives the same, whatever else is drawn.
        settings: of the drawing.
        shape: (C, h, w) of a latent.

    Returns:
        Scaled latents (N, C, h, w).
    """
    count = len(seeds)
    asked, empty = torch.arange(count), torch.full((count,), count)

    def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        return predict(base, z, timestep, text.select(asked if conditional else empty))

    scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
    noise = initial_noise(seeded_generators(seeds), shape).to(compute_device(base))
    with attach(base.unet, lora_adapter_set(weights), names=names):
        return sample(denoise, noise, scheduler, settings)
