"""A step of full-size SDXL with random weights, and what adapters on it cost.

The real UNet with all its layers. Layers of equal shape share their weights, so that it fits into
3 GB; what is computed stays the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet

from .interleaving.pairs import BASE, Seconds, interleave, price

SIDE = 32
"""Of the latent: a picture of 256 x 256."""


def small_memory_unet(config: dict) -> UNet2DConditionModel:
    """A UNet with random weights in which equal shapes share their numbers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    generator, shared = torch.Generator().manual_seed(0), {}
    for module in unet.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            shape = tuple(parameter.shape)
            if shape not in shared:
                scale = 0.5 / math.sqrt(max(1, parameter[0].numel()))
                weight = scale * torch.randn(shape, generator=generator)
                shared[shape] = nn.Parameter(weight, requires_grad=False)
            module._parameters[name] = shared[shape]
    return unet.eval()


def step_inputs(config: dict, side: int) -> tuple[Tensor, Tensor]:
    """Fixed latents (2, C, side, side) and text encodings (2, 77, d)."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, config["in_channels"], side, side, generator=generator)
    return z, torch.randn(2, 77, config["cross_attention_dim"], generator=generator)


def one_step(unet: nn.Module, config: dict, z: Tensor, context: Tensor) -> Callable[[], Tensor]:
    """One step (batch 2) on fixed inputs.

    The encoding is a new tensor each time, as a sampler gives it.
    """
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    when = torch.full((2,), 500)

    @torch.no_grad()
    def step() -> Tensor:
        return unet(z, when, context.clone(), added_cond_kwargs=added).sample

    return step


def attached(
    unet: nn.Module, adapters: AdapterSet | None, names: Mapping[str, str]
) -> AbstractContextManager:
    """The UNet with adapters, or as it is."""
    return nullcontext() if adapters is None else attach(unet, adapters, names=names)


def step_prices(
    unet: nn.Module,
    step: Callable[[], Tensor],
    variants: Mapping[str, AdapterSet | None],
    names: Mapping[str, str],
    pairs: int,
) -> dict[str, dict[str, float]]:
    """What a step costs with adapters over the base's, from steps in turn.

    Args:
        unet: of the step.
        step: takes it.
        variants: row name to what is attached; None is the base against itself.
        names: layer name to module path.
        pairs: steps of each that are counted.
    """

    def timed(adapters: AdapterSet | None) -> Seconds:
        wall, processor = time.perf_counter(), time.process_time()
        with attached(unet, adapters, names):  # as in sampling, where hooks go on for every step
            step()
        return time.perf_counter() - wall, time.process_time() - processor

    rows = {}
    for name, adapters in variants.items():
        base, own = interleave(partial(timed, None), partial(timed, adapters), pairs, warm_up=2)
        rows.setdefault(BASE, price(base, base) | {"projections": 0.0})
        rows[name] = price(base, own) | {"projections": float(len(adapters or ()))}
    return rows
