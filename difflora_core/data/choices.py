"""What becomes of each picture: whom it shows and by which face, or why it is left out.

Choices depend on what was found in the pictures and on settings alone, and are made anew each time:
that takes seconds where finding took hours. They are made person by person.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from ..config import Config, check_range
from ..errors import counted
from .catalogue import Catalogue, Choice, Known
from .duplicates import HASH_BITS, SAME, duplicates
from .looks import SeenFace
from .people import Array, group, likeness, main_person, rivals, several

UNUSABLE, FACELESS, STRANGER, CROWDED = "unusable", "faceless", "stranger", "crowded"
DUPLICATE, TOO_FEW = "duplicate", "too few"
_MADE_UP = "person-{:06d}"


@dataclass(frozen=True)
class ChoiceSettings(Config):
    """How people are told apart, and which pictures go.

    Attributes:
        same_person: mean cosine of two groups of faces from which on they are one person. Two
            photos of one person have about .46 with ArcFace, of two people about 0.
        several: what becomes of a picture that shows several people: "crop" keeps the square around
            the person's face, "keep" all of it, "drop" nothing.
        same_picture: bits of 256 in which two versions of one picture differ at most; -1 keeps
            duplicates.
        fewest: pictures that a person must have.

    Raises:
        ConfigError: a value is out of range.
    """

    same_person: float = 0.3
    several: Literal["crop", "keep", "drop"] = "crop"
    same_picture: int = SAME
    fewest: int = 1

    def __post_init__(self) -> None:
        self.check_choices("Choices")
        check_range("Choices", "same_person", self.same_person, 0.0, 1.0)
        check_range("Choices", "same_picture", self.same_picture, -1, HASH_BITS)
        check_range("Choices", "fewest", self.fewest, 1, 100_000)


def choose(
    catalogue: Catalogue, settings: ChoiceSettings, with_faces: bool, scratch: Path
) -> tuple[str, ...]:
    """Chooses for every picture of a catalogue.

    Args:
        catalogue: the choices go there.
        settings: how.
        with_faces: whether somebody looked for faces; without, a picture counts as it is, and one
            without a name is a person of its own.
        scratch: folder for the faces of pictures that nobody named, while they are grouped.

    Returns:
        Sentences about people whose pictures leave it open who is meant.
    """
    notes: list[str] = []
    catalogue.choose(_first_choices(catalogue, settings, with_faces, scratch, notes))
    catalogue.update_choices(_without_duplicates(catalogue, settings.same_picture))
    catalogue.update_choices(_without_few(catalogue, settings.fewest))
    return tuple(notes)


def _first_choices(
    catalogue: Catalogue,
    settings: ChoiceSettings,
    with_faces: bool,
    scratch: Path,
    notes: list[str],
) -> Iterator[Choice]:
    """Choices by what a picture shows, one for each."""
    for known in catalogue.pictures("WHERE refused<>'' OR reason<>''"):
        reason = known.refused or known.look.reason
        yield Choice(known.key, known.person, kind=UNUSABLE, reason=reason)
    usable = "WHERE refused='' AND reason='' AND person=?"
    for person in catalogue.named():
        pictures = list(catalogue.pictures(usable, person))
        yield from _named(catalogue, pictures, settings, with_faces, notes)
    if with_faces:
        yield from _unnamed(catalogue, settings, scratch)
        return
    for number, known in enumerate(catalogue.pictures(usable, "")):
        yield Choice(known.key, _MADE_UP.format(number + 1))


def _named(
    catalogue: Catalogue,
    pictures: Sequence[Known],
    settings: ChoiceSettings,
    with_faces: bool,
    notes: list[str],
) -> Iterator[Choice]:
    """Choices of the pictures of a person whom somebody named.

    The person is whoever is in most of them; a picture without that face shows somebody else.
    """
    if not with_faces:
        yield from (Choice(known.key, known.person) for known in pictures)
        return
    faces = [catalogue.faces(known.key) for known in pictures]
    places = [(n, k) for n, own in enumerate(faces) for k in range(len(own))]
    if not places:
        yield from map(_faceless, pictures)
        return
    vectors = np.stack([faces[n][k].vector for n, k in places])
    label = group(vectors, settings.same_person)
    owner = np.array([n for n, _ in places])
    main = main_person(label, owner, np.array([faces[n][k].area for n, k in places]))
    others = rivals(label, owner, main)
    if others:
        notes.append(
            f"{pictures[0].person}: {others + 1} people are in about all of the pictures; the one "
            "with the larger face was taken."
        )
    centre = vectors[label == main].sum(0)
    best: dict[int, int] = {}
    for row in np.flatnonzero(label == main)[::-1]:
        n = int(owner[row])
        if n not in best or vectors[row] @ centre >= vectors[best[n]] @ centre:
            best[n] = int(row)
    alike = dict(zip(best, likeness(vectors[list(best.values())]), strict=True))
    for n, known in enumerate(pictures):
        if not faces[n]:
            yield _faceless(known)
        elif n not in best:
            reason = f"it shows somebody else than most pictures of {known.person}"
            yield Choice(known.key, known.person, kind=STRANGER, reason=reason)
        else:
            face = places[best[n]][1]
            choice = Choice(known.key, known.person, face, round(float(alike[n]), 6))
            yield _not_crowded(choice, faces[n], settings)


def _unnamed(catalogue: Catalogue, settings: ChoiceSettings, scratch: Path) -> Iterator[Choice]:
    """Choices of the pictures that nobody named: people are made up of the largest faces.

    The faces go to a file and are read from there in blocks; of a picture a few numbers stay in
    memory.
    """
    usable = "WHERE refused='' AND reason='' AND person=''"
    count, width = 0, 0
    for known in catalogue.pictures(usable):
        faces = catalogue.faces(known.key)
        count, width = count + bool(faces), len(faces[0].vector) if faces else width
    if count:
        scratch.mkdir(parents=True, exist_ok=True)
        path = scratch / "faces.npy"
        table = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
        row = 0
        for known in catalogue.pictures(usable):
            faces = catalogue.faces(known.key)
            if faces:
                table[row] = faces[0].vector
                row += 1
        label = group(table, settings.same_person)
        alike = _likeness_by_group(table, label)
        del table
        path.unlink(missing_ok=True)
        firsts = np.unique(label)
    row = 0
    for known in catalogue.pictures(usable):
        faces = catalogue.faces(known.key)
        if not faces:
            yield _faceless(known)
            continue
        person = _MADE_UP.format(int(np.searchsorted(firsts, label[row])) + 1)
        choice = Choice(known.key, person, 0, round(float(alike[row]), 6))
        yield _not_crowded(choice, faces, settings)
        row += 1


def _likeness_by_group(table: Array, label: Array) -> Array:
    """`likeness` (N,) of each face within its group."""
    alike = np.ones(len(label), dtype=np.float32)
    for members in several(label):
        alike[members] = likeness(np.asarray(table[members], dtype=np.float32))
    return alike


def _faceless(known: Known) -> Choice:
    """A picture without a face."""
    reason = "it shows no face that could be found"
    return Choice(known.key, known.person, kind=FACELESS, reason=reason)


def _not_crowded(choice: Choice, faces: Sequence[SeenFace], settings: ChoiceSettings) -> Choice:
    """The choice, unless several people make it drop."""
    if len(faces) == 1 or settings.several != "drop":
        return choice
    return replace(choice, kind=CROWDED, reason=f"it shows {counted(len(faces), 'person')}")


def _kept_by_person(catalogue: Catalogue) -> Iterator[list[Choice]]:
    """The pictures that are kept, in a list for each person."""
    kept = catalogue.choices("WHERE kind=''")
    for _, own in groupby(kept, key=lambda choice: choice.person):
        yield list(own)


def _without_duplicates(catalogue: Catalogue, same: int) -> Iterator[Choice]:
    """New choices of pictures of which the same person has a larger version."""
    for own in _kept_by_person(catalogue):
        looks = [catalogue.known(choice.key).look for choice in own]
        hashes, pixels = [x.hash for x in looks], [x.height * x.width for x in looks]
        for gone, kept in duplicates(hashes, pixels, same).items():
            reason = f"it is the same picture as {own[kept].key}"
            yield replace(own[gone], kind=DUPLICATE, reason=reason)


def _without_few(catalogue: Catalogue, fewest: int) -> Iterator[Choice]:
    """New choices of pictures of people who have too few."""
    for own in _kept_by_person(catalogue) if fewest > 1 else ():
        if len(own) < fewest:
            reason = f"{own[0].person} has {len(own)} of the {fewest} pictures needed"
            yield from (replace(choice, kind=TOO_FEW, reason=reason) for choice in own)
