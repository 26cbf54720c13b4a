"""Whether a LoRA's tensors can be what they say, whatever their family.

A host adds what it is given: numbers that are no numbers blacken the picture, and factors that do
not fit are dropped with a line in a log.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LoRAFileError, shown
from .change import is_constant, is_whole, weight_change
from .families import group_keys

_BESIDE = ("dora", "bias_peft")
"""Roles that change nothing about how the others fit together."""


def check_sound(state: Mapping[str, Tensor]) -> None:
    """Looks at every tensor of a LoRA before anything is done with it.

    Args:
        state: key to tensor, as a file has them.

    Raises:
        LoRAFileError: as `check_arrays`; or a tensor holds NaN, an alpha is not one number,
            factors of a layer do not fit each other, or a layer is described twice.
    """
    check_arrays(state)
    for stem, group in group_keys(state)[0].items():
        _check_layer(stem, group)


def check_arrays(state: Mapping[str, Tensor]) -> None:
    """Looks at the kind of every tensor.

    Raises:
        LoRAFileError: one is no array of real numbers; or factors are those of an AdaLoRA, which
            mean something else.
    """
    for key, tensor in state.items():
        _check_array(key, tensor)
        if key.endswith(".lora_E") or ".lora_E." in key:
            raise LoRAFileError(
                f"This file is an AdaLoRA ({shown(key)}): its factors have a scale that the file "
                "does not hold, so neither ComfyUI nor this pack reads it. Use a LoRA."
            )


def _check_array(key: str, tensor: Tensor) -> None:
    """Refuses what no file of weights holds."""
    odd = tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized
    if odd or tensor.is_complex():
        kind = "complex" if tensor.is_complex() else "quantised, sparse or empty"
        raise LoRAFileError(
            f"The tensor {shown(key)} is {kind}: a LoRA holds plain real numbers. Make it again."
        )


def _check_layer(stem: str, group: Mapping[str, Tensor]) -> None:
    """Refuses the tensors of one layer that cannot belong together."""
    alpha = group.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise LoRAFileError(f"{shown(stem)}: alpha should be one number, got {tuple(alpha.shape)}.")
    for role in group:
        if not group[role].numel():
            raise LoRAFileError(
                f"{shown(stem)}: the {role} factor has shape {tuple(group[role].shape)}; this LoRA "
                "is empty or damaged."
            )
        if role.endswith("_peft") and role.removesuffix("_peft") in group:
            raise LoRAFileError(f"Layer {shown(stem)} is described twice, as LoRA and as PEFT.")
    parts = {r.removesuffix("_peft"): t for r, t in group.items() if r not in _BESIDE}
    if not (is_constant(parts) and is_whole(parts)):
        return
    shapes = {role: t.to("meta") for role, t in parts.items() if role != "alpha"}
    try:
        weight_change(shapes)
    except (RuntimeError, IndexError) as error:
        sizes = ", ".join(f"{role} {tuple(t.shape)}" for role, t in shapes.items())
        raise LoRAFileError(
            f"{shown(stem)}: its factors do not fit together or have different ranks (shapes: "
            f"{sizes}); the file is damaged."
        ) from error
