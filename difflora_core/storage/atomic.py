"""Writing a file: complete or not there, and no more readable than before.

The new content goes to a temporary file in the same folder, to the disk, and then takes the name of
the old one. A full disk, a kill or a crash leaves the old file as it was.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, DiffLoRAError, shown

STALE_SECONDS = 3600.0
"""A temporary file that nobody has written to for so long belongs to a writer that was killed."""

_NAME_BYTES = 200  # of the name in a temporary one; file systems take 255 in all


@contextmanager
def replacing(path: str | Path, error: type[DiffLoRAError] = CheckpointError) -> Iterator[Path]:
    """A temporary file to write to, which becomes `path` at the end, or goes where that fails.

    A link stays a link, its target is replaced. The mode is that of the old file; a new one has
    the mode that the system gives to new files.

    Args:
        path: file to write; its folder is made when missing.
        error: raised when it cannot be written.

    Raises:
        DiffLoRAError: as `error`: the disk is full, the folder cannot be written, the name is too
            long, or the old file is write-protected.
    """
    temporary: Path | None = None
    try:
        target = _target(Path(path))
        mode = _mode(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = _new_file(target, mode)
        mode = stat.S_IMODE(temporary.stat().st_mode) if mode is None else mode
        yield temporary
        os.chmod(temporary, mode)  # some writers of other libraries change it
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary = None
        _flush_folder(target.parent)
    except OSError as failure:
        place, reason = shown(str(path), 300), failure.strerror or failure
        raise error(f"{place} could not be written: {reason}.") from failure
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, error: type[DiffLoRAError] = CheckpointError) -> Path:
    """Writes a text file in UTF-8, see `replacing`.

    Raises:
        DiffLoRAError: as `error`: it cannot be written.
    """
    with replacing(path, error) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
    return Path(path)


def _target(path: Path) -> Path:
    """The file itself, where `path` is a link to it.

    Raises:
        OSError: no path can look like this.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as failure:  # a NUL, or half a character
        raise OSError(str(failure)) from failure


def _mode(target: Path) -> int | None:
    """Mode of the old file, None when there is none.

    Raises:
        OSError: it is no file, it is write-protected, or its name is too long.
    """
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError("something that is no file has this name")
    if not os.access(target, os.W_OK):
        raise OSError("the file is write-protected")
    return stat.S_IMODE(status.st_mode)


def _prefix(target: Path) -> str:
    """How the names of a file's temporary files begin; hidden, as the dot says."""
    return f".{os.fsencode(target.name)[:_NAME_BYTES].decode('utf-8', 'ignore')}."


def _new_file(target: Path, mode: int | None) -> Path:
    """An empty temporary file, never more readable than the old one, not even for a moment."""
    path = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.tmp")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    os.close(os.open(path, flags, 0o666 if mode is None else mode | stat.S_IWUSR))
    return path


def _sweep(target: Path) -> None:
    """Removes what killed writers of this file left, also under the names of version 0.1.0."""
    leftover = re.compile(rf"{re.escape(_prefix(target))}[a-z0-9_]{{8}}(\.tmp)?")
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            if leftover.fullmatch(entry.name) is None:
                continue
            with suppress(OSError):  # another writer was faster
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_SECONDS:
                    os.unlink(entry.path)


def _flush_folder(folder: Path) -> None:
    """Brings the new name to the disk, where the system can do that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
