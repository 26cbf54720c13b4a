"""The identity library: exact round trips, names, writers at once, and files that lie."""

import contextlib
import json
import os
import stat
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from difflora_core.errors import ConfigError, DiffLoRAError, ImageError, LibraryError
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.storage import library_file
from difflora_core.storage.identity_library import add_people, numbered
from difflora_core.storage.library_file import METADATA_KEY, check_name, read_library
from difflora_core.storage.thumbnail import (
    MAX_PICTURE_BYTES,
    make_thumbnail,
    make_thumbnails,
    read_thumbnail,
)

ROOT = Path(__file__).resolve().parents[2]


def people(count=1, seed=0, space="s"):
    g = torch.Generator().manual_seed(seed)
    return LoRALatent(torch.randn(count, 3, 4, generator=g), "layout", space)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "cast.safetensors"


def test_round_trip_is_exact(path):
    picture = make_thumbnail(torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(1)))
    latents = people(2)
    assert add_people(path, latents, ["Ada", "Żółć 李"], [picture, None], "m.safetensors") == [
        "Ada",
        "Żółć 李",
    ]
    library = read_library(path)
    assert torch.equal(library.latents.z, latents.z)
    assert (library.latents.layout_hash, library.latents.space) == ("layout", "s")
    assert library.names == ["Ada", "Żółć 李"]
    assert library.people[0].picture == picture
    assert library.people[1].picture is None
    assert library.model_name == "m.safetensors"
    assert torch.equal(library.latent(library.find("Ada")).z, latents.z[:1])
    assert library.find(number=2) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_thousand_people_take_a_few_kilobytes_each(path):
    picture = make_thumbnail(torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(1)))
    names = numbered("p", 1000)
    latents = LoRALatent(torch.randn(1000, 8, 16), "layout", "s")
    add_people(path, latents, names, [picture] * 1000)
    assert path.stat().st_size < 1000 * 8192  # noise is the largest picture there is
    assert len(read_library(path)) == 1000


def test_names_are_unique(path):
    assert add_people(path, people(3), ["Ada", "Ada", " Ada "]) == ["Ada", "Ada 2", "Ada 3"]
    with pytest.raises(LibraryError, match="already"):
        add_people(path, people(), ["Ada"], same_name="refuse")
    newer = people(seed=5)
    add_people(path, newer, ["Ada"], same_name="replace")
    library = read_library(path)
    assert library.names == ["Ada 2", "Ada 3", "Ada"]
    assert torch.equal(library.latent(2).z, newer.z)
    long = "x" * 80
    add_people(path, people(2), [long, long])
    assert read_library(path).names[-1] == "x" * 78 + " 2"


@given(st.text(max_size=100))
def test_names_can_be_shown(text):
    try:
        name = check_name(text)
    except LibraryError:
        assert not text.strip() or len(text.strip()) > 80 or not text.strip().isprintable()
    else:
        assert name == text.strip()
        assert len(name) <= 80


def test_what_does_not_belong(path):
    add_people(path, people(), ["a"], model_name="mine.safetensors")
    before = path.read_bytes()
    for other in (people(space="t"), replace(people(), layout_hash="x")):
        with pytest.raises(LibraryError, match=r"another DiffLoRA model \(mine.safetensors\)"):
            add_people(path, other, ["b"])
    with pytest.raises(LibraryError, match="NaN"):
        add_people(path, replace(people(), z=torch.full((1, 3, 4), torch.nan)), ["b"])
    with pytest.raises(ConfigError, match="as many names"):
        add_people(path, people(2), ["b"])
    with pytest.raises(ConfigError, match="Unknown rule"):
        add_people(path, people(), ["b"], same_name="merge")
    with pytest.raises(LibraryError, match="thumbnail"):
        add_people(path, people(), ["b"], [b"not a picture"])
    assert path.read_bytes() == before


