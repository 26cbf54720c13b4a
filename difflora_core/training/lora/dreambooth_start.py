"""Where a DreamBooth run starts: LoRA factors of a group of people, and their random numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, LayoutError, counted
from ...lora.layout import LoRALayout
from ...lora.weights import LoRALayer, LoRAWeights
from .dreambooth_config import DreamBoothConfig


def mixed_generator(*numbers: int) -> torch.Generator:
    """CPU generator seeded by several integers."""
    text = ",".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def starting_weights(
    layout: LoRALayout,
    seeds: Sequence[int],
    config: DreamBoothConfig,
    initial: LoRAWeights | None,
    shared_down: Mapping[str, Tensor] | None,
) -> LoRAWeights:
    """Weights before the first step, one row per person.

    Raises:
        ConfigError: both a LoRA and a shared `down` are given.
        LayoutError: the LoRA does not fit the layout or the people, or a shared `down` is missing
            or is not (r, in).
    """
    if initial is not None and shared_down is not None:
        raise ConfigError("DreamBooth starts from a LoRA or from a shared down, not from both.")
    random = _random_down(layout, [0] * len(seeds) if config.same_start else seeds, config.seed)
    if initial is not None:
        return _grown(initial, layout, random)
    layers = {}
    for shape in layout:
        down = random[shape.name]
        if shared_down is not None:
            shared = shared_down.get(shape.name)
            if shared is None or shared.shape != down.shape[1:]:
                raise LayoutError(
                    f"The shared down factor of {shape.name} must be {tuple(down.shape[1:])}, got "
                    f"{None if shared is None else tuple(shared.shape)}."
                )
            down = shared.detach().expand(len(seeds), -1, -1)
        up = torch.zeros(len(seeds), shape.out_features, layout.rank, dtype=down.dtype)
        layers[shape.name] = LoRALayer(down, up.to(down.device), float(layout.rank))
    return LoRAWeights(layers)


def _random_down(layout: LoRALayout, seeds: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Stock LoRA's start, uniform within 1 / sqrt(in): layer name to (B, r, in)."""
    generators = [mixed_generator(seed, own, 0) for own in seeds]
    return {
        shape.name: torch.stack(
            [torch.rand(layout.rank, shape.in_features, generator=g) * 2 - 1 for g in generators]
        )
        / math.sqrt(shape.in_features)
        for shape in layout
    }


def _grown(initial: LoRAWeights, layout: LoRALayout, random: Mapping[str, Tensor]) -> LoRAWeights:
    """`initial` as a batch at the layout's rank: new components have a random down and a zero up.

    Raises:
        LayoutError: other layers, a higher rank, or a batch of another size.
    """
    people = len(next(iter(random.values())))
    layers = {}
    for shape in layout:
        if shape.name not in initial.layers:
            raise LayoutError(f"The LoRA to start from has no layer {shape.name}.")
        own = initial[shape.name].folded()
        extra = layout.rank - own.rank
        if extra < 0 or own.batch_shape not in (torch.Size(), (people,)):
            raise LayoutError(
                f"The LoRA to start from has rank {own.rank} and batch {tuple(own.batch_shape)}; "
                f"at most rank {layout.rank} and one LoRA, or one for each of "
                f"{counted(people, 'person')}."
            )
        down = own.down.expand(people, -1, -1)
        fill = random[shape.name][:, own.rank :].to(down)
        up = F.pad(own.up.expand(people, -1, -1), (0, extra))
        layers[shape.name] = LoRALayer(torch.cat([down, fill], 1), up, float(layout.rank))
    return LoRAWeights(layers)
