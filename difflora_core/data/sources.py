"""What a source of pictures is: a list of entries, and the bytes of each."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import DatasetError
from ..limits import CAPTION_LENGTH, PICTURE_BYTES

MOST_REPEATS = 9999
PERSON_NAMES = ("person", "identity", "person_id", "identity_id", "celeb_id", "name", "label")
CAPTION_NAMES = ("captions", "caption", "text", "prompt")


@dataclass(frozen=True)
class Entry:
    """A picture of a source, before anybody looked at it.

    Attributes:
        key: what it is called in lists: unique, text, the same on every machine.
        place: where the source finds it again.
        person: who it shows; empty where nobody said.
        repeats: how often it counts.
        captions: what it shows, in the words of the user.
        refused: why it cannot be used; empty where nothing is known against it.
    """

    key: str
    place: bytes
    person: str = ""
    repeats: int = 1
    captions: tuple[str, ...] = ()
    refused: str = ""


class Source(Protocol):
    """A place that pictures come from; it can be sent to another process."""

    def entries(self) -> Iterator[Entry]:
        """Every picture once, in any order."""

    def read(self, place: bytes) -> bytes:
        """The bytes of a picture's file.

        Raises:
            DatasetError: it cannot be read; the message is the reason alone, for lists.
        """


def checked_bytes(data: bytes | None) -> bytes:
    """The bytes of a picture file.

    Raises:
        DatasetError: there are none, or too many.
    """
    if not data:
        raise DatasetError("the file is empty")
    if len(data) > PICTURE_BYTES:
        raise DatasetError(f"the file has more than {PICTURE_BYTES >> 20} MiB")
    return data


def name_of(part: bytes) -> str:
    """A file name as text: composed characters (NFC), bytes that are no UTF-8 escaped."""
    return unicodedata.normalize("NFC", part.decode("utf-8", "backslashreplace"))


def person_in(values: dict[str, Any], names: Sequence[str]) -> str:
    """The person of a row of a table: the first of these columns that it has, as text."""
    for name in names:
        value = values.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return unicodedata.normalize("NFC", str(value).strip())
    return ""


def captions_in(values: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    """The captions of a row of a table: a text, or a list of them."""
    for name in names:
        value = values.get(name)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            return cleaned(texts)
    return ()


def cleaned(texts: Sequence[str]) -> tuple[str, ...]:
    """Captions without blank ones, each on one line and of a sensible length."""
    lines = (" ".join(text.split())[:CAPTION_LENGTH] for text in texts)
    return tuple(line.encode("utf-8", "replace").decode() for line in lines if line)
