"""Styles of both methods beside people, concepts and ControlNets, in ComfyUI's own graphs.

Each part acts, at strength 0 it is gone to the pixel, and the order of the nodes is the order that
their help pages say.
"""

import shutil

import numpy as np
import pytest

from difflora_core.demo.comfyui.client import ComfyPromptError

MODEL, CLIP, VAE, DIFFLORA, CONTROL = (["demo", k] for k in (0, 1, 2, 5, 6))
WIDGETS = {
    "start_percent": 0.0, "end_percent": 1.0, "positive_only": False, "input_blocks": 1.0,
    "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0, "cross_attention": 1.0,
}  # fmt: skip
METHODS = ("styleinject", "para")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def styled(model=MODEL, style="file", strength=1.0, **changes):
    links = {"model": model, "style": [style, 0], "strength": strength}
    return node("DiffLoRA_ApplyStyle", **links, **(WIDGETS | changes))


def person(model=MODEL, strength=1.0):
    return node(
        "LoraModelLoader", model=model, lora=["lora", 0], strength_model=strength, bypass=False
    )


@pytest.fixture
def files(comfy_server, parts, random_style, random_para):
    """A random style file of each method."""
    write = parts("difflora_core.storage.adapter_file").write_adaptation
    folder = comfy_server.base_directory / "models/difflora_styles"
    for name, make in zip(METHODS, (random_style, random_para), strict=True):
        write(folder / f"random_{name}.safetensors", make(1).adaptation)


