"""What styles cost in a step of full-size SDXL: `make bench name=overhead args=--styles`.

Of every method that acts in each step, by its recipe's own settings, untrained: what is computed
does not depend on what the weights say. A method whose whole is a new weight costs nothing there.
Steps are timed on a small picture, where a style weighs most, and counted on a large one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from difflora_core import training
from difflora_core.adapters.base import AdapterSet
from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.lora.layout import SDXL_UNET_CONFIG, unet_name_map
from difflora_core.methods.base import (
    AppliedAdaptation,
    Method,
    PreparedAdaptation,
    StyleMethod,
)
from difflora_core.methods.registry import METHODS
from difflora_core.training.picture_task import PictureTask

from .sdxl_step import attached, one_step, small_memory_unet, step_inputs, step_prices

SIDE = 16
"""Of the latent of timed steps: a picture of 128 x 128."""
COUNTED_SIDE = 128
"""Of the latent whose operations are counted: a picture of 1024 x 1024."""


def style_prices(
    pairs: int, config: dict | None = None, side: int = SIDE, counted_side: int = COUNTED_SIDE
) -> dict[str, dict[str, float]]:
    """What a step (batch 2) costs with a style over the base's.

    Args:
        pairs: steps of each that are counted.
        config: of the UNet; None takes SDXL's.
        side: of the latent of timed steps.
        counted_side: of the latent of counted steps.

    Returns:
        Rows of `step_prices` with `operations_ratio`: multiplications and additions of products.
    """
    config = dict(config or SDXL_UNET_CONFIG)
    unet = small_memory_unet(config)
    names = {ldm: path for path, ldm in unet_name_map(config).items()}
    variants: dict[str, AdapterSet | None] = {"base_again": None, **untrained_styles(unet)}
    step = one_step(unet, config, *step_inputs(config, side))
    rows = step_prices(unet, step, variants, names, pairs)
    bare = operations(unet, config, None, names, counted_side)
    for name, row in rows.items():
        style = variants.get(name)
        own = bare if style is None else operations(unet, config, style, names, counted_side)
        row["operations_ratio"] = own / bare
    return rows


def untrained_styles(unet: Any) -> dict[str, AdapterSet]:
    """Method name to what its recipe starts with, of methods that act in every step."""
    task = PictureTask(DiffusersBase(unet, None, None, DDIMScheduler()), None, "sdxl")  # type: ignore[arg-type]
    found = {}
    for name, kind in METHODS.items():
        if issubclass(kind, StyleMethod) and not _is_weights(kind):
            recipe = import_module(f"{training.__name__}.{name}").RECIPE
            (made,) = recipe(task, recipe.Config()).adaptations({})
            found[name] = kind.adapters(
                [AppliedAdaptation(PreparedAdaptation(made), made.settings)]
            )
    return found


def _is_weights(kind: type[Method]) -> bool:
    """Whether a host changes weights once, instead of outputs in every step."""
    return kind.weight_edits.__func__ is not Method.weight_edits.__func__  # type: ignore[attr-defined]


def operations(
    unet: Any, config: dict, adapters: AdapterSet | None, names: Mapping[str, str], side: int
) -> int:
    """Multiplications and additions of a step's products, which are counted and not done."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        z = torch.empty(2, config["in_channels"], side, side)
        context = torch.empty(2, 77, config["cross_attention_dim"])
        with attached(unet, adapters, names):
            one_step(unet, config, z, context)()
    return int(counter.get_total_flops())
