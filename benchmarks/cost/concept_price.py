"""What concepts cost in a step of full-size SDXL: `make bench name=overhead args=--perfusion`.

The real UNet with all its layers and random weights. Layers of equal shape share their weights, so
that it fits into 3 GB; what is computed stays the same. Text encodings do not grow with a picture,
so the price is measured on a small picture, where it weighs most.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.lora.layout import SDXL_UNET_CONFIG, layout_from_unet_config
from difflora_core.methods.base import AdaptationRequest
from difflora_core.methods.infusion import Infusion, InfusionConfig
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig, PreparedConcept
from difflora_core.text.new_words import Concept

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


def random_concepts(config: dict, count: int, method: str = "perfusion") -> list[Concept]:
    """Concepts of the right shapes for every cross-attention layer."""
    generator = torch.Generator().manual_seed(1)
    layers = layout_from_unet_config("sdxl", config, 1)
    shapes = [shape for shape in layers if shape.name.endswith("attn2.to_v")]
    width = shapes[0].in_features
    concepts = []
    for number in range(count):
        direction = torch.randn(width, generator=generator)
        values = {s.name: 0.01 * torch.randn(s.out_features, generator=generator) for s in shapes}
        concepts.append(
            Concept(
                method, f"<word-{number}>", "cat", "sdxl", (torch.ones(768), torch.ones(1280)),
                direction, direction / direction.square().sum(), values, torch.ones(64),
            )
        )  # fmt: skip
    return concepts


def perfusion_adapters(concepts: Sequence[Concept]) -> AdapterSet:
    """Locally locked concepts as Apply Concept puts them on."""
    prepared = [(PreparedConcept(c, c.direction), PerfusionConfig()) for c in concepts]
    return Perfusion(prepared).adapters(AdaptationRequest())


def price(rounds: int, config: dict | None = None, side: int = SIDE) -> dict[str, dict[str, float]]:
    """Processor seconds of a step (batch 2) of every row; ratios are taken within a round."""
    config = dict(config or SDXL_UNET_CONFIG)
    unet = small_memory_unet(config)
    names = layout_from_unet_config("sdxl", config, 1).module_names
    one, two = (perfusion_adapters(random_concepts(config, n)) for n in (1, 2))
    residuals = [(c, InfusionConfig()) for c in random_concepts(config, 1, "infusion")]
    infusion = Infusion(residuals).adapters(AdaptationRequest())
    rows: dict[str, Callable[[], AbstractContextManager]] = {
        "base": nullcontext,
        "base_again": nullcontext,
        "perfusion": lambda: attach(unet, one, names=names),
        "two_perfusion": lambda: attach(unet, two, names=names),
        "infusion": lambda: attach(unet, infusion, names=names),
    }
    call = _call(unet, config, side)
    times: dict[str, list[float]] = {name: [] for name in rows}
    order = list(rows)
    for number in range(rounds + 1):
        turn = number % len(order)
        for name in (*order[turn:], *order[:turn]):
            started = time.process_time()
            with rows[name]():  # as in sampling, where hooks go on for every step
                call()
            if number:
                times[name].append(time.process_time() - started)
    counts = {"perfusion": len(one), "two_perfusion": len(two), "infusion": len(infusion)}
    return {
        name: {
            "cpu_seconds_per_step": statistics.median(own),
            "cpu_ratio": statistics.median(a / b for a, b in zip(own, times["base"], strict=True)),
            "projections": float(counts.get(name, 0)),
        }
        for name, own in times.items()
    }


def _call(unet: nn.Module, config: dict, side: int) -> Callable[[], Tensor]:
    """One step on fixed inputs; a new encoding tensor each time, as a sampler gives."""
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, config["in_channels"], side, side, generator=generator)
    context = torch.randn(2, 77, config["cross_attention_dim"], generator=generator)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    when = torch.full((2,), 500)

    @torch.no_grad()
    def call() -> Tensor:
        return unet(z, when, context.clone(), added_cond_kwargs=added).sample

    return call
