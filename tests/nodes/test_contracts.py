"""What saved workflows and files rely on: the contracts hold, and breaking them is noticed."""

import copy

import contract
import contract_files
import numpy as np
import pytest
import torch

from difflora_core.demo.comfyui.workflow_api import PACK, workflow_to_prompt
from difflora_core.demo.workflows.runner import FULL_SIZE
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.storage.checkpoint import load_model
from difflora_core.storage.library_file import read_library
from difflora_core.storage.lora_file import load_lora

NODES = contract.read(contract.FOLDER / "nodes.json")
FORMATS = contract.read(contract.FOLDER / "formats.json")
KEPT = sorted(contract.FOLDER.glob("*/*.json"))
VERSIONS = sorted(
    path for path in contract.FOLDER.iterdir() if (path / "lora.safetensors").exists()
)
DECODED = 4.9666
"""Sum of |up| that the kept checkpoint decodes from a ramp."""


@pytest.fixture(scope="module")
def info(comfy):
    return comfy.object_info()


def test_nodes_keep_their_promises(info, comfy):
    replaced = comfy.get("/node_replacements")
    assert contract.node_breaks(NODES, contract.node_contract(info), replaced) == []


def test_every_node_and_socket_is_recorded(info):
    """Else the next change of it would break workflows unseen: run `make contracts`."""
    live = contract.node_contract(info)
    assert set(live) <= set(NODES)
    for node, now in live.items():
        for group in ("required", "optional", "outputs"):
            assert len(now[group]) == len(NODES[node][group]), (node, group)


def test_files_keep_their_fields():
    assert contract.format_breaks(FORMATS, contract.format_contract()) == []


def broken(node="DiffLoRA_Personalize"):
    """The recorded nodes, and one of them to change."""
    nodes = copy.deepcopy(NODES)
    return nodes, nodes[node]


BREAKING = {
    "is gone": lambda nodes, node: nodes.pop("DiffLoRA_DecodeLoRA"),
    "order and ids": lambda nodes, node: node["required"].reverse(),
    "images became photos": lambda nodes, node: node["required"][0].update(id="photos"),
    "lost one of its optional": lambda nodes, node: node["optional"].pop(),
    "lost one of its outputs": lambda nodes, node: node["outputs"].pop(),
    "mode: default": lambda nodes, node: node["required"][2].update(default="sampled"),
    "lost a choice": lambda nodes, node: node["required"][2].update(options=["best_guess"]),
    "seed: control_after_generate": lambda nodes, node: node["required"][3].pop(
        "control_after_generate"
    ),
    "allows less": lambda nodes, node: node["required"][4].update(max=10),
    "new required input": lambda nodes, node: node["required"].append({"id": "x", "type": "INT"}),
    "face_analysis was": lambda nodes, node: node["optional"][1].update(type="FACEANALYSIS"),
    "LORA_MODEL was": lambda nodes, node: node["outputs"][0].update(type="LORA"),
    "list was None": lambda nodes, node: node["outputs"][0].update(list=True),
}


@pytest.mark.parametrize("complaint", BREAKING)
def test_breaking_change_is_named(complaint):
    nodes, node = broken()
    BREAKING[complaint](nodes, node)
    assert complaint in "; ".join(contract.node_breaks(NODES, nodes))


def test_additions_are_free():
    nodes, node = broken()
    node["optional"].append({"id": "more", "type": "FLOAT", "default": 1.0})
    node["optional"][0]["type"] += ",CLIP_VISION_OUTPUT"
    node["outputs"].append({"type": "IMAGE"})
    node["required"][2]["options"].insert(0, "third")
    node["required"][4].update(max=10_000)
    nodes["DiffLoRA_New"] = {"required": [], "optional": [], "outputs": []}
    assert contract.node_breaks(NODES, nodes) == []


def test_renamed_node_needs_a_replacement():
    nodes, _ = broken()
    nodes["DiffLoRA_Better"] = nodes.pop("DiffLoRA_DecodeLoRA")
    assert contract.node_breaks(NODES, nodes) != []
    assert contract.node_breaks(NODES, nodes, {"DiffLoRA_DecodeLoRA": [{}]}) == []


def test_lost_or_changed_file_field_is_named():
    formats = copy.deepcopy(FORMATS)
    formats["library"]["metadata"]["difflora_library"]["version"] = 2
    del formats["lora"]["metadata"]["difflora.seed"]
    formats["lora"]["metadata"]["difflora.new"] = "str"
    breaks = contract.format_breaks(FORMATS, formats)
    assert [line.split(" ")[0] for line in breaks] == [
        "/library/metadata/difflora_library/version",
        "/lora/metadata/difflora.seed",
    ]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_saved_workflow_gives_the_prompt_it_gave(path, info):
    """Only inputs that are newer than the file may have come since."""
    saved = contract.read(path)
    prompt = workflow_to_prompt(saved["workflow"], info)
    assert prompt.keys() == saved["prompt"].keys()
    for node, before in saved["prompt"].items():
        assert prompt[node]["class_type"] == before["class_type"]
        inputs = prompt[node]["inputs"]
        assert {name: inputs.get(name) for name in before["inputs"]} == before["inputs"]


