"""What Extract Identity Features gives to other nodes, Compare Identities and Compare Grid."""

import json

import numpy as np
import pytest
from PIL import Image

from difflora_core.comfy_client import ComfyPromptError

VISION, FACES = ["demo", 3], ["demo", 4]


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def extract(images, **changes):
    inputs = {
        "images": images, "clip_vision": VISION, "face_analysis": FACES,
        "on_missing_face": "skip", "face_order": "left_to_right", "face_index": 0,
        "image_region": "crop", "region_factor": 2.2,
    }  # fmt: skip
    return node("DiffLoRA_ExtractFeatures", **(inputs | changes))


def show(source):
    """Shows crops, masks as pictures, key points; `value` gives what a node says in words."""
    return {
        "crops": node("PreviewImage", images=[source, 1]),
        "mask_pictures": node("MaskToImage", mask=[source, 2]),
        "masks": node("PreviewImage", images=["mask_pictures", 0]),
        "points": node("PreviewImage", images=[source, 3]),
    }


@pytest.fixture(scope="module")
def photos(comfy, face_picture, plain_picture):
    names = [comfy.upload_picture(path) for path in (face_picture, plain_picture)]
    # both pictures are brought to one size, as a batch has to be
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        **{f"photo{k}": node("LoadImage", image=name) for k, name in enumerate(names)},
        **{
            f"scaled{k}": node(
                "ImageScale", image=[f"photo{k}", 0], upscale_method="bilinear", width=96,
                height=96, crop="disabled",
            )
            for k in range(2)
        },
        "batch": node("ImageBatch", image1=["scaled0", 0], image2=["scaled1", 0]),
    }  # fmt: skip


def test_face_mask_and_points_lie_on_the_face(comfy, photos):
    shown = comfy.run({**photos, "out": extract(["photo0", 0]), **show("out")}).pictures
    (mask,), (points,) = shown["masks"], shown["points"]
    assert mask.shape[:2] == points.shape[:2]
    face = mask[..., 0] > 127
    assert 0.02 < face.mean() < 0.7
    marked = points.max(-1) > 127
    assert 10 < marked.sum() < 0.1 * marked.size
    assert face[marked].mean() > 0.9
    centres = {
        name: np.argwhere((points == colour).all(-1)).mean(0)
        for name, colour in (("left eye", (255, 0, 0)), ("right eye", (0, 255, 0)))
    }
    assert centres["left eye"][1] < centres["right eye"][1]


def test_photos_without_a_face(comfy, photos):
    skipped = comfy.run({**photos, "out": extract(["batch", 0]), **show("out")}).pictures
    assert [len(skipped[k]) for k in ("crops", "masks", "points")] == [1, 1, 1]
    changes = {"on_missing_face": "image_only"}
    kept = comfy.run({**photos, "out": extract(["batch", 0], **changes), **show("out")}).pictures
    assert [len(kept[k]) for k in ("crops", "masks", "points")] == [2, 2, 2]
    assert kept["masks"][0].any()
    assert kept["points"][0].any()
    assert not kept["masks"][1].any()
    assert not kept["points"][1].any()


def test_all_faces_of_a_picture_are_a_batch(comfy, photos, is_shipped, tmp_path):
    if not is_shipped:
        pytest.skip("the stand-in detector sees one face per picture")
    from difflora_core.demo.world.identities import split_seeds
    from difflora_core.demo.world.scenes import render_pairs

    a, b = split_seeds("validation", 2)
    wide = render_pairs([a], [b], [3]).images[0]
    Image.fromarray((wide * 255).round().byte().numpy()).save(tmp_path / "pair.png")
    nodes = {**photos, "pair": node("LoadImage", image=comfy.upload_picture(tmp_path / "pair.png"))}
    shown = comfy.run({**nodes, "out": extract(["pair", 0], faces="all"), **show("out")}).pictures
    assert [len(shown[k]) for k in ("crops", "masks", "points")] == [2, 2, 1]
    left, right = (mask[..., 0] > 127 for mask in shown["masks"])
    assert left[:, :64].any()
    assert right[:, 64:].any()
    assert not (left & right).any()
    red = (shown["points"][0] == (255, 0, 0)).all(-1)
    assert red[:, :64].any()
    assert red[:, 64:].any()
    second = extract(["pair", 0], face_index=1)
    alone = comfy.run({**nodes, "out": second, **show("out")}).pictures
    np.testing.assert_array_equal(alone["masks"][0], shown["masks"][1])
    np.testing.assert_array_equal(alone["crops"][0], shown["crops"][1])


