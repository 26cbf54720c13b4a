"""The adapter families of LoRA files: the tensors of one layer in any form to a LoRALayer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...config import parse_json
from ...errors import LayoutError, LoRAFileError, described, shown
from ...limits import NAME_LENGTH, NUMBER
from ..weights import LoRALayer
from .lycoris import check_size, full_layer, loha_layer, lokr_layer

_ADAPTER = r"(?:\.(?!weight$)[\w-]+)?"  # PEFT writes its adapter name here: lora_A.default.weight
_SUFFIXES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:up|linear_layer\.up){_ADAPTER}\.weight", "up"),
    (rf"\.lora_(?:down|linear_layer\.down){_ADAPTER}\.weight", "down"),
    (r"[._]lora\.up\.weight", "up"),
    (r"[._]lora\.down\.weight", "down"),
    (rf"\.lora_B{_ADAPTER}\.weight", "up_peft"),
    (rf"\.lora_A{_ADAPTER}\.weight", "down_peft"),
    (r"\.lora_B", "up_peft"),
    (r"\.lora_A", "down_peft"),
    (r"\.alpha", "alpha"),
    (r"\.lora_mid\.weight", "mid"),
    (r"\.dora_scale", "dora"),
    (r"\.lora_magnitude_vector(?:\.[\w-]+)*", "dora"),
    # where a role is left out here, the suffix is the role
    (r"\.(lokr_w[12](?:_[ab])?|lokr_t2|hada_w[12]_[ab]|hada_t[12]|diff)", ""),
    (r"\.w_norm", "diff"),
    (r"\.reshape_weight", "reshape"),
    (r"\.set_weight", "whole weight"),
    (r"\.(?:diff_b|b_norm)", "bias"),
    (rf"\.(?:lora_B{_ADAPTER}\.bias|lora_bias)", "bias_peft"),
    (r"\.(oft_blocks|oft_diag|rescale)", ""),
    (r"\.([ab][12])\.weight", ""),
)
_PATTERNS = tuple((re.compile(f"(.+?){suffix}$"), role) for suffix, role in _SUFFIXES)
_PEFT_PARTS = ("unet.", "text_encoder.", "text_encoder_2.")
_TUCKER = "LoKr or LoHa convolution in Tucker form"
_OTHER = "OFT, BOFT or GLoRA, not a low-rank sum"
_UNSUPPORTED = {
    **dict.fromkeys(("lokr_t2", "hada_t1", "hada_t2"), _TUCKER),
    "reshape": "changes the shape of the weight",
    "whole weight": "replaces a whole weight",
    **dict.fromkeys(("bias", "bias_peft"), "changes a bias only"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "rescale", "a1", "a2", "b1", "b2"), _OTHER),
}
_BIASES = {"bias", "bias_peft"}
_WITH_KERNEL = {"down", "down_peft", "mid", "diff", "lokr_w2"}
"""Roles that hold the kernel of a convolution; those of the others are 1 x 1."""


def split_key(key: str) -> tuple[str, str] | None:
    """(stem, role) of a key of a LoRA file, None when no known suffix matches."""
    if len(key) > NAME_LENGTH:  # matching could take hours
        return None
    for pattern, role in _PATTERNS:
        match = pattern.match(key)
        if match:
            return match[1], role or match[2]
    return None


def group_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Tensors of a state dict by stem and role, and the keys without a known suffix.

    Raises:
        LoRAFileError: when a layer has two tensors for one role (two adapters in one file), or a
            tensor holds NaN or infinity.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
            continue
        stem, role = split
        group = groups.setdefault(stem, {})
        if role in group:
            raise LoRAFileError(
                f"Layer {shown(stem)} is described twice in this file (at {shown(key)}); it seems "
                "to hold several adapters. Save them as separate files."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise LoRAFileError(
                f"The tensor {shown(key)} holds NaN or infinite values: this LoRA is broken "
                "(training diverged, or the file is damaged)."
            )
        group[role] = tensor
    return groups, unknown


def _plain(stem: str, role: str, tensor: Tensor) -> Tensor | None:
    """Matrix (out, in) in float32 or better, a kernel flattened into ``in``; None for others."""
    if not tensor.is_floating_point():
        raise LoRAFileError(f"{stem}: the {role} factor holds {tensor.dtype}, not real numbers.")
    kernel = tensor.shape[2:]
    if kernel and (len(kernel) != 2 or (role not in _WITH_KERNEL and math.prod(kernel) != 1)):
        return None
    if tensor.ndim < 2 or not tensor.numel():
        raise LoRAFileError(f"{stem}: the {role} factor has shape {tuple(tensor.shape)}.")
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).flatten(1)


def _kernel(stem: str, group: Mapping[str, Tensor]) -> tuple[int, ...]:
    """(height, width) of a convolution's kernel; empty for a linear layer."""
    kernels = [tuple(group[role].shape[2:]) for role in _WITH_KERNEL if role in group]
    if sum(math.prod(kernel) > 1 for kernel in kernels) > 1:
        raise LoRAFileError(f"{stem}: two of its factors have a kernel; the file is damaged.")
    return max(kernels, key=lambda kernel: (math.prod(kernel), len(kernel)), default=())


