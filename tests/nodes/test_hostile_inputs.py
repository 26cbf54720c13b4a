"""What an artist may meet: names and files that break other programs end as words on a node.

After each the queue takes the next prompt.
"""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from difflora_core.comfy_client import ComfyPromptError

COLOURS = itertools.count(1)
DIFFLORA = ["demo", 5]
STEM = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_v"


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def shown(source, output=0):
    return node("PreviewAny", source=[source, output])


@pytest.fixture(autouse=True)
def the_queue_goes_on(comfy):
    """Whatever a test sent, the next prompt runs."""
    yield
    nodes = {
        "picture": node("EmptyImage", width=8, height=8, batch_size=1, color=next(COLOURS)),
        "shown": node("PreviewImage", images=["picture", 0]),
    }
    assert comfy.run(nodes).picture("shown") is not None


def refused(comfy, nodes, at):
    """A sentence on the node, short enough and fit to be shown."""
    with pytest.raises(ComfyPromptError) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == at
    assert "Traceback" not in caught.value.message
    assert 0 < len(caught.value.message.encode()) < 5000
    return caught.value.message


def covariance(name):
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "it": node(
            "DiffLoRA_BuildCovariance", clip=["demo", 1], captions="demo", count=100,
            file_name=name, ridge=0.01, rebuild=False,
        ),
        "show": shown("it"),
    }  # fmt: skip


def added(library, name):
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "new": node(
            "DiffLoRA_InventIdentity", difflora_model=DIFFLORA, seed=1, count=1, steps=2
        ),
        "it": node(
            "DiffLoRA_AddToLibrary", difflora_model=DIFFLORA, identity=["new", 0], library=library,
            name=name, same_name="number",
        ),
    }  # fmt: skip


PROMPTS = {
    "listed library": lambda name: {
        "it": node("DiffLoRA_ListLibrary", library=name, first=1, count=4, columns=4)
    },
    "library to add to": lambda name: added(name, "Ada"),
    "person to add": lambda name: added("hostile", name),
    "person to pick": lambda name: {
        **added("cast of one", "Ada"),
        "it": node("DiffLoRA_PickFromLibrary", library="cast of one", name=name, number=1),
        "show": shown("it"),
    },
    "covariance": covariance,
    "model": lambda name: {
        "it": node("DiffLoRA_LoadModel", model_name=name),
        "show": shown("it"),
    },
    "LoRA": lambda name: {"it": node("DiffLoRA_LoadLoRAFile", lora_name=name), "show": shown("it")},
    "concept": lambda name: {
        "demo": node("DiffLoRA_LoadDemo"),
        "it": node("DiffLoRA_LoadConcept", concept_name=name, clip=["demo", 1]),
        "show": shown("it"),
    },
    "faces": lambda name: {
        "it": node("DiffLoRA_LoadFaceAnalysis", package=name, provider="cpu"),
        "show": shown("it"),
    },
}


NAMES = {
    "half a character": "\ud800",
    "too long": "x" * 5000,
    "zero": "a\0b",
    "no character": "\n",
    "elsewhere": "../../../x",
}


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("where", PROMPTS)
def test_names_that_cannot_be(comfy, where, what):
    if (where, what) == ("person to add", "elsewhere"):
        pytest.skip("a person may be called so: no file is")
    refused(comfy, PROMPTS[where](NAMES[what]), "it")


def lora(comfy_server, name, tensors):
    folder = comfy_server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors")
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "file": node("DiffLoRA_LoadLoRAFile", lora_name=f"{name}.safetensors"),
        "it": node(
            "DiffLoRA_EncodeLoRA", difflora_model=DIFFLORA, lora=["file", 0], refine_steps=0
        ),
        "show": shown("it"),
    }


LORAS = {
    "a small file that means gigabytes": {
        f"{STEM}.lokr_w1": torch.ones(20_000, 2).half(),
        f"{STEM}.lokr_w2": torch.ones(20_000, 2).half(),
    },
    "a product beyond all numbers": {
        f"{STEM}.lora_up.weight": torch.full((64, 2), 3e38),
        f"{STEM}.lora_down.weight": torch.full((2, 64), 3e38),
    },
    "no numbers": {
        f"{STEM}.lora_up.weight": torch.full((64, 2), float("nan")),
        f"{STEM}.lora_down.weight": torch.ones(2, 64),
    },
    "another type in every factor": {
        f"{STEM}.lora_up.weight": torch.ones(64, 2, dtype=torch.int64),
        f"{STEM}.lora_down.weight": torch.ones(2, 64),
    },
    "nothing": {},
}


@pytest.mark.parametrize("what", LORAS)
def test_hostile_loras(comfy, comfy_server, what):
    refused(comfy, lora(comfy_server, what, LORAS[what]), "it")


@pytest.mark.parametrize("content", [b"", b"[" * 10_000, b"\xff" * 100], ids=["empty", "[", "ff"])
def test_a_library_that_is_none(comfy, comfy_server, content):
    folder = comfy_server.base_directory / "models" / "difflora_library"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.safetensors").write_bytes(content)
    refused(comfy, PROMPTS["listed library"]("broken"), "it")


@pytest.fixture
def picture():
    file = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("damage", ["cut", "PostScript"])
def test_a_damaged_picture(comfy, comfy_server, picture, damage):
    """ComfyUI's own loader says so, or shows what is there."""
    content = {
        "cut": picture[:20],
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    name = f"{damage}.png"
    (comfy_server.base_directory / "input" / name).write_bytes(content[damage])
    refused(
        comfy,
        {"it": node("LoadImage", image=name), "show": node("PreviewImage", images=["it", 0])},
        "it",
    )
