"""A LoRA file's tensors to LoRAWeights and back, in every naming."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LayoutError, LoRAFileError, counted
from ...limits import COMPUTED_SHARE, COMPUTED_VALUES
from ..layout import LoRALayout
from ..weights import LoRALayer, LoRAWeights
from .families import group_keys, layer_from_group, peft_alphas, split_key
from .lycoris import computed_values
from .report import ReadReport, ReadResult, conform, total_error
from .sound import check_arrays
from .stems import (
    Names,
    Naming,
    diffusers_pairs,
    file_stem,
    layer_name,
    other_part,
    stem_table,
    text_encoder_name,
    why_nothing,
)


def to_state_dict(
    weights: LoRAWeights,
    naming: Naming = "kohya_ldm",
    names: Names | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """State dict of one LoRA, on the CPU, every tensor with its own memory.

    Each layer has a down (r, in) and an up (out, r).

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
    to_diffusers = {} if names is None else {v: k for k, v in diffusers_pairs(names).items()}
    state: dict[str, Tensor] = {}
    for name, layer in weights.layers.items():
        stem = file_stem(name, naming, to_diffusers)
        layer = layer.folded() if naming == "diffusers" else layer
        down, up = layer.down, layer.up
        if layer.kernel:
            down, up = down.unflatten(-1, (-1, *layer.kernel)), up[..., None, None]
        tensors = {"lora_down.weight": down, "lora_up.weight": up}
        if naming == "diffusers":
            tensors = {"lora_A.weight": down, "lora_B.weight": up}
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
        state: key to tensor, factors of linear (r, in) or convolution (r, in, h, w) layers; fp16,
            bf16 and fp8 are read as float32.
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
    check_arrays(state)
    groups, unknown = group_keys(state)
    _check_computed(state, groups, rank or 0)
    layers, errors, skipped, outside = _read_groups(groups, names, rank, metadata)
    unused = {key: other_part(key) or "layers that are not edited" for key in unknown} | outside
    if not layers and (reason := why_nothing(state)):
        raise LayoutError(reason)
    if not layers:
        example = next(iter([*unused, *skipped, "it is empty"]))
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
    report = ReadReport(count, ranks, errors, total, missing, skipped, unused)
    return ReadResult(weights, report)


def _check_computed(
    state: Mapping[str, Tensor], groups: Mapping[str, Mapping[str, Tensor]], rank: int
) -> None:
    """Raises LoRAFileError where a small file would become a LoRA of gigabytes."""
    wanted = sum(computed_values(group, rank) for group in groups.values())
    most = COMPUTED_VALUES + COMPUTED_SHARE * sum(tensor.numel() for tensor in state.values())
    if wanted > most:
        raise LoRAFileError(
            f"As a LoRA of rank {rank} this file would become {counted(wanted, 'number')}; up to "
            f"{most} are read of a file of its size. Choose a smaller rank, or another file."
        )


def with_peft_alphas(
    state: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> dict[str, Tensor]:
    """A state dict that holds PEFT's alphas as ``.alpha`` tensors, which every reader knows.

    Args:
        state: key to tensor, as a file has them. An alpha is one number ().
        metadata: metadata of that file, where diffusers stores PEFT's configuration.

    Raises:
        LoRAFileError: that configuration is damaged.
    """
    alphas, result = peft_alphas(metadata), dict(state)
    for key, tensor in state.items():
        stem, role = split_key(key) or ("", "")
        if role == "down_peft" and tensor.ndim and f"{stem}.alpha" not in state:
            alpha = alphas(stem, tensor.shape[0])
            if alpha is not None:
                result[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return result


def _read_groups(
    groups: Mapping[str, Mapping[str, Tensor]],
    names: Names,
    rank: int | None,
    metadata: Mapping[str, str] | None,
) -> tuple[dict[str, LoRALayer], dict[str, float], dict[str, str], dict[str, str]]:
    """Layers and errors by canonical name, skipped stems with reasons, others with their part."""
    table, alphas = stem_table(names), peft_alphas(metadata)
    wanted = set(names.module_names) if isinstance(names, LoRALayout) else None
    layers: dict[str, LoRALayer] = {}
    errors: dict[str, float] = {}
    skipped: dict[str, str] = {}
    outside: dict[str, str] = {}
    for stem, group in groups.items():
        name = layer_name(stem, table) or text_encoder_name(stem)
        if name is None or (wanted is not None and name not in wanted):
            convolution = any(math.prod(tensor.shape[2:]) > 1 for tensor in group.values())
            kind = "convolutions" if convolution else "layers that are not edited"
            outside[stem] = other_part(stem) or kind
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
        if "bias" in group or "bias_peft" in group:
            skipped[f"{stem} (bias)"] = "changes a bias"
    return layers, errors, skipped, outside
