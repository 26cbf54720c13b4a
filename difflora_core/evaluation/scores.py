"""What the networks of an evaluation see, and the columns of its table.

A column has one number for each person: the mean over prompts and seeds. FID and KID have one for a
whole row. What a network sees is kept in files, so that nothing is looked at twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CheckpointError
from ..storage.file_digest import hashed
from ..storage.image_files import read_image
from ..storage.safetensors_io import read_file, write_atomic
from ..vision.preprocess import resize_square
from .backbones import Backbone
from .distribution import frechet_distance, kernel_distance
from .metrics import centroid, copy_paste, face_similarity, seed_diversity

AT_ONCE = 16
"""Pictures that a network looks at together."""
THUMBNAIL = 64
"""Side of the pictures that diversity is measured on."""


@dataclass(frozen=True)
class Shown:
    """Pictures in a row of the table, or people's photos.

    Attributes:
        paths: N files.
        owners: number of the person on each.
        prompts: what each was to show, without trigger words; empty of photos.
        cells: (prompt, seed) of each.
    """

    paths: tuple[Path, ...]
    owners: tuple[int, ...]
    prompts: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]


class Eyes:
    """The networks, and what they have seen.

    Args:
        backbones: by name.
        digests: of each one's weights.
        folder: where what they see is kept.
    """

    def __init__(
        self, backbones: Mapping[str, Backbone], digests: Mapping[str, str], folder: Path
    ) -> None:
        self.backbones = {**backbones, "pixels": thumbnails}
        self.digests = {**digests, "pixels": str(THUMBNAIL)}
        self.folder = folder

    def look(
        self, name: str, pictures: Shown, progress: Callable[[int, int], None]
    ) -> dict[str, Tensor]:
        """What each network sees: (N, D) by its name.

        Args:
            name: of the row.
            pictures: of the row.
            progress: told how many of all looks are done.
        """
        files = [hashed(path).hexdigest() for path in pictures.paths]
        total, done = len(self.backbones) * len(files), 0
        seen = {}
        for title, backbone in self.backbones.items():
            facts = [self.digests[title], files, pictures.prompts]
            of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
            path = self.folder / name / f"{title}.safetensors"
            kept = _kept(path, of)
            if kept is None:
                parts = []
                for start in range(0, len(files), AT_ONCE):
                    part = slice(start, start + AT_ONCE)
                    images = [read_image(own)[0] for own in pictures.paths[part]]
                    parts.append(backbone(images, pictures.prompts[part]))
                    progress(done + start + len(images), total)
                kept = torch.cat(parts).float()
                write_atomic({"seen": kept}, {"of": of}, path)
            else:
                progress(done + len(files), total)
            seen[title] = kept
            done += len(files)
        return seen


def _kept(path: Path, of: str) -> Tensor | None:
    """What was seen of just these pictures; None where that is not known."""
    if not path.exists():
        return None
    try:
        tensors, facts = read_file(path, "file of features")
    except CheckpointError:
        return None
    return tensors.get("seen") if facts.get("of") == of else None


def thumbnails(pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    """(N, D) pixels of small pictures."""
    return torch.stack([resize_square(p, THUMBNAIL).flatten() for p in pictures])


@dataclass(frozen=True)
class Known:
    """Photos of the people.

    Attributes:
        seen: by network.
        owners: (M,) number of the person.
        given: (M,) bool: the photo that a model is shown.
        real: features of the pictures that FID and KID compare with; None takes all photos.
    """

    seen: Mapping[str, Tensor]
    owners: Tensor
    given: Tensor
    real: Tensor | None = None


def columns(
    seen: Mapping[str, Tensor], pictures: Shown, known: Known, people: int
) -> dict[str, Tensor]:
    """Columns of a row, (P,) each; NaN where a person has no number.

    Args:
        seen: what the networks see in the row's pictures.
        pictures: these.
        known: people's photos.
        people: P.
    """
    owners = torch.tensor(pictures.owners)
    found: dict[str, Tensor] = {}
    for name in ("DINO", "DINOv2"):
        if name in seen:
            found[name] = alike(seen[name], owners, known.seen[name], known.owners, people)
    if "DINOv2" in found:
        found["DINOv2"] = (1 + found["DINOv2"]) / 2
    if "CLIP" in seen:
        images, texts = seen["CLIP"].chunk(2, 1)
        photos = known.seen["CLIP"].chunk(2, 1)[0]
        found["CLIP-I"] = alike(images, owners, photos, known.owners, people)
        found["CLIP-T"] = by_person((images * texts).sum(1), owners, people)
    for name in ("ImageReward", "PickScore"):
        if name in seen:
            found[name] = by_person(seen[name][:, 0], owners, people)
    if "faces" in seen:
        found |= face_columns(seen["faces"], owners, known, people)
    if (found_diversity := diversity(seen["pixels"], pictures, people)) is not None:
        found["diversity"] = found_diversity
    return found


def whole_row(seen: Mapping[str, Tensor], known: Known) -> dict[str, float]:
    """FID and KID of a row, where Inception has looked."""
    if "Inception" not in seen:
        return {}
    real = known.seen["Inception"] if known.real is None else known.real
    return {
        "FID": frechet_distance(seen["Inception"], real),
        "KID": kernel_distance(seen["Inception"], real),
    }


def by_person(values: Tensor, owners: Tensor, people: int) -> Tensor:
    """Mean of (N,) over each person's pictures, those that are NaN left out: (P,)."""
    parts = [values[(owners == person) & ~values.isnan()] for person in range(people)]
    return torch.stack([part.double().mean() for part in parts])


