"""Load LoRA File: what is in the file comes out, and only files of the lists are read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo import paths


def graph(name):
    return {
        "load": {"class_type": "DiffLoRA_LoadLoRAFile", "inputs": {"lora_name": name}},
        "save": {
            "class_type": "SaveLoRA",
            "inputs": {"lora": ["load", 0], "prefix": "loras/again", "steps": 0},
        },
    }


@pytest.fixture(scope="module")
def listed(comfy_server):
    """A file in models/loras with a name of its own."""
    folder = comfy_server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "listed.safetensors").write_bytes(paths.OLD_LORA.read_bytes())
    return "listed.safetensors"


def test_every_tensor_comes_out(comfy, comfy_server, listed):
    comfy.run(graph(listed))
    (saved,) = (comfy_server.output_directory / "loras").glob("again*.safetensors")
    expected, found = load_file(paths.OLD_LORA), load_file(saved)
    assert expected.keys() == found.keys()
    assert all(expected[key].equal(found[key]) for key in expected)


def test_the_scale_of_a_peft_file_is_kept(comfy, comfy_server):
    """PEFT writes alpha into the metadata, which no socket carries."""
    stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{stem}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    folder = comfy_server.base_directory / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 2, "unet.r": 4})}
    save_file(tensors, folder / "peft.safetensors", metadata)
    nodes = graph("peft.safetensors")
    nodes["save"]["inputs"]["prefix"] = "loras/scaled"
    comfy.run(nodes)
    (saved,) = (comfy_server.output_directory / "loras").glob("scaled*.safetensors")
    found = load_file(saved)
    assert found.keys() == {*tensors, f"{stem}.alpha"}
    assert float(found[f"{stem}.alpha"]) == 2


@pytest.mark.parametrize("name", ["", "missing.safetensors", "../../comfyui.log", "/etc/passwd"])
def test_other_files_are_refused_in_words(comfy, listed, name):
    with pytest.raises(ComfyPromptError, match=r"was not found\. Put it into .*loras.* press R"):
        comfy.run(graph(name))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("cut", lambda data: data[:-1000], "damaged; download it again"),
        ("page", lambda data: b"<html>not found</html>", "not a safetensors file"),
        ("pickle", lambda data: b"\x80\x04N." + bytes(20), "pickle"),
    ],
)
def test_damaged_file_is_one_sentence_on_the_node(
    comfy, listed, comfy_server, name, damage, message
):
    path = comfy_server.base_directory / "models" / "loras" / f"{name}.safetensors"
    path.write_bytes(damage(paths.OLD_LORA.read_bytes()))
    with pytest.raises(ComfyPromptError, match=message) as caught:
        comfy.run(graph(path.name))
    assert caught.value.node_id == "load"
    assert "\n" not in caught.value.message
