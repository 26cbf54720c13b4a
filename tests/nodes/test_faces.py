"""Finding faces, weighing photos, features in files, and other encoders, in real ComfyUI."""

import shutil

import numpy as np
import pytest

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.storage.features_file import read_features

FACES, DIFFLORA = ["demo", 4], ["demo", 5]


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def extract(images, **changes):
    inputs = {
        "images": images, "clip_vision": ["demo", 3], "face_analysis": FACES,
        "on_missing_face": "skip", "face_order": "largest", "face_index": 0,
        "image_region": "crop", "region_factor": 2.2,
    }  # fmt: skip
    inputs |= changes
    return node("DiffLoRA_ExtractFeatures", **{k: v for k, v in inputs.items() if v is not None})


@pytest.fixture(scope="module")
def photos(comfy, face_picture, plain_picture):
    """Nodes: the demo, a photo with a face, one without, and both as a batch."""
    nodes = {"demo": node("DiffLoRA_LoadDemo")}
    for name, path in (("one", face_picture), ("plain", plain_picture)):
        nodes[f"{name} file"] = node("LoadImage", image=comfy.upload_picture(path))
        nodes[name] = node(
            "ImageScale", image=[f"{name} file", 0], upscale_method="bilinear", width=96,
            height=96, crop="disabled",
        )  # fmt: skip
    return nodes | {"both": node("ImageBatch", image1=["plain", 0], image2=["one", 0])}


def mixed(features):
    """Nodes that show the gate of a person."""
    return {
        "mix": node(
            "DiffLoRA_MixFeatures", difflora_model=DIFFLORA, features=features, gate="learned",
            face_share=0.5, face_weight=-1.0, image_weight=-1.0,
        ),
        "show": node("PreviewImage", images=["mix", 1]),
    }  # fmt: skip


def test_faces_are_numbered_and_nobody_is_no_error(comfy, photos):
    nodes = dict(photos)
    for name, images in (("find", "both"), ("nobody", "plain")):
        nodes[name] = node(
            "DiffLoRA_FindFaces", images=[images, 0], face_analysis=FACES,
            face_order="left_to_right", region_factor=2.2,
        )  # fmt: skip
        nodes[f"{name} report"] = node("PreviewAny", source=[name, 2])
        nodes[f"{name} count"] = node("PreviewAny", source=[name, 3])
    shown = comfy.run(nodes)
    (report,) = shown.outputs["find report"]["text"]
    assert report.startswith("photo 2, face 0: ")
    assert shown.outputs["find count"]["text"] == ["1"]
    assert shown.outputs["nobody report"]["text"] == ["No face was found."]
    assert shown.outputs["nobody count"]["text"] == ["0"]
    assert (np.array(shown.pictures["nobody"][0])[..., :3] == 255).all()


def test_features_are_saved_and_loaded(comfy, comfy_server, photos):
    nodes = {**photos, "features": extract(["one", 0])}
    nodes["save"] = node("DiffLoRA_SaveFeatures", features=["features", 0], file_name="ada")
    direct = comfy.run({**nodes, **mixed(["features", 0])}).pictures["show"]
    path = comfy_server.base_directory / "models" / "difflora_features" / "ada.safetensors"
    stored = read_features(path)
    assert stored.face_found.tolist() == [True]
    assert stored.recogniser.endswith(".onnx")
    nodes = {"demo": photos["demo"], **mixed(["load", 0])}
    nodes["load"] = node("DiffLoRA_LoadFeatures", features_name="ada.safetensors")
    np.testing.assert_array_equal(comfy.run(nodes).pictures["show"], direct)


def test_photos_have_weights(comfy, photos):
    """A photo of the weight 0 is not there; numbers that do not fit are refused."""
    shown = {}
    for name, images, weights in (("alone", "one", ""), ("weighed", "both", "0, 1")):
        nodes = {**photos, "features": extract([images, 0], on_missing_face="image_only")}
        nodes["features"]["inputs"]["weights"] = weights
        shown[name] = comfy.run({**nodes, **mixed(["features", 0])}).pictures["show"]
    np.testing.assert_array_equal(shown["weighed"], shown["alone"])
    nodes["features"]["inputs"]["weights"] = "1, 2, 3"
    with pytest.raises(ComfyPromptError, match="3 photo weights for 2 photos"):
        comfy.run({**nodes, **mixed(["features", 0])})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"face_analysis": None}, "No face analysis is connected: only CLIP vision looks"),
        ({"clip_vision": None}, "No CLIP vision is connected: only the face counts."),
    ],
)
def test_a_forgotten_encoder_is_told(comfy, photos, changes, told):
    nodes = {**photos, "features": extract(["one", 0], **changes)}
    nodes["show"] = node("PreviewImage", images=["features", 1])
    shown = []
    comfy.run(nodes, shown=shown)
    assert [text for text in shown if isinstance(text, str) and told in text]


def test_another_recogniser_is_told(comfy, comfy_server, demo_world, is_shipped, photos):
    """antelopev2 and buffalo_l give as many numbers a face, of other people."""
    if not is_shipped:
        pytest.skip("the random world's model names no recogniser")
    folder = comfy_server.base_directory / "models" / "insightface" / "models" / "other_faces"
    shutil.copytree(demo_world / "insightface" / "demo_faces", folder)
    (folder / "rec_demo.onnx").rename(folder / "rec_other.onnx")
    loaded = node("DiffLoRA_LoadFaceAnalysis", package="other_faces", provider="cpu")
    for analysis, expected in (["faces", 0], True), (FACES, False):
        nodes = {**photos, "faces": loaded, "features": extract(["one", 0], face_analysis=analysis)}
        shown = []
        comfy.run({**nodes, **mixed(["features", 0])}, shown=shown)
        told = [text for text in shown if isinstance(text, str) and "rec_other.onnx, but" in text]
        assert bool(told) == expected
