"""Pictures that are nearly the same: perceptual hashes, and which of a group to keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.fft import dctn

_SIDE = 64
_LOW = 16
HASH_BITS = _LOW * _LOW
SAME = 24
"""Bits of the 256 in which two versions of a picture differ at most: scaled, compressed again."""


def perceptual_hash(picture: Image.Image) -> bytes:
    """256 bits that a picture keeps when it is scaled or compressed again (pHash, Zauner 2010).

    The signs of its 16 x 16 slowest cosine waves against their median; grey, at 64 x 64 pixels.
    """
    small = picture.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    waves = dctn(np.asarray(small, dtype=np.float64), norm="ortho")[:_LOW, :_LOW].flatten()
    return np.packbits(waves > np.median(waves[1:])).tobytes()  # the first is the brightness


def distances(one: bytes, others: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """In how many bits (n,) int64 a hash differs from others."""
    table = np.frombuffer(b"".join(others), np.uint8).reshape(len(others), -1)
    differ = np.bitwise_xor(table, np.frombuffer(one, np.uint8))
    return np.asarray(np.unpackbits(differ, axis=1).sum(1), dtype=np.int64)


def duplicates(hashes: Sequence[bytes], pixels: Sequence[int], same: int = SAME) -> dict[int, int]:
    """Pictures to leave out because another one shows the same.

    The largest come first, then the first ones; a picture goes when one that is kept is near it.

    Args:
        hashes: of N pictures, see `perceptual_hash`.
        pixels: how many each has.
        same: bits of the difference up to which two count as one; below 0 none do.

    Returns:
        Number of each that goes to the number of the one that is kept instead.
    """
    kept: list[int] = []
    gone: dict[int, int] = {}
    for number in sorted(range(len(hashes)), key=lambda n: (-pixels[n], n)):
        near = distances(hashes[number], [hashes[k] for k in kept]) if kept else np.zeros(0)
        if len(near) and near.min() <= same:
            gone[number] = kept[int(near.argmin())]
        else:
            kept.append(number)
    return gone
