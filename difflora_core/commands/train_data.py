"""A prepared dataset as training reads it: latents, texts and features of people.

What the base's encoders and CLIP vision make of a picture is computed once and kept in the run's
folder, in parts; a run that was stopped in the middle goes on with the part that is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..base_model.diffusers_base import DiffusersBase
from ..base_model.protocol import TextCondition, told_sizes
from ..data.encodings import Latents, encode_latents
from ..data.prepared import PreparedDataset
from ..data.records import PreparedPicture
from ..errors import DatasetError
from ..storage.safetensors_io import read_file, write_atomic
from ..training.difflora.functional import PersonPictures
from ..training.difflora.person_choice import sized
from ..training.fingerprint import fingerprint, weights_digest
from ..training.hooks import Progress
from ..training.processes import launched
from ..vision.face_choice import FaceOptions
from ..vision.face_encoder import DetectedFace
from ..vision.features import TENSORS, ImageFeatures, extract_features
from ..vision.image_encoder import ImageEncoder

PART = 256
"""Pictures that are encoded and written at once."""
PROMPTS = 64
"""Prompts that are encoded at once."""


@dataclass(frozen=True, eq=False)
class Encoders:
    """What makes pictures into what is trained on.

    Attributes:
        base: its VAE and text encoders.
        image: CLIP vision.
        image_digest: of its file, which tells it from others.
    """

    base: DiffusersBase
    image: ImageEncoder
    image_digest: str


class RecordedFace:
    """A FaceEncoder that finds what `prepare` found in a picture.

    Args:
        record: of the picture.
        package: the face analysis, "antelopev2/glintr100.onnx".
    """

    def __init__(self, record: PreparedPicture, package: str) -> None:
        self.record, self.recogniser = record, Path(package).name
        self.embedding_dim = 0 if record.face is None else len(record.face)

    def detect(self, image: Tensor) -> list[DetectedFace]:
        """The face of the record's picture (H, W, 3)."""
        r = self.record
        if r.face is None or r.box is None or r.keypoints is None:
            return []
        return [DetectedFace(r.box, r.score, r.keypoints, r.face)]


@dataclass(frozen=True, eq=False)
class People:
    """Some people of a dataset.

    Attributes:
        pictures: theirs, and perhaps those of others.
        names: of each of `pictures.people`.
    """

    pictures: PersonPictures
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def some(self, chosen: Sequence[int]) -> People:
        """A few of them, by place (n,)."""
        few = self.pictures.people[list(chosen)]
        return People(replace(self.pictures, people=few), tuple(self.names[k] for k in chosen))

    def photos(self, most: int | None = None) -> ImageFeatures:
        """Features of N photos each, person by person; who has fewer is seen again.

        Args:
            most: N; as many as the one with the most has, unless given.
        """
        table, counts = self.pictures.people, (self.pictures.people >= 0).sum(1)
        turns = torch.arange(most or table.shape[1])[None] % counts[:, None]
        return self.pictures.features.select(table.gather(1, turns).flatten())

    @property
    def fewest(self) -> int:
        """Pictures of whoever has the fewest."""
        return int((self.pictures.people >= 0).sum(1).min())


def load_people(
    dataset: PreparedDataset,
    encoders: Encoders,
    folder: Path,
    progress: Progress,
    fewest: int = 2,
) -> People:
    """Everybody of whom there are enough pictures with a face.

    Args:
        dataset: prepared.
        encoders: see there.
        folder: where what they make is kept.
        progress: told of pictures.
        fewest: how many that is.

    Raises:
        DatasetError: the dataset does not suit, or nobody is left.
    """
    _check(dataset)
    rows = _usable(dataset, fewest)
    latents = _latents(dataset, encoders.base, progress)
    tensors = _stored_features(dataset, rows, encoders, folder, progress)
    prompts, numbers = _prompts(dataset, rows)
    recogniser = Path(dataset.facts.face_encoder).name
    table, who = _people(dataset, rows)
    own, pixels = [latents.read(row) for row in rows], tensors["time_ids"]
    pictures = PersonPictures(
        latents=sized(own),
        text=encode_all(encoders.base, prompts),
        prompts=numbers,
        features=ImageFeatures(
            **{name: tensors[name] for name in TENSORS}, image_region="crop", recogniser=recogniser
        ),
        people=table,
        time_ids=told_sizes(pixels, int(pixels[0, 4]), own[0].shape[1]),
        boxes=_boxes(dataset, rows),
    )
    return People(pictures, who)


def encode_all(base: DiffusersBase, prompts: Sequence[str]) -> TextCondition:
    """Encoded prompts on the CPU, some at once."""
    parts = [base.encode_prompts(prompts[k : k + PROMPTS]) for k in range(0, len(prompts), PROMPTS)]
    context, pooled = ([getattr(p, n).cpu() for p in parts] for n in ("context", "pooled"))
    return TextCondition(torch.cat(context), torch.cat(pooled))


