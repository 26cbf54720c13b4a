"""WeightStatistics: scale (and optionally centre) of LoRA tokens over a corpus, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LayoutError


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """Normalised token = (token - mean) / scale. Ours (difflora.md 3).

    Args:
        mean: (T, L) corpus mean of each value, zeros when not centred.
        scale: (T, 1) root mean square of what remains, one per layer and factor, above 0.
        mask: (T, L) bool, True where a token holds a value.
    """

    mean: Tensor
    scale: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        tokens = self.mask.shape[0]
        if self.mean.shape != self.mask.shape or tuple(self.scale.shape) != (tokens, 1):
            raise LayoutError(
                f"Token statistics do not fit: mask {tuple(self.mask.shape)}, mean "
                f"{tuple(self.mean.shape)}, scale {tuple(self.scale.shape)}; expected (T, L), "
                "(T, L), (T, 1)."
            )
        usable = torch.isfinite(self.mean).all() and torch.isfinite(self.scale).all()
        if not (usable and (self.scale > 0).all()):
            raise LayoutError("Token statistics must be finite numbers with scales above zero.")

    @staticmethod
    def fit(tokens: Tensor, mask: Tensor, center: bool = False) -> WeightStatistics:
        """Statistics of a corpus, computed in float64, kept in float32 or the input's finer dtype.

        Args:
            tokens: (B, T, L), B LoRAs.
            mask: (T, L) bool.
            center: subtract the mean LoRA.

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
        mean = values.mean(0) if center else torch.zeros_like(values[0])
        count = mask.sum(-1, keepdim=True).clamp_min(1) * len(tokens)
        scale = ((values - mean).square().sum((0, 2))[:, None] / count).sqrt()  # (T, 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return WeightStatistics(mean.to(dtype), scale.to(dtype), mask)

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> WeightStatistics:
        """Same statistics in another dtype or on another device."""
        return WeightStatistics(
            self.mean.to(device=device, dtype=dtype),
            self.scale.to(device=device, dtype=dtype),
            self.mask.to(device=device),
        )

    def normalise(self, tokens: Tensor) -> Tensor:
        """(B, T, L) to unit scale; padding becomes 0."""
        return torch.where(self.mask, (tokens - self.mean) / self.scale, 0.0)

    def denormalise(self, tokens: Tensor) -> Tensor:
        """Inverse of ``normalise``; padding becomes 0."""
        return torch.where(self.mask, tokens * self.scale + self.mean, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors ``mean``, ``scale``, ``mask``."""
        return {"mean": self.mean, "scale": self.scale, "mask": self.mask}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> WeightStatistics:
        """Statistics from the tensors of ``state_dict``."""
        return WeightStatistics(state["mean"], state["scale"], state["mask"].bool())
