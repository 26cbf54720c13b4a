"""Every node's schema against its execute; what artists rely on is in test_contracts."""

import inspect
from importlib import import_module

import pytest


@pytest.fixture(scope="module")
def nodes(pack, node_module):
    node_module("model_paths").register()  # ComfyUI calls on_load first
    listed = import_module(".nodes", pack.__name__).NODES
    assert listed, "the checks would hold for nothing"
    return {node.GET_SCHEMA().node_id: node for node in listed}


def test_schema_ids_equal_execute_parameters(nodes):
    for node_id, node in nodes.items():
        schema = node.define_schema()
        parameters = inspect.signature(node.execute).parameters
        assert {i.id for i in schema.inputs} == set(parameters), node_id
        for item in schema.inputs:
            has_default = parameters[item.id].default is not inspect.Parameter.empty
            assert bool(item.optional) == has_default, f"{node_id}.{item.id}"


def test_execute_is_short(nodes):
    for node_id, node in nodes.items():
        body = inspect.getsource(node.execute)
        assert body.count("\n") - len(inspect.signature(node.execute).parameters) <= 25, node_id
