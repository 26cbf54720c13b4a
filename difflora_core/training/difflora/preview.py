"""Pictures of people under their predicted LoRAs: what a training run shows of itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ...adapters.attach import attach
from ...adapters.lora import lora_adapter_set
from ...base_model.diffusers_base import DiffusersBase
from ...base_model.protocol import TextCondition, compute_device
from ...diffusion.sampler import SampleSettings, initial_noise, sample, seeded_generators
from ...models.identity_model import IdentityModel
from ...vision.features import ImageFeatures
from ..losses import predict


@torch.no_grad()
def draw_people(
    model: IdentityModel,
    base: DiffusersBase,
    people: Sequence[ImageFeatures],
    text: TextCondition,
    settings: SampleSettings,
    shape: Sequence[int],
) -> Tensor:
    """One latent of each of P people, drawn by the base with the person's LoRA.

    Args:
        model: photos to LoRA: the best guess, or a sample where there is none.
        base: draws; its UNet is as before afterwards.
        people: photos of each person.
        text: two encoded prompts: what to draw, and the empty one for guidance.
        settings: of the drawing.
        shape: (C, h, w) of a latent.

    Returns:
        Scaled latents (P, C, h, w); the same for the same people, whatever else is drawn.
    """
    device = compute_device(base)
    pictures = []
    scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="trailing")
    for number, photos in enumerate(people):
        condition = model.condition(model.complete(photos.to(model.device, torch.float32)))
        guess = model.mean_latent(condition) if model.has_best_guess else None
        latent = guess or model.sample_latent(condition, [number], SampleSettings())

        def denoise(z: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
            return predict(base, z, timestep, text.select(torch.tensor([int(not conditional)])))

        noise = initial_noise(seeded_generators([number]), shape).to(device)
        names = model.layout.module_names
        with attach(base.unet, lora_adapter_set(model.decode(latent)), names=names):
            pictures.append(sample(denoise, noise, scheduler, settings))
    return torch.cat(pictures)
