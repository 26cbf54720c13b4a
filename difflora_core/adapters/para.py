"""PaRa: a concept is a smaller output space; r learned directions are taken out of every weight.

arXiv 2406.05641: with Q, _ = QR(B) of a learned B (d, r), W = W0 - Q Q' W0. In front of a product
that is a change of the output, h = W0 x - Q (Q' (W0 x)), so the weight itself is never needed.

PEFT has the same as `DeftConfig(decomposition_method="qr", para=True)`. Our tests compare with it,
but do not build on it: it wraps linear layers only, replaces modules of the base (ComfyUI's must
stay), has no strength, leaves the sign of Q to LAPACK, starts at random, and adds several up
instead of applying them one after another.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LayoutError
from .base import LayerAdapter


def orthonormal(directions: Tensor) -> Tensor:
    """Q of the thin QR of B, with the diagonal of R positive: continuous in B, gradients flow.

    Args:
        directions: B (..., out, r), r at most out.

    Returns:
        (..., out, r) in float32 or better; its columns are orthonormal and span those of B.
    """
    fine = directions.to(torch.promote_types(directions.dtype, torch.float32))
    q, r = torch.linalg.qr(fine)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
    return q * signs[..., None, :]


def reduced(weight: Tensor, q: Tensor) -> Tensor:
    """(I - Q Q') W: the weight without these directions of its output.

    Args:
        weight: (out, in) or, of a convolution, (out, in, kh, kw).
        q: (out, r) with orthonormal columns.
    """
    flat = weight.flatten(1)
    return (flat - q @ (q.mT @ flat)).reshape(weight.shape)


def least_harmful(weight: Tensor, rank: int) -> Tensor:
    """The r directions (out, r) of the output that a weight uses least: a start near the base.

    They are left singular vectors of the smallest singular values, within the column space of the
    weight as the paper's theorem asks. They come from the smaller Gram matrix,
    half a second for 1280 x 1280 on one CPU core, and are as exact as a start has to be.

    Raises:
        LayoutError: the weight has fewer directions than that.
    """
    flat = weight.flatten(1)
    if rank > min(flat.shape):
        raise LayoutError(
            f"A weight of {flat.shape[0]} outputs and {flat.shape[1]} inputs has no {rank} "
            "directions to take out. Lower the rank."
        )
    fine = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if flat.shape[0] <= flat.shape[1]:
        left: Tensor = torch.linalg.eigh(fine @ fine.mT)[1][:, :rank]  # smallest come first
        return left
    right = torch.linalg.eigh(fine.mT @ fine)[1][:, :rank]
    return orthonormal(fine @ right)


class ParaAdapter(LayerAdapter):
    """h - Q Q' (h - bias) on a linear layer or, on output channels, a convolution.

    Args:
        q: (out, r) with orthonormal columns, see `orthonormal`; gradients flow into it.
        bias: (out,) of the layer, which is kept; None where it has none. `on` fills it in.
        channels: dimension of the outputs: the last one, or 1 of a convolution.
    """

    def __init__(self, q: Tensor, bias: Tensor | None = None, channels: int = -1) -> None:
        self.q, self.bias, self.channels = q, bias, channels

    def on(self, layer: nn.Module) -> ParaAdapter:
        """The same with the layer's bias."""
        channels = 1 if hasattr(layer, "kernel_size") else -1
        return ParaAdapter(self.q, getattr(layer, "bias", None), channels)

    def edit(self, x: Tensor, y: Tensor) -> Tensor:
        """y without the directions; x is not looked at, y (B, ..., out) or (B, out, h, w).

        Raises:
            LayoutError: the layer has another number of outputs.
        """
        del x
        rows = y.movedim(self.channels, -1)
        if rows.shape[-1] != len(self.q):
            raise LayoutError(
                f"These directions are of {len(self.q)} outputs, but the layer has "
                f"{rows.shape[-1]}. Use the base model they were trained on."
            )
        plain = rows if self.bias is None else rows - self.bias.to(rows)
        q = self.q.to(rows)
        return (rows - F.linear(F.linear(plain, q.mT), q)).movedim(-1, self.channels)
