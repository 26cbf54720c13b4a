"""Photos to LoRA to pictures in real ComfyUI, by the short path and step by step."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difflora_core.comfy_client import ComfyInterrupted

SAMPLING = {"mode": "best_guess", "seed": 0, "steps": 8, "guidance": 1.0}
FACE = {
    "on_missing_face": "error",
    "face_order": "largest",
    "face_index": 0,
    "image_region": "crop",
}
GATE = {"gate": "learned", "face_share": 0.5}
MODEL, CLIP, VAE, VISION, FACES, DIFFLORA = (["demo", k] for k in range(6))


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def lora_nodes(photo, **changes):
    """The short path up to the LoRA."""
    inputs = {"images": ["photo", 0], "difflora_model": DIFFLORA, "base_model": MODEL}
    inputs |= {"clip_vision": VISION, "face_analysis": FACES}
    return {
        "photo": node("LoadImage", image=photo),
        "demo": node("DiffLoRA_LoadDemo"),
        "lora": node("DiffLoRA_Personalize", **(inputs | SAMPLING | FACE | GATE | changes)),
    }


def pictures(name, model, seed=3):
    """Nodes that draw a picture with a model."""
    sampler = node(
        "KSampler", model=model, positive=["words", 0], negative=["none", 0],
        latent_image=["empty", 0], seed=seed, steps=2, cfg=1.5, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        f"{name}_sampler": sampler,
        f"{name}_decoder": node("VAEDecode", samples=[f"{name}_sampler", 0], vae=VAE),
        name: node("SaveImage", images=[f"{name}_decoder", 0], filename_prefix=name),
    }


def apply(strength=1.0, bypass=False):
    return node(
        "LoraModelLoader", model=MODEL, lora=["lora", 0], strength_model=strength, bypass=bypass
    )


@pytest.fixture(scope="module")
def photo(comfy, face_picture):
    return comfy.upload_picture(face_picture)


@pytest.fixture
def saved_lora(comfy, comfy_server):
    """Runs nodes that end in a LoRA and reads the file that core's SaveLoRA wrote."""

    def run(nodes, prefix):
        source = "lora" if "lora" in nodes else "decoded"
        save = node("SaveLoRA", lora=[source, 0], prefix=f"loras/{prefix}", steps=0)
        comfy.run({**nodes, "save": save})
        return load_file(max(comfy_server.output_directory.glob(f"loras/{prefix}*")))

    return run


def steps_nodes(photo, **sampling):
    """The long path."""
    extract = {"images": ["photo", 0], "clip_vision": VISION, "face_analysis": FACES}
    weights = {"face_weight": -1.0, "image_weight": -1.0}
    nodes = lora_nodes(photo)
    del nodes["lora"]
    return {
        **nodes,
        "features": node("DiffLoRA_ExtractFeatures", **extract, **FACE, region_factor=2.2),
        "mixed": node(
            "DiffLoRA_MixFeatures", difflora_model=DIFFLORA, features=["features", 0],
            **GATE, **weights,
        ),
        "latent": node(
            "DiffLoRA_SampleLatent", difflora_model=DIFFLORA, condition=["mixed", 0],
            **(SAMPLING | sampling),
        ),
        "decoded": node(
            "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=["latent", 0],
            base_model=MODEL,
        ),
    }  # fmt: skip


def test_lora_changes_its_picture_and_leaves_the_base_alone(comfy, comfy_server, photo):
    alone = comfy.run({"demo": node("DiffLoRA_LoadDemo"), **pictures("base", MODEL)})
    both = {**lora_nodes(photo), "applied": apply()}
    both |= {**pictures("base", MODEL), **pictures("personal", ["applied", 0])}
    first = comfy.run(both)
    np.testing.assert_array_equal(first.pictures["base"], alone.pictures["base"])
    assert first.pictures["base"][0].shape == (64, 64, 3)
    difference = np.abs(first.pictures["personal"][0] - first.pictures["base"][0].astype(int))
    assert difference.max() > 8
    again = comfy.run_fresh(both)
    assert "demo" not in again.cached
    for name in ("base", "personal"):
        np.testing.assert_array_equal(again.pictures[name], first.pictures[name])
    assert "lora key not loaded" not in comfy_server.log_file.read_text().lower()
    assert "NOT LOADED" not in comfy_server.log_file.read_text()


