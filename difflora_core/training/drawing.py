"""Pictures that a base model draws with a LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..adapters.attach import attach
from ..adapters.lora import lora_adapter_set
from ..base_model.diffusers_base import DiffusersBase
from ..base_model.drawing import draw_latents, trailing_ddim
from ..base_model.protocol import TextCondition
from ..diffusion.sampler import SampleSettings, initial_noise, seeded_generators
from ..lora.weights import LoRAWeights


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
    asked, empty = text.select(torch.arange(count)), text.select(torch.full((count,), count))
    noise = initial_noise(seeded_generators(seeds), shape)
    with attach(base.unet, lora_adapter_set(weights), names=names):
        return draw_latents(base, noise, asked, empty, settings, trailing_ddim(base))
