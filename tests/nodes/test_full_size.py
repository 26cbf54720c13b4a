"""The full-size harness, on the demo world in real ComfyUI."""

import pytest

from benchmarks.cost.sdxl import graphs
from benchmarks.cost.workflows import Harness
from difflora_core.demo.comfyui.workflow_api import PACK, workflow_pictures, workflow_to_prompt
from difflora_core.demo.workflows.runner import read_workflow

QUICKSTART = PACK / "workflows" / "quickstart_demo.json"


@pytest.fixture(scope="module")
def harness(comfy_server):
    base = graphs.base_prompt("")
    base["load"] = {"class_type": "DiffLoRA_LoadDemo", "inputs": {}}
    base["empty"]["inputs"] |= {"width": 64, "height": 64}
    return Harness(comfy_server, base)


@pytest.fixture(scope="module")
def quickstart(comfy):
    workflow = read_workflow(QUICKSTART)
    for picture in workflow_pictures(workflow):
        comfy.upload_picture(picture)
    return graphs.smaller(workflow_to_prompt(workflow, comfy.object_info()))


def test_a_row_of_a_workflow_that_runs(harness, quickstart):
    row = harness.row("quickstart", quickstart)
    assert row.problem == ""
    assert row.good
    assert {"KSampler", "DiffLoRA_Personalize"} <= set(row.seconds)
    assert row.changed > 1
    assert row.restored is True
    assert 0.3 < row.peak_gb < 16


def test_every_training_computes_layers_again(comfy):
    info = comfy.object_info()
    kinds = {}
    for prompt in graphs.all_prompts(info).values():
        for node in prompt.values():
            schema = info[node["class_type"]]["input"]
            if "memory" in {**schema["required"], **(schema.get("optional") or {})}:
                kinds.setdefault(node["class_type"], set()).add(node["inputs"].get("memory"))
    assert len(kinds) > 5
    assert {kind: values for kind, values in kinds.items() if values != {"saving"}} == {}


def test_a_lora_without_strength_changes_nothing_and_that_is_seen(harness, quickstart):
    weak = graphs.smaller(quickstart)
    for node in weak.values():
        if node["class_type"] == "LoraModelLoader":
            node["inputs"]["strength_model"] = 0.0
    row = harness.row("weak", weak)
    assert (row.problem, row.changed, row.good) == ("", 0.0, False)


def test_another_picture_of_the_base_is_seen(harness):
    other = {key: {**node, "inputs": dict(node["inputs"])} for key, node in harness.base.items()}
    other["sampler"]["inputs"]["seed"] = 2
    harness.untouched = 255 - harness.untouched
    row = harness.row("altered", other)
    harness.untouched = 255 - harness.untouched
    assert (row.problem, row.changed, row.restored, row.good) == ("", None, False, False)


def test_a_part_that_was_left_out_is_a_failure(harness, quickstart):
    broken = graphs.smaller(quickstart)
    (lora,) = [n for n in broken.values() if n["class_type"] == "LoraModelLoader"]
    lora["inputs"]["strength_model"] = 1e9
    row = harness.row("broken", broken)  # ComfyUI runs what does not need it
    assert "did not run" in row.problem
    assert "SaveImage" in row.problem
    assert not row.good


def test_a_failure_names_the_node(harness, quickstart):
    broken = graphs.smaller(quickstart)
    (person,) = [n for n in broken.values() if n["class_type"] == "DiffLoRA_Personalize"]
    photo, _ = person["inputs"]["images"]
    broken[photo] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0},
    }
    row = harness.row("nobody", broken)
    assert "DiffLoRA_Personalize" in row.problem
    assert not row.good


def test_every_training_node_is_run(comfy):
    info = comfy.object_info()
    prompts = graphs.all_prompts(info)
    types = {node["class_type"] for prompt in prompts.values() for node in prompt.values()}
    trainings = {
        kind
        for kind, schema in info.items()
        if kind.startswith(("DiffLoRA_Train", "DiffLoRA_Distil"))
        and "steps" in schema["input"]["required"]
    }
    assert len(trainings) >= 6
    assert trainings <= types
    for name, prompt in prompts.items():
        steps = [n["inputs"]["steps"] for n in prompt.values() if n["class_type"] in trainings]
        assert all(count <= 2 for count in steps), name
        required = {key: info[n["class_type"]]["input"]["required"] for key, n in prompt.items()}
        for key, node in prompt.items():
            growing = {n for n, s in required[key].items() if "AUTOGROW" in str(s[0])}
            assert set(required[key]) - growing <= set(node["inputs"]), (name, key)
