"""StyleInject in graphs: chains of them, training and its file, and the router that is watched."""

import numpy as np
import pytest
from PIL import Image

from difflora_core.comfy_client import ComfyPromptError


@pytest.fixture
def random_style(random_adaptation):
    """Makes random styles."""
    return random_adaptation("styleinject")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def applied(style, model=("demo", 0), strength=1.0, **changes):
    """Apply Style in a graph."""
    widgets = {
        "start_percent": 0.0, "end_percent": 1.0, "positive_only": False, "input_blocks": 1.0,
        "middle_block": 1.0, "output_blocks": 1.0, "self_attention": 1.0, "cross_attention": 1.0,
    }  # fmt: skip
    links = {"model": list(model), "style": list(style), "strength": strength}
    return node("DiffLoRA_ApplyStyle", **links, **(widgets | changes))


def drawn(name, model):
    """A sampler on a model, and its picture."""
    sampler = node(
        "KSampler", model=list(model), positive=["words", 0], negative=["none", 0],
        latent_image=["empty", 0], seed=3, steps=4, cfg=2.0, sampler_name="euler",
        scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return {
        f"{name}_latent": sampler,
        f"{name}_decoded": node("VAEDecode", samples=[f"{name}_latent", 0], vae=["demo", 2]),
        name: node("PreviewImage", images=[f"{name}_decoded", 0]),
    }


GRAPH = {
    "demo": node("DiffLoRA_LoadDemo"),
    "words": node("CLIPTextEncode", clip=["demo", 1], text="photo of a person, smiling"),
    "none": node("CLIPTextEncode", clip=["demo", 1], text=""),
    "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
}


def test_graphs_draw_chains_of_styles_and_leave_the_base(comfy, comfy_server, parts, random_style):
    storage = parts("difflora_core.storage.adapter_file")
    folder = comfy_server.base_directory / "models/difflora_styles"
    for seed in (1, 2):
        storage.write_adaptation(folder / f"style{seed}.safetensors", random_style(seed).adaptation)
    nodes = GRAPH | {
        "one": node("DiffLoRA_LoadStyle", style_name="style1.safetensors"),
        "two": node("DiffLoRA_LoadStyle", style_name="style2.safetensors"),
        "off": applied(("one", 0), strength=0.0),
        "on": applied(("one", 0)),
        "on_off": applied(("two", 0), ("on", 0), 0.0),
        "then": applied(("two", 0), ("on", 0)),
        "turned": applied(("one", 0), ("second", 0)),
        "second": applied(("two", 0)),
    }
    nodes |= drawn("base", ("demo", 0))
    for name in ("off", "on", "on_off", "then", "turned"):
        nodes |= drawn(f"with_{name}", (name, 0))
    shown = comfy.run(nodes).pictures
    same = [(np.array_equal(a, b)) for a, b in (
        (shown["with_off"], shown["base"]), (shown["with_on_off"], shown["with_on"]),
        (shown["with_on"], shown["base"]), (shown["with_then"], shown["with_turned"]),
        (shown["with_then"], shown["with_on"]),
    )]  # fmt: skip
    assert same == [True, True, False, False, False]
    again = comfy.run_fresh(nodes).pictures
    for name in ("base", "with_then"):
        np.testing.assert_array_equal(again[name], shown[name])


def test_its_node_trains_and_its_file_draws_the_same(comfy, comfy_server):
    from difflora_core.methods.styleinject import StyleInject, style_layers
    from difflora_core.storage.adapter_file import read_adaptation

    more = comfy_server.base_directory / "input" / "more amber"
    more.mkdir()
    Image.new("RGB", (96, 128), (255, 136, 0)).save(more / "tall.png")
    nodes = GRAPH | {
        "images": node("EmptyImage", width=64, height=64, batch_size=5, color=0xFF8800),
        "train": node(
            "DiffLoRA_TrainStyleInject", model=["demo", 0], clip=["demo", 1], vae=["demo", 2],
            images=["images", 0], prompts="photo of a person\nphoto", steps=6, styles=2, rank=2,
            batch_size=2, seed=1, file_name="amber", mirror=False, small_file=False,
            learning_rate=0.05, layers="distillation", held_out=20, folder="more amber",
        ),
        "told": node("PreviewAny", source=["train", 1]),
        "on": applied(("train", 0)),
    }  # fmt: skip
    nodes |= drawn("base", ("demo", 0)) | drawn("trained", ("on", 0))
    answer = comfy.run(nodes)
    shown = answer.pictures
    assert "mask" not in answer.outputs["told"]["text"][0]
    assert "1 picture of the folder" in answer.outputs["told"]["text"][0]
    made = read_adaptation(comfy_server.base_directory / "models/difflora_styles/amber.safetensors")
    StyleInject.check(made)
    assert (made.method, made.word, made.facts["pictures"]) == ("styleinject", None, 5)
    assert {layer.kernel for layer in style_layers(made).values()} == {(), (3, 3)}
    assert int(np.abs(shown["trained"][0].astype(int) - shown["base"][0]).max()) > 8
    nodes["file"] = node("DiffLoRA_LoadStyle", style_name="amber.safetensors")
    nodes["on_file"] = applied(("file", 0))
    read = comfy.run(nodes | drawn("read", ("on_file", 0))).pictures["read"]
    gap = np.abs(read[0].astype(int) - shown["trained"][0]).max()
    assert int(gap) <= 2  # the file is float16
    nodes["train"]["inputs"]["folder"] = "../input"
    nodes = {name: nodes[name] for name in ("demo", "images", "train", "told")}
    with pytest.raises(ComfyPromptError, match=r"folder '../input' was not found"):
        comfy.run(nodes)


def test_the_router_is_seen_in_every_step_and_the_picture_is_ksamplers(
    comfy, comfy_server, parts, random_style
):
    storage = parts("difflora_core.storage.adapter_file")
    folder = comfy_server.base_directory / "models/difflora_styles"
    for name, styles in (("mixed", 3), ("single", 1)):
        made = random_style(1, styles).adaptation
        storage.write_adaptation(folder / f"{name}.safetensors", made)
    nodes = GRAPH | {
        "style": node("DiffLoRA_LoadStyle", style_name="mixed.safetensors"),
        "on": applied(("style", 0)),
    }
    nodes |= drawn("plain", ("on", 0))
    widgets = nodes["plain_latent"]["inputs"]
    nodes |= {
        "router": node("DiffLoRA_StyleRouter", **widgets),
        "told": node("PreviewAny", source=["router", 2]),
        "seen": node("PreviewImage", images=["router", 1]),
        "map": node("PreviewImage", images=["router", 3]),
        "decoded": node("VAEDecode", samples=["router", 0], vae=["demo", 2]),
        "same": node("PreviewImage", images=["decoded", 0]),
    }
    answer = comfy.run(nodes)
    for mine, cores in zip(answer.pictures["same"], answer.pictures["plain"], strict=True):
        np.testing.assert_array_equal(mine, cores)
    assert "style 3 " in answer.outputs["told"]["text"][0]
    assert answer.pictures["seen"][0].std() > 20
    assert answer.pictures["map"][0].std() > 5
    base = node("DiffLoRA_StyleRouter", **(widgets | {"model": ["demo", 0]}))
    single = node("DiffLoRA_LoadStyle", style_name="single.safetensors")
    for change in ({"router": base}, {"style": single}):
        with pytest.raises(ComfyPromptError, match="there is no router to show"):
            comfy.run(nodes | change)
