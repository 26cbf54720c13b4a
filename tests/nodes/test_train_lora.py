"""Train Identity LoRA in real ComfyUI: from nothing, on from a prediction, stopped, bad input."""

import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.comfy_client import ComfyInterrupted, ComfyPromptError

MODEL, CLIP, VAE, VISION, FACES, DIFFLORA = (["demo", k] for k in range(6))
OPTIONS = {
    "captions": "photo of a person", "trigger": "", "steps": 4, "rank": 2, "learning_rate": 0.01,
    "batch_size": 2, "seed": 1, "layers": "attention", "factors": "both", "schedule": "cosine",
    "loss": "min_snr", "even_steps": False, "resolution": 0, "mirror": True, "held_out": 10,
    "prior_weight": 1.0, "prior_prompt": "photo of a person", "on_missing_face": "skip",
    "face_order": "largest", "face_index": 0, "accumulate": 1, "memory": "auto",
}  # fmt: skip


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def training(name, images=("photo", 0), **changes):
    inputs = {
        "model": MODEL, "clip": CLIP, "vae": VAE, "images": list(images), "file_name": name,
        **OPTIONS,
    }  # fmt: skip
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "photo": node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8800),
        "train": node("DiffLoRA_TrainLoRA", **inputs | changes),
        "told": node("PreviewAny", source=["train", 1]),
    }


def drawn(nodes, lora, strength=1.0):
    """The nodes and what draws one picture with a LoRA."""
    return nodes | {
        "apply": node(
            "LoraModelLoader", model=MODEL, lora=lora, strength_model=strength, bypass=False
        ),
        "text": node("CLIPTextEncode", clip=CLIP, text="photo of a person"),
        "canvas": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node(
            "KSampler", model=["apply", 0], positive=["text", 0], negative=["text", 0],
            latent_image=["canvas", 0], seed=3, steps=4, cfg=1.0, sampler_name="euler",
            scheduler="normal", denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=VAE),
        "saved": node("SaveImage", images=["decoded", 0], filename_prefix="train_lora"),
    }  # fmt: skip


def report(result):
    return result.outputs["told"]["text"][0]


@pytest.fixture(scope="module")
def loras(comfy_server):
    return comfy_server.base_directory / "models/loras"


@pytest.mark.parametrize("layers", ["attention", "attention_and_convolutions", "all"])
def test_it_trains_writes_a_file_and_changes_the_picture(comfy, loras, layers):
    nodes = training(layers, layers=layers, trigger="ohwx", even_steps=True)
    base = comfy.run(drawn(nodes, ["train", 0], 0.0)).picture("saved")
    result = comfy.run(drawn(nodes, ["train", 0]))
    assert (result.picture("saved") != base).any()
    with safe_open(loras / f"{layers}.safetensors", "pt") as file:
        facts = file.metadata()
    wanted = {
        "modelspec.title": layers, "modelspec.trigger_phrase": "ohwx", "ss_network_dim": "2",
        "ss_steps": "4", "ss_num_train_images": "1", "ss_base_model_version": "sdxl_base_v1-0",
    }  # fmt: skip
    assert wanted.items() <= facts.items()
    assert not re.search(
        "[\\\\/]",
        " ".join(
            v for k, v in facts.items() if k.count("implement") + k.count("architecture") == 0
        ),
    )
    again = {"lora": node("DiffLoRA_LoadLoRAFile", lora_name=f"{layers}.safetensors")}
    loaded = comfy.run(drawn({"demo": nodes["demo"], **again}, ["lora", 0])).picture("saved")
    difference = abs(loaded.astype(int) - result.picture("saved")).max()
    assert difference <= 2  # the file is float16
    kernels = {len(t.shape) for t in load_file(loras / f"{layers}.safetensors").values()}
    assert kernels == ({0, 2} if layers == "attention" else {0, 2, 4})
    timed = node(
        "DiffLoRA_ApplyLoRA", model=MODEL, lora=["lora", 0], strength=1.0, start_percent=0.0,
        end_percent=0.99, positive_only=False, input_blocks=1.0, middle_block=1.0,
        output_blocks=1.0, self_attention=1.0, cross_attention=1.0,
    )  # fmt: skip
    parts = drawn({"demo": nodes["demo"], **again}, ["lora", 0]) | {"apply": timed}
    hooked = comfy.run(parts).picture("saved")  # on outputs, convolutions too
    assert abs(hooked.astype(int) - loaded).max() <= 2


