"""What concepts cost in a step of full-size SDXL: `make bench name=overhead args=--perfusion`.

Text encodings do not grow with a picture, so the price is measured on a small picture, where it
weighs most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

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

from .sdxl_step import SIDE, one_step, small_memory_unet, step_inputs, step_prices


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
    unet = small_memory_unet(config)
    step = concept_step(unet, config, side)
    return step_prices(unet, step, concept_adapters(config), module_names(config), pairs)


def concept_step(unet: nn.Module, config: dict, side: int) -> Callable[[], Tensor]:
    """One step on fixed inputs whose first row names the concepts."""
    z, context = step_inputs(config, side)
    first = next(kind for kind in METHODS.values() if issubclass(kind, ConceptMethod))
    for place, concept in enumerate(random_concepts(config, 2, first), start=5):
        context[0, place] = concept.adaptation.shared["direction"]  # the word itself
    return one_step(unet, config, z, context)
