"""Every node's schema: a public contract, and the parameters of execute."""

import inspect
from importlib import import_module

import pytest

CONTRACT = {
    "DiffLoRA_LoadDemo": (
        [],
        ["MODEL", "CLIP", "VAE", "CLIP_VISION", "FACEANALYSIS", "DIFFLORA_MODEL"],
    ),
    "DiffLoRA_LoadModel": (["model_name"], ["DIFFLORA_MODEL"]),
    "DiffLoRA_LoadFaceAnalysis": (["package", "provider"], ["FACEANALYSIS"]),
    "DiffLoRA_Personalize": (
        "images difflora_model clip_vision face_analysis mask base_model mode seed steps guidance "
        "on_missing_face face_order face_index image_region gate face_share".split(),
        ["LORA_MODEL", "IMAGE"],
    ),
    "DiffLoRA_ExtractFeatures": (
        "images clip_vision face_analysis mask features on_missing_face face_order face_index "
        "image_region region_factor".split(),
        ["DIFFLORA_FEATURES", "IMAGE"],
    ),
    "DiffLoRA_MixFeatures": (
        "difflora_model features gate face_share face_weight image_weight".split(),
        ["DIFFLORA_CONDITION", "IMAGE"],
    ),
    "DiffLoRA_SampleLatent": (
        "difflora_model condition mode seed steps guidance".split(),
        ["DIFFLORA_LATENT"],
    ),
    "DiffLoRA_DecodeLoRA": ("difflora_model lora_latent base_model".split(), ["LORA_MODEL"]),
}
"""Ids and their order are kept for ever: workflows store widget values by position."""


@pytest.fixture(scope="module")
def nodes(pack, node_module):
    node_module("model_paths").register()  # ComfyUI calls on_load first
    listed = import_module(".nodes", pack.__name__).NODES
    return {node.GET_SCHEMA().node_id: node for node in listed}


@pytest.mark.parametrize("node_id", CONTRACT)
def test_ids_and_outputs_keep_their_order(nodes, node_id):
    schema = nodes[node_id].define_schema()
    inputs, outputs = CONTRACT[node_id]
    assert [i.id for i in schema.inputs][: len(inputs)] == inputs
    assert [o.get_io_type() for o in schema.outputs][: len(outputs)] == outputs


def test_schema_ids_equal_execute_parameters(nodes):
    for node_id, node in nodes.items():
        schema = node.define_schema()
        parameters = inspect.signature(node.execute).parameters
        assert {i.id for i in schema.inputs} == set(parameters), node_id
        for item in schema.inputs:
            has_default = parameters[item.id].default is not inspect.Parameter.empty
            assert bool(item.optional) == has_default, f"{node_id}.{item.id}"


def test_every_node_and_socket_explains_itself(nodes):
    for node_id, node in nodes.items():
        schema = node.define_schema()
        assert schema.description, node_id
        assert schema.category.startswith("DiffLoRA"), node_id
        widgets = [i for i in schema.inputs if i.id not in ("features", "condition", "lora_latent")]
        assert all(item.tooltip for item in widgets), node_id


def test_execute_is_short(nodes):
    for node_id, node in nodes.items():
        body = inspect.getsource(node.execute)
        assert body.count("\n") - len(inspect.signature(node.execute).parameters) <= 25, node_id
