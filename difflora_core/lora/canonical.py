"""Canonical form: equal delta W get equal factors.

delta W = up @ down is unchanged by (up R, R^-1 down) for every invertible R, so element-wise losses
on factors punish equivalent solutions. Balanced SVD through QR (never forming delta W) plus a sign
rule removes that freedom; where singular values coincide, ``align_to`` fixes what rotation is left.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayoutError
from .weights import LoRALayer, LoRAWeights


def layer_svd(layer: LoRALayer) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of delta W from the factors: QR(up), QR(down^T), SVD of the small core. Ours.

    Args:
        layer: factors (..., r, in), (..., out, r).

    Returns:
        u (..., out, k), s (..., k) descending, vh (..., k, in) in float64, k = min(r, in, out),
        scale included; the largest entry of each column of u is positive.
    """
    up, down = layer.up.double(), layer.down.double() * layer.scaling
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    return signed(q_up @ u, s, vh @ q_down.mT)


def signed(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An SVD whose largest entry of each column of u (..., out, k) is positive."""
    peak = u.gather(-2, u.abs().argmax(-2, keepdim=True))  # (..., 1, k)
    sign = torch.where(peak < 0, -1.0, 1.0)
    return u * sign, s, vh * sign.mT


def truncated_layer(layer: LoRALayer, rank: int) -> tuple[LoRALayer, Tensor]:
    """Best approximation of delta W at another rank (Eckart-Young), in canonical form.

    Args:
        layer: factors (..., r, in), (..., out, r).
        rank: wanted rank; a larger one is filled with zeros.

    Returns:
        Layer with alpha = rank and balanced factors up = U sqrt(S), down = sqrt(S) V^T, in the
        input's dtype or float32, whichever is finer; relative Frobenius error (...), 0 when delta W
        itself is 0.
    """
    dtype = torch.promote_types(layer.up.dtype, torch.float32)
    balanced, error = balanced_layer(layer_svd(layer), rank)
    down, up = balanced.down.to(dtype), balanced.up.to(dtype)
    return LoRALayer(down, up, balanced.alpha, layer.kernel), error


def balanced_layer(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[LoRALayer, Tensor]:
    """The layer of a thin SVD, see `truncated_layer`; in the SVD's dtype.

    Args:
        svd: u (..., out, k), s (..., k) descending, vh (..., k, in).
        rank: wanted rank.
    """
    u, s, vh = svd
    # Singular values that are rounding noise would come back as sqrt(noise), eight digits larger.
    noise = torch.finfo(s.dtype).eps * max(u.shape[-2], vh.shape[-1]) * s[..., :1]
    s = torch.where(s > noise, s, torch.zeros_like(s))
    total = s.square().sum(-1)
    error = (s[..., rank:].square().sum(-1) / total.clamp_min(torch.finfo(s.dtype).tiny)).sqrt()
    values = min(rank, s.shape[-1])
    root = s[..., :values].sqrt()
    up = F.pad(u[..., :values] * root[..., None, :], (0, rank - values))
    down = F.pad(root[..., :, None] * vh[..., :values, :], (0, 0, 0, rank - values))
    return LoRALayer(down, up, float(rank)), error


def canonical(weights: LoRAWeights, rank: int | None = None) -> LoRAWeights:
    """Balanced SVD form of every layer (difflora.md 6.1): equal deltas give equal factors. Ours.

    Args:
        weights: one LoRA or a batch.
        rank: bring every layer to this rank (best approximation); None keeps each layer's rank.

    Returns:
        Same deltas (to rounding, or to truncation), alpha = rank, components by falling
        singular value, upT up = down downT = diag(S).
    """
    return LoRAWeights(
        {
            name: truncated_layer(layer, layer.rank if rank is None else rank)[0]
            for name, layer in weights.layers.items()
        }
    )


def align_to(weights: LoRAWeights, reference: LoRAWeights) -> LoRAWeights:
    """Rotate every layer's components onto a reference by orthogonal Procrustes. Ours.

    Deltas do not change. Removes sign flips and the rotation left among equal singular values;
    R minimises |up R - up_ref|^2 + |R^T down - down_ref|^2 over orthogonal R.

    Args:
        weights: one LoRA or a batch, best in canonical form.
        reference: same layers and ranks (for example a corpus mean); may lack the batch.

    Raises:
        LayoutError: when layers or ranks differ.
    """
    aligned = {}
    for name, layer in weights.layers.items():
        target = reference.layers.get(name)
        if target is None or target.rank != layer.rank:
            raise LayoutError(f"The reference LoRA has no layer {name} of rank {layer.rank}.")
        own, other = layer.folded(), target.folded()
        up, down = own.up.double(), own.down.double()
        overlap = up.mT @ other.up.double() + down @ other.down.double().mT  # (..., r, r)
        u, _, vh = torch.linalg.svd(overlap)
        rotation = u @ vh
        aligned[name] = LoRALayer(
            (rotation.mT @ down).to(own.down.dtype),
            (up @ rotation).to(own.up.dtype),
            own.alpha,
            own.kernel,
        )
    return LoRAWeights(aligned)
