"""Reading and writing .safetensors files: the only place that opens one.

Nothing in a file is trusted, and every way in which one can be wrong has its own sentence. A file
is opened once: its header and its tensors come from the same handle, so a file that is replaced or
deleted meanwhile is read as it was, and one that is overwritten in place is noticed.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..config import parse_json
from ..errors import CheckpointError, DiffLoRAError, counted, shown
from ..limits import DIMENSIONS, FILE_BYTES, HEADER_BYTES, NAME_LENGTH, TENSORS
from .atomic import replacing

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""In the order in which safetensors sorts them."""

_NAMES = {kind: name for name, kind in _TYPES.items()}


@dataclass(frozen=True)
class Header:
    """What a header says, consistent with the size of the file.

    Attributes:
        tensors: name to storage type (as safetensors spells it) and shape.
        metadata: the texts of the file.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]


class TensorFile:
    """An open file whose header is checked; made by `open_tensors`.

    Attributes:
        path: the file.
        header: what it says.
        size: bytes of the file.
    """

    def __init__(self, path: Path, file: BinaryIO, kind: str, error: type[DiffLoRAError]) -> None:
        self.path = path
        self._file, self._error = file, error
        self._before = os.fstat(file.fileno())
        self.size = self._before.st_size
        entries, self._start = _entries(file, path, kind, error)
        metadata = entries.pop("__metadata__", None) or {}
        self.header = Header(
            {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()},
            metadata,
        )
        self._begins = {name: entry["data_offsets"][0] for name, entry in entries.items()}

    def read(self, name: str, finite: bool = True) -> Tensor:
        """One tensor, with memory of its own.

        Args:
            name: a name of `header.tensors`.
            finite: refuse NaN and infinity.

        Raises:
            DiffLoRAError: the file was cut meanwhile, or a value is not finite.
        """
        kind, shape = self.header.tensors[name]
        try:
            tensor = torch.empty(shape, dtype=_TYPES[kind])
            if tensor.numel():
                self._file.seek(self._start + self._begins[name])
                if not _fill(self._file, _bytes(tensor)):
                    raise self._changed()
        except (OSError, RuntimeError, MemoryError) as failure:
            raise self._error(f"{_name(self.path)} cannot be read: {failure}.") from failure
        if finite and tensor.is_floating_point() and not _finite(tensor):
            raise self._error(
                f"{_name(self.path)}: {shown(name)} holds NaN or infinite values; what made the "
                "file failed. Make it again, or use another file."
            )
        return tensor

    def read_all(self, finite: bool = True) -> dict[str, Tensor]:
        """State dict of the file, see `read`."""
        return {name: self.read(name, finite) for name in self.header.tensors}

    def check_unchanged(self) -> None:
        """Raises the file's error when it was written to since it was opened."""
        now = os.fstat(self._file.fileno())
        before = self._before
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise self._changed()

    def _changed(self) -> DiffLoRAError:
        """What to say of a file that another program writes to."""
        return self._error(
            f"{_name(self.path)} was changed by another program while it was read; try again."
        )


@contextmanager
def open_tensors(
    path: str | Path, kind: str, error: type[DiffLoRAError] = CheckpointError
) -> Iterator[TensorFile]:
    """Opens a file and checks its header; at the end, that nobody changed it meanwhile.

    Args:
        path: the file.
        kind: what it should be, for messages: "LoRA file".
        error: raised when something is wrong.

    Raises:
        DiffLoRAError: as `error`: missing, cut short, not safetensors, inconsistent, too large, or
            changed while it was read.
    """
    path = Path(path)
    with _opened(path, kind, error) as file:
        tensors = TensorFile(path, file, kind, error)
        yield tensors
        tensors.check_unchanged()


def read_header(path: Path, kind: str, error: type[DiffLoRAError] = CheckpointError) -> Header:
    """Header of a file, see `open_tensors`."""
    with open_tensors(path, kind, error) as file:
        return file.header


def read_file(
    path: Path, kind: str, error: type[DiffLoRAError] = CheckpointError, finite: bool = True
) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """State dict of a file, and its metadata; see `open_tensors` and `TensorFile.read`."""
    with open_tensors(path, kind, error) as file:
        return file.read_all(finite), file.header.metadata


def write_atomic(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: str | Path,
    error: type[DiffLoRAError] = CheckpointError,
) -> Path:
    """Writes a state dict as .safetensors, see `atomic.replacing`.

    The bytes are those of safetensors' own writer, the order of the metadata apart. That one goes
    through a temporary file of its own, which a kill leaves under a name that says nothing.

    Raises:
        DiffLoRAError: as `error`: the folder cannot be written, or the content is beyond limits.
    """
    ranks = {name: number for number, name in enumerate(_TYPES)}
    stored = sorted(
        ((_kind(name, tensor, error), name, tensor) for name, tensor in tensors.items()),
        key=lambda entry: (-ranks[entry[0]], entry[1]),
    )
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for kind, name, tensor in stored:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = _header_text(header, _name(Path(path)), error)
    with replacing(path, error) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, tensor in stored:
            file.write(_bytes(tensor.detach().cpu().contiguous()))
    return Path(path)


