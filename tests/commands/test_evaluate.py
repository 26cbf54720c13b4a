"""`evaluate` in the demo world: killed and gone on with, every kind of row, and what it refuses."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from difflora_core.commands.evaluate import Settings, run
from difflora_core.commands.evaluate_backbones import Backbones
from difflora_core.commands.main import plain_console
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.demo.networks.base import demo_layout
from difflora_core.errors import ConfigError, DiffLoRAError
from difflora_core.storage.image_files import read_image, write_image

MODEL, LORA = str(paths.DIFFLORA), str(paths.OLD_LORA)
SMALL = {
    "faces": str(paths.FACES),
    "clip_vision": str(paths.CLIP_VISION),
    "first_people": 2,
    "first_prompts": 2,
    "seeds": 2,
    "steps": 2,
    "batch": 3,
}


def settings(folder, *rows, **given):
    return Settings(str(folder), rows, **{**SMALL, **given})


def pictures(folder):
    """Every picture of a run, by its place: what the file holds, and when it was written."""
    files = sorted((folder / "pictures").rglob("*.png"))
    return {str(f.relative_to(folder)): (read_image(f), f.stat().st_mtime_ns) for f in files}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name][0][0], other[name][0][0]) for name in one
    )


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """A run of every kind of row, with the demo world's judge."""
    folder = tmp_path_factory.mktemp("evaluate")
    loras = folder / "loras"
    loras.mkdir()
    for name in ("100000", "100001"):
        shutil.copy(LORA, loras / f"{name}.safetensors")
    foreign = folder / "foreign" / "100001"
    for number, name in enumerate(("01-1.png", "02-1_00001_.png")):
        write_image(torch.full((80, 80, 3), number / 2), foreign / name)
    rows = (f"model={MODEL}", f"lora={LORA}", f"each={loras}", f"other program={foreign.parent}")
    run(settings(folder / "run", *rows, backbones=Backbones(faces="demo")), plain_console())
    return folder / "run"


