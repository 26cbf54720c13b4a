"""Portraits to pictures: places in a workflow, what is drawn, what is kept."""

import json

import numpy as np
import pytest
from PIL import Image

from difflora_core.data.drawn_people import (
    DrawnConfig,
    DrawnFilter,
    drawings,
    find_portraits,
    keep_drawing,
)
from difflora_core.data.generator_workflow import read_prompts, read_workflow
from difflora_core.data.looks import SeenFace
from difflora_core.demo.paths import ROOT
from difflora_core.errors import DatasetError

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "{portrait}"}},
    "2": {"class_type": "Text", "inputs": {"text": "a photo, {prompt}, {seed}", "n": 3}},
    "3": {"class_type": "KSampler", "inputs": {"seed": "{seed}", "model": ["1", 0]}},
}


@pytest.fixture
def workflow(tmp_path):
    (tmp_path / "w.json").write_text(json.dumps(GRAPH))
    return read_workflow(tmp_path / "w.json")


def noise(seed, size=(40, 30)):
    """A picture of coarse noise: each is far from the others by its perceptual hash."""
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def test_places_are_filled(workflow):
    filled = workflow.filled("a.png", "in {seed} a park", 7)
    assert filled["1"]["inputs"]["image"] == "a.png"
    assert filled["3"]["inputs"] == {"seed": 7, "model": ["1", 0]}
    assert filled["2"]["inputs"]["n"] == 3
    assert workflow.graph == GRAPH  # as it was


def test_a_prompt_holds_no_places(workflow):
    """Words of a prompt that look like a place are words."""
    assert workflow.filled("a.png", "{portrait} {seed}", 7)["2"]["inputs"]["text"] == (
        "a photo, {portrait} {seed}, 7"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "w.json"),
        ("[]", "no workflow in API form"),
        ('{"nodes": [], "links": []}', "Export it in API form"),
        (
            '{"1": {"class_type": "A", "inputs": {"x": "{seed}{prompt}"}}}',
            "no place for {portrait}",
        ),
        ('{"1": {"class_type": "A"}}', "no workflow in API form"),
    ],
)
def test_workflows_that_cannot_be_used(tmp_path, content, said):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(DatasetError, match=said.replace("{", r"\{").replace("(", r"\(")):
        read_workflow(tmp_path / "w.json")


def test_one_picture_counts(tmp_path, workflow):
    assert workflow.shows is None
    saves = {n: {"class_type": "SaveImage", "inputs": {}} for n in ("7", "8")}
    (tmp_path / "w.json").write_text(json.dumps({**GRAPH, "7": saves["7"]}))
    assert read_workflow(tmp_path / "w.json").shows == "7"
    (tmp_path / "w.json").write_text(json.dumps(GRAPH | saves))
    with pytest.raises(DatasetError, match="in several nodes"):
        read_workflow(tmp_path / "w.json")


def test_shipped_workflows_have_their_places():
    for path in (ROOT / "workflows" / "api").glob("*.json"):
        read_workflow(path)


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n  two \n")
    assert read_prompts(tmp_path / "p.txt") == ("one", "two")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(DatasetError, match="no prompt"):
        read_prompts(tmp_path / "p.txt")


def test_portraits(tmp_path):
    """Turned by EXIF, named by their place, unreadable ones listed, two of one name refused."""
    source, folder = tmp_path / "in", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(1).save(source / "anna.jpg", exif=exif)
    noise(2).save(source / "more" / "bodo.png")
    (source / "bad.png").write_bytes(b"nothing")
    found, useless = find_portraits(source, folder)
    assert [p.name for p in found] == ["anna", "more-bodo"]
    assert Image.open(found[0].file).size == (30, 40)
    assert set(useless) == {"bad.png"}
    noise(3).save(source / "anna.png")
    with pytest.raises(DatasetError, match="Two portraits are called anna"):
        find_portraits(source, folder)


def test_drawings_are_known_by_what_they_are_made_from(tmp_path, workflow):
    (tmp_path / "in").mkdir()
    noise(1).save(tmp_path / "in" / "anna.png")
    (portrait,), _ = find_portraits(tmp_path / "in", tmp_path)
    made = drawings(portrait, workflow, ("a", "b"), 5, tmp_path)
    assert made == drawings(portrait, workflow, ("a", "b"), 5, tmp_path)
    assert len({d.file for d in made}) == len({d.seed for d in made}) == 5
    assert [d.prompt for d in made] == ["a", "b", "a", "b", "a"]
    assert drawings(portrait, workflow, ("a", "b"), 3, tmp_path) == made[:3]
    other = drawings(portrait, workflow, ("a", "c"), 5, tmp_path)
    assert [a.file == b.file for a, b in zip(made, other, strict=True)] == [True, False] * 2 + [
        True
    ]


def faces_of(directions):
    """A face analysis that knows pictures by their first pixel."""

    def find(picture):
        return [
            SeenFace(np.float32(direction).tobytes(), np.zeros(15, np.float32).tobytes())
            for direction in directions[picture.getpixel((0, 0))]
        ]

    return find


def test_what_is_kept(tmp_path, workflow):
    """Like the person, one face, not like another one; other settings take other pictures."""
    (tmp_path / "in").mkdir()
    noise(0).save(tmp_path / "in" / "anna.png")
    (portrait,), _ = find_portraits(tmp_path / "in", tmp_path)
    made = drawings(portrait, workflow, ("x",), 6, tmp_path)
    pictures = [noise(1), noise(2), noise(3), noise(4), noise(1).resize((80, 60)), noise(5)]
    for drawing, picture in zip(made, pictures, strict=True):
        keep_drawing(drawing, picture)
    like, unlike = (1.0, 0.0), (0.2, 0.98)
    found = [[like], [unlike], [], [like, like], [like], [like]]
    known = {p.getpixel((0, 0)): f for p, f in zip(pictures, found, strict=True)}
    known[noise(0).getpixel((0, 0))] = [like]
    choose = DrawnFilter(tmp_path, DrawnConfig(likeness=0.5), faces_of(known), "j").choose
    reasons = choose(portrait, made)
    names = [d.file.relative_to(tmp_path).as_posix() for d in made]
    assert [reasons.get(name, "")[:20] for name in names] == [
        *("", "its likeness is 0.20", "it shows no face", "it shows 2 faces"),
        *("it is nearly the sam", ""),
    ]
    folder = tmp_path / "pictures" / "anna"
    kept = {made[0].file.name, made[5].file.name}
    assert {p.name for p in folder.glob("*.png")} == {"portrait.png", *kept}
    assert {p.read_text() for p in folder.glob("*.txt")} == {"x\n"}
    blind = DrawnFilter(tmp_path, DrawnConfig(likeness=0.1), faces_of({}), "j")
    blind.faces = lambda picture: faces_of(known)(noise(0)) if picture.size == (40, 30) else 1 / 0
    assert names[1] not in blind.choose(portrait, made)  # what was seen is not looked at again
    loose = DrawnFilter(tmp_path, DrawnConfig(same=-1), None, "none")
    assert loose.choose(portrait, made) == {}
    assert len(list(folder.glob("*.png"))) == 7
    nobody = DrawnFilter(tmp_path, DrawnConfig(), lambda picture: [], "j2")
    assert nobody.choose(portrait, made) == {"anna": "the portrait shows no face"}
    assert not folder.exists()
