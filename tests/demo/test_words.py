"""The base that reads word by word: how it learns, and what the shipped one looks at."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from difflora_core.base_model.protocol import TextCondition
from difflora_core.demo import paths
from difflora_core.demo.build import words
from difflora_core.demo.build.concept_training import TRAINING, wordings
from difflora_core.demo.networks.base import BaseObjective, load_base, load_text, new_base
from difflora_core.demo.networks.text import END, tokenize, word_numbers
from difflora_core.demo.world.concepts import KNOWN
from difflora_core.demo.world.pool import PicturePool
from difflora_core.demo.world.scenes import random_scenes, render_portraits, render_things
from difflora_core.demo.world.things import TAUGHT_DISTANCE, draw_things, random_looks
from difflora_core.diffusion.objective import abar_at, add_noise
from difflora_core.storage.adapter_file import read_adaptation
from difflora_core.training.perfusion import PerfusionObjective

CAPTIONS = ["photo of a person wearing a red hat, with a cat", "cartoon of a person", "a cat", ""]


def test_shipped_words_are_of_the_recipe_that_the_build_names():
    shipped = [read_adaptation(path) for path in paths.CONCEPTS.glob("*.safetensors")]
    assert shipped
    assert {one.method for one in shipped} == {PerfusionObjective.name}
    assert {one.facts["steps"] for one in shipped} == {TRAINING.steps}


def test_what_the_words_do_not_say_is_hidden():
    """Word by word against a loop: the n-th token after the end is that of the row before; where
    colours are hidden, their places show the start mark; a look is at its own thing's word."""
    unet, text = new_base(1)
    objective = words.WordsObjective(unet, text)
    first, second = tokenize(CAPTIONS)
    captioned = torch.tensor([[True], [True], [True], [False]])
    with torch.no_grad():
        hidden = torch.tensor([[True], [True], [False], [True]])
        looks = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(3))
        batch = {"tokens_l": first, "tokens_g": second, "captioned": captioned, "hidden": hidden}
        batch["looks"] = looks
        made = objective.condition(batch)
        own = BaseObjective(unet, text).condition(batch)
    red, hat, cat = word_numbers("red hat cat")
    ends = [row.index(END) for row in first.tolist()]
    for row, end in enumerate(ends):
        other = row - 1
        for k in range(77):
            source = own.context[row, k]
            said = int(first[row, k])
            if hidden[row] and said == red:
                source = own.context[row, 0]
            if said in (hat, cat):
                second_thing = row == 0 and said == cat
                source = source + objective.names(looks[row, int(second_thing)])
            if k >= end and captioned[row]:
                source = own.context[other, min(76, max(0, ends[other] + k - end))]
            torch.testing.assert_close(made.context[row, k], source)
    assert torch.equal(made.pooled, own.pooled)


def test_batches_mix_portraits_and_named_things():
    """Empty captions tell and name nothing; looks are named only where colours are hidden."""
    generator = torch.Generator().manual_seed(4)
    scenes = random_scenes(torch.rand(6, 8, generator=generator))
    captions = [replace(s, item="none").caption() for s in scenes]
    empty = torch.zeros(0)
    pool = PicturePool(empty, empty, captions, scenes, empty, empty)
    pairs = [f"{c}, wearing a hat, with a cat" for c in captions]
    masks, paint = torch.rand(6, 16, 16, generator=generator), torch.rand(6, 2, 6)
    shown = torch.arange(6.0)[:, None, None, None].expand(6, 8, 16, 16)
    things = words.ThingLatents(shown + 10, masks, paint, pairs)
    batch = words.word_batches((shown, pool), things, 400, 1000)(generator)
    which, of_things = batch["latents"][:, 0, 0, 0] % 10, batch["latents"][:, 0, 0, 0] >= 10
    assert of_things.float().mean() == pytest.approx(words.PAIR_SHARE)
    assert 0.05 < (~batch["captioned"]).float().mean() < 0.15
    for row, number in enumerate(which.long().tolist()):
        said = (pairs if of_things[row] else captions)[number] if batch["captioned"][row] else ""
        assert torch.equal(batch["tokens_l"][row], tokenize([said])[0][0])
        weight = 1 + words.THING_WEIGHT * masks[number] if of_things[row] else torch.ones(16, 16)
        torch.testing.assert_close(batch["weights"][row, 0], weight)
        named = batch["looks"][row].abs().sum() > 0
        if named:
            assert of_things[row]
            assert batch["captioned"][row]
            assert batch["hidden"][row]
            torch.testing.assert_close(batch["looks"][row], 2 * paint[number] - 1)
    share = (batch["looks"].abs().sum((1, 2)) > 0)[of_things].float().mean()
    assert share == pytest.approx(0.9 * words.HIDDEN_SHARE * words.NAMED_SHARE, abs=0.08)


