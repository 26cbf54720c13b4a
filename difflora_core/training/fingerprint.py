"""One fingerprint of a run: equal for equal settings, pictures and words."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

SAME_COURSE = {"same_course": True}
"""Metadata of a setting that changes how a run is computed, not what comes out of it."""

LATER = {"later": True}
"""Metadata of a setting that came when there were runs already: at its default it does not count,
so that what was trained before it is known again."""


def fingerprint(*parts: object) -> str:
    """SHA-256 of settings and data.

    Args:
        parts: numbers, texts, None, tensors, and any nesting of them in mappings, sequences and
            dataclasses, whose fields with the metadata `SAME_COURSE` do not count, nor those with
            `LATER` at their default.

    Raises:
        TypeError: something else.
    """
    digest = hashlib.sha256()
    for piece in _pieces(parts):
        digest.update(memoryview(piece).nbytes.to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()


WEIGHTS_EACH = 8
"""Numbers of every parameter that tell a model from another."""


@torch.no_grad()
def weights_digest(module: nn.Module) -> str:
    """Digest of a few numbers of every parameter, in their order: tells base models apart.

    A model is too large to be read whole each time; another training moves all of its parameters.
    """
    pieces = []
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        few = flat[:: max(1, len(flat) // WEIGHTS_EACH)][:WEIGHTS_EACH]
        pieces.append((name, few.cpu().float()))
    return fingerprint(pieces)


def _pieces(part: object) -> Iterator[bytes | memoryview]:
    """What is hashed, piece by piece; every kind names itself, so that none passes for another."""
    if part is None or isinstance(part, bool | int | float | str):
        yield f"{type(part).__name__} {part!r}".encode()
    elif isinstance(part, Tensor):
        yield f"tensor {part.dtype} {tuple(part.shape)}".encode()
        plain = part.detach().cpu().contiguous().reshape(-1)
        yield plain.view(torch.uint8).numpy().data
    elif dataclasses.is_dataclass(part):
        yield type(part).__name__.encode()
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            unchanged = bool(field.metadata.get("later")) and value == field.default
            if not (unchanged or field.metadata.get("same_course")):
                yield field.name.encode()
                yield from _pieces(value)
    elif isinstance(part, Mapping):
        yield f"mapping {len(part)}".encode()
        for name, value in part.items():
            yield from _pieces(name)
            yield from _pieces(value)
    elif isinstance(part, Sequence):
        yield f"sequence {len(part)}".encode()
        for value in part:
            yield from _pieces(value)
    else:
        raise TypeError(f"{type(part).__name__} cannot take part in a fingerprint")
