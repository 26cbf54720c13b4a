"""Distances between LoRAs in delta W space, never forming delta W; for losses and metrics alike.

With delta_a = A_up A_down and delta_b = B_up B_down (scales included):

    <delta_a, delta_b>_F = sum((A_up^T B_up) * (A_down B_down^T))          cost O((in + out) r^2)

All functions are batched (leading dimensions broadcast) and differentiable. Values carry the
precision of their input: an error smaller than the square root of the dtype's epsilon (3e-4 for
float32) reads as about that; give float64 where this matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LayoutError, counted
from .canonical import layer_svd
from .weights import LoRALayer, LoRAWeights


def _common(a: LoRAWeights, b: LoRAWeights) -> tuple[str, ...]:
    """Layer names of both, in the order of the first."""
    if set(a.layers) != set(b.layers):
        odd = sorted(set(a.layers) ^ set(b.layers))
        raise LayoutError(
            "Two LoRAs with different layers cannot be compared: "
            f"{counted(len(odd), 'layer')} in one only, for example {odd[0]}."
        )
    if not a.layers:
        raise LayoutError("A LoRA without layers cannot be compared.")
    return tuple(a.layers)


def layer_inner_product(a: LoRALayer, b: LoRALayer) -> Tensor:
    """<delta_a, delta_b>_F of one layer; ranks may differ. Returns (...).

    Raises:
        LayoutError: when the layers have other widths.
    """
    if (a.in_features, a.out_features) != (b.in_features, b.out_features):
        raise LayoutError(
            f"A layer of {a.in_features} to {a.out_features} features cannot be compared with one "
            f"of {b.in_features} to {b.out_features}."
        )
    gram = (a.up.mT @ b.up) * (a.down @ b.down.mT)  # (..., r_a, r_b)
    return a.scaling * b.scaling * gram.sum((-2, -1))


def layer_inner_products(a: LoRAWeights, b: LoRAWeights) -> Tensor:
    """<delta_a, delta_b>_F of every layer, (..., layers), in the layer order of ``a``.

    Raises:
        LayoutError: when layers or widths differ.
    """
    return torch.stack([layer_inner_product(a[n], b[n]) for n in _common(a, b)], dim=-1)


def inner_product(a: LoRAWeights, b: LoRAWeights) -> Tensor:
    """<delta_a, delta_b>_F summed over layers, (...). Raises LayoutError when layers differ."""
    return layer_inner_products(a, b).sum(-1)


def squared_norm(weights: LoRAWeights) -> Tensor:
    """|delta W|_F^2 summed over layers, (...), never negative."""
    return inner_product(weights, weights).clamp_min(0)


def squared_error(estimate: LoRAWeights, target: LoRAWeights) -> Tensor:
    """|delta_estimate - delta_target|_F^2 summed over layers, (...), never negative.

    Raises:
        LayoutError: when layers differ.
    """
    cross = inner_product(estimate, target)
    return (squared_norm(estimate) - 2 * cross + squared_norm(target)).clamp_min(0)


def squared_relative_error(estimate: LoRAWeights, target: LoRAWeights) -> Tensor:
    """Squared error over the target's squared norm, (...); smooth, so made for losses.

    Raises:
        LayoutError: when layers differ.
    """
    norm = squared_norm(target)
    return squared_error(estimate, target) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def relative_error(estimate: LoRAWeights, target: LoRAWeights) -> Tensor:
    """|delta_estimate - delta_target|_F / |delta_target|_F, (...); for reports.

    Computed in float64; 0 for equal LoRAs to about 1e-8.

    Raises:
        LayoutError: when layers differ.
    """
    estimate, target = estimate.to(torch.float64), target.to(torch.float64)
    return squared_relative_error(estimate, target).sqrt()


def cosine_similarity(a: LoRAWeights, b: LoRAWeights) -> Tensor:
    """Cosine between the concatenated deltas, (...) in [-1, 1]; 0 when one of them is zero.

    1 - cosine is the angular loss of LoRAGen (ICLR 2026).

    Raises:
        LayoutError: when layers differ.
    """
    first, second = squared_norm(a), squared_norm(b)
    tiny = torch.finfo(first.dtype).tiny
    scale = first.clamp_min(tiny).sqrt() * second.clamp_min(tiny).sqrt()
    return inner_product(a, b) / scale


def layer_spectrum(layer: LoRALayer, count: int | None = None) -> Tensor:
    """Largest singular values of delta W, (..., k) descending.

    The gradient is the exact one, d s_i = u_i^T d(delta W) v_i, taken with fixed singular vectors,
    so it exists also where a QR or SVD derivative does not (zero or repeated singular values).

    Args:
        layer: factors (..., r, in), (..., out, r).
        count: how many values; None gives all min(r, in, out).
    """
    with torch.no_grad():
        u, _, vh = layer_svd(layer)
        u, vh = u[..., :count].to(layer.up), vh[..., :count, :].to(layer.down)
    left = u.mT @ layer.up  # (..., k, r)
    right = layer.down @ vh.mT  # (..., r, k)
    return layer.scaling * (left * right.mT).sum(-1)


def spectral_error(estimate: LoRAWeights, target: LoRAWeights, count: int) -> Tensor:
    """Mean over layers of |s - s_target|^2 / |s_target|^2 of the top singular values, (...).

    The spectral term of LoRAGen (ICLR 2026); their exact normalisation is not public, ours makes
    every layer count the same.

    Args:
        estimate: one LoRA or a batch.
        target: same layers.
        count: number of singular values per layer.

    Raises:
        LayoutError: when layers differ.
    """
    errors = []
    for name in _common(estimate, target):
        wanted = layer_spectrum(target[name], count)
        norm = wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)
        got = layer_spectrum(estimate[name], count)
        errors.append((got - wanted).square().sum(-1) / norm)
    return torch.stack(errors, dim=-1).mean(-1)
