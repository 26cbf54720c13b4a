"""PreparedPicture: the one record of a picture that training reads, and its columns on disk."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DatasetError, shown
from ..limits import PICTURE_PIXELS
from ..vision.training_pictures import FACE, WHOLE, Cut, TrainingPicture
from .libraries import datasets_library

KEYPOINTS = 5


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """A picture of one person, ready for training.

    Attributes:
        number: its row in the dataset, from 0. Rows are sorted by person, then by source.
        source: where it came from: a path relative to the folder that was prepared, or a row of a
            table.
        digest: SHA-256 of the source's bytes, hexadecimal.
        person: the name of the person, given by a folder or a table, or made up ("person-000001").
        picture: (H, W, 3) float32 in [0, 1]: turned as its EXIF data say, RGB, brought to the size
            of its bucket.
        captions: what it shows, one or more texts; none names the person unless the user's do.
        repeats: how often it counts against the others (kohya's `10_name`), 1 or more.
        cut: how it was scaled and cut out of the source.
        framing: WHOLE, or FACE for the square around the face.
        faces: how many faces the source shows; 0 where nobody looked.
        face: (Df,) float32 unit embedding of the person's face; None without a face.
        box: (4,) float32 x1, y1, x2, y2 of the face in pixels of `picture`; None without a face.
        keypoints: (5, 2) float32 eyes, nose tip, mouth corners in pixels of `picture`.
        score: of the face detector, in [0, 1]; 0 without a face.
        likeness: cosine of the face with the mean of the person's other faces; 1 for a single one.
    """

    number: int
    source: str
    digest: str
    person: str
    picture: Tensor
    captions: tuple[str, ...]
    repeats: int
    cut: Cut
    framing: str
    faces: int
    face: Tensor | None
    box: Tensor | None
    keypoints: Tensor | None
    score: float
    likeness: float

    @property
    def bucket(self) -> tuple[int, int]:
        """Height and width; pictures of one bucket can share a batch."""
        return self.picture.shape[0], self.picture.shape[1]

    def time_ids(self, mirrored: bool = False) -> list[float]:
        """The six numbers that SDXL is told of it, see `TrainingPicture.time_ids`."""
        training = TrainingPicture(self.picture, self.number, self.framing, cut=self.cut)
        return training.time_ids(mirrored)


def columns() -> Any:
    """The columns of a prepared dataset, as `datasets.Features`.

    `size` is height and width of the picture; `original_size` those of the source before it was
    scaled; `scaled_width` and `cut` (top, left) as in `Cut`. A picture without a face has empty
    lists for `face`, `box` and `keypoints`.
    """
    library = datasets_library()
    text, whole, number = (library.Value(kind) for kind in ("string", "int32", "float32"))
    return library.Features(
        {
            "picture": library.Image(),
            "source": text,
            "digest": text,
            "person": text,
            "person_number": whole,
            "captions": library.List(text),
            "repeats": whole,
            "size": library.List(whole),
            "original_size": library.List(whole),
            "scaled_width": whole,
            "cut": library.List(whole),
            "framing": text,
            "faces": whole,
            "face": library.List(number),
            "box": library.List(number),
            "keypoints": library.List(number),
            "score": number,
            "likeness": number,
        }
    )


def from_row(number: int, row: Mapping[str, Any]) -> PreparedPicture:
    """The record of a row whose picture is not decoded: {"bytes": ..., "path": ...}.

    Raises:
        DatasetError: the row is not one that `prepare` writes.
    """
    try:
        picture = decoded(row["picture"]["bytes"], tuple(row["size"]))
        height, width = row["original_size"]
        top, left = row["cut"]
        found = bool(row["face"])
        if row["framing"] not in (WHOLE, FACE) or not row["captions"]:
            raise ValueError("it has no caption, or an unknown framing")
        return PreparedPicture(
            number=number,
            source=row["source"],
            digest=row["digest"],
            person=row["person"],
            picture=picture,
            captions=tuple(row["captions"]),
            repeats=row["repeats"],
            cut=Cut((height, width), row["scaled_width"], top, left),
            framing=row["framing"],
            faces=row["faces"],
            face=torch.tensor(row["face"]) if found else None,
            box=torch.tensor(row["box"]).reshape(4) if found else None,
            keypoints=torch.tensor(row["keypoints"]).reshape(KEYPOINTS, 2) if found else None,
            score=row["score"],
            likeness=row["likeness"],
        )
    except (KeyError, TypeError, ValueError, OSError, SyntaxError, RuntimeError) as damage:
        raise DatasetError(
            f"Row {number} of the dataset is damaged ({shown(str(damage))}). Prepare it again."
        ) from damage


def encoded(pixels: np.ndarray[Any, Any], kind: str) -> bytes:
    """Pixels (H, W, 3) of 8 bits as a picture file: "png", or "jpeg" of high quality."""
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "jpeg" else {"compress_level": 3}
    Image.fromarray(pixels).save(buffer, kind.upper(), **options)
    return buffer.getvalue()


def decoded(data: bytes, size: tuple[int, ...]) -> Tensor:
    """Pixels (H, W, 3) float32 in [0, 1] of what `encoded` made of a picture of this size.

    Raises:
        ValueError: it has another size.
        OSError: it is no such file.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as opened:
        if (opened.height, opened.width) != size or opened.width * opened.height > PICTURE_PIXELS:
            raise ValueError("its picture has another size")
        pixels = np.asarray(opened.convert("RGB"))
    return torch.from_numpy(pixels.copy()).float() / 255
