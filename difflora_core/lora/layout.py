"""LoRALayout: the layers a LoRA edits, their order and shapes; derived from the UNet's config."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn

from ..config import build, parse_json
from ..errors import ConfigError, LayoutError, shown
from ..limits import FEATURES, LAYERS, LAYOUT_VALUES, NAME_LENGTH, RANK
from .weights import LoRAWeights

ATTENTION_PROJECTIONS = tuple(
    f"{attention}.{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
)

TRANSFORMER_LAYERS = (*ATTENTION_PROJECTIONS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
CONVOLUTIONS = ("in_layers.2", "out_layers.3", "skip_connection", "op", "conv")
TARGETS = {
    "attention": ATTENTION_PROJECTIONS,
    "transformer": TRANSFORMER_LAYERS,
    "attention_and_convolutions": (*ATTENTION_PROJECTIONS, *CONVOLUTIONS),
    "all": (*TRANSFORMER_LAYERS, *CONVOLUTIONS),
}
"""Endings of layer names: a LoRA's usual set, with feed-forward layers as kohya's trainer has them,
with LoCon's convolutions, and with both."""


def edited_layers(targets: str, *starts: Iterable[str] | None) -> tuple[str, ...]:
    """Endings of names, and names, of the layers that a LoRA edits.

    Args:
        targets: key of TARGETS.
        starts: the layers of what it starts from, where there is such a thing.
    """
    return (*TARGETS[targets], *(layer for start in starts for layer in start or ()))


# Inner parts of a diffusers residual block and their LDM names; attention parts share their names.
_RESNET_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER_PARTS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}

# Published configuration of the base model (only what differs from the diffusers defaults).
SDXL_UNET_CONFIG: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

SD15_UNET_CONFIG: Mapping[str, Any] = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class LayerShape:
    """One layer of a layout: canonical name, input and output width, name in diffusers.

    Of a convolution the widths are its channels.
    """

    name: str
    in_features: int
    out_features: int
    diffusers_name: str = ""