def split_people(people: People, held_out: float, seed: int) -> tuple[People, People | None]:
    """Those to train on, and those to validate with; the latter None where they are too few.

    Args:
        people: everybody.
        held_out: share of them.
        seed: of who they are.
    """
    count = int(len(people) * held_out)
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    others = people.some(sorted(order[:count])) if count else None
    return people.some(sorted(order[count:])), others


def _check(dataset: PreparedDataset) -> None:
    """Refuses a dataset that cannot be trained on."""
    if not dataset.facts.face_encoder:
        raise DatasetError(
            "Nobody looked for faces in this dataset: run prepare with --faces and the folder of a "
            "face analysis."
        )


def _usable(dataset: PreparedDataset, fewest: int) -> list[int]:
    """Rows with a face, of people who have so many of them."""
    faces = [bool(face) for face in dataset.column("face")]
    rows = []
    for person in dataset.people:
        own = [row for row in person.rows if faces[row]]
        rows += own if len(own) >= fewest else []
    if not rows:
        raise DatasetError(
            "Nobody in this dataset has two pictures with a face: one to see and one to draw are "
            "needed."
            if fewest > 1
            else "No picture in this dataset shows a face."
        )
    return rows


def _people(dataset: PreparedDataset, rows: Sequence[int]) -> tuple[Tensor, tuple[str, ...]]:
    """(P, Q) places among the rows of each person, -1 at the end of whoever has fewer; and who."""
    place = {row: number for number, row in enumerate(rows)}
    own = {
        person.name: found
        for person in dataset.people
        if (found := [place[row] for row in person.rows if row in place])
    }
    most = max(map(len, own.values()))
    table = [numbers + [-1] * (most - len(numbers)) for numbers in own.values()]
    return torch.tensor(table), tuple(own)


def _prompts(dataset: PreparedDataset, rows: Sequence[int]) -> tuple[list[str], Tensor]:
    """The different captions of rows (n,), and which (n,) each row has; no picture is read."""
    texts = list(dataset.column("captions"))
    captions = [texts[row][0] for row in rows]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(captions))}
    return list(numbers), torch.tensor([numbers[caption] for caption in captions])


def _boxes(dataset: PreparedDataset, rows: Sequence[int]) -> Tensor:
    """(n, 4) x1, y1, x2, y2 of the faces of rows that have one, in shares of the picture."""
    boxes, sizes = list(dataset.column("box")), list(dataset.column("size"))
    height, width = torch.tensor([sizes[row] for row in rows]).unbind(1)
    return torch.tensor([boxes[row] for row in rows]) / torch.stack([width, height] * 2, 1)


def _latents(dataset: PreparedDataset, base: DiffusersBase, progress: Progress) -> Latents:
    """Latents of all pictures, beside the dataset; encoded here where they are missing."""

    def report(what: str, done: int, total: int) -> None:
        progress(done, total, {})

    maker = weights_digest(base.vae)
    launched().on_main(lambda: encode_latents(dataset, base, maker, report=report))
    return Latents(dataset)


def _stored_features(
    dataset: PreparedDataset,
    rows: Sequence[int],
    encoders: Encoders,
    folder: Path,
    progress: Progress,
) -> dict[str, Tensor]:
    """What the encoders see in rows, from the run's folder where it is there; see `_features`."""
    digest = fingerprint(dataset.facts.digest, rows, encoders.image_digest)
    parts = []
    for start in range(0, len(rows), PART):
        path = folder / f"features-{digest[:16]}-{start:08d}.safetensors"

        def write(path: Path = path, chosen: Sequence[int] = rows[start : start + PART]) -> None:
            if not path.exists():
                write_atomic(
                    _features([dataset[row] for row in chosen], dataset, encoders), {}, path
                )

        launched().on_main(write)
        parts.append(read_file(path, "file of features")[0])
        progress(min(start + PART, len(rows)), len(rows), {})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _features(
    records: Sequence[PreparedPicture], dataset: PreparedDataset, encoders: Encoders
) -> dict[str, Tensor]:
    """What the encoders see in some pictures, and what the base is told of their sizes."""
    options, package = FaceOptions(on_missing="image_only"), dataset.facts.face_encoder
    features = ImageFeatures.cat(
        [
            extract_features(
                r.picture[None], RecordedFace(r, package), encoders.image, options
            ).features
            for r in records
        ]
    )
    tensors = {name: getattr(features, name).contiguous() for name in TENSORS}
    tensors["image_tokens"] = tensors["image_tokens"].half()
    return {**tensors, "time_ids": torch.tensor([r.time_ids() for r in records])}
