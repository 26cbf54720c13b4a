"""Every shipped workflow against real ComfyUI's own node list, and a real run of the converter."""

import json

import pytest
from PIL import Image

from difflora_core.demo.workflow_api import PACK, workflow_pictures, workflow_to_prompt

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflow_fits_the_node_list(comfy, path):
    workflow, info = json.loads(path.read_text("utf-8")), comfy.object_info()
    prompt = workflow_to_prompt(workflow, info)
    for node_id, node in prompt.items():
        required = info[node["class_type"]]["input"].get("required") or {}
        growing = {n for n, s in required.items() if str(s[0]).startswith("COMFY_AUTOGROW")}
        assert set(required) - growing <= set(node["inputs"]), f"node {node_id}"
    assert any(info[node["class_type"]]["output_node"] for node in prompt.values())
    assert all(picture.exists() for picture in workflow_pictures(workflow))


def test_saved_graph_runs_as_the_front_end_would_run_it(comfy, tmp_path):
    """LoadImage (with the value of its upload button) through a reroute, scaled, previewed."""
    Image.new("RGB", (8, 4), (10, 200, 30)).save(tmp_path / "green.png")
    nodes = [
        {"id": 1, "type": "LoadImage", "widgets_values": [None, "image"]},
        {"id": 2, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}]},
        {
            "id": 3,
            "type": "ImageScale",
            "widgets_values": ["nearest-exact", 16, 12, "disabled"],
            "inputs": [{"name": "image", "type": "IMAGE", "link": 2}],
        },
        {
            "id": 4,
            "type": "PreviewImage",
            "inputs": [{"name": "images", "type": "IMAGE", "link": 3}],
        },
    ]
    nodes[0]["widgets_values"][0] = comfy.upload_picture(tmp_path / "green.png")
    links = [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 3, 0, 4, 0, "IMAGE"]]
    prompt = workflow_to_prompt({"nodes": nodes, "links": links}, comfy.object_info())
    picture = comfy.run(prompt).picture(4)
    assert picture.shape == (12, 16, 3)
    assert picture[0, 0].tolist() == [10, 200, 30]


def test_seed_control_is_dropped_in_the_real_schema(comfy):
    widgets = [5, "randomize", 20, 7.0, "euler", "normal", 1.0]
    graph = {"nodes": [{"id": 1, "type": "KSampler", "widgets_values": widgets}], "links": []}
    inputs = workflow_to_prompt(graph, comfy.object_info())["1"]["inputs"]
    assert inputs == {
        "seed": 5,
        "steps": 20,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
