"""Merging and saving read weights: what acts while a model samples is told to be left out."""

import pytest

from tests.nodes.sampler_graphs import MODEL, apply_lora, invented_lora, node


@pytest.fixture(scope="module")
def told(comfy):
    """Lines on nodes that merge or save models with a timed LoRA, or with one in the weights."""
    nodes = {
        "demo": node("DiffLoRA_LoadDemo"),
        **invented_lora(),
        "timed": apply_lora(end_percent=0.5),
        "whole": apply_lora(),
        "cloned": node("FreeU", model=["timed", 0], b1=1.1, b2=1.2, s1=0.9, s2=0.6),
        "saved": node("ModelSave", model=["timed", 0], filename_prefix="left_out/model"),
    }
    for name in ("timed", "whole", "cloned"):
        nodes[f"merged {name}"] = node(
            "ModelMergeSimple", model1=MODEL, model2=[name, 0], ratio=0.5
        )
        nodes[f"shown {name}"] = node("PreviewAny", source=[f"merged {name}", 0])
    shown = []
    comfy.run(nodes, shown=shown)
    return [line for line in shown if isinstance(line, str)]


@pytest.mark.parametrize("node_id", ["merged timed", "merged cloned", "saved"])
def test_what_reads_weights_tells(told, node_id):
    (line,) = [line for line in told if line.startswith(f"{node_id}: ")]
    assert "is not in its weights" in line
    assert "Apply it to the model that comes out" in line


def test_a_lora_in_the_weights_is_merged_and_nothing_told(told):
    assert [line for line in told if "merged whole" in line] == []