CROWD = """
import os, sys, torch
from pathlib import Path
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.storage.identity_library import add_people
from difflora_core.storage.library_file import read_library

path, count = Path(sys.argv[1]), int(sys.argv[2])

def write(number):
    for k in range(count):
        z = torch.full((1, 3, 4), float(1000 * number + k))
        add_people(path, LoRALatent(z, "layout", "s"), [f"{number} {k}"])

def read(number):
    reads = before = 0
    while not path.with_suffix(".done").exists():
        if path.exists():
            library = read_library(path)
            for row, name in enumerate(library.names):
                number, k = map(int, name.split())
                assert (library.latent(row).z == 1000 * number + k).all(), name
            assert len(library) >= before
            reads, before = reads + 1, len(library)
    assert reads > 0

def start(task, number):
    child = os.fork()  # before torch has made a thread; an interpreter each takes seconds
    if child:
        return child
    failed = 1
    try:
        task(number)
        failed = 0
    finally:
        os._exit(failed)

readers = [start(read, number) for number in range(2)]
writers = [start(write, number) for number in range(8)]
failed = [os.waitpid(child, 0)[1] for child in writers]
path.with_suffix(".done").touch()
failed += [os.waitpid(child, 0)[1] for child in readers]
sys.exit(any(failed))
"""


