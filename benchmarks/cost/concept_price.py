"""What concepts cost in a step of full-size SDXL: `make bench name=overhead args=--perfusion`.

The real UNet with all its layers and random weights. Layers of equal shape share their weights, so
that it fits into 3 GB; what is computed stays the same. Text encodings do not grow with a picture,
so the price is measured on a small picture, where it weighs most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.base import AdapterSet
from difflora_core.lora.layout import SDXL_UNET_CONFIG, layout_from_unet_config
from difflora_core.methods.base import (
    AppliedAdaptation,
    ConceptMethod,
    PreparedAdaptation,
    TrainedAdaptation,
)
from difflora_core.methods.registry import METHODS
from difflora_core.text.new_words import LearnedWord

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


def random_concepts(
    config: dict, count: int, method: type[ConceptMethod]
) -> list[AppliedAdaptation]:
    """Concepts of the right shapes for every cross-attention layer, as Apply Concept has them."""
    generator = torch.Generator().manual_seed(1)
    layers = layout_from_unet_config("sdxl", config, 1)
    shapes = [shape for shape in layers if shape.name.endswith("attn2.to_v")]
    width = shapes[0].in_features
    concepts = []
    for number in range(count):
        direction = torch.randn(width, generator=generator)
        shared = {"direction": direction, "covector": direction / direction.square().sum()}
        layers = {
            shape.name: {"values": 0.01 * torch.randn(shape.out_features, generator=generator)}
            for shape in shapes
        }
        embeddings = (torch.ones(768), torch.ones(1280))
        word = LearnedWord(f"<word-{number}>", "cat", embeddings, torch.ones(64))
        settings = method.Config()
        concept = TrainedAdaptation(method.name, "sdxl", settings, shared, layers, word)
        concepts.append(AppliedAdaptation(PreparedAdaptation(concept, direction), settings))
    return concepts


def concept_adapters(config: dict) -> dict[str, AdapterSet | None]:
    """Row name to what is attached; None is the base against itself."""
    rows: dict[str, AdapterSet | None] = {"base_again": None}
    for name, method in METHODS.items():
        if issubclass(method, ConceptMethod):
            rows[name] = method.adapters(random_concepts(config, 1, method))
            rows[f"two_{name}"] = method.adapters(random_concepts(config, 2, method))
    return rows


def module_names(config: dict) -> dict[str, str]:
    """Layer name to module path."""
    return layout_from_unet_config("sdxl", config, 1).module_names


def attached(
    unet: nn.Module, adapters: AdapterSet | None, names: dict[str, str]
) -> AbstractContextManager:
    """The UNet with adapters, or as it is."""
    return nullcontext() if adapters is None else attach(unet, adapters, names=names)


def concept_prices(
    pairs: int, config: dict | None = None, side: int = SIDE
) -> dict[str, dict[str, float]]:
    """What a step (batch 2) costs with concepts over the base's, from steps in turn.

    Args:
        pairs: steps of each that are counted.
        config: of the UNet; None takes SDXL's.
        side: of the latent.
    """
    config = dict(config or SDXL_UNET_CONFIG)
    unet, names = small_memory_unet(config), module_names(config)
    step = one_step(unet, config, side)

    def timed(adapters: AdapterSet | None) -> Seconds:
        wall, processor = time.perf_counter(), time.process_time()
        with attached(unet, adapters, names):  # as in sampling, where hooks go on for every step
            step()
        return time.perf_counter() - wall, time.process_time() - processor

    rows = {}
    for name, adapters in concept_adapters(config).items():
        base, own = interleave(partial(timed, None), partial(timed, adapters), pairs, warm_up=2)
        rows.setdefault(BASE, price(base, base) | {"projections": 0.0})
        rows[name] = price(base, own) | {"projections": float(len(adapters or ()))}
    return rows


def one_step(unet: nn.Module, config: dict, side: int) -> Callable[[], Tensor]:
    """One step on fixed inputs whose first row names the concepts.

    The encoding is a new tensor each time, as a sampler gives it.
    """
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(2, config["in_channels"], side, side, generator=generator)
    context = torch.randn(2, 77, config["cross_attention_dim"], generator=generator)
    first = next(kind for kind in METHODS.values() if issubclass(kind, ConceptMethod))
    for place, concept in enumerate(random_concepts(config, 2, first), start=5):
        context[0, place] = concept.adaptation.shared["direction"]  # the word itself
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    added = {"text_embeds": torch.zeros(2, pooled), "time_ids": torch.zeros(2, 6)}
    when = torch.full((2,), 500)

    @torch.no_grad()
    def step() -> Tensor:
        return unet(z, when, context.clone(), added_cond_kwargs=added).sample

    return step
