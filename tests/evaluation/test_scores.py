"""Columns of an evaluation against plain float64 loops, and what is kept of what was seen."""

import math

import numpy as np
import pytest
import torch

from difflora_core.errors import ConfigError, ImageError
from difflora_core.evaluation.page import html_page
from difflora_core.evaluation.pictures import Cell, foreign_pictures, is_drawn, keep
from difflora_core.evaluation.protocol import FOLDER, Prompt, Protocol, chosen_people, read_protocol
from difflora_core.evaluation.report import Interval
from difflora_core.evaluation.scores import Eyes, Known, Shown, columns
from difflora_core.storage.image_files import read_image, read_texts, write_image

PEOPLE = 3
OWNERS = [0, 0, 0, 0, 1, 1, 1, 2]
CELLS = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (0, 0)]
PHOTO_OWNERS = [0, 0, 0, 1, 1, 2]
GIVEN = [True, False, False, True, False, True]


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def mean_by_person(values):
    """{person: mean} of a list of (person, value)."""
    found = {}
    for person, value in values:
        found.setdefault(person, []).append(value)
    return {person: sum(v) / len(v) for person, v in found.items()}


@pytest.fixture
def seen():
    g = torch.Generator().manual_seed(0)

    def draw(count, size):
        return torch.randn(count, size, generator=g)

    def faces(count, without):
        rows = torch.cat([torch.ones(count, 1), draw(count, 4)], 1)
        rows[without] = 0
        return rows

    row = {
        "DINO": draw(8, 5), "DINOv2": draw(8, 6), "faces": faces(8, [1, 6]),
        "CLIP": torch.nn.functional.normalize(draw(8, 7), dim=1).repeat(1, 2) + 0.1,
        "ImageReward": draw(8, 1), "pixels": torch.rand(8, 12, generator=g),
    }  # fmt: skip
    photos = {"DINO": draw(6, 5), "DINOv2": draw(6, 6), "CLIP": draw(6, 14), "faces": faces(6, [2])}
    return row, photos


@pytest.fixture
def found(seen):
    row, photos = seen
    shown = Shown((), tuple(OWNERS), ("",) * 8, tuple(CELLS))
    known = Known(photos, torch.tensor(PHOTO_OWNERS), torch.tensor(GIVEN))
    return columns(row, shown, known, PEOPLE)


def close(column, wanted):
    assert column.tolist() == pytest.approx([wanted[k] for k in range(PEOPLE)], abs=1e-6)


def test_likeness_of_pictures_is_the_mean_over_all_pairs(seen, found):
    row, photos = ({k: v.double().numpy() for k, v in part.items()} for part in seen)

    def pairs(pictures, references):
        return mean_by_person(
            (owner, cosine(picture, photo))
            for picture, owner in zip(pictures, OWNERS, strict=True)
            for photo, whose in zip(references, PHOTO_OWNERS, strict=True)
            if whose == owner
        )

    close(found["DINO"], pairs(row["DINO"], photos["DINO"]))
    mapped = {k: (1 + v) / 2 for k, v in pairs(row["DINOv2"], photos["DINOv2"]).items()}
    close(found["DINOv2"], mapped)
    close(found["CLIP-I"], pairs(row["CLIP"][:, :7], photos["CLIP"][:, :7]))
    texts = [float(a @ b) for a, b in zip(row["CLIP"][:, :7], row["CLIP"][:, 7:], strict=True)]
    close(found["CLIP-T"], mean_by_person(zip(OWNERS, texts, strict=True)))
    rewards = mean_by_person(zip(OWNERS, row["ImageReward"][:, 0], strict=True))
    close(found["ImageReward"], rewards)


def test_faces(seen, found):
    row, photos = ({k: v.double().numpy() for k, v in part.items()} for part in seen)

    def direction(person, given):
        chosen = [
            face[1:] / np.linalg.norm(face[1:])
            for face, owner, shown in zip(photos["faces"], PHOTO_OWNERS, GIVEN, strict=True)
            if owner == person and shown is given and face[0] > 0
        ]
        return np.mean(chosen, 0) if chosen else None

    def similarity(given):
        values = []
        for face, person in zip(row["faces"], OWNERS, strict=True):
            to = direction(person, given)
            value = math.nan if to is None else cosine(face[1:], to) if face[0] > 0 else 0.0
            values.append((person, value))
        return mean_by_person(values)

    close(found["Face Sim"], similarity(True))
    others = similarity(False)
    assert math.isnan(others[2])
    assert math.isnan(float(found["R-FaceSim"][2]))  # there is no other photo of the third
    assert found["R-FaceSim"][:2].tolist() == pytest.approx([others[0], others[1]], abs=1e-6)
    shown = mean_by_person(zip(OWNERS, row["faces"][:, 0], strict=True))
    close(found["face found"], shown)


def test_copy_paste_of_one_pair(seen, found):
    row, photos = ({k: v.double().numpy() for k, v in part.items()} for part in seen)
    given, other = photos["faces"][3, 1:], photos["faces"][4, 1:]

    def angle(a, b):
        return math.acos(cosine(a, b))

    values = [
        (angle(face[1:], other) - angle(face[1:], given)) / angle(given, other)
        for face, owner in zip(row["faces"], OWNERS, strict=True)
        if owner == 1 and face[0] > 0
    ]
    assert float(found["copy-paste"][1]) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_diversity_is_between_seeds_of_one_prompt(seen, found):
    pixels = seen[0]["pixels"].double().numpy()
    first, second = ((pixels[a] - pixels[b]) ** 2 for a, b in ((0, 1), (2, 3)))
    wanted = (first.mean() ** 0.5 + second.mean() ** 0.5) / 2
    assert float(found["diversity"][0]) == pytest.approx(wanted, abs=1e-6)
    only = ((pixels[4] - pixels[5]) ** 2).mean() ** 0.5
    assert float(found["diversity"][1]) == pytest.approx(only, abs=1e-6)
    assert math.isnan(float(found["diversity"][2]))


