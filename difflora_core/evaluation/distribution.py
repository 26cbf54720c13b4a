"""Distances between sets of pictures, from features: FID and KID through torchmetrics.

Both are biased by the number of pictures (FID heavily below some thousands): compare only sets of
equal size and print N. Statistics come before the metric, so features of any network will do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from ..errors import ConfigError


class _Features(nn.Module):
    """Hands features through, where torchmetrics expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The same features."""
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of Gaussians fitted to two feature sets (FID, Eq. 6 of arXiv:1706.08500).

    Args:
        real: (N, D) features; Inception-v3 pool3 gives the published FID.
        generated: (M, D).

    Returns:
        0 for equal sets, up to rounding.

    Raises:
        ConfigError: sets of fewer than two pictures or of different networks.
    """
    _check(real, generated)
    metric = FrechetInceptionDistance(_Features(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    real: Tensor, generated: Tensor, subset_size: int = 1000, subsets: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Squared MMD with the cubic kernel (KID, section 4 of arXiv:1801.01401), unbiased.

    Args:
        real: (N, D) features.
        generated: (M, D).
        subset_size: pictures per estimate, at most as many as there are.
        subsets: number of estimates.
        seed: of the subsets.

    Returns:
        Mean and standard deviation over the subsets; the mean may be slightly negative.

    Raises:
        ConfigError: sets of fewer than two pictures or of different networks.
    """
    _check(real, generated)
    generator = torch.Generator().manual_seed(seed)
    size = min(subset_size, len(real), len(generated))
    values = []
    for _ in range(subsets):
        rows = [torch.randperm(len(x), generator=generator)[:size] for x in (real, generated)]
        values.append(poly_mmd(real[rows[0]].double(), generated[rows[1]].double()))
    estimates = torch.stack(values)
    return float(estimates.mean()), float(estimates.std(correction=0))


def _check(real: Tensor, generated: Tensor) -> None:
    """Two (N, D) sets of at least two pictures with equal D."""
    fits = real.ndim == generated.ndim == 2 and real.shape[1] == generated.shape[1]
    if not fits or min(len(real), len(generated)) < 2:
        raise ConfigError(
            "Comparing sets of pictures needs features (N, D) and (M, D) of one network with at "
            f"least two pictures each; got {tuple(real.shape)} and {tuple(generated.shape)}."
        )
