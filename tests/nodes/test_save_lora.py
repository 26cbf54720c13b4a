"""Save LoRA with Details: half precision, what others read, nothing of a face; core loads it."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyPromptError

MODEL, CLIP, VAE = (["demo", k] for k in range(3))
DETAILS = {
    "file_name": "kept", "title": "Ada", "trigger_words": "ada, <ada-hat>", "tags": "portrait",
    "advised_strength": 0.8, "description": "A person.", "method": "DiffLoRA", "base_model": "auto",
    "precision": "float16",
}  # fmt: skip
KNOWN = (
    "sai_model_spec architecture implementation title description date trigger_phrase tags "
    "usage_hint network_module network_dim network_alpha base_model_version tag_frequency "
    "training_comment version base strength license"
).split()


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def save(lora=("lora", 0), **changes):
    return node("DiffLoRA_SaveLoRA", lora=list(lora), **(DETAILS | changes))


@pytest.fixture(scope="module")
def person():
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "latent": node(
            "DiffLoRA_InventIdentity", difflora_model=["demo", 5], seed=3, count=1, steps=4,
            guidance=1.0,
        ),
        "lora": node("DiffLoRA_DecodeLoRA", difflora_model=["demo", 5], lora_latent=["latent", 0]),
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
    }  # fmt: skip


def picture(name, model):
    sampler = node(
        "KSampler", model=model, positive=["words", 0], negative=["none", 0],
        latent_image=["empty", 0], seed=3, steps=3, cfg=2.0, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        f"{name}_s": sampler,
        f"{name}_d": node("VAEDecode", samples=[f"{name}_s", 0], vae=VAE),
        name: node("SaveImage", images=[f"{name}_d", 0], filename_prefix=name),
    }


def test_file_is_small_described_and_the_same_person(comfy, comfy_server, person):
    folder = comfy_server.base_directory / "models" / "loras"
    nodes = {**person, "core": node("SaveLoRA", lora=["lora", 0], prefix="loras/large", steps=0)}
    comfy.run({**nodes, "saved": save()})
    path = folder / "kept.safetensors"
    large = max(comfy_server.output_directory.glob("loras/large*"))
    # half, and the names and texts of 56 tiny layers
    assert path.stat().st_size < 0.6 * large.stat().st_size
    tensors, whole = load_file(path), load_file(large)
    assert tensors.keys() == whole.keys()
    for key, value in tensors.items():
        assert value.dtype == (torch.float32 if key.endswith(".alpha") else torch.float16)
        torch.testing.assert_close(value.float(), whole[key], rtol=1e-3, atol=1e-7)
    assert {value.dtype for value in whole.values()} == {torch.float32}
    with safe_open(large, "pt") as file:
        assert file.metadata() is None  # which is why there is a node of ours
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {key.split(".")[-1].removeprefix("ss_") for key in metadata} == set(KNOWN)
    assert metadata["modelspec.title"] == "Ada"
    assert metadata["modelspec.trigger_phrase"] == "ada, <ada-hat>"
    assert metadata["modelspec.usage_hint"] == "strength 0.8"
    assert metadata["ss_base_model_version"] == metadata["difflora.base"] == "demo"
    assert json.loads(metadata["ss_tag_frequency"])["Ada"].keys() == {
        "ada", "<ada-hat>", "portrait"
    }  # fmt: skip
    assert max(map(len, metadata.values())) < 100  # no place for an embedding
    nodes = {**person, "file": node("LoraLoaderModelOnly", model=MODEL, lora_name=path.name,
                                    strength_model=1.0)}  # fmt: skip
    nodes |= {"live": node("LoraModelLoader", model=MODEL, lora=["lora", 0], strength_model=1.0,
                           bypass=False)}  # fmt: skip
    shown = comfy.run(
        {**nodes, **picture("a", ["file", 0]), **picture("b", ["live", 0]), **picture("c", MODEL)}
    ).pictures
    gap = lambda x, y: int(np.abs(shown[x][0].astype(int) - shown[y][0].astype(int)).max())  # noqa: E731
    assert gap("a", "b") <= 2
    assert gap("a", "c") > 8


def test_a_name_that_is_taken_gets_a_number(comfy, comfy_server, person):
    comfy.run({**person, "one": save(file_name="same"), "two": save(file_name="same", title="B")})
    folder = comfy_server.base_directory / "models" / "loras"
    assert {path.name for path in folder.glob("same*")} == {
        "same.safetensors", "same_002.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "../up", "a/b", "CON"])
def test_names_that_are_no_file_names(comfy, person, name):
    with pytest.raises(ComfyPromptError):
        comfy.run({**person, "saved": save(file_name=name)})