def test_it_goes_on_from_a_prediction_and_from_a_file(comfy, face, is_shipped):
    predicted = node(
        "DiffLoRA_Personalize", images=["photo", 0], difflora_model=DIFFLORA, clip_vision=VISION,
        face_analysis=FACES, mode="best_guess", seed=0, steps=4, guidance=1.0,
        on_missing_face="error", face_order="largest", face_index=0, image_region="crop",
        gate="learned", face_share=0.5, base_model=MODEL,
    )  # fmt: skip
    options = {"loss": "high_noise", "even_steps": True, "learning_rate": 1e-7, "factors": "up"}
    nodes = training("refined", start_lora=["lora", 0], rank=4, **options)
    nodes |= {"photo": node("LoadImage", image=face), "lora": predicted}
    start = comfy.run(drawn(nodes, ["lora", 0])).picture("saved").astype(int)
    still = comfy.run(drawn(nodes, ["train", 0])).picture("saved")
    assert abs(still - start).max() <= 1  # it starts at the prediction
    nodes["train"]["inputs"] |= {"learning_rate": 0.02, "file_name": "moved"}
    assert abs(comfy.run(drawn(nodes, ["train", 0])).picture("saved") - start).max() > 2
    nodes["lora"] = node("DiffLoRA_LoadLoRAFile", lora_name="refined.safetensors")
    nodes["train"]["inputs"] |= {"learning_rate": 1e-7, "file_name": "again"}
    again = comfy.run(drawn(nodes, ["train", 0])).picture("saved")
    assert abs(again - start).max() <= 2


def test_a_start_on_more_layers_or_of_a_higher_rank(comfy, loras):
    comfy.run(training("wide", layers="all", steps=1))
    loaded = {"lora": node("DiffLoRA_LoadLoRAFile", lora_name="wide.safetensors")}
    comfy.run(training("wider", start_lora=["lora", 0], steps=1) | loaded)
    before, after = (load_file(loras / f"{name}.safetensors") for name in ("wide", "wider"))
    assert before.keys() == after.keys()
    changed = [key for key in before if "lora_up" in key and not before[key].equal(after[key])]
    assert any("_in_layers_2" in key for key in changed)
    assert any("_ff_net_" in key for key in changed)
    nodes = training("never", start_lora=["lora", 0], rank=1)
    with pytest.raises(ComfyPromptError, match="has rank 2: set rank to 2 or more"):
        comfy.run(nodes | loaded)


def test_stopping_keeps_the_best_and_queueing_goes_on(comfy, comfy_server, interrupt, loras):
    nodes = training("stopped", steps=60)
    folder = comfy_server.base_directory / "user/difflora/training"
    others = set(folder.glob("*/state*"))  # of trainings that other tests have stopped
    seen, stopped_at = [], []

    def watch(step):
        if step.node_id == "train" and step.value >= 30 and not stopped_at:
            stopped_at.append(step.value)
            interrupt()

    with pytest.raises(ComfyInterrupted):
        comfy.run(nodes, on_progress=watch)
    assert (loras / "stopped.safetensors").exists()
    assert set(folder.glob("*/state*")) - others  # in a folder that outlives ComfyUI
    result = comfy.run(
        nodes, on_progress=lambda s: seen.append(s.value) if s.node_id == "train" else None
    )
    assert min(v for v in seen if v) >= stopped_at[0] > 0  # not from the beginning
    assert "of 60" in report(result)
    assert set(folder.glob("*/state*")) == others
    once = comfy.run(training("once", steps=60, memory="saving"))
    assert report(once).split("\n")[1:] == report(result).split("\n")[1:]
    a, b = (load_file(loras / f"{n}.safetensors") for n in ("stopped", "once"))
    for key in a:  # exactly, but for layers that are computed again
        torch.testing.assert_close(a[key], b[key], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("trigger", "caption", "expected"),
    [
        ("ohwx", "a person", "ohwx, a person"),
        ("ohwx", "photo of ohwx, smiling", "photo of ohwx, smiling"),
        ("ohwx woman", "photo of ohwx woman smiling", "photo of ohwx woman smiling"),
        ("ohw", "photo of ohwx", "ohw, photo of ohwx"),
        ("", "a person", "a person"),
        ("ohwx", "", "ohwx"),
    ],
)
def test_the_trigger_is_added_where_it_lacks(node_module, trigger, caption, expected):
    request = node_module("host.photo_request").PhotoRequest
    assert request([], None, (caption,), trigger, "file", 64).prompts == [expected]


def test_faces_captions_and_class_pictures(comfy, face, plain):
    nodes = training(
        "mixed", ["both", 0], face_analysis=FACES, captions="photo of a person\nphoto of a woman",
        prior_images=["others", 0],
    )  # fmt: skip
    nodes |= {
        "photo": node("LoadImage", image=face),
        "without": node("LoadImage", image=plain),
        "both": node("ImageBatch", image1=["photo", 0], image2=["without", 0]),
        "others": node("EmptyImage", width=96, height=48, batch_size=3, color=0x0088FF),
    }
    told = report(comfy.run(nodes))
    assert "Picture 2 shows no face that could be found. Left out." in told
    assert "in 2 sizes" in told or "in 3 sizes" in told
    nodes["train"]["inputs"]["on_missing_face"] = "error"
    with pytest.raises(ComfyPromptError, match="set on_missing_face to skip"):
        comfy.run(nodes)
    nodes["both"] = node("ImageBatch", image1=["without", 0], image2=["without", 0])
    nodes["train"]["inputs"]["on_missing_face"] = "skip"
    with pytest.raises(ComfyPromptError, match="No photo is left"):
        comfy.run(nodes)


