"""Recipe of the FaceReader: what face feature would the recogniser find in this latent?

The target is not the feature of the one picture but the person's centroid over all pictures, so
that the reader looks for the person and not for the expression or the light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.face_reader import FaceReader
from ...vision.features import ImageFeatures
from ..fingerprint import fingerprint
from ..loop import Hooks, LoopConfig, Progress, train
from .person_choice import Latents, PersonChoice, of_one_size

BATCH = 128
AT_ONCE = 200
NOISE = 0.4
"""Largest noise on the latents: estimates of a clean latent are never quite clean."""


def face_centroids(features: ImageFeatures, people: Tensor) -> Tensor:
    """Unit mean of each person's unit face features; zero for a person whose face nobody found.

    Args:
        features: of M pictures.
        people: (P, Q) picture numbers of each person; -1 for none.

    Returns:
        (P, Df).
    """
    faces = F.normalize(features.face.float(), dim=-1) * features.face_found[:, None]
    own = faces[people.clamp(min=0)] * (people >= 0)[..., None]
    return F.normalize(own.sum(1), dim=-1)


def likeness_error(reader: FaceReader, latents: Tensor, centroids: Tensor) -> Tensor:
    """1 - cosine between the face read from latents (B, C, h, w) and centroids (B, Df): (B,).

    A zero centroid gives 1 and no gradient: nothing is known of that face.
    """
    return 1 - (reader(latents) * centroids).sum(-1)


class ReaderObjective(nn.Module):
    """Mean likeness error of real latents."""

    def __init__(self, reader: FaceReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of `latents` (B, C, h, w) whose faces are `centroids` (B, Df)."""
        error = likeness_error(self.reader, batch["latents"], batch["centroids"]).mean()
        return error, {"cosine": 1 - error.detach()}


def reader_batches(
    latents: Latents, centroids: Tensor, people: Tensor, count: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches of pictures with a little noise of a random amount on their latents.

    Args:
        latents: (M, C, h, w) scaled, or of several sizes.
        centroids: (P, Df) unit face of each person.
        people: (P, Q) picture numbers of each person; -1 at the end of whoever has fewer.
        count: B, pictures per batch.

    Returns:
        From a generator to a batch: `latents` (B, C, h, w) and their `centroids` (B, Df).
    """
    choose = PersonChoice(people, latents)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        person, pictures = choose(count, generator)
        clean = latents[pictures[:, 0]].float()
        amount = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        return {"latents": clean + amount * noise, "centroids": centroids[person]}

    return draw


@torch.no_grad()
def mean_likeness(
    reader: FaceReader, latents: Latents, features: ImageFeatures, people: Tensor
) -> float:
    """Mean cosine of the faces read from everybody's pictures with the person's, in [-1, 1].

    Args:
        reader: on the device where it reads.
        latents: scaled, of all pictures: (M, C, h, w), or of several sizes.
        features: of the same pictures.
        people: (P, Q) picture numbers of each person; -1 at the end of whoever has fewer.
    """
    centroids, device = face_centroids(features, people), next(reader.parameters()).device
    person, place = (people >= 0).nonzero(as_tuple=True)
    found = torch.zeros(())
    for rows in of_one_size(latents, people[person, place], AT_ONCE):
        faces = reader(latents[people[person, place][rows]].to(device, torch.float32))
        found += (faces.cpu() * centroids[person[rows]]).sum()
    return float(found / len(person))


def fit(
    reader: FaceReader,
    latents: Latents,
    features: ImageFeatures,
    people: Tensor,
    loop: LoopConfig,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the reader in place on M latents; see `loop.train` for the rest.

    Args:
        reader: changed in place.
        latents: scaled, of all pictures: (M, C, h, w), or of several sizes.
        features: of the same pictures.
        people: (P, Q) picture numbers of each person.
        loop: the run.
        folder: of its checkpoint and log.
        progress: as in `loop.train`.
    """
    centroids = face_centroids(features, people)
    draw = reader_batches(latents, centroids, people, BATCH)
    hooks = Hooks(progress, fingerprint=fingerprint(latents, centroids, people))
    return train(ReaderObjective(reader), draw, loop, folder, hooks)
