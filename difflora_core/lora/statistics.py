"""WeightStatistics: mean and scale of LoRA tokens over a corpus."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """Normalised token = (token - mean) / scale. Ours (difflora.md 3).

    Args:
        mean: (T, L) corpus mean of each value.
        scale: (T,) root mean square of what remains, one per layer and factor, above 0.
    """

    mean: Tensor
    scale: Tensor

    @staticmethod
    def fit(tokens: Tensor, mask: Tensor) -> WeightStatistics:
        """Statistics of a corpus, computed in float64, kept in float32 or the input's finer dtype.

        Args:
            tokens: (B, T, L), B LoRAs.
            mask: (T, L) bool, True where a token holds a value.

        Returns:
            Statistics; a token that never varies gets scale 1.

        Raises:
            LayoutError: when shapes differ, the corpus is empty, or a value is not finite.
        """
        if tokens.ndim != 3 or tokens.shape[1:] != mask.shape or not len(tokens):
            raise LayoutError(
                f"Expected LoRA tokens of shape (B, {mask.shape[0]}, {mask.shape[1]}) with B > 0, "
                f"got {tuple(tokens.shape)}."
            )
        values = torch.where(mask, tokens.detach().double(), 0.0)
        if not bool(torch.isfinite(values).all()):
            raise LayoutError("Token statistics must be finite numbers; a LoRA holds others.")
        mean = values.mean(0)
        count = mask.sum(-1).clamp_min(1) * len(tokens)
        scale = ((values - mean).square().sum((0, 2)) / count).sqrt()  # (T,)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return WeightStatistics(mean.to(dtype), scale.to(dtype))
