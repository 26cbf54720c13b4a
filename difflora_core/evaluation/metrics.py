"""Metrics as pure functions of features: statistics come before the metric.

Likeness to a person, agreement with a prompt, diversity between seeds, and how well one LoRA
stands in for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, counted
from ..lora.distance import cosine_similarity, relative_error, spectral_error
from ..lora.weights import LoRAWeights


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
            f"Face embeddings of {embeddings.shape[-1]} and "
            f"{counted(references.shape[-1], 'number')} cannot be compared: use one recogniser "
            "for both."
        )
    cosine = F.cosine_similarity(embeddings, references, dim=-1)
    return cosine if face_found is None else torch.where(face_found, cosine, 0.0)


def copy_paste(embeddings: Tensor, references: Tensor, others: Tensor) -> Tensor:
    """Whether pictures repeat the reference photos rather than show the person (arXiv:2510.14975).

    (angle to other photos - angle to the references) / angle between the two, all as means over
    pairs: about 0 for a new photo of the person, 1 for the reference itself, -1 for another photo.

    Args:
        embeddings: (..., E) of the pictures.
        references: (..., R, E) of the photos that the likeness was made from, broadcast.
        others: (..., T, E) of photos of the person that were not used, broadcast.

    Returns:
        (...), in [-1, 1] where R = T = 1.
    """
    pictures = embeddings[..., None, :]
    apart = _angle(references[..., :, None, :], others[..., None, :, :]).mean((-2, -1))
    nearer = _angle(pictures, others).mean(-1) - _angle(pictures, references).mean(-1)
    return nearer / apart.clamp_min(torch.finfo(apart.dtype).eps)


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Angle in radians between (..., E) and (..., E), of any length."""
    return F.cosine_similarity(one, other, dim=-1).clamp(-1, 1).acos()


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


def attribute_agreement(
    read: Mapping[str, Sequence[str]], asked: Sequence[Mapping[str, str]]
) -> Tensor:
    """Share of the attributes named by each prompt that a classifier reads back (ours).

    Args:
        read: attribute name to the classifier's answer for each of N pictures.
        asked: N prompts as attribute name to value; only what a prompt names counts.

    Returns:
        (N,) in [0, 1]; NaN for a prompt that names nothing.

    Raises:
        ConfigError: a prompt names an attribute that was not read, or the counts differ.
    """
    rows = []
    for number, wanted in enumerate(asked):
        missing = [name for name in wanted if name not in read or len(read[name]) != len(asked)]
        if missing:
            raise ConfigError(
                f"The attributes {missing} of picture {number} were not read back; ask a "
                "classifier that knows them for all pictures."
            )
        right = [float(read[name][number] == value) for name, value in wanted.items()]
        rows.append(sum(right) / len(right) if right else float("nan"))
    return torch.tensor(rows)


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