@pytest.mark.parametrize("output", [0, 1])
def test_face_analysis_of_other_packs(comfy, photos, output):
    nodes = {**photos, "foreign": node("TestFaceSockets", face_analysis=FACES)}
    own = comfy.run({**nodes, "out": extract(["photo0", 0]), **show("out")}).pictures
    nodes["out"] = extract(["photo0", 0], face_analysis=["foreign", output])
    theirs = comfy.run({**nodes, **show("out")}).pictures
    np.testing.assert_array_equal(theirs["crops"][0], own["crops"][0])


@pytest.mark.parametrize("class_type", ["DiffLoRA_ExtractFeatures", "DiffLoRA_CompareIdentities"])
def test_text_on_a_face_socket(comfy, photos, class_type):
    nodes = {**photos, "foreign": node("TestFaceSockets", face_analysis=FACES)}
    nodes["out"] = extract(["photo0", 0], face_analysis=["foreign", 2])
    nodes |= show("out")
    if class_type == "DiffLoRA_CompareIdentities":
        nodes = {**photos, "foreign": nodes["foreign"], "out": compare("photo0", "photo0")}
        nodes["out"]["inputs"]["face_analysis"] = ["foreign", 2]
    refused(comfy, nodes, "A str is not a face analysis")


def compare(references, pictures):
    return node(
        "DiffLoRA_CompareIdentities", references=[references, 0], pictures=[pictures, 0],
        face_analysis=FACES,
    )  # fmt: skip


def test_copying_is_told_beside_other_photos(comfy, photos):
    nodes = {**photos, "out": compare("photo0", "photo0"), "told": node("PreviewAny")}
    nodes["told"]["inputs"]["source"] = ["out", 2]
    assert "copy-paste" not in comfy.run(nodes).outputs["told"]["text"][0]
    nodes["out"]["inputs"]["other_photos"] = ["scaled0", 0]
    told = comfy.run(nodes).outputs["told"]["text"][0]
    assert float(told.split("copy-paste ")[1].split()[0]) > 0.9  # the reference itself


def refused(comfy, nodes, pattern):
    with pytest.raises(ComfyPromptError, match=pattern) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == "out"


def test_compare_identities(comfy, photos):
    nodes = {**photos, "out": compare("photo0", "batch")}
    nodes |= {"number": node("PreviewAny", source=["out", 1])}
    nodes |= {"words": node("PreviewAny", source=["out", 2])}
    result = comfy.run(nodes)
    number = json.loads(result.outputs["number"]["text"][0])
    assert 0.5 < number <= 1.001  # the same photo, scaled
    words = result.outputs["words"]["text"][0].split("\n")
    assert words[0] == f"mean similarity {number:.3f} over 1 of 2 pictures"
    assert words[2] == "picture 2: no face"
    assert result.picture("out").shape[1] == 2 * 192


def test_nothing_to_compare(comfy, photos):
    refused(comfy, {**photos, "out": compare("photo1", "photo0")}, "no face in any of the 1 refer")
    nodes = {**photos, "nothing": node("TestNoPictures")}
    refused(comfy, {**nodes, "out": compare("photo0", "nothing")}, "compared pictures is empty")
    refused(comfy, {**nodes, "out": compare("nothing", "photo0")}, "reference pictures is empty")


def test_a_finished_picture_without_a_face_is_saved_all_the_same(comfy, photos):
    nodes = {**photos, "out": compare("photo0", "photo1")}
    nodes["told"] = node("PreviewAny", source=["out", 2])
    nodes["save"] = node("SaveImage", images=["photo1", 0], filename_prefix="back_view")
    result = comfy.run(nodes)
    assert result.outputs["told"]["text"][0].startswith("no picture shows a face")
    assert result.pictures["save"]


def grid(**inputs):
    return node("DiffLoRA_CompareGrid", **({"labels": "", "columns": 4, "side": 64} | inputs))


def test_compare_grid(comfy, photos):
    nodes = {**photos, "more": grid(variants=["batch", 0], labels="one\ntwo\nthree")}
    nodes["out"] = grid(variants=["batch", 0], reference=["photo0", 0], columns=1)
    shown = comfy.run(nodes).pictures
    assert shown["more"][0].shape == (64 + 22, 2 * 64, 3)
    assert shown["out"][0].shape == (2 * (64 + 22), 2 * 64, 3)
    lower_left = shown["out"][0][86:150, :64]
    assert (lower_left == 255).all()
    nodes = {**photos, "nothing": node("TestNoPictures"), "out": grid(variants=["nothing", 0])}
    refused(comfy, nodes, "no picture")
    nodes["out"] = grid(variants=["batch", 0], reference=["photo0", 0], side=2048)
    refused(comfy, nodes, "too large")
