"""Distances between two sets of pictures, of their features: FID and KID, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Distance of two Gaussians fitted to features (FID of arXiv:1706.08500, Eq. 6).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The trace of the root is the sum of the singular
    values of X1 X2^T, X the centred features over sqrt(n - 1): no covariance is formed, and fewer
    pictures than features are no special case. The bias falls with the number of pictures: compare
    only results of the same number.

    Args:
        one: (N, D) features of N >= 2 pictures.
        other: (M, D), M >= 2.

    Raises:
        ConfigError: too few pictures, or other features.
    """
    first, second = _checked(one, other)
    apart = (first.mean(0) - second.mean(0)).square().sum()
    x, y = _centred(first), _centred(second)
    root = torch.linalg.svdvals(x @ y.mT).sum()
    return max(0.0, float(apart + x.square().sum() + y.square().sum() - 2 * root))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Squared maximum mean discrepancy of features, unbiased (KID of arXiv:1801.01401, Eq. 4).

    Kernel (x . y / D + 1)^3. Of all pairs, not of random subsets, so there is no seed; may be
    slightly negative.

    Args:
        one: (N, D) features of N >= 2 pictures.
        other: (M, D), M >= 2.

    Raises:
        ConfigError: too few pictures, or other features.
    """
    x, y = _checked(one, other)
    return float(_within(x) + _within(y) - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(N, M)."""
    return (x @ y.mT / x.shape[1] + 1) ** 3


def _within(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different pictures."""
    values, count = _kernel(x, x), len(x)
    return (values.sum() - values.diagonal().sum()) / (count * (count - 1))


def _centred(x: Tensor) -> Tensor:
    """Whose X^T X is the covariance."""
    return (x - x.mean(0)) / (len(x) - 1) ** 0.5


def _checked(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64."""
    if min(len(one), len(other)) < 2 or one.shape[1:] != other.shape[1:]:
        raise ConfigError(
            f"Sets of pictures are compared by features of two or more each, of one network; got "
            f"{tuple(one.shape)} and {tuple(other.shape)}."
        )
    return one.double(), other.double()
