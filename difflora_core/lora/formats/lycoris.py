"""LoKr, LoHa and whole weight changes (LyCORIS, arXiv 2309.14859) to the best LoRA of a rank.

LoKr: delta W = scale * kron(w1, w2); its singular triplets are products of those of w1 and w2.
LoHa: delta W = scale * (w1_a w1_b) * (w2_a w2_b), element-wise; exactly a LoRA of rank r1 * r2
(FedPara, arXiv 2108.06098). No delta W is formed that is larger than its factors, and nothing
before its size is judged: a small file may mean gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import LoRAFileError
from ...limits import FEATURES, MATRIX_SIDE, MATRIX_VALUES
from ..canonical import balanced_layer, layer_svd, signed, truncated_layer
from ..weights import LoRALayer


def computed_values(group: Mapping[str, Tensor], rank: int) -> int:
    """How many numbers are computed of a layer; 0 for one whose factors are taken as they are.

    Args:
        group: role to tensor, from ``group_keys``.
        rank: rank that it is brought to.
    """
    shapes = {role: tensor.shape for role, tensor in group.items() if tensor.ndim >= 2}
    out = width = 1
    for name in ("diff", "hada_w1", "lokr_w1", "lokr_w2"):
        first, last = (shapes.get(name, shapes.get(f"{name}_{part}")) for part in "ab")
        if first is not None and last is not None:
            out, width = out * first[0], width * math.prod(last[1:])
    if "mid" in shapes and "down" in shapes:
        return shapes["mid"][0] * math.prod(shapes["mid"][2:]) * shapes["down"][1]
    return (out + width) * rank if out * width > 1 else 0


def check_size(out: int, width: int, rank: int, values: int) -> None:
    """Refuses a layer before it is computed.

    Args:
        out: width of its output.
        width: width of its input.
        rank: components of the factors at hand, of which singular values may be taken.
        values: numbers of the largest matrix that is computed.

    Raises:
        LoRAFileError: one of them is beyond the limits.
    """
    if max(out, width) > FEATURES:
        raise LoRAFileError(
            f"A layer of this LoRA is made for {width} to {out} features; no model has more than "
            f"{FEATURES}. The file is broken."
        )
    if min(out, width, rank) > MATRIX_SIDE or values > MATRIX_VALUES:
        raise LoRAFileError(
            f"A layer of this LoRA, {width} to {out} features in {rank} components, is too large "
            f"to be read as a LoRA (up to {MATRIX_SIDE} components, "
            f"{MATRIX_VALUES} numbers). Load it with Load LoRA, which applies it as "
            "it is."
        )


def _svd(parts: Mapping[str, Tensor], name: str) -> tuple[tuple[Tensor, ...], int | None]:
    """Thin SVD of a full or factored LoKr matrix in float64, and its rank when factored."""
    if name in parts:
        matrix = parts[name].double()
        check_size(len(matrix), matrix.shape[1], min(matrix.shape), matrix.numel())
        return torch.linalg.svd(matrix, full_matrices=False), None
    first, second = parts.get(f"{name}_a"), parts.get(f"{name}_b")
    if first is None or second is None:
        raise LoRAFileError(f"A LoKr layer lacks its matrix {name}.")
    inner = len(second)
    check_size(len(first), second.shape[1], inner, 0)
    return layer_svd(LoRALayer(second, first, float(inner))), inner


def lokr_layer(
    parts: Mapping[str, Tensor], alpha: float | None, rank: int
) -> tuple[LoRALayer, Tensor]:
    """Best LoRA of a LoKr layer.

    Args:
        parts: ``lokr_w1`` or ``lokr_w1_a``, ``lokr_w1_b``, and the same for ``lokr_w2``; matrices.
        alpha: the file's alpha; counts only when a matrix is factored (as LyCORIS and ComfyUI do).
        rank: wanted rank.

    Returns:
        Canonical float32 layer, down (rank, in), up (out, rank); relative Frobenius error ().

    Raises:
        LoRAFileError: when a matrix is missing, or the layer is too large.
    """
    (u1, s1, v1), rank1 = _svd(parts, "lokr_w1")
    (u2, s2, v2), rank2 = _svd(parts, "lokr_w2")
    inner = rank2 if rank2 is not None else rank1
    scale = alpha / inner if alpha is not None and inner is not None else 1.0
    out, width, most = len(u1) * len(u2), v1.shape[1] * v2.shape[1], min(rank, len(s1) * len(s2))
    check_size(out, width, most, max(out, width) * most)
    products = (s1[:, None] * s2[None, :]).flatten()
    kept, order = products.topk(most)
    first, second = order // len(s2), order % len(s2)
    up = (u1[:, None, first] * u2[None, :, second]).flatten(0, 1)  # (out1 * out2, k)
    down = (v1[first, :, None] * v2[second, None, :]).flatten(1)  # (k, in1 * in2)
    svd = signed(up, abs(scale) * kept, down * math.copysign(1.0, scale))
    total = products.square().sum()
    lost = (total - kept.square().sum()).clamp_min(0) if len(kept) < len(products) else 0 * total
    error = (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
    return _single(balanced_layer(svd, rank)[0]), error


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
        LoRAFileError: when a matrix is missing, their ranks differ, or the layer is too large.
    """
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    missing = [name for name in names if name not in parts]
    if missing:
        raise LoRAFileError(f"A LoHa layer lacks {', '.join(missing)}.")
    a1, b1, a2, b2 = (parts[name].double() for name in names)
    if (a1.shape[1], a2.shape[1]) != (len(b1), len(b2)):
        raise LoRAFileError("A LoHa layer has factors of different ranks; the file is damaged.")
    out, width, inner = len(a1), b1.shape[1], len(b1) * len(b2)
    scale = 1.0 if alpha is None else alpha / b1.shape[0]
    if out * width <= (out + width) * inner:  # then delta W is the smaller of the two
        check_size(out, width, min(out, width), out * width)
        return full_layer(scale * (a1 @ b1) * (a2 @ b2), rank)
    check_size(out, width, inner, (out + width) * inner)
    up = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r1 * r2)
    down = (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)  # (r1 * r2, in)
    layer, error = truncated_layer(LoRALayer(down, up, scale * up.shape[1]), rank)
    return _single(layer), error


def full_layer(delta: Tensor, rank: int) -> tuple[LoRALayer, Tensor]:
    """Best LoRA of a whole weight change (out, in), as ``.diff`` entries hold it.

    Returns:
        Canonical float32 layer, relative Frobenius error.

    Raises:
        LoRAFileError: when it is too large.
    """
    check_size(len(delta), delta.shape[1], min(delta.shape), delta.numel())
    tall = delta.double() if len(delta) >= delta.shape[1] else delta.double().mT
    # Eigenvectors of the small Gram matrix span what is kept; much cheaper than all of the SVD.
    kept = torch.linalg.eigh(tall.mT @ tall).eigenvectors[:, -rank:]
    part = tall @ kept
    error = (tall - part @ kept.mT).norm() / tall.norm().clamp_min(torch.finfo(tall.dtype).tiny)
    up, down = (part, kept.mT) if len(delta) >= delta.shape[1] else (kept, part.mT)
    return _single(truncated_layer(LoRALayer(down, up, float(len(down))), rank)[0]), error


def _single(layer: LoRALayer) -> LoRALayer:
    """The layer in float32."""
    return LoRALayer(layer.down.float(), layer.up.float(), layer.alpha)