def _alpha(stem: str, group: Mapping[str, Tensor]) -> float | None:
    """The layer's alpha, None when the file has none."""
    tensor = group.get("alpha")
    if tensor is None:
        return None
    if tensor.numel() != 1 or tensor.is_complex():
        raise LoRAFileError(f"{stem}: alpha should be one number, got {tuple(tensor.shape)}.")
    return float(tensor.double())


def layer_from_group(
    stem: str, group: Mapping[str, Tensor], rank: int | None, peft_alpha: float | None
) -> tuple[LoRALayer, float] | str:
    """One LoRA layer from the tensors of a stem.

    Args:
        stem: for messages.
        group: role to tensor, from ``group_keys``.
        rank: rank for layers that are not stored as LoRA factors (LoKr, LoHa, ``.diff``).
        peft_alpha: alpha of PEFT factors that have none of their own; None means scale 1.

    Returns:
        Layer, with the kernel of a convolution, and the relative error of its delta W (0 for
        plain LoRA); or the reason why the layer cannot be read.

    Raises:
        LoRAFileError: when factors are missing, do not fit, or need the base weight (DoRA).
    """
    if "dora" in group:
        raise LoRAFileError(
            f"{stem}: this is a DoRA. Its effect depends on the base model's weights, so it is not "
            "a LoRA; load it with the host's own loader, or train it without weight decomposition."
        )
    reasons = [_UNSUPPORTED[r] for r in group if r in _UNSUPPORTED and r not in _BIASES]
    if "diff" in group and group["diff"].ndim == 1:
        reasons.append("changes a norm only")
    matrices = {}
    for role in group:
        if role != "alpha" and role not in _UNSUPPORTED and not reasons:
            matrix = _plain(stem, role, group[role])
            if matrix is None:
                reasons.append("convolution of an unknown form")
            elif role.removesuffix("_peft") in matrices:
                raise LoRAFileError(f"Layer {stem} is described twice, as LoRA and as PEFT.")
            else:
                matrices[role.removesuffix("_peft")] = matrix
    if reasons:
        return reasons[0]
    if not matrices:
        return _UNSUPPORTED["bias"] if _BIASES & set(group) else "has no factors"
    if len({role[:4] if role[:4] in ("lokr", "hada", "diff") else "" for role in matrices}) > 1:
        raise LoRAFileError(f"Layer {stem} is described twice, by {', '.join(sorted(matrices))}.")
    if len({matrix.dtype for matrix in matrices.values()}) > 1:
        matrices = {role: matrix.double() for role, matrix in matrices.items()}
    alpha = _alpha(stem, group)
    if alpha is None and "up_peft" in group:
        alpha = peft_alpha
    layer, error = _layer(stem, matrices, alpha, rank)
    return replace(layer, kernel=_kernel(stem, group)), error


def _layer(
    stem: str, matrices: Mapping[str, Tensor], alpha: float | None, rank: int | None
) -> tuple[LoRALayer, float]:
    """The layer of checked matrices, and its error; sizes and numbers are judged."""
    if any(float(matrix.abs().max()) > NUMBER for matrix in matrices.values()):
        raise LoRAFileError(f"{stem}: a factor holds numbers beyond {NUMBER:g}; it is broken.")
    try:
        if "up" in matrices or "down" in matrices:
            layer, error = _factors(stem, matrices, alpha), 0.0
        else:
            layer, error = _approximated(stem, matrices, alpha, rank)
    except (RuntimeError, LayoutError) as failure:  # matrices whose inner sizes do not agree
        raise LoRAFileError(f"{stem}: the tensors do not fit together ({failure}).") from failure
    largest = layer.rank * float(layer.up.abs().max()) * float(layer.down.abs().max())
    if not max(largest, 1.0) * abs(layer.scaling) <= NUMBER:
        raise LoRAFileError(f"{stem}: it changes weights by more than {NUMBER:g}; it is broken.")
    return layer, error