def test_switched_off_is_the_base_and_bypass_is_the_patch(comfy, photo):
    nodes = {**lora_nodes(photo), "patched": apply(), "off": apply(0.0), "bypassed": apply(1, True)}
    nodes |= pictures("base", MODEL)
    for name in ("patched", "off", "bypassed"):
        nodes |= pictures(f"p_{name}", [name, 0])
    shown = comfy.run(nodes).pictures
    np.testing.assert_array_equal(shown["p_off"], shown["base"])
    difference = np.abs(np.subtract(shown["p_bypassed"], shown["p_patched"], dtype=int))
    assert difference.max() <= 2


def test_the_steps_give_the_same_lora_as_the_one_node(saved_lora, photo):
    short = saved_lora(lora_nodes(photo), "short")
    long = saved_lora(steps_nodes(photo), "long")
    assert list(short) == list(long)
    assert all(torch.equal(short[key], long[key]) for key in short)
    stem = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert {f"{stem}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(
        short
    )


def test_seed_decides_the_sampled_variant(saved_lora, photo):
    loras = [
        saved_lora(lora_nodes(photo, mode="sampled", seed=seed, steps=4), f"seed{k}")
        for k, seed in enumerate((5, 6))
    ]
    again = saved_lora(steps_nodes(photo, mode="sampled", seed=5, steps=4), "seed_again")
    assert all(torch.equal(loras[0][key], again[key]) for key in again)
    assert any(not torch.equal(loras[0][key], loras[1][key]) for key in again)


def test_photos_of_two_nodes_count_together(saved_lora, comfy, photo, plain_picture):
    """In any order, and as one identity that neither photo alone gives."""

    def both(first, second):
        nodes = steps_nodes(first)
        nodes["other"] = node("LoadImage", image=second)
        nodes["more"] = copy.deepcopy(nodes["features"])
        nodes["more"]["inputs"] |= {"images": ["other", 0], "features": ["features", 0]}
        for name in ("features", "more"):
            nodes[name]["inputs"]["on_missing_face"] = "image_only"
        nodes["mixed"]["inputs"]["features"] = ["more", 0]
        return nodes

    plain = comfy.upload_picture(plain_picture)
    one = saved_lora(steps_nodes(photo), "one_photo")
    two = saved_lora(both(photo, plain), "two_photos")
    turned = saved_lora(both(plain, photo), "turned_round")
    twice = saved_lora(both(photo, photo), "twice")
    for key in one:
        torch.testing.assert_close(turned[key], two[key], rtol=1e-3, atol=1e-4)
    assert max(float((two[key] - one[key]).abs().max()) for key in one) > 1e-2
    assert max(float((twice[key] - one[key]).abs().max()) for key in one) < 1e-2


def test_gate_weighs_face_against_image(saved_lora, photo):
    loras = [
        saved_lora(lora_nodes(photo, gate="manual", face_share=share), f"gate{k}")
        for k, share in enumerate((0.0, 1.0))
    ]
    assert any(not torch.equal(loras[0][key], loras[1][key]) for key in loras[0])


def test_person_can_be_invented_without_photos(saved_lora):
    """Every seed is another person, and none is the base."""
    loras = []
    for seed in (1, 2):
        sampling = SAMPLING | {"mode": "sampled", "seed": seed}
        nodes = {
            "demo": node("DiffLoRA_LoadDemo"),
            "latent": node("DiffLoRA_SampleLatent", difflora_model=DIFFLORA, **sampling),
            "decoded": node(
                "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=["latent", 0]
            ),
        }
        loras.append(saved_lora(nodes, f"invented{seed}"))
    ups = [key for key in loras[0] if key.endswith("lora_up.weight")]
    norms = [sum(float(lora[key].square().sum()) for key in ups) ** 0.5 for lora in loras]
    apart = sum(float((loras[0][key] - loras[1][key]).square().sum()) for key in ups) ** 0.5
    assert min(norms) > 0
    assert apart > 0.1 * max(norms)


def test_sampling_reports_progress_and_stops_when_asked(comfy, interrupt, photo):
    steps = []

    def stop(step):
        if step.node_type == "DiffLoRA_Personalize":
            steps.append(step)
            if step.value >= 3:  # ComfyUI leaves steps out when they come fast
                interrupt()

    nodes = lora_nodes(photo, mode="sampled", steps=400, seed=99)
    nodes["save"] = node("SaveLoRA", lora=["lora", 0], prefix="loras/never", steps=0)
    with pytest.raises(ComfyInterrupted):
        comfy.run(nodes, on_progress=stop)
    assert {step.maximum for step in steps} >= {400}
    assert max(step.value for step in steps) < 400
