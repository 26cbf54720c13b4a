"""Edits of the bytes of any file, whatever its format.

An edit takes the bytes of a file and a random generator and returns other bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Edit = Callable[[bytes, Random], bytes]


def _flip(content: bytes, rng: Random) -> bytes:
    """A few bits."""
    flipped = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        if flipped:
            at = rng.randrange(len(flipped))
            flipped[at] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _cut(content: bytes, rng: Random) -> bytes:
    """Cut short, or longer."""
    at = rng.choice([0, 1, 7, 8, 9, len(content) - 1, rng.randrange(len(content) + 1)])
    return content[:at] if rng.random() < 0.8 else content + rng.randbytes(at % 64 + 1)


def _overwrite(content: bytes, rng: Random) -> bytes:
    """A stretch of random bytes, zeros or ones."""
    at, size = rng.randrange(len(content) + 1), rng.choice([1, 8, 64])
    stretch = rng.choice(
        [bytes(size), b"\xff" * size, rng.randbytes(size), b"9" * size, b"\ud7\xa0"]
    )
    return content[:at] + stretch + content[at + len(stretch) :]


def _stranger(content: bytes, rng: Random) -> bytes:
    """Something else altogether."""
    return rng.choice(
        [b"", b"PK\x03\x04" + content, b"\x80\x04N.", b"<html>", rng.randbytes(100), bytes(64)]
    )


BYTE_EDITS: dict[str, Edit] = {
    "flip": _flip,
    "cut": _cut,
    "overwrite": _overwrite,
    "stranger": _stranger,
}
