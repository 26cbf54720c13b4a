"""The road from photos to a model: every stage on the demo base, and what is said of it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks.cost import road
from difflora_core.data.lora_store import LoRAStore
from difflora_core.data.prepared import PreparedDataset
from difflora_core.demo import paths
from difflora_core.storage.checkpoint import read_description

DEMO = road.Place("demo", paths.FACES, paths.CLIP_VISION, 64)


@pytest.mark.slow
def test_the_whole_road_on_the_demo_base(tmp_path):
    told = []
    stages = road.walk(DEMO, tmp_path, told.append)
    assert [stage.name for stage in stages] == ["prepare", "corpus", "train", "generate"]
    assert stages == told
    assert all(stage.seconds > 0 and 0.1 < stage.gigabytes < 10 for stage in stages)
    assert len(PreparedDataset(tmp_path / "dataset").people) == road.PEOPLE
    store = LoRAStore(tmp_path / "corpus")
    assert len(store) == road.PEOPLE
    assert not store.left_out
    presets = {
        "difflora-model.safetensors": "functional",
        "difflora-model-paper.safetensors": "paper",
    }
    for name, preset in presets.items():
        assert read_description(tmp_path / "run" / name).config.preset == preset
    lora = load_file(tmp_path / "person.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in lora.values())
    with safe_open(tmp_path / "person.safetensors", "pt") as file:
        assert file.metadata()["difflora.base"] == "demo"
    again = road.walk(DEMO, tmp_path, told.append)  # what is done is not done again
    assert again[2].seconds < stages[2].seconds + 5


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(road.StageFailed, match="corpus failed with 1: corpus: There is neither"):
        road.measured("corpus", ["corpus", str(tmp_path), str(tmp_path / "x")], tmp_path / "log")


def test_the_graph_loads_the_exported_model():
    prompt = {
        "1": {"class_type": "DiffLoRA_LoadModel", "inputs": {"model_name": "a", "other": 1}},
        "2": {"class_type": "Other", "inputs": {"model_name": "a"}},
    }
    found = road.with_model(prompt, "b")
    assert found["1"]["inputs"] == {"model_name": "b", "other": 1}
    assert found["2"] == prompt["2"]
    assert prompt["1"]["inputs"]["model_name"] == "a"


def test_the_table():
    stages = [road.Stage("prepare", 90.0, 1.25), road.Stage("train", 600.0, 19.0)]
    assert road.totals(stages) == (11.5, 19.0)
    assert "| train | 600 | 19.0 |" in road.table(stages)
    assert road.line(stages[0]) == "prepare: 90 s, 1.2 GB"
