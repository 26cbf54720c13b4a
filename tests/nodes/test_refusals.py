"""Bad input: every refusal is one readable sentence on the node that cannot go on."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.networks.base import demo_layout
from difflora_core.lora.layout import layout_from_unet_config

MODEL, VISION, FACES, DIFFLORA = ["demo", 0], ["demo", 3], ["demo", 4], ["demo", 5]


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def personalize(photo, **changes):
    inputs = {
        "images": ["photo", 0], "difflora_model": DIFFLORA, "clip_vision": VISION,
        "face_analysis": FACES, "mode": "best_guess", "seed": 0, "steps": 4, "guidance": 1.0,
        "on_missing_face": "error", "face_order": "largest", "face_index": 0,
        "image_region": "crop", "gate": "learned", "face_share": 0.5,
    }  # fmt: skip
    inputs = {k: v for k, v in (inputs | changes).items() if v is not None}
    return {
        "photo": node("LoadImage", image=photo),
        "demo": node("DiffLoRA_LoadDemo"),
        "lora": node("DiffLoRA_Personalize", **inputs),
        "save": node("SaveLoRA", lora=["lora", 0], prefix="loras/refusals", steps=0),
    }


def with_model(nodes, name):
    nodes["loader"] = node("DiffLoRA_LoadModel", model_name=name)
    nodes["lora"]["inputs"]["difflora_model"] = ["loader", 0]
    return nodes


@pytest.fixture(scope="module")
def models(comfy_server, demo_world, sizes, random_difflora, sd15_config):
    """models/difflora with models that are wrong in one way each."""
    folder = comfy_server.base_directory / "models" / "difflora"
    folder.mkdir(parents=True, exist_ok=True)
    good = demo_world / "difflora.safetensors"
    shutil.copy(good, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes(good.read_bytes()[:-1000])
    (folder / "pickle.safetensors").write_bytes(b"\x80\x04N.")
    shutil.copy(demo_world / "base.safetensors", folder / "base.safetensors")
    other = replace(sizes, image=sizes.image + 32)
    random_difflora(folder / "other_vision.safetensors", demo_layout(), other)
    other = replace(sizes, face=sizes.face + 32)
    random_difflora(folder / "other_faces.safetensors", demo_layout(), other)
    random_difflora(folder / "other_rank.safetensors", demo_layout(2), sizes)
    layout = layout_from_unet_config("sd15", sd15_config, 2)
    small = replace(layout, layers=layout.layers[:4])
    random_difflora(folder / "sd15.safetensors", small, sizes)
    return folder


def refused(comfy, nodes, at, pattern):
    with pytest.raises(ComfyPromptError, match=pattern) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == at
    assert "Traceback" not in caught.value.message


def test_no_face(comfy, plain):
    refused(comfy, personalize(plain), "lora", "no face")
    refused(comfy, personalize(plain, on_missing_face="skip"), "lora", "No photo is left")


def test_photo_without_a_face_can_be_used_by_its_look(comfy, plain):
    comfy.run(personalize(plain, on_missing_face="image_only"))
    comfy.run(personalize(plain, face_analysis=None))


def test_no_photos_at_all(comfy, face):
    nodes = personalize(face, images=["nothing", 0]) | {"nothing": node("TestNoPictures")}
    refused(comfy, nodes, "lora", "no reference picture. Connect at least one photo")


def test_masks_of_other_sizes(comfy, face):
    """A mask is scaled to its photo; one for all is enough, but two for one photo are too many."""
    nodes = personalize(face, mask=["mask", 0])
    nodes["mask"] = node("SolidMask", value=1.0, width=48, height=200)
    nodes["crops"] = node("PreviewImage", images=["lora", 1])
    marked = comfy.run(nodes).picture("crops")
    nodes["mask"]["inputs"]["value"] = 0.0  # an empty mask is no mask
    np.testing.assert_array_equal(comfy.run(nodes).picture("crops"), marked)
    nodes["corner"] = node("SolidMask", value=1.0, width=2, height=2)
    nodes["mask"] = node(
        "MaskComposite", destination=["black", 0], source=["corner", 0], x=0, y=0, operation="add"
    )
    nodes["black"] = node("SolidMask", value=0.0, width=100, height=50)
    refused(comfy, nodes, "lora", "none of them under the mask")
    nodes["mask"] = node("TestTwoMasks")
    refused(comfy, nodes, "lora", "2 face masks for 1 picture")


def test_face_number_that_is_not_there(comfy, face):
    refused(comfy, personalize(face, face_index=4), "lora", "no face number 4")


def test_encoders_not_connected(comfy, face):
    refused(comfy, personalize(face, clip_vision=None), "lora", "connect its CLIP vision")
    nodes = personalize(face, clip_vision=None, face_analysis=None)
    refused(comfy, nodes, "lora", "Nothing looks at the photos")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("other_vision", "Wrong CLIP vision.*Load that one"),
        ("other_faces", "Wrong face recogniser"),
    ],
)
def test_wrong_encoder(comfy, face, models, name, pattern):
    refused(comfy, with_model(personalize(face), f"{name}.safetensors"), "lora", pattern)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("cut", "cut.safetensors.*again"),
        ("pickle", "pickle file with another name"),
        ("base", "no DiffLoRA model"),
    ],
)
def test_file_that_is_no_model(comfy, face, models, name, pattern):
    refused(comfy, with_model(personalize(face), f"{name}.safetensors"), "loader", pattern)


@pytest.mark.parametrize("name", ["gone.safetensors", "../../secret.safetensors", ""])
def test_missing_model_file_names_the_folder(comfy, face, models, name):
    refused(comfy, with_model(personalize(face), name), "loader", "models/difflora")


def test_missing_input_of_an_empty_list_names_the_folder(comfy, comfy_server):
    loader = node("DiffLoRA_LoadFaceAnalysis", package="antelopev2", provider="cpu")
    features = node(
        "DiffLoRA_ExtractFeatures", images=["photo", 0], face_analysis=["loader", 0],
        on_missing_face="error", face_order="largest", face_index=0, image_region="crop",
        region_factor=2.2,
    )  # fmt: skip
    nodes = {
        "loader": loader,
        "photo": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
        "features": features,
        "show": node("PreviewImage", images=["features", 1]),
    }
    refused(comfy, nodes, "loader", "insightface/models.*press R")


def test_face_package_nested_and_half_there(comfy, comfy_server, demo_world, face):
    root = comfy_server.base_directory / "models" / "insightface" / "models"
    package = demo_world / "insightface" / "demo_faces"
    shutil.copytree(package, root / "nested" / "nested")
    shutil.copytree(package, root / "half")
    os.remove(max((root / "half").glob("*.onnx")))  # the recogniser
    nodes = personalize(face, face_analysis=["faces", 0])
    nodes["faces"] = node("DiffLoRA_LoadFaceAnalysis", package="nested", provider="cpu")
    comfy.run(nodes)
    nodes["faces"]["inputs"]["package"] = "half"
    refused(comfy, nodes, "faces", "lacks a recogniser")


def test_lora_for_another_base_model(comfy, face, models):
    nodes = with_model(personalize(face, base_model=MODEL), "sd15.safetensors")
    refused(comfy, nodes, "lora", "made for sd15.*do not fit the base model")
    del nodes["lora"]["inputs"]["base_model"]
    comfy.run(nodes)  # nothing to compare with: the LoRA itself is fine


def test_latent_of_a_model_with_another_layout(comfy, models):
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "loader": node("DiffLoRA_LoadModel", model_name="other_rank.safetensors"),
        "latent": node(
            "DiffLoRA_SampleLatent", difflora_model=["loader", 0], mode="sampled", seed=1, steps=2,
            guidance=1.0,
        ),
        "decoded": node(
            "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=["latent", 0]
        ),
        "save": node("SaveLoRA", lora=["decoded", 0], prefix="loras/refusals", steps=0),
    }  # fmt: skip
    refused(comfy, nodes, "decoded", "another base model or LoRA layout")


def test_best_guess_without_photos(comfy):
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "latent": node(
            "DiffLoRA_SampleLatent", difflora_model=DIFFLORA, mode="best_guess", seed=1, steps=2,
            guidance=1.0,
        ),
        "decoded": node(
            "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=["latent", 0]
        ),
        "save": node("SaveLoRA", lora=["decoded", 0], prefix="loras/refusals", steps=0),
    }  # fmt: skip
    refused(comfy, nodes, "latent", "needs photos")


def test_overwritten_model_file_is_read_again(
    comfy, comfy_server, face, models, sizes, random_difflora
):
    target = models / "changing.safetensors"
    nodes = with_model(personalize(face), target.name)
    nodes["save"]["inputs"]["prefix"] = "loras/changing"
    loras = []
    for seed in (1, 2):
        random_difflora(target, demo_layout(), sizes, seed=seed)
        comfy.run(nodes)
        loras.append(load_file(max(comfy_server.output_directory.glob("loras/changing*"))))
    assert any((loras[0][key] != loras[1][key]).any() for key in loras[0])
