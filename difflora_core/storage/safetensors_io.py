"""Reading and writing .safetensors files: headers checked before any tensor, writes in one step.

Nothing in a file is trusted, and every way in which one can be wrong has its own sentence.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError, DiffLoRAError

MAX_HEADER_BYTES = 16 * 2**20  # a LoRA of 10,000 tensors needs about 2 MiB
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


@dataclass(frozen=True)
class Header:
    """What a header says, consistent with the size of the file.

    Attributes:
        tensors: name to storage type (as safetensors spells it) and shape.
        metadata: the texts of the file.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]


def read_header(path: Path, kind: str, error: type[DiffLoRAError]) -> Header:
    """Reads and checks a header.

    Args:
        path: the file.
        kind: what it should be, for messages: "LoRA file".
        error: raised when something is wrong.

    Raises:
        DiffLoRAError: as `error`: missing, cut short, not safetensors, or inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            sound = len(start) == 8 and 2 <= length <= min(size - 8, MAX_HEADER_BYTES)
            text = file.read(length) if sound else b""
    except FileNotFoundError as missing:
        raise error(f"There is no {kind} {path}.") from missing
    except OSError as closed:
        raise error(f"{path} cannot be opened: {closed.strerror}.") from closed
    if not sound:
        raise error(f"{path.name}: {_why_not(start, length, size)}")
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as damage:
        raise error(f"{path.name}: the header is damaged. Download it again.") from damage
    problem = _problem(header, size - 8 - length)
    if problem:
        raise error(f"{path.name}: {problem} The file is damaged; download it again.")
    metadata = header.pop("__metadata__", None) or {}
    tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    return Header(tensors, metadata)


def read_tensors(path: Path, error: type[DiffLoRAError] = CheckpointError) -> dict[str, Tensor]:
    """State dict, name to tensor, of a file whose header `read_header` accepted.

    Raises:
        DiffLoRAError: as `error`: the file cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as damage:
        raise error(f"{path.name} cannot be read: {damage}.") from damage


def read_file(
    path: Path, kind: str, error: type[DiffLoRAError] = CheckpointError
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """State dict of a file, and its metadata; the header is checked first.

    Args:
        path: the file.
        kind: what it should be, for messages: "LoRA file".
        error: raised when something is wrong.

    Raises:
        DiffLoRAError: as `error`, see `read_header`.
    """
    metadata = read_header(path, kind, error).metadata
    return read_tensors(path, error), metadata


def write_atomic(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: str | Path) -> Path:
    """Writes a state dict as .safetensors under a temporary name in the folder, then renames it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        save_file(dict(tensors), temporary, metadata=metadata)
        os.chmod(temporary, 0o644)  # mkstemp and safetensors leave 0600; others share the folder
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} could not be written: {error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _why_not(start: bytes, length: int, size: int) -> str:
    """Sentence for a file that does not begin like safetensors."""
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and length > MAX_HEADER_BYTES):
        return (
            "this is a pickle (.pt, .ckpt) with another name. Pickles can run code and are not "
            "read; convert it to safetensors in a program that you trust."
        )
    if size < 8 or start[:1] in (b"<", b"{") or length < 2:
        return "this is not a safetensors file (or the download was cut short)."
    if length > MAX_HEADER_BYTES:
        return f"not a safetensors file: it claims a header of {length} bytes."
    return f"the file is truncated: a header of {length} bytes in a file of {size} bytes."


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object whose keys are unique."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated key")
    return result


def _problem(header: object, data_bytes: int) -> str | None:
    """What is wrong with a parsed header, None when it describes the data exactly."""
    if not isinstance(header, dict):
        return "the header is not a table of tensors."
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "the metadata is not a table of texts."
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        span = _span(entry)
        if span is None:
            return f"the entry of tensor {key[:80]} makes no sense."
        spans.append((*span, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            return f"tensor {key[:80]} overlaps another one or leaves a gap."
        position = end
    if position != data_bytes:
        return f"the tensors need {position} bytes, but {data_bytes} are there."
    return None


def _span(entry: object) -> tuple[int, int] | None:
    """Byte range of a header entry, None when dtype, shape and range do not agree."""
    if not isinstance(entry, dict):
        return None
    item, shape, span = (entry.get(k) for k in ("dtype", "shape", "data_offsets"))
    for numbers in (shape, span):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return None
    if item not in _ITEM_BYTES or not isinstance(span, list) or len(span) != 2:
        return None
    begin, end = span
    fits = isinstance(shape, list) and end - begin == math.prod(shape) * _ITEM_BYTES[item]
    return (begin, end) if fits else None
