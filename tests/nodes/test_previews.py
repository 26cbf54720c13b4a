"""What an artist sees while something runs: previews of the picture, progress of our nodes."""

import numpy as np
import pytest
import torch

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits

DEMO = {"class_type": "DiffLoRA_LoadDemo", "inputs": {}}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def portraits():
    """Pictures of people as the VAE of the demo is asked to keep them."""
    seeds = split_seeds("train", 64)
    return render_portraits(seeds, [k % 7 for k in range(64)]).images


def test_preview_colours_are_those_of_the_vae(node_module, is_shipped, demo_world, portraits):
    if not is_shipped:
        pytest.skip("the shipped demo world is not trained yet (make demo-world)")
    demo = node_module("host.demo")
    base = load_base(demo_world / "base.safetensors")
    latents = base.encode_images(portraits).permute(0, 2, 3, 1)
    pixels = portraits.permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(pixels, size=latents.shape[1:3], mode="area") * 2 - 1
    wanted = wanted.permute(0, 2, 3, 1)
    shown = latents @ torch.tensor(demo.PREVIEW_COLOURS) + torch.tensor(demo.PREVIEW_GREY)
    rows = torch.cat([latents, torch.ones_like(latents[..., :1])], -1).flatten(0, 2)
    best = rows @ torch.linalg.lstsq(rows, wanted.flatten(0, 2)).solution
    error = (shown - wanted).square().mean()
    assert error < 1.1 * (best - wanted.flatten(0, 2)).square().mean()
    assert error < 0.15 * wanted.var()


def test_sampler_shows_the_picture_on_its_way(comfy):
    shown = []
    nodes = {
        "demo": DEMO,
        "words": node("CLIPTextEncode", clip=["demo", 1], text="photo of a person"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler", model=["demo", 0], positive=["words", 0], negative=["words", 0],
            latent_image=["empty", 0], seed=11, steps=6, cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "pixels": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
        "show": node("PreviewImage", images=["pixels", 0]),
    }  # fmt: skip
    picture = comfy.run(nodes, shown=shown).picture("show")
    previews = [item for item in shown if not isinstance(item, str)]
    assert len(previews) >= 2
    small = np.asarray(previews[-1].convert("RGB").resize((16, 16)), float)
    blocks = picture.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.8


@pytest.mark.parametrize(("width", "told"), [(64, False), (128, False), (288, True)])
def test_a_picture_far_from_the_size_of_the_demo_is_told(comfy, width, told):
    nodes = {
        "demo": DEMO,
        "words": node("CLIPTextEncode", clip=["demo", 1], text="photo of a person"),
        "empty": node("EmptyLatentImage", width=width, height=64, batch_size=1),
        "sampler": node(
            "KSampler", model=["demo", 0], positive=["words", 0], negative=["words", 0],
            latent_image=["empty", 0], seed=width, steps=1, cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "pixels": node("VAEDecode", samples=["sampler", 0], vae=["demo", 2]),
        "show": node("PreviewImage", images=["pixels", 0]),
    }  # fmt: skip
    shown = []
    comfy.run(nodes, shown=shown)
    texts = [item for item in shown if isinstance(item, str)]
    assert (
        any(f"sampler: The demo learned pictures of 64 x 64; {width} x 64" in t for t in texts)
        == told
    )


def extract(images, policy="image_only"):
    return node(
        "DiffLoRA_ExtractFeatures", images=images, clip_vision=["demo", 3],
        face_analysis=["demo", 4], on_missing_face=policy, face_order="largest", face_index=0,
        image_region="crop", region_factor=2.2,
    )  # fmt: skip


def steps_of(comfy, nodes, kind):
    """(value, maximum) of every step that a node of this class reported."""
    steps = []
    comfy.run(nodes, on_progress=steps.append)
    return {(step.value, step.maximum) for step in steps if step.node_type == kind}


def test_photos_are_counted(comfy, face_picture):
    """Finding faces takes seconds for a batch at full size."""
    nodes = {
        "demo": DEMO,
        "photo": node("LoadImage", image=comfy.upload_picture(face_picture)),
        "batch": node("RepeatImageBatch", image=["photo", 0], amount=8),
        "features": extract(["batch", 0]),
        "show": node("PreviewImage", images=["features", 1]),
        "compare": node(
            "DiffLoRA_CompareIdentities", references=["photo", 0], pictures=["batch", 0],
            face_analysis=["demo", 4],
        ),
    }  # fmt: skip
    assert (16, 16) in steps_of(comfy, nodes, "DiffLoRA_ExtractFeatures")
    nodes["photo"]["inputs"]["image"] = comfy.upload_picture(face_picture)
    nodes["batch"]["inputs"]["amount"] = 7
    assert (8, 8) in steps_of(comfy, nodes, "DiffLoRA_CompareIdentities")


def test_every_lora_of_a_batch_is_counted(comfy):
    people = node("DiffLoRA_InventIdentity", difflora_model=["demo", 5], seed=3, count=5, steps=2)
    decode = node(
        "DiffLoRA_DecodeLoRA", difflora_model=["demo", 5], lora_latent=["people", 0], index=-1
    )
    save = node("SaveLoRA", lora=["decode", 0], prefix="loras/counted", steps=0)
    nodes = {"demo": DEMO, "people": people, "decode": decode, "save": save}
    assert (5, 5) in steps_of(comfy, nodes, "DiffLoRA_DecodeLoRA")


def test_photos_left_out_are_told_on_the_node(comfy, face_picture, plain_picture):
    """Skipping is the documented fallback; the artist is told which photo it was."""
    nodes = {"demo": DEMO}
    for name, path in (("one", face_picture), ("other", plain_picture)):
        nodes[f"{name} file"] = node("LoadImage", image=comfy.upload_picture(path))
        nodes[name] = node(
            "ImageScale", image=[f"{name} file", 0], upscale_method="bilinear", width=96,
            height=96, crop="disabled",
        )  # fmt: skip
    nodes["batch"] = node("ImageBatch", image1=["one", 0], image2=["other", 0])
    nodes["features"] = extract(["batch", 0], "skip")
    nodes["show"] = node("PreviewImage", images=["features", 1])
    shown = []
    assert len(comfy.run(nodes, shown=shown).pictures["show"]) == 1
    told = "A face in 1 of 2 photos. Picture 2 shows no face that could be found. Left out."
    assert shown == [f"features: {told}"]
    nodes["features"] = extract(["batch", 0], "error")
    with pytest.raises(ComfyPromptError, match="Picture 2 shows no face") as caught:
        comfy.run(nodes)
    assert caught.value.node_id == "features"
