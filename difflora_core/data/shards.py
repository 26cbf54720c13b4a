"""Rows of a prepared dataset, and the Arrow files they are written to, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DatasetError, shown
from ..storage.atomic import replacing
from ..storage.file_digest import hashed
from .catalogue import Choice, Known
from .framing import Framed, frame
from .libraries import arrow_library
from .looks import SeenFace
from .pictures import open_picture
from .prepared import SHARD_ROWS, ShardFile
from .records import columns, encoded
from .sources import Source

_BATCH_ROWS = 16


@dataclass(frozen=True)
class Framing:
    """How pictures are cut and stored.

    Attributes:
        resolution: side in pixels of the square that the base was made for.
        close: the square around the face instead of the whole, so many times its box; 0: the whole.
        crowd: the same for pictures of several people.
        encoding: "jpeg" or "png".
    """

    resolution: int
    close: float
    crowd: float
    encoding: str


@dataclass(frozen=True)
class Row:
    """All that a row is made of, but for the picture.

    Attributes:
        known: the picture's entry and look.
        choice: whom it shows.
        person_number: of the person, from 0.
        captions: what it shows.
        faces: how many the picture shows.
        face: the person's; None without one.
    """

    known: Known
    choice: Choice
    person_number: int
    captions: tuple[str, ...]
    faces: int
    face: SeenFace | None

    def plan(self) -> str:
        """The row in one line: equal lines make equal rows."""
        known, choice = self.known, self.choice
        parts = [known.key, known.look.digest, choice.person, self.person_number, known.repeats]
        parts += [*self.captions, self.faces, choice.face, choice.likeness]
        if self.face is not None:
            parts += [self.face.embedding.hex(), self.face.geometry.hex()]
        return json.dumps(parts)

    def framed(self, source: Source, framing: Framing) -> Framed:
        """The picture, cut to its bucket.

        Raises:
            DatasetError: its file is not the one any more that was looked at.
        """
        picture = self._open(source)
        close = framing.crowd if self.faces > 1 else framing.close
        places = None if self.face is None else self.face.places
        box = None if self.face is None else self.face.box
        return frame(picture, framing.resolution, box, places, close)

    def _open(self, source: Source) -> Image.Image:
        """The whole picture."""
        try:
            data = source.read(self.known.place)
        except DatasetError as gone:
            raise DatasetError(f"{shown(self.known.key, 300)}: {gone}.") from gone
        if hashlib.sha256(data).hexdigest() != self.known.look.digest:
            raise DatasetError(
                f"{shown(self.known.key, 300)} was changed while the dataset was prepared. "
                "Run prepare again when nobody writes to the pictures."
            )
        return open_picture(data)


@dataclass(frozen=True)
class ShardJob:
    """One file to write: its number and its rows."""

    number: int
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """Of the file."""
        return f"data-{self.number:05d}.arrow"

    def plan(self, framing: Framing) -> str:
        """Digest of all that the file is made of."""
        digest = hashlib.sha256(json.dumps(asdict(framing), sort_keys=True).encode())
        for row in self.rows:
            digest.update(row.plan().encode() + b"\n")
        return digest.hexdigest()


def jobs(rows: Iterator[Row]) -> Iterator[ShardJob]:
    """Rows as files of SHARD_ROWS each."""
    number, own = 0, []
    for row in rows:
        own.append(row)
        if len(own) == SHARD_ROWS:
            yield ShardJob(number, tuple(own))
            number, own = number + 1, []
    if own:
        yield ShardJob(number, tuple(own))


@dataclass(frozen=True)
class ShardWriter:
    """Writes shards to a folder; can be sent to another process."""

    source: Source
    folder: Path
    framing: Framing

    def __call__(self, job: ShardJob) -> ShardFile:
        """Writes one file; it is there as a whole or not at all.

        Raises:
            DatasetError: a picture was changed, or the file cannot be written.
        """
        arrow, path = arrow_library(), self.folder / job.name
        schema = columns().arrow_schema
        with replacing(path, DatasetError) as temporary:
            file = arrow.OSFile(str(temporary), "wb")
            with file, arrow.ipc.new_stream(file, schema) as to:
                for start in range(0, len(job.rows), _BATCH_ROWS):
                    part = job.rows[start : start + _BATCH_ROWS]
                    values = [self._values(row) for row in part]
                    to.write_batch(arrow.RecordBatch.from_pylist(values, schema=schema))
            size, digest = temporary.stat().st_size, hashed(temporary).hexdigest()
        return ShardFile(job.name, size, len(job.rows), digest)

    def _values(self, row: Row) -> dict[str, Any]:
        """The columns of a row, see `records.columns`."""
        framed = row.framed(self.source, self.framing)
        cut, pixels, points = framed.picture.cut, framed.pixels, framed.points
        if cut is None:
            raise DatasetError("A picture was not cut to its bucket.")
        picture = {"bytes": encoded(pixels, self.framing.encoding), "path": None}
        values = {
            "picture": picture,
            "source": row.known.key,
            "digest": row.known.look.digest,
            "person": row.choice.person,
            "person_number": row.person_number,
            "captions": list(row.captions),
            "repeats": row.known.repeats,
            "size": list(pixels.shape[:2]),
            "original_size": list(cut.original),
            "scaled_width": cut.scaled_width,
            "cut": [cut.top, cut.left],
            "framing": framed.picture.framing,
            "faces": row.faces,
            "likeness": row.choice.likeness,
        }
        face = row.face
        numbers = np.zeros(0) if face is None else face.vector
        places = np.zeros(0) if face is None else points.flatten().numpy()
        return values | {
            "face": numbers.tolist(),
            "box": places[:4].tolist(),
            "keypoints": places[4:].tolist(),
            "score": 0.0 if face is None else face.score,
        }
