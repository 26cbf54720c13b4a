"""LyCORIS LoKr and LoHa as ordinary LoRA: truncated SVD of delta W, which is never formed.

LoKr: delta W = scale * kron(w1, w2); its singular triplets are products of those of w1 and w2.
LoHa: delta W = scale * (w1_a w1_b) * (w2_a w2_b), element-wise; exactly a LoRA of rank r1 * r2
(FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LoRAFileError
from ..canonical import truncated_layer
from ..weights import LoRALayer


def _matrix(parts: Mapping[str, Tensor], name: str) -> tuple[Tensor, int | None]:
    """Full or factored LoKr matrix in float64, and its inner rank when factored."""
    if name in parts:
        return parts[name].double(), None
    first, second = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if first is None or second is None:
        raise LoRAFileError(f"A LoKr layer lacks its matrix {name}.")
    return first.double() @ second.double(), second.shape[0]


def lokr_layer(
    parts: Mapping[str, Tensor], alpha: float | None, rank: int
) -> tuple[LoRALayer, Tensor]:
    """Best LoRA of a LoKr layer.

    Args:
        parts: ``lokr_w1`` or ``lokr_w1_a``, ``lokr_w1_b``, and the same for ``lokr_w2``; matrices.
        alpha: the file's alpha; counts only when a matrix is factored (as LyCORIS and ComfyUI do).
        rank: wanted rank.

    Returns:
        Canonical float32 layer, relative Frobenius error.

    Raises:
        LoRAFileError: when a matrix is missing.
    """
    w1, rank1 = _matrix(parts, "lokr_w1")
    w2, rank2 = _matrix(parts, "lokr_w2")
    inner = rank2 if rank2 is not None else rank1
    scale = alpha / inner if alpha is not None and inner is not None else 1.0
    u1, s1, v1 = torch.linalg.svd(w1, full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(w2, full_matrices=False)
    products = (s1[:, None] * s2[None, :]).flatten()
    kept, order = products.topk(min(rank, products.numel()))
    first, second = order // len(s2), order % len(s2)
    up = (u1[:, None, first] * u2[None, :, second]).flatten(0, 1)  # (out1 * out2, k)
    down = (v1[first, :, None] * v2[second, None, :]).flatten(1)  # (k, in1 * in2)
    layer = LoRALayer((down * kept[:, None]).float(), up.float(), scale * len(kept))
    total = products.square().sum()
    lost = (total - kept.square().sum()).clamp_min(0) if len(kept) < len(products) else 0 * total
    error = (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
    return truncated_layer(layer, rank)[0], error


def loha_layer(
    parts: Mapping[str, Tensor], alpha: float | None, rank: int
) -> tuple[LoRALayer, Tensor]:
    """Best LoRA of a LoHa layer.

    Args:
        parts: ``hada_w1_a`` (out, r1), ``hada_w1_b`` (r1, in), ``hada_w2_a``, ``hada_w2_b``.
        alpha: the file's alpha over r1; None means scale 1.
        rank: wanted rank.

    Returns:
        Canonical float32 layer, relative Frobenius error.

    Raises:
        LoRAFileError: when a matrix is missing.
    """
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    missing = [name for name in names if name not in parts]
    if missing:
        raise LoRAFileError(f"A LoHa layer lacks {', '.join(missing)}.")
    a1, b1, a2, b2 = (parts[name].double() for name in names)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r1 * r2)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r1 * r2, in)
    scale = 1.0 if alpha is None else alpha / b1.shape[0]
    layer, error = truncated_layer(LoRALayer(down, up, scale * up.shape[1]), rank)
    return LoRALayer(layer.down.float(), layer.up.float(), layer.alpha), error


def full_layer(delta: Tensor, rank: int) -> tuple[LoRALayer, Tensor]:
    """Best LoRA of a whole weight change (out, in), as ``.diff`` entries hold it.

    Returns:
        Canonical float32 layer, relative Frobenius error.
    """
    wide = delta.double()
    identity = torch.eye(min(wide.shape), dtype=wide.dtype)
    down, up = (identity, wide) if wide.shape[1] <= wide.shape[0] else (wide, identity)
    layer, error = truncated_layer(LoRALayer(down, up, float(down.shape[0])), rank)
    return LoRALayer(layer.down.float(), layer.up.float(), layer.alpha), error
