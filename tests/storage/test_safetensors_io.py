"""The one opener of safetensors: what it reads is what another writer wrote, and nothing else."""

import io
import json
import os
import struct
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import _SIZE, load_file, save_file

from difflora_core import limits
from difflora_core.errors import CheckpointError, DiffLoRAError, LibraryError
from difflora_core.storage.safetensors_io import (
    _TYPES,
    _fill,
    open_tensors,
    read_file,
    read_header,
    write_atomic,
)

KINDS = dict(_TYPES)
TENSORS = {f"{k} ö\n": torch.arange(6).reshape(2, 3).to(kind) for k, kind in KINDS.items()}
TENSORS |= {"number": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
FACTS = {"a": 'x\n"ü\u2028', "b": "{}"}


def content(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def same(one, other):
    return one.keys() == other.keys() and all(
        a.dtype == other[k].dtype and torch.equal(a.double(), other[k].double())
        for k, a in one.items()
    )


def test_the_format_is_that_of_safetensors(tmp_path):
    """Both ways, for every type, against safetensors' own reader and writer."""
    written = {k: t for k, t in TENSORS.items() if t.dtype in _SIZE}  # 0.4 lacks unsigned ones
    assert len(written) >= len(TENSORS) - 3
    save_file(written, tmp_path / "theirs", metadata=FACTS)
    write_atomic(written, FACTS, tmp_path / "ours")
    assert same(load_file(tmp_path / "ours"), written)
    for name in ("theirs", "ours"):
        tensors, facts = read_file(tmp_path / name, "file")
        assert same(tensors, written)
        assert facts == FACTS
    save_file(written, tmp_path / "theirs", metadata={"a": FACTS["a"]})  # the order of more: random
    write_atomic(written, {"a": FACTS["a"]}, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_strided_and_shared_tensors_are_written_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    write_atomic({"turned": base.mT, "part": base[1:]}, {}, tmp_path / "f")
    tensors, _ = read_file(tmp_path / "f", "file")
    assert torch.equal(tensors["turned"], base.mT)
    assert torch.equal(tensors["part"], base[1:])


def entry(shape, *span, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(span)}


BAD = {
    "a list for a type": content({"a": entry([2], 0, 8, dtype=[])}, bytes(8)),
    "a table for a type": content({"a": entry([2], 0, 8, dtype={})}, bytes(8)),
    "true for a size": content({"a": entry([True], 0, 4)}, bytes(4)),
    "a float for a size": content({"a": entry([1.0], 0, 4)}, bytes(4)),
    "an impossible empty tensor": content({"a": entry([0, 2**60], 0, 0)}),
    "too many dimensions": content({"a": entry([1] * 9, 0, 4)}, bytes(4)),
    "a long name": content({"a" * 1001: entry([1], 0, 4)}, bytes(4)),
    "5,000 digits": content(b'{"a":' + b"9" * 5000 + b"}"),
    "no number": content(b'{"a": NaN}'),
    "100,000 brackets": content(b'{"a":' + b"[" * 100_000),
    "depth that parses": content(b'{"a":' + b"[" * 60 + b"]" * 60 + b"}"),
    "half a character": content(b'{"__metadata__": {"a": "\\ud800"}}'),
    "utf-16": content('{"a": 1}'.encode("utf-16")),
    "a key twice": content(b'{"__metadata__": {"a": "1", "a": "2"}}'),
    "nothing": b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_headers_that_make_no_sense(tmp_path, kind):
    path = tmp_path / "some.safetensors"
    path.write_bytes(BAD[kind])
    with pytest.raises(LibraryError, match=r"some\.safetensors") as caught:
        read_file(path, "file", LibraryError)
    str(caught.value).encode()
    assert len(str(caught.value)) < 500


def test_more_tensors_than_any_file_has(tmp_path, monkeypatch):
    monkeypatch.setattr("difflora_core.storage.safetensors_io.TENSORS", 3)
    path = tmp_path / "many.safetensors"
    path.write_bytes(content({f"t{k}": entry([1], 4 * k, 4 * k + 4) for k in range(4)}, bytes(16)))
    with pytest.raises(CheckpointError, match="4 tensors"):
        read_header(path, "file")


def test_a_sparse_file_is_refused_before_memory_is_taken(tmp_path):
    """A file of a few blocks may claim terabytes."""
    size = 2**41
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(content({"a": entry([size // 4], 0, size)}))
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(CheckpointError, match="more than any"):
        read_file(path, "file")


@pytest.mark.parametrize("kind", [k for k, t in KINDS.items() if t.is_floating_point])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 98])
def test_one_bad_value_anywhere_is_found(tmp_path, kind, value, place):
    tensor = torch.ones(99)
    tensor[place] = value
    tensor = tensor.to(KINDS[kind])
    if torch.isfinite(tensor.float()).all():
        pytest.skip(f"{kind} has no {value}")
    path = write_atomic({"a": tensor}, {}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="a holds NaN or infinite"):
        read_file(path, "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["F8_E5M2", "F16", "BF16", "F32", "F64"])
def test_values_that_are_not_finite(tmp_path, value, kind):
    save_file({"a": torch.tensor([1.0, value]).to(KINDS[kind])}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="a holds NaN or infinite"):
        read_file(tmp_path / "f", "file")
    assert read_file(tmp_path / "f", "file", finite=False)[0]["a"].float()[0] == 1


@pytest.mark.parametrize(
    "path", ["/dev/null", "/dev/zero", "/", "a\0b", "\ud800", "x" * 5000, "/nowhere/at/all"]
)
def test_what_is_no_file(path):
    with pytest.raises(CheckpointError) as caught:
        read_file(path, "file")
    str(caught.value).encode()


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no file"):
        read_file(tmp_path / "pipe", "file")


def test_a_file_replaced_while_it_is_open_is_read_as_it_was(tmp_path):
    path = write_atomic({"a": torch.ones(4)}, {"who": "one"}, tmp_path / "f")
    with open_tensors(path, "file") as file:
        write_atomic({"a": torch.zeros(4)}, {"who": "another"}, path)
        assert file.header.metadata == {"who": "one"}
        assert torch.equal(file.read("a"), torch.ones(4))
    with open_tensors(path, "file") as file:
        path.unlink()
        assert torch.equal(file.read("a"), torch.zeros(4))


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_overwritten_in_place_is_noticed(tmp_path, cut):
    """As some network drives and copying programs do; memory maps would crash the process."""
    path = write_atomic({"a": torch.ones(4096)}, {}, tmp_path / "f")
    other = path.read_bytes()[:200] if cut else path.read_bytes()[:-8] + bytes(8)
    with pytest.raises(CheckpointError, match="changed by another program"):  # noqa: PT012
        with open_tensors(path, "file") as file:
            with path.open("r+b") as same_file:
                same_file.write(other)
                same_file.truncate(len(other))
            os.utime(path, ns=(1, 1))
            file.read("a")


def test_a_reader_beside_a_writer_meets_one_or_the_other(tmp_path):
    path, stop = tmp_path / "f", threading.Event()
    write_atomic({"a": torch.full((512,), 0.0)}, {"k": "0"}, path)

    def write():
        k = 0
        while not stop.is_set():
            k += 1
            write_atomic({"a": torch.full((512,), float(k))}, {"k": str(k)}, path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            tensors, facts = read_file(path, "file")
            assert (tensors["a"] == float(facts["k"])).all()
    finally:
        stop.set()
        writer.join()


@given(st.data())
def test_changed_bytes_never_surprise(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "f"
    write_atomic({"a": torch.ones(3), "b": torch.zeros(2, 2).half()}, FACTS, path)
    good = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(good)
    try:
        tensors, facts = read_file(path, "file")
    except DiffLoRAError as error:
        str(error).encode()
    else:
        theirs = load_file(path)  # what we accept, safetensors accepts, and reads as we do
        assert same(tensors, theirs)
        assert all(isinstance(value, str) for value in facts.values())


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    path = write_atomic({"a": torch.ones(2)}, {}, tmp_path / "f")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot be stored"):
        write_atomic({"a": torch.ones(2, dtype=torch.complex64)}, {}, path)
    with pytest.raises(CheckpointError, match="header has"):
        write_atomic({"a": torch.ones(2)}, {"k": "x" * limits.HEADER_BYTES}, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


class Slow(io.BytesIO):
    """Gives at most three bytes at once, as a system gives at most 2 GiB."""

    def readinto(self, memory):
        return super().readinto(memory[:3])


def test_a_tensor_that_takes_several_reads_is_whole():
    memory = memoryview(bytearray(8))
    assert _fill(Slow(b"12345678"), memory)
    assert bytes(memory) == b"12345678"
    assert not _fill(Slow(b"1234567"), memoryview(bytearray(8)))


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [({"x" * 1001: torch.zeros(1)}, {}), ({}, {"a": "\ud800"}), ({"\udfff": torch.zeros(1)}, {})],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, tensors, facts):
    with pytest.raises(LibraryError, match="was not written"):
        write_atomic(tensors, facts, tmp_path / "f", LibraryError)
    assert not list(tmp_path.iterdir())
