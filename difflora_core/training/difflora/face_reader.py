"""Recipe of the FaceReader: what face feature would the recogniser find in this latent?

The target is not the feature of the one picture but the person's centroid over all pictures, so
that the reader looks for the person and not for the expression or the light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

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


def likeness_error(
    reader: FaceReader, latents: Tensor, centroids: Tensor, boxes: Tensor | None = None
) -> Tensor:
    """1 - cosine between the face read from latents (B, C, h, w) and centroids (B, Df): (B,).

    A zero centroid gives 1 and no gradient: nothing is known of that face. `boxes` (B, 4): where
    the faces are, see `FaceReader.forward`.
    """
    return 1 - (reader(latents, boxes) * centroids).sum(-1)


class ReaderObjective(nn.Module):
    """Mean likeness error of real latents."""

    def __init__(self, reader: FaceReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of `latents` (B, C, h, w) whose faces are `centroids` (B, Df), at `boxes`."""
        latents, boxes = batch["latents"], batch.get("boxes")
        error = likeness_error(self.reader, latents, batch["centroids"], boxes).mean()
        return error, {"cosine": 1 - error.detach()}


class FacePictures(Protocol):
    """Pictures of people and what is known of their faces, such as `functional.PersonPictures`."""

    @property
    def latents(self) -> Latents:
        """Scaled, of M pictures: (M, C, h, w), or of several sizes."""

    @property
    def features(self) -> ImageFeatures:
        """Of the same pictures, M rows."""

    @property
    def people(self) -> Tensor:
        """(P, Q) picture numbers of each person; -1 at the end of whoever has fewer."""

    @property
    def boxes(self) -> Tensor | None:
        """(M, 4) of the faces, in shares of the picture, if they are known."""


def reader_batches(
    data: FacePictures, count: int
) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Batches of pictures with a little noise of a random amount on their latents.

    Args:
        data: the pictures.
        count: B, pictures per batch.

    Returns:
        From a generator to a batch: `latents` (B, C, h, w), `centroids` (B, Df), the unit faces of
        their people, and the `boxes` (B, 4) of their faces if they are known.
    """
    choose = PersonChoice(data.people, data.latents)
    centroids = face_centroids(data.features, data.people)

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        person, pictures = choose(count, generator)
        clean = data.latents[pictures[:, 0]].float()
        amount = NOISE * torch.rand(count, 1, 1, 1, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        there = {} if data.boxes is None else {"boxes": data.boxes[pictures[:, 0]]}
        return {"latents": clean + amount * noise, "centroids": centroids[person], **there}

    return draw


@torch.no_grad()
def mean_likeness(reader: FaceReader, data: FacePictures) -> float:
    """Mean cosine of the faces read from everybody's pictures with the person's, in [-1, 1].

    Args:
        reader: on the device where it reads.
        data: the pictures.
    """
    centroids = face_centroids(data.features, data.people)
    device = next(reader.parameters()).device
    person, place = (data.people >= 0).nonzero(as_tuple=True)
    pictures = data.people[person, place]
    found = torch.zeros(())
    for rows in of_one_size(data.latents, pictures, AT_ONCE):
        boxes = None if data.boxes is None else data.boxes[pictures[rows]].to(device)
        faces = reader(data.latents[pictures[rows]].to(device, torch.float32), boxes)
        found += (faces.cpu() * centroids[person[rows]]).sum()
    return float(found / len(person))


def fit(
    reader: FaceReader,
    data: FacePictures,
    loop: LoopConfig,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train the reader in place; see `loop.train` for the rest.

    Args:
        reader: changed in place.
        data: the pictures.
        loop: the run.
        folder: of its checkpoint and log.
        progress: as in `loop.train`.
    """
    known = [] if data.boxes is None else [data.boxes]
    parts = data.latents, face_centroids(data.features, data.people), data.people
    hooks = Hooks(progress, fingerprint=fingerprint(*parts, *known))
    return train(ReaderObjective(reader), reader_batches(data, BATCH), loop, folder, hooks)