@pytest.mark.parametrize("count", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_writers_and_two_readers_at_once(path, count):
    """Nothing is lost, and every read gives every person her own latent."""

    command = [sys.executable, "-c", CROWD, str(path), str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    path.parent.mkdir()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    library = read_library(path)
    assert sorted(library.names) == sorted(f"{n} {k}" for n in range(8) for k in range(count))
    for row, name in enumerate(library.names):
        number, k = map(int, name.split())
        assert (library.latent(row).z == 1000 * number + k).all()
    assert {p.name for p in path.parent.iterdir()} <= {
        *(path.name, f".{path.name}.lock", path.with_suffix(".done").name)
    }


def test_a_person_deleted_while_somebody_reads(path, monkeypatch):
    """Between the check of the header and the tensors, the file becomes another one."""
    latents = people(3)
    add_people(path, latents, ["Ada", "Bo", "Cy"])
    others = library_file._facts

    def facts_then_delete(where, header):
        found = others(where, header)
        monkeypatch.setattr(library_file, "_facts", others)
        add_people(path, people(seed=9), ["Ada"], same_name="replace")  # the rows move up
        return found

    monkeypatch.setattr(library_file, "_facts", facts_then_delete)
    library = read_library(path)
    assert library.names == ["Ada", "Bo", "Cy"]
    assert torch.equal(library.latents.z, latents.z)
    assert read_library(path).names == ["Bo", "Cy", "Ada"]


def test_a_linked_library_is_updated_in_its_place(path, tmp_path):
    add_people(path, people(), ["Ada"])
    link = tmp_path / "elsewhere" / "linked.safetensors"
    link.parent.mkdir()
    link.symlink_to(path)
    add_people(link, people(seed=1), ["Bo"])
    assert link.is_symlink()
    assert read_library(path).names == read_library(link).names == ["Ada", "Bo"]
    assert [p.name for p in link.parent.iterdir()] == [link.name]  # the lock lies at the target


def test_a_library_keeps_its_mode(path):
    add_people(path, people(), ["Ada"])
    path.chmod(0o600)
    add_people(path, people(), ["Bo"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_lock_that_is_a_link_truncates_nothing(path, tmp_path):
    """What filelock did before 3.20.1; requirements ask for a later one."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.parent.mkdir()
    path.with_name(f".{path.name}.lock").symlink_to(victim)
    with contextlib.suppress(LibraryError):
        add_people(path, people(), ["Ada"])
    assert victim.read_text() == "precious"


def facts(**changes):
    good = {
        "format": "difflora_library", "version": 1, "layout_hash": "h", "space": "s",
        "model_name": "m", "people": [{"name": "a", "added": "2026"}, {"name": "b", "added": ""}],
    }  # fmt: skip
    return good | changes


LATENTS = torch.zeros(2, 3, 4)
BYTES = torch.zeros(8, dtype=torch.uint8)
LIES = {
    "no people": (facts(people=None), {"latents": LATENTS}),
    "too few people": (facts(people=[]), {"latents": LATENTS}),
    "a name twice": (facts(people=[{"name": "a", "added": ""}] * 2), {"latents": LATENTS}),
    "a name with lines": (
        facts(people=[{"name": "a\nb", "added": ""}, {"name": "b", "added": ""}]),
        {"latents": LATENTS},
    ),
    "a name that is none": (facts(people=[{"name": 7, "added": ""}] * 2), {"latents": LATENTS}),
    "people that are texts": (facts(people=["a", "b"]), {"latents": LATENTS}),
    "a number for a text": (facts(space=3), {"latents": LATENTS}),
    "a later version": (facts(version=2), {"latents": LATENTS}),
    "a list": ([], {"latents": LATENTS}),
    "no latents": (facts(), {"other": LATENTS}),
    "half precision": (facts(), {"latents": LATENTS.half()}),
    "two dimensions": (facts(), {"latents": LATENTS.flatten(1)}),
    "empty latents": (facts(), {"latents": torch.zeros(2, 0, 4)}),
    "not numbers": (facts(), {"latents": LATENTS / 0}),
    "a picture of nobody": (facts(), {"latents": LATENTS, "picture.2": BYTES}),
    "a picture of floats": (facts(), {"latents": LATENTS, "picture.0": BYTES.float()}),
    "a large picture": (
        facts(),
        {"latents": LATENTS, "picture.0": torch.zeros(MAX_PICTURE_BYTES + 1, dtype=torch.uint8)},
    ),
    "something more": (facts(), {"latents": LATENTS, "face": BYTES}),
}


def test_the_file_that_the_lies_differ_from(tmp_path):
    path = tmp_path / "cast.safetensors"
    save_file({"latents": LATENTS}, path, metadata={METADATA_KEY: json.dumps(facts())})
    assert read_library(path).names == ["a", "b"]


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(tmp_path, lie):
    path = tmp_path / "cast.safetensors"
    said, tensors = LIES[lie]
    save_file(dict(tensors), path, metadata={METADATA_KEY: json.dumps(said)})
    before = path.read_bytes()
    with pytest.raises(LibraryError, match=r"cast\.safetensors"):
        read_library(path)
    with pytest.raises(LibraryError):
        add_people(path, people(), ["c"])
    assert path.read_bytes() == before


@given(st.data())
def test_damaged_bytes_never_surprise(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "cast.safetensors"
    add_people(path, people(2), ["a", "b"], [make_thumbnail(torch.zeros(8, 8, 3)), None])
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(good[:at])
    else:
        path.write_bytes(good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :])
    with contextlib.suppress(DiffLoRAError):
        for person in read_library(path).people:
            read_thumbnail(person.picture)


def test_no_place_for_a_deep_header(tmp_path):
    path = tmp_path / "deep.safetensors"
    deep = b'{"__metadata__":' + b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(LibraryError, match=r"deep\.safetensors"):
        read_library(path)


def test_thumbnails():
    wide = torch.zeros(50, 100, 3)
    wide[:, 25:75] = 1.0  # the middle square
    shown = read_thumbnail(make_thumbnail(wide))
    assert shown.shape == (96, 96, 3)
    assert shown.min() > 0.95
    assert read_thumbnail(None).std() == 0
    noise = torch.rand(96, 96, 3, generator=torch.Generator().manual_seed(2))
    assert len(make_thumbnail(noise)) <= MAX_PICTURE_BYTES
    assert make_thumbnails(None, 2) == [None, None]
    assert len(set(make_thumbnails(wide[None], 3))) == 1
    with pytest.raises(ImageError, match="2 thumbnails for 3"):
        make_thumbnails(torch.zeros(2, 8, 8, 3), 3)
    with pytest.raises(LibraryError, match="at most"):
        read_thumbnail(bytes(MAX_PICTURE_BYTES + 1))
    with pytest.raises(LibraryError, match="96 pixels wide"):
        read_thumbnail(_jpeg(4000))
    with pytest.raises(LibraryError, match="damaged"):
        read_thumbnail(make_thumbnail(wide)[:60])


def _jpeg(side):
    """A flat picture, small as a file and large when unpacked."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "JPEG", quality=1)
    return file.getvalue()[:MAX_PICTURE_BYTES]
