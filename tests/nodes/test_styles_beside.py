"""Styles of every method beside people, concepts and ControlNets, in ComfyUI's own graphs.

Each part acts, at strength 0 it is gone to the pixel, and the order of the nodes is the order that
their help pages say.
"""

import numpy as np
import pytest

from difflora_core.methods.base import StyleMethod
from difflora_core.methods.registry import METHODS as REGISTRY

MODEL, CLIP, CONTROL = (["demo", k] for k in (0, 1, 6))
WIDGETS = {
    "start_percent": 0.0, "end_percent": 1.0, "positive_only": False, "input_blocks": 1.0,
    "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0, "cross_attention": 1.0,
}  # fmt: skip
METHODS = {name: kind for name, kind in REGISTRY.items() if issubclass(kind, StyleMethod)}


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
def files(comfy_server, parts, random_adaptation):
    """A random style file of each method."""
    write = parts("difflora_core.storage.adapter_file").write_adaptation
    folder = comfy_server.base_directory / "models/difflora_styles"
    for name in METHODS:
        write(folder / f"random_{name}.safetensors", random_adaptation(name)(1).adaptation)


def plain(*names):
    """The models of these nodes under the ordinary prompts."""
    return {name: ([name, 0], ["words", 0], ["none", 0]) for name in names}


def differ(shown, *pairs):
    for one, other in pairs:
        assert np.abs(shown[one] - shown[other]).max() > 8, (one, other)


def loaded(method):
    return {"file": node("DiffLoRA_LoadStyle", style_name=f"random_{method}.safetensors")}


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_person_in_either_order_of_the_nodes(draw_models, files, method):
    """The same pictures: a LoRA is in what a style sees, or whole beside one of the base."""
    nodes = loaded(method) | {
        "style": styled(),
        "person": person(),
        "person style": styled(["person", 0]),
        "style person": person(["style", 0]),
        "person off": styled(["person", 0], strength=0.0),
        "style off": person(["style", 0], strength=0.0),
    }
    names = ("demo", "style", "person", "person style", "style person", "person off", "style off")
    shown = draw_models(nodes, plain(*names))
    np.testing.assert_array_equal(shown["person off"], shown["person"])
    np.testing.assert_array_equal(shown["style off"], shown["style"])
    np.testing.assert_array_equal(shown["person style"], shown["style person"])
    differ(shown, ("person style", "person"), ("person style", "style"), ("person", "demo"))


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_concept(draw_models, files, is_shipped, method):
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
    shown = draw_models(
        nodes, plain("style", "concept", "concept style", "concept off", "style off")
    )
    np.testing.assert_array_equal(shown["concept off"], shown["concept"])
    np.testing.assert_array_equal(shown["style off"], shown["style"])
    differ(shown, ("concept style", "concept"), ("concept style", "style"))


@pytest.mark.parametrize("method", METHODS)
def test_beside_a_control_net(comfy, draw_models, files, method, face_picture):
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
    shown = draw_models(
        nodes,
        plain("style") | {
            "steered": (MODEL, *steered),
            "both": (["style", 0], *steered),
            "steered off": (["off", 0], *steered),
        },
    )  # fmt: skip
    np.testing.assert_array_equal(shown["steered off"], shown["steered"])
    differ(shown, ("both", "steered"), ("both", "style"))


@pytest.mark.parametrize("of_base", [name for name, kind in METHODS.items() if kind.of_base])
@pytest.mark.parametrize("other", [name for name, kind in METHODS.items() if not kind.of_base])
def test_one_of_the_base_is_the_first_wherever_its_node_stands(draw_models, files, of_base, other):
    nodes = {
        f"file {m}": node("DiffLoRA_LoadStyle", style_name=f"random_{m}.safetensors")
        for m in (of_base, other)
    } | {
        "other": styled(style=f"file {other}"),
        "other then base": styled(["other", 0], f"file {of_base}"),
        "base": styled(style=f"file {of_base}"),
        "base then other": styled(["base", 0], f"file {other}"),
    }  # fmt: skip
    shown = draw_models(nodes, plain("other", "base", "other then base", "base then other"))
    np.testing.assert_array_equal(shown["other then base"], shown["base then other"])
    differ(shown, ("other then base", "other"), ("other then base", "base"))


@pytest.mark.parametrize("method", METHODS)
def test_below_zero_leads_away(draw_models, files, method):
    nodes = loaded(method) | {
        "away": styled(strength=-0.3), "on": styled(strength=0.3), "off": styled(strength=0.0),
    }  # fmt: skip
    shown = draw_models(nodes, plain("demo", "away", "on", "off"))
    np.testing.assert_array_equal(shown["off"], shown["demo"])
    away, on = shown["away"] - shown["demo"], shown["on"] - shown["demo"]
    differ(shown, ("away", "demo"), ("on", "demo"))
    assert (away * on).sum() < 0  # the other way, on the whole
