"""The file of an identity library: many LoRA latents, their names and small pictures.

One .safetensors file: the tensor `latents` (M, K, Dz) float32 holds the identities,
`picture.<number>` the bytes of a JPEG thumbnail where there is one; the metadata says which model
they belong to, and name and date of each. There is no place for face embeddings or names of source
files. Nothing in a file is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import parse_json
from ..errors import LibraryError, counted, described, shown
from ..models.lae.autoencoder import LoRALatent
from .safetensors_io import Header, open_tensors, write_atomic
from .thumbnail import MAX_PICTURE_BYTES

FORMAT, VERSION, METADATA_KEY = "difflora_library", 1, "difflora_library"
MAX_FILE_BYTES = 2**30
MAX_IDENTITIES = 100_000
MAX_LATENT = 2**20
MAX_NAME = 80


@dataclass(frozen=True)
class Person:
    """One identity of a library.

    Attributes:
        name: unique in its library.
        added: when, UTC, ISO 8601.
        picture: JPEG bytes of the thumbnail, or None.
    """

    name: str
    added: str
    picture: bytes | None = None


@dataclass(frozen=True, eq=False)
class Library:
    """A whole library.

    Attributes:
        latents: z (M, K, Dz), one row per person.
        people: M of them.
        model_name: file name of the DiffLoRA model that made them, in words.
    """

    latents: LoRALatent
    people: tuple[Person, ...]
    model_name: str = ""

    def __len__(self) -> int:
        return len(self.people)

    @property
    def names(self) -> list[str]:
        """Names in the order of the file."""
        return [person.name for person in self.people]

    def find(self, name: str = "", number: int = 1) -> int:
        """Row of a person, by name, or by number from 1 when the name is empty.

        Raises:
            LibraryError: there is no such person; the message says who is there.
        """
        name = name.strip()
        if name in self.names:
            return self.names.index(name)
        if name:
            some = ", ".join(self.names[:20]) + (", …" if len(self) > 20 else "")
            raise LibraryError(f"There is no '{shown(name)}' in this library. It holds: {some}.")
        if not 1 <= number <= len(self):
            raise LibraryError(f"There is no number {number}: this library holds {len(self)}.")
        return number - 1

    def latent(self, row: int) -> LoRALatent:
        """The identity in one row, (1, K, Dz)."""
        return replace(self.latents, z=self.latents.z[row : row + 1])


def read_library(path: str | Path) -> Library:
    """Reads a library.

    Raises:
        LibraryError: the file is missing, damaged, hostile, or no library.
    """
    path = Path(path)
    with open_tensors(path, "identity library", LibraryError) as file:
        if file.size > MAX_FILE_BYTES:
            raise LibraryError(f"{shown(path.name)} has {file.size} bytes, more than any library.")
        facts = _facts(path, file.header)
        tensors = file.read_all()
    people = tuple(
        Person(entry["name"], entry["added"], _picture(tensors, row))
        for row, entry in enumerate(facts["people"])
    )
    place = (facts["layout_hash"], facts["space"])
    kind = (facts.get("unit_tokens", False), facts.get("license", ""))
    latents = LoRALatent(tensors["latents"], *place, *kind)
    return Library(latents, people, facts["model_name"])


def write_library(path: Path, library: Library) -> None:
    """Writes the complete file, then renames it; only `identity_library` does it, under its lock.

    Raises:
        LibraryError: a value is not finite, the library is too large, or it cannot be written.
    """
    tensors = {"latents": library.latents.z.detach().to("cpu", torch.float32).contiguous()}
    if not bool(torch.isfinite(tensors["latents"]).all()):
        raise LibraryError(f"{path.name} was not changed: the identity holds NaN or infinity.")
    for row, person in enumerate(library.people):
        if person.picture is not None:
            tensors[f"picture.{row}"] = torch.frombuffer(
                bytearray(person.picture), dtype=torch.uint8
            )
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "layout_hash": library.latents.layout_hash,
        "space": library.latents.space,
        "unit_tokens": library.latents.unit_tokens,
        "license": library.latents.license,
        "model_name": library.model_name,
        "people": [{"name": person.name, "added": person.added} for person in library.people],
    }
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(library) > MAX_IDENTITIES or size + 2 * len(text) > MAX_FILE_BYTES:
        raise LibraryError(
            f"{path.name} is full ({counted(len(library), 'identity')}): begin another one."
        )
    write_atomic(tensors, {METADATA_KEY: text}, path, LibraryError)


def check_name(name: object) -> str:
    """A person's name without spaces around it.

    Raises:
        LibraryError: it is empty, too long, or holds characters that cannot be shown.
    """
    text = name.strip() if isinstance(name, str) else ""
    if not _can_be_shown(text):
        raise LibraryError(
            f"A name has 1 to {MAX_NAME} visible characters in one line; got '{shown(text)}'."
        )
    return text


def _can_be_shown(name: object) -> bool:
    """Whether a stored name is one that `check_name` gives."""
    sound = isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()
    return sound and name == str(name).strip()


def _facts(path: Path, header: Header) -> dict[str, Any]:
    """The metadata, every field checked, and the tensors checked against it."""
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        raise LibraryError(f"{path.name} is no identity library: it does not describe one.")
    facts = parse_json(text, f"{path.name}: its list of people", LibraryError)
    try:
        if (facts["format"], facts["version"]) != (FORMAT, VERSION):
            found = f"{described(facts['format'])} {described(facts['version'])}"
            raise LibraryError(
                f"{path.name} has format {found}; this version reads {FORMAT} {VERSION}. "
                "Update the node pack."
            )
        people = facts["people"]
        texts = [facts[key] for key in ("layout_hash", "space", "model_name")]
        texts += [facts.get("license", ""), *(entry["added"] for entry in people)]
        sound = all(isinstance(value, str) and len(value) <= 256 for value in texts)
        sound = sound and isinstance(facts.get("unit_tokens", False), bool)
        names = [entry["name"] for entry in people]
        sound = sound and all(_can_be_shown(name) for name in names)
    except (KeyError, TypeError, AttributeError) as error:
        raise LibraryError(f"{path.name} is damaged: its list of people makes no sense.") from error
    dtype, shape = header.tensors.get("latents", ("", ()))
    sound = sound and dtype == "F32" and len(shape) == 3 and 0 < shape[1] * shape[2] <= MAX_LATENT
    sound = sound and len(names) == len(set(names)) == shape[0] <= MAX_IDENTITIES
    pictures = {f"picture.{row}" for row in range(len(names))}
    for name, (kind, size) in header.tensors.items():
        fits = name in pictures and kind == "U8" and len(size) == 1
        fits = fits and 0 < size[0] <= MAX_PICTURE_BYTES
        sound = sound and (name == "latents" or fits)
    if not sound:
        raise LibraryError(f"{path.name} is damaged: its tensors do not fit its list of people.")
    return dict(facts)


def _picture(tensors: Mapping[str, Tensor], row: int) -> bytes | None:
    """The thumbnail of a row, as it lies in the file."""
    stored = tensors.get(f"picture.{row}")
    return None if stored is None else stored.numpy().tobytes()