def test_the_table(straight):
    report = json.loads((straight / "report.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["base", "model", "lora", "each", "other program"]
    assert [row["pictures"] for row in rows.values()] == [8, 8, 8, 8, 2]
    assert rows["lora"]["Face Sim"] == rows["each"]["Face Sim"]
    assert rows["model"]["Face Sim"] != rows["base"]["Face Sim"]
    assert rows["model"]["LoRA seconds"] > 0
    assert "LoRA seconds" not in rows["lora"]
    assert rows["other program"]["face found"] == 0  # grey squares
    assert rows["other program"]["Face Sim"] == 0
    assert report["people"] == ["100000", "100001"]
    assert len(report["per_person"]["model"]["Face Sim"]) == 2
    low, high = report["interval_95"]["model"]["Face Sim"]
    assert low <= rows["model"]["Face Sim"] <= high
    assert "FID, KID left out: --backbones.inception" in report["left_out"]
    log = (straight / "log.txt").read_text()
    assert "2 people, 2 prompts, 2 seeds; the protocol asks for 25, 30 and 2." in log
    assert "other program: 2 of 8 pictures are there" in log
    digest = next(iter(report["backbones"]["faces embedder.safetensors"].values()))
    assert f"SHA-256 {digest}" in log
    assert "| model |" in (straight / "report.md").read_text()


def test_the_page_shows_the_pictures(straight):
    page = (straight / "report.html").read_text()
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 2 * 4 * 2 + 2 + 2  # each person's photo too
    for source in sources:
        with Image.open(straight / source.replace("%20", " ")) as opened:
            assert opened.width in (64, 80)


def test_a_lora_changes_pictures_and_strength_0_does_not(straight, tmp_path):
    drawn = pictures(straight)
    one = settings(tmp_path, f"lora={LORA}", strengths=(0.0, 1.0), first_people=1)
    run(one, plain_console())
    own = pictures(tmp_path)
    for name, ((image, _), _) in own.items():
        row = "lora" if "x 1" in name else "base"
        again = drawn[re.sub(r"pictures/[^/]+", f"pictures/{row}", name)][0][0]
        assert torch.equal(image, again), name
    base, lora = (drawn[f"pictures/{row}/100000/01-1.png"][0][0] for row in ("base", "lora"))
    assert (base - lora).abs().mean() > 0.01


def test_called_again_it_draws_what_is_missing_or_changed(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    before = pictures(tmp_path / "run")
    gone, changed = "pictures/model/100001/02-2.png", "pictures/base/100000/01-1.png"
    (tmp_path / "run" / gone).unlink()
    with Image.open(tmp_path / "run" / changed) as picture:
        picture.rotate(90).save(tmp_path / "run" / changed)
    again = settings(tmp_path / "run", f"model={MODEL}", backbones=Backbones(faces="demo"))
    run(again, plain_console())
    after = pictures(tmp_path / "run")
    assert same(before, after)
    assert {n for n in after if after[n][1] != before[n][1]} == {gone, changed}


def test_another_setting_draws_anew(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    before = pictures(tmp_path / "run")
    run(settings(tmp_path / "run", steps=3, first_people=1), plain_console())
    after = pictures(tmp_path / "run")
    changed = {n for n in after if not torch.equal(after[n][0][0], before[n][0][0])}
    assert changed == {n for n in after if n.startswith("pictures/base/100000/")}


def test_killed_it_goes_on_to_the_same_pictures(straight, tmp_path):
    words = [str(tmp_path / "run"), f"model={MODEL}"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "difflora_core", "evaluate", *words],
        cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first = tmp_path / "run" / "pictures" / "base" / "100001" / "01-1.png"
    deadline = time.monotonic() + 250
    while not first.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "report.json").exists()
    run(settings(tmp_path / "run", f"model={MODEL}"), plain_console())
    wanted = {n: p for n, p in pictures(straight).items() if n.split("/")[1] in ("base", "model")}
    assert same(pictures(tmp_path / "run"), wanted)


@pytest.fixture
def outline(tmp_path):
    """The demo's face package with a model of 106 points beside it, which HyperLoRA needs."""
    path = paths.ROOT / "tests" / "vision" / "conftest.py"
    spec = importlib.util.spec_from_file_location("faces_with_points", path)
    points = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(points)
    shutil.copytree(paths.FACES, tmp_path / "outline")
    onnx.save(points._landmarks(), tmp_path / "outline" / "landmarks.onnx")
    return tmp_path / "outline"


def test_a_hyperlora_folder_with_its_words(tmp_path, write_hyperlora, outline):
    """On the demo base: its layers, and its trigger words before every prompt."""
    modules = {
        f"lora_unet_{own.name.removesuffix('.to_k').replace('.', '_')}": (
            own.out_features,
            None if own.in_features == own.out_features else own.in_features,
        )
        for own in demo_layout()
        if own.name.endswith(".to_k")
    }
    face, image = demo_encoders()
    tokens = image.encode(torch.zeros(1, 64, 64, 3))[1].shape[-1]
    sizes = {"depth": 1, "face": face.embedding_dim, "image": tokens}
    folder = write_hyperlora(tmp_path / "hyper", modules, **sizes)
    few = {"first_people": 1, "first_prompts": 1, "seeds": 1, "faces": str(outline)}
    run(settings(tmp_path / "run", f"hyper={folder}", **few), plain_console())
    image, texts = read_image(tmp_path / "run/pictures/hyper/100000/01-1.png")
    assert texts["prompt"].startswith("fcsks fxhks fhyks, photo of a person")
    assert not torch.equal(image, read_image(tmp_path / "run/pictures/base/100000/01-1.png")[0])


def test_sdxl_of_a_folder_with_a_lora_of_convolutions(tmp_path, tiny_sdxl):
    """bfloat16, DPM++ 2M on Karras' levels with guidance, and a LoRA as kohya's LoCon writes it."""
    folder, pipe = tiny_sdxl
    write_image(torch.rand(64, 64, 3), tmp_path / "people" / "anna" / "1.png")
    generator = torch.Generator().manual_seed(0)
    resnet = pipe.unet.down_blocks[0].resnets[0].conv1
    query = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    state = {
        "lora_unet_input_blocks_1_0_in_layers_2": (
            torch.randn(2, resnet.in_channels, 3, 3, generator=generator),
            torch.randn(resnet.out_channels, 2, 1, 1, generator=generator),
        ),
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q": (
            torch.randn(2, query.in_features, generator=generator),
            torch.randn(query.out_features, 2, generator=generator),
        ),
    }
    tensors = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    for stem, (down, up) in state.items():
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    metadata = {"modelspec.trigger_phrase": "ohwx"}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    few = {"base": str(folder), "side": 64, "first_prompts": 1, "seeds": 2, "steps": 3}
    few |= {"people": str(tmp_path / "people"), "first_people": 0}
    run(settings(tmp_path / "run", f"a={tmp_path / 'a.safetensors'}", **few), plain_console())
    drawn = pictures(tmp_path / "run")
    assert len(drawn) == 4
    (base, _), _ = drawn["pictures/base/anna/01-1.png"]
    (own, texts), _ = drawn["pictures/a/anna/01-1.png"]
    assert base.shape == (64, 64, 3)
    assert (base - own).abs().mean() > 0.003
    assert texts["prompt"] == "ohwx, a photo of a person in the snow"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "a.safetensors: 2 layers read" in log
    assert "text encoders" in log  # what was left out is told


def test_faults_are_named(tmp_path):
    (tmp_path / "nothing").mkdir()
    write_image(torch.rand(64, 64, 3), tmp_path / "people" / "anna" / "1.png")
    for number, (rows, given, said) in enumerate(
        (
            (["gone=gone.safetensors"], {}, "There is no gone.safetensors"),
            ([f"x={LORA}", f"x={MODEL}"], {}, "cannot be called 'x'"),
            ([f"base={LORA}"], {}, "cannot be called 'base'"),
            ([f"a/b={LORA}"], {}, "cannot be called"),
            ([f"x={tmp_path / 'nothing'}"], {}, "no LoRA of 2 people"),
            ([], {"people": str(tmp_path / "people")}, "people have no folder"),
            ([], {"side": 60}, "multiples of"),
            ([], {"backbones": Backbones(dino=str(tmp_path))}, "holds no weights"),
            ([f"x={paths.BASE}"], {}, "No layer of this LoRA belongs"),
        )
    ):
        few = {"first_prompts": 1, "seeds": 1, "steps": 1} | given
        with pytest.raises(DiffLoRAError, match=said):
            run(settings(tmp_path / f"run{number}", *rows, **few), plain_console())
    with pytest.raises(ConfigError, match="none twice"):
        settings(tmp_path, strengths=(1.0, 1.0))
    with pytest.raises(ConfigError, match="batch"):
        replace(settings(tmp_path), batch=0)
