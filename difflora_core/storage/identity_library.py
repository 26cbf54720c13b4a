"""Identity libraries as they grow, with several programs at once.

Every change happens under a lock that holds between processes, from a fresh reading to the rename
of a complete file, so two writers lose nothing and a reader never meets half a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ..errors import ConfigError, LibraryError, counted
from ..models.lae.autoencoder import LoRALatent
from .library_file import MAX_NAME, Library, Person, check_name, read_library, write_library
from .thumbnail import read_thumbnail

NUMBER, REPLACE, REFUSE = "number", "replace", "refuse"
SAME_NAME = (NUMBER, REPLACE, REFUSE)
"""What happens to a name that is taken: a number after it, the old one goes, or an error."""

LOCK_SECONDS = 60.0


def add_people(
    path: str | Path,
    latents: LoRALatent,
    names: Sequence[str],
    pictures: Sequence[bytes | None] = (),
    model_name: str = "",
    same_name: str = NUMBER,
) -> list[str]:
    """Adds identities, making the file when there is none.

    Args:
        path: the library, ending in .safetensors.
        latents: M identities of one model.
        names: M names.
        pictures: M thumbnails from `thumbnail.make_thumbnail`, or nothing.
        model_name: file name of the DiffLoRA model, kept with a new library.
        same_name: one of SAME_NAME.

    Returns:
        The names as they were given.

    Raises:
        LibraryError: the library holds identities of another model, a name is taken (`refuse`) or
            cannot be one, or the file cannot be read or written.
        ConfigError: the numbers of names or pictures do not fit, or an unknown `same_name`.
    """
    pictures = pictures or [None] * len(latents)
    if not len(latents) == len(names) == len(pictures) or not names:
        raise ConfigError(
            f"{counted(len(latents), 'identity')} need as many names and pictures; got "
            f"{len(names)} and {len(pictures)}."
        )
    if same_name not in SAME_NAME:
        raise ConfigError(f"Unknown rule {same_name!r}; use one of {', '.join(SAME_NAME)}.")
    for picture in pictures:
        if picture is not None:
            read_thumbnail(picture)
    given: list[str] = []

    def add(library: Library | None) -> Library:
        if library is None:
            library = Library(replace(latents, z=latents.z[:0].cpu()), (), model_name)
        for row, (name, picture) in enumerate(zip(names, pictures, strict=True)):
            library, name = _with(library, latents.z[row : row + 1], name, picture, same_name)
            given.append(name)
        return library

    _change(Path(path), add, latents)
    return given


def numbered(name: str, count: int) -> list[str]:
    """Names of a batch: the name itself for one, "name 1" and so on for several."""
    return [name] if count == 1 else [f"{name} {k + 1}" for k in range(count)]


def _change(
    path: Path, edit: Callable[[Library | None], Library], latents: LoRALatent | None = None
) -> None:
    """Reads, edits and writes a library while nobody else can; None when there is no file yet."""
    try:
        path = Path(os.path.realpath(path))  # links to one library share its lock
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
            library = read_library(path) if path.exists() else None
            if library is not None and latents is not None:
                _check_belongs(path, library, latents)
            write_library(path, edit(library))
    except Timeout as error:
        raise LibraryError(
            f"{path.name} is being changed by another program for more than {LOCK_SECONDS:g} "
            "seconds; try again."
        ) from error
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise LibraryError(f"{path} cannot be written: {reason or error}.") from error


def _check_belongs(path: Path, library: Library, latents: LoRALatent) -> None:
    """Refuses identities that another model made."""
    own = library.latents
    same = own.layout_hash == latents.layout_hash and own.space == latents.space
    if not same or own.z.shape[1:] != latents.z.shape[1:]:
        made_by = f" ({library.model_name})" if library.model_name else ""
        raise LibraryError(
            f"{path.name} holds identities of another DiffLoRA model{made_by}: add this one to a "
            "library of its own."
        )


def _with(
    library: Library, z: Tensor, name: str, picture: bytes | None, same_name: str
) -> tuple[Library, str]:
    """The library with one person more, and the name given."""
    name = check_name(name)
    if name in library.names:
        if same_name == REFUSE:
            raise LibraryError(f"'{name}' is in this library already: choose another name.")
        if same_name == REPLACE:
            library = _without(library, name)
    name = _free_name(name, library.names)
    added = datetime.now(timezone.utc).isoformat(timespec="seconds")
    everyone = torch.cat([library.latents.z, z.detach().to("cpu", torch.float32)])
    people = (*library.people, Person(name, added, picture))
    return replace(library, latents=replace(library.latents, z=everyone), people=people), name


def _without(library: Library, name: str) -> Library:
    """The library without one person."""
    row = library.find(check_name(name))
    others = [k for k in range(len(library)) if k != row]
    people = tuple(library.people[k] for k in others)
    latents = replace(library.latents, z=library.latents.z[others])
    return replace(library, latents=latents, people=people)


def _free_name(name: str, taken: Sequence[str]) -> str:
    """The name, or the name with the first free number from 2 after it."""
    number, free, others = 2, name, set(taken)
    while free in others:
        ending = f" {number}"
        free = name[: MAX_NAME - len(ending)].rstrip() + ending
        number += 1
    return free
