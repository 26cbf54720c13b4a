"""SHA-256 of files, read in pieces: a model has gigabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE = 1 << 20


def hashed(path: Path, digest: hashlib._Hash | None = None) -> hashlib._Hash:
    """The digest with the bytes of a file after what it has seen; a new SHA-256 without one.

    Raises:
        OSError: the file cannot be read.
    """
    digest = digest or hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest
