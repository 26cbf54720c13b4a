"""A folder of pictures becomes a dataset: what is in it, what is left out, and who is who."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.data.catalogue import Catalogue
from difflora_core.data.choices import ChoiceSettings
from difflora_core.data.contact_sheet import ROWS
from difflora_core.data.looker import face_encoder
from difflora_core.data.prepare import prepare
from difflora_core.data.prepared import FACTS, PreparedDataset
from difflora_core.demo.paths import FACES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_pairs
from difflora_core.errors import ConfigError, DatasetError

PEOPLE = ("anna", "bodo", "Žofie 🙂")


def contents(folder):
    """Digest of every file of a dataset, without what is kept for going on."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "work"
    }


def dropped(folder):
    """What was left out: source to kind."""
    lines = (folder / "dropped.jsonl").read_text("utf-8").splitlines()
    return {entry["source"]: entry["kind"] for entry in map(json.loads, lines)}


def test_folders_of_people_become_rows(people_folder, tmp_path, demo_config, portraits):
    """Rows are sorted; the picture, the face and its place are those of the files."""
    data = prepare(people_folder, tmp_path / "set", demo_config)
    assert [person.name for person in data.people] == list(PEOPLE)
    assert [person.count for person in data.people] == [4, 4, 4]
    assert not dropped(data.folder)
    encoder = face_encoder(str(FACES), "cpu")
    for row, original in zip(data, [p for own in portraits for p in own], strict=True):
        pixels = torch.from_numpy(np.asarray(original).copy())
        assert torch.equal((row.picture * 255).round().byte(), pixels)
        (face,) = encoder.detect(pixels)
        unit = torch.nn.functional.normalize(face.embedding, dim=0)
        assert torch.allclose(row.face, unit, atol=1e-6)
        assert torch.allclose(row.box, face.box, atol=1e-4)
        assert torch.allclose(row.keypoints, face.keypoints, atol=1e-4)
        assert row.captions == ("a photo of a person",)
        assert row.bucket == (64, 64)
        assert row.time_ids() == [64, 64, 0, 0, 64, 64]
    assert list(data.buckets) == [(64, 64)]


def test_datasets_reads_the_folder(people_folder, tmp_path, demo_config):
    """The library's own reader sees the same rows, pictures included."""
    datasets = pytest.importorskip("datasets")
    data = prepare(people_folder, tmp_path / "set", demo_config)
    table = datasets.load_from_disk(str(data.folder))
    assert len(table) == len(data) == 12
    for row, values in zip(data, table, strict=True):
        assert values["person"] == row.person
        assert np.array_equal(
            np.asarray(values["picture"]), (row.picture * 255).round().byte().numpy()
        )


def test_a_second_run_does_nothing(people_folder, tmp_path, demo_config, monkeypatch):
    """What is there is neither looked at nor written again."""
    data = prepare(people_folder, tmp_path / "set", demo_config)
    before = {path: path.stat().st_mtime_ns for path in data.folder.glob("*.*")}
    monkeypatch.setattr("difflora_core.data.looker.open_picture", lambda *_: pytest.fail("opened"))
    assert prepare(people_folder, data.folder, demo_config).facts == data.facts
    assert {path: path.stat().st_mtime_ns for path in data.folder.glob("*.*")} == before


