"""Edits of .safetensors files: consistent files that mean something else, and damaged ones.

An edit takes the bytes of a file and a random generator and returns other bytes. What it cannot
change, it leaves alone, so edits can follow one another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from .byte_edits import BYTE_EDITS, Edit
from .json_edits import HOSTILE_KEYS, JSON_EDITS, dump

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
NAN = {
    "F16": b"\x00\x7e", "BF16": b"\xc0\x7f", "F32": b"\x00\x00\xc0\x7f",
    "F64": b"\0\0\0\0\0\0\xf8\x7f", "F8_E4M3": b"\x7f", "F8_E5M2": b"\x7f",
}  # fmt: skip
INFINITY = {
    "F16": b"\x00\x7c", "BF16": b"\x80\x7f", "F32": b"\x00\x00\x80\x7f",
    "F64": b"\0\0\0\0\0\0\xf0\x7f", "F8_E5M2": b"\x7c",
}  # fmt: skip
LARGEST = {
    "F16": b"\xff\x7b", "BF16": b"\x7f\x7f", "F32": b"\xff\xff\x7f\x7f",
    "F64": b"\xff\xff\xff\xff\xff\xff\xef\x7f", "F8_E4M3": b"\x7e", "F8_E5M2": b"\x7b",
}  # fmt: skip
SMALLEST = {"F16": b"\1\0", "BF16": b"\1\0", "F32": b"\1\0\0\0", "F64": b"\1\0\0\0\0\0\0\0"}
MOST_BYTES = 900_000
"""A hostile file stays below 1 MB: what it asks for is out of all proportion then."""


@dataclass
class Stored:
    """One tensor of a file."""

    dtype: Any
    shape: Any
    data: bytes

    @property
    def plain(self) -> bool:
        """Whether an earlier edit left a type and a shape that others can change."""
        whole = isinstance(self.shape, list) and all(type(n) is int for n in self.shape)
        return whole and isinstance(self.dtype, str) and self.dtype in ITEM_BYTES


@dataclass
class SafeFile:
    """The tensors and the metadata of a file; `pack` lays them out anew."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]

    @classmethod
    def parse(cls, content: bytes) -> SafeFile | None:
        """None where the bytes are no such file (any more)."""
        try:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            metadata = header.pop("__metadata__", {})
            data = content[8 + length :]
            tensors = {
                name: Stored(e["dtype"], e["shape"], data[slice(*e["data_offsets"])])
                for name, e in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        plain = isinstance(metadata, dict) and all(t.plain for t in tensors.values())
        return cls(tensors, metadata) if plain else None

    def pack(self) -> bytes:
        """The file."""
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        position = 0
        for name, tensor in self.tensors.items():
            end = position + len(tensor.data)
            offsets = [position, end]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return (
            len(text).to_bytes(8, "little") + text + b"".join(t.data for t in self.tensors.values())
        )


def _on_file(change: Callable[[SafeFile, Random], object]) -> Edit:
    """An edit of the parsed file."""

    def edit(content: bytes, rng: Random) -> bytes:
        file = SafeFile.parse(content)
        if file is None:
            return content
        change(file, rng)
        return file.pack()

    return edit


def _on_tensor(change: Callable[[Stored, Random], object]) -> Edit:
    """An edit of one of its tensors."""

    def one(file: SafeFile, rng: Random) -> None:
        if file.tensors:
            change(rng.choice(list(file.tensors.values())), rng)

    return _on_file(one)


def _values(table: dict[str, bytes], everywhere: bool) -> Edit:
    """Writes a special number at one place of a tensor, or everywhere."""

    def change(tensor: Stored, rng: Random) -> None:
        value = table.get(str(tensor.dtype), b"\xff" * ITEM_BYTES.get(str(tensor.dtype), 1))
        count = len(tensor.data) // len(value)
        if everywhere:
            tensor.data = value * count
        elif count:
            at = rng.randrange(count) * len(value)
            tensor.data = tensor.data[:at] + value + tensor.data[at + len(value) :]

    return _on_tensor(change)


def _largest_everywhere(file: SafeFile, rng: Random) -> None:
    """All floating tensors near the largest number that they can hold."""
    for tensor in file.tensors.values():
        if value := LARGEST.get(str(tensor.dtype)):
            tensor.data = value * (len(tensor.data) // len(value))


def _numel(shape: Any) -> int:
    sound = isinstance(shape, list) and all(type(n) is int for n in shape)
    return math.prod(shape) if sound else 0


def _of(kind: str, count: int, rng: Random) -> bytes:
    """Random numbers of a type; floats are mostly ordinary."""
    size = ITEM_BYTES[kind]
    if kind == "F32":
        return b"".join(
            bytes([rng.randrange(256), rng.randrange(256), 128, 63]) for _ in range(count)
        )
    if kind in ("F16", "BF16"):
        return bytes([rng.randrange(256), 60]) * count
    return rng.randbytes(size * min(count, 64)) * (count // 64) + rng.randbytes(size * (count % 64))


def _retype(tensor: Stored, rng: Random) -> None:
    """Another type, with as many numbers."""
    tensor.dtype = rng.choice(list(ITEM_BYTES))
    count = min(max(0, _numel(tensor.shape)), 2**16)
    tensor.data = (_of(tensor.dtype, count, rng) + bytes(8 * count))[
        : ITEM_BYTES[tensor.dtype] * count
    ]


def _all_retyped(file: SafeFile, rng: Random) -> None:
    """One type for every tensor."""
    kind = rng.choice(list(ITEM_BYTES))
    for tensor in file.tensors.values():
        count = min(max(0, _numel(tensor.shape)), 2**16)
        tensor.dtype, tensor.data = kind, bytes(ITEM_BYTES[kind] * count)


def _reshape(tensor: Stored, rng: Random) -> None:
    """The same numbers in another shape."""
    count = _numel(tensor.shape)
    shapes = [
        [count],
        [count, 1],
        [1, count],
        [1, 1, count],
        [*tensor.shape, 1, 1],
        [1] * 40 + [count],
    ]
    tensor.shape = rng.choice([*shapes, list(reversed(tensor.shape))])


def _resize(tensor: Stored, rng: Random) -> None:
    """Another size along one side: zero, one, one more, or many."""
    item = ITEM_BYTES.get(str(tensor.dtype), 1)
    if rng.random() < 0.3 or not isinstance(tensor.shape, list) or not tensor.shape:
        tensor.shape = rng.choice([[], [0], [0, 0], [0, 2**40], [2**62, 0], [0, 2], [2, 0]])
    else:
        at = rng.randrange(len(tensor.shape))
        tensor.shape[at] = rng.choice([0, 1, tensor.shape[at] + 1, 2 * tensor.shape[at], 5000])
    needed = _numel(tensor.shape) * item
    if needed > MOST_BYTES:
        tensor.shape, needed = [1], item
    tensor.data = (tensor.data * (needed // max(1, len(tensor.data)) + 1) + bytes(needed))[:needed]


def _vast(file: SafeFile, rng: Random) -> None:
    """Longest sides grown as far as a small file can hold: products of such factors are bombs."""
    matrices = [t for t in file.tensors.values() if isinstance(t.shape, list) and len(t.shape) == 2]
    rng.shuffle(matrices)
    chosen = matrices[: rng.choice([1, 2, 4, 64])]
    share = MOST_BYTES // max(1, len(chosen))
    kind = rng.choice(["F16", "F16", "F8_E4M3", "F32"])
    longest = rng.choice([0, 1, None])
    for tensor in chosen:
        at = longest if longest is not None else tensor.shape.index(max(tensor.shape))
        other = max(1, tensor.shape[1 - at])
        tensor.shape[at] = share // ITEM_BYTES[kind] // other
        tensor.dtype, tensor.data = (
            kind,
            bytes([1, 60] * (share // 2))[: _numel(tensor.shape) * ITEM_BYTES[kind]].ljust(
                _numel(tensor.shape) * ITEM_BYTES[kind], b"\1"
            ),
        )


def _square(file: SafeFile, rng: Random) -> None:
    """One matrix as large as a small file can hold, in both directions."""
    names = [n for n, t in file.tensors.items() if isinstance(t.shape, list) and len(t.shape) == 2]
    if names:
        side = rng.choice([300, 600, 900])
        file.tensors[rng.choice(names)] = Stored(
            "F8_E4M3",
            [side, side],
            rng.randbytes(64) * (side * side // 64) + bytes(side * side % 64),
        )


def _rename(file: SafeFile, rng: Random) -> None:
    """A tensor under a hostile name, or under another one's stem."""
    if file.tensors:
        name = rng.choice(list(file.tensors))
        tensor = file.tensors.pop(name)
        new = rng.choice([*HOSTILE_KEYS, name.upper(), f"{name}.default", f"x.{name}", name[1:]])
        file.tensors[new] = tensor


def _copy(file: SafeFile, rng: Random) -> None:
    """A tensor once more under another name."""
    if file.tensors:
        name = rng.choice(list(file.tensors))
        old = file.tensors[name]
        new = rng.choice([*HOSTILE_KEYS, f"{name}2", name.replace(".0.", ".1."), f"te.{name}"])
        file.tensors[new] = Stored(old.dtype, list(old.shape), old.data)


def _drop(file: SafeFile, rng: Random) -> None:
    """A tensor less."""
    if file.tensors:
        file.tensors.pop(rng.choice(list(file.tensors)))


def _swap(file: SafeFile, rng: Random) -> None:
    """Two tensors change places."""
    if len(file.tensors) > 1:
        a, b = rng.sample(list(file.tensors), 2)
        file.tensors[a], file.tensors[b] = file.tensors[b], file.tensors[a]


def _crowd(file: SafeFile, rng: Random) -> None:
    """Many empty tensors."""
    like = rng.choice(list(file.tensors) or ["x"])
    for number in range(rng.choice([100, 100, 100, 2000])):
        file.tensors[f"{number}.{like}"] = Stored("F32", [0], b"")


def _metadata(file: SafeFile, rng: Random) -> None:
    """A text of the metadata gone, replaced, or under another name."""
    name = rng.choice([*file.metadata, "lora_adapter_metadata", "format"])
    choice = rng.randrange(4)
    if choice == 0:
        file.metadata.pop(name, None)
    elif choice == 1:
        file.metadata[name] = rng.choice(
            [
                "",
                "null",
                "[]",
                "{}",
                "nan",
                "0",
                "x",
                "\ud800",
                "[" * 100_000,
                "9" * 5000,
                "-1",
                "1e999",
                "true",
                '"text"',
                "\0",
            ]
        )
    elif choice == 2:
        file.metadata[rng.choice(HOSTILE_KEYS)] = file.metadata.pop(name, "x")
    else:
        file.metadata = {}


def _metadata_json(kind: str) -> Edit:
    """An edit of a JSON document in the metadata."""

    def change(file: SafeFile, rng: Random) -> None:
        texts = {name: text for name, text in file.metadata.items() if isinstance(text, str)}
        documents = [name for name, text in texts.items() if text[:1] in ("{", "[")]
        if documents:
            name = rng.choice(documents)
            file.metadata[name] = JSON_EDITS[kind](texts[name].encode(), rng).decode()

    return _on_file(change)


def _header(content: bytes, rng: Random) -> bytes:
    """The header itself as a JSON document that is edited."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    text = rng.choice(list(JSON_EDITS.values()))(header, rng)
    return len(text).to_bytes(8, "little") + text + data


def _entry(content: bytes, rng: Random) -> bytes:
    """One field of one tensor's entry with a value that makes no sense."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        entry = header[rng.choice(names)]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        values = [[], {}, None, "F33", "", 0, -1, [-1], [1.5], ["a"], [2**63, 2], [2**31, 2**31],
                  [True], [[]], "F4", [0, 2**64], [5, 1], [None, 1], 10**300, ["F32"]]  # fmt: skip
        entry[field] = rng.choice(values)
        text = dump(header)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError):
        return content
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _length(content: bytes, rng: Random) -> bytes:
    """Another length of the header."""
    length = rng.choice([0, 1, 2, 2**20, 2**31, 2**63, 2**64 - 1, rng.randrange(2**16)])
    return length.to_bytes(8, "little") + content[8:]


SAFETENSORS_EDITS: dict[str, Edit] = {
    "nan": _values(NAN, False),
    "infinity": _values(INFINITY, False),
    "largest": _values(LARGEST, True),
    "largest everywhere": _on_file(_largest_everywhere),
    "smallest": _values(SMALLEST, True),
    "zeros": _on_tensor(lambda tensor, rng: setattr(tensor, "data", bytes(len(tensor.data)))),
    "random": _on_tensor(lambda t, rng: setattr(t, "data", rng.randbytes(len(t.data)))),
    "retype": _on_tensor(_retype),
    "all retyped": _on_file(_all_retyped),
    "reshape": _on_tensor(_reshape),
    "resize": _on_tensor(_resize),
    "vast": _on_file(_vast),
    "square": _on_file(_square),
    "rename": _on_file(_rename),
    "copy": _on_file(_copy),
    "drop": _on_file(_drop),
    "swap": _on_file(_swap),
    "crowd": _on_file(_crowd),
    "metadata": _on_file(_metadata),
    **{f"metadata {kind}": _metadata_json(kind) for kind in JSON_EDITS},
    "header": _header,
    "entry": _entry,
    "length": _length,
    **BYTE_EDITS,
}
