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
        running = RunningStatistics(mask)
        running.add(tokens)
        return running.result(torch.promote_types(tokens.dtype, torch.float32))


class RunningStatistics:
    """Statistics of a corpus that comes in parts; in memory there is one part and the mean.

    Deviations of parts are joined by the formula of Chan, Golub and LeVeque (1979), so that parts
    of any sizes give the numbers of the whole.

    Args:
        mask: (T, L) bool, True where a token holds a value.
    """

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._count = 0
        self._mean = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
        self._deviation = self._mean.sum(-1)  # (T,) sum of squares around the mean

    def add(self, tokens: Tensor) -> None:
        """Takes up a part (B, T, L) of B LoRAs.

        Raises:
            LayoutError: when shapes differ, the part is empty, or a value is not finite.
        """
        mask, number = self._mask, len(tokens)
        if tokens.ndim != 3 or tokens.shape[1:] != mask.shape or not number:
            raise LayoutError(
                f"Expected LoRA tokens of shape (B, {mask.shape[0]}, {mask.shape[1]}) with B > 0, "
                f"got {tuple(tokens.shape)}."
            )
        values = torch.where(mask, tokens.detach().double(), 0.0)
        if not bool(torch.isfinite(values).all()):
            raise LayoutError("Token statistics must be finite numbers; a LoRA holds others.")
        mean = values.mean(0)
        shift, total = mean - self._mean, self._count + number
        self._deviation += (values - mean).square().sum((0, 2))
        self._deviation += shift.square().sum(-1) * (self._count * number / total)
        self._mean += shift * (number / total)
        self._count = total

    def result(self, dtype: torch.dtype = torch.float32) -> WeightStatistics:
        """Statistics of all parts; a token that never varies gets scale 1.

        Raises:
            LayoutError: there was no part.
        """
        if not self._count:
            raise LayoutError("There are no LoRAs to take statistics of.")
        places = self._mask.sum(-1).clamp_min(1) * self._count
        scale = (self._deviation / places).sqrt()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return WeightStatistics(self._mean.to(dtype), scale.to(dtype))