def test_workers_make_the_same_files(people_folder, tmp_path, demo_config):
    """Two processes, and one, byte for byte."""
    prepare(people_folder, tmp_path / "one", demo_config)
    prepare(people_folder, tmp_path / "two", demo_config, workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_nobody_named_people_are_found(tmp_path, demo_config, portraits):
    """Pictures of three people in one folder, mixed, fall into three people."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for person, own in enumerate(portraits):
        for number, picture in enumerate(own):
            picture.save(folder / f"{number}-{person}.png")
    data = prepare(folder, tmp_path / "set", demo_config)
    assert [person.name for person in data.people] == [f"person-{k:06d}" for k in (1, 2, 3)]
    for person in data.people:
        assert len({data[row].source.split("-")[1] for row in person.rows}) == 1


def test_strangers_and_duplicates_go(people_folder, tmp_path, demo_config, portraits):
    """Somebody else's picture in a folder, and the same picture once more, larger."""
    portraits[1][0].save(people_folder / "anna" / "stranger.png")
    portraits[0][2].resize((96, 96)).save(people_folder / "anna" / "again.jpg")
    data = prepare(people_folder, tmp_path / "set", demo_config)
    assert dropped(data.folder) == {"anna/stranger.png": "stranger", "anna/2.png": "duplicate"}
    assert data.people[0].count == 4
    assert data.facts.counts == {"pictures": 14, "duplicate": 1, "stranger": 1}


def test_two_people_in_every_picture(tmp_path, demo_config):
    """The one whom all pictures have is meant; where both are in all, a note says so."""
    seeds = split_seeds("test", 4)
    folder = tmp_path / "pairs"
    for name, others in (("anna", seeds[1:4]), ("bodo", [seeds[1]] * 3)):
        (folder / name).mkdir(parents=True)
        drawn = render_pairs([seeds[0]] * 3, others, [0, 1, 2]).images
        for number, pixels in enumerate((drawn * 255).round().byte().numpy()):
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    data = prepare(folder, tmp_path / "set", demo_config)
    assert [person.name for person in data.people] == ["anna", "bodo"]
    assert len(data.facts.notes) == 1
    assert data.facts.notes[0].startswith("bodo: 2 people")
    for row in data.people[0].rows:
        picture = data[row]
        assert picture.faces == 2
        assert picture.framing == "face"
        assert picture.likeness > 0.8
        assert 0 <= picture.box[0] < picture.box[2] <= 64
    several = replace(demo_config, choices=ChoiceSettings(0.5, "drop"))
    with pytest.raises(DatasetError, match="No picture is left"):
        prepare(folder, tmp_path / "none", several)


def test_single_pictures_and_no_faces(tmp_path, demo_config, portraits):
    """A person with one picture is kept, unless more are asked for; a picture of nothing goes."""
    (tmp_path / "photos" / "anna").mkdir(parents=True)
    portraits[0][0].save(tmp_path / "photos" / "anna" / "one.png")
    Image.new("RGB", (80, 80), "green").save(tmp_path / "photos" / "anna" / "wall.png")
    data = prepare(tmp_path / "photos", tmp_path / "set", demo_config)
    assert len(data) == 1
    assert data[0].likeness == 1
    assert dropped(data.folder) == {"anna/wall.png": "faceless"}
    few = replace(demo_config, choices=ChoiceSettings(0.5, fewest=2))
    with pytest.raises(DatasetError, match="1 faceless, 1 too few"):
        prepare(tmp_path / "photos", tmp_path / "few", few)


def test_without_a_face_package_names_count(people_folder, tmp_path, demo_config):
    """Nobody looks for faces: every picture of a name stays, and says that nobody looked."""
    data = prepare(people_folder, tmp_path / "set", replace(demo_config, faces=""))
    assert [person.count for person in data.people] == [4, 4, 4]
    assert data[0].face is None
    assert data[0].faces == 0
    assert data.facts.face_encoder == ""


def test_a_change_of_the_pictures_is_noticed(people_folder, tmp_path, demo_config, portraits):
    """By content: a touched file is the same, an edited one is not, until an update is asked."""
    folder = tmp_path / "set"
    prepare(people_folder, folder, demo_config)
    first = contents(folder)
    file = people_folder / "anna" / "0.png"
    file.touch()
    prepare(people_folder, folder, demo_config)
    portraits[0][0].rotate(3).save(file)
    (people_folder / "bodo" / "3.png").unlink()
    for _ in range(2):  # not only the first time
        with pytest.raises(DatasetError, match="the pictures have changed"):
            prepare(people_folder, folder, demo_config)
    assert contents(folder) == first
    assert len(prepare(people_folder, folder, demo_config, update=True)) == 11
    prepare(people_folder, tmp_path / "anew", demo_config)
    assert contents(folder) == contents(tmp_path / "anew")


def test_other_settings_are_noticed(people_folder, tmp_path, demo_config):
    """A dataset of other settings is not replaced unless an update is asked for."""
    data = prepare(people_folder, tmp_path / "set", demo_config)
    other = replace(demo_config, template="a drawing of {person}")
    with pytest.raises(DatasetError, match="the settings are others"):
        prepare(people_folder, data.folder, other)
    assert prepare(people_folder, data.folder, other, update=True)[0].captions == (
        "a drawing of anna",
    )


def test_captions_of_the_user_and_of_a_command(people_folder, tmp_path, demo_config):
    """A text beside a picture counts; a program captions the others, once."""
    (people_folder / "anna" / "0.txt").write_text("anna smiles\n\n anna   waves \n", "utf-8")
    program = tmp_path / "captioner.py"
    program.write_text(
        "import sys\nfrom PIL import Image\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "for line in sys.stdin:\n    print('a picture of', Image.open(line.strip()).size)\n",
        "utf-8",
    )
    command = f"{sys.executable} {program}"
    config = replace(demo_config, caption_command=command)
    data = prepare(people_folder, tmp_path / "set", config)
    assert data[0].captions == ("anna smiles", "anna waves")
    assert data[1].captions == ("a picture of (64, 64)",)
    prepare(people_folder, data.folder, config)
    assert (tmp_path / "calls").read_text("utf-8") == "x"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("no-such-program", "does not work"),
        (f"{sys.executable} -c 'print(1)'", "gave 1 lines for 12"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no card\")'", "no card"),
        ("'", "does not work"),
    ],
)
def test_a_command_that_fails_says_why(people_folder, tmp_path, demo_config, program, message):
    with pytest.raises(DatasetError, match=message):
        prepare(people_folder, tmp_path / "set", replace(demo_config, caption_command=program))


