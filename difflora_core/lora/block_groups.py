"""Strength by place: which part of the UNet a LoRA layer belongs to, read off its name. Ours.

Input blocks hold layout and pose, output blocks texture and colour, cross-attention the words;
artists turn a LoRA down in one of them to keep, say, the composition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..config import Config
from ..errors import ConfigError


@dataclass(frozen=True)
class GroupStrengths(Config):
    """One factor for each part of the UNet; those of a layer's block and attention multiply.

    Attributes:
        input_blocks: blocks on the way down.
        middle_block: the innermost block.
        output_blocks: blocks on the way up.
        self_attention: picture attending to picture.
        cross_attention: picture attending to the prompt.
    """

    input_blocks: float = 1.0
    middle_block: float = 1.0
    output_blocks: float = 1.0
    self_attention: float = 1.0
    cross_attention: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not math.isfinite(getattr(self, field.name)):
                raise ConfigError(f"The strength of {field.name} must be a finite number.")

    def of(self, layer: str) -> float:
        """Factor of a layer: the product over its groups; 1 for a layer outside all of them."""
        return math.prod(getattr(self, group) for group in layer_groups(layer))


_ATTENTIONS = {"attn1": "self_attention", "attn2": "cross_attention"}


def layer_groups(layer: str) -> tuple[str, ...]:
    """Fields of GroupStrengths that a layer belongs to: its block, then its attention.

    Args:
        layer: canonical name, e.g. ``input_blocks.4.1.transformer_blocks.0.attn1.to_q``; the
            first part of an LDM path is the block.
    """
    parts = layer.split(".")
    blocks = {field.name for field in fields(GroupStrengths)} - set(_ATTENTIONS.values())
    found = [parts[0]] if parts[0] in blocks else []
    return (*found, *(_ATTENTIONS[part] for part in parts if part in _ATTENTIONS))