@pytest.fixture
def draw(comfy):
    """The pictures of several models, each with its prompts, from one prompt of ComfyUI."""

    def run(nodes, models, demo=None):
        graph = {
            "demo": node("DiffLoRA_LoadDemo", **(demo or {})),
            "identity": node(
                "DiffLoRA_InventIdentity", difflora_model=DIFFLORA, seed=3, count=1, steps=4,
                guidance=1.0,
            ),
            "lora": node(
                "DiffLoRA_DecodeLoRA", difflora_model=DIFFLORA, lora_latent=["identity", 0]
            ),
            "words": node("CLIPTextEncode", clip=CLIP, text="photo of a person, smiling"),
            "none": node("CLIPTextEncode", clip=CLIP, text=""),
            "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        } | nodes  # fmt: skip
        for name, (model, positive, negative) in models.items():
            graph |= {
                f"{name} latent": node(
                    "KSampler", model=model, positive=positive, negative=negative,
                    latent_image=["empty", 0], seed=3, steps=4, cfg=2.0, sampler_name="euler",
                    scheduler="normal", denoise=1.0,
                ),
                f"{name} picture": node("VAEDecode", samples=[f"{name} latent", 0], vae=VAE),
                f"{name} shown": node("PreviewImage", images=[f"{name} picture", 0]),
            }  # fmt: skip
        shown = comfy.run(graph).pictures
        return {name: np.stack(shown[f"{name} shown"]).astype(int) for name in models}

    return run


def plain(*names):
    """The models of these nodes under the ordinary prompts."""
    return {name: ([name, 0], ["words", 0], ["none", 0]) for name in names}


def differ(shown, *pairs):
    for one, other in pairs:
        assert np.abs(shown[one] - shown[other]).max() > 8, (one, other)


def loaded(method):
    return {"file": node("DiffLoRA_LoadStyle", style_name=f"random_{method}.safetensors")}


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_person_in_either_order_of_the_nodes(draw, files, method):
    """A LoRA is in what StyleInject sees, and whole beside PaRa, wherever it is loaded."""
    nodes = loaded(method) | {
        "style": styled(),
        "person": person(),
        "person style": styled(["person", 0]),
        "style person": person(["style", 0]),
        "person off": styled(["person", 0], strength=0.0),
        "style off": person(["style", 0], strength=0.0),
    }
    names = ("demo", "style", "person", "person style", "style person", "person off", "style off")
    shown = draw(nodes, plain(*names))
    np.testing.assert_array_equal(shown["person off"], shown["person"])
    np.testing.assert_array_equal(shown["style off"], shown["style"])
    np.testing.assert_array_equal(shown["person style"], shown["style person"])
    differ(shown, ("person style", "person"), ("person style", "style"), ("person", "demo"))


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_concept(draw, files, is_shipped, method):
    if not is_shipped:
        pytest.skip("the demo world has no concepts")
    worn = {
        "bias": 0.6, "temperature": 0.1, "lock": "local", "start_percent": 0.0, "end_percent": 1.0,
        "combine": "exact", "reach": 0,
    }  # fmt: skip

    def concept(model, strength=1.0):
        links = {"model": model, "concept": ["hat", 0], "strength": strength}
        return node("DiffLoRA_ApplyConcept", **links, **worn)

    text = "photo of a person, smiling, wearing a <demo-hat>"
    nodes = loaded(method) | {
        "hat": node("DiffLoRA_LoadConcept", concept_name="demo_hat.safetensors", clip=CLIP),
        "words": node("CLIPTextEncode", clip=["hat", 1], text=text),
        "style": styled(),
        "concept": concept(MODEL),
        "concept style": styled(["concept", 0]),
        "concept off": styled(["concept", 0], strength=0.0),
        "style off": concept(["style", 0], 0.0),
    }
    shown = draw(
        nodes,
        plain("style", "concept", "concept style", "concept off", "style off"),
        {"word_by_word": True},
    )
    np.testing.assert_array_equal(shown["concept off"], shown["concept"])
    np.testing.assert_array_equal(shown["style off"], shown["style"])
    differ(shown, ("concept style", "concept"), ("concept style", "style"))


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_control_net(comfy, draw, files, method, face_picture):
    nodes = loaded(method) | {
        "photo": node("LoadImage", image=comfy.upload_picture(face_picture)),
        "steer": node(
            "ControlNetApplyAdvanced", positive=["words", 0], negative=["none", 0],
            control_net=CONTROL, image=["photo", 0], strength=1.5, start_percent=0.0,
            end_percent=1.0,
        ),
        "style": styled(),
        "off": styled(strength=0.0),
    }  # fmt: skip
    steered = (["steer", 0], ["steer", 1])
    shown = draw(
        nodes,
        plain("style") | {
            "steered": (MODEL, *steered),
            "both": (["style", 0], *steered),
            "steered off": (["off", 0], *steered),
        },
    )  # fmt: skip
    np.testing.assert_array_equal(shown["steered off"], shown["steered"])
    differ(shown, ("both", "steered"), ("both", "style"))


def test_both_methods_in_one_chain(draw, files):
    """PaRa reads the base, so it is the first wherever its node stands."""
    nodes = {
        f"file {m}": node("DiffLoRA_LoadStyle", style_name=f"random_{m}.safetensors")
        for m in METHODS
    } | {
        "inject": styled(style="file styleinject"),
        "inject para": styled(["inject", 0], "file para"),
        "para": styled(style="file para"),
        "para inject": styled(["para", 0], "file styleinject"),
    }  # fmt: skip
    shown = draw(nodes, plain("inject", "para", "inject para", "para inject"))
    np.testing.assert_array_equal(shown["inject para"], shown["para inject"])
    differ(shown, ("inject para", "inject"), ("inject para", "para"))


@pytest.mark.parametrize("method", METHODS)
def test_below_zero_leads_away(draw, files, method):
    nodes = loaded(method) | {
        "away": styled(strength=-0.3), "on": styled(strength=0.3), "off": styled(strength=0.0),
    }  # fmt: skip
    shown = draw(nodes, plain("demo", "away", "on", "off"))
    np.testing.assert_array_equal(shown["off"], shown["demo"])
    away, on = shown["away"] - shown["demo"], shown["on"] - shown["demo"]
    differ(shown, ("away", "demo"), ("on", "demo"))
    assert (away * on).sum() < 0  # the other way, on the whole


@pytest.fixture
def trained_para(comfy, comfy_server):
    """A PaRa that was trained for a few steps, as a file."""
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "images": node("EmptyImage", width=64, height=64, batch_size=2, color=0xFF8800),
        "train": node(
            "DiffLoRA_TrainPaRa", model=MODEL, clip=CLIP, vae=VAE, images=["images", 0],
            prompts="photo of a person", steps=4, rank=2, batch_size=2, seed=1,
            file_name="peach", mirror=True, small_file=False, learning_rate=0.05,
            layers="all", start="least_used", bound=0.2,
        ),
        "told": node("PreviewAny", source=["train", 1]),
    }  # fmt: skip
    path = comfy_server.base_directory / "models/difflora_styles/peach.safetensors"
    if not path.exists():
        comfy.run(nodes)
    return path


def test_a_trained_para_is_loaded_and_its_lora_draws_the_same(
    comfy, comfy_server, draw, trained_para
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
        "off": styled(strength=0.0),
        "core": node(
            "LoraLoaderModelOnly", model=MODEL, lora_name="peach_lora.safetensors",
            strength_model=1.0,
        ),
    }  # fmt: skip
    shown = draw(nodes, plain("demo", "on", "off", "core"))
    np.testing.assert_array_equal(shown["off"], shown["demo"])
    differ(shown, ("on", "demo"))
    assert np.abs(shown["on"] - shown["core"]).max() <= 2  # the file's numbers are rounded


def test_a_para_of_another_base_is_refused(comfy, comfy_server, parts, random_para):
    from dataclasses import replace

    made = random_para(1).adaptation
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
