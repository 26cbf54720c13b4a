"""What a look at a picture finds out: is it one, how large is it, which faces are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..vision.face_encoder import DetectedFace


@dataclass(frozen=True)
class SeenFace:
    """A face as it is kept.

    Attributes:
        embedding: (Df,) float32 of unit length, as bytes.
        geometry: (15,) float32 box, five points (x, y) in pixels of the turned picture, and the
            detector's score, as bytes.
    """

    embedding: bytes
    geometry: bytes

    @staticmethod
    def of(face: DetectedFace, scale: float) -> SeenFace:
        """A face of a picture that was made `scale` times as large before."""
        places = torch.cat([face.box, face.keypoints.flatten()]).double() / scale
        geometry = [*places.tolist(), face.score]
        embedding = F.normalize(face.embedding.float(), dim=0)
        return SeenFace(_packed(embedding.numpy()), _packed(np.array(geometry)))

    @property
    def vector(self) -> np.ndarray[Any, Any]:
        """(Df,) float32, unit length."""
        return np.frombuffer(self.embedding, np.float32)

    @property
    def places(self) -> Tensor:
        """(7, 2) float32: corners of the box, then the five points, x and y in pixels."""
        return torch.from_numpy(np.frombuffer(self.geometry, np.float32)[:-1].copy()).reshape(-1, 2)

    @property
    def box(self) -> Tensor:
        """(4,) float32 x1, y1, x2, y2 in pixels."""
        return self.places[:2].flatten()

    @property
    def score(self) -> float:
        """The detector's, in [0, 1]."""
        return float(np.frombuffer(self.geometry, np.float32)[-1])

    @property
    def size(self) -> float:
        """The longer side of the box in pixels."""
        x1, y1, x2, y2 = self.box.tolist()
        return max(x2 - x1, y2 - y1)

    @property
    def area(self) -> float:
        """Of the box, in square pixels."""
        x1, y1, x2, y2 = self.box.tolist()
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)


@dataclass(frozen=True)
class Look:
    """What a picture is.

    Attributes:
        digest: SHA-256 of the file, hexadecimal; empty where it could not be read.
        reason: why it cannot be used; empty where it can.
        height, width: in pixels, turned.
        hash: see `duplicates.perceptual_hash`.
        faces: all that are large enough, the largest first.
    """

    digest: str
    reason: str = ""
    height: int = 0
    width: int = 0
    hash: bytes = b""
    faces: tuple[SeenFace, ...] = ()


def _packed(numbers: np.ndarray[Any, Any]) -> bytes:
    """Numbers as float32, in the byte order that files have."""
    return numbers.astype("<f4").tobytes()