def test_trains_attention_text_layers_and_the_finest_level_alone():
    unet, text = new_base(1)
    objective = words.WordsObjective(unet, text)
    trained = {n for n, p in objective.named_parameters() if p.requires_grad}
    left = {n for n, p in objective.named_parameters() if not p.requires_grad}
    blocks = (unet.conv_in, unet.conv_out, unet.down_blocks[0], unet.up_blocks[1])
    finest = {id(p) for block in blocks for p in block.parameters()}
    finest |= {id(p) for p in unet.conv_norm_out.parameters()}
    for name, parameter in objective.unet.named_parameters():
        assert parameter.requires_grad == ("attn" in name or id(parameter) in finest)
    assert all(n.startswith(("text.", "names.", "unet.")) for n in trained)
    assert any("text" in n for n in trained)
    assert any("token_embedding" in n for n in left)


@pytest.mark.parametrize("kind", ["hat", "cup", "cat", "flower"])
def test_shipped_base_draws_what_the_words_say(kind):
    """From "red hat" to "blue hat": the words change the picture, the end mark does not."""
    words_share, rest_share = _shares(load_base(paths.BASE), load_text(paths.BASE), kind)
    assert words_share > 0.85
    assert abs(rest_share) < 0.1


@torch.no_grad()
def _shares(base, text, kind):
    """Share of the change in the thing's place that the words, and what follows them, make."""
    generator = torch.Generator().manual_seed(5)
    plain = random_scenes(torch.rand(8, 8, generator=generator))
    scenes = [replace(s, item=kind, item_colour="red") for s in plain]
    images, masks = render_things(range(120_000, 120_008), range(8), [(scenes, None)])
    masks = F.interpolate(masks[:, None], (16, 16), mode="area")
    clean = base.encode_images(images)
    when = torch.full((8,), 600)
    abar = abar_at(base.alphas_cumprod, when, clean)
    noisy = add_noise(clean, torch.randn(clean.shape, generator=generator), abar)
    captions = [scene.caption() for scene in scenes]
    red = text.encode_prompts(captions)
    blue = text.encode_prompts([replace(s, item_colour="blue").caption() for s in scenes])
    end = (tokenize(captions)[0] == END).long().argmax(1)[:, None]
    after = (torch.arange(77)[None] >= end)[..., None]

    def drawn(context):
        return base.predict(noisy, when, TextCondition(context, red.pooled)) * masks

    start = drawn(red.context)
    whole = drawn(blue.context) - start
    parts = [torch.where(m, blue.context, red.context) for m in (~after, after)]
    return [float(((drawn(c) - start) * whole).sum() / whole.square().sum()) for c in parts]


def test_looks_keep_away_from_what_is_taught():
    """No random look, and no plain one, has both colours near a concept's."""
    looks = random_looks(600, torch.Generator().manual_seed(1))
    for concept in KNOWN:
        own = torch.tensor([concept.main, concept.accent])
        apart = (looks.paint - own).norm(dim=-1).amax(-1)
        unnamed = torch.tensor([not said for said in looks.said])
        assert apart[unnamed].min() >= TAUGHT_DISTANCE - 1e-6
        assert apart.min() > 0.15
    lengths = {len(said.split()) for said in looks.said}
    assert lengths == {0, 1, 3}


def test_things_are_drawn_and_told():
    """Where a thing is drawn its colour stands, and the caption names it in the same order."""
    kinds = [["hat"] * 4, ["cat", "cat", "cup", "none"]]
    pictures = draw_things(range(4), range(4), kinds, torch.Generator().manual_seed(2))
    paint = pictures.paint
    bare = render_portraits(range(4), range(4), [replace(s, item="none") for s in pictures.scenes])
    for row, caption in enumerate(pictures.captions):
        second = kinds[1][row]
        assert second == "none" or caption.index("hat") < caption.index(second)
        near = (pictures.images[row] - paint[row, 0, 0]).norm(dim=-1) < 0.15
        assert near.sum() > (bare.images[row] - paint[row, 0, 0]).norm(dim=-1).lt(0.15).sum()
    assert "cat" not in pictures.captions[3]
    assert "cup" not in pictures.captions[3]


def test_a_concept_is_told_in_many_places_and_shorter():
    """Nothing is said that the picture's own prompt does not say, nor twice."""
    prompt = "photo of a person, sad, red shirt, wearing a <x>"
    first, *rest = prompt.split(", ")
    said = [wording.split(", ") for wording in wordings(prompt)]
    assert said[0] == [first, *rest]
    assert len({tuple(phrases) for phrases in said}) == len(said) == 3 + 2
    for head, *phrases in said:
        assert head == first
        assert "wearing a <x>" in phrases
        assert set(phrases) <= set(rest)
        assert len(set(phrases)) == len(phrases)
        assert len(phrases) == 3 or phrases[-1] == "wearing a <x>"
    assert {phrases.index("wearing a <x>") for phrases in said} == {1, 2, 3}
