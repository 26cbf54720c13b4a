"""Every shipped workflow against real ComfyUI's own node list, and a real run of the converter."""

import json
import re

import pytest
from PIL import Image

from difflora_core.demo.comfyui.workflow_api import (
    PACK,
    WorkflowError,
    workflow_pictures,
    workflow_to_prompt,
)
from difflora_core.demo.workflows.builder import Graph
from difflora_core.demo.workflows.needs import OWN_CHECKPOINT
from difflora_core.demo.workflows.targets import DEMO, SDXL
from difflora_core.demo.workflows.writer import FULL_SIZE_ALONE, build, to_text
from difflora_core.demo.workflows.writer import WORKFLOWS as GRAPHS

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))

BROUGHT = (
    *("CheckpointLoaderSimple", "CLIPVisionLoader", "ControlNetLoader", "DiffLoRA_LoadModel"),
    *("DiffLoRA_LoadFaceAnalysis", "DiffLoRA_LoadConcept", "DiffLoRA_LoadStyle"),
    "DiffLoRA_LoadLoRAFile",
)

OWN = BROUGHT[3:4] + BROUGHT[5:]
"""Loaders of what nobody publishes, but for HyperLoRA."""


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return json.loads(request.param.read_text("utf-8"))


def test_every_graph_comes_for_both_targets_with_a_picture():
    files = {target.file(name) for target in (DEMO, SDXL) for name in GRAPHS}
    files |= {SDXL.file(name) for name in FULL_SIZE_ALONE}
    assert {path.stem for path in WORKFLOWS} == files
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert 128 <= min(picture.size) <= max(picture.size) <= 768
        assert path.with_suffix(".jpg").stat().st_size < 60_000


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, target) for name in GRAPHS for target in (DEMO, SDXL)),
        *((name, SDXL) for name in FULL_SIZE_ALONE),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_file_is_what_the_builder_writes(comfy, name, target):
    path = PACK / "workflows" / f"{target.file(name)}.json"
    written = to_text(build(name, target, comfy.object_info()))
    assert written == path.read_text("utf-8"), "python -m difflora_core.demo.workflows.writer"


def test_links_and_nodes_agree(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        accepted = nodes[target]["inputs"][slot]["type"].split(",")
        assert kind in accepted or accepted == ["*"] or accepted[0].startswith("COMFY_MATCHTYPE")
    for node in workflow["nodes"]:
        if not node["type"].endswith("Note"):
            assert node["properties"]["cnr_id"] in ("difflora", "comfy-core")
            assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])


def test_nothing_overlaps_and_groups_hold_their_nodes(workflow):
    """By the file alone; what the front end makes of it is in test_frontend.py."""
    nodes = [
        (*node["pos"], node["size"][0], 0 if node["flags"].get("collapsed") else node["size"][1],
         node["id"])
        for node in workflow["nodes"]
    ]  # fmt: skip
    groups = [(*group["bounding"], group["title"]) for group in workflow["groups"]]
    for boxes, title in ((nodes, 30), (groups, 0)):
        for k, (x, y, w, h, one) in enumerate(boxes):
            for a, b, c, d, other in boxes[k + 1 :]:
                apart = x + w <= a or a + c <= x or y + h <= b - title or b + d <= y - title
                assert apart, (one, other)
    for x, y, w, h, number in nodes:
        if workflow["nodes"][number - 1]["type"] != "MarkdownNote":
            inside = [a <= x and b <= y and x + w <= a + c and y + h <= b + d
                      for a, b, c, d, _ in groups]  # fmt: skip
            assert sum(inside) == 1, number


def test_all_of_it_is_readable_in_a_usual_window(workflow):
    """The front end fits the nodes, and 10 around them, into 3/4 of 1600 x 900; its font is 14."""
    boxes = []
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((x, y - 30, x + width, y + height * (not node["flags"].get("collapsed"))))
    left, top, right, bottom = (
        pick(side)
        for pick, side in zip((min, min, max, max), zip(*boxes, strict=True), strict=True)
    )
    zoom = 0.75 * min(1600 / (right - left + 20), 900 / (bottom - top + 20))
    assert zoom * 14 >= 8