@pytest.mark.parametrize("template", ["", " {person} ", "a {photo}", "a photo {0}", "{person"])
def test_templates_that_say_nothing(people_folder, tmp_path, demo_config, template):
    with pytest.raises(DatasetError, match="template"):
        prepare(people_folder, tmp_path / "set", replace(demo_config, template=template))


def test_the_contact_sheet_shows_people_and_losses(people_folder, tmp_path, demo_config, portraits):
    """One sheet, a line a person; whoever lost most comes first; its number is bounded."""
    portraits[1][0].save(people_folder / "anna" / "stranger.png")
    data = prepare(people_folder, tmp_path / "set", demo_config)
    with Image.open(data.folder / "sheet-000.png") as sheet:
        assert sheet.width == 12 * 128
        assert sheet.height == 3 * (128 + 2 * 22)
        first = np.asarray(sheet)[22 : 22 + 128, :128]
    larger = np.asarray(portraits[1][0])
    middle = first[32:96, 32:96]  # the stranger is shown, not enlarged, in the middle
    assert np.abs(middle.astype(int) - larger).mean() < 2
    assert ROWS > 3
    none = prepare(people_folder, tmp_path / "none", replace(demo_config, sheets=0))
    assert not list(none.folder.glob("sheet-*"))


def test_a_dataset_that_is_not_whole_is_refused(people_folder, tmp_path, demo_config):
    """No facts, a shard gone or cut, facts edited: each with a sentence; prepare mends shards."""
    data = prepare(people_folder, tmp_path / "set", demo_config)
    shard = data.folder / data.facts.files[0].name
    whole = shard.read_bytes()
    data.check_file(0)
    shard.write_bytes(whole[:-100])
    with pytest.raises(DatasetError, match="was changed"):
        PreparedDataset(data.folder)
    prepare(people_folder, data.folder, demo_config)
    assert shard.read_bytes() == whole
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(DatasetError, match=rf"{shard.name} is damaged: .* Prepare the dataset"):
        PreparedDataset(data.folder).check_file(0)
    with pytest.raises(DatasetError, match="damaged"):
        PreparedDataset(data.folder)[0]
    shard.write_bytes(whole)
    facts = (data.folder / FACTS).read_text("utf-8")
    for wrong in ("{", "[]", facts.replace("difflora-dataset", "x"), facts.replace("data-", "../")):
        (data.folder / FACTS).write_text(wrong, "utf-8")
        with pytest.raises(DatasetError, match="damaged"):
            PreparedDataset(data.folder)
    (data.folder / FACTS).unlink()
    with pytest.raises(DatasetError, match="no prepared dataset"):
        PreparedDataset(data.folder)


