"""Every node's schema against its execute; what artists rely on is in test_contracts."""

import inspect
from importlib import import_module

import pytest


@pytest.fixture(scope="module")
def package(pack):
    return import_module(".nodes", pack.__name__)


@pytest.fixture(scope="module")
def nodes(package, node_module):
    node_module("model_paths").register()  # ComfyUI calls on_load first
    listed = package.NODES
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


def test_a_method_without_a_node_file_brings_no_node(package, monkeypatch):
    before = package.method_nodes()
    assert before
    monkeypatch.setitem(package.METHODS, "nodeless", object)
    assert package.method_nodes() == before


def test_a_broken_node_file_raises_its_own_error(package, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import what_is_not_there\n")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setitem(package.METHODS, "broken", object)
    with pytest.raises(ModuleNotFoundError, match="what_is_not_there"):
        package.method_nodes()


@pytest.mark.parametrize("node", ["DiffLoRA_Personalize", "DiffLoRA_SampleLatent"])
def test_a_fresh_node_keeps_its_seed(comfy, node):
    """Its mode is the best guess, which has no seed: another one would only make it run again."""
    inputs = comfy.object_info()[node]["input"]["required"]
    assert inputs["mode"][1]["default"] == "best_guess"
    assert inputs["seed"][1]["control_after_generate"] == "fixed"
