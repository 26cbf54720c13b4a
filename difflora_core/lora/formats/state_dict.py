"""Key names of LoRA files to canonical layer names and back: every family that ComfyUI knows, and
the PEFT/diffusers export that it drops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...errors import LayoutError, LoRAFileError
from ..layout import LoRALayout
from ..weights import LoRALayer, LoRAWeights
from .groups import group_keys, layer_from_group, peft_alphas
from .report import ReadReport, ReadResult, conform, total_error

Naming = Literal["kohya_ldm", "kohya_diffusers", "generic", "diffusers"]
Names = LoRALayout | Mapping[str, str]

_TEXT_KOHYA = re.compile(
    r"lora_te(?P<n>[12]?)_text_model_encoder_layers_(?P<layer>\d+)_"
    r"(?P<block>self_attn|mlp)_(?P<part>[qkv]_proj|out_proj|fc[12])$"
)
_TEXT_PROJECTION = re.compile(r"lora_te(?P<n>[12]?)_text_projection$")
_TEXT_DIFFUSERS = re.compile(r"text_encoder(?P<n>_2)?\.(?:base_model\.model\.)?(?P<path>.+)$")


def _pairs(names: Names) -> dict[str, str]:
    """Diffusers name to canonical name."""
    if isinstance(names, LoRALayout):
        return {layer.diffusers_name or layer.name: layer.name for layer in names}
    return dict(names)


def stem_table(names: Names) -> dict[str, str]:
    """Every accepted UNet stem to its canonical layer name.

    Args:
        names: a layout, or a map of diffusers names to canonical names (``unet_name_map``).
    """
    table: dict[str, str] = {}
    for diffusers, ldm in _pairs(names).items():
        old = diffusers.replace(".to_", ".processor.to_")
        dotted = (diffusers, old, old.removesuffix(".0"), diffusers.replace(".to_out.0", ".to_out"))
        stems = [f"lora_unet_{ldm.replace('.', '_')}", f"diffusion_model.{ldm}", ldm]
        stems += [f"{p}_{diffusers.replace('.', '_')}" for p in ("lora_unet", "lycoris")]
        prefixes = ("", "unet.", "base_model.model.", "unet.base_model.model.")
        stems += [prefix + name for prefix in prefixes for name in dotted]
        table.update({stem: ldm for stem in stems})
    return table


def _text_encoder_name(stem: str) -> str | None:
    """Canonical name (te1., te2.) of a text encoder stem."""
    match = _TEXT_KOHYA.match(stem)
    if match:
        path = f"text_model.encoder.layers.{match['layer']}.{match['block']}.{match['part']}"
        return f"te{match['n'] or 1}.{path}"
    match = _TEXT_PROJECTION.match(stem)
    if match:
        return f"te{match['n'] or 1}.text_projection"
    match = _TEXT_DIFFUSERS.match(stem)
    return f"te{2 if match['n'] else 1}.{match['path']}" if match else None


def _stem(name: str, naming: Naming, to_diffusers: Mapping[str, str]) -> str:
    """File stem of a canonical layer."""
    encoder = re.match(r"te([12])\.(.+)$", name)
    if encoder and naming == "diffusers":
        return f"text_encoder{'_2' if encoder[1] == '2' else ''}.{encoder[2]}"
    if encoder:
        return f"lora_te{encoder[1]}_{encoder[2].replace('.', '_')}"
    if naming == "kohya_ldm":
        return f"lora_unet_{name.replace('.', '_')}"
    if naming == "generic":
        return f"diffusion_model.{name}"
    diffusers = to_diffusers.get(name)
    if diffusers is None:
        raise LayoutError(f"The diffusers name of layer {name} is not known for this base model.")
    return (
        f"unet.{diffusers}" if naming == "diffusers" else f"lora_unet_{diffusers.replace('.', '_')}"
    )


def to_state_dict(
    weights: LoRAWeights,
    naming: Naming = "kohya_ldm",
    names: Names | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """State dict of one LoRA, on the CPU, every tensor with its own memory.

    Args:
        weights: one LoRA (no batch).
        naming: ``kohya_ldm`` (what kohya's SDXL trainer writes; default), ``kohya_diffusers``,
            ``generic`` (``diffusion_model.``): lora_up, lora_down and alpha; or ``diffusers``:
            lora_A and lora_B with alpha folded into lora_B, as diffusers expects.
        names: layout or map of diffusers names; needed for the two diffusers namings.
        dtype: dtype of the factors, None keeps theirs; alpha is always float32.

    Raises:
        LayoutError: when the weights are a batch or a diffusers name is not known.
        LoRAFileError: when a value does not fit the dtype.
    """
    if naming not in ("kohya_ldm", "kohya_diffusers", "generic", "diffusers"):
        raise LoRAFileError(f"Unknown LoRA key naming {naming!r}.")
    if weights.batch_shape:
        raise LayoutError("A LoRA file holds one LoRA: choose one of the batch first.")
    to_diffusers = {} if names is None else {v: k for k, v in _pairs(names).items()}
    state: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        stem = _stem(name, naming, to_diffusers)
        if naming == "diffusers":
            layer = layer.folded()
            tensors = {"lora_A.weight": layer.down, "lora_B.weight": layer.up}
        else:
            tensors = {"lora_down.weight": layer.down, "lora_up.weight": layer.up}
        for suffix, tensor in tensors.items():
            value = tensor.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
            if not torch.isfinite(value.float()).all():
                raise LoRAFileError(
                    f"Layer {name} has values that are not finite in {value.dtype}; "
                    "nothing was written."
                )
            state[f"{stem}.{suffix}"] = value
        if naming != "diffusers":
            state[f"{stem}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def from_state_dict(
    state: Mapping[str, Tensor],
    names: Names,
    rank: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ReadResult:
    """Read a LoRA of any known key family.

    Args:
        state: key to tensor; fp16, bf16 and fp8 are read as float32.
        names: a layout: the result then has exactly its layers, shapes and rank; or a map of
            diffusers names (``unet_name_map``): the result has every layer found, at its own rank,
            text encoders included.
        rank: rank for LoKr, LoHa and whole weight changes; the layout's rank when None.
        metadata: metadata of the file; PEFT's alpha is stored there.

    Returns:
        Weights in float32 or float64, and a report; nothing is dropped silently.

    Raises:
        LoRAFileError: damaged tensors, DoRA, or nothing readable.
        LayoutError: when the LoRA is for another base model.
    """
    layout = names if isinstance(names, LoRALayout) else None
    rank = layout.rank if rank is None and layout is not None else rank
    groups, unused = group_keys(state)
    layers, errors, skipped, outside = _read_groups(groups, names, rank, metadata)
    unused += outside
    if not layers:
        example = (unused or list(skipped) or ["it is empty"])[0]
        raise LayoutError(
            "No layer of this LoRA belongs to the base model"
            f"{'' if layout is None else f' {layout.base}'} (for example {example}). "
            "Use a LoRA made for this base model."
        )
    ranks = tuple(sorted({layer.rank for layer in layers.values()}))
    count = len(layers)
    missing: tuple[str, ...] = ()
    if layout is not None:
        layers, missing = conform(layers, layout, errors)
    weights = LoRAWeights(layers)
    total = total_error(weights, errors)
    report = ReadReport(count, ranks, errors, total, missing, skipped, tuple(unused))
    return ReadResult(weights, report)


def _read_groups(
    groups: Mapping[str, Mapping[str, Tensor]],
    names: Names,
    rank: int | None,
    metadata: Mapping[str, str] | None,
) -> tuple[dict[str, LoRALayer], dict[str, float], dict[str, str], list[str]]:
    """Layers and errors by canonical name, skipped stems with reasons, stems of no layer."""
    table, alphas = stem_table(names), peft_alphas(metadata)
    wanted = set(names.module_names) if isinstance(names, LoRALayout) else None
    layers: dict[str, LoRALayer] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    outside = []
    for stem, group in groups.items():
        name = table.get(stem) or _text_encoder_name(stem)
        if name is None or (wanted is not None and name not in wanted):
            outside.append(stem)
            continue
        down = group.get("down_peft")
        peft_alpha = None if down is None or not down.ndim else alphas(stem, down.shape[0])
        found = layer_from_group(stem, group, rank, peft_alpha)
        if isinstance(found, str):
            skipped[stem] = found
            continue
        if name in layers:
            raise LoRAFileError(f"Layer {name} is in this file under two names (one is {stem}).")
        layers[name], error = found
        if error > 0:
            errors[name] = error
        if "bias" in group:
            skipped[f"{stem} (bias)"] = "changes a bias"
    return layers, errors, skipped, outside