def _header_text(header: Mapping[str, Any], place: str, error: type[DiffLoRAError]) -> bytes:
    """A header as it is stored, refused where our reader would refuse it."""
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as half:
        raise error(f"{place} was not written: {shown(str(half.object))} is no text.") from half
    text += b" " * (-len(text) % 8)
    longest = max(map(len, header), default=0)
    if len(text) > HEADER_BYTES or longest > NAME_LENGTH or len(header) > TENSORS:
        raise error(
            f"{place} was not written: its header has {len(text)} bytes, "
            f"{counted(len(header), 'entry')} and names of up to {longest} characters "
            f"({HEADER_BYTES}, {TENSORS} and {NAME_LENGTH} at most)."
        )
    return text


def _kind(name: str, tensor: Tensor, error: type[DiffLoRAError]) -> str:
    """How safetensors spells a tensor's type."""
    if tensor.dtype not in _NAMES:
        raise error(f"{shown(name)} was not written: {tensor.dtype} cannot be stored.")
    return _NAMES[tensor.dtype]


def _fill(file: BinaryIO, memory: memoryview) -> bool:
    """Reads until the memory is full; False where the file ends before. A system gives 2 GiB at
    once at most."""
    while memory:
        count = file.readinto(memory)  # type: ignore[attr-defined]
        if not count:
            return False
        memory = memory[count:]
    return True


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@contextmanager
def _opened(path: Path, kind: str, error: type[DiffLoRAError]) -> Iterator[BinaryIO]:
    """The open file."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise OSError("it is no file")
        file = path.open("rb", buffering=0)
    except FileNotFoundError as missing:
        raise error(f"There is no {kind} at {shown(str(path), 300)}.") from missing
    except (OSError, ValueError) as closed:  # ValueError: a NUL or half a character in the path
        reason = closed.strerror if isinstance(closed, OSError) else None
        place = shown(str(path), 300)
        raise error(f"{place} cannot be opened: {reason or closed}.") from closed
    with file:
        yield file


def _entries(
    file: BinaryIO, path: Path, kind: str, error: type[DiffLoRAError]
) -> tuple[dict[str, Any], int]:
    """The parsed header, checked, and where the data begin."""
    try:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        sound = len(start) == 8 and 2 <= length <= min(size - 8, HEADER_BYTES)
        text = file.read(length) if sound else b""
    except OSError as closed:
        raise error(f"{_name(path)} cannot be read: {closed.strerror}.") from closed
    if not sound:
        raise error(f"{_name(path)}: {_why_not(start, length, size)}")
    if size > FILE_BYTES:
        raise error(f"{_name(path)} has {size} bytes, more than any {kind} ({FILE_BYTES}).")
    header = parse_json(text, f"{_name(path)}: the header", error, HEADER_BYTES)
    problem = _problem(header, size - 8 - length)
    if problem:
        raise error(f"{_name(path)}: {problem} The file is damaged; download it again.")
    return header, 8 + length


def _name(path: Path) -> str:
    """Name of a file in messages."""
    return shown(path.name, 120)


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite, without a copy; 8-bit floats have no such test of their own.

    The smallest and the largest value are NaN where one of them is.
    """
    if not tensor.numel():
        return True
    ends = torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor)
    return all(math.isfinite(end) for end in ends)


def _why_not(start: bytes, length: int, size: int) -> str:
    """Sentence for a file that does not begin like safetensors."""
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and length > HEADER_BYTES):
        return (
            "this is a pickle file with another name (.pt, .ckpt). Pickles can run code and are "
            "not read; convert it to safetensors in a program that you trust."
        )
    if size < 8 or start[:1] in (b"<", b"{") or length < 2:
        return "this is not a safetensors file (or the download was cut short)."
    if length > HEADER_BYTES:
        return f"not a safetensors file: it claims a header of {length} bytes."
    return f"the file is truncated: it was cut at {size} bytes, in a header of {length}."


def _problem(header: object, data_bytes: int) -> str | None:
    """What is wrong with a parsed header, None when it describes the data exactly."""
    if not isinstance(header, dict):
        return "the header is not a table of tensors."
    if len(header) > TENSORS:
        count = counted(len(header), "tensor")
        return f"the header names {count}, more than any file of ours ({TENSORS})."
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "the metadata is not a table of texts."
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        span = _span(entry) if len(key) <= NAME_LENGTH else None
        if span is None:
            return f"the entry of tensor {shown(key)} makes no sense."
        spans.append((*span, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            return f"tensor {shown(key)} overlaps another one or leaves a gap."
        position = end
    if position > data_bytes:
        return f"it was cut: the tensors need {position} bytes, but {data_bytes} are there."
    if position < data_bytes:
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
    if not isinstance(item, str) or item not in _TYPES or not isinstance(span, list):
        return None
    if not isinstance(shape, list) or len(shape) > DIMENSIONS or len(span) != 2:
        return None
    begin, end = span
    # A shape such as (0, 2**60) needs no bytes, but no library can make it.
    fits = max(shape, default=0) < 2**40 and end - begin == math.prod(shape) * _TYPES[item].itemsize
    return (begin, end) if fits else None
