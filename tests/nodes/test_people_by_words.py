"""Two people in one picture without masks, by the words of the prompt that name them."""

import re
from importlib import import_module

import pytest
import torch

from difflora_core.comfy_client import ComfyPromptError
from tests.nodes.placed import placed
from tests.nodes.sampler_graphs import (
    CLIP,
    MODEL,
    ROUNDING,
    cfg,
    difference,
    guided,
    invented_lora,
    node,
    sampling_nodes,
)

TEXT = "photo of two people, blue background, red shirt, green shirt"
FIRST, SECOND = "red shirt", "green shirt"


def people(first=FIRST, second=SECOND, text=TEXT, strength=1.0):
    """Nodes of two invented people by words, and of a prompt that names them."""
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        **invented_lora(),
        **invented_lora(4),
        **sampling_nodes(),
        "empty": node("EmptyLatentImage", width=128, height=64, batch_size=1),
        "place0": placed(MODEL, CLIP, "lora", first, strength),
        "place1": placed(["place0", 0], ["place0", 1], "lora4", second, strength),
        "words": node("CLIPTextEncode", clip=["place1", 1], text=text),
        "none": node("CLIPTextEncode", clip=CLIP, text=""),
    }


def said(comfy, nodes, name="out"):
    """What stands on nodes after a run, by node, and the pictures."""
    texts = []
    result = comfy.run(nodes, shown=texts)
    lines = [t for t in texts if isinstance(t, str) and t.startswith("place")]
    return dict(line.split(": ", 1) for line in lines), result.pictures[name]


@pytest.fixture(scope="module")
def shipped(is_shipped):
    if not is_shipped:
        pytest.skip("the demo world is not complete")


def test_words_say_who_stands_where(comfy, shipped):
    nodes = people() | guided("out", cfg(["place1", 0], ["words", 0]))
    told, drawn = said(comfy, nodes)
    shares = []
    for place, (words, side) in {"place0": (FIRST, "left"), "place1": (SECOND, "right")}.items():
        line = re.fullmatch(rf"{words}: (\d+)% of the picture, {side}\.", told[place])
        assert line, told
        shares.append(int(line[1]))
    assert sum(shares) == 100
    assert min(shares) > 35
    nodes = people(SECOND, FIRST) | guided("out", cfg(["place1", 0], ["words", 0]))
    told, swapped = said(comfy, nodes)
    assert re.fullmatch(r"green shirt: \d+% of the picture, right\.", told["place0"])
    assert difference(drawn, swapped) > 30


def test_without_a_step_after_finding_them_nobody_is_placed_and_told(comfy, shipped):
    """As a model of one step draws."""
    nodes = people() | guided("out", cfg(["place1", 0], ["words", 0]))
    nodes["steps"]["inputs"]["steps"] = 1
    told, drawn = said(comfy, nodes)
    assert told["place0"].startswith("red shirt: no step was left after people were found")
    nodes["out_guider"]["inputs"]["model"] = MODEL
    assert difference(drawn, said(comfy, nodes)[1]) == 0


def test_in_another_case_with_weights_and_in_any_order(comfy, shipped):
    """Tokens are compared, so what CLIP reads alike is alike; so is the order of the nodes."""
    nodes = people("Red Shirt", " green shirt ") | guided("out", cfg(["place1", 0], ["words", 0]))
    nodes["place0"]["inputs"] |= {"lora": ["lora4", 0], "words": "green  shirt"}
    nodes["place1"]["inputs"] |= {"lora": ["lora", 0], "words": "Red Shirt"}
    plain = people() | guided("out", cfg(["place1", 0], ["words", 0]))
    assert difference(said(comfy, nodes)[1], said(comfy, plain)[1]) <= ROUNDING
    weighted = people(text=TEXT.replace(SECOND, f"({SECOND}:1.1)"))
    told, _ = said(comfy, weighted | guided("out", cfg(["place1", 0], ["words", 0])))
    assert told["place1"].endswith("right.")


def test_without_strength_it_is_the_base(comfy, shipped):
    nodes = people(strength=0.0) | guided("out", cfg(["place1", 0], ["words", 0]))
    nodes |= guided("base", cfg(MODEL, ["words", 0]))
    shown = comfy.run(nodes).pictures
    assert difference(shown["out"], shown["base"]) == 0


