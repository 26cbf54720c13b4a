"""A LoRA under names that a host knows: what it would drop in silence gets another name."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from ...errors import LoRAFileError, shown
from .change import keys_by_role, lokr_factors
from .stems import layer_name

_SUFFIXES = {
    "up": ".lora_up.weight",
    "down": ".lora_down.weight",
    "up_peft": ".lora_B.weight",
    "down_peft": ".lora_A.weight",
    "mid": ".lora_mid.weight",
    "dora": ".dora_scale",
    "bias": ".diff_b",
    "bias_peft": ".diff_b",
    "reshape": ".reshape_weight",
    "whole weight": ".set_weight",
    **{role: f".{role}.weight" for role in ("a1", "a2", "b1", "b2")},
}
"""Role to its suffix, where that is not the role itself."""
_TAKEN = {
    *_SUFFIXES.values(),
    *(f"{link}.{side}.weight" for link in ("_lora", ".lora") for side in ("up", "down")),
    *(f".lora_linear_layer.{side}.weight" for side in ("up", "down")),
    *(f".lora_{side}{name}" for side in "AB" for name in ("", ".default.weight")),
    *(".w_norm", ".b_norm"),
}
"""Suffixes that ComfyUI reads, besides those that are the role itself."""


def with_known_names(
    state: Mapping[str, Tensor], table: Mapping[str, str], known: Container[str]
) -> dict[str, Tensor]:
    """A state dict whose layers a host finds.

    PEFT's exports become kohya's names, PEFT's magnitude vectors DoRA scales and its biases
    differences of biases, scaled as PEFT does. LoKr in Tucker form is multiplied out.

    Args:
        state: key to tensor, as a file has them.
        table: stem to canonical layer, from `stems.stem_table`.
        known: stems that the host knows; they stay.

    Raises:
        LoRAFileError: a layer is there under two names.
    """
    result = dict(state)
    taken_by: dict[str, str] = {}
    for stem, keys in keys_by_role(state).items():
        layer = layer_name(stem, table)
        if stem not in known and layer is None:
            continue
        own = stem if stem in known else f"lora_unet_{layer}".replace(".", "_")
        if taken_by.setdefault(own, stem) != stem:
            raise LoRAFileError(
                f"Layer {shown(stem)} is in this file under two names; it seems to hold several "
                "adapters. Save them as separate files."
            )
        for role, key in keys.items():
            suffix = key[len(stem) :]
            taken = suffix in _TAKEN or suffix == f".{role}"
            name = own + (suffix if taken else _SUFFIXES.get(role, f".{role}"))
            if name != key and name in result:
                raise LoRAFileError(f"{shown(stem)} is in this file under two names.")
            value = _converted(role, state[key], state, keys)
            if name != key:
                del result[key]
            result[name] = value
        if "lokr_t2" in keys:
            _unfold_tucker(result, own, {role: state[key] for role, key in keys.items()})
        if "oft_blocks" in keys and state[keys["oft_blocks"]].ndim == 4:
            result.setdefault(f"{own}.alpha", torch.tensor(0.0))  # ComfyUI skips BOFT without one
    return result


def _unfold_tucker(result: dict[str, Tensor], stem: str, parts: dict[str, Tensor]) -> None:
    """Writes a LoKr layer in Tucker form with whole factors; ComfyUI fails on the other form."""
    for role in parts:
        result.pop(f"{stem}.{role}")
    for role, matrix in lokr_factors(parts).items():
        result[f"{stem}.{role}"] = matrix


def _converted(
    role: str, tensor: Tensor, state: Mapping[str, Tensor], keys: Mapping[str, str]
) -> Tensor:
    """A tensor as it stands under its new name."""
    if role == "dora" and tensor.ndim == 1 and len(tensor) == _outputs(state, keys):
        return tensor[:, None]
    if role == "bias_peft" and "alpha" in keys and "down_peft" in keys:
        return tensor.float() * float(state[keys["alpha"]]) / len(state[keys["down_peft"]])
    return tensor


def _outputs(state: Mapping[str, Tensor], keys: Mapping[str, str]) -> int | None:
    """Outputs of a layer of LoRA factors."""
    up = keys.get("up") or keys.get("up_peft")
    return len(state[up]) if up else None