def test_one_process_at_a_time(people_folder, tmp_path, demo_config):
    """A second prepare of the same folder says so at once."""

    def report(what, done, total):
        with pytest.raises(DatasetError, match="Another process"):
            prepare(people_folder, tmp_path / "set", demo_config)
        calls.append(what)

    calls = []
    prepare(people_folder, tmp_path / "set", demo_config, report=report)
    assert calls


def test_nothing_to_prepare(tmp_path, demo_config):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no pictures"):
        prepare(tmp_path / "empty", tmp_path / "set", demo_config)
    with pytest.raises(DatasetError, match="nothing at"):
        prepare(tmp_path / "nowhere", tmp_path / "set", demo_config)
    (tmp_path / "file").write_text("x", "utf-8")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "x.png")
    with pytest.raises(DatasetError, match="written"):
        prepare(tmp_path / "photos", tmp_path / "file", demo_config)


def test_a_picture_that_changes_meanwhile(people_folder, tmp_path, demo_config):
    """Between the look and the writing: the run stops and says which."""

    def report(what, done, total):
        if what == "telling people apart":
            shutil.copy(people_folder / "bodo" / "0.png", people_folder / "anna" / "1.png")

    with pytest.raises(DatasetError, match=r"anna/1\.png was changed"):
        prepare(people_folder, tmp_path / "set", demo_config, report=report)
    assert not (tmp_path / "set" / FACTS).exists()


def test_a_damaged_catalogue_says_so(people_folder, tmp_path, demo_config):
    data = prepare(people_folder, tmp_path / "set", demo_config)
    (data.folder / "work" / "catalogue.sqlite3").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DatasetError, match="delete its folder"):
        prepare(people_folder, data.folder, demo_config)


@pytest.mark.parametrize("most", [4096, 150_000])
def test_a_full_disk_says_so_and_the_next_run_goes_on(tmp_path, demo_config, most):
    """Files that cannot grow stand for it: the catalogue, then a file of pictures."""
    resource = pytest.importorskip("resource")
    draw = np.random.default_rng(0)
    for number in range(4):
        noise = draw.integers(0, 255, (128, 128, 3), dtype=np.uint8)
        path = tmp_path / "photos" / "anna" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    config = replace(demo_config, faces="", resolution=128)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        with pytest.raises(DatasetError, match="Free space" if most < 10_000 else "data-00000"):
            prepare(tmp_path / "photos", tmp_path / "set", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert not (tmp_path / "set" / FACTS).exists()
    assert not list((tmp_path / "set").glob("*.arrow"))
    assert len(prepare(tmp_path / "photos", tmp_path / "set", config)) == 4
    prepare(tmp_path / "photos", tmp_path / "whole", config)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_pictures_of_a_person_are_found_by_an_index(tmp_path):
    """A search of all pictures for each person would take days for a million of them."""
    catalogue = Catalogue(tmp_path / "work" / "catalogue.sqlite3")
    for query, index in (
        ("SELECT * FROM picture WHERE refused='' AND reason='' AND person=? ORDER BY key", "named"),
        ("SELECT * FROM choice WHERE person=? AND kind='' ORDER BY person, key", "chosen"),
    ):
        (plan,) = catalogue._db.execute(f"EXPLAIN QUERY PLAN {query}", ("anna",)).fetchall()
        assert "SEARCH" in plan[-1]
        assert index in plan[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("resolution", 8), ("face_margin", 0.5), ("encoding", "gif"), ("sheets", -1)],
)
def test_settings_out_of_range(demo_config, name, value):
    with pytest.raises(ConfigError):
        replace(demo_config, **{name: value})
