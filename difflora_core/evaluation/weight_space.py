"""LoRA-level metrics: delta-W reconstruction, diversity of generated LoRAs, retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..lora.distance import (
    cosine_similarity,
    inner_product,
    relative_error,
    spectral_error,
    squared_norm,
)
from ..lora.weights import LoRALayer, LoRAWeights


def reconstruction(
    estimate: LoRAWeights, target: LoRAWeights, singular_values: int = 4
) -> dict[str, Tensor]:
    """How well one LoRA stands in for another, in delta W (ours; spectrum as in LoRAGen).

    Args:
        estimate: one LoRA or a batch.
        target: the same layers.
        singular_values: how many per layer enter the spectral error.

    Returns:
        `relative_error`, `cosine` and `spectral_error`, each (...).
    """
    return {
        "relative_error": relative_error(estimate, target),
        "cosine": cosine_similarity(estimate, target),
        "spectral_error": spectral_error(estimate, target, singular_values),
    }


def pairwise_cosines(first: LoRAWeights, second: LoRAWeights) -> Tensor:
    """Delta-W cosines (A, B) between two batches of LoRAs."""
    if len(first.batch_shape) != 1 or len(second.batch_shape) != 1:
        raise ConfigError("Comparing many LoRAs needs two batches of them.")
    rows = _unsqueezed(first, 1), _unsqueezed(second, 0)
    norms = squared_norm(first)[:, None].sqrt() * squared_norm(second)[None].sqrt()
    return inner_product(*rows) / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def diversity(weights: LoRAWeights) -> Tensor:
    """Mean of 1 - cosine over all pairs of a batch of LoRAs, a scalar; 0 when all are equal.

    Raises:
        ConfigError: fewer than two LoRAs.
    """
    cosines = pairwise_cosines(weights, weights)
    count = len(cosines)
    if count < 2:
        raise ConfigError("The diversity of LoRAs needs at least two of them.")
    first, second = torch.triu_indices(count, count, 1)
    return (1 - cosines[first, second]).mean()


def retrieval_rate(generated: LoRAWeights, sources: LoRAWeights) -> float:
    """Share of generated LoRAs whose nearest source by delta-W cosine is their own (ours).

    Args:
        generated: batches of equal size; row b of one belongs to row b of the other.
        sources: batches of equal size; row b of one belongs to row b of the other.
    """
    cosines = pairwise_cosines(generated, sources)
    return float((cosines.argmax(1) == torch.arange(len(cosines))).float().mean())


def _unsqueezed(weights: LoRAWeights, dim: int) -> LoRAWeights:
    """Factors (B, ...) with a further batch dimension of one."""
    return LoRAWeights(
        {
            name: LoRALayer(layer.down.unsqueeze(dim), layer.up.unsqueeze(dim), layer.alpha)
            for name, layer in weights.layers.items()
        }
    )
