"""What comes over links into widgets: ComfyUI lets every value through that is not typed there."""

import math
from importlib import import_module

import pytest
import torch
from comfy_api.latest import io

from difflora_core.comfy_client import ComfyPromptError


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(scope="module")
def values(pack, node_module):
    return node_module("host.widget_values")


@pytest.fixture(scope="module")
def widgets(pack):
    """(node, widget) of everything that an artist can set."""
    nodes = import_module(".nodes", pack.__name__).NODES
    return [(node, widget) for node in nodes for widget in node.define_schema().inputs]


def refused(values, widget, value, files=()):
    with pytest.raises(Exception, match=f"^{widget.id} is ") as caught:
        values.fitting(widget, value, files)
    assert type(caught.value).__name__ == "ConfigError"


def test_every_number_has_a_range_and_keeps_it(values, widgets):
    numbers = [w for _, w in widgets if isinstance(w, (io.Int.Input, io.Float.Input))]
    assert len(numbers) > 100
    for widget in numbers:
        for wrong in (math.nan, math.inf, -math.inf, None, "1", [1], torch.ones(2), 10**400):
            refused(values, widget, wrong)
        step = 1 if isinstance(widget, io.Int.Input) else 1e-3
        refused(values, widget, widget.min - step)
        refused(values, widget, widget.max + max(step, widget.max * 1e-3))
        for right in (widget.min, widget.max, widget.default):
            assert values.fitting(widget, right) == right
        low = values.fitting(widget, torch.tensor(float(widget.min)))
        assert type(low) is (int if isinstance(widget, io.Int.Input) else float)
    halves = [w for w in numbers if isinstance(w, io.Int.Input) and w.max > w.min + 1]
    for widget in halves:
        refused(values, widget, widget.min + 0.5)


def test_texts_and_choices(values, widgets):
    """A list of files stays the node's own affair: it says where a missing one belongs."""
    for _, widget in widgets:
        if isinstance(widget, io.String.Input):
            refused(values, widget, 5)
            refused(values, widget, "half a character: \ud800")
            assert values.fitting(widget, "\U0001f600 ü") == "\U0001f600 ü"
        if isinstance(widget, io.Combo.Input):
            refused(values, widget, None)
            refused(values, widget, "nonsense")
            assert values.fitting(widget, widget.options[0]) == widget.options[0]
            assert values.fitting(widget, "nonsense", {widget.id}) == "nonsense"
        if isinstance(widget, (io.Model.Input, io.Image.Input)):
            assert values.fitting(widget, values) is values
            if not widget.optional:
                refused(values, widget, None)


GRAPHS = {
    "a picture no pixel high": (
        "PrimitiveInt", 0, {"variants": ["picture", 0], "labels": "", "columns": 1}, "side",
        "side is 0, but has to be a whole number from 32 to 2048",
    ),
    "no column": (
        "PrimitiveInt", 0, {"variants": ["picture", 0], "labels": "", "side": 64}, "columns",
        "columns is 0, but has to be a whole number from 1 to 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_a_linked_number_is_refused_on_the_node(comfy, case):
    kind, value, others, name, sentence = GRAPHS[case]
    nodes = {
        "picture": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "number": node(kind, value=value),
        "it": node("DiffLoRA_CompareGrid", **others, **{name: ["number", 0]}),
    }
    with pytest.raises(ComfyPromptError, match=sentence) as caught:
        comfy.run(nodes)
    assert caught.value.node_id == "it"


def test_photos_in_lists(comfy, face):
    """A node that takes lists has a list of every widget."""
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        "photo": node("LoadImage", image=face),
        "number": node("PrimitiveInt", value=-3),
        "it": node(
            "DiffLoRA_TrainLoRA", model=["demo", 0], clip=["demo", 1], vae=["demo", 2],
            images=["photo", 0], captions="photo of a person", trigger="", steps=["number", 0],
            rank=2, learning_rate=1e-4, batch_size=1, seed=0, file_name="never",
            layers="attention", factors="both", schedule="cosine", loss="min_snr",
            even_steps=False, resolution=64, mirror=True, held_out=0, prior_weight=1.0,
            prior_prompt="photo of a person", on_missing_face="skip", face_order="largest",
            face_index=0, accumulate=1, memory="auto",
        ),
        "show": node("PreviewAny", source=["it", 1]),
    }  # fmt: skip
    with pytest.raises(ComfyPromptError, match="steps is -3, but has to be a whole number") as told:
        comfy.run(nodes)
    assert told.value.node_id == "it"


def test_a_link_that_the_node_does_not_know_is_told(comfy):
    """As in a workflow of another version."""
    nodes = {
        "picture": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "it": node(
            "DiffLoRA_CompareGrid", variants=["picture", 0], labels="", columns=1, side=64,
            former=["picture", 0], later=5,
        ),
    }  # fmt: skip
    shown = []
    result = comfy.run(nodes, shown=shown)
    assert result.pictures["it"]
    assert "it: This node has no input former; what is connected there does nothing." in shown