def alike(
    pictures: Tensor, owners: Tensor, photos: Tensor, photo_owners: Tensor, people: int
) -> Tensor:
    """Mean cosine over all pairs of a person's pictures (N, D) and photos (M, D): (P,)."""
    pictures, photos = (F.normalize(own.double(), dim=1) for own in (pictures, photos))
    means = torch.stack([photos[photo_owners == person].mean(0) for person in range(people)])
    return by_person((pictures * means[owners]).sum(1), owners, people)


def face_columns(seen: Tensor, owners: Tensor, known: Known, people: int) -> dict[str, Tensor]:
    """Likeness of faces (N, 1 + E), see `backbones.Faces`.

    Face Sim compares with the photo that was given, R-FaceSim with the others; no face counts as 0.
    Copy-paste is of the pictures with a face.
    """
    found, faces = seen[:, 0] > 0, seen[:, 1:].double()
    known_found, known_faces = known.seen["faces"][:, 0] > 0, known.seen["faces"][:, 1:].double()
    rows = {
        name: torch.full((len(seen),), torch.nan, dtype=torch.double)
        for name in ("Face Sim", "R-FaceSim", "copy-paste")
    }
    for person in range(people):
        own, photos = owners == person, known_found & (known.owners == person)
        given, others = known_faces[photos & known.given], known_faces[photos & ~known.given]
        for name, references in (("Face Sim", given), ("R-FaceSim", others)):
            if len(references):
                to = centroid(references)[None]
                rows[name][own] = face_similarity(faces[own], to, found[own])
        if len(given) and len(others):
            rows["copy-paste"][own & found] = copy_paste(faces[own & found], given, others)
    columns = {name: by_person(values, owners, people) for name, values in rows.items()}
    return columns | {"face found": by_person(found.double(), owners, people)}


def diversity(seen: Tensor, pictures: Shown, people: int) -> Tensor | None:
    """Difference between seeds of one prompt, (P,); None where nothing has two seeds."""
    places: dict[tuple[int, int], list[int]] = {}
    for row, (owner, (prompt, _)) in enumerate(zip(pictures.owners, pictures.cells, strict=True)):
        places.setdefault((owner, prompt), []).append(row)
    several = {place: rows for place, rows in places.items() if len(rows) > 1}
    if not several:
        return None
    values = torch.stack([seed_diversity(seen[rows][:, None, None]) for rows in several.values()])
    owners = torch.tensor([owner for owner, _ in several])
    return by_person(values, owners, people)