def _factors(stem: str, matrices: Mapping[str, Tensor], alpha: float | None) -> LoRALayer:
    """Plain LoRA factors."""
    up, down = matrices.get("up"), matrices.get("down")
    if up is None or down is None:
        have, lack = ("up", "down") if down is None else ("down", "up")
        raise LoRAFileError(
            f"{stem}: the {have} factor is there, but the {lack} factor is missing."
        )
    if up.shape[1] != down.shape[0]:
        raise LoRAFileError(
            f"{stem}: up {tuple(up.shape)} and down {tuple(down.shape)} have different ranks; "
            "the file is damaged."
        )
    if "mid" in matrices:  # core of a convolution in Tucker form (LyCORIS, arXiv 2309.14859)
        down = _inner(stem, matrices["mid"], down)
    check_size(len(up), down.shape[1], len(down), 0)
    return LoRALayer(down, up, float(down.shape[0]) if alpha is None else alpha)


def _inner(stem: str, core: Tensor, down: Tensor) -> Tensor:
    """The down factor (r, in kh kw) of a core (r, s kh kw) and its own factor (s, in)."""
    places, left = divmod(core.shape[1], len(down))
    if left:
        raise LoRAFileError(f"{stem}: the core of the convolution does not fit; it is damaged.")
    by_place = core.unflatten(1, (len(down), places))
    return torch.einsum("rsk, si -> rik", by_place, down).flatten(1)


def _approximated(
    stem: str, matrices: Mapping[str, Tensor], alpha: float | None, rank: int | None
) -> tuple[LoRALayer, float]:
    """LoKr, LoHa or whole weight change as truncated SVD."""
    if rank is None:
        raise LoRAFileError(
            f"{stem}: this layer is stored as LoKr, LoHa or a whole weight change. Choose a rank "
            "to read it as LoRA."
        )
    if "diff" in matrices:
        layer, error = full_layer(matrices["diff"], rank)
    elif any(role.startswith("hada") for role in matrices):
        layer, error = loha_layer(matrices, alpha, rank)
    else:
        layer, error = lokr_layer(matrices, alpha, rank)
    return layer, float(error)


def peft_alphas(metadata: Mapping[str, str] | None) -> Callable[[str, int], float | None]:
    """Alpha by (stem, rank) from the PEFT configuration that diffusers stores in the metadata.

    PEFT files have no ``.alpha`` tensors; without this their scale would silently read as 1.

    Raises:
        LoRAFileError: that configuration is damaged.
    """
    text = (metadata or {}).get("lora_adapter_metadata", "{}")
    what = "The text of the PEFT settings in the file's metadata"
    config: Any = parse_json(text, what, LoRAFileError)
    parts = {part: _peft_part(config, part) for part in (*_PEFT_PARTS, "")}

    def alpha(stem: str, rank: int) -> float | None:
        settings, patterns = parts[next((p for p in _PEFT_PARTS if stem.startswith(p)), "")]
        words = stem.split(".")
        ends = (".".join(words[first:]) for first in range(len(words)))
        special = max((patterns[end] for end in ends if end in patterns), default=None)
        value = settings.get("lora_alpha") if special is None else special[1]
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) <= NUMBER:
            raise LoRAFileError(f"{stem}: lora_alpha in the file's metadata is {described(value)}.")
        # rank-stabilised LoRA (arXiv 2312.03732) divides by sqrt(r) instead of r
        return float(value) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)

    return alpha


def _peft_part(config: Any, part: str) -> tuple[dict[str, Any], dict[str, tuple[int, Any]]]:
    """PEFT's settings of one network, and its special alphas with their place: the last counts."""
    sound = isinstance(config, dict)
    settings = {
        name.removeprefix(part): value
        for name, value in (config.items() if sound else ())
        if name.startswith(part)
    }
    patterns = settings.get("alpha_pattern") or {}
    if not sound or not isinstance(patterns, dict):
        raise LoRAFileError(
            "The PEFT settings in the file's metadata are damaged: "
            f"{described(config)} is no table."
        )
    return settings, {end: (place, value) for place, (end, value) in enumerate(patterns.items())}
