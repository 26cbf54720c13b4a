"""A reader under test: valid files of every family, how to read one, and what a result must be."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from .byte_edits import BYTE_EDITS, Edit
from .json_edits import JSON_EDITS
from .safetensors_edits import SAFETENSORS_EDITS

JSON_FILE_EDITS: dict[str, Edit] = {**JSON_EDITS, **BYTE_EDITS}


@dataclass(frozen=True)
class Case:
    """One file: a family, edits one after another, and the seed of their random numbers."""

    family: str
    edits: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Reader:
    """One way in which a file comes in.

    Args:
        name: for the table.
        families: name to the bytes of a valid file.
        read: path and family to the result.
        check: raises unless a result (with its path) is valid and survives its own writer.
        edits: what makes files hostile.
        share: how many of all files are this reader's, in relation to others.
        refused: families that are read to say no.
        file: name of the file.
    """

    name: str
    families: Mapping[str, Callable[[], bytes]]
    read: Callable[[Path, str], Any]
    check: Callable[[Any, Path], object]
    edits: Mapping[str, Edit] = dataclasses.field(default_factory=lambda: SAFETENSORS_EDITS)
    share: float = 1.0
    refused: frozenset[str] = frozenset()
    file: str = "file.safetensors"

    def case(self, number: int) -> Case:
        """The case of a number: every family first as it is, then every edit of it, then more."""
        families, edits = list(self.families), [None, *self.edits]
        rng = Random(f"{self.name} {number}")
        family = families[number % len(families)]
        first = edits[number // len(families) % len(edits)]
        turn = number // (len(families) * len(edits))
        chosen = [] if first is None else [first]
        while turn and chosen and len(chosen) < 4 and rng.random() < 0.35:
            chosen.append(rng.choice(list(self.edits)))
        return Case(family, tuple(chosen), rng.randrange(2**32))

    def content(self, case: Case) -> bytes:
        """The bytes of a case."""
        content, rng = valid(self, case.family), Random(case.seed)
        for name in case.edits:
            content = self.edits[name](content, rng)
        return content


@functools.cache
def _valid(make: Callable[[], bytes]) -> bytes:
    return make()


def valid(reader: Reader, family: str) -> bytes:
    """The valid file of a family; made once."""
    return _valid(reader.families[family])


def written(write: Callable[[Path], object], name: str = "file.safetensors") -> bytes:
    """The bytes of what a writer writes."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def as_text(path: Path) -> str:
    """A file's text, with half characters where it is not UTF-8."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def same(first: Any, second: Any) -> bool:
    """Equal records, numbers and tensors, bit for bit; NaN equals nothing."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first.double(), second.double())
    if dataclasses.is_dataclass(first):
        fields = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(
            same(getattr(first, name), getattr(second, name)) for name in fields
        )
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(v, second[k]) for k, v in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second) and type(first) is type(second)


def sound(value: Any) -> None:
    """Raises AssertionError where a number is not finite or a text cannot be encoded."""
    if isinstance(value, torch.Tensor):
        assert not value.is_floating_point() or bool(torch.isfinite(value).all()), "not finite"
    elif isinstance(value, str):
        value.encode()
    elif isinstance(value, float):
        assert math.isfinite(value), "not finite"
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            sound(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            sound(key)
            sound(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            sound(inner)
