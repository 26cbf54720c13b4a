"""A look at a picture, once and by any process: it depends on the file's bytes and on settings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from ..config import Config, check_range
from ..errors import DatasetError
from ..storage.file_digest import hashed
from ..vision.face_encoder import LONGEST_SIDE, InsightFaceEncoder
from ..vision.face_folder import find_face_folder
from .catalogue import Known
from .duplicates import perceptual_hash
from .looks import Look, SeenFace
from .pictures import open_picture
from .sources import Source


@dataclass(frozen=True)
class LookSettings(Config):
    """What a look needs to know.

    Attributes:
        smallest: pixels that the shorter side of a picture must have.
        faces: folder of an insightface package; empty looks for no faces.
        provider: what the package runs on, see `face_providers`.
        smallest_face: pixels that the longer side of a face must have.

    Raises:
        ConfigError: a size is out of range.
    """

    smallest: int = 256
    faces: str = ""
    provider: str = "cpu"
    smallest_face: int = 32

    def __post_init__(self) -> None:
        check_range("Look", "smallest", self.smallest, 1, 65_536)
        check_range("Look", "smallest_face", self.smallest_face, 1, 65_536)

    def digest(self) -> str:
        """Digest of what a look depends on: the sizes, and the files of the face package."""
        digest = hashlib.sha256(f"look 1, {self.smallest}, {self.smallest_face}".encode())
        if self.faces:
            folder = find_face_folder(self.faces)
            for name in folder.files:
                digest.update(name.encode() + hashed(folder.path / name).digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Looker:
    """Looks at pictures of a source; can be sent to another process.

    Attributes:
        source: where they are.
        settings: what counts.
        signature: digest of the settings.
    """

    source: Source
    settings: LookSettings
    signature: str

    def __call__(self, batch: Sequence[Known]) -> list[tuple[str, Look]]:
        """Key and look of each; what is known of a file that did not change is not computed."""
        return [(known.key, self._look(known)) for known in batch]

    def _look(self, known: Known) -> Look:
        """One look."""
        try:
            data = self.source.read(known.place)
        except DatasetError as closed:
            return Look("", str(closed))
        digest = hashlib.sha256(data).hexdigest()
        if (digest, self.signature) == (known.look.digest, known.settings):
            return known.look
        try:
            picture = open_picture(data, self.settings.smallest)
        except DatasetError as useless:
            return Look(digest, str(useless))
        faces = self._faces(picture)
        return Look(
            digest, "", picture.height, picture.width, perceptual_hash(picture), tuple(faces)
        )

    def _faces(self, picture: Image.Image) -> list[SeenFace]:
        """The faces of a picture, the largest first."""
        if not self.settings.faces:
            return []
        scale = min(1.0, LONGEST_SIDE / max(picture.size))
        if scale < 1:
            size = (round(picture.width * scale), round(picture.height * scale))
            scale = max(size) / max(picture.size)
            picture = picture.resize(size, Image.Resampling.BOX, reducing_gap=2.0)
        pixels = torch.from_numpy(np.asarray(picture).copy())
        encoder = face_encoder(self.settings.faces, self.settings.provider)
        seen = [SeenFace.of(face, scale) for face in encoder.detect(pixels)]
        seen = [face for face in seen if face.size >= self.settings.smallest_face]
        return sorted(seen, key=lambda face: -face.area)


@lru_cache(1)
def face_encoder(folder: str, provider: str) -> InsightFaceEncoder:
    """The face package of a folder, loaded once a process."""
    return InsightFaceEncoder(folder, provider=provider)