@dataclass(frozen=True)
class LoRALayout:
    """Ordered layers of a LoRA for one base model family, all of one rank. Ours.

    Args:
        base: family name of the base model (``sdxl``, ``sd15``, ``demo``).
        rank: components per layer, at least 1.
        layers: shapes in the order in which tokens are made; names are unique.
    """

    base: str
    rank: int
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        base = shown(self.base)
        if self.rank < 1:
            raise LayoutError(f"The LoRA rank must be at least 1, got {self.rank}.")
        if len(self.layers) > LAYERS:
            raise LayoutError(f"The layout for {base} has more than {LAYERS} layers.")
        names = [self.base, *(layer.name for layer in self.layers)]
        names += [layer.diffusers_name or layer.name for layer in self.layers]
        if not all(0 < len(name) <= NAME_LENGTH for name in names):
            raise LayoutError(f"The layout for {base} has a name that is empty or too long.")
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise LayoutError(f"The layout for {base} names a layer twice.")
        sizes = [n for layer in self.layers for n in (layer.in_features, layer.out_features)]
        possible = self.rank <= RANK and all(0 < size <= FEATURES for size in sizes)
        if not possible or self.numel > LAYOUT_VALUES:
            raise LayoutError(f"The layout for {base} has impossible sizes.")

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerShape]:
        return iter(self.layers)

    @cached_property
    def hash(self) -> str:
        """Stable hex digest of base, rank, names and shapes; stored in every checkpoint."""
        shapes = [[layer.name, layer.in_features, layer.out_features] for layer in self.layers]
        text = json.dumps([self.base, self.rank, shapes], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def numel(self) -> int:
        """Number of LoRA values: sum of r * (in + out)."""
        return self.rank * sum(layer.in_features + layer.out_features for layer in self.layers)

    @property
    def module_names(self) -> dict[str, str]:
        """Canonical name to module path in the diffusers UNet (the ``names`` of ``attach``)."""
        return {layer.name: layer.diffusers_name or layer.name for layer in self.layers}

    def check(self, weights: LoRAWeights) -> None:
        """Compare weights with this layout: same layers, shapes and rank; order is free.

        Raises:
            LayoutError: naming the first layer that does not fit.
        """
        expected = {layer.name for layer in self.layers}
        missing = [layer.name for layer in self.layers if layer.name not in weights.layers]
        extra = [name for name in weights if name not in expected]
        if missing or extra:
            raise LayoutError(
                f"This LoRA does not have the layers of {self.base}: {len(missing)} missing "
                f"(first {missing[:1]}), {len(extra)} unexpected (first {extra[:1]}). "
                f"Use a LoRA made for {self.base}."
            )
        for shape in self.layers:
            layer = weights[shape.name]
            got = (layer.out_features, layer.in_features, layer.rank)
            seen = shape.in_features * math.prod(layer.kernel)
            wanted = (shape.out_features, seen, self.rank)
            if got != wanted:
                raise LayoutError(
                    f"Layer {shape.name} has (out, in, rank) {got}, but {self.base} needs "
                    f"{wanted}. Use a LoRA made for {self.base}, brought to rank {self.rank}."
                )

    def to_json(self) -> str:
        """JSON text; ``from_json`` gives an equal layout."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> LoRALayout:
        """Layout from the text of ``to_json``.

        Raises:
            LayoutError: when the text is not a layout.
        """
        return LoRALayout.from_dict(parse_json(text, "The LoRA layout", LayoutError))

    @staticmethod
    def from_dict(data: Any) -> LoRALayout:
        """Layout from what the text of ``to_json`` holds.

        Raises:
            LayoutError: when it is not a layout, or one of impossible sizes.
        """
        layers = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(layers, list) or not 0 < len(layers) <= LAYERS:
            raise LayoutError(
                f"A LoRA layout has 1 to {LAYERS} layers; this one has impossible sizes."
            )
        try:
            layout: LoRALayout = build(LoRALayout, data, "The LoRA layout")
        except ConfigError as error:
            raise LayoutError(f"This is not a LoRA layout: {error}") from error
        return layout


def module_size(module: object) -> tuple[int, ...]:
    """(in, out) features of a linear layer; of a convolution (in, out, kernel height and width).

    It asks for attributes, since bases keep their weights in layers of many classes. Empty for
    other modules.
    """
    kernel = getattr(module, "kernel_size", ())
    names = ("in_channels", "out_channels") if kernel else ("in_features", "out_features")
    sizes = [getattr(module, name) for name in names if hasattr(module, name)]
    return (*sizes, *kernel) if len(sizes) == 2 else ()


@lru_cache(maxsize=8)
def _meta_unet(config_text: str) -> nn.Module:
    """The UNet of a config, with shapes only (meta device); cached, treat as read-only."""
    from diffusers import UNet2DConditionModel

    config = json.loads(config_text)
    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**config)
    return unet


def _config_text(config: Mapping[str, Any]) -> str:
    """Config as cache key, without the bookkeeping fields that diffusers adds to saved files."""
    return json.dumps({k: v for k, v in config.items() if not k.startswith("_")}, sort_keys=True)


def _block_prefixes(unet: nn.Module) -> dict[str, str]:
    """Diffusers block path to LDM block path, counted from the live module tree."""
    prefixes = dict(_OUTER_PARTS)
    number = 1  # input_blocks.0 is conv_in
    for b, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        attentions = len(getattr(block, "attentions", None) or ())
        for i in range(len(block.resnets)):
            prefixes[f"down_blocks.{b}.resnets.{i}"] = f"input_blocks.{number}.0"
            if i < attentions:
                prefixes[f"down_blocks.{b}.attentions.{i}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers is not None:
            prefixes[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    prefixes["mid_block.resnets.0"] = "middle_block.0"
    prefixes["mid_block.attentions.0"] = "middle_block.1"
    prefixes["mid_block.resnets.1"] = "middle_block.2"
    number = 0
    for b, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        attentions = len(getattr(block, "attentions", None) or ())
        last = len(block.resnets) - 1
        for i in range(last + 1):
            prefixes[f"up_blocks.{b}.resnets.{i}"] = f"output_blocks.{number}.0"
            if i < attentions:
                prefixes[f"up_blocks.{b}.attentions.{i}"] = f"output_blocks.{number}.1"
            if i == last and block.upsamplers is not None:
                place = 2 if i < attentions else 1
                prefixes[f"up_blocks.{b}.upsamplers.0.conv"] = (
                    f"output_blocks.{number}.{place}.conv"
                )
            number += 1
    return prefixes


def _ldm_name(path: str, prefixes: Mapping[str, str]) -> str | None:
    """LDM name of one diffusers module path, None when LDM has no such module."""
    if path in prefixes:
        return prefixes[path]
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        prefix, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if prefix in prefixes:
            inner = _RESNET_PARTS.get(rest) if parts[cut - 2] == "resnets" else rest
            return None if inner is None else f"{prefixes[prefix]}.{inner}"
    return None


def unet_name_map(config: Mapping[str, Any]) -> dict[str, str]:
    """Diffusers module path to LDM path for every layer with a weight.

    Args:
        config: configuration of a diffusers ``UNet2DConditionModel`` (``dict(unet.config)``).

    Returns:
        Ordered map, for example ``down_blocks.2.attentions.0.proj_in`` to
        ``input_blocks.7.1.proj_in``.
    """
    unet = _meta_unet(_config_text(config))
    prefixes = _block_prefixes(unet)
    names = {}
    for path, module in unet.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor):
            ldm = _ldm_name(path, prefixes)
            if ldm is not None:
                names[path] = ldm
    return names


def layout_from_unet_config(
    base: str,
    config: Mapping[str, Any],
    rank: int,
    targets: tuple[str, ...] = ATTENTION_PROJECTIONS,
) -> LoRALayout:
    """Layout of the layers whose canonical name ends in one of ``targets``. Ours.

    Args:
        base: family name stored in the layout.
        config: configuration of a diffusers ``UNet2DConditionModel``; built on the meta device.
        rank: LoRA rank of every layer.
        targets: names, or endings of them; the default is every attention projection.

    Raises:
        LayoutError: when no layer matches.
    """
    unet = _meta_unet(_config_text(config))
    layers, endings = [], tuple(f".{target}" for target in targets)
    for path, ldm in unet_name_map(config).items():
        size = module_size(unet.get_submodule(path))
        if size and f".{ldm}".endswith(endings):
            layers.append(LayerShape(ldm, size[0], size[1], path))
    if not layers:
        raise LayoutError(f"The base model {base} has no layer that ends in {targets}.")
    return LoRALayout(base, rank, tuple(layers))


def sdxl_layout(rank: int) -> LoRALayout:
    """The 560 attention projections of SDXL."""
    return layout_from_unet_config("sdxl", SDXL_UNET_CONFIG, rank)
