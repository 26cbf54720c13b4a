"""Every kind of source lists its pictures; what is wrong with an entry is a reason in a list."""

import json
import os

import pytest
from PIL import Image

from difflora_core.data.find_source import find_source
from difflora_core.data.folder_sources import FolderSource, MetadataSource
from difflora_core.data.table_sources import ArrowSource, ParquetSource, TableNames
from difflora_core.errors import DatasetError


def picture(path, colour="red"):
    """A small picture at a path whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def listed(source):
    """Entries by key."""
    entries = list(source.entries())
    found = {entry.key: entry for entry in entries}
    assert len(found) == len(entries)
    return found


def reason(source, place):
    """Why a place cannot be read."""
    with pytest.raises(DatasetError) as refusal:
        source.read(place)
    return str(refusal.value)


def test_folders_name_people(tmp_path):
    """The first folder is the person; hidden files and other files do not count."""
    picture(tmp_path / "anna" / "1.PNG")
    picture(tmp_path / "anna" / "deep" / "2.jpg")
    picture(tmp_path / "alone.webp")
    for name in (".hidden.png", "._1.png", "notes.md", ".git/x.png"):
        path = tmp_path / "anna" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    source = find_source(tmp_path)
    entries = listed(source)
    assert {key: entry.person for key, entry in entries.items()} == {
        "anna/1.PNG": "anna",
        "anna/deep/2.jpg": "anna",
        "alone.webp": "",
    }
    assert source.read(entries["alone.webp"].place) == (tmp_path / "alone.webp").read_bytes()


def test_kohya_folders_have_repeats(tmp_path):
    """Only where all folders are named so; a year is no number of repeats then."""
    picture(tmp_path / "10_anna" / "1.png")
    picture(tmp_path / "3_bodo karl" / "1.png")
    entries = listed(find_source(tmp_path))
    assert {(e.person, e.repeats) for e in entries.values()} == {("anna", 10), ("bodo karl", 3)}
    picture(tmp_path / "clara" / "1.png")
    assert isinstance(find_source(tmp_path), FolderSource)
    assert {e.person for e in find_source(tmp_path).entries()} == {
        "10_anna", "3_bodo karl", "clara",
    }  # fmt: skip


def test_captions_lie_beside_pictures(tmp_path):
    """In UTF-8, one a line; a text that is none makes the picture an entry with a reason."""
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "1.txt").write_bytes("\ufeffein  Bild\n\nmit Öl\n".encode())
    picture(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "2.caption").write_bytes(b"\xff\xfe bad")
    picture(tmp_path / "a" / "3.png")
    (tmp_path / "a" / "3.txt").write_bytes(b"x" * (2**20 + 5))
    picture(tmp_path / "a" / "4.png")
    (tmp_path / "a" / "4.txt").mkdir()
    entries = listed(find_source(tmp_path))
    assert entries["a/1.png"].captions == ("ein Bild", "mit Öl")
    assert "no text in UTF-8" in entries["a/2.png"].refused
    assert "1 MiB" in entries["a/3.png"].refused
    assert "cannot be read" in entries["a/4.png"].refused


def test_links_that_lead_out_are_refused(tmp_path):
    """Neither usable nor read; a link inside is a picture, a linked folder is not walked."""
    outside = picture(tmp_path / "outside" / "secret.png")
    root = tmp_path / "photos"
    inside = picture(root / "a" / "1.png")
    (root / "a" / "out.png").symlink_to(outside)
    (root / "a" / "in.png").symlink_to(inside)
    (root / "a" / "gone.png").symlink_to(root / "nothing.png")
    (root / "b").symlink_to(outside.parent, target_is_directory=True)
    (root / "round").symlink_to(root, target_is_directory=True)
    source = FolderSource(str(root))
    entries = listed(source)
    assert set(entries) == {"a/1.png", "a/out.png", "a/in.png", "a/gone.png"}
    assert "outside" in entries["a/out.png"].refused
    assert not entries["a/in.png"].refused
    assert "outside" in reason(source, b"a/out.png")
    assert "gone" in reason(source, b"a/gone.png")
    assert "outside" in reason(source, b"../outside/secret.png")
    assert "gone" in reason(source, b"a")


def test_names_of_every_kind(tmp_path):
    """Unicode in two forms is one person; bytes that are no UTF-8 and very long names are read."""
    picture(tmp_path / "Zoë" / "1.png")
    picture(tmp_path / "Zoe\u0308" / "2.png")
    raw = os.path.join(os.fsencode(tmp_path), b"\xff\xfename")
    os.mkdir(raw)
    (tmp_path / "Zoë" / "1.png").rename(os.fsdecode(os.path.join(raw, b"\xe9.png")))
    picture(tmp_path / "Zoë" / "3.png")
    long = picture(tmp_path / ("🙂" * 60) / ("x" * 240 + ".png"))
    source = FolderSource(str(tmp_path))
    entries = listed(source)
    assert {entry.person for entry in entries.values()} == {"Zoë", "🙂" * 60, "\\xff\\xfename"}
    for entry in entries.values():
        entry.key.encode()
        assert source.read(entry.place) == long.read_bytes()


def test_metadata_lists_pictures(tmp_path):
    """A line a picture; each line that makes no sense is an entry with its reason."""
    picture(tmp_path / "train" / "1.png")
    picture(tmp_path.parent / "out.png")
    lines = [
        {"file_name": "train/1.png", "person": "anna", "text": " a\nphoto ", "repeats": 4},
        {"file_name": "train/none.png"},
        {"file_name": "../out.png"},
        {"file_name": str(tmp_path.parent / "out.png")},
        {"file_name": "train/1.png\0"},
        {"text": "no name"},
        ["list"],
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n{broken\n" + "[" * 100000 + "\n"
    (tmp_path / "metadata.jsonl").write_text(text, "utf-8")
    source = find_source(tmp_path)
    assert isinstance(source, MetadataSource)
    entries = list(source.entries())
    first = entries[0]
    assert (first.person, first.captions, first.repeats) == ("anna", ("a photo",), 4)
    assert not first.refused
    assert source.read(first.place)
    assert [bool(entry.refused) for entry in entries[1:]] == [True] * 8
    assert "no such file" in entries[1].refused
    assert "outside" in entries[2].refused
    assert "outside" in entries[3].refused


@pytest.mark.parametrize("repeats", [0, -1, 1e9, "many", True, None, 10**30])
def test_repeats_that_are_none(tmp_path, repeats):
    picture(tmp_path / "1.png")
    line = json.dumps({"file_name": "1.png", "repeats": repeats})
    (tmp_path / "metadata.jsonl").write_text(line, "utf-8")
    (entry,) = find_source(tmp_path).entries()
    assert entry.refused
    assert entry.repeats == 1


@pytest.fixture
def rows(tmp_path):
    """Columns of a table of pictures, as `datasets` stores them."""
    colours = ("red", "green", "blue")
    data = [picture(tmp_path / "raw" / f"{c}.png", c).read_bytes() for c in colours]
    return {
        "image": [{"bytes": bytes_, "path": "x.png"} for bytes_ in data],
        "label": [3, 3, 4],
        "text": ["one", "two", ""],
    }, data


def test_parquet_tables(tmp_path, rows):
    """Row groups are read one at a time; a cell may hold a path, nothing, or nonsense."""
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    columns, data = rows
    columns["image"] += [{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"", "path": None}]
    columns["label"] += [None, 5]
    columns["text"] += [None, "x"]
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "train-0.parquet"
    parquet.write_table(arrow.table(columns), file, row_group_size=2)
    source = find_source(tmp_path / "set")
    assert isinstance(source, ParquetSource)
    entries = list(listed(source).values())
    assert [entry.person for entry in entries] == ["3", "3", "4", "", "5"]
    assert [entry.captions for entry in entries] == [("one",), ("two",), (), (), ("x",)]
    assert [source.read(entry.place) for entry in entries[:3]] == data
    assert "path instead" in reason(source, entries[3].place)
    assert "empty" in reason(source, entries[4].place)
    one = find_source(file)
    assert [one.read(entry.place) for entry in list(one.entries())[:3]] == data
    with pytest.raises(DatasetError, match="no column face"):
        list(find_source(file, names=TableNames(picture="face")).entries())
    (tmp_path / "set" / "data" / "broken.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DatasetError, match="cannot be read as parquet"):
        list(find_source(tmp_path / "set").entries())


def test_datasets_on_disk(tmp_path, rows):
    """A dataset and a dictionary of splits, with decoded and plain columns."""
    datasets = pytest.importorskip("datasets")
    columns, data = rows
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(str(tmp_path / "two"))
    for folder, times in (("one", 1), ("two", 2)):
        source = find_source(tmp_path / folder)
        assert isinstance(source, ArrowSource)
        entries = list(listed(source).values())
        assert [entry.person for entry in entries] == ["3", "3", "4"] * times
        assert [source.read(entry.place) for entry in entries] == data * times
    (tmp_path / "one" / "state.json").write_text("{", "utf-8")
    with pytest.raises(DatasetError, match="cannot be read as a dataset"):
        list(find_source(tmp_path / "one").entries())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("metadata", r"no metadata\.jsonl"),
        ("parquet", "no parquet file"),
        ("arrow", "no dataset on disk"),
    ],
)
def test_a_kind_that_is_not_there(tmp_path, kind, message):
    with pytest.raises(DatasetError, match=message):
        find_source(tmp_path, kind)
