"""Arithmetic on what the judge says of faces: order, sameness, distinctness."""

from __future__ import annotations

import torch
from torch import Tensor

from difflora_core.evaluation.metrics import centroid


def rank_correlation(values: Tensor) -> Tensor:
    """Spearman's correlation of each row (P, W) with its column numbers: (P,).

    Equal values share the mean of their ranks, so a row that does not change gives 0.
    """
    below = (values[:, :, None] > values[:, None]).sum(2)
    equal = (values[:, :, None] == values[:, None]).sum(2)
    ranks = below + (equal - 1) / 2
    steps = torch.arange(values.shape[1]).double()
    ranks, steps = ranks.double() - ranks.double().mean(1, keepdim=True), steps - steps.mean()
    return (ranks @ steps) / (ranks.norm(dim=1) * steps.norm()).clamp_min(1e-12)


def three_distributions(faces: Tensor, training: Tensor, prefix: str) -> dict[str, object]:
    """Of people (I, C, E): the same in every picture, distinct, and nobody of the training (T, E).

    `own` compares two halves of a person's pictures, as `nearest_training` compares all of them
    with somebody else's; `distinct` is the share of people who are nearer to themselves.
    """
    half = faces.shape[1] // 2
    own = (centroid(faces[:, :half]) * centroid(faces[:, half:])).sum(1)
    nearest = (centroid(faces) @ training.T).amax(1)
    rows = {
        "consistency": within(faces),
        "between": between(centroid(faces)),
        "nearest_training": nearest,
        "own": own,
    }
    found = {f"{prefix}{name}": distribution(values) for name, values in rows.items()}
    return {**found, f"{prefix}distinct": float((own > nearest).float().mean())}


def within(faces: Tensor) -> Tensor:
    """Cosines between different pictures (I, C, E) of the same person."""
    return torch.cat([between(person) for person in faces])


def between(people: Tensor) -> Tensor:
    """Cosines between different people (I, E)."""
    return (people @ people.T)[tuple(torch.triu_indices(len(people), len(people), 1))]


def distribution(values: Tensor) -> dict[str, float]:
    """Mean and quantiles."""
    levels = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    quantiles = {name: float(values.quantile(level)) for name, level in levels.items()}
    return {"mean": float(values.mean()), **quantiles}
