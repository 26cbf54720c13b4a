"""PaRa in graphs: trained, loaded, as a LoRA, and where it does not fit."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from difflora_core.comfy_client import ComfyPromptError

MODEL, CLIP, VAE = (["demo", k] for k in (0, 1, 2))


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def styled(strength=1.0):
    return node(
        "DiffLoRA_ApplyStyle", model=MODEL, style=["file", 0], strength=strength,
        start_percent=0.0, end_percent=1.0, positive_only=False, input_blocks=1.0,
        middle_block=1.0, output_blocks=1.0, self_attention=1.0, cross_attention=1.0,
    )  # fmt: skip


def training(**inputs):
    """A few steps on two pictures, and the report."""
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "images": node("EmptyImage", width=64, height=64, batch_size=2, color=0xFF8800),
        "train": node(
            "DiffLoRA_TrainPaRa", model=MODEL, clip=CLIP, vae=VAE, images=["images", 0],
            prompts="photo of a person", steps=4, rank=2, batch_size=2, seed=1,
            mirror=True, small_file=False, learning_rate=0.05,
            layers="all", start="least_used", bound=0.2, **inputs,
        ),
        "told": node("PreviewAny", source=["train", 1]),
    }  # fmt: skip


@pytest.fixture
def trained_para(comfy, comfy_server):
    """A PaRa that was trained for a few steps, as a file."""
    path = comfy_server.base_directory / "models/difflora_styles/peach.safetensors"
    if not path.exists():
        comfy.run(training(file_name="peach"))
    return path


def test_a_trained_para_is_loaded_and_its_lora_draws_the_same(
    comfy, comfy_server, draw_models, trained_para
):
    file = node("DiffLoRA_LoadStyle", style_name=trained_para.name)
    exported = {
        "demo": node("DiffLoRA_LoadDemo"),
        "file": file,
        "export": node("DiffLoRA_ExportStyleLoRA", model=MODEL, style=["file", 0]),
        "told": node("PreviewAny", source=["export", 1]),
        "save": node("SaveLoRA", lora=["export", 0], prefix="loras/peach", steps=0),
    }
    answer = comfy.run(exported)
    assert answer.outputs["told"]["text"] == ["The LoRA is the whole style."]
    (saved,) = comfy_server.base_directory.glob("output/loras/peach*.safetensors")
    folder = comfy_server.base_directory / "models/loras"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.move(saved, folder / "peach_lora.safetensors")
    nodes = {
        "file": file,
        "on": styled(),
        "off": styled(0.0),
        "core": node(
            "LoraLoaderModelOnly", model=MODEL, lora_name="peach_lora.safetensors",
            strength_model=1.0,
        ),
    }  # fmt: skip
    models = {
        name: ([name, 0], ["words", 0], ["none", 0]) for name in ("demo", "on", "off", "core")
    }
    shown = draw_models(nodes, models)
    np.testing.assert_array_equal(shown["off"], shown["demo"])
    assert np.abs(shown["on"] - shown["demo"]).max() > 8
    assert np.abs(shown["on"] - shown["core"]).max() <= 2  # the file's numbers are rounded


def test_it_trains_on_the_pictures_of_a_folder_too(comfy, comfy_server):
    from difflora_core.storage.adapter_file import read_adaptation

    more = comfy_server.base_directory / "input" / "more peach"
    more.mkdir()
    for name in ("tall", "wide"):
        size = (96, 128) if name == "tall" else (128, 64)
        Image.new("RGB", size, (255, 136, 0)).save(more / f"{name}.png")
    (more / "wide.txt").write_text("cartoon of a person", "utf-8")
    nodes = training(file_name="more_peach", folder=more.name)
    (told,) = comfy.run(nodes).outputs["told"]["text"]
    assert "2 pictures of the folder" in told
    made = read_adaptation(
        comfy_server.base_directory / "models/difflora_styles/more_peach.safetensors"
    )
    assert made.facts["pictures"] == 2 * (2 + 2)  # mirrored too
    for folder in ("../input", "no such folder"):
        with pytest.raises(ComfyPromptError, match=f"folder '{folder}' was not found"):
            comfy.run(training(file_name="more_peach", folder=folder))


def test_a_para_of_another_base_is_refused(comfy, comfy_server, parts, random_adaptation):
    made = random_adaptation("para")(1).adaptation
    layers = {f"input_blocks.99.{name}": tensors for name, tensors in made.layers.items()}
    folder = comfy_server.base_directory / "models/difflora_styles"
    write = parts("difflora_core.storage.adapter_file").write_adaptation
    write(folder / "foreign.safetensors", replace(made, base="sd9", layers=layers))
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "file": node("DiffLoRA_LoadStyle", style_name="foreign.safetensors"),
        "on": styled(),
        "lora": node("DiffLoRA_ExportStyleLoRA", model=MODEL, style=["file", 0]),
        "told": node("PreviewAny", source=["lora", 1]),
    }
    with pytest.raises(ComfyPromptError, match=r"made for sd9.*do not fit the model"):
        comfy.run(nodes)
