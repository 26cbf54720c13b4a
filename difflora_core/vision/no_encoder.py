"""Stand-ins for an encoder that somebody leaves out: features of size 0."""

from __future__ import annotations

import torch
from torch import Tensor

from .face_encoder import DetectedFace


class NoImageEncoder:
    """An ImageEncoder that says nothing about a picture."""

    image_size = 224

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing about N pictures: (N, 0) and (N, 0, 0)."""
        return torch.zeros(len(images), 0), torch.zeros(len(images), 0, 0)


class NoFaceEncoder:
    """A FaceEncoder that finds no face."""

    embedding_dim = 0

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """No face of a picture (H, W, 3)."""
        return []
