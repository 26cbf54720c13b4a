"""What all training nodes refuse, and what the reports of some say of the pictures."""

import pytest
import torch

from difflora_core.methods.registry import METHODS
from difflora_core.training.recipes import default_distillation


@pytest.fixture
def training_nodes(parts):
    """Every node that trains on pictures, by its id."""
    parts("nodes.model_paths").register()
    listed = {node.GET_SCHEMA().node_id: node for node in parts("nodes").NODES}
    found = {name: node for name, node in listed.items() if name.startswith("DiffLoRA_Train")}
    assert len(found) >= len(METHODS)
    return found


def filled(node, **given):
    """Inputs of a node: what is given, else its defaults."""
    schema = node.GET_SCHEMA()
    defaults = {i.id: getattr(i, "default", None) for i in schema.inputs if not i.optional}
    values = {name: given.get(name, default) for name, default in defaults.items()}
    return {name: [value] for name, value in values.items()} if schema.is_input_list else values


def test_a_model_that_draws_through_styles_is_trained_by_no_node(
    parts, demo, training_nodes, random_adaptation
):
    adapters, method_base = parts("nodes.host.adapters"), parts("difflora_core.methods.base")
    model, clip, vae = demo
    style = random_adaptation(default_distillation())(1)
    applied = method_base.AppliedAdaptation(style, style.adaptation.settings)
    styled = adapters.with_link(model, adapters.Link(applied, 0.0, 1.0, False))
    refusal = parts("difflora_core.errors").ConfigError
    given = {"clip": clip, "vae": vae, "images": torch.rand(1, 64, 64, 3)}
    for node in training_nodes.values():
        inputs = filled(node, model=styled, prompts="a photo of <my-hat>", **given)
        with pytest.raises(refusal, match="act while a sampler runs"):
            node.execute(**inputs)


def test_what_the_report_says_of_small_pictures_and_shared_prompts(parts, demo):
    request, (model, *_) = parts("nodes.host.training_request"), demo

    def notes(kind, prompts, count, side, *more):
        images = torch.rand(count, side, 2 * side, 3)
        made = parts("difflora_core.training.picture_examples").PictureExamples(
            torch.zeros(count, 4, 2, 2), [["a"]] * count, torch.ones(count, 2, 2)
        )
        asked = kind(prompts, "a", False, False, *more)
        return asked.remarks(made, request.PictureParts(model, None, None, images, None, None))

    assert notes(request.PictureRequest, "a", 2, 64) == []
    assert notes(request.PictureRequest, "a\nb\nc", 2, 64) == []
    (told,) = notes(request.PictureRequest, "a\nb", 2, 64)
    assert told.startswith("2 prompts for 2 pictures: each picture was trained with any")
    assert notes(request.HeldOutRequest, "a\nb", 2, 64, 0) == []
    (told,) = notes(request.HeldOutRequest, "a\nb\nc", 2, 64, 0)
    assert told.startswith("3 prompts for 2 pictures")
    (told,) = notes(request.PictureRequest, "a", 3, 16)
    small = "3 of 3 photos (photo 1 has 32 x 16 pixels)"
    assert told.startswith(f"Small for a model that draws 64: {small}")
    assert notes(request.TrainingRequest, "a <h1>\nb <h1>", 2, 64, "<h1>", "hat") == []


def test_pictures_for_a_model_with_comfyuis_own_configuration_are_measured_against_1024(
    parts, demo
):
    model, *_ = demo
    size, demo_config = parts("nodes.host.base").picture_size, model.model.model_config
    assert size(model) == demo_config.picture_size == 64
    sdxl = parts("nodes.host.demo").comfy.supported_models.SDXL
    model.model.model_config = sdxl(demo_config.unet_config)
    assert size(model) == 1024
