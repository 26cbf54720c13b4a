"""Likeness to a person: face similarity, parameter error, recognition among people."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


def centroid(embeddings: Tensor) -> Tensor:
    """Mean direction of a person's pictures (ours).

    Args:
        embeddings: (..., M, E) face embeddings of M pictures, any length.

    Returns:
        (..., E) unit vectors.
    """
    return F.normalize(F.normalize(embeddings, dim=-1).mean(-2), dim=-1)


def face_similarity(
    embeddings: Tensor, references: Tensor, face_found: Tensor | None = None
) -> Tensor:
    """Cosine between the face of a picture and a person (Face Sim of arXiv:2312.04461).

    With the centroid of *other* pictures as reference this is R-FaceSim of Meta-LoRA: copying the
    pose of the photo brings nothing.

    Args:
        embeddings: (..., E) of the pictures.
        references: (..., E), broadcast against `embeddings`.
        face_found: (...) bool; a picture without a detected face counts as 0.

    Returns:
        (...) in [-1, 1].

    Raises:
        ConfigError: the two come from different recognisers.
    """
    if embeddings.shape[-1] != references.shape[-1]:
        raise ConfigError(
            f"Face embeddings of {embeddings.shape[-1]} and {references.shape[-1]} numbers cannot "
            "be compared: use one recogniser for both."
        )
    cosine = F.cosine_similarity(embeddings, references, dim=-1)
    return cosine if face_found is None else torch.where(face_found, cosine, 0.0)


def parameter_error(estimates: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error over a person's parameters (ours).

    Args:
        estimates: (..., P) as regressed from pictures.
        truth: (..., P), broadcast.

    Returns:
        (...) in the unit of the parameters.
    """
    return (estimates - truth).abs().mean(-1)


def recognition_rate(embeddings: Tensor, centroids: Tensor, people: Tensor) -> Tensor:
    """Whether the nearest of C people is the right one (rank 1; ours).

    Args:
        embeddings: (N, E).
        centroids: (C, E).
        people: (N,) row of the right centroid.

    Returns:
        (N,) 1.0 where the right person is nearest, else 0.0.
    """
    cosines = F.normalize(embeddings, dim=-1) @ F.normalize(centroids, dim=-1).T
    return (cosines.argmax(-1) == people).float()
