"""Files of the demo's networks are taken up whole, or refused with the file and what is wrong."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base, load_text
from difflora_core.demo.networks.clip_vision import load_clip_vision
from difflora_core.demo.networks.concept_judge import load_concept_judge
from difflora_core.demo.networks.judges import load_judge
from difflora_core.errors import CheckpointError

WEIGHTS = {
    load_base: [
        "model.diffusion_model.out.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
        "conditioner.embedders.1.transformer.text_projection.weight",
        "vocabulary",
    ],
    load_text: ["conditioner.embedders.1.transformer.text_projection.weight"],
    load_judge: ["stem.weight"],
    load_concept_judge: ["stem.weight"],
    load_clip_vision: ["visual_projection.weight"],
}
SOURCES = {
    load_base: paths.BASE,
    load_text: paths.BASE,
    load_judge: paths.PROMPT_JUDGE,
    load_concept_judge: paths.CONCEPT_JUDGE,
    load_clip_vision: paths.CLIP_VISION,
}
FACTS = {
    load_base: [("config",), ("config", "unet"), ("config", "vae")],
    load_judge: [("recipe",), ("recipe", "widths"), ("recipe", "outputs")],
    load_concept_judge: [("recipe",), ("recipe", "widths")],
    load_clip_vision: [("config",)],
}


def cases(table):
    return [(load, entry) for load, entries in table.items() for entry in entries]


def read(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def refused(load, path, why):
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + f".*{why}.*Make it again"):
        load(path)


@pytest.mark.parametrize("wrong", ["missing", "unknown", "of another shape"])
@pytest.mark.parametrize(("load", "name"), cases(WEIGHTS))
def test_tensors_must_be_those_of_the_network(load, name, wrong, tmp_path):
    tensors, facts = read(SOURCES[load])
    culprit = name
    if wrong == "missing":
        del tensors[name]
    elif wrong == "unknown":
        culprit = f"{name}.more"
        tensors[culprit] = torch.ones(1)
    else:
        tensors[name] = tensors[name].new_ones(7, 7)
    path = tmp_path / SOURCES[load].name
    save_file(tensors, path, metadata=facts)
    refused(load, path, rf"{wrong}: 1 \(for example {re.escape(culprit)}\)")


@pytest.mark.parametrize(("load", "keys"), cases(FACTS))
def test_a_fact_that_is_missing_is_named(load, keys, tmp_path):
    tensors, facts = read(SOURCES[load])
    first, *inner = keys
    document = json.loads(facts.pop(first))
    if inner:
        del document[inner[0]]
        facts[first] = json.dumps(document)
    path = tmp_path / SOURCES[load].name
    save_file(tensors, path, metadata=facts)
    refused(load, path, f"'{keys[-1]}' is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attn_implementation", "kernels-community/flash-attn"),
        ("auto_map", {"AutoModel": "somebody/code--model.Model"}),
        ("_name_or_path", "somebody/model"),
        ("trust_remote_code", True),
        ("hidden_act", "somebody/activation"),
        ("hidden_size", 60_000),
        ("num_hidden_layers", 60_000),
        ("image_size", "64"),
        ("model_type", "siglip"),
    ],
)
def test_a_clip_vision_describes_its_sizes_and_nothing_else(name, value, tmp_path):
    """Nothing that leads transformers to code, the network, or memory without end."""
    tensors, facts = read(paths.CLIP_VISION)
    facts["config"] = json.dumps({**json.loads(facts["config"]), name: value})
    path = tmp_path / "clip_vision.safetensors"
    save_file(tensors, path, metadata=facts)
    refused(load_clip_vision, path, "")