def test_pictures_are_shown_once_and_smoothly(workflow):
    """A grid shows itself; saving it is folded. No mosaics of enlarged pixels."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    sources = {link[3]: nodes[link[1]]["type"] for link in workflow["links"]}
    for node in nodes.values():
        if node["type"] == "SaveImage" and sources[node["id"]] == "DiffLoRA_CompareGrid":
            assert node["flags"].get("collapsed")
        assert "nearest-exact" not in node["widgets_values"]


def test_what_nobody_publishes_stands_in_the_title_of_its_group(workflow):
    for node in workflow["nodes"]:
        name = str(node["widgets_values"][0]) if node["widgets_values"] else ""
        if (node["type"] not in OWN and name != OWN_CHECKPOINT) or "demo" in name:
            continue
        x, y = node["pos"]
        (title,) = [
            group["title"] for group in workflow["groups"]
            if 0 <= x - group["bounding"][0] < group["bounding"][2]
            and 0 <= y - group["bounding"][1] < group["bounding"][3]
        ]  # fmt: skip
        assert re.search(": (train|teach|bring|download) .* first$", title)


def test_a_note_for_sdxl_does_not_speak_of_the_demo(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    text = note["widgets_values"][0].lower()
    if any(node["type"] == "CheckpointLoaderSimple" for node in workflow["nodes"]):
        assert "demo" not in text
    if any(node["type"] == "DiffLoRA_TrainPerfusionConcept" for node in workflow["nodes"]):
        sdxl = any(node["type"] == "CheckpointLoaderSimple" for node in workflow["nodes"])
        assert ("about 175 kib" if sdxl else "of 4 kib") in text


def test_a_note_says_what_to_change(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    text = note["widgets_values"][0]
    assert text.startswith("## ")
    assert text.count("\n- ") >= 3
    assert "{" not in text


def test_full_size_workflows_name_their_files(workflow):
    for node in workflow["nodes"]:
        for file in node["properties"].get("models", []):
            assert file["name"] == node["widgets_values"][0]
            assert file["url"].startswith("https://")
            assert file["directory"] in ("checkpoints", "clip_vision", "controlnet")
    kinds = {node["type"] for node in workflow["nodes"]}
    assert ("DiffLoRA_LoadDemo" in kinds) != ("CheckpointLoaderSimple" in kinds)


def test_full_size_notes_begin_with_what_the_artist_must_bring(workflow):
    """Every file that a loader names, where it lies and where it comes from, and no other.

    First what nobody publishes.
    """
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    _, first, *rest = note["widgets_values"][0].split("\n")
    loaded = {
        str(node["widgets_values"][0]).split("/")[-1]
        for node in workflow["nodes"]
        if node["type"] in BROUGHT and "demo" not in str(node["widgets_values"][0])
    }
    assert first.startswith("**Bring first** `models/") == bool(loaded)
    if loaded:
        lines = [first, *rest[: rest.index("")]]
        assert len(lines) == len(loaded)
        for name in loaded:
            (line,) = [line for line in lines if f"/{name}" in line.split("`")[1]]
            assert line == first or line.startswith("- `models/")
            assert re.search(
                r"from https://|workflow \*sdxl_|that you have|has to be trained", line
            )
    own = [
        str(n["widgets_values"][0])
        for n in workflow["nodes"]
        if n["type"] in OWN or OWN_CHECKPOINT in n["widgets_values"][:1]
    ]
    if loaded and own:
        assert any(name.split("/")[-1] in first for name in own)


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("NoSuchNode", {}, "no node 'NoSuchNode'"),
        ("EmptyLatentImage", {"breadth": 64}, "no input .*breadth"),
        ("VAEDecode", {"samples": 3}, "needs a link"),
        ("VAEDecode", {"samples": "the model"}, "takes LATENT, not MODEL"),
    ],
)
def test_builder_refuses_what_comfyui_would(comfy, kind, inputs, message):
    graph = Graph("wrong", comfy.object_info(), "0.1.0")
    with graph.group("nodes"):
        demo = graph.add("DiffLoRA_LoadDemo", 0)
        given = {k: demo["MODEL"] if v == "the model" else v for k, v in inputs.items()}
        with pytest.raises(WorkflowError, match=message):
            graph.add(kind, 0, **given)
        with pytest.raises(WorkflowError, match="no output 'AUDIO'"):
            demo["AUDIO"]


def test_shipped_workflow_fits_the_node_list(comfy, workflow):
    info = comfy.object_info()
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
