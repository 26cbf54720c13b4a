"""Errors that DiffLoRA raises on purpose: one readable sentence each (what, where, what to do).

A message may hold text from a file or a prompt. The classes here see to it that it can always be
shown: what cannot be encoded or would move the cursor is escaped, and what is long is cut.
"""

from __future__ import annotations

import reprlib

MAX_MESSAGE = 2000  # characters; a traceback window shows about as many
MAX_SHOWN = 80


def shown(foreign: str, most: int = MAX_SHOWN) -> str:
    """A name from outside as part of a message: one line, escaped and cut.

    Args:
        foreign: the text.
        most: characters to keep.
    """
    return _escaped(foreign[:most], "") + ("…" if len(foreign) > most else "")


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 layer", "2 layers", "3 entries", "4 people"."""
    if noun == "person":
        many = "people"
    else:
        many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else many}"


def percent(share: float, digits: int = 0) -> str:
    """A share in words: 0.4 is "40%". What rounds to nothing is "0%", and never "-0%"."""
    return f"{round(share, digits + 2) + 0.0:.{digits}%}"


def described(foreign: object) -> str:
    """A value from outside as part of a message: as Python writes it, with the middle left out."""
    try:
        return shown(reprlib.repr(foreign))
    except ValueError:  # an integer of thousands of digits
        return f"a {type(foreign).__name__}"


class DiffLoRAError(Exception):
    """Parent of every error that the library raises on purpose.

    Args:
        message: the sentence. It is kept so that every terminal and socket can show it.
    """

    def __init__(self, message: str = "") -> None:
        text = _escaped(message, "\n")
        head, tail = MAX_MESSAGE * 3 // 4, MAX_MESSAGE // 4 - 3  # the remedy stands at the end
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:head]} … {text[-tail:]}")


class LayoutError(DiffLoRAError):
    """A LoRA does not have the layers, shapes or rank that the base model or network expects."""


class CheckpointError(DiffLoRAError):
    """A model checkpoint is missing, damaged, or made for something else."""


class ConfigError(DiffLoRAError):
    """A setting is outside its range or unknown."""


class DivergedError(ConfigError):
    """A loss is no finite number any more: the settings or the pictures do not work."""


class NoFaceError(DiffLoRAError):
    """No usable face was found in the reference images."""


class ImageError(DiffLoRAError):
    """A reference image cannot be used (shape, size, or values)."""


class LoRAFileError(DiffLoRAError):
    """A LoRA file or state dict cannot be read or written."""


class LibraryError(DiffLoRAError):
    """An identity library cannot be read or changed, or does not hold what is asked for."""


class DatasetError(DiffLoRAError):
    """A folder of pictures or a prepared dataset cannot be read or written, or has changed."""


class EncoderError(DiffLoRAError):
    """A face or image encoder is missing, incomplete, or of the wrong kind."""


class FileNameError(DiffLoRAError):
    """A name cannot be that of a file, or there is no file of that name."""


class InterruptedTraining(DiffLoRAError):
    """Training was stopped on request; the last complete checkpoint can be resumed."""


def _escaped(text: str, allowed: str) -> str:
    """Text without characters that cannot be encoded or shown (category C and separators)."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in allowed else c.encode("unicode_escape").decode() for c in text
    )
