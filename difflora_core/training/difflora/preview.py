"""Pictures of people under their predicted LoRAs: what a training run shows of itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...base_model.diffusers_base import DiffusersBase
from ...base_model.protocol import TextCondition
from ...diffusion.sampler import SampleSettings
from ...models.identity_model import IdentityModel
from ...vision.features import ImageFeatures
from ..drawing import draw


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
        model: photos to LoRA: the best guess.
        base: draws; its UNet is as before afterwards.
        people: photos of each person.
        text: two encoded prompts: what to draw, and the empty one for guidance.
        settings: of the drawing.
        shape: (C, h, w) of a latent.

    Returns:
        Scaled latents (P, C, h, w); the same for the same people, whatever else is drawn.
    """
    pictures = []
    for number, photos in enumerate(people):
        condition = model.condition(model.complete(photos.to(model.device, torch.float32)))
        weights, names = model.decode(model.mean_latent(condition)), model.layout.module_names
        pictures.append(draw(base, weights, names, text, [number], settings, shape))
    return torch.cat(pictures)