def test_a_list_of_photos_of_many_sizes(comfy):
    """As a folder loader gives them; small and huge ones, and a mask of another size."""
    sizes = [(8, 8), (300, 120), (1500, 1400)]
    nodes = training("sizes", ["list", 0], masks=["mask", 0])
    for k, (width, height) in enumerate(sizes):
        nodes[f"p{k}"] = node("EmptyImage", width=width, height=height, batch_size=1, color=99 * k)
    nodes["list"] = node("CreateList", **{f"inputs.input{k}": [f"p{k}", 0] for k in range(3)})
    nodes["mask"] = node("SolidMask", value=0.5, width=33, height=17)
    told = report(comfy.run(nodes))
    assert "in 2 sizes" in told
    assert "1 of 3 photos (photo 1 has 8 x 8 pixels)" in told
    assert "No photo was held out, all were trained on: from 8 on" in told


def test_an_empty_caption_leaves_the_others_with_their_photos(comfy):
    """As from a folder loader: a list of captions, one for each photo, or of another number."""
    texts = ["photo of a person", " ", "photo of a woman"]
    nodes = training("captioned", captions=["list", 0], trigger="ohwx")
    nodes["photo"]["inputs"]["batch_size"] = 3
    for k, text in enumerate(texts):
        nodes[f"t{k}"] = node("PrimitiveString", value=text)
    nodes["list"] = node("CreateList", **{f"inputs.input{k}": [f"t{k}", 0] for k in range(3)})
    assert "any of them" not in report(comfy.run(nodes))
    nodes["train"]["inputs"]["trigger"] = ""
    with pytest.raises(ComfyPromptError, match="Caption 2 of 3 is empty"):
        comfy.run(nodes)
    nodes["photo"]["inputs"]["batch_size"] = 4
    assert "2 captions for 4 photos: each was trained" in report(comfy.run(nodes))


def test_masks_that_mark_nothing_are_told(comfy):
    nodes = training("unmarked", masks=["masks", 0])
    nodes["photo"]["inputs"]["batch_size"] = 2
    nodes |= {
        "mask": node("SolidMask", value=1.0, width=64, height=64),
        "none": node("SolidMask", value=0.0, width=64, height=64),
        "masks": node("CreateList", **{"inputs.input0": ["mask", 0], "inputs.input1": ["none", 0]}),
    }
    assert "since the mask marks nothing: 1 of 2 photos (first: photo 2)" in report(
        comfy.run(nodes)
    )


def test_what_a_start_lora_cannot_do_is_told(comfy, loras):
    comfy.run(training("begun", steps=1))
    state = load_file(loras / "begun.safetensors")
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    text = {
        f"{stem}.lora_down.weight": torch.ones(2, 64),
        f"{stem}.lora_up.weight": torch.ones(64, 2),
    }
    save_file(state | text, loras / "worded.safetensors")
    save_file({k: t for k, t in state.items() if k.endswith("alpha")}, loras / "alphas.safetensors")
    nodes = training("on", steps=1, start_lora=["lora", 0])
    nodes["lora"] = node("DiffLoRA_LoadLoRAFile", lora_name="worded.safetensors")
    assert "text encoder" in report(comfy.run(nodes))
    nodes["lora"]["inputs"]["lora_name"] = "alphas.safetensors"
    with pytest.raises(ComfyPromptError, match="changes no layer"):
        comfy.run(nodes)


@pytest.mark.slow
def test_a_thousand_photos(comfy):
    nodes = training("thousand", steps=2)
    nodes["photo"]["inputs"]["batch_size"] = 1000
    assert "1800 training pictures" in report(comfy.run(nodes))  # 100 are held out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"captions": " \n"}, "Write in captions what the photos show"),
        ({"file_name": "../up"}, "file name"),
        ({"factors": "up"}, "connect one, or train both"),
        ({"captions": "word " * 301}, "301 tokens; the text encoders read up to 300"),
        ({"accumulate": 3}, "accumulate"),
        ({"prior_images": ["photo", 0], "prior_prompt": ""}, "Write in prior_prompt"),
    ],
)
def test_what_is_refused(comfy, changes, words):
    with pytest.raises(ComfyPromptError, match=words):
        comfy.run(training("never", **changes))


def test_a_loss_that_is_no_number(comfy, loras):
    comfy.run(training("sound", steps=1))
    state = load_file(loras / "sound.safetensors")
    broken = {k: torch.full_like(t.float(), 1e4) if t.ndim else t for k, t in state.items()}
    save_file(broken, loras / "huge.safetensors")
    nodes = training("never", start_lora=["lora", 0])
    nodes["lora"] = node("DiffLoRA_LoadLoRAFile", lora_name="huge.safetensors")
    with pytest.raises(ComfyPromptError, match=r"The loss is no longer a number .*lower learning"):
        comfy.run(nodes)