def runs():
    """The saved workflows; those that train take half a minute each."""
    for path in KEPT:
        kinds = {node["class_type"] for node in contract.read(path)["prompt"].values()}
        slow = any(kind.startswith("DiffLoRA_Train") for kind in kinds)
        marks = [pytest.mark.slow] if slow else []
        yield pytest.param(path, id=f"{path.parent.name}-{path.stem}", marks=marks)


@pytest.mark.parametrize("path", runs())
def test_saved_workflow_still_runs(path, comfy, info, is_shipped):
    saved, shipped = contract.read(path), PACK / "workflows" / path.name
    if not is_shipped or path.name.startswith(FULL_SIZE):
        pytest.skip("needs models that are not here")
    prompt = workflow_to_prompt(saved["workflow"], info)
    if shipped.exists() and workflow_to_prompt(contract.read(shipped), info) == prompt:
        pytest.skip("still shipped as it was: the tests of the workflows run it")
    assert comfy.run(prompt).pictures


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_files_of_every_version_are_read_as_they_were_meant(folder):
    model = load_model(folder / "checkpoint.safetensors")
    with torch.no_grad():
        z = torch.linspace(-1, 1, 8).reshape(1, 2, 4)
        weights = model.decode(LoRALatent(z, model.layout.hash)).batch_item(0)
    total = sum(layer.up.double().abs().sum() for layer in weights.layers.values())
    assert total.item() == pytest.approx(DECODED, rel=1e-3)
    library = read_library(folder / "library.safetensors")
    assert library.names == ["Ada", "Ben"]
    assert library.people[0].picture is not None
    torch.testing.assert_close(library.latents.z, torch.arange(12.0).reshape(2, 2, 3))
    read = load_lora(folder / "lora.safetensors", contract_files.tiny_layout())
    for name, layer in contract_files.tiny_lora().layers.items():
        np.testing.assert_allclose(read.weights.layers[name].down, layer.down, atol=1e-3)
        np.testing.assert_allclose(read.weights.layers[name].up, layer.up, atol=1e-3)


def features_prompt(comfy, picture, kind, **inputs):
    """Photo to the gate's picture through a node of the class `kind`."""
    photo = comfy.upload_picture(picture)
    out = 0 if kind == "DiffLoRA_WeighFeatures" else 1
    return {
        "1": {"class_type": "DiffLoRA_LoadDemo", "inputs": {}, "_meta": {"title": "Demo"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": photo}, "_meta": {"title": "Photo"}},
        "3": {
            "class_type": "DiffLoRA_ExtractFeatures",
            "inputs": {
                **{"images": ["2", 0], "clip_vision": ["1", 3], "face_analysis": ["1", 4]},
                **{"on_missing_face": "error", "face_order": "largest", "face_index": 0},
                **{"image_region": "crop", "region_factor": 2.2},
            },
            "_meta": {"title": "Features"},
        },
        "4": {
            "class_type": kind,
            "inputs": {"features": ["3", 0], "gate": "manual", **inputs},
            "_meta": {"title": "Mix"},
        },
        "5": {
            "class_type": "PreviewImage",
            "inputs": {"images": ["4", out]},
            "_meta": {"title": "Gate"},
        },
    }


def test_workflow_with_the_old_id_of_a_renamed_node_runs(comfy, face_picture):
    """The old node had other input names, fewer widgets, and its outputs the other way round."""
    weights = {"face_weight": -1.0, "image_weight": -1.0}
    today = {"difflora_model": ["1", 5], "face_share": 0.8, **weights}
    old = {"model": ["1", 5], "share": 0.8}
    now = comfy.run(features_prompt(comfy, face_picture, "DiffLoRA_MixFeatures", **today))
    then = comfy.run(features_prompt(comfy, face_picture, "DiffLoRA_WeighFeatures", **old))
    np.testing.assert_array_equal(now.picture(5), then.picture(5))
    assert now.picture(5).std() > 10


def test_deprecated_subclass_keeps_the_schema_under_the_old_id(node_module):
    """The other way, for an id that stays: what the contributors' guide shows."""
    decode = node_module("difflora").DecodeLoRA

    class MakeLoRA(decode):
        @classmethod
        def define_schema(cls):
            schema = super().define_schema()
            schema.node_id, schema.is_deprecated = "DiffLoRA_MakeLoRA", True
            return schema

    old, new = MakeLoRA.GET_SCHEMA(), decode.GET_SCHEMA()
    assert (old.node_id, old.is_deprecated) == ("DiffLoRA_MakeLoRA", True)
    assert new.node_id == "DiffLoRA_DecodeLoRA"
    assert not new.is_deprecated
    assert [i.as_dict() for i in old.inputs] == [i.as_dict() for i in new.inputs]
    assert [o.as_dict() for o in old.outputs] == [o.as_dict() for o in new.outputs]