def test_a_picture_that_is_drawn_again(comfy, shipped):
    """Also where sampling starts behind the share of the steps in which people are found."""
    nodes = people() | guided("first", cfg(MODEL, ["words", 0]))
    nodes["few"] = node("BasicScheduler", model=MODEL, scheduler="normal", steps=3, denoise=0.5)
    nodes |= guided("out", cfg(["place1", 0], ["words", 0]))
    nodes["out_latent"]["inputs"] |= {"latent_image": ["first_latent", 0], "sigmas": ["few", 0]}
    told, _ = said(comfy, nodes)
    assert told["place0"].endswith("left.")
    assert told["place1"].endswith("right.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": "blue hat"}, "The words blue hat stand in no positive prompt.*just so"),
        ({"first": " "}, "There are no words. Write those of your prompt"),
        ({"first": SECOND}, "Two people are placed by the same words, green shirt"),
    ],
)
def test_words_that_name_nobody(comfy, shipped, changes, message):
    nodes = people(**changes) | guided("out", cfg(["place1", 0], ["words", 0]))
    with pytest.raises(ComfyPromptError, match=message):
        comfy.run(nodes)


def test_what_cannot_be_placed_is_refused(comfy, shipped):
    alone = people() | guided("out", cfg(["place0", 0], ["words", 0]))
    with pytest.raises(ComfyPromptError, match=r"one person to place by words .red shirt."):
        comfy.run(alone)
    unmarked = people() | guided("out", cfg(["place1", 0], ["words", 0]))
    unmarked["words"]["inputs"]["clip"] = CLIP
    with pytest.raises(ComfyPromptError, match="the CLIP of the last Place LoRA by Words"):
        comfy.run(unmarked)
    area = people() | guided("out", cfg(["place1", 0], ["part", 0]))
    area["part"] = node(
        "ConditioningSetAreaPercentage", conditioning=["words", 0], width=0.5, height=1.0, x=0.0,
        y=0.0, strength=1.0,
    )  # fmt: skip
    with pytest.raises(ComfyPromptError, match="people cannot be found by their words"):
        comfy.run(area)


def test_words_that_several_share_tell_nobody_apart(pack):
    regions = import_module(".nodes.host.regions", pack.__name__)
    far = torch.inf
    where = torch.tensor([[[0.0, 0.0], [0.0, far], [0.0, 0.0], [far, 0.0], [far, far]]])
    assert regions.own_tokens(where)[0].tolist() == [[0, 0], [1, 0], [0, 0], [0, 1], [0, 0]]
    inside = torch.tensor([[[0.0, 0.0], [0.0, far]]])  # "man" inside "man in red"
    assert regions.own_tokens(inside)[0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ([1, 7, 8, 2, 7, 8], [0, 1, 1, 0, 1, 1]),
        ([7, 7, 8, 7], [0, 1, 1, 0]),
        ([8, 7], [0, 0]),
        ([7], [0]),
        ([torch.tensor([7.0]), 8], [0, 0]),
    ],
)
def test_where_a_phrase_stands(pack, section, wanted):
    words = import_module(".nodes.host.words", pack.__name__)
    found = words.Phrase((7, 8)).since(section)
    assert [distance == 0 for distance in found] == [bool(k) for k in wanted]


def test_every_picture_of_a_batch_has_its_own_regions(pack):
    regions = import_module(".nodes.host.regions", pack.__name__)
    finder = regions.RegionFinder(["a", "b"])
    finder.begin((2, 4, 4, 8))
    left = torch.zeros(4, 8)
    left[:, :3] = 1
    one, other = torch.stack([left, left.flip(1)]), torch.stack([left.flip(1), left])
    finder._maps = torch.stack([one, other])
    first, second = finder.regions(torch.zeros(4, 4, 4, 8))
    assert first.mask[0, 0, 0] == second.mask[0, 0, -1] == 1
    assert first.mask[1, 0, 0] == second.mask[1, 0, -1] == 0
    assert finder.described(0) == "a: 50% of the picture, left."
    finder.end()
    assert finder.looking
