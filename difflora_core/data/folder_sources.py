"""Pictures in folders.

``folders``: one folder a person, or pictures without one. ``kohya``: folders named `10_name`,
whose pictures count ten times. In both, a text file beside a picture with the same name holds its
captions, one a line. ``metadata``: Hugging Face's imagefolder, where each line of `metadata.jsonl`
says what is known of one picture: `file_name`, and whom it shows (`person`), `text`, `repeats`.

Hidden files do not count. A link that leads out of the folder is never followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..config import parse_json
from ..errors import DatasetError, described, shown
from ..limits import PICTURE_BYTES
from .sources import (
    CAPTION_NAMES,
    MOST_REPEATS,
    PERSON_NAMES,
    Entry,
    captions_in,
    checked_bytes,
    cleaned,
    name_of,
    person_in,
)

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
)
CAPTION_SUFFIXES = (".txt", ".caption")
METADATA = "metadata.jsonl"
KOHYA = re.compile(r"(\d{1,4})_(.+)", re.DOTALL)
_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class FolderSource:
    """A folder of pictures, see `folders` and `kohya` above.

    Attributes:
        root: the folder.
        kohya: names of folders begin with a number of repeats.
    """

    root: str
    kohya: bool = False

    def entries(self) -> Iterator[Entry]:
        """Every picture of the tree. Hidden files, and links out of the folder, do not count."""
        root = os.fsencode(os.path.realpath(self.root))
        for path in _walk(root, root):
            yield self._entry(root, path)

    def _entry(self, root: bytes, path: bytes) -> Entry:
        """One picture, with what its folder and the text beside it say."""
        place = os.path.relpath(path, root)
        parts = place.split(os.fsencode(os.sep))
        person, repeats = ("", 1) if len(parts) == 1 else (name_of(parts[0]), 1)
        match = KOHYA.fullmatch(person) if self.kohya else None
        if match is not None:
            person, repeats = match[2], max(1, int(match[1]))
        captions, refused = _captions_beside(path)
        if not refused and not _inside(root, path):
            refused = "it is a link to a file outside the folder"
        return Entry("/".join(map(name_of, parts)), place, person, repeats, captions, refused)

    def read(self, place: bytes) -> bytes:
        """The bytes of a file."""
        return read_file(os.fsencode(os.path.realpath(self.root)), place)


@dataclass(frozen=True)
class MetadataSource:
    """Pictures that `metadata.jsonl` lists, see `metadata` above; others are not taken."""

    root: str

    def entries(self) -> Iterator[Entry]:
        """A picture a line; a line that makes no sense is an entry that says so."""
        root = os.fsencode(os.path.realpath(self.root))
        with open(os.path.join(self.root, METADATA), "rb") as file:
            number = 0
            while line := file.readline(_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield self._entry(root, f"{METADATA}, line {number}", line)

    def _entry(self, root: bytes, where: str, line: bytes) -> Entry:
        """The picture of one line."""
        try:
            values = parse_json(line, where, DatasetError, _LINE_BYTES)
        except DatasetError as damage:
            return Entry(where, b"", refused=str(damage))
        name = values.get("file_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or not name or "\0" in name:
            return Entry(where, b"", refused="it names no file (`file_name`)")
        place = os.fsencode(name)
        path = os.path.join(root, place)
        refused = ""
        if os.path.isabs(place) or not _inside(root, path):
            refused = "it lies outside the folder"
        elif not os.path.isfile(path):
            refused = "there is no such file"
        repeats = values.get("repeats", 1)
        if type(repeats) is not int or not 1 <= repeats <= MOST_REPEATS:
            refused = refused or f"repeats is {described(repeats)}"
            repeats = 1
        person = person_in(values, PERSON_NAMES)
        captions = captions_in(values, CAPTION_NAMES)
        return Entry(name_of(place), place, person, repeats, captions, refused)

    def read(self, place: bytes) -> bytes:
        """The bytes of a file."""
        return read_file(os.fsencode(os.path.realpath(self.root)), place)


def read_file(root: bytes, place: bytes) -> bytes:
    """The bytes of a file of a folder.

    Raises:
        DatasetError: it cannot be read, is empty or too large, or lies outside the folder.
    """
    path = os.path.join(root, place)
    try:
        if not _inside(root, path):
            raise DatasetError("it is a link to a file outside the folder")
        if not os.path.isfile(path):
            raise DatasetError("it is no file, or gone")
        with open(path, "rb") as file:
            data = file.read(PICTURE_BYTES + 1)
    except (OSError, ValueError) as closed:
        reason = closed.strerror if isinstance(closed, OSError) else closed
        raise DatasetError(f"it cannot be read: {reason}") from closed
    return checked_bytes(data)


def _captions_beside(path: bytes) -> tuple[tuple[str, ...], str]:
    """The captions in a text file of the same name, and what is wrong with it."""
    for suffix in CAPTION_SUFFIXES:
        text = os.path.splitext(path)[0] + suffix.encode()
        try:
            with open(text, "rb") as file:
                data = file.read(_LINE_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as closed:
            return (), f"its caption file cannot be read: {closed.strerror}"
        try:
            if len(data) > _LINE_BYTES:
                raise ValueError("more than 1 MiB")
            return cleaned(data.decode("utf-8-sig").splitlines()), ""
        except ValueError as damage:
            return (), f"its caption file is no text in UTF-8: {shown(str(damage))}"
    return (), ""


def _walk(root: bytes, folder: bytes) -> Iterator[bytes]:
    """Paths of the picture files in a tree; links to folders outside are not followed."""
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    if entry.name.startswith(b"."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower().decode("latin-1") in SUFFIXES:
                        yield entry.path
        except OSError as closed:
            raise DatasetError(
                f"The folder {shown(os.fsdecode(folder), 300)} cannot be listed: {closed.strerror}."
            ) from closed


def _inside(root: bytes, path: bytes) -> bool:
    """Whether a path, with its links followed, lies in a folder."""
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError):
        return False
    return real.startswith(root.rstrip(os.fsencode(os.sep)) + os.fsencode(os.sep))
