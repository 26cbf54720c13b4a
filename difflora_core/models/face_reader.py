"""FaceReader: the recogniser's face feature, read from an image latent instead of from pixels.

It exists for training alone: a likeness loss on the base model's estimate of the clean picture
(PuLID, arXiv:2404.16022, section 3.3) then needs no VAE decoder, no face detector and no alignment
in the loop. The estimate has the composition of the picture that was noised, so its face lies where
that one's was found: large pictures are cut to it first (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config, check_range
from ..errors import ConfigError

GROUPS = 8
MARGIN = 1.5
"""Side of the square that is read, in sides of the face's box: hair and chin belong to a face."""


@dataclass(frozen=True)
class FaceReaderConfig(Config):
    """Sizes of the reader.

    Args:
        channels: of the image latent.
        face: length of the face feature.
        width: channels of the first level; each of the two further levels doubles them.
        grid: side of the grid that the last level is pooled to.
        crop: side that the square around a face is brought to; 0 reads the whole picture.

    Raises:
        ConfigError: a value out of range.
    """

    channels: int
    face: int
    width: int = 48
    grid: int = 4
    crop: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "face", "grid"):
            check_range("Face reader", name, getattr(self, name), 1, 16_384)
        check_range("Face reader", "crop", self.crop, 0, 1024)
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

    def forward(self, latents: Tensor, boxes: Tensor | None = None) -> Tensor:
        """Reads unit face features (B, Df) from scaled latents (B, C, h, w).

        Args:
            latents: of pictures with a face each.
            boxes: (B, 4) of the faces: x1, y1, x2, y2 in shares of the picture, 0 to 1; only
                looked at where `config.crop` is set.

        Raises:
            ConfigError: this reader cuts faces out, and nobody says where they are.
        """
        if self.config.crop:
            if boxes is None:
                raise ConfigError("This reader of faces has to be told where they are.")
            latents = face_crop(latents, boxes, self.config.crop)
        h = self.body(latents).flatten(1)  # B 4c*grid*grid
        feature: Tensor = F.normalize(self.face_out(h).float(), dim=-1)
        return feature


def face_crop(latents: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Squares around faces, brought to one size by bilinear sampling.

    Args:
        latents: (B, C, h, w).
        boxes: (B, 4) x1, y1, x2, y2 in shares of the picture.
        side: of the result.

    Returns:
        (B, C, side, side); what lies outside of a picture is its edge.
    """
    size = torch.tensor([latents.shape[3], latents.shape[2]]).to(boxes)  # w h
    first, last = boxes[:, :2], boxes[:, 2:]
    half = MARGIN / 2 * ((last - first) * size).amax(1, keepdim=True)  # B 1
    scale, middle = 2 * half / size, first + last - 1  # B 2, in grid_sample's -1 to 1
    theta = torch.cat([torch.diag_embed(scale), middle[..., None]], -1)  # B 2 3
    shape = [len(latents), latents.shape[1], side, side]
    grid = F.affine_grid(theta.to(latents), shape, align_corners=False)
    return F.grid_sample(latents, grid, "bilinear", "border", align_corners=False)


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
