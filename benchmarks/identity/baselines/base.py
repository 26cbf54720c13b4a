"""What a method that is trained once on many people looks like, and how a table draws with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.base_model.protocol import TextCondition
from difflora_core.training.losses import NoisedBatch, denoise
from difflora_core.vision.face_encoder import FaceEncoder
from difflora_core.vision.features import FeatureSizes, ImageFeatures

Person = dict[str, Tensor]
"""What a method made of the photos of B people: tensors (B, ...)."""


@dataclass(frozen=True)
class Photos:
    """N photos of each of B people.

    `face` (B, N, Df), `image` (B, N, Di), `tokens` (B, N, L, Dt): what the encoders saw;
    `keypoints` (B, 5, 2): of the face in pixels of the picture to follow, NaN without one.
    """

    face: Tensor
    image: Tensor
    tokens: Tensor
    keypoints: Tensor


class Baseline(nn.Module):
    """A method that is trained once, on the frozen base's denoising loss, and then reads photos.

    `source`: the paper, and what we changed.
    """

    source: ClassVar[str]

    def __init__(self, base: DiffusersBase, sizes: FeatureSizes) -> None:
        super().__init__()
        self.face_norm = Standardise(sizes.face, unit=True)
        self.image_norm = Standardise(sizes.image, unit=True)
        self.token_norm = Standardise(sizes.token_dim)

    def person(self, photos: Photos) -> Person:
        """What the base is steered by."""
        raise NotImplementedError

    def text(self, text: TextCondition, person: Person, strength: float) -> TextCondition:
        """Prompts (B) as they are for their people."""
        del person, strength
        return text

    def steered(
        self, base: DiffusersBase, person: Person, strength: float
    ) -> AbstractContextManager[DiffusersBase]:
        """The base as it draws B samples, each of its own person."""
        raise NotImplementedError

    def fit_statistics(self, photos: ImageFeatures) -> None:
        """Take mean and spread of the features of many photos, before training."""
        self.face_norm.fit(photos.face[photos.face_found])
        self.image_norm.fit(photos.image)
        self.token_norm.fit(photos.image_tokens.flatten(0, 1))

    def faces(self, photos: Photos) -> Tensor:
        """Standardised face embeddings (B, N, Df)."""
        return self.face_norm(photos.face)

    def learned(self) -> dict[str, Tensor]:
        """All that training changed: what a file of the method holds."""
        trained = {n: p.detach() for n, p in self.named_parameters() if p.requires_grad}
        return {**trained, **{n: b for n, b in self.named_buffers() if ".net." not in n}}

    @torch.no_grad()
    def load_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `learned` gave.

        Raises:
            KeyError: it is of another method or size.
        """
        own = self.learned()
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise KeyError("The file belongs to another baseline.")
        for name, value in own.items():
            value.copy_(tensors[name])


class Standardise(nn.Module):
    """(x - mean) / spread with one spread for all numbers, after L2 normalisation where asked.

    The same treatment that the MIF of DiffLoRA gives its features.
    """

    def __init__(self, size: int, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(()))

    def fit(self, rows: Tensor) -> None:
        """Statistics of (M, size)."""
        rows = F.normalize(rows.float(), dim=-1) if self.unit else rows.float()
        self.mean.copy_(rows.mean(0))
        self.spread.copy_(rows.var(0, unbiased=False).mean().sqrt().clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size)."""
        x = F.normalize(x, dim=-1) if self.unit else x
        return (x - self.mean) / self.spread


class BaselineObjective(nn.Module):
    """Denoising loss of other pictures of the person; forward maps a batch to (loss, metrics)."""

    def __init__(self, method: Baseline, base: DiffusersBase) -> None:
        super().__init__()
        self.method, self.base = method, base

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss () of a batch of `person_batches` with `keypoints` (B, 5, 2) of what is drawn."""
        seen = (batch[name] for name in ("face", "image", "image_tokens", "keypoints"))
        person = self.method.person(Photos(*seen))
        text = TextCondition(batch["context"], batch["pooled"])
        text = self.method.text(text, person, 1.0)
        with self.method.steered(self.base, person, 1.0) as steered:
            pictures = NoisedBatch(batch["latents"], batch["noise"], batch["timesteps"], text)
            error = denoise(steered, pictures).error.mean()
        return error, {"denoising": error.detach()}


class ConditionedPeople:
    """A trained method on the photos of some people: what a row draws with, see `Personal`."""

    @torch.no_grad()
    def __init__(self, method: Baseline, photos: Photos) -> None:
        self.method, self.person = method, method.person(photos)

    def encode(
        self, base: DiffusersBase, captions: Sequence[str], owner: Tensor, strength: float
    ) -> TextCondition:
        """See `Personal`."""
        return self.method.text(base.encode_prompts(captions), self._rows(owner), strength)

    @contextmanager
    def steered(
        self, base: DiffusersBase, owner: Tensor, strength: float
    ) -> Iterator[DiffusersBase]:
        """See `Personal`."""
        with self.method.steered(base, self._rows(owner), strength) as steered:
            yield steered

    def tensors(self) -> dict[str, Tensor]:
        """See `Personal`."""
        return {**self.method.learned(), **self.person}

    @property
    def kilobytes(self) -> float:
        """Of one person in half precision."""
        return sum(2 * value[0].numel() for value in self.person.values()) / 1024

    def _rows(self, owner: Tensor) -> Person:
        return {name: value[owner] for name, value in self.person.items()}


def photos_of(
    features: Sequence[ImageFeatures], images: Tensor, faces: FaceEncoder | None
) -> Photos:
    """The photos (I, N, H, W, 3) of I people as baselines see them.

    `faces` finds the five points of each first photo; None leaves them out.
    """
    points = torch.full((len(images), 5, 2), torch.nan)
    for number, person in enumerate(images if faces else ()):
        found = faces.detect(person[0])
        if found:
            points[number] = max(found, key=lambda face: face.score).keypoints
    return Photos(
        face=torch.stack([person.face for person in features]),
        image=torch.stack([person.image for person in features]),
        tokens=torch.stack([person.image_tokens for person in features]).float(),
        keypoints=points,
    )
