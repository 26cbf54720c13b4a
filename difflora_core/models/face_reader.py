"""FaceReader: the recogniser's face feature, read from an image latent instead of from pixels.

It exists for training alone: a likeness loss on the base model's estimate of the clean picture
(PuLID, arXiv:2404.16022, section 3.3) then needs no VAE decoder, no face detector and no alignment
in the loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, check_range

GROUPS = 8


@dataclass(frozen=True)
class FaceReaderConfig(Config):
    """Sizes of the reader.

    Args:
        channels: of the image latent.
        face: length of the face feature.
        width: channels of the first level; each of the two further levels doubles them.
        grid: side of the grid that the last level is pooled to.

    Raises:
        ConfigError: a value out of range.
    """

    channels: int
    face: int
    width: int = 48
    grid: int = 4

    def __post_init__(self) -> None:
        for name in ("channels", "face", "grid"):
            check_range("Face reader", name, getattr(self, name), 1, 16_384)
        check_range("Face reader", "width", self.width / GROUPS, 1, 1024)


class FaceReader(nn.Module):
    """Convolutions from latents (B, C, h, w) of any size to unit face features (B, Df).

    Args:
        config: sizes.
    """

    def __init__(self, config: FaceReaderConfig) -> None:
        super().__init__()
        self.config = config
        c = config.width - config.width % GROUPS
        self.body = nn.Sequential(
            nn.Conv2d(config.channels, c, 3, padding=1),
            Residual(c),
            nn.Conv2d(c, 2 * c, 3, 2, 1),
            Residual(2 * c),
            Residual(2 * c),
            nn.Conv2d(2 * c, 4 * c, 3, 2, 1),
            Residual(4 * c),
            Residual(4 * c),
            nn.GroupNorm(GROUPS, 4 * c),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(config.grid),
        )
        self.face_out = nn.Linear(4 * c * config.grid**2, config.face)

    def forward(self, latents: Tensor) -> Tensor:
        """Reads unit face features (B, Df) from scaled latents (B, C, h, w)."""
        h = self.body(latents).flatten(1)  # B 4c*grid*grid
        feature: Tensor = F.normalize(self.face_out(h).float(), dim=-1)
        return feature


class Residual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), as in diffusion UNets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(GROUPS, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        y: Tensor = x + self.branch(x)
        return y
