"""SDXL's workflows at full size: what is covered, how graphs are made small, and the table."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import comfyui_run as measure
from benchmarks.cost import workflows
from benchmarks.cost.sdxl import files, graphs
from benchmarks.cost.workflows import Row, chosen, table
from difflora_core.comfy_client import NodeProgress
from difflora_core.demo.workflows.needs import OWN_CHECKPOINT
from difflora_core.demo.workflows.runner import read_workflow
from difflora_core.demo.workflows.writer import FOLDER

NAMES = graphs.workflow_names()
MODELS = {
    "CheckpointLoaderSimple": "models/checkpoints/{}",
    "CLIPVisionLoader": "models/clip_vision/{}",
    "ControlNetLoader": "models/controlnet/{}",
    "DiffLoRA_LoadFaceAnalysis": "models/insightface/models/{}/",
    "DiffLoRA_LoadModel": "models/difflora/{}",
    "DiffLoRA_LoadLoRAFile": "models/loras/{}",
    "PhotoMakerLoader": "models/photomaker/{}",
}
INFO = {
    "Load": {"input": {}, "output": ["MODEL", "CLIP"], "output_name": ["model", "clip"]},
    "Apply": {
        "input": {"required": {"lora": ["LORA_MODEL"], "model": ["MODEL", {}]}},
        "output": ["MODEL"],
    },
    "Two": {
        "input": {"required": {"clip": ["CLIP"], "model": ["MODEL", {}]}},
        "output": ["MODEL", "CLIP", "STRING"],
    },
    "Place": {"input": {"optional": {"hooks": ["HOOKS"]}}, "output": ["CONDITIONING"]},
    "Sampler": {"input": {"required": {"model": ["MODEL", {}]}}, "output": ["LATENT"]},
    "VAEDecode": {"input": {}, "output": ["IMAGE"]},
    "PreviewImage": {"input": {}, "output": []},
}


def nodes_of(name):
    """The types of the nodes of a workflow in API form."""
    graph = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    return {node["class_type"] for node in graph.values()}


PEOPLE = {
    kind: {"input": {}, "output": []} for kind in sorted(nodes_of("multiply_sdxl_photomaker"))
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(applied=True, hooks=True):
    """Two LoRAs after one another, and a prompt with hooks."""
    place = {"hooks": ["hook", 0]} if hooks else {}
    last = "second" if applied else "load"
    return {
        "load": node("Load"),
        "first": node("Apply", model=["load", 0], lora=["lora", 0]),
        "second": node("Apply", model=["first", 0], lora=["lora", 0]),
        "lora": node("VAEDecode"),
        "hook": node("VAEDecode"),
        "placed": node("Place", text="a person", **place),
        "plain": node("Sampler", model=["load", 0], positive=["load", 1]),
        "drawn": node("Sampler", model=[last, 0], positive=["placed", 0]),
        "plain pixels": node("VAEDecode", samples=["plain", 0]),
        "pixels": node("VAEDecode", samples=["drawn", 0]),
    }


def test_every_shipped_workflow_for_sdxl_is_run():
    shipped = {path.stem for path in FOLDER.glob("sdxl_*.json")}
    assert set(NAMES) == shipped
    assert len(NAMES) == len(shipped) > 20
    makers = {name for name, _ in graphs.MAKERS.values()}
    assert set(NAMES[: len(makers)]) == makers


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_a_workflow_loads_is_made(name):
    made = [file.place for file in files.FILES]
    for loader in read_workflow(FOLDER / f"{name}.json")["nodes"]:
        kind, values = loader["type"], loader.get("widgets_values") or [""]
        if kind in graphs.FOLDERS:
            assert str(values[0]).removesuffix(".safetensors") in graphs.MAKERS
        elif values[0] == OWN_CHECKPOINT:  # see the next test
            assert name == "sdxl_distil_checkpoint"
        elif kind in MODELS:
            place = MODELS[kind].format(values[0])
            if str(values[0]).startswith("hyper_lora/"):
                place = f"models/hyper_lora/{values[0]}/"
            assert any(path.startswith(place) for path in made), place
        else:
            assert "Loader" not in kind or kind == "LoraModelLoader", kind


def test_workflows_that_draw_people_are_run_with_files_that_are_made():
    made = [file.place for file in files.FILES]
    prompts = graphs.people_prompts(nodes_of("multiply_sdxl_photomaker"), 64)
    assert list(prompts) == ["multiply_sdxl_photomaker"]
    for prompt in prompts.values():
        assert "{" not in json.dumps([list(entry["inputs"].values()) for entry in prompt.values()])
        for entry in prompt.values():
            if entry["class_type"] == "LoadImage":
                assert (FOLDER / entry["inputs"]["image"]).exists()
            elif "Loader" in entry["class_type"]:
                name = next(iter(entry["inputs"].values()))
                assert MODELS[entry["class_type"]].format(name) in made


def test_two_samplers_after_one_another_still_share_the_steps():
    (prompt,) = graphs.people_prompts(nodes_of("multiply_sdxl_photomaker"), 64).values()
    ranges = [
        (n["inputs"]["steps"], n["inputs"]["start_at_step"], n["inputs"]["end_at_step"])
        for n in prompt.values()
        if n["class_type"] == "KSamplerAdvanced"
    ]
    assert ranges == [(2, 0, 1), (2, 1, 10000)]


def test_without_the_photo_the_words_are_those_that_photomaker_encodes():
    (prompt,) = graphs.people_prompts(nodes_of("multiply_sdxl_photomaker"), 64).values()
    plain = graphs.bypassed(prompt, PEOPLE)
    changed = {key for key in prompt if plain[key] != prompt[key]}
    (key,) = changed
    assert prompt[key]["class_type"] == "PhotoMakerEncode"
    text = "photo of a person , in a garden"
    assert plain[key]["class_type"] == "CLIPTextEncode"
    assert plain[key]["inputs"] == {"text": text, "clip": ["1", 1]}
    seen = graphs.witnessed(prompt, PEOPLE)
    previews = [n["inputs"]["images"] for n in seen.values() if n["class_type"] == "PreviewImage"]
    assert previews == [seen[graphs.WITNESS]["inputs"]["images"]]  # ComfyUI runs two alike as one


def test_a_checkpoint_of_the_artists_own_is_the_published_one_with_a_lora(monkeypatch):
    prompt = {
        "base": node("CheckpointLoaderSimple", ckpt_name="sd_xl_base_1.0.safetensors"),
        "own": node("CheckpointLoaderSimple", ckpt_name=OWN_CHECKPOINT),
        "distil": node(
            "DiffLoRA_DistilCheckpoint", teacher=["own", 0], model=["base", 0], steps=2000
        ),
    }
    monkeypatch.setattr(graphs, "workflow_to_prompt", lambda workflow, info: prompt)
    small = graphs.small_prompt("sdxl_distil_checkpoint", {})
    own = small["own"]["inputs"]
    assert small["own"]["class_type"] == "LoraLoader"  # its outputs are MODEL and CLIP too
    assert (own["model"], own["clip"], own["strength_model"]) == (["base", 0], ["base", 1], 1.0)
    assert f"models/loras/{own['lora_name']}" in [file.place for file in files.FILES]
    assert small["base"] == prompt["base"]
    assert small["distil"]["inputs"]["teacher"] == ["own", 0]
    assert small["distil"]["inputs"]["steps"] == 2


def test_without_a_style_the_router_picture_is_drawn_as_ever():
    given = node("DiffLoRA_StyleRouter", model=["first", 0], seed=3)
    prompt = {**graph(), "drawn": given}
    info = INFO | {"DiffLoRA_StyleRouter": INFO["Sampler"]}
    drawn = graphs.bypassed(prompt, info)["drawn"]
    assert drawn == node("KSampler", model=["load", 0], seed=3)
    assert given["class_type"] == "DiffLoRA_StyleRouter"


def test_sizes_keep_their_proportions():
    assert [graphs.pixels(n) for n in (832, 1216, 1024, 2 * 832, 64)] == [192, 320, 256, 384, 64]
    masks = {
        "wide": node("SolidMask", value=0.0, width=1664, height=832),
        "half": node("SolidMask", value=1.0, width=832, height=832),
        "right": node("MaskComposite", x=832, y=0, destination=["wide", 0]),
        "left": node("MaskComposite", x=0, y=0, destination=["wide", 0]),
    }
    small = {key: made["inputs"] for key, made in graphs.smaller(masks).items()}
    assert small["wide"]["width"] == 2 * small["half"]["width"] == 2 * small["right"]["x"]
    assert (small["left"]["x"], small["right"]["destination"]) == (0, ["wide", 0])
    assert masks["wide"]["inputs"]["width"] == 1664
    tiny = {key: made["inputs"] for key, made in graphs.smaller(masks, 128).items()}
    assert tiny["wide"]["width"] == 2 * tiny["half"]["width"] == 2 * tiny["right"]["x"] == 192


def test_steps_are_two_and_links_stay():
    prompt = {
        "a": node("KSampler", steps=30, cfg=5.0, seed=7, model=["x", 0]),
        "b": node("KSampler", steps=["number", 0], cfg=1.0),
        "c": node("DiffLoRA_TrainLoRA", steps=9, batch_size=1, resolution=0, memory="auto"),
        "d": node("CreateList", **{f"inputs.{k}": [str(k), 0] for k in range(4)}),
    }
    made = {key: entry["inputs"] for key, entry in graphs.smaller(prompt).items()}
    assert made["a"] == {"steps": 2, "cfg": 1, "seed": 7, "model": ["x", 0]}
    assert made["b"] == {"steps": ["number", 0], "cfg": 1}
    assert made["c"] == {"steps": 2, "batch_size": 1, "resolution": 256, "memory": "saving"}
    assert list(made["d"]) == ["inputs.0", "inputs.1"]


def test_bypassing_leads_to_the_base_model_past_every_node():
    prompt = graph()
    plain = graphs.bypassed(prompt, INFO)
    assert set(plain) == set(prompt) - {"first", "second"}
    assert plain["drawn"]["inputs"]["model"] == ["load", 0]
    assert plain["placed"]["inputs"] == {"text": "a person"}
    assert prompt["drawn"]["inputs"]["model"] == ["second", 0]


def test_bypassing_passes_each_output_the_input_of_its_type():
    prompt = {
        "load": node("Load"),
        "first": node("Two", model=["load", 0], clip=["load", 1]),
        "second": node("Two", model=["first", 0], clip=["first", 1]),
        "drawn": node("Sampler", model=["second", 0], clip=["second", 1], said=["first", 2]),
    }
    plain = graphs.bypassed(prompt, INFO)
    assert plain["drawn"]["inputs"] == {"model": ["load", 0], "clip": ["load", 1], "said": None}


@pytest.mark.parametrize(("applied", "hooks"), [(True, True), (True, False), (False, True)])
def test_the_witness_is_the_last_picture_that_something_was_applied_to(applied, hooks):
    given = graph(applied, hooks)
    given |= {"last": given["pixels"], "other": node("VAEDecode", samples=["plain", 0])}
    prompt = graphs.witnessed(given, INFO)
    assert prompt[graphs.WITNESS]["inputs"]["images"] == ["last", 0]
    cut = graphs.ancestors(graphs.bypassed(prompt, INFO), graphs.WITNESS)
    assert set(cut) == {graphs.WITNESS, "last", "drawn", "load", "placed"}


def test_without_anything_applied_there_is_no_witness():
    assert graphs.witnessed(graph(applied=False, hooks=False), INFO) is None


def test_files_that_artists_train_are_missing_until_they_are_there(tmp_path):
    prompt = {
        "a": node("DiffLoRA_LoadConcept", concept_name="my_hat.safetensors"),
        "b": node("DiffLoRA_LoadConcept", concept_name="my_cat.safetensors"),
        "c": node("DiffLoRA_LoadStyle", style_name="my_style.safetensors"),
        "d": node("DiffLoRA_LoadStyle", style_name="my_style.safetensors"),
    }
    assert graphs.missing_files(prompt, tmp_path) == ["my_hat", "my_cat", "my_style"]
    (tmp_path / "difflora_concepts").mkdir()
    (tmp_path / "difflora_concepts" / "my_hat.safetensors").touch()
    assert graphs.missing_files(prompt, tmp_path) == ["my_cat", "my_style"]


def test_random_layers_keep_the_size_of_what_they_are_given():
    shapes = {"a.weight": [300, 200], "b.weight": [50, 20, 3, 3], "norm.weight": [7]}
    shapes |= {"norm.bias": [7], "scale.logit_scale": [], "zero_convs.0.weight": [300, 200]}
    made = files.drawn(shapes, torch.float32)
    assert {name: list(value.shape) for name, value in made.items()} == shapes
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(1))
    assert 0.9 < (x @ made["a.weight"].T).std() / x.std() < 1.1
    assert made["norm.weight"].eq(1).all()
    assert made["norm.bias"].eq(0).all()
    assert torch.equal(made["zero_convs.0.weight"], 0.3 * made["a.weight"])


def test_shapes_are_those_of_the_real_sdxl(comfyui):
    """Numbers of parameters as its authors give them: 2.6 B, and 0.8 B of text encoders."""
    shapes = files.sdxl_shapes()

    def billions(file, start):
        sizes = [np.prod(s) for name, s in shapes[file].items() if name.startswith(start)]
        return sum(sizes) / 1e9

    assert billions("checkpoints", "model.diffusion_model.") == pytest.approx(2.567, abs=1e-3)
    assert billions("checkpoints", "conditioner.embedders.0") == pytest.approx(0.123, abs=1e-3)
    assert billions("checkpoints", "conditioner.embedders.1") == pytest.approx(0.695, abs=1e-3)
    assert billions("checkpoints", "first_stage_model.") == pytest.approx(0.0837, abs=1e-4)
    assert billions("clip_vision", "") == pytest.approx(0.304, abs=1e-3)
    assert billions("controlnet", "") == pytest.approx(1.251, abs=1e-3)
    assert billions("photomaker", "") == pytest.approx(0.326, abs=1e-3)
    names = ("visual_projection_2.weight", "fuse_module.mlp1.fc1.weight")
    assert [shapes["photomaker"][name] for name in names] == [[1280, 1024], [2048, 4096]]


def test_the_clock_gives_each_node_its_seconds(monkeypatch):
    times = iter([0.0, 3.0, 3.0, 10.0, 10.0, 11.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(times))
    clock = measure.NodeClock({"1": node("Load"), "2": node("Sampler"), "3": node("Load")})
    for key in ("1", "2", "2", "3"):
        clock(NodeProgress(key, "", 0, 1))
    clock.stop()
    assert clock.seconds == {"Load": 4.0, "Sampler": 7.0}


def test_the_peak_is_seen_although_it_has_passed():
    program = (
        "input(); held = bytearray(b'1') * 300_000_000; print('held', flush=True); "
        "input(); del held; print('gone', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        with measure.PeakMemory(child.pid) as memory:
            for said in ("held", "gone"):
                child.stdin.write("\n")
                child.stdin.flush()
                assert child.stdout.readline().strip() == said
                measure.time.sleep(0.5)
        assert 0.3 < memory.gigabytes < 0.5
    finally:
        child.kill()
        child.wait()


def test_difference_is_in_grey_levels():
    black = np.zeros((4, 4, 3), np.uint8)
    grey = black.copy()
    grey[:2] = 255
    assert measure.difference(black, grey) == measure.difference(grey, black) == 127.5


GOOD = Row("sdxl_a", {"KSampler": 30.4, "DiffLoRA_Personalize": 5.2}, 12.34, 19.26, True)


def test_the_table_says_what_became_of_each():
    failed = Row("sdxl_b", problem="Node 3 (X): no such file")
    lines = table([GOOD, failed, replace(GOOD, name="c", changed=None, restored=False)]).split("\n")
    assert lines[2] == "| sdxl_a | 36 | KSampler 30, Personalize 5 | 12.3 | 19.3 | yes |"
    assert lines[3] == "| sdxl_b | FAILED | Node 3 (X): no such file | – | – | – |"
    assert lines[4].endswith("| – | NO |")
    assert {line.count("|") for line in lines} == {7}


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"changed": None, "restored": None}, True),
        ({"changed": 0.0}, False),
        ({"restored": False}, False),
        ({"peak_gb": 17.3}, False),
        ({"problem": "it failed"}, False),
    ],
)
def test_a_row_is_good_when_it_ran_acted_and_left_nothing(change, good):
    assert replace(GOOD, **change).good == good


def test_names_may_lack_their_prefix():
    names = ["sdxl_blend", "sdxl_library", "Distil Checkpoint"]
    assert chosen([], names) == names
    assert chosen(["library", "Distil Checkpoint"], names) == ["sdxl_library", "Distil Checkpoint"]
    with pytest.raises(SystemExit, match="no sdxl_blnd; choose from: sdxl_blend"):
        chosen(["blnd"], names)


def test_remove_deletes_the_folder_alone(tmp_path):
    folder = tmp_path / "full-size"
    (folder / "models").mkdir(parents=True)
    (tmp_path / "other").touch()
    assert workflows.main(["--remove", "--folder", str(folder)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
