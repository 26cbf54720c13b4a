"""workflows/quickstart_demo.json with the shipped demo world."""

import json

import numpy as np
import pytest
from PIL import Image

from difflora_core.demo.comfyui.workflow_api import PACK, workflow_pictures, workflow_to_prompt
from difflora_core.demo.examples import reference_picture
from difflora_core.demo.workflows.runner import run_workflow

PATH = PACK / "workflows" / "quickstart_demo.json"


@pytest.fixture(scope="module")
def workflow():
    return json.loads(PATH.read_text("utf-8"))


def test_its_photo_is_the_example_person(workflow):
    (path,) = workflow_pictures(workflow)
    pixels = (reference_picture() * 255).round().byte().numpy()
    np.testing.assert_array_equal(np.asarray(Image.open(path).convert("RGB")), pixels)


def test_runs_twice_with_identical_pixels(comfy_server, is_shipped, workflow):
    if not is_shipped:
        pytest.skip("the shipped demo world is not trained yet (make demo-world)")
    first = run_workflow(comfy_server, PATH)
    prompt = workflow_to_prompt(workflow, comfy_server.client.object_info())
    again = comfy_server.client.run_fresh(prompt)
    assert not again.cached
    saved = [node for node, entry in prompt.items() if entry["class_type"] == "SaveImage"]
    assert len(saved) == 2
    for node in saved:
        np.testing.assert_array_equal(first.pictures[node], again.pictures[node])
        assert len(first.pictures[node]) == 4
        assert first.pictures[node][0].shape == (384, 384, 3)
    difference = np.subtract(*(first.pictures[node][0] for node in saved), dtype=int)
    assert np.abs(difference).max() > 30
