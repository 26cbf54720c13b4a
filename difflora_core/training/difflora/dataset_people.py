"""People of a prepared dataset: their pictures as DreamBooth takes them, their LoRAs' likeness."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ...base_model.diffusers_base import DiffusersBase
from ...base_model.protocol import TextCondition, compute_device, told_sizes
from ...config import Config, check_range
from ...data.encodings import Latents
from ...data.prepared import PreparedDataset
from ...diffusion.sampler import SampleSettings
from ...errors import DatasetError, shown
from ...lora.weights import LoRAWeights
from ...vision.face_choice import FaceOptions, choose_face
from ...vision.face_encoder import FaceEncoder
from ..drawing import draw
from ..lora.dreambooth_config import DreamBoothExamples

_LARGEST = FaceOptions(on_missing="skip")


class DatasetPeople:
    """Everybody of a dataset; called with names it gives their DreamBoothExamples.

    A picture that counts n times as much as others (`repeats`) stands there n times.

    Args:
        dataset: prepared; all pictures of one size.
        latents: of its pictures.

    Attributes:
        names: of everybody, in the order of the rows.

    Raises:
        DatasetError: the pictures have several sizes.
    """

    def __init__(self, dataset: PreparedDataset, latents: Latents) -> None:
        if len(dataset.buckets) > 1:
            sizes = ", ".join(f"{h} x {w}" for h, w in list(dataset.buckets)[:4])
            raise DatasetError(
                f"The pictures have {len(dataset.buckets)} sizes ({sizes}); people who are trained "
                "at once need one. Run prepare with --framing face, which cuts squares."
            )
        self._latents = latents
        self._rows = {person.name: person.rows for person in dataset.people}
        self.names = tuple(self._rows)
        self._captions = [captions[0] for captions in dataset.column("captions")]
        self._repeats = list(dataset.column("repeats"))
        told = [torch.tensor(list(dataset.column(n))) for n in ("original_size", "cut", "size")]
        pixels = torch.cat(told, 1).float()  # as `PreparedPicture.time_ids`
        self._time_ids = told_sizes(pixels, int(pixels[0, 4]), latents.read(0).shape[1])

    def __call__(self, names: Sequence[str]) -> DreamBoothExamples:
        """Pictures of some people."""
        rows = [self._counted(name) for name in names]
        return DreamBoothExamples(
            pad_sequence([self._read(own) for own in rows], batch_first=True),
            [[self._captions[row] for row in own] for own in rows],
            [seed_of(name) for name in names],
            pad_sequence([self._time_ids[own] for own in rows], batch_first=True),
        )

    def captions(self, name: str) -> list[str]:
        """Different captions of a person's pictures, in their order."""
        return list(dict.fromkeys(self._captions[row] for row in self._rows[name]))

    def rows(self, name: str) -> range:
        """Rows of a person."""
        return self._rows[name]

    def _counted(self, name: str) -> list[int]:
        """The rows of a person, each as often as it counts."""
        own = self._rows[name]
        share = reduce(gcd, (self._repeats[row] for row in own))
        return [row for row in own for _ in range(self._repeats[row] // share)]

    def _read(self, rows: Sequence[int]) -> Tensor:
        """(M, C, h, w) float32."""
        return torch.stack([self._latents.read(row).float() for row in rows])


def seed_of(name: str) -> int:
    """A person's own seed, the same in every dataset and group."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")


@dataclass(frozen=True)
class JudgeSettings(Config):
    """How the likeness that a LoRA reached is measured.

    Args:
        faces: folder of the face analysis that prepare had; empty measures nothing.
        pictures: drawn with each LoRA, of the person's own captions.
        steps: of the drawing.
        guidance: of the drawing.

    Raises:
        ConfigError: a value is out of range.
    """

    faces: str = ""
    pictures: int = 4
    steps: int = 20
    guidance: float = 4.0

    def __post_init__(self) -> None:
        check_range("Judge", "pictures", self.pictures, 1, 1000)
        check_range("Judge", "steps", self.steps, 1, 1000)
        check_range("Judge", "guidance", self.guidance, 0, 100)


class LikenessJudge:
    """Draws with a LoRA and compares the faces with the person's; a `Likeness` of `lora_store`.

    A picture without a face counts as 0 (Face Sim of arXiv:2312.04461, with the mean direction of
    the person's faces).

    Args:
        base: draws.
        people: whose LoRAs are judged.
        dataset: knows their faces.
        encoder: finds and recognises faces, as prepare did.
        settings: of the judging.

    Raises:
        DatasetError: prepare looked for no faces, or with another recogniser.
    """

    def __init__(
        self,
        base: DiffusersBase,
        people: DatasetPeople,
        dataset: PreparedDataset,
        encoder: FaceEncoder,
        settings: JudgeSettings,
    ) -> None:
        known = Path(dataset.facts.face_encoder).name
        own = getattr(encoder, "recogniser", "")
        if known != own:
            raise DatasetError(
                f"The dataset's faces were found by {shown(known) or 'nobody'}, these are found "
                f"by {shown(own)}: their likeness cannot be compared. Name the face analysis that "
                "prepare had."
            )
        self.base, self.people, self.encoder, self.settings = base, people, encoder, settings
        self._faces = list(dataset.column("face"))
        self._names = base.module_names
        self._shape = people([people.names[0]]).latents.shape[2:]

    def __call__(self, name: str, weights: LoRAWeights) -> float:
        """The likeness, in [-1, 1]; 0 where no face of the person is known."""
        faces = [self._faces[row] for row in self.people.rows(name) if self._faces[row]]
        if not faces:
            return 0.0
        person = F.normalize(F.normalize(torch.tensor(faces), dim=-1).mean(0), dim=-1)
        pictures = self.base.decode_latents(self._draw(name, weights))
        return sum(self._cosine(picture.cpu(), person) for picture in pictures) / len(pictures)

    def _draw(self, name: str, weights: LoRAWeights) -> Tensor:
        """Latents of pictures of a person."""
        s, captions = self.settings, self.people.captions(name)
        asked = [captions[k % len(captions)] for k in range(s.pictures)]
        text: TextCondition = self.base.encode_prompts([*asked, ""])
        seeds = [seed_of(name) + k for k in range(s.pictures)]
        here = weights.to(torch.float32, compute_device(self.base))
        settings = SampleSettings(s.steps, s.guidance)
        return draw(self.base, here, self._names, text, seeds, settings, self._shape)

    def _cosine(self, picture: Tensor, person: Tensor) -> float:
        """Of the largest face of a picture (H, W, 3) with a direction (Df,); 0 without a face."""
        face = choose_face(self.encoder.detect(picture), _LARGEST)
        return 0.0 if face is None else float(F.normalize(face.embedding, dim=-1) @ person)
