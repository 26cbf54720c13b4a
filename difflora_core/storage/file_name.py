"""Names of files that people choose: plain, and possible on every system."""

from __future__ import annotations

import re
import unicodedata

from ..errors import FileNameError, shown

MAX_CHARACTERS = 80
MAX_BYTES = 200  # file systems take 255, and endings, numbers and locks are added
ENDING = ".safetensors"
_SIGNS = " .()-_"
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


def check_file_name(name: str) -> str:
    """The name of a new file, without its ending.

    Args:
        name: what somebody typed.

    Raises:
        FileNameError: it is empty or too long, names a folder, ends in a space or a point, holds
            other characters than letters, digits, spaces and . - _ ( ), or belongs to Windows.
    """
    if len(name) > MAX_CHARACTERS or len(name.encode("utf-8", "replace")) > MAX_BYTES:
        raise FileNameError(
            f"'{shown(name, 40)}' is too long for a file name: use up to {MAX_CHARACTERS} "
            f"characters ({MAX_BYTES} bytes)."
        )
    if _RESERVED.fullmatch(name):
        raise FileNameError(
            f"'{shown(name)}' is the name of a device on Windows and cannot be a file name: "
            "choose another one."
        )
    if not _is_plain(name) or name[-1] in ". ":
        raise FileNameError(
            f"'{shown(name)}' cannot be a file name: use letters, digits, spaces, . - _ and "
            "brackets, without a folder, and no point or space at the end."
        )
    return name


def _is_plain(name: str) -> bool:
    """Whether a name begins with a letter, a digit or _, and goes on with those and other signs.

    Some scripts write vowels as marks on letters.
    """
    letters = (c.isalnum() or unicodedata.category(c)[0] == "M" or c in _SIGNS for c in name)
    return bool(name) and (name[0].isalnum() or name[0] == "_") and all(letters)


def typed_name(name: str) -> str:
    """A name as typed, without spaces around it and the ending that our files get anyway.

    Accents that macOS takes apart from their letters are one with them.
    """
    name = unicodedata.normalize("NFC", name.strip())
    return name[: -len(ENDING)] if name.lower().endswith(ENDING) else name


def with_ending(name: str, ending: str) -> str:
    """A name that `check_file_name` takes, as much of it as leaves room for an ending, and that."""
    while len(name + ending) > MAX_CHARACTERS or len((name + ending).encode()) > MAX_BYTES:
        name = name[:-1]
    return name + ending