def test_nothing_is_looked_at_twice(tmp_path):
    for k in range(3):
        write_image(torch.full((8, 8, 3), k / 4), tmp_path / f"{k}.png")
    asked = []

    def network(pictures, prompts):
        asked.extend(prompts)
        return torch.stack([p.mean()[None] for p in pictures])

    def look(digest="1", prompts=("a", "b", "c")):
        shown = Shown(tuple(tmp_path / f"{k}.png" for k in range(3)), (0,) * 3, prompts, ())
        eyes = Eyes({"network": network}, {"network": digest}, tmp_path / "seen")
        return eyes.look("row", shown, lambda done, total: None)["network"][:, 0].tolist()

    wanted = pytest.approx([0, 0.25, 0.5], abs=0.003)
    assert look() == wanted == look()
    assert asked == ["a", "b", "c"]
    (tmp_path / "seen" / "row" / "network.safetensors").write_bytes(b"damaged")
    assert look() == wanted
    look("2")
    look("2", ("a", "b", "x"))
    write_image(torch.ones(8, 8, 3), tmp_path / "0.png")
    assert look("2", ("a", "b", "x"))[0] == 1
    assert len(asked) == 15  # damage, another network, another prompt, another picture


def test_a_picture_is_known_by_its_content(tmp_path):
    cell = Cell("anna", 2, 0)
    assert cell.path(tmp_path) == tmp_path / "anna" / "03-1.png"
    image = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(1))
    assert not is_drawn(cell.path(tmp_path), "key")
    keep(image, cell.path(tmp_path), "key", {"prompt": "Öl — a person"})
    assert is_drawn(cell.path(tmp_path), "key")
    assert not is_drawn(cell.path(tmp_path), "other")
    texts = read_image(cell.path(tmp_path))[1]
    assert texts["prompt"] == "Öl — a person"
    assert read_texts(cell.path(tmp_path)) == texts
    changed = read_image(cell.path(tmp_path))[0]
    changed[0, 0, 0] = 1 - changed[0, 0, 0]
    write_image(changed, cell.path(tmp_path), texts)
    assert not is_drawn(cell.path(tmp_path), "key")
    cell.path(tmp_path).write_bytes(cell.path(tmp_path).read_bytes()[:60])
    assert not is_drawn(cell.path(tmp_path), "key")


def test_pictures_of_other_programs(tmp_path):
    names = ("01-1.png", "2-1_00001_.png", "02-02-again.jpg", "03-1.png", "1-3.png", "notes.txt")
    for name in names:
        (tmp_path / "anna").mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / "anna" / name).write_text("x")
        else:
            write_image(torch.rand(8, 8, 3), tmp_path / "anna" / name)
    found = foreign_pictures(tmp_path, ["anna", "bert"], 2, 2)
    assert {(c.prompt, c.seed): p.name for c, p in found.items()} == {
        (0, 0): "01-1.png", (1, 0): "2-1_00001_.png", (1, 1): "02-02-again.jpg",
    }  # fmt: skip
    write_image(torch.rand(8, 8, 3), tmp_path / "anna" / "1-1-b.png")
    with pytest.raises(ImageError, match="both prompt 1, seed 1"):
        foreign_pictures(tmp_path, ["anna"], 2, 2)
    with pytest.raises(ImageError, match="PERSON/PROMPT-SEED"):
        foreign_pictures(tmp_path, ["bert"], 2, 2)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_protocols(path):
    """25 people, and 30 different prompts: 10 of places, 10 of clothes, 5 and 5 others."""
    protocol = read_protocol(path.stem)
    assert protocol == read_protocol(str(path))
    assert protocol.count == 25
    assert len(protocol.people) in (0, 25)
    assert len({prompt.text for prompt in protocol.prompts}) == 30
    kinds = [prompt.kind for prompt in protocol.prompts]
    assert [kinds.count(kind) for kind in dict.fromkeys(kinds)] == [10, 10, 5, 5]
    assert protocol.text(0, "xyz").startswith("xyz, ")
    assert "{" not in protocol.text(0)


def test_noise_is_the_same_for_every_model_and_different_in_every_picture():
    protocol = Protocol((Prompt("{person}"), Prompt("{person} at sea")), seeds=2)
    seeds = [protocol.noise_seed(who, *cell) for who in ("a", "b") for cell in protocol.cells]
    assert len(set(seeds)) == 8
    assert protocol.noise_seed("a", 0, 1) == seeds[1]


def test_protocols_that_do_not_work(tmp_path):
    (tmp_path / "p.json").write_text('{"prompts": [{"text": "a photo"}]}')
    for name, said in ((str(tmp_path / "p.json"), "lacks {person}"), ("gone", "demo, sdxl")):
        with pytest.raises(ConfigError, match=said):
            read_protocol(name)
    protocol = Protocol((Prompt("{person}"),), people=("a", "b"))
    with pytest.raises(ConfigError, match="have no folder"):
        chosen_people(protocol, ["a"])
    assert chosen_people(protocol, ["b", "c", "a"]) == ["a", "b"]


def test_the_page_says_names_as_they_are():
    page = html_page(
        "<b>", {"a & b": {"X": Interval(0.5, 0.4, 0.6), "Y": math.nan}}, ["<i>"], ["p"],
        {"<p>": {"a & b": [None]}},
    )  # fmt: skip
    assert "a &amp; b" in page
    assert "0.400 to 0.600" in page
    assert not any(text in page for text in ("<b>", "<i>", "<p>", "nan"))
