"""Sizes of a HyperLoRA model, and the names of the layers that it makes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...config import Config, check_range
from ...errors import LayoutError, shown
from ...lora.layout import LayerShape, LoRALayout
from ...vision.features import FeatureSizes

PARTS = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of an attention module, in the order of the latent's tokens."""

VIT_L_14 = FeatureSizes(512, 768, 257, 1024)
"""ArcFace, and CLIP ViT-L/14 at 224 pixels: what the public weights were trained with."""

_MODULE = re.compile(
    r"lora_unet_(?P<block>(?:input|output)_blocks_\d+|middle_block)_(?P<place>\d+)"
    r"_transformer_blocks_(?P<depth>\d+)_(?P<attention>attn[12])"
)


@dataclass(frozen=True)
class HyperLoRAConfig(Config):
    """Sizes, as the paper's networks have them (arXiv:2503.16944, section 3).

    Args:
        face_dim: features of the face embedding.
        face_tokens: tokens that the face embedding becomes.
        image_dim: features of these, and of a token of CLIP vision's penultimate states.
        width: features of the resampler.
        depth: its layers.
        heads: its attention heads.
        head_dim: features of a head.
        basis_size: basis matrices of each LoRA factor, the features of a latent token.

    Raises:
        ConfigError: a value out of range.
    """

    face_dim: int = 512
    face_tokens: int = 16
    image_dim: int = 1024
    width: int = 1024
    depth: int = 4
    heads: int = 12
    head_dim: int = 64
    basis_size: int = 128

    def __post_init__(self) -> None:
        for name in ("face_dim", "image_dim", "width", "basis_size"):
            check_range("HyperLoRA", name, getattr(self, name), 1, 16_384)
        check_range("HyperLoRA", "face_tokens", self.face_tokens, 1, 1024)
        check_range("HyperLoRA", "depth", self.depth, 1, 64)
        check_range("HyperLoRA", "heads", self.heads, 1, 256)
        check_range("HyperLoRA", "head_dim", self.head_dim, 1, 1024)

    def feature_sizes(self, found: FeatureSizes) -> FeatureSizes:
        """Sizes of the encoders that are needed, beside those `found`.

        The weights do not tell the number of image tokens; of the public ones it is known.
        """
        if self.image_dim == VIT_L_14.token_dim:
            return FeatureSizes(self.face_dim, VIT_L_14.image, VIT_L_14.tokens, self.image_dim)
        return FeatureSizes(self.face_dim, found.image, found.tokens, self.image_dim)


def layout_of_modules(modules: Mapping[str, tuple[int, int]], rank: int) -> LoRALayout:
    """The four projections of each attention module, for SDXL.

    Args:
        modules: kohya name of an attention module to its width, and to that of its context.
        rank: of every layer.

    Raises:
        LayoutError: a name is none of an attention module.
    """
    layers = []
    for module, (width, context) in modules.items():
        name = _canonical(module)
        for part in PARTS:
            inner = context if part in ("to_k", "to_v") else width
            layers.append(LayerShape(f"{name}.{part}", inner, width))
    return LoRALayout("sdxl", rank, tuple(layers))


def _canonical(module: str) -> str:
    """LDM path of an attention module from its kohya name."""
    found = _MODULE.fullmatch(module)
    if found is None:
        raise LayoutError(f"'{shown(module)}' names no attention module of SDXL.")
    block = re.sub(r"_(?=\d)", ".", found["block"])
    place = f"{block}.{found['place']}.transformer_blocks.{found['depth']}"
    return f"{place}.{found['attention']}"
