"""Procedural people: every identity is a vector of named parameters drawn from its own seed.

Splits are disjoint by seed range, so nothing trained on one split can have met a person of another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PARAMETERS = (
    "skin_tone",
    "skin_hue",
    "hair_light",
    "hair_red",
    "hair_length",
    "hair_volume",
    "hair_curl",
    "fringe",
    "parting",
    "face_width",
    "face_height",
    "jaw",
    "eye_size",
    "eye_spacing",
    "eye_colour",
    "brow_thickness",
    "brow_angle",
    "nose",
    "mouth_width",
    "lips",
    "beard",
    "glasses",
)
"""Names of the identity parameters, in the order of the vectors; each value lies in [-1, 1]."""

SOMETIMES = {"beard": 0.45, "glasses": 0.4}
"""Parameters that most people lack: probability of presence (absent = -1, present = 0.1 to 1)."""

SPLITS = {
    "train": range(0, 100_000),
    "validation": range(100_000, 110_000),
    "test": range(200_000, 210_000),
    "judge": range(300_000, 400_000),
    "example": range(400_000, 401_000),
}
"""Seed ranges of the splits. `judge` identities train the judge networks and nothing else,
`example` identities are the people of the shipped pictures and workflows."""


def identity_parameters(seeds: Sequence[int]) -> Tensor:
    """Parameters of the people with these seeds.

    Args:
        seeds: identity seeds (see SPLITS).

    Returns:
        (len(seeds), len(PARAMETERS)) float32 in [-1, 1].
    """
    rows = [torch.rand(len(PARAMETERS) + len(SOMETIMES), generator=_generator(s)) for s in seeds]
    draws = torch.stack(rows)
    values = draws[:, : len(PARAMETERS)] * 2 - 1
    for k, (name, probability) in enumerate(SOMETIMES.items()):
        column = PARAMETERS.index(name)
        present = draws[:, len(PARAMETERS) + k] < probability
        amount = 0.1 + 0.9 * draws[:, column]
        values[:, column] = torch.where(present, amount, torch.full_like(amount, -1.0))
    return values


def split_seeds(split: str, count: int, start: int = 0) -> list[int]:
    """The seeds number `start` to `start + count` of a split.

    Raises:
        KeyError: unknown split.
        ValueError: the split has fewer identities.
    """
    seeds = SPLITS[split]
    if start + count > len(seeds):
        raise ValueError(f"split {split} has {len(seeds)} identities, asked for {start + count}")
    return list(seeds[start : start + count])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(7_919 * seed + 17)
