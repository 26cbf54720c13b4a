"""`prepare` on the command line: a folder of photos becomes a dataset, and it says what became."""

import json

import pytest
import torch

from difflora_core.commands.inspect import facts_of
from difflora_core.commands.main import main
from difflora_core.data.encodings import Latents, Prompts
from difflora_core.data.prepared import PreparedDataset
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.paths import BASE, FACES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.storage.image_files import write_image


@pytest.fixture
def photos(tmp_path):
    """Two people with three pictures each, and a file that is none."""
    for name, seed in zip(("anna", "bodo"), split_seeds("test", 2), strict=True):
        for number, image in enumerate(render_portraits([seed] * 3, range(3)).images):
            write_image(image, tmp_path / "photos" / name / f"{number}.png")
    (tmp_path / "photos" / "bodo" / "broken.jpg").write_bytes(b"")
    return tmp_path / "photos"


def words(photos, *more):
    """The command line."""
    return [
        *("prepare", str(photos), str(photos.parent / "set"), "--resolution", "64"),
        *("--faces", str(FACES), "--smallest-face", "12", "--encoding", "png", "--workers", "1"),
        *("--choices.same-person", "0.5", *more),
    ]


def test_prepare_tells_what_became_of_the_photos(photos, capsys):
    assert main(words(photos)) == 0
    said = capsys.readouterr().out
    assert "6 pictures of 2 people; left out: 1 unusable." in said
    assert "sheet-000.png" in said
    folder = photos.parent / "set"
    assert len(PreparedDataset(folder)) == 6
    assert json.loads((folder / "config.json").read_text("utf-8"))["resolution"] == 64
    (dropped,) = (folder / "dropped.jsonl").read_text("utf-8").splitlines()
    assert json.loads(dropped)["reason"] == "the file is empty"
    facts = facts_of(folder)
    assert facts["kind"] == "Prepared dataset"
    assert facts["pictures"] == "6"
    assert facts["face encoder"] == "demo_faces/rec_demo.onnx"
    assert main(words(photos, "--template", "a drawing")) == 1
    assert "settings are others" in capsys.readouterr().err
    assert main(words(photos, "--template", "a drawing", "--update")) == 0
    assert PreparedDataset(folder)[0].captions == ("a drawing",)
    (folder / "data-00000.arrow").write_bytes(b"x")
    assert main(["inspect", str(folder)]) == 1
    assert "was changed" in capsys.readouterr().err


def test_a_base_that_is_named_encodes(photos):
    """Latents and captions lie beside the pictures; a second call encodes nothing."""
    assert main(words(photos, "--base", "demo", "--mirrored")) == 0
    data = PreparedDataset(photos.parent / "set")
    latents, prompts = Latents(data), Prompts(data)
    base = load_base(BASE)
    for row, record in enumerate(data):
        expected = base.encode_images(record.picture[None].flip(2))[0]
        assert torch.allclose(latents.read(row, mirrored=True).float(), expected, atol=4e-3)
        assert prompts.of_row(row) == [1]
    files = {path: path.stat().st_mtime_ns for path in data.folder.glob("encoded/*/0*")}
    assert len(files) == 2
    assert main(words(photos, "--base", "demo")) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_prepare_refuses(photos, capsys):
    assert main(["prepare", str(photos / "none"), str(photos.parent / "set")]) == 1
    assert "nothing at" in capsys.readouterr().err
    assert main(words(photos, "--workers", "-1")) == 1
    assert "workers" in capsys.readouterr().err
