"""A word is read at the layer of the text encoders that it was learned at, or that is told.

So are two CLIPs by mistake: one that was taught the word, and another one that reads the prompt.
"""

import numpy as np
import pytest

from difflora_core.comfy_client import ComfyPromptError
from tests.nodes.sampler_graphs import CLIP, MODEL, cfg, guided, node, sampling_nodes

HAT, CAT = "<demo-hat>", "<demo-cat>"
USUAL = -2  # SDXL's layer


def loaded(name="demo_hat", clip=CLIP):
    return node("DiffLoRA_LoadConcept", concept_name=f"{name}.safetensors", clip=list(clip))


def on(concept, model=MODEL):
    settings = {
        "bias": 0.3, "temperature": 0.15, "strength": 1.0, "lock": "local", "start_percent": 0.0,
        "end_percent": 1.0, "combine": "approximate", "reach": -1,
    }  # fmt: skip
    return node("DiffLoRA_ApplyConcept", model=model, concept=[concept, 0], **settings)


def skipped(layer, clip=CLIP):
    return node("CLIPSetLastLayer", clip=list(clip), stop_at_clip_layer=layer)


@pytest.fixture
def draw(comfy, is_shipped):
    """Draws with CLIPs: name to the CLIP that reads the prompt; gives pictures and what is told."""
    if not is_shipped:
        pytest.skip("the demo world is not complete")

    def run(nodes, clips, text=f"photo of a person, wearing a {HAT}"):
        graph = {
            "demo": node("DiffLoRA_LoadDemo"),
            "none": node("CLIPTextEncode", clip=CLIP, text=""),
            "on": on("hat"),
            **nodes,
            **sampling_nodes(),
        }
        for name, (model, clip) in clips.items():
            graph[f"{name} words"] = node("CLIPTextEncode", clip=list(clip), text=text)
            graph |= guided(name, cfg(list(model), [f"{name} words", 0]))
        said: list[object] = []
        pictures = comfy.run(graph, shown=said).pictures
        return pictures, [line for line in said if isinstance(line, str)]

    return run


def test_the_usual_layer_by_name_changes_nothing(draw):
    """-2 is what SDXL reads: before Load Concept, after it, and without it."""
    nodes = {
        "hat": loaded(), "skip": skipped(USUAL), "late": skipped(USUAL, ("hat", 1)),
        "skipped hat": loaded(clip=("skip", 0)), "on it": on("skipped hat"),
    }  # fmt: skip
    plain, taught, model = ("hat", 1), ("skipped hat", 1), ("on", 0)
    ways = {
        "plain": (model, plain),
        "after": (model, ("late", 0)),
        "before": (("on it", 0), taught),
    }
    shown, told = draw(nodes, ways)
    for name in ("after", "before"):
        np.testing.assert_array_equal(shown[name], shown["plain"])
    assert told == []


def test_another_layer_after_the_word_was_loaded_is_told(draw):
    nodes = {"hat": loaded(), "late": skipped(-1, ("hat", 1))}
    _, told = draw(nodes, {"after": (("on", 0), ("late", 0))})
    assert len(told) == 1
    assert told[0].startswith("after words: CLIP Set Last Layer stands between Load Concept and")
    _, told = draw(nodes, {"plain word": (("on", 0), ("late", 0))}, "photo of a person, hat")
    assert not [line for line in told if "Last Layer" in line]


def test_another_layer_before_it_is_refused_with_the_right_one(draw):
    nodes = {"skip": skipped(-1), "hat": loaded(clip=("skip", 0))}
    with pytest.raises(ComfyPromptError, match="Set CLIP Set Last Layer to -2 before") as caught:
        draw(nodes, {"p": (("on", 0), ("hat", 1))})
    assert caught.value.node_id == "hat"


def test_a_word_learned_at_another_layer(parts, demo):
    """It loads at that layer, and else the message names it."""
    text, errors = parts("nodes.host.text"), parts("difflora_core.errors")
    probe_of = parts("difflora_core.text.encoders").text_probe
    _, clip, _ = demo
    last = clip.clone()
    last.clip_layer(-1)
    probe = probe_of(text.ComfyText(last))
    text.check_made_with("Concept <w>", probe, last)
    with pytest.raises(errors.ConfigError, match="Set CLIP Set Last Layer to -1 before"):
        text.check_made_with("Concept <w>", probe, clip)
    with pytest.raises(errors.ConfigError, match="with other text encoders"):
        text.check_made_with("Concept <w>", probe.flip(0), clip)


def test_a_prompt_of_the_other_clip_is_told(draw):
    """Read by the base's CLIP, or by one of two that were taught a word each."""
    nodes = {"hat": loaded(), "cat": loaded("demo_cat"), "both": on("cat", ["on", 0])}
    clips = {"base": (MODEL, CLIP), "ours": (("on", 0), CLIP)}
    shown, told = draw(nodes, clips)
    np.testing.assert_array_equal(shown["ours"], shown["base"])
    assert [line for line in told if line.startswith(f"on: The word {HAT} stands in no prompt")]
    text = f"photo of a person, wearing a {HAT}, with a {CAT}"
    _, told = draw(nodes, {"two": (("both", 0), ("hat", 1))}, text)
    assert [line for line in told if line.startswith(f"both: The word {CAT} stands in no prompt")]
    assert not [line for line in told if line.startswith("on:")]


def test_a_clip_of_another_base_is_refused(draw):
    """One of other weights: core's merging nodes make it of the demo's own."""
    other = node("CLIPMergeSubtract", clip1=CLIP, clip2=CLIP, multiplier=0.3)
    nodes = {"other": other, "hat": loaded(clip=("other", 0))}
    with pytest.raises(ComfyPromptError, match="was made with other text encoders") as caught:
        draw(nodes, {"p": (("on", 0), ("hat", 1))})
    assert caught.value.node_id == "hat"
