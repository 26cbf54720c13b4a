"""Likeness of whole pictures: CLIP-I, DINO, and the diversity between seeds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


def image_similarity(generated: Tensor, real: Tensor) -> Tensor:
    """Mean cosine of each generated picture to all real ones: CLIP-I or DINO (arXiv:2208.12242).

    Args:
        generated: (..., G, E) features.
        real: (..., R, E) of the same network.

    Returns:
        (..., G) raw cosines in [-1, 1].

    Raises:
        ConfigError: the features come from different networks.
    """
    if generated.shape[-1] != real.shape[-1]:
        raise ConfigError(
            f"Image features of {generated.shape[-1]} and {real.shape[-1]} numbers cannot be "
            "compared: use one network for both."
        )
    cosines = F.normalize(generated, dim=-1) @ F.normalize(real, dim=-1).mT
    return cosines.mean(-1)


def mapped_to_unit(cosine: Tensor) -> Tensor:
    """(1 + cos) / 2, the form in which some papers print cosines; never compare the two forms."""
    return (1 + cosine) / 2


def seed_diversity(images: Tensor) -> Tensor:
    """Root mean square difference between pictures of one prompt, over all pairs of seeds (ours).

    Args:
        images: (..., S, H, W, 3) in [0, 1], S >= 2 seeds.

    Returns:
        (...) in [0, 1]; 0 when all seeds give the same picture.

    Raises:
        ConfigError: fewer than two seeds.
    """
    if images.shape[-4] < 2:
        raise ConfigError("Diversity needs pictures from at least two seeds.")
    flat = images.flatten(-3)  # (..., S, H*W*3)
    first, second = torch.triu_indices(flat.shape[-2], flat.shape[-2], 1)
    distance = (flat[..., first, :] - flat[..., second, :]).square().mean(-1).sqrt()
    return distance.mean(-1)
